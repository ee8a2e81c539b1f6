"""What a fan-out asks for: the values of child rows, wherever their spans have been meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from spillway.change import make_key
from spillway.chunk import WHOLE, Batch, ChunkBuilder, Keying, Piece, Span
from spillway.clock import SystemClock
from spillway.config.shape import Related
from spillway.config.values import TableName
from spillway.flow.budget import Budget
from spillway.flow.fanout import FanOut
from spillway.impl import gather
from spillway.source.parents import Parents
from spillway.store.base import AskedRefreshes

CHILD, PARENT = TableName("public", "child"), TableName("public", "parent")
RELATED = Related(table=CHILD, columns=("parent_id",), sql="SELECT unnest($1) AS id", refreshes=PARENT)


def a_span(parent: str, *, stored: bool) -> Span:
    """Of a companion whose group is the second of two; what was in the store has that group alone."""
    builder = ChunkBuilder(2)
    keys = [make_key(*CHILD, (value,)).encode() for value in ("1", "of another sink", parent)]
    texts = [text for key in keys for text in (key, b"")]
    now = int(SystemClock().wall() * 1_000_000)
    builder.add(CHILD, 0, 1000, 0, now, b'{"record":{}}', 2, texts, flags=WHOLE, xid=7)
    chunk = builder.take()
    if not stored:
        return Span(chunk, Keying.GROUPED + 1)
    return Span(gather(chunk, [0], Keying.hash_word(Keying.GROUPED + 1)), Keying.GROUPED, base=1 << 16)


@pytest.mark.parametrize("order", [(True,), (False,), (True, False), (False, True)])
def test_what_was_in_the_store_and_what_comes_are_asked_for_alike(order: tuple[bool, ...]) -> None:
    nobody = cast(Callable[[AskedRefreshes], Awaitable[None]], None)
    asked = FanOut([RELATED], cast(Parents, None), Budget(1 << 20, 1).pages, nobody, SystemClock())
    pieces: list[Piece] = [(a_span(f"{222 if stored else 111}", stored=stored), 0, 1) for stored in order]
    wanted, emptied, seen = asked._read(Batch(pieces))
    assert sorted(values for _, many in wanted for values in many) == sorted(
        ("222",) if stored else ("111",) for stored in order
    )
    assert not emptied
    assert set(seen.xids) == {7}


def test_values_of_other_columns_say_nothing_of_rows() -> None:
    """What was kept while the entry named another column; that of the primary key is as it was."""
    nobody = cast(Callable[[AskedRefreshes], Awaitable[None]], None)
    by_key = Related(table=CHILD, sql="SELECT unnest($1) AS id", refreshes=TableName("public", "other"))
    for below, expected in ((1000, []), (999, [("111",)])):
        asked = FanOut(
            [RELATED, by_key], cast(Parents, None), Budget(1 << 20, 1).pages, nobody, SystemClock(), {CHILD: below}
        )
        wanted, emptied, seen = asked._read(Batch([(a_span("111", stored=True), 0, 1)]))
        assert [many for entry, many in wanted if entry is RELATED] == [expected] * len(expected)
        assert [many for entry, many in wanted if entry is by_key] == [[("1",)]]
        assert emptied == ([] if expected else [PARENT])
        assert set(seen.xids) == {7}

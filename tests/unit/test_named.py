"""Keys of named rows: kept once, in blocks that are small, and found again by nobody but their backfill."""

from __future__ import annotations

import hypothesis.strategies as st
import orjson
from hypothesis import given, settings

from spillway.flow.named import BLOCK_BYTES, BLOCK_KEYS, NamedKeys, is_block, key_bytes, without_backfill
from spillway.store.base import BackfillDocument

keys = st.lists(st.lists(st.text(max_size=9), min_size=1, max_size=3).map(tuple), max_size=30)


class Kept:
    """What a store keeps, and a delivery that writes into it."""

    name = "sink"

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}

    async def note(self, document: BackfillDocument) -> None:
        self.documents[document.id] = document.document
        if document.forgotten:
            del self.documents[document.id]

    def backfills(self, sink: str, *, ended: bool) -> list[tuple[str, bytes]]:
        assert (sink, ended) == ("sink", False)
        return list(self.documents.items())


def named(kept: Kept, backfill_id: str = "b") -> NamedKeys:
    return NamedKeys(kept, kept, backfill_id)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(keys, st.integers(1, 40))
async def test_each_key_is_kept_once_in_its_order(given: list[tuple[str, ...]], repeat: int) -> None:
    kept = Kept()
    mine = named(kept)
    found = await mine.keep(given * repeat)
    once = list(dict.fromkeys(given))
    assert [key for number in range(found.blocks) for key in await mine.block(number)] == once
    assert (found.rows, found.size_bytes) == (len(once), sum(map(key_bytes, once)))
    await mine.drop(range(found.blocks))
    assert not kept.documents


async def test_blocks_are_small_whatever_the_keys() -> None:
    for width, count in ((1, 3 * BLOCK_KEYS), (100, 2000), (BLOCK_BYTES, 3)):
        kept = Kept()
        found = await named(kept).keep((f"{n:0{width}}",) for n in range(count))
        blocks = [orjson.loads(document) for document in kept.documents.values()]
        assert len(blocks) == found.blocks
        for block in blocks:
            assert len(block) <= BLOCK_KEYS
            assert len(block) == 1 or sum(key_bytes(key) for key in block) <= BLOCK_BYTES


async def test_what_has_no_backfill_is_told() -> None:
    kept = Kept()
    await named(kept, "gone").keep([("1",)])
    await named(kept, "here").keep([("1",)])
    await kept.note(BackfillDocument("here", b"{}", ended=False))
    lost = without_backfill(kept.documents, ["here"])
    assert len(lost) == 1
    assert is_block(lost[0])
    assert not is_block("gone")
    assert not is_block("here")

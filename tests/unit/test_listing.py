"""Pages of what waits: what is held by key, then the queue message by message, each once."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_support import SINK, at, key, opened, park, put, span

from spillway.chunk import Message
from spillway.engine.listing import Page, dead_page, waiting_page
from spillway.errors import SpillwayError
from spillway.store.base import Store, Waiting, Write


def waiting(key: str, reason: str = "", messages: int = 1) -> Waiting:
    return Waiting(key, reason, "", 0, 0.0, 100, messages)


class Pile:
    """What a store has to say: keys that are held (or buried), and rows of the queue."""

    def __init__(self, held: int, queued: int) -> None:
        self.keys = [waiting(f"public.t:{n:03d}", "odd" if n % 2 else "even", 3) for n in range(held)]
        self.rows = [(n << 16 | n % 7, waiting(f"public.t:{n % 3}")) for n in range(1, queued + 1)]
        self.reads = 0

    def held(self, _sink: str, after_key: str | None, limit: int, reason: str | None) -> list[Waiting]:
        self.reads += 1
        found = [w for w in self.keys if after_key is None or w.key > after_key]
        return [w for w in found if reason in (None, w.reason)][:limit]

    dead = held

    def queued(self, _sink: str, after_row: int, limit: int) -> list[tuple[int, Waiting]]:
        assert limit > 0
        self.reads += 1
        return [(row, w) for row, w in self.rows if row > after_row][:limit]

    def page(self, after: str | None, limit: int, reason: str | None = None) -> Page:
        return waiting_page(self, "s", after, limit, reason)  # type: ignore[arg-type] # what it asks of a store

    def listed(self, limit: int, reason: str | None = None) -> list[Waiting]:
        items, after = self.page(None, limit, reason)
        while after is not None:
            page, after = self.page(after, limit, reason)
            assert len(page) <= limit
            items += page
        return items


@pytest.mark.parametrize("held", [0, 1, 4, 5])
@pytest.mark.parametrize("queued", [0, 1, 4, 5])
@pytest.mark.parametrize("limit", [1, 2, 4, 5, 100])
def test_everything_is_listed_once_in_order_in_few_reads(held: int, queued: int, limit: int) -> None:
    pile = Pile(held, queued)
    assert pile.listed(limit) == [*pile.keys, *(w for _, w in pile.rows)]
    assert pile.reads <= (held + queued) // limit + 3


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_a_reason_selects_what_is_held(limit: int) -> None:
    pile = Pile(5, 5)
    assert [w.key for w in pile.listed(limit, "odd")] == ["public.t:001", "public.t:003"]


@pytest.mark.parametrize(
    "after",
    [
        "",
        "x",
        "key",
        "key:",
        "row",
        "row:",
        "row:0",
        "row:-1",
        "row:x",
        "row:\u00b2",
        f"row:{1 << 63}",
        "row:" + "9" * 5000,
    ],
)
@pytest.mark.parametrize("reason", [None, "odd"])
def test_a_cursor_from_elsewhere_is_refused(after: str, reason: str | None) -> None:
    with pytest.raises(SpillwayError) as caught:
        Pile(5, 5).page(after, 2, reason)
    assert caught.value.code == "bad_request"


def test_a_key_may_hold_anything() -> None:
    pile = Pile(0, 1)
    pile.keys = [waiting("public.t:a:b"), waiting("public.t:row:1")]
    assert pile.listed(1) == [*pile.keys, pile.rows[0][1]]


def test_dead_letters_by_key() -> None:
    pile = Pile(3, 5)
    first, after = dead_page(pile, "s", None, 2, None)  # type: ignore[arg-type]
    rest, end = dead_page(pile, "s", after, 2, None)  # type: ignore[arg-type]
    assert [*first, *rest] == pile.keys
    assert end is None


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_of_a_real_store(tmp_path: Path, limit: int) -> None:
    """Parked, held behind it, and queued; what is resolved is not listed."""
    with opened(tmp_path / "state.db") as store:
        first, second = span((1, "a"), (2, "b"), (3, "a"), (4, "c")), span((5, "a"), (6, "d"), (7,), (8, "e", "f"))
        store.write(put(first, second))
        store.write(park(Message(first, 0), reason="odd"))
        store.write(park(Message(second, 1), reason="even"))
        store.write(Write(SINK, hold=at(first, 2), resolved=[(first, 1, 2)])).result()
        assert _listed(store, limit) == [
            *((key("a"), "odd", 2), (key("d"), "even", 1)),
            *((key("c"), "", 1), (key("a"), "", 1), (f"public.jobs:\\#{second.row(2)}", "", 1), (key("f"), "", 1)),
        ]
        assert _listed(store, limit, "odd") == [(key("a"), "odd", 2)]
        assert _listed(store, limit, "other") == []


def _listed(store: Store, limit: int, reason: str | None = None) -> list[tuple[str, str, int]]:
    items, after = waiting_page(store, SINK, None, limit, reason)
    while after is not None:
        page, after = waiting_page(store, SINK, after, limit, reason)
        items += page
    return [(w.key, w.reason, w.messages) for w in items]

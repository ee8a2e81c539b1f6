"""Pages of what waits: what is held by key, then the queue message by message, each once."""

from __future__ import annotations

import pytest

from spillway.engine.listing import Page, dead_page, waiting_page
from spillway.errors import SpillwayError
from spillway.store.base import Waiting


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

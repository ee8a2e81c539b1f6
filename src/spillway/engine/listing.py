"""What waits, and what was given up on, in pages for people: items, and a cursor to where the next page begins, None at
the end.

The backlog is listed as it lies: first what is held, one item per key; then the queue in position order, one item per
message, since nothing in it is ordered by key. Meanwhile the flow goes on: a message that is parked between two pages
may be missing from the list, or be in it twice.
"""

from __future__ import annotations

from typing import Final

from spillway.errors import SpillwayError
from spillway.store.base import Store, Waiting

Page = tuple[list[Waiting], str | None]

# Cursors of the backlog: behind a key that is held, or behind a row of the queue.
_KEY: Final = "key"
_ROW: Final = "row"
_LAST_ROW: Final = (1 << 63) - 1


def waiting_page(store: Store, sink: str, after: str | None, limit: int, reason: str | None) -> Page:
    """With ``reason``: what is held for it; nothing in the queue has one."""
    key, row = (None, 0) if after is None else _cursor(after)
    held: list[Waiting] = []
    if row == 0:
        held = store.held(sink, key, limit, reason)
        if len(held) == limit:
            return held, f"{_KEY}:{held[-1].key}"
    if reason is not None:
        return held, None
    queued = store.queued(sink, row, limit - len(held))
    full = len(held) + len(queued) == limit
    return [*held, *(waiting for _, waiting in queued)], f"{_ROW}:{queued[-1][0]}" if full else None


def dead_page(store: Store, sink: str, after: str | None, limit: int, reason: str | None) -> Page:
    letters = store.dead(sink, after, limit, reason)
    return letters, letters[-1].key if len(letters) == limit else None


def _cursor(after: str) -> tuple[str | None, int]:
    """The key, or else the row, which is above 0."""
    part, _, value = after.partition(":")
    if part == _KEY and value:
        return value, 0
    if part == _ROW and value.isascii() and value.isdigit() and len(value) < 20 and 0 < int(value) <= _LAST_ROW:
        return None, int(value)
    raise SpillwayError("bad_request", f"after={after} is not where a page of the backlog ends", "take it from one")

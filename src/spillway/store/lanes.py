"""Which rows are held: lanes, their heads, and how they advance.

Runs inside the writer's transaction. `Lanes` is told what goes (`remove`), what must be held (`hold`) and what has
failed, and keeps these invariants:

- L1. A row with key k is held (is not in ``queue``) if and only if k is parked and the row is not before k's head:
  ``parked.head`` is the first held row of its key. With two keys: held under both or under neither.
- L2. A key is parked as long as a row of it is held, and no longer.
- L3. ``due`` is null unless the head is the first of *all* waiting rows of *all* its keys; then exactly one of its
  keys carries the due time (the smaller one): so the head is offered once.
- L4. ``attempts``, ``reason`` and ``detail`` are those of the head; a new head starts with none, due at once.

**Holding** (`hold`): the rows of a key from some row on leave the queue. Where such a row has a second key, that key is
parked behind it, and its rows from there on leave the queue, and so on. Rows of the second key that come before stay in
the queue and flow; its lane waits for them (L3). By L1 each round reads only rows that it moves: up to the old head.

**Advancing** (`settle`): for each key that may have changed, the first of its waiting rows and the first of its held
rows are looked up by index. Nothing held: no longer parked. First held row not the head: new head. First of all rows
of all its keys: due. The work is that of the rows removed, never that of the rows which wait.

Nothing here is done row by row: see `spillway.store.rows`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import cast

from spillway.store.base import Counters
from spillway.store.rows import CHUNK, as_json, rows_of


@dataclass(slots=True)
class SinkRow:
    """A sink as its row in table ``sink`` says; `spillway.store.apply` writes it back."""

    id: int
    slot: str
    run: int
    position: tuple[int, int, int] | None
    counters: Counters

    def copy(self) -> SinkRow:
        return replace(self, counters=replace(self.counters))


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed attempt says about the head of a lane."""

    reason: str
    detail: str
    due: float
    attempts: int


@dataclass(slots=True)
class _Lane:
    """A parked key, and what the lane index says about it: its first row at all, its first held row."""

    head: int
    due: float | None
    attempts: int
    reason: str
    detail: str
    first: int | None
    next: int | None
    other: str | None  # of the first held row


SELECT_REMOVED = """
    SELECT json_group_array(json_array(id, key1, key2, length(body))) FROM message
    WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""
DELETE_MESSAGES = "DELETE FROM message WHERE id IN (SELECT value FROM json_each(?))"
DELETE_QUEUE = "DELETE FROM queue WHERE sink = ? AND id IN (SELECT value FROM json_each(?))"
# Without the casts SQLite would not use the whole key.
DELETE_LANES = """
    DELETE FROM lane WHERE sink = ?1 AND (key, id) IN (
        SELECT CAST(json_extract(value, '$[0]') AS TEXT), CAST(json_extract(value, '$[1]') AS INTEGER)
        FROM json_each(?2))"""
SELECT_PARKED = """
    SELECT json_group_array(json_array(p.key, p.head))
    FROM json_each(?2) k CROSS JOIN parked p ON p.sink = ?1 AND p.key = k.value"""
SELECT_QUEUED = """
    SELECT json_group_array(json_array(key, id, other)) FROM (
        SELECT l.key, l.id, l.other FROM json_each(?2) k CROSS JOIN lane l
        ON l.sink = ?1 AND l.key = json_extract(k.value, '$[0]')
        AND l.id >= json_extract(k.value, '$[1]') AND l.id < json_extract(k.value, '$[2]') LIMIT ?3)"""
SELECT_LANES = """
    SELECT json_group_array(json_array(p.key, p.head, p.due, p.attempts, p.reason, p.detail,
        (SELECT l.id FROM lane l WHERE l.sink = p.sink AND l.key = p.key ORDER BY l.id LIMIT 1),
        (SELECT l.id FROM lane l WHERE l.sink = p.sink AND l.key = p.key AND l.id >= p.head ORDER BY l.id LIMIT 1),
        (SELECT l.other FROM lane l WHERE l.sink = p.sink AND l.key = p.key AND l.id >= p.head ORDER BY l.id LIMIT 1)))
    FROM json_each(?2) k CROSS JOIN parked p ON p.sink = ?1 AND p.key = k.value"""
DELETE_PARKED = "DELETE FROM parked WHERE sink = ? AND key IN (SELECT value FROM json_each(?))"
UPSERT_PARKED = """
    INSERT INTO parked (sink, run, key, head, due, attempts, reason, detail)
    SELECT ?1, ?2, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]')
    FROM json_each(?3) WHERE true
    ON CONFLICT (sink, key) DO UPDATE SET run = excluded.run, head = excluded.head, due = excluded.due,
        attempts = excluded.attempts, reason = excluded.reason, detail = excluded.detail"""

_NO_ROW = (1 << 63) - 1


class Lanes:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def parked(self, sink: SinkRow, keys: Iterable[str]) -> dict[str, int]:
        """Which of these keys are parked, with their heads."""
        if not sink.counters.parked_keys:
            return {}
        found = rows_of(self._db.execute(SELECT_PARKED, (sink.id, as_json(keys))))
        return dict(cast("list[tuple[str, int]]", found))

    def start_behind(self, sink: SinkRow, heads: dict[str, int]) -> None:
        """Park keys that are not parked, behind a newcomer that is held for its other key."""
        self._write(sink, [(key, head, None, 0, "", "") for key, head in heads.items()])
        sink.counters.parked_keys += len(heads)

    def hold(self, sink: SinkRow, starts: dict[str, int], newcomers_from: int) -> tuple[set[str], set[int]]:
        """Take the rows of each key, from the given row on, out of the queue, and what must follow them. Returns all
        keys concerned, to be settled, and which rows from ``newcomers_from`` on were moved."""
        touched: set[str] = set()
        moved: set[int] = set()
        ranges: list[tuple[str, int, int]] = []
        heads: dict[str, int] = {}
        while starts or ranges:
            if not ranges:
                touched.update(starts)
                heads = self.parked(sink, starts)
                ranges = [(k, start, heads.get(k, _NO_ROW)) for k, start in starts.items()]
                ranges = [r for r in ranges if r[1] < r[2]]
                starts = {}
                continue
            found = cast(
                "list[tuple[str, int, str | None]]",
                rows_of(self._db.execute(SELECT_QUEUED, (sink.id, as_json(ranges), CHUNK))),
            )
            fresh: dict[str, int] = {}
            for key, row, other in found:
                if row < fresh.get(key, heads.get(key, _NO_ROW)):
                    fresh[key] = row
                if other is not None:
                    starts[other] = min(row, starts.get(other, row))
            sink.counters.parked_keys += len(fresh.keys() - heads.keys())
            heads.update(fresh)
            self._write(sink, [(key, head, None, 0, "", "") for key, head in fresh.items()])
            self._unqueue(sink, [row for _, row, _ in found])
            moved.update(row for _, row, _ in found if row >= newcomers_from)
            ranges = _behind(ranges, found[-1][0], found[-1][1]) if len(found) == CHUNK else []
        return touched, moved

    def settle(
        self, sink: SinkRow, keys: Collection[str], now: float, failures: dict[str, Failure] | None = None
    ) -> None:
        """Bring the parked ones of these keys in line with what waits: invariants L2 to L4."""
        lanes = self._lanes(sink, keys)
        pairs = {lane.other for lane in lanes.values() if lane.other is not None} - lanes.keys()
        both = lanes | self._lanes(sink, pairs)
        empty = [key for key, lane in lanes.items() if lane.next is None]
        dirty: set[str] = set()
        for key, lane in lanes.items():
            if lane.next is None:
                continue
            if lane.next != lane.head:
                lane.head, lane.due, lane.attempts, lane.reason, lane.detail = lane.next, None, 0, "", ""
                dirty.add(key)
        for key, lane in lanes.items():
            if lane.next is None:
                continue
            other = None if lane.other is None else both[lane.other]
            ready = lane.first == lane.next and (other is None or other.first == other.next == lane.next)
            carrier = key if lane.other is None else min(key, lane.other)
            failure = failures.get(key) if failures else None
            if failure is not None:
                lane.attempts += failure.attempts
                lane.reason, lane.detail = failure.reason, failure.detail
                dirty.add(key)
            if ready and (both[carrier].due is None or failure is not None):
                both[carrier].due = failure.due if failure is not None else now
                dirty.add(carrier)
        if empty:
            self._db.execute(DELETE_PARKED, (sink.id, as_json(empty)))
            sink.counters.parked_keys -= len(empty)
        self._write(
            sink, [(k, both[k].head, both[k].due, both[k].attempts, both[k].reason, both[k].detail) for k in dirty]
        )

    def remove(self, sink: SinkRow, rows: Collection[int], now: float) -> list[int]:
        """Remove waiting messages for good; lanes advance. Returns which were still there."""
        removed: list[int] = []
        wanted = list(rows)
        for start in range(0, len(wanted), CHUNK):
            removed += self._remove(sink, wanted[start : start + CHUNK], now)
        return removed

    def _remove(self, sink: SinkRow, rows: list[int], now: float) -> list[int]:
        found = cast(
            "list[tuple[int, str, str | None, int]]",
            rows_of(self._db.execute(SELECT_REMOVED, (sink.id, as_json(rows)))),
        )
        if not found:
            return []
        numbers = [row for row, _, _, _ in found]
        under = [(key1, row) for row, key1, _, _ in found]
        under += [(key2, row) for row, _, key2, _ in found if key2 is not None]
        self._db.execute(DELETE_LANES, (sink.id, as_json(under)))
        self._unqueue(sink, numbers)
        self._db.execute(DELETE_MESSAGES, (as_json(numbers),))
        sink.counters.messages -= len(found)
        sink.counters.bytes -= sum(size for _, _, _, size in found)
        if sink.counters.parked_keys:
            self.settle(sink, {key for key, _ in under}, now)
        return numbers

    def _unqueue(self, sink: SinkRow, rows: list[int]) -> None:
        if rows:
            sink.counters.queued -= self._db.execute(DELETE_QUEUE, (sink.id, as_json(rows))).rowcount

    def _lanes(self, sink: SinkRow, keys: Collection[str]) -> dict[str, _Lane]:
        if not keys:
            return {}
        found = cast(
            "list[tuple[str, int, float | None, int, str, str, int | None, int | None, str | None]]",
            rows_of(self._db.execute(SELECT_LANES, (sink.id, as_json(keys)))),
        )
        return {
            key: _Lane(head, due, attempts, reason, detail, first, following, other)
            for key, head, due, attempts, reason, detail, first, following, other in found
        }

    def _write(self, sink: SinkRow, lanes: list[tuple[str, int, float | None, int, str, str]]) -> None:
        if lanes:
            self._db.execute(UPSERT_PARKED, (sink.id, sink.run, as_json(lanes)))


def _behind(ranges: list[tuple[str, int, int]], key: str, row: int) -> list[tuple[str, int, int]]:
    """What is left of the ranges behind this row."""
    at = next(index for index, (k, _, _) in enumerate(ranges) if k == key)
    return [(key, row + 1, ranges[at][2]), *ranges[at + 1 :]]

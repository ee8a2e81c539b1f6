"""The lanes of parked keys: single messages, their heads, and how they advance.

Runs inside the writer's transaction. `Lanes` is told what comes (`enter`), what goes (`remove`) and what has failed,
and keeps these invariants:

- L1. A message is under all its keys or under none.
- L2. A key is parked as long as it has a lane, and no longer; ``parked.head`` is the first row of its lane.
- L3. ``due`` is null unless the head is the first of the lanes of *all* its keys; then exactly one of its keys carries
  the due time (the smaller one): so the head is offered once.
- L4. ``attempts``, ``reason`` and ``detail`` are those of the head; a new head starts with none, due at once.
- L5. ``waits_for`` is the head's row if there may be earlier rows of its keys in the queue: if it has two keys, or was
  a dead letter. Not once it was tried: whoever tried it knew that it was the first.

**Settling** (`settle`): for each key that may have changed, the first row of its lane is looked up by index. None: no
longer parked. Not the head: new head. First of all its lanes: due. The work is that of the rows which came or went,
never that of the rows which wait.

Nothing here is done row by row: see `spillway.store.rows`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from spillway.store.rows import CHUNK, INSERT_LANE, INSERT_MESSAGE, Row, SinkRow, as_json, insert, rows_of


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed attempt says about the head of a lane."""

    reason: str
    detail: str
    due: float
    attempts: int


@dataclass(slots=True)
class _Lane:
    """A key: what table ``parked`` says, and the first row of its lane as it is."""

    head: int | None
    due: float | None
    waits_for: int
    attempts: int
    reason: str
    detail: str
    first: int | None
    other: str | None  # of the first
    waits: int | None
    head_other: str | None  # of the head, if it is still there


SELECT_REMOVED = """
    SELECT json_group_array(json_array(id, key1, key2, length(data))) FROM message
    WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""
SELECT_KEYS = """
    SELECT json_group_array(json_array(key1, key2)) FROM message
    WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""
DELETE_MESSAGES = "DELETE FROM message WHERE id IN (SELECT value FROM json_each(?))"
# Without the casts SQLite would not use the whole key.
DELETE_LANES = """
    DELETE FROM lane WHERE sink = ?1 AND (key, id) IN (
        SELECT CAST(json_extract(value, '$[0]') AS TEXT), CAST(json_extract(value, '$[1]') AS INTEGER)
        FROM json_each(?2))"""
SELECT_LANES = """
    SELECT json_group_array(json_array(k.value, p.head, p.due, coalesce(p.waits_for, 0), coalesce(p.attempts, 0),
        coalesce(p.reason, ''), coalesce(p.detail, ''), l.id, l.other, l.waits, h.other))
    FROM json_each(?2) k
    LEFT JOIN parked p ON p.sink = ?1 AND p.key = k.value
    LEFT JOIN lane l ON l.sink = ?1 AND l.key = k.value
        AND l.id = (SELECT f.id FROM lane f WHERE f.sink = ?1 AND f.key = k.value ORDER BY f.id LIMIT 1)
    LEFT JOIN lane h ON h.sink = ?1 AND h.key = k.value AND h.id = p.head"""
DELETE_PARKED = "DELETE FROM parked WHERE sink = ? AND key IN (SELECT value FROM json_each(?))"
UPSERT_PARKED = """
    INSERT INTO parked (sink, run, key, head, due, waits_for, attempts, reason, detail)
    SELECT ?1, ?2, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
        json_extract(value, '$[6]')
    FROM json_each(?3) WHERE true
    ON CONFLICT (sink, key) DO UPDATE SET run = excluded.run, head = excluded.head, due = excluded.due,
        waits_for = excluded.waits_for, attempts = excluded.attempts, reason = excluded.reason,
        detail = excluded.detail"""


class Lanes:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def enter(self, sink: SinkRow, messages: Sequence[Row], lanes: Sequence[Row]) -> set[str]:
        """Messages that were in the queue, or nowhere, as `message_rows` gives them. To be settled by their keys,
        which are returned."""
        insert(self._db, INSERT_MESSAGE, messages)
        insert(self._db, INSERT_LANE, lanes)
        sink.counters.messages += len(messages)
        sink.counters.bytes += sum([len(cast(bytes, row[-1])) for row in messages])
        return {cast(str, row[1]) for row in lanes}

    def keys(self, sink: SinkRow, rows: Collection[int]) -> set[str]:
        """Which lanes these rows are in."""
        found = rows_of(self._db.execute(SELECT_KEYS, (sink.id, as_json(rows))))
        return {key for keys in cast("list[list[str | None]]", found) for key in keys if key is not None}

    def settle(
        self, sink: SinkRow, keys: Collection[str], now: float, failures: Mapping[int, Failure] | None = None
    ) -> None:
        """Bring what is parked in line with these lanes: invariants L2 to L5. ``failures``: by row."""
        lanes = self._lanes(sink, keys)
        partners = {key for lane in lanes.values() for key in (lane.other, lane.head_other) if key is not None}
        both = lanes | self._lanes(sink, partners - lanes.keys())
        dirty: set[str] = set()
        heads: dict[int, tuple[str, ...]] = {}  # that are, or were, with all their keys, the smaller one first
        for key, lane in lanes.items():
            if lane.head is not None and lane.head_other is not None:
                heads[lane.head] = _sorted(key, lane.head_other)
            if lane.first is None:
                continue
            heads[lane.first] = _sorted(key, lane.other)
            if lane.first != lane.head:
                sink.counters.parked_keys += lane.head is None
                lane.head, lane.due, lane.attempts, lane.reason, lane.detail = lane.first, None, 0, "", ""
                lane.waits_for = lane.first if lane.waits else 0
                dirty.add(key)
        for row, names in heads.items():
            if any(both[name].first != row for name in names):
                if both[names[0]].first == row and both[names[0]].due is not None:
                    both[names[0]].due = None
                    dirty.add(names[0])
                continue
            failure = failures.get(row) if failures else None
            if failure is not None:
                for name in names:
                    lane = both[name]
                    lane.attempts += failure.attempts
                    lane.reason, lane.detail, lane.waits_for = failure.reason, failure.detail, 0
                    dirty.add(name)
            if both[names[0]].due is None or failure is not None:
                both[names[0]].due = failure.due if failure is not None else now
                dirty.add(names[0])
        empty = [key for key, lane in lanes.items() if lane.first is None and lane.head is not None]
        if empty:
            self._db.execute(DELETE_PARKED, (sink.id, as_json(empty)))
            sink.counters.parked_keys -= len(empty)
        if dirty:
            self._write(sink, {key: both[key] for key in dirty})

    def remove(self, sink: SinkRow, rows: Collection[int], now: float) -> int:
        """Remove messages for good; lanes advance. Returns how many were still there."""
        count = 0
        wanted = list(rows)
        for start in range(0, len(wanted), CHUNK):
            count += self._remove(sink, wanted[start : start + CHUNK], now)
        return count

    def _remove(self, sink: SinkRow, rows: list[int], now: float) -> int:
        found = cast(
            "list[tuple[int, str, str | None, int]]",
            rows_of(self._db.execute(SELECT_REMOVED, (sink.id, as_json(rows)))),
        )
        if not found:
            return 0
        under = [(key1, row) for row, key1, _, _ in found]
        under += [(key2, row) for row, _, key2, _ in found if key2 is not None]
        self._db.execute(DELETE_LANES, (sink.id, as_json(under)))
        self._db.execute(DELETE_MESSAGES, (as_json([row for row, _, _, _ in found]),))
        sink.counters.messages -= len(found)
        sink.counters.bytes -= sum([size for _, _, _, size in found])
        self.settle(sink, {key for key, _ in under}, now)
        return len(found)

    def _lanes(self, sink: SinkRow, keys: Collection[str]) -> dict[str, _Lane]:
        if not keys:
            return {}
        found = cast("list[list[object]]", rows_of(self._db.execute(SELECT_LANES, (sink.id, as_json(keys)))))
        return {cast(str, key): _Lane(*rest) for key, *rest in found}  # type: ignore[arg-type]  # JSON

    def _write(self, sink: SinkRow, lanes: dict[str, _Lane]) -> None:
        rows = [
            (key, lane.head, lane.due, lane.waits_for, lane.attempts, lane.reason, lane.detail)
            for key, lane in lanes.items()
        ]
        self._db.execute(UPSERT_PARKED, (sink.id, sink.run, as_json(rows)))


def _sorted(key: str, other: str | None) -> tuple[str, ...]:
    if other is None:
        return (key,)
    return (key, other) if key < other else (other, key)

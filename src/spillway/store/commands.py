"""What people do to what waits and to dead letters: commands, as jobs of the writer's thread.

Each touches a bounded number of messages; whoever wants more asks again. What is found by key in the queue is found by
a scan of its key texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

from spillway.store.apply import by_span
from spillway.store.base import Select
from spillway.store.compact import Compacting
from spillway.store.queue import Taken
from spillway.store.rows import CHUNK, SinkRow, as_json, rows_of

# From the end of each lane: its head, which has the reason, goes last.
SELECT_HELD = """
    SELECT json_group_array(json_array(key, id)) FROM (
        SELECT l.key, l.id FROM parked p CROSS JOIN lane l
        ON l.sink = p.sink AND l.key = p.key AND l.id >= p.head AND l.id < iif(p.key = ?2, ?3, 0x7fffffffffffffff)
        WHERE p.sink = ?1 AND p.key >= ?2 ORDER BY p.key, l.id DESC LIMIT ?4)"""
SELECT_HELD_FOR = """
    SELECT json_group_array(json_array(key, id)) FROM (
        SELECT l.key, l.id FROM parked p INDEXED BY parked_reason CROSS JOIN lane l
        ON l.sink = p.sink AND l.key = p.key AND l.id >= p.head AND l.id < iif(p.key = ?2, ?3, 0x7fffffffffffffff)
        WHERE p.sink = ?1 AND p.reason = ?5 AND p.key >= ?2 ORDER BY p.key, l.id DESC LIMIT ?4)"""
# One lane, in the same order.
SELECT_LANE = """
    SELECT json_group_array(id) FROM (
        SELECT id FROM lane WHERE sink = ? AND key = ? AND id < ? ORDER BY id DESC LIMIT ?)"""
SELECT_HEAD = """
    SELECT p.head, l.other FROM parked p CROSS JOIN lane l ON l.sink = p.sink AND l.key = p.key AND l.id = p.head
    WHERE p.sink = ? AND p.key = ?"""
SELECT_REASON_KEYS = """
    SELECT json_group_array(key) FROM (
        SELECT key FROM parked WHERE sink = ? AND reason = ? AND key > ? ORDER BY key LIMIT ?)"""
UPDATE_DUE = """
    UPDATE parked SET run = ?2, due = ?3
    WHERE sink = ?1 AND key IN (SELECT value FROM json_each(?4)) AND due IS NOT NULL"""
UPDATE_HEAD_DUE = UPDATE_DUE + " AND head = ?5"
DELETE_DEAD_KEY = "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE sink = ? AND key1 = ? LIMIT ?)"
DELETE_DEAD_REASON = "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE sink = ? AND reason = ? LIMIT ?)"
DELETE_DEAD_ALL = "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE sink = ? LIMIT ?)"

_LAST = (1 << 63) - 1


class Commands(Compacting):
    """A transaction that can do these, too."""

    def retry_key(self, name: str, key: str) -> int:
        sink = self._sink(name)
        found = self._db.execute(SELECT_HEAD, (sink.id, key)).fetchone()
        if found is None:
            return 0
        head, other = found
        keys = as_json([key] if other is None else [key, other])
        return self._db.execute(UPDATE_HEAD_DUE, (sink.id, sink.run, self._clock.monotonic(), keys, head)).rowcount

    def retry_reason(self, name: str, reason: str, after_key: str) -> tuple[int, str | None]:
        """One step: how many keys, and behind which key to go on, if it is not done."""
        sink = self._sink(name)
        keys = cast("list[str]", rows_of(self._db.execute(SELECT_REASON_KEYS, (sink.id, reason, after_key, CHUNK))))
        count = self._db.execute(UPDATE_DUE, (sink.id, sink.run, self._clock.monotonic(), as_json(keys))).rowcount
        return count, keys[-1] if len(keys) == CHUNK else None

    def retry_all(self, name: str) -> int:
        """A new run: whatever due times there are have passed."""
        sink = self._sink(name)
        sink.run += 1
        return sink.counters.parked_keys

    def discard(self, name: str, select: Select, limit: int, spare: frozenset[int]) -> int:
        sink = self._sink(name)
        now = self._clock.monotonic()
        rows: set[int] = set()
        if select.key is None:
            self._collect_held(sink, select.reason, rows, limit, spare)
        else:
            self._collect_lane(sink, select.key, rows, limit, spare)
        count = self._lanes.remove(sink, rows, now)
        if count == limit or select.reason is not None:
            return count
        spared = by_span(spare)
        queue = self._queue.all(sink, spared) if select.key is None else self._queue.of_key(sink, select.key, spared)
        return count + self._queue.take(sink, list(_at_most(limit - count, queue)))

    def _collect_lane(self, sink: SinkRow, key: str, rows: set[int], limit: int, spare: frozenset[int]) -> None:
        before = _LAST
        while len(rows) < limit:
            cursor = self._db.execute(SELECT_LANE, (sink.id, key, before, CHUNK))
            found = cast("list[int]", rows_of(cursor))
            rows.update([row for row in found if row not in spare][: limit - len(rows)])
            if len(found) < CHUNK:
                return
            before = found[-1]

    def _collect_held(
        self, sink: SinkRow, reason: str | None, rows: set[int], limit: int, spare: frozenset[int]
    ) -> None:
        key, before = "", _LAST
        while len(rows) < limit:
            given = (sink.id, key, before, CHUNK)
            cursor = (
                self._db.execute(SELECT_HELD, given)
                if reason is None
                else self._db.execute(SELECT_HELD_FOR, (*given, reason))
            )
            found = cast("list[tuple[str, int]]", rows_of(cursor))
            for _, row in found:
                if row not in spare and len(rows) < limit:
                    rows.add(row)
            if len(found) < CHUNK:
                return
            key, before = found[-1]

    def discard_dead(self, name: str, select: Select, limit: int) -> int:
        sink = self._sink(name)
        if select.key is not None:
            cursor = self._db.execute(DELETE_DEAD_KEY, (sink.id, select.key, limit))
        elif select.reason is not None:
            cursor = self._db.execute(DELETE_DEAD_REASON, (sink.id, select.reason, limit))
        else:
            cursor = self._db.execute(DELETE_DEAD_ALL, (sink.id, limit))
        sink.counters.dead_letters -= cursor.rowcount
        return cursor.rowcount


def _at_most(limit: int, taken: Iterable[Taken]) -> Iterator[Taken]:
    for one in taken:
        bits = one.bits
        while bits.bit_count() > limit:
            bits &= ~(1 << bits.bit_length() - 1)
        limit -= bits.bit_count()
        if bits:
            yield replace(one, bits=bits)
        if limit == 0:
            return

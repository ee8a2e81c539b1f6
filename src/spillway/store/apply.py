"""Applying writes: what the writer's thread does between BEGIN and COMMIT.

`Transaction` is one group commit. It works on copies of the sinks' rows and hands them over, with the row numbers of
what was put, when the commit has returned; after a rollback it is thrown away and nothing has happened.

Anything that contradicts the contract (a put without its position, a message that was never put) is a defect of the
caller and raises; the store then fails as a whole, because what the caller believes is no longer what is on disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from spillway.change import Message
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.position import Position
from spillway.store.base import Counters, Gap, Identity, Park, Select, SinkState, Write, Written
from spillway.store.lanes import Failure, Lanes, SinkRow
from spillway.store.rows import (
    CHUNK,
    Row,
    as_json,
    insert,
    insert_messages,
    lane_keys,
    lane_rows,
    message_row,
    rows_of,
)

INSERT_DEAD = """
    INSERT INTO dead (id, sink, lsn, idx, sub, action, schema_name, table_name, change_key, key1, key2, pks, n, flags,
        too_large_bytes, commit_time, stored, record_bytes, attempts, reason, detail, body)
    SELECT m.id, m.sink, lsn, idx, sub, action, schema_name, table_name, change_key, key1, key2, pks, n, flags,
        too_large_bytes, commit_time, stored, record_bytes,
        json_extract(j.value, '$[3]') + coalesce(
            (SELECT p.attempts FROM parked p WHERE p.sink = m.sink AND p.key = m.key1 AND p.head = m.id), 0),
        json_extract(j.value, '$[1]'), json_extract(j.value, '$[2]'), body
    FROM json_each(?2) j CROSS JOIN message m ON m.id = json_extract(j.value, '$[0]') AND m.sink = ?1"""
SELECT_KEYS = """
    SELECT json_group_array(json_array(id, key1, key2)) FROM message
    WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""
SELECT_TABLE = """
    SELECT json_group_array(json_array(key, id, below)) FROM (
        SELECT l.key, l.id, (m.lsn, m.idx, m.sub) < (?5, ?6, ?7) AS below
        FROM lane l CROSS JOIN message m ON m.id = l.id
        WHERE l.sink = ?1 AND (l.key, l.id) > (?2, ?3) AND l.key < ?4 ORDER BY l.key, l.id LIMIT ?8)"""
SELECT_QUEUE = """
    SELECT json_group_array(id) FROM (SELECT id FROM queue WHERE sink = ? AND id > ? ORDER BY id LIMIT ?)"""
SELECT_KEY_ROWS = """
    SELECT json_group_array(id) FROM (SELECT id FROM lane WHERE sink = ? AND key = ? AND id > ? ORDER BY id LIMIT ?)"""
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
UPDATE_SINK = """
    UPDATE sink SET lsn = ?, idx = ?, sub = ?, run = ?, messages = ?, bytes = ?, queued = ?, parked_keys = ?,
    dead_letters = ? WHERE id = ?"""
SELECT_SINK = """
    SELECT id, slot, run, lsn, idx, sub, messages, bytes, queued, parked_keys, dead_letters,
    paused, gap_first, gap_last, gap_since, gap_reason FROM sink WHERE name = ?"""
UPSERT_SLOT = """
    INSERT INTO slot (name, system_id, timeline, epoch, mark) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET system_id = excluded.system_id, timeline = excluded.timeline,
        mark = CASE WHEN epoch = excluded.epoch THEN max(mark, excluded.mark) ELSE excluded.mark END,
        epoch = excluded.epoch"""

DELETE_DEAD_KEY = "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE sink = ? AND key1 = ? LIMIT ?)"
DELETE_DEAD_REASON = "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE sink = ? AND reason = ? LIMIT ?)"
DELETE_DEAD_ALL = "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE sink = ? LIMIT ?)"
DELETE_DEAD = "DELETE FROM dead WHERE sink = ?1 AND id IN (SELECT value FROM json_each(?2))"
SELECT_DEAD = """
    SELECT json_group_array(id) FROM dead WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""

TEXT_CHARACTERS = 1000  # of a reason or detail
_LAST = (1 << 63) - 1


class Transaction:
    def __init__(self, db: sqlite3.Connection, sinks: dict[str, SinkRow], next_row: int, clock: Clock) -> None:
        self._db = db
        self._lanes = Lanes(db)
        self._committed = sinks
        self._clock = clock
        self._sinks: dict[str, SinkRow] = {}  # changed by this transaction
        self._rows: dict[int, tuple[Message, int]] = {}  # what was put, by identity, with its row
        self.next_row = next_row

    def _sink(self, name: str) -> SinkRow:
        sink = self._sinks.get(name)
        if sink is None:
            sink = self._sinks[name] = self._committed[name].copy()
        return sink

    def finish(self) -> None:
        """The last statements before COMMIT."""
        for sink in self._sinks.values():
            self._save(sink)

    def _save(self, sink: SinkRow) -> None:
        c = sink.counters
        position = sink.position or (None, None, None)
        counters = (c.messages, c.bytes, c.queued, c.parked_keys, c.dead_letters)
        self._db.execute(UPDATE_SINK, (*position, sink.run, *counters, sink.id))

    def committed(self) -> None:
        """COMMIT has returned: publish."""
        self._committed.update(self._sinks)
        for message, row in self._rows.values():
            message.row = row

    # -- start ------------------------------------------------------------------------------------------------------
    def open_sink(self, name: str, slot: str) -> SinkState:
        if name in self._sinks:
            self._save(self._sinks[name])
        found = self._db.execute(SELECT_SINK, (name,)).fetchone()
        if found is None:
            self._db.execute("INSERT INTO sink (name, slot) VALUES (?, ?)", (name, slot))
            found = self._db.execute(SELECT_SINK, (name,)).fetchone()
        number, its_slot, run, lsn, idx, sub = found[:6]
        if its_slot != slot:
            raise SpillwayError(
                "sink_moved",
                f"the state of sink {name} belongs to slot {its_slot}, not to {slot}",
                "give the sink another name (it then starts anew), or its database the slot it had",
            )
        messages, size, queued, parked_keys, dead_letters, paused, gap_first, gap_last, gap_since, why = found[6:]
        counters = Counters(messages, size, queued, parked_keys, dead_letters)
        position = None if lsn is None else Position(lsn, idx, sub)
        self._sinks[name] = SinkRow(number, slot, run, position, counters)
        gap = None if gap_first is None else Gap(gap_first, gap_last, gap_since, why)
        return SinkState(position, None if paused is None else bool(paused), gap, replace(counters))

    def write_identity(self, identity: Identity) -> None:
        before = self._db.execute("SELECT epoch FROM slot WHERE name = ?", (identity.slot,)).fetchone()
        if before is not None and before[0] != identity.epoch:
            self._db.execute("UPDATE sink SET lsn = NULL, idx = NULL, sub = NULL WHERE slot = ?", (identity.slot,))
            for name, sink in self._committed.items():
                if sink.slot == identity.slot:
                    self._sink(name).position = None
        self._db.execute(
            UPSERT_SLOT, (identity.slot, identity.system_id, identity.timeline, identity.epoch, identity.mark)
        )

    # -- a write, in the order of its fields ------------------------------------------------------------------------
    def write(self, write: Write) -> Written:
        sink = self._sink(write.sink)
        now = self._clock.monotonic()
        first = self.next_row
        held = self._put(sink, write.put) if write.put else set()
        if write.position is not None:
            if sink.position is not None and write.position < sink.position:
                raise ValueError(f"position {write.position} of sink {write.sink} is below {sink.position}")
            sink.position = write.position
        removed = self._lanes.remove(sink, [self._row(m) for m in write.resolved], now)
        for message in write.superseded_by:
            removed += self._remove_before(sink, message, now)
        if write.park:
            held |= self._park(sink, write.park, now, first)
        removed += self._bury(sink, write.bury, now) if write.bury else []
        if write.revive:
            self._revive(sink, write.revive, now)
        if write.drop_table_below is not None:
            prefix, position = write.drop_table_below
            removed += self._drop_table(sink, prefix, position, now)
        if write.paused is not None:
            self._db.execute("UPDATE sink SET paused = ? WHERE id = ?", (write.paused, sink.id))
        if write.gap is not None or write.clear_gap:
            gap = write.gap
            values = (None,) * 4 if gap is None else (gap.first_lsn, gap.last_lsn, gap.since, gap.reason)
            self._db.execute(
                "UPDATE sink SET gap_first = ?, gap_last = ?, gap_since = ?, gap_reason = ? WHERE id = ?",
                (*values, sink.id),
            )
        return Written(frozenset(held.difference(removed)), replace(sink.counters))

    def _remove_before(self, sink: SinkRow, message: Message, now: float) -> list[int]:
        """Remove what waits under the key of a message that was resolved, up to where it stood."""
        (key,) = message.keys
        row = self._row(message)
        removed: list[int] = []
        while True:
            found = cast("list[int]", rows_of(self._db.execute(SELECT_KEY_ROWS, (sink.id, key, 0, CHUNK))))
            before = [r for r in found if r < row]
            if not before:
                return removed
            removed += self._lanes.remove(sink, before, now)

    def _row(self, message: Message) -> int:
        """The row of a message: its own, or the one it gets when this transaction commits."""
        if message.row > 0:
            return message.row
        return self._rows[id(message)][1]

    def _put(self, sink: SinkRow, messages: Sequence[Message]) -> set[int]:
        """Append. Returns the rows that are held."""
        if sink.position is not None and messages[0].position <= sink.position:
            raise ValueError(f"a put at {messages[0].position} for a sink at {sink.position}")
        parked = self._lanes.parked(sink, {key for m in messages for key in m.keys})
        behind: dict[str, int] = {}
        stored = self._clock.wall()
        held: set[int] = set()
        rows: list[Row] = []
        queue: list[Row] = []
        lanes: list[Row] = []
        size = 0
        for row, message in enumerate(messages, self.next_row):
            self._rows[id(message)] = (message, row)
            rows.append(message_row(message, row, sink.id, stored))
            lanes += lane_rows(message, row, sink.id)
            body_bytes = len(message.change.body)
            size += body_bytes
            if parked and not parked.keys().isdisjoint(message.keys):
                held.add(row)
                for key in message.keys:
                    if key not in parked:
                        parked[key] = behind[key] = row
            else:
                queue.append((sink.id, row, body_bytes))
        self.next_row += len(messages)
        lanes.sort(key=_by_key)  # the index is written page by page, not here and there
        insert_messages(self._db, rows)
        insert(self._db, "queue", queue)
        insert(self._db, "lane", lanes)
        if behind:
            self._lanes.start_behind(sink, behind)
        sink.counters.messages += len(messages)
        sink.counters.bytes += size
        sink.counters.queued += len(queue)
        return held

    def _park(self, sink: SinkRow, parks: Sequence[Park], now: float, first: int) -> set[int]:
        """Park the keys of what failed. Returns which rows from ``first`` on left the queue."""
        by_row = {self._row(park.message): park for park in parks}
        found = rows_of(self._db.execute(SELECT_KEYS, (sink.id, as_json(by_row))))
        waiting = cast("list[tuple[int, str, str | None]]", found)
        heads = self._lanes.parked(sink, {key for _, *keys in waiting for key in keys if key is not None})
        starts: dict[str, int] = {}
        failures: dict[str, Failure] = {}
        for row, *keys in waiting:
            park = by_row[row]
            its_keys = [key for key in keys if key is not None]
            if any(row > heads.get(key, _LAST) for key in its_keys):
                continue  # held behind the head of its lane: it was not its turn, which will come
            failure = Failure(_text(park.reason), _text(park.detail), now + park.due_seconds, int(park.counts_attempt))
            for key in its_keys:
                failures.setdefault(key, failure)
                if row != heads.get(key):
                    starts[key] = 0
        touched, moved = self._lanes.hold(sink, starts, first)
        self._lanes.settle(sink, touched | failures.keys(), now, failures)
        return moved

    def _bury(self, sink: SinkRow, buries: Sequence[Park], now: float) -> list[int]:
        removed: list[int] = []
        for start in range(0, len(buries), CHUNK):
            letters = [
                (self._row(b.message), _text(b.reason), _text(b.detail), int(b.counts_attempt))
                for b in buries[start : start + CHUNK]
            ]
            sink.counters.dead_letters += self._db.execute(INSERT_DEAD, (sink.id, as_json(letters))).rowcount
            removed += self._lanes.remove(sink, [row for row, *_ in letters], now)
        return removed

    def _revive(self, sink: SinkRow, letters: Sequence[tuple[int, Message]], now: float) -> None:
        """Dead letters become the last of their lanes."""
        numbers = as_json(row for row, _ in letters)
        dead = set(cast("list[int]", rows_of(self._db.execute(SELECT_DEAD, (sink.id, numbers)))))
        revived = [message for row, message in letters if row in dead]
        self._db.execute(DELETE_DEAD, (sink.id, numbers))
        stored = self._clock.wall()
        first = self.next_row
        self.next_row += len(revived)
        insert_messages(self._db, [message_row(m, row, sink.id, stored) for row, m in enumerate(revived, first)])
        insert(self._db, "lane", [r for row, m in enumerate(revived, first) for r in lane_rows(m, row, sink.id)])
        sink.counters.dead_letters -= len(revived)
        sink.counters.messages += len(revived)
        sink.counters.bytes += sum(len(m.change.body) for m in revived)
        last_first = [(key, row) for row, m in enumerate(revived, first) for key in lane_keys(m, row)][::-1]
        heads = dict(last_first)
        parked = self._lanes.parked(sink, heads)
        self._lanes.start_behind(sink, {key: row for key, row in heads.items() if key not in parked})
        self._lanes.settle(sink, heads.keys(), now)

    def _drop_table(self, sink: SinkRow, prefix: str, position: Position, now: float) -> list[int]:
        removed: list[int] = []
        key, row, end = prefix, 0, prefix[:-1] + chr(ord(prefix[-1]) + 1)
        while True:
            found = cast(
                "list[tuple[str, int, int]]",
                rows_of(self._db.execute(SELECT_TABLE, (sink.id, key, row, end, *position, CHUNK))),
            )
            removed += self._lanes.remove(sink, {row for _, row, below in found if below}, now)
            if len(found) < CHUNK:
                return removed
            key, row, _ = found[-1]

    # -- for people -------------------------------------------------------------------------------------------------
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
        rows: set[int] = set()
        if select.key is not None or select.all:
            self._collect_rows(sink, select.key, rows, limit, spare)
        if select.key is None:
            self._collect_held(sink, select.reason, rows, limit, spare)
        return len(self._lanes.remove(sink, rows, self._clock.monotonic()))

    def _collect_rows(self, sink: SinkRow, key: str | None, rows: set[int], limit: int, spare: frozenset[int]) -> None:
        """Of one key, or of the queue."""
        after = 0
        while len(rows) < limit:
            cursor = (
                self._db.execute(SELECT_QUEUE, (sink.id, after, CHUNK))
                if key is None
                else self._db.execute(SELECT_KEY_ROWS, (sink.id, key, after, CHUNK))
            )
            found = cast("list[int]", rows_of(cursor))
            rows.update([row for row in found if row not in spare][: limit - len(rows)])
            if len(found) < CHUNK:
                return
            after = found[-1]

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


def _text(said: str) -> str:
    """What a server said, bounded and fit for UTF-8."""
    return said[:TEXT_CHARACTERS].encode("utf-8", "replace").decode()


def _by_key(row: Row) -> str:
    return cast(str, row[1])

"""Applying writes: what the writer's thread does between BEGIN and COMMIT.

`Transaction` is one group commit. It works on copies of the sinks' rows and hands them over, with the numbers of the
spans that were put, when the commit has returned; after a rollback it is thrown away and nothing has happened.

Anything that contradicts the contract (a put without its position, a message that was never put) is a defect of the
caller and raises; the store then fails as a whole, because what the caller believes is no longer what is on disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import orjson

from spillway.change import table_prefix
from spillway.chunk import MOST_PLACES, PLACE_BITS, Keying, Message, Piece, Span
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.impl import gather
from spillway.position import Position
from spillway.store.backfills import write_backfill
from spillway.store.base import Counters, Gap, Identity, Park, SinkState, TakenTable, Write, Written
from spillway.store.lanes import Failure, Lanes
from spillway.store.queue import Put, Queue, Taken
from spillway.store.refreshes import ask_refreshes, drop_refreshes
from spillway.store.rows import CHUNK, INSERT_BYTES, Row, SinkRow, as_json, message_rows, ones, rows_of, single

INSERT_DEAD = """
    INSERT INTO dead (id, sink, keying, key_groups, tables, key1, stored, size, attempts, reason, detail, keys, meta,
        data)
    SELECT m.id, m.sink, keying, key_groups, tables, key1, stored, size,
        json_extract(j.value, '$[3]') + coalesce(
            (SELECT p.attempts FROM parked p WHERE p.sink = m.sink AND p.key = m.key1 AND p.head = m.id), 0),
        json_extract(j.value, '$[1]'), json_extract(j.value, '$[2]'), keys, meta, data
    FROM json_each(?2) j CROSS JOIN message m ON m.id = json_extract(j.value, '$[0]') AND m.sink = ?1"""
SELECT_TABLE = """
    SELECT json_group_array(json_array(key, id, below)) FROM (
        SELECT l.key, l.id, (m.lsn, m.idx, m.sub) < (?5, ?6, ?7) AS below
        FROM lane l CROSS JOIN message m ON m.id = l.id
        WHERE l.sink = ?1 AND (l.key, l.id) > (?2, ?3) AND l.key < ?4 ORDER BY l.key, l.id LIMIT ?8)"""
SELECT_KEY_ROWS = """
    SELECT json_group_array(id) FROM (
        SELECT id FROM lane WHERE sink = ? AND key = ? AND id > ? AND id < ? ORDER BY id LIMIT ?)"""
UPDATE_GAP = """
    UPDATE sink SET gap_first = ?, gap_last = ?, gap_since = ?, gap_reason = ?, gap_tables = ? WHERE id = ?"""
UPDATE_SINK = """
    UPDATE sink SET lsn = ?, idx = ?, sub = ?, run = ?, messages = ?, bytes = ?, queued = ?, parked_keys = ?,
    dead_letters = ?, refreshes = ?, asked = ? WHERE id = ?"""
SELECT_SINK = """
    SELECT id, slot, run, lsn, idx, sub, asked, messages, bytes, queued, parked_keys, dead_letters, refreshes,
    paused, gap_first, gap_last, gap_since, gap_reason, gap_tables FROM sink WHERE name = ?"""
UPSERT_SLOT = """
    INSERT INTO slot (name, system_id, timeline, epoch, mark) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET system_id = excluded.system_id, timeline = excluded.timeline,
        mark = CASE WHEN epoch = excluded.epoch THEN max(mark, excluded.mark) ELSE excluded.mark END,
        epoch = excluded.epoch"""

UPSERT_TAKEN = "INSERT OR REPLACE INTO taken (slot, oid, schema, tbl, partition) VALUES (?, ?, ?, ?, ?)"
DELETE_DEAD = "DELETE FROM dead WHERE sink = ?1 AND id IN (SELECT value FROM json_each(?2))"
SELECT_DEAD = """
    SELECT json_group_array(id) FROM dead WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""

TEXT_CHARACTERS = 1000  # of a reason or detail


class Transaction:
    def __init__(self, db: sqlite3.Connection, sinks: dict[str, SinkRow], next_span: int, clock: Clock) -> None:
        self._db = db
        self._queue = Queue(db)
        self._lanes = Lanes(db)
        self._committed = sinks
        self._clock = clock
        self._sinks: dict[str, SinkRow] = {}  # changed by this transaction
        self._put: dict[int, tuple[int, Put]] = {}  # by identity of the span: its number
        self.next_span = next_span

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
        counters = (c.messages, c.bytes, c.queued, c.parked_keys, c.dead_letters, c.refreshes, sink.asked)
        self._db.execute(UPDATE_SINK, (*position, sink.run, *counters, sink.id))

    def committed(self) -> None:
        """COMMIT has returned: publish."""
        self._committed.update(self._sinks)
        for number, put in self._put.values():
            put.span.numbers = put.numbers
            put.span.base = number << PLACE_BITS

    # -- start ------------------------------------------------------------------------------------------------------
    def open_sink(self, name: str, slot: str) -> SinkState:
        if name in self._sinks:
            self._save(self._sinks[name])
        found = self._db.execute(SELECT_SINK, (name,)).fetchone()
        if found is None:
            self._db.execute("INSERT INTO sink (name, slot) VALUES (?, ?)", (name, slot))
            found = self._db.execute(SELECT_SINK, (name,)).fetchone()
        number, its_slot, run, lsn, idx, sub, asked = found[:7]
        if its_slot != slot:
            raise SpillwayError(
                "sink_moved",
                f"the state of sink {name} belongs to slot {its_slot}, not to {slot}",
                "give the sink another name (it then starts anew), or its database the slot it had",
            )
        counters = Counters(*found[7:13])
        paused, gap_first, gap_last, gap_since, why, missed = found[13:]
        position = None if lsn is None else Position(lsn, idx, sub)
        self._sinks[name] = SinkRow(number, slot, run, position, counters, asked)
        tables = None if missed is None else tuple((schema, table) for schema, table in orjson.loads(missed))
        gap = None if gap_first is None else Gap(gap_first, gap_last, gap_since, why, tables)
        return SinkState(position, None if paused is None else bool(paused), gap, replace(counters))

    def write_identity(self, identity: Identity) -> None:
        before = self._db.execute("SELECT epoch FROM slot WHERE name = ?", (identity.slot,)).fetchone()
        if before is not None and before[0] != identity.epoch:
            self._db.execute("UPDATE sink SET lsn = NULL, idx = NULL, sub = NULL WHERE slot = ?", (identity.slot,))
            self._db.execute("DELETE FROM taken WHERE slot = ?", (identity.slot,))
            for name, sink in self._committed.items():
                if sink.slot == identity.slot:
                    self._sink(name).position = None
        self._db.execute(
            UPSERT_SLOT, (identity.slot, identity.system_id, identity.timeline, identity.epoch, identity.mark)
        )

    def write_taken_table(self, slot: str, oid: int, table: TakenTable) -> None:
        self._db.execute(UPSERT_TAKEN, (slot, oid, table.schema, table.table, table.partition))

    # -- a write, in the order of its fields ------------------------------------------------------------------------
    def write(self, write: Write, puts: Sequence[Put]) -> Written:
        sink = self._sink(write.sink)
        now = self._clock.monotonic()
        if puts:
            self._append(sink, puts)
        if write.position is not None:
            if sink.position is not None and write.position < sink.position:
                raise ValueError(f"position {write.position} of sink {write.sink} is below {sink.position}")
            sink.position = write.position
        if write.resolved:
            self._queue.take(sink, self._queue.look(sink, self._numbers(write.resolved)))
        if write.resolved_held:
            self._lanes.remove(sink, [self._row(m) for m in write.resolved_held], now)
        for message in write.superseded_by:
            self._remove_before(sink, message, now)
        if write.park:
            self._park(sink, write.park, now)
        if write.hold:
            self._lanes.settle(sink, self._hold(sink, [self._row(m) for m in write.hold]), now)
        if write.bury:
            self._bury(sink, write.bury, now)
        if write.revive:
            self._revive(sink, write.revive, now)
        if write.unbury:
            sink.counters.dead_letters -= self._db.execute(DELETE_DEAD, (sink.id, as_json(write.unbury))).rowcount
        if write.drop_table_below is not None:
            schema, table, below = write.drop_table_below
            self._drop_table(sink, (schema, table), below, now)
        if write.paused is not None:
            self._db.execute("UPDATE sink SET paused = ? WHERE id = ?", (write.paused, sink.id))
        if write.gap is not None or write.clear_gap:
            gap = write.gap
            values: tuple[object, ...] = (None,) * 5
            if gap is not None:
                tables = None if gap.tables is None else as_json(gap.tables)
                values = (gap.first_lsn, gap.last_lsn, gap.since, gap.reason, tables)
            self._db.execute(UPDATE_GAP, (*values, sink.id))
        if write.backfill is not None:
            write_backfill(self._db, sink.id, write.backfill)
        if write.ask is not None:
            ask_refreshes(self._db, sink, write.ask, self._clock.wall())
        if write.refreshed:
            drop_refreshes(self._db, sink, write.refreshed)
        return Written(replace(sink.counters))

    def _append(self, sink: SinkRow, puts: Sequence[Put]) -> None:
        numbered: list[tuple[int, Put]] = []
        for put in puts:
            # One of which nothing was left gets a number, too: what is said of it later is passed over.
            self._put[id(put.span)] = (self.next_span, put)
            if put.indices:
                numbered.append((self.next_span, put))
            self.next_span += 1
        if numbered:
            first = numbered[0][1].position()
            if sink.position is not None and first <= sink.position:
                raise ValueError(f"a put at {first} for a sink at {sink.position}")
            self._queue.put(sink, numbered, self._clock.wall())

    def _where(self, span: Span) -> tuple[int, Sequence[int] | None]:
        """The number of a span, or the one it gets when this transaction commits, and the numbers of its places."""
        put = self._put.get(id(span))
        if put is not None:
            return put[0], put[1].numbers
        if span.base <= 0:
            raise ValueError("a span that was never put")
        return span.base >> PLACE_BITS, span.numbers

    def _row(self, message: Message) -> int:
        """The row of a message; negative for one that was resolved when its span was put."""
        span, numbers = self._where(message.span)
        return span << PLACE_BITS | (message.place if numbers is None else numbers[message.place])

    def _numbers(self, pieces: Iterable[Piece]) -> dict[int, int]:
        found: dict[int, int] = {}
        for span, start, stop in pieces:
            number, numbers = self._where(span)
            if numbers is None:
                bits = ones(start, stop)
            else:
                bits = 0
                for one in numbers[start:stop]:
                    bits |= 1 << one if one >= 0 else 0
            found[number] = found.get(number, 0) | bits
        return found

    def _remove_before(self, sink: SinkRow, message: Message, now: float) -> None:
        """Remove what waits in the lane of a message that was resolved, up to where it stood."""
        (key,) = message.keys
        row = self._row(message)
        while found := rows_of(self._db.execute(SELECT_KEY_ROWS, (sink.id, key, 0, row, CHUNK))):
            self._lanes.remove(sink, cast("list[int]", found), now)

    def _park(self, sink: SinkRow, parks: Sequence[Park], now: float) -> None:
        by_row = {self._row(park.message): park for park in parks}
        entered = self._hold(sink, by_row)
        failures = {
            row: Failure(_text(park.reason), _text(park.detail), now + park.due_seconds, int(park.counts_attempt))
            for row, park in by_row.items()
        }
        self._lanes.settle(sink, entered | self._lanes.keys(sink, by_row), now, failures)

    def _hold(self, sink: SinkRow, rows: Iterable[int]) -> set[str]:
        """Into their lanes, as far as they are in the queue. Returns the keys, to be settled."""
        return self._enter(sink, self._queue.look(sink, by_span(rows)))

    def _enter(self, sink: SinkRow, taken: Sequence[Taken]) -> set[str]:
        messages: list[Row] = []
        lanes: list[Row] = []
        keys: set[str] = set()
        size = 0
        for one in taken:
            for message in self._queue.messages(one):
                row, its = message_rows(message, message.row, sink.id, one.row.stored)
                messages.append(row)
                lanes += its
                size += message.body_bytes
                if size > INSERT_BYTES:
                    keys |= self._lanes.enter(sink, messages, lanes)
                    messages, lanes, size = [], [], 0
        self._queue.take(sink, taken)
        return keys | self._lanes.enter(sink, messages, lanes)

    def _bury(self, sink: SinkRow, buries: Sequence[Park], now: float) -> None:
        for start in range(0, len(buries), CHUNK):
            letters = [
                (self._row(b.message), _text(b.reason), _text(b.detail), int(b.counts_attempt))
                for b in buries[start : start + CHUNK]
            ]
            rows = [row for row, *_ in letters]
            self._hold(sink, rows)
            sink.counters.dead_letters += self._db.execute(INSERT_DEAD, (sink.id, as_json(letters))).rowcount
            self._lanes.remove(sink, rows, now)

    def _revive(self, sink: SinkRow, letters: Sequence[tuple[int, Message]], now: float) -> None:
        """Dead letters become the last of their lanes."""
        numbers = as_json(row for row, _ in letters)
        dead = set(cast("list[int]", rows_of(self._db.execute(SELECT_DEAD, (sink.id, numbers)))))
        self._db.execute(DELETE_DEAD, (sink.id, numbers))
        sink.counters.dead_letters -= len(dead)
        stored = self._clock.wall()
        messages: list[Row] = []
        lanes: list[Row] = []
        for at, (_, message) in enumerate([letter for letter in letters if letter[0] in dead]):
            if at % MOST_PLACES == 0:
                first, self.next_span = self.next_span << PLACE_BITS, self.next_span + 1
            span = message.span
            chunk = gather(span.chunk, [span.indices[message.place]], Keying.hash_word(span.keying))
            one = single(Span(chunk, min(span.keying, Keying.GROUPED)), 0, chunk.data)
            row, its = message_rows(one, first | at % MOST_PLACES, sink.id, stored, waits=True)
            messages.append(row)
            lanes += its
        self._lanes.settle(sink, self._lanes.enter(sink, messages, lanes), now)

    def _drop_table(self, sink: SinkRow, table: tuple[str, str], below: Position, now: float) -> None:
        for taken in self._queue.of_table(sink, table, below):
            self._queue.take(sink, [taken] if taken.bits else [])
        prefix = table_prefix(*table)
        key, row, end = prefix, 0, prefix[:-1] + chr(ord(prefix[-1]) + 1)
        while True:
            found = cast(
                "list[tuple[str, int, int]]",
                rows_of(self._db.execute(SELECT_TABLE, (sink.id, key, row, end, *below, CHUNK))),
            )
            self._lanes.remove(sink, {row for _, row, below in found if below}, now)
            if len(found) < CHUNK:
                return
            key, row, _ = found[-1]


def _text(said: str) -> str:
    """What a server said, bounded and fit for UTF-8."""
    return said[:TEXT_CHARACTERS].encode("utf-8", "replace").decode()


def by_span(rows: Iterable[int]) -> dict[int, int]:
    """Rows as numbers by span."""
    found: dict[int, int] = {}
    for row in rows:
        if row > 0:
            span = row >> PLACE_BITS
            found[span] = found.get(span, 0) | 1 << (row & (MOST_PLACES - 1))
    return found

"""The reading half of the SQLite store: two connections, each with its lock, any thread; and one of its own for `ask`.

Every method is a few statements by index: they visit the rows that they return and a bounded number of others (a test
holds every statement's plan against that). Where there are several, they see one state. Bodies are loaded only where
they fit the caller's bytes: the sizes are read before.

`newest` scans the key texts of the queue: it tries the last `PROBED` keys there. It shares the connection of what
people ask for (`spillway.store.people`), so that nobody of the stream stands behind it. It makes no snapshot of the
scan, which would keep the WAL from being emptied: the queue only grows at its end, so what the scan did not find before
a row will never be there. One snapshot at the end is the state that the answer is true of: the message is in the queue
and its keys are not parked.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple, cast

from spillway.chunk import FLAGS, MOST_PLACES, PLACE_BITS, Message, Span
from spillway.clock import Clock
from spillway.errors import StoreFailed
from spillway.store.backfills import SELECT_BACKFILLS, SELECT_RUNNING
from spillway.store.base import DueRefresh, Identity, LaneHead, P, T, TakenTable
from spillway.store.file import free_bytes, open_reader
from spillway.store.queue import find_spans, read_span, with_key
from spillway.store.refreshes import SELECT_DUE_TABLES, SELECT_REFRESHES, table_text
from spillway.store.rows import (
    CHUNK,
    MESSAGE_COLUMNS,
    SPAN_COLUMNS,
    Row,
    SpanRow,
    Value,
    as_json,
    lowest,
    mark,
    ones,
    read_blobs,
    read_message,
    read_tables,
    rows_of,
    single,
    span_rows,
)

PROBED = 8
_LAST_ROW = (1 << 63) - 1
PAGE_SPANS = 64  # at most in a page

COLUMNS = ", ".join(f"m.{name.strip()}" for name in MESSAGE_COLUMNS.split(","))
_RUN = "(SELECT run FROM sink WHERE id = ?1)"
_HEAD = "p.key, p.head, p.attempts, p.reason, p.run, p.due"


def _heads(*ranges: tuple[str, str, str]) -> str:
    """The first of each of some ranges of an index: index, condition, order."""
    parts = [
        f"""SELECT * FROM (SELECT {_HEAD} FROM parked p INDEXED BY {index}
            WHERE p.sink = ?1 AND p.due IS NOT NULL AND {which} AND ?2 >= 0 AND ?3 IS NOT NULL
            ORDER BY {order} LIMIT ?4)"""
        for index, which, order in ranges
    ]
    return f"""
    SELECT json_group_array(json_array(q.head, q.attempts, q.reason, q.run, q.due, l.bytes))
    FROM ({" UNION ALL ".join(parts)}) q CROSS JOIN lane l ON l.sink = ?1 AND l.key = q.key AND l.id = q.head"""


class _Head(NamedTuple):
    row: int
    attempts: int
    reason: str
    run: int
    due: float
    bytes: int


SELECT_SINK_ID = "SELECT id FROM sink WHERE name = ?"
SELECT_IDENTITY = "SELECT system_id, timeline, name, epoch, mark FROM slot WHERE name = ?"
SELECT_TAKEN = "SELECT oid, schema, tbl, partition FROM taken WHERE slot = ?"
SELECT_PARKED = """
    SELECT json_group_array(p.key) FROM json_each(?2) k CROSS JOIN parked p ON p.sink = ?1 AND p.key = k.value"""
SELECT_PAGE = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT {SPAN_COLUMNS} FROM span WHERE sink = ?1 AND id >= ?2 ORDER BY id LIMIT ?3)"""
SELECT_TRUNCATED = "SELECT DISTINCT tables FROM span INDEXED BY span_truncates WHERE sink = ? AND truncates"
SELECT_LAST = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT {SPAN_COLUMNS} FROM span WHERE sink = ?1 ORDER BY id DESC LIMIT ?2)"""
# Heads that wait for nothing of the queue: of older runs, and those whose time has come; and those that have waited:
# they were never tried, so their time has come.
_WAITED = ("parked_waits", "p.waits_for > 0 AND p.waits_for <= ?2", "p.waits_for")
SELECT_DUE = _heads(
    ("parked_due", f"p.waits_for = 0 AND p.run < {_RUN}", "p.run, p.due"),
    ("parked_due", f"p.waits_for = 0 AND p.run = {_RUN} AND p.due <= ?3", "p.run, p.due"),
    _WAITED,
)
SELECT_REGARDLESS = _heads(("parked_due", "p.waits_for = 0", "p.run, p.due"), _WAITED)
SELECT_MESSAGES = f"SELECT {COLUMNS} FROM json_each(?2) j CROSS JOIN message m ON m.id = j.value AND m.sink = ?1"
SELECT_RUN = "SELECT run FROM sink WHERE id = ?"


def _latest(flags: str) -> str:
    """``flags``: hexadecimal digits that the lower half of the flags of an image has."""
    image = f"instr('{flags}', substr(hex(substr(w.meta, {FLAGS + 1}, 1)), 2)) > 0"  # of the only record of `w`
    return f"""
    SELECT {COLUMNS} FROM message m
    WHERE m.id = (
        SELECT l.id FROM lane l CROSS JOIN message w ON w.id = l.id
        WHERE l.sink = ?1 AND l.key = ?2 AND {image} ORDER BY l.id DESC LIMIT 1)
    AND length(m.data) <= ?3
    AND NOT EXISTS (SELECT 1 FROM lane WHERE sink = ?1 AND key = ?2 AND other IS NOT NULL)"""


SELECT_LATEST = _latest("13579BDF")  # WHOLE is the lowest bit
SELECT_LATEST_PARTIAL = _latest("01234567")  # TOO_LARGE is the highest
SELECT_OLDEST = """
    SELECT (SELECT commit_time FROM span WHERE sink = ?1 ORDER BY id LIMIT 1),
        (SELECT m.commit_time FROM message m WHERE m.id = (
            SELECT head FROM parked WHERE sink = ?1 ORDER BY head LIMIT 1))"""
SELECT_QUEUED_FROM = "SELECT first_lsn FROM span WHERE sink = ? ORDER BY id LIMIT 1"


class Reads:
    """What `spillway.store.sqlite.SqliteStore` answers without its writer."""

    reads: int

    def __init__(self, path: Path, clock: Clock) -> None:
        self.reads = 0
        self._path = path
        self._clock = clock
        self._reader = open_reader(path)
        self._reading = Lock()
        self._people = open_reader(path)  # what people ask for never stands before what the stream asks for
        self._asking = Lock()
        self._asked_in = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spillway-store-asked")
        self._sink_ids: dict[str, int] = {}

    def close_reader(self) -> None:
        self._asked_in.shutdown(cancel_futures=True)
        with self._reading, self._asking:
            self._reader.close()
            self._people.close()

    def _rows(self, statement: str, given: Sequence[Value]) -> list[Row]:
        with self._stream() as db:
            self.reads += 1
            return db.execute(statement, given).fetchall()

    def _asked(self, statement: str, given: Sequence[Value]) -> list[Row]:
        with self._asked_for() as db:
            return db.execute(statement, given).fetchall()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[sqlite3.Connection]:
        with self._reading, _failing():
            yield self._reader

    @contextlib.contextmanager
    def _asked_for(self) -> Iterator[sqlite3.Connection]:
        with self._asking, _failing():
            yield self._people

    def ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return self._asked_in.submit(call, *args, **kwargs)
        except RuntimeError:  # it was shut down
            refused: Future[T] = Future()
            refused.set_exception(StoreFailed("store_closed", "the store is closed"))
            return refused

    def _first(self, statement: str, given: Sequence[Value]) -> Row | None:
        rows = self._rows(statement, given)
        return rows[0] if rows else None

    def _id(self, sink: str) -> int:
        """The number of a sink; 0, which none has, for one that was never opened."""
        number = self._sink_ids.get(sink)
        if number is None:
            found = self._first(SELECT_SINK_ID, (sink,))
            if found is None:
                return 0
            number = self._sink_ids[sink] = cast(int, found[0])
        return number

    # -- start ------------------------------------------------------------------------------------------------------
    def identity(self, slot: str) -> Identity | None:
        found = self._first(SELECT_IDENTITY, (slot,))
        return None if found is None else Identity(*cast("tuple[str, int, str, int, int]", found))

    def taken_tables(self, slot: str) -> dict[int, TakenTable]:
        rows = cast("list[tuple[int, str, str, int]]", self._rows(SELECT_TAKEN, (slot,)))
        return {oid: TakenTable(schema, table, bool(partition)) for oid, schema, table, partition in rows}

    # -- the stream -------------------------------------------------------------------------------------------------
    def parked(self, sink: str, keys: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for start in range(0, len(keys), CHUNK):
            with self._stream() as db:
                self.reads += 1
                cursor = db.execute(SELECT_PARKED, (self._id(sink), as_json(keys[start : start + CHUNK])))
                found.update(cast("list[str]", rows_of(cursor)))
        return found

    def page(self, sink: str, after_row: int, max_messages: int, max_bytes: int) -> list[Span]:
        number = self._id(sink)
        with self._stream() as db, snapshot(db):
            self.reads += 2  # also when nothing fits: the number of reads is the same whatever waits (I5)
            chosen: list[tuple[SpanRow, int]] = []
            for row, done in behind(db, number, after_row, min(max_messages, PAGE_SPANS)):
                max_bytes -= row.body_bytes
                max_messages -= row.messages
                if max_bytes < 0 or max_messages < 0:
                    break
                chosen.append((row, done))
            blobs = read_blobs(db, ("keys", "meta", "data"), [row.id for row, _ in chosen])
        spans: list[Span] = []
        for (row, done), found in zip(chosen, blobs, strict=True):
            if found is not None:
                keys, meta, data = found
                span = row.span(keys, meta, data)
                mark(span, done)
                spans.append(span)
        return spans

    def bytes_at_head(self, sink: str, after_row: int) -> tuple[int, int] | None:
        number = self._id(sink)
        with self._stream() as db:
            self.reads += 1
            for row, _ in behind(db, number, after_row, 1):
                return row.body_bytes, row.messages
        return None

    def newest(self, sink: str, max_bytes: int) -> Message | None:
        number = self._id(sink)
        firsts: dict[str, int] = {}
        with self._asked_for() as db:
            self.reads += 1
            last = span_rows(db.execute(SELECT_LAST, (number, PROBED)))
            truncated = {t for (tables,) in db.execute(SELECT_TRUNCATED, (number,)) for t in read_tables(tables)}
            for one in last:
                found = None if truncated.issuperset(read_tables(one.tables)) else read_span(db, number, one.id)
                if found is None:
                    continue
                row, span = found
                done = row.places(row.done)
                for place in range(span.size - 1, -1, -1):
                    if done >> place & 1 or (truncated and span.chunk.table(span.indices[place]) in truncated):
                        continue
                    its_keys = span.keys(place)
                    for key in its_keys:
                        if key not in firsts:
                            if len(firsts) == PROBED:
                                return None
                            firsts[key] = _first_of(db, number, key)
                    if all(firsts[key] == span.row(place) for key in its_keys):
                        return _read_if(db, number, row, span, place, max_bytes)
        return None

    def due(
        self, sink: str, max_keys: int, max_bytes: int, read_up_to: int, regardless: bool = False
    ) -> list[LaneHead]:
        number = self._id(sink)
        with self._stream() as db, snapshot(db):
            self.reads += 3
            heads = self._due(db, number, max_keys, read_up_to, regardless)
            if heads and heads[0].bytes > max_bytes:  # `bytes_due` may have told of another
                heads = self._due(db, number, 1, read_up_to, regardless)
            chosen: dict[int, _Head] = {}
            for head in heads:
                max_bytes -= head.bytes
                if max_bytes < 0:
                    break
                chosen[head.row] = head
            rows = db.execute(SELECT_MESSAGES, (number, as_json(chosen))).fetchall()
        said = [chosen[row[0]] for row in rows]
        return [LaneHead(read_message(row), head.attempts, head.reason) for row, head in zip(rows, said, strict=True)]

    def _due(self, db: sqlite3.Connection, number: int, limit: int, read_up_to: int, regardless: bool) -> list[_Head]:
        """The longest due first; of those that wait for the queue to be read, which are found by where they wait, the
        first of so many."""
        statement = SELECT_REGARDLESS if regardless else SELECT_DUE
        given = (number, _read_up_to(db, number, read_up_to), self._clock.monotonic(), limit)
        found = rows_of(db.execute(statement, given))
        heads = [_Head(*head) for head in cast("list[tuple[int, int, str, int, float, int]]", found)]
        return sorted(heads, key=lambda head: (head.run, head.due))[:limit]

    def bytes_due(self, sink: str, read_up_to: int, regardless: bool = False) -> int | None:
        number = self._id(sink)
        with self._stream() as db, snapshot(db):
            self.reads += 2
            heads = self._due(db, number, 1, read_up_to, regardless)
        return heads[0].bytes if heads else None

    def latest(self, sink: str, key: str, max_bytes: int, *, partial_images: bool) -> Message | None:
        statement = SELECT_LATEST_PARTIAL if partial_images else SELECT_LATEST
        found = self._first(statement, (self._id(sink), key, max_bytes))
        return None if found is None else read_message(found)

    def next_due_seconds(self, sink: str, read_up_to: int) -> float | None:
        number = self._id(sink)
        with self._stream() as db, snapshot(db):
            self.reads += 3
            heads = self._due(db, number, 1, read_up_to, True)
            found = db.execute(SELECT_RUN, (number,)).fetchone()
        if not heads:
            return None
        return 0.0 if heads[0].run < found[0] else heads[0].due - self._clock.monotonic()

    def backfills(self, sink: str, *, ended: bool) -> list[tuple[str, bytes]]:
        given = (self._id(sink),)
        rows = self._asked(SELECT_BACKFILLS, given) if ended else self._rows(SELECT_RUNNING, given)
        return cast("list[tuple[str, bytes]]", rows)

    def refreshes(self, sink: str, table: tuple[str, str], after_place: int, limit: int) -> list[DueRefresh]:
        number = self._id(sink)
        with self._stream() as db:
            self.reads += 1
            cursor = db.execute(SELECT_REFRESHES, (number, table_text(table), after_place, limit))
            found = cast("list[tuple[int, str, int, float]]", rows_of(cursor))
        return [DueRefresh(table, key, place, asked, since) for place, key, asked, since in found]

    def due_tables(self, sink: str) -> list[tuple[str, str]]:
        number = self._id(sink)
        with self._stream() as db:
            self.reads += 1
            found = cast("list[tuple[str, str]]", rows_of(db.execute(SELECT_DUE_TABLES, (number,))))
        return [(schema, table) for schema, table in found]

    def oldest(self, sink: str) -> float | None:
        found = self._first(SELECT_OLDEST, (self._id(sink),))
        assert found is not None
        return min([time for time in cast("tuple[float | None, ...]", found) if time is not None], default=None)

    def queued_from(self, sink: str) -> int | None:
        found = self._first(SELECT_QUEUED_FROM, (self._id(sink),))
        return None if found is None else cast("int", found[0])

    def free_bytes(self) -> int:
        return free_bytes(self._path.parent)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StoreFailed("store_failed", f"the state file cannot be read: {error}", "see the disk it is on") from error


@contextlib.contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Several statements that see the same state."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")


def behind(db: sqlite3.Connection, sink: int, after_row: int, spans: int) -> list[tuple[SpanRow, int]]:
    """The next spans behind the cursor, and what of each is gone or before it, by place."""
    cursor, at = after_row >> PLACE_BITS, (after_row & (MOST_PLACES - 1)) + 1
    found = []
    for row in span_rows(db.execute(SELECT_PAGE, (sink, cursor, spans + 1))):
        done = row.done
        if row.id == cursor:
            done |= ones(0, at)
        gone = row.places(done)
        if gone.bit_count() < row.messages:
            found.append((row, gone))
    return found[:spans]


def _read_up_to(db: sqlite3.Connection, sink: int, row: int) -> int:
    """The last row before which nothing of the queue is unread, if this one was read last."""
    for span, gone in behind(db, sink, row, 1):
        first = lowest(~gone)
        numbers = span.numbers
        return (span.id << PLACE_BITS | (first if numbers is None else numbers[first])) - 1
    return _LAST_ROW


def _first_of(db: sqlite3.Connection, sink: int, key: str) -> int:
    """The row of the first of a key, which is in the queue; 0 if the key is parked."""
    if rows_of(db.execute(SELECT_PARKED, (sink, as_json([key])))):
        return 0
    for _, span, places in with_key(db, sink, key):
        return span.row(places[0])
    return 0


def _read_if(db: sqlite3.Connection, sink: int, was: SpanRow, span: Span, place: int, max_bytes: int) -> Message | None:
    """The message, if it is still there, where it was, under no key that is parked by now, and fits."""
    with snapshot(db):
        if rows_of(db.execute(SELECT_PARKED, (sink, as_json(span.keys(place))))):
            return None
        for row in find_spans(db, sink, [was.id]):
            there = row.kept_text == was.kept_text and not row.places(row.done) >> place & 1
            if there and span.bytes_between(place, place + 1) <= max_bytes:
                return read_one(db, span, place)
    return None


def read_one(db: sqlite3.Connection, span: Span, place: int) -> Message:
    """A message of the queue, alone. ``span`` has no bodies."""
    end = span.ends[place]
    start = span.ends[place - 1] if place else 0
    with db.blobopen("span_data", "data", span.base >> PLACE_BITS, readonly=True) as blob:
        blob.seek(start)
        return single(span, place, blob.read(end - start))

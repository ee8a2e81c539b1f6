"""The queue: spans, what of them is gone, and what leaves them.

Runs inside the writer's transaction. Nothing here looks at single messages, but where some of a span are taken out of
it: `look` finds what of the wanted numbers is still there, `take` removes it, whether to be forgotten or because it has
been copied into lanes (`messages`). A span of which all is gone is deleted; else the bits of what is gone are set.

Sets of numbers are integers, a bit per number: a span has at most 65,536, and Python does such sets at once.
"""

from __future__ import annotations

import sqlite3
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import orjson

from spillway.change import ACTIONS
from spillway.chunk import ACTION, LSN, PLACE_BITS, TABLE, TIME, WORDS, Chunk, Keying, Message, Span
from spillway.impl import gather
from spillway.position import Position
from spillway.store.rows import (
    CHUNK,
    SPAN_COLUMNS,
    Row,
    SinkRow,
    SpanRow,
    as_json,
    insert,
    lowest,
    ones,
    places_of,
    private_row,
    read_blobs,
    read_tables,
    runs,
    single,
    size_of,
    span_rows,
    write_tables,
)

INSERT_SPAN = (
    "span (id, sink, keying, key_groups, messages, bytes, messages_left, bytes_left, first_lsn, commit_time, stored,"
    " tables, truncates, done, kept)"
)
INSERT_DATA = "span_data (id, keys, meta, data)"
_QUALIFIED = ", ".join(f"q.{name}" for name in SPAN_COLUMNS.split(", "))
SELECT_SPANS = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM span
    WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""
SELECT_BEHIND = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT {SPAN_COLUMNS} FROM span WHERE sink = ?1 AND id > ?2 ORDER BY id LIMIT ?3)"""
# In one statement: a reader without a snapshot gets what belongs together, though the span be written anew.
SELECT_SPAN = f"""
    SELECT {_QUALIFIED}, d.keys, d.meta FROM span q CROSS JOIN span_data d ON d.id = q.id
    WHERE q.id = ?2 AND q.sink = ?1"""
# Of the next spans those in whose texts the key occurs, and how far that is.
SELECT_WITH_KEY = """
    SELECT json_group_array(q.id) FILTER (WHERE instr(d.keys, ?3)), max(q.id) FROM (
        SELECT id FROM span WHERE sink = ?1 AND id > ?2 ORDER BY id LIMIT ?4) q
    CROSS JOIN span_data d ON d.id = q.id"""
SELECT_BELOW = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT * FROM span WHERE sink = ?1 AND id > ?2 AND first_lsn <= ?3 AND instr(tables, ?4)
        ORDER BY id LIMIT ?5)"""
SELECT_META = "SELECT meta FROM span_data WHERE id = ?"
DELETE_SPANS = "DELETE FROM span WHERE id IN (SELECT value FROM json_each(?))"
DELETE_DATA = "DELETE FROM span_data WHERE id IN (SELECT value FROM json_each(?))"
UPDATE_SPAN = "UPDATE span SET messages_left = ?, bytes_left = ?, commit_time = ?, done = ? WHERE id = ?"

TRUNCATE = ACTIONS.index("truncate")
SCANNED = 512  # spans that are searched at once: no statement keeps the WAL from being emptied for long


@dataclass(frozen=True, slots=True)
class Put:
    """A span as it was when `Store.write` was called: the caller goes on to resolve it and to let go of its chunk."""

    span: Span
    chunk: Chunk
    indices: Sequence[int]
    keying: int
    numbers: list[int] | None  # by place; -1 for what is left out

    @classmethod
    def of(cls, span: Span) -> Put:
        if span.resolved.count(0) == span.size:
            return cls(span, span.chunk, span.indices, span.keying, None)
        places = [place for place, gone in enumerate(span.resolved) if not gone]
        numbers = [-1] * span.size
        for number, place in enumerate(places):
            numbers[place] = number
        return cls(span, span.chunk, [span.indices[place] for place in places], span.keying, numbers)

    @property
    def size_bytes(self) -> int:
        """About so many bytes of bodies."""
        return len(self.chunk.data) * len(self.indices) // (self.chunk.count or 1)

    def position(self) -> tuple[int, int, int]:
        return Span(self.chunk, self.keying, self.indices[:1]).position(0)


@dataclass(frozen=True, slots=True)
class Taken:
    """Numbers of a span that are in the queue, and wanted; bits by number."""

    row: SpanRow
    done: int
    bits: int

    @property
    def count(self) -> int:
        return self.bits.bit_count()


class Queue:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def put(self, sink: SinkRow, puts: Sequence[tuple[int, Put]], stored: float) -> None:
        spans: list[Row] = []
        data: list[Row] = []
        for number, put in puts:
            chunk = gather(put.chunk, put.indices, Keying.hash_word(put.keying))
            keying = min(put.keying, Keying.GROUPED)
            size, commit_time = len(chunk.data), chunk.word(0, TIME) / 1_000_000
            counts = (chunk.count, size, chunk.count, size, chunk.word(0, LSN), commit_time, stored)
            truncates = TRUNCATE in chunk.byte_column(ACTION)
            spans.append(
                (number, sink.id, keying, chunk.groups, *counts, write_tables(chunk.tables), int(truncates), "0", None)
            )
            data.append((number, chunk.keys, chunk.meta, chunk.data))
            sink.counters.messages += chunk.count
            sink.counters.queued += chunk.count
            sink.counters.bytes += size
        insert(self._db, INSERT_SPAN, spans)
        insert(self._db, INSERT_DATA, data)

    def look(self, sink: SinkRow, wanted: dict[int, int]) -> list[Taken]:
        """What of these numbers, by span, is in the queue, in its order."""
        found: list[Taken] = []
        spans = sorted(wanted)
        for start in range(0, len(spans), CHUNK):
            rows = find_spans(self._db, sink.id, spans[start : start + CHUNK])
            found += [_taken(row, wanted[row.id]) for row in rows]
        return sorted([one for one in found if one.bits], key=_by_id)

    def take(self, sink: SinkRow, taken: Sequence[Taken]) -> int:
        """Remove it. Returns how many messages that were."""
        gone: list[int] = []
        count = size = 0
        for one in taken:
            row = one.row
            if one.count == row.messages_left:
                gone.append(row.id)
                count += row.messages_left
                size += row.bytes_left
            else:
                count += one.count
                size += self._take_some(one)
        if gone:
            self._db.execute(DELETE_SPANS, (as_json(gone),))
            self._db.execute(DELETE_DATA, (as_json(gone),))
        sink.counters.messages -= count
        sink.counters.queued -= count
        sink.counters.bytes -= size
        return count

    def _take_some(self, one: Taken) -> int:
        row = one.row
        (meta,) = self._db.execute(SELECT_META, (row.id,)).fetchone()
        words, stride = memoryview(meta).cast("Q"), WORDS + 2 * row.groups
        size = sum([size_of(words, stride, start, stop) for start, stop in runs(row.places(one.bits))])
        done = one.done | one.bits
        commit_time = words[lowest(~row.places(done)) * stride + TIME] / 1_000_000
        given = (row.messages_left - one.count, row.bytes_left - size, commit_time, f"{done:x}", row.id)
        self._db.execute(UPDATE_SPAN, given)
        return size

    def messages(self, one: Taken) -> Iterator[Message]:
        """Each in a span of its own."""
        ((keys, meta),) = cast("list[list[bytes]]", read_blobs(self._db, ("keys", "meta"), [one.row.id]))
        span = one.row.span(keys, meta, b"")
        with self._db.blobopen("span_data", "data", one.row.id, readonly=True) as data:
            for start, stop in runs(one.row.places(one.bits)):
                at = span.ends[start - 1] if start else 0
                for place in range(start, stop):
                    data.seek(at)
                    yield single(span, place, data.read(span.ends[place] - at))
                    at = span.ends[place]

    # -- what is meant ----------------------------------------------------------------------------------------------
    def all(self, sink: SinkRow, spare: dict[int, int]) -> Iterator[Taken]:
        after = 0
        while found := span_rows(self._db.execute(SELECT_BEHIND, (sink.id, after, CHUNK))):
            yield from [_taken(row, ~spare.get(row.id, 0)) for row in found]
            after = found[-1].id

    def of_key(self, sink: SinkRow, key: str, spare: dict[int, int]) -> Iterator[Taken]:
        for row, span, places in with_key(self._db, sink.id, key):
            yield _taken(row, _numbers(span, places) & ~spare.get(row.id, 0))

    def of_table(self, sink: SinkRow, table: tuple[str, str], below: Position) -> Iterator[Taken]:
        """What waits of a table below a position."""
        after = 0
        named = write_tables([table])[1:-1]
        while found := span_rows(self._db.execute(SELECT_BELOW, (sink.id, after, below.commit_lsn, named, SCANNED))):
            metas = read_blobs(self._db, ("meta",), [row.id for row in found])
            for row, meta in zip(found, metas, strict=True):
                if meta is not None and table in read_tables(row.tables):
                    yield _taken(row, _of_table(row.span(b"", meta[0], b""), table, below))
            after = found[-1].id


def with_key(db: sqlite3.Connection, sink: int, key: str) -> Iterator[tuple[SpanRow, Span, list[int]]]:
    """The spans that have unresolved messages of a key, with their places. Scans the key texts."""
    row = private_row(key)
    if row:
        yield from _places(db, sink, [row >> PLACE_BITS], key)
        return
    text = key.encode() + b"\0"
    after: int | None = 0
    while after is not None:
        found, after = db.execute(SELECT_WITH_KEY, (sink, after, text, SCANNED)).fetchone()
        yield from _places(db, sink, orjson.loads(found), key)


def read_span(db: sqlite3.Connection, sink: int, number: int) -> tuple[SpanRow, Span] | None:
    """A span as it is in the queue, without its bodies."""
    found = db.execute(SELECT_SPAN, (sink, number)).fetchone()
    if found is None:
        return None
    *columns, keys, meta = found
    row = SpanRow(*columns)
    return row, row.span(keys, meta, b"")


def find_spans(db: sqlite3.Connection, sink: int, numbers: Sequence[int]) -> list[SpanRow]:
    return span_rows(db.execute(SELECT_SPANS, (sink, as_json(numbers))))


def _places(
    db: sqlite3.Connection, sink: int, numbers: Sequence[int], key: str
) -> Iterator[tuple[SpanRow, Span, list[int]]]:
    for number in numbers:
        found = read_span(db, sink, number)
        if found is None:
            continue
        row, span = found
        gone = row.places(row.done)
        places = [place for place in places_of(span, key) if not gone >> place & 1]
        if places:
            yield row, span, places


def _of_table(span: Span, table: tuple[str, str], below: Position) -> int:
    """Positions rise within a span; what is below is its beginning."""
    stop = bisect_left(range(span.size), tuple(below), key=span.position)
    chunk = span.chunk
    if len(chunk.tables) == 1:
        return _numbers(span, range(stop))
    number = chunk.tables.index(table).to_bytes(2, sys.byteorder)
    low, high = chunk.byte_column(TABLE), chunk.byte_column(TABLE + 1)
    return _numbers(span, [place for place in range(stop) if low[place] == number[0] and high[place] == number[1]])


def _numbers(span: Span, places: Iterable[int]) -> int:
    """Bits by number."""
    if isinstance(places, range) and span.numbers is None:
        return ones(0, len(places))
    numbers = span.numbers or range(span.size)
    return sum([1 << numbers[place] for place in places])


def _taken(row: SpanRow, wanted: int) -> Taken:
    done = row.done
    return Taken(row, done, wanted & row.kept & ~done)


def _by_id(one: Taken) -> int:
    return one.row.id

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from spillway.chunk import LSN, PLACE_BITS, TABLE, TIME, WORDS, Chunk, Keying, Message, Span
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
    " tables, done)"
)
INSERT_DATA = "span_data (id, keys, meta, data)"
SELECT_SPANS = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM span
    WHERE id IN (SELECT value FROM json_each(?2)) AND sink = ?1"""
SELECT_BEHIND = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT {SPAN_COLUMNS} FROM span WHERE sink = ?1 AND id > ?2 ORDER BY id LIMIT ?3)"""
SELECT_WITH_KEY = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT s.* FROM span s CROSS JOIN span_data d ON d.id = s.id
        WHERE s.sink = ?1 AND s.id > ?2 AND instr(d.keys, ?3) ORDER BY s.id LIMIT ?4)"""
SELECT_BELOW = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT * FROM span WHERE sink = ?1 AND id > ?2 AND first_lsn <= ?3 AND instr(tables, ?4)
        ORDER BY id LIMIT ?5)"""
SELECT_META = "SELECT meta FROM span_data WHERE id = ?"
DELETE_SPANS = "DELETE FROM span WHERE id IN (SELECT value FROM json_each(?))"
DELETE_DATA = "DELETE FROM span_data WHERE id IN (SELECT value FROM json_each(?))"
UPDATE_SPAN = "UPDATE span SET messages_left = ?, bytes_left = ?, commit_time = ?, done = ? WHERE id = ?"

WITH_KEY = 64  # spans that are looked at for a key at once


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
        gone = span.resolved
        if not any(gone):
            return cls(span, span.chunk, span.indices, span.keying, None)
        numbers = [-1] * span.size
        indices: list[int] = []
        for place, index in enumerate(span.indices):
            if not gone[place]:
                numbers[place] = len(indices)
                indices.append(index)
        return cls(span, span.chunk, indices, span.keying, numbers)

    @property
    def size_bytes(self) -> int:
        """About so many bytes of bodies."""
        return len(self.chunk.data) * len(self.indices) // (self.chunk.count or 1)

    def position(self) -> tuple[int, int, int]:
        return Span(self.chunk, self.keying, self.indices[:1]).position(0)


@dataclass(frozen=True, slots=True)
class Taken:
    """Numbers of a span that are in the queue, and wanted."""

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
            spans.append((number, sink.id, keying, chunk.groups, *counts, write_tables(chunk.tables), "0"))
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
            cursor = self._db.execute(SELECT_SPANS, (sink.id, as_json(spans[start : start + CHUNK])))
            found += [_taken(row, wanted[row.id]) for row in span_rows(cursor)]
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
        size = sum([size_of(words, stride, start, stop) for start, stop in runs(one.bits)])
        done = one.done | one.bits
        first = (~done & (done + 1)).bit_length() - 1
        commit_time = words[first * stride + TIME] / 1_000_000
        given = (row.messages_left - one.count, row.bytes_left - size, commit_time, f"{done:x}", row.id)
        self._db.execute(UPDATE_SPAN, given)
        return size

    def messages(self, one: Taken) -> Iterator[Message]:
        """Each in a span of its own."""
        ((keys, meta),) = cast("list[list[bytes]]", read_blobs(self._db, ("keys", "meta"), [one.row.id]))
        span = one.row.span(keys, meta, b"")
        with self._db.blobopen("span_data", "data", one.row.id, readonly=True) as data:
            for start, stop in runs(one.bits):
                at = span.ends[start - 1] if start else 0
                for place in range(start, stop):
                    data.seek(at)
                    yield single(span, place, data.read(span.ends[place] - at))
                    at = span.ends[place]

    # -- what is meant ----------------------------------------------------------------------------------------------
    def all(self, sink: SinkRow, spare: dict[int, int]) -> Iterator[Taken]:
        after = 0
        while found := span_rows(self._db.execute(SELECT_BEHIND, (sink.id, after, CHUNK))):
            yield from [_taken(row, ones(0, row.messages) & ~spare.get(row.id, 0)) for row in found]
            after = found[-1].id

    def of_key(self, sink: SinkRow, key: str, spare: dict[int, int]) -> Iterator[Taken]:
        for row, _, places in with_key(self._db, sink.id, key, 0):
            yield _taken(row, sum([1 << place for place in places]) & ~spare.get(row.id, 0))

    def of_table(self, sink: SinkRow, table: tuple[str, str], below: Position) -> Iterator[Taken]:
        """What waits of a table below a position."""
        after = 0
        named = write_tables([table])[1:-1]
        while found := span_rows(self._db.execute(SELECT_BELOW, (sink.id, after, below.commit_lsn, named, WITH_KEY))):
            metas = read_blobs(self._db, ("meta",), [row.id for row in found])
            for row, meta in zip(found, metas, strict=True):
                if meta is not None and table in read_tables(row.tables):
                    yield _taken(row, _of_table(row.span(b"", meta[0], b""), table, below))
            after = found[-1].id


def with_key(
    db: sqlite3.Connection, sink: int, key: str, after: int, columns: Sequence[str] = ("keys", "meta")
) -> Iterator[tuple[SpanRow, Span, list[int]]]:
    """The spans behind this one that have unresolved messages of a key, with their places. Scans the key texts."""
    row = private_row(key)
    if row:
        cursor = db.execute(SELECT_SPANS, (sink, as_json([row >> PLACE_BITS])))
        yield from _places(db, span_rows(cursor), key, columns)
        return
    while found := span_rows(db.execute(SELECT_WITH_KEY, (sink, after, key.encode() + b"\0", WITH_KEY))):
        yield from _places(db, found, key, columns)
        after = found[-1].id


def _places(
    db: sqlite3.Connection, found: list[SpanRow], key: str, columns: Sequence[str]
) -> Iterator[tuple[SpanRow, Span, list[int]]]:
    for row in found:
        (blobs,) = read_blobs(db, columns, [row.id])
        if blobs is None:
            continue
        keys, meta, *data = blobs
        span, done = row.span(keys, meta, data[0] if data else b""), row.done
        places = [place for place in places_of(span, key) if not done >> place & 1]
        if places:
            yield row, span, places


def _of_table(span: Span, table: tuple[str, str], below: Position) -> int:
    """Positions rise within a span; what is below is its beginning."""
    stop = bisect_left(range(span.size), tuple(below), key=span.position)
    chunk = span.chunk
    number = chunk.tables.index(table).to_bytes(2, sys.byteorder)
    low, high = chunk.byte_column(TABLE), chunk.byte_column(TABLE + 1)
    if len(chunk.tables) == 1:
        return ones(0, stop)
    return sum([1 << place for place in range(stop) if low[place] == number[0] and high[place] == number[1]])


def _taken(row: SpanRow, wanted: int) -> Taken:
    done = row.done
    return Taken(row, done, wanted & ~done & ones(0, row.messages))


def _by_id(one: Taken) -> int:
    return one.row.id

"""Spans and single messages as rows, and statements that take many of them in one step.

**One step, many rows.** The sqlite3 module gives up the interpreter's lock at every step of a statement and has to get
it back; while the event loop is busy each step may then cost a switch interval (5 ms unless `spillway.cli.run` has set
another). So nothing in this package is done row by row: inserts are multi-row VALUES of a few fixed sizes (prepared
once each), blobs are read `WIDTH` spans to a row, everything else takes or returns its rows as one JSON array.

**Keys.** A message without keys has a lane of its own, under a private key that no row of a table can have:
``public.jobs:\\#17``, where 17 is its row (`spillway.change.make_key` never writes a backslash before ``#``). It begins
with the table's prefix like any other key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias, cast

import orjson

from spillway.change import table_prefix
from spillway.chunk import (
    ENDS,
    LARGE,
    LOW,
    MOST_PLACES,
    PLACE_BITS,
    TABLE,
    TIME,
    WORD_BYTES,
    Chunk,
    Message,
    Span,
    key_hash,
)
from spillway.store.base import Counters

Value: TypeAlias = "int | float | str | bytes | None"
Row: TypeAlias = tuple[Value, ...]

INSERT_BYTES = 8 << 20  # blobs of one statement: SQLite copies what is bound
INSERT_SIZES = (512, 64, 8, 1)  # rows of one statement
CHUNK = 2048  # rows that go through JSON at once
WIDTH = 32  # spans whose blobs are read in one step

MESSAGE_COLUMNS = "id, keying, key_groups, tables, keys, meta, data"
INSERT_MESSAGE = (
    "message (id, sink, lsn, idx, sub, keying, key_groups, tables, key1, key2, commit_time, stored, size,"
    " keys, meta, data)"
)
INSERT_LANE = "lane (sink, key, id, other, waits, bytes)"


@dataclass(slots=True)
class SinkRow:
    """A sink as its row in table ``sink`` says; `spillway.store.apply` writes it back."""

    id: int
    slot: str
    run: int
    position: tuple[int, int, int] | None
    counters: Counters
    asked: int = 0  # the last number of a due refresh

    def copy(self) -> SinkRow:
        return replace(self, counters=replace(self.counters))


class SpanRow(NamedTuple):
    """What table ``span`` says of one, as JSON brings it. Bits are by number, or by place in its columns: the same as
    long as nothing was cut out of these."""

    id: int
    keying: int
    groups: int
    messages: int
    body_bytes: int
    messages_left: int
    bytes_left: int
    stored: float
    tables: str
    done_text: str
    kept_text: str | None

    @property
    def done(self) -> int:
        """By number: what is gone of what is in the columns."""
        return int(self.done_text, 16)

    @property
    def kept(self) -> int:
        """By number: what is in the columns."""
        return ones(0, self.messages) if self.kept_text is None else int(self.kept_text, 16)

    @property
    def numbers(self) -> list[int] | None:
        """By place; None: its own."""
        if self.kept_text is None:
            return None
        return [number for start, stop in runs(self.kept) for number in range(start, stop)]

    def places(self, bits: int) -> int:
        """Bits by number as bits by place."""
        kept = self.kept
        bits &= kept
        numbers = self.numbers
        if not bits or numbers is None:
            return bits
        digits = f"{bits:0{kept.bit_length()}b}"[::-1]
        return int("".join([digits[number] for number in reversed(numbers)]), 2)

    def span(self, keys: bytes, meta: bytes, data: bytes) -> Span:
        chunk = Chunk(self.messages, data, meta, keys, read_tables(self.tables), self.groups)
        return Span(chunk, self.keying, base=self.id << PLACE_BITS, numbers=self.numbers)


SPAN_COLUMNS = "id, keying, key_groups, messages, bytes, messages_left, bytes_left, stored, tables, done, kept"


def mark(span: Span, done: int) -> None:
    """Let the span say what is gone, by place."""
    if done:
        bits = f"{done:0{span.size}b}".encode().translate(_FROM_DIGITS)
        span.resolved = bytearray(bits[::-1])
        span.left = span.size - done.bit_count()


_FROM_DIGITS = bytes.maketrans(b"01", b"\0\1")


def runs(bits: int) -> Iterator[tuple[int, int]]:
    """Where the set bits are: from one number up to, not including, another."""
    at = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        length = (~bits & (bits + 1)).bit_length() - 1
        yield at + skip, at + skip + length
        bits >>= length
        at += skip + length


def lowest(bits: int) -> int:
    """Which is the lowest of them."""
    return (bits & -bits).bit_length() - 1


def ones(start: int, stop: int) -> int:
    return (1 << stop) - (1 << start)


def write_tables(tables: Sequence[tuple[str, str]]) -> str:
    return orjson.dumps(tables).decode()


@lru_cache(maxsize=1024)
def read_tables(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((schema, table) for schema, table in orjson.loads(text))


def private_key(table: tuple[str, str], row: int) -> str:
    return table_prefix(*table) + f"\\#{row}"


def private_row(key: str) -> int:
    """Whose private key it is; 0: nobody's."""
    _, mark_, number = key.rpartition(":\\#")
    return int(number) if mark_ and number.isascii() and number.isdigit() and len(number) < 19 else 0


def lane_keys(span: Span, place: int, row: int) -> tuple[str, ...]:
    """The keys that the message stands under in lanes: its own, or a private one."""
    return span.keys(place) or (private_key(span.chunk.table(span.indices[place]), row),)


def places_of(span: Span, key: str) -> list[int]:
    """Where the messages of a key are."""
    row = private_row(key)
    if row:
        return [place for place in range(span.size) if span.row(place) == row and lane_keys(span, place, row) == (key,)]
    wanted = key_hash(key.encode())
    places = {place for place, value in enumerate(span.hashes) if value == wanted}
    places.update(place for place, value in span.moved.items() if value == wanted)
    return [place for place in sorted(places) if key in span.keys(place)]


def single(span: Span, place: int, data: bytes) -> Message:
    """The message of a span that need not have its bodies, with its body, in a span of its own."""
    chunk, index = span.chunk, span.indices[place]
    stride = chunk.stride * WORD_BYTES
    start = chunk.word(index - 1, ENDS) >> 32 if index else 0
    keys = chunk.keys[start : chunk.word(index, ENDS) >> 32]
    record = bytearray(chunk.meta[index * stride : (index + 1) * stride])
    memoryview(record).cast("Q")[ENDS] = len(data) | len(keys) << 32
    record[TABLE : TABLE + 2] = b"\0\0"
    return _alone(
        Chunk(1, data, bytes(record), keys, (chunk.table(index),), chunk.groups), span.keying, span.row(place)
    )


def message_rows(message: Message, row: int, sink: int, stored: float, *, waits: bool = False) -> tuple[Row, list[Row]]:
    """A message that is alone in its span, for table ``message``, and for table ``lane``."""
    span = message.span
    chunk = span.chunk
    names = lane_keys(span, 0, row)
    other = names[1] if len(names) > 1 else None
    size = len(chunk.data)
    lanes: list[Row] = [(sink, names[0], row, other, int(waits or other is not None), size)]
    if other is not None:
        lanes.append((sink, other, row, names[0], 1, size))
    its = (*message.position, span.keying, chunk.groups, write_tables(chunk.tables), names[0], other)
    told = max(size, chunk.word(0, LARGE) & LOW)
    at = chunk.word(0, TIME) / 1_000_000
    return (row, sink, *its, at, stored, told, chunk.keys, chunk.meta, chunk.data), lanes


def read_message(row: Row) -> Message:
    """The message of a row selected by `MESSAGE_COLUMNS`, alone in its span."""
    number, keying, groups, tables, keys, meta, data = cast("tuple[int, int, int, str, bytes, bytes, bytes]", row[:7])
    return _alone(Chunk(1, data, meta, keys, read_tables(tables), groups), keying, number)


def _alone(chunk: Chunk, keying: int, row: int) -> Message:
    number = row & (MOST_PLACES - 1)
    return Message(Span(chunk, keying, base=row - number, numbers=(number,)), 0)


def size_of(meta: memoryview, stride: int, start: int, stop: int) -> int:
    """The bytes of the bodies from one record up to another."""
    return (meta[(stop - 1) * stride + ENDS] & LOW) - (meta[(start - 1) * stride + ENDS] & LOW if start else 0)


def insert(db: sqlite3.Connection, into: str, rows: Sequence[Row]) -> None:
    """The bytes of a row, if it has any that count, come last."""
    start = 0
    while start < len(rows):
        end, size = start, 0
        while end < len(rows) and (end == start or size + _weight(rows[end]) <= INSERT_BYTES):
            size += _weight(rows[end])
            end += 1
        for count in INSERT_SIZES:
            while end - start >= count:
                part = rows[start : start + count]
                one = "(" + ",".join("?" * len(part[0])) + ")"
                db.execute(f"INSERT INTO {into} VALUES {','.join([one] * count)}", [v for row in part for v in row])
                start += count


def _weight(row: Row) -> int:
    last = row[-1]
    return len(last) if isinstance(last, bytes) else 0


def read_blobs(db: sqlite3.Connection, columns: Sequence[str], numbers: Sequence[int]) -> list[list[bytes] | None]:
    """These columns of ``span_data`` of each of these spans; None for one that is gone."""
    found: list[list[bytes] | None] = []
    width = len(columns)
    for start in range(0, len(numbers), WIDTH):
        part = numbers[start : start + WIDTH]
        count = WIDTH if len(part) > WIDTH // 4 else len(part)
        ask = ",".join(
            f"(SELECT {name} FROM span_data WHERE id = ?{n})" for n in range(1, count + 1) for name in columns
        )
        (row,) = db.execute(f"SELECT {ask}", [*part, *[0] * (count - len(part))])
        for at in range(0, len(part) * width, width):
            found.append(None if row[at] is None else list(row[at : at + width]))
    return found


def as_json(rows: Iterable[object]) -> str:
    """Rows as the one parameter of a statement that reads them with json_each."""
    return orjson.dumps(list(rows)).decode()


def rows_of(cursor: sqlite3.Cursor) -> object:
    """The rows of a statement that returns all of them as one json_group_array."""
    (text,) = cursor.fetchone()
    return orjson.loads(text)


def span_rows(cursor: sqlite3.Cursor) -> list[SpanRow]:
    return [SpanRow(*row) for row in cast("list[list[object]]", rows_of(cursor))]  # type: ignore[arg-type]  # JSON

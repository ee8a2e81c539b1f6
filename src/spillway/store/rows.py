"""Messages as rows, and statements that take many of them in one step.

**One step, many rows.** The sqlite3 module gives up the interpreter's lock at every step of a statement and has to get
it back; while the event loop is busy each step may then cost a switch interval (5 ms). So nothing here or in `lanes`
is done row by row: inserts with bodies are multi-row VALUES of a few fixed sizes (prepared once each), everything else
takes or returns its rows as one JSON array. Measured beside a busy thread: 2,200 small rows/s with one step per row,
33,000 and more with these.

**Keys.** A message without keys has a lane of its own, under a private key that no row of a table can have:
``public.jobs:\\#17``, where 17 is its row (`spillway.change.make_key` never writes a backslash before ``#``). It begins
with the table's prefix like any other key. Read back, such a message has no keys again.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

import orjson

from spillway.change import Action, Change, Message, table_prefix

Value: TypeAlias = "int | float | str | bytes | None"
Row: TypeAlias = tuple[Value, ...]

WHOLE = 1  # flags: Change.whole
KEYLESS = 2  # flags: the message has no keys, key1 is a private one

INSERT_BYTES = 1 << 20  # bodies of one statement: SQLite copies what is bound
INSERT_SIZES = (512, 64, 8, 1)  # rows of one statement; 512 rows of 19 columns are below SQLite's default limit
CHUNK = 2048  # rows that go through JSON at once

MESSAGE_COLUMNS = (
    "id, lsn, idx, sub, action, schema_name, table_name, change_key, key1, key2, pks, n, flags, too_large_bytes,"
    " commit_time, record_bytes, body"
)
_INSERTED = (
    "id, sink, lsn, idx, sub, action, schema_name, table_name, change_key, key1, key2, pks, n, flags, too_large_bytes,"
    " commit_time, stored, record_bytes, body"
)


def lane_keys(message: Message, row: int) -> tuple[str, ...]:
    """The keys that the message with this row number stands under: its own, or a private one."""
    if message.keys:
        return message.keys
    return (table_prefix(message.change.schema, message.change.table) + f"\\#{row}",)


def message_row(message: Message, row: int, sink: int, stored: float) -> Row:
    change = message.change
    keys = lane_keys(message, row)
    return (
        row,
        sink,
        change.commit_lsn,
        change.commit_idx,
        message.sub,
        change.action,
        change.schema,
        change.table,
        change.key,
        keys[0],
        keys[1] if len(keys) > 1 else None,
        orjson.dumps(change.pks).decode(),
        change.n,
        (WHOLE if change.whole else 0) | (0 if message.keys else KEYLESS),
        change.too_large_bytes,
        change.commit_time,
        stored,
        change.record_bytes,
        change.body,
    )


def lane_rows(message: Message, row: int, sink: int) -> list[Row]:
    keys = lane_keys(message, row)
    size = len(message.change.body)
    if len(keys) == 1:
        return [(sink, keys[0], row, None, size)]
    return [(sink, keys[0], row, keys[1], size), (sink, keys[1], row, keys[0], size)]


def read_message(row: Row) -> Message:
    """The message of a row selected by `MESSAGE_COLUMNS`."""
    (number, lsn, idx, sub, action, schema, table, change_key, key1, key2, pks, n, flags, too_large_bytes) = cast(
        "tuple[int, int, int, int, str, str, str, str | None, str, str | None, str, int, int, int]", row[:14]
    )
    commit_time, record_bytes, body = cast("tuple[float, int, bytes]", row[14:17])
    if flags & KEYLESS:
        keys: tuple[str, ...] = ()
    else:
        keys = (key1,) if key2 is None else (key1, key2)
    change = Change(
        commit_lsn=lsn,
        commit_idx=idx,
        schema=sys.intern(schema),
        table=sys.intern(table),
        action=cast(Action, sys.intern(action)),
        key=key1 if change_key == key1 else change_key,
        pks=tuple(orjson.loads(pks)),
        body=body,
        record_bytes=record_bytes,
        n=n,
        whole=bool(flags & WHOLE),
        commit_time=commit_time,
        too_large_bytes=too_large_bytes,
    )
    return Message(change, keys, sub, number)


def insert_messages(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    start = 0
    while start < len(rows):
        end, size = start, 0
        while end < len(rows) and (end == start or size + len(cast(bytes, rows[end][-1])) <= INSERT_BYTES):
            size += len(cast(bytes, rows[end][-1]))
            end += 1
        insert(db, f"message ({_INSERTED})", rows[start:end])
        start = end


def insert(db: sqlite3.Connection, into: str, rows: Sequence[Row]) -> None:
    start = 0
    for size in INSERT_SIZES:
        while len(rows) - start >= size:
            part = rows[start : start + size]
            one = "(" + ",".join("?" * len(part[0])) + ")"
            db.execute(f"INSERT INTO {into} VALUES {','.join([one] * size)}", [v for row in part for v in row])
            start += size


def as_json(rows: Iterable[object]) -> str:
    """Rows as the one parameter of a statement that reads them with json_each."""
    return orjson.dumps(list(rows)).decode()


def rows_of(cursor: sqlite3.Cursor) -> object:
    """The rows of a statement that returns all of them as one json_group_array."""
    (text,) = cursor.fetchone()
    return orjson.loads(text)

"""A table in an SQLite file, kept equal to the source table.

**Semantics ``atomic``.** A batch is one transaction, fsynced at its commit (WAL, ``synchronous=FULL``).

**The table** has the name of the source table (``SCHEMA.TABLE`` outside of ``public``; a dot or colon inside of a name
is escaped with a backslash), or the one configured. It is made of the first record: a column for each of its keys, and
``_spillway_key``, the message's key, as the primary key. A record with a new column adds it; a column that the source
drops stays, with what it held.

**Columns have no type**, so SQLite converts nothing and every value reads as it was written:

===========================  =====================================================================================
JSON                         SQLite
===========================  =====================================================================================
string                       TEXT
number without a fraction    INTEGER if it fits 64 bits, else TEXT
any other number             TEXT with exactly the digits of the source: ``1.50`` stays ``1.50``
true, false                  1, 0
object, array                TEXT, the JSON as the message has it
null                         NULL
===========================  =====================================================================================

So for numbers and texts ``CAST(column AS TEXT)`` here is ``column::text`` there, without rounding.

**Changes.** Insert, update and read write the columns that they carry; unchanged TOAST columns stay as they are, and if
the row is not there to have them the message is rejected: half a row would be a lie. An update of the key moves the
row. Truncate empties the table. All of it can be repeated.

**Shaped messages.** What functions have made of a message is its row, and must be a JSON object; a second one of the
same message has no key of its own and is rejected (``document_id_missing``). A column that a whole row was given before
and that it lacks now (a function has left it out, an object was flattened that had more keys) is null. Columns with a
declared type are not this sink's, but somebody else's, and keep what they hold.

**Failures.** A constraint, a trigger's ``RAISE(ABORT)`` or a value that SQLite cannot take rejects the batch; a locked,
full, read-only or broken file is the sink's failure. After one the file is opened anew.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from spillway.change import Change, key_values, table_prefix
from spillway.chunk import Batch, Message
from spillway.errors import SpillwayError
from spillway.sinks.base import OK, ROW_AWAITED, Result, Semantics, SinkContext, reject, sink_down
from spillway.sinks.disk import disk_failed, is_at
from spillway.sinks.encode import nth
from spillway.sinks.thread import OwnThread

KEY_COLUMN = "_spillway_key"

_BUSY_SECONDS = 5.0
# What SQLite says of the data or of the schema, not of the file; every other code concerns the file.
_OF_THE_MESSAGE = frozenset(
    (
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_RANGE,
        sqlite3.SQLITE_ERROR,
    )
)
_INT64 = range(-(1 << 63), 1 << 63)

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?[0-9.eE+-]+")
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
_decode_string = json.JSONDecoder().raw_decode

Value = str | int | None
_Row = tuple[Change, bytes, int | None]  # with its JSON; where it was shaped, which of its message's rows it is


class _Rejected(Exception):
    """This message does not fit; ends the transaction."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class SqliteSink:
    semantics: Semantics = "atomic"
    max_in_flight = 1
    single = False

    def __init__(self, context: SinkContext, *, path: str | Path, table: str | None = None) -> None:
        self._path = context.base_dir / path
        self._table = table
        self._thread = OwnThread(context.name)
        self._connection: sqlite3.Connection | None = None
        self._stat: os.stat_result | None = None
        self._columns: dict[str, dict[str, bool]] = {}  # of each table, as of `_schema_version`: whether it has a type
        self._schema_version = -1
        self.awaited: set[tuple[str, str]] = set()
        self._sources: dict[str, tuple[str, str]] = {}  # which source table a table is kept equal to

    async def open(self) -> None:
        await self._thread.run(self._try, ())

    async def send(self, batch: Batch) -> Sequence[Result] | Result:
        # A cancelled batch may go on in the thread, when the batch is no longer what it was.
        return await self._thread.run(self._try, [_row(message) for message in batch])

    async def keys(
        self,
        table: tuple[str, str],
        columns: Sequence[str],  # noqa: ARG002  # a key says its values itself
        after: str | None,
        limit: int,
        below_version: int | None,  # noqa: ARG002  # a row has no version
    ) -> tuple[list[tuple[str, ...]], str | None]:
        """See `spillway.sinks.base.Readable`. There are no versions; the cursor is a key."""
        found = await self._thread.run(self._read_keys, table, after, limit)
        return [key_values(*table, key) for key in found], found[-1] if len(found) == limit else None

    async def close(self) -> None:
        with suppress(RuntimeError):  # the thread has ended: closed before
            await self._thread.run(self._disconnect)
        await self._thread.close()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _try(self, rows: Sequence[_Row]) -> Sequence[Result] | Result:
        try:
            connection = self._connected()
            try:
                passed_over = self._transact(connection, rows)
            except BaseException:
                self._schema_version = -1  # what this transaction added is gone
                connection.rollback()
                raise
        except _Rejected as rejected:
            return reject(rejected.reason, rejected.detail)
        except UnicodeEncodeError as error:
            return reject("invalid_text", f"half of a surrogate pair cannot be stored: {error.reason}")
        except sqlite3.Error as error:
            return self._failed(error)
        except OSError as error:
            return disk_failed(error)
        return [ROW_AWAITED if place in passed_over else OK for place in range(len(rows))] if passed_over else OK

    def _failed(self, error: sqlite3.Error) -> Result:
        # Misuse of the module has no code: a value it cannot take (DataError, ProgrammingError).
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISMATCH)
        reason = getattr(error, "sqlite_errorname", type(error).__name__).lower()
        if code & 0xFF in _OF_THE_MESSAGE:
            return reject(reason, str(error))
        with suppress(sqlite3.Error):
            self._disconnect()
        return sink_down(reason, f"{self._path}: {error}")

    def _read_keys(self, source: tuple[str, str], after: str | None, limit: int) -> list[str]:
        table = self._table_name(source)
        prefix = table_prefix(*source)
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        try:
            connection = self._connected()
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
                return []
            select = f"""
                SELECT {KEY_COLUMN} FROM {_quoted(table)} WHERE {KEY_COLUMN} > ? AND {KEY_COLUMN} < ?
                ORDER BY {KEY_COLUMN} LIMIT ?"""
            return [key for (key,) in connection.execute(select, (after or prefix, end, limit))]
        except (sqlite3.Error, OSError) as error:
            raise SpillwayError(
                "sink_unreachable", f"{self._path} cannot be read: {error}", "see to the file, then repeat the command"
            ) from error

    def _connected(self) -> sqlite3.Connection:
        if self._stat is not None and not is_at(self._path, self._stat):
            self._disconnect()
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                self._stat = self._path.stat()
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._schema_version = -1
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection, self._stat = self._connection, None, None
        if connection is not None:
            connection.close()

    def _transact(self, connection: sqlite3.Connection, rows: Sequence[_Row]) -> set[int]:
        """Returns the places of those that were passed over."""
        if not rows:
            return set()
        connection.execute("BEGIN IMMEDIATE")
        (found,) = connection.execute("PRAGMA schema_version").fetchone()
        if found != self._schema_version:
            self._columns.clear()
        passed_over = {place for place, row in enumerate(rows) if not self._apply(connection, *row)}
        (self._schema_version,) = connection.execute("PRAGMA schema_version").fetchone()
        connection.execute("COMMIT")
        return passed_over

    def _apply(self, connection: sqlite3.Connection, change: Change, record: bytes, number: int | None) -> bool:
        """``number``: as `_Row` has it. False: it was passed over."""
        table = self._table_of(change)
        columns = self._columns_of(connection, table)
        if change.action == "truncate":
            if columns:
                connection.execute(f"DELETE FROM {_quoted(table)}")
            return True
        if change.key is None:
            raise _Rejected("no_primary_key", f"{change.schema}.{change.table} has no primary key to find its rows by")
        if change.action == "delete":
            if columns:
                connection.execute(f"DELETE FROM {_quoted(table)} WHERE {KEY_COLUMN} = ?", (change.key,))
            return True
        if not record.startswith(b"{"):
            raise _Rejected("not_an_object", "what a function has made of the message is no JSON object, and so no row")
        if number:
            raise _Rejected("document_id_missing", f"{change.key} is one row here, and its message has become several")
        values = dict(record_values(record.decode()))
        self._add_columns(connection, table, columns, values)
        if change.was is not None:
            _move(connection, table, change.was, change.key)
        if not change.whole and not _has_row(connection, table, change.key):
            if (change.schema, change.table) in self.awaited:
                return False
            raise _Rejected(
                "unchanged_toast",
                f"{change.key} is not in the table, and the update carries no TOAST columns: backfill the row first",
            )
        if number is not None and change.whole:
            values = dict.fromkeys(sorted(name for name, typed in columns.items() if not typed)) | values
        _upsert(connection, table, change.key, values)
        return True

    # -- tables and columns -------------------------------------------------------------------------------------------

    def _table_of(self, change: Change) -> str:
        source = (change.schema, change.table)
        table = self._table_name(source)
        if self._sources.setdefault(table, source) != source:
            raise _Rejected("table_taken", f"{table} is kept equal to {'.'.join(self._sources[table])} already")
        return table

    def _table_name(self, source: tuple[str, str]) -> str:
        return self._table or table_prefix(*source).removesuffix(":").removeprefix("public.")

    def _columns_of(self, connection: sqlite3.Connection, table: str) -> dict[str, bool]:
        """The table's columns; none: there is no such table."""
        columns = self._columns.get(table)
        if columns is not None:
            return columns
        found = connection.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE", (table,)
        ).fetchone()
        if found is not None and found[0] != table:
            raise _Rejected("table_taken", f"SQLite takes {table} and {found[0]} for the same name")
        columns = {row[1]: bool(row[2]) for row in connection.execute(f"PRAGMA table_info({_quoted(table)})")}
        if columns and KEY_COLUMN not in columns:
            raise _Rejected("table_taken", f"the table {table} was not made by this sink: it has no {KEY_COLUMN}")
        self._columns[table] = columns
        return columns

    def _add_columns(
        self, connection: sqlite3.Connection, table: str, columns: dict[str, bool], values: dict[str, Value]
    ) -> None:
        if KEY_COLUMN in values:
            raise _Rejected("reserved_column", f"the source table has a column {KEY_COLUMN}, which this sink needs")
        if not columns:
            names = "".join(f", {_quoted(name)}" for name in values)
            connection.execute(f"CREATE TABLE {_quoted(table)} ({KEY_COLUMN} TEXT NOT NULL PRIMARY KEY{names})")
            columns.update({KEY_COLUMN: True} | dict.fromkeys(values, False))
        for name in values.keys() - columns.keys():
            connection.execute(f"ALTER TABLE {_quoted(table)} ADD COLUMN {_quoted(name)}")
            columns[name] = False


def _row(message: Message) -> _Row:
    chunk, index = message.span.chunk, message.span.indices[message.place]
    if chunk.complete:
        return message.change, message.change.body, nth(chunk, index)
    return message.change, message.change.record, None


def _move(connection: sqlite3.Connection, table: str, old: str, new: str) -> None:
    """Gives the row its new key. A row that has it already is the same one, moved at an earlier attempt."""
    if old == new:
        return
    if not _has_row(connection, table, new):
        connection.execute(f"UPDATE {_quoted(table)} SET {KEY_COLUMN} = ? WHERE {KEY_COLUMN} = ?", (new, old))
    connection.execute(f"DELETE FROM {_quoted(table)} WHERE {KEY_COLUMN} = ?", (old,))


def _has_row(connection: sqlite3.Connection, table: str, key: str) -> bool:
    return connection.execute(f"SELECT 1 FROM {_quoted(table)} WHERE {KEY_COLUMN} = ?", (key,)).fetchone() is not None


def _upsert(connection: sqlite3.Connection, table: str, key: str, values: dict[str, Value]) -> None:
    names = [_quoted(name) for name in values]
    sets = ", ".join(f"{name} = excluded.{name}" for name in names)
    connection.execute(
        f"INSERT INTO {_quoted(table)} ({', '.join((KEY_COLUMN, *names))}) VALUES (?{', ?' * len(names)}) "
        f"ON CONFLICT ({KEY_COLUMN}) DO {f'UPDATE SET {sets}' if sets else 'NOTHING'}",
        (key, *values.values()),
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def record_values(record: str) -> Iterator[tuple[str, Value]]:
    """The columns of a record and what is stored of them. Parsed by hand: a JSON parser would round the numbers and
    lose the text of what is nested."""
    position = _skip_space(record, 1)
    while record[position] != "}":
        name, position = _decode_string(record, position)
        position = _skip_space(record, _skip_space(record, position) + 1)  # behind the colon
        value, position = _value(record, position)
        yield name, value
        position = _skip_space(record, position)
        if record[position] == ",":
            position = _skip_space(record, position + 1)


def _value(record: str, position: int) -> tuple[Value, int]:
    first = record[position]
    if first == '"':
        text, end = _decode_string(record, position)
        return str(text), end
    if first in "{[":
        end = _end_of_nested(record, position)
        return record[position:end], end
    for literal, value in (("null", None), ("true", 1), ("false", 0)):
        if first == literal[0]:
            return value, position + len(literal)
    match = _NUMBER.match(record, position)
    assert match, f"no JSON value begins with {first!r}"
    return _number(match[0]), match.end()


def _number(digits: str) -> Value:
    if len(digits) <= 20 and digits.lstrip("-").isdigit():
        number = int(digits)
        if number in _INT64 and str(number) == digits:  # "-0" is none
            return number
    return digits


def _end_of_nested(record: str, start: int) -> int:
    """Where the object or array that begins at ``start`` ends, however deep it goes."""
    depth = 0
    for match in _STRUCTURE.finditer(record, start):
        found = match[0]
        if found in "{[":
            depth += 1
        elif found in "}]":
            depth -= 1
            if depth == 0:
                return match.end()
    raise AssertionError("a record is valid JSON")


def _skip_space(record: str, position: int) -> int:
    match = _SPACE.match(record, position)
    assert match  # it may be empty
    return match.end()

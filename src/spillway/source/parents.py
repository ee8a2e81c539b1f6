"""From changed rows of a related table to the rows whose documents they are part of.

`Parents.find` asks, for all changes of a batch, one question per related table: its SQL with ``$1`` ... ``$n``, arrays
of the values of its columns, typed as arrays of the columns' own types. A row that was moved or deleted is asked for
with the values that it had. The answer is read through a cursor, in pages of keys: there may be millions, and no more
than a page of them is ever here.

**Fresh.** All questions of a batch are asked in one snapshot, of the server that the changes are from. A commit is
streamed before it is visible, so a snapshot that does not see all the changes is given up and taken again, shortly
after.

**Keys.** The SQL's result has the primary key's columns of the table that is refreshed, under their names; where that
is one column its name does not matter. It has no other columns, and they are of the key's types or of types of the same
category (an int for a bigint); anything may be a text. Values are cast to the key's types, so that they read as the
stream writes them. A row with a null in it means no row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import generators
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import dict_row

from spillway.change import make_key
from spillway.config.shape import Related
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.position import parse_lsn
from spillway.source.connect import Connection
from spillway.source.mistakes import locate, told
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal
from spillway.source.sessions import Session, Sessions
from spillway.source.snapshot import Seen
from spillway.source.wrapped import array, as_subquery

PAGE_KEYS: Final = 500
KEY_BYTES: Final = 1024  # of a key; a longer one is the failure of the change that it belongs to
PAGE_BYTES: Final = PAGE_KEYS * (KEY_BYTES + 512)
VISIBLE_SECONDS: Final = 30.0
FIRST_DELAY_SECONDS: Final = 0.005
MOST_DELAY_SECONDS: Final = 0.2
SETTINGS: Final = {"cursor_tuple_fraction": "1", "statement_timeout": "60s"}  # of its sessions, on top of theirs

Values = tuple[str | None, ...]
Take = Callable[[tuple[str, str], Sequence[str]], Awaitable[None]]  # a table, and keys of its rows

_DATA_CLASSES: Final = ("21", "22", "23", "P0")  # SQLSTATEs that depend on the rows that were asked for
_TIMED_OUT: Final = "57014"
_STATEMENT_CLASSES: Final = ("0A", "42", "3F")

_COLUMNS: Final = """
    SELECT a.attname::text AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, t.oid AS type_oid,
           t.typarray AS array_oid,
           t.typdelim::text AS delimiter,
           coalesce(pg_catalog.array_position(i.indkey::int2[], a.attnum) < i.indnkeyatts, false) AS in_key
      FROM pg_catalog.pg_class c
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
      JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
      LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisprimary
     WHERE n.nspname = %(schema)s AND c.relname = %(table)s
     ORDER BY a.attnum"""

_CATEGORIES: Final = """
    SELECT g.typcategory::text AS given_category, pg_catalog.format_type(g.oid, NULL) AS given_name,
           t.typcategory::text AS category
      FROM pg_catalog.pg_type g, pg_catalog.pg_type t
     WHERE g.oid = %(given)s AND t.oid = %(type)s"""


class QuestionFailed(SpillwayError):
    """The SQL of a related table failed for what some of the changed rows hold: others may go through."""


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: str
    type_oid: int
    array_oid: int
    delimiter: str
    in_key: bool


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is known of a related table's question: its parameters, and the columns of the refreshed table's key."""

    parameters: tuple[_Column, ...]
    places: tuple[int, ...]  # of each parameter among the values of a change
    key: tuple[_Column, ...]


class Parents:
    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._asked: dict[tuple[object, ...], _Asked] = {}

    async def find(self, wanted: Sequence[tuple[Related, Sequence[Values]]], seen: Seen, take: Take) -> None:
        """``take`` gets every page of keys, as `spillway.change.make_key` writes them, and is waited for; a key may
        come several times. The values are in the order of ``Related.columns``, else those of the primary key in column
        order. Raises QuestionFailed, SourceUnavailable, or SpillwayError for what somebody must mend."""
        async with self._sessions.one(fresh=False) as session:
            related: Related | None = None
            try:
                await _begin(session, seen)
                for related, values in wanted:
                    await self._ask(session.connection, related, values, take)
                await session.connection.execute("COMMIT")
            except psycopg.Error as error:
                self._asked.clear()
                raise _refusal(error, related) from error

    async def close(self) -> None:
        await self._sessions.close()

    async def _ask(self, connection: Connection, related: Related, values: Sequence[Values], take: Take) -> None:
        asked = await self._known(connection, related)
        literals = [
            array([value[place] for value in values], column.delimiter)
            for place, column in zip(asked.places, asked.parameters, strict=True)
        ]
        types = [column.array_oid for column in asked.parameters]
        names = await _names(connection, asked, related, literals, types)
        await _run(connection, _declaration(related, asked.key, names), literals, types)
        table = (related.refreshes.schema, related.refreshes.table)
        while True:
            page = await _run(connection, f"FETCH {PAGE_KEYS} FROM parents")
            if page.ntuples:
                await take(table, [_key(page, row, related) for row in range(page.ntuples)])
            if page.ntuples < PAGE_KEYS:
                await _run(connection, "CLOSE parents")
                return

    async def _known(self, connection: Connection, related: Related) -> _Asked:
        name = (related.table, related.columns, related.refreshes)
        known = self._asked.get(name)
        if known is None:
            child, parent = [
                await _columns(connection, table.schema, table.table) for table in (related.table, related.refreshes)
            ]
            known = self._asked[name] = _asked(related, child, parent)
        return known


async def _begin(session: Session, seen: Seen) -> None:
    """A snapshot that sees what it must."""
    connection, delay, began = session.connection, FIRST_DELAY_SECONDS, time.monotonic()
    while True:
        replayed = await fetch_one(connection, "replayed") if session.standby else None
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        snapshot = await fetch_one(connection, "horizon")
        assert snapshot is not None  # it always gives a row
        if parse_lsn(replayed["lsn"]) > seen.lsn if replayed is not None else seen.by(snapshot["snapshot"]):
            return
        await connection.execute("ROLLBACK")
        if time.monotonic() - began > VISIBLE_SECONDS:
            raise SourceUnavailable("not_visible", f"a change is not visible {VISIBLE_SECONDS:g} s after its commit")
        await asyncio.sleep(delay)
        delay = min(2 * delay, MOST_DELAY_SECONDS)


async def _columns(connection: Connection, schema: str, table: str) -> list[_Column]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_COLUMNS, {"schema": schema, "table": table})
        return [_Column(**row) for row in await cursor.fetchall()]


def _asked(related: Related, child: Sequence[_Column], parent: Sequence[_Column]) -> _Asked:
    if related.columns is None:
        own = [column for column in child if column.in_key]
        parameters = sorted(own, key=lambda column: column.name)  # as enrichments have them
        places = [own.index(column) for column in parameters]
    else:
        named = {column.name: column for column in child}
        missing = [name for name in related.columns if name not in named]
        if missing:
            raise _wrong(related, f"table {related.table} has no column {', '.join(missing)}")
        parameters = [named[name] for name in related.columns]
        places = list(range(len(parameters)))
    key = tuple(column for column in parent if column.in_key)
    for table, columns in ((related.table, parameters), (related.refreshes, key)):
        if not columns:
            raise _wrong(related, f"table {table} does not exist, or has no primary key")
    for column in parameters:
        if not column.array_oid:
            raise _wrong(related, f"there are no arrays of the type of {related.table}.{column.name}, {column.type}")
    return _Asked(tuple(parameters), tuple(places), key)


async def _names(
    connection: Connection, asked: _Asked, related: Related, literals: Sequence[bytes], types: Sequence[int]
) -> list[str]:
    """Of the columns that the SQL gives, which are those of the key."""
    around = "SELECT * FROM "
    try:
        result = await _run(connection, f"{around}{as_subquery(related.sql)} AS u LIMIT 0", literals, types)
    except psycopg.Error as error:
        locate(error, related.sql, len(around) + len("(\n"))
        raise
    names = [(result.fname(i) or b"").decode() for i in range(result.nfields)]
    if len(names) != len(asked.key):
        columns = "1 column" if len(names) == 1 else f"{len(names)} columns"
        raise _wrong(related, f"its SQL gives {columns}, and the key of {related.refreshes} has {len(asked.key)}")
    given = {name: result.ftype(i) for i, name in enumerate(names)}
    if len(names) == 1:
        given = {asked.key[0].name: result.ftype(0)}
    for column in asked.key:
        if column.name in given and given[column.name] != column.type_oid:
            await _check_type(connection, related, column, given[column.name])
    return names


async def _check_type(connection: Connection, related: Related, column: _Column, given: int) -> None:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_CATEGORIES, {"given": given, "type": column.type_oid})
        row = await cursor.fetchone()
    if row is not None and row["category"] != "S" and row["category"] != row["given_category"]:
        raise _wrong(
            related,
            f"its SQL gives {column.name} as {row['given_name']}, and the key of {related.refreshes} has it as "
            f"{column.type}: cast it, with ::{column.type}",
        )


def _declaration(related: Related, key: Sequence[_Column], names: Sequence[str]) -> str:
    columns = names if len(key) == 1 == len(names) else [column.name for column in key]
    missing = [name for name in columns if name not in names]
    if missing:
        raise _wrong(related, f"its SQL gives no column {', '.join(missing)} of the key of {related.refreshes}")
    quoted = ["u." + '"' + name.replace('"', '""') + '"' for name in columns]
    texts = ", ".join(
        f"pg_catalog.concat(CAST({name} AS {column.type})) AS k{i}"
        for i, (name, column) in enumerate(zip(quoted, key, strict=True))
    )
    length = " + ".join(f"pg_catalog.octet_length(k{i})" for i in range(len(key)))
    shown = ", ".join(f"CASE WHEN {length} <= {KEY_BYTES} THEN k{i} END" for i in range(len(key)))
    whole = " AND ".join(f"{name} IS NOT NULL" for name in quoted)
    return f"""
DECLARE parents NO SCROLL CURSOR FOR SELECT {shown}
  FROM (SELECT {texts} FROM {as_subquery(related.sql)} AS u WHERE {whole} OFFSET 0) AS t"""


def _key(page: PGresult, row: int, related: Related) -> str:
    values = [page.get_value(row, i) for i in range(page.nfields)]
    if None in values:
        raise QuestionFailed(
            "related_key_too_long", f"related table {related.table}: its SQL gives a key of more than {KEY_BYTES} bytes"
        )
    return make_key(*related.refreshes, tuple((value or b"").decode() for value in values))


async def _run(
    connection: Connection, statement: str, literals: Sequence[bytes] = (), types: Sequence[int] = ()
) -> PGresult:
    """With parameters that have types, which psycopg's cursors do not let their callers say."""
    pgconn = connection.pgconn
    pgconn.send_query_params(statement.encode(), literals, types)
    results: list[PGresult] = await connection.wait(generators.execute(pgconn))
    result = results[-1]
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise error_from_result(result)
    return result


def _wrong(related: Related, what: str) -> SpillwayError:
    return SpillwayError("related_sql", f"related table {related.table}: {what}", "correct related[] of the sink")


def _refusal(error: psycopg.Error, related: Related | None) -> SpillwayError:
    state = error.sqlstate or ""
    if related is None or not state:
        return query_refusal(error)
    said = told(error)
    if state == _TIMED_OUT:
        return SourceUnavailable("timeout", f"related table {related.table}: its SQL took too long: {said}")
    if state[:2] in _DATA_CLASSES:
        return QuestionFailed("related_data", f"related table {related.table}: its SQL failed: {said}")
    if state[:2] in _STATEMENT_CLASSES:
        return _wrong(related, f"PostgreSQL does not take its SQL: {said}")
    return query_refusal(error)

"""Views: what a page's transaction knows of its table, and the connection on which that is found out.

A `View` is a snapshot of one table with its lock held, and a decoder that knows the table as the snapshot has it. The
lock comes before the snapshot, the WAL position and the table's shape with it, in one statement. Views come one at a
time, on one connection, which is made anew by whoever comes next after it was lost, after something was broken off in
the middle, or after a row so large that libpq's buffer should go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow

from spillway.change import ACTIONS
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.pgoutput import Decoder
from spillway.pgoutput.relation import TableInfo
from spillway.position import parse_lsn
from spillway.source import catalog, keyspace
from spillway.source.connect import Connection, connect_query
from spillway.source.keyspace import Rows
from spillway.source.origin import Expected, check_origin, check_standby
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal, quoted
from spillway.source.shape import Selection, Shape, rows_of
from spillway.source.snapshot import Snapshot, parsed

LOCK_TIMEOUT_SECONDS = 0.5
GRACE_SECONDS = 30.0  # on top of what the server is told to keep to; then the connection counts as dead
BY_CTID_SINCE = 140000

_WAL_BLOCK_BYTES: Final = 8192
CATALOGUE_LOCK_SECONDS: Final = 1
_HEADERS_BYTES: Final = (24, 40)  # of a block, of the first block of a file
# SQLSTATEs of a statement that is as wrong the next time: data, syntax or access rule, not supported, cardinality; a
# condition with a parameter ($1).
_REFUSED_CLASSES: Final = ("22", "42", "0A", "21")
_NO_PARAMETERS: Final = "08P01"
_ALL_ACTIONS: Final = frozenset(ACTIONS)

# Scans that the order needs, one process, no compiler: a page is short. The user's subqueries may still scan and hash.
_BY_KEY: Final = ("enable_seqscan", "enable_bitmapscan")
_BY_CTID: Final = ("enable_indexscan", "enable_indexonlyscan")
BY_LIST: Final = ("enable_hashjoin", "enable_mergejoin")


class LockTimeout(SpillwayError):
    """Somebody holds the table in ACCESS EXCLUSIVE mode, or waits for it: try again later."""


class PageTimeout(SpillwayError):
    """The rows took longer than allowed, or a standby wanted to go on replaying: read fewer."""


@dataclass(frozen=True, slots=True)
class View:
    """What an open transaction knows of the table."""

    connection: Connection
    decoder: Decoder
    shape: Shape
    rows: Rows
    snapshot: Snapshot


@dataclass(slots=True)
class _Session:
    """A connection, and what goes with it: a decoder that knows the tables as they were last seen."""

    connection: Connection
    decoder: Decoder
    shapes: dict[tuple[str, str, str | None], Shape] = field(default_factory=dict)
    learned: dict[int, tuple[Shape, TableInfo]] = field(default_factory=dict)  # by OID
    conditions: set[tuple[str, str, str]] = field(default_factory=set)  # found to be in order


class Views:
    """See the module. ``renew_frame_bytes``: libpq keeps a buffer twice the size of the largest row that came until the
    connection is made anew, which it is after a larger one."""

    def __init__(
        self,
        conninfo: str,
        slot: str,
        publication: str,
        new_decoder: Callable[[], Decoder],
        expected: Expected,
        renew_frame_bytes: int,
    ) -> None:
        self.standby = False  # the connection is to a server in recovery
        self.wal_writer_delay_seconds = 0.0
        self.server_version = 0
        self._conninfo = conninfo
        self._slot = slot
        self._publication = publication
        self._new_decoder = new_decoder
        self._expected = expected
        self._renew_frame_bytes = renew_frame_bytes
        self._session: _Session | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    @contextlib.asynccontextmanager
    async def transaction(self, selection: Selection, timeout_seconds: float) -> AsyncIterator[View]:
        """A snapshot of the table with its lock held."""
        async with self.using(2 * timeout_seconds) as session:
            connection = session.connection
            try:
                replayed = (await one(connection, "replayed"))["lsn"] if self.standby else None
                await connection.execute(_begin_sql(selection, timeout_seconds))
                yield await self._look(session, selection, replayed)
                await connection.execute("COMMIT")
            except (psycopg.Error, SpillwayError) as error:
                await self._roll_back(connection)
                if isinstance(error, psycopg.Error):
                    raise _page_refusal(error, selection) from error
                raise
            if session.decoder.largest_frame_bytes > self._renew_frame_bytes:
                await self._drop()

    async def _look(self, session: _Session, selection: Selection, replayed: str | None) -> View:
        connection, (schema, table) = session.connection, (selection.schema, selection.table)
        seen = await one(
            connection,
            "page",
            schema=schema,
            table=table,
            sort_column=selection.sort_column,
            publication=self._publication,
        )
        if seen["shape"] is None:
            raise _no_table(schema, table)
        check_standby(self._expected, standby=seen["standby"])  # a promotion leaves connections as they are
        self.standby = seen["standby"]
        name = (schema, table, selection.sort_column)
        shape = session.shapes.get(name)
        if shape is None or shape.text != seen["shape"]:
            published = await fetch_one(
                connection, "published_table", publication=self._publication, schema=schema, table=table
            )
            if published is None:
                raise not_published(self._publication, schema, table)
            shape = Shape.of(seen["shape"], schema, table, published, connection.info.server_version)
            session.shapes[name] = shape
        await self._learn(session, shape)
        rows = rows_of(shape, selection)
        if rows is None or (rows.order.physical and connection.info.server_version < BY_CTID_SINCE):
            raise no_primary_key(schema, table)
        if rows.order.physical:
            await connection.execute(off(_BY_CTID))
        if selection.where is not None:
            await _check_condition(session, rows, selection.where)
        return View(connection, session.decoder, shape, rows, _snapshot(seen, replayed))

    async def _learn(self, session: _Session, shape: Shape) -> None:
        """A type of the user's may change while the table stays: it is looked at for every page."""
        oid = shape.relation.oid
        known = session.learned.get(oid)
        if known is not None and known[0] is shape and not shape.has_own_types:
            return
        info = await catalog.describe(session.connection, shape.relation)
        if known is None or known[0] is not shape or known[1] != info:
            session.decoder.learn(shape.relation, info, _ALL_ACTIONS)
            session.learned[oid] = (shape, info)

    async def _roll_back(self, connection: Connection) -> None:
        status = connection.pgconn.transaction_status
        if status == TransactionStatus.IDLE:
            return
        if status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            with contextlib.suppress(psycopg.Error):  # the connection is lost: what came before says why
                await connection.execute("ROLLBACK")
                return
        await self._drop()

    # The connection.

    async def close(self) -> None:
        """For good, after what is being done."""
        async with self._turn:
            self._closed = True
            await self._drop()

    @contextlib.asynccontextmanager
    async def using(self, seconds: float) -> AsyncIterator[_Session]:
        async with self._turn:
            if self._closed:
                raise SourceUnavailable("closed", "the reader of pages was closed")
            try:
                async with asyncio.timeout(seconds + GRACE_SECONDS):
                    if self._session is None or self._session.connection.closed:
                        await self._connect()
                    assert self._session is not None
                    yield self._session
            except TimeoutError as error:
                await self._drop()
                raise SourceUnavailable(
                    "no_answer", f"no answer to a query in {seconds + GRACE_SECONDS:g} s"
                ) from error
            except SpillwayError:
                raise
            except BaseException:
                # Cancelled, or a defect: nobody knows what the connection is in the middle of.
                await self._drop()
                raise

    async def _connect(self) -> None:
        await self._drop()
        connection = await connect_query(self._conninfo, self._slot, lock_timeout_seconds=CATALOGUE_LOCK_SECONDS)
        try:
            seen = await one(connection, "reader")
            await check_origin(connection, self._conninfo, self._slot, self._expected, standby=seen["standby"])
        except BaseException:  # cancelled, too: nobody uses a connection that was not looked at
            await connection.close()
            raise
        self.standby, self.wal_writer_delay_seconds = seen["standby"], seen["wal_writer_delay_seconds"]
        self.server_version = connection.info.server_version
        self._session = _Session(connection, self._new_decoder())

    async def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.connection.close()


def before_header(lsn: int) -> int:
    """The same position before the page header of the WAL that it stands right behind: nobody passes that header until
    there is a record behind it. Where a record goes on behind the header instead, no position is in between."""
    offset = lsn % _WAL_BLOCK_BYTES
    return lsn - offset if offset in _HEADERS_BYTES else lsn


def _snapshot(seen: DictRow, replayed: str | None) -> Snapshot:
    xmin, xmax, running = parsed(seen["snapshot"])
    return Snapshot(
        lsn=before_header(parse_lsn(seen["lsn"])),
        xmin=xmin,
        xmax=xmax,
        running=running,
        microseconds=seen["microseconds"],
        replayed_lsn=None if replayed is None else parse_lsn(replayed),
    )


def _begin_sql(selection: Selection, timeout_seconds: float) -> sql.Composed:
    return sql.SQL(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; "
        "SET LOCAL lock_timeout = {}; SET LOCAL statement_timeout = {}; "
        "SET LOCAL row_security = off; SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0; {}; "
        "LOCK TABLE {} IN ACCESS SHARE MODE"
    ).format(
        sql.Literal(int(LOCK_TIMEOUT_SECONDS * 1000)),
        sql.Literal(max(1, int(timeout_seconds * 1000))),
        off(_BY_KEY),
        sql.Identifier(selection.schema, selection.table),
    )


def off(settings: Sequence[str]) -> sql.Composed:
    return sql.SQL("; ").join(sql.SQL("SET LOCAL {} = off").format(sql.Identifier(name)) for name in settings)


async def _check_condition(session: _Session, rows: Rows, where: str) -> None:
    name = (rows.schema, rows.table, where)
    if name not in session.conditions:
        for test in keyspace.tests_of_condition(rows.source, where):
            # Results in binary: that alone makes psycopg use the extended protocol, which takes one statement.
            await session.connection.execute(test, binary=True)
        session.conditions.add(name)


async def one(connection: Connection, name: str, **parameters: object) -> DictRow:
    row = await fetch_one(connection, name, **parameters)
    assert row is not None, f"{name} always gives a row"
    return row


def no_primary_key(schema: str, table: str) -> SpillwayError:
    return SpillwayError(
        "no_primary_key",
        f"table {schema}.{table} has no primary key to read it by (PostgreSQL 14 and later read one that is not "
        "partitioned by its blocks)",
        f"ALTER TABLE {quoted(schema, table)} ADD PRIMARY KEY (...);",
    )


def not_published(publication: str, schema: str, table: str) -> SpillwayError:
    return SpillwayError(
        "not_published",
        f"table {schema}.{table} is not in publication {publication}",
        f"ALTER PUBLICATION {quoted(publication)} ADD TABLE {quoted(schema, table)};",
    )


def _no_table(schema: str, table: str) -> SpillwayError:
    return SpillwayError("no_table", f"table {schema}.{table} does not exist", "create it, or cancel the backfill")


def _page_refusal(error: psycopg.Error, selection: Selection) -> SpillwayError:
    state = error.sqlstate or ""
    name = f"{selection.schema}.{selection.table}"
    if state == "55P03":
        return LockTimeout(
            "lock_timeout",
            f"table {name} is locked, or somebody waits to lock it, in ACCESS EXCLUSIVE mode",
            "retried; see pg_locks for who it is",
        )
    if state in ("57014", "40001"):
        return PageTimeout("page_timeout", f"a page of table {name}: {_text(error)}", "retried with fewer rows")
    if state in ("42P01", "3F000") and selection.where is None:
        return _no_table(selection.schema, selection.table)
    if state == "42501":
        return query_refusal(error)
    if state[:2] in _REFUSED_CLASSES or state == _NO_PARAMETERS:
        if selection.where is not None or selection.start is not None:
            return SpillwayError(
                "bad_condition",
                f"table {name}: PostgreSQL does not take where or start: {_text(error)}",
                "one boolean expression over the table's columns; functions outside of pg_catalog with their schema",
            )
        return SpillwayError(
            "page", f"table {name} cannot be read: {_text(error)}", "cancel this backfill and start it again"
        )
    return query_refusal(error)


def _text(error: psycopg.Error) -> str:
    return " ".join((error.diag.message_primary or str(error)).split())

"""Connections to the source: psycopg's libpq does the network, TLS and authentication; here are only the settings.

Promises:

- **One text per value.** What a value looks like as text depends on session settings that a role, a database or the
  ``options`` of a URL may have changed. `SESSION` is set by ``SET`` once the connection stands, on query connections
  and walsenders alike (a walsender with ``replication=database`` takes SQL), so it wins over all of them, and a row
  read by a query is byte for byte the row of the stream. ``search_path`` is empty: names of types and tables that are
  values (``regclass``, ``regtype``) come schema-qualified whoever reads them. ``lc_monetary`` is left alone: forcing
  it would move the decimal point of ``money`` in currencies without cents.
- **Nothing else of the role's defaults reaches us**: time-outs that would end a stream or a session in the middle, a
  read-only or serializable default, and ``client_min_messages`` (PostgreSQL 18 says "skipped loading publication" in
  a warning only, see `spillway.source.stream`).
- **A dead peer is noticed**: TCP keepalives and ``tcp_user_timeout`` unless the user set their own.
- **Errors are ours**: `SourceUnavailable` for what a later attempt may mend, `SpillwayError` with a remedy for the rest
  (`spillway.source.refusal`).

PgBouncer and its like cannot carry a replication connection; the refusal says so.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import AsyncIterator, Mapping

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from spillway.errors import SpillwayError
from spillway.source.refusal import connect_refusal, query_refusal

Connection = AsyncConnection[TupleRow]

# What decides how a value is written as text. Forced alike on every connection.
SESSION: Mapping[str, str] = {
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "search_path": "",
    "quote_all_identifiers": "off",  # regclass and regtype values
}

# What a role's or a database's defaults could otherwise do to a connection of ours, whatever it is used for.
_GUARDS: Mapping[str, str] = {
    "client_min_messages": "warning",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
}
_GUARDS_SINCE: Mapping[str, int] = {"idle_session_timeout": 140000, "transaction_timeout": 170000}

QUERY_TIMEOUT_SECONDS = 60  # of one statement on a query connection; longer work sets its own
CONNECT_TIMEOUT_SECONDS = 10

_NETWORK: Mapping[str, int] = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 50_000,
}


async def connect_query(conninfo: str, slot: str = "", *, lock_timeout_seconds: int = 0) -> Connection:
    """A connection for queries, in autocommit, with `SESSION` forced. The caller closes it. ``lock_timeout_seconds``: 0
    for none. The catalogue's functions lock the tables that they tell of."""
    return await _connect(conninfo, slot, {}, QUERY_TIMEOUT_SECONDS, lock_timeout_seconds)


async def connect_replication(conninfo: str, slot: str = "") -> Connection:
    """A walsender of the database, with `SESSION` forced: replication commands and plain SQL without parameters."""
    return await _connect(conninfo, slot, {"replication": "database"}, 0, 0)


@contextlib.asynccontextmanager
async def querying(conninfo: str, slot: str, *, lock_timeout_seconds: int = 0) -> AsyncIterator[Connection]:
    """A query connection for one piece of work; closed at its end."""
    connection = await connect_query(conninfo, slot, lock_timeout_seconds=lock_timeout_seconds)
    try:
        yield connection
    finally:
        await connection.close()


async def _connect(
    conninfo: str, slot: str, more: Mapping[str, str], statement_timeout_seconds: int, lock_timeout_seconds: int
) -> Connection:
    target = describe_target(conninfo)
    application = f"spillway:{slot}" if slot else "spillway"
    connection: Connection | None = None
    try:
        # Named from the start, so that a connection stuck in authentication can be told in pg_stat_activity.
        settings = {**_NETWORK, **conninfo_to_dict(conninfo), **more, "application_name": application}
        connection = await AsyncConnection.connect(
            make_conninfo("", **settings), autocommit=True, prepare_threshold=None
        )
        version = connection.info.server_version
        await connection.execute(session_sql(application, version, statement_timeout_seconds, lock_timeout_seconds))
    except psycopg.Error as error:
        if connection is None:
            raise connect_refusal(error, target) from error
        await connection.close()
        raise query_refusal(error) from error
    except BaseException as error:
        # Cancelled: the socket must not outlive us. While connecting, psycopg keeps it in frames that the error holds.
        if connection is None:
            traceback.clear_frames(error.__traceback__)
        else:
            await connection.close()
        raise
    return connection


def session_sql(
    application: str, server_version: int, statement_timeout_seconds: int, lock_timeout_seconds: int = 0
) -> sql.Composed:
    """The one statement that fixes a session. Simple protocol, literals only: a walsender takes no parameters."""
    settings = {
        **SESSION,
        **_GUARDS,
        **{name: "0" for name, since in _GUARDS_SINCE.items() if server_version >= since},
        "statement_timeout": f"{statement_timeout_seconds}s",
        "lock_timeout": f"{lock_timeout_seconds}s",
        "application_name": application,
    }
    one = sql.SQL("SET {} = {}")
    return sql.SQL("; ").join(one.format(sql.Identifier(k), sql.Literal(v)) for k, v in settings.items())


def describe_target(conninfo: str) -> str:
    """``user@host:port/database`` for messages: never the password."""
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.Error:
        # libpq quotes the part that it could not read, which may be the password: its text is dropped.
        raise SpillwayError(
            "conninfo", "the database's URL cannot be parsed", "check `url`, or use hostname, ..."
        ) from None
    host, port = given.get("host") or given.get("hostaddr") or "local socket", given.get("port") or "5432"
    return f"{given.get('user') or ''}@{host}:{port}/{given.get('dbname') or given.get('user') or ''}"

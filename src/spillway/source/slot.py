"""The server's identity, the publication, the slot, and how far behind it is.

Order of creation: publication, then slot. A slot reads the catalogue as it was at each place of the WAL, so a
publication that is younger than the slot does not exist where the slot starts (PostgreSQL bug 18683).

Creating a slot waits until every transaction that was running has ended. `ensure_slot` says whom it waits for every
few seconds and gives up at its deadline; a slot given up or cancelled halfway leaves nothing behind.

`SlotState.used` answers "may this slot have confirmed something of a history whose state we do not have?" and errs
towards yes. From 14 on the server counts the transactions that a slot has decoded. 12 and 13 count nothing, and nothing
else tells: confirmed_flush_lsn stands right behind restart_lsn both after creation and when a used slot is idle; so
there a slot counts as used unless `ensure_slot` has just said that it made it. What is missed: the counter of a server
that crashed begins at 0 again; unless the two positions are further apart than a creation leaves them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psycopg
import structlog
from psycopg import sql

from spillway.errors import SourceUnavailable, SpillwayError
from spillway.position import parse_lsn
from spillway.source.connect import Connection
from spillway.source.queries import fetch_one
from spillway.source.refusal import (
    missing_slot,
    other_database,
    query_refusal,
    quoted,
    slot_refusal,
    wrong_plugin,
)

log = structlog.get_logger(__name__)

PLUGIN = "pgoutput"
PROGRESS_SECONDS = 5.0
# A creation that waited for long transactions leaves WAL between the two positions, but hardly this much.
CREATION_SPAN_BYTES = 256 * 1024 * 1024

Table = tuple[str, str]  # schema, name


@dataclass(frozen=True, slots=True)
class System:
    """IDENTIFY_SYSTEM: whose history the positions belong to (I9)."""

    system_id: str
    timeline: int
    server_version: int
    xlogpos: int


@dataclass(frozen=True, slots=True)
class SlotState:
    exists: bool
    plugin: str | None = None  # None for a physical slot
    database: str | None = None
    active_pid: int | None = None
    active_application: str | None = None
    confirmed_flush_lsn: int = 0
    restart_lsn: int = 0
    wal_status: str | None = None  # from 13 on
    invalidation: str | None = None  # why the slot is of no use any more
    used: bool = False


class Lag(NamedTuple):
    behind_bytes: int  # of WAL, between the server's position and the confirmed one
    confirmed_lsn: int


async def system(replication: Connection) -> System:
    try:
        row = await (await replication.execute("IDENTIFY_SYSTEM")).fetchone()
    except psycopg.Error as error:
        raise query_refusal(error) from error
    if row is None:
        raise SourceUnavailable("identify_system", "the server did not answer IDENTIFY_SYSTEM")
    return System(str(row[0]), int(row[1]), replication.info.server_version, parse_lsn(row[2]))


async def slot_state(query: Connection, slot: str) -> SlotState:
    row = await fetch_one(query, "slot", slot=slot)
    if row is None:
        return SlotState(exists=False)
    confirmed, restart = (parse_lsn(row[key] or "0/0") for key in ("confirmed_flush_lsn", "restart_lsn"))
    used = True
    if query.info.server_version >= 140000:
        decoded = await fetch_one(query, "slot_transactions", slot=slot)
        used = bool(decoded and decoded["total_txns"]) or confirmed - restart > CREATION_SPAN_BYTES
    return SlotState(
        exists=True,
        plugin=row["plugin"],
        database=row["database"],
        active_pid=row["active_pid"],
        active_application=row["active_application"],
        confirmed_flush_lsn=confirmed,
        restart_lsn=restart,
        wal_status=row["wal_status"],
        invalidation=row["invalidation"],
        used=used,
    )


async def lag(query: Connection, slot: str) -> Lag:
    """Lag as dashboards know it: pg_current_wal_lsn (a standby: what it has replayed) less confirmed_flush_lsn."""
    row = await fetch_one(query, "lag", slot=slot)
    if row is None or row["confirmed"] is None:
        raise missing_slot(slot)
    confirmed = parse_lsn(row["confirmed"])
    return Lag(max(0, parse_lsn(row["now"] or "0/0") - confirmed), confirmed)


async def ensure_publication(
    query: Connection, publication: str, *, create_if_not_exists: bool, init_sql: str | None, tables: Sequence[Table]
) -> bool:
    """True if it was created. ``tables``: what the sinks name, for a role that may not publish all tables."""
    if await fetch_one(query, "publication", publication=publication) is not None:
        return False
    if not create_if_not_exists:
        raise no_publication(publication, create_publication_sql(publication, tables, query.info.server_version))
    server = await fetch_one(query, "server")
    everything = server is not None and bool(server["superuser"])
    for_all = create_publication_sql(publication, (), query.info.server_version)
    if init_sql is None and not everything and not tables:
        raise SpillwayError(
            "publication_create",
            f"publication {publication} cannot be created: only a superuser may publish all tables, and no sink names "
            "its tables",
            f"give include_tables, or as a superuser: {for_all}",
        )
    command = init_sql or create_publication_sql(publication, () if everything else tables, query.info.server_version)
    try:
        async with query.transaction():
            # The user's SQL means the tables that the user would see.
            await query.execute("SET LOCAL search_path TO DEFAULT")
            await query.execute(command.encode())
    except psycopg.errors.DuplicateObject:
        return False
    except psycopg.Error as error:
        if error.sqlstate in ("42501", "42P01", "42809"):  # not the owner, no such table, not a table
            raise SpillwayError(
                "publication_create",
                f"publication {publication} cannot be created: {error}",
                f"as the owner: {command}",
            ) from error
        raise query_refusal(error) from error
    log.info("publication created", publication=publication, sql=command)
    return True


def create_publication_sql(publication: str, tables: Sequence[Table], server_version: int) -> str:
    """For the tables, or for all when none is given; partitions under the name of their root where that exists."""
    what = "TABLE " + ", ".join(quoted(*table) for table in sorted(set(tables))) if tables else "ALL TABLES"
    root = " WITH (publish_via_partition_root = true)" if server_version >= 130000 else ""
    return f"CREATE PUBLICATION {quoted(publication)} FOR {what}{root};"


def no_publication(publication: str, command: str) -> SpillwayError:
    return SpillwayError(
        "publication_missing",
        f"publication {publication} does not exist",
        f"{command} or publication.create_if_not_exists: true",
    )


async def ensure_slot(
    query: Connection,
    replication: Connection,
    slot: str,
    publication: str,
    *,
    create_if_not_exists: bool,
    deadline_seconds: float = 600.0,
) -> bool:
    """True if it was created. The publication must exist by now."""
    state = await slot_state(query, slot)
    database = query.info.dbname
    if state.exists:
        if state.plugin != PLUGIN:
            raise wrong_plugin(slot, f"plugin {state.plugin}")
        if state.database != database:
            raise other_database(slot, f"database {state.database}", database)
        return False
    if not create_if_not_exists:
        raise missing_slot(slot)
    if await fetch_one(query, "publication", publication=publication) is None:
        raise no_publication(publication, create_publication_sql(publication, (), query.info.server_version))
    try:
        await _create_slot(query, replication, slot, deadline_seconds)
    except psycopg.errors.DuplicateObject:
        return False
    except psycopg.Error as error:
        raise slot_refusal(error, slot, database) from error
    log.info("slot created", slot=slot)
    return True


async def _create_slot(query: Connection, replication: Connection, slot: str, deadline_seconds: float) -> None:
    command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL {} NOEXPORT_SNAPSHOT").format(
        sql.Identifier(slot), sql.Identifier(PLUGIN)
    )
    creation = asyncio.ensure_future(replication.execute(command))
    started = time.monotonic()
    try:
        while True:
            left = deadline_seconds - (time.monotonic() - started)
            await asyncio.wait({creation}, timeout=min(PROGRESS_SECONDS, max(0.0, left)))
            if creation.done():
                await creation
                return
            blocker = await fetch_one(query, "slot_creation_waits_for")
            who = f"{blocker['who']}, since {blocker['since']}" if blocker else "the running transactions"
            if left <= PROGRESS_SECONDS:
                remedy = (
                    blocker["remedy"] if blocker else "on a standby: SELECT pg_log_standby_snapshot(); on its primary"
                )
                raise SourceUnavailable(
                    "slot_creation_waits",
                    f"slot {slot} could not be created in {deadline_seconds:g} s: it waits for {who}",
                    remedy,
                )
            log.info("slot creation waits for the end of running transactions", slot=slot, waits_for=who)
    finally:
        if not creation.done():
            creation.cancel()  # psycopg cancels the command at the server, which takes the half-made slot away
            await asyncio.wait({creation})

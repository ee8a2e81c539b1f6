"""`check`: everything that would go wrong outside of the configuration file, found before the run.

Each finding has the exact SQL that mends it. What ``create_if_not_exists`` will create is no finding; that it cannot be
created is one. Nothing is changed on the source, and nothing of it is held for longer than a query: one query
connection and one walsender are opened, since whether the role may replicate is best known by doing it, and one query
connection to the replica, if there is one.

``max_slot_wal_keep_size`` is -1 on a server as it comes, which is no fault; it is a finding when the slot already holds
back so much WAL that the source's disk (no limit) or the slot (with a limit) is in danger.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

from psycopg.rows import DictRow

from spillway.config import Config, Database, Sink, TableName
from spillway.errors import Finding, SpillwayError
from spillway.source import catalog
from spillway.source.connect import Connection, connect_replication, querying
from spillway.source.origin import Expected, check_origin, system_id
from spillway.source.queries import fetch_one
from spillway.source.refusal import invalidated, missing_slot, other_database, quoted, wrong_plugin
from spillway.source.shaped import shaping_findings
from spillway.source.slot import PLUGIN, SlotState, create_publication_sql, lag, no_publication, slot_state
from spillway.source.tables import Published, named, table_findings

OLDEST_VERSION = 120000
HELD_BACK_WARN_BYTES = 4 << 30  # of WAL, without a limit
_FOR_SUPERUSERS = re.compile(r"\bFOR\s+(?:ALL\s+TABLES|TABLES\s+IN\s+SCHEMA)\b", re.IGNORECASE)
_UNITS = {"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40, "B": 1}


async def check(config: Config) -> list[Finding]:
    """The findings of all databases, in the order of the file; empty: clean."""
    findings: list[Finding] = []
    for database in config.databases:
        sinks = [sink for sink in config.sinks if sink.database == database.name and sink.status != "disabled"]
        try:
            async with querying(database.conninfo(), database.slot.name) as query:
                findings += [f async for f in _of_database(query, config, database, sinks)]
        except SpillwayError as error:
            findings.append(_finding(error, database))
    return findings


async def _of_database(
    query: Connection, config: Config, database: Database, sinks: list[Sink]
) -> AsyncIterator[Finding]:
    server = await fetch_one(query, "server")
    assert server is not None  # one row, always: the role that is connected
    version = query.info.server_version
    state = await slot_state(query, database.slot.name)
    publication = await fetch_one(query, "publication", publication=database.publication.name)
    names = named(sinks)
    existing = await catalog.existing(query, names)
    # The publication first, as it must be made first: a slot does not see a publication that is younger.
    found = [*_of_missing_publication(database, server, version, sinks, existing)] if publication is None else []
    of_server = [*_of_server(server, version), *_of_slot(database, state, server)]
    found += of_server
    if not of_server:
        found += await _of_walsender(database)
    if database.replica_url is not None:
        found += await _of_replica(query, database)
    if state.exists and state.plugin == PLUGIN:
        found += await _of_kept_wal(query, database, state, server)
    for finding in found:
        yield replace(finding, database=database.name)
    if publication is None and not database.publication.create_if_not_exists:
        return
    published = await _published(query, database, publication, server, existing)
    exist = {TableName(row["schema"], row["table"]) for row in existing}
    for finding in table_findings(published, sinks, exist, server["role"], version):
        yield replace(finding, database=database.name)
    async for finding in shaping_findings(query, config, database, sinks, published, server["role"]):
        yield replace(finding, database=database.name)


def _of_server(server: DictRow, version: int) -> Iterator[Finding]:
    if version < OLDEST_VERSION:
        yield Finding("version", f"PostgreSQL {version // 10000} is too old", "PostgreSQL 12 or newer is needed")
    if server["wal_level"] != "logical":
        yield Finding(
            "wal_level",
            f"wal_level is {server['wal_level']}",
            "ALTER SYSTEM SET wal_level = logical; and restart the server (on a standby: its primary)",
        )
    if server["standby"] and version < 160000:
        yield Finding("standby", "the server is a standby", "read from the primary, or from a standby of 16 or newer")


def _of_slot(database: Database, state: SlotState, server: DictRow) -> Iterator[Finding]:
    slot, name = database.slot, database.slot.name
    if not state.exists:
        if server["replication_slots"] >= server["max_replication_slots"]:
            yield Finding(
                "max_replication_slots",
                f"slot {name} cannot be created: all {server['max_replication_slots']} replication slots are taken",
                "drop one that nobody reads with SELECT pg_drop_replication_slot(...); or ALTER SYSTEM SET "
                f"max_replication_slots = {server['max_replication_slots'] + 10}; and restart the server",
            )
        elif not slot.create_if_not_exists:
            yield _finding(missing_slot(name), database)
    elif state.plugin != PLUGIN:
        yield _finding(wrong_plugin(name, f"plugin {state.plugin or 'none: a physical slot'}"), database)
    elif state.database != server["database"]:
        yield _finding(other_database(name, f"database {state.database}", server["database"]), database)
    elif state.invalidation is not None:
        yield _finding(invalidated(name, state.invalidation), database)
    elif state.active_pid is not None and state.active_application != f"spillway:{name}":  # ours may be running
        yield Finding(
            "slot_active",
            f"slot {name} is being read by {state.active_application or 'another client'} (pid {state.active_pid})",
            f"stop it before this one starts; as a last resort SELECT pg_terminate_backend({state.active_pid});",
        )


async def _of_walsender(database: Database) -> list[Finding]:
    """May we replicate, and is there room? Seen by doing it."""
    try:
        replication = await connect_replication(database.conninfo(), database.slot.name)
    except SpillwayError as error:
        return [_finding(error, database)]
    await replication.close()
    return []


async def _of_replica(query: Connection, database: Database) -> list[Finding]:
    """Whether pages of backfills may be read there."""
    slot = database.slot.name
    try:
        expected = Expected(await system_id(query, database.conninfo(), slot), replica=True)
    except SpillwayError:  # it may not be asked for, which is a finding about the walsender
        return []
    conninfo = database.page_conninfo()
    try:
        async with querying(conninfo, slot) as replica:
            seen = await fetch_one(replica, "reader")
            assert seen is not None  # one row, always
            await check_origin(replica, conninfo, slot, expected, standby=seen["standby"])
    except SpillwayError as error:
        return [replace(_finding(error, database), what=f"replica_url: {error.what}")]
    return []


async def _of_kept_wal(query: Connection, database: Database, state: SlotState, server: DictRow) -> list[Finding]:
    if state.invalidation is not None:
        return []
    behind_bytes = (await lag(query, database.slot.name)).behind_bytes
    limit_bytes = _size_bytes(server["max_slot_wal_keep_size"])
    held = f"slot {database.slot.name} holds back {behind_bytes >> 20} MB of WAL"
    if limit_bytes is None and behind_bytes > HELD_BACK_WARN_BYTES:
        return [
            Finding(
                "max_slot_wal_keep_size",
                f"{held}, and nothing limits it: the source's disk may fill up",
                "let Spillway catch up; a limit ends the slot instead of the source, and with it the changes that were "
                "not read: ALTER SYSTEM SET max_slot_wal_keep_size = '...'; SELECT pg_reload_conf();",
                "warning",
            )
        ]
    if limit_bytes is not None and (behind_bytes > limit_bytes // 2 or state.wal_status == "unreserved"):
        return [
            Finding(
                "max_slot_wal_keep_size",
                f"{held} of the {limit_bytes >> 20} MB after which it is lost",
                f"ALTER SYSTEM SET max_slot_wal_keep_size = '{max(2 * behind_bytes, limit_bytes * 2) >> 20}MB'; "
                "SELECT pg_reload_conf();",
                "warning",
            )
        ]
    return []


def _size_bytes(setting: str | None) -> int | None:
    """``64GB`` -> bytes; None for -1 and for servers that know no such limit."""
    if setting is None or setting == "-1":
        return None
    digits = setting.rstrip("kMGTB")
    return int(digits) * _UNITS[setting[len(digits) :] or "B"]


def _of_missing_publication(
    database: Database, server: DictRow, version: int, sinks: list[Sink], existing: list[DictRow]
) -> Iterator[Finding]:
    name = database.publication.name
    tables = [table for sink in sinks for table in sink.source.include_tables or ()]
    if not database.publication.create_if_not_exists:
        order = "" if not database.slot.create_if_not_exists else " (before the slot)"
        error = no_publication(name, create_publication_sql(name, tables, version) + order)
        yield _finding(error, database)
        return
    if server["superuser"]:
        return
    init_sql = database.publication.init_sql
    command = init_sql or create_publication_sql(name, tables, version)
    reason = None
    if init_sql is not None and _FOR_SUPERUSERS.search(init_sql):
        reason = "only a superuser may publish all tables, or those of a schema"
    elif init_sql is None and not tables:
        reason = "only a superuser may publish all tables, and no sink names its tables"
    else:
        # What init_sql puts into the publication is taken to be what the sinks name.
        foreign = sorted(f"{row['schema']}.{row['table']}" for row in existing if not row["owned"])
        lacks = [] if server["may_create"] else ["lacks CREATE on the database"]
        lacks += [f"does not own {', '.join(foreign)}"] if foreign else []
        if lacks:
            reason = f"{server['role']} {' and '.join(lacks)}"
        if lacks and not foreign:
            command = f"GRANT CREATE ON DATABASE {quoted(server['database'])} TO {quoted(server['role'])}; or {command}"
    if reason is not None:
        yield Finding("publication_create", f"publication {name} cannot be created: {reason}", f"as owner: {command}")


async def _published(
    query: Connection, database: Database, publication: DictRow | None, server: DictRow, existing: list[DictRow]
) -> Published:
    """The publication, or what creating it will make."""
    name, via_root = database.publication.name, query.info.server_version >= 130000
    if publication is not None:
        return Published(
            name,
            await catalog.tables(query, name),
            certain=True,
            update=publication["update"],
            delete=publication["delete"],
            via_root=publication["via_root"],
            all_tables=publication["all_tables"],
        )
    if database.publication.init_sql is None and server["superuser"]:
        tables = await catalog.publishable(query, via_root=via_root)
        return Published(name, tables, certain=True, all_tables=True)
    tables = await catalog.by_oid(query, [row["oid"] for row in existing])
    return Published(name, tables, certain=database.publication.init_sql is None)


def _finding(error: SpillwayError, database: Database) -> Finding:
    return Finding(error.code, error.what, error.remedy, database=database.name)

"""One session with a source: the stream of its slot, and a query connection beside it.

`open_session` connects, makes publication and slot where the configuration says so, and reports what the server says
of itself (`Session.server`), so that the caller can hold its state against it (I9) *before* anything is read. Then
`Session.start` takes the slot and begins to stream from where it was confirmed last.

The query connection answers what only the catalogue knows, once per Relation message. It is idle otherwise, and lost
together with the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import psycopg

from spillway.config import Database, Source
from spillway.errors import Finding
from spillway.pgoutput.identity import quote_identifier, unkeyable
from spillway.pgoutput.relation import Relation, TableInfo
from spillway.position import parse_lsn
from spillway.source import catalog
from spillway.source.connect import Connection, connect_query, connect_replication, querying
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal
from spillway.source.slot import ensure_publication, ensure_slot, slot_state, system
from spillway.source.stream import Stream


@dataclass(frozen=True, slots=True)
class SourceState:
    """What the server says of itself and of the slot, before reading starts."""

    system_id: str
    timeline: int
    forked_lsn: int | None  # where this timeline left the known one; None: it is the same, or unknown
    slot_exists: bool
    slot_created: bool  # by us, just now
    slot_used: bool  # somebody has read from it
    slot_reader: str  # who is reading from it now, "" if nobody is
    confirmed_lsn: int


class Session:
    """See the module. ``stream`` is there after `start`."""

    stream: Stream

    def __init__(self, database: Database, query: Connection, server: SourceState, server_version: int) -> None:
        self.server = server
        self._database = database
        self._query = query
        self._server_version = server_version
        self._started = False
        # By the root: its partitions that the stream has named and that are logged without their whole old rows.
        self._partial: dict[tuple[str, str], set[int]] = {}

    async def start(self) -> None:
        """Take the slot. Raises SourceUnavailable while somebody else has it."""
        database = self._database
        self.stream = await Stream.open(
            database.conninfo(), database.slot.name, [database.publication.name], 0, self._server_version
        )
        self._started = True

    async def describe(self, relation: Relation) -> TableInfo:
        """Of the replica identity of partitions the stream is believed: the catalogue has that of today."""
        info = await catalog.describe(self._query, relation)
        partial = self._partial.setdefault(info.root or (relation.schema, relation.table), set())
        if info.root is not None and not info.partitioned:
            if relation.replica_identity == "f":
                partial.discard(relation.oid)
            else:
                partial.add(relation.oid)
        return replace(info, partial=bool(partial))

    async def published_as(self, name: tuple[str, str], oid: int) -> bool:
        """Whether a table other than this is published under the name."""
        schema, table = name
        publication = self._database.publication.name
        found = await fetch_one(
            self._query, "published_as", publication=publication, schema=schema, table=table, oid=oid
        )
        return found is not None and bool(found["found"])

    def unkeyable(
        self, relation: Relation, info: TableInfo, columns: tuple[str, ...] | None, needs_key: bool
    ) -> Finding | None:
        """Why a sink cannot take this table: its key (None: the primary key) is not part of the replica identity."""
        if columns is not None:
            return unkeyable(relation, info, columns)
        if info.primary_key:
            return unkeyable(relation, info, info.primary_key)
        if not needs_key:
            return None
        table = f"{quote_identifier(relation.schema)}.{quote_identifier(relation.table)}"
        return Finding(
            "no_primary_key",
            f"table {relation.schema}.{relation.table} has no primary key: its rows cannot be told apart",
            f"ALTER TABLE {table} ADD PRIMARY KEY (...); or leave it out by source.exclude_tables",
        )

    async def close(self) -> None:
        if self._started:
            await self.stream.close()
        await self._query.close()


async def open_session(
    database: Database, sources: Sequence[Source], known_timeline: int | None, *, create_slot: bool
) -> Session:
    """``known_timeline``: the one that the state was made on. ``create_slot``: there is no state yet, so a slot that
    does not exist is made (if the configuration says so) rather than missed."""
    conninfo, slot, publication = database.conninfo(), database.slot, database.publication
    query = await connect_query(conninfo, slot.name)
    try:
        replication = await connect_replication(conninfo, slot.name)
        try:
            tables = [(t.schema, t.table) for source in sources for t in source.include_tables or ()]
            await ensure_publication(
                query,
                publication.name,
                create_if_not_exists=publication.create_if_not_exists,
                init_sql=publication.init_sql,
                tables=tables,
            )
            created = create_slot and await ensure_slot(
                query, replication, slot.name, publication.name, create_if_not_exists=slot.create_if_not_exists
            )
            server = await _observe(query, replication, slot.name, known_timeline, created=created)
        finally:
            await replication.close()
        return Session(database, query, server, query.info.server_version)
    except BaseException:
        await query.close()
        raise


async def observe(database: Database, known_timeline: int | None) -> SourceState:
    """What `open_session` would report, without making or taking anything."""
    async with querying(database.conninfo(), database.slot.name) as query:
        replication = await connect_replication(database.conninfo(), database.slot.name)
        try:
            return await _observe(query, replication, database.slot.name, known_timeline, created=False)
        finally:
            await replication.close()


async def _observe(
    query: Connection, replication: Connection, slot: str, known_timeline: int | None, *, created: bool
) -> SourceState:
    identified = await system(replication)
    forked = None
    if known_timeline is not None and known_timeline != identified.timeline:
        forked = await _forked_lsn(replication, identified.timeline, known_timeline)
    state = await slot_state(query, slot)
    return SourceState(
        system_id=identified.system_id,
        timeline=identified.timeline,
        forked_lsn=forked,
        slot_exists=state.exists,
        slot_created=created,
        slot_used=state.used,
        slot_reader=state.active_application or str(state.active_pid or ""),
        confirmed_lsn=state.confirmed_flush_lsn,
    )


async def _forked_lsn(replication: Connection, timeline: int, known: int) -> int | None:
    """Where the known timeline ended, by the current one's history file: lines of timeline, LSN, reason."""
    try:
        row = await (await replication.execute(f"TIMELINE_HISTORY {timeline:d}".encode())).fetchone()
    except psycopg.Error as error:
        raise query_refusal(error) from error
    content = bytes(row[1]) if row is not None and not isinstance(row[1], str) else str(row[1] if row else "").encode()
    for line in content.decode(errors="replace").splitlines():
        fields = line.split()
        if len(fields) >= 2 and fields[0] == str(known):
            return parse_lsn(fields[1])
    return None

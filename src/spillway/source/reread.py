"""Rows read anew, as the stream would have sent them.

A dead letter of a sink that keeps state is not sent again as it was: a later change may have been applied since. The
row is read by its primary key instead; a row that is gone, or that the sink's filter leaves out, becomes a delete. What
is read goes through the decoder as an Insert or Delete frame made of PostgreSQL's own text values, so that it is byte
for byte what the stream would have carried. Its position is the server's WAL position after the read: above everything
the read saw.
"""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import psycopg
from psycopg import sql

from spillway.change import ACTIONS, Change
from spillway.chunk import NO, Chunk
from spillway.errors import SpillwayError
from spillway.pgoutput import Decoder
from spillway.pgoutput.relation import Relation
from spillway.position import parse_lsn
from spillway.source import catalog
from spillway.source.connect import Connection
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal
from spillway.source.shape import Shape

_Value = bytes | None

_ALL_ACTIONS = frozenset(ACTIONS)
_XLOG_HEADER = b"w" + bytes(24)  # XLogData; its positions and time are not looked at


class Rereader:
    """Reads rows of one database anew. ``new_decoder``: as the stream's, without sets of group columns, and with no
    filters but those of the sink."""

    def __init__(self, query: Connection, new_decoder: Callable[[], Decoder]) -> None:
        self._query = query
        self._decoder = new_decoder()
        self._relations: dict[tuple[str, str], Relation] = {}

    async def read(self, schema: str, table: str, pks: Sequence[str]) -> Change:
        """The row with this primary key now, or its delete."""
        relation = await self._relation(schema, table)
        keys = [c for c in relation.columns if c.in_identity]
        if len(keys) != len(pks):
            raise SpillwayError("reread", f"the primary key of {schema}.{table} has changed", "discard the dead letter")
        query = sql.SQL("SELECT {} FROM {} WHERE {}").format(
            sql.SQL(", ").join(sql.Identifier(c.name) for c in relation.columns),
            sql.Identifier(schema, table),
            sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(c.name)) for c in keys),
        )
        try:
            cursor = await self._query.execute(query, list(pks))
            result = cursor.pgresult
            assert result is not None
            row = [result.get_value(0, i) for i in range(len(relation.columns))] if result.ntuples else None
            lsn_row = await (await self._query.execute(_WAL_POSITION)).fetchone()
        except psycopg.Error as error:
            raise query_refusal(error) from error
        assert lsn_row is not None
        begin = begin_frame(parse_lsn(lsn_row[0]), int(lsn_row[1]))
        named = dict(zip((k.name for k in keys), pks, strict=True))
        chunk = self._decoded(begin, row_frame(relation, row, named))
        if row is not None and NO in chunk.matched:
            chunk = self._decoded(begin, row_frame(relation, None, named))
        return replace(chunk.change(0), n=0)

    def _decoded(self, *payloads: bytes) -> Chunk:
        stop = self._decoder.fill(Frames(*payloads), sys.maxsize, 2)
        assert stop is None
        return self._decoder.take()

    async def _relation(self, schema: str, table: str) -> Relation:
        known = self._relations.get((schema, table))
        if known is not None:
            return known
        # Of no publication: all columns.
        seen = await fetch_one(self._query, "page", schema=schema, table=table, sort_column=None, publication=None)
        if seen is None or seen["shape"] is None:
            raise SpillwayError("reread", f"table {schema}.{table} is not there any more", "discard the dead letters")
        relation = Shape.of(seen["shape"], schema, table, None, self._query.info.server_version).relation
        self._decoder.learn(relation, await catalog.describe(self._query, relation), _ALL_ACTIONS)
        self._relations[schema, table] = relation
        return relation


class Frames:
    """What the decoder takes for a connection: these payloads, and no more."""

    def __init__(self, *payloads: bytes) -> None:
        self._frames = deque(_XLOG_HEADER + payload for payload in payloads)

    def get_copy_data(self, async_: int) -> tuple[int, memoryview]:  # noqa: ARG002 - libpq's signature
        if not self._frames:
            return 0, memoryview(b"")
        frame = self._frames.popleft()
        return len(frame), memoryview(frame)


# The position, and the time as Begin has it: microseconds since 2000.
_WAL_POSITION = """
    SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END::text,
           (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - 946684800000000
"""


def begin_frame(lsn: int, microseconds_since_2000: int) -> bytes:
    return struct.pack(">cQqI", b"B", lsn, microseconds_since_2000, 0)


def commit_frame(lsn: int) -> bytes:
    return struct.pack(">cBQQq", b"C", 0, lsn, lsn, 0)


def row_frame(relation: Relation, row: Sequence[_Value] | None, pks: dict[str, str]) -> bytes:
    """Insert of the row, or Delete of the key (PostgreSQL documentation, "Logical Replication Message Formats")."""
    values = row if row is not None else [pks[c.name].encode() if c.name in pks else None for c in relation.columns]
    head = struct.pack(
        ">cIcH", b"I" if row is not None else b"D", relation.oid, b"N" if row is not None else b"K", len(values)
    )
    return head + b"".join(b"n" if v is None else b"t" + len(v).to_bytes(4, "big") + v for v in values)

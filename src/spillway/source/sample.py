"""Some rows of a table as the stream would send their inserts, for whoever tries what is made of them.

The rows are the last by primary key. As in `spillway.source.page` they go through the decoder as Insert frames of
PostgreSQL's own text values, so that they are byte for byte what the stream would have carried: the columns that the
publication shows, where it shows the table.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

import psycopg
from psycopg import sql

from spillway.change import ACTIONS, Change
from spillway.config import Database, TableName
from spillway.errors import SpillwayError
from spillway.pgoutput import Decoder
from spillway.pgoutput.plan import DatabaseMeta
from spillway.pgoutput.relation import Relation
from spillway.position import parse_lsn
from spillway.source import catalog
from spillway.source.connect import Connection
from spillway.source.frames import Frames, begin_frame, row_frame
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal
from spillway.source.shape import Shape

_2000 = 946_684_800_000_000  # in microseconds since 1970; frames count from there


async def sample(
    query: Connection, database: Database, table: TableName, limit: int, max_message_bytes: int
) -> list[Change]:
    """At most ``limit`` rows. Raises SpillwayError ``table_missing`` and as queries do."""
    meta = DatabaseMeta(database.id, database.name, database.annotations, database.database, database.hostname)
    decoder = Decoder(meta, lambda _schema, _table: (), 0, max_message_bytes, 0, 1 << 62)
    relation, begin = await relation_of(query, database.publication.name, table)
    decoder.learn(relation, await catalog.describe(query, relation), frozenset(ACTIONS))
    try:
        result = (await query.execute(_rows(relation, limit))).pgresult
    except psycopg.Error as error:
        raise query_refusal(error) from error
    assert result is not None
    columns = range(len(relation.columns))
    frames = [
        row_frame(relation, [result.get_value(row, column) for column in columns], {}) for row in range(result.ntuples)
    ]
    stop = decoder.fill(Frames(begin, *frames), sys.maxsize, sys.maxsize)
    assert stop is None
    chunk = decoder.take()
    return [chunk.change(index) for index in range(len(frames))]


async def made_up_row(query: Connection, publication: str, table: TableName) -> dict[str, object]:
    """A row as the table may have one, for when it has none: its published columns, the primary key first."""
    relation, _ = await relation_of(query, publication, table)
    kinds = await catalog.column_types(query, relation.oid)
    columns = sorted(relation.columns, key=lambda column: not column.in_identity)
    return {column.name: _example(kinds.get(column.name, "text")) for column in columns}


_EXAMPLES: Final[Mapping[str, object]] = {
    **dict.fromkeys(("smallint", "integer", "bigint"), 1),
    **dict.fromkeys(("numeric", "real", "double precision"), 1.5),
    "boolean": True,
    "json": {},
    "jsonb": {},
    "uuid": "00000000-0000-4000-8000-000000000001",
    "date": "2026-01-02",
    "timestamp without time zone": "2026-01-02T03:04:05.000000Z",
    "timestamp with time zone": "2026-01-02T03:04:05.000000Z",
}


def _example(kind: str) -> object:
    return _EXAMPLES.get(kind.partition("(")[0], "example")


async def relation_of(query: Connection, publication: str, table: TableName) -> tuple[Relation, bytes]:
    """The table as the stream would describe it, and a Begin frame of now."""
    schema, name = table
    published = await fetch_one(query, "published_table", publication=publication, schema=schema, table=name)
    seen = await fetch_one(
        query, "page", schema=schema, table=name, sort_column=None, publication=publication if published else None
    )
    if seen is None or seen["shape"] is None:
        raise SpillwayError("table_missing", f"table {table} does not exist", "create it, or correct its name")
    relation = Shape.of(seen["shape"], schema, name, published, query.info.server_version).relation
    return relation, begin_frame(parse_lsn(seen["lsn"]), seen["microseconds"] - _2000)


def _rows(relation: Relation, limit: int) -> sql.Composed:
    keys = [column.name for column in relation.columns if column.in_identity]
    order = sql.SQL(", ").join(sql.SQL("{} DESC").format(sql.Identifier(name)) for name in keys)
    return sql.SQL("SELECT {} FROM {} {} LIMIT {}").format(
        sql.SQL(", ").join(sql.Identifier(column.name) for column in relation.columns),
        sql.Identifier(relation.schema, relation.table),
        sql.SQL("ORDER BY {}").format(order) if keys else sql.SQL(""),
        sql.Literal(limit),
    )

"""What was ordered by command, as requests for backfills: one for each table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from psycopg import sql

from spillway.config import Database, Sink
from spillway.config.orders import BackfillOrder, Key
from spillway.errors import SpillwayError
from spillway.flow.progress import Request
from spillway.source import catalog
from spillway.source.connect import Connection, querying
from spillway.source.queries import fetch_one

Table = tuple[str, str]


async def requests(database: Database, sink: Sink, order: BackfillOrder, tables: Sequence[Table]) -> list[Request]:
    """``tables``: the published ones that the sink takes, which an order without tables means."""
    named = [(table.schema, table.table) for table in order.tables] or list(tables)
    if not named:
        raise SpillwayError("no_tables", f"sink {sink.name} takes no table of the publication", "see: spillway check")
    conditions: dict[Table, str | None] = dict.fromkeys(named, order.where)
    if order.since is not None or order.from_key is not None or order.to_key is not None:
        async with querying(database.conninfo(), database.slot.name) as query:
            for table in named:
                conditions[table] = await _condition(query, database, order, table)
    limits = sink.backfill
    start = order.start_position
    if order.since is not None and order.sort_column is not None:
        start = order.since.astimezone(
            UTC
        ).isoformat()  # a timestamp without a zone is one of the session's, which is UTC
    return [
        Request(
            *table,
            "replay" if order.replay else "command",
            where=conditions[table],
            sort_column=order.sort_column,
            start=start,
            keys=order.keys,
            parallel=order.parallel or limits.parallel,
            max_rows_per_second=order.max_rows_per_second or limits.max_rows_per_second,
        )
        for table in named
    ]


async def _condition(query: Connection, database: Database, order: BackfillOrder, table: Table) -> str | None:
    """SQL for all that an order says of the rows, but for its ``start_position``."""
    parts: list[sql.Composable] = []
    if order.where is not None:
        parts.append(sql.SQL("(\n{}\n)").format(_verbatim(order.where)))
    if order.since is not None and order.sort_column is None:
        row = await fetch_one(query, "commit_timestamps")
        if row is None or not row["kept"]:
            raise SpillwayError(
                "no_commit_timestamps",
                f"database {database.name} does not keep when a row was changed (track_commit_timestamp is off)",
                "name the column that says so: --column updated_at",
            )
        since = sql.Literal(order.since.isoformat())
        parts.append(sql.SQL("pg_xact_commit_timestamp(xmin) >= {}").format(since))
    if order.from_key is not None or order.to_key is not None:
        columns = await _primary_key(query, database, table)
        for key, comparison in ((order.from_key, ">="), (order.to_key, "<=")):
            if key is not None:
                parts.append(_bound(columns, key, comparison, table))
    return sql.SQL(" AND ").join(parts).as_string(query) if parts else None


def _bound(columns: Sequence[str], key: Key, comparison: str, table: Table) -> sql.Composable:
    if len(key) != len(columns):
        raise SpillwayError(
            "bad_key",
            f"a key of {'.'.join(table)} has {len(columns)} parts ({', '.join(columns)}), this one has {len(key)}",
            "separate the parts by :",
        )
    return sql.SQL("({}) {} ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(">=" if comparison == ">=" else "<="),
        sql.SQL(", ").join(map(sql.Literal, key)),
    )


async def _primary_key(query: Connection, database: Database, table: Table) -> tuple[str, ...]:
    for published in await catalog.tables(query, database.publication.name):
        if published.name == table and published.primary_key:
            return published.primary_key
    raise SpillwayError("no_primary_key", f"{'.'.join(table)} has no primary key", "use --where")


def _verbatim(condition: str) -> sql.Composable:
    """The user's own SQL: whoever may order a backfill may read the table with the rights of our role, no more."""
    return _Raw(condition)


class _Raw(sql.Composable):
    def as_bytes(self, context: object = None) -> bytes:  # noqa: ARG002 - psycopg's signature
        return str(self._obj).encode()

"""What was ordered by command, as requests for backfills: one for each table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC

import psycopg
from psycopg import sql

from spillway.config import Database, Sink
from spillway.config.orders import BackfillOrder, Key
from spillway.errors import SpillwayError
from spillway.flow.progress import Request
from spillway.source import catalog
from spillway.source.catalog import PublishedTable
from spillway.source.connect import Connection, querying
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal

Table = tuple[str, str]


async def requests(database: Database, sink: Sink, order: BackfillOrder, tables: Sequence[Table]) -> list[Request]:
    """``tables``: the published ones that the sink takes, which an order without tables means."""
    named = [(table.schema, table.table) for table in order.tables] or list(tables)
    if not named:
        raise SpillwayError("no_tables", f"sink {sink.name} takes no table of the publication", "see: spillway check")
    keys = [*(order.keys or ()), *(key for key in (order.from_key, order.to_key) if key is not None)]
    if keys and order.sort_column is not None:
        raise SpillwayError("bad_request", "keys and a sort column do not go together", "leave one of them out")
    since = None if order.since is None else order.since.astimezone(UTC).isoformat()
    by_commit = since is not None and order.sort_column is None
    if keys or by_commit:
        async with querying(database.conninfo(), database.slot.name) as query:
            if by_commit:
                await _check_commit_timestamps(query, database)
            for table in named if keys else ():
                await _check_keys(query, database, table, keys)
    limits = sink.backfill
    return [
        Request(
            *table,
            "replay" if order.replay else "command",
            where=order.where,
            sort_column=order.sort_column,
            # A timestamp without a zone is one of the session's, which is UTC.
            start=order.start_position if since is None or by_commit else since,
            committed_since=since if by_commit else None,
            keys=order.keys,
            least_key=order.from_key,
            most_key=order.to_key,
            parallel=order.parallel or limits.parallel,
            max_rows_per_second=order.max_rows_per_second or limits.max_rows_per_second,
        )
        for table in named
    ]


async def _check_commit_timestamps(query: Connection, database: Database) -> None:
    row = await fetch_one(query, "commit_timestamps")
    if row is None or not row["kept"]:
        raise SpillwayError(
            "no_commit_timestamps",
            f"database {database.name} does not keep when a row was changed (track_commit_timestamp is off)",
            "name the column that says so: --column updated_at",
        )


async def _check_keys(query: Connection, database: Database, table: Table, keys: Sequence[Key]) -> None:
    name = ".".join(table)
    found = [one for one in await catalog.tables(query, database.publication.name) if one.name == table]
    if not found:
        return  # the beginning refuses it
    columns = found[0].primary_key
    if not columns:
        raise SpillwayError("no_primary_key", f"{name} has no primary key", "use --where")
    for key in keys:
        if len(key) != len(columns):
            raise SpillwayError(
                "bad_key",
                f"a key of {name} has {len(columns)} parts ({', '.join(columns)}), this one has {len(key)}",
                "separate the parts by :",
            )
    await _check_types(query, found[0], keys)


async def _check_types(query: Connection, table: PublishedTable, keys: Sequence[Key]) -> None:
    """Each value must be one of its column's type: read as such by the server, without a look at the table."""
    rows = json.dumps([dict(zip(table.primary_key, key, strict=True)) for key in keys])
    statement = sql.SQL("SELECT count(*) FROM jsonb_populate_recordset(CAST(NULL AS {}), CAST({} AS jsonb))")
    try:
        await query.execute(statement.format(sql.Identifier(table.schema, table.table), sql.Literal(rows)))
    except psycopg.DataError as error:
        raise SpillwayError(
            "bad_key",
            f"a key of {'.'.join(table.name)} is ({', '.join(table.primary_key)}): {error.diag.message_primary}",
            "give keys as they are shown",
        ) from error
    except psycopg.IntegrityError:
        pass  # a domain of another column that may not be null
    except psycopg.Error as error:
        raise query_refusal(error) from error

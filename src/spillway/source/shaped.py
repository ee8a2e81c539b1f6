"""What `check` finds about the shape of a sink's messages: its filters, its enrichment, its related tables.

The SQL of users is prepared and planned by the server that it will be asked of, with arrays of the key columns' own
types, and asked for no key at all: syntax, names, grants and the columns of its result are found before the run.

A related table must be in the publication, or its changes are not seen; and the old values of the columns that lead to
parents must be part of its replica identity: else a child that is deleted, or moves, leaves a document behind that
still shows it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from spillway.config import Condition, Config, Database, Related, Search, Sink, TableName
from spillway.config.code import names_changes
from spillway.config.section import nearest
from spillway.config.shape import columns_in
from spillway.errors import Finding, SpillwayError
from spillway.pgoutput.conditions import compiled
from spillway.pgoutput.identity import unroutable
from spillway.source import catalog
from spillway.source.catalog import PublishedTable
from spillway.source.connect import Connection
from spillway.source.enrich import Enricher
from spillway.source.grants import missing_grants
from spillway.source.origin import Expected, system_id
from spillway.source.parents import SETTINGS, Parents
from spillway.source.planned import few_rows
from spillway.source.refusal import quoted
from spillway.source.sample import relation_of
from spillway.source.sessions import Sessions
from spillway.source.snapshot import Seen
from spillway.source.tables import Published, as_streamed, not_published, rows_of

TIMEOUT_SECONDS = 15.0  # of one statement of the check
_NAMED_TABLES = 10  # of a finding about many
_ROUTING_COLUMN = "routing_column"
_NOT_OPERATED = "field_column_missing"
_UNTOLD = "filter_not_told"
_KEY_WRITTEN_OVER = "key_written_over"
_BESIDE = (_NOT_OPERATED, _UNTOLD, _KEY_WRITTEN_OVER)  # findings that say nothing of a related table's SQL


class _Enough(Exception):
    """The SQL of a related table works."""


async def shaping_findings(
    query: Connection, config: Config, database: Database, sinks: Sequence[Sink], published: Published, role: str
) -> AsyncIterator[Finding]:
    """Of the sinks of a database that can be asked, with ``role``."""
    for sink in sinks:
        selected = [table for table in published.tables if sink.selects(*table.name)]
        for finding in (*_of_format(sink), *_of_changes(config, sink, selected)):
            yield replace(finding, sink=sink.name)
    shaped = [
        sink for sink in sinks if sink.enrichment or sink.related or sink.filters or sink.transform or _columns(sink)
    ]
    if not shaped:
        return
    try:
        server = await system_id(query, database.conninfo(), database.slot.name)
    except SpillwayError:  # the role may not ask for it, which is a finding about the walsender
        server = None
    for sink in shaped:
        tables = {table.name: table for table in published.tables if sink.source.selects(*table.name)}
        found = [*_missing_columns(sink, tables), *_of_operations(config, sink, list(tables.values()))]
        found += _written_over(config, sink, list(tables.values()))
        found += [f async for f in _of_filters(query, database, sink, tables)]
        found += await _of_related_tables(query, published, sink)
        if server is not None:
            found += [f async for f in _of_enrichment(query, config, database, sink, server, role)]
            if all(f.code in _BESIDE for f in found):  # else the SQL of a related table can hardly be right
                found += [f async for f in _of_related_sql(query, database, sink, server, role)]
        for finding in found:
            yield replace(finding, sink=sink.name)


def _of_format(sink: Sink) -> Iterator[Finding]:
    """A filter in Python may leave deletes out, too."""
    if sink.format == "record" and "delete" in sink.taken_actions and not sink.destination.state and not sink.filter:
        yield Finding(
            "deletes_not_told",
            "with format: record nothing tells the delete of a row from a row: it is sent as the old row, with null "
            "where the replica identity does not hold it",
            "actions: [insert, update] for this sink, or another format",
            "warning",
        )


def _of_changes(config: Config, sink: Sink, tables: Sequence[PublishedTable]) -> Iterator[Finding]:
    """``changes`` are the old values, which an update has with REPLICA IDENTITY FULL only."""
    code = None if sink.filter is None else config.function(sink.filter).code
    if code is None or "update" not in sink.taken_actions or not names_changes(code):
        return
    leaves = [leaf for table in tables for leaf in rows_of(table) if leaf.replica_identity != "f"]
    if leaves:
        shown = ", ".join(_shown((leaf.schema, leaf.table)) for leaf in leaves[:_NAMED_TABLES])
        more = f" and {len(leaves) - _NAMED_TABLES} more" if len(leaves) > _NAMED_TABLES else ""
        yield Finding(
            "changes_not_told",
            f"filter {sink.filter} looks at changes, which are empty without REPLICA IDENTITY FULL: {shown}{more}",
            "\n".join(
                f"ALTER TABLE {quoted(leaf.schema, leaf.table)} REPLICA IDENTITY FULL;"
                for leaf in leaves[:_NAMED_TABLES]
            ),
            "warning",
        )


def _columns(sink: Sink) -> list[tuple[str, str]]:
    """Columns that the sink names, and where; of the table of its outbox, else of any of its tables."""
    destination, outbox = sink.destination, sink.outbox
    if isinstance(destination, Search) and destination.routing_column is not None:
        return [(destination.routing_column, _ROUTING_COLUMN)]
    if outbox is None or outbox.table is None:
        return []
    named = [(outbox.payload, "outbox.payload")]
    if not sink.message_grouping:  # else it is what the table is keyed by, and is judged as that
        named.append((outbox.key, "outbox.key"))
    for where, texts in (("routing", outbox.routing), ("headers", outbox.headers)):
        named += [(name, f"outbox.{where}.{key}") for key, text in texts.items() for name in columns_in(text)]
    return [(name, where) for name, where in named if name is not None]


def _missing_columns(sink: Sink, tables: Mapping[tuple[str, str], PublishedTable]) -> Iterator[Finding]:
    only = sink.outbox.table if sink.outbox is not None else None
    for column, where in _columns(sink):
        for table in tables.values():
            if only is not None and table.name != only:
                continue
            if column not in table.published_columns:
                yield Finding(
                    "column_missing",
                    f'the published columns of table {_shown(table.name)} have no "{column}", which {where} names',
                    "name a column that exists and, if the publication lists the table's columns, add it there",
                )
            elif where == _ROUTING_COLUMN:
                yield from _unknown_shard(sink, table, column)


def _of_operations(config: Config, sink: Sink, tables: Sequence[PublishedTable]) -> Iterator[Finding]:
    """Columns that the field operations name and no table of the sink has: passed over, and so not masked."""
    if sink.transform is None or not tables:
        return
    names = {name for table in tables for name in table.published_columns}
    flattened: list[str] = []
    for operation in config.function(sink.transform).fields:
        for column in (*operation.columns, *operation.names):
            if column not in names and not column.startswith(tuple(flattened)):
                near = nearest(column, sorted(names))
                yield Finding(
                    _NOT_OPERATED,
                    f'no table of this sink has a column "{column}" by then, which {operation.kind} in '
                    f"function {sink.transform} names{near}",
                    "name a column that is there, or leave it out: it has no effect",
                    "warning",
                )
        if operation.kind == "select":
            names &= set(operation.columns)
        if operation.kind == "rename":
            names = (names - operation.names.keys()) | set(operation.names.values())
        if operation.kind == "flatten":
            flattened += [f"{column}_" for column in operation.columns]
        names |= operation.values.keys()


def _written_over(config: Config, sink: Sink, tables: Sequence[PublishedTable]) -> Iterator[Finding]:
    """Columns of a key that a sink of rows shows with another value than the key that it keeps the row under."""
    if sink.transform is None or not sink.destination.state:
        return
    keys = {column: _shown(table.name) for table in tables for column in table.primary_key}
    for operation in config.function(sink.transform).fields:
        for column in sorted({*operation.names.values(), *operation.values} & keys.keys()):
            yield Finding(
                _KEY_WRITTEN_OVER,
                f"{operation.kind} in function {sink.transform} writes over {column}, of the primary key of table "
                f"{keys[column]}: the sink shows another value than that by which the row is known",
                "give it another name",
                "warning",
            )


def _unknown_shard(sink: Sink, table: PublishedTable, column: str) -> Iterator[Finding]:
    for leaf in rows_of(table):
        finding = unroutable(*as_streamed(leaf, table.published_columns), column, sink.taken_actions)
        if finding is not None:
            yield finding


async def _of_filters(
    query: Connection, database: Database, sink: Sink, tables: Mapping[tuple[str, str], PublishedTable]
) -> AsyncIterator[Finding]:
    for name in dict.fromkeys(condition.table for condition in sink.filters):
        table = tables.get(name)
        if table is None:
            continue  # it is not published, or not there: told elsewhere
        relation, _ = await relation_of(query, database.publication.name, TableName(table.schema, table.table))
        conditions = [condition for condition in sink.filters if condition.table == name]
        result = compiled(relation, await catalog.describe(query, relation), conditions)
        if isinstance(result, Finding):
            yield _with_near(result, [column.name for column in relation.columns], conditions)
        else:
            for finding in _untold(sink, table, {condition.column for condition in conditions}):
                yield finding


def _with_near(finding: Finding, columns: Sequence[str], conditions: Sequence[Condition]) -> Finding:
    missing = [one.column for one in conditions if one.column not in columns]
    if finding.code != "filter_column_missing" or not missing:
        return finding
    return replace(finding, what=finding.what + nearest(missing[0], columns))


def _untold(sink: Sink, table: PublishedTable, columns: Collection[str]) -> Iterator[Finding]:
    """Large values that an UPDATE leaves alone are not in the stream, and so a filter cannot tell them."""
    if sink.toast == "reselect" or "update" not in sink.taken_actions:
        return
    for leaf in rows_of(table):
        large = [c for c in leaf.toastable if c in columns and c not in leaf.identity_columns]
        if large and leaf.replica_identity != "f":
            alter = f"ALTER TABLE {quoted(leaf.schema, leaf.table)} REPLICA IDENTITY FULL;"
            yield Finding(
                _UNTOLD,
                f"a filter looks at {', '.join(large)} of table {_shown((leaf.schema, leaf.table))}, and an UPDATE"
                " that leaves a large value as it is does not carry it: it counts as one that passes",
                f"{alter} or toast: reselect for this sink" if sink.destination.state else alter,
                "warning",
            )


async def _of_enrichment(
    query: Connection, config: Config, database: Database, sink: Sink, server: str, role: str
) -> AsyncIterator[Finding]:
    if sink.enrichment is None:
        return
    code = config.function(sink.enrichment).code or ""
    replica = sink.enrichment_from == "replica"
    expected = Expected(server, replica)
    enricher = Enricher(
        database.page_conninfo() if replica else database.conninfo(),
        database.slot.name,
        lambda: expected,
        sink.enrichment,
        code,
        timeout_seconds=TIMEOUT_SECONDS,
        connections=1,
    )
    try:
        for table in sink.source.include_tables or ():
            await enricher.columns(table)
            why = few_rows(await enricher.plan(table))
            if why:
                yield Finding(
                    "enrichment_few_rows",
                    f"enrichment {sink.enrichment} {why}, and it is asked once for the rows of a batch",
                    "GROUP BY the key, or: FROM unnest($1) AS k(id) CROSS JOIN LATERAL (SELECT ... WHERE ... = k.id"
                    " LIMIT 1); see docs/functions.md#data-of-other-tables",
                )
    except SpillwayError as error:
        yield await _finding(query, error, code, role)
    finally:
        await enricher.close()


async def _finding(query: Connection, error: SpillwayError, code: str, role: str) -> Finding:
    """With all the grants that the SQL lacks, where one is what it lacks."""
    remedy = await missing_grants(query, code, role) if "permission denied" in error.what else ""
    return Finding(error.code, error.what, remedy or error.remedy)


async def _of_related_tables(query: Connection, published: Published, sink: Sink) -> list[Finding]:
    names = sorted({related.table for related in sink.related})
    exist = {TableName(row["schema"], row["table"]): row["oid"] for row in await catalog.existing(query, names)}
    by_name: dict[tuple[str, str], list[PublishedTable]] = {}
    for table in published.tables:
        by_name.setdefault(table.name, []).append(table)
    found: list[Finding] = []
    for related in sink.related:
        if related.table not in exist:
            found.append(Finding("table_missing", f"table {related.table} does not exist", "create it, or correct it"))
            continue
        tables = by_name.get(related.table)
        if tables is None:
            if published.certain:
                found.append(not_published(published, related.table))
                continue
            # init_sql will tell; what it has for the table is as good as known.
            tables = await catalog.by_oid(query, [exist[related.table]])
        found += [f for table in tables for f in _unseen(related, table)]
    return list(dict.fromkeys(found))


def _unseen(related: Related, table: PublishedTable) -> Iterator[Finding]:
    """Columns of which a change may not say the old value."""
    columns = related.columns or table.primary_key
    unknown = [column for column in columns if column not in table.published_columns]
    if unknown or not columns:
        what = f"have no {', '.join(unknown)}" if unknown else "have no primary key, and related names no columns"
        yield Finding(
            "related_columns",
            f"the published columns of table {related.table} {what}",
            "correct columns of this related table, or add them to the publication's list",
        )
        return
    for leaf in rows_of(table):
        outside = [column for column in columns if column not in leaf.identity_columns]
        if outside:
            yield Finding(
                "related_not_in_replica_identity",
                f"a DELETE on table {_shown((leaf.schema, leaf.table))}, or an UPDATE that moves a row, does not say "
                f"the old value of {', '.join(outside)}: the document of {related.refreshes} that it leaves would "
                "not be refreshed",
                f"ALTER TABLE {quoted(leaf.schema, leaf.table)} REPLICA IDENTITY FULL;",
            )


async def _of_related_sql(
    query: Connection, database: Database, sink: Sink, server: str, role: str
) -> AsyncIterator[Finding]:
    for related in sink.related:
        sessions = Sessions(
            database.conninfo(),
            database.slot.name,
            "check",
            lambda: Expected(server),
            TIMEOUT_SECONDS,
            1,
            own_search_path=True,
            settings=SETTINGS,
        )
        parents = Parents(sessions)
        try:
            await parents.find([(related, [])], Seen((), 0), _enough)
        except _Enough:
            pass
        except SpillwayError as error:
            yield await _finding(query, error, related.sql, role)
        finally:
            await parents.close()


async def _enough(_table: tuple[str, str], _keys: Sequence[str]) -> None:
    raise _Enough


def _shown(name: tuple[str, str]) -> str:
    return ".".join(name)

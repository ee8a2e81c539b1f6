"""What is wrong with tables: pure judgement over catalogue rows, one database at a time.

The rule for keys is `spillway.pgoutput.identity.unkeyable`, the same by which the stream refuses a table: what is found
here before the run is what would be refused in it, under the same code. A partitioned table's rows are in its leaves,
and the replica identity of the root says nothing of theirs: each leaf is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spillway.config import Search, Sink, TableName
from spillway.errors import Finding
from spillway.pgoutput.identity import concerns_inserts, unkeyable
from spillway.pgoutput.relation import Column, Relation, TableInfo
from spillway.source.catalog import PublishedTable
from spillway.source.grants import grants
from spillway.source.refusal import quoted


@dataclass(frozen=True, slots=True)
class Published:
    """A publication as it is, or as it will be once created."""

    name: str
    tables: Sequence[PublishedTable]
    certain: bool  # False: it is made by init_sql, so nobody knows yet what else it will hold
    update: bool = True
    delete: bool = True
    via_root: bool = True
    all_tables: bool = False


def table_findings(
    published: Published, sinks: Sequence[Sink], existing: set[TableName], role: str, server_version: int
) -> Iterator[Finding]:
    """``existing``: those of `named` that exist."""
    if published.update or published.delete:
        for table in published.tables:
            yield from _refused_updates(table)
    if server_version >= 130000 and not published.via_root:
        yield from _without_root(published)
    for sink in sinks:
        for finding in _of_sink(published, sink, existing, role):
            yield replace(finding, sink=sink.name)


def named(sinks: Sequence[Sink]) -> list[TableName]:
    """Every table that the sinks name, except for related ones."""
    names = {name for sink in sinks for name in sink.source.include_tables or ()}
    return sorted(names | {table.name for sink in sinks for table in sink.tables})


def refusal(sink: Sink, relations: Sequence[PublishedTable]) -> Finding | None:
    """Why the sink cannot take what is published under one table's name."""
    found = (finding for relation in relations for finding in _keys(sink, relation))
    return next((finding for finding in found if finding.severity == "error"), None)


def _refused_updates(table: PublishedTable) -> Iterator[Finding]:
    """PostgreSQL refuses the application's own UPDATE and DELETE: wanted by a sink or not, this hurts."""
    for leaf in rows_of(table):
        if not leaf.identity_columns:
            name = quoted(leaf.schema, leaf.table)
            mend = "REPLICA IDENTITY DEFAULT" if leaf.primary_key else "REPLICA IDENTITY FULL"
            yield Finding(
                "update_refused",
                f"PostgreSQL refuses UPDATE and DELETE on table {_shown(leaf)} while they are published: "
                "it has no replica identity",
                f"ALTER TABLE {name} {mend};"
                + ("" if leaf.primary_key else f" or ALTER TABLE {name} ADD PRIMARY KEY (...);"),
            )
        outside = [name for name in table.filter_columns if name not in leaf.identity_columns]
        if leaf.identity_columns and outside:
            yield Finding(
                "update_refused",
                f"PostgreSQL refuses UPDATE and DELETE on table {_shown(leaf)}: the publication's row filter uses "
                f"{', '.join(outside)}, which is not part of the replica identity",
                f"ALTER TABLE {quoted(leaf.schema, leaf.table)} REPLICA IDENTITY FULL;",
            )


def _partial(published: Published, table: PublishedTable) -> Iterator[Finding]:
    """The frames of rows that go by their root claim its replica identity, and hold what the partition's is."""
    if table.kind != "p" or table.replica_identity != "f" or not (published.update or published.delete):
        return
    for leaf in table.leaves:
        if leaf.replica_identity != "f" and leaf.identity_columns:
            yield Finding(
                "partition_identity",
                f"table {_shown(table)} has REPLICA IDENTITY FULL and its partition {_shown(leaf)} has not: old rows "
                "of the table are known by their keys alone",
                f"ALTER TABLE {quoted(leaf.schema, leaf.table)} REPLICA IDENTITY FULL;",
                "warning",
            )


def _without_root(published: Published) -> Iterator[Finding]:
    roots = sorted({".".join(table.root) for table in published.tables if table.root is not None})
    if roots:
        yield Finding(
            "pubviaroot",
            f"publication {published.name} publishes the partitions of {', '.join(roots)} one by one",
            f"ALTER PUBLICATION {quoted(published.name)} SET (publish_via_partition_root = true);",
            "warning",
        )


def _of_sink(published: Published, sink: Sink, existing: set[TableName], role: str) -> Iterator[Finding]:
    selected = [table for table in published.tables if sink.source.selects(*table.name)]
    reached = {table.name for table in selected}
    for name in dict.fromkeys((*(sink.source.include_tables or ()), *(table.name for table in sink.tables))):
        if name not in existing:
            yield Finding("table_missing", f"table {name} does not exist", "create it, or correct its name")
        elif published.certain and name not in reached and name in (sink.source.include_tables or ()):
            yield not_published(published, name)
    if not selected and published.certain and sink.source.include_tables is None:
        yield Finding(
            "no_tables",
            f"publication {published.name} has no table that this sink's source selects",
            f"ALTER PUBLICATION {quoted(published.name)} ADD TABLE ...; or correct the sink's source",
        )
    seen: set[Finding] = set()
    for table in selected:
        for finding in _of_table(published, sink, table, role):
            if finding not in seen:
                seen.add(finding)
                yield finding


def not_published(published: Published, name: TableName) -> Finding:
    what = f"table {name} is not in publication {published.name}"
    if published.all_tables:
        remedy = "name the table's partition root; temporary and unlogged tables are never published"
    else:
        remedy = f"ALTER PUBLICATION {quoted(published.name)} ADD TABLE {quoted(*name)};"
    return Finding("table_not_published", what, remedy)


def _of_table(published: Published, sink: Sink, table: PublishedTable, role: str) -> Iterator[Finding]:
    yield from _keys(sink, table)
    yield from _partial(published, table)
    if isinstance(sink.destination, Search) and published.update and "update" in sink.actions:
        yield from _toast(sink, table)
    if sink.destination.state and not table.readable:
        yield _unreadable(sink, table, role)


def _unreadable(sink: Sink, table: PublishedTable, role: str) -> Finding:
    """A warning where it may come to it, an error where it is certain to."""
    needs = [
        ("related: a document is read anew when something that it holds has changed", bool(sink.related)),
        ("toast: reselect: a row whose large values did not come is read anew", sink.toast == "reselect"),
        ("a backfill, and a dead letter that is retried with the row as it is now", True),
    ]
    said = "; ".join(what for what, needed in needs if needed)
    return Finding(
        "select_missing",
        f"table {_shown(table)} cannot be read, which is needed for {said}",
        grants([(table.schema, table.table)], role),
        "error" if sink.related else "warning",
    )


def _keys(sink: Sink, table: PublishedTable) -> Iterator[Finding]:
    """As the router orders: sinks of state by the primary key, the others by the configured columns if there are."""
    state = sink.destination.state
    if not sink.message_grouping and not state:
        return
    columns = (None if state else sink.group_columns.get(table.name)) or table.primary_key
    if not columns:
        name = quoted(table.schema, table.table)
        so = "its rows cannot be told apart" if state else "its messages have no order among themselves"
        yield Finding(
            "no_primary_key",
            f"table {_shown(table)} has no primary key: {so}",
            f"ALTER TABLE {name} ADD PRIMARY KEY (...); or leave it out by source.exclude_tables",
            "error" if state else "warning",
        )
        return
    for leaf in (table, *table.leaves):
        finding = unkeyable(*as_streamed(leaf, table.published_columns), columns)
        if finding is not None and (sink.taken_actions != ("insert",) or concerns_inserts(finding)):
            yield finding


def as_streamed(table: PublishedTable, published_columns: Sequence[str]) -> tuple[Relation, TableInfo]:
    """As the stream will name the table: without types, which its keys do not need."""
    identity = set(table.identity_columns)
    streamed = tuple(Column(name, 0, -1, name in identity) for name in table.columns if name in published_columns)
    relation = Relation(table.oid, table.schema, table.table, table.replica_identity, streamed)
    return relation, TableInfo(table.oid, table.primary_key, {})


def _toast(sink: Sink, table: PublishedTable) -> Iterator[Finding]:
    """A large value that an UPDATE leaves alone is not in the stream, unless the whole old row is."""
    for leaf in rows_of(table):
        large = [c for c in leaf.toastable if c in table.published_columns and c not in leaf.identity_columns]
        if large and leaf.replica_identity != "f" and sink.toast != "reselect":
            so = "is rejected" if sink.toast == "fail" else "leaves the column out"
            yield Finding(
                "toast",
                f"an UPDATE of table {_shown(leaf)} that leaves a large value of {', '.join(large)} as it is "
                f"does not carry it, and so {so}",
                f"ALTER TABLE {quoted(leaf.schema, leaf.table)} REPLICA IDENTITY FULL;",
                "warning",
            )


def rows_of(table: PublishedTable) -> Sequence[PublishedTable]:
    """Where the rows are: the table itself, or the leaves of a partitioned one."""
    return table.leaves if table.kind == "p" else (table,)


def _shown(table: PublishedTable) -> str:
    return f"{table.schema}.{table.table}"

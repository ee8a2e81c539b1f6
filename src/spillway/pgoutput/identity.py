"""Whether changes of a table can be keyed: the key's columns must be part of the replica identity.

What PostgreSQL sends of the old row of an update or a delete is its replica identity, no more (PostgreSQL
documentation, "Logical Replication", "Publication"). With a key column outside of it a delete has no key, and an
update that changes the key does not say so. A table without any replica identity is fine: PostgreSQL itself refuses
updates and deletes on it while they are published, so only inserts come.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from spillway.errors import Finding
from spillway.pgoutput.plan import primary_key
from spillway.pgoutput.relation import Relation, TableInfo


def unkeyable(relation: Relation, info: TableInfo, columns: Sequence[str]) -> Finding | None:
    """Why changes of this table cannot be keyed by these columns (the primary key's or a configured group's)."""
    table = f"{relation.schema}.{relation.table}"
    present = {column.name for column in relation.columns}
    missing = [name for name in columns if name not in present]
    if missing:
        return Finding(
            code="key_column_missing",
            what=f"the published columns of table {table} do not include {_listed(missing)}, by which it is keyed",
            remedy="name columns that exist and, if the publication has a column list for the table, add them to it",
        )
    identity = {column.name for column in relation.columns if column.in_identity}
    outside = [name for name in columns if name not in identity]
    if not identity or not outside:
        return None
    # The default identity is the primary key: lighter on the WAL than full, where it is enough.
    enough = relation.replica_identity == "i" and set(columns) <= set(primary_key(relation, info))
    return Finding(
        code="key_not_in_replica_identity",
        what=f"updates and deletes of table {table} do not carry {_listed(outside)}, by which it is keyed",
        remedy=f"ALTER TABLE {quote_identifier(relation.schema)}.{quote_identifier(relation.table)}"
        f" REPLICA IDENTITY {'DEFAULT' if enough else 'FULL'};",
    )


def unroutable(relation: Relation, info: TableInfo, column: str, actions: Collection[str]) -> Finding | None:
    """Why documents of this table cannot be kept in the shards that a column says. A delete must tell it; and an update
    what it was, or the document stays in its old shard: of an index as the identity `changes` tells nothing."""
    table = f"{relation.schema}.{relation.table}"
    if column not in {one.name for one in relation.columns}:
        return Finding(
            "column_missing",
            f"the published columns of table {table} have no {quote_identifier(column)}, which routing_column names",
            "name a column that exists and, if the publication lists the table's columns, add it there",
        )
    identity = {one.name for one in relation.columns if one.in_identity}
    if not identity or relation.replica_identity == "f" or column in primary_key(relation, info):
        return None
    told = column in identity
    if "update" not in actions and (told or "delete" not in actions):
        return None
    what = f"an UPDATE on table {table} does not say the old" if told else f"a DELETE on table {table} does not say the"
    return Finding(
        "column_not_in_replica_identity",
        f"{what} {column} of its row, by which routing_column finds the document",
        f"ALTER TABLE {quote_identifier(relation.schema)}.{quote_identifier(relation.table)} REPLICA IDENTITY FULL;",
    )


def concerns_inserts(finding: Finding) -> bool:
    """Whether inserts cannot be keyed either: they carry every column that there is."""
    return finding.code == "key_column_missing"


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _listed(names: Sequence[str]) -> str:
    return ", ".join(quote_identifier(name) for name in names)

"""Whether changes of a table can be keyed: the key's columns must be part of the replica identity.

What PostgreSQL sends of the old row of an update or a delete is its replica identity, no more (PostgreSQL
documentation, "Logical Replication", "Publication"). With a key column outside of it a delete has no key, and an
update that changes the key does not say so. A table without any replica identity is fine: PostgreSQL itself refuses
updates and deletes on it while they are published, so only inserts come.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def concerns_inserts(finding: Finding) -> bool:
    """Whether inserts cannot be keyed either: they carry every column that there is."""
    return finding.code == "key_column_missing"


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _listed(names: Sequence[str]) -> str:
    return ", ".join(quote_identifier(name) for name in names)

"""What only the catalogue knows of a table: its primary key, its types, its root, what its publication leaves out.

The catalogue is the table's present; the stream may be in its past. `describe` therefore trusts the Relation message
where both speak: under replica identity default the flagged columns *are* the primary key as of that place of the WAL.
Otherwise the present key is taken, by name, or by place where a column has only been renamed. A key that is not wholly
among the streamed columns is no key: a part of it would make one row of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from psycopg.rows import DictRow

from spillway.pgoutput.relation import Relation, ReplicaIdentity, TableInfo, TypeInfo
from spillway.source.connect import Connection
from spillway.source.queries import fetch, fetch_one

TypeKind = Literal["base", "domain", "enum", "composite", "array", "range", "multirange"]

_KINDS: Mapping[str, TypeKind] = {
    "b": "base", "d": "domain", "e": "enum", "c": "composite", "r": "range", "m": "multirange", "p": "base",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table of a publication (or one that would be), under the name that the stream gives it."""

    oid: int
    schema: str
    table: str
    kind: Literal["r", "p"]  # ordinary, partitioned
    replica_identity: ReplicaIdentity
    columns: tuple[str, ...]
    primary_key: tuple[str, ...]  # in column order
    identity_columns: tuple[str, ...]
    toastable: tuple[str, ...]  # columns that may hold values out of line; none while the table holds no such value
    published_columns: tuple[str, ...]
    row_filter: str | None
    filter_columns: tuple[str, ...]
    readable: bool  # we may SELECT from it
    root: tuple[str, str] | None = None  # of a partition that is published by itself
    leaves: tuple[PublishedTable, ...] = ()  # of a partitioned table: where its rows are

    @property
    def name(self) -> tuple[str, str]:
        """The name its changes go by: a partition's are its root's."""
        return self.root or (self.schema, self.table)


async def describe(query: Connection, relation: Relation) -> TableInfo:
    """The answer to a Relation message. A table that was dropped since has what the message alone can tell."""
    columns = await fetch(query, "columns", oid=relation.oid)
    root = await fetch_one(query, "root", oid=relation.oid)
    return TableInfo(
        oid=relation.oid,
        primary_key=_primary_key(relation, columns),
        types=await types(query, [column.type_oid for column in relation.columns]),
        root=None if root is None or root["table"] is None else (root["schema"], root["table"]),
        partitioned=root is not None and root["partitioned"],
    )


async def types(query: Connection, oids: Sequence[int]) -> dict[int, TypeInfo]:
    """These and all that they are made of, by OID."""
    return {row["oid"]: _type(row) for row in await fetch(query, "types", oids=sorted(set(oids)))}


def _primary_key(relation: Relation, columns: Sequence[DictRow]) -> tuple[str, ...]:
    flagged = tuple(column.name for column in relation.columns if column.in_identity)
    present = [column for column in columns if column["in_primary_key"]]
    if relation.replica_identity == "d":
        return flagged if len(present) <= len(flagged) else ()
    streamed = {column.name for column in relation.columns}
    names = [_streamed_name(column, relation, columns, streamed) for column in present]
    return () if None in names else tuple(cast(str, name) for name in names)


def _streamed_name(column: DictRow, relation: Relation, columns: Sequence[DictRow], streamed: set[str]) -> str | None:
    """What the Relation message calls a column of today's primary key."""
    if column["name"] in streamed:
        return str(column["name"])
    plain = [c for c in columns if not c["generated"]]
    if column["generated"] or len(plain) != len(relation.columns):
        return None
    then = relation.columns[plain.index(column)]
    today = {c["name"] for c in plain}
    return then.name if then.name not in today and then.type_oid == column["type_oid"] else None


def _type(row: DictRow) -> TypeInfo:
    is_array = row["element_oid"] != 0
    return TypeInfo(
        oid=row["oid"],
        name=row["name"],
        kind="array" if is_array else _KINDS[row["kind"]],
        base_oid=row["base_oid"],
        element_oid=row["element_oid"],
        delimiter=row["delimiter"],
        attributes=tuple(zip(row["attribute_names"], row["attribute_types"], strict=True)),
    )


async def tables(query: Connection, publication: str) -> list[PublishedTable]:
    """The tables of a publication."""
    published = await fetch(query, "published", publication=publication)
    return await _tables(query, {row["oid"]: row for row in published})


async def publishable(query: Connection, *, via_root: bool) -> list[PublishedTable]:
    """What a publication for all tables would hold."""
    rows = await fetch(query, "publishable", via_root=via_root)
    return await _tables(query, {row["oid"]: {} for row in rows})


async def existing(query: Connection, names: Sequence[tuple[str, str]]) -> list[DictRow]:
    """Those of the named tables that exist: schema, table, oid, kind, owned."""
    return await fetch(query, "existing", schemas=[schema for schema, _ in names], tables=[table for _, table in names])


async def column_types(query: Connection, oid: int) -> dict[str, str]:
    """By column: the type that its values are made of, as ``format_type`` names it: the base of a domain, the elements
    of an array; any enum is ``enum``."""
    return {row["name"]: row["type"] for row in await fetch(query, "column_types", oid=oid)}


async def by_oid(query: Connection, oids: Sequence[int]) -> list[PublishedTable]:
    """Tables as a publication without column lists and filters would hold them."""
    return await _tables(query, {oid: {} for oid in oids})


async def _tables(query: Connection, published: Mapping[int, Mapping[str, object]]) -> list[PublishedTable]:
    roots_of: dict[int, int] = {}
    for row in await fetch(query, "leaves", oids=list(published)):
        roots_of[row["leaf"]] = row["root"]
    rows = await fetch(query, "tables", oids=[*published, *roots_of])
    leaves: dict[int, list[PublishedTable]] = {}
    for row in rows:
        if row["oid"] in roots_of:
            leaves.setdefault(roots_of[row["oid"]], []).append(_table(row, {}, ()))
    return [
        _table(row, published[row["oid"]], tuple(leaves.get(row["oid"], ()))) for row in rows if row["oid"] in published
    ]


def _table(row: DictRow, published: Mapping[str, object], leaves: tuple[PublishedTable, ...]) -> PublishedTable:
    columns = tuple(row["columns"])
    listed = cast("list[str] | None", published.get("published_columns"))
    return PublishedTable(
        oid=row["oid"],
        schema=row["schema"],
        table=row["table"],
        kind=row["kind"],
        replica_identity=row["replica_identity"],
        columns=columns,
        primary_key=tuple(row["primary_key"]),
        identity_columns=tuple(row["identity_columns"]),
        toastable=tuple(row["toastable"] or ()),
        published_columns=columns if listed is None else tuple(listed),
        row_filter=cast("str | None", published.get("row_filter")),
        filter_columns=tuple(cast("list[str] | None", published.get("filter_columns")) or ()),
        readable=row["readable"],
        root=None if row["root_table"] is None else (row["root_schema"], row["root_table"]),
        leaves=leaves,
    )

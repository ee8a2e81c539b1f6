"""What the decoder must know of a table: pgoutput's Relation message, and what only the catalogue can tell.

A Relation message (PostgreSQL documentation, "Logical Replication Message Formats") names the columns, their types and
which are part of the replica identity; not the primary key, nor what an unknown type OID is. The source asks the
catalogue once per Relation message and hands the answer to the decoder before the next row is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ReplicaIdentity = Literal["d", "n", "f", "i"]  # default, nothing, full, index: pg_class.relreplident


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type_oid: int
    type_modifier: int
    in_identity: bool  # flag 1: part of the replica identity


@dataclass(frozen=True, slots=True)
class Relation:
    """The Relation message. With ``publish_via_partition_root`` it names the root."""

    oid: int
    schema: str
    table: str
    replica_identity: ReplicaIdentity
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type that is not built in (its OID is 16384 or above, or the decoder does not know it): pg_type, one row."""

    oid: int
    name: str
    kind: Literal["base", "domain", "enum", "composite", "array", "range", "multirange"]
    base_oid: int = 0  # of a domain
    element_oid: int = 0  # of an array
    delimiter: str = ","  # typdelim of the element
    attributes: tuple[tuple[str, int], ...] = ()  # of a composite: name, type OID


@dataclass(frozen=True, slots=True)
class TableInfo:
    """What the catalogue says, and `Session.describe`. ``root``: for a partition, the topmost table's.

    ``partial``: of a partitioned table, or of the one that a partition belongs to: some of its partitions are logged
    with less than their whole old rows. Published by the root an old row is then taken for no more than a key."""

    oid: int
    primary_key: tuple[str, ...]  # in column order of the table (attnum), not of the constraint
    types: Mapping[int, TypeInfo]  # every type reachable from the columns, by OID
    root: tuple[str, str] | None = None  # schema, table
    partitioned: bool = False
    partial: bool = False

"""Which tables cannot be keyed, and the SQL that mends it."""

from __future__ import annotations

from spillway.pgoutput import Column, Relation, TableInfo, unkeyable
from spillway.pgoutput.relation import ReplicaIdentity

INFO = TableInfo(1, ("id",), {})


def relation(replica_identity: ReplicaIdentity, *identity: str, table: str = "jobs") -> Relation:
    columns = tuple(Column(name, 25, -1, name in identity) for name in ("id", "tenant", "note"))
    return Relation(1, "public", table, replica_identity, columns)


def test_the_primary_key_under_identity_default_and_everything_under_full() -> None:
    assert unkeyable(relation("d", "id"), INFO, ("id",)) is None
    assert unkeyable(relation("f", "id", "tenant", "note"), INFO, ("tenant", "note")) is None
    assert unkeyable(relation("i", "tenant"), INFO, ("tenant",)) is None


def test_a_group_column_outside_of_the_identity() -> None:
    finding = unkeyable(relation("d", "id", table='odd "one"'), INFO, ("tenant", "id"))
    assert finding is not None
    assert finding.code == "key_not_in_replica_identity"
    assert '"tenant"' in finding.what
    assert finding.remedy == 'ALTER TABLE "public"."odd ""one""" REPLICA IDENTITY FULL;'
    assert finding.severity == "error"


def test_an_identity_index_without_the_primary_key_goes_back_to_default() -> None:
    finding = unkeyable(relation("i", "tenant"), INFO, ("id",))
    assert finding is not None
    assert finding.remedy == 'ALTER TABLE "public"."jobs" REPLICA IDENTITY DEFAULT;'
    finding = unkeyable(relation("i", "tenant"), INFO, ("note",))
    assert finding is not None
    assert finding.remedy.endswith("FULL;")


def test_without_any_identity_only_inserts_come() -> None:
    assert unkeyable(relation("n"), INFO, ("id",)) is None
    assert unkeyable(relation("d"), TableInfo(1, (), {}), ("tenant",)) is None


def test_a_column_that_is_not_published() -> None:
    finding = unkeyable(relation("d", "id"), INFO, ("id", "region"))
    assert finding is not None
    assert finding.code == "key_column_missing"
    assert '"region"' in finding.what

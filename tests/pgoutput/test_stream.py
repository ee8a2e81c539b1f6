"""What real servers send: keys, TOAST, truncation, annotations, partitions, changes of the schema, large rows."""

from __future__ import annotations

import orjson
import psycopg
import pytest

from pgoutput.capture import Capture, slot
from pgoutput.frames import SUFFIX, changes_of, groups_before, groups_of
from spillway.change import Change
from spillway.chunk import FLAGS, MOVED, OLD, WHOLE
from spillway.pgoutput import unkeyable
from spillway.pgoutput.relation import TableInfo
from spillway.position import parse_lsn

JOBS = "CREATE TABLE jobs (id int PRIMARY KEY, name text, note text)"
BIG = "SELECT string_agg(md5(i::text), '') FROM generate_series(1, 400) i"


def record_of(change: Change) -> dict[str, object]:
    return orjson.loads(change.record)


def message_of(change: Change) -> dict[str, dict[str, object]]:
    return orjson.loads(change.body + SUFFIX)


def one(session: psycopg.Connection[tuple[object, ...]], query: str) -> str:
    (value,) = session.execute(query).fetchone() or (None,)
    return str(value)


def test_a_transaction_from_begin_to_commit(any_database: str) -> None:
    with slot(any_database, JOBS) as (session, capture):
        before = parse_lsn(one(session, "SELECT pg_current_wal_lsn()"))
        with session.transaction():
            session.execute("INSERT INTO jobs VALUES (1, 'a', NULL)")
            session.execute("UPDATE jobs SET name = 'b'")
            session.execute("UPDATE jobs SET id = 2")
            session.execute("DELETE FROM jobs")
        after = parse_lsn(one(session, "SELECT pg_current_wal_lsn()"))
        clock = float(one(session, "SELECT extract(epoch FROM clock_timestamp())"))
        chunk = capture.chunk()
    changes = changes_of(chunk)
    assert len(capture.relations) == 1
    assert before < chunk.commit_lsn < chunk.end_lsn <= after
    assert {change.commit_lsn for change in changes} == {chunk.commit_lsn}
    assert abs(clock - changes[0].commit_time) < 60
    assert [(c.action, c.commit_idx, c.n, c.key, c.was) for c in changes] == [
        ("insert", 0, 1, "public.jobs:1", None),
        ("update", 1, 2, "public.jobs:1", None),
        ("delete", 2, 3, "public.jobs:1", None),
        ("update", 2, 1, "public.jobs:2", "public.jobs:1"),
        ("delete", 3, 2, "public.jobs:2", None),
    ]
    assert list(chunk.byte_column(FLAGS)) == [WHOLE, WHOLE, WHOLE | OLD, WHOLE | MOVED, WHOLE]
    _, updated, old, _, deleted = changes
    assert record_of(old) == {"id": 1, "name": None, "note": None}
    assert record_of(deleted) == {"id": 2, "name": None, "note": None}
    assert message_of(updated)["changes"] == {}


def test_the_same_again_at_replay(any_database: str) -> None:
    with slot(any_database, JOBS) as (session, capture):
        session.execute("INSERT INTO jobs SELECT i, 'x', 'y' FROM generate_series(1, 50) i")
        session.execute("UPDATE jobs SET id = id + 100")
        first = capture.chunk(peek=True)
        again = Capture(session).chunk()
    assert first.count == 150
    assert (first.data, first.meta, first.keys) == (again.data, again.meta, again.keys)


def test_identity_full(any_database: str) -> None:
    table = "CREATE TABLE t (id int PRIMARY KEY, price numeric, name text, big text)"
    with slot(any_database, table, "ALTER TABLE t REPLICA IDENTITY FULL", groups=(("name",),)) as (session, capture):
        session.execute(f"INSERT INTO t VALUES (1, 1.0, 'a', ({BIG}))")
        session.execute("UPDATE t SET price = 1.00")
        session.execute("UPDATE t SET name = 'b'")
        session.execute("UPDATE t SET price = price")
        session.execute("UPDATE t SET id = 2, name = NULL")
        session.execute("DELETE FROM t")
        chunk = capture.chunk()
    inserted, priced, named, same, old, moved, deleted = changes_of(chunk)
    text = record_of(inserted)["big"]
    assert isinstance(text, str)
    assert len(text) == 12_800
    assert b'"changes":{"price":1.0}' in priced.body
    assert all(change.whole and change.was is None for change in (inserted, priced, named, same, deleted))
    assert record_of(priced)["big"] == text
    assert message_of(named)["changes"] == {"name": "a"}
    assert message_of(same)["changes"] == {}
    assert [groups_before(chunk, i) for i in range(7)] == [[""], [""], ["public.t:a"], [""], [""], ["public.t:b"], [""]]
    assert [groups_of(chunk, i) for i in (2, 4, 5)] == [["public.t:b"], ["public.t:b"], ["public.t:\\N"]]
    assert (old.key, moved.key, moved.was) == ("public.t:1", "public.t:2", "public.t:1")
    assert record_of(old) == {"id": 1, "price": 1.0, "name": "b", "big": text}
    assert record_of(deleted) == {"id": 2, "price": 1.0, "name": None, "big": text}


def test_identity_index_and_nothing(any_database: str) -> None:
    with slot(
        any_database,
        "CREATE TABLE i (id int PRIMARY KEY, code text NOT NULL UNIQUE)",
        "ALTER TABLE i REPLICA IDENTITY USING INDEX i_code_key",
        "CREATE TABLE n (id int PRIMARY KEY)",
        "ALTER TABLE n REPLICA IDENTITY NOTHING",
        groups=(("code",),),
    ) as (session, capture):
        session.execute("INSERT INTO i VALUES (1, 'a')")
        session.execute("UPDATE i SET code = 'b'")
        session.execute("DELETE FROM i")
        session.execute("INSERT INTO n VALUES (1)")
        chunk = capture.chunk()
    inserted, updated, deleted, other = changes_of(chunk)
    assert (inserted.key, groups_of(chunk, 0)) == ("public.i:1", ["public.i:a"])
    assert (updated.key, updated.was, groups_before(chunk, 1)) == ("public.i:1", None, ["public.i:a"])
    assert (deleted.key, groups_of(chunk, 2), record_of(deleted)) == (None, ["public.i:b"], {"id": None, "code": "b"})
    assert other.key == "public.n:1"
    info = TableInfo(0, ("id",), {})
    identities = {relation.table: unkeyable(relation, info, ("id",)) for relation in capture.relations}
    assert identities["n"] is None
    finding = identities["i"]
    assert finding is not None
    assert finding.remedy == 'ALTER TABLE "public"."i" REPLICA IDENTITY DEFAULT;'


def test_toast_is_left_out_where_the_server_does_not_send_it(any_database: str) -> None:
    table = "CREATE TABLE t (id int PRIMARY KEY, n int, big text, doc jsonb)"
    with slot(any_database, table) as (session, capture):
        session.execute(f"INSERT INTO t VALUES (1, 1, ({BIG}), jsonb_build_object('a', ({BIG})))")
        session.execute("UPDATE t SET n = 2")
        session.execute("UPDATE t SET id = 2")
        session.execute("UPDATE t SET big = NULL")
        inserted, updated, old, moved, emptied = capture.changes()
    assert inserted.whole
    assert record_of(updated) == {"id": 1, "n": 2}
    assert record_of(moved) == {"id": 2, "n": 2}
    assert record_of(emptied) == {"id": 2, "n": 2, "big": None}
    assert not any(change.whole for change in (updated, moved, emptied))
    assert old.whole


def test_a_primary_key_out_of_line_is_known_when_unchanged(any_database: str) -> None:
    with slot(
        any_database,
        "CREATE TABLE t (id text PRIMARY KEY, n int)",
        "ALTER TABLE t ALTER id SET STORAGE EXTERNAL",
    ) as (session, capture):
        key = "k" * 2400
        session.execute("INSERT INTO t VALUES (%s, 1)", [key])
        session.execute("UPDATE t SET n = 2")
        session.execute("DELETE FROM t")
        inserted, updated, deleted = capture.changes()
    assert inserted.pks == updated.pks == deleted.pks == (key,)
    assert record_of(updated) == {"id": key, "n": 2}
    assert updated.whole
    assert updated.was is None


def test_truncate_is_one_operation(any_database: str) -> None:
    with slot(any_database, JOBS, "CREATE TABLE other (id int PRIMARY KEY)") as (session, capture):
        with session.transaction():
            session.execute("INSERT INTO jobs VALUES (1, 'a', 'b')")
            session.execute("TRUNCATE jobs, other")
            session.execute("INSERT INTO other VALUES (1)")
        changes = capture.changes()
    assert [(change.table, change.action, change.commit_idx, change.key) for change in changes] == [
        ("jobs", "insert", 0, "public.jobs:1"),
        ("jobs", "truncate", 1, None),
        ("other", "truncate", 1, None),
        ("other", "insert", 2, "public.other:1"),
    ]
    assert message_of(changes[1])["record"] is None
    assert message_of(changes[1])["metadata"]["record_pks"] == []


def test_rows_rolled_back_or_not_published_are_not_counted(any_database: str) -> None:
    with slot(any_database, JOBS, "CREATE TABLE other (id int)", publication="FOR TABLE jobs") as (session, capture):
        with session.transaction():
            session.execute("INSERT INTO other VALUES (1)")
            session.execute("INSERT INTO jobs VALUES (1, 'a', 'b')")
            session.execute("SAVEPOINT s")
            session.execute("INSERT INTO jobs VALUES (2, 'a', 'b')")
            session.execute("ROLLBACK TO s")
            session.execute("INSERT INTO jobs VALUES (3, 'a', 'b')")
        assert [(change.key, change.commit_idx) for change in capture.changes()] == [
            ("public.jobs:1", 0),
            ("public.jobs:3", 1),
        ]


@pytest.mark.parametrize("postgres", ["15", "18"], indirect=True)
def test_annotations(database: str) -> None:
    emit = "SELECT pg_logical_emit_message(%s, %s, %s)"
    annotation = "sequin:transaction_annotations."
    with slot(database, JOBS, options=("messages", "true")) as (session, capture):
        with session.transaction():
            session.execute("INSERT INTO jobs VALUES (1)")
            session.execute(emit, [True, annotation + "set", '{"user":\n"é"}'])
            session.execute(emit, [False, annotation + "set", '{"user": "nobody"}'])
            session.execute(emit, [True, "mine", "x"])
            session.execute("INSERT INTO jobs VALUES (2)")
            session.execute(emit, [True, annotation + "clear", ""])
            session.execute("INSERT INTO jobs VALUES (3)")
            session.execute(emit, [True, annotation + "set", "no JSON"])
            session.execute("INSERT INTO jobs VALUES (4)")
        session.execute("INSERT INTO jobs VALUES (5)")
        metadata = [message_of(change)["metadata"] for change in capture.changes()]
    assert [(m["commit_idx"], m["transaction_annotations"]) for m in metadata] == [
        (0, None),
        (3, {"user": "é"}),
        (5, None),
        (7, None),
        (0, None),
    ]
    assert capture.warnings == ["invalid_transaction_annotation"]


PARTITIONS = (
    "CREATE TABLE root (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at)",
    "CREATE TABLE middle PARTITION OF root FOR VALUES FROM ('2024-01-01') TO ('2025-01-01') PARTITION BY RANGE (at)",
    "CREATE TABLE leaf PARTITION OF middle FOR VALUES FROM ('2024-01-01') TO ('2024-07-01')",
    "CREATE TABLE late PARTITION OF middle FOR VALUES FROM ('2024-07-01') TO ('2025-01-01')",
)


def test_a_partition_under_its_own_name_has_the_identity_of_its_root(any_database: str) -> None:
    with slot(any_database, *PARTITIONS, publication="FOR TABLE leaf, late") as (session, capture):
        session.execute("INSERT INTO root VALUES (1, '2024-02-03')")
        session.execute("UPDATE root SET at = '2024-08-01'")
        session.execute("TRUNCATE late")
        inserted, deleted, again, truncated = capture.changes()
    assert {relation.table for relation in capture.relations} == {"leaf", "late"}
    assert (inserted.schema, inserted.table, inserted.key) == ("public", "root", "public.root:1:2024-02-03")
    assert (deleted.action, deleted.key) == ("delete", "public.root:1:2024-02-03")
    assert (again.action, again.key) == ("insert", "public.root:1:2024-08-01")
    assert (truncated.action, truncated.table) == ("truncate", "late")


@pytest.mark.parametrize("postgres", ["15", "18"], indirect=True)
def test_a_partition_published_by_its_root(database: str) -> None:
    publication = "FOR TABLE root WITH (publish_via_partition_root = true)"
    with slot(database, *PARTITIONS, publication=publication) as (session, capture):
        session.execute("INSERT INTO root VALUES (1, '2024-02-03')")
        session.execute("TRUNCATE root")
        inserted, truncated = capture.changes()
    # The server names the partition too, but every row comes under its root.
    assert {relation.table for relation in capture.relations} == {"root", "leaf"}
    assert (inserted.table, inserted.key, truncated.table) == ("root", "public.root:1:2024-02-03", "root")


@pytest.mark.parametrize("postgres", ["15", "18"], indirect=True)
def test_a_partition_with_identity_full_when_its_root_has_not(database: str) -> None:
    """The server then marks the whole old row as an old key."""
    publication = "FOR TABLE root WITH (publish_via_partition_root = true)"
    tables = (*PARTITIONS, "ALTER TABLE root ADD name text", "ALTER TABLE leaf REPLICA IDENTITY FULL")
    with slot(database, *tables, publication=publication, groups=(("name",),)) as (session, capture):
        session.execute("INSERT INTO root VALUES (1, '2024-02-03', 'a')")
        session.execute("UPDATE root SET name = 'b'")
        session.execute("DELETE FROM root")
        chunk = capture.chunk()
    _, renamed, deleted = changes_of(chunk)
    assert (renamed.key, groups_before(chunk, 1)) == ("public.root:1:2024-02-03", ["public.root:a"])
    assert record_of(deleted) == {"id": 1, "at": "2024-02-03", "name": "b"}


def test_changes_of_the_schema_in_between(any_database: str) -> None:
    with slot(any_database, JOBS) as (session, capture):
        session.execute("INSERT INTO jobs VALUES (1, 'a', 'b')")
        session.execute("ALTER TABLE jobs ADD COLUMN extra int[] DEFAULT '{1}', DROP COLUMN note")
        session.execute("INSERT INTO jobs VALUES (2, 'a')")
        session.execute("ALTER TABLE jobs RENAME COLUMN id TO number")
        session.execute("UPDATE jobs SET name = 'c' WHERE number = 2")
        session.execute("ALTER TABLE jobs ALTER name TYPE int USING 7")
        session.execute("DELETE FROM jobs WHERE number = 1")
        changes = capture.changes()
    # The catalogue was asked after all of this: the key comes from the relation messages nevertheless.
    assert [(change.key, change.record) for change in changes[:3] + changes[-1:]] == [
        ("public.jobs:1", b'{"id":1,"name":"a","note":"b"}'),
        ("public.jobs:2", b'{"id":2,"name":"a","extra":[1]}'),
        ("public.jobs:2", b'{"number":2,"name":"c","extra":[1]}'),
        ("public.jobs:1", b'{"number":1,"name":null,"extra":null}'),
    ]


@pytest.mark.parametrize("postgres", ["15", "18"], indirect=True)
def test_a_column_list(database: str) -> None:
    with slot(database, JOBS, publication="FOR TABLE jobs (id, note)") as (session, capture):
        session.execute("INSERT INTO jobs VALUES (1, 'a', 'b')")
        session.execute("UPDATE jobs SET id = 2")
        inserted, old, updated = capture.changes()
    assert record_of(inserted) == {"id": 1, "note": "b"}
    assert (old.key, updated.was, record_of(old)) == ("public.jobs:1", "public.jobs:1", {"id": 1, "note": None})


def test_a_row_that_is_too_large_keeps_its_key(any_database: str) -> None:
    with slot(any_database, JOBS, max_message_bytes=1 << 20) as (session, capture):
        session.execute("INSERT INTO jobs VALUES (1, 'a', repeat('x', 2000000))")
        session.execute("UPDATE jobs SET id = 2, note = note || 'y'")
        session.execute("UPDATE jobs SET note = 'short'")
        session.execute("DELETE FROM jobs")
        inserted, old, moved, shortened, deleted = capture.changes()
    assert inserted.too_large_bytes > 2_000_000
    assert (inserted.key, record_of(inserted), inserted.whole) == ("public.jobs:1", {"id": 1}, False)
    assert (moved.key, old.key, old.too_large_bytes) == ("public.jobs:2", "public.jobs:1", 0)
    assert (shortened.too_large_bytes, shortened.whole, deleted.too_large_bytes) == (0, True, 0)


def test_names_of_tables_and_columns_may_hold_anything(any_database: str) -> None:
    table = 'CREATE TABLE "a.b"."50%s:""x""" ("100%b" int PRIMARY KEY, "é\n" text)'
    with slot(any_database, 'CREATE SCHEMA "a.b"', table) as (session, capture):
        session.execute('INSERT INTO "a.b"."50%s:""x""" VALUES (1, NULL)'.replace("%", "%%"), [])
        (change,) = capture.changes()
    assert record_of(change) == {"100%b": 1, "é\n": None}
    assert change.key == 'a\\.b.50%s\\:"x":1'
    assert (change.schema, change.table) == ("a.b", '50%s:"x"')

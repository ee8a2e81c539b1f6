"""Partitions whose replica identities differ, from a real PostgreSQL."""

from __future__ import annotations

import sqlite3
import subprocess
from pathlib import Path

from oracle.product import spillway_command
from shape.place import Shaped, file_sink, sqlite_sink

T = "public.t"
SCHEMA = """create table t (id int primary key, tenant int, v int) partition by range (id);
    create table t1 partition of t for values from (0) to (100);"""
TENANT = [{"column": "tenant", "operator": "eq", "value": 1}]


def test_a_partition_that_is_refused_is_not_mended_by_another(database: str, tmp_path: Path) -> None:
    schema = (
        SCHEMA + "create table t2 partition of t for values from (100) to (200); alter table t1 replica identity full"
    )
    sink = {**file_sink("out", [T]), "tables": [{"name": T, "group_column_names": ["tenant"]}]}
    with Shaped(database, tmp_path, [sink], schema=schema) as place:
        place.begin()
        place.sql("insert into t values (101, 1, 0)")
        place.wait(lambda: place.status("out")["state"] == "gap", "the refusal")
        place.sql("insert into t values (1, 1, 0)")
        assert [line["record"]["id"] for line in place.came("out", 1)] == [1]
        assert place.status("out")["state"] == "gap"
        assert "public.t2" in place.status("out")["reason"]
        place.post("out/resume")  # acknowledged, and still refused
        place.sql("insert into t values (103, 1, 0)")
        place.read_by_the_stream()
        assert place.status("out")["state"] == "gap"
        place.sql("alter table t2 replica identity full", "insert into t values (102, 1, 0)")
        assert [line["record"]["id"] for line in place.came("out", 2)] == [1, 102]
        assert place.status("out")["gap"]["last_lsn"] is not None


def test_a_key_in_place_of_an_old_row_is_not_taken_for_one(database: str, tmp_path: Path) -> None:
    """The second partition comes while the process runs."""
    schema = SCHEMA + "alter table t replica identity full; alter table t1 replica identity full"
    sinks = [
        sqlite_sink("lite", [T], filters=TENANT),
        file_sink("out", [T], filters=TENANT),
        file_sink("plain", [T]),
    ]
    with Shaped(database, tmp_path, sinks, schema=schema) as place:
        place.sql("alter publication spillway set (publish_via_partition_root = true)")
        place.begin()
        place.sql("insert into t values (1, 1, 0)", "update t set v = 1 where id = 1")
        place.sql("create table t2 partition of t for values from (100) to (200)")
        place.sql("insert into t values (101, 1, 0), (102, 1, 0), (103, 1, 0)")
        place.sql("update t set id = 110 where id = 101", "delete from t where id = 102")
        place.sql("update t set tenant = 2 where id = 103")
        place.drained("lite", "out", "plain")
        told = [line["changes"] for line in place.lines("plain") if line["action"] == "update"]
        assert told == [{"v": 0}, {}, {}]
        assert [line["record"]["id"] for line in place.lines("out") if line["action"] == "delete"] == [102]
        with sqlite3.connect(place.folder / "lite.db") as lite:
            assert [row[0] for row in lite.execute("select id from t order by id")] == [1, 110]
        checked = subprocess.run(
            [*spillway_command(), "check", str(place.product.file)], capture_output=True, text=True, check=False
        )
        assert 'ALTER TABLE "public"."t2" REPLICA IDENTITY FULL;' in checked.stdout
        assert "partition_identity" in checked.stdout

"""A sink with filters on its columns: a row that leaves the filter while the sink misses changes is not left there."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfill.site import Site, sqlite_sink

T = "public.t"
FILTERS = [{"column": "tenant", "operator": "=", "value": 1}]
TABLE = "create table t (id int primary key, tenant int, v text)"
TABLES = {
    "default": (TABLE,),
    "full": (TABLE, "alter table t replica identity full"),
    "partitions": (
        f"{TABLE} partition by range (id)",
        "create table t1 partition of t for values from (-5000) to (4)",
        "create table t2 partition of t for values from (4) to (5000)",
    ),
}
BACKLOG = {"max_messages": 1000, "on_full": "pause"}


@pytest.mark.parametrize("shape", ["default", "full", "partitions"])
def test_the_sweep_takes_what_has_left_the_filter(database: str, tmp_path: Path, shape: str) -> None:
    kept = sqlite_sink("kept", [T], filters=FILTERS, backlog=BACKLOG)
    with Site(database, tmp_path, [kept]) as site:
        site.sql(*TABLES[shape], "create publication spillway for all tables")
        site.begin()
        site.sql("insert into t select n, 1, 'x' from generate_series(1, 20) n")
        site.drained("kept")
        site.block("kept.db")
        site.sql("insert into t select -n, 1, 'y' from generate_series(1, 1000) n")
        site.wait_gap_grows("kept")
        site.sql("update t set tenant = 2 where id between 1 and 5", "delete from t where id between 6 and 10")
        site.read_by_the_stream()
        site.unblock("kept.db")
        site.end_gap("kept")
        site.ended("kept", site.start("kept", gap=True))
        site.wait(lambda: site.status("kept")["gap"] is None, "the gap to be cleared")
        site.drained("kept")
        wanted = {str(row[0]) for row in site.sql("select id from t where tenant = 1")}
        assert {key[1] for key in site.sqlite_rows("kept", T)} == wanted

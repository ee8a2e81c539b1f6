"""After a gap: the tables that missed changes are read anew, what they have lost is deleted, and the gap is cleared."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from backfill.site import Refused, Site, file_sink, sink, sqlite_sink
from oracle.product import spillway_command
from oracle.rules import Row, judge_rows
from oracle.workload import Load
from servers.opensearch import OpenSearch
from servers.ports import free_port

JOBS, PAIRS, STILL = "public.jobs", "public.pairs", "public.still"
TABLES = (JOBS, PAIRS, STILL)
SCHEMA = """
create table public.jobs (id int primary key, seq bigint not null, v text);
create table public.pairs (a int, b text, seq bigint not null, v text, primary key (a, b));
create table public.still (id int primary key, v text);
create publication spillway for all tables;
"""
ROWS = """
insert into jobs select n, -n, 'row ' || n from generate_series(1, 900) n;
insert into pairs select n, 'x-' || n, -n, 'row ' || n from generate_series(1, 600) n;
insert into still select n, 'row ' || n from generate_series(1, 5) n;
"""
MISSED = """
insert into jobs select n, -n, 'new' from generate_series(901, 950) n;
update jobs set v = 'changed', seq = seq - 10000 where id between 100 and 199;
delete from jobs where id between 200 and 799;
update jobs set id = id + 5000 where id between 10 and 19;
delete from pairs where a between 2 and 9;
update pairs set b = b || ':moved' where a between 10 and 19;
"""
BACKLOG = {"max_messages": 1000, "on_full": "pause"}


def overflow(site: Site, name: str) -> None:
    """The sink is down: changes until it takes no part any more."""
    site.sql("insert into jobs select -n, -20000 - n, 'before the gap' from generate_series(1, 1000) n")
    site.wait_gap_grows(name)


def assert_equal(site: Site, name: str, *tables: str) -> None:
    for table in tables:
        assert not judge_rows(site.source_rows(table), site.sqlite_rows(name, table))


@pytest.mark.parametrize("loaded", [False, True], ids=["quiet", "under load"])
def test_refill_repairs_what_was_missed_and_sweeps(database: str, tmp_path: Path, loaded: bool) -> None:
    with Site(database, tmp_path, [sqlite_sink("mirror", TABLES, backlog=BACKLOG)]) as site, ExitStack() as loads:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained("mirror")
        load = loads.enter_context(Load(database, seed=1)) if loaded else None
        site.block("mirror.db")
        overflow(site, "mirror")
        growing = site.status("mirror")
        assert "spillway sinks resume mirror" in growing["remedy"]
        assert "spillway backfill start mirror --gap" in growing["remedy"]
        with pytest.raises(Refused) as early:
            site.start("mirror", gap=True)
        assert early.value.code == "gap_open"
        site.sql(MISSED)
        if load is not None:
            load.allow(100)
        site.read_by_the_stream()
        site.unblock("mirror.db")
        if load is not None:
            load.allow(200)
        site.end_gap("mirror")
        missed = site.status("mirror")
        assert missed["state"] == "gap"
        assert "missed changes of public.jobs, public.pairs from" in missed["reason"]
        assert missed["remedy"].startswith("spillway backfill start mirror --gap;")
        if load is not None:
            load.allow(600)
        ids = site.start("mirror", gap=True)
        assert site.tables_of("mirror", ids) == [JOBS, PAIRS]
        ended = site.ended("mirror", ids)
        assert sum(item["swept"] for item in ended) > 600
        site.wait(lambda: site.status("mirror")["gap"] is None, "the gap to be cleared")
        if load is not None:
            load.finish()
        site.drained("mirror")
        site.wait_state("mirror", "caught_up")
        assert_equal(site, "mirror", *TABLES)
        with pytest.raises(Refused) as late:
            site.start("mirror", gap=True)
        assert late.value.code == "no_gap"


def adopt(site: Site) -> None:
    command = [*spillway_command(), "state", "adopt", "-c", str(site.product.file), "--yes"]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_search_sink_is_refilled_and_swept(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    """It is down because its address is wrong: the gap begins in one life of the process and ends in another. Then the
    slot is lost. A second sink has the rows of two tables in one index, where nobody can tell whose they are; two more
    sinks have one index together."""

    def searches(url: str) -> list[dict[str, object]]:
        tables = {"search": [JOBS], "both": [JOBS, PAIRS], "left": [STILL], "right": [PAIRS]}
        indexes = {"search": "gap_search", "both": "gap_both", "left": "gap_shared", "right": "gap_shared"}
        where = {
            name: {"type": "opensearch", "endpoint_url": url, "index_name": index} for name, index in indexes.items()
        }
        return [sink(name, tables[name], where[name], backlog=BACKLOG) for name in tables]

    def documents(index: str) -> dict[str, Row]:
        for path in (f"/{index}/_refresh", f"/{index}/_search?size=5000"):
            with urllib.request.urlopen(opensearch.url + path) as answer:
                found = json.load(answer)
        return {hit["_id"]: {k: str(v) for k, v in hit["_source"].items()} for hit in found["hits"]["hits"]}

    def rows(table: str) -> dict[str, Row]:
        return {":".join(key[1:]): row for key, row in site.source_rows(table).items()}

    with Site(database, tmp_path, searches(opensearch.url)) as site:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained(*("search", "both", "left", "right"))
        assert len(documents("gap_search")) == 900
        assert len(documents("gap_both")) == 1500
        site.stop()
        site.configure(*searches(f"http://127.0.0.1:{free_port()}"))
        site.begin()
        overflow(site, "search")
        site.wait_gap_grows("both")
        site.sql(MISSED)
        site.read_by_the_stream()
        site.stop()
        site.configure(*searches(opensearch.url))
        site.begin()
        site.end_gap("search")
        (item,) = site.run("search", gap=True)
        # Those that were deleted, and the old keys of those that moved.
        assert (item["table"], item["swept"]) == (JOBS, 610)
        site.drained("search")
        site.wait_state("search", "caught_up")
        assert documents("gap_search") == rows(JOBS)
        site.end_gap("both")
        assert [item["swept"] for item in site.run("both", gap=True)] == [0, 0]
        site.drained("both")
        site.wait(lambda: "deletes are not repaired" in site.status("both")["reason"], "the gap to be refilled")
        found, wanted = documents("gap_both"), rows(JOBS)
        assert {identity: found.get(identity) for identity in wanted} == wanted

        site.stop()
        site.sql("select pg_drop_replication_slot('spillway')", "delete from jobs where id > 950")
        adopt(site)
        site.begin()
        (item,) = site.run("search", gap=True)
        assert item["swept"] == 10
        assert [item["swept"] for item in site.run("left", gap=True)] == [0]
        site.drained("search", "left", "right")
        site.wait_state("search", "caught_up")
        assert documents("gap_search") == rows(JOBS)
        site.wait(lambda: "deletes are not repaired" in site.status("left")["reason"], "the gap to be refilled")
        shared = [row["b"] for row in documents("gap_shared").values() if "b" in row]
        assert sorted(map(str, shared)) == sorted(str(row["b"]) for row in rows(PAIRS).values())


def test_a_file_is_refilled_and_its_deletes_are_not_repaired(database: str, tmp_path: Path) -> None:
    with Site(database, tmp_path, [file_sink("out", TABLES, backlog=BACKLOG)]) as site:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained("out")
        site.block("out.ndjson")
        overflow(site, "out")
        site.sql(MISSED)
        site.read_by_the_stream()
        site.unblock("out.ndjson")
        site.end_gap("out")
        ids = site.start("out", gap=True)
        assert site.tables_of("out", ids) == [JOBS, PAIRS]
        site.ended("out", ids)
        site.drained("out")
        assert sorted(map(int, site.reads("out", JOBS))) == sorted(int(key[1] or 0) for key in site.source_rows(JOBS))
        site.again()
        status = site.status("out")
        assert status["state"] == "gap"
        assert "rows are refilled; deletes are not repaired" in status["reason"]
        assert "acknowledge: spillway sinks resume out" in status["remedy"]
        with pytest.raises(Refused) as again:
            site.start("out", gap=True)
        assert again.value.code == "nothing_missed"
        site.post("out/resume")
        site.wait_state("out", "caught_up", "idle")
        assert site.status("out")["gap"] is None


def test_a_lost_slot_is_a_gap_of_all_tables(database: str, tmp_path: Path) -> None:
    """A sink that takes no deletes keeps what it has, and its gap is repaired all the same."""
    sinks = [sqlite_sink("mirror", TABLES), sqlite_sink("keeper", [STILL], actions=["insert", "update"])]
    with Site(database, tmp_path, sinks) as site:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained("mirror", "keeper")
        site.stop()
        site.sql(
            MISSED,
            "update still set v = 'missed'",
            "select pg_drop_replication_slot('spillway')",
            "delete from still where id = 3",
        )
        adopt(site)
        site.sql("delete from jobs where id = 20", "insert into jobs values (21000, 1, 'after it')")
        site.begin()
        assert "spillway backfill start mirror --gap" in site.status("mirror")["remedy"]
        ids = site.start("mirror", gap=True)
        assert site.tables_of("mirror", ids) == sorted(TABLES)
        site.ended("mirror", ids)
        site.run("keeper", gap=True)
        site.drained("mirror", "keeper")
        site.wait_state("mirror", "caught_up")
        site.wait_state("keeper", "caught_up")
        assert_equal(site, "mirror", *TABLES)
        kept = site.sqlite_rows("keeper", STILL)
        assert kept.pop((STILL, "3"))["v"] == "row 3"
        assert kept == site.source_rows(STILL)


def test_gap_refill_and_sweep_go_on_after_a_crash(database: str, tmp_path: Path) -> None:
    with Site(database, tmp_path, [sqlite_sink("mirror", TABLES, backlog=BACKLOG)]) as site:
        site.sql(SCHEMA)
        site.begin()
        site.sql("insert into jobs select n, -n, 'row ' || n from generate_series(1, 12000) n", *ROWS.splitlines()[2:])
        site.drained("mirror")
        site.block("mirror.db")
        overflow(site, "mirror")
        site.sql("delete from jobs where id % 2 = 0", "update jobs set v = 'changed' where id % 10 = 1")
        site.read_by_the_stream()
        site.again()  # while the gap grows
        site.sql("delete from pairs where a < 300")
        site.read_by_the_stream()
        site.unblock("mirror.db")
        site.end_gap("mirror")
        site.again()
        assert "missed changes of public.jobs, public.pairs from" in site.status("mirror")["reason"]
        ids = site.start("mirror", gap=True)
        (jobs,) = [backfill_id for backfill_id in ids if site.item("mirror", backfill_id)["table"] == JOBS]

        def crash_in(column: str) -> dict:
            """As soon as the backfill has come so far, its table is locked: there it stands."""
            site.wait(lambda: site.item("mirror", jobs)[column] > 0, column, every=0.001)
            with site.transaction("lock table public.jobs in access exclusive mode"):
                site.wait(lambda: "locked" in site.item("mirror", jobs)["waiting"], "a page that waits")
                site.again()
                item = site.item("mirror", jobs)
                assert item["state"] == "active"
                return item

        rows = crash_in("rows_processed_count")["rows_processed_count"]
        there = len(site.source_rows(JOBS))
        assert 0 < rows < there
        swept = crash_in("swept")["swept"]
        assert 0 < swept < 6000
        (done,) = site.ended("mirror", [jobs])
        assert done["rows_processed_count"] == there, "what is counted is durable"
        site.ended("mirror", ids)
        site.wait(lambda: site.status("mirror")["gap"] is None, "the gap to be cleared")
        site.drained("mirror")
        assert_equal(site, "mirror", *TABLES)


def test_what_was_not_repaired_stays_in_the_gap(database: str, tmp_path: Path) -> None:
    """A refill that ends otherwise than well leaves its table in the gap, and so does one whose gap has grown since."""
    with Site(database, tmp_path, [sqlite_sink("mirror", TABLES, backlog=BACKLOG)]) as site:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained("mirror")
        site.block("mirror.db")
        overflow(site, "mirror")
        site.sql(MISSED)
        site.read_by_the_stream()
        site.unblock("mirror.db")
        site.end_gap("mirror")
        with site.transaction("select txid_current()"):  # no page before this has ended
            ids = site.start("mirror", gap=True)
            site.change("mirror", JOBS, "paused")
        site.wait(lambda: site.of_table("mirror", PAIRS)[0]["state"] == "completed", "the refill of pairs")
        site.change("mirror", JOBS, "cancelled")
        assert "missed changes of public.jobs from" in site.status("mirror")["reason"]
        with site.transaction("select txid_current()"):
            (outdated,) = site.start("mirror", gap=True)
            assert site.start("mirror", gap=True) == [outdated], "it is under way already"
            site.block("mirror.db")
            site.sql("insert into still select n, 'again' from generate_series(10, 1100) n")
            site.wait_gap_grows("mirror")
            site.sql("delete from still where id = 2")
            site.read_by_the_stream()
            site.unblock("mirror.db")
            site.end_gap("mirror")
        site.ended("mirror", [outdated])
        assert "missed changes of public.jobs, public.still from" in site.status("mirror")["reason"]
        again = site.start("mirror", gap=True)
        assert site.tables_of("mirror", again) == [JOBS, STILL]
        site.ended("mirror", again)
        site.drained("mirror")
        site.wait_state("mirror", "caught_up")
        assert_equal(site, "mirror", *TABLES)
        assert len(ids) == 2


def test_what_waited_before_the_gap_is_swept_too(database: str, tmp_path: Path) -> None:
    """A row that the sink has rejected so far is not among its keys; taken later, it must not come back to life. Of a
    table that is gone nothing is to be refilled."""
    with Site(database, tmp_path, [sqlite_sink("mirror", [JOBS, STILL], backlog=BACKLOG)]) as site:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained("mirror")

        def in_sink(*statements: str) -> None:
            connection = sqlite3.connect(tmp_path / "mirror.db", timeout=20, isolation_level=None)
            for statement in statements:
                connection.execute(statement)
            connection.close()

        in_sink("create trigger no before insert on jobs when new.v = 'bad' begin select raise(abort, 'bad'); end")
        site.sql("insert into jobs values (7777, 1, 'bad')")
        site.wait(lambda: site.status("mirror")["parked_keys"] == 1, "a parked key")
        site.block("mirror.db")
        overflow(site, "mirror")
        site.sql("delete from jobs where id in (7777, 5)", "delete from still")
        site.read_by_the_stream()
        site.sql("drop table still")
        site.unblock("mirror.db")
        site.end_gap("mirror")
        assert "missed changes of public.jobs, public.still from" in site.status("mirror")["reason"]
        (item,) = site.run("mirror", gap=True)
        assert (item["table"], item["swept"]) == (JOBS, 2)
        site.wait(lambda: site.status("mirror")["gap"] is None, "the gap to be cleared")
        in_sink("drop trigger no")
        site.post("mirror/backlog/retry", all=True)
        site.drained("mirror")
        site.wait_state("mirror", "caught_up")
        assert_equal(site, "mirror", JOBS)

"""Initial backfills, tables that come later, what people do to backfills, and tables that are not like the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backfill.site import Refused, Site, file_sink, sqlite_sink
from oracle.rules import judge_rows
from servers.postgres import Postgres

A, B, C = "public.a", "public.b", "public.c"
TWO_TABLES = """
create table a (id int primary key, v text);
create table b (id int primary key, changed int not null);
create publication spillway for table a, b;
insert into a select n, 'row ' || n from generate_series(1, 700) n;
insert into b select n, 100 - n from generate_series(1, 90) n;
"""
MANY_ROWS = """
create table a (id int primary key, v text);
create publication spillway for all tables;
insert into a select n, 'row ' || n from generate_series(1, 2000) n;
"""


def has_had(site: Site, name: str, table: str, rows: int) -> None:
    """One backfill of this table, complete; exactly these rows."""
    site.wait(lambda: [i["state"] for i in site.of_table(name, table)] == ["completed"], f"the rows of {table}")
    site.wait(lambda: len(site.reads(name, table)) >= rows, f"{rows} rows of {table} in {name}")
    assert len(set(site.reads(name, table))) == len(site.reads(name, table)) == rows


def test_what_the_file_asks_for_and_what_comes_later(database: str, tmp_path: Path) -> None:
    every = file_sink("every", [A, B, C, "public.later"], initial_backfill=True)
    listed = file_sink(
        "listed", [A, B, C],
        initial_backfill=[
            {"table": B, "type": "partial", "sort_column": "changed", "start_position": "60"}, {"table": C}
        ],
    )  # fmt: skip
    none = file_sink("none", [A, B])
    with Site(database, tmp_path, [every, listed, none]) as site:
        site.sql(TWO_TABLES)
        site.begin()
        has_had(site, "every", A, 700)
        has_had(site, "every", B, 90)
        has_had(site, "listed", B, 40)
        assert set(site.reads("listed", B)) == set(range(1, 41))

        # A table that enters the publication while a transaction is open that has changed it, and one made later
        site.sql(
            "create table c (id int primary key, v text)", "insert into c select n, 'c' from generate_series(1, 50) n"
        )
        with site.transaction("insert into c values (51, 'open')", "update c set v = 'open' where id = 7") as open_one:
            site.sql("alter publication spillway add table c", "create table later (id int primary key)")
            site.sql("insert into later values (1), (2)", "alter publication spillway add table later")
            site.wait(lambda: len(site.of_table("every", C)) == 1, "the table to be noticed")
            site.wait(
                lambda: "was running when it began" in site.of_table("every", C)[0]["waiting"], "what it waits for"
            )
            site.sql("insert into c values (52, 'after it')", "insert into later values (3)")
            assert not site.reads("every", C)
            open_one.commit()
        for name in ("every", "listed"):
            site.wait(lambda name=name: [i["state"] for i in site.of_table(name, C)] == ["completed"], "the rows of c")
            site.wait(lambda name=name: set(site.reads(name, C)) >= set(range(1, 52)), "rows of c")
            by_id = {
                i["record"]["id"]: i["record"]["v"] for i in site.lines(name) if i["metadata"]["table_name"] == "c"
            }
            assert by_id.keys() == set(range(1, 53))
            assert by_id[7] == by_id[51] == "open"
        site.wait(lambda: {1, 2} <= set(site.reads("every", "public.later")), "rows of the later table")
        site.drained("every", "listed", "none")

        # Not again after a restart; but a sink that is new gets its rows, and so does one that asks for the first time.
        counted = {name: len(site.lines(name)) for name in ("every", "listed", "none")}
        site.product.kill()
        site.configure(every, {**listed, "initial_backfill": True}, none, file_sink("new", [B], initial_backfill=True))
        site.begin()
        has_had(site, "new", B, 90)
        has_had(site, "listed", A, 700)
        site.sql("insert into a values (701, 'live')")
        site.drained("every", "listed", "none", "new")
        assert len(site.lines("every")) == counted["every"] + 1
        assert len(site.lines("none")) == counted["none"] + 1
        assert len(site.lines("listed")) == counted["listed"] + 701
        assert len(site.of_table("every", A)) == len(site.of_table("every", C)) == 1
        assert len(site.of_table("listed", B)) == 1
        assert site.product.backfills("none") == []


def test_what_cannot_be_read_fails_with_its_remedy(postgres: Postgres, database: str, tmp_path: Path) -> None:
    role = f"reader_{database.rsplit('_', 1)[1]}"
    url = postgres.dsn(database.rsplit("/", 1)[1], user=role)
    with Site(database, tmp_path, [file_sink("out", [A, B]), sqlite_sink("mirror", [A, B, C])], url) as site:
        site.sql(TWO_TABLES, f"create role {role} login replication", f"grant select on b to {role}")
        site.sql(
            "create table c (id int primary key, u int not null unique, v text)", "insert into c values (1, 1, 'x')"
        )
        site.sql("alter table c replica identity using index c_u_key", f"grant select on c to {role}")
        site.sql("alter publication spillway add table c")
        try:
            site.begin()
            (bad,) = site.ended("out", site.start("out", table=B, where="no_such_column = 1"), "failed")
            assert "no_such_column" in bad["error"]
            assert "one boolean expression" in bad["error"]
            assert "[bad_condition]" in bad["error"]
            (bad,) = site.ended("out", site.start("out", table=B, where="true; drop table b"), "failed")
            assert "[bad_condition]" in bad["error"]
            column = {"sort_column": "changed", "start_position": "not a number"}
            (bad,) = site.ended("out", site.start("out", table=B, **column), "failed")
            assert "[bad_condition]" in bad["error"]
            (bad,) = site.ended("out", site.start("out", table=B, sort_column="nothing"), "failed")
            assert "nothing" in bad["error"]
            (bad,) = site.ended("out", site.start("out", table=A), "failed")
            assert f'GRANT SELECT ON "public"."a" TO "{role}"' in bad["error"]
            assert "[no_grant]" in bad["error"]
            site.sql(f"grant select on a to {role}")
            assert site.run("out", table=A)[0]["rows_processed_count"] == 700

            with pytest.raises(Refused) as refused:
                site.start("mirror", table=C)
            assert refused.value.code == "key_not_in_replica_identity"
            assert 'ALTER TABLE "public"."c" REPLICA IDENTITY' in str(refused.value)
            site.sql("alter table c replica identity default")
            site.run("mirror", table=C)
            site.drained("mirror")
            assert not judge_rows(site.source_rows(C), site.sqlite_rows("mirror", C))
        finally:
            site.product.close()
            site.sql("drop publication spillway", "drop table a, b, c", f"drop role {role}")


def test_what_people_do_holds_over_restarts(database: str, tmp_path: Path) -> None:
    limits = {"max_rows_per_second": 1000}
    with Site(database, tmp_path, [file_sink("out", [A], backfill=limits), file_sink("other", [A])]) as site:
        site.sql(MANY_ROWS)
        site.begin()
        with ThreadPoolExecutor(8) as people:

            def start(_: int) -> str:
                try:
                    return site.start("out", table=A)[0]
                except Refused as refused:
                    return refused.code

            said = list(people.map(start, range(8)))
        (backfill_id,) = [one for one in said if one != "backfill_active"]
        assert said.count("backfill_active") == 7

        site.wait(lambda: site.item("out", backfill_id)["rows_processed_count"] > 0, "a page")
        assert site.change("out", A, "paused")["state"] == "paused"
        site.again()
        paused = site.item("out", backfill_id)
        assert paused["state"] == "paused"
        rows = paused["rows_processed_count"]
        assert 0 < rows < 2000
        with pytest.raises(Refused, match="paused already"):
            site.start("out", table=A)
        site.run("other", table=A)  # another sink's is none of its business
        site.sql("insert into a values (5000, 'while it is paused')")
        site.drained("out")
        assert site.item("out", backfill_id)["rows_processed_count"] == rows
        assert site.change("out", backfill_id, "active")["state"] == "active"
        site.again()
        assert site.item("out", backfill_id)["state"] in ("active", "completed")
        site.ended("out", [backfill_id])
        site.drained("out")
        assert set(site.reads("out", A)) == {*range(1, 2001), 5000}

        (second,) = site.start("out", table=A)
        assert site.change("out", second, "cancelled")["state"] == "cancelled"
        site.again()
        assert site.item("out", second)["state"] == "cancelled"
        assert site.item("out", second)["canceled_at"] is not None
        with pytest.raises(Refused) as ended:
            site.change("out", second, "active")
        assert ended.value.code == "unknown_backfill"
        (third,) = site.start("out", table=A, where="id < 10")
        site.ended("out", [third])


@pytest.mark.parametrize("via_root", [True, False], ids=["by their root", "one by one"])
def test_partitions(database: str, tmp_path: Path, via_root: bool) -> None:
    backlog = {"max_messages": 400, "on_full": "pause"}
    with Site(database, tmp_path, [sqlite_sink("mirror", [A], initial_backfill=True, backlog=backlog)]) as site:
        site.sql(
            "create table a (id int, region text, v text, primary key (region, id)) partition by list (region)",
            "create table a_north partition of a for values in ('n') partition by range (id)",
            "create table a_north_1 partition of a_north for values from (0) to (100)",
            "create table a_north_2 (v text, id int not null, region text not null, primary key (region, id))",
            "alter table a_north attach partition a_north_2 for values from (100) to (1000)",
            "create table a_south partition of a for values in ('s')",
            "insert into a select n, unnest(array['n', 's']), 'row' from generate_series(1, 400) n",
            f"create publication spillway for table a with (publish_via_partition_root = {str(via_root).lower()})",
        )
        site.begin()
        site.wait(lambda: [i["state"] for i in site.of_table("mirror", A)] == ["completed"], "the rows of a")
        site.drained("mirror")
        assert not judge_rows(site.source_rows(A), site.sqlite_rows("mirror", A))
        site.block("mirror.db")
        site.sql("insert into a select n, 'n', 'new' from generate_series(500, 899) n")
        site.wait_gap_grows("mirror")
        site.sql(
            "delete from a where id % 3 = 0",
            "update a set region = 's' where region = 'n' and id = 700 or id = 503",
            "update a set id = id + 900 where region = 's' and id between 20 and 29",
            "update a set v = 'changed' where id between 90 and 110",
        )
        site.read_by_the_stream()
        site.unblock("mirror.db")
        site.end_gap("mirror")
        (item,) = site.run("mirror", gap=True)
        assert (item["table"], item["rows_processed_count"]) == (A, len(site.source_rows(A)))
        site.drained("mirror")
        site.wait_state("mirror", "caught_up")
        assert not judge_rows(site.source_rows(A), site.sqlite_rows("mirror", A))


def test_partitions_that_go_and_come_while_they_are_read(database: str, tmp_path: Path) -> None:
    """One is dropped and one detached before they are read; one with rows is attached."""
    limits = {"max_rows_per_second": 400}
    with Site(database, tmp_path, [sqlite_sink("mirror", [A], initial_backfill=True, backfill=limits)]) as site:
        site.sql("create table a (id text primary key, v text) partition by range (id)")
        bounds = ("ab", "bc", "cd", "de")
        site.sql(*(f"create table a_{n} partition of a for values from ('{n}') to ('{end}')" for n, end in bounds))
        site.sql(
            "insert into a select x || n, 'row' from unnest('{a,b,c,d}'::text[]) x, generate_series(1, 300) n",
            "create table a_e (id text primary key, v text)",
            "insert into a_e select 'e' || n, 'row' from generate_series(1, 50) n",
            "create publication spillway for all tables",
        )
        site.begin()
        site.wait(lambda: any(i["rows_processed_count"] for i in site.of_table("mirror", A)), "rows", every=0.001)
        site.sql(
            "drop table a_b", "alter table a detach partition a_c",
            "alter table a attach partition a_e for values from ('e') to ('f')",
        )  # fmt: skip
        site.wait(lambda: site.of_table("mirror", A)[0]["state"] != "active", "its end")
        assert site.of_table("mirror", A)[0]["state"] == "completed"
        site.drained("mirror")
        found = site.sqlite_rows("mirror", A)
        assert {key: found[key] for key in site.source_rows(A)} == site.source_rows(A)
        assert not [key for key in found if key[1] and key[1].startswith(("b", "c"))]


def test_what_failed_is_said_until_somebody_saw_to_it(database: str, tmp_path: Path) -> None:
    manners = {"initial_backfill": True, "backfill": {"max_rows_per_second": 400}}
    with Site(database, tmp_path, [file_sink("out", [A, B], **manners)]) as site:
        site.sql(TWO_TABLES)
        site.begin()
        site.wait(lambda: site.of_table("out", B) and site.of_table("out", B)[0]["state"] == "completed", "rows of b")
        site.wait(lambda: any(i["rows_processed_count"] for i in site.of_table("out", A)), "rows of a", every=0.001)

        def fail(table: str) -> None:
            plain = table.removeprefix("public.")
            site.sql(f"alter publication spillway drop table {plain}")
            site.wait(lambda: site.of_table("out", table)[-1]["state"] == "failed", "its end")
            site.sql(f"alter publication spillway add table {plain}")

        def said() -> bool:
            status = site.status("out")
            return (
                "the initial backfill of public.a failed: " in status["reason"]
                and "spillway backfill start out public.a;" in status["remedy"]
            )

        fail(A)
        site.wait(said, "what has failed")
        site.again()
        site.wait(said, "what has failed, after a restart")
        assert len(site.of_table("out", A)) == 1
        site.run("out", table=A, where="id < 10")
        assert said(), "some rows are not all"
        site.run("out", table=A)
        site.wait(lambda: site.status("out")["reason"] == "", "nothing to be said")
        site.again()
        site.drained("out")
        site.wait(lambda: site.status("out")["reason"] == "", "nothing to be said")


@pytest.mark.parametrize("postgres", ["15"], indirect=True)
def test_a_table_without_primary_key(database: str, tmp_path: Path) -> None:
    """Into a file; a sink that keeps rows cannot take it."""
    sinks = [file_sink("out", [A], initial_backfill=True), sqlite_sink("mirror", [A], initial_backfill=True)]
    with Site(database, tmp_path, sinks) as site:
        site.sql("create table a (id int, v text)", "create publication spillway for table a")
        site.sql("insert into a select n, 'row' from generate_series(1, 3000) n", "insert into a values (1, 'row')")
        site.begin()
        site.wait(lambda: [i["state"] for i in site.of_table("out", A)] == ["completed"], "the rows of a")
        site.drained("out")
        assert sorted(map(int, map(str, site.reads("out", A)))) == [1, *range(1, 3001)]
        reads = [line for line in site.lines("out") if line["action"] == "read"]
        assert len({line["metadata"]["idempotency_key"] for line in reads}) == 3001
        with pytest.raises(Refused) as refused:
            site.start("mirror", table=A)
        assert refused.value.code == "no_primary_key"
        assert site.product.backfills("mirror") == []
        assert "no initial backfill" in site.product.log_end()

        # Rewritten while it is read: its rows are elsewhere, and are read from the first.
        before = len(site.reads("out", A))
        site.start("out", table=A, max_rows_per_second=1000)
        site.wait(lambda: site.of_table("out", A)[-1]["rows_processed_count"] > 0, "a page", every=0.001)
        site.sql("vacuum full a")
        site.wait(lambda: site.of_table("out", A)[-1]["state"] != "active", "its end")
        assert site.of_table("out", A)[-1]["state"] == "completed"
        site.drained("out")
        assert set(map(str, site.reads("out", A)[before:])) >= {str(n) for n in range(2, 3001)}
        assert "from its beginning" in site.product.log_end()

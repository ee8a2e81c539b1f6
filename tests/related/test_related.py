"""Documents stay right: a change of a related table makes its parents' documents anew, on a real PostgreSQL."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backfill.load import commit_late
from backfill.site import Refused, Site, sqlite_sink
from backfill.test_replica import with_replica
from servers.postgres import Postgres, Standby

TABLES = """
create table companies (id int primary key, name text not null);
create table jobs (id int primary key, company_id int, title text not null);
create table skills (id int primary key, job_id int, name text not null);
create index on jobs (company_id);
create index on skills (job_id);
alter table skills replica identity full;
create publication spillway for table companies, jobs, skills;
"""
DOCUMENT = """
select j.id, j.title, c.name as company, (select string_agg(s.name, ' ' order by s.name) from public.skills s
  where s.job_id = j.id) as skills from public.jobs j left join public.companies c on c.id = j.company_id"""
RELATED = [
    {"table": "public.companies", "sql": "select id from jobs where company_id = any($1)"},
    {"table": "public.skills", "columns": ["job_id"], "sql": "select unnest($1) as id"},
]
FUNCTION = {"name": "document", "type": "enrichment", "code": f"{DOCUMENT} where j.id = any($1)"}

Document = tuple[int, str, str | None, str | None]


class Board(Site):
    """The job board: jobs with what they are joined with."""

    functions: Sequence[dict[str, str]] = (FUNCTION,)

    def _config(self, sinks: Sequence[Mapping[str, object]]) -> dict[str, object]:
        return {**super()._config(sinks), "functions": list(self.functions)}

    def documents(self) -> dict[int, Document]:
        return {row[0]: row for row in self.ask_all("select id, title, company, skills from jobs")}

    def fresh(self) -> dict[int, Document]:
        return {row[0]: row for row in self.sql(DOCUMENT)}

    def wait_right(self) -> None:
        self.wait(self.is_right, "the documents to be those of the source", every=0.1)

    def is_right(self) -> bool:
        return self.documents() == self.fresh()

    def renamed(self, name: str = "renamed") -> int:
        return self.ask("select count(*) from jobs where company = ?", name)

    def title(self, number: int) -> str:
        return self.ask("select title from jobs where id = ?", number)

    def ask(self, query: str, *given: object) -> Any:
        with closing(sqlite3.connect(self.folder / "jobs.db")) as db:
            return db.execute(query, given).fetchone()[0]

    def ask_all(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.folder / "jobs.db")) as db:
            try:
                return db.execute(query).fetchall()
            except sqlite3.OperationalError:  # not there yet
                return []

    @property
    def due(self) -> int:
        return int(self.status("jobs")["due_refreshes"])


def jobs_sink(**more: object) -> dict[str, object]:
    return sqlite_sink("jobs", ["public.jobs"], enrichment="document", related=RELATED, initial_backfill=True, **more)


@pytest.fixture
def board(database: str, tmp_path: Path) -> Iterator[Board]:
    with Board(database, tmp_path, [jobs_sink()]) as board:
        board.sql(
            TABLES,
            "insert into companies select n, 'company ' || n from generate_series(1, 3) n",
            "insert into jobs select n, 1 + n % 3, 'job ' || n from generate_series(1, 30) n",
            "insert into skills select n, n, 'skill ' || n from generate_series(1, 30) n",
        )
        yield board


def test_documents_follow_their_related_tables(board: Board) -> None:
    board.begin()
    board.wait_right()
    for statement in (
        "update companies set name = 'renamed' where id = 1",
        "insert into skills values (100, 1, 'new')",
        "update skills set name = 'other' where id = 100",
        "update skills set job_id = 2 where id = 100",  # both jobs change
        "delete from skills where id in (2, 100)",
        "update skills set job_id = null where id = 3",
        "update skills set job_id = 3 where id = 3",
        "update skills set job_id = 1 where job_id > 20",
        "delete from skills where job_id = 1; insert into jobs values (31, 1, 'job 31'); delete from jobs where id = 4",
        "truncate skills",
    ):
        board.sql(statement)
        board.wait_right()
    board.wait(lambda: board.due == 0, "everything to be done")


def test_a_large_fan_out_goes_on_after_sigkill(board: Board) -> None:
    board.sql("insert into jobs select n, 1, 'job ' || n from generate_series(1001, 1000 + 20000) n")
    board.begin()
    board.wait_right()
    board.sql("update companies set name = 'renamed' where id = 1")
    board.wait(lambda: board.due > 0, "the first refreshes to be due", every=0.01)
    board.again()  # while keys are being asked for, or shortly after
    for left in (15_000, 8_000):
        board.wait(
            lambda most=left: board.renamed() > 0 and 0 < board.due < most, "a part of the refreshes", every=0.01
        )
        board.again()
        assert board.due > 0
    board.wait_right()
    board.wait(lambda: board.due == 0, "everything to be done")


def test_live_changes_flow_during_a_refresh(board: Board) -> None:
    """What is asked for again while it is due is done once; changes of other rows do not wait for it."""
    rows = 20_000
    board.sql(f"insert into jobs select n, 1, 'job ' || n from generate_series(1001, 1000 + {rows}) n")
    board.begin()
    board.wait_right()
    board.product.memory.label = "refresh"
    for name in ("first", "second", "third"):
        board.sql(f"update companies set name = '{name}' where id = 1")
    seconds: list[float] = []
    number = 0
    while board.renamed("third") < rows:
        number += 1
        began = time.monotonic()
        board.sql(f"update jobs set title = 'live {number}' where id = 1")
        board.wait(lambda title=f"live {number}": board.title(1) == title, "a live change", every=0.002)
        seconds.append(time.monotonic() - began)
    board.wait_right()
    assert number > 20
    assert sorted(seconds)[int(len(seconds) * 0.99)] < 1.0
    assert board.status("jobs")["related"]["refreshed"] < 3 * rows
    board.stop()
    assert max(board.product.memory.peaks.values()) < (128 + 100) << 20


def test_a_table_that_does_not_tell_its_old_values_is_refused(board: Board) -> None:
    board.sql("alter table skills replica identity default")
    board.begin()
    board.wait_right()
    board.sql("insert into skills values (100, 1, 'new')")
    board.wait(lambda: "REPLICA IDENTITY FULL" in board.status("jobs")["remedy"], "the finding")
    assert "job_id" in board.status("jobs")["reason"]
    board.sql("update companies set name = 'renamed' where id = 2")  # the other table's refreshes flow
    board.wait(lambda: board.documents()[1] == board.fresh()[1], "the documents of company 2")


def test_a_table_that_is_mended_while_nobody_is_there(board: Board) -> None:
    """What was missed of it is made up for after the start."""
    board.sql("alter table skills replica identity default")
    board.begin()
    board.wait_right()
    board.sql("insert into skills values (100, 1, 'new')")
    board.wait(lambda: "all documents are due" in board.status("jobs")["related"]["waiting"], "the finding")
    board.read_by_the_stream()
    board.product.kill()
    board.sql("alter table skills replica identity full")
    board.begin()
    board.wait_right()
    board.wait(lambda: board.due == 0, "everything to be done")


def test_sql_that_does_not_fit_is_said(board: Board) -> None:
    board.configure(
        jobs_sink() | {"related": [{"table": "public.skills", "sql": "select nothing from jobs where id = any($1)"}]}
    )
    board.begin()
    board.sql("insert into skills values (100, 1, 'new')")
    board.wait(lambda: "nothing" in board.status("jobs")["reason"], "the finding")
    board.sql("alter table jobs add column nothing int", "update jobs set nothing = id")
    board.wait_right()
    board.wait(lambda: "nothing" not in board.status("jobs")["reason"], "the end of the finding")


def test_a_change_for_which_the_sql_fails_waits_alone(board: Board) -> None:
    related = {"table": "public.skills", "columns": ["job_id"], "sql": "select x + 0 / (x - 7) as id from unnest($1) x"}
    board.configure(jobs_sink() | {"related": [related]})
    board.begin()
    board.wait_right()
    board.sql("insert into skills select 100 + n, n, 'new' from generate_series(1, 20) n")
    board.wait(lambda: board.status("jobs")["related"]["parked_keys"] == 1, "the change to be parked")
    board.wait(lambda: board.documents().items() - board.fresh().items() <= {(7, board.documents()[7])}, "the others")
    board.wait(lambda: "division by zero" in board.status("jobs")["reason"], "the reason")
    board.again()
    assert board.status("jobs")["related"]["parked_keys"] == 1
    board.sql("update jobs set title = 'by hand' where id = 7")
    board.wait_right()
    board.post("jobs~related/backlog/discard", all=True)
    board.wait(lambda: "division" not in board.status("jobs")["reason"], "the end of the finding")


def test_what_is_due_outlives_the_sql_that_asked_for_it(board: Board) -> None:
    board.begin()
    board.wait_right()
    board.post("jobs/pause")
    board.sql("update companies set name = 'renamed' where id = 1")
    board.wait(lambda: board.due == 10, "the documents of company 1 to be due")
    board.stop()
    board.configure(jobs_sink() | {"related": [{**RELATED[0], "sql": "select id from jobs where $1 is null"}]})
    board.begin()
    assert board.due == 10
    board.post("jobs/resume")
    board.wait_right()


def test_what_was_due_for_an_entry_that_is_gone_is_forgotten(board: Board) -> None:
    """With the companion, if it was the last."""
    board.begin()
    board.wait_right()
    board.post("jobs/pause")
    board.sql("update companies set name = 'renamed' where id = 1")
    board.wait(lambda: board.due == 10, "the documents of company 1 to be due")
    board.stop()
    board.configure({name: value for name, value in jobs_sink().items() if name != "related"})
    board.begin()
    board.wait(lambda: board.due == 0, "nothing to be due")
    board.post("jobs/resume")
    board.sql("update jobs set title = 'by hand' where id = 1")
    board.wait(lambda: board.title(1) == "by hand", "the change")
    assert board.renamed() == 0
    board.stop()
    board.configure(jobs_sink())
    board.begin()
    assert board.status("jobs")["related"]["backlog_messages"] == 0
    board.sql("update companies set name = 'again' where id = 1")
    board.wait_right()


def test_changes_that_wait_are_not_lost_when_the_entry_names_other_columns(board: Board) -> None:
    by_name = {"table": "public.skills", "columns": ["name"], "sql": "select nothing from jobs where title = any($1)"}
    board.configure(jobs_sink() | {"related": [by_name]})
    board.begin()
    board.wait(lambda: len(board.documents()) == 30, "the documents")
    board.sql("insert into skills values (100, 1, '2'), (101, 3, 'word')")
    board.wait(lambda: board.status("jobs")["related"]["backlog_messages"] == 2, "the changes to wait")
    board.read_by_the_stream()  # so they are in the store
    board.stop()
    board.configure(jobs_sink())
    board.begin()
    board.wait_right()
    board.wait(lambda: board.status("jobs")["related"]["backlog_messages"] == 0, "nothing to wait")
    assert board.status("jobs")["related"]["parked_keys"] == 0


def test_a_table_without_a_primary_key_needs_columns(board: Board) -> None:
    board.sql("alter table skills drop constraint skills_pkey")
    board.configure(
        jobs_sink() | {"related": [RELATED[0], {"table": "public.skills", "sql": "select unnest($1) as id"}]}
    )
    board.begin()
    board.wait_right()
    board.sql("insert into skills values (100, 1, 'new')")
    board.wait(lambda: "primary key" in board.status("jobs")["reason"], "the finding")
    board.sql("update companies set name = 'renamed' where id = 3")
    board.wait(lambda: board.documents()[2] == board.fresh()[2], "the documents of company 3")
    with pytest.raises(Refused, match="name its sink: jobs"):
        board.start("jobs~related", tables=["public.jobs"])


def test_a_related_table_that_is_renamed_is_told_of_as_what_it_is(board: Board) -> None:
    board.configure(jobs_sink())
    board.begin()
    board.sql("update companies set name = 'known' where id = 1")
    board.wait_right()
    board.sql("alter table companies rename to firms", "update firms set name = 'renamed' where id = 1")
    board.wait(lambda: board.status("jobs")["state"] == "gap", "the sink to tell")
    status = board.status("jobs")
    assert "table public.companies is called public.firms now" in status["reason"]
    assert "in related of sink jobs" in status["remedy"]
    assert "~related" not in status["remedy"]
    board.stop()
    board.sql("alter table firms rename to companies")
    board.begin()
    board.wait_right()
    board.wait(lambda: board.status("jobs")["state"] in ("idle", "caught_up"), "the sink to be well")


def test_a_transaction_that_stays_open_holds_up_nothing(board: Board) -> None:
    """Not the first refresh after a while without any, either."""
    board.begin()
    board.wait_right()
    board.sql("update companies set name = 'first' where id = 1")
    board.wait_right()
    with board.transaction("insert into jobs values (50, 1, 'unseen')", "update companies set name = 'x' where id = 3"):
        board.sql("update jobs set title = title || '!' where id < 10")
        for number in range(3):
            board.sql(f"update companies set name = 'during {number}' where id = 1")
            board.wait_right()
    board.wait_right()


def test_a_table_may_be_related_to_itself_and_several_times(database: str, tmp_path: Path) -> None:
    """Two entries of one child table by different columns; a partitioned table with a key of two columns."""
    document = (
        "select j.region, j.id, above.title as above, (select string_agg(s.name, ' ' order by s.name) from skills s"
        " where (s.region, s.job_id) = (j.region, j.id)) as skills,"
        " (select count(*) from skills s where s.name = j.title) as namesakes from jobs j"
        " left join jobs above on (above.region, above.id) = (j.region, j.above)"
    )
    function = f"{document} join unnest($1, $2) as k (id, region) on (k.id, k.region) = (j.id, j.region)"
    related = [
        {
            "table": "public.jobs",
            "sql": "select j.region, j.id from jobs j join unnest($1, $2) k (id, region) on (k.id, k.region) ="
            " (j.above, j.region)",
        },
        {
            "table": "public.skills",
            "columns": ["region", "job_id"],
            "sql": "select * from unnest($1, $2) k (region, id)",
        },
        {"table": "public.skills", "columns": ["name"], "sql": "select id, region from jobs where title = any($1)"},
    ]
    sink = sqlite_sink("jobs", ["public.jobs"], enrichment="document", related=related, initial_backfill=True)
    with Board(database, tmp_path, [sink]) as site:
        site.functions = [{"name": "document", "type": "enrichment", "code": function}]
        site.configure(sink)
        site.sql(
            "create table jobs (id int, region text, above int, title text, primary key (region, id))"
            " partition by list (region)",
            "create table jobs_a partition of jobs for values in ('a', 'a:b')",
            "create table jobs_b partition of jobs default",
            "create table skills (id int primary key, region text, job_id int, name text)",
            "alter table skills replica identity full",
            "create publication spillway for table jobs, skills with (publish_via_partition_root = true)",
            "insert into jobs select n, r, n - 1, 'job ' || n"
            " from generate_series(1, 5) n, unnest('{a,a:b,c}'::text[]) r",
        )

        def right() -> bool:
            found = site.ask_all("select region, id, above, skills, namesakes from jobs")
            return sorted(found) == sorted(site.sql(document))

        site.begin()
        for statement in (
            "select 1",
            "update jobs set title = 'above' where id = 2",
            "insert into skills values (1, 'a:b', 3, 'job 4'), (2, 'c', 3, 'above'), (3, null, 3, null)",
            "update skills set name = 'job 1', region = 'a' where id = 1",
            "update skills set name = null where id = 2",
            "update jobs set region = 'c', id = 9 where region = 'a' and id = 3",
            "delete from skills",
            "delete from jobs where id = 2",
        ):
            site.sql(statement)
            site.wait(right, f"the documents after {statement}")


def test_partitions_that_are_published_by_themselves_are_emptied(database: str, tmp_path: Path) -> None:
    """A TRUNCATE names them and not their root, whether it was one of them or all."""
    with Board(database, tmp_path, [jobs_sink()]) as board:
        board.sql(
            TABLES.replace(
                "job_id int, name text not null);", "job_id int, name text not null) partition by range (id);"
            ),
            "create table skills_a partition of skills for values from (0) to (100)",
            "create table skills_b partition of skills for values from (100) to (200)",
            "alter table skills_a replica identity full",
            "alter table skills_b replica identity full",
            "insert into companies values (1, 'one')",
            "insert into jobs select n, 1, 'job ' || n from generate_series(1, 30) n",
        )
        board.begin()
        for statement in ("truncate skills_a", "truncate skills"):
            board.sql(
                "delete from skills", "insert into skills select n * 10, n % 5 + 1, 'x' from generate_series(1, 19) n"
            )
            board.wait_right()
            board.sql(statement)
            board.wait_right()
        board.wait(lambda: board.due == 0, "everything to be done")


def test_commits_that_become_visible_late(tmp_path: Path) -> None:
    """A commit is streamed some 200 ms before anybody sees it, as with a synchronous standby far away."""
    with (
        Postgres("18") as primary,
        Standby(primary, settings={"recovery_min_apply_delay": "200ms"}),
        Board(primary.create_database("app"), tmp_path, [jobs_sink()]) as board,
    ):
        board.sql(
            TABLES,
            "insert into companies values (1, 'one'), (2, 'two')",
            "insert into jobs select n, 1, 'job ' || n from generate_series(1, 50) n",
        )
        commit_late(board.conninfo)
        board.begin()
        threads = [threading.Thread(target=board.sql, args=statements) for statements in LATE]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        board.wait_right()
        board.wait(lambda: board.due == 0, "everything to be done")


def test_a_row_that_the_replica_has_not_yet(tmp_path: Path) -> None:
    """It was sent before what it is joined with has changed; where it is to be read again it does not exist so far, or
    does not meet the sink's filter."""
    filtered = jobs_sink(filters=[{"column": "title", "operator": "ne", "value": "no"}])
    with (
        Postgres("18") as primary,
        Standby(primary) as standby,
        Board(primary.create_database("app"), tmp_path, [filtered]) as board,
    ):
        board.sql(
            TABLES, "insert into companies values (1, 'one')", "insert into jobs values (1, 1, 'job 1'), (2, 1, 'no')"
        )
        standby.wait_replayed()
        with_replica(board, standby.dsn("app"), filtered)
        board.begin()
        board.wait(lambda: 1 in board.documents(), "the first document")
        refresh_once(board)
        replay(standby, "pause")
        board.sql("insert into jobs values (3, 1, 'new')", "update jobs set title = 'yes' where id = 2")
        board.wait_right()
        board.sql("update companies set name = 'renamed' where id = 1")
        board.wait(lambda: board.renamed() == 1, "the first document to be made anew")
        replay(standby, "resume")
        board.wait_right()
        board.wait(lambda: board.due == 0, "everything to be done")


def test_everything_waits_for_the_replica(tmp_path: Path) -> None:
    """A row that came into being behind what the replica shows would not be in the backfill."""
    with (
        Postgres("18") as primary,
        Standby(primary) as standby,
        Board(primary.create_database("app"), tmp_path, [jobs_sink()]) as board,
    ):
        board.sql(
            TABLES,
            "insert into companies values (1, 'one')",
            "insert into jobs values (1, 1, 'job 1')",
            "insert into skills values (1, 1, 'a')",
        )
        standby.wait_replayed()
        with_replica(board, standby.dsn("app"), jobs_sink())
        board.begin()
        board.wait_right()
        refresh_once(board)
        replay(standby, "pause")
        board.sql("insert into skills values (2, 2, 'b')", "insert into jobs values (2, 1, 'new')")
        board.wait_right()
        board.sql("truncate skills")

        def held_up() -> bool:
            return "replica" in board.status("jobs")["related"]["waiting"] or board.documents()[1][3] is None

        board.wait(held_up, "everything to be due")
        replay(standby, "resume")
        board.wait_right()
        board.wait(lambda: board.due == 0, "everything to be done")


def refresh_once(board: Board) -> None:
    """What was running when it began has ended, for the replica, too."""
    board.sql("update companies set name = 'first' where id = 1")
    board.wait(lambda: board.renamed("first") == 1 and board.due == 0, "the first refresh")


def replay(standby: Standby, verb: str) -> None:
    with psycopg.connect(standby.dsn("app"), autocommit=True) as connection:
        connection.execute(f"select pg_wal_replay_{verb}()".encode())


@pytest.mark.parametrize("enrichment_from", ["primary", "replica"])
def test_pages_and_documents_from_a_replica_that_lags(tmp_path: Path, enrichment_from: str) -> None:
    """What it shows is some 300 ms old, and what the primary shows is not waited for."""
    with (
        Postgres("18") as primary,
        Standby(primary, settings={"recovery_min_apply_delay": "300ms"}) as standby,
        Board(primary.create_database("app"), tmp_path, [jobs_sink()]) as board,
    ):
        board.sql(
            TABLES,
            "insert into companies values (1, 'one'), (2, 'two')",
            "insert into jobs select n, 1, 'job ' || n from generate_series(1, 50) n",
        )
        standby.wait_replayed()
        with_replica(board, standby.dsn("app"), jobs_sink(enrichment_from=enrichment_from))
        board.begin()
        threads = [threading.Thread(target=slowly, args=(board, statements)) for statements in LATE]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        board.wait_right()
        board.wait(lambda: board.due == 0, "everything to be done")
        assert board.is_right()


def slowly(board: Board, statements: Sequence[str]) -> None:
    for number, statement in enumerate(statements):
        time.sleep(0.1 * (number % 4))  # against the lag, in all phases of it
        board.sql(statement)


LATE = [
    [f"update companies set name = 'name {n}' where id = 1" for n in range(8)],
    [f"update jobs set title = 'title {n}', company_id = 1 + {n} % 2 where id % 7 = {n}" for n in range(7)],
    [f"insert into skills values ({n}, {n % 5 + 1}, 'skill {n}')" for n in range(6)]
    + ["update skills set job_id = job_id + 1"],
]

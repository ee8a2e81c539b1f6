"""Documents stay right: a change of a related table makes its parents' documents anew, on a real PostgreSQL."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from backfill.site import Site, sqlite_sink

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

    def _config(self, sinks: object) -> dict[str, object]:
        return {**super()._config(sinks), "functions": [FUNCTION]}  # type: ignore[arg-type]

    def documents(self) -> dict[int, Document]:
        path = self.folder / "jobs.db"
        if not path.exists():
            return {}
        with closing(sqlite3.connect(path)) as db:
            try:
                rows = db.execute("select id, title, company, skills from jobs").fetchall()
            except sqlite3.OperationalError:  # not there yet
                return {}
        return {row[0]: row for row in rows}

    def fresh(self) -> dict[int, Document]:
        return {row[0]: row for row in self.sql(DOCUMENT)}

    def wait_right(self) -> None:
        self.wait(self.is_right, "the documents to be those of the source", every=0.1)

    def is_right(self) -> bool:
        return self.documents() == self.fresh()

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

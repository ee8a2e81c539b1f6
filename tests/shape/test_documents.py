"""Documents of twelve tables stay right, whatever changes and however late commits are seen: see `shape.load`. The
bench (``bench/shape.py random``) runs it longer."""

from __future__ import annotations

import threading
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from backfill.load import commit_late
from oracle.documents import Index, differences
from servers.opensearch import OpenSearch
from servers.postgres import Postgres, Standby
from shape import board
from shape.load import JOBS, SIZE, BoardSite, run

SEED = 20260901
WAITS = "select 1 from pg_stat_activity where wait_event = 'SyncRep'"


def test_under_random_changes_the_index_equals_a_fresh_build(
    database: str, tmp_path: Path, opensearch: OpenSearch
) -> None:
    verdict = run(database, tmp_path, opensearch.url, seed=SEED, seconds=10)
    assert verdict.good, str(verdict)


@pytest.mark.timeout(400)
def test_though_commits_are_seen_late(tmp_path: Path, opensearch: OpenSearch) -> None:
    """A commit is streamed 200 ms before it can be seen."""
    with Postgres("18") as primary, Standby(primary, settings={"recovery_min_apply_delay": "200ms"}):
        conninfo = primary.create_database("app")
        verdict = run(conninfo, tmp_path, opensearch.url, seed=SEED, seconds=10, late=True)
    assert verdict.good, str(verdict)


@pytest.mark.timeout(400)
def test_though_documents_are_enriched_on_a_replica_that_is_behind(tmp_path: Path, opensearch: OpenSearch) -> None:
    with Postgres("18") as primary, Standby(primary, settings={"recovery_min_apply_delay": "300ms"}) as standby:
        conninfo = primary.create_database("app")
        standby.wait_replayed()
        verdict = run(conninfo, tmp_path, opensearch.url, seed=SEED, seconds=6, replica_url=standby.dsn("app"))
    assert verdict.good, str(verdict)


def test_though_the_process_is_killed(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    verdict = run(database, tmp_path, opensearch.url, seed=SEED, seconds=10, kills=4)
    assert verdict.good, str(verdict)


def test_what_is_committed_before_and_seen_after(tmp_path: Path, opensearch: OpenSearch) -> None:
    """A company changes, and its commit waits for the standby. Behind it in the WAL, and seen at once, one of its jobs
    changes: its document is made without the company's change, and has the later version."""
    name = f"board-{uuid4().hex}"
    destination = {"type": "opensearch", "endpoint_url": opensearch.url, "index_name": name}
    sinks = [board.documents_sink("documents", destination, initial_backfill=True)]
    with (
        Postgres("18") as primary,
        Standby(primary, settings={"recovery_min_apply_delay": "1500ms"}),
        Index(opensearch.url, name) as index,
    ):
        conninfo = primary.create_database("app")
        board.prepare(conninfo, JOBS, SIZE)
        index.create(board.INDEX)
        with BoardSite(conninfo, tmp_path, sinks) as site:
            site.begin()
            site.wait(lambda: index.count() == len(JOBS), "the documents")
            site.quiet()
            commit_late(conninfo)
            for number in range(3):
                change = f"update companies set name = 'renamed {number}'"
                waiting = threading.Thread(target=site.sql, args=(change,))
                waiting.start()
                site.wait(lambda: bool(site.sql(WAITS)), "the commit to wait")
                with psycopg.connect(conninfo) as connection:
                    connection.execute("set synchronous_commit = local")
                    connection.execute("update jobs set title = %s where id <= 60", [f"title {number}"])
                waiting.join()
            site.quiet()
            assert differences(conninfo, index) == []
        index.delete()

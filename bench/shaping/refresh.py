"""One change of one company, which 100,000 jobs belong to: every one of their documents is refreshed.

Before, all documents come by an initial backfill. Meanwhile single jobs of other companies change at a steady rate
(`live`), and when half of the documents are refreshed the process is killed with SIGKILL and started again. *Live*
leaves out what was committed in the second before the kill and until two seconds after the process was up again.

*Documents fetched* are the rows that the enrichment queries had, by ``pg_stat_statements``: what was refreshed before
the kill is not refreshed again.
"""

from __future__ import annotations

import time
from argparse import Namespace
from uuid import UUID

import httpx
import psycopg

import stage
from shape import board
from shaping.ground import INDEX, Ground, at_rest
from shaping.live import Live

JOBS = 100_000
OTHERS = 2_000
COMPANY = str(UUID(int=1))
BEFORE_SECONDS = 10.0
LEFT_OUT_SECONDS = (1.0, 2.0)
AGAIN = 1.1
P99_SECONDS = 1.0
MAPPING = {
    "dynamic": False,
    "properties": {"id": {"type": "long"}, "company": {"properties": {"rating": {"type": "keyword"}}}},
}


def run(options: Namespace, report: stage.Report) -> None:
    jobs = round(JOBS * options.scale)
    everyone = range(1, jobs + OTHERS + 1)
    others = range(jobs + 1, jobs + OTHERS + 1)
    with Ground(options, report, children=everyone, jobs=range(1, jobs + 1), company=COMPANY) as ground:
        with psycopg.connect(ground.conninfo, autocommit=True) as connection:
            connection.execute("insert into companies (id, name, rating) values (%s, 'The one', 1)", [COMPANY])
            board.insert_jobs(connection, others)
        ground.index.create({**board.INDEX, "mappings": MAPPING})
        _Refresh(ground, jobs, others).go()


class _Refresh:
    def __init__(self, ground: Ground, jobs: int, others: range) -> None:
        self._ground, self._report, self._jobs, self._others = ground, ground.report, jobs, others
        self._product = ground.product(ground.search.url, initial_backfill=True)
        self._search = httpx.Client(base_url=ground.search.url, timeout=60, trust_env=False)

    def go(self) -> None:
        ground, product, report = self._ground, self._product, self._report
        product.memory.label = "in the initial backfill"
        began = time.monotonic()
        product.start()
        product.wait_streaming(ground.conninfo)
        product.wait(lambda: ground.index.count() == self._jobs + len(self._others), "the backfill", seconds=1800)
        product.wait(lambda: at_rest(product), "the sink to be caught up", seconds=60)
        report.inform("initial backfill", (self._jobs + len(self._others)) / (time.monotonic() - began), "documents/s")
        with Live(ground.conninfo, ground.search.url, INDEX, self._others) as live:
            self._wait_seconds(BEFORE_SECONDS)
            began, asked = time.monotonic(), ground.asked()
            product.memory.label = "refreshing"
            with psycopg.connect(ground.conninfo, autocommit=True) as connection:
                connection.execute("update companies set rating = 2 where id = %s", [COMPANY])
            product.wait(lambda: self._refreshed() >= self._jobs / 2, "half of the refresh", seconds=900, every=0.25)
            killed_at = time.monotonic()
            product.kill()
            product.memory.label = "refreshing, after a restart"
            product.start()
            product.wait_up()
            up_at = time.monotonic()
            product.wait(lambda: self._refreshed() == self._jobs, "the refresh", seconds=900, every=0.25)
            ended = time.monotonic()
            fetched = ground.asked() - asked
            self._wait_seconds(3.0)
            before, behind = LEFT_OUT_SECONDS
            alone = live.between(began - BEFORE_SECONDS + 1, began - 1)
            beside = live.between(began, killed_at - before) + live.between(up_at + behind, ended)
        report.inform("the refresh, kill and restart included", ended - began, "s")
        report.inform("documents refreshed a second", self._jobs / (ended - began), "documents/s")
        report.inform("enrichment queries meanwhile", fetched.queries, "queries")
        bound = self._jobs * AGAIN + len(beside)
        report.at_most("documents fetched, live ones included", fetched.rows, bound, "documents")
        for what, took in (("alone", alone), ("beside the refresh", beside)):
            report.inform(f"live changes {what}", len(took), "changes")
            report.inform(f"live changes {what}: p50", stage.percentile(took, 0.5) * 1000, "ms")
        report.inform("live changes alone: p99", stage.percentile(alone, 0.99) * 1000, "ms")
        p99 = stage.percentile(beside, 0.99) * 1000
        report.at_most("live changes beside the refresh: p99", p99, P99_SECONDS * 1000, "ms")
        ground.wait_read(product)
        product.wait(lambda: at_rest(product), "the sink to be caught up", seconds=60)
        report.equal("exit status after SIGTERM", product.terminate(60), 0)
        ground.judge_memory(product)
        ground.judge_documents()

    def _refreshed(self) -> int:
        """As a search sees it, a second late at most."""
        body = {"query": {"term": {"company.rating": "2.00"}}}
        answer = self._search.post(f"/{INDEX}/_count", json=body)
        return int(answer.raise_for_status().json()["count"])

    def _wait_seconds(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._product.wait(lambda: time.monotonic() >= end, "time", seconds=seconds + 5)

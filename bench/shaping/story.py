"""The story with real documents: 140,416 jobs of twelve tables each, of about 18 KB, and an index that is not well.

Rows come at `ROWS_A_SECOND`. First the index's strict mapping rejects every document; at half of the load the node is
killed, and comes back, with a mapping that takes everything, when the load has ended. The process is killed with
SIGKILL five times: twice while everything is rejected, twice while the node is away, once halfway through the drain.

*Enrichment queries* are those that the server has executed, by ``pg_stat_statements``. The bound is on the drain: each
message once, in batches, and 5 % for what is asked again, which the fifth kill is part of.
"""

from __future__ import annotations

import math
import threading
import time
from argparse import Namespace

import psycopg

import stage
from oracle.product import Product
from shape import board
from shaping.ground import SINK, Asked, Ground, at_rest

ROWS = 140_416
ROWS_A_SECOND = 4_000
IN_ONE = 100  # rows of a transaction
KILLS_REJECTED, KILLS_DOWN = (0.2, 0.4), (0.6, 0.8)  # of the load's rows
DOWN_AT = 0.5
LIFE_SECONDS = 4.0
REPEATS = 1.05
STRICT = {**board.INDEX, "mappings": {"dynamic": "strict", "properties": {"id": {"type": "long"}}}}


class Load(threading.Thread):
    def __init__(self, conninfo: str, rows: int) -> None:
        super().__init__(daemon=True)
        self.rows, self.done = rows, 0
        self.error: psycopg.Error | None = None
        self._conninfo = conninfo

    def run(self) -> None:
        try:
            with psycopg.connect(self._conninfo) as connection:
                began = time.monotonic()
                while self.done < self.rows:
                    last = min(self.rows, self.done + IN_ONE)
                    board.insert_jobs(connection, range(self.done + 1, last + 1))
                    connection.commit()
                    self.done = last
                    ahead = last / ROWS_A_SECOND - (time.monotonic() - began)
                    if ahead > 0:
                        time.sleep(ahead)
        except psycopg.Error as error:
            self.error = error


def run(options: Namespace, report: stage.Report) -> None:
    rows = round(ROWS * options.scale)
    with Ground(options, report, children=range(1, rows + 1), jobs=range(0)) as ground:
        _Story(ground, rows).go()


class _Story:
    def __init__(self, ground: Ground, rows: int) -> None:
        self._ground, self._report, self._rows = ground, ground.report, rows
        ground.index.create(STRICT)
        self._batch_size = ground.options.batch_size
        self._product: Product = ground.product(ground.search.url, batch_size=self._batch_size)
        self._load = Load(ground.conninfo, rows)

    def go(self) -> None:
        self._product.memory.label = "while everything is rejected"
        self._product.start()
        self._product.wait_streaming(self._ground.conninfo)
        self._load.start()
        for share in KILLS_REJECTED:
            self._reach(share)
            self._kill_and_start()
        self._reach(DOWN_AT)
        self._report.inform("documents parked when the node was killed", self._parked(), "documents")
        self._told("while everything was rejected", self._ground.asked(), Asked(0, 0))
        self._ground.search.kill()
        self._product.memory.label = "while the node is away"
        for share in KILLS_DOWN:
            self._reach(share)
            self._kill_and_start()
        self._reach(1.0)
        self._live(LIFE_SECONDS)
        self._ground.wait_read(self._product)
        self._product.wait(lambda: self._waiting() == self._rows, "the backlog to hold every row", seconds=60)
        self._report.equal("messages that wait", self._waiting(), self._rows, "messages")
        self._drain()
        code = self._product.terminate(60)
        self._report.equal("exit status after SIGTERM", code, 0)
        self._ground.judge_memory(self._product)
        self._ground.judge_documents()

    def _drain(self) -> None:
        self._product.memory.label = "draining"
        ground, before = self._ground, self._ground.asked()
        ground.search.start()
        ground.index.change_mapping({"dynamic": False})
        began = time.monotonic()
        self._product.wait(lambda: self._waiting() < self._rows / 2, "half of the drain", seconds=1800)
        self._product.kill()
        self._product.memory.label = "draining, after a restart"
        self._product.start()
        self._product.wait(lambda: at_rest(self._product), "the drain", seconds=1800, every=0.5)
        seconds = time.monotonic() - began
        self._report.inform("the drain, kill and restart included", seconds, "s")
        self._report.inform("documents a second", self._rows / seconds, "documents/s")
        asked = ground.asked() - before
        self._told("in the drain", ground.asked(), before)
        bound = math.ceil(self._rows / self._batch_size) * REPEATS
        self._report.at_most("enrichment queries in the drain", asked.queries, bound, "queries")
        self._report.equal("documents in the index", ground.index.count(), self._rows, "documents")

    def _told(self, when: str, now: Asked, before: Asked) -> None:
        asked = now - before
        self._report.inform(f"enrichment queries {when}", asked.queries, "queries")
        self._report.inform(f"rows that they had {when}", asked.rows, "rows")

    def _reach(self, share: float) -> None:
        goal = round(share * self._rows)
        self._product.wait(lambda: self._load.done >= goal or not self._load.is_alive(), "the load", seconds=1800)
        if self._load.error is not None:
            raise self._load.error

    def _kill_and_start(self) -> None:
        self._product.kill()
        self._product.start()
        self._product.wait_up()
        self._live(LIFE_SECONDS / 2)

    def _live(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._product.wait(lambda: time.monotonic() >= end, "time", seconds=seconds + 5)

    def _waiting(self) -> int:
        return int(self._product.sink(SINK)["backlog_messages"])

    def _parked(self) -> int:
        return int(self._product.sink(SINK)["parked_keys"])

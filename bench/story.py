"""The story: a search index rejects every document, 140,416 rows of 18 KB pile up, and nothing else happens.

Two runs, the same but for the index: in the first it takes documents (for comparison), in the second its strict mapping
rejects every one. Each run: a load of rows at 20 MB of WAL a second into ``public.jobs``, bound for OpenSearch, and a
tick every 10 ms into ``public.ticks``, bound for a webhook; the process is killed with SIGKILL and started again five
times, twice under load, three times after it. Then the second run's mapping is mended, everything must arrive, and
index and table are compared row by row.

The process runs in a memory cgroup of ``limit_mb`` + 128 MB. Evidence: VmHWM of ``/proc`` (with children: the PSS sum),
the times that a proxy before OpenSearch and the recording webhook wrote down, ``pg_replication_slots``,
``pg_xact_commit_timestamp``, the index itself. The one figure of the product's own, its backlog metric, is held
against these.

    python bench/story.py                                                  full size, about 12 minutes
    python bench/story.py --scale 0.1 --limit-mb 32 --batch-size 1         as in CI
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psycopg

import stage
from oracle.cgroup import MemoryCgroup
from oracle.endpoint import Proxy, Recorder
from oracle.product import Product
from servers.opensearch import OpenSearch
from servers.postgres import Postgres

ROWS = 140_416
ROW_BYTES = 18_000
WAL_BYTES_A_SECOND = 20_000_000
UPDATE_EVERY = 50  # so many rows, an earlier row is changed too: a key with several messages
KILLS_UNDER_LOAD = (0.6, 0.8)  # of the load's rows
KILLS_AFTER_LOAD = 3
LIFE_SECONDS = 8.0
TICK_SECONDS = 0.01
LAG_BOUND_BYTES = 16 * stage.MIB
FIRST_REQUEST_SECONDS = 2.0
INDEX = "jobs"
SCHEMA = """
create table jobs (id int primary key, title text, payload text);
alter table jobs alter payload set storage external;
create table ticks (id bigserial primary key, note text);
create publication spillway for table jobs, ticks;
"""
MENDED = {
    "id": {"type": "integer"},
    "title": {"type": "keyword"},
    "payload": {"type": "keyword", "index": False, "doc_values": False},
}


class Load(threading.Thread):
    """Rows of `ROW_BYTES` that no compression shrinks, at a rate; ``written`` counts messages, ``rows`` rows."""

    def __init__(self, conninfo: str, rows: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.rows, self.written = rows, 0
        self.rows_done = 0
        self.began = 0.0
        self.error: psycopg.Error | None = None
        self._conninfo = conninfo
        self._random = random.Random(seed)
        self._text = base64.b64encode(self._random.randbytes(2 * stage.MIB)).decode()

    def run(self) -> None:
        try:
            with psycopg.connect(self._conninfo) as connection:
                self.began = time.monotonic()
                while self.rows_done < self.rows:
                    self._transaction(connection)
                    ahead = self.written * (ROW_BYTES + 300) / WAL_BYTES_A_SECOND - (time.monotonic() - self.began)
                    if ahead > 0:
                        time.sleep(ahead)
        except psycopg.Error as error:
            self.error = error

    def _transaction(self, connection: psycopg.Connection) -> None:
        count = min(10, self.rows - self.rows_done)
        first = self.rows_done + 1
        with connection.cursor().copy("copy jobs from stdin") as copy:
            for number in range(first, first + count):
                copy.write_row((number, f"job {number}", self._payload()))
        changed = 0
        if first // UPDATE_EVERY != (first + count) // UPDATE_EVERY and first > 1:
            old = self._random.randrange(1, first)
            connection.execute("update jobs set payload = %s where id = %s", [self._payload(), old])
            changed = 1
        connection.commit()
        self.rows_done += count
        self.written += count + changed

    def _payload(self) -> str:
        start = self._random.randrange(len(self._text) - ROW_BYTES)
        return self._text[start : start + ROW_BYTES]


class Ticks(threading.Thread):
    """A small row every 10 ms, each a transaction of its own."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(daemon=True)
        self._conninfo = conninfo
        self._ended = threading.Event()
        self.error: psycopg.Error | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                while not self._ended.wait(TICK_SECONDS):
                    connection.execute("insert into ticks (note) values ('tick')")
        except psycopg.Error as error:
            self.error = error

    def end(self) -> None:
        self._ended.set()
        self.join()
        if self.error is not None:
            raise self.error


class SlotLag(threading.Thread):
    """``pg_current_wal_lsn() - confirmed_flush_lsn``, asked twice a second: (monotonic time, WAL position, lag)."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(daemon=True)
        self._conninfo = conninfo
        self._ended = threading.Event()
        self.samples: list[tuple[float, int, int]] = []
        self.error: psycopg.Error | None = None

    def run(self) -> None:
        query = (
            "select (pg_current_wal_lsn() - '0/0')::bigint, (pg_current_wal_lsn() - confirmed_flush_lsn)::bigint"
            " from pg_replication_slots where slot_name = 'spillway'"
        )
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                while not self._ended.wait(0.5):
                    row = connection.execute(query).fetchone()
                    if row is not None and row[1] is not None:
                        self.samples.append((time.monotonic(), row[0], row[1]))
        except psycopg.Error as error:
            self.error = error

    def end(self) -> None:
        self._ended.set()
        self.join()
        if self.error is not None:
            raise self.error


class Run:
    """One of the two runs, on a database, an index and a process of its own."""

    def __init__(self, options: argparse.Namespace, report: stage.Report, stack: ExitStack, *, healthy: bool) -> None:
        self.healthy, self.name = healthy, "healthy" if healthy else "failing"
        self.options, self.report = options, report
        self.rows = round(ROWS * options.scale)
        self.latencies: list[float] = []
        self._up: list[tuple[float, float]] = []  # wall times between which the process was up and settled
        self._postgres = stack.enter_context(Postgres(options.postgres, settings={"max_wal_size": "2GB"}))
        heap_mb = 2048 if options.scale > 0.5 else 1024
        self._search = stack.enter_context(OpenSearch(heap_mb=heap_mb))
        self._proxy = stack.enter_context(Proxy(self._search.port))
        self._recorder = stack.enter_context(Recorder())
        self._cgroup = stack.enter_context(MemoryCgroup((options.limit_mb + 128) * stage.MIB))
        self._conninfo = self._postgres.create_database("app")
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(SCHEMA)
        self._client = stack.enter_context(httpx.Client(base_url=self._search.url, timeout=60, trust_env=False))
        properties = MENDED if healthy else {"id": MENDED["id"]}
        settings = {"number_of_shards": 1, "number_of_replicas": 0}
        body = {"settings": settings, "mappings": {"dynamic": "strict", "properties": properties}}
        self._client.put(f"/{INDEX}", json=body).raise_for_status()
        self._warm_up()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-story-")))
        self.product = stack.enter_context(Product(folder, self._config(), cgroup=self._cgroup))
        self._load = Load(self._conninfo, self.rows, seed=1)
        self._ticks = Ticks(self._conninfo)
        self._lag = SlotLag(self._conninfo)

    def _config(self) -> dict[str, object]:
        search = {"type": "opensearch", "endpoint_url": self._proxy.url, "index_name": INDEX}
        hook = {"type": "webhook", "http_endpoint": "recorder", "http_endpoint_path": "/ticks", "batch": True}
        slot = {"name": "spillway", "create_if_not_exists": True}
        database = {"name": "app", "url": self._conninfo, "slot": slot, "publication": {"name": "spillway"}}
        jobs = {"name": "jobs_sink", "database": "app", "source": {"include_tables": ["public.jobs"]}}
        ticks = {"name": "ticks_sink", "database": "app", "source": {"include_tables": ["public.ticks"]}}
        return {
            "memory": {"limit_mb": self.options.limit_mb},
            "databases": [database],
            "http_endpoints": [{"name": "recorder", "url": self._recorder.url}],
            "sinks": [
                {**jobs, "batch_size": self.options.batch_size, "destination": search},
                {**ticks, "batch_size": 50, "destination": hook},
            ],
        }

    def _warm_up(self) -> None:
        """A fresh JVM is slow at first, which would flatter the comparison: the healthy run would pay for it."""
        text = base64.b64encode(random.Random(0).randbytes(ROW_BYTES * 3 // 4)).decode()
        action = '{"index":{}}\n'
        for _ in range(20):
            lines = "".join(f'{action}{{"title":"{n}","payload":"{text}"}}\n' for n in range(100))
            headers = {"Content-Type": "application/x-ndjson"}
            self._client.post("/warm/_bulk", content=lines, headers=headers).raise_for_status()
        self._client.delete("/warm").raise_for_status()

    # -- acts -------------------------------------------------------------------------------------------------------
    def go(self) -> None:
        self.report.say(f"--- {self.name} run: {self.rows} rows, PostgreSQL {self.options.postgres}")
        self.product.memory.label = "under load"
        self._start()
        self.product.wait_streaming(self._conninfo)
        for thread in (self._ticks, self._lag, self._load):
            thread.start()
        kills = [self._after_rows(round(share * self.rows)) for share in KILLS_UNDER_LOAD]
        for number, reached in enumerate(kills):
            self.product.wait(reached, "the load", seconds=3600)
            if number == 0:
                self._judge_lag()
            self._kill_and_start(number + 1)
        self.product.wait(lambda: not self._load.is_alive(), "the load", seconds=3600)
        if self._load.error is not None:
            raise self._load.error
        for number in range(KILLS_AFTER_LOAD):
            self._live(LIFE_SECONDS)
            self._kill_and_start(len(kills) + number + 1)
        self._live(LIFE_SECONDS)
        if not self.healthy:
            self._judge_backlog()
            self._mend()
        self._drain()
        self._end()

    def _after_rows(self, rows: int):  # a condition for Product.wait
        return lambda: self._load.rows_done >= rows or not self._load.is_alive()

    def _start(self) -> None:
        self._proxy_offset = self._proxy.size
        self.product.start()

    def _kill_and_start(self, number: int) -> None:
        self._up.append((self.product.started_at + 2, time.time() - 1))
        self.product.kill()
        self._recorder.wait_no_connections()
        self.product.memory.label = f"restart {number}"
        self._start()
        if self.healthy:
            self._live(LIFE_SECONDS / 2)
            return
        self.product.wait(self._was_asked, "a request to the index", seconds=30, every=0.02)
        first = next(self._documents_requests())
        self.report.at_most(
            f"restart {number}: first request", first - self.product.started_at, FIRST_REQUEST_SECONDS, "s"
        )
        self._live(LIFE_SECONDS / 2)

    def _was_asked(self) -> bool:
        return next(self._documents_requests(), None) is not None

    def _documents_requests(self) -> Iterator[float]:
        """When requests that carry documents came in this life."""
        return (p.at for p in self._proxy.passed(self._proxy_offset) if "_bulk" in p.path and p.bytes != 0)

    def _live(self, seconds: float) -> None:
        """Lets it run: the time itself is what is wanted here."""
        end = time.monotonic() + seconds
        self.product.wait(lambda: time.monotonic() >= end, "time", seconds=seconds + 5)

    def _mend(self) -> None:
        self.product.memory.label = "draining"
        asked = sum("_bulk" in p.path for p in self._proxy.passed())
        self.report.inform("bulk requests while the index rejected everything", asked, "requests")
        self._client.put(f"/{INDEX}/_mapping", json={"properties": MENDED}).raise_for_status()
        self._mended = time.monotonic()

    def _drain(self) -> None:
        if self.healthy:
            self.product.memory.label = "draining"
        self.product.wait(self._all_is_there, "the index to hold every row", seconds=3600, every=1)
        if not self.healthy:
            self.report.inform("from the mended mapping to the last row", time.monotonic() - self._mended, "s")

    def _all_is_there(self) -> bool:
        self._client.post(f"/{INDEX}/_refresh").raise_for_status()
        count = self._client.get(f"/{INDEX}/_count").raise_for_status().json()["count"]
        return count == self.rows and self.product.sink("jobs_sink")["backlog_messages"] == 0

    def _end(self) -> None:
        self._up.append((self.product.started_at + 2, time.time() - 1))
        self._ticks.end()
        self._lag.end()
        self.product.wait(self._all_ticks_came, "the last ticks", seconds=30)
        code = self.product.terminate(60)
        self._take_latencies()
        if self.healthy:
            return
        bound = self.options.limit_mb + 100
        for label, peak in self.product.memory.peaks.items():
            self.report.at_most(f"VmHWM {label}", peak / stage.MIB, bound, "MB")
        self.report.inform(f"peak of the cgroup (v{self._cgroup.version}), page cache included",
                           self._cgroup.peak_bytes / stage.MIB, "MB")  # fmt: skip
        self.report.equal("kills by the kernel for want of memory", self._cgroup.oom_kills, 0)
        self.report.equal("exit status after SIGTERM", code, 0)
        self.report.equal("rows in which index and table differ", self._differences(), 0, "rows")

    # -- judgement --------------------------------------------------------------------------------------------------
    def _judge_lag(self) -> None:
        """The most that the slot was behind around the 60th second of the outage, or when the load was short, now."""
        now = min(self._load.began + 60, time.monotonic())
        window = [sample for sample in self._lag.samples if abs(sample[0] - now) <= 5]
        (t0, wal0, _), (t1, wal1, _) = window[0], window[-1]
        rate = (wal1 - wal0) / (t1 - t0)
        after = now - self._load.began
        if self.healthy:
            return
        self.report.inform(f"WAL written, {after:.0f} s into the outage", rate / 1e6, "MB/s")
        behind = max(lag for _, _, lag in window)
        what = f"confirmed_flush_lsn behind, {after:.0f} s into the outage"
        self.report.at_most(what, behind / stage.MIB, LAG_BOUND_BYTES / stage.MIB, "MiB")

    def _judge_backlog(self) -> None:
        undelivered = self._load.written
        self.product.wait(lambda: self._backlog() == undelivered, "the backlog metric", seconds=10)
        self.report.equal("spillway_backlog_messages", self._backlog(), undelivered, "messages")
        lag = self.product.metric('spillway_slot_lag_bytes{database="app"}')
        self.report.inform("spillway_slot_lag_bytes", lag / stage.MIB, "MiB")
        self.report.inform("slot lag as PostgreSQL tells it", self._lag.samples[-1][2] / stage.MIB, "MiB")

    def _backlog(self) -> float:
        return self.product.metric('spillway_backlog_messages{sink="jobs_sink"}')

    def _all_ticks_came(self) -> bool:
        with psycopg.connect(self._conninfo) as connection:
            row = connection.execute("select count(*) from ticks").fetchone()
        assert row is not None
        return len(self._arrivals()) == row[0]

    def _arrivals(self) -> dict[int, float]:
        """When each tick arrived for the first time."""
        arrivals: dict[int, float] = {}
        for request in self._recorder.requests("/ticks"):
            for message in request.messages:
                record = message["record"]
                assert isinstance(record, dict)
                arrivals.setdefault(record["id"], request.at)
        return arrivals

    def _take_latencies(self) -> None:
        arrivals = self._arrivals()
        query = "select id, extract(epoch from pg_xact_commit_timestamp(xmin))::float8 from ticks"
        with psycopg.connect(self._conninfo) as connection:
            committed = connection.execute(query).fetchall()
        judged = [(number, at) for number, at in committed if any(start <= at <= end for start, end in self._up)]
        self.latencies = [arrivals[number] - at for number, at in judged]
        if self.options.trace:
            path = self.options.out / f"{self.report.name}-{self.name}.csv"
            first = min(at for _, at in committed)
            path.write_text("".join(f"{at - first:.3f},{arrivals[number] - at:.4f}\n" for number, at in judged))

    def _differences(self) -> int:
        """Index against table, row by row, by the hash of the payload."""
        with psycopg.connect(self._conninfo) as connection:
            expected = {row[0]: row[1:] for row in connection.execute("select id, title, md5(payload) from jobs")}
        differing = 0
        for document_id, source in self._documents():
            digest = hashlib.md5(source["payload"].encode()).hexdigest()
            row = expected.pop(int(document_id), None)
            differing += row != (source["title"], digest) or source["id"] != int(document_id)
        return differing + len(expected)

    def _documents(self) -> Iterator[tuple[str, dict]]:
        scroll = f"/{INDEX}/_search?scroll=2m"
        answer = self._client.post(scroll, json={"size": 500, "sort": ["_doc"]}).raise_for_status().json()
        while hits := answer["hits"]["hits"]:
            yield from ((hit["_id"], hit["_source"]) for hit in hits)
            body = {"scroll": "2m", "scroll_id": answer["_scroll_id"]}
            answer = self._client.post("/_search/scroll", json=body).raise_for_status().json()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of 140,416 rows")
    parser.add_argument("--limit-mb", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--postgres", choices=("15", "18"), default="18")
    parser.add_argument("--trace", action="store_true", help="also the latency of each tick, as CSV")
    parser.add_argument(
        "--only-failing", action="store_true", help="without the healthy run: latencies are told, not judged"
    )
    parser.add_argument("--out", type=Path, default=stage.RESULTS, help="where the report goes")
    options = parser.parse_args()
    name = f"story-{round(ROWS * options.scale)}-limit{options.limit_mb}-batch{options.batch_size}"
    report = stage.Report(name, {**stage.parameters(options), "row_bytes": ROW_BYTES, "pid": os.getpid()})
    p99: dict[bool, float] = {}
    with report.product_may_fail():
        for healthy in (False,) if options.only_failing else (True, False):
            with ExitStack() as stack:
                run = Run(options, report, stack, healthy=healthy)
                run.go()
                p99[healthy] = stage.percentile(run.latencies, 0.99)
                report.inform(f"ticks judged, {run.name} run", len(run.latencies), "ticks")
                for share in (0.5, 0.9, 1.0):
                    figure = stage.percentile(run.latencies, share) * 1000
                    report.inform(f"second sink, {run.name} run: p{share * 100:.0f}", figure, "ms")
        if not options.only_failing:
            report.inform("second sink, p99 from commit to arrival, first sink healthy", p99[True] * 1000, "ms")
            what = "second sink, p99 from commit to arrival, first sink failing"
            report.at_most(what, p99[False] * 1000, 1000, "ms")
            report.at_most("the same, against the healthy run", p99[False] / p99[True], 2, "times")
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())

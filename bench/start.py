"""Starting costs the same with 1,000 and with 1,000,000 waiting messages (I5).

A webhook that answers 503 lets rows pile up, to the smaller number first and then to the larger. With each pile the
process is killed with SIGKILL and started ten times. Measured: the time from spawning it to the first request at the
recording endpoint, and what had been read by then: the store's reads as the product counts them, and, as evidence not
its own, the bytes that the process had read from files (``rchar`` of ``/proc/PID/io``). SQLite reads the log that a
killed process left whole, and how long that is depends on the last checkpoint, not on the backlog: its size is taken
off. The product's count is asked for right after the first request, which is held; what its timers read until then
only adds, so the fewest of ten are compared.

    python bench/start.py
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psycopg

import stage
from oracle.endpoint import Recorder
from oracle.product import Product
from servers.postgres import Postgres

MEDIANS_APART_SECONDS = 0.1
FIRST_REQUEST_SECONDS = 2.0
READ_APART_BYTES = 8 * stage.MIB  # a page of the backlog and the state file's inner nodes; the backlog has 600 MB


class Start:
    def __init__(self, options: argparse.Namespace, report: stage.Report, stack: ExitStack) -> None:
        self._options, self._report = options, report
        postgres = stack.enter_context(Postgres(options.postgres))
        self._conninfo = postgres.create_database("app")
        self._recorder = stack.enter_context(Recorder())
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute("create table t (id int primary key, v text); create publication spillway for table t")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-start-")))
        slot = {"name": "spillway", "create_if_not_exists": True}
        hook = {"type": "webhook", "http_endpoint": "recorder", "batch": True, "timeout_seconds": 60}
        config = {
            "memory": {"limit_mb": 128},
            "databases": [
                {"name": "app", "url": self._conninfo, "slot": slot, "publication": {"name": "spillway"}},
            ],
            "http_endpoints": [{"name": "recorder", "url": self._recorder.url}],
            "sinks": [{"name": "hook", "database": "app", "batch_size": 100, "destination": hook}],
        }
        self._product = stack.enter_context(Product(folder, config))
        self._rows = 0

    def go(self) -> None:
        small, large = self._options.small, self._options.large
        self._product.start()
        self._product.wait_streaming(self._conninfo)
        found = {}
        for waiting in (small, large):
            self._pile_up(waiting)
            found[waiting] = self._starts(waiting)
        (seconds_small, reads_small, bytes_small), (seconds_large, reads_large, bytes_large) = found.values()
        apart = abs(statistics.median(seconds_small) - statistics.median(seconds_large))
        self._report.at_most("medians apart", apart, MEDIANS_APART_SECONDS, "s")
        self._report.at_most("slowest first request", max(seconds_small + seconds_large), FIRST_REQUEST_SECONDS, "s")
        self._report.inform(f"store reads before the first request, {small} waiting", min(reads_small), "reads")
        what = f"store reads before the first request, {large} waiting"
        self._report.equal(what, min(reads_large), min(reads_small), "reads")
        read_apart = abs(statistics.median(bytes_small) - statistics.median(bytes_large))
        what = "bytes read from files before the first request, medians apart"
        self._report.at_most(what, read_apart, READ_APART_BYTES, "B")

    def _pile_up(self, rows: int) -> None:
        """Ends with the process running and exactly ``rows`` messages waiting."""
        self._recorder.script([{"do": "status", "status": 503}])
        began = time.monotonic()
        with psycopg.connect(self._conninfo) as connection:
            while self._rows < rows:
                step = min(10_000, rows - self._rows)
                series = "generate_series(%s::int, %s::int) i"
                query = f"insert into t select i, md5(i::text) || md5((i + 1)::text) from {series}"
                connection.execute(query, [self._rows + 1, self._rows + step])
                connection.commit()
                self._rows += step
        # A row that is stored is stored: that the count is right is judged by what a drained backlog gives (story.py).
        self._product.wait(
            lambda: self._product.sink("hook")["backlog_messages"] == rows, f"{rows} waiting messages", seconds=1800
        )
        self._report.inform(f"to store {rows} messages", time.monotonic() - began, "s")

    def _starts(self, waiting: int) -> tuple[list[float], list[int], list[int]]:
        seconds: list[float] = []
        reads: list[int] = []
        read_bytes: list[int] = []
        for _ in range(self._options.starts):
            self._product.kill()
            self._recorder.wait_no_connections()
            # The first request of a life is held, so that nothing happens behind it until we have looked.
            self._recorder.script([{"do": "stall"}])
            offset = self._recorder.size
            log_bytes = sum(path.stat().st_size for path in self._product.folder.glob("*-wal"))
            self._product.start()
            self._product.wait(lambda at=offset: self._recorder.size > at, "a request", seconds=30, every=0.01)
            first = next(self._recorder.requests(offset=offset))
            read_bytes.append(_read_bytes(self._product.pid) - log_bytes)
            seconds.append(first.at - self._product.started_at)
            reads.append(self._store_reads())
        self._report.inform(f"first request with {waiting} waiting, median", statistics.median(seconds), "s")
        return seconds, reads, read_bytes

    def _store_reads(self) -> int:
        self._product.wait_up()
        status = self._product.status()
        at_first = next(s for s in status["sinks"] if s["name"] == "hook").get("store_reads_at_first_request")
        return int(status["memory"]["store_reads"] if at_first is None else at_first)


def _read_bytes(pid: int) -> int:
    match = re.search(r"^rchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--postgres", choices=("15", "18"), default="18")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    name = "start" if (options.small, options.large) == (1_000, 1_000_000) else f"start-{options.small}-{options.large}"
    report = stage.Report(name, stage.parameters(options))
    with report.product_may_fail(), ExitStack() as stack:
        Start(options, report, stack).go()
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())

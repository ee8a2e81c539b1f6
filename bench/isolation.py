"""One of 25 sinks in outage costs the others under 5 % of their throughput (I6).

24 sinks write files, the 25th sends to a webhook. Rounds alternate: the webhook takes everything, or refuses
connections. In each round the process is down while rows are committed; then it is started, and the time is taken from
the first line in any file to the last row in all 24. Medians of the rounds are compared.

    python bench/isolation.py
"""

from __future__ import annotations

import argparse
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

OTHERS = 24
COST_BOUND_PERCENT = 5.0


class Isolation:
    def __init__(self, options: argparse.Namespace, report: stage.Report, stack: ExitStack) -> None:
        self._options, self._report = options, report
        postgres = stack.enter_context(Postgres(options.postgres))
        self._conninfo = postgres.create_database("app")
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute("create table t (id bigserial primary key, v text)")
            connection.execute("create publication spillway for table t")
        self._recorder = stack.enter_context(Recorder())
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-isolation-")))
        self._files = [self._folder / f"out-{n}.ndjson" for n in range(OTHERS)]
        slot = {"name": "spillway", "create_if_not_exists": True}
        hook = {"type": "webhook", "http_endpoint": "recorder", "batch": True, "timeout_seconds": 10}
        sinks: list[dict[str, object]] = [
            {"name": f"file_{n}", "database": "app", "destination": {"type": "file", "path": path.name}}
            for n, path in enumerate(self._files)
        ]
        sinks.append({"name": "hook", "database": "app", "batch_size": 500, "destination": hook})
        config = {
            "memory": {"limit_mb": 512},
            "databases": [
                {"name": "app", "url": self._conninfo, "slot": slot, "publication": {"name": "spillway"}},
            ],
            "http_endpoints": [{"name": "recorder", "url": self._recorder.url}],
            "sinks": sinks,
        }
        self._product = stack.enter_context(Product(self._folder, config))

    def go(self) -> None:
        self._product.start()
        self._product.wait_streaming(self._conninfo)
        self._product.terminate()
        self._round(0)  # the page cache, the slot's first reading
        rates: dict[bool, list[float]] = {True: [], False: []}
        for number in range(self._options.rounds):
            for outage in (False, True) if number % 2 == 0 else (True, False):
                if outage:
                    self._recorder.stop()
                rate = self._round(number + 1)
                if outage:
                    self._recorder.start()
                rates[outage].append(rate)
                self._report.inform(f"round {number + 1}, {'one in outage' if outage else 'all well'}", rate, "rows/s")
        well, ill = statistics.median(rates[False]), statistics.median(rates[True])
        self._report.inform(f"{OTHERS} sinks, all 25 well, each", well, "rows/s")
        self._report.inform(f"{OTHERS} sinks, the 25th in outage, each", ill, "rows/s")
        self._report.at_most("cost of the outage to the others", (well - ill) / well * 100, COST_BOUND_PERCENT, "%")

    def _round(self, number: int) -> float:
        marker = f"last of round {number} at {time.time_ns()}".encode()
        before = [self._size(path) for path in self._files]
        with psycopg.connect(self._conninfo) as connection:
            for _ in range(0, self._options.rows, 1_000):
                connection.execute("insert into t (v) select repeat(md5(i::text), 6) from generate_series(1, 1000) i")
                connection.commit()
            connection.execute("insert into t (v) values (%s)", [marker.decode()])
        self._product.start()
        grown = [False]

        def began() -> bool:
            grown[0] = any(self._size(path) > size for path, size in zip(self._files, before, strict=True))
            return grown[0]

        self._product.wait(began, "the first line", seconds=60, every=0.005)
        first = time.monotonic()
        left = set(self._files)

        def ended() -> bool:
            left.difference_update([path for path in left if marker in _tail(path)])
            return not left

        self._product.wait(ended, "the last row in all files", seconds=900, every=0.02)
        seconds = time.monotonic() - first
        self._product.terminate(60)
        return self._options.rows / seconds

    def _size(self, path: Path) -> int:
        return path.stat().st_size if path.exists() else 0


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--postgres", choices=("15", "18"), default="18")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    report = stage.Report("isolation", stage.parameters(options))
    with report.product_may_fail(), ExitStack() as stack:
        Isolation(options, report, stack).go()
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())

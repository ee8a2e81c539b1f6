"""What `backlog.on_full: compact` costs while a backlog grows, and what it saves.

A table of some keys is updated while the process is not running, each key as often as the others, in transactions of
`IN_ONE` rows. Then it is started with a paused sqlite sink, and reads all of that into its store as fast as it can:
once under ``block`` and once under ``compact``, which take turns. The **spill rate** is from the moment that the slot
is read until it is confirmed to the end. Then what waits is given time to become compact, the sink is resumed, and its
table is compared with the source's. The keys are few in one case; in the other more than a pass may remember, so that
it goes over the backlog part by part.

    python bench/compact.py
    python bench/compact.py --updates 200000 --rounds 1 --out /tmp/look
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import httpx
import psycopg

import stage
from oracle.product import TOKEN, Product
from servers.postgres import Postgres

FEW_KEYS, MANY_KEYS = 10_000, 500_000
IN_ONE = 10_000
ROW_BYTES = 200
OVER_LIMIT_MB = 100  # that VmHWM may have beyond limit_mb
SLOWER = 0.8  # of the spill rate under block
SINK = "mirror"
CONFIRMED = "select confirmed_flush_lsn >= %s::pg_lsn from pg_replication_slots where slot_name = 'spillway'"


class Round:
    def __init__(self, options: argparse.Namespace, report: stage.Report, server: Postgres, keys: int) -> None:
        self._options, self._report, self._server, self._keys = options, report, server, keys

    def spill_rate(self, mode: str) -> float:
        """Updates a second. Everything else that is measured goes to the report."""
        conninfo = self._server.create_database(f"app_{time.monotonic_ns()}")
        with (
            tempfile.TemporaryDirectory(prefix="spillway-compact-") as folder,
            Product(Path(folder), self._config(conninfo, mode)) as product,
        ):
            self._prepare(conninfo)
            product.start()
            product.wait_streaming(conninfo)
            product.terminate()
            end = self._update(conninfo)
            product.memory.label = mode
            product.start()
            product.wait_streaming(conninfo)
            began = time.monotonic()
            with psycopg.connect(conninfo, autocommit=True) as connection:
                product.wait(
                    lambda: connection.execute(CONFIRMED, [end]).fetchone() == (True,), "the spill",
                    seconds=1800, every=0.02,
                )  # fmt: skip
            rate = self._options.updates / (time.monotonic() - began)
            if mode == "compact":
                self._judge(product, conninfo, Path(folder))
            product.terminate()
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute("select pg_drop_replication_slot('spillway')")
        return rate

    def _judge(self, product: Product, conninfo: str, folder: Path) -> None:
        report, case = self._report, f"{self._keys} keys"
        began = time.monotonic()
        product.wait(lambda: _waiting(product) <= self._keys, "the backlog to be compact", seconds=600)
        report.inform(f"{case}: until what waits was compact, after the spill", time.monotonic() - began, "s")
        report.at_most(f"{case}: messages that wait", _waiting(product), self._keys, "messages")
        size = sum(path.stat().st_size for path in folder.glob("state.db*")) / stage.MIB
        report.inform(f"{case}: the state's files", size, "MB")
        url, headers = f"http://127.0.0.1:{product.port}/api/sinks/{SINK}/resume", {"Authorization": f"Bearer {TOKEN}"}
        httpx.post(url, headers=headers, trust_env=False).raise_for_status()
        product.wait(lambda: _waiting(product) == 0, "the drain", seconds=1800)
        peak = product.memory.peaks["compact"] / stage.MIB
        report.at_most(f"{case}: VmHWM", peak, self._options.limit_mb + OVER_LIMIT_MB, "MB")
        with psycopg.connect(conninfo) as source, closing(sqlite3.connect(folder / "mirror.db")) as mirror:
            expected = dict(source.execute("select id, n from t").fetchall())
            found = dict(mirror.execute("select id, n from t").fetchall())
        differing = sum(found.get(key) != n for key, n in expected.items()) + len(found.keys() - expected.keys())
        report.equal(f"{case}: rows in which the tables differ", differing, 0, "rows")

    def _prepare(self, conninfo: str) -> None:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("create table t (id int primary key, n int not null, v text) with (fillfactor = 50)")
            query = "insert into t select i, 0, repeat('x', %s) from generate_series(0, %s::int - 1) i"
            connection.execute(query, [ROW_BYTES, self._keys])
            connection.execute("create publication spillway for table t")

    def _update(self, conninfo: str) -> str:
        query = "update t set n = n + 1 where id >= %s and id < %s"
        with psycopg.connect(conninfo, autocommit=True) as connection:
            for done in range(0, self._options.updates, IN_ONE):
                first = done % self._keys
                connection.execute(query, [first, first + IN_ONE])
            row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
            connection.execute("select txid_current()")  # something to confirm, behind it
        assert row is not None
        return str(row[0])

    def _config(self, conninfo: str, mode: str) -> dict[str, object]:
        slot = {"name": "spillway", "create_if_not_exists": True}
        database = {"name": "app", "url": conninfo, "slot": slot, "publication": {"name": "spillway"}}
        sink = {
            "name": SINK, "database": "app", "status": "paused", "backlog": {"on_full": mode},
            "destination": {"type": "sqlite", "path": "mirror.db"},
        }  # fmt: skip
        state = {"url": "sqlite:///state.db"}
        return {
            "memory": {"limit_mb": self._options.limit_mb},
            "state": state,
            "databases": [database],
            "sinks": [sink],
        }


def _waiting(product: Product) -> int:
    return int(product.sink(SINK)["backlog_messages"])


def _run(options: argparse.Namespace, report: stage.Report) -> None:
    with Postgres(options.postgres, settings={"max_wal_size": "4GB"}) as server:
        for keys in (FEW_KEYS, MANY_KEYS):
            rates: dict[str, list[float]] = {"block": [], "compact": []}
            for number in range(2 * options.rounds):
                mode = ("block", "compact")[number % 2]
                rates[mode].append(Round(options, report, server, keys).spill_rate(mode))
            for mode, found in rates.items():
                report.inform(f"{keys} keys: spill rate under {mode}, median", statistics.median(found), "updates/s")
            ratio = statistics.median(rates["compact"]) / statistics.median(rates["block"])
            what = f"{keys} keys: spill rate under compact, part of that under block"
            if keys == FEW_KEYS:
                report.at_least(what, ratio, SLOWER, "")
            else:
                report.inform(what, ratio, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-mb", type=int, default=128)
    parser.add_argument("--postgres", choices=("15", "18"), default="18")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    report = stage.Report("compact", stage.parameters(options))
    with report.product_may_fail():
        _run(options, report)
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())

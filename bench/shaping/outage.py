"""An outage under ``backlog.on_full: compact``: 1,000,000 updates over 10,000 keys, while the index is away.

Rows are updated in transactions of `IN_ONE`, as fast as the server takes them, each key as often as the others; halfway
the process is killed with SIGKILL and started again. What waits is looked at all the time. When everything has been
read the node comes back, and at the end index and table are compared row by row.
"""

from __future__ import annotations

import random
import threading
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

import stage
from oracle.cgroup import MemoryCgroup
from oracle.documents import Index
from oracle.product import Product
from servers.opensearch import OpenSearch
from servers.postgres import Postgres
from shape import board
from shape.load import at_rest
from shaping.ground import CGROUP_OVER_LIMIT_MB, INDEX, OVER_LIMIT_MB

UPDATES, KEYS = 1_000_000, 10_000
IN_ONE = 1_000
COMPACT_SECONDS = 60.0  # within which what waits is compact, once nothing comes any more
ROW_BYTES = 200
SINK = "rows"


class Load(threading.Thread):
    def __init__(self, conninfo: str, updates: int, keys: int) -> None:
        super().__init__(daemon=True)
        self.updates, self.done = updates, 0
        self.error: psycopg.Error | None = None
        self._conninfo, self._keys = conninfo, keys

    def run(self) -> None:
        query = "update t set n = n + 1 from unnest(%s::int[]) as chosen (id) where t.id = chosen.id"
        shuffled = random.Random(1)
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                while self.done < self.updates:
                    order = shuffled.sample(range(self._keys), self._keys)
                    for first in range(0, self._keys, IN_ONE):
                        connection.execute(query, [order[first : first + IN_ONE]])
                        self.done += IN_ONE
        except psycopg.Error as error:
            self.error = error


def run(options: Namespace, report: stage.Report) -> None:
    updates = max(10 * KEYS, round(UPDATES * options.scale))
    with ExitStack() as stack:
        server = stack.enter_context(Postgres(options.postgres, settings={"max_wal_size": "2GB"}))
        search = stack.enter_context(OpenSearch())
        group = stack.enter_context(MemoryCgroup((options.limit_mb + CGROUP_OVER_LIMIT_MB) * stage.MIB))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="spillway-shape-")))
        index = stack.enter_context(Index(search.url, INDEX))
        index.create(board.INDEX)
        conninfo = server.create_database("app")
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("create table t (id int primary key, n int not null, v text)")
            connection.execute("create publication spillway for table t")
            query = "insert into t select i, 0, repeat('x', %s) from generate_series(0, %s::int - 1) i"
            connection.execute(query, [ROW_BYTES, KEYS])
        product = stack.enter_context(Product(folder, _config(options, conninfo, search.url), cgroup=group))
        product.memory.label = "while the node is away"
        search.kill()
        product.start()
        product.wait_streaming(conninfo)
        began = time.monotonic()
        load = Load(conninfo, updates, KEYS)
        load.start()
        most = _watch(product, load, updates // 2)
        product.kill()
        product.memory.label = "while the node is away, after a restart"
        product.start()
        product.wait_up()
        most = max(most, _watch(product, load, updates))
        if load.error is not None:
            raise load.error
        report.inform("updates a second, committed", updates / (time.monotonic() - began), "updates/s")
        product.wait(lambda: _read(product), "everything to be read", seconds=600)
        seconds = time.monotonic() - began
        report.inform("from the first update until everything was read", seconds, "s")
        most = max(most, _waiting(product))
        report.inform("messages that waited at any time we looked, at most", most, "messages")
        product.wait(lambda: _waiting(product) <= KEYS, "the backlog to be compact", seconds=COMPACT_SECONDS)
        report.inform("from the first update until what waits was compact", time.monotonic() - began, "s")
        report.at_most("messages that wait at the end of the outage", _waiting(product), KEYS, "messages")
        size = sum(path.stat().st_size for path in folder.glob("state.db*")) / stage.MIB
        report.inform("the state's files then", size, "MB")
        began, delivered = time.monotonic(), int(product.sink(SINK)["delivered"])
        product.memory.label = "draining"
        search.start()
        product.wait(lambda: at_rest(product), "the drain", seconds=600)
        report.inform("the drain, start of the node included", time.monotonic() - began, "s")
        sent = int(product.sink(SINK)["delivered"]) - delivered
        report.at_most("messages delivered in the drain", sent, KEYS, "messages")
        report.equal("exit status after SIGTERM", product.terminate(60), 0)
        for label, peak in product.memory.peaks.items():
            report.at_most(f"VmHWM {label}", peak / stage.MIB, options.limit_mb + OVER_LIMIT_MB, "MB")
        report.equal("kills by the kernel for want of memory", group.oom_kills, 0)
        with psycopg.connect(conninfo) as connection:
            expected = {str(row[0]): row[1:] for row in connection.execute("select id, n, v from t")}
        found = {identity: (source["n"], source["v"]) for identity, source in index.documents()}
        differing = sum(found.get(one) != expected[one] for one in expected) + len(found.keys() - expected.keys())
        report.equal("rows in which index and table differ", differing, 0, "rows")


def _config(options: Namespace, conninfo: str, url: str) -> dict[str, object]:
    slot = {"name": "spillway", "create_if_not_exists": True}
    database = {"name": "app", "url": conninfo, "slot": slot, "publication": {"name": "spillway"}}
    sink = {
        "name": SINK, "database": "app", "source": {"include_tables": ["public.t"]},
        "destination": {"type": "opensearch", "endpoint_url": url, "index_name": INDEX},
        "backlog": {"on_full": "compact"},
    }  # fmt: skip
    state = {"url": "sqlite:///state.db"}
    return {"memory": {"limit_mb": options.limit_mb}, "state": state, "databases": [database], "sinks": [sink]}


def _watch(product: Product, load: Load, goal: int) -> int:
    """Until so much of the load is done; the most that waited."""
    most = 0

    def reached() -> bool:
        nonlocal most
        most = max(most, _waiting(product))
        return load.done >= goal or not load.is_alive()

    product.wait(reached, "the load", seconds=1800, every=0.1)
    return most


def _read(product: Product) -> bool:
    (database,) = product.status()["databases"]
    lag_bytes = database["slot_lag_bytes"]
    return lag_bytes is not None and int(lag_bytes) < 1 << 16


def _waiting(product: Product) -> int:
    return int(product.sink(SINK)["backlog_messages"])

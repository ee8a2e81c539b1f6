"""User code: what a Python transform costs, and what poison costs.

**Cost.** The same rows wait in a slot and are drained into a null sink, without a transform, with field operations, and
with a Python transform that makes a new message of each; in turns. Time is from START_REPLICATION until everything is
acknowledged; CPU is that of the process and of its workers.

**Poison.** Of rows that come as they are inserted, each 1000th does something bad in the transform, in turns: it loops,
raises, makes a result of 1 GB, recurses without end, ends the worker. Each of them must be parked, alone, and say why
(an exception: where); all others must come to the file.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import psycopg

import stage
from oracle.cgroup import MemoryCgroup
from oracle.product import Product
from peers.source import TABLES, Slot, Source
from servers.postgres import Postgres
from servers.reaper import family
from shape import place
from shape.place import python
from shaping.ground import CGROUP_OVER_LIMIT_MB, OVER_LIMIT_MB
from speed.bench import Bench
from speed.life import BLACKHOLE, Life, configuration, cpu_seconds, sink
from speed.results import Results

ROWS = 300_000
ROUNDS = 3
POISONED_ROWS = 50_000
EVERY = 1_000
TIMEOUT_MS = 300
PLAIN, FIELDS, PYTHON = "no transform", "field operations", "a Python transform"
FUNCTIONS: dict[str, Mapping[str, object] | None] = {
    PLAIN: None,
    FIELDS: {
        "name": "made", "type": "fields",
        "fields": [{"drop": ["payload"]}, {"rename": {"amount": "total"}}, {"set": {"kind": "order"}}],
    },
    PYTHON: python("made", "transform", 'return {"id": record["id"], "total": record["amount"], "action": action}'),
}  # fmt: skip
POISON = """
kind = record["id"] % 5000 // 1000 if record["id"] % 1000 == 0 else -1
if kind == 0:
    while True:
        pass
if kind == 1:
    raise ValueError("bad row")
if kind == 2:
    return "x" * (1 << 30)
if kind == 3:
    def deeper(n):
        return deeper(n + 1) + 1
    return deeper(0)
if kind == 4:
    import os
    os._exit(3)
return {"id": record["id"]}
"""
KINDS = ("endless loop", "exception", "1 GB result", "deep recursion", "os._exit")


def run(options: Namespace, report: stage.Report) -> None:
    _cost(options, report)
    _poison(options, report)


def _cost(options: Namespace, report: stage.Report) -> None:
    rows = max(10_000, round(ROWS * options.scale))
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in FUNCTIONS}
    with Source() as source:
        bench = Bench(source, Results(), rows, ROUNDS, full=False)
        with bench.filled([TABLES["rows_200"]], rows) as waiting:
            for number in range(ROUNDS):
                for name, function in FUNCTIONS.items():
                    with source.copy(waiting) as slot:
                        wall, cpu, peak_mb = _drain(options, slot, function)
                    figures[name].append((wall / rows * 1e6, cpu / rows * 1e6, peak_mb))
                    shown = f"{figures[name][-1][0]:.2f} us, {figures[name][-1][1]:.2f} us of CPU a message"
                    report.say(f"round {number + 1}, {name}: {shown}")
    for name, rounds in figures.items():
        report.inform(f"{name}: time a message", statistics.median(wall for wall, _, _ in rounds), "us")
        report.inform(f"{name}: CPU a message, workers included", statistics.median(cpu for _, cpu, _ in rounds), "us")
        peak = max(peak for _, _, peak in rounds)
        report.at_most(f"{name}: VmHWM, workers included", peak, options.limit_mb + OVER_LIMIT_MB, "MB")


def _drain(options: Namespace, slot: Slot, function: Mapping[str, object] | None) -> tuple[float, float, float]:
    """Seconds, CPU seconds, and the most memory in MB."""
    more = {} if function is None else {"transform": function["name"]}
    config = configuration(slot, [sink("out", BLACKHOLE, **more)], limit_mb=options.limit_mb)
    if function is not None:
        config["functions"] = [dict(function)]
    with tempfile.TemporaryDirectory(prefix="spillway-shape-") as folder, Product(Path(folder), config) as product:
        life = Life(product, slot, ["out"])
        try:
            life.start()
            done = life.drained()
            workers = sum(cpu_seconds(pid) for pid in family(product.pid) if pid != product.pid)
            life.finish()
        finally:
            life.close()
        return done.seconds, done.cpu_seconds + workers, life.peak_rss_mb


def _poison(options: Namespace, report: stage.Report) -> None:
    rows = max(5 * EVERY, round(POISONED_ROWS * options.scale))
    with ExitStack() as stack:
        server = stack.enter_context(Postgres(options.postgres))
        group = stack.enter_context(MemoryCgroup((options.limit_mb + CGROUP_OVER_LIMIT_MB) * stage.MIB))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-shape-")))
        conninfo = server.create_database("app")
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("create table t (id int primary key, v text); create publication spillway for table t")
        product = stack.enter_context(Product(folder, _poisoned(options, conninfo), cgroup=group))
        product.memory.label = "with poison"
        product.start()
        product.wait_streaming(conninfo)
        began = time.monotonic()
        with psycopg.connect(conninfo) as connection:
            for first in range(1, rows + 1, 100):
                query = "insert into t select n, 'v' from generate_series(%s::int, %s) n"
                connection.execute(query, [first, first + 99])
                connection.commit()
        bad = rows // EVERY
        out = folder / "out.ndjson"
        product.wait(lambda: _lines(out) >= rows - bad, "everything but the poison", seconds=600, every=0.25)
        report.inform("from the first commit until everything but the poison had come", time.monotonic() - began, "s")
        product.wait(lambda: product.sink("out")["parked_keys"] >= bad, "the poison to be parked", seconds=120)
        came = Counter(json.loads(line)["id"] for line in out.read_bytes().splitlines())
        wanted = {n for n in range(1, rows + 1) if n % EVERY}
        report.equal("messages that did not come", len(wanted - came.keys()), 0, "messages")
        report.equal("messages that came though they are poison", len(came.keys() - wanted), 0, "messages")
        parked = _parked(product)
        report.equal("parked messages", len(parked), bad, "messages")
        for kind, name in enumerate(KINDS):
            shown = {n: item for n, item in parked.items() if n % 5000 // 1000 == kind}
            reasons = Counter(str(item["reason"]) for item in shown.values())
            report.inform(f"parked: {name} ({', '.join(reasons)})", len(shown), "messages")
            report.say(str(next(iter(shown.values()), None)))
        told = [n for n, item in parked.items() if n % 5000 // 1000 == 1 and _tells_where(str(item["detail"]))]
        exceptions = sum(n % 5000 // 1000 == 1 for n in range(EVERY, rows + 1, EVERY))
        report.equal("exceptions that say what was raised and where", len(told), exceptions, "messages")
        report.equal("exit status after SIGTERM", product.terminate(60), 0)
        peak = product.memory.peaks["with poison"] / stage.MIB
        report.at_most("VmHWM with poison, workers included", peak, options.limit_mb + OVER_LIMIT_MB, "MB")
        report.equal("kills by the kernel for want of memory", group.oom_kills, 0)


def _poisoned(options: Namespace, conninfo: str) -> dict[str, object]:
    destination = {"type": "file", "path": "out.ndjson"}
    slot = {"name": "spillway", "create_if_not_exists": True}
    database = {"name": "app", "url": conninfo, "slot": slot, "publication": {"name": "spillway"}}
    return {
        "memory": {"limit_mb": options.limit_mb},
        "function_limits": {"timeout_ms": TIMEOUT_MS},
        "databases": [database],
        "functions": [python("poison", "transform", POISON)],
        "sinks": [{"name": "out", "database": "app", "destination": destination, "transform": "poison"}],
    }


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _parked(product: Product) -> dict[int, dict[str, object]]:
    """By the number of the row."""
    items = place.parked(product, "out")
    return {int(str(item["key"]).rpartition(":")[2]): item for item in items}


def _tells_where(detail: str) -> bool:
    return "ValueError: bad row" in detail and "in transform: raise ValueError" in detail

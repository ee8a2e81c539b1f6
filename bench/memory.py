"""Memory stays within the limit plus 100 MB, whatever the source sends and the sinks do (I4).

Each case has a database, a process and a memory cgroup (limit + 128 MB) of its own:

transaction   one transaction of 1,000,000 rows into a file and a webhook
row           a row of 16 MB (16,000,000 bytes), twice, into a file and a webhook
columns       a table of 500 columns, inserted and updated
broken        25 sinks, 24 of which are refused, rejected or never answered
dead-letter   with a limit of 256 MB a row of 50 MB becomes a dead letter with its key, size and reason

What was sent is counted where it arrived. VmHWM is read from ``/proc``.

    python bench/memory.py                       all cases, some minutes
    python bench/memory.py --case row --scale 1
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import psycopg

import stage
from oracle.cgroup import MemoryCgroup
from oracle.endpoint import Recorder
from oracle.product import TOKEN, Product, ProductFailed, spillway_command
from servers.ports import free_port
from servers.postgres import Postgres

ROW_BYTES = 16_000_000
DEAD_ROW_BYTES = 50_000_000
COLUMNS = 500


class Case:
    """A database, a recorder and a product with some sinks; ``finish`` judges the memory."""

    def __init__(
        self, name: str, report: stage.Report, stack: ExitStack, schema: str, *, limit_mb: int = 128, broken: int = 0
    ) -> None:
        self.name, self.report, self.limit_mb = name, report, limit_mb
        postgres = stack.enter_context(Postgres("18", settings={"max_wal_size": "4GB"}))
        self.conninfo = postgres.create_database("app")
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(schema)
            connection.execute("create publication spillway for table t")
        self.recorder = stack.enter_context(Recorder())
        self.cgroup = stack.enter_context(MemoryCgroup((limit_mb + 128) * stage.MIB))
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-memory-")))
        self.file = self.folder / "out.ndjson"
        self.product = stack.enter_context(Product(self.folder, self._config(broken), cgroup=self.cgroup))
        self.product.start()
        self.product.wait_streaming(self.conninfo)

    def _config(self, broken: int) -> dict[str, object]:
        slot = {"name": "spillway", "create_if_not_exists": True}
        hook = {"type": "webhook", "http_endpoint": "recorder", "timeout_seconds": 5, "batch": True}
        sinks: list[dict[str, object]] = [
            {"name": "file", "database": "app", "destination": {"type": "file", "path": self.file.name}}
        ]
        if not broken:
            destination = {**hook, "http_endpoint_path": "/well"}
            sinks.append({"name": "hook", "database": "app", "batch_size": 100, "destination": destination})
        for number in range(broken):
            path = ("/rejects", "/stalls", "/unavailable", "")[number % 4]
            endpoint = "recorder" if path else "refused"
            destination = {**hook, "http_endpoint": endpoint, "http_endpoint_path": path}
            sinks.append({"name": f"broken_{number}", "database": "app", "batch_size": 100, "destination": destination})
        return {
            "memory": {"limit_mb": self.limit_mb},
            "databases": [{"name": "app", "url": self.conninfo, "slot": slot, "publication": {"name": "spillway"}}],
            "http_endpoints": [
                {"name": "recorder", "url": self.recorder.url},
                {"name": "refused", "url": f"http://127.0.0.1:{free_port()}"},
            ],
            "sinks": sinks,
        }

    def execute(self, query: str, values: Mapping[str, object] | None = None) -> None:
        with psycopg.connect(self.conninfo) as connection:
            connection.execute(query, values)

    def wait_lines(self, count: int, seconds: float) -> None:
        self.product.wait(lambda: lines(self.file) >= count, f"{count} lines in the file", seconds=seconds, every=0.5)
        self.report.equal(f"{self.name}: messages in the file", lines(self.file), count)

    def wait_webhook(self, count: int, seconds: float) -> None:
        def arrived() -> int:
            return self.recorder.applied_messages().get("/well", 0)

        self.product.wait(lambda: arrived() >= count, f"{count} messages at the webhook", seconds=seconds, every=0.5)
        self.report.equal(f"{self.name}: messages at the webhook", arrived(), count)

    def finish(self) -> None:
        self.product.terminate(60)
        peak = max(self.product.memory.peaks.values())
        self.report.at_most(f"{self.name}: VmHWM", peak / stage.MIB, self.limit_mb + 100, "MB")
        self.report.equal(f"{self.name}: kills by the kernel for want of memory", self.cgroup.oom_kills, 0)


def transaction(report: stage.Report, stack: ExitStack, scale: float) -> None:
    case = Case("transaction", report, stack, "create table t (id int primary key, v text)")
    rows = round(1_000_000 * scale)
    case.execute("insert into t select i, md5(i::text) from generate_series(1, %(rows)s::int) i", {"rows": rows})
    case.wait_lines(rows, 900)
    case.wait_webhook(rows, 900)
    case.finish()


def row(report: stage.Report, stack: ExitStack, _scale: float) -> None:
    case = Case("row", report, stack, "create table t (id int primary key, v text)")
    for number in (1, 2):
        case.execute(
            "insert into t values (%(id)s::int, repeat('x', %(size)s::int))", {"id": number, "size": ROW_BYTES}
        )
    case.wait_lines(2, 120)
    case.wait_webhook(2, 120)
    case.finish()


def columns(report: stage.Report, stack: ExitStack, scale: float) -> None:
    names = [f"column_number_{n}" for n in range(COLUMNS - 1)]
    listed = ", ".join(f"{name} text" for name in names)
    case = Case("columns", report, stack, f"create table t (id int primary key, {listed})")
    rows = round(10_000 * scale)
    # Fifteen bytes a column: more would not fit a page of the source, and these are too short to leave it.
    values = ", ".join("left(md5((i + 1)::text), 12)" for _ in names)
    case.execute(f"insert into t select i, {values} from generate_series(1, %(rows)s::int) i", {"rows": rows})
    case.execute("update t set column_number_7 = 'changed'")
    case.wait_lines(2 * rows, 900)
    case.wait_webhook(2 * rows, 900)
    case.finish()


def broken(report: stage.Report, stack: ExitStack, scale: float) -> None:
    case = Case("broken", report, stack, "create table t (id int primary key, v text)", broken=24)
    case.recorder.script(
        [
            {"path": "/rejects", "do": "status", "status": 422},
            {"path": "/stalls", "do": "stall"},
            {"path": "/unavailable", "do": "status", "status": 503},
        ]
    )
    rows = round(50_000 * scale)
    for start in range(1, rows, 1_000):
        query = "insert into t select i, repeat(md5(i::text), 32) from generate_series(%(first)s::int, %(last)s::int) i"
        case.execute(query, {"first": start, "last": min(start + 999, rows)})
    case.wait_lines(rows, 900)

    def waiting() -> list[int]:
        return [s["backlog_messages"] for s in case.product.status()["sinks"] if s["name"] != "file"]

    case.product.wait(lambda: set(waiting()) == {rows}, "all rows to wait for each broken sink", seconds=300, every=1)
    case.report.equal("broken: fewest messages waiting for a broken sink", min(waiting()), rows, "messages")
    case.finish()


def dead_letter(report: stage.Report, stack: ExitStack, _scale: float) -> None:
    case = Case("dead-letter", report, stack, "create table t (id int primary key, v text)", limit_mb=256)
    case.execute("insert into t values (1, repeat('x', %(size)s::int))", {"size": DEAD_ROW_BYTES})
    case.execute("insert into t values (2, 'behind it')")
    case.wait_lines(1, 120)
    case.product.wait(lambda: bool(_dead(case.product)), "the dead letter", seconds=60)
    letters = _dead(case.product)
    report.equal("dead-letter: dead letters", len(letters), 1)
    letter = letters[0]
    report.say(f"dead letter: {letter}")
    if letter["key"] != "public.t:1" or not letter["reason"]:
        report.failed("dead-letter: its key or reason is missing")
    # The row's size: the letter itself holds the key's columns alone, so its bytes may be those.
    sizes = [letter["bytes"], *(int(number) for number in re.findall(r"\d+", letter.get("detail", "")))]
    report.at_most("dead-letter: the row's size less than the letter says", DEAD_ROW_BYTES - max(sizes), 0, "B")
    case.finish()


def _dead(product: Product) -> list[dict]:
    """What ``spillway dead-letters list`` says, as a user would ask."""
    command = [*spillway_command(), "dead-letters", "list", "file", "--json", "-c", str(product.file)]
    environment = {**os.environ, "SPILLWAY_TOKEN": TOKEN}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise ProductFailed(f"dead-letters list ended with {done.returncode}: {done.stderr}")
    return list(json.loads(done.stdout))


def lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(stage.MIB), b""))


CASES: Mapping[str, Callable[[stage.Report, ExitStack, float], None]] = {
    "transaction": transaction,
    "row": row,
    "columns": columns,
    "broken": broken,
    "dead-letter": dead_letter,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="may be given again; all by default")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    cases = options.case or list(CASES)
    name = "memory" if len(cases) == len(CASES) and options.scale == 1.0 else f"memory-{'-'.join(cases)}"
    report = stage.Report(name, {"cases": ", ".join(cases), "scale": options.scale, "commit": stage.commit()})
    for case in cases:
        report.say(f"--- {case}")
        with report.product_may_fail(case), ExitStack() as stack:
            CASES[case](report, stack, options.scale)
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())

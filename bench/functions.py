"""What a sink's functions cost: microseconds per message, beside a batch that is only looked at.

    python bench/functions.py [--rounds 20]

Batches of 500 messages of 1 kB and 18 kB go through the functions of a sink as at delivery: from the bytes of the
messages to the bytes of what is sent. `loop` is CPU time of the process that has the loop, for which all else waits;
the rest of the time a worker computes. The figure of a line is the best of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import orjson
import uvloop

import stage
from spillway.functions.base import Failure, Functions
from spillway.functions.build import build
from spillway.functions.isolated import IsolatedFunctions
from spillway.functions.spec import (
    FieldOperation,
    FieldOperations,
    FunctionSpec,
    PathExpression,
    PythonFunction,
)

BATCH = 500
BOUND_MICROSECONDS = 15.0  # per message of 1 kB, all in
IDENTITY = """
def transform(action, record, changes, metadata):
    return {"record": record, "changes": changes, "action": action, "metadata": metadata}
"""
TYPICAL = """
def transform(action, record, changes, metadata):
    return {
        "id": record["id"],
        "title": record["title"].strip().lower(),
        "place": f"{record['city']}, {record['country']}",
        "tags": [tag for tag in record["tags"] if tag],
        "updated": metadata.commit_timestamp,
        "table": metadata.table_name,
        "deleted": action == "delete",
        "score": round(record["score"] * 1.5, 2),
    }
"""
FILTER = """
def filter(action, record, changes, metadata):
    return action != "delete" and record["score"] > 0
"""
ROUTING = """
def route(action, record, changes, metadata):
    return {"index_name": f"jobs-{record['country']}"}
"""


def message(number: int, size_bytes: int) -> bytes:
    record = {
        "id": number, "title": f" Engineer {number} ", "city": "Wien", "country": "at", "tags": ["a", "b", ""],
        "score": number + 0.5, "salary": "4200.00", "open": True, "company": {"id": 7, "address": {"zip": "1010"}},
    }  # fmt: skip
    whole = {
        "record": record,
        "changes": {"title": "Engineer"},
        "action": "update",
        "metadata": {
            "table_schema": "public", "table_name": "jobs", "idempotency_key": "MTIzNDU2Nzk6MQ==",
            "commit_timestamp": "2024-10-28T21:39:21.127470Z", "commit_lsn": 123456790 + number, "commit_idx": number,
            "database_name": "jobs", "record_pks": [str(number)], "transaction_annotations": None, "enrichment": None,
            "consumer": {"id": "5c2b", "name": "search", "annotations": {}},
        },
    }  # fmt: skip
    place = 0
    while (missing := size_bytes - len(orjson.dumps(whole))) > 10:
        record[f"column_{place}"] = ("text of a row " * 8)[: max(1, missing - 16)]
        place += 1
    return orjson.dumps(whole)


def python(name: str, text: str) -> PythonFunction:
    return PythonFunction(name, f"{name}.py", text)


SPECS: dict[str, FunctionSpec] = {
    "no function": FunctionSpec(),
    "path record": FunctionSpec(transform=PathExpression("record")),
    "fields drop, mask, hash, flatten": FunctionSpec(
        transform=FieldOperations(
            (
                FieldOperation("drop", ("salary",)),
                FieldOperation("mask", ("title",)),
                FieldOperation("hash", ("city",)),
                FieldOperation("flatten", ("company",)),
            )
        )
    ),
    "Python filter": FunctionSpec(filter=python("filter", FILTER)),
    "Python routing": FunctionSpec(routing=python("routing", ROUTING)),
    "Python transform, identity": FunctionSpec(transform=python("identity", IDENTITY)),
    "Python transform, typical": FunctionSpec(transform=python("typical", TYPICAL)),
    "Python filter, routing and transform": FunctionSpec(
        filter=python("filter", FILTER), routing=python("routing", ROUTING), transform=python("typical", TYPICAL)
    ),
}


async def measure(functions: Functions, messages: list[bytes], rounds: int) -> tuple[float, float]:
    """Microseconds per message: until the answer is there, and of the loop's own CPU time."""
    deletes = [False] * len(messages)
    whole, own = [], []
    for _ in range(rounds + 1):
        began, cpu = time.perf_counter(), time.process_time()
        outcomes = await functions(messages, deletes)
        whole.append(time.perf_counter() - began)
        own.append(time.process_time() - cpu)
        if any(isinstance(outcome, Failure) for outcome in outcomes) or len(outcomes) != len(messages):
            raise SystemExit(f"a function failed: {outcomes[0]}")
    per = 1e6 / len(messages)
    return min(whole[1:]) * per, min(own[1:]) * per


def vm_hwm_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def run(report: stage.Report, rounds: int) -> None:
    resident_mb = 0.0
    for size_bytes in (1_000, 18_000):
        messages = [message(number, size_bytes) for number in range(BATCH)]
        for name, spec in SPECS.items():
            functions = build(spec)
            began = time.perf_counter()
            await functions.open()
            if spec.python and size_bytes == 1_000:
                report.inform(f"{name}: start", (time.perf_counter() - began) * 1000, "ms")
            try:
                whole, own = await measure(functions, messages, rounds)
                if isinstance(functions, IsolatedFunctions) and functions.pid is not None:
                    resident_mb = max(resident_mb, vm_hwm_mb(functions.pid))
            finally:
                await functions.close()
            what = f"{name}, {size_bytes // 1000} kB"
            if size_bytes == 1_000 and name != "Python filter, routing and transform":
                report.at_most(what, whole, BOUND_MICROSECONDS, "us")
            else:
                report.inform(what, whole, "us")
            report.inform(f"{what}: loop", own, "us")
    report.inform("largest worker, VmHWM", resident_mb, "MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    report = stage.Report("functions", {"rounds": options.rounds, "batch": BATCH, "commit": stage.commit()})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(report, options.rounds))
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())

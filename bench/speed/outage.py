"""Outage: the sink takes nothing while the slot is drained, then everything.

The sink is a null sink that the configuration says is paused: what comes for it goes to the store as it does when a
sink refuses. **Spill rate**: from START_REPLICATION until the store holds every row (``backlog_messages``, which counts
what is committed, fsync included). Then ``POST .../resume``; **catch-up rate**: from that until everything is delivered
and the store is empty. Beside them, in the same round, a drain of the same rows to the null sink.
"""

from __future__ import annotations

import time
from functools import partial

from peers.source import TABLES, Waiting
from speed.bench import NULL_TCP, Bench
from speed.life import BLACKHOLE, Json, Life, living, sink
from speed.results import PRODUCT_RSS

PART = "outage"
ROWS_200, ROWS_18K = "200 B", "18 kB"
DRAIN, SPILL, CATCH_UP = NULL_TCP, "spill, sink paused", "catch-up, null sink"


def run(bench: Bench) -> None:
    for case, table, rows in ((ROWS_200, "rows_200", bench.rows), (ROWS_18K, "rows_18000", bench.rows // 10)):
        with bench.filled([TABLES[table]], rows, batch=10_000 if case == ROWS_200 else 1_000) as waiting:
            bench.take_turns([bench.null(PART, case, waiting), partial(_outage, bench, case, waiting)])


def _outage(bench: Bench, case: str, waiting: Waiting, number: int) -> None:
    rows = waiting.rows
    with (
        bench.source.copy(waiting) as slot,
        living(slot, [sink("out", BLACKHOLE, status="paused")]) as life,
    ):
        stored_at = life.wait_for(lambda status: life.total("backlog_messages", status), rows, "stored")
        _add(
            bench,
            case,
            SPILL,
            number,
            life,
            rows,
            stored_at - life.stream_began,
            life.cpu_seconds() - life.start_cpu_seconds,
        )
        cpu, began = life.cpu_seconds(), time.time()
        life.post("/api/sinks/out/resume")

        def resolved(status: Json | None) -> int:
            """Delivered and gone from the store: the fewer of the two."""
            if status is None:
                return 0
            return min(life.delivered(status), rows - life.total("backlog_messages", status))

        ended_at = life.wait_for(resolved, rows, "caught up")
        delivered = life.delivered(life.status())
        if delivered != rows:
            bench.say(f"{delivered - rows} messages were delivered twice, which is allowed")
        _add(bench, case, CATCH_UP, number, life, rows, ended_at - began, life.cpu_seconds() - cpu)


def _add(
    bench: Bench, case: str, tool: str, number: int, life: Life, rows: int, seconds: float, cpu_seconds: float
) -> None:
    values = {
        "rows_per_second": rows / seconds,
        "cpu_us_per_row": cpu_seconds / rows * 1e6,
        PRODUCT_RSS: life.peak_rss_mb,
    }
    bench.add(PART, case, tool, number, values)

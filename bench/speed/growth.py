"""Growth: CPU per change and memory, against the backlog in the slot, the number of tables, and of columns.

CPU is that of the process from the moment at which changes flow, without its start.

- A backlog of up to 100,000 rows costs milliseconds, which would drown in the start of a process. So one process has it
  again and again: it is suspended (SIGSTOP), the rows are committed, it goes on (SIGCONT), and its CPU is read as soon
  as a status, asked after the reading, says that all is delivered. What it takes while idle, measured in the same way,
  is taken off.
- Larger ones, and those of many tables or columns, wait in the slot when the process starts, as in any drain here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from peers.source import TABLES, Table, Waiting, many_columns, ten_columns
from speed.bench import Bench
from speed.life import BLACKHOLE, Life, living, sink
from speed.results import PRODUCT_RSS

PART = "growth"
BACKLOG, TABLES_CASE, COLUMNS = "backlog", "tables", "columns"  # the first word of a case
SMALL = (1_000, 10_000, 100_000)
LARGE = (1_000_000,)
LARGE_FULL = (1_000_000, 10_000_000)
TABLE_COUNTS = (1, 10, 100, 1_000)
COLUMN_COUNTS = (10, 50, 100, 200, 500)
SPILLWAY = "Spillway"

_REPEATED_CHANGES = 50_000
_REPEATS = range(3, 31)  # the fewest and the most
_IDLE_SECONDS = 1.5
_TABLES_ROWS = 1_000_000
_TABLES_ROWS_IN_ONE = 200
_VALUES = 4_000_000  # of columns, in a run


def case(kind: str, count: int) -> str:
    return f"{kind}: {count:,}"


def run(bench: Bench) -> None:
    for rows in SMALL:
        for number in range(bench.rounds):
            _again_and_again(bench, rows, number)
    table = TABLES["rows_200"]
    for rows in LARGE_FULL if bench.full else LARGE:
        with bench.filled([table], min(rows, 10 * bench.rows)) as waiting:
            for number in range(bench.rounds):
                _at_once(bench, case(BACKLOG, waiting.rows), waiting, number)
    for count in TABLE_COUNTS:
        tables = [ten_columns(200, name=f"many_{number}") for number in range(count)]
        with bench.filled(tables, min(bench.rows, _TABLES_ROWS), batch=_TABLES_ROWS_IN_ONE) as waiting:
            for number in range(bench.rounds):
                _at_once(bench, case(TABLES_CASE, count), waiting, number)
    for count in COLUMN_COUNTS:
        rows = min(bench.rows, _VALUES // count)
        with bench.filled([many_columns(count)], rows, batch=max(100, 100_000 // count)) as waiting:
            for number in range(bench.rounds):
                _at_once(bench, case(COLUMNS, count), waiting, number, columns=count)


def _at_once(bench: Bench, name: str, waiting: Waiting, number: int, *, columns: int = 0) -> None:
    with bench.source.copy(waiting) as slot, living(slot, [sink("out", BLACKHOLE)]) as life:
        done = life.drained()
        life.finish()
        values = done.values(life)
    if columns:
        values["cpu_ns_per_value"] = values["cpu_us_per_row"] * 1000 / columns
    bench.add(PART, name, SPILLWAY, number, values, rows=waiting.rows)


# -- small backlogs ----------------------------------------------------------------------------------------------------


def _again_and_again(bench: Bench, rows: int, number: int) -> None:
    table = TABLES["rows_200"]
    repeats = min(max(_REPEATED_CHANGES // rows, _REPEATS.start), _REPEATS.stop - 1)
    pause_seconds = 0.05 + rows * 4e-6
    with (
        bench.filled([table], 0) as waiting,
        bench.source.copy(waiting) as slot,
        living(slot, [sink("out", BLACKHOLE)]) as life,
        bench.source.connect() as connection,
    ):
        life.wait_streaming()
        made = 0
        cpu = seconds = 0.0
        for turn in range(1 + repeats):  # the first is for warming up
            with _suspended(life):
                _insert(connection, table, made, rows)
            made += rows
            took, waited = _until_delivered(life, made, pause_seconds)
            if turn:
                cpu, seconds = cpu + took, seconds + waited
        idle = idle_seconds = 0.0
        while idle_seconds < _IDLE_SECONDS:
            with _suspended(life):
                pass
            took, waited = _until_delivered(life, made, pause_seconds)
            idle, idle_seconds = idle + took, idle_seconds + waited
        net = cpu - idle / idle_seconds * seconds
        values = {"cpu_us_per_row": net / (rows * repeats) * 1e6, PRODUCT_RSS: life.peak_rss_mb}
        bench.add(PART, case(BACKLOG, rows), SPILLWAY, number, values, repeats=repeats, idle_cpu=idle / idle_seconds)


@contextmanager
def _suspended(life: Life) -> Iterator[None]:
    os.kill(life.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(life.pid, signal.SIGCONT)


def _insert(connection: psycopg.Connection[tuple[object, ...]], table: Table, made: int, rows: int) -> None:
    cursor = psycopg.ClientCursor(connection)
    for first in range(made + 1, made + rows + 1, 10_000):
        last = min(first + 9_999, made + rows)
        cursor.execute(table.batch.encode(), {"first": first, "last": last})


def _until_delivered(life: Life, goal: int, pause_seconds: float) -> tuple[float, float]:
    """CPU and time from now until everything is delivered, as far as pauses of that length tell."""
    began, before = time.monotonic(), life.cpu_seconds()
    while True:
        time.sleep(pause_seconds)
        cpu, now = life.cpu_seconds(), time.monotonic()
        if life.delivered(life.status()) == goal:
            return cpu - before, now - began
        life.check_within(now - began)

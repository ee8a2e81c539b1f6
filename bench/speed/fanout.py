"""Fan-out: 1, 5 and 25 null sinks on one slot, all of them on one table, and together on 25 tables.

On one table every sink gets every row. On 25 tables each row has one sink: of k sinks, each has 25 / k tables. CPU per
further sink is what 24 more sinks on the one table cost, for each row and sink.
"""

from __future__ import annotations

from peers.source import TABLES, Waiting, ten_columns
from speed.bench import Bench, Run
from speed.life import BLACKHOLE, Json, living, sink

PART = "fan-out"
ONE_TABLE, MANY_TABLES = "one table, every sink gets every row", "25 tables, every row has one sink"
SINKS = (1, 5, 25)
TABLES_COUNT = 25
_ROWS_IN_ONE = 1_000  # transaction; of 25 tables each has one in turn


def tool(sinks: int) -> str:
    return "1 sink" if sinks == 1 else f"{sinks} sinks"


def run(bench: Bench) -> None:
    with bench.filled([TABLES["rows_200"]], bench.rows // 4, batch=_ROWS_IN_ONE) as waiting:
        bench.take_turns([_to(bench, ONE_TABLE, waiting, count) for count in SINKS])
    tables = [ten_columns(200, name=f"fan_{number}") for number in range(TABLES_COUNT)]
    with bench.filled(tables, bench.rows, batch=_ROWS_IN_ONE) as waiting:
        bench.take_turns([_to(bench, MANY_TABLES, waiting, count) for count in SINKS])


def _to(bench: Bench, case: str, waiting: Waiting, count: int) -> Run:
    many = case == MANY_TABLES

    def once(number: int) -> None:
        sinks: list[Json] = []
        for at in range(count):
            names = [f"public.{table.name}" for table in (waiting.tables[at::count] if many else waiting.tables)]
            sinks.append(sink(f"out_{at}", BLACKHOLE, source={"include_tables": names}))
        with bench.source.copy(waiting) as slot, living(slot, sinks) as life:
            done = life.drained(messages=waiting.rows if many else waiting.rows * count)
            life.finish()
            bench.add(PART, case, tool(count), number, done.values(life), asked=life.asked)

    return once

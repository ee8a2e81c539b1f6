"""Latency: from a commit to the arrival of its row at the far side, while rows come at a steady rate.

**The clock** is the machine's. A change was committed at PostgreSQL's own commit timestamp, which it takes right before
it writes the commit record: waiting for the commit itself is in the figure. It has arrived

- at a webhook when the receiver (a process of its own) has the whole request, which it answers at once;
- at the null sink when its ``send`` is called (``callback/``: the product with a blackhole that looks at the clock);
- at Debezium's consumer when it is called with the batch, beside its configuration by default and polling every 10 ms.

**The writer** is a procedure in the server, on a connection of its own: it inserts, commits, and sleeps until the next
is due. It sleeps in whole milliseconds, so 10,000 commits a second come about ten at a time. A case in which it does
not come to 95 % of its rate has failed and has no figures. The first second is left out; where Debezium's engine is
beside it the first five are, of both, so that a JVM can warm up.

"Half the drain rate" is of a drain to the same webhook, measured first; rows come in transactions of 100 there.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oracle.product import ProductFailed
from peers import debezium
from peers.source import Slot, Table, ten_columns
from speed.bench import Bench
from speed.drain import WEBHOOK_BATCH
from speed.life import BLACKHOLE, Life, living, sink
from speed.receiver import Receiver
from speed.results import PRODUCT_RSS
from stage import percentile

PART = "latency"
SPILLWAY = "Spillway"
HALF = "webhook, half the drain rate"
CALLBACK = "null sink, 500 commits/s"
DEBEZIUM, DEBEZIUM_10_MS = "Debezium's engine, defaults", "Debezium's engine, polling every 10 ms"
CALLBACK_RATE = 500
WEBHOOK = {"type": "webhook", "http_endpoint": "receiver", "batch": True}

# The rows of the drains, but for values that cost the writer nothing.
_PAYLOAD = "x" * 122
_TABLE = Table(
    "latency",
    ten_columns(200, name="latency").create,
    "INSERT INTO latency SELECT i, 100001, 'eu', 'pending', 100, 1000.25, true,"
    f" timestamptz '2026-01-01 00:00:00.123457Z', 'customer 0000001', '{_PAYLOAD}'"
    " FROM generate_series(%(first)s::bigint, %(last)s::bigint) i",
)
_DRAIN_ROWS = 300_000
_LEFT_OUT_SECONDS = 1
_LEFT_OUT_JVM_SECONDS = 5
_RATE_HELD = 0.95
_FOLDER = Path(__file__).with_name("callback")

Arrivals = Sequence[tuple[int, int]]  # arrived, committed: microseconds since 1970


@dataclass(frozen=True, slots=True)
class Load:
    per_second: float  # rows
    seconds: float
    rows_in_one: int = 1  # transaction
    left_out_seconds: int = _LEFT_OUT_SECONDS

    @property
    def transactions(self) -> int:
        return int(self.per_second * self.seconds / self.rows_in_one)

    @property
    def rows(self) -> int:
        return self.transactions * self.rows_in_one


def webhook_case(per_second: int) -> str:
    return f"webhook, {per_second:,} commits/s"


LOADS = {webhook_case(rate): Load(rate, seconds) for rate, seconds in ((100, 16), (1_000, 11), (10_000, 11))}


def run(bench: Bench) -> None:
    rate = _webhook_drain(bench)
    loads = {**LOADS, HALF: Load(rate / 2, 11, rows_in_one=100)}
    bench.take_turns(
        [
            lambda number: _webhook(bench, loads, number),
            lambda number: _callback(bench, number),
            lambda number: _debezium(bench, DEBEZIUM_10_MS, 10, number),
            lambda number: _debezium(bench, DEBEZIUM, None, number),
        ]
    )


# -- the writer --------------------------------------------------------------------------------------------------------


def _procedure(table: Table) -> str:
    insert = table.batch % {"first": "id", "last": "id + rows_in_one - 1"}
    return f"""\
CREATE OR REPLACE PROCEDURE load(first bigint, transactions bigint, per_second float8, rows_in_one bigint)
LANGUAGE plpgsql AS $$
DECLARE began timestamptz := clock_timestamp(); id bigint := first; ahead float8;
BEGIN
  FOR n IN 0 .. transactions - 1 LOOP
    ahead := n / per_second - extract(epoch FROM clock_timestamp() - began);
    IF ahead > 0 THEN PERFORM pg_sleep(ahead); END IF;
    {insert};
    COMMIT;
    id := id + rows_in_one;
  END LOOP;
END $$"""


class Writer:
    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._next = 1
        with bench.source.connect() as connection:
            connection.execute(_procedure(_TABLE).encode())

    def write(self, load: Load) -> float:
        """Returns the rate that it came to, in rows a second."""
        with self._bench.source.connect() as connection:
            began = time.monotonic()
            connection.execute(
                "CALL load(%s::bigint, %s::bigint, %s::float8, %s::bigint)",
                [self._next, load.transactions, load.per_second / load.rows_in_one, load.rows_in_one],
            )
            rate = load.rows / (time.monotonic() - began)
        self._next += load.rows
        return rate


@contextmanager
def _empty_slot(bench: Bench) -> Iterator[Slot]:
    with bench.filled([_TABLE], 0) as waiting, bench.source.copy(waiting) as slot:
        yield slot


# -- the runs ----------------------------------------------------------------------------------------------------------


def _webhook_drain(bench: Bench) -> float:
    with (
        bench.filled([_TABLE], min(bench.rows, _DRAIN_ROWS)) as waiting,
        Receiver() as receiver,
        bench.source.copy(waiting) as slot,
        living(slot, [sink("out", WEBHOOK, batch_size=WEBHOOK_BATCH)], endpoint=receiver.url) as life,
    ):
        done = life.drained()
        rate = done.rows / done.seconds
    bench.say(f"a drain to the webhook comes to {rate:,.0f} rows/s")
    return rate


def _webhook(bench: Bench, loads: dict[str, Load], number: int) -> None:
    one = sink("out", WEBHOOK, batch_size=WEBHOOK_BATCH)
    with (
        _empty_slot(bench) as slot,
        Receiver(latencies=True) as receiver,
        living(slot, [one], endpoint=receiver.url) as life,
    ):
        writer = Writer(bench)
        life.wait_streaming()
        seen = 0
        for case, load in loads.items():
            before = life.cpu_seconds()
            rate = writer.write(load)
            life.wait_for(life.delivered, seen + load.rows, "delivered")
            cpu = life.cpu_seconds() - before
            arrivals = receiver.arrivals()
            if len(arrivals) != seen + load.rows:
                raise ProductFailed(f"{len(arrivals)} messages at the receiver, not {seen + load.rows}")
            taken = arrivals[seen:]
            seen += load.rows
            _add(bench, case, SPILLWAY, number, taken, load, rate, life, cpu_us_per_row=cpu / load.rows * 1e6)


def _callback(bench: Bench, number: int) -> None:
    load = Load(CALLBACK_RATE, 16, left_out_seconds=_LEFT_OUT_JVM_SECONDS)
    with bench.folder() as folder:
        calls = folder / "calls"
        path = os.pathsep.join([str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": path, "SPEED_CALLBACKS": str(calls)}
        with _empty_slot(bench) as slot, living(slot, [sink("out", BLACKHOLE)], environment=environment) as life:
            writer = Writer(bench)
            life.wait_streaming()
            rate = writer.write(load)
            life.wait_for(life.delivered, load.rows, "delivered")
            life.finish()
            pairs = array("q", calls.read_bytes())
            arrivals = list(zip(pairs[::2], pairs[1::2], strict=True))
            if len(arrivals) != load.rows:
                raise ProductFailed(f"{len(arrivals)} calls of the sink for {load.rows} rows")
            _add(bench, CALLBACK, SPILLWAY, number, arrivals, load, rate, life)


def _debezium(bench: Bench, tool: str, poll_interval_ms: int | None, number: int) -> None:
    load = Load(CALLBACK_RATE, 16, left_out_seconds=_LEFT_OUT_JVM_SECONDS)
    with _empty_slot(bench) as slot:
        writer = Writer(bench)
        with debezium.Callbacks(slot, 1 + load.rows, poll_interval_ms=poll_interval_ms) as engine:
            writer.write(Load(1, 1))
            engine.wait_seen(1)
            rate = writer.write(load)
            calls = engine.wait_seen(1 + load.rows)
        query = "SELECT id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint FROM latency"
        with bench.source.connect() as connection:
            committed = {row[0]: int(str(row[1])) for row in connection.execute(query)}
    arrivals = [(at, committed[json.loads(key)["id"]]) for at, key in calls[1:]]
    _add(bench, CALLBACK, tool, number, arrivals, load, rate)


def _add(
    bench: Bench,
    case: str,
    tool: str,
    number: int,
    arrivals: Arrivals,
    load: Load,
    rate: float,
    life: Life | None = None,
    **more: float,
) -> None:
    if rate < load.per_second * _RATE_HELD:
        why = f"{tool}: the writer came to {rate:,.0f} rows/s, {load.per_second:,.0f} were asked for"
        bench.say(f"NO FIGURE for {case}: {why}")
        bench.results.fail(why, PART, case)
        return
    start = arrivals[0][1] + load.left_out_seconds * 1_000_000
    took = sorted((arrived - committed) / 1000 for arrived, committed in arrivals if committed >= start)
    values = {
        "p50_ms": percentile(took, 0.5),
        "p99_ms": percentile(took, 0.99),
        "p99_9_ms": percentile(took, 0.999),
        "max_ms": took[-1],
        "rows_per_second": rate,
        **more,
    }
    if life is not None:
        values[PRODUCT_RSS] = life.peak_rss_mb
    bench.add(PART, case, tool, number, values, counted=len(took))

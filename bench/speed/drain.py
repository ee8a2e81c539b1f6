"""Drains to the null sink beside ``pg_recvlogical`` and the bare reader; then to a file and a webhook; and Debezium.

The rows of 200 B have every tool, over TCP and over a Unix socket, and the bare reader also with the small window that
it does best with (``peers.bare``). The other sizes, Sequin's table and the mix of inserts, updates and deletes have
Spillway, ``pg_recvlogical`` and the limit. Debezium's engine has 2,000,000 rows, so that its JVM is warm in the second
half, and Spillway beside it the same ones; with its defaults, which is for information, it has one round.
"""

from __future__ import annotations

from oracle.product import ProductFailed
from peers import Measured, bare, debezium
from peers.bare import WINDOW_BYTES, WINDOW_PAUSE_US
from peers.source import TABLES, Slot, Waiting
from speed.bench import Bench, Run
from speed.receiver import Receiver

PART = "drain"
SINKS_PART = "sinks"
DEBEZIUM_PART = "debezium"

ROWS_200 = "200 B"
OTHERS = {
    "100 B": "rows_100",
    "400 B": "rows_400",
    "1.6 kB": "rows_1600",
    "Sequin's": "benchmark_records",
    "mix": "mixed",
}
EAGER, LIMIT = "bare reader, eager", "bare reader, 1 ms pauses (the limit)"
WINDOW = "bare reader, 1 ms pauses, small window"
LIMIT_UNIX = "bare reader, 1 ms pauses, Unix socket"
DEBEZIUM, DEBEZIUM_SCHEMAS = "Debezium's engine, schemas off", "Debezium's engine, defaults"
NULL, FILE, WEBHOOK = "null sink", "file", "webhook"
WEBHOOK_BATCH = 1_000


def _bare(
    bench: Bench,
    case: str,
    waiting: Waiting,
    tool: str,
    *,
    pause_us: int = 0,
    window_bytes: int = 0,
    unix: bool = False,
) -> Run:
    def drain(slot: Slot) -> Measured:
        return bare.drain(slot, pause_us=pause_us, receive_buffer_bytes=window_bytes, unix=unix)

    return bench.peer(PART, case, tool, waiting, drain)


def run(bench: Bench) -> None:
    with bench.filled([TABLES["rows_200"]], bench.rows) as waiting:
        bench.take_turns(
            [
                bench.null(PART, ROWS_200, waiting),
                bench.recvlogical(PART, ROWS_200, waiting),
                _bare(bench, ROWS_200, waiting, EAGER),
                _bare(bench, ROWS_200, waiting, LIMIT, pause_us=1000),
                _bare(bench, ROWS_200, waiting, WINDOW, pause_us=WINDOW_PAUSE_US, window_bytes=WINDOW_BYTES),
                bench.null(PART, ROWS_200, waiting, unix=True),
                bench.recvlogical(PART, ROWS_200, waiting, unix=True),
                _bare(bench, ROWS_200, waiting, LIMIT_UNIX, pause_us=1000, unix=True),
            ]
        )
    for case, table in OTHERS.items():
        with bench.filled([TABLES[table]], bench.rows) as waiting:
            bench.take_turns(
                [
                    bench.null(PART, case, waiting),
                    bench.recvlogical(PART, case, waiting),
                    _bare(bench, case, waiting, LIMIT, pause_us=1000),
                    bench.null(PART, case, waiting, unix=True),
                ]
            )


def run_sinks(bench: Bench) -> None:
    with bench.filled([TABLES["rows_200"]], bench.rows) as waiting:
        bench.take_turns(
            [
                lambda number: bench.drain(SINKS_PART, ROWS_200, NULL, waiting, number),
                lambda number: _file(bench, waiting, number),
                lambda number: _webhook(bench, waiting, number),
            ]
        )


def _file(bench: Bench, waiting: Waiting, number: int) -> None:
    with bench.folder() as folder:
        path = folder / "out.ndjson"

        def check(slot: Slot) -> None:
            with path.open("rb") as file:
                lines = sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
            if lines != slot.rows:
                raise ProductFailed(f"{lines} lines in the file, {slot.rows} were acknowledged")

        to = {"type": "file", "path": str(path)}
        bench.drain(SINKS_PART, ROWS_200, FILE, waiting, number, destination=to, check=check)


def _webhook(bench: Bench, waiting: Waiting, number: int) -> None:
    with Receiver() as receiver:

        def check(slot: Slot) -> None:
            told = receiver.told()
            bench.say(f"the receiver took {receiver.cpu_seconds():.2f} s of CPU for {told}")
            if told["messages"] != slot.rows:
                raise ProductFailed(f"{told['messages']} messages at the receiver, {slot.rows} were acknowledged")

        bench.drain(
            SINKS_PART,
            ROWS_200,
            WEBHOOK,
            waiting,
            number,
            destination={"type": "webhook", "http_endpoint": "receiver", "batch": True},
            endpoint=receiver.url,
            check=check,
            batch_size=WEBHOOK_BATCH,
        )


def run_debezium(bench: Bench) -> None:
    with bench.filled([TABLES["rows_200"]], 2 * bench.rows) as waiting:
        case = f"{ROWS_200}, {2 * bench.rows:,} rows"
        bench.take_turns(
            [
                bench.null(DEBEZIUM_PART, case, waiting),
                bench.peer(DEBEZIUM_PART, case, DEBEZIUM, waiting, debezium.drain),
            ]
        )
        bench.peer(DEBEZIUM_PART, case, DEBEZIUM_SCHEMAS, waiting, lambda s: debezium.drain(s, schemas=True))(0)

"""What the parts share: the source, the results, whose turn it is, and the peers as samples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from peers import Measured, recvlogical
from peers.source import Slot, Source, Table, Waiting
from speed.life import BLACKHOLE, MIB, StreamStart, living, sink
from speed.results import Results

FULL_ROWS = 1_000_000  # the issue's
NULL_TCP = "Spillway, null sink, TCP"
NULL_UNIX = "Spillway, null sink, Unix socket"
RECVLOGICAL = "pg_recvlogical, TCP"

Run = Callable[[int], None]  # one run of one tool in a round


@dataclass(slots=True)
class Bench:
    source: Source
    results: Results
    rows: int
    rounds: int
    full: bool
    impls: set[str] = field(default_factory=set)  # which twins of the product ran
    versions: dict[str, str] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def add(self, part: str, case: str, tool: str, number: int, values: Mapping[str, float], **detail: object) -> None:
        self.results.add(part, case, tool, number, values, detail)
        shown = ", ".join(f"{name} {value:,.5g}" for name, value in values.items())
        self.say(f"[{part}, round {number + 1}] {case}: {tool}: {shown}")

    def take_turns(self, runs: Sequence[Run]) -> None:
        """Each tool once, then each again: what the machine does meanwhile falls on all of them."""
        for number in range(self.rounds):
            for run in runs:
                run(number)

    @contextmanager
    def filled(self, tables: Sequence[Table], rows: int, *, batch: int = 10_000) -> Iterator[Waiting]:
        began = time.monotonic()
        waiting = self.source.fill(tables, rows, batch=batch)
        names = tables[0].name if len(tables) == 1 else f"{len(tables)} tables"
        self.say(f"{rows:,} changes of {names} wait, made in {time.monotonic() - began:.1f} s")
        try:
            yield waiting
        finally:
            self.source.drop(waiting)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="spillway-speed-") as name:
            yield Path(name)

    # -- tools ------------------------------------------------------------------------------------------------------
    def drain(
        self,
        part: str,
        case: str,
        tool: str,
        waiting: Waiting,
        number: int,
        *,
        destination: Mapping[str, object] = BLACKHOLE,
        unix: bool = False,
        endpoint: str | None = None,
        check: Callable[[Slot], None] | None = None,
        **more: object,
    ) -> None:
        """The product drains what waits into one sink. ``check`` looks behind the sink whether all is there."""
        with self.source.copy(waiting) as slot:
            one = sink("out", destination, **more)
            with living(slot, [one], unix=unix, endpoint=endpoint) as life:
                done = life.drained()
                life.finish()
                self.impls.add(life.impl)
                self.add(part, case, tool, number, done.values(life), sink=one, asked=life.asked)
            if check is not None:
                check(slot)

    def null(self, part: str, case: str, waiting: Waiting, *, unix: bool = False) -> Run:
        tool = NULL_UNIX if unix else NULL_TCP
        return lambda number: self.drain(part, case, tool, waiting, number, unix=unix)

    def peer(
        self,
        part: str,
        case: str,
        tool: str,
        waiting: Waiting,
        run: Callable[[Slot], Measured],
        *,
        stream: bool = False,
    ) -> Run:
        """A peer that drains a slot. ``stream``: its time is from the start of its process, of which START_REPLICATION
        is to be taken off."""

        def once(number: int) -> None:
            with self.source.copy(waiting) as slot:
                if stream:
                    measured, late_seconds = _timed(slot, run)
                else:
                    measured, late_seconds = run(slot), 0.0
            self.add_measured(part, case, tool, number, measured, late_seconds=late_seconds)

        return once

    def recvlogical(self, part: str, case: str, waiting: Waiting, *, unix: bool = False) -> Run:
        tool = "pg_recvlogical, Unix socket" if unix else RECVLOGICAL
        return self.peer(part, case, tool, waiting, lambda s: recvlogical.drain(s, unix=unix), stream=True)

    def add_measured(
        self, part: str, case: str, tool: str, number: int, measured: Measured, *, late_seconds: float = 0.0
    ) -> None:
        seconds = measured.seconds - late_seconds
        values = {"rows_per_second": measured.rows / seconds}
        if late_seconds:
            values["gross_rows_per_second"] = measured.rows_per_second
        if measured.cpu_seconds:
            values["cpu_us_per_row"] = measured.cpu_seconds / measured.rows * 1e6
        walsender = measured.detail.get("walsender_cpu_seconds")
        if isinstance(walsender, float):
            values["walsender_us_per_row"] = walsender / measured.rows * 1e6
        if measured.peak_rss_bytes:
            values["peak_rss_mb"] = measured.peak_rss_bytes / MIB
        second_half = measured.detail.get("second_half_rows_per_second")
        if isinstance(second_half, float):
            values["second_half_rows_per_second"] = second_half
        version = measured.detail.get("version")
        if isinstance(version, str):
            self.versions[tool.partition(",")[0]] = version
        self.add(part, case, tool, number, values, **measured.detail)


def _timed(slot: Slot, run: Callable[[Slot], Measured]) -> tuple[Measured, float]:
    """Runs it; and how long after its start START_REPLICATION was."""
    stream, done = StreamStart(slot), Event()

    def look() -> None:
        while not stream.look() and not done.wait(0.02):
            pass

    watching = Thread(target=look)
    began = time.time()
    watching.start()
    try:
        measured = run(slot)
    finally:
        done.set()
        watching.join()
        stream.close()
    return measured, max(0.0, stream.at - began) if stream.at is not None else 0.0

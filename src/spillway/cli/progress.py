"""Waiting for backfills: bars on a terminal, elsewhere a line when something has changed.

`follow` looks again every second until everything has ended, and raises SpillwayError ``backfill_failed`` for what
ended otherwise than completed: a script that waits for its rows wants to know. Ctrl-C ends the looking, not the
backfills.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spillway.cli import output
from spillway.errors import SpillwayError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LOOK_SECONDS = 1.0
LINE_SECONDS = 10.0  # a line of the same backfill at most so often, unless its state changes

ENDED = ("completed", "done", "failed", "cancelled")
WELL = ("completed", "done")

Look = Callable[[], list[output.Row]]


def follow(look: Look, *, quiet: bool = False) -> list[output.Row]:
    """Look until all of the rows, backfills as HTTP describes them, have ended; gives them back. ``quiet``: show
    nothing."""
    if quiet:
        shown: AbstractContextManager[_Lines | _Bars | None] = nullcontext()
    elif sys.stdout.isatty():
        shown = _Bars()
    else:
        shown = nullcontext(_Lines())
    with shown as display:
        while True:
            rows = look()
            if display is not None:
                display.show(rows)
            if all(row.get("state") in ENDED for row in rows):
                break
            time.sleep(LOOK_SECONDS)
    bad = [row for row in rows if row.get("state") not in WELL]
    if bad:  # an error says itself what to do
        raise SpillwayError(
            "backfill_failed", "; ".join(f"{row.get('table')}: {why(row) or row['state']}" for row in bad)
        )
    return rows


def share(row: output.Row) -> float | None:
    """How much is done, from 0 to 1; None: not known. The estimate may be too low."""
    if row.get("state") in WELL:
        return 1.0
    done, estimate = row.get("rows_processed_count"), row.get("rows_initial_count")
    if not isinstance(done, int | float) or not isinstance(estimate, int | float) or estimate <= 0:
        return None
    return min(done / estimate, 0.99)


def percent(row: output.Row) -> str:
    known = share(row)
    return "-" if known is None else f"{int(known * 100)} %"


def why(row: output.Row) -> str:
    """Why it failed, or does not read just now."""
    return str(row.get("error") or row.get("waiting") or "")


@dataclass
class _Lines:
    _told: dict[str, tuple[object, str, float]] = field(default_factory=dict)  # by id: state, line, when

    def show(self, rows: Sequence[output.Row]) -> None:
        now = time.monotonic()
        for row in rows:
            id_, state, line = str(row["id"]), row["state"], _line(row)
            was, told, when = self._told.get(id_, (None, "", 0.0))
            if state != was or (line != told and now - when >= LINE_SECONDS):
                self._told[id_] = (state, line, now)
                print(output.printable(line), flush=True)


def _line(row: output.Row) -> str:
    return f"{row.get('table')}: {_said(row)}"


def _said(row: output.Row) -> str:
    estimate, rows = row.get("rows_initial_count"), f"{row.get('rows_processed_count') or 0} rows"
    if isinstance(estimate, int) and row.get("state") not in ENDED:
        rows += f" of about {estimate} ({percent(row)})"
    parts = (
        str(row.get("state")),
        rows,
        f"{rate(row)} rows/s" if rate(row) else "",
        f"{_left(row)} left" if _left(row) else "",
    )
    return ", ".join(filter(None, parts)) + (f"; {why(row)}" if why(row) else "")


def rate(row: output.Row) -> str:
    per_second = row.get("rows_per_second")
    known = isinstance(per_second, int | float) and per_second > 0 and row.get("state") == "active"
    return f"{per_second:,.0f}" if known else ""


def _left(row: output.Row) -> str:
    left = row.get("seconds_left")
    return output.seconds(left) if left is not None and row.get("state") == "active" else ""


class _Bars:
    def __init__(self) -> None:
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress = _progress()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, rows: Sequence[output.Row]) -> None:
        for row in rows:
            known = share(row)
            said = output.printable(_said(row))
            task = self._tasks.get(str(row["id"]))
            if task is None:
                label = output.printable(str(row["table"]))
                task = self._tasks[str(row["id"])] = self._progress.add_task(label, total=None, said=said)
            total = None if known is None else 1.0
            self._progress.update(task, total=total, completed=known or 0.0, said=said)


def _progress() -> Progress:
    from rich.console import Console  # noqa: PLC0415 - only on a terminal
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    label, said = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[said]}", markup=False)
    return Progress(label, BarColumn(), said, console=console)

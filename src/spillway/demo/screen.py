"""What is shown: the story in sentences, and a line of figures a second; live on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

_HEADINGS = ("second", "changes", "memory", "peak", "waiting", "on disk", "slot behind", "broken sink", "healthy sink")
_SHOWN = 10
_PLAIN_EVERY = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at everything."""

    second: float
    changes: int  # committed in the source since the start
    memory_mb: float
    peak_mb: float
    waiting: int  # messages, by the engine's own account
    disk_mb: float
    slot_behind_mb: float
    state: str
    audit_seconds: float | None

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.second:.0f}",
            f"{self.changes:,}",
            f"{self.memory_mb:.0f} MB",
            f"{self.peak_mb:.0f} MB",
            f"{self.waiting:,}",
            f"{self.disk_mb:.0f} MB",
            f"{self.slot_behind_mb:.1f} MB",
            self.state,
            "-" if self.audit_seconds is None else f"{self.audit_seconds:.1f} s late",
        )


class Screen:
    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._samples: deque[Sample] = deque(maxlen=_SHOWN)
        self._live: Live | None = None
        self._count = 0

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=self._live is None)

    def headline(self, text: str) -> None:
        self.say(f"\n{text}", "bold")
        self._count = 0

    def show(self, sample: Sample) -> None:
        self._samples.append(sample)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            if self._count == 0:
                self._plain(_HEADINGS)
            if self._count % _PLAIN_EVERY == 0:
                self._plain(sample.cells())
        self._count += 1

    def _plain(self, cells: tuple[str, ...]) -> None:
        widths = (6, 9, 8, 8, 9, 8, 12, 12, 12)
        self.say(" ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))

    def _table(self) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
        for heading in _HEADINGS:
            table.add_column(heading, justify="right")
        for sample in self._samples:
            table.add_row(*sample.cells(), style="bold" if sample is self._samples[-1] else "")
        return table

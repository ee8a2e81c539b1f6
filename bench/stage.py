"""What the benches share: the judge's tools on the path, and a report that is honest.

Every bench starts real processes, kills them with SIGKILL, reads VmHWM of ``/proc`` and the memory cgroup, and takes
times at the far side of a sink. It prints each line with its figure and its bound, writes them as JSON and Markdown,
and ends with 1 if a line does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
if str(REPOSITORY / "tests") not in sys.path:
    sys.path.insert(0, str(REPOSITORY / "tests"))

from oracle.product import ProductFailed  # noqa: E402 - on the path by now

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    what: str
    figure: float
    unit: str
    bound: str  # "" where the figure is for information
    holds: bool

    def __str__(self) -> str:
        verdict = "      " if not self.bound else ("  ok  " if self.holds else "FAILED")
        bound = f"   ({self.bound})" if self.bound else ""
        return f"[{verdict}] {self.what}: {self.figure:,.6g} {self.unit}{bound}"


class Report:
    """Lines as they come, then a verdict. ``name`` is the file's; ``parameters`` say how the bench was run."""

    def __init__(self, name: str, parameters: Mapping[str, object]) -> None:
        self.name = name
        self.parameters = dict(parameters)
        self.lines: list[Line] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def at_most(self, what: str, figure: float, bound: float, unit: str) -> None:
        self._add(Line(what, figure, unit, f"at most {bound:,.6g} {unit}", figure <= bound))

    def at_least(self, what: str, figure: float, bound: float, unit: str) -> None:
        self._add(Line(what, figure, unit, f"at least {bound:,.6g} {unit}".rstrip(), figure >= bound))

    def equal(self, what: str, figure: float, bound: float, unit: str = "") -> None:
        self._add(Line(what, figure, unit, f"must be {bound:,.6g} {unit}".rstrip(), figure == bound))

    def inform(self, what: str, figure: float, unit: str) -> None:
        self._add(Line(what, figure, unit, "", True))

    def failed(self, what: str) -> None:
        self._add(Line(what, 1, "", "must not happen", False))

    @contextmanager
    def product_may_fail(self, part: str = "") -> Iterator[None]:
        """If it does, that is a line that does not hold, and the bench goes on behind this."""
        try:
            yield
        except ProductFailed as error:
            self.failed(f"{part}: the product: {_first_line(error)}" if part else f"the product: {_first_line(error)}")
            self.say(str(error))

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        self.say(str(line))

    @property
    def good(self) -> bool:
        return bool(self.lines) and all(line.holds for line in self.lines)

    def finish(self, folder: Path) -> int:
        """Writes NAME.json and NAME.md; returns the exit status."""
        folder.mkdir(parents=True, exist_ok=True)
        seconds = round(time.monotonic() - self._began, 1)
        whole = {
            "bench": self.name,
            "good": self.good,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "machine": machine(),
            "parameters": self.parameters,
            "lines": [asdict(line) for line in self.lines],
        }
        (folder / f"{self.name}.json").write_text(json.dumps(whole, indent=2) + "\n")
        (folder / f"{self.name}.md").write_text(self._markdown(whole))
        self.say(f"{'all lines hold' if self.good else 'A LINE DOES NOT HOLD'}; {folder / self.name}.md")
        return 0 if self.good else 1

    def _markdown(self, whole: Mapping[str, object]) -> str:
        lines = [f"# {self.name}: {'holds' if self.good else 'DOES NOT HOLD'}", ""]
        lines.append(f"{whole['at']}, {whole['seconds']} s, {whole['machine']}")
        lines += ["", *(f"- `{name}`: {value}" for name, value in self.parameters.items())]
        lines += ["", "| what | figure | bound | holds |", "|---|---:|---|---|"]
        for line in self.lines:
            holds = "" if not line.bound else ("yes" if line.holds else "**no**")
            lines.append(f"| {line.what} | {line.figure:,.6g} {line.unit} | {line.bound} | {holds} |")
        return "\n".join(lines) + "\n"


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def commit() -> str:
    """The checkout's commit, marked when the tree differs from it."""
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def parameters(options: argparse.Namespace, *left_out: str) -> dict[str, object]:
    """What is said of a run: how it was called, and of which commit it is."""
    called = {name: value for name, value in vars(options).items() if name not in ("out", *left_out)}
    return {**called, "commit": commit()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * share) - 1]

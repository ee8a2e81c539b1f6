"""What is printed and written: ``speed.json``, ``speed.md``, the plots.

The JSON has every sample as it was taken; the Markdown the bounds with their verdicts, then a table for each part.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import stage
from speed import bounds
from speed.results import PRODUCT_RSS, Results, Which

# Of each value that a table may show: its heading, and how it is written.
_COLUMNS: Mapping[str, tuple[str, str]] = {
    "rows_per_second": ("rows/s", ",.0f"),
    "second_half_rows_per_second": ("second half, rows/s", ",.0f"),
    "gross_rows_per_second": ("gross, rows/s", ",.0f"),
    "p50_ms": ("p50, ms", ".2f"),
    "p99_ms": ("p99, ms", ".2f"),
    "p99_9_ms": ("p99.9, ms", ".2f"),
    "max_ms": ("max, ms", ".1f"),
    "cpu_us_per_row": ("CPU, µs a row", ".2f"),
    "cpu_ns_per_value": ("CPU, ns a value", ".0f"),
    "walsender_us_per_row": ("walsender, µs a row", ".2f"),
    "start_seconds": ("start, s", ".2f"),
    "start_cpu_seconds": ("start, s of CPU", ".2f"),
    "most_stored": ("waiting in the store, at most", ",.0f"),
    PRODUCT_RSS: ("peak RSS, MB", ".0f"),
    "peak_rss_mb": ("peak RSS, MB", ".0f"),
}


def write(folder: Path, results: Results, parameters: Mapping[str, object], whole_seconds: float) -> bool:
    """Writes and prints everything; whether all that was measured holds and nothing failed."""
    judged = list(bounds.lines(results))
    at = datetime.now(UTC).isoformat(timespec="seconds")
    good = not results.failures and all(line.holds is not False for line in judged)
    head = {
        "bench": "speed",
        "good": good,
        "at": at,
        "seconds": round(whole_seconds),
        "machine": f"{stage.machine()}, {_processor()}",
        "parameters": dict(parameters),
    }
    judgements = [
        {"what": one.what, "bound": one.bound_text, "verdict": one.verdict, "unit": one.unit}
        | {"figure": asdict(one.spread) if one.spread else None}
        for one in judged
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**head, "bounds": judgements, **results.json()}, indent=1, default=str)
    (folder / "speed.json").write_text(text + "\n")
    (folder / "speed.md").write_text(_markdown(head, judged, results))
    for part in results.parts():
        print("\n".join(["", part, *_table(results, part)]))
    print()
    for line in judged:
        print(f"[{line.verdict:12}] {line.what}: {line.figure_text}  ({line.bound_text})")
    for part, why in results.failures.items():
        print(f"[FAILED      ] {part}: {why}")
    return good


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    """Of what every run has: the compiler and the interpreter are in the machine's line."""
    gcc = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {"gcc": gcc}


def _markdown(head: Mapping[str, object], judged: Sequence[bounds.Line], results: Results) -> str:
    short = sum(line.holds is False for line in judged)
    missing = sum(line.spread is None for line in judged)
    title = "holds" if head["good"] else f"{short} fall short, {len(results.failures)} parts failed"
    lines = [f"# speed: {title}", ""]
    if missing:
        lines += [f"{missing} not measured in this run.", ""]
    lines += [f"**The part `{part}` failed and has no figures:** {why}\n" for part, why in results.failures.items()]
    lines.append(f"{head['at']}, {head['seconds']} s, {head['machine']}")
    parameters = head["parameters"]
    assert isinstance(parameters, dict)
    lines += ["", *(f"- `{name}`: {value}" for name, value in parameters.items())]
    lines += [
        "",
        "Medians of the rounds, with the least and the most. Ratios are taken within a round. What is timed, and",
    ]
    lines += ["how: `bench/speed/__init__.py` and the docstring of each part beside it.", ""]
    lines += ["| figure | median (least to most) | required | |", "|---|---:|---|---|"]
    for line in judged:
        verdict = f"**{line.verdict}**" if line.holds is False else line.verdict
        lines.append(f"| {line.what} | {line.figure_text} | {line.bound_text} | {verdict} |")
    for part in results.parts():
        picture = part.replace(" ", "-")
        lines += ["", f"## {part}", "", *_table(results, part)]
        if part not in results.failures:
            lines += ["", f"![{part}](speed/{picture}.png)"]
    lines += ["", "## Configuration", "", *_configuration(results)]
    return "\n".join(lines) + "\n"


def _table(results: Results, part: str) -> list[str]:
    rows = results.rows(part)
    there = {name for sample in results.samples if sample.part == part for name in sample.values}
    headings = list(dict.fromkeys(_COLUMNS[name][0] for name in _COLUMNS if name in there))
    lines = [f"| what | tool | {' | '.join(headings)} |", f"|---|---|{'---:|' * len(headings)}"]
    for case, tool in rows:
        cells = dict.fromkeys(headings, "")
        for name, (heading, form) in _COLUMNS.items():
            spread = results.spread(Which(part, case, tool, name))
            if spread is not None:
                cells[heading] = f"{spread.median:{form}}"
                if name in ("rows_per_second", "p99_ms") and spread.count > 1:
                    cells[heading] += f" ({spread.low:{form}} to {spread.high:{form}})"
        lines.append(f"| {case} | {tool} | {' | '.join(cells.values())} |")
    return lines


def _configuration(results: Results) -> list[str]:
    """How each tool was set, once: from the last of its samples."""
    told: dict[str, Mapping[str, object]] = {}
    for sample in results.samples:
        if sample.detail:
            told[f"{sample.part}: {sample.tool}"] = sample.detail
    lines = []
    for name, detail in told.items():
        shown = {key: value for key, value in detail.items() if isinstance(value, str | bool | dict | list)}
        if shown:
            lines.append(f"- {name}: `{json.dumps(shown, default=str)}`")
    lines.append(
        "- Debezium's properties: `bench/peers/debezium/engine.properties`; the source's: `bench/peers/source.py`"
    )
    return lines

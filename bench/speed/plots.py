"""The pictures: ``bench/results/speed/PART.png`` and ``.svg``. matplotlib is in the dependency group ``bench``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speed import drain, fanout, growth, latency, outage, search
from speed.results import PRODUCT_RSS, Results, Spread, Which

_OURS, _THEIRS = "#1f6feb", "#9aa4af"


def draw(folder: Path, results: Results) -> None:
    mpl.use("Agg")
    mpl.rcParams.update(
        {"svg.hashsalt": "spillway", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part in results.parts():
        if part == latency.PART:
            figure = _latency(results)
        elif part == growth.PART:
            figure = _growth(results)
        else:
            figure = _rates(results, part, _TITLES[part])
        for kind in ("png", "svg"):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(folder / f"{part.replace(' ', '-')}.{kind}", dpi=120, metadata=metadata)
        plt.close(figure)


_TITLES = {
    drain.PART: "Draining a slot to the null sink",
    drain.SINKS_PART: "Draining a slot to sinks on this machine, 200 B",
    drain.DEBEZIUM_PART: "Draining a slot: Debezium's engine",
    search.PART: "Draining a slot to OpenSearch, 200 B",
    outage.PART: "The sink in outage, and back",
    fanout.PART: "Sinks on one slot",
}


def _colour(tool: str) -> str:
    theirs = ("pg_recvlogical", "bare", "Debezium", "pgsync")
    return _THEIRS if tool.startswith(theirs) else _OURS


def _rates(results: Results, part: str, title: str) -> Figure:
    """Bars of rows per second, with the least and the most of the rounds."""
    rows = results.rows(part)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.27 * len(rows)), layout="constrained")
    labels, at, place, last = [], [], 0.0, ""
    for case, tool in rows:
        place += 1.6 if last and case != last else 1.0
        last = case
        spread = results.spread(Which(part, case, tool))
        assert spread is not None
        axes.barh(place, spread.median, color=_colour(tool), xerr=_error(spread), error_kw={"lw": 0.8})
        axes.text(spread.high, place, f"  {spread.median:,.0f}", va="center", fontsize=8)
        labels.append(f"{case}: {tool}")
        at.append(place)
    axes.set_yticks(at, labels)
    axes.invert_yaxis()
    axes.set_xlabel("rows per second")
    axes.set_title(title)
    axes.margins(x=0.12)
    return figure


def _error(spread: Spread) -> list[list[float]]:
    return [[spread.median - spread.low], [spread.high - spread.median]]


def _latency(results: Results) -> Figure:
    rows = results.rows(latency.PART)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
    for number, (name, heading) in enumerate((("p50_ms", "p50"), ("p99_ms", "p99"), ("p99_9_ms", "p99.9"))):
        medians = [results.spread(Which(latency.PART, case, tool, name)) for case, tool in rows]
        values = [spread.median if spread else 0.0 for spread in medians]
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        axes.barh(places, values, height=0.25, label=heading)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{case}: {tool}" for case, tool in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds from commit to arrival")
    axes.set_title("Latency")
    axes.legend()
    return figure


def _growth(results: Results) -> Figure:
    figure, grid = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained", squeeze=False)
    kinds = (
        (growth.BACKLOG, "rows in the backlog", "cpu_us_per_row", "CPU, µs a change"),
        (growth.TABLES_CASE, "tables", "cpu_us_per_row", "CPU, µs a change"),
        (growth.COLUMNS, "columns", "cpu_ns_per_value", "CPU, ns a value"),
    )
    for column, (kind, across, value, up) in enumerate(kinds):
        _line(grid[0][column], results, kind, value, up)
        _line(grid[1][column], results, kind, PRODUCT_RSS, "peak RSS, MB")
        grid[1][column].set_xlabel(across)
    figure.suptitle("Growth")
    return figure


def _line(axes: Axes, results: Results, kind: str, value: str, label: str) -> None:
    across, medians, low, high = [], [], [], []
    for case, tool in results.rows(growth.PART):
        name, _, count = case.partition(": ")
        spread = results.spread(Which(growth.PART, case, tool, value)) if name == kind else None
        if spread is not None:
            across.append(int(count.replace(",", "")))
            medians.append(spread.median)
            low.append(spread.low)
            high.append(spread.high)
    axes.plot(across, medians, "o-", color=_OURS)
    axes.fill_between(across, low, high, color=_OURS, alpha=0.2, lw=0)
    axes.set_xscale("log")
    if high:
        axes.set_ylim(0, 1.1 * max(high))
    axes.set_ylabel(label)

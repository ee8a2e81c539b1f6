"""What the figures must come to: the table of the issue, line by line, judged on the medians of the rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from speed import drain, fanout, growth, latency, outage, search
from speed.bench import NULL_TCP, NULL_UNIX, RECVLOGICAL
from speed.life import LIMIT_MB
from speed.results import PRODUCT_RSS, Results, Spread, Which

RSS_OVER_LIMIT_MB = 100

Kind = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Line:
    what: str
    spread: Spread | None  # None: not measured
    unit: str = ""
    kind: Kind | None = None  # None: for information
    bound: float = 0.0
    aim: str = ""

    @property
    def holds(self) -> bool | None:
        if self.spread is None or self.kind is None:
            return None
        return self.spread.median >= self.bound if self.kind == "at least" else self.spread.median <= self.bound

    @property
    def verdict(self) -> str:
        if self.spread is None:
            return "not measured"
        return {None: "", True: "holds", False: "FALLS SHORT"}[self.holds]

    @property
    def bound_text(self) -> str:
        if self.kind is None:
            return "reported"
        return f"{self.kind} {self.bound:g} {self.unit}".rstrip() + self.aim

    @property
    def figure_text(self) -> str:
        if self.spread is None:
            return "–"
        one = self.spread
        unit = f" {self.unit}" if self.unit else ""
        return f"{one.median:.3g}{unit} ({one.low:.3g} to {one.high:.3g})"


def lines(results: Results) -> Iterator[Line]:
    def ratio(what: str, over: Which, under: Which, kind: Kind | None = None, bound: float = 0, aim: str = "") -> Line:
        return Line(what, results.ratio(over, under), "", kind, bound, aim)

    def figure(what: str, which: Which, unit: str, kind: Kind | None = None, bound: float = 0) -> Line:
        return Line(what, results.spread(which), unit, kind, bound)

    null = Which(drain.PART, drain.ROWS_200, NULL_TCP)
    unix = Which(drain.PART, drain.ROWS_200, NULL_UNIX)
    recvlogical = Which(drain.PART, drain.ROWS_200, RECVLOGICAL)
    limit = Which(drain.PART, drain.ROWS_200, drain.LIMIT)
    yield ratio("null sink, 200 B, TCP / `pg_recvlogical`", null, recvlogical, "at least", 1.3, " (aim: 2)")
    yield ratio("null sink, 200 B, Unix socket / `pg_recvlogical` over TCP", unix, recvlogical, "at least", 1.8)
    yield ratio("null sink, 200 B, TCP / bare reader with 1 ms pauses (the limit)", null, limit, "at least", 0.5)
    yield from _debezium(results)
    yield from _search(results)
    yield from _outage(results)
    called = Which(latency.PART, latency.CALLBACK, latency.SPILLWAY)
    what = "commit to callback of the null sink, 500 single-row commits/s"
    yield figure(f"{what}, p50", _value(called, "p50_ms"), "ms", "at most", 1)
    yield figure(f"{what}, p99", _value(called, "p99_ms"), "ms", "at most", 3)
    hook = Which(latency.PART, latency.webhook_case(1_000), latency.SPILLWAY, "p99_ms")
    yield figure("commit to arrival at a local webhook, 1,000/s, p99", hook, "ms", "at most", 15)
    many = Which(fanout.PART, fanout.MANY_TABLES, fanout.tool(25))
    one = Which(fanout.PART, fanout.MANY_TABLES, fanout.tool(1))
    yield ratio("25 sinks on 25 tables / 1 sink on 25 tables", many, one, "at least", 0.85)
    yield Line("CPU of a further sink, for each row it gets", _further_sink(results), "µs")
    yield from _growth(results)
    yield from _memory(results)


def _value(which: Which, value: str) -> Which:
    return Which(which.part, which.case, which.tool, value)


def _debezium(results: Results) -> Iterator[Line]:
    cases = {case for case, _ in results.rows(drain.DEBEZIUM_PART)} or {""}
    for case in cases:
        ours = Which(drain.DEBEZIUM_PART, case, NULL_TCP)
        for tool, required in ((drain.DEBEZIUM, True), (drain.DEBEZIUM_SCHEMAS, False)):
            theirs = Which(drain.DEBEZIUM_PART, case, tool, "second_half_rows_per_second")
            what = f"null sink / {tool}, second half of the rows"
            yield Line(what, results.ratio(ours, theirs), "", "at least" if required else None, 3)
        memory = results.ratio(
            _value(ours, PRODUCT_RSS), Which(drain.DEBEZIUM_PART, case, drain.DEBEZIUM, "peak_rss_mb")
        )
        yield Line("peak RSS / that of Debezium's engine", memory, "", "at most", 0.2)


def _search(results: Results) -> Iterator[Line]:
    for case, required in ((search.DYNAMIC, True), (search.EXPLICIT, False)):
        ours, theirs = (Which(search.PART, case, tool) for tool in (search.SPILLWAY, search.BULK))
        what = f"OpenSearch, {case} / {search.BULK}"
        yield Line(what, results.ratio(ours, theirs), "", "at least" if required else None, 0.85)
    ours = Which(search.PART, search.DYNAMIC, search.SPILLWAY)
    pgsync = Which(search.PART, search.DYNAMIC, search.PGSYNC)
    yield Line("OpenSearch / pgsync in WAL mode", results.ratio(ours, pgsync), "", "at least", 8)
    explicit = _value(Which(search.PART, search.EXPLICIT, search.SPILLWAY), "rows_per_second")
    yield Line("OpenSearch, explicit mapping / dynamic mapping", results.ratio(explicit, ours))


def _outage(results: Results) -> Iterator[Line]:
    for case, least in ((outage.ROWS_200, 0.6), (outage.ROWS_18K, 0.8)):
        spill, plain = (Which(outage.PART, case, tool) for tool in (outage.SPILL, outage.DRAIN))
        yield Line(f"spill rate / drain to the null sink, {case}", results.ratio(spill, plain), "", "at least", least)
    for case in (outage.ROWS_200, outage.ROWS_18K):
        back, plain = (Which(outage.PART, case, tool) for tool in (outage.CATCH_UP, outage.DRAIN))
        yield Line(f"catch-up rate / drain to the null sink, {case}", results.ratio(back, plain), "", "at least", 0.8)


def _further_sink(results: Results) -> Spread | None:
    few, many = (
        results.by_round(Which(fanout.PART, fanout.ONE_TABLE, fanout.tool(count), "cpu_us_per_row"))
        for count in (1, 25)
    )
    values = [(many[number] - few[number]) / 24 for number in few if number in many]
    return Spread.of(values) if values else None


def _growth(results: Results) -> Iterator[Line]:
    """Each backlog against the smallest, and the largest as the one that is judged."""
    names = [case for case, _ in results.rows(growth.PART) if case.startswith(growth.BACKLOG)]
    smallest = growth.case(growth.BACKLOG, growth.SMALL[0])
    largest = growth.case(growth.BACKLOG, growth.LARGE_FULL[-1])
    for name in dict.fromkeys([*names, largest]):
        if name == smallest:
            continue
        over, under = (Which(growth.PART, one, growth.SPILLWAY, "cpu_us_per_row") for one in (name, smallest))
        kind: Kind | None = "at most" if name == largest else None
        yield Line(f"CPU per change, {name} / {smallest}", results.ratio(over, under), "", kind, 1.1)


def _memory(results: Results) -> Iterator[Line]:
    """Of every run: the one with the most is what is judged."""
    found = [value for _, value in results.named(PRODUCT_RSS)]
    most = Spread(max(found), min(found), max(found), len(found)) if found else None
    bound = LIMIT_MB + RSS_OVER_LIMIT_MB
    yield Line(f"peak RSS, the most of {len(found)} runs", most, "MB", "at most", bound)

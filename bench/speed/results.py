"""What was measured: samples, and their medians over the rounds.

A `Sample` is one run of one tool: ``part``, ``case`` (what is drained, at which rate, ...), ``tool``, the round, and
named numbers with their units in the names. ``Results.ratio`` compares two of them round by round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

PRODUCT_RSS = "product_peak_rss_mb"  # every sample of the product has it


@dataclass(frozen=True, slots=True)
class Sample:
    part: str
    case: str
    tool: str
    round: int
    values: dict[str, float]
    detail: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Which:
    """One figure: a value of a tool in a case of a part."""

    part: str
    case: str
    tool: str
    value: str = "rows_per_second"


class Results:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.failures: dict[str, str] = {}  # by part, or part and case

    def add(
        self,
        part: str,
        case: str,
        tool: str,
        number: int,
        values: Mapping[str, float],
        detail: Mapping[str, object] | None = None,
    ) -> None:
        if f"{part}, {case}" in self.failures:
            return
        self.samples.append(Sample(part, case, tool, number, dict(values), dict(detail or {})))

    def fail(self, why: str, part: str, case: str | None = None) -> None:
        """What failed has no figures: those of other rounds are forgotten, those to come are not taken."""
        self.failures[part if case is None else f"{part}, {case}"] = why
        self.samples = [one for one in self.samples if one.part != part or case not in (None, one.case)]

    def parts(self) -> list[str]:
        return list(dict.fromkeys(sample.part for sample in self.samples))

    def rows(self, part: str) -> list[tuple[str, str]]:
        """(case, tool) of a part: cases in the order in which they were first measured, each with its tools."""
        pairs = dict.fromkeys((sample.case, sample.tool) for sample in self.samples if sample.part == part)
        cases = dict.fromkeys(case for case, _ in pairs)
        return [(case, tool) for case in cases for of, tool in pairs if of == case]

    def by_round(self, which: Which) -> dict[int, float]:
        return {
            sample.round: sample.values[which.value]
            for sample in self.samples
            if (sample.part, sample.case, sample.tool) == (which.part, which.case, which.tool)
            and which.value in sample.values
        }

    def spread(self, which: Which) -> Spread | None:
        values = list(self.by_round(which).values())
        return Spread.of(values) if values else None

    def ratio(self, a: Which, b: Which) -> Spread | None:
        """a / b of each round that has both."""
        over, under = self.by_round(a), self.by_round(b)
        values = [over[number] / under[number] for number in over if under.get(number)]
        return Spread.of(values) if values else None

    def named(self, value: str) -> Iterator[tuple[Sample, float]]:
        for sample in self.samples:
            if value in sample.values:
                yield sample, sample.values[value]

    def json(self) -> dict[str, object]:
        return {"failures": self.failures, "samples": [asdict(sample) for sample in self.samples]}

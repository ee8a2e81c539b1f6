"""The parts, in the order in which they are measured. A part's name is that of its samples."""

from __future__ import annotations

from collections.abc import Callable

from speed import drain, fanout, growth, latency, outage, search
from speed.bench import Bench

PARTS: dict[str, Callable[[Bench], None]] = {
    drain.PART: drain.run,
    drain.SINKS_PART: drain.run_sinks,
    drain.DEBEZIUM_PART: drain.run_debezium,
    search.PART: search.run,
    latency.PART: latency.run,
    outage.PART: outage.run,
    fanout.PART: fanout.run,
    growth.PART: growth.run,
}

"""What Prometheus scrapes: names, labels and meanings are a contract with dashboards (docs/operations.md).

Two sources. What *happens* is counted here by the flow, as it happens: deliveries, rejections, the time from commit to
acknowledgement. What *is* (memory, lag, backlog, state) is read at the scrape from the same status dictionary that
``/api/status`` answers, so the two never disagree and nothing has to be kept up to date.

Counting costs one dictionary look-up and an addition for a whole batch: the numbers are plain integers of this module
and become Prometheus families only at the scrape. Everything is called from the event loop's thread.

Cardinality is bounded: a sink has at most `MAX_REASONS` reasons and `MAX_TABLES` tables that are being backfilled, what
comes after them is counted as ``other``. The numbers of a backfill are those that the store keeps: they go on after a
restart, and end with it. A value that is unknown (the lag of a source that cannot be reached) has no sample: a gap in
the graph, never a false zero.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

SINK_STATES = ("idle", "caught_up", "behind", "retrying", "parked", "paused", "full", "down", "stalled", "gap")

# Fine up to a second, where a healthy sink lives; then what an outage looks like, up to half a day.
DELIVERY_BUCKETS_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
    7200.0, 43200.0,
)  # fmt: skip

MAX_REASONS = 50
MAX_TABLES = 100
OTHER = "other"

# Per sink: metric, key of the status, meaning.
_SINK_GAUGES = (
    ("spillway_backlog_messages", "backlog_messages", "Durable, unresolved messages of the sink in the store"),
    ("spillway_backlog_bytes", "backlog_bytes", "Bytes of the messages of the sink in the store"),
    ("spillway_backlog_oldest_seconds", "backlog_oldest_seconds", "Age of the oldest message in the store"),
    ("spillway_parked_keys", "parked_keys", "Keys whose head was rejected or waits for its retry"),
    ("spillway_dead_letters", "dead_letters", "Messages given up on, kept for retry, export or discard"),
    ("spillway_due_refreshes", "due_refreshes", "Documents to be made anew, since a related table has changed"),
    ("spillway_due_refreshes_oldest_seconds", "due_refreshes_oldest_seconds", "Age of the oldest due refresh"),
    ("spillway_sink_memory_messages", "messages_in_memory", "Messages of the sink in memory"),
    ("spillway_sink_memory_bytes", "bytes_in_memory", "Bytes of the messages of the sink in memory"),
)


# Per sink: metric, key of the status, meaning; of this run.
_SINK_COUNTERS = (
    ("spillway_messages_compacted", "compacted", "Messages of which a later image of their row waits, removed"),
    ("spillway_enrichment_queries", "enrichment_queries", "Queries for the enrichment of the sink's messages"),
    (
        "spillway_enrichment_repeated",
        "enrichment_repeated",
        "Of these, asked again because a snapshot did not see the change yet",
    ),
)

# Per sink and table that is being backfilled: metric, key of the item, meaning.
_BACKFILL_COUNTERS = (
    ("spillway_backfill_rows", "rows_processed_count", "Rows read by the backfills under way"),
    ("spillway_backfill_superseded", "superseded", "Of these, not sent: the stream had brought something newer"),
)
_BACKFILL_ESTIMATE = "Rows that the backfills under way will read, by the planner's statistics"


class _Histogram:
    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(DELIVERY_BUCKETS_SECONDS) + 1)  # the last is +Inf
        self.sum = 0.0


class Metrics:
    """The counters of one process, and `render` for the scrape."""

    def __init__(self) -> None:
        self._delivered: dict[str, int] = {}
        self._rejected: dict[str, dict[str, int]] = {}
        self._seconds: dict[str, _Histogram] = {}

    def delivered(self, sink: str, n: int) -> None:
        """``n`` messages were acknowledged durably by the sink."""
        self._delivered[sink] = self._delivered.get(sink, 0) + n

    def delivery_seconds(self, sink: str, wall_seconds: float, commits: Sequence[int]) -> None:
        """Messages whose commit times at the source these are, in microseconds, were acknowledged at this time. Rising
        or nearly so: one look per bucket, not per message."""
        histogram = self._seconds.get(sink)
        if histogram is None:
            histogram = self._seconds[sink] = _Histogram()
        now = round(wall_seconds * 1_000_000)
        ages = sorted([max(now - commit, 0) for commit in commits])  # the source's clock may be ahead of ours
        start = 0
        for bucket, bound_seconds in enumerate(DELIVERY_BUCKETS_SECONDS):
            stop = bisect_right(ages, bound_seconds * 1_000_000, start)
            histogram.counts[bucket] += stop - start
            start = stop
            if start == len(ages):
                break
        histogram.counts[-1] += len(ages) - start
        histogram.sum += sum(ages) / 1_000_000

    def rejected(self, sink: str, reason: str, n: int) -> None:
        """The sink refused ``n`` messages for what they are."""
        reasons = self._rejected.setdefault(sink, {})
        if reason not in reasons and len(reasons) >= MAX_REASONS:
            reason = OTHER
        reasons[reason] = reasons.get(reason, 0) + n

    def render(self, status: dict[str, object]) -> bytes:
        """The exposition: our counters, and the gauges of ``status`` (`spillway.engine.Engine.status`)."""
        registry = CollectorRegistry()
        registry.register(_Scrape(self, status))
        return generate_latest(registry)

    def families(self, sinks: list[str]) -> Iterator[Metric]:
        """The counted metrics; a sink of ``sinks`` that has delivered nothing yet counts from zero."""
        delivered = CounterMetricFamily(
            "spillway_messages_delivered", "Messages that the sink acknowledged", labels=["sink"]
        )
        for sink, n in {**dict.fromkeys(sinks, 0), **self._delivered}.items():
            delivered.add_metric([sink], n)
        yield delivered
        rejected = CounterMetricFamily(
            "spillway_messages_rejected", "Messages that the sink refused for what they are", labels=["sink", "reason"]
        )
        for sink, reasons in self._rejected.items():
            for reason, n in reasons.items():
                rejected.add_metric([sink, reason], n)
        yield rejected
        seconds = HistogramMetricFamily(
            "spillway_delivery_seconds", "From the commit at the source to the sink's acknowledgement", labels=["sink"]
        )
        for sink, histogram in self._seconds.items():
            seconds.add_metric([sink], _cumulative(histogram.counts), histogram.sum)
        yield seconds


class _Scrape(Collector):
    """One scrape: the counters and one status, together."""

    def __init__(self, metrics: Metrics, status: dict[str, object]) -> None:
        self._metrics, self._status = metrics, status

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        sinks = _rows(self._status, "sinks")
        yield from self._process()
        yield from self._databases()
        yield from self._metrics.families([str(sink["name"]) for sink in sinks])
        for metric, key, meaning in _SINK_GAUGES:
            family = GaugeMetricFamily(metric, meaning, labels=["sink"])
            for sink in sinks:
                _add(family, [str(sink["name"])], sink.get(key))
            yield family
        for metric, key, meaning in _SINK_COUNTERS:
            counter = CounterMetricFamily(metric, meaning, labels=["sink"])
            for sink in sinks:
                _add(counter, [str(sink["name"])], sink.get(key))
            yield counter
        state = GaugeMetricFamily(
            "spillway_sink_state", "1 for the state the sink is in, 0 for all others", labels=["sink", "state"]
        )
        for sink in sinks:
            for name in SINK_STATES:
                state.add_metric([str(sink["name"]), name], 1.0 if sink.get("state") == name else 0.0)
        yield state
        yield from self._backfills([str(sink["name"]) for sink in sinks])

    def _backfills(self, sinks: list[str]) -> Iterator[Metric]:
        tables: dict[tuple[str, str], list[dict[str, object]]] = {}
        active = dict.fromkeys(sinks, 0)
        of_sink: dict[str, int] = {}
        for item in _rows(self._status, "backfills"):
            sink, table = str(item["sink"]), str(item["table"])
            if (sink, table) not in tables:
                of_sink[sink] = of_sink.get(sink, 0) + 1
                table = table if of_sink[sink] <= MAX_TABLES else OTHER
            tables.setdefault((sink, table), []).append(item)
            active[sink] = active.get(sink, 0) + (item.get("state") == "active")
        running = GaugeMetricFamily("spillway_backfill_active", "Backfills under way and not paused", labels=["sink"])
        for sink, n in active.items():
            running.add_metric([sink], n)
        yield running
        for metric, key, meaning in _BACKFILL_COUNTERS:
            rows = CounterMetricFamily(metric, meaning, labels=["sink", "table"])
            for labels, items in tables.items():
                _add(rows, list(labels), _sum(items, key))
            yield rows
        estimate = GaugeMetricFamily("spillway_backfill_estimated_rows", _BACKFILL_ESTIMATE, labels=["sink", "table"])
        for labels, items in tables.items():
            _add(estimate, list(labels), _sum(items, "rows_initial_count"))
        yield estimate

    def _process(self) -> Iterator[Metric]:
        memory = self._status.get("memory")
        memory = memory if isinstance(memory, dict) else {}
        for metric, key, meaning in (
            ("spillway_memory_held_bytes", "held_bytes", "Bytes of credit that payloads in memory hold"),
            ("spillway_memory_limit_bytes", "limit_bytes", "The limit of the process, memory.limit_mb"),
        ):
            family = GaugeMetricFamily(metric, meaning)
            _add(family, [], memory.get(key))
            yield family
        yield GaugeMetricFamily(
            "spillway_process_resident_bytes", "Resident memory of the process", value=resident_bytes()
        )
        build = GaugeMetricFamily("spillway_build_info", "1; the version is in the labels", labels=["version", "impl"])
        build.add_metric([str(self._status.get("version", "")), str(self._status.get("impl", ""))], 1.0)
        yield build

    def _databases(self) -> Iterator[Metric]:
        lag = GaugeMetricFamily(
            "spillway_slot_lag_bytes", "pg_current_wal_lsn() - confirmed_flush_lsn of the slot", labels=["database"]
        )
        confirmed = GaugeMetricFamily(
            "spillway_slot_confirmed_lsn", "The position confirmed to the source, as a number", labels=["database"]
        )
        for database in _rows(self._status, "databases"):
            labels = [str(database["name"])]
            _add(lag, labels, database.get("slot_lag_bytes"))
            _add(confirmed, labels, _lsn(database.get("confirmed_lsn")))
        yield lag
        yield confirmed


def resident_bytes() -> int:
    """The resident set of this process, as the kernel counts it."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*map(str, DELIVERY_BUCKETS_SECONDS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def _rows(status: dict[str, object], key: str) -> list[dict[str, object]]:
    rows = status.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _sum(items: list[dict[str, object]], key: str) -> int | None:
    """None: some of it is unknown."""
    values = [value for item in items if isinstance(value := item.get(key), int)]
    return sum(values) if len(values) == len(items) else None


def _add(family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: object) -> None:
    if isinstance(value, int | float):
        family.add_metric(labels, value)


def _lsn(value: object) -> object:
    """An LSN of the status, ``16/B374D848``, as the number it is."""
    if not isinstance(value, str):
        return value
    high, _, low = value.partition("/")
    return int(high, 16) << 32 | int(low, 16)

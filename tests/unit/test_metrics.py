"""Every metric that dashboards rely on, read back by the Prometheus parser itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from spillway.metrics import MAX_REASONS, MAX_TABLES, SINK_STATES, Metrics, resident_bytes

STATUS: dict[str, object] = {
    "memory": {"held_bytes": 10, "limit_bytes": 100},
    "databases": [
        {"name": "app", "slot_lag_bytes": 42, "confirmed_lsn": "16/B374D848"},
        {"name": "gone", "slot_lag_bytes": None, "confirmed_lsn": None},
    ],
    "sinks": [
        {
            "name": "jobs",
            "state": "parked",
            "backlog_messages": 5,
            "backlog_bytes": 50,
            "backlog_oldest_seconds": 1.5,
            "parked_keys": 2,
            "dead_letters": 1,
            "messages_in_memory": 3,
            "bytes_in_memory": 30,
        },
        {"name": "quiet", "state": "idle", "backlog_messages": 0, "backlog_oldest_seconds": None},
    ],
    "version": "1",
    "impl": "python",
}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(metrics: Metrics, status: dict[str, object] = STATUS) -> Samples:
    families = text_string_to_metric_families(metrics.render(status).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("spillway_memory_held_bytes", {}, 10),
        ("spillway_memory_limit_bytes", {}, 100),
        ("spillway_slot_lag_bytes", {"database": "app"}, 42),
        ("spillway_slot_confirmed_lsn", {"database": "app"}, 0x16B374D848),
        ("spillway_backlog_messages", {"sink": "jobs"}, 5),
        ("spillway_backlog_bytes", {"sink": "jobs"}, 50),
        ("spillway_backlog_oldest_seconds", {"sink": "jobs"}, 1.5),
        ("spillway_parked_keys", {"sink": "jobs"}, 2),
        ("spillway_dead_letters", {"sink": "jobs"}, 1),
        ("spillway_sink_memory_messages", {"sink": "jobs"}, 3),
        ("spillway_sink_memory_bytes", {"sink": "jobs"}, 30),
        ("spillway_build_info", {"version": "1", "impl": "python"}, 1),
        ("spillway_messages_delivered_total", {"sink": "jobs"}, 0),
    ],
)
def test_gauges_come_from_the_status(name: str, labels: dict[str, str], expected: float) -> None:
    assert value(scrape(Metrics()), name, **labels) == expected


def test_what_is_unknown_has_no_sample() -> None:
    samples = scrape(Metrics())
    assert value(samples, "spillway_slot_lag_bytes", database="gone") is None
    assert value(samples, "spillway_slot_confirmed_lsn", database="gone") is None
    assert value(samples, "spillway_backlog_oldest_seconds", sink="quiet") is None


def test_a_sink_is_in_exactly_one_state() -> None:
    samples = scrape(Metrics())
    states = {state: value(samples, "spillway_sink_state", sink="jobs", state=state) for state in SINK_STATES}
    assert states == {state: float(state == "parked") for state in SINK_STATES}


def test_resident_bytes_are_the_kernels() -> None:
    resident = value(scrape(Metrics()), "spillway_process_resident_bytes")
    assert resident is not None
    kilobytes = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    assert resident == pytest.approx(kilobytes * 1024, rel=0.2)
    assert resident_bytes() > 1024 * 1024


def test_counters_and_reasons() -> None:
    metrics = Metrics()
    metrics.delivered("jobs", 500)
    metrics.delivered("jobs", 1)
    metrics.rejected("jobs", "mapping", 3)
    metrics.rejected("jobs", 'odd "quoted"\nreason', 1)
    samples = scrape(metrics)
    assert value(samples, "spillway_messages_delivered_total", sink="jobs") == 501
    assert value(samples, "spillway_messages_rejected_total", sink="jobs", reason="mapping") == 3
    assert value(samples, "spillway_messages_rejected_total", sink="jobs", reason='odd "quoted"\nreason') == 1


def test_the_number_of_reasons_is_bounded() -> None:
    metrics = Metrics()
    for n in range(MAX_REASONS + 30):
        metrics.rejected("jobs", f"reason_{n}", 1)
    metrics.rejected("jobs", "reason_0", 1)
    reasons = {k[1][0][1]: v for k, v in scrape(metrics).items() if k[0] == "spillway_messages_rejected_total"}
    assert len(reasons) == MAX_REASONS + 1
    assert reasons["other"] == 30
    assert reasons["reason_0"] == 2


def test_the_histogram_counts_a_batch_at_once() -> None:
    metrics = Metrics()
    now = 2_000_000_000
    microseconds = [now * 1_000_000 - 20_000] * 400
    metrics.delivery_seconds("jobs", now, [*microseconds, now * 1_000_000 - 25_000])  # the last on the bound: inside
    metrics.delivery_seconds("jobs", now, [(now + 3) * 1_000_000, (now - 1_000_000_000) * 1_000_000])  # a clock ahead
    samples = scrape(metrics)
    bucket = "spillway_delivery_seconds_bucket"
    assert value(samples, bucket, sink="jobs", le="0.01") == 1
    assert value(samples, bucket, sink="jobs", le="0.025") == 402
    assert value(samples, bucket, sink="jobs", le="43200.0") == 402
    assert value(samples, bucket, sink="jobs", le="+Inf") == 403
    assert value(samples, "spillway_delivery_seconds_count", sink="jobs") == 403
    assert value(samples, "spillway_delivery_seconds_sum", sink="jobs") == pytest.approx(400 * 0.02 + 0.025 + 1e9)


def item(table: str, rows: int, estimate: int | None, state: str = "active") -> dict[str, object]:
    return {
        "sink": "jobs",
        "table": table,
        "state": state,
        "rows_processed_count": rows,
        "rows_initial_count": estimate,
        "superseded": rows // 10,
    }


def test_backfills_under_way() -> None:
    items = [
        item("public.jobs", 100, 1000),
        item("public.jobs", 50, 200, "paused"),
        item("public.users", 7, None),
    ]
    samples = scrape(Metrics(), STATUS | {"backfills": items})
    assert value(samples, "spillway_backfill_active", sink="jobs") == 2
    assert value(samples, "spillway_backfill_active", sink="quiet") == 0
    jobs = {"sink": "jobs", "table": "public.jobs"}
    assert value(samples, "spillway_backfill_rows_total", **jobs) == 150
    assert value(samples, "spillway_backfill_superseded_total", **jobs) == 15
    assert value(samples, "spillway_backfill_estimated_rows", **jobs) == 1200
    assert value(samples, "spillway_backfill_rows_total", sink="jobs", table="public.users") == 7
    assert value(samples, "spillway_backfill_estimated_rows", sink="jobs", table="public.users") is None


def test_the_number_of_tables_is_bounded() -> None:
    items = [item(f"public.t{n % (MAX_TABLES + 30)}", 1, 1) for n in range(2 * (MAX_TABLES + 30))]
    samples = scrape(Metrics(), STATUS | {"backfills": items})
    tables = {k[1][1][1]: v for k, v in samples.items() if k[0] == "spillway_backfill_rows_total"}
    assert len(tables) == MAX_TABLES + 1
    assert (tables["public.t0"], tables["other"]) == (2, 60)


def test_an_empty_status_still_renders() -> None:
    assert value(scrape(Metrics(), {}), "spillway_process_resident_bytes") is not None

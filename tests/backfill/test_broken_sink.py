"""A backfill into a sink that takes nothing: reading stops, says why, and goes on when the sink is mended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from backfill.rows import fill
from backfill.stage import Stage, shown, webhook_sink
from oracle.endpoint import Recorder

ITEMS = ("public.items",)
ROWS = 12_000
RUN_AHEAD = 2_000
PROBES = 3  # of the sink, by which time passes without reading
LARGEST_PAGE_ROWS = 1_000  # before anything was delivered pages have not grown


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


def existing(connection: psycopg.Connection) -> None:
    fill(connection, items=range(ROWS), docs=range(0))
    connection.execute("analyze public.items")


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize(("status", "why"), [(503, "down"), (422, "rejects")])
def test_reading_stops_and_goes_on(
    status: int, why: str, parallel: int, database: str, tmp_path: Path, recorder: Recorder
) -> None:
    """503: the sink is down. 422: every message is refused for itself and waits for its retry."""
    backfill = {"run_ahead": RUN_AHEAD, "parallel": parallel}
    sink = webhook_sink("hook", ITEMS, backfill=backfill)
    with Stage(database, tmp_path, [sink], existing=existing, endpoint_url=recorder.url, memory_mb=256) as stage:
        stage.begin()
        recorder.script([{"path": "/hook", "do": "status", "status": status}])
        (backfill_id,) = stage.backfill("hook", table="public.items")
        stopped = stage.wait_item("hook", backfill_id, lambda item: why in item["waiting"], f"a stop: {why}")
        read = stopped["rows_processed_count"]
        assert read <= RUN_AHEAD + LARGEST_PAGE_ROWS * parallel
        since = recorder.size

        def probed() -> bool:
            return sum(1 for _ in recorder.requests("/hook", since)) >= PROBES

        stage.product.wait(probed, "probes of the sink", seconds=60)
        still = stage.item("hook", backfill_id)
        assert still["rows_processed_count"] <= RUN_AHEAD + LARGEST_PAGE_ROWS * parallel
        assert still["state"] == "active"
        assert still["waiting"] != ""
        stage.sql("update items set seq = 1 where id = 11999")
        recorder.script([])
        stage.wait_completed({"hook": [backfill_id]})
        stage.drained("hook")
        found = stage.judge(recorder.deliveries("/hook"), ITEMS)
        assert found == [], shown(found)

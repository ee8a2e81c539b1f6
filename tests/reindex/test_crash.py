"""A re-index whose process is killed, or whose index server is away: it goes on, and loses nothing.

The `Gate` holds back the request that a test is about, so that the moment of the kill is not one of chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from reindex.gate import Gate
from reindex.place import SINK, WIDE, Place, Traffic
from servers.opensearch import OpenSearch

MOVE = "POST /_aliases"


@pytest.fixture
def gate(opensearch: OpenSearch) -> Iterator[Gate]:
    with Gate(opensearch.port) as gate:
        yield gate


@pytest.fixture
def place(database: str, tmp_path: Path, opensearch: OpenSearch, gate: Gate) -> Iterator[Place]:
    with Place(database, tmp_path, opensearch.url, through=gate.url) as place:
        place.begin()
        yield place


def test_killed_while_it_backfills_it_goes_on_where_it_was(
    database: str, tmp_path: Path, opensearch: OpenSearch
) -> None:
    with Place(database, tmp_path, opensearch.url, backfill={"max_rows_per_second": 800}) as place:
        place.fill(3_000)
        place.begin()
        place.reindex()
        place.wait(lambda: [b["pages"] >= 2 for b in place.progress()["backfills"]] == [True], "pages")
        (backfill,) = place.progress()["backfills"]
        place.again()
        item = place.progress()
        assert item["state"] == "backfilling"
        assert place.shadow in place.sinks()
        place.sql("update public.jobs set seq = 1 where id % 100 = 0", "delete from public.jobs where id % 7 = 0")
        item = place.reaches("done")
        (ended,) = item["backfills"]
        assert ended["id"] == backfill["id"]
        assert ended["rows_processed_count"] < 4_000, "at most a page was read twice"
        place.wait_equal()


@pytest.mark.parametrize("created", [False, True])
def test_killed_while_the_index_is_created(place: Place, gate: Gate, created: bool) -> None:
    place.fill(50, extra="word")
    create = f"PUT /{place.v2}"
    gate.hold(create)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(place.reindex)
        gate.wait_held(create)
        number = place.progress_on_disk()["id"]
        place.product.kill()
        with pytest.raises(httpx.TransportError):
            asked.result()
    if created:
        place.create(place.v2, {"mappings": {**WIDE["mappings"], "_meta": {"spillway_reindex": number}}})
    gate.drop(create)
    place.begin()
    place.reaches("done")
    assert len(place.documents()) == 50


def test_an_index_that_somebody_creates_meanwhile_is_not_ours(place: Place, gate: Gate) -> None:
    create = f"PUT /{place.v2}"
    gate.hold(create)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(place.refused, "reindex", into=place.v2, mapping=WIDE)
        gate.wait_held(create)
        place.create(place.v2, {})
        gate.release(create)
        assert asked.result() == "index_exists"
    assert place.get(f"sinks/{SINK}/reindex")["data"] == []
    assert place.exists(place.v2)


@pytest.mark.parametrize("moved", [False, True], ids=["right before", "right after"])
def test_killed_when_the_alias_moves(place: Place, gate: Gate, moved: bool) -> None:
    place.fill(300)
    place.wait_equal()
    gate.hold(MOVE)
    place.reindex()
    gate.wait_held(MOVE)
    assert place.progress()["state"] == "verifying"
    assert place.refused("reindex/cancel") == "reindex_swapped"
    place.product.kill()
    if moved:
        actions = [
            {"remove": {"index": place.v1, "alias": place.alias}},
            {"add": {"index": place.v2, "alias": place.alias, "is_write_index": True}},
        ]
        place.search.post("/_aliases", json={"actions": actions}).raise_for_status()
    place.sql("update public.jobs set seq = 1 where id % 10 = 0", "delete from public.jobs where id % 7 = 0")
    gate.drop(MOVE)
    place.begin()
    item = place.reaches("done")
    assert item["old"] == [place.v1]
    assert place.behind() == [place.v2]
    assert place.sinks() == [SINK]
    place.wait_equal()


@pytest.mark.parametrize("killed", [False, True])
def test_what_the_main_sink_wrote_into_the_old_index_reaches_the_new_one(
    place: Place, gate: Gate, killed: bool
) -> None:
    """A row that was under way when the alias moved: the main sink has it, the old index has it, the shadow has not
    delivered it. Until it has, the re-index is not done."""
    place.fill(100)
    place.wait_equal()
    gate.hold(MOVE)
    place.reindex()
    gate.wait_held(MOVE)
    bulk = f"POST /{place.v2}/_bulk"
    gate.hold(bulk)
    place.fill(1, first=101)
    gate.wait_held(bulk)
    place.wait(lambda: 101 in place.documents(place.v1), "the row in the old index")
    gate.release(MOVE)
    place.reaches("swapped")
    assert place.refused("reindex/cancel") == "reindex_swapped"
    assert 101 not in place.documents()
    if killed:
        place.product.kill()
        gate.drop(bulk)
        place.begin()
    else:
        gate.release(bulk)
    place.reaches("done")
    place.wait_equal()


def test_cancelled_and_killed_it_is_cancelled(place: Place, gate: Gate) -> None:
    place.fill(50, extra="word")
    place.reindex()
    place.reaches("done")
    place.v2 += "b"
    remove = f"DELETE /{place.v2}"
    gate.hold(remove)
    gate.hold(f"POST /{place.v2}/_bulk")
    place.reindex()
    place.reaches("backfilling", "catching_up")
    place.post(f"{SINK}/reindex/cancel")
    gate.release(f"POST /{place.v2}/_bulk")
    gate.wait_held(remove)
    place.product.kill()
    gate.drop(remove)
    place.begin()
    place.reaches("cancelled")
    assert not place.exists(place.v2)
    assert place.sinks() == [SINK]
    place.wait_equal()


def test_a_full_backlog_of_the_new_index_harms_nobody_else(
    database: str, tmp_path: Path, opensearch: OpenSearch, gate: Gate
) -> None:
    backlog = {"max_messages": 20, "on_full": "block"}
    with Place(database, tmp_path, opensearch.url, through=gate.url, backlog=backlog) as place:
        place.begin()
        place.fill(5)
        gate.hold(f"POST /{place.v2}/_bulk")
        place.reindex()
        gate.wait_held(f"POST /{place.v2}/_bulk")
        for first in range(10, 70):
            place.fill(1, first=first)
        assert "missed changes" in place.reaches("failed")["reason"]
        assert place.sinks() == [SINK]
        place.wait_equal()
        gate.release(f"POST /{place.v2}/_bulk")
        place.reindex()
        place.reaches("done")
        place.wait_equal()


def test_a_server_that_is_away_is_waited_for(place: Place, gate: Gate) -> None:
    place.fill(300)
    place.wait_equal()
    gate.hold(MOVE)
    place.reindex()
    gate.wait_held(MOVE)
    gate.close()
    place.sql("update public.jobs set seq = 1 where id % 10 = 0")
    place.says("connect")
    gate.drop(MOVE)
    gate.open()
    place.reaches("done")
    place.wait_equal()


def test_a_server_that_comes_and_goes_under_load(place: Place, gate: Gate) -> None:
    place.fill(500)
    with Traffic(place, seed=3, ids=500) as traffic:
        place.reindex()
        place.reaches("backfilling", "catching_up", "verifying", "swapped", "done")
        for _ in range(3):
            before = traffic.written
            gate.close()
            place.wait(lambda before=before: traffic.written > before + 30, "traffic")
            gate.open()
            place.wait(lambda before=before: traffic.written > before + 90, "traffic")
        place.again()
        place.reaches("done")
    place.wait_equal()

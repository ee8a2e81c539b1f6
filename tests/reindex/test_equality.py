"""When the new index counts as equal: what is found, what is left out on purpose, and what is only late."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfill.site import file_sink
from reindex.gate import Gate
from reindex.place import NARROW, SINK, Place
from servers.opensearch import OpenSearch


@pytest.fixture
def held(place: Place) -> Place:
    """Before the comparison, waiting for row 1, which the new index has rejected, to be mended."""
    place.fill(40)
    place.wait_equal()
    hold(place)
    return place


def hold(place: Place) -> None:
    place.sql("update public.jobs set extra = 'word' where id = 1")
    place.reindex(mapping=NARROW)
    place.says("has rejected 1 rows")


def let_go(place: Place) -> None:
    place.sql("update public.jobs set extra = null where id = 1")


def test_whatever_differs_is_found(held: Place) -> None:
    held.write("5", {"id": 5, "seq": 9, "title": "title 5", "extra": None}, held.version("5"))
    held.write("999", {"id": 999, "seq": 0, "title": "foreign", "extra": None}, 1)
    version = held.version("6")
    held.search.delete(f"/{held.v2}/_doc/6?version={version}&version_type=external_gte").raise_for_status()
    let_go(held)
    reason = held.reaches("failed")["reason"]
    for wanted in (
        "public.jobs:5 is another in",
        "public.jobs:6 is not in",
        "public.jobs:999 is in the new index alone",
    ):
        assert wanted in reason
    assert held.behind() == [held.v1]
    held.post(f"{SINK}/reindex/cancel")
    assert not held.exists(held.v2)


def test_a_document_that_the_filter_leaves_out_is_found(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    """Whether its row is there or not; a row that leaves the filter meanwhile is only late."""
    filters = [{"column": "seq", "operator": "lt", "value": 5}, {"column": "title", "operator": "is_not_null"}]
    with Place(database, tmp_path, opensearch.url, filters=filters) as place:
        place.begin()
        place.fill(40)
        place.sql("update public.jobs set seq = 7 where id = 39", "update public.jobs set title = null where id = 40")
        place.wait(lambda: set(place.documents()) == set(range(1, 39)), "the documents")
        hold(place)
        version = place.version("2")
        place.write("40", {"id": 40, "seq": 0, "title": None, "extra": None}, version)
        let_go(place)
        reason = place.reaches("failed")["reason"]
        assert "1 rows differ from the source: public.jobs:40 is in the new index alone" in reason
        place.reindex()
        place.sql(*[f"update public.jobs set seq = 9 where id = {number}" for number in range(10, 20)])
        place.reaches("done")
        assert set(place.documents()) == {*range(1, 10), *range(20, 39)}


def test_changes_that_the_sink_does_not_take_are_no_difference(
    database: str, tmp_path: Path, opensearch: OpenSearch
) -> None:
    with Place(database, tmp_path, opensearch.url, actions=["insert", "update"]) as place:
        place.begin()
        place.fill(40)
        place.wait_equal()
        hold(place)
        place.sql("delete from public.jobs where id > 35")
        let_go(place)
        place.reaches("done")
        assert set(place.documents()) == set(range(1, 41))


def test_columns_that_may_be_omitted_are_no_difference(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    with Place(database, tmp_path, opensearch.url, toast="omit") as place:
        place.sql("alter table public.jobs alter column title set storage external")
        place.begin()
        place.fill(10)
        place.sql("update public.jobs set title = repeat('x', 9000) where id = 7")
        place.wait_equal()
        hold(place)
        place.sql("update public.jobs set seq = 5 where id = 7")
        let_go(place)
        place.reaches("done")
        assert place.documents()[7] == {"id": 7, "seq": 5, "extra": None}
        assert len(place.documents()) == 10


def test_rows_of_several_tables(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    tables = {"include_tables": ["public.jobs", "public.pairs"]}
    with Place(database, tmp_path, opensearch.url, document="message", source=tables) as place:
        place.sql(
            "create table public.pairs (a int, b text, v text, primary key (b, a))",
            "insert into public.pairs select i, 'b-' || i, 'x' from generate_series(1, 700) i",
            "alter publication spillway add table public.pairs",
        )
        place.fill(600)
        place.begin()
        place.reindex(mapping=None, derive_mapping=True)
        assert sorted(b["table"] for b in place.reaches("done")["backfills"]) == ["public.jobs", "public.pairs"]
        place.sql("delete from public.pairs where a = 5", "update public.jobs set seq = 3 where id = 5")
        place.read_by_the_stream()
        found = place.documents()
        assert len(found) == 1_299
        assert found[5]["record"]["seq"] == 3
        assert "5-b\\-5" not in found


def test_a_stream_that_is_late_is_waited_for(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    """Another sink blocks the slot: the source is ahead of every index, which is no difference."""
    blocking = file_sink("full", ["public.other"], backlog={"max_messages": 5, "on_full": "block"})
    with (
        Gate(opensearch.port) as gate,
        Place(database, tmp_path, opensearch.url, through=gate.url, more=[blocking]) as place,
    ):
        place.sql("create table public.other (id int primary key)", "alter publication spillway add table public.other")
        place.begin()
        place.fill(40)
        place.sql("insert into public.other values (0)")
        place.wait_equal()
        compare = f"POST /{place.v2}/_mget"
        gate.hold(compare)
        place.reindex()
        gate.wait_held(compare)
        place.block("full.ndjson")
        place.sql(*[f"insert into public.other values ({i})" for i in range(1, 20)])
        place.wait(lambda: place.status("full")["state"] == "full", "the sink to be full")
        place.sql("update public.jobs set seq = 1 where id < 20", "delete from public.jobs where id = 30")
        gate.drop(compare)
        place.says("waits for the stream to come by")
        place.unblock("full.ndjson")
        place.reaches("done")
        place.wait_equal()


def test_stopped_and_started_again(held: Place) -> None:
    held.stop()
    held.sql("delete from public.jobs where id = 3", "update public.jobs set seq = 4 where id = 4")
    held.begin()
    held.says("has rejected 1 rows")
    let_go(held)
    held.reaches("done")
    held.wait_equal()

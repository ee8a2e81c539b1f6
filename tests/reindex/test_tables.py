"""Tables and partitions that come and go while a re-index is under way: what takes the alias has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backfill.test_reload import reload
from reindex.gate import Gate
from reindex.place import SINK, Place
from servers.opensearch import OpenSearch

BOTH = {"include_tables": ["public.jobs", "public.pairs"]}
PAIRS = 30


@pytest.fixture
def gate(opensearch: OpenSearch) -> Iterator[Gate]:
    with Gate(opensearch.port) as gate:
        yield gate


@pytest.fixture
def place(database: str, tmp_path: Path, opensearch: OpenSearch, gate: Gate) -> Iterator[Place]:
    """Ten jobs; pairs are there and not published, and the sink takes both."""
    options = {"through": gate.url, "document": "message", "initial_backfill": True}
    with Place(database, tmp_path, opensearch.url, source=BOTH, **options) as place:
        place.search.delete(f"/{place.v1}").raise_for_status()
        place.create(place.v1, {"aliases": {place.alias: {}}})
        place.sql(
            "create table public.pairs (id int primary key, v text)",
            f"insert into public.pairs select i, 'x' from generate_series(1001, {1000 + PAIRS}) i",
        )
        place.fill(10)
        place.begin()
        place.wait(lambda: len(place.documents()) == 10, "the initial backfill")
        yield place


def begin(place: Place) -> None:
    place.reindex(mapping={"mappings": {}})


def publish(place: Place) -> None:
    """The old index has the pairs when this returns."""
    place.sql("alter publication spillway add table public.pairs")
    place.wait(lambda: len(place.documents(place.v1)) == 10 + PAIRS, "the initial backfill of what has joined")


def pairs_in(place: Place, index: str) -> int:
    return sum(identity >= 1000 for identity in place.documents(index) if isinstance(identity, int))


def test_a_table_is_published_right_before_the_switch(place: Place, gate: Gate) -> None:
    refresh = f"POST /{place.v2}/_refresh"
    gate.hold(refresh)
    begin(place)
    gate.wait_held(refresh)
    assert place.progress()["state"] == "verifying"
    publish(place)
    gate.release(refresh)
    item = place.reaches("done")
    assert sorted(one["table"] for one in item["backfills"]) == ["public.jobs", "public.pairs"]
    assert item["old"] == [place.v1]
    assert place.behind() == [place.v2]
    assert pairs_in(place, place.v2) == PAIRS
    assert item["documents"] == 10 + PAIRS, "compared again, with the new table"


def test_a_table_is_published_in_the_moment_of_the_switch(place: Place, gate: Gate) -> None:
    """Its rows have gone into the old index only."""
    gate.hold("POST /_aliases")
    begin(place)
    gate.wait_held("POST /_aliases")
    publish(place)
    gate.release("POST /_aliases")
    place.reaches("done")
    assert place.behind() == [place.v2]
    assert pairs_in(place, place.v2) == PAIRS


def test_the_source_changes_on_sighup(place: Place, gate: Gate) -> None:
    """What the new index gets follows: the table that is added, and its changes."""
    place.sql("create table public.late (id int primary key, v text)", "insert into public.late values (2001, 'x')")
    place.sql("alter publication spillway add table public.late")
    compare = f"POST /{place.v2}/_mget"
    gate.hold(compare)
    begin(place)
    gate.wait_held(compare)
    more = {"include_tables": ["public.jobs", "public.late"]}
    assert f'"changed": ["{SINK}"]' in reload(place, {**place.jobs, "source": more})
    place.sql("insert into public.late values (2002, 'by the stream')")
    place.wait(lambda: {2001, 2002} <= place.documents(place.v1).keys(), "the old index to have both")
    gate.release(compare)
    item = place.reaches("done")
    assert sorted(one["table"] for one in item["backfills"]) == ["public.jobs", "public.late"]
    assert {2001, 2002} <= place.documents(place.v2).keys()
    place.sql("update public.late set v = 'after' where id = 2001")
    place.wait(lambda: place.documents()[2001]["record"]["v"] == "after", "the sink to go on")


def test_a_table_leaves_while_it_is_compared(place: Place, gate: Gate) -> None:
    publish(place)
    compare = f"POST /{place.v2}/_mget"
    gate.hold(compare)
    begin(place)
    gate.wait_held(compare)
    place.sql("alter publication spillway drop table public.pairs")
    gate.release(compare)
    assert [one["table"] for one in place.reaches("done")["backfills"]] == ["public.jobs"]


def test_partitions_come_and_go_while_they_are_compared(place: Place, gate: Gate) -> None:
    place.sql(
        "drop table public.pairs",
        "create table public.pairs (id int primary key, v text) partition by range (id)",
        "create table public.pairs_1 partition of public.pairs for values from (1000) to (2000)",
        "create table public.pairs_2 partition of public.pairs for values from (2000) to (3000)",
        "insert into public.pairs select i, 'x' from generate_series(1001, 1020) i",
        "insert into public.pairs select i, 'x' from generate_series(2001, 2010) i",
    )
    publish(place)
    compare = f"POST /{place.v2}/_mget"
    gate.hold(compare)
    begin(place)
    gate.wait_held(compare)
    place.sql(
        "drop table public.pairs_2",
        "create table public.pairs_3 partition of public.pairs for values from (3000) to (4000)",
        "insert into public.pairs select i, 'x' from generate_series(3001, 3010) i",
    )
    gate.release(compare)
    place.reaches("done")
    assert {*range(1001, 1021), *range(3001, 3011)} <= place.documents(place.v2).keys()

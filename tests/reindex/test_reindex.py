"""Re-indexes: what they show under load, what they say when something is in the way, and how they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfill.site import Refused
from reindex.place import NARROW, SINK, WIDE, Place, Traffic
from servers.opensearch import OpenSearch


def test_under_load_the_alias_always_serves_what_was_committed(place: Place) -> None:
    """Of every row, for as long as the run takes, what a search by the alias gives is at most five seconds old."""
    place.fill(1_000)
    place.wait_equal()
    with Traffic(place, seed=1, ids=1_000) as traffic:
        place.reindex(parallel=2)
        place.reaches("done")
        traffic.settle()
        assert traffic.written > 500
    assert (traffic.violations, traffic.failed) == ([], [])
    item = place.progress()
    assert (item["old"], item["into"], item["alias"]) == ([place.v1], place.v2, place.alias)
    assert item["documents"] > 500
    assert [one["state"] for one in item["backfills"]] == ["completed"]
    assert place.behind() == [place.v2]
    place.wait_equal()
    assert place.sinks() == [SINK], "the shadow has left"
    assert place.status(SINK)["state"] in ("caught_up", "idle")


def test_a_new_mapping_takes_what_the_old_one_rejected(place: Place) -> None:
    place.fill(100)
    place.fill(20, first=101, extra="word")
    place.wait(lambda: place.status(SINK)["parked_keys"] == 20, "rows to be rejected")
    place.reindex()
    place.reaches("done")
    assert len(place.documents()) == 120
    place.post(f"{SINK}/backlog/retry", all=True)
    place.wait(lambda: place.status(SINK)["parked_keys"] == 0, "the old rejections to go")
    place.wait_equal()
    assert len(place.documents(place.v1)) == 100


def test_a_row_that_the_new_mapping_rejects_is_waited_for(place: Place) -> None:
    place.fill(50)
    place.wait_equal()
    place.sql("update public.jobs set extra = 'word' where id = 7")
    place.reindex(mapping=NARROW)
    place.says("has rejected 1 rows")
    assert "mapper_parsing_exception" in place.progress()["reason"]
    assert place.progress()["state"] == "catching_up"
    assert place.behind() == [place.v1]
    place.sql("update public.jobs set extra = '12' where id = 7")
    place.reaches("done")
    place.wait_equal()


def test_a_rejected_row_that_is_discarded_is_not_lost(place: Place) -> None:
    """The new index lacks it, so the alias does not move."""
    place.fill(50)
    place.wait_equal()
    place.sql("update public.jobs set extra = 'word' where id = 7")
    place.reindex(mapping=NARROW)
    place.says("has rejected 1 rows")
    place.post(f"{place.shadow}/backlog/discard", all=True)
    item = place.reaches("failed")
    assert "1 rows differ from the source: public.jobs:7 is not in the new index" in item["reason"]
    assert place.behind() == [place.v1]
    assert place.sinks() == [SINK]
    assert place.exists(place.v2), "to be looked at"
    place.reindex()
    place.reaches("done")
    assert len(place.documents()) == 50


def test_cancelled_it_leaves_everything_as_it_was(place: Place) -> None:
    place.fill(50)
    place.fill(1, first=51, extra="word")
    place.reindex(mapping=NARROW)
    place.says("has rejected 1 rows")
    place.post(f"{SINK}/reindex/cancel")
    place.reaches("cancelled")
    assert place.behind() == [place.v1]
    assert not place.exists(place.v2)
    assert place.sinks() == [SINK]
    assert place.refused("reindex/cancel") == "reindex_ended"
    place.reindex()
    place.reaches("done")
    assert len(place.documents()) == 51


def test_the_old_index_is_kept_until_it_is_dropped(place: Place) -> None:
    place.fill(10)
    place.wait_equal()
    assert place.refused("reindex/drop-old") == "unknown_reindex"
    place.reindex()
    place.reaches("done")
    place.search.post("/_aliases", json={"actions": [{"add": {"index": place.v1, "alias": f"{place.alias}-old"}}]})
    assert place.refused("reindex/drop-old") == "index_in_use"
    place.search.post("/_aliases", json={"actions": [{"remove": {"index": place.v1, "alias": f"{place.alias}-old"}}]})
    assert place.exists(place.v1)
    v3 = f"{place.alias}-v3"
    place.reindex(v3)
    place.reaches("done")
    assert place.progress()["old"] == [place.v1, place.v2]
    place.search.post("/_aliases", json={"actions": [{"add": {"index": place.v2, "alias": f"{place.alias}-old"}}]})
    with pytest.raises(Refused, match=f"deleted by then: {place.v1}"):
        place.post(f"{SINK}/reindex/drop-old")
    place.search.post("/_aliases", json={"actions": [{"remove": {"index": place.v2, "alias": f"{place.alias}-old"}}]})
    answer = place.post(f"{SINK}/reindex/drop-old")
    assert (answer["deleted"], answer["old"]) == ([place.v2], [])
    assert [place.exists(index) for index in (place.v1, place.v2, v3)] == [False, False, True]
    assert place.post(f"{SINK}/reindex/drop-old")["deleted"] == []
    assert len(place.documents()) == 10


def test_an_index_becomes_an_alias_when_that_is_allowed(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    with Place(database, tmp_path, opensearch.url) as place:
        place.search.delete(f"/{place.v1}")
        place.create(place.alias, NARROW)
        place.begin()
        place.fill(1_000)
        place.wait_equal()
        assert place.refused("reindex", into=place.v2, mapping=WIDE) == "alias_is_index"
        assert not place.exists(place.v2)
        with Traffic(place, seed=2, ids=1_000) as traffic:
            place.reindex(replace_index=True)
            place.reaches("done")
            traffic.settle()
        assert traffic.violations == []
        assert len(traffic.failed) <= 1, "the one that was under way in the index that went"
        assert place.behind() == [place.v2]
        assert place.progress()["old"] == []
        place.wait_equal()
        assert place.status(SINK)["state"] in ("caught_up", "idle")


def test_what_cannot_be_is_refused_and_leaves_no_trace(place: Place) -> None:
    place.fill(1)
    place.wait_equal()
    assert place.refused("reindex", into=place.v1, mapping=WIDE) == "index_exists"
    assert place.refused("reindex", into=place.alias, mapping=WIDE) == "index_exists"
    assert place.refused("reindex", into=place.v2) == "no_mapping"
    assert place.refused("reindex", into=place.v2, mapping={"settings": {"no_such": 1}}) == "sink_refused"
    assert place.refused("reindex", into=place.v2, mapping={"aliases": {place.alias: {}}}) == "bad_request"
    assert place.get(f"sinks/{SINK}/reindex")["data"] == []
    assert place.sinks() == [SINK]
    assert not place.exists(place.v2)


def test_one_at_a_time(place: Place) -> None:
    place.fill(10, extra="word")
    place.reindex(mapping=NARROW)
    assert place.refused("reindex", into=f"{place.alias}-v3", mapping=WIDE) == "reindex_active"
    assert place.refused("reindex/drop-old") == "reindex_active"
    place.says("has rejected 10 rows")
    place.post(f"{SINK}/reindex/cancel")
    place.reaches("cancelled")


@pytest.mark.parametrize("document", ["record", "message"])
def test_a_derived_mapping(database: str, tmp_path: Path, opensearch: OpenSearch, document: str) -> None:
    with Place(database, tmp_path, opensearch.url, document=document) as place:
        place.begin()
        place.fill(30, extra="word")
        place.reindex(mapping=None, derive_mapping=True)
        place.reaches("done")
        found = place.search.get(f"/{place.v2}/_mapping").json()[place.v2]["mappings"]["properties"]
        fields = found if document == "record" else found["record"]["properties"]
        assert {name: of["type"] for name, of in fields.items()} == {
            "id": "integer", "seq": "long", "title": "text", "extra": "text",
        }  # fmt: skip
        assert len(place.documents()) == 30

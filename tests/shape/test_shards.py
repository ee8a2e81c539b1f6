"""A column says the shard of each document: none stays in a shard that its row has left."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from oracle.documents import Index
from servers.opensearch import OpenSearch
from shape.place import Json, Shaped, sink

TABLE = "create table t (id int primary key, tenant text not null, v int);"
ROWS = 12


def search(url: str, index: str, **more: object) -> Json:
    destination = {
        "type": "opensearch", "endpoint_url": url, "index_name": index, "routing_column": "tenant",
        "document": "record",
    }  # fmt: skip
    return sink("out", ["public.t"], destination, **more)


def shards(url: str, index: str) -> list[tuple[str, int]]:
    """The routing and the value of each document."""
    httpx.post(f"{url}/{index}/_refresh").raise_for_status()
    found = httpx.post(f"{url}/{index}/_search", json={"size": 100}).raise_for_status().json()
    return sorted((hit["_routing"], hit["_source"]["v"]) for hit in found["hits"]["hits"])


@pytest.mark.parametrize("stored", [False, True], ids=["direct", "stored"])
def test_a_row_that_moves_and_changes_again_leaves_nothing_behind(
    database: str, tmp_path: Path, opensearch: OpenSearch, stored: bool
) -> None:
    name = f"shards-{uuid4().hex}"
    with (
        Index(opensearch.url, name) as index,
        Shaped(
            database,
            tmp_path,
            [search(opensearch.url, name)],
            schema=f"{TABLE} alter table t replica identity full",
        ) as place,
    ):
        index.create({"settings": {"number_of_shards": 8}})
        place.begin()
        place.sql(f"insert into t select n, 'one', 0 from generate_series(1, {ROWS}) n")
        place.drained("out")
        if stored:
            place.post("out/pause")
        place.sql(
            *(
                f"update t set {change} where id = {row}"
                for row in range(1, ROWS + 1)
                for change in ("v = v + 1", "tenant = 'two'", "v = v + 2")
            )
        )
        if stored:
            place.read_by_the_stream()
            place.post("out/resume")
        place.drained("out")
        assert shards(opensearch.url, name) == [("two", 3)] * ROWS


def test_a_table_whose_updates_do_not_tell_the_old_shard_is_refused_until_they_do(
    database: str, tmp_path: Path, opensearch: OpenSearch
) -> None:
    name = f"shards-{uuid4().hex}"
    schema = f"{TABLE} create unique index by on t (id, tenant); alter table t replica identity using index by"
    with (
        Index(opensearch.url, name) as index,
        Shaped(database, tmp_path, [search(opensearch.url, name)], schema=schema) as place,
    ):
        index.create({"settings": {"number_of_shards": 8}})
        place.begin()
        place.sql("insert into t values (1, 'one', 0)")
        place.wait(lambda: place.status("out")["state"] == "gap", "the refusal")
        assert "does not say the old tenant" in place.status("out")["reason"]
        place.sql("alter table t replica identity full", "insert into t values (2, 'one', 0)")
        place.sql("update t set tenant = 'two' where id = 2")
        place.drained("out")
        assert shards(opensearch.url, name) == [("two", 0)]
        assert place.status("out")["gap"] is not None

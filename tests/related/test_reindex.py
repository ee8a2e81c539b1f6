"""A re-index while related tables change: the new index is as right as the old one, before and after the switch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from reindex.place import SINK, Place, mapping
from servers.opensearch import OpenSearch

DOCUMENT = "select j.id, o.name from public.jobs j left join public.owners o on o.id = j.seq"
FUNCTION = {"name": "document", "type": "enrichment", "code": f"{DOCUMENT} where j.id = any($1)"}
RELATED = [{"table": "public.owners", "sql": "select id from jobs where seq = any($1)"}]
OWNERS, ROWS = 10, 2_000

MAPPING = mapping("keyword")
MAPPING["mappings"]["properties"]["name"] = {"type": "keyword"}


class Joined(Place):
    def _config(self, sinks: Sequence[Mapping[str, object]]) -> dict[str, object]:
        return {**super()._config(sinks), "functions": [FUNCTION]}

    def names(self) -> dict[int, Any]:
        return {number: document.get("name") for number, document in self.documents().items()}


@pytest.fixture
def place(database: str, tmp_path: Path, opensearch: OpenSearch) -> Iterator[Joined]:
    with Joined(database, tmp_path, opensearch.url, enrichment="document", related=RELATED) as place:
        place.search.delete(f"/{place.v1}").raise_for_status()
        place.create(place.v1, {**MAPPING, "aliases": {place.alias: {}}})
        place.sql(
            "create table public.owners (id int primary key, name text)",
            "alter publication spillway add table owners",
            f"insert into owners select n, 'owner ' || n from generate_series(0, {OWNERS - 1}) n",
        )
        place.begin()
        yield place


def test_a_reindex_while_related_tables_change(place: Joined) -> None:
    place.sql(f"insert into jobs select n, n % {OWNERS}, 'title', null from generate_series(1, {ROWS}) n")
    right = f"{DOCUMENT} order by 1"
    place.wait(lambda: place.names() == dict(place.sql(right)), "the first documents")
    end = threading.Event()

    def change() -> None:
        number = 0
        while not end.wait(0.3):
            number += 1
            place.sql(f"update owners set name = 'change {number}' where id = {number % OWNERS}")

    changes = threading.Thread(target=change)
    changes.start()
    try:
        place.reindex(mapping=MAPPING)
        place.reaches("done")
    finally:
        end.set()
        changes.join()
    assert place.behind() == [place.v2]
    place.wait(lambda: place.names() == dict(place.sql(right)), "the documents of the new index")
    assert place.status(SINK)["related"]["name"] == f"{SINK}~related"
    place.wait(lambda: place.status(SINK)["due_refreshes"] == 0, "everything to be done")

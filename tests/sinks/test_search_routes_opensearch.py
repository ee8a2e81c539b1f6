"""Routes, updates and shards on a real OpenSearch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from servers.opensearch import OpenSearch
from sinks.conformance import send
from sinks.indexes import Index
from sinks.messages import change, full, shaped
from spillway.position import version
from spillway.sinks.base import OK, Result
from spillway.sinks.search import SearchSink

LSN = 0x16B3748


async def one(sink: SearchSink, body: Any, route: dict[str, object] | None = None, **arguments: Any) -> Result:
    (result,) = await send(sink, shaped([(change({"of": "the row"}, **arguments), body, route)]))
    return result


async def test_a_whole_message_is_the_document_as_it_is(index: Index) -> None:
    for document in ("record", "message"):
        sink = index.sink(document=document)
        batch = shaped([(change({"v": i}, pks=(str(i),)), {"made": i}, None) for i in range(3)])
        assert await send(sink, batch) == [OK] * 3
        assert await index.document("2") == {"made": 2}
    assert await one(sink, {}, action="delete", pks=("2",), lsn=LSN + 64) == OK
    assert await index.document("2") is None


async def test_each_message_goes_where_its_route_says(index: Index) -> None:
    sink = index.sink()
    other = f"{index.name}-other"
    batch = shaped(
        [
            (change({}, pks=("1",)), {"v": 1}, None),
            (change({}, pks=("2",)), {"v": 2}, {"index_name": other}),
            (change({}, pks=("3",)), {"v": 3}, {"id": "three", "routing": "r"}),
        ]
    )
    assert await send(sink, batch) == [OK] * 3
    assert await index.documents() == [
        (index.name, "1", ""),
        (index.name, "three", "r"),
        (other, "2", ""),
    ]
    assert await index.document("three", routing="r") == {"v": 3}
    gone = shaped(
        [
            (change({}, pks=("2",), action="delete", lsn=LSN + 64), {}, {"index_name": other}),
            (change({}, pks=("3",), lsn=LSN + 64), {}, {"id": "three", "routing": "r", "op": "delete"}),
        ]
    )
    assert await send(sink, gone) == [OK] * 2
    assert await index.documents() == [(index.name, "1", "")]


async def test_routed_documents_have_versions_too(index: Index) -> None:
    sink = index.sink()
    route: dict[str, object] = {"id": "x", "index_name": f"{index.name}-other"}
    assert await one(sink, {"v": "new"}, route, lsn=LSN + 320) == OK
    assert await one(sink, {"v": "old"}, route, lsn=LSN) == OK
    assert await index.document("x", index=f"{index.name}-other") == {"v": "new"}


@pytest.fixture(scope="module")
def with_ingest() -> Iterator[OpenSearch]:
    """A node that has the role for pipelines; the shared one has not."""
    with OpenSearch(heap_mb=512, settings={"node.roles": "cluster_manager,data,ingest"}) as server:
        yield server


@pytest.fixture
async def index_with_ingest(with_ingest: OpenSearch, tmp_path: Path) -> AsyncIterator[Index]:
    async with httpx.AsyncClient(base_url=with_ingest.url, trust_env=False, timeout=30) as client:
        index = Index(with_ingest, client, tmp_path)
        processors = [{"set": {"field": "note", "value": "by the pipeline"}}]
        (await client.put("/_ingest/pipeline/add-note", json={"processors": processors})).raise_for_status()
        yield index
        await index.close()


async def test_a_pipeline_by_route_and_by_destination(index_with_ingest: Index) -> None:
    index = index_with_ingest
    assert await one(index.sink(), {"v": 0}, {"id": "0", "pipeline": "add-note"}) == OK
    sink = index.sink(pipeline="add-note")
    assert await send(sink, [change({"v": 1})]) == [OK]
    assert await one(sink, {"v": 2}, {"id": "2"}) == OK
    assert await one(sink, {"v": 3}, {"id": "3", "pipeline": "_none"}) == OK
    assert await one(sink, {"v": 4}, {"id": "4", "op": "update", "doc_as_upsert": True}) == OK
    note = {"note": "by the pipeline"}
    documents = [await index.document(str(i)) for i in range(5)]
    assert documents == [{"v": 0, **note}, {"v": 1, **note}, {"v": 2, **note}, {"v": 3}, {"v": 4}]
    result = await one(index.sink(pipeline="none"), {"v": 2})
    assert result.outcome == "reject"
    assert "[none] does not exist" in result.detail


async def test_one_message_as_several_documents_needs_their_ids(index: Index) -> None:
    sink = index.sink()
    order = change({})
    lines: list[tuple[Any, Any, Any]] = [(order, {"line": n}, {"id": f"1-{n}"}) for n in range(3)]
    assert await send(sink, shaped(lines)) == [OK] * 3
    assert [identity for _, identity, _ in await index.documents()] == ["1-0", "1-1", "1-2"]
    for second in (None, {"routing": "r"}):
        results = await send(sink, shaped([(order, {"n": 1}, None), (order, {"n": 2}, second), *lines]))
        assert [r.reason for r in results] == ["", "document_id_missing", "", "", ""]
    elsewhere: dict[str, object] = {"index_name": f"{index.name}-other"}
    assert await send(sink, shaped([(order, {"n": 1}, None), (order, {"n": 2}, elsewhere)])) == [OK] * 2


async def test_a_table_without_a_key_can_be_told_its_ids(index: Index) -> None:
    sink = index.sink()
    assert (await one(sink, {"v": 1}, {"routing": "r"}, pks=())).reason == "no_primary_key"
    assert await one(sink, {"v": 1}, {"id": "mine"}, pks=()) == OK
    assert await index.document("mine") == {"v": 1}


async def test_what_one_index_refuses_is_no_matter_of_the_others(index: Index) -> None:
    sink = index.sink()
    await index.client.put("/_cluster/settings", json={"persistent": {"action.auto_create_index": "false"}})
    try:
        batch = shaped(
            [
                (change({}, pks=("1",)), {"v": 1}, {"index_name": f"{index.name}-missing"}),
                (change({}, pks=("2",)), {"v": 2}, None),
            ]
        )
        results = await send(sink, batch)
        assert [(r.outcome, r.reason) for r in results] == [("reject", "index_not_found_exception"), ("ok", "")]
    finally:
        await index.client.put("/_cluster/settings", json={"persistent": {"action.auto_create_index": None}})
    assert await index.document("2") == {"v": 2}


async def test_an_index_of_a_route_is_made_with_the_mapping(index: Index, tmp_path: Path) -> None:
    mapping = {"mappings": {"dynamic": "strict", "properties": {"v": {"type": "keyword"}}}}
    (tmp_path / "jobs.json").write_text(json.dumps(mapping))
    sink = index.sink(mapping=Path("jobs.json"))
    other = f"{index.name}-other"
    assert await one(sink, {"v": 1}, {"index_name": other}) == OK
    assert await one(sink, {"v": 2}, {"index_name": other}, pks=("2",)) == OK
    made = (await index.client.get(f"/{other}/_mapping")).json()[other]
    assert made == mapping
    settings = (await index.client.get(f"/{other}/_settings?flat_settings=true")).json()[other]["settings"]
    assert settings["index.gc_deletes"] == "3600s"


# -- updates ----------------------------------------------------------------------------------------------------------


async def test_an_update_leaves_the_fields_of_others(index: Index) -> None:
    await index.create()
    await index.client.put(f"/{index.name}/_doc/1", json={"theirs": 1, "both": {"a": 1}})
    sink = index.sink(op="update")
    assert await send(sink, [change({"ours": 2, "both": {"b": 2}})]) == [OK]
    assert await index.document("1") == {"theirs": 1, "ours": 2, "both": {"a": 1, "b": 2}}
    assert await one(sink, {"ours": 3}, lsn=LSN + 64) == OK
    assert await index.document("1") == {"theirs": 1, "ours": 3, "both": {"a": 1, "b": 2}}


async def test_an_update_of_what_is_not_there(index: Index) -> None:
    sink = index.sink(op="update")
    result = (await send(sink, [change({"v": 1})]))[0]
    assert (result.outcome, result.reason) == ("reject", "document_missing")
    assert await send(index.sink(op="update", doc_as_upsert=True), [change({"v": 1})]) == [OK]
    assert await one(sink, {"v": 2}, {"doc_as_upsert": True}, pks=("2",)) == OK
    assert await one(sink, {"v": 3}, {"doc_as_upsert": True, "index_name": f"{index.name}-new"}) == OK
    assert await index.document("1") == {"v": 1}
    assert await index.document("2") == {"v": 2}
    assert await index.document("1", index=f"{index.name}-new") == {"v": 3}


async def test_the_message_may_be_what_is_merged(index: Index) -> None:
    sent = change({"v": 1})
    sink = index.sink(op="update", doc_as_upsert=True, document="message")
    assert await send(sink, [sent]) == [OK]
    assert await index.document("1") == full(sent)


async def test_an_update_needs_no_toast_columns_but_of_a_new_document(index: Index) -> None:
    sink = index.sink(op="update", doc_as_upsert=True)
    partial = change({"v": 2}, action="update", whole=False, lsn=LSN + 64)
    assert [r.reason for r in await send(sink, [partial])] == ["unchanged_toast"]
    assert await send(sink, [change({"v": 1, "large": "x"})]) == [OK]
    assert await send(sink, [partial]) == [OK]
    assert await index.document("1") == {"v": 2, "large": "x"}


async def test_updates_deletes_and_documents_in_turn(index: Index) -> None:
    """What has versions and what has none, in one index."""
    sink = index.sink(op="update", doc_as_upsert=True)
    for turn in range(3):
        lsn = LSN + 640 * turn
        assert await one(sink, {"a": turn}, lsn=lsn) == OK
        assert await one(sink, {"b": turn}, lsn=lsn + 64) == OK
        assert await index.document("1") == {"a": turn, "b": turn}
        assert await one(sink, {"whole": turn}, {"op": "index"}, lsn=lsn + 128) == OK
        assert await index.document("1") == {"whole": turn}
        assert await one(sink, {"c": turn}, lsn=lsn + 192) == OK
        assert await index.document("1") == {"whole": turn, "c": turn}
        assert await one(sink, {}, action="delete", lsn=lsn + 256) == OK
        assert await index.document("1") is None


async def test_several_rows_may_update_one_document(index: Index) -> None:
    sink = index.sink(op="update", doc_as_upsert=True)
    batch = shaped([(change({}, pks=(str(i),)), {f"line{i}": i, "last": i}, {"id": "order"}) for i in range(5)])
    assert await send(sink, batch) == [OK] * 5
    assert await index.document("order") == {**{f"line{i}": i for i in range(5)}, "last": 4}


async def test_updates_of_several_batches_at_once_all_arrive(index: Index) -> None:
    sinks = [index.sink(op="update", doc_as_upsert=True) for _ in range(3)]

    async def deliver(number: int) -> None:
        for i in range(8):
            left = True
            while left:  # what was beaten too often is for the caller to send again
                result = await one(sinks[number], {f"f{number}-{i}": i}, {"id": "shared"}, pks=(f"{number}-{i}",))
                assert result.outcome in ("ok", "retry"), result
                left = result != OK

    await asyncio.gather(*(deliver(number) for number in range(3)))
    assert await index.document("shared") == {f"f{n}-{i}": i for n in range(3) for i in range(8)}


async def test_an_update_that_comes_late_changes_nothing(index: Index) -> None:
    """The server carries out a request behind a newer one: what was read for it is no longer what is there."""
    sink = index.sink(op="update", doc_as_upsert=True)
    assert await one(sink, {"v": 0}) == OK
    sent: list[bytes] = []
    request = sink._http.request

    async def held(method: Any, url: Any, headers: Any, content: Any = None, **options: Any) -> Any:
        if url.path.endswith("/_bulk") and not sent:
            sent.append(b"".join(content.parts))
            raise TimeoutError
        return await request(method, url, headers, content, **options)

    sink._http.request = held  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        await one(sink, {"v": 1}, lsn=LSN + 64)
    assert await one(sink, {"v": 1}, lsn=LSN + 64) == OK
    assert await one(sink, {"v": 2}, lsn=LSN + 128) == OK
    late = await index.client.post("/_bulk", content=sent[0], headers={"content-type": "application/x-ndjson"})
    assert late.json()["items"][0]["update"]["status"] == 409
    assert await index.document("1") == {"v": 2}


async def test_an_alias_of_several_indices_cannot_be_read_for_an_update(index: Index) -> None:
    for name in ("a", "b"):
        await index.client.put(
            f"/{index.name}-{name}", json={"aliases": {f"{index.name}-alias": {"is_write_index": name == "a"}}}
        )
    sink = index.sink(index_name=f"{index.name}-alias", op="update", doc_as_upsert=True)
    result = await one(sink, {"v": 1})
    assert result.outcome == "retry"
    assert "more than one" in result.detail


async def test_a_closed_index_is_the_sinks_failure_for_updates_too(index: Index) -> None:
    sink = index.sink(op="update", doc_as_upsert=True)
    assert await one(sink, {"v": 1}) == OK
    await index.client.post(f"/{index.name}/_close")
    result = await one(sink, {"v": 2})
    assert (result.outcome, result.reason) == ("sink_down", "index_closed_exception")
    await index.client.post(f"/{index.name}/_open?wait_for_active_shards=1")
    assert await one(sink, {"v": 2}) == OK


# -- shards -----------------------------------------------------------------------------------------------------------

JOIN = {
    "settings": {"number_of_shards": 5},
    "mappings": {"properties": {"relation": {"type": "join", "relations": {"company": "job"}}}},
}


async def test_parents_and_children_by_a_routing_column(index: Index) -> None:
    await index.create(**JOIN)
    sink = index.sink(routing_column="company_id")
    company = change({"company_id": 7, "name": "A", "relation": "company"}, pks=("c7",), table="companies")
    jobs = [
        change({"id": i, "company_id": 7, "relation": {"name": "job", "parent": "c7"}}, pks=(str(i),))
        for i in range(10)
    ]
    assert await send(sink, [company, *jobs]) == [OK] * 11
    assert {routing for _, _, routing in await index.documents()} == {"7"}
    query = {"query": {"has_parent": {"parent_type": "company", "query": {"match": {"name": "A"}}}}}
    found = (await index.client.post(f"/{index.name}/_search", json=query)).json()
    assert found["hits"]["total"]["value"] == 10
    gone = change({"id": 3, "company_id": 7}, pks=("3",), action="delete", lsn=LSN + 64)
    assert await send(sink, [gone]) == [OK]
    assert len(await index.documents()) == 10


async def test_a_message_that_does_not_say_its_shard_is_rejected(index: Index) -> None:
    sink = index.sink(routing_column="tenant")
    rows = [
        change({"id": 1}, pks=("1",)),
        change({"id": 2, "tenant": None}, pks=("2",), action="delete"),
        change({"id": 3, "tenant": "t"}, pks=("3",)),
        change({"id": 4, "tenant": True}, pks=("4",)),
        change('{"id":5,"tenant":12345678901234567890.10}', pks=("5",)),
    ]
    results = await send(sink, rows)
    assert [r.reason for r in results] == ["routing_missing", "routing_missing", "", "", ""]
    assert "replica identity" in results[1].detail
    routings = sorted(routing for _, _, routing in await index.documents())
    assert routings == ["12345678901234567890.10", "t", "true"]


async def test_a_row_that_moves_to_another_shard_leaves_nothing_behind(index: Index) -> None:
    await index.create(settings={"number_of_shards": 5})
    sink = index.sink(routing_column="tenant")
    assert await send(sink, [change({"id": 1, "tenant": "a"})]) == [OK]
    moved = change({"id": 1, "tenant": "b"}, action="update", changes={"tenant": "a"}, lsn=LSN + 64)
    assert await send(sink, [moved]) == [OK]
    assert await send(sink, [moved]) == [OK]
    assert await index.documents() == [(index.name, "1", "b")]


async def test_the_shard_of_whole_messages(index: Index) -> None:
    assert await one(index.sink(routing_column="t"), {"t": "x"}) == OK
    sent = change({"t": "y"}, pks=("2",))
    sink = index.sink(routing_column="t", document="message")
    assert await send(sink, shaped([(sent, full(sent), None)])) == [OK]
    assert await one(sink, {"record": {"t": "z"}}, {"routing": "own"}, pks=("3",)) == OK
    assert [(i, r) for _, i, r in await index.documents()] == [("1", "x"), ("2", "y"), ("3", "own")]


async def test_foreign_versions_under_an_id_of_a_route_are_that_messages_failure(index: Index) -> None:
    other = f"{index.name}-other"
    foreign = version(2, LSN, 1)
    written = await index.client.put(
        f"/{other}/_doc/theirs?version={foreign}&version_type=external", content=orjson.dumps({"v": 1}),
        headers={"content-type": "application/json"},
    )  # fmt: skip
    written.raise_for_status()
    result = await one(index.sink(), {"v": 2}, {"index_name": other, "id": "theirs"})
    assert (result.outcome, result.reason) == ("reject", "foreign_versions")

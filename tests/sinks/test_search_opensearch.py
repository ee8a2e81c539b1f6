"""The search sink against a real OpenSearch: versions, results of single items, states of the index."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from servers.opensearch import OpenSearch
from sinks.conformance import send
from sinks.messages import change, context, full
from spillway.errors import SpillwayError
from spillway.position import version
from spillway.sinks.base import OK, Result
from spillway.sinks.search import SearchSink

LSN = 0x16B3748


class Index:
    """An index of its own for a test, and a sink for it."""

    def __init__(self, server: OpenSearch, client: httpx.AsyncClient, folder: Path) -> None:
        self.client = client
        self.name = f"search-{uuid4().hex}"
        self._url = server.url
        self._folder = folder
        self._sinks: list[SearchSink] = []

    def sink(self, *, started_lsn: int = 0, epoch: int = 1, **options: Any) -> SearchSink:
        arguments = {"endpoint_url": self._url, "index_name": self.name, "document": "record", **options}
        sink = SearchSink(context(self._folder, epoch=epoch, started_lsn=started_lsn), **arguments)
        self._sinks.append(sink)
        return sink

    async def create(self, **body: Any) -> None:
        (await self.client.put(f"/{self.name}", json=body)).raise_for_status()

    async def document(self, identity: str) -> dict[str, Any] | None:
        found = (await self.client.get(f"/{self.name}/_doc/{identity}")).json()
        return found["_source"] if found["found"] else None

    async def setting(self, name: str) -> str:
        found = (await self.client.get(f"/{self.name}/_settings?flat_settings=true")).json()
        setting: str = found[self.name]["settings"][name]
        return setting

    async def put_settings(self, **settings: Any) -> None:
        (await self.client.put(f"/{self.name}/_settings", json=settings)).raise_for_status()

    async def close(self) -> None:
        for sink in self._sinks:
            await sink.close()
        await self.client.delete(f"/{self.name}")


@pytest.fixture
async def index(opensearch: OpenSearch, tmp_path: Path) -> AsyncIterator[Index]:
    async with httpx.AsyncClient(base_url=opensearch.url, trust_env=False, timeout=30) as client:
        index = Index(opensearch, client, tmp_path)
        yield index
        await index.close()


async def one(sink: SearchSink, *args: Any, **arguments: Any) -> Result:
    (result,) = await send(sink, [change(*args, **arguments)])
    return result


async def test_a_missing_index_is_created_to_remember_deletes_for_an_hour(index: Index) -> None:
    sink = index.sink()
    await sink.open()
    assert await index.setting("index.gc_deletes") == "3600s"
    assert await sink.findings() == []


async def test_an_index_that_forgets_deletes_early_is_a_finding(index: Index) -> None:
    await index.create()
    sink = index.sink()
    await sink.open()
    (finding,) = await sink.findings()
    assert (finding.code, finding.severity, finding.sink) == ("search_gc_deletes", "warning", "jobs_sink")
    assert "60 s" in finding.what
    assert index.name in finding.remedy
    await index.put_settings(**{"index.gc_deletes": "2h"})
    assert await sink.findings() == []
    await index.put_settings(**{"index.gc_deletes": "90s"})
    assert "90 s" in (await sink.findings())[0].what


async def test_an_index_behind_an_alias_is_left_as_it_is(index: Index) -> None:
    await index.create(aliases={f"{index.name}-alias": {}})
    sink = index.sink(index_name=f"{index.name}-alias")
    await sink.open()
    assert await one(sink, {"a": 1}) == OK
    assert await index.document("1") == {"a": 1}
    assert index.name in (await sink.findings())[0].what


async def test_nothing_to_check_before_the_index_exists(index: Index) -> None:
    assert await index.sink().findings() == []


async def test_a_late_change_is_superseded_and_changes_nothing(index: Index) -> None:
    sink = index.sink()
    assert await one(sink, {"v": "new"}, lsn=LSN + 320, action="update") == OK
    assert await one(sink, {"v": "old"}, lsn=LSN) == OK
    assert await index.document("1") == {"v": "new"}


async def test_the_same_change_twice_is_applied_twice(index: Index) -> None:
    sink = index.sink()
    assert await one(sink, {"v": 1}) == OK
    assert await one(sink, {"v": 1}) == OK
    assert await index.document("1") == {"v": 1}


async def test_changes_of_one_transaction_are_told_apart(index: Index) -> None:
    sink = index.sink()
    assert await one(sink, {"v": 1}, n=1) == OK
    assert await one(sink, {"v": None}, n=2, action="delete") == OK
    assert await one(sink, {"v": 1}, n=1) == OK, "the replayed insert is late"
    assert await index.document("1") is None


async def test_a_delete_is_not_undone_by_what_was_before_it(index: Index) -> None:
    sink = index.sink()
    assert await one(sink, {"v": 1}) == OK
    assert await one(sink, {}, action="delete", lsn=LSN + 64) == OK
    assert await one(sink, {"v": 1}) == OK
    assert await index.document("1") is None
    assert await one(sink, {"v": 2}, lsn=LSN + 128) == OK
    assert await index.document("1") == {"v": 2}


async def test_a_delete_of_what_is_not_there_is_ok(index: Index) -> None:
    assert await one(index.sink(), {}, action="delete") == OK


async def test_a_backfilled_row_is_below_what_comes_later(index: Index) -> None:
    sink = index.sink()
    assert await one(sink, {"v": "streamed"}, lsn=LSN, n=1) == OK
    assert await one(sink, {"v": "page"}, lsn=LSN, n=0, action="read") == OK
    assert await index.document("1") == {"v": "streamed"}


async def test_a_later_epoch_is_above_everything_of_an_earlier_one(index: Index) -> None:
    assert await one(index.sink(epoch=1), {"v": "lost"}, lsn=LSN * 1000) == OK
    assert await one(index.sink(epoch=2), {"v": "now"}, lsn=LSN) == OK
    assert await index.document("1") == {"v": "now"}


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(version(2, LSN, 1), id="a later epoch"),
        pytest.param(version(1, LSN - 32, 1), id="from before the sink began"),
        pytest.param(1_700_000_000_000_000_000, id="nanoseconds"),
    ],
)
async def test_versions_of_somebody_else_are_the_sinks_failure(index: Index, foreign: int) -> None:
    await index.create()
    written = await index.client.put(
        f"/{index.name}/_doc/1?version={foreign}&version_type=external", json={"v": "theirs"}
    )
    written.raise_for_status()
    lsn = LSN - 3200  # a replay of ours, below the foreign version
    results = await send(
        index.sink(started_lsn=LSN),
        [change({"v": "ours"}, lsn=lsn), change({"v": 2}, pks=("2",), lsn=lsn)],
    )
    assert [r.outcome for r in results] == ["sink_down", "ok"]
    assert results[0].reason == "foreign_versions"
    assert str(foreign) in results[0].detail
    assert await index.document("1") == {"v": "theirs"}


async def test_documents_written_without_a_version_are_replaced(index: Index) -> None:
    await index.create()
    for _ in range(3):
        (await index.client.put(f"/{index.name}/_doc/1", json={"v": "theirs"})).raise_for_status()
    assert await one(index.sink(), {"v": "ours"}) == OK
    assert await index.document("1") == {"v": "ours"}


async def test_a_document_that_does_not_fit_is_rejected_alone(index: Index) -> None:
    await index.create(mappings={"dynamic": "strict", "properties": {"a": {"type": "integer"}}})
    good, unknown, bad = ({"a": 1}, {"a": 1, "b": 2}, {"a": "x" * 300})
    batch = [change(record, pks=(str(i),)) for i, record in enumerate([good, unknown, good, bad, good])]
    results = await send(index.sink(), batch)
    assert [r.outcome for r in results] == ["ok", "reject", "ok", "reject", "ok"]
    assert results[1].reason == "strict_dynamic_mapping_exception"
    assert "[b]" in results[1].detail
    assert results[3].reason == "mapper_parsing_exception"
    assert "[a]" in results[3].detail
    assert "For input string" in results[3].detail
    assert await index.document("4") == good


async def test_a_mended_mapping_takes_what_was_rejected(index: Index) -> None:
    await index.create(mappings={"dynamic": "strict", "properties": {"a": {"type": "integer"}}})
    sink = index.sink()
    assert (await one(sink, {"b": 1})).outcome == "reject"
    await index.client.put(f"/{index.name}/_mapping", json={"dynamic": True})
    assert await one(sink, {"b": 1}) == OK
    assert await index.document("1") == {"b": 1}


async def test_a_read_only_index_is_the_sinks_failure(index: Index) -> None:
    sink = index.sink()
    await sink.open()
    await index.put_settings(**{"index.blocks.read_only_allow_delete": True})  # what the flood stage does
    result = await one(sink, {"v": 1})
    assert (result.outcome, result.reason) == ("sink_down", "cluster_block_exception")
    await index.put_settings(**{"index.blocks.read_only_allow_delete": None})
    assert await one(sink, {"v": 1}) == OK


async def test_a_closed_index_is_the_sinks_failure(index: Index) -> None:
    sink = index.sink()
    await sink.open()
    await index.client.post(f"/{index.name}/_close")
    result = await one(sink, {"v": 1})
    assert (result.outcome, result.reason) == ("sink_down", "index_closed_exception")
    await index.client.post(f"/{index.name}/_open?wait_for_active_shards=1")
    assert await one(sink, {"v": 1}) == OK


async def test_a_deleted_index_is_the_sinks_failure_and_created_anew(index: Index) -> None:
    sink = index.sink()
    await sink.open()
    settings = {"persistent": {"action.auto_create_index": "false"}}
    await index.client.put("/_cluster/settings", json=settings)
    try:
        await index.client.delete(f"/{index.name}")
        result = await one(sink, {"v": 1})
        assert (result.outcome, result.reason) == ("sink_down", "index_not_found_exception")
        assert await one(sink, {"v": 1}) == OK
        assert await index.setting("index.gc_deletes") == "3600s"
    finally:
        await index.client.put("/_cluster/settings", json={"persistent": {"action.auto_create_index": None}})


@pytest.mark.parametrize(
    ("pks", "identity"),
    [
        (("42",), "42"),
        (("0b1e6a9c-1f5e-4d0a-9a8e-111111111111",), "0b1e6a9c-1f5e-4d0a-9a8e-111111111111"),
        (("a-b", "c"), "a%5C-b-c"),
        (("a", "b-c"), "a-b%5C-c"),
        (("a\\", "c"), "a%5C%5C-c"),
        (('"quo"ted\n',), "%22quo%22ted%0A"),
        (("ключ ☃",), "%D0%BA%D0%BB%D1%8E%D1%87%20%E2%98%83"),
    ],
)
async def test_ids(index: Index, pks: tuple[str, ...], identity: str) -> None:
    assert await one(index.sink(), {"v": 1}, pks=pks) == OK
    assert await index.document(identity) == {"v": 1}


async def test_ids_above_the_servers_limit_are_hashed_and_can_be_deleted(index: Index) -> None:
    sink = index.sink()
    batch = [change({"v": i}, pks=(f"{'ü' * 300}{i}",)) for i in range(2)]
    assert await send(sink, [*batch, change({"v": 2}, pks=("",))]) == [OK, OK, OK]
    await index.client.post(f"/{index.name}/_refresh")
    assert (await index.client.get(f"/{index.name}/_count")).json()["count"] == 3
    assert await one(sink, {}, pks=batch[0].pks, action="delete", lsn=LSN + 64) == OK
    await index.client.post(f"/{index.name}/_refresh")
    assert (await index.client.get(f"/{index.name}/_count")).json()["count"] == 2


async def test_the_document_may_be_the_message(index: Index) -> None:
    sent = change({"v": 1})
    assert await send(index.sink(document="message"), [sent]) == [OK]
    assert await index.document("1") == full(sent)


async def test_numbers_arrive_with_all_their_digits(index: Index) -> None:
    assert await one(index.sink(), '{"v":12345678901234567890.12345678901234567890}') == OK
    found = await index.client.get(f"/{index.name}/_doc/1")
    assert "12345678901234567890.12345678901234567890" in found.text


async def test_an_index_name_that_cannot_be_is_an_error_of_the_configuration(index: Index) -> None:
    with pytest.raises(SpillwayError, match=r"change destination\.index_name") as raised:
        await index.sink(index_name="_no").open()
    assert raised.value.code == "index_name"

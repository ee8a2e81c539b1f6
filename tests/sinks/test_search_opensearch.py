"""The search sink against a real OpenSearch: versions, results of single items, states of the index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sinks.conformance import send
from sinks.indexes import Index
from sinks.messages import change, full
from spillway.errors import SpillwayError
from spillway.position import version
from spillway.sinks.base import OK, Readable, Result
from spillway.sinks.index import OWNER, Found, Target
from spillway.sinks.mapping import derived
from spillway.sinks.search import SearchSink

LSN = 0x16B3748


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


# -- reading keys ---------------------------------------------------------------------------------------------------
TABLE = ("public", "jobs")


async def keys_of(
    sink: SearchSink, *columns: str, limit: int = 1000, below: int | None = None, table: tuple[str, str] = TABLE
) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    after: str | None = None
    while True:
        page, after = await sink.keys(table, columns, after, limit, below)
        assert len(page) <= limit
        found += page
        if after is None:
            return found


@pytest.mark.parametrize("document", ["record", "message"])
@pytest.mark.parametrize("shards", [1, 3])
async def test_every_key_is_read_once_in_pages_of_any_size(index: Index, document: str, shards: int) -> None:
    await index.create(settings={"number_of_shards": shards})
    sink = index.sink(document=document)
    assert isinstance(sink, Readable)
    assert await keys_of(sink, "id") == []
    expected = [(str(i),) for i in range(25)]
    await send(sink, [change({"id": i, "title": "x"}, pks=(str(i),)) for i in range(25)])
    for limit in (1, 4, 25, 1000):
        assert sorted(await keys_of(sink, "id", limit=limit), key=lambda key: int(key[0])) == expected


@pytest.mark.parametrize("column", ["a.b", 'Näme "x"', "a b", "id*"])
async def test_columns_of_every_name_can_be_of_the_key(index: Index, column: str) -> None:
    sink = index.sink()
    assert await one(sink, {column: 5, "other": 1}, pks=("5",)) == OK
    assert await keys_of(sink, column) == [("5",)]


async def test_there_are_no_keys_in_an_index_that_is_not_there(index: Index) -> None:
    assert await keys_of(index.sink(), "id") == []


@pytest.mark.parametrize("document", ["record", "message"])
async def test_keys_are_the_text_of_postgres(index: Index, document: str) -> None:
    """Where the server has rounded the number, and the document has another form of the time."""
    await index.create(mappings={"properties": {"at": {"type": "keyword"}}})
    sink = index.sink(document=document)
    keys = [
        ("12345678901234567890.50", "2024-10-28 21:39:21.12747+00", "a-b"),
        ("-1.50", "infinity", "\\"),
        ("0", "0044-03-15 00:00:00 BC", "x" * 300),
    ]
    for key in keys:
        record = '{"n":%s,"at":"2024-10-28T21:39:21.127470Z","t":"x"}' % key[0]  # noqa: UP031  # of braces
        assert await one(sink, record, pks=key) == OK
    assert sorted(await keys_of(sink, "n", "at", "t")) == sorted(keys)


async def test_keys_above_the_limit_of_an_id_are_read_from_the_document(index: Index) -> None:
    sink = index.sink()
    keys = [("ü" * 300 + "1",), ("ü" * 300 + "2",), ("",)]
    await send(sink, [change({"t": key[0]}, pks=key) for key in keys])
    assert sorted(await keys_of(sink, "t")) == sorted(keys)


async def test_documents_written_since_are_left_out(index: Index) -> None:
    sink = index.sink()
    await send(sink, [change({"id": i}, pks=(str(i),), lsn=LSN) for i in range(4)])
    await send(
        sink, [change({"id": 1}, pks=("1",), lsn=LSN + 320), change({}, action="delete", pks=("2",), lsn=LSN + 320)]
    )
    fence = version(1, LSN + 320, 0)
    assert sorted(await keys_of(sink, "id", below=fence)) == [("0",), ("3",)]
    assert sorted(await keys_of(sink, "id")) == [("0",), ("1",), ("3",)]


async def test_keys_of_one_table_among_several(index: Index) -> None:
    sink = index.sink(document="message")
    await send(sink, [change({"id": 1}, pks=("1",)), change({"id": 2}, pks=("2",), table="users")])
    assert await keys_of(sink, "id") == [("1",)]
    assert await keys_of(sink, "id", table=("public", "users")) == [("2",)]


async def test_documents_that_are_not_of_rows_have_no_keys(index: Index) -> None:
    sink = index.sink()
    assert await one(sink, {"id": 1}) == OK
    (await index.client.post(f"/{index.name}/_doc", json={"v": "theirs"})).raise_for_status()
    (await index.client.post(f"/{index.name}/_doc", json={})).raise_for_status()
    assert await keys_of(sink, "id") == [("1",)]


async def test_what_is_written_meanwhile_hides_nothing(index: Index) -> None:
    sink = index.sink()
    await send(sink, [change({"id": i}, pks=(str(i),)) for i in range(6)])
    found, after = await sink.keys(TABLE, ["id"], None, 2, None)
    await send(sink, [change({"id": i}, pks=(str(i),), lsn=LSN + 64) for i in (0, 3)])
    await sink.indexes.refresh(index.name)
    while after is not None:
        page, after = await index.sink().keys(TABLE, ["id"], after, 2, None)
        found += page
    assert set(found) == {(str(i),) for i in range(6)}


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_walk_ends_whatever_is_written_meanwhile(index: Index, shards: int) -> None:
    await index.create(settings={"number_of_shards": shards})
    sink = index.sink()
    await send(sink, [change({"id": i}, pks=(str(i),)) for i in range(6)])
    found: list[tuple[str, ...]] = []
    after: str | None = None
    pages = 0
    while True:
        page, after = await sink.keys(TABLE, ["id"], after, 2, None)
        found += page
        pages += 1
        if after is None:
            break
        assert pages < 20
        new = [change({"id": i}, pks=(str(i),), lsn=LSN + 64 * pages) for i in range(100 * pages, 100 * pages + 9)]
        await send(sink, new)
        await sink.indexes.refresh(index.name)
    assert set(found) >= {(str(i),) for i in range(6)}


async def test_large_documents_come_in_smaller_pages(index: Index) -> None:
    sink = index.sink()
    keys = [("k" * 20_000 + str(i),) for i in range(40)]
    await index.create(mappings={"properties": {"t": {"type": "keyword", "ignore_above": 10}}})
    await send(sink, [change({"t": key[0]}, pks=key) for key in keys])
    page, _ = await sink.keys(TABLE, ["t"], None, 40, None)
    assert 0 < len(page) < 40
    assert sorted(await keys_of(sink, "t", limit=40)) == sorted(keys)


async def test_keys_behind_an_alias_are_those_of_its_write_index(index: Index) -> None:
    alias = f"{index.name}-alias"
    sink = index.sink(index_name=alias)
    await index.create(aliases={alias: {"is_write_index": True}})
    (await index.client.put(f"/{index.name}-old", json={"aliases": {alias: {}}})).raise_for_status()
    (await index.client.put(f"/{index.name}-old/_doc/7", json={"id": 7})).raise_for_status()
    assert await one(sink, {"id": 1}) == OK
    assert await keys_of(sink, "id") == [("1",)]
    actions = [{"add": {"index": index.name, "alias": alias, "is_write_index": False}}]
    (await index.client.post("/_aliases", json={"actions": actions})).raise_for_status()
    with pytest.raises(SpillwayError, match="none of them takes its writes"):
        await keys_of(sink, "id")


async def test_keys_of_a_closed_index_are_refused(index: Index) -> None:
    sink = index.sink()
    await sink.open()
    await index.client.post(f"/{index.name}/_close")
    with pytest.raises(SpillwayError, match="index_closed") as raised:
        await keys_of(sink, "id")
    assert raised.value.code == "sink_refused"


# -- indexes and aliases --------------------------------------------------------------------------------------------
async def test_the_index_is_created_as_the_file_says(index: Index, tmp_path: Path) -> None:
    definition = {
        "mappings": {"dynamic": "strict", "properties": {"a": {"type": "integer"}}},
        "settings": {"index": {"number_of_shards": 2}, "refresh_interval": "5s"},
    }
    (tmp_path / "jobs.json").write_text(json.dumps(definition))
    sink = index.sink(mapping=Path("jobs.json"))
    await sink.open()
    assert await index.setting("index.number_of_shards") == "2"
    assert await index.setting("index.refresh_interval") == "5s"
    assert await index.setting("index.gc_deletes") == "3600s"
    assert await one(sink, {"a": 1}) == OK
    assert (await one(sink, {"b": 1})).reason == "strict_dynamic_mapping_exception"


async def test_an_index_is_created_once(index: Index) -> None:
    indexes = index.sink().indexes
    assert await indexes.create(index.name, {})
    assert not await indexes.create(index.name, {"settings": {"number_of_shards": 3}})
    assert await index.setting("index.gc_deletes") == "3600s"
    assert await indexes.shards(index.name) == 1
    with pytest.raises(SpillwayError, match="unknown setting") as raised:
        await indexes.create(index.name + "-2", {"settings": {"no_such": 1}})
    assert raised.value.code == "sink_refused"


async def test_a_derived_index_takes_what_the_columns_hold(index: Index) -> None:
    """Each value as it is rendered, strange ones included: all stay in the document, the others are searched."""
    columns = {
        "bool": ("boolean", "true"),
        "int2": ("smallint", "-32768"),
        "int4": ("integer[]", "[1,[2,null]]"),
        "int8": ("bigint", "9223372036854775807"),
        "oid": ("oid", "4294967295"),
        "real": ("real", '"NaN"'),
        "double": ("double precision", '"-Infinity"'),
        "numeric": ("numeric(1000,2)", "9" * 400 + ".50"),
        "text": ("text", json.dumps("x" * 40_000)),
        "uuid": ("uuid", '"0b1e6a9c-1f5e-4d0a-9a8e-111111111111"'),
        "enum": ("enum", '"open"'),
        "inet": ("inet", '"10.0.0.0/8"'),
        "date": ("date", '"-0043-03-15"'),
        "stamp": ("timestamp without time zone", '"infinity"'),
        "zoned": ("timestamp with time zone[]", '["2024-10-28T21:39:21.127470Z","+10000-01-01T00:00:00.000000Z"]'),
        "time": ("time with time zone", '"21:39:21.12747+02"'),
        "span": ("tstzrange", json.dumps("[" + "x" * 40_000)),
        "json": ("jsonb", '{"a":{"b":1}}'),
        "interval": ("interval", '{"months":1,"days":-2,"microseconds":9000000000000}'),
        "bytea": ("bytea", json.dumps("\\x" + "ab" * 40_000)),
        "bits": ("bit varying(90000)", json.dumps("1" * 90_000)),
        "other": ("hstore", '"a=>1"'),
    }
    for document in ("record", "message"):
        name = f"{index.name}-{document}"
        sink = index.sink(index_name=name, document=document)
        definition = derived([(column, type_name) for column, (type_name, _) in columns.items()], document)
        assert await sink.indexes.create(name, definition)
        record = "{" + ",".join(f'"{column}":{value}' for column, (_, value) in columns.items()) + "}"
        assert await one(sink, record) == OK
        await sink.indexes.refresh(name)
        prefix = "record." if document == "message" else ""
        for field, value in (("int4", 2), ("enum", "open"), ("json.a.b", 1), ("interval.days", -2), ("bool", True)):
            query = {"query": {"term": {prefix + field: value}}}
            assert (await index.client.post(f"/{name}/_count", json=query)).json()["count"] == 1, field


async def test_a_name_may_be_an_index_an_alias_or_nothing(index: Index) -> None:
    indexes = index.sink().indexes
    a, b, alias = (f"{index.name}-{part}" for part in ("a", "b", "alias"))
    assert await indexes.target(alias) is None
    await indexes.create(a, {})
    await indexes.create(b, {})
    assert await indexes.target(a) == Target(a, False, (a,), a)
    assert await indexes.move_alias(alias, a) == ()
    assert await indexes.target(alias) == Target(alias, True, (a,), a)
    assert await indexes.target(a) == Target(a, False, (a,), a)
    add = {"add": {"index": b, "alias": alias}}
    (await index.client.post("/_aliases", json={"actions": [add]})).raise_for_status()
    assert await indexes.target(alias) == Target(alias, True, (a, b), a)
    plain = {"actions": [{"remove": {"index": a, "alias": alias}}]}
    (await index.client.post("/_aliases", json=plain)).raise_for_status()
    assert await indexes.target(alias) == Target(alias, True, (b,), b), "the only one takes the writes"


async def test_an_alias_moves_in_one_request(index: Index) -> None:
    indexes = index.sink().indexes
    old, new, alias = (f"{index.name}-{part}" for part in ("old", "new", "alias"))
    for name in (old, new):
        await indexes.create(name, {})
        await indexes.move_alias(alias, name)
    assert await index.stands_for(alias) == {new: {"is_write_index": True}}
    assert await indexes.move_alias(alias, new) == (new,), "again"
    assert await indexes.target(old) is not None, "the old one stays"
    with pytest.raises(SpillwayError, match="index_not_found") as raised:
        await indexes.move_alias(alias, f"{index.name}-missing")
    assert raised.value.code == "sink_refused"
    assert await index.stands_for(alias) == {new: {"is_write_index": True}}


async def test_an_index_gives_its_name_to_an_alias_only_when_told(index: Index) -> None:
    sink = index.sink()
    await one(sink, {"v": "old"})
    new = f"{index.name}-v2"
    await sink.indexes.create(new, {})
    with pytest.raises(SpillwayError, match="may be deleted") as raised:
        await sink.indexes.move_alias(index.name, new)
    assert raised.value.code == "alias_is_index"
    assert await index.document("1") == {"v": "old"}
    with pytest.raises(SpillwayError, match="index_not_found"):
        await sink.indexes.move_alias(index.name, f"{index.name}-missing", delete_index=True)
    assert await index.document("1") == {"v": "old"}, "all or nothing"
    assert await sink.indexes.move_alias(index.name, new, delete_index=True) == (index.name,)
    assert await sink.indexes.target(index.name) == Target(index.name, True, (new,), new)
    assert await one(sink, {"v": "new"}) == OK, "the sink goes on under the same name"


async def test_documents_are_counted_after_a_refresh(index: Index) -> None:
    await index.create(settings={"refresh_interval": "-1"})
    sink = index.sink()
    await send(sink, [change({"id": i}, pks=(str(i),)) for i in range(3)])
    await sink.indexes.refresh(index.name)
    assert await sink.indexes.count(index.name) == 3
    with pytest.raises(SpillwayError, match="index_not_found"):
        await sink.indexes.count(f"{index.name}-missing")


async def test_an_alias_keeps_its_options_when_it_moves(index: Index) -> None:
    indexes = index.sink().indexes
    old, new, alias = (f"{index.name}-{part}" for part in ("old", "new", "alias"))
    options = {"filter": {"term": {"v": 1}}, "search_routing": "1", "index_routing": "1"}
    await index.client.put(f"/{old}", json={"mappings": {"properties": {"v": {"type": "integer"}}}})
    await index.client.post("/_aliases", json={"actions": [{"add": {**options, "index": old, "alias": alias}}]})
    await indexes.create(new, {"mappings": {"properties": {"v": {"type": "integer"}}}})
    await indexes.move_alias(alias, new)
    assert await index.stands_for(alias) == {new: {**options, "is_write_index": True}}


async def test_whose_an_index_is_and_what_stands_for_it(index: Index) -> None:
    indexes = index.sink().indexes
    assert await indexes.owner(index.name) is None
    assert await indexes.aliases(index.name) == ()
    await index.create(mappings={"properties": {}})
    assert await indexes.owner(index.name) is None
    await indexes.delete(index.name)
    await indexes.delete(index.name)
    assert await indexes.target(index.name) is None
    await index.create(mappings={"_meta": {"team": "search", OWNER: "7"}}, aliases={f"{index.name}-alias": {}})
    assert await indexes.owner(index.name) == "7"
    assert await indexes.aliases(index.name) == (f"{index.name}-alias",)
    with pytest.raises(SpillwayError, match="alias") as raised:
        await indexes.delete(f"{index.name}-alias")
    assert raised.value.code == "sink_refused"
    assert await indexes.owner(index.name) == "7"


async def test_documents_by_id_are_those_of_this_moment(index: Index) -> None:
    await index.create(settings={"refresh_interval": "-1"})
    sink = index.sink()
    assert await send(sink, [change({"n": "1.50"}), change('{"n":1.50}', pks=("2",))]) == [OK, OK]
    at = version(1, LSN, 1)
    found = await sink.indexes.documents(index.name, ["1", "2", "3"], 10_000)
    assert found == {"1": Found(at, {"n": "1.50"}), "2": Found(at, {"n": "1.50"})}
    assert await sink.indexes.documents(index.name, ["1", "2"], 50) is None, "more than may be held"
    assert await one(sink, {}, action="delete", lsn=LSN + 64) == OK
    assert list(await sink.indexes.documents(index.name, ["1", "2"], 10_000) or ()) == ["2"]
    with pytest.raises(SpillwayError, match="index_not_found") as raised:
        await sink.indexes.documents(f"{index.name}-missing", ["1"], 10_000)
    assert raised.value.code == "sink_unreachable"

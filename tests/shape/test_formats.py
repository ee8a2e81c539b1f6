"""Envelopes, transaction information, timestamps, and rows whose TOAST columns did not come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from oracle.documents import Index
from servers.opensearch import OpenSearch
from shape.place import Json, Shaped, file_sink, python, sink

T = "public.t"
SCHEMA = """
create table t (id int primary key, v text, at timestamptz, body text);
alter table t alter body set storage external;
alter table t replica identity full;
"""
CHANGES = (
    "insert into t values (1, 'a', '2026-01-01 00:00:00.5+00')",
    "update t set v = 'b'",
    "delete from t",
)


@pytest.fixture
def formats(database: str, tmp_path: Path) -> Iterator[dict[str, list[Json]]]:
    kinds = ("sequin", "debezium", "cloudevents", "record")
    sinks = [file_sink(kind, [T], format=kind) for kind in kinds]
    with Shaped(database, tmp_path, sinks, schema=SCHEMA) as place:
        place.begin()
        place.sql(*CHANGES)
        yield {kind: place.came(kind, 3) for kind in kinds}


def test_formats_tell_the_same(formats: dict[str, list[Json]]) -> None:
    sequin = formats["sequin"]
    assert formats["record"] == [message["record"] for message in sequin]
    before = [None, {**sequin[1]["record"], **sequin[1]["changes"]}, sequin[2]["record"]]
    after = [sequin[0]["record"], sequin[1]["record"], None]
    debezium = [message.get("payload", message) for message in formats["debezium"]]
    assert [message["op"] for message in debezium] == ["c", "u", "d"]
    assert [message["before"] for message in debezium] == before
    assert [message["after"] for message in debezium] == after
    for message, of in zip(debezium, sequin, strict=True):
        source = message["source"]
        assert (source["schema"], source["table"]) == ("public", "t")
        assert source["lsn"] == of["metadata"]["commit_lsn"]
    events = formats["cloudevents"]
    assert {event["specversion"] for event in events} == {"1.0"}
    assert len({event["id"] for event in events}) == 3
    assert [event["id"] for event in events] == [message["metadata"]["idempotency_key"] for message in sequin]
    for event, of in zip(events, sequin, strict=True):
        assert event["type"]
        assert event["source"]
        assert event["time"] == of["metadata"]["commit_timestamp"]
        assert event["data"]["record"] == of["record"]


def test_transactions_are_told_on_request(database: str, tmp_path: Path) -> None:
    sinks = [file_sink("told", [T], tx=True), file_sink("untold", [T])]
    with Shaped(database, tmp_path, sinks, schema=SCHEMA) as place:
        place.begin()
        place.sql("insert into t values (1)", "insert into t select n from generate_series(2, 4) n")
        told, untold = place.came("told", 4), place.came("untold", 4)
    assert all("tx" not in line["metadata"] for line in untold)
    shown = [line["metadata"]["tx"] for line in told]
    assert [(tx["total"], tx["index"]) for tx in shown] == [(1, 0), (3, 0), (3, 1), (3, 2)]
    assert len({tx["id"] for tx in shown}) == 2
    assert len({tx["id"] for tx in shown[1:]}) == 1


def test_timestamps_as_numbers(database: str, tmp_path: Path) -> None:
    sinks = [
        file_sink("numbers", [T], timestamp_format="unix_microsecond"),
        file_sink("seen", [T], timestamp_format="unix_microsecond", transform="seen"),
    ]
    seen = python("seen", "transform", "return {'at': record['at']}")
    with Shaped(database, tmp_path, sinks, [seen], schema=SCHEMA) as place:
        place.begin()
        place.sql(CHANGES[0], "insert into t values (2, '2026-01-01T00:00:00.500000Z', null)")
        lines = place.came("numbers", 2)
        assert place.came("seen", 2) == [{"at": 1767225600500000}, {"at": None}]
    assert [line["record"]["at"] for line in lines] == [1767225600500000, None]
    assert lines[1]["record"]["v"] == "2026-01-01T00:00:00.500000Z", "text stays text"
    assert lines[0]["metadata"]["commit_timestamp"].endswith("Z")


def test_timestamps_of_a_column_that_is_added(database: str, tmp_path: Path) -> None:
    with Shaped(
        database, tmp_path, [file_sink("numbers", [T], timestamp_format="unix_microsecond")], schema=SCHEMA
    ) as p:
        p.begin()
        p.sql("insert into t values (1, 'a', '2026-01-01 00:00:00.5+00')")
        p.came("numbers", 1)
        p.sql("alter table t add later timestamptz", "update t set later = at")
        assert p.came("numbers", 2)[1]["record"]["later"] == 1767225600500000


def test_timestamps_of_a_column_whose_type_changes(database: str, tmp_path: Path) -> None:
    numbers = file_sink("numbers", [T], timestamp_format="unix_microsecond")
    with Shaped(database, tmp_path, [numbers], schema=SCHEMA) as p:
        p.begin()
        p.sql("insert into t values (1, '2026-01-01 00:00:00.5Z', '2026-01-01 00:00:00.5+00')")
        first = p.came("numbers", 1)[0]["record"]
        assert (first["v"], first["at"]) == ("2026-01-01 00:00:00.5Z", 1767225600500000)
        p.sql("alter table t alter v type timestamptz using v::timestamptz", "update t set id = 2")
        assert p.came("numbers", 2)[1]["record"]["v"] == 1767225600500000
        p.sql("alter table t alter at type text using '2026-01-01T00:00:00Z'", "update t set id = 3")
        assert p.came("numbers", 3)[2]["record"]["at"] == "2026-01-01T00:00:00Z"


def test_a_document_is_whole_though_its_toast_did_not_come(
    database: str, tmp_path: Path, opensearch: OpenSearch
) -> None:
    """By default: the row is read anew. A row that is gone by then is deleted."""
    name = f"toast-{uuid4().hex}"
    destination = {"type": "opensearch", "endpoint_url": opensearch.url, "index_name": name}
    with (
        Shaped(database, tmp_path, [sink("s", [T], destination)], schema=SCHEMA) as place,
        Index(opensearch.url, name) as index,
    ):
        place.sql("alter table t replica identity default")
        place.begin()
        place.sql("insert into t select n, 'a', now(), repeat(md5(n::text), 200) from generate_series(1, 20) n")
        place.sql(*(f"update t set v = 'b{n}' where id = {n}" for n in range(1, 21)))
        place.sql(
            "update t set v = 'c' where id <= 3", "delete from t where id = 2", "update t set id = 99 where id = 3"
        )
        place.drained("s")
        place.wait(lambda: index.count() == 19, "19 documents")
        found = {int(identity): source for identity, source in index.documents()}
        rows = place.sql("select id, v, body from t")
        assert {number: (found[number]["v"], found[number]["body"]) for number in found} == {
            number: (v, body) for number, v, body in rows
        }
        index.delete()


def test_the_total_of_a_transaction_that_was_written_bit_by_bit(database: str, tmp_path: Path) -> None:
    sinks = [file_sink("told", [T], tx=True), file_sink("untold", [T])]
    with Shaped(database, tmp_path, sinks, schema=SCHEMA) as place:
        place.begin()
        place.sql("insert into t values (1)")
        place.came("told", 1)
        statements = ["insert into t values (2)", "delete from t where id = 1", "insert into t values (3)"]
        with place.transaction(*statements):
            place.sql("insert into t values (4)")
        told = place.came("told", 5)
    assert [line["metadata"]["tx"]["total"] for line in told] == [1, 1, 3, 3, 3]

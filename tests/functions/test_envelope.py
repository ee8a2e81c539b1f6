"""Envelopes: CloudEvents as their SDK reads them, Debezium's as Debezium 3.6.3 sends the same changes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_structured_event
from cloudevents.core.formats.json import JSONFormat

from sinks.messages import SUFFIX, batch_of, change, full
from spillway import __version__
from spillway.change import Change
from spillway.chunk import LARGE, Message
from spillway.functions.envelope import Format, envelope
from spillway.functions.transaction import tx
from spillway.pgoutput.plan import DatabaseMeta

DATABASE = DatabaseMeta("uuid", "böard/1", {}, "postgres", "db.example.com")
COMMITTED = datetime(2024, 10, 28, 21, 39, 21, tzinfo=UTC)
NOW = 1795470984.570492


class FixedClock:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return NOW

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits here")


def message(one: Change, xid: int = 0) -> Message:
    (made,) = batch_of([one])
    chunk = made.span.chunk
    meta = bytearray(chunk.meta)
    memoryview(meta).cast("Q")[LARGE] |= xid << 32
    chunk.meta = bytes(meta)
    chunk.words = memoryview(chunk.meta).cast("Q")
    return made


def wrapped(kind: Format, one: Change, xid: int = 0) -> bytes:
    return envelope(kind, DATABASE, FixedClock())(message(one, xid), one.body + SUFFIX)


# -- Debezium ---------------------------------------------------------------------------------------------------------

# What Debezium 3.6.3 made of: INSERT; UPDATE v (replica identity full); DELETE, on PostgreSQL 18.
THEIRS = """\
{"before":null,"after":{"id":1,"v":"a"},"source":{"version":"3.6.3.Final","connector":"postgresql","name":"bench",\
"ts_ms":1795470979683,"snapshot":"false","db":"postgres","sequence":"[\\"24672504\\",\\"24672504\\"]",\
"ts_us":1795470979683999,"ts_ns":1795470979683999000,"schema":"public","table":"whole","txId":761,"lsn":24672504,\
"xmin":null,"origin":null,"origin_lsn":null},"transaction":null,"op":"c","ts_ms":1795470984647,\
"ts_us":1795470984647347,"ts_ns":1795470984647347547}
{"before":{"id":1,"v":"a"},"after":{"id":1,"v":"b"},"source":{"version":"3.6.3.Final","connector":"postgresql",\
"name":"bench","ts_ms":1795470979685,"snapshot":"false","db":"postgres","sequence":"[\\"24672776\\",\\"24672776\\"]",\
"ts_us":1795470979685644,"ts_ns":1795470979685644000,"schema":"public","table":"whole","txId":762,"lsn":24672776,\
"xmin":null,"origin":null,"origin_lsn":null},"transaction":null,"op":"u","ts_ms":1795470984648,\
"ts_us":1795470984648306,"ts_ns":1795470984648306316}
{"before":{"id":1,"v":"b"},"after":null,"source":{"version":"3.6.3.Final","connector":"postgresql","name":"bench",\
"ts_ms":1795470979686,"snapshot":"false","db":"postgres","sequence":"[\\"24673048\\",\\"24673048\\"]",\
"ts_us":1795470979686011,"ts_ns":1795470979686011000,"schema":"public","table":"whole","txId":764,"lsn":24673048,\
"xmin":null,"origin":null,"origin_lsn":null},"transaction":null,"op":"d","ts_ms":1795470984649,\
"ts_us":1795470984649470,"ts_ns":1795470984649470210}""".splitlines()
OURS = (
    change({"id": 1, "v": "a"}, table="whole", lsn=24672504),
    change({"id": 1, "v": "b"}, table="whole", lsn=24672776, action="update", changes={"v": "a"}),
    change({"id": 1, "v": "b"}, table="whole", lsn=24673048, action="delete"),
)


def shape(value: Any) -> Any:
    """Names in their order, and types; null may be of any type."""
    return {name: shape(one) for name, one in value.items()} if isinstance(value, dict) else type(value).__name__


@pytest.mark.parametrize(("ours", "theirs"), list(zip(OURS, THEIRS, strict=True)))
def test_debezium_as_debezium(ours: Change, theirs: str) -> None:
    made, expected = json.loads(wrapped("debezium", ours, xid=761)), json.loads(theirs)
    assert list(made) == list(expected)
    assert sorted(made["source"]) == sorted(expected["source"])
    assert shape({**made, "source": dict(sorted(made["source"].items()))}) == shape(
        {**expected, "source": dict(sorted(expected["source"].items()))}
    )
    for name in ("before", "after", "op", "transaction"):
        assert made[name] == expected[name]
    for name in ("connector", "snapshot", "db", "schema", "table", "lsn", "xmin"):
        assert made["source"][name] == expected["source"][name]


def test_debezium_says_where_a_change_is_from() -> None:
    made = json.loads(wrapped("debezium", change({"id": 1}, lsn=77, idx=3), xid=4_000_000_000))
    source = made["source"]
    assert (source["version"], source["name"], source["db"]) == (__version__, "böard/1", "postgres")
    assert (source["lsn"], source["txId"]) == (77, 4_000_000_000)
    assert json.loads(source["sequence"]) == ["77", "3"]
    microseconds = int(COMMITTED.timestamp()) * 1_000_000
    assert source["ts_us"] == microseconds
    assert (source["ts_ms"], source["ts_ns"]) == (microseconds // 1000, microseconds * 1000)
    assert (made["ts_ms"], made["ts_us"]) == (1795470984570, 1795470984570492)


def test_debezium_of_an_existing_row() -> None:
    made = json.loads(wrapped("debezium", change({"id": 1}, action="read", idempotency_key="cGFnZTox")))
    assert (made["op"], made["before"], made["after"]) == ("r", None, {"id": 1})
    assert (made["source"]["snapshot"], made["source"]["txId"]) == ("incremental", None)


@pytest.mark.parametrize(
    "one",
    [
        change({"id": 1, "v": 2}, action="update", changes={}),
        change({"id": 1, "v": 2}, action="update", changes={"v": 1}, whole=False),
    ],
    ids=["no replica identity full", "half a row"],
)
def test_debezium_without_the_old_row(one: Change) -> None:
    made = json.loads(wrapped("debezium", one))
    assert (made["before"], made["after"]) == (None, {"id": 1, "v": 2})


def test_the_old_row_is_put_together_without_a_change_of_a_byte() -> None:
    record = '{"id":12345678901234567890123,"a":{"x":[1, {"y":"}\\""}]},"b\\"":1.50,"c":"\\\\","d":null}'
    one = change(record, action="update", changes={'b"': None, "c": [{"}": "]"}]})
    made = wrapped("debezium", one)
    assert made.startswith(
        b'{"before":{"id":12345678901234567890123,"a":{"x":[1, {"y":"}\\""}]},"b\\"":null,"c":[{"}":"]"}],"d":null},'
        b'"after":' + record.encode() + b',"source":'
    )


def test_debezium_of_a_truncated_table() -> None:
    made = json.loads(wrapped("debezium", change("null", action="truncate", pks=())))
    assert (made["op"], made["before"], made["after"]) == ("t", None, None)


# -- CloudEvents ------------------------------------------------------------------------------------------------------

TRAP = {"metadata": {"idempotency_key": "no", "commit_timestamp": "no"}}


@pytest.mark.parametrize(
    ("one", "kind", "subject"),
    [
        (change({"id": 1}), "spillway.insert", "public.jobs:1"),
        (change(TRAP, action="update", changes=TRAP, pks=('a"b', "c")), "spillway.update", 'public.jobs:a"b:c'),
        (change({"id": 1}, action="delete"), "spillway.delete", "public.jobs:1"),
        (change(TRAP, action="read", idempotency_key="cGFnZTox"), "spillway.read", "public.jobs:1"),
        (change({"v": 1}, pks=()), "spillway.insert", "public.jobs"),
    ],
)
def test_cloud_events_as_their_sdk_reads_them(one: Change, kind: str, subject: str) -> None:
    made = wrapped("cloudevents", one)
    headers = {"content-type": "application/cloudevents+json"}
    event = from_structured_event(HTTPMessage(headers, made), JSONFormat())
    assert event.get_specversion() == "1.0"
    assert event.get_id() == full(one)["metadata"]["idempotency_key"]
    assert event.get_source() == "/spillway/b%C3%B6ard%2F1"
    assert event.get_type() == kind
    assert event.get_subject() == subject
    assert event.get_time() == COMMITTED.replace(microsecond=127470)
    assert event.get_datacontenttype() == "application/json"
    assert event.get_data() == full(one)
    assert b"\n" not in made


# -- the row, and what a message says of its transaction --------------------------------------------------------------


def test_a_record_is_the_row_alone() -> None:
    one = change('{"id":1,"n":1.50}', action="delete")
    assert wrapped("record", one) == b'{"id":1,"n":1.50}'


def test_the_transaction_stands_in_the_metadata() -> None:
    one = change({"id": 1}, idx=5)
    for total in (0, 7):
        metadata = json.loads(one.body + tx(message(one, xid=742), total) + SUFFIX)["metadata"]
        assert metadata["tx"] == {"id": 742, "total": total or None, "index": 5}
    read = change({"id": 1}, action="read", idx=5)
    assert json.loads(b"{" + tx(message(read))[1:] + b"}")["tx"] == {"id": None, "total": None, "index": None}

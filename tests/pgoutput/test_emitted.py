"""Logical messages as changes of a table that there is not."""

from __future__ import annotations

import orjson
import psycopg
import pytest

from pgoutput import frames
from pgoutput.capture import connect
from pgoutput.frames import FINAL_LSN, META, Connection, changes_of, xlog
from pgoutput.twins import TWINS
from spillway.chunk import Chunk
from spillway.flow.route import Router, Subscription
from spillway.pgoutput import Committed, ProtocolError, Relation, TableInfo
from spillway.pgoutput.decoder import Decoder
from spillway.pgoutput.emitted import SCHEMA
from spillway.position import format_lsn

ROW = frames.insert(b"1", b"a")


def decoder_of(twin: type[Decoder], most: int = 1 << 20, groups: int = 0) -> Decoder:
    decoder = twin(
        META, lambda *_: (None,) * groups, groups, most, 0, 1 << 30, lambda _: None, lambda *_: (), 0, True, ("orders",)
    )
    stop = decoder.fill(Connection(xlog(frames.relation([("id", 20), ("name", 25)]))), 1 << 30, 1)
    assert isinstance(stop, Relation)
    decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset({"insert"}))
    decoder.take()
    return decoder


def chunk_of(decoder: Decoder, *payloads: bytes) -> Chunk:
    assert decoder.fill(Connection(*map(xlog, payloads)), 1 << 30, 1000) is None
    return decoder.take()


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"id": 7,\n"a": [1.50]}', b'{"id": 7, "a": [1.50]}'), (b"7", b"7"), (b"", b'""'), (b"a\n", rb'"a\n"'),
        (b'"x"', b'"x"'), (b"{1}", b'"{1}"'), (b"\xff\0", rb'"\\xff00"'), (b'"\xff"', rb'"\\x22ff22"'),
        ("ſé".encode(), '"ſé"'.encode()),
    ],
)  # fmt: skip
def test_a_message_in_a_transaction(twin: type[Decoder], content: bytes, told: bytes) -> None:
    chunk = chunk_of(
        decoder_of(twin, groups=1), frames.begin(), ROW, frames.message("orders", content),
        frames.message("others", b""), ROW, frames.commit(),
    )  # fmt: skip
    first, message, last = changes_of(chunk)
    assert message.record == b'{"prefix":"orders","content":' + told + b"}"
    assert (message.schema, message.table, message.action, message.key) == (SCHEMA, "orders", "insert", None)
    assert [one.commit_idx for one in (first, message, last)] == [0, 1, 3]
    assert [chunk.total(index) for index in range(3)] == [4, 4, 4]
    body = orjson.loads(message.body + b"}}")
    assert (body["changes"], body["metadata"]["record_pks"], body["metadata"]["table_name"]) == (None, [], "orders")
    assert chunk.key_texts(1) == [b"", b"", b"", b""]


@pytest.mark.parametrize("twin", TWINS)
def test_a_message_of_no_transaction_is_one_of_its_own(twin: type[Decoder]) -> None:
    decoder = decoder_of(twin)
    chunk = chunk_of(decoder, frames.message("orders", b"1", transactional=False))
    assert (chunk.commit_lsn, chunk.end_lsn, decoder.in_transaction) == (76, 77, False)
    (message,) = changes_of(chunk)
    assert (message.commit_lsn, message.commit_idx, message.commit_time) == (76, 0, 946_684_800.000003)
    assert chunk.total(0) == 1
    assert not chunk_of(decoder, frames.message("others", b"1", transactional=False)).count


@pytest.mark.parametrize("twin", TWINS)
def test_a_message_out_of_place(twin: type[Decoder]) -> None:
    with pytest.raises(ProtocolError):
        chunk_of(decoder_of(twin), frames.message("orders", b"1"))
    with pytest.raises(ProtocolError):
        chunk_of(decoder_of(twin), frames.begin(), frames.message("orders", b"1", transactional=False))


@pytest.mark.parametrize("twin", TWINS)
def test_a_message_that_is_too_large(twin: type[Decoder]) -> None:
    decoder = decoder_of(twin, 1000)
    chunk = chunk_of(
        decoder, frames.begin(), frames.message("orders", b"x" * 1000), frames.message("orders", b"\1" * 300)
    )
    assert [(change.too_large_bytes > 1000, change.record) for change in changes_of(chunk)] == [(True, b"{}")] * 2


@pytest.mark.parametrize("twin", TWINS)
def test_who_wants_the_prefix_gets_it(twin: type[Decoder]) -> None:
    class Sink:
        name = "s"
        truncates_ignored = 0

    sinks = [Sink(), Sink(), Sink()]
    wants = [
        Subscription(sink, lambda *_: False, prefix=prefix)  # type: ignore[arg-type]
        for sink, prefix in zip(sinks, ("orders", "others", None), strict=True)
    ]
    router = Router(wants)
    assert router.prefixes == {"orders", "others"}
    chunk = chunk_of(decoder_of(twin), frames.begin(FINAL_LSN), frames.message("orders", b"1"))
    ((delivery, span),) = router.route(chunk)
    assert delivery is sinks[0]
    assert (len(span), span.keys(0), span.position(0)) == (1, (), (FINAL_LSN, 0, 0))


@pytest.mark.parametrize("postgres", ["15", "18"], indirect=True)
def test_where_a_server_sends_them(database: str) -> None:
    """Messages that are not transactional come in the order of the WAL, between transactions, and not again once
    their end was confirmed."""
    query = "SELECT data FROM pg_logical_slot_peek_binary_changes('s', NULL, NULL, 'proto_version', '1', " \
        "'publication_names', 'p', 'messages', 'true')"  # fmt: skip
    with connect(database) as session, connect(database) as other:
        session.execute("CREATE TABLE jobs (id int8 PRIMARY KEY, name text)")
        session.execute("CREATE PUBLICATION p FOR ALL TABLES")
        session.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        other.execute("BEGIN")
        other.execute("INSERT INTO jobs VALUES (1, 'a')")
        other.execute("SELECT pg_logical_emit_message(false, 'orders', '1')")
        session.execute("INSERT INTO jobs VALUES (2, 'b')")
        session.execute("SELECT pg_logical_emit_message(false, 'orders', '2')")
        other.execute("SELECT pg_logical_emit_message(true, 'orders', '3')")
        other.execute("COMMIT")
        with pytest.raises(psycopg.errors.DivisionByZero):
            session.execute("SELECT pg_logical_emit_message(false, 'orders', '4'), 1 / (id - 2) FROM jobs WHERE id = 2")

        session.execute("INSERT INTO jobs VALUES (3, 'c')")  # has what was rolled back flushed

        def transactions() -> list[Chunk]:
            with session.cursor(binary=True) as cursor:
                payloads = [bytes(row[0]) for row in cursor.execute(query).fetchall()]
            told = []
            for twin in TWINS:
                decoder, chunks = decoder_of(twin), []
                decoder.break_at_lsn = 1
                connection = Connection(*map(xlog, payloads))
                while (stop := decoder.fill(connection, 1 << 30, 1000)) is not None:
                    if isinstance(stop, Relation):
                        decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset({"insert"}))
                    elif isinstance(stop, Committed):
                        chunks.append(decoder.take())
                told.append(chunks)
            assert len({tuple((chunk.data, chunk.meta, chunk.end_lsn) for chunk in chunks) for chunks in told}) == 1
            return [chunk for chunk in told[0] if chunk.count]

        chunks = transactions()
        found = [change for chunk in chunks for change in changes_of(chunk)]
        assert [orjson.loads(change.record).get("content", change.key) for change in found] == [
            1, "public.jobs:2", 2, "public.jobs:1", 3, 4, "public.jobs:3"
        ]  # fmt: skip
        positions = [(change.commit_lsn, change.commit_idx) for change in found]
        assert positions == sorted(set(positions))
        while chunks:
            confirmed = chunks.pop(0)
            assert confirmed.commit_lsn < confirmed.end_lsn
            session.execute("SELECT pg_replication_slot_advance('s', %s::pg_lsn)", (format_lsn(confirmed.end_lsn),))
            assert [chunk.meta for chunk in transactions()] == [chunk.meta for chunk in chunks]

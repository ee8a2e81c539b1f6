"""The compiled decoder takes its frames from libpq by itself, and gets what psycopg would have given it."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn

from pgoutput.compare import columns_of
from pgoutput.frames import META, PLENTY_BYTES
from pgoutput.twins import TWINS
from spillway import impl
from spillway.change import ACTIONS
from spillway.chunk import ChunkBuilder
from spillway.pgoutput import Copy, Ended, Full, Keepalive, Relation, Stop, TableInfo
from spillway.pgoutput.decoder import Decoder

ROWS = 3000
CREDIT_BYTES = 100_000


class ThroughPsycopg:
    """Hides libpq's connection, so that a decoder has to ask psycopg."""

    def __init__(self, connection: PGconn) -> None:
        self.get_copy_data = connection.get_copy_data


@pytest.fixture
def filled(database: str) -> Iterator[str]:
    """A database with a slot for each twin, behind which many rows wait, one of them large."""
    with psycopg.connect(database, autocommit=True) as session:
        session.execute("CREATE TABLE jobs (id int8 PRIMARY KEY, name text)")
        session.execute("CREATE PUBLICATION p FOR TABLE jobs")
        for number in range(len(TWINS)):
            session.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"s{number}"])
        session.execute("INSERT INTO jobs SELECT i, repeat('n', 1 + i %% 200) FROM generate_series(1, %s) i", [ROWS])
        session.execute("UPDATE jobs SET name = repeat('large', 40000) WHERE id = 7")
        session.execute("DELETE FROM jobs WHERE id = 9")
    yield database


def start(session: psycopg.Connection[tuple[object, ...]], slot: str) -> PGconn:
    connection = session.pgconn
    command = f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names 'p')"
    connection.send_query(command.encode())
    result = connection.get_result()
    assert result is not None
    assert result.status == ExecStatus.COPY_BOTH
    return connection


def read(decoder: Decoder, connection: PGconn, copy: Copy) -> list[tuple[object, ...]]:
    """The changes of all rows, each as a chunk of its own: where a chunk is full depends on nothing but credit, where
    frames run out is chance."""
    changes: list[tuple[object, ...]] = []
    while len(changes) < ROWS + 2:
        stop = decoder.fill(copy, CREDIT_BYTES, 700)
        if isinstance(stop, Relation):
            decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset(ACTIONS))
        elif isinstance(stop, Full):
            assert stop.needed_bytes <= CREDIT_BYTES or not decoder.used_bytes
            chunk = decoder.take()
            changes += [(chunk.change(i).body, chunk.change(i).key, chunk.change(i).n) for i in range(chunk.count)]
            if stop.needed_bytes > CREDIT_BYTES:
                assert decoder.fill(copy, stop.needed_bytes, 1) is None or decoder.count
        else:
            assert stop is None or isinstance(stop, Keepalive)
            chunk = decoder.take()
            changes += [(chunk.change(i).body, chunk.change(i).key, chunk.change(i).n) for i in range(chunk.count)]
            if len(changes) < ROWS + 2:
                assert receive(connection)
    return changes


def receive(connection: PGconn) -> bool:
    """Whether the connection still stands."""
    select.select([connection.socket], [], [], 10)
    try:
        connection.consume_input()
    except psycopg.OperationalError:
        return False
    return True


def decoder_of(twin: type[Decoder]) -> Decoder:
    return twin(META, lambda *_: (), 0, 1 << 24, 0, PLENTY_BYTES)


def test_frames_of_libpq_and_of_psycopg_are_the_same(filled: str) -> None:
    assert impl.native is not None
    assert impl.native.calls_libpq()
    results = []
    for number, twin in enumerate(TWINS):
        with closing(psycopg.connect(filled, replication="database", autocommit=True)) as session:
            connection = start(session, f"s{number}")
            native = twin is impl.native.Decoder
            results.append(read(decoder_of(twin), connection, connection if native else ThroughPsycopg(connection)))
    assert results[0] == results[1]


def test_lines_of_libpq_and_of_psycopg_are_the_same(filled: str) -> None:
    assert impl.native is not None
    results = []
    for number, twin in enumerate(TWINS):
        decoder = decoder_of(twin)
        with closing(psycopg.connect(filled, replication="database", autocommit=True)) as session:
            connection = start(session, f"s{number}")
            stop = decoder.fill(connection, PLENTY_BYTES, 10)
            while not isinstance(stop, Relation):
                assert stop is None or isinstance(stop, Keepalive)
                assert receive(connection)
                stop = decoder.fill(connection, PLENTY_BYTES, 10)
        decoder = decoder_of(twin)  # which is not inside of a transaction
        decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset(ACTIONS))
        decoder.begin_page(b"page", 1, 1)
        with psycopg.connect(filled, autocommit=True) as session:
            connection = session.pgconn
            connection.send_query(b"COPY (SELECT * FROM jobs ORDER BY id) TO STDOUT")
            result = connection.get_result()
            assert result is not None
            assert result.status == ExecStatus.COPY_OUT
            native = twin is impl.native.Decoder
            results.append(
                read_page(decoder, connection, connection if native else ThroughPsycopg(connection), stop.oid)
            )
            while connection.get_result() is not None:
                pass
    assert results[0] == results[1]
    assert len(results[0]) == ROWS - 1


def read_page(decoder: Decoder, connection: PGconn, copy: Copy, oid: int) -> list[tuple[object, ...]]:
    changes: list[tuple[object, ...]] = []
    credit_bytes = CREDIT_BYTES
    while True:
        stop = decoder.fill_page(copy, oid, credit_bytes, 700)
        if stop is None:
            assert receive(connection)
            continue
        chunk = decoder.take()
        changes += [(chunk.change(i).body, chunk.change(i).key, chunk.change(i).n) for i in range(chunk.count)]
        if isinstance(stop, Ended):
            assert stop == Ended(-1)
            return changes
        credit_bytes = max(CREDIT_BYTES, stop.needed_bytes)


def test_the_end_of_the_stream(filled: str) -> None:
    assert impl.native is not None
    empty = columns_of(ChunkBuilder().take())
    with closing(psycopg.connect(filled, replication="database", autocommit=True)) as session:
        connection = start(session, "s0")
        decoder = decoder_of(impl.native.Decoder)
        with psycopg.connect(filled, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 's0'")
        stop: Stop = None
        lost = False
        while not isinstance(stop, Ended):
            if stop is None:
                assert not lost
                lost = not receive(connection)
            stop = decoder.fill(connection, PLENTY_BYTES, 10)
            if isinstance(stop, Relation):
                decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset(ACTIONS))
            elif isinstance(stop, Full):
                decoder.take()
        decoder.take()
        assert columns_of(decoder.take()) == empty
    with pytest.raises(psycopg.OperationalError):
        decoder.fill(connection, PLENTY_BYTES, 10)

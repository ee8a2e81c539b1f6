"""One START_REPLICATION against real servers: frames, feedback, and every way in which it ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from pgoutput.frames import META
from pgoutput.twins import TWINS
from servers.postgres import Postgres
from source.conftest import Recorder, SourceDatabase, fill
from spillway.change import ACTIONS
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.pgoutput import Full, Keepalive, Relation
from spillway.pgoutput.decoder import Decoder
from spillway.position import format_lsn, parse_lsn
from spillway.source import catalog
from spillway.source.connect import connect_query
from spillway.source.slot import lag, slot_state
from spillway.source.stream import READ_BYTES, Stream

DEADLINE_SECONDS = 30


async def _end(stream: Stream) -> SpillwayError:
    """Read until the stream raises."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        try:
            while True:
                if fill(stream, Recorder()) is None:
                    await stream.more()
        except SpillwayError as error:
            return error


async def _keepalive(stream: Stream) -> Keepalive:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            stop = fill(stream, Recorder())
            if stop is None:
                await stream.more()
            elif isinstance(stop, Keepalive):
                return stop


async def test_frames_in_commit_order_and_feedback_that_moves_the_slot(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t VALUES (1, 'one')", "INSERT INTO public.t VALUES (2, 'two')")
    rows = await source.frames(stream, b"I", 2)
    assert [b"one" in rows[0].payload, b"two" in rows[1].payload] == [True, True]
    assert 0 < rows[0].wal_start < rows[1].wal_start
    (commit,) = await source.frames(stream, b"C")
    end_lsn = int.from_bytes(commit.payload[10:18], "big")
    stream.send_feedback(end_lsn, end_lsn)
    await stream.flush()

    async def confirmed() -> bool:
        return (await slot_state(source.query, source.slot)).confirmed_flush_lsn == end_lsn

    async with asyncio.timeout(DEADLINE_SECONDS):
        await source.until(confirmed)
    assert (await lag(source.query, source.slot)).confirmed_lsn == end_lsn


async def test_feedback_never_goes_back(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t VALUES (1, 'one')")
    (commit,) = await source.frames(stream, b"C")
    end_lsn = int.from_bytes(commit.payload[10:18], "big")
    stream.send_feedback(end_lsn, end_lsn)
    stream.send_feedback(1, 1)
    stream.send_feedback(0, 0, reply=True)
    assert stream.flush_sent == end_lsn

    async def confirmed() -> bool:
        return (await slot_state(source.query, source.slot)).confirmed_flush_lsn >= end_lsn

    async with asyncio.timeout(DEADLINE_SECONDS):
        await source.until(confirmed)
        stream.send_feedback(1, 1)
        await _keepalive(stream)
        await source.until(confirmed)
    assert (await slot_state(source.query, source.slot)).confirmed_flush_lsn == end_lsn
    await stream.close()
    again = await source.stream(start_lsn=end_lsn)
    again.send_feedback(0, 0)
    assert again.flush_sent == end_lsn


async def test_an_idle_server_answers_when_asked(source: SourceDatabase) -> None:
    """PostgreSQL 12 says nothing by itself."""
    await source.make_slot()
    stream = await source.stream()
    await _keepalive(stream)
    await source.execute("SELECT pg_switch_wal()")
    behind = parse_lsn(str(await source.value("SELECT pg_current_wal_lsn()")))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            stream.send_feedback(0, 0, reply=True)
            if (await _keepalive(stream)).wal_end >= behind:
                break


async def test_a_killed_connection_hands_out_what_had_come_and_then_says_so(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t SELECT i, repeat('x', 500) FROM generate_series(1, 20000) i")
    await source.frames(stream, b"I", 100)
    await source.execute(
        f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{source.slot}'"
    )
    error = await _end(stream)
    assert isinstance(error, SourceUnavailable)
    assert error.code == "connection_lost"
    with pytest.raises(SourceUnavailable):
        stream.send_feedback(0, 0)
    # The slot was not moved: everything comes again.
    again = await _reopened(source)
    assert len(await source.frames(again, b"I", 20000)) == 20000


async def test_what_comes_in_one_bite_with_the_end_is_handed_out_before_it(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t VALUES (1, 'one')")
    committed = await source.value("SELECT pg_current_wal_lsn()")
    walsender = f"FROM pg_stat_replication WHERE application_name = 'spillway:{source.slot}'"

    async def sent() -> bool:
        return await source.value(f"SELECT sent_lsn >= '{committed}' {walsender}") is True

    async def gone() -> bool:
        return await source.value(f"SELECT count(*) {walsender}") == 0

    handed: list[bytes] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        await source.until(sent)
        await source.execute(f"SELECT pg_terminate_backend(pid) {walsender}")
        await source.until(gone)
        with pytest.raises(SourceUnavailable) as caught:
            while True:
                recorder = Recorder()
                stop = fill(stream, recorder)
                handed += [frame.tag for frame in recorder.frames]
                if stop is None:
                    await stream.more()
    assert caught.value.code == "connection_lost"
    assert handed == [b"B", b"R", b"I", b"C"]


async def _reopened(source: SourceDatabase) -> Stream:
    """The server lets go of the slot a moment after the connection ends."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                return await source.stream()
            except SourceUnavailable as error:
                assert error.code == "slot_active"


async def test_a_busy_slot_is_retried_later(source: SourceDatabase) -> None:
    await source.make_slot()
    await source.stream()
    with pytest.raises(SourceUnavailable) as caught:
        await source.stream()
    assert caught.value.code == "slot_active"
    pid = (await slot_state(source.query, source.slot)).active_pid
    assert str(pid) in caught.value.what


async def test_close_frees_the_slot_in_the_middle_of_a_big_transaction(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t SELECT i, repeat('x', 500) FROM generate_series(1, 50000) i")
    await source.frames(stream, b"I")
    await stream.close()
    await stream.close()
    with pytest.raises(SourceUnavailable, match="closed"):
        fill(stream, Recorder())
    again = await _reopened(source)
    await source.frames(again, b"C")


async def test_a_row_of_20_mb_comes_whole(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t VALUES (1, repeat('0123456789', 2000000)), (2, 'small')")
    large, small = await source.frames(stream, b"I", 2)
    assert large.payload.count(b"0123456789") == 2_000_000
    assert len(large.payload) < 20_000_200
    assert b"small" in small.payload


async def test_reads_in_bites_and_takes_every_row_once(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t SELECT i, repeat('x', 200) FROM generate_series(1, 50000) i")
    ids: list[int] = []
    bites = largest = 0
    while len(ids) < 50_000:
        recorder = Recorder()
        while fill(stream, recorder) is not None:
            pass
        ids += [int(frame.payload[13:].split(b"t", 1)[0]) for frame in recorder.frames if frame.tag == b"I"]
        largest = max(largest, sum(len(frame.payload) for frame in recorder.frames))
        bites += 1
        if len(ids) < 50_000:
            await stream.more()
    assert ids == list(range(1, 50_001))
    assert largest < 3 * READ_BYTES
    assert bites < 25_000  # far less than a row each


@pytest.mark.parametrize("decoder_class", TWINS)
async def test_a_decoder_takes_every_row_once_whatever_credit_it_gets(
    source: SourceDatabase, decoder_class: type[Decoder]
) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute("INSERT INTO public.t SELECT i, repeat('x', i % 1000) FROM generate_series(1, 20000) i")
    decoder = decoder_class(META, lambda *_: (), 0, 1 << 20, 100, 1 << 23)
    pks: list[str] = []
    end_lsn = 0
    credit_bytes, most = 1 << 14, 100
    while not end_lsn:
        stop = stream.fill(decoder, credit_bytes, most)
        if isinstance(stop, Relation):
            decoder.learn(stop, await catalog.describe(source.query, stop), frozenset(ACTIONS))
        assert decoder.used_bytes <= credit_bytes
        assert decoder.count <= most
        chunk = decoder.take()
        pks += [chunk.change(index).pks[0] for index in range(chunk.count)]
        end_lsn = chunk.end_lsn
        if isinstance(stop, Full):
            credit_bytes = max(stop.needed_bytes, credit_bytes * 3 % (1 << 17))
        elif stop is None and not end_lsn:
            await stream.more()
    assert pks == [str(number) for number in range(1, 20_001)]


async def test_a_cancelled_wait_loses_nothing(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await _keepalive(stream)
    for number in range(1, 6):
        waiting = asyncio.create_task(source.frames(stream, b"I"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await source.execute(f"INSERT INTO public.t VALUES ({number}, 'row {number}')")
    rows = await source.frames(stream, b"I", 5)
    assert [b"row %d" % n in row.payload for n, row in enumerate(rows, 1)] == [True] * 5


async def test_close_wakes_who_waits(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    ending = asyncio.create_task(_end(stream))
    stream.send_feedback(0, 0, reply=True)
    await asyncio.sleep(0)
    await stream.close()
    assert (await ending).code == "closed"


async def test_a_cancelled_open_leaves_no_walsender(source: SourceDatabase) -> None:
    await source.make_slot()
    for turns in range(0, 12, 3):
        opening = asyncio.create_task(source.stream())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        for stream in source.streams:
            await stream.close()

    async def free() -> bool:
        count = await source.value(
            f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'spillway:{source.slot}'"
        )
        return count == 0

    async with asyncio.timeout(DEADLINE_SECONDS):
        await source.until(free)


async def test_a_missing_slot(source: SourceDatabase) -> None:
    with pytest.raises(SpillwayError) as caught:
        await source.stream()
    assert caught.value.code == "slot_missing"
    assert f"pg_create_logical_replication_slot('{source.slot}', 'pgoutput')" in caught.value.remedy


async def test_a_missing_publication_ends_the_stream_before_anything_is_skipped(source: SourceDatabase) -> None:
    """Up to 17 an error; 18 only warns, sends nothing and goes on in keepalives."""
    await source.make_slot()
    before = (await slot_state(source.query, source.slot)).confirmed_flush_lsn
    stream = await source.stream(publication="nope")
    await source.execute("INSERT INTO public.t VALUES (1, 'must not be skipped')")
    committed = parse_lsn(str(await source.value("SELECT pg_current_wal_lsn()")))
    positions: list[int] = []
    with pytest.raises(SpillwayError) as caught:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                stop = fill(stream, Recorder())
                if stop is None:
                    await stream.more()
                elif isinstance(stop, Keepalive):
                    positions.append(stop.wal_end)
    assert caught.value.code == "publication_missing"
    assert all(position < committed for position in positions), (format_lsn(before), positions)


async def test_a_slot_of_another_plugin_or_database(source: SourceDatabase) -> None:
    await source.execute(f"SELECT pg_create_logical_replication_slot('{source.slot}', 'test_decoding')")
    with pytest.raises(SpillwayError) as caught:
        await source.stream()
    assert caught.value.code == "slot_plugin"
    with pytest.raises(SpillwayError) as caught:
        await source.stream(dsn=make_conninfo(source.dsn, dbname="postgres"))
    assert caught.value.code == "slot_database"


async def test_a_role_without_the_replication_attribute(source: SourceDatabase) -> None:
    await source.make_slot()
    role = f"plain_{source.database}"
    await source.execute(f"CREATE ROLE {role} LOGIN")
    try:
        with pytest.raises(SpillwayError) as caught:
            await source.stream(dsn=source.as_role(role))
        assert caught.value.code == "no_replication_attribute"
        assert "REPLICATION" in caught.value.remedy
    finally:
        await source.execute(f"DROP ROLE {role}")


HOSTILE = {
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kolkata",
    "extra_float_digits": "-10",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "search_path": "hidden",
    "quote_all_identifiers": "on",
    "statement_timeout": "150ms",
    "idle_in_transaction_session_timeout": "100ms",
    "default_transaction_read_only": "on",
    "client_min_messages": "error",
}


async def test_hostile_settings_change_no_byte(source: SourceDatabase) -> None:
    """Of the role, of the database and of the URL's options: the stream and a query give the same text as ever."""
    role = f"hostile_{source.database}"
    await source.execute(
        "CREATE SCHEMA hidden",
        "CREATE TABLE hidden.named (id int)",
        'CREATE TABLE public.t (id int PRIMARY KEY, d date, i interval, z timestamptz, f float8, "real" real, b bytea,'
        " s text, c regclass, y regtype)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        f"CREATE ROLE {role} LOGIN REPLICATION",
        f"GRANT ALL ON public.t TO {role}",
        "INSERT INTO public.t VALUES (1, '2024-03-04', '1 mon -2 days 03:04:05.678', '2024-03-04 05:06:07.89+02',"
        " 0.1::float8 + 0.2::float8, 1.1, '\\x00ff41', 'gr\u00fc\u00dfe', 'hidden.named', 'hidden.named')",
    )
    for name, value in HOSTILE.items():
        await source.execute(f"ALTER ROLE {role} SET {name} = '{value}'")
        await source.execute(f"ALTER DATABASE {source.database} SET {name} = '{value}'")
    try:
        dsn = make_conninfo(source.as_role(role), options="-c DateStyle=German -c TimeZone=America/New_York")
        stream = await source.stream(dsn=dsn)
        (row,) = await source.frames(stream, b"I")
        texts = _texts(row.payload)
        assert texts == [
            b"1", b"2024-03-04", b"1 mon -2 days +03:04:05.678", b"2024-03-04 03:06:07.89+00",
            b"0.30000000000000004", b"1.1", b"\\x00ff41", "gr\u00fc\u00dfe".encode(), b"hidden.named", b"hidden.named",
        ]  # fmt: skip
        query = await connect_query(dsn, source.slot)
        try:
            copied = b""
            async with query.cursor().copy(b"COPY public.t TO STDOUT") as copy:
                async for block in copy:
                    copied += bytes(block)
            assert copied.replace(b"\\\\", b"\\").rstrip(b"\n").split(b"\t") == texts
            await query.execute("SELECT pg_sleep(0.3)")  # no statement_timeout of the role's
        finally:
            await query.close()
    finally:
        await stream.close()
        await source.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def _texts(insert: bytes) -> list[bytes]:
    """The columns of an Insert message (all in text)."""
    assert insert[:1] == b"I"
    assert insert[5:6] == b"N"
    texts, at = [], 8
    for _ in range(int.from_bytes(insert[6:8], "big")):
        assert insert[at : at + 1] == b"t"
        size = int.from_bytes(insert[at + 1 : at + 5], "big")
        texts.append(insert[at + 5 : at + 5 + size])
        at += 5 + size
    return texts


async def test_messages_are_streamed_where_the_server_can(source: SourceDatabase) -> None:
    await source.make_slot()
    stream = await source.stream()
    await source.execute(
        "BEGIN; SELECT pg_logical_emit_message(true, 'prefix', 'said'); INSERT INTO public.t VALUES (1, 'x'); COMMIT"
    )
    recorder = Recorder()
    while not recorder.frames or recorder.frames[-1].tag != b"C":
        if fill(stream, recorder) is None:
            await stream.more()
    assert (b"M" in [frame.tag for frame in recorder.frames]) == (source.version >= 140000)


async def test_a_publication_name_that_needs_quotes(source: SourceDatabase) -> None:
    name = 'it\'s "A, b"'
    await source.make_slot(publication='"' + name.replace('"', '""') + '"')
    stream = await source.stream(publication=name)
    await source.execute("INSERT INTO public.t VALUES (1, 'x')")
    await source.frames(stream, b"I")


@pytest.mark.parametrize("version", ["13+", "wal_level"])
async def test_a_slot_that_lost_its_wal_and_a_server_that_does_not_decode(version: str) -> None:
    lost = version == "13+"
    settings = (
        {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
        if lost
        else {"wal_level": "replica"}
    )
    with Postgres("15", settings=settings) as server:
        query = await connect_query(server.dsn())
        try:
            if lost:
                await query.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
                for _ in range(4):
                    await query.execute("CREATE TABLE IF NOT EXISTS public.t (id int); INSERT INTO public.t VALUES (1)")
                    await query.execute("SELECT pg_switch_wal()")
                await query.execute("CHECKPOINT")
                state = await slot_state(query, "s")
                assert (state.wal_status, state.invalidation) == ("lost", "wal_removed")
            with pytest.raises(SpillwayError) as caught:
                await Stream.open(server.dsn(), "s", ["p"], 0, query.info.server_version)
        finally:
            await query.close()
    if lost:
        assert caught.value.code in ("slot_invalidated", "wal_removed")
        assert "pg_drop_replication_slot('s')" in caught.value.remedy
    else:
        assert caught.value.code == "wal_level"
        assert "ALTER SYSTEM SET wal_level = logical" in caught.value.remedy


@pytest.fixture
def certificate(tmp_path: Path) -> Sequence[Path]:
    """A key and a certificate of its own."""
    files = (tmp_path / "key.pem", tmp_path / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-keyout", str(files[0]), "-out", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


async def test_tls_streams_large_and_small_rows_without_stalling(certificate: Sequence[Path]) -> None:
    """OpenSSL may hold bytes that the socket does not show: nothing waits for the next row to come out."""
    with Postgres("18") as server:
        for file in certificate:
            target = server.data / file.name
            target.write_bytes(file.read_bytes())
            target.chmod(0o600)
            _give(target, server)
        await asyncio.to_thread(server.stop)
        server.configure(ssl="on", ssl_cert_file="cert.pem", ssl_key_file="key.pem")
        await asyncio.to_thread(server.start)
        dsn = make_conninfo(server.dsn(), sslmode="require")
        source = SourceDatabase(dsn, await connect_query(dsn))
        try:
            assert source.query.pgconn.ssl_in_use
            await source.make_slot()
            stream = await source.stream()
            async with asyncio.timeout(DEADLINE_SECONDS):
                for number, size in enumerate((10, 8_000, 12_345, 16_384, 16_400, 24_500, 300_000, 3) * 8):
                    await source.execute(f"INSERT INTO public.t VALUES ({number}, repeat('x', {size}))")
                    (row,) = await source.frames(stream, b"I")
                    assert row.payload.endswith(b"x" * size)
        finally:
            for stream in source.streams:
                await stream.close()
            await source.query.close()


def _give(path: Path, server: Postgres) -> None:
    """To the user that the server runs as."""
    owner = server.data.stat()
    os.chown(path, owner.st_uid, owner.st_gid)

"""Conditions, credit, time, and what goes wrong while a page is read."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from pgoutput.given import If
from pgoutput.twins import TWINS
from servers.postgres import Postgres
from source.conftest import MANY, SourceDatabase
from source.paging import ALL, RENEW_BYTES, SECONDS, T, changes, opened, pages, reading, records
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.flow.route import filters_of_pages
from spillway.pgoutput.decoder import Decoder
from spillway.source import view
from spillway.source.connect import Connection, connect_query
from spillway.source.origin import Expected
from spillway.source.page import NeedsCredit, PageReader, PageTimeout, Selection

ROWS = (
    "CREATE TABLE public.t (id int PRIMARY KEY, at timestamptz, kind text, body text)",
    "INSERT INTO public.t SELECT i, timestamptz '2024-01-01 00:00+00' + (i * 7 % 100) / 3 * interval '1 day',"
    " 'k' || i % 5, repeat('x', i * 10) FROM generate_series(1, 100) i",
    "CREATE PUBLICATION p FOR TABLE public.t",
)
START = "2024-01-21"


async def _ids(source: SourceDatabase, where: str, order: str = "id") -> list[str]:
    found = await source.query.execute(f"SELECT id::text FROM public.t WHERE {where} ORDER BY t.{order}".encode())
    return [row[0] for row in await found.fetchall()]


async def test_a_condition_ends_pages_by_the_index(source: SourceDatabase) -> None:
    await source.execute(*ROWS)
    selection = Selection("public", "t", where="kind = 'k3' and t.id > 40 or id = 2 -- that's all")
    expected = await _ids(source, "(kind = 'k3' AND id > 40) OR id = 2")
    async with reading(source) as reader:
        for size, credit in ((1, MANY), (7, MANY), (MANY, MANY), (MANY, 6000), (50, 6000)):
            read = await pages(reader, selection, size, credit=credit)
            assert [c.pks[0] for page in read for c in changes(page)] == expected
            assert credit < MANY or len(read) >= 100 // size  # also where no row matched
        assert await reader.estimate(selection) < 100
        looked_at = [page.looked_at for page in await pages(reader, selection, 7)]
        assert looked_at[:-1] == [7] * 14, "whether they met the condition or not"


@pytest.mark.parametrize("key", ["tenant, k", "k, tenant"])
async def test_bounds_of_the_key(source: SourceDatabase, key: str) -> None:
    """Both included, by the operators of the index: by the bare name citext would be compared as text. A row that comes
    between the last one below and the least is none of theirs."""
    await source.execute(
        "CREATE EXTENSION citext SCHEMA public",
        f"CREATE TABLE public.t (tenant int, k public.citext, PRIMARY KEY ({key}))",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t SELECT n, k FROM generate_series(1, 300) n, unnest(ARRAY['a', 'B', 'c']) k",
        "ANALYZE public.t",
    )
    selection = Selection("public", "t", least_key=("9", "b"), most_key=("10", "B"))
    async with reading(source) as reader:
        within = await reader.bounded(selection)
        await source.execute("INSERT INTO public.t VALUES (9, 'aa')")
        for size in (1, 2, MANY):
            found = {c.pks for page in await pages(reader, selection, size, within) for c in changes(page)}
            assert found == {("9", "B"), ("9", "c"), ("10", "a"), ("10", "B")}
        if key == "tenant, k":
            assert len(await pages(reader, selection, 4, within)) <= 2, "nothing else is looked at"
            assert await reader.estimate(selection, within) < 100
        await source.execute(
            "ALTER TABLE public.t ADD COLUMN extra int DEFAULT 0, DROP CONSTRAINT t_pkey,"
            " ADD PRIMARY KEY (tenant, k, extra)"
        )
        with pytest.raises(SpillwayError) as caught:
            await pages(reader, selection, within=within)
        assert caught.value.code == "order_changed"


@pytest.mark.parametrize("index", [True, False])
async def test_from_a_start_of_the_sort_column_on(source: SourceDatabase, index: bool) -> None:
    await source.execute(*ROWS, "UPDATE public.t SET at = NULL WHERE id = 50")
    if index:
        await source.execute("CREATE INDEX ON public.t (at)")
    order = "at, t.id" if index and source.version >= 130000 else "id"
    selection = Selection("public", "t", sort_column="at", start=START)
    both = Selection("public", "t", where="kind <> 'k1'", sort_column="at", start=START)
    async with reading(source) as reader:
        for size, credit in ((1, MANY), (7, MANY), (MANY, MANY), (MANY, 6000)):
            read = [c.pks[0] for page in await pages(reader, selection, size, credit=credit) for c in changes(page)]
            assert read == await _ids(source, f"at >= '{START}'", order)
            read = [c.pks[0] for page in await pages(reader, both, size, credit=credit) for c in changes(page)]
            assert read == await _ids(source, f"at >= '{START}' AND kind <> 'k1'", order)
        # Without a start, rows that are null there are there as well.
        assert len(await records(reader, Selection("public", "t", sort_column="at"), 9)) == 100
        by_key = Selection("public", "t", sort_column="id", start="95")
        assert len(await records(reader, by_key, 4)) == 6
        with pytest.raises(SpillwayError, match="has no column nothing"):
            await records(reader, Selection("public", "t", sort_column="nothing"))
        with pytest.raises(SpillwayError) as caught:
            await records(reader, Selection("public", "t", sort_column="at", start="soon"))
        assert caught.value.code == "bad_condition"


@pytest.mark.parametrize(
    "where",
    [
        "true) OR (true",
        "true], ARRAY[true",
        "true; DROP TABLE public.t",
        "nothing = 1",
        "id",
        "true, true",
        "count(*) > 1",
        "$1",
        "'",
        "/*",
        "",
        "kind::int = 1",
    ],
)
async def test_what_is_no_condition(source18: SourceDatabase, where: str) -> None:
    await source18.execute(*ROWS)
    async with reading(source18) as reader:
        for _ in range(2):
            with pytest.raises(SpillwayError) as caught:
                await records(reader, Selection("public", "t", where=where))
            assert caught.value.code == "bad_condition"
        assert len(await records(reader)) == 100


async def test_a_page_ends_where_its_credit_does(source: SourceDatabase) -> None:
    await source.execute(*ROWS)
    async with reading(source) as reader:
        for size in (MANY, 10):
            read = await pages(reader, size=size, credit=8000)
            assert [c.pks[0] for page in read for c in changes(page)] == [str(i) for i in range(1, 101)]
            assert len(read) > 20
        with pytest.raises(NeedsCredit) as caught:
            await reader.read(T, ALL, ("1", "99"), 10, 500, SECONDS)
        page = await reader.read(T, ALL, ("1", "99"), 10, caught.value.needed_bytes, SECONDS)
        assert [c.pks for c in changes(page)] == [("100",)]


async def test_a_large_page_is_cancelled(source: SourceDatabase) -> None:
    """More than the sockets hold is on its way when the credit is used up."""
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, body text)",
        "INSERT INTO public.t SELECT i, repeat('x', 1000) FROM generate_series(1, 20000) i",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    async with reading(source) as reader:
        page = await reader.read(T, ALL, None, MANY, 500_000, SECONDS)
        assert page.cursor == ("1", str(page.chunk.count))
        assert page.chunk.cost < 500_000
        page = await reader.read(T, ALL, ("1", "19990"), MANY, MANY, SECONDS)
        assert (page.chunk.count, page.cursor) == (10, None)


async def test_a_connection_that_carried_a_huge_row_is_not_kept(source18: SourceDatabase) -> None:
    await source18.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, body text)",
        f"INSERT INTO public.t VALUES (1, 'x'), (2, repeat('x', {9 << 20})), (3, 'x')",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    ours = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'spillway:s' AND datname = current_database()"
    )

    async def gone() -> bool:
        return await source18.value(ours) == 0

    async with reading(source18) as reader:
        first = await reader.read(T, ALL, None, 1, MANY, SECONDS)
        assert await source18.value(ours) == 1
        second = await reader.read(T, ALL, first.cursor, 1, MANY, SECONDS)
        assert [(c.pks, c.too_large_bytes > 0) for c in changes(second)] == [(("2",), True)]
        await source18.until(gone)
        third = await reader.read(T, ALL, second.cursor, 1, MANY, SECONDS)
        assert [c.pks for c in changes(third)] == [("3",)]


async def test_many_keys_at_once(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, body text)",
        "INSERT INTO public.t SELECT i, 'x' FROM generate_series(1, 1100) i",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    keys = [(str(i),) for i in range(1, 1201, 2)]
    async with reading(source) as reader:
        page = await reader.read_keys(T, keys, MANY, SECONDS)
        assert sorted(int(c.pks[0]) for c in changes(page)) == list(range(1, 1100, 2))
        assert page.missing == [(str(i),) for i in range(1101, 1201, 2)]
        assert page.cursor is None
        with pytest.raises(NeedsCredit):
            await reader.read_keys(T, keys, 5000, SECONDS)
        page = await reader.read_keys(T, keys[:2], MANY, SECONDS)
        assert [c.pks for c in changes(page)] == [("1",), ("3",)]
        assert (await reader.read_keys(T, [], MANY, SECONDS)).chunk.count == 0


async def test_keys_that_are_absent_are_deletes(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (b int, body text, a text, PRIMARY KEY (a, b))",
        "INSERT INTO public.t VALUES (1, 'x', 'y'), (2, repeat('x', 9000), 'y')",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    async with reading(source) as reader:
        assert await reader.key_columns(T) == ("b", "a")
        cut = await reader.read(T, ALL, None, 5, 5000, SECONDS)  # the second row stays behind in the decoder
        assert cut.chunk.count == 1
        page = await reader.read_absent(T, [("1", "y"), ("3", "y"), ("1", "z")], SECONDS)
        deletes = changes(page)
        assert [(c.action, c.pks, c.n) for c in deletes] == [("delete", ("3", "y"), 0), ("delete", ("1", "z"), 0)]
        assert page.missing == [("3", "y"), ("1", "z")]
        assert len(await records(reader)) == 2


@pytest.mark.parametrize("twin", TWINS)
async def test_what_the_filters_leave_out_is_absent(source: SourceDatabase, twin: type[Decoder]) -> None:
    await source.execute(
        "CREATE TABLE public.t (b int, n int, body text, a text, PRIMARY KEY (a, b))",
        "INSERT INTO public.t VALUES (1, 1, 'x', 'y'), (2, 2, repeat('x', 9000), 'y'), (3, NULL, 'x', 'y')",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    filters = filters_of_pages((If("n", "eq", 2, table=("public", "t")),))
    keys = [("1", "y"), ("2", "y"), ("3", "y"), ("4", "y")]
    async with reading(source, twin=twin, filters=filters) as reader:
        assert (await reader.read_absent(T, keys, SECONDS)).missing == [("4", "y")]
        page = await reader.read_absent(T, keys, SECONDS, {"n"}, 5000)  # the large column is not read
        assert [(c.action, c.pks) for c in changes(page)] == [("delete", (n, "y")) for n in "134"]
        assert page.missing == [(n, "y") for n in "134"]
        with pytest.raises(NeedsCredit):
            await reader.read_absent(T, keys, SECONDS, {"n", "body"}, 5000)
        assert [c.pks for c in changes(await reader.read(T, ALL, None, 5, MANY, SECONDS))] == [("2", "y")]


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Postgres]:
    """A server with TLS."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    with Postgres("18") as server:
        server.stop()
        owner = server.data.stat()
        for name in ("key.pem", "cert.pem"):
            (server.data / name).write_bytes((tmp_path / name).read_bytes())
            (server.data / name).chmod(0o600)
            os.chown(server.data / name, owner.st_uid, owner.st_gid)
        server.configure(ssl="on", ssl_cert_file="cert.pem", ssl_key_file="key.pem")
        server.start()
        yield server


async def test_pages_over_tls_do_not_stall(encrypted: Postgres) -> None:
    """OpenSSL may hold bytes that the socket does not show."""
    dsn = make_conninfo(encrypted.dsn(), sslmode="require")
    async with await connect_query(dsn) as query:
        source = SourceDatabase(dsn, query)
        await source.execute(
            "CREATE TABLE public.t (id int PRIMARY KEY, body text)",
            "INSERT INTO public.t SELECT i, repeat('x', (ARRAY[3, 8000, 12345, 16384, 16400, 300000])[i % 6 + 1])"
            " FROM generate_series(1, 60) i",
            "CREATE PUBLICATION p FOR TABLE public.t",
        )
        async with reading(source) as reader, asyncio.timeout(SECONDS):
            for size, credit in ((1, MANY), (7, MANY), (MANY, MANY), (MANY, 1_500_000)):
                assert len(await records(reader, size=size, credit=credit)) == 60


async def test_time_runs_out(source: SourceDatabase) -> None:
    await source.execute(*ROWS)
    slow = Selection("public", "t", where="pg_sleep(10) IS NOT NULL")
    async with reading(source) as reader:
        with pytest.raises(PageTimeout):
            await reader.read(slow, ALL, None, 5, MANY, 0.05)
        assert len(await records(reader)) == 100
        assert await source.value("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == 0


async def _sleeps(source: SourceDatabase) -> bool:
    return await source.value("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == 1


async def test_a_lost_connection_is_made_anew(source: SourceDatabase) -> None:
    await source.execute(*ROWS)
    slow = Selection("public", "t", where="pg_sleep(100) IS NOT NULL")
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    async with reading(source) as reader:
        read = asyncio.create_task(records(reader, slow))
        await source.until(lambda: _sleeps(source))
        await source.execute(end)
        with pytest.raises(SourceUnavailable):
            await read
        assert len(await records(reader)) == 100
        read = asyncio.create_task(records(reader, slow))
        await source.until(lambda: _sleeps(source))
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert len(await records(reader)) == 100
        await source.execute(end)
    with pytest.raises(SourceUnavailable, match="closed"):
        await records(reader)


async def test_grants_and_row_security(source: SourceDatabase) -> None:
    await source.execute(*ROWS, f"CREATE ROLE r_{source.database} LOGIN")
    role = f"r_{source.database}"
    try:
        async with reading(source, source.as_role(role)) as reader:
            with pytest.raises(SpillwayError, match="GRANT SELECT ON") as caught:
                await reader.relations("public", "t")
            assert caught.value.code == "no_grant"
            with pytest.raises(SpillwayError) as caught:
                await records(reader)
            assert caught.value.code == "permission"
            await source.execute(f"GRANT USAGE ON SCHEMA public TO {role}", f"GRANT SELECT ON public.t TO {role}")
            assert len(await records(reader, size=30)) == 100
            await source.execute("ALTER TABLE public.t ENABLE ROW LEVEL SECURITY")
            with pytest.raises(SpillwayError, match="row-level security policy") as caught:
                await records(reader)
            assert caught.value.code == "permission"
    finally:
        await source.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.fixture(params=["12", "18"])
def standby(request: pytest.FixtureRequest) -> Iterator[tuple[Postgres, Postgres]]:
    """A primary and its hot standby."""
    with Postgres(request.param) as primary, Postgres(request.param) as standby:
        primary.stop()
        standby.stop()
        shutil.rmtree(standby.data)
        shutil.copytree(primary.data, standby.data)
        for path in (standby.data, *standby.data.rglob("*")):
            shutil.copystat(primary.data / path.relative_to(standby.data), path)
            owner = (primary.data / path.relative_to(standby.data)).stat()
            shutil.chown(path, owner.st_uid, owner.st_gid)
        (standby.data / "standby.signal").touch()
        standby.configure(primary_conninfo=f"host=127.0.0.1 port={primary.port} user=postgres")
        primary.start()
        standby.start()
        yield primary, standby


async def test_a_page_of_a_standby(standby: tuple[Postgres, Postgres]) -> None:
    primary, replica = standby
    async with await connect_query(primary.dsn()) as query:
        source = SourceDatabase(primary.dsn(), query)
        await source.execute(*ROWS)
        behind = await source.value("SELECT pg_current_wal_insert_lsn()::text")
        async with await connect_query(replica.dsn()) as other, await connect_query(primary.dsn()) as writer:
            seen = SourceDatabase(replica.dsn(), other)

            async def replayed() -> bool:
                return await seen.value(f"SELECT pg_last_wal_replay_lsn() >= '{behind}'") is True

            await source.until(replayed)
            await writer.execute("BEGIN")
            xid = await SourceDatabase("", writer).value("SELECT txid_current()")
            assert isinstance(xid, int)
            async with reading(seen) as reader:
                assert reader.standby
                assert await reader.running() == {}
                for size, credit in ((7, MANY), (MANY, 8000)):
                    assert len(await records(reader, size=size, credit=credit)) == 100
                read = await reader.read(Selection("public", "t", where="id > 90"), ALL, None, MANY, 3000, SECONDS)
                assert read.snapshot.replayed_lsn is not None
                assert not read.snapshot.sees(xid, read.snapshot.replayed_lsn)
                assert read.snapshot.sees(xid, read.snapshot.replayed_lsn - 1)
                assert await reader.flushed_lsn() >= read.snapshot.replayed_lsn
            await writer.execute("ROLLBACK")


async def test_another_system_and_a_promoted_replica_are_not_read(standby: tuple[Postgres, Postgres]) -> None:
    primary, replica = standby
    async with await connect_query(primary.dsn()) as query, await connect_query(replica.dsn()) as other:
        source, seen = SourceDatabase(primary.dsn(), query), SourceDatabase(replica.dsn(), other)
        await source.execute(*ROWS, "CREATE ROLE reader LOGIN", "GRANT SELECT ON public.t TO reader")
        await source.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
        system_id = str(await source.value("SELECT system_identifier FROM pg_control_system()"))
        written = await source.value("SELECT pg_current_wal_insert_lsn()::text")

        async def replayed() -> bool:
            return await seen.value(f"SELECT pg_last_wal_replay_lsn() >= '{written}'") is True

        async def code(reader: PageReader) -> str:
            with pytest.raises(SourceUnavailable) as caught:
                await records(reader)
            return caught.value.code

        async def gone() -> bool:
            return await seen.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'spillway:s'") == 0

        async def refused(dsn: str, expected: Expected) -> str:
            with pytest.raises(SpillwayError) as caught:
                await opened(dsn, expected)
            return caught.value.code

        await source.until(replayed)
        assert await refused(replica.dsn(), Expected("1", replica=True)) == "replica_foreign"
        assert await refused(primary.dsn(), Expected("1")) == "other_system"
        assert await refused(primary.dsn(), Expected(system_id, replica=True)) == "replica_promoted"
        # A role from which the function is kept asks a walsender, if it may.
        as_reader = seen.as_role("reader")
        assert await refused(as_reader, Expected(system_id, replica=True)) == "no_replication_attribute"
        await source.execute("ALTER ROLE reader REPLICATION")
        written = await source.value("SELECT pg_current_wal_insert_lsn()::text")
        await source.until(replayed)
        reader = await opened(as_reader, Expected(system_id, replica=True))
        try:
            assert len(await records(reader)) == 100
            await seen.execute("SELECT pg_promote()")
            assert await code(reader) == "replica_promoted"  # on the connection that stands
            await seen.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'spillway:s'"
            )
            await seen.until(gone)
            assert [await code(reader) for _ in range(3)] == ["source_query", "replica_promoted", "replica_promoted"]
        finally:
            await reader.close()


async def test_a_server_that_goes_away_right_behind_connect(
    source18: SourceDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def then_ended(conninfo: str, slot: str = "", *, lock_timeout_seconds: int = 0) -> Connection:
        connection = await connect_query(conninfo, slot, lock_timeout_seconds=lock_timeout_seconds)
        await source18.execute(f"SELECT pg_terminate_backend({connection.info.backend_pid}, 20000)")
        return connection

    monkeypatch.setattr(view, "connect_query", then_ended)
    with pytest.raises(SourceUnavailable):
        await opened(source18.dsn, Expected("1"))


async def test_a_large_row_renews_the_connection(source18: SourceDatabase) -> None:
    await source18.execute(*ROWS)
    expected = Expected(str(await source18.value("SELECT system_identifier FROM pg_control_system()")))
    connections = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    for renew_bytes, stays in ((RENEW_BYTES, True), (500, False)):
        reader = await opened(source18.dsn, expected, renew_bytes)
        try:
            before = await source18.value(connections)
            assert len(await records(reader)) == 100
            await reader.horizon()
            assert (await source18.value(connections) == before) is stays
        finally:
            await reader.close()


async def test_keys_that_are_not_utf8(any_pg: Postgres) -> None:
    """The server checks what it converts, not what the database says is UTF-8 already."""
    dsn = any_pg.create_database("page_ascii", encoding="SQL_ASCII")
    try:
        async with await connect_query(dsn) as query:
            await SourceDatabase(dsn, query).execute(
                "SET client_encoding = SQL_ASCII",
                "CREATE TABLE public.t (id text PRIMARY KEY)",
                "INSERT INTO public.t SELECT i || convert_from('\\xe9', 'SQL_ASCII') FROM generate_series(1, 9) i",
                "CREATE PUBLICATION p FOR TABLE public.t",
                "UPDATE pg_database SET encoding = pg_char_to_encoding('UTF8') WHERE datname = current_database()",
            )
        async with await connect_query(dsn) as query, reading(SourceDatabase(dsn, query)) as reader:
            with pytest.raises(SpillwayError) as caught:
                await pages(reader, Selection("public", "t", where="true"), 2)
            assert caught.value.code == "not_utf8"
    finally:
        any_pg.drop_database("page_ascii")

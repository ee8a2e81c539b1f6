"""Questions asked because of a change are answered from at or after it: commits that are written, streamed and not
visible, and replicas that are behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from psycopg.conninfo import conninfo_to_dict

from servers.postgres import VERSIONS, Postgres, Standby
from source.conftest import MANY, SourceDatabase
from source.enriching import T, expected
from source.paging import SECONDS
from spillway.errors import SourceUnavailable
from spillway.position import parse_lsn
from spillway.source.connect import connect_query
from spillway.source.enrich import Enricher
from spillway.source.snapshot import Seen

SQL = "SELECT id, v FROM t WHERE id = ANY($1)"
POLLED = "FROM pg_stat_activity WHERE application_name = 'spillway:s:enrichment' AND datname = current_database()"


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Postgres, Standby]]:
    with Postgres(request.param) as primary, Standby(primary) as standby:
        yield primary, standby


@asynccontextmanager
async def databases(pair: tuple[Postgres, Standby], name: str) -> AsyncIterator[tuple[SourceDatabase, SourceDatabase]]:
    """An empty database with a table t of one row, on the primary and on the standby."""
    primary, standby = pair
    dsn = primary.create_database(name)
    async with asyncio.timeout(SECONDS), await connect_query(dsn) as query:
        source = SourceDatabase(dsn, query)
        await source.execute("CREATE TABLE public.t (id int PRIMARY KEY, v int)", "INSERT INTO public.t VALUES (1, 1)")
        await asyncio.to_thread(standby.wait_replayed)
        other = standby.dsn(str(conninfo_to_dict(dsn)["dbname"]))
        async with await connect_query(other) as behind:
            replica = SourceDatabase(other, behind)
            try:
                yield source, replica
            finally:
                if await replica.value("SELECT pg_is_in_recovery()"):
                    await replica.execute("SELECT pg_wal_replay_resume()")


@asynccontextmanager
async def enriching(
    source: SourceDatabase, *, replica: bool = False, visible_seconds: float = 30
) -> AsyncIterator[Enricher]:
    server = await expected(source, replica=replica)
    enricher = Enricher(source.dsn, "s", lambda: server, "f", SQL, visible_seconds=visible_seconds)
    try:
        yield enricher
    finally:
        await enricher.close()


async def _looks(source: SourceDatabase) -> object:
    return await source.value(f"SELECT max(query_start) {POLLED}")


async def _looks_again(source: SourceDatabase, times: int) -> None:
    """Until the enrichment's connection has asked so often."""
    last: object = None
    for _ in range(times):

        async def another() -> bool:
            return await _looks(source) not in (None, last)  # noqa: B023 - called in this turn only

        await source.until(another)
        last = await _looks(source)


async def test_a_commit_that_waits_for_a_synchronous_standby(pair: tuple[Postgres, Standby]) -> None:
    async with databases(pair, "synchronous") as (source, replica):
        await source.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()")

        async def in_force() -> bool:
            return await source.value("SELECT sync_state FROM pg_stat_replication") == "sync"

        async def waits() -> bool:
            return await source.value("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == 1

        await source.until(in_force)
        await replica.execute("SELECT pg_wal_replay_pause()")
        async with await connect_query(source.dsn) as writer, enriching(source) as enricher:
            assert (await enricher.fetch(T, [("1",)], Seen((), 0), MANY, MANY)).rows[0]["v"] == b"1"
            writing = SourceDatabase("", writer)
            await writing.execute("SET synchronous_commit = remote_apply", "BEGIN", "UPDATE public.t SET v = 2")
            xid = await writing.value("SELECT txid_current()")
            assert isinstance(xid, int)
            committing = asyncio.create_task(writing.execute("COMMIT"))
            await source.until(waits)
            assert await source.value("SELECT v FROM public.t") == 1
            asking = asyncio.create_task(enricher.fetch(T, [("1",)], Seen({xid % (1 << 32)}, 0), MANY, MANY))
            await _looks_again(source, 4)
            assert not asking.done()
            await replica.execute("SELECT pg_wal_replay_resume()")
            fetched = await asking
            assert fetched.rows[0]["v"] == b"2"
            assert fetched.queries == 2, "while it waits it asks for the snapshot alone"
            await committing
        await source.execute("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")


async def test_a_replica_that_is_behind_and_then_is_none(pair: tuple[Postgres, Standby]) -> None:
    async with databases(pair, "behind") as (source, replica):
        await replica.execute("SELECT pg_wal_replay_pause()")
        await source.execute("UPDATE public.t SET v = 2")
        end_lsn = parse_lsn(str(await source.value("SELECT pg_current_wal_insert_lsn()::text")))
        async with enriching(replica, replica=True, visible_seconds=0.05) as enricher:
            assert (await enricher.fetch(T, [("1",)], Seen({7}, 0), MANY, MANY)).rows[0]["v"] == b"1"
            with pytest.raises(SourceUnavailable) as caught:
                await enricher.fetch(T, [("1",)], Seen({7}, end_lsn), MANY, MANY)
            assert caught.value.code == "not_visible"
        async with enriching(replica, replica=True) as enricher:
            asking = asyncio.create_task(enricher.fetch(T, [("1",)], Seen({7}, end_lsn), MANY, MANY))
            await _looks_again(replica, 4)
            assert not asking.done()
            await replica.execute("SELECT pg_wal_replay_resume()")
            fetched = await asking
            assert (fetched.rows[0]["v"], fetched.queries) == (b"2", 1)
            await replica.execute("SELECT pg_promote()")
            for _ in range(2):  # on the connection that stands, and on another
                with pytest.raises(SourceUnavailable) as caught:
                    await enricher.fetch(T, [("1",)], Seen({7}, 0), MANY, MANY)
                assert caught.value.code == "replica_promoted"

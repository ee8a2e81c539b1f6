"""Publication, slot, identity and lag against real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from source.conftest import SourceDatabase
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.source.connect import Connection, connect_query, connect_replication
from spillway.source.slot import ensure_publication, ensure_slot, lag, slot_state, system


@pytest.fixture
async def walsender(source: SourceDatabase) -> AsyncIterator[Connection]:
    replication = await connect_replication(source.dsn, source.slot)
    yield replication
    await replication.close()


async def _publication(source: SourceDatabase, query: Connection | None = None, **more: object) -> bool:
    arguments: dict[str, object] = {"create_if_not_exists": True, "init_sql": None, "tables": [], **more}
    return await ensure_publication(query or source.query, "p", **arguments)  # type: ignore[arg-type]


async def test_identifies_the_system(source: SourceDatabase, walsender: Connection) -> None:
    identified = await system(walsender)
    assert identified.system_id == str(await source.value("SELECT system_identifier FROM pg_control_system()"))
    assert (identified.timeline, identified.server_version) == (1, source.version)
    assert identified.xlogpos > 0


async def test_a_superuser_publishes_everything_by_root(source: SourceDatabase) -> None:
    assert await _publication(source) is True
    assert await _publication(source) is False
    assert await source.value("SELECT puballtables FROM pg_publication WHERE pubname = 'p'") is True
    if source.version >= 130000:
        assert await source.value("SELECT pubviaroot FROM pg_publication WHERE pubname = 'p'") is True


async def test_an_owner_publishes_the_tables_that_the_sinks_name(source: SourceDatabase) -> None:
    role = f"owner_{source.database}"
    await source.execute(
        f"CREATE ROLE {role} LOGIN",
        'CREATE TABLE public."Odd, name" (id int PRIMARY KEY)',
        "CREATE TABLE public.foreign_one (id int)",
        f'ALTER TABLE public."Odd, name" OWNER TO {role}',
        f"GRANT CREATE ON DATABASE {source.database} TO {role}",
    )
    query = await connect_query(source.as_role(role))
    try:
        with pytest.raises(SpillwayError) as caught:
            await _publication(source, query)
        assert caught.value.code == "publication_create"
        assert 'CREATE PUBLICATION "p" FOR ALL TABLES' in caught.value.remedy
        with pytest.raises(SpillwayError) as caught:
            await _publication(source, query, tables=[("public", "foreign_one")])
        assert 'FOR TABLE "public"."foreign_one"' in caught.value.remedy
        assert await _publication(source, query, tables=[("public", "Odd, name")] * 2) is True
        assert await source.value("SELECT tablename FROM pg_publication_tables WHERE pubname = 'p'") == "Odd, name"
    finally:
        await query.close()
        await source.execute("DROP PUBLICATION IF EXISTS p", f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_init_sql_sees_the_names_that_its_author_sees(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.plain (id int PRIMARY KEY)")
    assert await _publication(source, init_sql="create publication p for table plain") is True
    assert await source.value("SELECT current_setting('search_path')") == '""'


async def test_nothing_is_made_unasked(source: SourceDatabase, walsender: Connection) -> None:
    with pytest.raises(SpillwayError) as caught:
        await _publication(source, create_if_not_exists=False, tables=[("public", "t")])
    assert caught.value.code == "publication_missing"
    assert 'CREATE PUBLICATION "p" FOR TABLE "public"."t"' in caught.value.remedy
    with pytest.raises(SpillwayError) as caught:
        await ensure_slot(source.query, walsender, source.slot, "p", create_if_not_exists=True)
    assert caught.value.code == "publication_missing"  # a slot is never older than its publication
    await _publication(source)
    with pytest.raises(SpillwayError) as caught:
        await ensure_slot(source.query, walsender, source.slot, "p", create_if_not_exists=False)
    assert caught.value.code == "slot_missing"
    assert (await slot_state(source.query, source.slot)).exists is False


async def test_a_slot_is_made_once_and_known_as_unused_until_it_is_read(
    source: SourceDatabase, walsender: Connection
) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY, body text)")
    await _publication(source)
    assert await ensure_slot(source.query, walsender, source.slot, "p", create_if_not_exists=True) is True
    assert await ensure_slot(source.query, walsender, source.slot, "p", create_if_not_exists=True) is False
    state = await slot_state(source.query, source.slot)
    assert (state.exists, state.plugin, state.database) == (True, "pgoutput", source.database)
    assert (state.active_pid, state.invalidation) == (None, None)
    assert 0 < state.restart_lsn <= state.confirmed_flush_lsn
    assert state.used is (source.version < 140000)  # 12 and 13 cannot tell
    stream = await source.stream()
    assert (await slot_state(source.query, source.slot)).active_application == f"spillway:{source.slot}"
    await source.execute("INSERT INTO public.t VALUES (1, 'x')")
    await source.frames(stream, b"C")
    await stream.close()

    async def used() -> bool:
        return (await slot_state(source.query, source.slot)).used

    async with asyncio.timeout(30):
        await source.until(used)


async def test_lag_is_what_the_server_has_written_and_nobody_confirmed(source: SourceDatabase) -> None:
    await source.make_slot()
    before = await lag(source.query, source.slot)
    await source.execute("INSERT INTO public.t SELECT i, repeat('x', 100) FROM generate_series(1, 5000) i")
    after = await lag(source.query, source.slot)
    assert after.confirmed_lsn == before.confirmed_lsn
    assert after.behind_bytes - before.behind_bytes > 500_000
    with pytest.raises(SpillwayError) as caught:
        await lag(source.query, "nobody")
    assert caught.value.code == "slot_missing"


async def test_a_creation_that_waits_says_for_whom_and_leaves_nothing(
    source: SourceDatabase, walsender: Connection
) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    await _publication(source)
    blocker = await connect_query(source.dsn)
    try:
        await blocker.execute(b"BEGIN; INSERT INTO public.t VALUES (1)")
        with pytest.raises(SourceUnavailable) as caught:
            await ensure_slot(
                source.query, walsender, source.slot, "p", create_if_not_exists=True, deadline_seconds=0.3
            )
        assert caught.value.code == "slot_creation_waits"
        assert f"pg_terminate_backend({blocker.info.backend_pid})" in caught.value.remedy
    finally:
        await blocker.close()

    async def gone() -> bool:
        return not (await slot_state(source.query, source.slot)).exists

    async with asyncio.timeout(30):
        await source.until(gone)
    assert await ensure_slot(source.query, walsender, source.slot, "p", create_if_not_exists=True) is True


async def test_a_foreign_slot_is_not_taken(source: SourceDatabase, walsender: Connection) -> None:
    await source.execute(f"SELECT pg_create_logical_replication_slot('{source.slot}', 'test_decoding')")
    with pytest.raises(SpillwayError) as caught:
        await ensure_slot(source.query, walsender, source.slot, "p", create_if_not_exists=True)
    assert caught.value.code == "slot_plugin"

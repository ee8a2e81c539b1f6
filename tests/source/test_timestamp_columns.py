"""Which columns are timestamps, while the source is there and while it is away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest

from servers.postgres import Postgres
from source.conftest import SourceDatabase
from spillway.errors import SourceUnavailable
from spillway.source import timestamps
from spillway.source.connect import Connection, querying
from spillway.source.timestamps import TimestampColumns


class Asked:
    """In place of `querying`: how often somebody asked, and how many at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = self.now = self.most = 0
        monkeypatch.setattr(timestamps, "querying", self)

    @contextlib.asynccontextmanager
    async def __call__(self, conninfo: str, slot: str) -> AsyncIterator[Connection]:
        self.times += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            async with querying(conninfo, slot) as query:
                yield query
        finally:
            self.now -= 1


async def test_what_is_known_holds_while_the_source_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    with Postgres("18") as server:
        dsn = server.create_database("app")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create table t (id int primary key, at timestamptz)")
            connection.execute("create table u (id int primary key)")
        columns = TimestampColumns(dsn, "s")
        assert await columns.of("public", "t", ["id", "at"]) == {"at"}
        server.stop()
        monkeypatch.setattr(timestamps, "ASK_AGAIN_SECONDS", -1.0)  # whatever is known is old
        assert await columns.of("public", "t", ["id", "at"]) == {"at"}
        assert asked.times == 2
        monkeypatch.setattr(timestamps, "ASK_AGAIN_SECONDS", 600.0)
        columns._known["public", "t"].asked_at -= 601  # old, and the last attempt is not
        assert await columns.of("public", "t", ["id"]) == {"at"}
        assert asked.times == 2
        with pytest.raises(SourceUnavailable):  # nobody knows this column
            await columns.of("public", "t", ["id", "later"])
        with pytest.raises(SourceUnavailable):
            await columns.of("public", "u", ["id"])
        columns.forget("public", "t")
        with pytest.raises(SourceUnavailable):
            await columns.of("public", "t", ["id", "at"])
        server.start()
        assert await columns.of("public", "t", ["id", "at"]) == {"at"}


async def test_one_asks_at_a_time_and_for_all_of_them(source: SourceDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    await source.execute("create table public.t (at timestamptz)", "create table public.u (later timestamp)")
    asked = Asked(monkeypatch)
    columns = TimestampColumns(source.dsn, source.slot)
    found = await asyncio.gather(
        *(columns.of("public", "t", ["at"]) for _ in range(4)),
        *(columns.of("public", "u", ["later"]) for _ in range(4)),
    )
    assert found == [{"at"}] * 4 + [{"later"}] * 4
    assert (asked.times, asked.most) == (2, 1)

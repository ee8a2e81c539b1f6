"""A source database with a table, a publication and a slot, and a connection of the superuser to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from spillway.pgoutput import Copy, Ended, Full, Keepalive, Stop
from spillway.source.connect import Connection, connect_query
from spillway.source.stream import Stream

MANY = 1 << 30


class Frame(NamedTuple):
    wal_start: int
    payload: bytes

    @property
    def tag(self) -> bytes:
        return self.payload[:1]


class Recorder:
    """In place of a decoder: takes frames as one does, and keeps them as they are."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.taken_frames = 0
        self.taken_bytes = 0
        self.used_bytes = 0

    def fill(self, copy: Copy, credit_bytes: int, max_changes: int) -> Stop:
        while True:
            size, frame = copy.get_copy_data(1)
            if size <= 0:
                return Ended(size) if size else None
            self.taken_frames += 1
            self.taken_bytes += size
            if frame[0] == ord("k"):
                return Keepalive(int.from_bytes(frame[1:9], "big"), frame[17] != 0)
            assert frame[0] == ord("w")
            self.used_bytes += size
            self.frames.append(Frame(int.from_bytes(frame[1:9], "big"), bytes(frame[25:])))
            if len(self.frames) >= max_changes:
                return Full(0)


def fill(stream: Stream, recorder: Recorder, most: int = MANY) -> Full | Keepalive | None:
    """What is whole in memory, up to ``most`` frames since the recorder was made."""
    stop = stream.fill(recorder, MANY, most)  # type: ignore[arg-type] # what the stream uses of a decoder
    assert stop is None or isinstance(stop, Full | Keepalive)
    return stop


@dataclass
class SourceDatabase:
    dsn: str
    query: Connection
    streams: list[Stream] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.query.info.server_version

    @property
    def database(self) -> str:
        return str(conninfo_to_dict(self.dsn)["dbname"])

    @property
    def slot(self) -> str:
        """Slots belong to the cluster: a name of this database's own."""
        return f"s_{self.database}"

    def as_role(self, role: str) -> str:
        return psycopg.conninfo.make_conninfo(self.dsn, user=role)

    async def execute(self, *statements: str) -> None:
        for statement in statements:
            await self.query.execute(statement.encode())

    async def value(self, statement: str) -> object:
        row = await (await self.query.execute(statement.encode())).fetchone()
        return None if row is None else row[0]

    async def make_slot(self, publication: str = "p") -> None:
        await self.execute(
            "CREATE TABLE public.t (id int PRIMARY KEY, body text)",
            f"CREATE PUBLICATION {publication} FOR TABLE public.t",
            f"SELECT pg_create_logical_replication_slot('{self.slot}', 'pgoutput')",
        )

    async def stream(self, publication: str = "p", dsn: str | None = None, start_lsn: int = 0) -> Stream:
        stream = await Stream.open(dsn or self.dsn, self.slot, [publication], start_lsn, self.version)
        self.streams.append(stream)
        return stream

    async def frames(self, stream: Stream, tag: bytes, count: int = 1) -> list[Frame]:
        """The next ``count`` messages of a kind, whatever stands between them."""
        found: list[Frame] = []
        while len(found) < count:
            recorder = Recorder()
            if fill(stream, recorder, 1) is None:
                await stream.more()
            found += [frame for frame in recorder.frames if frame.tag == tag]
        return found

    async def until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        """The server does some things a moment after it was told; each look is a round trip to it."""
        while not await holds():
            pass


async def _opened(dsn: str) -> AsyncIterator[SourceDatabase]:
    source = SourceDatabase(dsn, await connect_query(dsn))
    yield source
    for stream in source.streams:
        await stream.close()
    await source.query.close()


@pytest.fixture
async def source(any_database: str) -> AsyncIterator[SourceDatabase]:
    """Once with each version."""
    async for opened in _opened(any_database):
        yield opened


@pytest.fixture
async def source18(database: str) -> AsyncIterator[SourceDatabase]:
    async for opened in _opened(database):
        yield opened

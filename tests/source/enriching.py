"""What the tests of enrichment and reselect share: one of each on a source, and what they need to have seen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from source.conftest import MANY, SourceDatabase
from spillway.pgoutput.conditions import Condition
from spillway.source.enrich import Enricher
from spillway.source.origin import Expected
from spillway.source.reading import Fetched
from spillway.source.reselect import Reselect
from spillway.source.snapshot import Seen
from spillway.source.wrapped import object_parts

NOTHING = Seen((), 0)
T = ("public", "t")
Key = tuple[str, ...]


async def expected(source: SourceDatabase, *, replica: bool = False) -> Expected:
    return Expected(str(await source.value("SELECT system_identifier FROM pg_control_system()")), replica)


@asynccontextmanager
async def enriching(
    source: SourceDatabase, sql: str, *, timeout_seconds: float = 15, connections: int = 2, visible_seconds: float = 30
) -> AsyncIterator[Enricher]:
    server = await expected(source)
    enricher = Enricher(
        source.dsn,
        "s",
        lambda: server,
        "f",
        sql,
        timeout_seconds=timeout_seconds,
        connections=connections,
        visible_seconds=visible_seconds,
    )
    try:
        yield enricher
    finally:
        await enricher.close()


@asynccontextmanager
async def reselecting(source: SourceDatabase, *conditions: Condition) -> AsyncIterator[Reselect]:
    server = await expected(source)
    reselect = Reselect(source.dsn, "s", "p", lambda: server, conditions)
    try:
        yield reselect
    finally:
        await reselect.close()


async def enriched(enricher: Enricher, *keys: Key, credit_bytes: int = MANY) -> Fetched:
    return await enricher.fetch(T, keys, NOTHING, credit_bytes, credit_bytes)


async def reselected(reselect: Reselect, *keys: Key, credit_bytes: int = MANY) -> Fetched:
    return await reselect.fetch(T, keys, NOTHING, credit_bytes, credit_bytes)


def records(fetched: Fetched) -> dict[int, bytes]:
    """The rows as JSON objects."""
    return {place: b"".join(object_parts(row)) for place, row in fetched.rows.items()}

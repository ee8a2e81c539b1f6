"""What the tests of pages share: a reader, all pages of a selection, and the stream of the same table beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pgoutput.frames import META
from pgoutput.twins import TWINS
from source.conftest import MANY, SourceDatabase
from spillway.change import ACTIONS, Change
from spillway.pgoutput import Relation
from spillway.pgoutput.decoder import Decoder
from spillway.pgoutput.filters import Filters, no_filters
from spillway.source import catalog
from spillway.source.origin import Expected
from spillway.source.page import Cursor, Page, PageReader, Range, Selection
from spillway.source.stream import Stream

SECONDS = 20.0
RENEW_BYTES = 8 << 20
T = Selection("public", "t")
ALL = Range()


def new_decoder(twin: type[Decoder] = TWINS[-1], filters: Filters = no_filters) -> Decoder:
    """``filters``: one, or none."""
    count = 0 if filters is no_filters else 1
    return twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 23, lambda _: None, filters, count)


async def opened(
    dsn: str,
    expected: Expected,
    renew_bytes: int = RENEW_BYTES,
    twin: type[Decoder] = TWINS[-1],
    filters: Filters = no_filters,
) -> PageReader:
    return await PageReader.open(dsn, "s", "p", lambda: new_decoder(twin, filters), b"backfill", expected, renew_bytes)


@asynccontextmanager
async def reading(
    source: SourceDatabase,
    dsn: str | None = None,
    twin: type[Decoder] = TWINS[-1],
    filters: Filters = no_filters,
) -> AsyncIterator[PageReader]:
    expected = Expected(str(await source.value("SELECT system_identifier FROM pg_control_system()")))
    reader = await opened(dsn or source.dsn, expected, twin=twin, filters=filters)
    try:
        yield reader
    finally:
        await reader.close()


def changes(page: Page) -> list[Change]:
    return [page.chunk.change(i) for i in range(page.chunk.count)]


async def pages(
    reader: PageReader, selection: Selection = T, size: int = MANY, within: Range = ALL, credit: int = MANY
) -> list[Page]:
    read: list[Page] = []
    cursor: Cursor | None = None
    while True:
        page = await reader.read(selection, within, cursor, size, credit, SECONDS)
        assert page.chunk.count <= size
        read.append(page)
        cursor = page.cursor
        if cursor is None:
            return read


async def records(
    reader: PageReader, selection: Selection = T, size: int = MANY, within: Range = ALL, credit: int = MANY
) -> list[bytes]:
    return [c.record for page in await pages(reader, selection, size, within, credit) for c in changes(page)]


async def streamed(source: SourceDatabase, stream: Stream, rows: int, decoder: Decoder) -> list[Change]:
    """The next so many changes."""
    found: list[Change] = []
    async with asyncio.timeout(SECONDS):
        while len(found) < rows:
            stop = stream.fill(decoder, MANY, rows - len(found))
            if isinstance(stop, Relation):
                decoder.learn(stop, await catalog.describe(source.query, stop), frozenset(ACTIONS))
            elif stop is None:
                await stream.more()
            chunk = decoder.take()
            found += [chunk.change(i) for i in range(chunk.count)]
    return found

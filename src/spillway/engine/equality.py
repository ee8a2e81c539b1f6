"""Whether a new index is equal to the source, row by row, while both change.

1. Every row of the source is read in pages and compared with its document, which is asked for by its id.
2. Every key of the index is looked for in the source; a row that the sink's filters leave out is as good as none. (Not
   for rows of several tables without Sequin's message around them: nobody can tell there of which table a document is.)

A document counts as equal if it holds the row of the page, or if its version (spillway.position.version) is above all
that the page's snapshot sees: then it was brought by the stream since, as a whole. What differs is usually a change on
its way, so it is looked at again, by key, once the stream has come by: the row is read, a second passes, in which a
sink that keeps up has brought it, and the document is asked for. What differs after `LOOKS` of these is a difference.

Where the sink shapes its messages (spillway.flow.shaping) the row of a page is shaped as it would be for the sink, and
the document compared with that. Of a document that a Python function, a path or an envelope has made nobody knows what
it says of the change that brought it: there only that it is there, or not, is compared.

What the sink leaves out on purpose is none: changes of actions that it does not take, columns that it may omit
(``toast: omit``), rows above its ``max_message_bytes``.

The relations of a table are asked for again and again: partitions may come, and are walked like the others, and may
go. Nobody tells a sink of rows that go with a partition or a table: where one has gone, documents that the source has
not are no difference, for the old index has them, too.

Credit for a page and for its documents is taken from what nobody else wants, before they are read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spillway.change import Change
from spillway.chunk import Batch, Keying, Span
from spillway.clock import Clock
from spillway.config import Search, Sink
from spillway.engine.shadow import ReindexState
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.flow.attempt import Answer
from spillway.flow.budget import Spare
from spillway.flow.paging import OpenReader
from spillway.flow.shaping import Shaping
from spillway.position import version
from spillway.sinks.base import OK, Result
from spillway.sinks.document import document_id, parsed
from spillway.sinks.index import Found
from spillway.source.page import Cursor, LockTimeout, NeedsCredit, Page, PageReader, PageTimeout, Range, Selection

if TYPE_CHECKING:
    from spillway.sinks.search import SearchSink

LOOKS = 10
LOOK_SECONDS = 1.0
PAGE_ROWS = 500
KEYS_AT_ONCE = 100  # that are looked at again together
LOOKED_AT_ONCE = 1_000  # of so many that differ, the reading waits until they have been looked at again
ENOUGH = 100  # differences, and the rest is not of interest
CREDIT_BYTES = 8 << 20
CREDIT_PARTS = 4  # one for a page; the others for what the index answers, and for comparing
CREDIT_SECONDS = 0.05
_ANSWER_BYTES = 64 * 1024
_ANSWER_DOCUMENT_BYTES = 1024

MISSING = "is not in the new index"
UNEQUAL = "is another in the new index"
TOO_MUCH = "is in the new index alone"

GONE = ("no_table", "not_published")  # codes of what is said of a relation that has gone

Keys = dict[Cursor, str]  # what differs, and how


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from."""

    open_reader: OpenReader
    spare: Spare
    timeout_seconds: float  # of the statement of a page


class Equality:
    def __init__(
        self,
        index: SearchSink,
        sink: Sink,
        state: ReindexState,
        source: Source,
        settled: Callable[[], Awaitable[None]],
        come_by: Callable[[int], Awaitable[None]],
        clock: Clock,
        shaping: Shaping | None = None,
    ) -> None:
        """``settled`` returns when the shadow has delivered all but the youngest changes that it got, ``come_by`` when
        the stream has carried everything up to a position. Both raise when nobody wants to know any more."""
        assert isinstance(sink.destination, Search)
        self._index = index
        self._sink = sink
        self._bare = sink.destination.document == "record"
        self._state = state
        self._source = source
        self._settled = settled
        self._come_by = come_by
        self._clock = clock
        self._shaping = shaping  # None: the documents are the rows
        self._opaque = shaping is not None and shaping.opaque
        self._needed_bytes = 0  # of credit, for a large row
        self._seen: set[Selection] = set()  # relations of the table that is being compared, since it was backfilled
        self._vanished = False  # one of these has gone
        self.found: dict[str, str] = {}  # what stays different, by table and key

    async def compare(self, tables: Sequence[tuple[str, str]]) -> None:
        """Afterwards `found` is what differs."""
        self._state.documents = self._state.differing = 0
        for table in tables:
            since = self._state.relations.get(".".join(table), ())
            self._seen, self._vanished = {Selection(*relation) for relation in since}, False
            compared: set[Selection] = set()
            reader = await self._source.open_reader(self._state.id)
            try:
                while rest := [one for one in await self._relations(reader, table) if one not in compared]:
                    await self._rows(reader, table, rest[0])
                    compared.add(rest[0])
                if "delete" in self._sink.actions and not (self._bare and len(tables) > 1):
                    await self._keys(reader, table)
            finally:
                await reader.close()

    async def _relations(self, reader: PageReader, table: tuple[str, str]) -> list[Selection]:
        """As of now; none of a table that has left the publication."""
        while True:
            try:
                relations = [Selection(*name) for name in await reader.relations(*table)]
                break
            except (LockTimeout, PageTimeout):
                await self._clock.sleep(LOOK_SECONDS)
                await self._settled()
            except SpillwayError as error:
                if error.code not in GONE:
                    raise
                relations = []
                break
        self._vanished = self._vanished or not self._seen.issubset(relations)
        self._seen.update(relations)
        return relations

    # -- the two walks ----------------------------------------------------------------------------------------------
    async def _rows(self, reader: PageReader, table: tuple[str, str], relation: Selection) -> None:
        cursor: Cursor | None = None
        rows = PAGE_ROWS
        differing: Keys = {}
        while len(self.found) < ENOUGH:
            await self._settled()
            async with self._credit() as credit:
                try:
                    page = await reader.read(relation, Range(), cursor, rows, credit, self._source.timeout_seconds)
                except (LockTimeout, PageTimeout):
                    rows = max(1, rows // 2)
                    await self._clock.sleep(LOOK_SECONDS)
                    continue
                except NeedsCredit as error:
                    self._needed_bytes = error.needed_bytes
                    continue
                except SpillwayError as error:
                    if error.code not in GONE or relation in await self._relations(reader, table):
                        raise
                    break
                differing |= await self._unequal(page)
            self._needed_bytes = 0
            self._state.documents += page.chunk.count
            self._state.differing = len(differing)
            cursor = page.cursor
            if cursor is None:
                break
            if len(differing) >= LOOKED_AT_ONCE:
                await self._look_again(reader, table, differing)
                differing = {}
            if self._sink.backfill.max_rows_per_second is not None:
                await self._clock.sleep(page.chunk.count / self._sink.backfill.max_rows_per_second)
        await self._look_again(reader, table, differing)

    async def _keys(self, reader: PageReader, table: tuple[str, str]) -> None:
        relations = await self._relations(reader, table)
        if not relations:
            return
        columns = await reader.key_columns(relations[0])
        checked = {condition.column for condition in self._sink.filters if condition.table == table}
        after: str | None = None
        while len(self.found) < ENOUGH and not self._vanished:
            await self._settled()
            keys, after = await self._index.keys(table, columns, after, PAGE_ROWS, None)
            for relation in await self._relations(reader, table):
                keys = await self._absent(reader, relation, keys, checked)
            self._state.differing = len(keys)
            await self._look_again(reader, table, dict.fromkeys(keys, TOO_MUCH))
            if after is None:
                break

    async def _absent(
        self, reader: PageReader, relation: Selection, keys: list[Cursor], checked: Collection[str]
    ) -> list[Cursor]:
        """Those that are not there, or do not pass the sink's filters, which look at the columns ``checked``."""
        absent: list[Cursor] = []
        while keys:
            await self._settled()
            some = keys[: 1 if self._needed_bytes else PAGE_ROWS]
            async with self._credit() as credit:
                try:
                    page = await reader.read_absent(relation, some, self._source.timeout_seconds, checked, credit)
                except (LockTimeout, PageTimeout):
                    await self._clock.sleep(LOOK_SECONDS)
                    continue
                except NeedsCredit as error:
                    self._needed_bytes = error.needed_bytes if len(some) == 1 else 1
                    continue
                except SpillwayError as error:
                    if error.code not in GONE:
                        raise
                    break  # what is there of it is looked at again, in the relations of then
            self._needed_bytes = 0
            absent += page.missing
            keys = keys[len(some) :]
        return absent + keys

    # -- what differs -----------------------------------------------------------------------------------------------
    async def _look_again(self, reader: PageReader, table: tuple[str, str], differing: Keys) -> None:
        for _ in range(LOOKS):
            if not differing:
                break
            await self._come_by(await reader.flushed_lsn())
            relations = await self._relations(reader, table)
            if not relations:
                return
            keys = list(differing)
            differing = {}
            for start in range(0, len(keys), KEYS_AT_ONCE):
                differing |= await self._looked_at(reader, relations, keys[start : start + KEYS_AT_ONCE])
            self._state.differing = len(differing)
        for key, how in differing.items():
            self.found[f"{'.'.join(table)}:{':'.join(key)}"] = how

    async def _looked_at(self, reader: PageReader, relations: Sequence[Selection], keys: list[Cursor]) -> Keys:
        """Those that differ still. Each page is read a second before its documents."""
        differing: Keys = {}
        newest = 0
        for relation in relations:
            rest = list(keys)
            keys = []
            while rest:
                await self._settled()
                some = rest[: KEYS_AT_ONCE if not self._needed_bytes else 1]
                async with self._credit() as credit:
                    try:
                        page = await reader.read_keys(relation, some, credit, self._source.timeout_seconds)
                    except (LockTimeout, PageTimeout):
                        await self._clock.sleep(LOOK_SECONDS)
                        continue
                    except NeedsCredit as error:
                        self._needed_bytes = error.needed_bytes if len(some) == 1 else 1
                        continue
                    except SpillwayError as error:
                        if error.code not in GONE:
                            raise
                        keys += rest
                        break
                    self._needed_bytes = 0
                    rest = rest[len(some) :]
                    there = {row.pks for row in map(page.chunk.change, range(page.chunk.count))}
                    keys += [key for key in some if key not in there]
                    if page.chunk.count:
                        await self._second()
                        differing |= await self._unequal(page)
                    newest = self._newest(page)
        if keys and "delete" in self._sink.actions and not self._vanished:
            await self._second()
            found = await self._documents({document_id(key): key for key in keys}, 0)
            differing |= {key: TOO_MUCH for key, one in found.items() if one is None or one.version <= newest}
        return differing

    async def _unequal(self, page: Page) -> Keys:
        """The rows of a page that the index has not, or has otherwise."""
        rows = {row.pks: row for row in map(page.chunk.change, range(page.chunk.count)) if self._is_taken(row)}
        newest = self._newest(page)
        if self._shaping is None:
            return await self._compared({key: row.record for key, row in rows.items()}, newest)
        differing: Keys = {}

        async def compare(shaped: Batch) -> Answer:
            """What would be sent of some of the rows; its credit is held as long as this takes."""
            images = {message.change.pks: message.body for message in shaped}
            differing.update(await self._compared({key: images[key] for key in images if key in rows}, newest))
            return OK

        if page.chunk.count:
            answer = await self._shaping(Batch([(Span(page.chunk, Keying.STATE), 0, page.chunk.count)]), compare)
            for result in answer if not isinstance(answer, Result) else (answer,):
                if result.outcome == "sink_down":
                    raise SourceUnavailable(result.reason, result.detail)
        return differing

    async def _compared(self, images: Mapping[Cursor, bytes], newest: int) -> Keys:
        found = await self._documents({document_id(key): key for key in images}, sum(map(len, images.values())))
        return await asyncio.to_thread(self._judged, images, found, newest)

    def _judged(self, images: Mapping[Cursor, bytes], found: Mapping[Cursor, Found | None], newest: int) -> Keys:
        differing: Keys = {}
        for key, image in images.items():
            if key not in found:
                if "insert" in self._sink.actions:
                    differing[key] = MISSING
                continue
            document = found[key]
            if document is not None and (
                document.version > newest or "update" not in self._sink.actions or self._is_equal(image, document)
            ):
                continue
            differing[key] = UNEQUAL
        return differing

    def _is_equal(self, image: bytes, document: Found) -> bool:
        if self._opaque:
            return True
        held: object = document.source
        whole = parsed(image)
        if not self._bare and isinstance(held, dict):
            if self._shaping is not None and isinstance(whole, dict):
                if _enrichment(held) != _enrichment(whole):
                    return False
                whole = whole.get("record")
            held = held.get("record")
        if not isinstance(held, dict) or not isinstance(whole, dict):
            return False
        if self._sink.toast == "omit":
            whole = {name: value for name, value in whole.items() if name in held}
        return whole == held

    def _is_taken(self, row: Change) -> bool:
        return not row.too_large_bytes and len(row.body) <= self._sink.max_message_bytes

    def _newest(self, page: Page) -> int:
        """The highest version of anything that the page's snapshot may see."""
        snapshot = page.snapshot
        lsn = snapshot.lsn if snapshot.replayed_lsn is None else min(snapshot.lsn, snapshot.replayed_lsn)
        return version(self._state.epoch, lsn, 0xFF)

    async def _documents(self, ids: Mapping[str, Cursor], bodies_bytes: int) -> dict[Cursor, Found | None]:
        """By key; None: there is one, but so large that it cannot be equal."""
        found: dict[Cursor, Found | None] = {}
        pending = [list(ids)] if ids else []
        most_bytes = _ANSWER_BYTES + 2 * bodies_bytes + _ANSWER_DOCUMENT_BYTES * len(ids)
        while pending:
            some = pending.pop()
            documents = await self._index.indexes.documents(self._state.into, some, most_bytes)
            if documents is not None:
                found |= {ids[identity]: one for identity, one in documents.items()}
            elif len(some) == 1:
                found[ids[some[0]]] = None
            else:
                half = len(some) // 2
                pending += [some[:half], some[half:]]
        return found

    # -- credit -----------------------------------------------------------------------------------------------------
    async def _second(self) -> None:
        """Passes with credit in hand: less, if somebody wants that. What then differs is looked at once more."""
        until = self._clock.monotonic() + LOOK_SECONDS
        while self._clock.monotonic() < until and not self._source.spare.wanted:
            await self._clock.sleep(CREDIT_SECONDS)

    @contextlib.asynccontextmanager
    async def _credit(self) -> AsyncIterator[int]:
        """For a page; as much again, some times over, is held beside."""
        spare = self._source.spare
        if self._needed_bytes > spare.most_bytes:
            raise SpillwayError(
                "memory_limit",
                f"a row needs {self._needed_bytes} bytes to be compared: memory.limit_mb is too small",
                "raise memory.limit_mb",
            )
        least = max(self._needed_bytes, min(CREDIT_BYTES, spare.limit_bytes) // CREDIT_PARTS)
        whole = min(CREDIT_PARTS * least, spare.most_bytes)
        while not spare.try_take(whole):
            await self._clock.sleep(CREDIT_SECONDS)
            await self._settled()
        try:
            yield least
        finally:
            spare.give(whole)


def _enrichment(message: Mapping[str, object]) -> object:
    metadata = message.get("metadata")
    return metadata.get("enrichment") if isinstance(metadata, dict) else None

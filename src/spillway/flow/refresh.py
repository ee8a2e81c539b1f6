"""Documents of one table that are made anew because something that they are joined with has changed.

What is due is in the store (spillway.store.refreshes), put there by the sink's companion (spillway.flow.fanout). A
`Refresh` works it off, page by page: a page's rows are read by their keys and take their place in the sink's stream as
those of a backfill do (spillway.flow.paging); how they become documents is the sink's own, as for any row. Nothing here
grows with what is due: a fan-out of millions is rows of the store, and a page of them in memory.

**Done** is what was placed, and is resolved or durable: its refreshes are taken away then, together with the sink's
position. A crash before repeats the page. A row that was not placed, because the stream had brought a newer one that
the page did not see, stays due: what made that one may not have seen what the refresh is for. So does one that the page
has not, but the stream has: it is new, or came into the sink's filter, since the page's snapshot (a replica's may be
old), or it went from one partition to another between their pages. A row that is gone needs nothing: its delete is in
the stream.

**Fresh.** A refresh is due after a snapshot of the source has seen the change that it is for, and its rows are read and
placed later; never before the place of that change in the stream (``behind``), so that whoever makes documents of them
on a replica knows how far that has to be.

**Ready.** The stream's changes of the table are remembered all the time (spillway.flow.carried), from the start on, so
that no refresh has to wait until whatever runs just now has ended. What every snapshot sees by now is dropped every
`TRIM_SECONDS`; where that does not do, and everything was forgotten, it begins anew.

**Everything.** A refresh of all rows is a backfill, of which there is one at a time for a table; it is ordered, and the
refresh is done when the order is durable. Its pages do not keep what they drop for something newer. So it is ordered
only when a replica has replayed what it is for: what a page does not see then is of later, and so is its document.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import structlog

from spillway.change import key_values, make_key
from spillway.clock import Clock
from spillway.errors import SourceUnavailable, SpillwayError, StoreFailed
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture
from spillway.flow.paging import RETRY_CAP_SECONDS, ROOM_SECONDS, Manners, OpenReader, Paging
from spillway.flow.retry import backoff_seconds
from spillway.flow.route import Subscription
from spillway.source.page import Cursor, LockTimeout, NeedsCredit, PageReader, PageTimeout, Selection
from spillway.store.base import EVERYTHING, AskedRefreshes, DueRefresh, Store

MOST_KEYS = 2000  # in a page
TRIM_SECONDS = 0.25
IDLE_SECONDS = 10.0  # without a refresh for so long, and nothing to remember: the connection is closed

Table = tuple[str, str]

_log = structlog.get_logger()


class Refresh(Paging):
    def __init__(
        self,
        table: Table,
        subscription: Subscription,
        keying: int,
        capture: Capture,
        spare: Spare,
        open_reader: OpenReader,
        manners: Manners,
        clock: Clock,
        store: Store,
        behind: Callable[[], int],
        order_everything: Callable[[Table], Awaitable[str]],
    ) -> None:
        """``behind``: the LSN of the last change that may have asked for what is due. ``order_everything`` returns ""
        when a backfill of the table is durable, else why it cannot be ordered yet."""
        page_id = f"refresh of {'.'.join(table)} for {subscription.delivery.name}"
        super().__init__(page_id, subscription, keying, capture, spare, open_reader, manners, clock)
        self.table = table
        self.trouble = ""  # what somebody must mend, before it goes on
        self.since: float | None = None  # wall seconds at which the first of what is due was asked for
        self.rows = 0  # placed in this run
        self._store = store
        self._behind = behind
        self._order_everything = order_everything
        self._asked = asyncio.Event()
        self._asked.set()
        self._reader: PageReader | None = None
        self._cause = (0, 0)  # the number of the last refresh of everything, and no LSN that it is for is above this

    def ask(self) -> None:
        """Something is due."""
        self._asked.set()

    async def run(self) -> None:
        """For ever. What fails is tried again; what is due stays due."""
        failures = 0
        self._carried.watch(self.table)
        try:
            while True:
                await self._rest()
                self._asked.clear()
                placed = self.rows
                try:
                    done = await self._round()
                    failures, self.trouble = 0, ""
                    if not done:
                        self._asked.set()
                        await self._sleep(ROOM_SECONDS)
                except StoreFailed:
                    raise
                except SpillwayError as error:
                    failures = failures + 1 if self.rows == placed else 1
                    passing = isinstance(error, SourceUnavailable | LockTimeout | PageTimeout)
                    self.waiting = f"source: {error}"
                    if not passing and not self.trouble:
                        self.trouble = f"documents of {'.'.join(self.table)} are not refreshed: {error}"
                        _log.warning("refresh failed", sink=self._delivery.name, error=str(error))
                    self._asked.set()
                    await self._close()
                    await self._sleep(backoff_seconds(failures - 1, 0.25, RETRY_CAP_SECONDS))
        finally:
            self._carried.unwatch(self.table)
            await self._close()

    async def look(self) -> None:
        """For people: since when something is due."""
        first = await self._due(0, 1) if self._delivery.counters.refreshes else []
        self.since = first[0].since if first else None

    # -- between refreshes ------------------------------------------------------------------------------------------
    async def _rest(self) -> None:
        """Until something is due; ready for it."""
        idle_since, pause_seconds = self._clock.monotonic(), TRIM_SECONDS
        while not self._asked.is_set():
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(pause_seconds):
                    await self._asked.wait()
                    return
            pause_seconds = TRIM_SECONDS
            try:
                if not self._ready:
                    await self._quiet(await self._open())
                    self.waiting = ""
                elif self._carried.held_bytes:
                    await self._trim()
                elif self._clock.monotonic() - idle_since > IDLE_SECONDS:
                    await self._close()
            except SpillwayError:  # whoever reads a page meets and reports the same
                await self._close()
                pause_seconds = ROOM_SECONDS * 8

    @property
    def _ready(self) -> bool:
        """A page could be read without waiting for what runs just now."""
        carried = self._carried
        return carried.remembers and carried.quiet == carried.began and not self._must_wait

    async def _trim(self) -> None:
        view = self._carried.open()
        try:
            reader = await self._open()
            self._carried.saw(view, await reader.seen())
        finally:
            self._carried.close(view)

    async def _open(self) -> PageReader:
        if self._reader is None:
            self._reader = await self._open_reader(self._page_id)
        return self._reader

    async def _close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()

    # -- what is due ------------------------------------------------------------------------------------------------
    async def _due(self, after_place: int, limit: int) -> list[DueRefresh]:
        return await asyncio.to_thread(self._store.refreshes, self._delivery.name, self.table, after_place, limit)

    async def _round(self) -> bool:
        """Everything that is due, once, in the order of its places. False: something is left."""
        after, left, needed_bytes = 0, False, 0
        most_keys = min(MOST_KEYS, self._delivery.page_messages)
        while await self._due(after, 1):
            await self._room()
            reader = await self._open()
            began = await self._quiet(reader)
            credit = await self._credit(needed_bytes)
            due: list[DueRefresh] = []
            try:
                due = await self._due(after, min(self._size.fitting(credit), most_keys))
                left = not await self._page(reader, due, began, credit) or left
            except NeedsCredit as error:
                most_keys = max(1, len(due) // 2)
                needed_bytes = error.needed_bytes if len(due) == 1 else 0
                if needed_bytes > self._spare.most_bytes:
                    raise
                continue
            except PageTimeout:
                self._size.timed_out()
                raise
            finally:
                self._spare.give(credit)
            needed_bytes = 0
            after = due[-1].place
        self.waiting = ""
        return not left

    async def _everything(self, reader: PageReader, due: DueRefresh) -> bool:
        if due.number != self._cause[0]:
            self._cause = (due.number, max(self._behind() + 1, self._capture.received_lsn))
        if reader.standby and await reader.flushed_lsn() < self._cause[1]:
            self.waiting = "all documents are due: waits for the replica"
            return False
        self.waiting = await self._order_everything(self.table)
        if self.waiting:
            return False
        await self._delivery.refreshed([due])
        return True

    async def _page(self, reader: PageReader, due: Sequence[DueRefresh], began: int, credit_bytes: int) -> bool:
        """False: something of it stays due."""
        whole = next((one for one in due if one.key == EVERYTHING), None)
        ordered = whole is None or await self._everything(reader, whole)
        wanted = {key_values(*self.table, one.key): one for one in due if one.key != EVERYTHING}
        missing, stale = list(wanted), set[Cursor]()
        for relation in await reader.relations(*self.table):
            if not missing:
                break
            try:
                placed = await self._read(reader, relation, missing, began, credit_bytes)
            except SpillwayError as error:
                if error.code != "order_changed":
                    raise
                # They are keys of before, and mean nothing any more.
                await self._delivery.ask(AskedRefreshes(self.table, [EVERYTHING]))
                await self._delivery.refreshed(due)
                return False
            if placed is None:
                return False
            missing, newer = placed
            stale.update(newer)
        done = [one for key, one in wanted.items() if key not in stale]
        self.rows += len(done)
        await self._delivery.refreshed(done)
        return ordered and not stale

    async def _read(
        self, reader: PageReader, relation: Table, keys: Sequence[Cursor], began: int, credit_bytes: int
    ) -> tuple[list[Cursor], list[Cursor]] | None:
        """Place the rows with these keys. Returns the keys that are not in this relation, and those of which the sink
        has something newer; None: the page was not placed."""
        self.waiting = ""
        view = self._carried.open()
        try:
            page = await reader.read_keys(Selection(*relation), keys, credit_bytes, self._manners.timeout_seconds)
            self._carried.saw(view, page.snapshot.sees)
            asked = {make_key(*self.table, key).encode(): key for key in keys}
            placing = await self._place(reader, page, began, relation, least_lsn=self._behind() + 1, asked=asked)
        finally:
            self._carried.close(view)
        if placing is None:
            return None
        placing.placed_at = self._clock.monotonic()
        await self._settled(placing)
        seconds = await self._taken(placing)
        self._size.took(page.chunk.count, max(1, 2 * page.chunk.cost), page.seconds, seconds)
        return page.missing, placing.stale

"""Pages of existing rows on their way into the stream of a sink: what `spillway.flow.backfill` and
`spillway.flow.refresh` have in common.

Whoever reads pages does this with each of them, in this order:

1. *Room* (`_room`): the sink takes part, is not paused and not down, and what waits for it is little. Live changes are
   never held back for a page.
2. *Quiet* (`_quiet`): what the stream carried before `spillway.flow.carried` began to remember must be visible to every
   snapshot from now on, and whatever ran when the table entered the publication must have ended. So everything that was
   running then is waited for, once.
3. *Credit* (`_credit`), from what nobody else wants (`spillway.flow.budget.Spare`), before a row is read.
4. The page is read (spillway.source.page), in a transaction that is over by then.
5. *Place* (`_place`): when the stream has carried everything that the page sees, what is left of it is handed to the
   sink between two chunks, as if it had been committed there: above everything carried, below all that comes
   (`Placing`). A page that cannot be judged any more is read again.
6. *Settled* (`_settled`): every message of it is resolved, or durable in the store. What says that the page is done may
   be made durable now, and not before.
7. *Taken* (`_taken`): the sink has done with it; by how long that takes the next page is sized.

Until it has its place a page is a cache: it is given up as soon as anybody waits for the credit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from spillway.change import ACTIONS, key_values
from spillway.chunk import Chunk, Span
from spillway.clock import Clock
from spillway.flow.attempt import UNCHANGED_TOAST
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture, Turn
from spillway.flow.pagesize import PageSize
from spillway.flow.route import Subscription
from spillway.pgoutput.conditions import Condition
from spillway.source.page import Cursor, Page, PageReader

PAGE_CREDIT_BYTES = 16 << 20  # of one reader
BEHIND_SECONDS = 2.0  # a page that has waited so long for its place says that the stream is behind
PLACE_SECONDS = 60.0  # a page that finds no place in that time is read again
LOOK_SECONDS = 0.05  # a page that waits for its place looks so often whether its credit is wanted
ROOM_SECONDS = 0.25
QUIET_SECONDS = 0.05  # running transactions are looked at so often
TAKEN_SECONDS = 2.0  # so long a page is waited for at most, when it is durable
LEAST_AHEAD = 50  # messages that may always wait for the sink when a page is read
RETRY_CAP_SECONDS = 30.0


class OpenReader(Protocol):
    """Makes a reader for what has this id: where pages are to be read, or on the ``primary``. Rows that do not meet the
    ``filters`` are not in its pages."""

    async def __call__(
        self, page_id: str, *, primary: bool = False, filters: Sequence[Condition] = ()
    ) -> PageReader: ...


@dataclass(frozen=True, slots=True)
class Manners:
    """What the configuration says of the sink's backfills."""

    run_ahead: int  # rows of its backfills that may wait for the sink
    timeout_seconds: float  # of the statements of a page


class Paging:
    """See the module. ``active``: pages are to be read; every wait ends when it is not so any more."""

    def __init__(
        self,
        page_id: str,
        subscription: Subscription,
        keying: int,
        capture: Capture,
        spare: Spare,
        open_reader: OpenReader,
        manners: Manners,
        clock: Clock,
        readers: int = 1,
    ) -> None:
        self.waiting = ""  # why it does not read just now
        self._page_id = page_id
        self._subscription = subscription
        self._delivery = subscription.delivery
        self._keying = keying
        self._capture = capture
        self._carried = capture.carried
        self._spare = spare
        self._open_reader = partial(open_reader, filters=subscription.filters) if subscription.filters else open_reader
        self._manners = manners
        self._clock = clock
        self._readers = max(1, readers)
        self._woken = asyncio.Event()
        self._size = PageSize()
        self._not_before = 0.0
        self._pause_reason = ""
        self._must_wait = True  # for whatever is running, before the next page

    @property
    def active(self) -> bool:
        return True

    def wake(self) -> None:
        """Something has changed that it may wait for."""
        self._woken.set()

    # -- before a page is read --------------------------------------------------------------------------------------
    async def _room(self) -> bool:
        """Wait until there is room for a page. False: it is not active any more."""
        while self.active:
            seconds = self._not_before - self._clock.monotonic()
            self.waiting = self._pause_reason if seconds > ROOM_SECONDS else self._why_not()
            if seconds <= 0 and not self.waiting:
                return True
            await self._sleep(seconds if 0 < seconds < ROOM_SECONDS else ROOM_SECONDS)
        return False

    def _why_not(self) -> str:
        sink = self._delivery
        if not sink.participates:
            self._must_wait = True  # what it misses counts as carried
            return f"the sink takes no part: {sink.gap.reason if sink.gap is not None else ''}"
        if sink.paused:
            return "the sink is paused"
        if sink.breaker.open:
            return f"the sink is down: {sink.last_error or ''}"
        if sink.full is not None:
            return f"the backlog of the sink is full: {sink.full}"
        rejects = sink.last_error or ""
        if sink.queue_throttle.narrow and not rejects.startswith(UNCHANGED_TOAST.reason):  # a page may mend that
            return f"the sink rejects what it gets: {rejects}"
        counters = sink.counters
        if not counters.messages and not sink.memory_messages:
            sink.reads_resolved = sink.reads_taken  # what was discarded, or emptied by a TRUNCATE, is not counted
        ahead = min(sink.reads_taken - sink.reads_resolved, max(counters.messages, sink.memory_messages))
        if ahead >= self._manners.run_ahead:
            return f"{ahead} rows wait for the sink, backfill.run_ahead is {self._manners.run_ahead}"
        if not sink.has_room(sink.page_messages, sink.page_bytes):
            return f"{counters.messages} messages wait for the sink; the rest of its backlog is for live changes"
        waiting = max(counters.queued, sink.memory_messages) - sink.window.flying
        if waiting >= max(LEAST_AHEAD, 2 * self._size.rows * self._readers):
            return f"the sink is behind: {waiting} messages come first"
        return ""

    def _pause(self, seconds: float, reason: str) -> None:
        """No page before that."""
        self._not_before, self._pause_reason = self._clock.monotonic() + seconds, reason

    async def _quiet(self, reader: PageReader) -> int:
        """Wait until the stream and every snapshot from now on have nothing between them that is not remembered.
        Returns in which memory (`Carried.began`) that is so; 0: it is not active any more."""
        carried = self._carried
        while self.active:
            carried.begin()
            began = carried.began
            if carried.quiet == began and not self._must_wait:
                return began
            behind_lsn = self._capture.received_lsn
            primary = await self._open_reader(self._page_id, primary=True) if reader.standby else reader
            try:
                done = await self._all_ended(primary, began)
                if done and self._must_wait and primary.stream_may_miss_a_table:
                    done = await self._renewed(await primary.flushed_lsn(), began)
                if done and reader.standby:
                    done = await self._replayed(reader, max(behind_lsn, await primary.flushed_lsn()), began)
            finally:
                if primary is not reader:
                    await primary.close()
            if done:
                self._must_wait = False
                carried.quiet = began
        return 0

    async def _all_ended(self, primary: PageReader, began: int) -> bool:
        """Wait until every transaction has ended that is running now. False: that is of no use any more."""
        if primary.standby:  # the source itself is one: what runs is not told there, but what has ended
            _, first_after = await primary.horizon()
            while (await primary.horizon())[0] < first_after:
                self.waiting = "waits for transactions that were running when it began"
                if not await self._waited(began):
                    return False
            return self._remembered(began)
        running = await primary.running()
        while running:
            self.waiting = f"waits for a transaction that was running when it began: {next(iter(running.values()))}"
            if not await self._waited(began):
                return False
            now = await primary.running()
            running = {xid: who for xid, who in running.items() if xid in now}
        return self._remembered(began)

    async def _renewed(self, lsn: int, began: int) -> bool:
        """Have the stream's connection made anew, behind this position."""
        while self._capture.sent_lsn < lsn:
            self.waiting = "waits until all that was running is confirmed, to make the stream's connection anew"
            if not await self._waited(began):
                return False
        await self._capture.renew()
        return self._remembered(began)

    async def _replayed(self, standby: PageReader, lsn: int, began: int) -> bool:
        while await standby.flushed_lsn() < lsn:
            self.waiting = "waits for the standby"
            if not await self._waited(began):
                return False
        return self._remembered(began)

    async def _waited(self, began: int) -> bool:
        await self._sleep(QUIET_SECONDS)
        return self._remembered(began) and self.active

    def _remembered(self, began: int) -> bool:
        return self._carried.began == began and self._carried.remembers

    async def _credit(self, needed_bytes: int) -> int:
        """0: it is not active any more."""
        readers = self._readers
        most_bytes = min(PAGE_CREDIT_BYTES, self._spare.limit_bytes // readers, self._delivery.page_bytes)
        wanted = max(needed_bytes, self._size.credit_bytes(most_bytes))
        while not self._spare.try_take(wanted):
            self.waiting = "memory: the stream, the sinks and pages of other backfills come first"
            if not self.active:
                return 0
            await self._clock.sleep(LOOK_SECONDS)
        return wanted

    # -- when it has been read --------------------------------------------------------------------------------------
    async def _place(
        self,
        reader: PageReader,
        page: Page,
        began: int,
        relation: tuple[str, str] | None = None,
        advance: Callable[[Placing], None] | None = None,
        least_lsn: int = 0,
        asked: Mapping[bytes, Cursor] = MappingProxyType({}),
    ) -> Placing | None:
        """Its place in the stream, not below ``least_lsn``. ``asked``: what it was read for, by the texts of the keys,
        if that is to be told of what it has not. None: it cannot be judged any more, or its credit was wanted: to be
        read again."""
        placing = Placing(page, relation, self._subscription, self._keying, self._capture, began, advance, asked)
        turn = Turn(max(page.snapshot.lsn, least_lsn), placing)
        waits = asyncio.ensure_future(self._capture.placed(turn))
        started = self._clock.monotonic()
        try:
            while not waits.done():
                await asyncio.wait([waits], timeout=LOOK_SECONDS)
                seconds = self._clock.monotonic() - started
                if waits.done():
                    break
                if self._spare.wanted or seconds > PLACE_SECONDS or not self._remembered(began):
                    break
                if not self.active:
                    break
                if seconds > 3 * reader.wal_writer_delay_seconds + LOOK_SECONDS:
                    # Whatever the snapshot saw of asynchronous commits is on disk by now, or it would not be at all;
                    # what is above was never a commit, and on an idle server nobody may write it out for long.
                    turn.lsn = max(least_lsn, min(turn.lsn, await reader.flushed_lsn()))
                    self.waiting = "waits for the stream to come by"
        finally:
            placing.abandoned = not placing.placed
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
        seconds = self._clock.monotonic() - started
        if seconds > BEHIND_SECONDS:  # what comes before it is not made faster by pages
            self._pause(min(seconds, PLACE_SECONDS / 10), "the stream is behind")
        self.waiting = ""
        return placing if placing.placed else None

    async def _settled(self, placing: Placing) -> None:
        """Wait until what was placed is resolved, or durable in the store."""
        span = placing.span
        while span is not None and span.left and not span.durable:
            await self._sleep(ROOM_SECONDS)

    async def _taken(self, placing: Placing) -> float:
        """Wait until the sink has done with it, though it may be durable long before: what it has in front of it, live
        changes have, too. Not for a sink that does not deliver; `_room` does that. Returns seconds since it was placed.
        """
        span, sink = placing.span, self._delivery
        while span is not None and span.left and self.active:
            seconds = self._clock.monotonic() - placing.placed_at
            if span.durable and (
                not sink.counters.queued
                or sink.reads_resolved >= placing.reads
                or seconds > TAKEN_SECONDS
                or sink.paused
                or sink.breaker.open
                or not sink.participates
            ):
                break
            await self._sleep(LOOK_SECONDS)
        return self._clock.monotonic() - placing.placed_at

    async def _sleep(self, seconds: float) -> None:
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await self._woken.wait()


class Placing:
    """What puts a page into the stream of its sink; called by capture, between two chunks."""

    def __init__(
        self,
        page: Page,
        relation: tuple[str, str] | None,
        subscription: Subscription,
        keying: int,
        capture: Capture,
        began: int,
        advance: Callable[[Placing], None] | None,
        asked: Mapping[bytes, Cursor],
    ) -> None:
        """``asked``: as `Paging._place` has it. ``advance``: is called as soon as it is placed, before anything is
        awaited: who is cancelled then must not have the page read again. No cursor is saved without what was placed."""
        self._page = page
        self._advance = advance
        self._relation = relation
        self._subscription = subscription
        self._keying = keying
        self._carried = capture.carried
        self._began = began
        self.abandoned = False
        self.placed = False
        self.span: Span | None = None  # what the sink was given, if anything was left
        self.dropped = 0
        self.again: list[Cursor] = []
        self._asked = asked
        self._stale: set[int] = set()
        self._brought: list[Cursor] = []
        self.placed_at = 0.0
        self.reads = 0  # of the sink, this page's included

    @property
    def stale(self) -> list[Cursor]:
        """The keys of those rows that were not placed: the sink has something newer. So it has of what was asked for
        and is not in the page at all, but was brought by a change that the page does not see."""
        return [*(_cursor(self._page.chunk, place) for place in self._stale), *self._brought]

    def _void(self) -> bool:
        """Nobody wants it any more, the sink takes no part, or what it is judged by was forgotten."""
        taken = self._subscription.delivery.participates
        return self.abandoned or not taken or self._carried.began != self._began or not self._carried.remembers

    def _brought_since(self) -> list[Cursor]:
        chunk = self._page.chunk
        absent = self._asked.keys() - {chunk.key_texts(place)[0] for place in range(chunk.count)} if self._asked else ()
        return [self._asked[key] for key in self._carried.brought(absent, self._page.snapshot.sees)] if absent else []

    async def __call__(self, received_lsn: int) -> bool:
        delivery = self._subscription.delivery
        chunk = self._page.chunk
        lsn = received_lsn - 1
        tail = delivery.tail
        if tail.commit_lsn > lsn:
            return False  # the stream comes again, after a restart
        if self._void():
            return True
        actions = self._subscription.actions
        stale = self._carried.stale(
            chunk, self._page.snapshot.sees, lambda action: ACTIONS[action] in actions, self._relation
        )
        if stale is None:
            return True
        left = None
        if stale.dropped or stale.again:
            gone = stale.dropped | stale.again
            left = [place for place in range(chunk.count) if place not in gone]
        span: Span | None = None
        parked = None
        if chunk.count and left != []:
            first = tail.commit_idx + 1 if tail.commit_lsn == lsn else 0
            span = Span(chunk.placed(lsn, first), self._keying, left)
            parked = await delivery.parked_among(span) if delivery.needs_look_up else None
            # Nothing is awaited from here on.
            if self._void() or not delivery.has_room(len(span), len(chunk.data)):
                return True
            delivery.intake(span, parked)
            delivery.reads_taken += len(span)
        self.reads = delivery.reads_taken
        self.span = span
        self._stale = stale.dropped | stale.again
        self._brought = self._brought_since()
        self.dropped = len(stale.dropped)
        self.again = [_cursor(chunk, place) for place in sorted(stale.again)]
        self.placed = True
        if self._advance is not None:
            self._advance(self)
        return True


def _cursor(chunk: Chunk, place: int) -> Cursor:
    schema, table = chunk.table(place)
    return key_values(schema, table, chunk.key_texts(place)[0].decode())

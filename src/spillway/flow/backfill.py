"""One backfill: the rows of one table, in pages, to one sink, beside the live stream.

A reader works off one part after another, strictly page by page, each as `spillway.flow.paging` says. When every
message of a page is resolved, or durable in the store, the cursor is made durable. A crash in between repeats this
page, no more; a cursor is never ahead of its rows.

Rows that are stale but for which the sink got no whole image are kept with the cursor (``Part.again``) and read anew,
by key.

What is read is said by `spillway.flow.parts`; when all of it is, the sweep comes, if one was asked for
(`spillway.flow.sweep`).

Rows that are named by their keys (`spillway.flow.named`) have no parts. Of each block of keys one relation of the table
after the other is asked for what was not found yet. What is in none of them is deleted, if there is to be a sweep; what
turns out to be there then has come to another relation meanwhile, and is looked for again. One that can never be read,
since it is too large or its key is none of the table's, does not keep the others from coming: it is passed over and
named, and the backfill ends as failed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import structlog

from spillway.change import key_values
from spillway.chunk import Chunk
from spillway.clock import Clock
from spillway.errors import SourceUnavailable, SpillwayError, StoreFailed, first_of
from spillway.flow.attempt import UNCHANGED_TOAST
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture
from spillway.flow.named import MOST_BYTES, NamedKeys
from spillway.flow.paging import RETRY_CAP_SECONDS, ROOM_SECONDS, Manners, OpenReader, Placing
from spillway.flow.parts import Parts
from spillway.flow.progress import BackfillState, Named, Part
from spillway.flow.retry import backoff_seconds
from spillway.flow.route import Subscription
from spillway.flow.sweep import MOST_KEYS, Sweeping
from spillway.source.page import Cursor, LockTimeout, NeedsCredit, Page, PageReader, PageTimeout
from spillway.store.base import Select

RATE_SECONDS = 10.0
HELP_SECONDS = 2.0
LOOKS = 5  # at the relations of a table, for rows that go from one to another meanwhile
OF_KEYS = ("order_changed", "page")  # codes of what is said where keys are none of the table's

_log = structlog.get_logger()


class Backfill(Sweeping):
    def __init__(
        self,
        state: BackfillState,
        subscription: Subscription,
        keying: int,
        capture: Capture,
        spare: Spare,
        open_reader: OpenReader,
        manners: Manners,
        epoch: Callable[[], int],
        clock: Clock,
        named: NamedKeys | None = None,
    ) -> None:
        super().__init__(state, subscription, keying, capture, spare, open_reader, manners, epoch, clock)
        self._parts = Parts(state, subscription.needs_key, self._save)
        self._named = named
        self._help_at = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # when how many rows had been read

    # -- what people do ---------------------------------------------------------------------------------------------
    async def change(self, state: Literal["active", "paused", "cancelled"]) -> None:
        """Durable when this returns. Raises SpillwayError ``backfill_ended``."""
        if self.state.has_ended:
            raise SpillwayError("backfill_ended", f"backfill {self.state.id} is {self.state.state}", "start another")
        if state == "cancelled":
            await self._end(state)
            return
        self.state.state = state
        self._woken.set()
        await self._save()

    async def _end(self, state: Literal["completed", "failed", "cancelled"], error: str | None = None) -> None:
        """Nothing, if it has ended already."""
        if self.state.has_ended:
            return
        self.state.state, self.state.error, self.state.ended = state, error, self._clock.wall()
        self._woken.set()
        await self._save()

    @property
    def rows_per_second(self) -> float:
        """Over the last seconds."""
        if len(self._recent) < 2:
            return 0.0
        (since, before), (until, now) = self._recent[0], self._recent[-1]
        idle = self._clock.monotonic() - until
        return (now - before) / max(until - since + (idle if idle > 1 else 0), 1e-3)

    # -- the work ---------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until it has ended. What concerns the source for a while is tried again; what somebody must mend fails it."""
        failures = 0
        table = self.state.request.name
        self._carried.watch(table)
        if self._whole:
            self._delivery.expect(table, self._read_again)
        try:
            while not self.state.has_ended:
                if self.state.state == "paused":
                    self.waiting = "paused"
                    await self._sleep(ROOM_SECONDS)
                    continue
                before = self.state.pages
                try:
                    await self._work()
                except (SourceUnavailable, LockTimeout, PageTimeout) as error:
                    failures = failures + 1 if self.state.pages == before else 1
                    self.waiting = f"source: {error}"
                    await self._sleep(backoff_seconds(failures - 1, 0.25, RETRY_CAP_SECONDS))
                except StoreFailed:
                    raise
                except SpillwayError as error:
                    _log.warning("backfill failed", sink=self.state.sink, table=".".join(table), error=str(error))
                    await self._end("failed", f"{error} [{error.code}]")
        finally:
            self.waiting = ""
            self._carried.unwatch(table)
            if self._whole:
                self._delivery.expect_no_more(table)

    @property
    def _whole(self) -> bool:
        """All rows of the table are wanted."""
        request = self.state.request
        least = (request.where, request.start, request.committed_since, request.named, request.least_key)
        return least == (None,) * len(least) and request.most_key is None

    async def _read_again(self, keys: Sequence[Cursor]) -> bool:
        """Rows that may have come behind the pages. Durable when this returns; False: it has ended."""
        parts = {(part.schema, part.table): part for part in reversed(self.state.parts or ())}
        for part in parts.values():  # in which of them they are is not known: where they are not they are not missed
            part.again += [key for key in keys if key not in part.again]
        if not self.state.has_ended:
            await self._save()
        return not self.state.has_ended

    async def _work(self) -> None:
        """Until there is nothing left to do, or it is not active any more."""
        if self.state.request.named is not None:
            await self._bring_named(self.state.request.named)
            return
        reader = await self._open_reader(self.state.id)
        try:
            if self.state.parts is None:
                await self._lay_out(reader)
        finally:
            await reader.close()
        parts = deque(part for part in self.state.parts or () if not part.done or part.again)
        readers = min(max(1, self.state.request.parallel), len(parts))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(readers):
                    tasks.create_task(self._read_parts(parts))
        except* SpillwayError as group:
            raise first_of(group) from None
        if not all(part.done and not part.again for part in self.state.parts or ()):
            return  # it was paused for a moment
        if self.active and await self._more_parts():
            return
        if self.active and self.state.request.sweep and not await self._sweep():
            return
        if self.active:
            while self._whole and self._delivery.passes_over and await self._room():
                if not await self._delivery.due_now(Select(reason=UNCHANGED_TOAST.reason)):
                    break
                self.waiting = "waits for updates of rows that the sink did not have"
                await self._sleep(ROOM_SECONDS)
            if not any(part.again for part in self.state.parts or ()):
                await self._all_done()

    async def _all_done(self) -> None:
        state = self.state
        if not state.unreadable:
            await self._end("completed")
            return
        more = state.unreadable - len(state.unreadable_named)
        said = "; ".join([*state.unreadable_named, *([f"and {more} more"] if more else [])])
        _log.warning("rows cannot be read", sink=state.sink, table=state.request.text, rows=state.unreadable)
        await self._end("failed", f"{state.unreadable} rows cannot be read, all others came: {said} [unreadable_rows]")

    # -- rows that are named by their keys --------------------------------------------------------------------------
    async def _bring_named(self, named: Named) -> None:
        """All of them, or until it is not active any more."""
        state, keys = self.state, self._named
        assert keys is not None, "named rows, and nobody knows their keys"
        reader = await self._open_reader(state.id)
        try:
            while state.block < named.blocks and await self._room():
                credit = await self._credit(2 * MOST_BYTES)  # what reading a block may hold for a moment
                if not credit:
                    return
                try:
                    block = await keys.block(state.block)
                finally:
                    self._spare.give(credit)
                self._numbers = {key: number for number, key in enumerate(block)}
                if not await self._bring_block(reader):
                    return
                state.block, state.placed, self._numbers = state.block + 1, [], {}
                await self._save()
                await keys.drop([state.block - 1])
        finally:
            await reader.close()
        if self.active:
            await self._all_done()

    async def _bring_block(self, reader: PageReader) -> bool:
        """False: not all of it."""
        name, sweep = self.state.request.name, self.state.request.sweep
        for _ in range(LOOKS):
            relations = await reader.relations(*name)
            for relation in relations:
                part = Part(*relation, done=True, again=self._left())
                try:
                    await self._read_part(reader, part)
                except SpillwayError as error:
                    await self._parts.check_gone(reader, relation, error)
                    part.again = []
                if part.again:
                    return False
            absent: list[Cursor] | None = None if sweep else []
            while (left := self._left()) and absent is None:
                if not await self._room():
                    return False
                absent = await self._delete_absent(reader, left)
            self.state.placed += [self._numbers[key] for key in absent or ()]
            if not self._left() or (not sweep and await reader.relations(*name) == relations):
                return True
        moving = SpillwayError("moving", "goes from one partition to another whenever it is looked for")
        for key in self._left():
            self._pass_over(key, moving)
        return True

    def _left(self) -> list[Cursor]:
        """Of the block."""
        placed = set(self.state.placed)
        return [key for key, number in self._numbers.items() if number not in placed]

    def _came(self, page: Page, again: Sequence[Cursor]) -> None:
        found = _keys_of(page.chunk).difference(again)
        self.state.placed += [self._numbers[key] for key in found if key in self._numbers]

    # -- parts ------------------------------------------------------------------------------------------------------
    async def _lay_out(self, reader: PageReader) -> bool:
        """Whether there were relations that are not known yet."""
        found = await self._parts.lay_out(reader, self._capture.received_lsn)
        if found:
            self._must_wait = True  # what runs may have begun before they were published
            await self._save()
        return found

    async def _more_parts(self) -> bool:
        """All are read; whether there are others by now."""
        reader = await self._open_reader(self.state.id)
        try:
            return await self._lay_out(reader)
        except SpillwayError as error:
            if error.code != "not_published":
                raise
            return False  # the table has gone: what it had was read
        finally:
            await reader.close()

    async def _read_parts(self, parts: deque[Part]) -> None:
        reader = await self._open_reader(self.state.id)
        try:
            while parts and await self._room():
                part = parts.popleft()
                try:
                    await self._read_part(reader, part)
                except SpillwayError as error:
                    parts += await self._parts.instead(reader, part, error)
        finally:
            await reader.close()

    async def _read_part(self, reader: PageReader, part: Part) -> None:
        needed_bytes = 0  # more than usual, for a large row
        failures = 0
        most_keys = self._most_keys
        while (not part.done or part.again) and await self._room():
            began = await self._quiet(reader)
            if not began:
                return
            by_key = part.again[:most_keys] if part.done or len(part.again) >= MOST_KEYS else []
            credit = await self._credit(needed_bytes)
            if not credit:
                return
            used = 0
            view = self._carried.open()
            try:
                page = await self._read(reader, part, by_key, credit)
                used = max(1, min(credit, 2 * page.chunk.cost))
                self._carried.saw(view, page.snapshot.sees)
            except (LockTimeout, PageTimeout) as error:
                if isinstance(error, PageTimeout):
                    self._size.timed_out()
                    most_keys = max(1, len(by_key) // 2) if by_key else most_keys
                failures += 1
                self.waiting = str(error)
                await self._sleep(backoff_seconds(failures, 0.05, RETRY_CAP_SECONDS))
                continue
            except NeedsCredit as error:
                if len(by_key) > 1:
                    most_keys = len(by_key) // 2
                    continue
                needed_bytes = error.needed_bytes
                if needed_bytes > self._spare.most_bytes:
                    if not by_key:
                        raise
                    self._pass_over(part.again.pop(0), error)
                    needed_bytes = 0
                continue
            except SpillwayError as error:
                if not self._numbers or error.code not in OF_KEYS:
                    raise
                if len(by_key) > 1:
                    most_keys = len(by_key) // 2
                else:
                    self._pass_over(part.again.pop(0), error)
                continue
            finally:
                self._spare.give(credit - used)
                if not used:
                    self._carried.close(view)
            failures = needed_bytes = 0
            most_keys = min(self._most_keys, 2 * most_keys)
            try:
                try:
                    advance = partial(self._advance, part, page, by_key)
                    placing = await self._place(reader, page, began, (part.schema, part.table), advance)
                finally:
                    self._carried.close(view)
                if placing is not None:
                    placing.placed_at = self._clock.monotonic()
                    await self._settled(placing)
                    await self._save()
            finally:
                self._spare.give(used)
            if placing is not None:
                await self._help_partial_updates()
                seconds = await self._taken(placing)
                if not by_key:
                    self._size.took(max(page.chunk.count, page.looked_at), used, page.seconds, seconds)

    async def _help_partial_updates(self) -> None:
        """Updates without their TOAST columns wait for rows that the sink has not yet: those of the page may be theirs.
        They are not left to their back-off, for until then all that comes of their keys waits, too."""
        now = self._clock.monotonic()
        if self._delivery.is_state and self._delivery.counters.parked_keys and now >= self._help_at:
            self._help_at = now + HELP_SECONDS
            await self._delivery.due_now(Select(reason=UNCHANGED_TOAST.reason))

    async def _read(self, reader: PageReader, part: Part, by_key: Sequence[Cursor], credit_bytes: int) -> Page:
        self.waiting = ""
        selection = part.selection(self.state.request)
        timeout_seconds = self._manners.timeout_seconds
        if by_key:
            page = await reader.read_keys(selection, by_key, credit_bytes, timeout_seconds)
        else:
            rows = min(self._size.fitting(credit_bytes), self._delivery.page_messages)
            page = await reader.read(selection, part.within, part.cursor, rows, credit_bytes, timeout_seconds)
        table = self.state.request.name
        if page.chunk.count and page.chunk.table(0) != table:  # a partition that was detached
            name = ".".join(table)
            raise SpillwayError("not_published", f"{part.schema}.{part.table} is no part of {name}", "start it again")
        return page

    def _advance(self, part: Part, page: Page, by_key: Sequence[Cursor], placing: Placing) -> None:
        state = self.state
        rows = page.chunk.count
        state.rows += rows
        state.superseded += placing.dropped
        state.pages += 1
        if by_key:
            part.again = [*part.again[len(by_key) :], *placing.again]
            self._came(page, placing.again)
        else:
            part.again += placing.again
            part.cursor = page.cursor
            part.done = page.cursor is None
        now = self._clock.monotonic()
        rate = state.request.max_rows_per_second
        if rate is not None:
            self._pause(max(self._not_before, now - rows / rate) + rows / rate - now, "max_rows_per_second")
        self._recent.append((now, state.rows))
        while self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()


def _keys_of(chunk: Chunk) -> set[Cursor]:
    return {key_values(*chunk.table(place), chunk.key_texts(place)[0].decode()) for place in range(chunk.count)}

"""One backfill: the rows of one table, in pages, to one sink, beside the live stream.

A reader works off one part after another, strictly page by page, each as `spillway.flow.paging` says. When every
message of a page is resolved, or durable in the store, the cursor is made durable. A crash in between repeats this
page, no more; a cursor is never ahead of its rows.

Rows that are stale but for which the sink got no whole image are kept with the cursor (``Part.again``) and read anew,
by key.

**Relations.** Parts are laid out over the relations that the table's rows are in, which change: a part whose relation
was dropped, detached or taken out of the publication is dropped, as long as the table has others; when all parts are
read, the relations that have come meanwhile are laid out, too. A relation whose cursors mean nothing any more (it was
rewritten, or has another key) is read from its beginning, once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import structlog

from spillway.change import key_values, table_prefix
from spillway.clock import Clock
from spillway.errors import SourceUnavailable, SpillwayError, StoreFailed, first_of
from spillway.flow.attempt import UNCHANGED_TOAST
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture
from spillway.flow.paging import RETRY_CAP_SECONDS, ROOM_SECONDS, Manners, OpenReader, Paging, Placing
from spillway.flow.progress import BackfillState, Part
from spillway.flow.retry import backoff_seconds
from spillway.flow.route import Subscription
from spillway.position import version
from spillway.source.page import Cursor, LockTimeout, NeedsCredit, Page, PageReader, PageTimeout, Selection
from spillway.store.base import BackfillDocument, Select

AGAIN_KEYS = 500  # keys that are read anew in one page
RATE_SECONDS = 10.0
HELP_SECONDS = 2.0
GONE = ("no_table", "not_published", "bad_condition")  # codes of what is said of a relation that has gone

_log = structlog.get_logger()


class Backfill(Paging):
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
    ) -> None:
        super().__init__(
            state.id, subscription, keying, capture, spare, open_reader, manners, clock, state.request.parallel
        )
        self.state = state
        self._epoch = epoch
        self._help_at = 0.0
        self._begun_anew: set[tuple[str, str]] = set()  # relations whose order has changed
        self._recent: deque[tuple[float, int]] = deque()  # when how many rows had been read

    @property
    def active(self) -> bool:
        return self.state.state == "active"

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
        table = (self.state.request.schema, self.state.request.table)
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
            self._delivery.expect_no_more(table)

    @property
    def _whole(self) -> bool:
        """All rows of the table are wanted."""
        request = self.state.request
        least = (request.where, request.start, request.committed_since, request.keys, request.least_key)
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
                await self._end("completed")

    async def _lay_out(self, reader: PageReader) -> None:
        """Relations of the table that are not known yet become parts."""
        state = self.state
        known = {(part.schema, part.table) for part in state.parts or ()}
        parts: list[Part] = []
        estimate = 0
        for relation in await reader.relations(state.request.schema, state.request.table):
            if relation in known:
                continue
            try:
                found, rows = await self._parts_of(reader, Part(*relation))
            except SpillwayError as error:
                await self._check_gone(reader, relation, error)
                continue
            parts += found
            estimate += rows
        if state.parts is None:
            state.started_lsn = max(state.started_lsn, self._capture.received_lsn)
        elif not parts:
            return
        state.parts = [*(state.parts or ()), *parts]
        state.estimate_rows = (state.estimate_rows or 0) + estimate
        self._must_wait = True  # what runs may have begun before they were published
        await self._save()

    async def _parts_of(self, reader: PageReader, whole: Part) -> tuple[list[Part], int]:
        """And about how many rows they have."""
        request = self.state.request
        if request.keys is not None:
            whole.again, whole.done = list(request.keys), True
            return [whole], len(request.keys)
        selection = whole.selection(request)
        if request.least_key is not None or request.most_key is not None:
            ranges = [await reader.bounded(selection)]
            rows = await reader.estimate(selection, ranges[0])
        else:
            ranges = await reader.split(selection, request.parallel)
            rows = await reader.estimate(selection)
        return [Part(whole.schema, whole.table, one.low, one.high) for one in ranges], rows

    async def _more_parts(self) -> bool:
        """All are read; whether there are others by now."""
        before = len(self.state.parts or ())
        reader = await self._open_reader(self.state.id)
        try:
            await self._lay_out(reader)
        except SpillwayError as error:
            if error.code != "not_published":  # the table has gone: what it had was read
                raise
        finally:
            await reader.close()
        return len(self.state.parts or ()) > before

    async def _read_parts(self, parts: deque[Part]) -> None:
        reader = await self._open_reader(self.state.id)
        try:
            while parts and await self._room():
                part = parts.popleft()
                try:
                    await self._read_part(reader, part)
                except SpillwayError as error:
                    parts += await self._instead(reader, part, error)
        finally:
            await reader.close()

    async def _instead(self, reader: PageReader, part: Part, error: SpillwayError) -> list[Part]:
        """What is to be read in place of the parts of this relation. Raises the error if nobody can say."""
        state, relation = self.state, (part.schema, part.table)
        if not any(part is known for known in state.parts or ()):
            return []  # another reader has met the same
        instead: list[Part] = []
        if error.code == "order_changed":
            request = state.request
            bounded = (request.keys, request.least_key, request.most_key) != (None, None, None)
            if bounded or relation in self._begun_anew:
                raise error
            if self._subscription.needs_key and not await reader.key_columns(Selection(*relation)):
                raise error
            self._begun_anew.add(relation)
            instead.append(Part(*relation))
        else:
            await self._check_gone(reader, relation, error)
        state.parts = [known for known in state.parts or () if (known.schema, known.table) != relation] + instead
        _log.info(
            "backfill goes on",
            sink=state.sink,
            relation=".".join(relation),
            now="from its beginning" if instead else "without it",
            error=str(error),
        )
        await self._save()
        return instead

    async def _check_gone(self, reader: PageReader, relation: tuple[str, str], error: SpillwayError) -> None:
        """Raises unless the relation has gone and the table has others: the error, or `SourceUnavailable` if it is
        there again."""
        if error.code not in GONE:
            raise error
        try:
            relations = await reader.relations(self.state.request.schema, self.state.request.table)
        except SpillwayError as now:
            raise error if now.code == "not_published" else now from None
        if relation in relations:
            raise error if error.code == "bad_condition" else SourceUnavailable(error.code, str(error))

    async def _read_part(self, reader: PageReader, part: Part) -> None:
        needed_bytes = 0  # more than usual, for a large row
        failures = 0
        most_keys = self._most_keys
        while (not part.done or part.again) and await self._room():
            began = await self._quiet(reader)
            if not began:
                return
            by_key = part.again[:most_keys] if part.done or len(part.again) >= AGAIN_KEYS else []
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
                    raise
                continue
            finally:
                self._spare.give(credit - used)
                if not used:
                    self._carried.close(view)
            failures = needed_bytes = 0
            most_keys = self._most_keys
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

    @property
    def _most_keys(self) -> int:
        """In one page."""
        return min(AGAIN_KEYS, self._delivery.page_messages)

    async def _sweep(self) -> bool:
        """What the sink has, or will have, and the source has not, or the sink's filters leave out, is deleted, by
        pages of the sink's keys. What the backfill has just written is known to be there, where the sink knows
        versions. False: it is not active any more."""
        sink, state = self._delivery.readable, self.state
        if sink is None:
            return True
        below = version(self._epoch(), state.started_lsn, 0)
        table = (state.request.schema, state.request.table)
        reader = await self._open_reader(state.id)
        try:
            columns = await reader.key_columns(Selection(*(await reader.relations(*table))[0]))
            if not await self._sweep_held(reader):  # after a restart, too: what was tried may come again
                return False
            while await self._room():
                try:
                    keys, after = await sink.keys(table, columns, state.sweep_after, self._most_keys, below)
                except SpillwayError as error:
                    if error.code != "sink_unreachable":
                        raise
                    self.waiting = f"the sink cannot be read: {error}"
                    await self._sleep(ROOM_SECONDS)
                    continue
                if keys and not await self._delete_absent(reader, keys):
                    continue
                state.sweep_after = after
                await self._save()
                if after is None:
                    return True
        finally:
            await reader.close()
        return False

    async def _sweep_held(self, reader: PageReader) -> bool:
        """A row from before that the sink has not taken yet is not among the sink's keys; taken after all, it must not
        stay. So what is older than this backfill has been tried before the sink's keys are read, and the keys of what
        has failed are swept as if the sink had them: the delete goes behind it."""
        table = (self.state.request.schema, self.state.request.table)
        while await self._room():
            lsn = await self._delivery.untried_from()
            if lsn is None or lsn > self.state.started_lsn:
                break
            self.waiting = "what waited for the sink before comes first"
            await self._sleep(ROOM_SECONDS)
        prefix = after = table_prefix(*table)
        while await self._room():
            held = [key for key in await self._delivery.held_keys(after, self._most_keys) if key.startswith(prefix)]
            if not held:
                return True
            if await self._delete_absent(reader, [key_values(*table, key) for key in held]):
                after = held[-1]
        return False

    async def _delete_absent(self, reader: PageReader, keys: Sequence[Cursor]) -> bool:
        """Deletes of those that the source has not, or whose rows the sink's filters leave out, placed as a page is.
        False: to be done again."""
        try:
            return await self._delete_absent_of(reader, keys, 0)
        except NeedsCredit as error:
            if len(keys) > 1:
                half = len(keys) // 2
                return await self._delete_absent(reader, keys[:half]) and await self._delete_absent(reader, keys[half:])
            if error.needed_bytes > self._spare.most_bytes:
                raise
            return await self._delete_absent_of(reader, keys, error.needed_bytes)

    async def _delete_absent_of(self, reader: PageReader, keys: Sequence[Cursor], needed_bytes: int) -> bool:
        began = await self._quiet(reader)
        if not began:
            return False
        credit = await self._credit(needed_bytes)
        if not credit:
            return False
        view = self._carried.open()
        try:
            page = await self._absent(reader, keys, credit)
            self._carried.saw(view, page.snapshot.sees)
            placing = await self._place(reader, page, began)
            if placing is None:
                return False
            await self._settled(placing)
            self.state.swept += page.chunk.count - placing.dropped - len(placing.again)
            return True
        except (LockTimeout, PageTimeout) as error:
            self.waiting = str(error)
            await self._sleep(ROOM_SECONDS)
            return False
        finally:
            self._carried.close(view)
            self._spare.give(credit)

    async def _absent(self, reader: PageReader, keys: Sequence[Cursor], credit_bytes: int) -> Page:
        """Deletes of those that are in none of the table's relations. What moved from one to another while they were
        looked at is told by the snapshot of the first, which does not see that. Partitions may come while a sweep goes
        on: the relations are those of before and after."""
        table = (self.state.request.schema, self.state.request.table)
        seconds = self._manners.timeout_seconds
        checked = {condition.column for condition in self._subscription.filters if condition.table == table}
        while True:
            relations = await reader.relations(*table)
            page = await reader.read_absent(Selection(*relations[0]), keys, seconds, checked, credit_bytes)
            snapshot = page.snapshot
            for relation in relations[1:]:
                page = await reader.read_absent(Selection(*relation), page.missing, seconds, checked, credit_bytes)
            if relations == [table] or await reader.relations(*table) == relations:
                page.snapshot = replace(snapshot, lsn=page.snapshot.lsn)
                return page

    async def _read(self, reader: PageReader, part: Part, by_key: Sequence[Cursor], credit_bytes: int) -> Page:
        self.waiting = ""
        selection = part.selection(self.state.request)
        timeout_seconds = self._manners.timeout_seconds
        if by_key:
            page = await reader.read_keys(selection, by_key, credit_bytes, timeout_seconds)
        else:
            rows = min(self._size.fitting(credit_bytes), self._delivery.page_messages)
            page = await reader.read(selection, part.within, part.cursor, rows, credit_bytes, timeout_seconds)
        table = (self.state.request.schema, self.state.request.table)
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

    # -- state ------------------------------------------------------------------------------------------------------
    async def _save(self) -> None:
        state = self.state
        state.changed = self._clock.wall()
        await self._delivery.note(
            BackfillDocument(state.id, state.as_json(), state.has_ended and not state.is_owed), covering=True
        )

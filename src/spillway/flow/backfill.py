"""One backfill: the rows of one table, in pages, to one sink, beside the live stream.

A reader works off one part after another, strictly page by page:

1. *Room*: the backfill is active, the sink takes part, is not paused and not down, and what waits for it is little
   (`Backfill._why_not`). Live changes are never held back for a page.
2. *Quiet*: what the stream carried before `spillway.flow.carried` began to remember must be visible to every snapshot
   from now on, and whatever ran when the table entered the publication must have ended. So everything that was running
   then is waited for, once.
3. *Credit*, from what nobody else wants (`spillway.flow.budget.Spare`), before a row is read.
4. The page is read (spillway.source.page), in a transaction that is over by then.
5. *Place*: when the stream has carried everything that the page sees, what is left of it is handed to the sink between
   two chunks, as if it had been committed there: above everything carried, below all that comes (`_Placing`). A page
   that cannot be judged any more is read again.
6. When every message of it is resolved, or durable in the store, the cursor is made durable. A crash in between repeats
   this page, no more; a cursor is never ahead of its rows.

Until it has its place a page is a cache: it is given up as soon as anybody waits for the credit.

Rows that are stale but for which the sink got no whole image are kept with the cursor (``Part.again``) and read anew,
by key.

**Relations.** Parts are laid out over the relations that the table's rows are in, which change: a part whose relation
was dropped, detached or taken out of the publication is dropped, as long as the table has others; when all parts are
read, the relations that have come meanwhile are laid out, too. A relation whose cursors mean nothing any more (it was
rewritten, or has another key) is read from its beginning, once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import structlog

from spillway.change import ACTIONS, key_values, table_prefix
from spillway.chunk import Chunk, Span
from spillway.clock import Clock
from spillway.errors import SourceUnavailable, SpillwayError, StoreFailed
from spillway.flow.attempt import UNCHANGED_TOAST
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture, Turn
from spillway.flow.pagesize import PageSize
from spillway.flow.progress import BackfillState, Part
from spillway.flow.retry import backoff_seconds
from spillway.flow.route import Subscription
from spillway.position import version
from spillway.source.page import Cursor, LockTimeout, NeedsCredit, Page, PageReader, PageTimeout, Selection
from spillway.store.base import BackfillDocument, Select

PAGE_CREDIT_BYTES = 16 << 20  # of one reader
BEHIND_SECONDS = 2.0  # a page that has waited so long for its place says that the stream is behind
PLACE_SECONDS = 60.0  # a page that finds no place in that time is read again
LOOK_SECONDS = 0.05  # a page that waits for its place looks so often whether its credit is wanted
ROOM_SECONDS = 0.25
QUIET_SECONDS = 0.05  # running transactions are looked at so often
AGAIN_KEYS = 500  # keys that are read anew in one page
TAKEN_SECONDS = 2.0  # so long a page is waited for at most, when it is durable
LEAST_AHEAD = 50  # messages that may always wait for the sink when a page is read
RETRY_CAP_SECONDS = 30.0
RATE_SECONDS = 10.0
HELP_SECONDS = 2.0
GONE = ("no_table", "not_published", "bad_condition")  # codes of what is said of a relation that has gone

_log = structlog.get_logger()


class OpenReader(Protocol):
    """Makes a reader for the backfill with this id: where pages are to be read, or on the ``primary``."""

    async def __call__(self, backfill_id: str, *, primary: bool = False) -> PageReader: ...


@dataclass(frozen=True, slots=True)
class Manners:
    """What the configuration says of the sink's backfills."""

    run_ahead: int  # rows of its backfills that may wait for the sink
    timeout_seconds: float  # of the statements of a page


class Backfill:
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
        self.state = state
        self.waiting = ""  # why it does not read just now
        self._subscription = subscription
        self._delivery = subscription.delivery
        self._keying = keying
        self._capture = capture
        self._carried = capture.carried
        self._spare = spare
        self._open_reader = open_reader
        self._manners = manners
        self._epoch = epoch
        self._clock = clock
        self._woken = asyncio.Event()
        self._size = PageSize()
        self._not_before = 0.0
        self._pause_reason = ""
        self._help_at = 0.0
        self._must_wait = True  # for whatever is running, before the next page
        self._begun_anew: set[tuple[str, str]] = set()  # relations whose order has changed
        self._recent: deque[tuple[float, int]] = deque()  # when how many rows had been read

    # -- what people do ---------------------------------------------------------------------------------------------
    def wake(self) -> None:
        """Something has changed that it may wait for."""
        self._woken.set()

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
            raise _first(group) from None
        if not all(part.done and not part.again for part in self.state.parts or ()):
            return  # it was paused for a moment
        if self.state.state == "active" and await self._more_parts():
            return
        if self.state.state == "active" and self.state.request.sweep and not await self._sweep():
            return
        if self.state.state == "active":
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
        """What the sink has, or will have, and the source has not is deleted, by pages of the sink's keys. What the
        backfill has just written is known to be there, where the sink knows versions. False: it is not active any more.
        """
        sink, state = self._delivery.readable, self.state
        if sink is None:
            return True
        below = version(self._epoch(), state.started_lsn, 0)
        table = (state.request.schema, state.request.table)
        reader = await self._open_reader(state.id)
        try:
            columns = await reader.key_columns(Selection(*(await reader.relations(*table))[0]))
            if state.sweep_after is None and not await self._sweep_held(reader):
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
        """Deletes of those that the source has not, placed as a page is. False: to be done again."""
        began = await self._quiet(reader)
        if not began:
            return False
        credit = await self._credit(0)
        if not credit:
            return False
        view = self._carried.open()
        try:
            page = await self._absent(reader, keys)
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

    async def _absent(self, reader: PageReader, keys: Sequence[Cursor]) -> Page:
        """Deletes of those that are in none of the table's relations. What moved from one to another while they were
        looked at is told by the snapshot of the first, which does not see that. Partitions may come while a sweep goes
        on: the relations are those of before and after."""
        table = (self.state.request.schema, self.state.request.table)
        seconds = self._manners.timeout_seconds
        while True:
            relations = await reader.relations(*table)
            page = await reader.read_absent(Selection(*relations[0]), keys, seconds)
            snapshot = page.snapshot
            for relation in relations[1:]:
                page = await reader.read_absent(Selection(*relation), page.missing, seconds)
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

    # -- before a page is read --------------------------------------------------------------------------------------
    async def _room(self) -> bool:
        """Wait until there is room for a page. False: it is not active any more."""
        while self.state.state == "active":
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
        if waiting >= max(LEAST_AHEAD, 2 * self._size.rows * max(1, self.state.request.parallel)):
            return f"the sink is behind: {waiting} messages come first"
        return ""

    def _pause(self, seconds: float, reason: str) -> None:
        """No page before that."""
        self._not_before, self._pause_reason = self._clock.monotonic() + seconds, reason

    async def _quiet(self, reader: PageReader) -> int:
        """Wait until the stream and every snapshot from now on have nothing between them that is not remembered.
        Returns in which memory (`Carried.began`) that is so; 0: it is not active any more."""
        carried = self._carried
        while self.state.state == "active":
            carried.begin()
            began = carried.began
            if carried.quiet == began and not self._must_wait:
                return began
            behind_lsn = self._capture.received_lsn
            primary = await self._open_reader(self.state.id, primary=True) if reader.standby else reader
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
        return self._remembered(began) and self.state.state == "active"

    def _remembered(self, began: int) -> bool:
        return self._carried.began == began and self._carried.remembers

    async def _credit(self, needed_bytes: int) -> int:
        """0: it is not active any more."""
        readers = max(1, self.state.request.parallel)
        most_bytes = min(PAGE_CREDIT_BYTES, self._spare.limit_bytes // readers, self._delivery.page_bytes)
        wanted = max(needed_bytes, self._size.credit_bytes(most_bytes))
        while not self._spare.try_take(wanted):
            self.waiting = "memory: the stream, the sinks and pages of other backfills come first"
            if self.state.state != "active":
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
        advance: Callable[[_Placing], None] | None = None,
    ) -> _Placing | None:
        """Its place in the stream. None: it cannot be judged any more, or its credit was wanted: to be read again."""
        placing = _Placing(page, relation, self._subscription, self._keying, self._capture, began, advance)
        turn = Turn(page.snapshot.lsn, placing)
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
                if self.state.state != "active":
                    break
                if seconds > 3 * reader.wal_writer_delay_seconds + LOOK_SECONDS:
                    # Whatever the snapshot saw of asynchronous commits is on disk by now, or it would not be at all;
                    # what is above was never a commit, and on an idle server nobody may write it out for long.
                    turn.lsn = min(turn.lsn, await reader.flushed_lsn())
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

    async def _settled(self, placing: _Placing) -> None:
        """Wait until what was placed is resolved, or durable in the store."""
        span = placing.span
        while span is not None and span.left and not span.durable:
            await self._sleep(ROOM_SECONDS)

    async def _taken(self, placing: _Placing) -> float:
        """Wait until the sink has done with it, though it may be durable long before: what it has in front of it, live
        changes have, too. Not for a sink that does not deliver; `_room` does that. Returns seconds since it was placed.
        """
        span, sink = placing.span, self._delivery
        while span is not None and span.left and self.state.state == "active":
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

    def _advance(self, part: Part, page: Page, by_key: Sequence[Cursor], placing: _Placing) -> None:
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

    async def _sleep(self, seconds: float) -> None:
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await self._woken.wait()


class _Placing:
    """What puts a page into the stream of its sink; called by capture, between two chunks."""

    def __init__(
        self,
        page: Page,
        relation: tuple[str, str] | None,
        subscription: Subscription,
        keying: int,
        capture: Capture,
        began: int,
        advance: Callable[[_Placing], None] | None,
    ) -> None:
        """``advance``: is called as soon as it is placed, before anything is awaited: who is cancelled then must not
        have the page read again. No cursor is saved without what was placed."""
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
        self.placed_at = 0.0
        self.reads = 0  # of the sink, this page's included

    def _void(self) -> bool:
        """Nobody wants it any more, the sink takes no part, or what it is judged by was forgotten."""
        taken = self._subscription.delivery.participates
        return self.abandoned or not taken or self._carried.began != self._began or not self._carried.remembers

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
        self.dropped = len(stale.dropped)
        self.again = [_cursor(chunk, place) for place in sorted(stale.again)]
        self.placed = True
        if self._advance is not None:
            self._advance(self)
        return True


def _cursor(chunk: Chunk, place: int) -> Cursor:
    schema, table = chunk.table(place)
    return key_values(schema, table, chunk.key_texts(place)[0].decode())


def _first(group: BaseExceptionGroup[SpillwayError]) -> SpillwayError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an empty group")

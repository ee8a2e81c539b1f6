"""What comes in for a sink, and where it lives: in the window, or over the spillway in the store.

`Inflow` owns what is known of a sink's messages: the window, the tail (what was routed last), whether the sink is
*direct* or *stored*, what has been written, and the credit of what is in memory. `spillway.flow.delivery` sends.

**Direct**: newcomers go into the window; nothing is written. **Stored**: newcomers go to the tail of the store, and
pages are read back as there is credit. Direct becomes stored (`_spill`) when the oldest open span is older than the
spill age, or the window has no credit: everything unwritten is put into the store, what is not in flight leaves memory.
Stored becomes direct again when a page has shown that nothing unread waits and nothing was put meanwhile.

**Every put covers the tail** (see spillway.store.base): whatever is written for a sink, all its unwritten messages are
written with it, in position order, and the position becomes the tail. So the store never holds anything above the
position, and a restart skips exactly what is at or below it.

**Parked keys.** What comes of a parked key is held: newcomers in direct mode, and what is read back in stored mode
(newcomers of a stored sink go to the queue whatever their key). Which keys are parked is asked of the store by look-up,
per span and only while there are such keys; what is being parked meanwhile is known to ``_diverted``
(spillway.flow.parking).

**The cap.** A backlog at its cap blocks the slot (`blocks`), or takes the sink out with a gap on record
(spillway.flow.gap). When what waits is compacted is decided in spillway.flow.compacting.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spillway.chunk import CHANGE_OVERHEAD_BYTES, FLAGS, PENDING, TOO_LARGE, Message, Span
from spillway.clock import Clock
from spillway.flow.budget import Budget
from spillway.flow.compacting import Passes
from spillway.flow.gap import Gaps
from spillway.flow.limits import Limits
from spillway.flow.parking import HeldBack, Parked
from spillway.flow.window import ENCODED_OVERHEAD_BYTES, Window
from spillway.metrics import Metrics
from spillway.position import ZERO, Position
from spillway.sinks.base import Readable, Sink
from spillway.store.base import (
    AskedRefreshes,
    BackfillDocument,
    DueRefresh,
    Gap,
    Park,
    SinkState,
    Store,
    Write,
    Written,
)

# What a message read back costs beyond its bytes, twice: its record and keys, and its place in request and answer.
# By it credit is taken before anything is read, when nothing is known of the columns. A stored record has 80 bytes at
# most, so it is no less than what `stored_cost` finds unless the key texts of a message have more than 176 bytes on
# average. Such a page overdraws the sink's share by the difference, which the next to be read makes up for.
STORED_OVERHEAD_BYTES = CHANGE_OVERHEAD_BYTES + ENCODED_OVERHEAD_BYTES

MOST_MESSAGES = 1 << 40  # where there is no limit
MOST_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """What the flow must know of a sink's configuration."""

    name: str
    batch_size: int
    max_memory_bytes: int
    max_messages: int
    max_message_bytes: int
    timeout_seconds: float
    max_retry_count: int | None = None
    on_reject: Literal["block", "dead_letter", "latest_wins"] = "block"
    toast_fails: bool = False
    partial_images: bool = False  # an update without its TOAST columns stands for the whole row
    routed: bool = False  # where a row's document is, is said message by message
    # Of a state: a later image may stand for earlier ones. Not where code decides what is sent, or a column where to.
    supersedes: bool = True
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Process:
    """What all sinks of a process share."""

    store: Store
    budget: Budget
    clock: Clock
    metrics: Metrics


class Inflow:
    def __init__(
        self, spec: SinkSpec, sink: Sink, state: SinkState, process: Process, moved: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self._sink = sink
        self._store = process.store
        self._budget = process.budget
        self._share = process.budget.share(self.wake)
        self._clock = process.clock
        self._metrics = process.metrics
        self._moved = moved  # called when the watermark may have moved or a full backlog has room
        self.window = Window(
            keyed=sink.semantics in ("state", "events"), supersedes=sink.semantics == "state" and spec.supersedes
        )
        self.counters = state.counters
        self.tail: Position = state.position or ZERO
        self.gaps = Gaps(spec.name, state.gap, self._commit, moved, process.clock)
        self.stored = state.counters.queued > 0
        self.full: str | None = None  # why the backlog is at its cap
        self.oldest_seconds = 0.0  # age of the oldest waiting message, as of the last `check_limits`
        self.busy_since = process.clock.monotonic()
        self.last_intake_at = float("-inf")
        self.truncates_ignored = 0
        self.passes = Passes(process.clock.monotonic(), state.counters)
        self.reads_taken = 0  # rows of backfills, in this run
        self.reads_resolved = 0
        self.memory_bytes = 0
        self.memory_messages = 0
        self._read_back = 0  # spans in memory that the delivery pool covers
        self._cursor = 0  # rows of the queue up to here are in memory, in `_skip`, or gone
        self._skip: set[int] = set()  # rows beyond the cursor that are in flight: a page must not bring them again
        self._diverted = HeldBack()
        self._asked_by_capture: Parked | None = None  # open from `parked_among` to `intake`
        self._puts = 0  # uncommitted puts of messages that are in the window
        self._put_count = 0  # all puts ever, to see whether a page read was overtaken by one
        self._puts_done = 0  # and how many of them have committed
        self._turns = 0  # counts what makes a page that is being read unusable: parks, evictions, discards
        self._evict_due = False  # when the last put has committed
        self._last_put: asyncio.Future[Written] | None = None
        self._lane_at = 0.0  # when the lanes are worth a look
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    @property
    def is_state(self) -> bool:
        """Whether the sink keeps rows rather than events."""
        return self._sink.semantics in ("state", "atomic")

    @property
    def readable(self) -> Readable | None:
        """The sink as one that can say what it holds; None: it cannot."""
        return self._sink if isinstance(self._sink, Readable) and not self.spec.routed else None

    @property
    def open_lsn(self) -> int | None:
        """Commit LSN of the oldest message that forbids confirming (I1); None: there is none."""
        first = self.window.first_open()
        lsns = ([] if first is None else [first.first_lsn]) + ([] if self.gaps.lsn is None else [self.gaps.lsn])
        return min(lsns, default=None)

    # -- intake: called by capture, synchronous ---------------------------------------------------------------------
    @property
    def participates(self) -> bool:
        """False while a gap is growing: the sink takes no part in the slot."""
        return not self.gaps.growing

    @property
    def gap(self) -> Gap | None:
        return self.gaps.now

    @property
    def needs_look_up(self) -> bool:
        return not self.stored and self._has_parked

    @property
    def _has_parked(self) -> bool:
        return bool(self.counters.parked_keys or self._diverted)

    async def parked_among(self, span: Span) -> Parked:
        """Which keys of this span are parked. To be called right before `intake`, when `needs_look_up`."""
        self._close_look_up()  # that of a stream which ended before the intake
        self._asked_by_capture = parked = self._diverted.open()
        await self._look_up(parked, span)
        return parked

    def _close_look_up(self) -> None:
        if self._asked_by_capture is not None:
            self._diverted.close(self._asked_by_capture)
            self._asked_by_capture = None

    async def _look_up(self, parked: Parked, span: Span) -> None:
        keys = {key for place in range(len(span)) for key in span.keys(place)}
        if keys:
            parked.found |= await asyncio.to_thread(self._store.parked, self.name, list(keys))

    def intake(self, span: Span, parked: Parked | None) -> asyncio.Future[Written] | None:
        """Take messages in position order. Returns the commit to wait for before their capture credit is given back,
        None if the window covers them. ``parked`` is None when no look-up was made."""
        self._close_look_up()  # nothing commits before this returns
        if span.position(0) <= self.tail:  # read again after a reconnect or a restart: known already
            known = bisect_right(range(len(span)), tuple(self.tail), key=span.position)
            if known == len(span):
                return None
            span = Span(span.chunk, span.keying, span.indices[known:])
        last = Position(*span.position(len(span) - 1))
        if not self.participates:
            self.gaps.swallow(span, last.commit_lsn)
            return None
        now = self._clock.monotonic()
        self.last_intake_at = now
        if not self.counters.messages and not self.memory_messages:
            self.busy_since = now
        span.arrived = now
        self._wake.set()
        if not self.stored:
            if parked is None and self._has_parked:
                self._spill()  # became direct, with parked keys, since capture asked
            elif self._take_credit(span):
                self.tail = last
                self.window.track(span)
                return self._divert(span, parked)
            else:
                self._spill()
        self.tail = last
        self.window.track(span)
        return self._put(span)

    def _take_credit(self, span: Span) -> bool:
        cost = span.chunk.cost
        if (
            self.memory_bytes + cost > self.spec.max_memory_bytes
            or self.memory_messages + len(span) > self.spec.max_messages
            or not self._budget.hold(span)
        ):
            return False
        span.windowed = True
        self.memory_bytes += cost
        return True

    def _divert(self, span: Span, parked: Parked | None) -> asyncio.Future[Written] | None:
        """Into the window; but what has a parked key, or is too large, goes to the store and takes all else along."""
        self.memory_messages += len(span)
        large = self._large_places(span)
        held = self._diverted.union(parked) if parked is not None else set()
        if not held and not large:
            self.window.admit(span, 0, len(span))
            return None
        runs, hold = self._apart(span, [(0, len(span))], held, large)
        for start, stop in runs:
            self.window.admit(span, start, stop)
        span.held += len(hold) + len(large)
        if not hold and not large:
            return None
        return self._write_unwritten(hold=hold, aside=[*hold, *(Message(span, place) for place in large)])

    @staticmethod
    def _apart(
        span: Span, runs: Sequence[tuple[int, int]], held: set[str], large: Collection[int]
    ) -> tuple[list[tuple[int, int]], list[Message]]:
        """What of these runs may be admitted, and what must be held because one of its keys is. ``held`` grows: what
        follows under the other key of an event stands behind it."""
        free: list[tuple[int, int]] = []
        hold: list[Message] = []
        for start, stop in runs:
            for place in range(start, stop):
                if place in large:
                    continue
                if held and not held.isdisjoint(keys := span.keys(place)):
                    held.update(keys)
                    hold.append(Message(span, place))
                elif free and free[-1][1] == place:
                    free[-1] = (free[-1][0], place + 1)
                else:
                    free.append((place, place + 1))
        return free, hold

    async def note(self, document: BackfillDocument, *, covering: bool = False) -> None:
        """Returns when it is durable. ``covering``: together with the position and all that is unwritten below it. What
        the document says was delivered came after that: a restart that sent anything of before it again would not send
        that again, and would leave the older behind (I3)."""
        await (
            self._write_unwritten(backfill=document) if covering else self._commit(Write(self.name, backfill=document))
        )

    async def retried_by(self, document: BackfillDocument, letters: Sequence[int]) -> None:
        """The rows of these dead letters come with the backfill, and they are no more. Durable when this returns."""
        await self._commit(Write(self.name, backfill=document, unbury=letters))

    async def ask(self, asked: AskedRefreshes) -> None:
        """Documents of these rows are to be made anew. Durable when this returns."""
        await self._commit(Write(self.name, ask=asked))

    async def refreshed(self, done: Sequence[DueRefresh]) -> None:
        """They have been, by messages that are resolved or durable. With the position, as in `note`."""
        await self._write_unwritten(refreshed=done)

    async def untried_from(self) -> int | None:
        """No message that has not been tried yet has a commit LSN below this; None: there is none. What was tried and
        has failed is in the lanes."""
        first = self.window.first_open()
        lsns = [] if first is None else [first.first_lsn]
        if self.counters.queued:
            queued_lsn = await asyncio.to_thread(self._store.queued_from, self.name)
            lsns += [] if queued_lsn is None else [queued_lsn]
        return min(lsns, default=None)

    async def held_keys(self, after: str, limit: int) -> list[str]:
        """The keys that have a lane, in their order."""
        held = await asyncio.wrap_future(self._store.ask(self._store.held, self.name, after, limit))
        return [waiting.key for waiting in held]

    # -- writing ----------------------------------------------------------------------------------------------------
    def _put(self, span: Span) -> asyncio.Future[Written]:
        """Newcomers of a stored sink, to the tail; none of them stays in memory."""
        large = [self._large(Message(span, place)) for place in self._large_places(span)]
        span.base = PENDING  # before the writer's thread can know of it, which sets what comes next
        done = self._commit(Write(self.name, put=[span], position=self.tail, bury=large))
        done.add_done_callback(lambda _: self._mark_durable([span]))
        return done

    def _write_unwritten(
        self,
        *,
        hold: Sequence[Message] = (),
        aside: Sequence[Message] = (),
        park: Sequence[Park] = (),
        bury: Sequence[Park] = (),
        stuck: Sequence[Message] = (),
        backfill: BackfillDocument | None = None,
        refreshed: Sequence[DueRefresh] = (),
    ) -> asyncio.Future[Written]:
        """Put everything unwritten, which stays in memory, and do the rest in the same commit. ``aside`` is not in the
        window but among the unwritten: it is forgotten when the commit is done, and so is what is held behind
        ``stuck``, which is in flight: what is parked, and what stands behind it in the same batch."""
        put = self.window.unwritten()
        keys = {key for message in hold for key in message.keys}
        behind: list[Message] = []
        if park:
            blocked, behind = self.window.drop_behind(stuck)
            keys |= blocked
            self._turns += 1
        self._diverted.hold(keys)
        large = [self._large(Message(s, p)) for s in put for p in self._large_places(s) if not s.resolved[p]]
        for span in put:
            span.base = PENDING  # see `_put`
        self._puts += 1
        done = self._commit(
            Write(
                self.name,
                put=put,
                position=self.tail if put or backfill is not None or refreshed else None,
                park=park,
                hold=[*hold, *behind],
                bury=[*large, *bury],
                backfill=backfill,
                refreshed=refreshed,
            )
        )
        self._last_put = done

        def committed(_: asyncio.Future[Written]) -> None:
            self._puts -= 1
            self._mark_durable(put)
            self._diverted.done(keys)
            for message in (*aside, *behind):
                self._forget(message.span, 1)
            if park:
                self._turns += 1
                self._lane_at = min(self._lane_at, self._clock.monotonic() + min(p.due_seconds for p in park))
            if self._evict_due and not self._puts:
                self._evict()

        done.add_done_callback(committed)
        return done

    def _commit(self, write: Write) -> asyncio.Future[Written]:
        """Queue a write. The future is done on the loop, after the commit; the counters are up to date then."""
        if write.put:
            self._put_count += 1
        done = asyncio.wrap_future(self._store.write(write))

        def committed(written: asyncio.Future[Written]) -> None:
            if not written.cancelled() and written.exception() is None:
                self.counters = written.result().counters
                if write.put:
                    self._puts_done += 1
                    self.passes.put()
                    self._judge_limits()
            self._wake.set()

        done.add_done_callback(committed)
        return done

    def _mark_durable(self, spans: Iterable[Span]) -> None:
        for span in spans:
            span.durable = span.base > 0
            if span.durable and not span.held:
                self._leave(span)
        self._moved()

    def _spill(self) -> None:
        """Become stored: put what is unwritten; when that has committed, all that is not in flight leaves memory."""
        self.stored = True
        self._evict_due = True
        self._write_unwritten()

    def _evict(self) -> None:
        """Drop what is not in flight from memory; all of it has rows. Pages bring it back from the cursor on."""
        self._evict_due = False
        for span, start, stop in self.window.evict():
            self._cursor = min(self._cursor, span.row(start) - 1)
            self._forget(span, stop - start)
        self._skip = {row for row in self.window.flying_rows() if row > self._cursor}
        self._turns += 1

    def drop_cache(self) -> None:
        """What was read back and is not in flight leaves memory: it is not going to be sent soon."""
        if self.stored and not self._puts and not self._evict_due and self.window.waiting:
            self._evict()

    def _large_places(self, span: Span) -> list[int]:
        """The rows that this sink does not take."""
        most = self.spec.max_message_bytes
        if len(span.chunk.data) <= most and span.plain:
            return []
        flags = span.chunk.byte_column(FLAGS)
        return [
            place
            for place, index in enumerate(span.indices)
            if flags[index] & TOO_LARGE or span.bytes_between(place, place + 1) > most
            # Of a deleted row its key is all that a sink of state needs.
            if not (self.is_state and span.chunk.action(index) == "delete")
        ]

    def _large(self, message: Message) -> Park:
        size = message.change.too_large_bytes or message.body_bytes
        self._metrics.rejected(self.name, "too_large", 1)
        return Park(message, "too_large", f"the row has {size} bytes, above max_message_bytes", 0.0)

    # -- credit -----------------------------------------------------------------------------------------------------
    def _forget(self, span: Span, count: int) -> None:
        """So many messages of a span leave memory."""
        span.held -= count
        self.memory_messages -= count
        if not span.held and span.base != PENDING:
            self._leave(span)

    def _leave(self, span: Span) -> None:
        """Nothing of a span is needed in memory any more."""
        if span.credit:
            self._share.give(span.credit)
            self.memory_bytes -= span.credit
            self._read_back -= 1
            span.credit = 0
        elif span.windowed:
            self._budget.drop(span)
            self.memory_bytes -= span.chunk.cost
            span.windowed = False
        span.leave()

    def _remember(self, span: Span) -> None:
        """A span read back is in memory; its credit was taken from the share."""
        span.credit = stored_cost(span)
        self._read_back += 1
        self.memory_bytes += span.credit

    # -- the cap ----------------------------------------------------------------------------------------------------
    @property
    def blocks(self) -> bool:
        """The backlog is full, and the slot must not be read until there is room."""
        full_disk = self._store.disk_full_since is not None
        return full_disk or (self.full is not None and self.spec.limits.on_full != "pause")

    @property
    def page_messages(self) -> int:
        """At most so many rows of a backfill in one page: a quarter of what the backlog takes."""
        most = self.spec.limits.max_messages
        return MOST_MESSAGES if most is None else max(1, most // 4)

    @property
    def page_bytes(self) -> int:
        most = self.spec.limits.max_bytes
        return MOST_BYTES if most is None else most // 4

    def has_room(self, messages: int, size_bytes: int) -> bool:
        """Whether so much of a backfill leaves the backlog well below its cap: the last quarter is for live changes,
        which a backfill must not push into a gap."""
        waiting = self.counters.messages + self.memory_messages
        waiting_bytes = self.counters.bytes + self.memory_bytes
        return not waiting or (
            waiting + messages <= 3 * self.page_messages and waiting_bytes + size_bytes <= 3 * self.page_bytes
        )

    async def check_limits(self) -> None:
        """To be called every second or so: the backlog against its cap, its age included."""
        oldest = await asyncio.to_thread(self._store.oldest, self.name) if self.counters.messages else None
        self.oldest_seconds = 0.0 if oldest is None else max(0.0, self._clock.wall() - oldest)
        self._judge_limits()
        on_disk = self._store.disk_full_since is None  # else the slot is not read, and no gap could be recorded
        if self.full is not None and on_disk and self.spec.limits.on_full == "pause" and self.participates:
            self._open_gap(self.full)

    def _judge_limits(self) -> None:
        was_full = self.full is not None
        if self._store.disk_full_since is not None:
            self.full = "the disk of the state is full: nothing can be written, the slot is not read"
        else:
            self.full = self.spec.limits.full(
                self.counters, self.oldest_seconds, self._store.free_bytes(), was_full=was_full
            )
        if was_full and self.full is None:
            self._moved()

    # -- compaction -------------------------------------------------------------------------------------------------
    @property
    def may_be_compacted(self) -> bool:
        """Something waits that no pass has looked at. While that is so a backlog at its cap is not known to be full:
        the slot is not read, but only until the pass has ended."""
        on_disk = self._store.disk_full_since is None
        compacts = self.spec.limits.on_full == "compact"
        return compacts and self.passes.unknown and on_disk and self.counters.messages > 0

    def _compaction_due(self, now: float) -> bool:
        if self.spec.limits.on_full != "compact":
            return False
        newcomers, full = self.may_be_compacted, self.full is not None
        return self.passes.due(now, self.counters, self.last_intake_at, newcomers=newcomers, full=full)

    def _open_gap(self, reason: str) -> None:
        """Stop taking part. The gap is durable before anything it swallows can be confirmed (I2)."""
        self._spill()
        self.gaps.begin(self.tail.commit_lsn, reason)


def stored_cost(span: Span) -> int:
    """Credit for a span read back: its bodies twice, as read and as encoded, and what is made of them."""
    return span.chunk.cost + len(span.chunk.data) + ENCODED_OVERHEAD_BYTES * span.chunk.count

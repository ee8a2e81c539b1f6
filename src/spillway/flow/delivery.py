"""One sink's flow: from the router's hands to the acknowledgement, through memory or over the spillway.

`Delivery` owns everything about its sink: the window, the tail (what was routed last), whether it is *direct* or
*stored*, the breaker, the throttles. One task runs it; each batch in flight, each read of the store and each settling
is a child task of that one. State changes happen on the loop between awaits, never in a thread.

**Direct**: newcomers go into the window; nothing is written. **Stored**: newcomers go to the tail of the store, and
pages are read back as there is credit. Direct becomes stored (`_spill`) when the oldest open message is older than
the spill age, or the window has no credit: everything unwritten is put into the store, what is not in flight leaves
memory. Stored becomes direct again when a page has shown that nothing unread waits and nothing was put meanwhile.

**Every put covers the tail** (see spillway.store.base): whatever is written for a sink, all its unwritten messages are
written with it, in position order, and the position becomes the tail. So the store never holds anything above the
position, and a restart skips exactly what is at or below it.

**Parked keys.** In direct mode newcomers of a parked key must go to the store. Which keys are parked is asked of the
store by look-up (`parked_among`), per chunk and only while there are such keys. Between the decision to park and the
first look-up that is sure to see it, the keys are in ``_diverted``.

**Settling.** What was resolved in memory alone is released at once. What has a row is released when the removal of
the row has committed: only then may a later message of its key go out. What failed is parked or buried by a write
that covers the tail, and leaves "in flight" when that has committed.

Priorities of the loop, in this order: 1. stop, 2. what the sink said (settling runs as it comes), 3. spill, 4. due
retries, 5. new work, 6. reading ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog

from spillway.change import NOT_STORED, PENDING, Message, table_prefix
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.flow.attempt import BLOCKED, Attempt
from spillway.flow.budget import Budget
from spillway.flow.limits import Limits
from spillway.flow.retry import PARKED_ROUNDS, Breaker, Throttle, backoff_seconds
from spillway.flow.window import Window, encoded_cost
from spillway.metrics import Metrics
from spillway.position import ZERO, Position
from spillway.sinks.base import Result, Sink
from spillway.store.base import Gap, Park, Select, SinkState, Store, Write, Written

SPILL_AGE_SECONDS = 0.25
# What a message read back costs beyond its bytes, twice: its objects, and its place in request and answer.
STORED_OVERHEAD_BYTES = 1536
READ_BYTES = 4 << 20  # bodies of one page: enough to fill a request, small enough to share the pool
PARKED_AT_START = 100  # with so many parked keys a restart begins narrow
BLAME_SECONDS = 60.0  # a sink that took something so recently is not down because one message times out
DISCARD_MESSAGES = 5000  # removed per transaction
IDLE_SECONDS = 1.0  # the longest the loop sleeps: what depends on time alone is looked at this often

_log = structlog.get_logger()


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
    limits: Limits = field(default_factory=Limits)


class Delivery:
    def __init__(
        self,
        spec: SinkSpec,
        sink: Sink,
        store: Store,
        state: SinkState,
        budget: Budget,
        clock: Clock,
        metrics: Metrics,
        moved: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self._sink = sink
        self._store = store
        self._budget = budget
        self._share = budget.share(self.wake)
        self._clock = clock
        self._metrics = metrics
        self._moved = moved  # called when the watermark may have moved or a full backlog has room
        self._attempt = Attempt(spec.name, sink, clock, spec.timeout_seconds, spec.toast_fails)
        self.window = Window(
            keyed=sink.semantics in ("state", "events"), supersedes=sink.semantics == "state", passed=self._passed
        )
        self.counters = state.counters
        self.tail: Position = state.position or ZERO
        self.paused = False
        self.gap = state.gap
        self.stored = state.counters.queued > 0
        self.breaker = Breaker()
        narrow = 6 if state.counters.parked_keys >= PARKED_AT_START else 0
        self.queue_throttle = Throttle(narrow)
        self.lane_throttle = Throttle(narrow)
        self.full: str | None = None  # why the backlog is at its cap
        self.oldest_seconds = 0.0  # age of the oldest waiting message, as of the last `check_limits`
        self._gap_lsn: int | None = None  # a gap begins here that is not durable yet
        self._missed_lsn = 0  # the newest that a growing gap has swallowed in this run
        self.last_error: str | None = None
        self.last_failure_at = 0.0
        self.last_progress_at = float("-inf")
        self.busy_since = clock.monotonic()
        self.last_intake_at = float("-inf")
        self.delivered = 0
        self.reads_before_first_request: int | None = None  # of the store, by all sinks (I5)
        self.truncates_ignored = 0
        self.memory_bytes = 0
        self.memory_messages = 0
        self._read_back = 0  # of the messages in memory: covered by the delivery pool
        self._next_bytes = 0  # credit for the first of the next page, if it is known to be above the sink's ceiling
        self._cursor = 0  # rows of the queue up to here are in memory, in `_skip`, or gone
        self._skip: set[int] = set()  # rows beyond the cursor that are in flight: a page must not bring them again
        self._diverted: dict[str, int] = {}  # keys of parks and diversions that have not committed
        self._lingering: set[str] = set()  # the same, committed since the last look-up began
        self._puts = 0  # uncommitted puts of messages that are in the window
        self._put_count = 0  # all puts ever, to see whether a page read was overtaken by one
        self._puts_done = 0  # and how many of them have committed
        self._turns = 0  # counts what makes a page that is being read unusable: parks, evictions, discards
        self._evict_rows: list[int] | None = None  # an eviction is due when the last put has committed
        self._last_put: asyncio.Future[Written] | None = None
        self._reading = False
        self._retrying = False
        self._in_flight = 0  # batches being sent or settled
        self._lane_waits = False  # a retry waits for a slot
        self._slot_freed = asyncio.Event()
        self._lanes_turn = True  # with one slot, queue and lanes take turns
        self._lane_at = 0.0  # when the lanes are worth a look
        self._lane_mended = False  # the last retry brought back a key that had failed: try all the others
        self._probe_newest = False
        self._wake = asyncio.Event()
        self._stopping = False

    @property
    def is_state(self) -> bool:
        """Whether the sink keeps rows rather than events."""
        return self._sink.semantics in ("state", "atomic")

    @property
    def open_lsn(self) -> int | None:
        """Commit LSN of the oldest message that forbids confirming (I1); None: there is none."""
        first = self.window.first_open()
        if self._gap_lsn is not None:
            return self._gap_lsn if first is None else min(self._gap_lsn, first.change.commit_lsn)
        return None if first is None else first.change.commit_lsn

    # -- intake: called by capture, synchronous ---------------------------------------------------------------------
    @property
    def participates(self) -> bool:
        """False while a gap is growing: the sink takes no part in the slot."""
        return self.gap is None or self.gap.last_lsn is not None

    @property
    def needs_look_up(self) -> bool:
        if not self.counters.parked_keys and not self._diverted:
            self._lingering.clear()
            return False
        return not self.stored

    async def parked_among(self, messages: Sequence[Message]) -> set[str]:
        """Which keys of these messages are parked. To be called right before `intake`, when `needs_look_up`."""
        self._lingering.clear()  # what has committed by now is seen by the look-up that begins now
        keys = {key for message in messages for key in message.keys}
        return await asyncio.to_thread(self._store.parked, self.name, list(keys)) if keys else set()

    def intake(self, messages: list[Message], parked: set[str] | None) -> asyncio.Future[Written] | None:
        """Take messages in position order. Returns the commit to wait for before their capture credit is given back,
        None if the window covers them. ``parked`` is None when no look-up was made."""
        if messages[0].position <= self.tail:  # read again after a reconnect or a restart: known already
            messages = [m for m in messages if m.position > self.tail]
        if messages and not self.participates:
            self._missed_lsn = messages[-1].change.commit_lsn
            return None
        if not messages:
            return None
        now = self._clock.monotonic()
        self.last_intake_at = now
        if not self.counters.messages and not self.memory_messages:
            self.busy_since = now
        for message in messages:
            message.arrived = now
        self._wake.set()
        if not self.stored:
            if parked is None and self.needs_look_up:
                self._spill()  # became direct, with parked keys, since capture asked
            elif self._take_credit(messages):
                return self._divert(messages, parked or set())
            else:
                self._spill()
        self.tail = Position(*messages[-1].position)
        self.window.track(messages)
        return self._put(messages)

    def _take_credit(self, messages: list[Message]) -> bool:
        """Credit for all of them, or for none."""
        cost = sum(m.change.cost for m in messages)
        if (
            self.memory_bytes + cost > self.spec.max_memory_bytes
            or self.memory_messages + len(messages) > self.spec.max_messages
        ):
            return False
        for index, message in enumerate(messages):
            if not self._budget.hold(message.change):
                for held in messages[:index]:
                    self._budget.drop(held.change)
                return False
        self.memory_bytes += cost
        self.memory_messages += len(messages)
        return True

    def _divert(self, messages: list[Message], parked: set[str]) -> asyncio.Future[Written] | None:
        """Into the window; but what has a parked key, or is too large, goes to the store and takes all else along."""
        self.tail = Position(*messages[-1].position)
        self.window.track(messages)
        held = parked.union(self._diverted, self._lingering)
        aside: list[Message] = []
        for message in messages:
            if self._too_large(message):
                aside.append(message)
            elif held and not held.isdisjoint(message.keys):
                aside.append(message)
                held.update(message.keys)  # what follows under the other key of an event stands behind it
            else:
                self.window.admit(message)
        if not aside:
            return None
        return self._write_unwritten(aside=aside)

    # -- writing ----------------------------------------------------------------------------------------------------
    def _put(self, messages: list[Message]) -> asyncio.Future[Written]:
        """Newcomers of a stored sink, to the tail; none of them stays in memory."""
        for message in messages:
            message.row = PENDING
        large = [self._large(m) for m in messages if self._too_large(m)]
        done = self._commit(Write(self.name, put=messages, position=self.tail, bury=large))
        done.add_done_callback(lambda _: self._mark_durable(messages))
        return done

    def _write_unwritten(
        self,
        *,
        aside: Sequence[Message] = (),
        park: Sequence[Park] = (),
        bury: Sequence[Park] = (),
        stuck: Sequence[Message] = (),
    ) -> asyncio.Future[Written]:
        """Put everything unwritten, which stays in memory, and do the rest in the same commit. ``aside`` is not in
        memory but among the unwritten; its credit is given back when the commit is done. ``stuck`` is in flight: what
        is parked, and what stands behind it in the same batch."""
        put = self.window.unwritten()
        for message in put:
            message.row = PENDING
        keys = {key for m in aside for key in m.keys}
        if park:
            keys |= self.window.behind(stuck)[0]
            self._turns += 1
        self._hold_back(keys)
        large = [self._large(m) for m in put if self._too_large(m)]
        self._puts += 1
        done = self._commit(
            Write(
                self.name,
                put=put,
                position=self.tail if put else None,
                park=park,
                bury=[*large, *bury],
            )
        )
        self._last_put = done

        def committed(written: asyncio.Future[Written]) -> None:
            self._puts -= 1
            self._mark_durable(put)
            self._hold_back_no_more(keys)
            for message in aside:
                self._forget(message)
            if park:
                self._turns += 1
                self._lane_at = min(self._lane_at, self._clock.monotonic() + min(p.due_seconds for p in park))
            if aside and not written.cancelled() and written.exception() is None:
                held = written.result().held
                freed = [m.row for m in aside if m.row not in held and not self._too_large(m)]
                if freed:
                    self._spill(freed)  # their key was freed meanwhile: they wait in the queue and must be read
            if self._evict_rows is not None and not self._puts:
                self._evict()

        done.add_done_callback(committed)
        return done

    def _hold_back(self, keys: Iterable[str]) -> None:
        """Newcomers of these keys go to the store: the keys are being parked."""
        for key in keys:
            self._diverted[key] = self._diverted.get(key, 0) + 1

    def _hold_back_no_more(self, keys: Iterable[str]) -> None:
        """It has committed: a look-up that begins from now on sees whether they are parked."""
        for key in keys:
            if self._diverted[key] == 1:
                del self._diverted[key]
                self._lingering.add(key)
            else:
                self._diverted[key] -= 1

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
                    self._judge_limits()
            self._wake.set()

        done.add_done_callback(committed)
        return done

    def _mark_durable(self, messages: Iterable[Message]) -> None:
        for message in messages:
            message.done = message.row > 0
        self._moved()

    def _spill(self, unread: Sequence[int] = ()) -> None:
        """Become stored: put what is unwritten; when that has committed, all that is not in flight leaves memory."""
        self.stored = True
        self._evict_rows = [*(self._evict_rows or ()), *unread]
        self._write_unwritten()

    def _evict(self) -> None:
        """Drop what is not in flight from memory; all of it has rows. Pages bring it back from the cursor on."""
        rows = self._evict_rows or []
        self._evict_rows = None
        dropped = self.window.evict()
        rows.extend(m.row for m in dropped)
        for message in dropped:
            self._forget(message)
        if rows:
            self._cursor = min(self._cursor, min(rows) - 1)
        self._skip = {row for row in self.window.flying_rows() if row > self._cursor}
        self._turns += 1

    def drop_cache(self) -> None:
        """What was read back and is not in flight leaves memory: it is not going to be sent soon."""
        if self.stored and not self._puts and self._evict_rows is None and self.window.waiting:
            self._evict()

    def _give_way(self) -> None:
        """What could be sent is in flight by now. If anyone waits for delivery credit the rest is only a cache: those
        who wait may hold the very slots in which it would be sent, and wait for it (I7)."""
        if not self._share.contended or not self._read_back or not self.window.waiting:
            return
        if self.stored:
            self.drop_cache()
        else:
            self._spill()

    def _too_large(self, message: Message) -> int:
        """The size of a row that this sink does not take, 0 if it does."""
        change = message.change
        if change.action == "delete" and self.is_state:
            return 0  # its key is all that such a sink needs of it
        size = change.too_large_bytes or len(change.body)
        return size if change.too_large_bytes or size > self.spec.max_message_bytes else 0

    def _large(self, message: Message) -> Park:
        size = self._too_large(message)
        self._metrics.rejected(self.name, "too_large", 1)
        return Park(message, "too_large", f"the row has {size} bytes, above max_message_bytes", 0.0)

    # -- credit -----------------------------------------------------------------------------------------------------
    def _forget(self, message: Message) -> None:
        """A message leaves memory."""
        if message.credit:
            self._share.give(message.credit)
            self.memory_bytes -= message.credit
            self._read_back -= 1
            message.credit = 0
        elif not message.passed:
            message.left = True  # but the window tracks it, and its body with it: `_passed` gives the credit back
            return
        else:
            self._budget.drop(message.change)
            self.memory_bytes -= message.change.cost
        self.memory_messages -= 1

    def _passed(self, message: Message) -> None:
        """The watermark has passed a message: the window has let go of it."""
        if message.left:
            self._forget(message)

    def _remember(self, message: Message) -> None:
        """A message read back is in memory; its credit was taken from the share."""
        message.credit = _stored_cost(message)
        self._read_back += 1
        self.memory_bytes += message.credit
        self.memory_messages += 1

    # -- the loop ---------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Deliver until `stop`. Any exception that leaves here is fatal for the process."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while not self._stopping:
                    self._wake.clear()
                    wait_seconds = self._work(tasks)
                    self._give_way()
                    with contextlib.suppress(TimeoutError):
                        async with self._clock.timeout(wait_seconds):
                            await self._wake.wait()
        finally:
            await self._sink.close()

    def stop(self) -> None:
        """Start nothing new; `run` returns when what is in flight is settled."""
        self._stopping = True
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def _work(self, tasks: asyncio.TaskGroup) -> float:
        """Start whatever can be started; return after how many seconds to look again."""
        now = self._clock.monotonic()
        wait_seconds = IDLE_SECONDS
        first = self.window.first_open()
        if not self.stored and first is not None and first.row == NOT_STORED:
            left = first.arrived + SPILL_AGE_SECONDS - now
            if left <= 0:
                self._spill()
            else:
                wait_seconds = left
        if self.paused:
            self.drop_cache()
            return wait_seconds
        not_before = self.breaker.probe_at if self.breaker.open else 0.0
        if now < not_before:
            return min(wait_seconds, not_before - now)
        if self.breaker.open and self._in_flight:
            return wait_seconds  # one probe at a time
        lanes_wait = self._start_retry(tasks, now)
        queue_wait = self._start_batches(tasks, now)
        return max(0.0, min(wait_seconds, lanes_wait, queue_wait))

    def _start_retry(self, tasks: asyncio.TaskGroup, now: float) -> float:
        if not self.counters.parked_keys or self._retrying:
            return IDLE_SECONDS
        at = max(self._lane_at, self.lane_throttle.not_before)
        if now < at:
            return at - now
        others_turn = not self._lanes_turn and self.window.ready and now >= self.queue_throttle.not_before
        if not others_turn:
            self._retrying = True
            tasks.create_task(self._retry())
        return IDLE_SECONDS

    def _start_batches(self, tasks: asyncio.TaskGroup, now: float) -> float:
        at = self.queue_throttle.not_before
        if now < at:
            self.drop_cache()
            return at - now
        allowance = 1 if self.breaker.open else self.queue_throttle.allowance(self.spec.batch_size)
        one_at_a_time = self.breaker.open or self.queue_throttle.narrow
        if one_at_a_time and self._probe_newest and self.stored and not self._in_flight:
            self._probe_newest = False
            self._in_flight += 1
            tasks.create_task(self._try_newest())
        while self.window.ready and self._free_slots > 0 and not (one_at_a_time and self._in_flight):
            batch, encode_bytes = self._take(allowance)
            if not batch:
                break
            self._lanes_turn = True
            self._probe_newest = True
            self._in_flight += 1
            tasks.create_task(self._deliver(batch, encode_bytes))
        wanted = allowance if one_at_a_time else 2 * allowance * self._sink.max_in_flight
        if self._may_read and self.window.ready_count < max(1, wanted // 2):
            self._reading = True
            tasks.create_task(self._read(wanted))
        return IDLE_SECONDS

    @property
    def _free_slots(self) -> int:
        return self._sink.max_in_flight - self._in_flight - self._lane_waits

    async def _take_slot(self) -> None:
        """For a retry, which has its credit already: the next slot that is free is its."""
        self._lane_waits = True
        while self._in_flight >= self._sink.max_in_flight:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self._lane_waits = False
        self._in_flight += 1

    def _free_slot(self) -> None:
        self._in_flight -= 1
        self._slot_freed.set()
        self._wake.set()

    @property
    def _may_read(self) -> bool:
        """Not while something in memory is on its way to the store: a page could bring it a second time."""
        return (
            self.stored
            and not (self._reading or self._puts or self._evict_rows is not None)
            and self.memory_messages < self.spec.max_messages
            and self._below_ceiling(self._next_bytes)
        )

    def _below_ceiling(self, size_bytes: int) -> bool:
        """Whether so much more may be read back. A single message may, whatever its size."""
        return not self.memory_bytes or self.memory_bytes + size_bytes <= self.spec.max_memory_bytes

    # -- the backlog's cap, and what people ask for -----------------------------------------------------------------
    @property
    def blocks(self) -> bool:
        """The backlog is full, and the slot must not be read until there is room."""
        full_disk = self._store.disk_full_since is not None
        return full_disk or (self.full is not None and self.spec.limits.on_full == "block")

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

    def _open_gap(self, reason: str) -> None:
        """Stop taking part. The gap is durable before anything it swallows can be confirmed (I2)."""
        self._gap_lsn = first_lsn = self.tail.commit_lsn
        since = self._clock.wall()
        if self.gap is not None:  # nobody has acknowledged that one yet: this one goes on from it
            first_lsn, since = self.gap.first_lsn, self.gap.since
        self.gap = Gap(first_lsn, None, since, reason)
        self._spill()

        def durable(written: asyncio.Future[Written]) -> None:
            if not written.cancelled() and written.exception() is None:
                self._gap_lsn = None
                self._moved()

        self._commit(Write(self.name, gap=self.gap)).add_done_callback(durable)

    def missed(self, first_lsn: int, last_lsn: int, reason: str) -> None:
        """Changes in this range were not for this sink to have, though it should have had them: a gap."""
        since = self._clock.wall()
        if self.gap is not None:
            if self.gap.last_lsn is None:
                return  # inside of a growing one
            first_lsn, since = min(first_lsn, self.gap.first_lsn), self.gap.since
        self.gap = Gap(first_lsn, last_lsn, since, reason)
        self._commit(Write(self.name, gap=self.gap))

    async def pause(self) -> None:
        await self._commit(Write(self.name, paused=True))
        self.paused = True

    async def resume(self, now_at_lsn: int) -> None:
        """Undo the first of these that holds: it is paused; it takes no part, and its gap is growing (the gap ends
        here); it has a gap (which is acknowledged, and forgotten). ``now_at_lsn``: how far the slot was received,
        0 as long as it was not reached since the start."""
        if self.paused:
            await self._commit(Write(self.name, paused=False))
            self.paused = False
            self.busy_since = self._clock.monotonic()  # what waited for this has not stalled
        elif self.gap is not None and self.gap.last_lsn is None:
            if not now_at_lsn:
                raise SpillwayError(
                    "slot_not_reached",
                    f"how much sink {self.name} missed is not known before the source is connected",
                    "try again when it is",
                )
            # Takes part from here on. If the end of the gap is not on disk at a crash, the gap is found growing.
            self.gap = replace(self.gap, last_lsn=max(self.gap.first_lsn, now_at_lsn, self._missed_lsn))
            await self._commit(Write(self.name, gap=self.gap))
        elif self.gap is not None:
            await self._commit(Write(self.name, clear_gap=True))
            self.gap = None
        self.try_now()

    def try_now(self) -> None:
        """Forget back-off: whatever waits is tried at once."""
        self.breaker.probe_at = 0.0
        self.queue_throttle.not_before = self.lane_throttle.not_before = self._lane_at = 0.0
        self._wake.set()

    async def retry(self, select: Select) -> int:
        count = await asyncio.wrap_future(self._store.retry_now(self.name, select))
        self.try_now()
        return count

    async def discard(self, select: Select) -> int:
        """Remove what waits, but for what is in flight. Returns how many messages."""
        total = 0
        while True:
            while self._puts and self._last_put is not None:  # what is in memory must have its row, to be spared
                await asyncio.shield(self._last_put)
            self._turns += 1
            self.drop_cache()
            spare = frozenset(self.window.rows())
            count = await asyncio.wrap_future(self._store.discard(self.name, select, DISCARD_MESSAGES, spare))
            self._turns += 1
            total += count
            if count == 0:
                break
        await self.refresh()
        return total

    async def refresh(self) -> None:
        """Bring the counters up to date after a change that was made past `Write`."""
        await self._commit(Write(self.name))

    async def revive(self, letters: Sequence[tuple[int, Message]]) -> None:
        """Dead letters (their rows) become heads of lanes, due at once, as these messages. What is unwritten is
        written first, so that they stand behind everything of their keys."""
        keys = {key for _, letter in letters for key in letter.keys}
        self._hold_back(keys)
        self._write_unwritten()
        self._turns += 1
        try:
            await self._commit(Write(self.name, revive=letters))
        finally:
            self._turns += 1
            self._hold_back_no_more(keys)
        self.try_now()

    # -- sending ----------------------------------------------------------------------------------------------------
    def _take(self, allowance: int) -> tuple[list[Message], int]:
        """A batch, and the credit for its encoded form that was taken for it; what was read back has its own."""
        batch = self.window.take(allowance, 2 * READ_BYTES, self._share.available_bytes())
        encode_bytes = sum(encoded_cost(m) for m in batch if not m.credit)
        if not self._share.try_take(encode_bytes):
            self.window.put_back(batch)
            return [], 0
        return batch, encode_bytes

    async def _deliver(self, batch: list[Message], encode_bytes: int) -> None:
        try:
            results = await self._ask(batch)
        finally:
            self._share.give(encode_bytes)
        await self._settle(batch, results, self.queue_throttle)
        self._free_slot()

    async def _ask(self, batch: list[Message]) -> list[Result]:
        if self.reads_before_first_request is None:
            self.reads_before_first_request = self._store.reads
        return await self._attempt(batch)

    async def _settle(self, batch: list[Message], results: list[Result], throttle: Throttle) -> None:
        """Make what the sink said durable, then let go of the messages (see the module's text)."""
        now = self._clock.monotonic()
        lane = throttle is self.lane_throttle
        results = self._blame(results, now)
        ok = [m for m, r in zip(batch, results, strict=True) if r.outcome == "ok"]
        failed = [(m, r) for m, r in zip(batch, results, strict=True) if r.outcome in ("retry", "reject")]
        down = [(m, r) for m, r in zip(batch, results, strict=True) if r.outcome == "sink_down"]
        if down:
            result = down[0][1]
            self.breaker.failed(now, result.reason, result.detail, result.retry_after_seconds)
            self._note(result.reason, result.detail, now)
        elif self.breaker.open:
            self.breaker.succeeded()
        if ok:
            throttle.succeeded()
            self.last_progress_at = now
        elif failed and not down:
            throttle.failed(now)
        if lane:  # they stay the heads of their lanes
            self._let_go([m for m, _ in down])
        if not lane:
            self.window.put_back([m for m, _ in down])
        if down:
            self.drop_cache()
        self._count(ok)
        await self._settle_ok([m for m in ok if m.change.action != "truncate"])
        if failed:
            await self._settle_failed(failed, now, lane=lane)
        for message in ok:  # last, so that what was parked of its own batch is gone with it
            if message.change.action == "truncate":
                await self._settle_truncate(message)
        self._moved()

    def _blame(self, results: list[Result], now: float) -> list[Result]:
        """A time-out concerns the sink; but one message alone that times out while others go through is itself to
        blame, and must not be the probe for ever: its key is parked. It is never buried for that."""
        alone = len(results) == 1 and results[0].outcome == "sink_down" and results[0].reason == "timeout"
        if alone and now - self.last_progress_at < BLAME_SECONDS:
            return [replace(results[0], outcome="retry")]
        return results

    async def _settle_ok(self, ok: list[Message]) -> None:
        """Resolved. Nothing of it is done, and no key free, before the removal of all its rows has committed: else the
        later message of a key could be confirmed while a crash brings the earlier one back. While we wait for that,
        the others may be put into the store, too, since they are not done: their rows go in the next round."""
        messages = _with_superseded(ok)
        removed: set[int] = set()
        while True:
            if any(m.row == PENDING for m in messages) and self._last_put is not None:
                await asyncio.shield(self._last_put)
                continue
            rows = [m for m in messages if m.row > 0 and m.row not in removed]
            if not rows:
                break
            removed.update(m.row for m in rows)
            superseded_by = [m for m in ok if m.superseded and m.row > 0]
            await self._commit(Write(self.name, resolved=rows, superseded_by=superseded_by))
        for message in messages:
            message.done = True
        self._let_go(ok)

    async def _settle_truncate(self, message: Message) -> None:
        """What waits of that table from before it is gone with it, what is parked included."""
        prefix = table_prefix(message.change.schema, message.change.table)
        self._turns += 1
        await self._commit(Write(self.name, drop_table_below=(prefix, Position(*message.position))))
        await self._settle_ok([message])

    async def _settle_failed(self, failed: list[tuple[Message, Result]], now: float, *, lane: bool) -> None:
        park: list[Park] = []
        bury: list[Park] = []
        blocked: list[Message] = []
        for message, result in failed:
            if result is BLOCKED:
                blocked.append(message)
                continue
            self._metrics.rejected(self.name, result.reason, 1)
            self._note(result.reason, result.detail, now)
            attempts = message.attempts + 1
            limit = self.spec.max_retry_count
            if message.superseded and lane:  # by `latest_wins`, in place of the head
                park.append(Park(message.superseded[0], result.reason, result.detail, backoff_seconds(attempts - 1)))
            elif message.superseded:
                # Not sent themselves yet: they go first, one by one, from the lane.
                park.append(Park(message.superseded[0], result.reason, result.detail, 0.0, counts_attempt=False))
            elif (limit is not None and attempts > limit and result.reason != "timeout") or (
                self.spec.on_reject == "dead_letter" and result.outcome == "reject"
            ):
                bury.append(Park(message, result.reason, result.detail, 0.0))
            else:
                park.append(Park(message, result.reason, result.detail, backoff_seconds(attempts - 1)))
        stuck = [p.message for p in park]
        keys = {key for message in stuck for key in message.keys}
        for message in blocked:  # in order: one that stands behind under one of its keys blocks the other
            if not keys.isdisjoint(message.keys):
                keys.update(message.keys)
                stuck.append(message)
        if lane:  # heads of lanes have rows, and their keys are parked already
            self._turns += 1
            await self._commit(Write(self.name, park=park, bury=bury))
            self._turns += 1
        else:
            await self._write_unwritten(park=park, bury=bury, stuck=stuck)
        for message in self.window.drop_behind(stuck):
            self._forget(message)
        self._let_go([m for m, r in failed if r is not BLOCKED])
        self._let_go([m for m in blocked if not keys.isdisjoint(m.keys)])
        self.window.put_back([m for m in blocked if keys.isdisjoint(m.keys)])

    def _let_go(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.window.release(message)
            for one in _with_superseded([message]):
                self._forget(one)

    def _count(self, ok: list[Message]) -> None:
        if not ok:
            return
        resolved = len(ok) + sum(len(m.superseded) for m in ok if m.superseded)
        self.delivered += resolved
        self._metrics.delivered(self.name, resolved)
        wall = self._clock.wall()
        for commit_time, same in itertools.groupby(ok, key=lambda m: m.change.commit_time):
            self._metrics.delivery_seconds(self.name, max(0.0, wall - commit_time), sum(1 for _ in same))

    def _note(self, reason: str, detail: str, now: float) -> None:
        self.last_error = f"{reason}: {detail}" if detail else reason
        self.last_failure_at = now

    # -- reading back -----------------------------------------------------------------------------------------------
    async def _read(self, wanted: int) -> None:
        """The next page of the queue into the window; becomes direct when there is none."""
        try:
            turns, puts = self._turns, self._put_count
            all_committed = self._puts_done == puts
            head_bytes = await asyncio.to_thread(self._store.bytes_at_head, self.name, self._cursor)
            if head_bytes is None:
                if turns == self._turns and all_committed and puts == self._put_count:
                    self.stored = False
                return
            self._next_bytes = 2 * head_bytes + STORED_OVERHEAD_BYTES
            if not self._below_ceiling(self._next_bytes):
                return
            self._next_bytes = 0
            left = grant = await self._grant(head_bytes)
            try:
                most = max(1, min(wanted, grant // (2 * STORED_OVERHEAD_BYTES)))
                page = await asyncio.to_thread(
                    self._store.page, self.name, self._cursor, most, max(head_bytes, grant // 4)
                )
                if turns != self._turns or self._puts:
                    return  # overtaken by a park or an eviction: read again
                for message in page:
                    self._cursor = message.row
                    if message.row not in self._skip:
                        self._remember(message)
                        left -= message.credit
                        self.window.admit(message)
                self._skip = {row for row in self._skip if row > self._cursor}
            finally:
                self._share.give(left)
        finally:
            self._reading = False
            self._wake.set()

    async def _grant(self, head_bytes: int) -> int:
        """Credit for a page: what is there now, or what its first message needs when its turn comes."""
        least = 2 * head_bytes + STORED_OVERHEAD_BYTES
        if least > self._share.most_bytes:
            raise SpillwayError(
                "memory_limit",
                f"a message of {head_bytes} bytes waits for sink {self.name}: memory.limit_mb is too small to send it",
                f"raise memory.limit_mb to at least {8 * head_bytes // (1 << 20) + 1}",
            )
        room = max(least, self.spec.max_memory_bytes - self.memory_bytes)
        available = min(self._share.available_bytes(), 4 * READ_BYTES, room)
        if available >= least and self._share.try_take(available):
            return available
        await self._share.take(least)
        return least

    async def _retry(self) -> None:
        """Try the heads of some lanes again."""
        try:
            parked = self.counters.parked_keys
            most = max(
                self.lane_throttle.allowance(self.spec.batch_size),
                min(self.spec.batch_size, -(-parked // PARKED_ROUNDS)),
            )
            # Credit before the slot: what holds the credit may need the slot to give it back.
            heads = await self._read_heads(1 if self.breaker.open else most)
            if heads:
                await self._take_slot()
                results = await self._ask(heads)
                await self._settle(heads, results, self.lane_throttle)
                self._free_slot()
                mended = [m for m, r in zip(heads, results, strict=True) if r.outcome == "ok"]
                self._lane_mended = any(m.attempts for m in mended) or (self._lane_mended and bool(mended))
            else:
                self._lane_mended = False
            due = await asyncio.to_thread(self._store.next_due_seconds, self.name)
            now = self._clock.monotonic()
            self._lane_at = (
                now if self._lane_mended else now + min(IDLE_SECONDS, due if due is not None else IDLE_SECONDS)
            )
        finally:
            self._retrying = False
            self._lanes_turn = False
            self._wake.set()

    async def _read_heads(self, most: int) -> list[Message]:
        """Heads of lanes into flight, with their credit taken."""
        head_bytes = await asyncio.to_thread(self._store.bytes_due, self.name, self._lane_mended)
        if head_bytes is None:
            return []
        left = grant = await self._grant(head_bytes)
        most = max(1, min(most, grant // (2 * STORED_OVERHEAD_BYTES)))
        try:
            heads = await asyncio.to_thread(self._heads, most, max(head_bytes, grant // 4), left)
            flying: list[Message] = []
            for message in heads:
                if self.window.busy(message.keys):
                    continue  # an earlier message of it is still on its way out of the queue
                for one in _with_superseded([message]):
                    self._remember(one)
                    left -= one.credit
                self.window.fly(message)
                flying.append(message)
            return flying
        finally:
            self._share.give(left)

    def _heads(self, most: int, max_bytes: int, credit: int) -> list[Message]:
        """In a thread: what to send for the lanes that are due. By ``latest_wins`` the newest of a lane goes in place
        of its head, if the credit covers both."""
        heads: list[Message] = []
        for head in self._store.due(self.name, most, max_bytes, self._lane_mended):
            message = head.message
            message.attempts = head.attempts
            credit -= _stored_cost(message)
            heads.append(message)
        if self.spec.on_reject != "latest_wins":
            return heads
        for index, message in enumerate(heads):
            room = (credit - STORED_OVERHEAD_BYTES) // 2
            newest = None
            if len(message.keys) == 1 and room > 0:
                newest = self._store.latest(self.name, message.keys[0], room)
            if newest is None or newest.row == message.row:
                continue
            if newest.change.whole or newest.change.action == "delete":
                newest.attempts, newest.superseded = message.attempts, [message]
                credit -= _stored_cost(newest)
                heads[index] = newest
        return heads

    async def _try_newest(self) -> None:
        """While the stream is down to single probes: the newest message, whose kind may be mended already."""
        try:
            turns = self._turns
            left = min(self._share.available_bytes(), READ_BYTES)
            if left < 2 * STORED_OVERHEAD_BYTES or not self._share.try_take(left):
                return
            try:
                most = (left - STORED_OVERHEAD_BYTES) // 2
                message = await asyncio.to_thread(self._store.newest, self.name, most)
                if message is None or turns != self._turns or self._puts or self.window.busy(message.keys):
                    return
                if message.row <= self._cursor or message.row in self._skip:
                    return
                self._remember(message)
                left -= message.credit
            finally:
                self._share.give(left)
            self._skip.add(message.row)
            self.window.fly(message)
            results = await self._ask([message])
            await self._settle([message], results, self.queue_throttle)
        finally:
            self._free_slot()


def _stored_cost(message: Message) -> int:
    """Credit for a message read back: its body twice, as read and as encoded, and the objects around."""
    return 2 * len(message.change.body) + STORED_OVERHEAD_BYTES


def _with_superseded(messages: Iterable[Message]) -> list[Message]:
    """The messages, each behind those it supersedes."""
    return [one for m in messages for one in (*(m.superseded or ()), m)]

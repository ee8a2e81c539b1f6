"""What comes in for a sink, and where it lives: in the window, or over the spillway in the store.

`Inflow` owns what is known of a sink's messages: the window, the tail (what was routed last), whether the sink is
*direct* or *stored*, what has been written, and the credit of what is in memory. `spillway.flow.delivery` sends.

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

**The cap.** A backlog at its cap blocks the slot (`blocks`), or takes the sink out with a gap on record: what a growing
gap swallows is confirmed only after the gap is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spillway.change import PENDING, Message
from spillway.clock import Clock
from spillway.flow.budget import Budget
from spillway.flow.limits import Limits
from spillway.flow.window import Window
from spillway.metrics import Metrics
from spillway.position import ZERO, Position
from spillway.sinks.base import Sink
from spillway.store.base import Gap, Park, SinkState, Store, Write, Written

# What a message read back costs beyond its bytes, twice: its objects, and its place in request and answer.
STORED_OVERHEAD_BYTES = 1536


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


class Inflow:
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
        self.window = Window(
            keyed=sink.semantics in ("state", "events"), supersedes=sink.semantics == "state", passed=self._passed
        )
        self.counters = state.counters
        self.tail: Position = state.position or ZERO
        self.gap = state.gap
        self.stored = state.counters.queued > 0
        self.full: str | None = None  # why the backlog is at its cap
        self.oldest_seconds = 0.0  # age of the oldest waiting message, as of the last `check_limits`
        self._gap_lsn: int | None = None  # a gap begins here that is not durable yet
        self._missed_lsn = 0  # the newest that a growing gap has swallowed in this run
        self.busy_since = clock.monotonic()
        self.last_intake_at = float("-inf")
        self.truncates_ignored = 0
        self.memory_bytes = 0
        self.memory_messages = 0
        self._read_back = 0  # of the messages in memory: covered by the delivery pool
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
        self._lane_at = 0.0  # when the lanes are worth a look
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

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
        message.credit = stored_cost(message)
        self._read_back += 1
        self.memory_bytes += message.credit
        self.memory_messages += 1

    # -- the cap ----------------------------------------------------------------------------------------------------
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


def stored_cost(message: Message) -> int:
    """Credit for a message read back: its body twice, as read and as encoded, and the objects around."""
    return 2 * len(message.change.body) + STORED_OVERHEAD_BYTES

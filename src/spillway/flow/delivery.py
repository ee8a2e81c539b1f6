"""One sink's flow: what is sent when.

`Delivery` is a sink's `Inflow`, `Readback` and `Settling`, and what stands on them: the loop, what people ask for, and
the sending of batches and retries. One task runs it; each batch in flight, each read of the store and each settling is
a child task of that one. State changes happen on the loop between awaits, never in a thread.

Priorities of the loop, in this order: 1. stop, 2. what the sink said (settling runs as it comes), 3. spill, 4. due
retries, 5. new work, 6. reading ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from spillway.chunk import NOT_STORED, Batch, Message
from spillway.errors import SpillwayError
from spillway.flow.attempt import Answer, Attempt, each
from spillway.flow.compacting import PASS_BYTES
from spillway.flow.inflow import STORED_OVERHEAD_BYTES, Process, SinkSpec
from spillway.flow.readback import READ_BYTES, DoesNotFit
from spillway.flow.retry import PARKED_ROUNDS
from spillway.flow.settle import Settling
from spillway.flow.shaping import Shaping
from spillway.flow.window import encoded_cost
from spillway.sinks.base import Result, Sink
from spillway.store.base import Select, SinkState, Write
from spillway.store.compact import KEY_BYTES, Compaction, parts_for

SPILL_AGE_SECONDS = 0.25
CLOSE_SECONDS = 5.0
DISCARD_MESSAGES = 5000  # removed per transaction
BUSY_SECONDS = 0.1  # heads of lanes that are due, but something of their keys is under way, are looked at so often
BATCH_TOO_LARGE = (
    "timeout",
    "http_429",
    "enrichment_timeout",
)  # reasons for which a sink may be down that a smaller batch may avoid
IDLE_SECONDS = 1.0  # the longest the loop sleeps: what depends on time alone is looked at this often


class Delivery(Settling):
    def __init__(
        self,
        spec: SinkSpec,
        sink: Sink,
        state: SinkState,
        process: Process,
        moved: Callable[[], None],
        shaping: Shaping | None = None,
    ) -> None:
        super().__init__(spec, sink, state, process, moved)
        self.shaping = shaping
        self._attempt = Attempt(
            spec.name,
            sink,
            process.clock,
            spec.timeout_seconds,
            spec.toast_fails,
            shaping,
            self.batch_size.answered,
        )
        self.paused = False
        self.reads_before_first_request: int | None = None  # of the store, by all sinks (I5)
        self._retrying = False
        self._in_flight = 0  # batches being sent or settled
        self._lane_waits = 0  # retries that wait for a slot
        self._slot_freed = asyncio.Event()
        self._lanes_turn = True  # with one slot, queue and lanes take turns
        self._probe_newest = False
        self._stopping = False

    # -- the loop ---------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Deliver until `stop`. Any exception that leaves here is fatal for the process."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while not self._stopping:
                    self._wake.clear()
                    wait_seconds = min(self._work(tasks), self._give_way())
                    with contextlib.suppress(TimeoutError):
                        async with self._clock.timeout(wait_seconds):
                            await self._wake.wait()
        finally:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(CLOSE_SECONDS), contextlib.AsyncExitStack() as stack:
                    stack.push_async_callback(self._sink.close)
                    if self.shaping is not None:  # whatever the sink does then
                        stack.push_async_callback(self.shaping.close)

    def stop(self) -> None:
        """Start nothing new; `run` returns when what is in flight is settled."""
        self._stopping = True
        self._wake.set()

    def _work(self, tasks: asyncio.TaskGroup) -> float:
        """Start whatever can be started; return after how many seconds to look again."""
        now = self._clock.monotonic()
        wait_seconds = IDLE_SECONDS
        first = self.window.first_open()
        if not self.stored and first is not None and first.base == NOT_STORED:
            left = first.arrived + SPILL_AGE_SECONDS - now
            if left <= 0:
                self._spill()
            else:
                wait_seconds = left
        if self._compaction_due(now):
            self.passes.begin(now, self.counters)
            tasks.create_task(self._compact())
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
        allowance = 1 if self.breaker.open else self.queue_throttle.allowance(self.batch_size.messages)
        one_at_a_time = self.breaker.open or self.queue_throttle.narrow
        # Not of a sink that applies TRUNCATEs: the newest may be one, or may stand behind one.
        may_overtake = self._sink.semantics != "atomic"
        if one_at_a_time and self._probe_newest and may_overtake and self.stored and not self._in_flight:
            self._probe_newest = False
            self._in_flight += 1
            tasks.create_task(self._try_newest())
        while self.window.ready and self._free_slots > 0 and not (one_at_a_time and self._in_flight):
            if self._rather_reads(allowance):
                break
            batch = self._take(allowance)
            if batch is None:
                break
            self._lanes_turn = True
            self._probe_newest = True
            self._in_flight += 1
            tasks.create_task(self._deliver(batch, encoded_cost(batch)))
        wanted = allowance if one_at_a_time else 2 * allowance * self._sink.max_in_flight
        if self._may_read and self.window.ready_count < max(1, wanted // 2, allowance if self.shaping else 0):
            self._reading = True
            tasks.create_task(self._read_page(wanted))
        return IDLE_SECONDS

    def _rather_reads(self, allowance: int) -> bool:
        """Each batch that is shaped costs a query and a call, whatever its size: while more waits in the store, batches
        are full."""
        few = self.window.ready_count < allowance
        return few and self.shaping is not None and self.stored and (self._reading or self._may_read)

    @property
    def _free_slots(self) -> int:
        return self._sink.max_in_flight - self._in_flight - self._lane_waits

    async def _take_slot(self) -> None:
        """For a retry, which has its credit already: the next slot that is free is its."""
        self._lane_waits += 1
        while self._in_flight >= self._sink.max_in_flight:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self._lane_waits -= 1
        self._in_flight += 1

    def _free_slot(self) -> None:
        self._in_flight -= 1
        self._slot_freed.set()
        self._wake.set()

    async def left(self) -> None:
        """The sink is no more, and `run` has returned: what waits for it is gone, and so is its credit."""
        for batch in self.window.flying_batches():  # `run` was cancelled
            self._let_go(batch)
        for span, start, stop in self.window.evict():
            self._forget(span, stop - start)
        while await asyncio.wrap_future(
            self._store.discard(self.name, Select(all=True), DISCARD_MESSAGES, frozenset())
        ):
            pass
        self._budget.unshare(self._share, self.wake)
        if self.shaping is not None:
            self._budget.unshare_shaping(self.shaping.share)

    # -- what people ask for ----------------------------------------------------------------------------------------
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
        elif self.gaps.growing:
            if not now_at_lsn:
                raise SpillwayError(
                    "slot_not_reached",
                    f"how much sink {self.name} missed is not known before the source is connected",
                    "try again when it is",
                )
            await self.gaps.end(now_at_lsn)
        elif self.gap is not None:
            await self.gaps.forget()
        self.try_now()

    def try_now(self) -> None:
        """Forget back-off: whatever waits is tried at once."""
        self.breaker.probe_at = 0.0
        self.queue_throttle.not_before = self.lane_throttle.not_before = self._lane_at = 0.0
        self._wake.set()

    async def due_now(self, select: Select) -> int:
        """These parked keys may be tried at once; nothing else is hurried."""
        count = await asyncio.wrap_future(self._store.retry_now(self.name, select))
        if count:
            self._lane_at = 0.0
            self._wake.set()
        return count

    async def retry(self, select: Select) -> int:
        count = await asyncio.wrap_future(self._store.retry_now(self.name, select))
        self.try_now()
        return count

    async def discard(self, select: Select) -> int:
        """Remove what waits, but for what is in flight. Returns how many messages."""
        total = 0
        while True:
            while self._puts and self._last_put is not None:  # what is in memory must have its row, to be spared
                # It may be done while what follows from that has not run yet: this lets it run, an await would not.
                await asyncio.wait([self._last_put])
            with self._removing():
                self.drop_cache()
                spare = frozenset(self.window.rows())
                count = await asyncio.wrap_future(self._store.discard(self.name, select, DISCARD_MESSAGES, spare))
            total += count
            if count == 0:
                break
        await self.refresh()
        return total

    async def _compact(self) -> None:
        """One pass (spillway.store.compact). What is in flight is spared: were it rejected, its key would have lost its
        back-off. Nothing else of what is in memory depends on that: what is resolved, parked or held after its row has
        gone is passed over, and the newer image waits until its key is free. What is only being read is another matter:
        the newer image must not go out before it is in memory (`_removing`, `_try_newest`)."""
        size_bytes = min(PASS_BYTES, self._budget.common.limit_bytes // 3)
        most_keys = max(1, size_bytes // KEY_BYTES)
        work = Compaction(most_keys, self.spec.partial_images, parts_for(self.passes.keys, most_keys))
        try:
            async with self._budget.lent(size_bytes):
                while not work.done and not self._stopping:
                    # Heads of lanes that are being read meanwhile may be gone, and are read again.
                    with contextlib.nullcontext() if work.below else self._removing():
                        self.passes.step()
                        spare = frozenset(self.window.flying_rows())
                        count = await asyncio.wrap_future(self._store.compact(self.name, work, spare))
                        self.passes.step(count)
            self.reads_resolved += work.reads
            await self.refresh()
        finally:
            self.passes.ended(self._clock.monotonic(), self.counters, keys=work.keys, spared=work.spared)
            self._judge_limits()
            self._wake.set()

    async def refresh(self) -> None:
        """Bring the counters up to date after a change that was made past `Write`."""
        await self._commit(Write(self.name))

    async def revive(self, letters: Sequence[tuple[int, Message]]) -> None:
        """Dead letters (their rows) become heads of lanes, due at once, as these messages. What is unwritten is
        written first, so that they stand behind everything of their keys."""
        keys = {key for _, letter in letters for key in letter.keys}
        self._diverted.hold(keys)
        self._write_unwritten()
        self._turns += 1
        try:
            await self._commit(Write(self.name, revive=letters))
        finally:
            self._turns += 1
            self._diverted.done(keys)
        self.try_now()

    # -- sending ----------------------------------------------------------------------------------------------------
    def _take(self, allowance: int) -> Batch | None:
        """A batch; the credit for its encoded form is taken. What was read back has its own."""
        batch = self.window.take(allowance, 2 * READ_BYTES, self._share.available_bytes())
        if batch is not None and not self._share.try_take(encoded_cost(batch)):
            self.window.put_back(batch)
            return None
        return batch

    async def _deliver(self, batch: Batch, encode_bytes: int) -> None:
        try:
            answer = await self._ask(batch)
        finally:
            self._share.give(encode_bytes)
        await self._settle(batch, answer, self.queue_throttle)
        self._free_slot()

    async def _ask(self, batch: Batch) -> Answer:
        if self.reads_before_first_request is None:
            self.reads_before_first_request = self._store.reads
        answer = await self._attempt(batch)
        if isinstance(answer, Result) and answer.outcome == "sink_down" and answer.reason in BATCH_TOO_LARGE:
            self.batch_size.refused(len(batch))
        return answer

    async def _retry(self) -> None:
        """Try the heads of some lanes again."""
        try:
            parked = self.counters.parked_keys
            size = self.batch_size.messages
            most = max(self.lane_throttle.allowance(size), min(size, -(-parked // PARKED_ROUNDS)))
            if not self.lane_throttle.streak:
                most *= self._sink.max_in_flight
            # Credit before the slots: what holds the credit may need a slot to give it back.
            removals = self._removals
            batches = await self._read_heads(1 if self.breaker.open else most)
            retries = [self._retry_batch(heads, removals) for heads in batches]
            mended = [m for ok in await asyncio.gather(*retries) for m in ok]
            self._lane_mended = any(m.attempts for m in mended) or (self._lane_mended and bool(mended))
            due = await asyncio.to_thread(self._store.next_due_seconds, self.name, self._read_up_to)
            if due is not None and not batches:
                due = max(due, BUSY_SECONDS)
            now = self._clock.monotonic()
            self._lane_at = (
                now if self._lane_mended else now + min(IDLE_SECONDS, due if due is not None else IDLE_SECONDS)
            )
        except DoesNotFit as error:
            self._cannot_read(error)
        finally:
            self._retrying = False
            self._lanes_turn = False
            self._wake.set()

    async def _read_page(self, wanted: int) -> None:
        try:
            await self._read(wanted)
        except DoesNotFit as error:
            self._cannot_read(error)

    def _cannot_read(self, error: DoesNotFit) -> None:
        """This sink cannot go on before there is more memory; the others can (I6)."""
        now = self._clock.monotonic()
        self.breaker.failed(now, error.code, str(error))
        self._note(error.code, str(error))

    async def _retry_batch(self, heads: Batch, removals: int) -> list[Message]:
        """Returns what went through. Nothing is sent if anything was removed since it was read: it may be gone."""
        await self._take_slot()
        if removals != self._removals:
            self._let_go(heads)
            self._free_slot()
            return []
        answer = await self._ask(heads)
        await self._settle(heads, answer, self.lane_throttle)
        self._free_slot()
        return [m for m, r in zip(heads, each(answer, heads), strict=True) if r.outcome == "ok"]

    async def _try_newest(self) -> None:
        """While the stream is down to single probes: the newest message, whose kind may be mended already. Not beside a
        page that may bring an older one of that key, since its reading began before compaction has removed that."""
        try:
            turns = self._turns
            left = min(self._share.available_bytes(), READ_BYTES)
            if left < 2 * STORED_OVERHEAD_BYTES or not self._share.try_take(left):
                return
            try:
                most = (left - STORED_OVERHEAD_BYTES) // 2
                with self._diverted.looking_up() as parked:
                    message = await asyncio.wrap_future(self._store.ask(self._store.newest, self.name, most))
                    being_parked = self._diverted.union(parked)
                if message is None or turns != self._turns or self._puts or not self.window.free([message]):
                    return
                if self._reading and self._steps_at_read != self.passes.steps:
                    return
                if not being_parked.isdisjoint(message.keys):
                    return  # an earlier message of its key was still on its way to the lane while this was looked for
                if message.row <= self._cursor or message.row in self._skip:
                    return
                self._remember(message.span)
                self.memory_messages += 1
                left -= message.span.credit
            finally:
                self._share.give(left)
            self._skip.add(message.row)
            batch = self.window.fly([message])
            await self._settle(batch, await self._ask(batch), self.queue_throttle)
        finally:
            self._free_slot()

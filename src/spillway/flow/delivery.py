"""One sink's flow: what is sent when, and what becomes of it.

`Delivery` is a sink's `Inflow` and `Readback` and what stands on them: the loop, the breaker, the throttles. One task
runs it; each batch in flight, each read of the store and each settling is a child task of that one. State changes
happen on the loop between awaits, never in a thread.

**Settling.** What was resolved in memory alone is released at once. What has a row is released when the removal of
the row has committed: only then may a later message of its key go out. What failed is parked or buried by a write
that covers the tail, and leaves "in flight" when that has committed.

Priorities of the loop, in this order: 1. stop, 2. what the sink said (settling runs as it comes), 3. spill, 4. due
retries, 5. new work, 6. reading ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from spillway.change import ACTIONS
from spillway.chunk import ACTION, NOT_STORED, PENDING, TIME, Batch, Message, Piece
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.flow.attempt import BLOCKED, Answer, Attempt, each
from spillway.flow.budget import Budget
from spillway.flow.inflow import STORED_OVERHEAD_BYTES, SinkSpec
from spillway.flow.readback import READ_BYTES, Readback
from spillway.flow.retry import PARKED_ROUNDS, BatchSize, Breaker, Throttle, backoff_seconds
from spillway.flow.window import encoded_cost
from spillway.metrics import Metrics
from spillway.position import Position
from spillway.sinks.base import Result, Sink
from spillway.store.base import Park, Select, SinkState, Store, Write

SPILL_AGE_SECONDS = 0.25
PARKED_AT_START = 100  # with so many parked keys a restart begins narrow
BLAME_SECONDS = 60.0  # a sink that took something so recently is not down because one message times out
CLOSE_SECONDS = 5.0
DISCARD_MESSAGES = 5000  # removed per transaction
BUSY_SECONDS = 0.1  # heads of lanes that are due, but something of their keys is under way, are looked at so often
BATCH_TOO_LARGE = ("timeout", "http_429")  # reasons for which a sink may be down that a smaller batch may avoid
IDLE_SECONDS = 1.0  # the longest the loop sleeps: what depends on time alone is looked at this often


class Delivery(Readback):
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
        super().__init__(spec, sink, store, state, budget, clock, metrics, moved)
        self._attempt = Attempt(spec.name, sink, clock, spec.timeout_seconds, spec.toast_fails)
        self.paused = False
        self.breaker = Breaker()
        self.batch_size = BatchSize(spec.batch_size, spec.timeout_seconds)
        narrow = 6 if state.counters.parked_keys >= PARKED_AT_START else 0
        self.queue_throttle = Throttle(narrow)
        self.lane_throttle = Throttle(narrow)
        self.last_error: str | None = None
        self.last_failure_at = 0.0
        self.last_progress_at = float("-inf")
        self.delivered = 0
        self.reads_before_first_request: int | None = None  # of the store, by all sinks (I5)
        self._retrying = False
        self._truncates = 0  # that were settled
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
                    wait_seconds = self._work(tasks)
                    self._give_way()
                    with contextlib.suppress(TimeoutError):
                        async with self._clock.timeout(wait_seconds):
                            await self._wake.wait()
        finally:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(CLOSE_SECONDS):
                    await self._sink.close()

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
        if one_at_a_time and self._probe_newest and self.stored and not self._in_flight:
            self._probe_newest = False
            self._in_flight += 1
            tasks.create_task(self._try_newest())
        while self.window.ready and self._free_slots > 0 and not (one_at_a_time and self._in_flight):
            batch = self._take(allowance)
            if batch is None:
                break
            self._lanes_turn = True
            self._probe_newest = True
            self._in_flight += 1
            tasks.create_task(self._deliver(batch, encoded_cost(batch)))
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
                # It may be done while what follows from that has not run yet: this lets it run, an await would not.
                await asyncio.wait([self._last_put])
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
        asked_at = self._clock.monotonic()
        answer = await self._attempt(batch)
        if not isinstance(answer, Result) or answer.outcome == "ok":
            self.batch_size.answered(len(batch), self._clock.monotonic() - asked_at)
        elif answer.outcome == "sink_down" and answer.reason in BATCH_TOO_LARGE:
            self.batch_size.refused(len(batch))
        return answer

    async def _retry(self) -> None:
        """Try the heads of some lanes again."""
        try:
            parked = self.counters.parked_keys
            most = max(
                self.lane_throttle.allowance(self.spec.batch_size),
                min(self.spec.batch_size, -(-parked // PARKED_ROUNDS)),
            )
            if not self.lane_throttle.streak:
                most *= self._sink.max_in_flight
            # Credit before the slots: what holds the credit may need a slot to give it back.
            truncates = self._truncates
            batches = await self._read_heads(1 if self.breaker.open else most)
            retries = [self._retry_batch(heads, truncates) for heads in batches]
            mended = [m for ok in await asyncio.gather(*retries) for m in ok]
            self._lane_mended = any(m.attempts for m in mended) or (self._lane_mended and bool(mended))
            due = await asyncio.to_thread(self._store.next_due_seconds, self.name, self._read_up_to)
            if due is not None and not batches:
                due = max(due, BUSY_SECONDS)
            now = self._clock.monotonic()
            self._lane_at = (
                now if self._lane_mended else now + min(IDLE_SECONDS, due if due is not None else IDLE_SECONDS)
            )
        finally:
            self._retrying = False
            self._lanes_turn = False
            self._wake.set()

    async def _retry_batch(self, heads: Batch, truncates: int) -> list[Message]:
        """Returns what went through. Nothing is sent if there was a TRUNCATE since it was read: it may be gone."""
        await self._take_slot()
        if truncates != self._truncates:
            self._let_go(heads)
            self._free_slot()
            return []
        answer = await self._ask(heads)
        await self._settle(heads, answer, self.lane_throttle)
        self._free_slot()
        return [m for m, r in zip(heads, each(answer, heads), strict=True) if r.outcome == "ok"]

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
                if message is None or turns != self._turns or self._puts or not self.window.free([message]):
                    return
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

    # -- settling ---------------------------------------------------------------------------------------------------
    async def _settle(self, batch: Batch, answer: Answer, throttle: Throttle) -> None:
        """Make what the sink said durable, then let go of the messages (see the module's text)."""
        now = self._clock.monotonic()
        lane = throttle is self.lane_throttle
        ok, failed, down, why = self._sort(batch, self._blame(answer, batch, now))
        if why is not None:
            self.breaker.failed(now, why.reason, why.detail, why.retry_after_seconds)
            self._note(why.reason, why.detail, now)
        elif self.breaker.open:
            self.breaker.succeeded()
        if ok:
            throttle.succeeded()
            self.last_progress_at = now
        elif failed and not down:
            throttle.failed(now)
        if down:
            if lane:  # they stay the heads of their lanes
                self._let_go(down)
            else:
                self.window.put_back(down)
            self.drop_cache()
        truncates: list[Batch] = []
        if ok:
            self._count(ok)
            ok, truncates = self._without_truncates(ok)
            if ok:
                await self._settle_ok(ok, lane=lane)
        if failed:
            await self._settle_failed(failed, now, lane=lane)
        for truncate in truncates:  # last, so that what was parked of its own batch is gone with it
            await self._settle_truncate(truncate, lane=lane)
        self._moved()

    def _sort(
        self, batch: Batch, answer: Answer
    ) -> tuple[Batch | None, list[tuple[Batch, Result]], Batch | None, Result | None]:
        """What went through, what failed (each alone), what concerns the sink as a whole, and how it said that."""
        if isinstance(answer, Result):
            if answer.outcome == "ok":
                return batch, [], None, None
            if answer.outcome == "sink_down":
                return None, [], batch, answer
        pairs = list(zip(batch, each(answer, batch), strict=True))
        ok = Batch.of([m for m, r in pairs if r.outcome == "ok"])
        failed = [(Batch.of([m]), r) for m, r in pairs if r.outcome in ("retry", "reject")]
        down = Batch.of([m for m, r in pairs if r.outcome == "sink_down"])
        why = next((r for _, r in pairs if r.outcome == "sink_down"), None)
        self.window.divide(batch, [part for part in (ok, down, *(one for one, _ in failed)) if part])
        return ok or None, failed, down or None, why

    def _blame(self, answer: Answer, batch: Batch, now: float) -> Answer:
        """A time-out concerns the sink; but one message alone that times out while others go through is itself to
        blame, and must not be the probe for ever: its key is parked. It is never buried for that."""
        if len(batch) > 1 or now - self.last_progress_at >= BLAME_SECONDS:
            return answer
        result = answer if isinstance(answer, Result) else answer[0]
        blamed = result.outcome == "sink_down" and result.reason == "timeout"
        return replace(result, outcome="retry") if blamed else answer

    async def _settle_ok(self, ok: Batch, *, lane: bool) -> None:
        """Resolved. Nothing of it is done, and no key free, before its removal from the store has committed: else the
        later message of a key could be confirmed while a crash brings the earlier one back. While we wait for that,
        the others may be put into the store, too, since they are not done: they are removed in the next round."""
        superseded = ok.superseded
        if lane:
            superseded_by = [m for m in ok if m.superseded]
            await self._commit(Write(self.name, resolved_held=[*superseded, *ok.messages], superseded_by=superseded_by))
        else:
            await self._remove([*ok.pieces, *((m.span, m.place, m.place + 1) for m in superseded)])
        self._let_go(ok)

    async def _remove(self, pieces: Sequence[Piece]) -> None:
        """Remove from the store what of these is there, and mark them resolved."""
        left = pieces
        while left:
            if any(span.base == PENDING for span, _, _ in left) and self._last_put is not None:
                await asyncio.shield(self._last_put)
                continue
            stored = [piece for piece in left if piece[0].base != NOT_STORED]
            if not stored:
                break
            left = [piece for piece in left if piece[0].base == NOT_STORED]
            await self._commit(Write(self.name, resolved=stored))
        for span, start, stop in pieces:
            span.resolved[start:stop] = b"\1" * (stop - start)
            span.left -= stop - start

    def _without_truncates(self, ok: Batch) -> tuple[Batch | None, list[Batch]]:
        """What went through without its TRUNCATEs, and each of these."""
        if not any(_TRUNCATE in span.chunk.byte_column(ACTION) for span, _, _ in ok.pieces):
            return ok, []
        truncates = [m for m in ok if m.change.action == "truncate"]
        parts = [Batch.of([m]) for m in truncates]
        rest = Batch.of([m for m in ok if m.change.action != "truncate"])
        self.window.divide(ok, [*parts, rest] if rest else parts)
        return rest or None, parts

    async def _settle_truncate(self, truncate: Batch, *, lane: bool) -> None:
        """What waits of that table from before it is gone with it, what is parked included."""
        (message,) = truncate
        change = message.change
        self._turns += 1
        self._truncates += 1
        below = (change.schema, change.table, Position(*message.position))
        await self._commit(Write(self.name, drop_table_below=below))
        await self._settle_ok(truncate, lane=lane)

    async def _settle_failed(self, failed: list[tuple[Batch, Result]], now: float, *, lane: bool) -> None:
        park: list[Park] = []
        bury: list[Park] = []
        blocked: list[Batch] = []
        let_go: list[Batch] = []
        behind: list[Message] = []  # what is held together with what is parked
        for one, result in failed:
            if result is BLOCKED:
                blocked.append(one)
                continue
            (message,) = one
            let_go.append(one)
            self._metrics.rejected(self.name, result.reason, 1)
            self._note(result.reason, result.detail, now)
            attempts = message.attempts + 1
            limit = self.spec.max_retry_count
            if message.superseded and lane:  # by `latest_wins`, in place of the head
                park.append(Park(message.superseded[0], result.reason, result.detail, backoff_seconds(attempts - 1)))
            elif message.superseded:
                # Not sent themselves yet: they go first, one by one, from the lane.
                park.append(Park(message.superseded[0], result.reason, result.detail, 0.0, counts_attempt=False))
                behind += [*message.superseded[1:], message]
            elif (limit is not None and attempts > limit and result.reason != "timeout") or (
                self.spec.on_reject == "dead_letter" and result.outcome == "reject"
            ):
                bury.append(Park(message, result.reason, result.detail, 0.0))
            else:
                park.append(Park(message, result.reason, result.detail, backoff_seconds(attempts - 1)))
        stuck = [p.message for p in park]
        keys = {key for message in stuck for key in message.keys}
        put_back: list[Batch] = []
        for one in blocked:  # in order: one that stands behind under one of its keys blocks the other
            (message,) = one
            if keys.isdisjoint(message.keys):
                put_back.append(one)
            else:
                keys.update(message.keys)
                behind.append(message)
                let_go.append(one)
        if lane:  # they have rows in their lanes, and their keys are parked already
            self._turns += 1
            await self._commit(Write(self.name, park=park, bury=bury))
            self._turns += 1
        else:
            behind.sort(key=lambda message: message.position)
            await self._write_unwritten(park=park, bury=bury, stuck=[*stuck, *behind], hold=behind)
        for one in let_go:
            self._let_go(one)
        for one in reversed(put_back):
            self.window.put_back(one)

    def _let_go(self, batch: Batch) -> None:
        self.window.release(batch)
        for span, start, stop in batch.pieces:
            self._forget(span, stop - start)
        for message in batch.superseded:
            self._forget(message.span, 1)

    def _count(self, ok: Batch) -> None:
        resolved = len(ok) + len(ok.superseded)
        self.delivered += resolved
        self._metrics.delivered(self.name, resolved)
        times: list[int] = []
        for span, start, stop in ok.pieces:
            column = span.chunk.column(TIME)
            times += column[start:stop] if span.whole_chunk else [column[i] for i in span.indices[start:stop]]
        self._metrics.delivery_seconds(self.name, self._clock.wall(), times)

    def _note(self, reason: str, detail: str, now: float) -> None:
        self.last_error = f"{reason}: {detail}" if detail else reason
        self.last_failure_at = now


_TRUNCATE = ACTIONS.index("truncate")

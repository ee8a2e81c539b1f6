"""What becomes of a batch: what the sink said is made durable, and only then let go.

What was resolved in memory alone is released at once. What has a row is released when the removal of the row has
committed: only then may a later message of its key go out. What failed is parked or buried by a write that covers the
tail, and leaves "in flight" when that has committed. What concerns the sink as a whole opens its breaker and goes back.

A batch of which everything went through is settled as a whole; else it is divided, and what failed is looked at message
by message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from spillway.change import ACTIONS
from spillway.chunk import ACTION, NOT_STORED, PENDING, TIME, Batch, Message, Piece
from spillway.flow.attempt import BLOCKED, UNCHANGED_TOAST, Answer, each, is_truncate
from spillway.flow.inflow import Process, SinkSpec
from spillway.flow.readback import Readback
from spillway.flow.retry import Breaker, Throttle, backoff_seconds
from spillway.position import Position
from spillway.sinks.base import ROW_AWAITED, Awaiting, Result, Sink
from spillway.store.base import Park, SinkState, Write

ReadAgain = Callable[[Sequence[tuple[str, ...]]], Awaitable[bool]]

PARKED_AT_START = 100  # with so many parked keys a restart begins narrow
BLAME_SECONDS = 60.0  # a sink that took something so recently is not down because one message times out

# What may have come from outside, whoever it befell: a lock, a machine that stood still, a signal. It may bury a
# message only if it has failed so often.
_BY_CHANCE = ("enrichment_timeout", "reselect_timeout", "function_timeout", "function_crashed")
BURIED_BY_CHANCE = 3

_READ, _TRUNCATE = ACTIONS.index("read"), ACTIONS.index("truncate")


class Settling(Readback):
    def __init__(
        self, spec: SinkSpec, sink: Sink, state: SinkState, process: Process, moved: Callable[[], None]
    ) -> None:
        super().__init__(spec, sink, state, process, moved)
        self.breaker = Breaker()
        narrow = 6 if state.counters.parked_keys >= PARKED_AT_START else 0
        self.queue_throttle = Throttle(narrow)
        self.lane_throttle = Throttle(narrow)
        self.last_error: str | None = None
        self.last_progress_at = float("-inf")
        self.delivered = 0
        # By table of which a backfill brings all rows: has the rows with these primary keys read once more.
        self.awaited: dict[tuple[str, str], ReadAgain] = {}

    async def _settle(self, batch: Batch, answer: Answer, throttle: Throttle) -> None:
        """Make what the sink said durable, then let go of the messages (see the module's text)."""
        now = self._clock.monotonic()
        lane = throttle is self.lane_throttle
        if not isinstance(answer, Result) and any(result is ROW_AWAITED for result in answer):
            answer = await self._read_again(batch, answer)
        ok, failed, down, why = self._sort(batch, self._blame(answer, batch, now))
        if why is not None:
            self.breaker.failed(now, why.reason, why.detail, why.retry_after_seconds)
            self._note(why.reason, why.detail)
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
        covered = [one for one, result in failed if result is BLOCKED and _is_covered(one, truncates)]
        failed = [(one, result) for one, result in failed if one not in covered]
        if failed:
            await self._settle_failed(failed, lane=lane)
        for one in covered:  # not sent, and not to be sent any more
            await self._settle_ok(one, lane=lane)
        for truncate in truncates:  # last, so that what was parked of its own batch is gone with it
            await self._settle_truncate(truncate, lane=lane)
        self._moved()

    async def _read_again(self, batch: Batch, answer: Sequence[Result]) -> Sequence[Result]:
        """Of what was passed over: rows under the key that they come with are read when their page comes; one that was
        moved may have come behind the pages, and must be read by its key. That is durable before the update counts as
        resolved."""
        moved: dict[tuple[str, str], list[tuple[str, ...]]] = {}
        for message, result in zip(batch, answer, strict=True):
            change = message.change
            if result is ROW_AWAITED and change.was is not None:
                moved.setdefault((change.schema, change.table), []).append(change.pks)
        lost = {table for table, keys in moved.items() if not await self._awaits(table, keys)}
        if not lost:
            return answer
        return [
            UNCHANGED_TOAST
            if result is ROW_AWAITED and (message.change.schema, message.change.table) in lost
            else result
            for message, result in zip(batch, answer, strict=True)
        ]

    @property
    def passes_over(self) -> bool:
        """Whether the sink passes over what it cannot take of rows that are expected."""
        return isinstance(self._sink, Awaiting)

    def expect(self, table: tuple[str, str], read_again: ReadAgain) -> None:
        """All rows of this table come, until `expect_no_more`."""
        self.awaited[table] = read_again
        if isinstance(self._sink, Awaiting):
            self._sink.awaited.add(table)

    def expect_no_more(self, table: tuple[str, str]) -> None:
        self.awaited.pop(table, None)
        if isinstance(self._sink, Awaiting):
            self._sink.awaited.discard(table)

    async def _awaits(self, table: tuple[str, str], keys: Sequence[tuple[str, ...]]) -> bool:
        read_again = self.awaited.get(table)
        return read_again is not None and await read_again(keys)

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
        blame, and must not be the probe for ever: its key is parked. It is never buried for that. A TRUNCATE is the
        probe until it goes through: what follows must not overtake it."""
        if len(batch) > 1 or now - self.last_progress_at >= BLAME_SECONDS or is_truncate(batch[0]):
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
        if not any(_TRUNCATE in span.byte_column(ACTION, start, stop) for span, start, stop in ok.pieces):
            return ok, []
        parts = [Batch.of([m]) for m in ok if is_truncate(m)]
        rest = Batch.of([m for m in ok if not is_truncate(m)])
        self.window.divide(ok, [*parts, rest] if rest else parts)
        return rest or None, parts

    async def _settle_truncate(self, truncate: Batch, *, lane: bool) -> None:
        """What waits of that table from before it is gone with it, what is parked included."""
        (message,) = truncate
        change = message.change
        below = (change.schema, change.table, Position(*message.position))
        with self._removing():
            await self._commit(Write(self.name, drop_table_below=below))
        await self._settle_ok(truncate, lane=lane)

    async def _settle_failed(self, failed: list[tuple[Batch, Result]], *, lane: bool) -> None:
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
            self._note(result.reason, result.detail)
            attempts = message.attempts + 1
            if message.superseded and lane:  # by `latest_wins`, in place of the head
                park.append(Park(message.superseded[0], result.reason, result.detail, backoff_seconds(attempts - 1)))
            elif message.superseded:
                # Not sent themselves yet: they go first, one by one, from the lane.
                park.append(Park(message.superseded[0], result.reason, result.detail, 0.0, counts_attempt=False))
                behind += [*message.superseded[1:], message]
            elif self._is_hopeless(result, attempts):
                bury.append(Park(message, result.reason, result.detail, 0.0))
                self.reads_resolved += message.action == "read"
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

    def _is_hopeless(self, result: Result, attempts: int) -> bool:
        """By the configuration it becomes a dead letter."""
        if result.reason == "timeout" or (result.reason in _BY_CHANCE and attempts < BURIED_BY_CHANCE):
            return False
        limit = self.spec.max_retry_count
        rejected = self.spec.on_reject == "dead_letter" and result.outcome == "reject"
        return rejected or (limit is not None and attempts > limit)

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
        self.reads_resolved += _reads(ok) + sum(m.action == "read" for m in ok.superseded)
        times: list[int] = []
        for span, start, stop in ok.pieces:
            if span.byte_column(ACTION, start, start + 1)[0] != _READ:  # how old a row is says nothing
                times += span.column(TIME, start, stop)
        self._metrics.delivery_seconds(self.name, self._clock.wall(), times)

    def _note(self, reason: str, detail: str) -> None:
        self.last_error = f"{reason}: {detail}" if detail else reason


def _reads(batch: Batch) -> int:
    return sum([span.byte_column(ACTION, start, stop).count(_READ) for span, start, stop in batch.pieces])


def _is_covered(blocked: Batch, truncates: Sequence[Batch]) -> bool:
    """Whether a message stands before one of these TRUNCATEs of its table."""
    (message,) = blocked
    table = (message.change.schema, message.change.table)
    return any((t.change.schema, t.change.table) == table and message.position < t.position for (t,) in truncates)

"""Bringing messages back from the store: pages of the queue, and the heads of lanes that are due.

Credit is taken before anything is read, by the size of the first span, and what the page did not need is given back.
A page that was overtaken by a park, an eviction or a discard (``_turns``) is thrown away and read again; no page is
read while something in memory is on its way to the store, since it could come a second time. What a page brings of a
parked key is not admitted: it goes to the lanes of its keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from spillway.chunk import Batch, Message, Span
from spillway.errors import SpillwayError
from spillway.flow.attempt import UNCHANGED_TOAST
from spillway.flow.inflow import STORED_OVERHEAD_BYTES, Inflow, Process, SinkSpec, stored_cost
from spillway.flow.retry import BatchSize
from spillway.sinks.base import Sink
from spillway.store.base import SinkState, Write

READ_BYTES = 4 << 20  # bodies of one page: enough to fill a request, small enough to share the pool
KEEP_SECONDS = 0.25


class DoesNotFit(SpillwayError):
    """What waits in one piece needs more credit than can ever be granted: the limit was lowered since it was stored."""


class Readback(Inflow):
    def __init__(
        self, spec: SinkSpec, sink: Sink, state: SinkState, process: Process, moved: Callable[[], None]
    ) -> None:
        super().__init__(spec, sink, state, process, moved)
        self.batch_size = BatchSize(spec.batch_size, spec.timeout_seconds)
        self._next_bytes = 0  # credit for the first of the next page, if it is known that there is no room for it
        self._reading = False
        self._read_at = float("-inf")  # when the last page came
        self._steps_at_read = 0  # `Passes.steps` when the page that is being read was asked for
        self._lane_mended = False  # the last retry brought back a key that had failed: try all the others
        self._removals = 0  # counts what makes heads of lanes unusable that are read and not sent yet

    @contextlib.contextmanager
    def _removing(self) -> Iterator[None]:
        """Around a commit that removes what waits (a TRUNCATE, a discard). It counts before and after: what was read
        before it is noticed, and so is what was read while it was under way, from the state before it."""
        self._turns += 1
        self._removals += 1
        try:
            yield
        finally:
            self._turns += 1
            self._removals += 1

    @property
    def _may_read(self) -> bool:
        """Not while something in memory is on its way to the store: a page could bring it a second time."""
        return (
            self.stored
            and not (self._reading or self._puts or self._evict_due)
            and self.memory_messages < self.spec.max_messages
            and self._has_room(self._next_bytes)
        )

    def _has_room(self, size_bytes: int) -> bool:
        """Whether so much more may be read back: below the sink's ceiling, but for a single span, whatever its size;
        and while there is something to send, only if the credit is there. To wait for it would call for what this
        very sink has read (`_give_way`)."""
        if self.memory_bytes and self.memory_bytes + size_bytes > self.spec.max_memory_bytes:
            return False
        return not self.window.waiting or self._share.available_bytes() >= size_bytes

    def _give_way(self) -> float:
        """What could be sent is in flight by now. If anyone waits for delivery credit the rest is only a cache: those
        who wait may hold the very slots in which it would be sent, and wait for it (I7). But a page is kept for a
        moment: a sink of small requests would read it for each of them anew. Returns after how many seconds to look
        again."""
        if not self._share.contended or not self._read_back or not self.window.waiting:
            return float("inf")
        left = self._read_at + KEEP_SECONDS - self._clock.monotonic()
        if left > 0:
            return left
        if self.stored:
            self.drop_cache()
        else:
            self._spill()
        return float("inf")

    async def _read(self, wanted: int) -> None:
        """The next page of the queue into the window; becomes direct when there is none."""
        try:
            turns, puts = self._turns, self._put_count
            self._steps_at_read = self.passes.steps
            all_committed = self._puts_done == puts
            head = await asyncio.to_thread(self._store.bytes_at_head, self.name, self._cursor)
            if head is None:
                if turns == self._turns and all_committed and puts == self._put_count:
                    self.stored = False
                return
            head_bytes, head_messages = head
            self._next_bytes = 2 * head_bytes + STORED_OVERHEAD_BYTES * head_messages
            if not self._has_room(self._next_bytes):
                return
            self._next_bytes = 0
            left = grant = await self._grant(head_bytes, head_messages)
            try:
                most, most_bytes = _covered(grant, head_bytes, head_messages)
                most = min(most, max(wanted, head_messages))
                with self._diverted.looking_up() as parked:
                    page = await asyncio.to_thread(self._store.page, self.name, self._cursor, most, most_bytes)
                    if self._has_parked:
                        for span in page:
                            await self._look_up(parked, span)
                    held = self._diverted.union(parked)
                if turns != self._turns or self._puts:
                    return  # overtaken by a park or an eviction: read again
                hold: list[Message] = []
                for span in page:
                    if span.left:
                        self._remember(span)
                        left -= span.credit
                    hold += self._take_in(span, held)
                self._read_at = self._clock.monotonic()
                self._skip = {row for row in self._skip if row > self._cursor}
                self._hold_read(hold)
            finally:
                self._share.give(left)
        finally:
            self._reading = False
            self._wake.set()

    def _take_in(self, span: Span, held: set[str]) -> list[Message]:
        """Admit what of a page's span is neither gone nor in flight. Returns what must be held."""
        self._cursor = span.row(len(span) - 1)
        runs: list[tuple[int, int]] = []
        if span.left == len(span) and not self._skip:
            runs.append((0, len(span)))
        else:
            for place in range(len(span)):
                if not span.resolved[place] and span.row(place) not in self._skip:
                    if runs and runs[-1][1] == place:
                        runs[-1] = (runs[-1][0], place + 1)
                    else:
                        runs.append((place, place + 1))
        hold: list[Message] = []
        if held:
            runs, hold = self._apart(span, runs, held, ())
        for start, stop in runs:
            self.window.admit(span, start, stop)
        span.held += len(hold)
        self.memory_messages += span.held
        if span.credit and not span.held:
            self._leave(span)
        return hold

    def _hold_read(self, hold: list[Message]) -> None:
        """What was read of parked keys goes to their lanes."""
        if not hold:
            return
        keys = {key for message in hold for key in message.keys}
        self._diverted.hold(keys)

        def committed(_: object) -> None:
            self._diverted.done(keys)
            for message in hold:
                self._forget(message.span, 1)
            self._lane_at = 0.0

        self._commit(Write(self.name, hold=hold)).add_done_callback(committed)

    async def _grant(self, head_bytes: int, head_messages: int) -> int:
        """Credit for a page: what is there now, or what its first span needs when its turn comes."""
        least = 2 * head_bytes + STORED_OVERHEAD_BYTES * head_messages
        if least > self._share.most_bytes:
            raise DoesNotFit(
                "memory_limit",
                f"{head_bytes} bytes wait for sink {self.name} in one piece: memory.limit_mb is too small to send them",
                f"raise memory.limit_mb to at least {8 * least // (2 << 20) + 1}",
            )
        room = max(least, self.spec.max_memory_bytes - self.memory_bytes)
        available = min(self._share.available_bytes(), 4 * READ_BYTES, room)
        if available >= least and self._share.try_take(available):
            return available
        await self._share.take(least)
        return least

    async def _read_heads(self, most: int) -> list[Batch]:
        """Heads of lanes into flight, with their credit taken; no two of them have a key in common."""
        read_up_to, removals = self._read_up_to, self._removals
        head_bytes = await asyncio.to_thread(self._store.bytes_due, self.name, read_up_to, self._lane_mended)
        if head_bytes is None:
            return []
        left = grant = await self._grant(head_bytes, 1)
        covered, most_bytes = _covered(grant, head_bytes, 1)
        try:
            with self._diverted.looking_up() as parked:
                heads = await asyncio.to_thread(self._heads, min(most, covered), most_bytes, read_up_to, left)
                stale = self._diverted.union(parked)
            if read_up_to > self._read_up_to or removals != self._removals:
                return []  # an eviction has taken back what was read, or what was read may be gone
            # Not those of which an earlier message may have come into a lane since, or is still on its way.
            heads = [message for message in heads if stale.isdisjoint(message.keys)]
            if self._sink.semantics == "atomic":
                heads = self._before_truncates(heads, read_up_to)
            heads = self.window.free(heads)
            for message in heads:
                for one in (*(message.superseded or ()), message):
                    self._remember(one.span)
                    self.memory_messages += 1
                    left -= one.span.credit
            size = self.batch_size.messages
            return [self.window.fly(heads[start : start + size]) for start in range(0, len(heads), size)]
        finally:
            self._share.give(left)

    def _before_truncates(self, heads: list[Message], read_up_to: int) -> list[Message]:
        """Without those that may stand behind a TRUNCATE of their table that was not applied yet: it would remove
        them. What is unread may hold one, so they wait for their turn in the queue."""
        before: list[Message] = []
        truncates = [(t.change.schema, t.change.table, t.position) for t in self.window.truncates()]
        for head in heads:
            table = (head.change.schema, head.change.table)
            if head.row <= read_up_to and not any(t[:2] == table and t[2] < head.position for t in truncates):
                before.append(head)
        return before

    @property
    def _read_up_to(self) -> int:
        return self._cursor if self.stored else NOTHING_UNREAD

    def _heads(self, most: int, max_bytes: int, read_up_to: int, credit: int) -> list[Message]:
        """In a thread: what to send for the lanes that are due. By ``latest_wins`` the newest image of a lane (whole,
        or one that is read anew) goes in place of its head, if the credit covers both; and always where the head lacks
        what that has."""
        heads: list[Message] = []
        lacking: list[bool] = []
        for head in self._store.due(self.name, most, max_bytes, read_up_to, self._lane_mended):
            message = head.message
            message.attempts = head.attempts
            credit -= stored_cost(message.span)
            heads.append(message)
            lacking.append(self.is_state and head.reason == UNCHANGED_TOAST.reason)
        for index, message in enumerate(heads):
            if not self.spec.supersedes or not (lacking[index] or self.spec.on_reject == "latest_wins"):
                continue
            room = (credit - STORED_OVERHEAD_BYTES) // 2
            newest = None
            if len(message.keys) == 1 and room > 0:
                partial = self.spec.partial_images
                newest = self._store.latest(self.name, message.keys[0], room, partial_images=partial)
            if newest is not None and newest.row != message.row:
                newest.attempts, newest.superseded = message.attempts, [message]
                credit -= stored_cost(newest.span)
                heads[index] = newest
        return heads


NOTHING_UNREAD = (1 << 63) - 1


def _covered(grant: int, head_bytes: int, head_messages: int) -> tuple[int, int]:
    """How many messages and bytes of bodies may be read for this credit, whatever they turn out to be: half of it for
    each, but as much as the first needs."""
    most_bytes = max(head_bytes, min(grant // 4, (grant - STORED_OVERHEAD_BYTES * head_messages) // 2))
    return (grant - 2 * most_bytes) // STORED_OVERHEAD_BYTES, most_bytes

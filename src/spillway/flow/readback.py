"""Bringing messages back from the store: pages of the queue, and the heads of lanes that are due.

Credit is taken before anything is read, by the size of the first message, and what the page did not need is given
back. A page that was overtaken by a park, an eviction or a discard (``_turns``) is thrown away and read again; no page
is read while something in memory is on its way to the store, since it could come a second time.
"""

from __future__ import annotations

import asyncio

from spillway.change import Message
from spillway.errors import SpillwayError
from spillway.flow.inflow import STORED_OVERHEAD_BYTES, Inflow, stored_cost
from spillway.flow.window import with_superseded

READ_BYTES = 4 << 20  # bodies of one page: enough to fill a request, small enough to share the pool


class Readback(Inflow):
    _next_bytes = 0  # credit for the first of the next page, if it is known to be above the sink's ceiling
    _reading = False
    _lane_mended = False  # the last retry brought back a key that had failed: try all the others

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

    def _give_way(self) -> None:
        """What could be sent is in flight by now. If anyone waits for delivery credit the rest is only a cache: those
        who wait may hold the very slots in which it would be sent, and wait for it (I7)."""
        if not self._share.contended or not self._read_back or not self.window.waiting:
            return
        if self.stored:
            self.drop_cache()
        else:
            self._spill()

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
                for one in with_superseded([message]):
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
            credit -= stored_cost(message)
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
                credit -= stored_cost(newest)
                heads[index] = newest
        return heads

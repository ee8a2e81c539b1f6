"""Memory: every payload byte is covered by a credit taken before it is held (I4).

One `Budget` per process, in pools whose limits add up to the process limit. They are taken in this order and never
backwards, so that no circle of waiters can form: *capture* (frames, decoded changes, what waits for its commit in the
store), *window* (unresolved changes in memory), *delivery* (batches: pages read back, encoded bodies, answers),
*shaping* (enrichment, what functions see and make; only where a sink has any of it).

- The capture pool is waited for: when it is empty, reading the slot stops.
- The window pool is never waited for: what does not fit goes to the store.
- The delivery pool is divided, and so is the shaping pool: a quarter is split into one guaranteed `Share` per sink, so
  that a sink with a batch in flight can never be starved by the others; the rest is common, first come, first served.
- What the shaping pool lacks may come from the common part of the delivery pool (`ShapingShare`): as long as nobody
  waits for that; and for one large row, in its line.

Shared bytes are charged once: a chunk held by several windows is charged to the window pool when the first takes it and
given back by the last (``Chunk.holders``); what each of them adds is its own. A sink's own ceiling (``max_memory_mb``)
counts a chunk in full, however few of its changes the sink wants.

Whoever waits for common bytes holds none that another waiter could need but in flight: what is read back and not in
flight is dropped by every sink as soon as anyone waits (`Delivery._give_way`). What is in flight ends by its deadline.

A pool grants requests in the order they were made: a large request at the head of the line is not overtaken by small
ones, so that a jumbo message gets its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from spillway.chunk import MESSAGE_OVERHEAD_BYTES, Span
from spillway.errors import SpillwayError

CAPTURE_EIGHTHS = 3
WINDOW_EIGHTHS = 2
DELIVERY_EIGHTHS = 3
SHAPING_EIGHTHS = 2  # where something is shaped: one each from window and delivery
REREAD_EIGHTHS = 1  # where no more is done than to read rows anew: from delivery


@dataclass(slots=True, eq=False)
class Turn:
    """A place in the line of a pool."""

    size_bytes: int
    granted: asyncio.Future[None]


class Pool:
    """Bytes that can be taken and given back. Single-threaded: belongs to the loop."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._line: deque[Turn] = deque()

    def try_take(self, size_bytes: int) -> bool:
        """Take now, or not at all; not past those who wait."""
        if self._line or self.held_bytes + size_bytes > self.limit_bytes:
            return False
        self.held_bytes += size_bytes
        return True

    async def take(self, size_bytes: int) -> None:
        """Wait in line. Raises ValueError for what can never be granted. Cancellable: nothing is held then."""
        if size_bytes > self.limit_bytes:
            raise ValueError(f"{size_bytes} bytes can never be granted by the {self.name} pool of {self.limit_bytes}")
        if self.try_take(size_bytes):
            return
        await self.granted(self.line_up(size_bytes))

    def line_up(self, size_bytes: int) -> Turn:
        """A place at the end of the line, to be awaited by `granted`."""
        turn = Turn(size_bytes, asyncio.get_running_loop().create_future())
        self._line.append(turn)
        return turn

    async def granted(self, turn: Turn) -> None:
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.done() and not turn.granted.cancelled():
                self.give(turn.size_bytes)
            else:
                with contextlib.suppress(ValueError):  # somebody gave back meanwhile, and it was passed over
                    self._line.remove(turn)
                self._grant()
            raise

    def shrink(self, turn: Turn, size_bytes: int) -> None:
        """Who stands in line needs less than it did; it keeps its place. Who needs nothing need not stand there."""
        turn.size_bytes = size_bytes
        if not size_bytes:
            self._line.remove(turn)
            turn.granted.set_result(None)
        self._grant()

    def give(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        assert self.held_bytes >= 0, f"the {self.name} pool was given more than was taken"
        if self._line:
            self._grant()

    @property
    def waited_for(self) -> bool:
        return bool(self._line)

    def _grant(self) -> None:
        while self._line and self.held_bytes + self._line[0].size_bytes <= self.limit_bytes:
            turn = self._line.popleft()
            if not turn.granted.done():
                self.held_bytes += turn.size_bytes
                turn.granted.set_result(None)


class Spare:
    """Credit of a pool for work that nobody waits for: taken only while nobody stands in line for the pool, and up to a
    part of it; what is larger than that alone. Who holds some and has no right to keep it gives it back as soon as it
    is `wanted`."""

    def __init__(self, pool: Pool, limit_bytes: int) -> None:
        self._pool = pool
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    @property
    def most_bytes(self) -> int:
        """The largest request that can ever be granted."""
        return self._pool.limit_bytes

    @property
    def wanted(self) -> bool:
        return self._pool.waited_for

    def try_take(self, size_bytes: int) -> bool:
        if self.held_bytes and self.held_bytes + size_bytes > self.limit_bytes:
            return False
        if not self._pool.try_take(size_bytes):
            return False
        self.held_bytes += size_bytes
        return True

    def give(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self._pool.give(size_bytes)


class Share:
    """A sink's part of the delivery pool or the shaping pool: its guarantee, then what the common part has."""

    def __init__(self, common: Pool, guaranteed_bytes: int, wake_all: Callable[[], None]) -> None:
        self._common = common
        self.guaranteed_bytes = guaranteed_bytes
        self.held_bytes = 0
        self._from_common = 0
        self._wake_all = wake_all
        self._waiting: list[tuple[int, Turn]] = []  # what was asked for, and its place in the common part's line

    @property
    def contended(self) -> bool:
        """Somebody waits for the common part."""
        return self._common.waited_for

    @property
    def most_bytes(self) -> int:
        """The largest request that can ever be granted."""
        return self.guaranteed_bytes + self._common.limit_bytes

    def try_take(self, size_bytes: int) -> bool:
        missing = self._missing(size_bytes)
        if missing and not self._common.try_take(missing):
            return False
        self._from_common += missing
        self.held_bytes += size_bytes
        return True

    async def take(self, size_bytes: int) -> None:
        """Wait in line for the common part. Raises ValueError for more than ``most_bytes``. Cancellable."""
        if size_bytes > self.most_bytes:
            raise ValueError(f"{size_bytes} bytes can never be granted by a share of {self.most_bytes}")
        while missing := self._missing(size_bytes):
            if not self._common.try_take(missing):
                turn = self._common.line_up(missing)
                waiting = (size_bytes, turn)
                self._waiting.append(waiting)
                self._wake_all()  # to drop what is a cache only
                try:
                    await self._common.granted(turn)
                finally:
                    self._waiting.remove(waiting)
                missing = turn.size_bytes
            self._from_common += missing
        self.held_bytes += size_bytes

    def available_bytes(self) -> int:
        """What ``try_take`` would grant just now."""
        common = 0 if self._common.waited_for else self._common.limit_bytes - self._common.held_bytes
        return max(0, self.guaranteed_bytes - self.held_bytes) + max(0, common)

    def give(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        surplus = self._from_common - max(0, self.held_bytes - self.guaranteed_bytes)
        if surplus > 0:
            self._from_common -= surplus
            self._common.give(surplus)
            self._wake_all()
        for asked_bytes, turn in self._waiting:  # what the guarantee covers by now need not come from the others
            if not turn.granted.done() and self._missing(asked_bytes) < turn.size_bytes:
                self._common.shrink(turn, self._missing(asked_bytes))

    def _missing(self, size_bytes: int) -> int:
        """What must come from the common part before so much more can be held."""
        return max(0, self.held_bytes + size_bytes - self.guaranteed_bytes - self._from_common)


class ShapingShare:
    """A sink's part of the shaping pool, and what it has borrowed of the delivery pool's common part: up to half of
    that while nobody waits for it; or as much as a row needs that fits in no other way, in line (`take_alone`)."""

    def __init__(self, own: Share, common: Pool, wake_all: Callable[[], None], limit_bytes: int) -> None:
        self.own = own
        self._common = common
        self._wake_all = wake_all
        self._limit_bytes = limit_bytes
        self._borrowed_bytes = 0

    @property
    def held_bytes(self) -> int:
        return self.own.held_bytes + self._borrowed_bytes

    @property
    def most_bytes(self) -> int:
        """The largest request that `try_take` can ever grant."""
        return self.own.most_bytes + self._common.limit_bytes // 2

    @property
    def most_alone_bytes(self) -> int:
        return self.own.most_bytes + self._common.limit_bytes

    def limit_mb_for(self, size_bytes: int) -> int:
        """The process limit with which `take_alone` could grant so much."""
        return 1 + -(-self._limit_bytes * size_bytes // self.most_alone_bytes >> 20)

    def available_bytes(self) -> int:
        """What ``try_take`` would grant just now."""
        return self.own.available_bytes() + self._spare_bytes

    def try_take(self, size_bytes: int) -> bool:
        lacking = max(0, size_bytes - self.own.available_bytes())
        if lacking > self._spare_bytes or not self.own.try_take(size_bytes - lacking):
            return False
        if lacking:
            borrowed = self._common.try_take(lacking)
            assert borrowed, "that much is spare"
            self._borrowed_bytes += lacking
        return True

    async def take(self, size_bytes: int) -> None:
        """Wait for so much of the shaping pool."""
        await self.own.take(size_bytes)

    async def take_alone(self, size_bytes: int) -> None:
        """More than the shaping pool has. Who asks holds nothing of the shaping pool, and gives up after a while: what
        else its batches hold of the delivery pool may be what others wait for in the same way."""
        lacking = size_bytes - self.own.most_bytes
        self._wake_all()  # to drop what is a cache only
        await self._common.take(lacking)
        self._borrowed_bytes += lacking
        try:
            await self.own.take(self.own.most_bytes)
        except BaseException:
            self._give_back(lacking)
            raise

    def give(self, size_bytes: int) -> None:
        borrowed = min(size_bytes, self._borrowed_bytes)
        if borrowed:
            self._give_back(borrowed)
        self.own.give(size_bytes - borrowed)

    @property
    def _spare_bytes(self) -> int:
        if self._common.waited_for:
            return 0
        free_bytes = self._common.limit_bytes - self._common.held_bytes
        return max(0, min(free_bytes, self._common.limit_bytes // 2 - self._borrowed_bytes))

    def _give_back(self, size_bytes: int) -> None:
        self._borrowed_bytes -= size_bytes
        self._common.give(size_bytes)
        self._wake_all()


class Budget:
    """The process limit, divided. ``held_bytes`` never exceeds ``limit_bytes``. ``shaped``: how many of the sinks have
    a share of the shaping pool, which has so many eighths of the limit. ``whole_bytes``: the limit with what is beside
    it, if that is more."""

    def __init__(
        self, limit_bytes: int, sinks: int, shaped: int = 0, shaping_eighths: int = 0, whole_bytes: int = 0
    ) -> None:
        self.limit_bytes = limit_bytes
        self._whole_bytes = max(limit_bytes, whole_bytes)
        eighth = limit_bytes // 8
        self.capture = Pool("capture", CAPTURE_EIGHTHS * eighth)
        self.window = Pool("window", (WINDOW_EIGHTHS - shaping_eighths // 2) * eighth)
        delivery = (DELIVERY_EIGHTHS - (shaping_eighths + 1) // 2) * eighth
        shaping = shaping_eighths * eighth
        self.shaping = Pool("shaping", shaping - shaping // 4)
        self._shaped = shaped
        self._shaping_guaranteed_bytes = shaping // 4 // max(1, shaped)
        self._shaping_shares: list[ShapingShare] = []
        self.pages = Spare(self.capture, self.capture.limit_bytes // 3)
        self._sinks = sinks
        self._guaranteed_bytes = delivery // 4 // max(1, sinks)
        self.common = Pool("delivery", delivery - delivery // 4)
        self._shares: list[Share] = []
        self._thirsty: list[Callable[[], None]] = []

    @property
    def held_bytes(self) -> int:
        shares = (*self._shares, *(share.own for share in self._shaping_shares))
        guaranteed = sum(min(share.held_bytes, share.guaranteed_bytes) for share in shares)
        pools = (self.capture, self.window, self.common, self.shaping)
        return guaranteed + sum(pool.held_bytes for pool in pools)

    def shaping_share(self) -> ShapingShare:
        """Another sink's share of the shaping pool. Raises SpillwayError where nothing was shaped at the start."""
        if not self._shaped:
            raise SpillwayError(
                "no_shaping_memory",
                "no sink of the file had functions, an enrichment or rows that are read anew (as search indexes have)"
                " when the process started, so no memory is set apart for that",
                "restart spillway",
            )
        guaranteed_bytes = self._shaping_guaranteed_bytes if len(self._shaping_shares) < self._shaped else 0
        own = Share(self.shaping, guaranteed_bytes, lambda: None)
        share = ShapingShare(own, self.common, self._wake_all, self._whole_bytes)
        self._shaping_shares.append(share)
        return share

    def unshare_shaping(self, share: ShapingShare) -> None:
        """Its sink is no more."""
        share.give(share.held_bytes)
        self._shaping_shares.remove(share)

    def share(self, wake: Callable[[], None]) -> Share:
        """A sink's share of the delivery pool; ``wake`` is called when anyone frees or lacks common bytes. One that was
        not counted in at the start has no guarantee of its own: it waits in the common line."""
        guaranteed_bytes = self._guaranteed_bytes if len(self._shares) < self._sinks else 0
        share = Share(self.common, guaranteed_bytes, self._wake_all)
        self._shares.append(share)
        self._thirsty.append(wake)
        return share

    def unshare(self, share: Share, wake: Callable[[], None]) -> None:
        """A sink is no more. What it should have given back is given back here."""
        share.give(share.held_bytes)
        self._shares.remove(share)
        self._thirsty.remove(wake)

    @contextlib.asynccontextmanager
    async def lent(self, size_bytes: int) -> AsyncIterator[None]:
        """Common delivery credit for something that people asked to see."""
        size_bytes = min(size_bytes, self.common.limit_bytes)
        self._wake_all()
        await self.common.take(size_bytes)
        try:
            yield
        finally:
            self.common.give(size_bytes)
            self._wake_all()

    def _wake_all(self) -> None:
        for wake in self._thirsty:
            wake()

    def hold(self, span: Span) -> bool:
        """Take a window's credit for a span, and for its chunk if no other window holds that. False: no room."""
        own = MESSAGE_OVERHEAD_BYTES * len(span)
        if not self.window.try_take(own if span.chunk.holders else own + span.chunk.cost):
            return False
        span.chunk.holders += 1
        return True

    def drop(self, span: Span) -> None:
        """Give back what `hold` took, the chunk's part if this was its last holder."""
        span.chunk.holders -= 1
        own = MESSAGE_OVERHEAD_BYTES * len(span)
        self.window.give(own if span.chunk.holders else own + span.chunk.cost)

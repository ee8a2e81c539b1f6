"""Credit for shaping: how many messages of a batch are shaped together, and what that may take.

A *part* of a batch is planned by what is known of its rows: their sizes where the source has told them, else a guess
that follows what was seen. A batch is planned whole if there can ever be credit for it: each part costs a query. What
is left of it is summed up once (`_Sums`), so that a plan for any credit is a search in these sums.

What a part takes while it is made is covered by its plan: its messages and rows once, and twice what is just being
made. While it is sent there is an encoded copy besides (spillway.sinks.base). Where the sink's messages are independent
that is taken as it can be had, and the part is sent in *portions* that what was had is enough for, of some megabytes at
least; so a sink asks for the rows of one batch while it sends another. Else it is planned, too.

Nobody waits for another sink's server (I6): a sink waits for credit only while its own batches hold it, which end by
their deadline, or for its first message alone. While others hold what it lacks, it takes a smaller part. A row that is
larger than the shaping pool waits for what it lacks of the delivery pool, alone, and not for long (`NoRoomError`).

Batches of one sink are granted in the order in which they ask: else small ones that overlap would keep a large one
waiting for ever, since what it waits for is given back by one and taken by the next (I7). Who waits so, and who stands
behind, holds nothing of the shaping pool, and waits for that alone; so what they hold of the pools before it keeps
nobody from ending. A large row that waits for the delivery pool is overtaken.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spillway.chunk import Batch, Message, Piece
from spillway.clock import Clock
from spillway.flow.budget import ShapingShare
from spillway.source.bykeys import making_bytes

LARGEST_PART = 16  # of many rows each may be this part of all: what is in the making is covered by that
MESSAGE_BYTES = 2048  # what objects of one message take besides
FIRST_GUESS_BYTES = 16 << 10  # of a row that is fetched, before any was seen
MOST_IN_PART = 5000  # messages: what one query is asked for
ALONE_SECONDS = 10.0  # that a large row may wait
JOINED_BYTES = 1 << 20  # bodies that become one chunk: so much is there twice
STEP_BYTES = 64 << 10  # to which the largest row is found out


class NoRoomError(Exception):
    """For a large row, just now."""


@dataclass(slots=True)
class Guess:
    """Bytes of a row before it is read; follows what was seen: up at once, down slowly."""

    bytes: float = FIRST_GUESS_BYTES

    def saw(self, rows: int, size_bytes: int) -> None:
        if rows:
            mean = size_bytes / rows
            self.bytes = max(mean, 0.75 * self.bytes + 0.25 * mean)


@dataclass(frozen=True, slots=True)
class _Plan:
    """So many messages, with so many bytes of rows, none of them larger than ``row_bytes``."""

    count: int
    rows_bytes: int
    row_bytes: int
    cost_bytes: int


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of the first 1, 2, 3 ... of the messages that are left."""

    bodies_bytes: Sequence[int]
    known_bytes: Sequence[int]  # of rows that the source has told of
    largest_bytes: Sequence[int]  # of these
    largest_body_bytes: Sequence[int]
    reread: Sequence[int]  # rows of which nothing is known but what others of their kind had
    enriched: Sequence[int]
    growth: float


@dataclass(slots=True)
class Credit:
    """What was taken for a plan. ``given``: to be set when something is given back. ``whole``: it is sent as one."""

    share: ShapingShare
    held_bytes: int
    count: int
    rows_bytes: int
    row_bytes: int
    given: asyncio.Event
    whole: bool

    def use(self, size_bytes: int) -> None:
        self.rows_bytes = max(0, self.rows_bytes - size_bytes)

    def portions(self, batch: Batch) -> Iterator[Batch]:
        """The batch as it can be sent, whole if there is credit for that: there is an encoded copy of one portion at a
        time. What is not needed for it is given back."""
        own_bytes = batch.body_bytes + MESSAGE_BYTES * len(batch)
        lacking = own_bytes + batch.body_bytes - self.held_bytes
        if lacking > 0 and not self.whole and self.share.try_take(lacking):
            self.held_bytes += lacking
            lacking = 0
        if lacking <= 0 or self.whole:
            self.keep(own_bytes + batch.body_bytes)
            yield batch
            return
        some: list[Piece] = []
        size = 0
        for piece in batch.pieces:
            span, start, stop = piece
            more = span.bytes_between(start, stop)
            if some and size + more > self.held_bytes - own_bytes:
                yield Batch(some)
                some, size = [], 0
            some.append(piece)
            size += more
        yield Batch(some)

    def keep(self, size_bytes: int) -> None:
        """So much is needed from now on."""
        surplus = self.held_bytes - size_bytes
        if surplus > 0:
            self.held_bytes -= surplus
            self.share.give(surplus)
            self.given.set()


class Lending:
    """Of one sink. ``result_bytes``: what functions may make of one message; None: there are none. ``whole``: a
    part is sent as one."""

    def __init__(
        self,
        share: ShapingShare,
        clock: Clock,
        suffix_bytes: int,
        result_bytes: int | None,
        *,
        rereads: bool,
        enriches: bool,
        whole: bool,
    ) -> None:
        self.share = share
        self._clock = clock
        self.reread = Guess()
        self.enriched = Guess()
        self._suffix_bytes = suffix_bytes
        self._result_bytes = result_bytes
        self._rereads = rereads
        self._enriches = enriches
        self._whole = whole
        self._lending = 0  # batches that hold credit
        self._given = asyncio.Event()
        self._next = asyncio.Lock()  # who waits

    @contextlib.asynccontextmanager
    async def lent(
        self, messages: Sequence[Message], left: Sequence[int], known: Mapping[int, int], growth: float
    ) -> AsyncIterator[Credit]:
        """Credit for all of these (places of messages), or for the first of them. ``known``: sizes of their rows, as
        far as the source has told them. ``growth``: bytes of what functions make, for each byte of what they see.
        Raises NoRoomError for a first message whose row is large."""
        sums = self._sums(messages, left[:MOST_IN_PART], known, growth)
        plan = await self._taken(sums)
        credit = Credit(
            self.share, plan.cost_bytes, plan.count, plan.rows_bytes, plan.row_bytes, self._given, self._whole
        )
        self._lending += 1
        try:
            yield credit
        finally:
            self._lending -= 1
            credit.keep(0)
            self._given.set()

    def needed(self, body_bytes: int, size_bytes: int) -> int:
        """For a message alone, whose rows have this size."""
        body_bytes += self._suffix_bytes
        return self._cost(1, body_bytes, size_bytes, size_bytes, body_bytes + size_bytes, 1.0)

    def largest_row(self, body_bytes: int, most_bytes: int) -> int:
        """The size for which so much is needed, about."""
        sizes = range(0, most_bytes, STEP_BYTES)
        return sizes[max(1, bisect_right(sizes, most_bytes, key=lambda size: self.needed(body_bytes, size))) - 1]

    async def _taken(self, sums: _Sums) -> _Plan:
        async with self._next:
            while True:
                plan = self._plan(sums, self.share.most_bytes)
                if self.share.try_take(plan.cost_bytes):
                    return plan
                if not self._lending:
                    break
                self._given.clear()
                await self._given.wait()
            plan = self._plan(sums, self.share.available_bytes())
            if self.share.try_take(plan.cost_bytes):
                return plan
            if plan.cost_bytes <= self.share.own.most_bytes:
                await self.share.take(plan.cost_bytes)
                return plan
        # Not as the next: what it lacks of the delivery pool may be held by those who would stand behind it.
        try:
            async with self._clock.timeout(ALONE_SECONDS):
                await self.share.take_alone(plan.cost_bytes)
        except TimeoutError as error:
            raise NoRoomError from error
        return plan

    def _sums(self, messages: Sequence[Message], left: Sequence[int], known: Mapping[int, int], growth: float) -> _Sums:
        some = [messages[place] for place in left]
        bodies_bytes = [message.body_bytes + self._suffix_bytes for message in some]
        unknown = [place not in known for place in left]
        return _Sums(
            list(accumulate(bodies_bytes)),
            list(accumulate(known.get(place, 0) for place in left)),
            list(accumulate((known.get(place, 0) for place in left), max)),
            list(accumulate(bodies_bytes, max)),
            list(accumulate(self._rereads and one and not m.whole for one, m in zip(unknown, some, strict=True))),
            list(accumulate(self._enriches and one for one in unknown)),
            growth,
        )

    def _plan(self, sums: _Sums, most: int) -> _Plan:
        """For the first of these, and as many more as so much credit is enough for."""

        def of(count: int) -> _Plan:
            at = count - 1
            reread, enriched = int(self.reread.bytes), int(self.enriched.bytes)
            rows_bytes = sums.known_bytes[at] + sums.reread[at] * reread + sums.enriched[at] * enriched
            guessed = bool(sums.reread[at]) * reread + bool(sums.enriched[at]) * enriched
            rows_bytes, row_bytes = _spread(rows_bytes, max(sums.largest_bytes[at], guessed), count)
            largest = sums.largest_body_bytes[at] + row_bytes
            cost = self._cost(count, sums.bodies_bytes[at], rows_bytes, row_bytes, largest, sums.growth)
            return _Plan(count, rows_bytes, row_bytes, cost)

        counts = range(1, len(sums.bodies_bytes) + 1)
        plan = of(max(1, bisect_right(counts, most, key=lambda count: of(count).cost_bytes)))
        # More than the shaping pool has is waited for only where the row is known to be so large.
        most = self.share.most_alone_bytes if sums.known_bytes[0] else self.share.own.most_bytes
        if plan.count == 1 and plan.cost_bytes > most:
            row_bytes = self.largest_row(sums.bodies_bytes[0] - self._suffix_bytes, most)
            plan = _Plan(1, row_bytes, row_bytes, most)
        return plan

    def _cost(
        self, count: int, bodies_bytes: int, rows_bytes: int, row_bytes: int, largest_bytes: int, growth: float
    ) -> int:
        """``largest_bytes``: of one message with its row. Each step lets go of what the one before has made: beside the
        whole there are a row and what is made of it, and bodies that are being joined. Only functions see all messages
        of a part while its rows are there, before they make others, which are ``growth`` times as large."""
        held = made = seen = bodies_bytes + rows_bytes
        if self._result_bytes is not None:
            made = max(seen, int(min(growth * seen, self._result_bytes * count)))
            held = 2 * seen + made
        copies = 2 if self._rereads and self._enriches else 1
        held += max(making_bytes(row_bytes), copies * largest_bytes + min(made, JOINED_BYTES))
        return MESSAGE_BYTES * count + (max(held, 2 * made) if self._whole else held)


def _spread(rows_bytes: int, largest_bytes: int, count: int) -> tuple[int, int]:
    """For so many rows of which the bytes are guessed: what they may have in all, since a mean of few says little, and
    what one of them may have."""
    if count > 1:
        rows_bytes = int(rows_bytes * (1.05 + count**-0.5))
        largest_bytes = max(largest_bytes, rows_bytes // LARGEST_PART)
    return rows_bytes, largest_bytes

"""Credit for shaping: how many messages of a batch are shaped together, and what that may take.

A *part* of a batch is planned by what is known of its rows: their sizes where the source has told them, else a guess
that follows what was seen. A batch is planned whole if there can ever be credit for it: each part costs a query.

Nobody waits for another sink's server (I6): a sink waits for credit only while its own batches hold it, which end by
their deadline, or for its first message alone. While others hold what it lacks, it takes a smaller part.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from spillway.chunk import Batch, Message
from spillway.flow.budget import Share
from spillway.source.enrich import FETCH_FACTOR

COPIES = 1.2  # of what is made, at once: each step lets go of what the one before has made
LARGEST_PART = 16  # of many rows each may be this part of all: what is in the making costs `FETCH_FACTOR` times that
MESSAGE_BYTES = 2048  # what objects of one message take besides
FIRST_GUESS_BYTES = 16 << 10  # of a row that is fetched, before any was seen
MOST_IN_PART = 5000  # messages: what one query is asked for


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


@dataclass(slots=True)
class Credit:
    """What was taken for a plan. ``given``: to be set when something is given back."""

    share: Share
    held_bytes: int
    count: int
    rows_bytes: int
    row_bytes: int
    given: asyncio.Event

    def use(self, size_bytes: int) -> None:
        self.rows_bytes = max(0, self.rows_bytes - size_bytes)

    def keep(self, size_bytes: int) -> None:
        """So much is needed from now on."""
        surplus = self.held_bytes - size_bytes
        if surplus > 0:
            self.held_bytes -= surplus
            self.share.give(surplus)
            self.given.set()


class Lending:
    """Of one sink. ``result_bytes``: what functions may make of one message; None: there are none."""

    def __init__(
        self, share: Share, suffix_bytes: int, result_bytes: int | None, *, rereads: bool, enriches: bool
    ) -> None:
        self.share = share
        self.reread = Guess()
        self.enriched = Guess()
        self.growth = 1.0  # bytes of what functions make of a message, for each of its own
        self._suffix_bytes = suffix_bytes
        self._result_bytes = result_bytes
        self._rereads = rereads
        self._enriches = enriches
        self._lending = 0  # batches that hold credit
        self._given = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lent(
        self, messages: Sequence[Message], left: Sequence[int], known: Mapping[int, int]
    ) -> AsyncIterator[Credit]:
        """Credit for all of these (places of messages), or for the first of them. ``known``: sizes of their rows, as
        far as the source has told them."""
        most = self.share.most_bytes
        while True:
            plan = self._plan(messages, left, known, most)
            if self.share.try_take(plan.cost_bytes):
                break
            if self._lending:
                self._given.clear()
                await self._given.wait()
                continue
            plan = self._plan(messages, left, known, min(most, self.share.available_bytes()))
            if not self.share.try_take(plan.cost_bytes):
                await self.share.take(plan.cost_bytes)
            break
        credit = Credit(self.share, plan.cost_bytes, plan.count, plan.rows_bytes, plan.row_bytes, self._given)
        self._lending += 1
        try:
            yield credit
        finally:
            self._lending -= 1
            credit.keep(0)
            self._given.set()

    def needed(self, message: Message, size_bytes: int) -> int:
        """For this message alone, whose rows have this size."""
        return self._cost(1, message.body_bytes + self._suffix_bytes, size_bytes, size_bytes, 1.0)

    def sending(self, batch: Batch) -> int:
        """What a batch needs while it is sent: itself, and one encoded copy."""
        return 2 * batch.body_bytes + MESSAGE_BYTES * len(batch)

    def _plan(self, messages: Sequence[Message], left: Sequence[int], known: Mapping[int, int], most: int) -> _Plan:
        """For the first of these, and as many more as so much credit is enough for."""
        bodies = rows = largest = 0
        plan: _Plan | None = None
        for count, place in enumerate(left[:MOST_IN_PART], 1):
            message = messages[place]
            size = known[place] if place in known else self._guessed(message)
            bodies += message.body_bytes + self._suffix_bytes
            rows, largest = rows + size, max(largest, size)
            rows_bytes, row_bytes = _spread(rows, largest, count)
            cost = self._cost(count, bodies, rows_bytes, row_bytes, self.growth)
            if plan is not None and cost > most:
                break
            plan = _Plan(count, rows_bytes, row_bytes, cost)
        assert plan is not None, "something is left"
        if plan.cost_bytes > self.share.most_bytes:  # the first alone: its row is asked for by what there can be
            row_bytes = max(
                0, int((self.share.most_bytes - self.needed(messages[left[0]], 0)) / (2 * COPIES + FETCH_FACTOR))
            )
            plan = _Plan(1, row_bytes, row_bytes, self.share.most_bytes)
        return plan

    def _guessed(self, message: Message) -> int:
        reread = self._rereads and not message.whole
        return reread * int(self.reread.bytes) + self._enriches * int(self.enriched.bytes)

    def _cost(self, count: int, bodies_bytes: int, rows_bytes: int, row_bytes: int, growth: float) -> int:
        """Functions see whole messages before they make others, which are ``growth`` times as large."""
        made = seen = bodies_bytes + rows_bytes
        if self._result_bytes is not None:
            made = seen + int(min(growth * seen, self._result_bytes * count))
        return MESSAGE_BYTES * count + int(COPIES * made) + FETCH_FACTOR * row_bytes


def _spread(rows_bytes: int, largest_bytes: int, count: int) -> tuple[int, int]:
    """For so many rows of which the bytes are guessed: what they may have in all, since a mean of few says little, and
    what one of them may have."""
    if count > 1:
        rows_bytes = int(rows_bytes * (1.05 + count**-0.5))
        largest_bytes = max(largest_bytes, rows_bytes // LARGEST_PART)
    return rows_bytes, largest_bytes

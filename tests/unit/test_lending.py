"""Credit for shaping among the batches of one sink: nobody starves, and nobody is in the way who need not be."""

from __future__ import annotations

import asyncio

import pytest
from store_support import StillClock
from test_shaping import a_batch

from spillway.chunk import Message
from spillway.flow.budget import SHAPING_EIGHTHS, Budget
from spillway.flow.lending import Lending

MANY = 5000
ROW_BYTES = 18_000.0
WAIT_SECONDS = 20.0


class Patient(StillClock):
    """Nothing has waited for too long."""

    def timeout(self, _seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(None)


class Batches:
    """Of one sink. Each ends when it is let go. ``began``: in this order."""

    def __init__(self) -> None:
        self.budget = Budget(128 << 20, sinks=1, shaped=1, shaping_eighths=SHAPING_EIGHTHS)
        self.lending = Lending(
            self.budget.shaping_share(), Patient(), 0, None, rereads=False, enriches=True, whole=False
        )
        self.lending.enriched.bytes = ROW_BYTES
        self.began: list[str] = []
        self.counts: dict[str, int] = {}
        self._more = asyncio.Event()
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def ask(self, name: str, messages: list[Message], row_bytes: int = 0) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._run(name, messages, row_bytes)))

    async def _run(self, name: str, messages: list[Message], row_bytes: int) -> None:
        known = {0: row_bytes} if row_bytes else {}
        async with self.lending.lent(messages, range(len(messages)), known, 1.0) as credit:
            self.began.append(name)
            self.counts[name] = credit.count
            self._more.set()
            await self._ends[name].wait()

    def end(self, name: str) -> None:
        self._ends[name].set()

    async def next(self) -> str:
        """The one that begins next."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self._more.wait()
        self._more.clear()
        return self.began[-1]

    async def ended(self) -> None:
        for end in self._ends.values():
            end.set()
        await asyncio.gather(*self._tasks)
        assert self.lending.share.held_bytes == 0


@pytest.fixture(scope="module")
def many() -> list[Message]:
    return list(a_batch(*map(str, range(MANY))))


async def test_small_batches_that_overlap_do_not_keep_a_large_one_waiting(many: list[Message]) -> None:
    batches = Batches()
    batches.ask("0", many[:5])
    assert await batches.next() == "0"
    batches.ask("large", many)
    for small in range(1, 100):
        batches.ask(str(small), many[:5])
        batches.end(str(small - 1))
        if await batches.next() == "large":
            break
    assert batches.began == ["0", "large"]
    assert batches.counts["large"] > MANY // 3
    batches.end("large")
    assert await batches.next() == "1"
    await batches.ended()


async def test_who_waits_and_is_cancelled_lets_the_others_go_on(many: list[Message]) -> None:
    batches = Batches()
    batches.ask("0", many[:5])
    assert await batches.next() == "0"
    batches.ask("large", many)
    batches.ask("1", many[:5])
    batches._tasks.pop(1).cancel()
    assert await batches.next() == "1"
    await batches.ended()


async def test_a_row_that_waits_for_the_delivery_pool_is_overtaken(many: list[Message]) -> None:
    """What it lacks may be held by those behind it."""
    batches = Batches()
    share, common = batches.lending.share, batches.budget.common
    assert common.try_take(common.limit_bytes)
    size = batches.lending.largest_row(many[0].body_bytes, (share.own.most_bytes + share.most_alone_bytes) // 2)
    batches.ask("row", many[:1], size)
    batches.ask("0", many[1:6])
    assert await batches.next() == "0"
    batches.end("0")
    common.give(common.limit_bytes)
    assert await batches.next() == "row"
    await batches.ended()

"""What buries a message: a rejection, at once or after its retries; but not what may befall any of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from invariants.world import World
from spillway.chunk import Batch
from spillway.sinks.base import Result, reject


@pytest.mark.parametrize(("reason", "attempts"), [("function_timeout", 3), ("mapping", 1)])
async def test_what_may_have_come_from_outside_buries_nobody_at_once(world: World, reason: str, attempts: int) -> None:
    """A lock, a machine that stood still, a signal to the worker: the next attempt may go through."""
    sink = world.sink("events", "events", on_reject="dead_letter", max_retry_count=0)
    asked: list[str] = []

    async def send(batch: Batch) -> Sequence[Result]:
        asked.extend(key for message in batch for key in message.keys)
        return [reject(reason) for _ in batch]

    sink.send = send  # type: ignore[method-assign]
    engine = await world.start()
    delivery = engine.deliveries["events"]
    world.postgres.commit(("insert", "a"))
    async with asyncio.timeout(20):
        while not delivery.counters.dead_letters:
            delivery.try_now()
            await asyncio.sleep(0.005)
    assert asked == ["public.t:a"] * attempts
    await world.end(engine)

"""I3: per (sink, key) messages take effect in commit order, also over parks, outages and crashes (replay closure)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from invariants.world import Engine, World

KEYS = "abcdef"


def load(world: World, transactions: int) -> None:
    """Transactions over few keys: inserts, updates, deletes, and moves of a row from one key to another."""
    dice = world.dice
    for _ in range(transactions):
        rows: list[tuple[str, str] | tuple[str, str, str]] = []
        for _ in range(dice.choice((1, 1, 1, 3, 12))):
            if dice.random() < 0.15:
                old, new = dice.sample(KEYS, 2)
                rows.append(("move", old, new))
            else:
                rows.append((dice.choice(("insert", "update", "delete")), dice.choice(KEYS)))
        world.postgres.commit(*rows)


def mischief(world: World) -> None:
    for sink in world.sinks.values():
        sink.trouble = world.dice.choice((0.0, 0.1, 0.4))
        sink.down = world.dice.random() < 0.2
        sink.bad = {f"public.t:{k}" for k in world.dice.sample(KEYS, world.dice.choice((0, 0, 1, 2)))}


def peace(world: World) -> None:
    for sink in world.sinks.values():
        sink.trouble, sink.down, sink.bad = 0.0, False, set()


@pytest.mark.parametrize("seed", range(12))
async def test_order_and_nothing_lost_under_mischief_and_crashes(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name, semantics in (("events", "events"), ("state", "state"), ("ordered", "ordered"), ("atomic", "atomic")):
        world.sink(name, semantics)  # type: ignore[arg-type]
    engine: Engine = await world.start()
    crashes = 0
    for _ in range(8):
        mischief(world)
        load(world, 15)
        await asyncio.sleep(world.dice.random() * 0.08)
        if world.dice.random() < 0.6:
            await world.crash(engine)
            crashes += 1
            engine = await world.start()
    peace(world)
    for delivery in engine.deliveries.values():
        delivery.try_now()
    await engine.settled()
    for name in world.sinks:
        world.judge(name, crashed=crashes > 0)
    await world.end(engine)
    assert engine.budget.held_bytes == 0

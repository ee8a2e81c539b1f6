"""`on_reject: latest_wins`: a newer whole image takes the place of the rejected ones of its key."""

from __future__ import annotations

import asyncio

import pytest

from invariants.world import World


@pytest.mark.parametrize("on_reject", ["latest_wins", "block"])
async def test_a_newer_image_frees_the_key_only_under_latest_wins(world: World, on_reject: str) -> None:
    sink = world.sink("index", "state", on_reject=on_reject)
    sink.bad = {"public.t:a"}
    engine = await world.start()
    delivery = engine.deliveries["index"]
    for _ in range(5):
        world.postgres.commit(("update", "a"), ("update", "b"))
    async with asyncio.timeout(20):
        while delivery.counters.messages != 5 or delivery.memory_messages:
            await asyncio.sleep(0.005)
    assert {keys for _, keys in sink.applied} == {("public.t:b",)}
    sink.applied.clear()
    sink.bad.clear()
    delivery.try_now()
    async with asyncio.timeout(20):
        while delivery.counters.messages:
            delivery.try_now()
            await asyncio.sleep(0.005)
    sent = [position[0] for position, keys in sink.applied if keys == ("public.t:a",)]
    lsns = [lsn for lsn, _, _ in world.postgres.transactions]
    assert sent == (lsns[-1:] if on_reject == "latest_wins" else lsns)
    await world.end(engine)
    assert engine.budget.held_bytes == 0


@pytest.mark.parametrize("partial_images", [False, True])
async def test_an_update_without_its_large_columns_is_the_newest_image_if_it_is_read_anew(
    world: World, partial_images: bool
) -> None:
    sink = world.sink("index", "state", on_reject="latest_wins", partial_images=partial_images)
    sink.bad = {"public.t:a"}
    engine = await world.start()
    delivery = engine.deliveries["index"]
    for action in ("update", "update", "partial", "partial"):
        world.postgres.commit((action, "a"))
    async with asyncio.timeout(20):
        while delivery.counters.messages != 4 or delivery.memory_messages:
            await asyncio.sleep(0.005)
    sink.bad.clear()
    async with asyncio.timeout(20):
        while delivery.counters.messages:
            delivery.try_now()
            await asyncio.sleep(0.005)
    lsns = [lsn for lsn, _, _ in world.postgres.transactions]
    assert [position[0] for position, _ in sink.applied] == (lsns[-1:] if partial_images else lsns[1:])
    await world.end(engine)

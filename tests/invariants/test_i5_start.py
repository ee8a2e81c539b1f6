"""I5: a start reads a fixed amount of state per sink and never scans: as many store reads before the first request with
10 messages waiting as with 50,000, whether they wait in the queue or under parked keys, and in about the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from invariants.instruments import put, script, sole, stored_span, until
from invariants.world import FastClock, World
from spillway.chunk import Batch, Message
from spillway.sinks.base import OK, Result
from spillway.store.base import Park, Write, Written
from spillway.store.sqlite import open_store

SPAN = 50  # messages: what a chunk of this world has at most
KINDS = ("queue", "parked", "one key", "dead letters")


def prepare(world: World, count: int, kind: str) -> None:
    """A state file with so many messages of the kind, beside ten that wait in the queue."""
    keys = ["hot" if kind == "one key" else f"k{n}" for n in range(1, count + 1)]
    spans = [stored_span(1 + start, keys[start : start + SPAN]) for start in range(0, count, SPAN)]
    with_store = open_store(world._state, FastClock())
    put(with_store, "sink", spans)
    done: Future[Written] | None = None
    for span in spans:
        messages = [Message(span, place) for place in range(len(span))]
        fate = [Park(m, "mapping", "", 3600.0) for m in messages]
        if kind == "parked":
            done = with_store.write(Write("sink", park=fate))
        elif kind == "dead letters":
            done = with_store.write(Write("sink", bury=fate))
        elif kind == "one key":
            done = with_store.write(Write("sink", park=fate[: span is spans[0]], hold=messages))
    if done is not None:
        done.result()
    if kind == "dead letters":
        put(with_store, "sink", [stored_span(count + 1, [f"w{n}" for n in range(10)])])
    with_store.close()
    world.postgres.confirmed_lsn = 1 << 40  # nothing of it is read again


async def reads_of_a_start(world: World) -> int:
    """Store reads when the sink is asked for the first time."""
    sink = script(world, "sink", lambda _: OK)
    sink.stalled = True
    engine = await world.start()
    reads: list[int] = []
    send = sink.send

    def counted(batch: Batch) -> Awaitable[Sequence[Result] | Result]:
        reads.append(engine.store.reads)
        return send(batch)

    sink.send = counted  # type: ignore[method-assign, assignment]
    await until(lambda: reads)
    sink.stalled = False
    await world.end(engine)
    return reads[0]


@pytest.mark.parametrize("kind", KINDS)
async def test_as_many_reads_before_the_first_request_whatever_waits(tmp_path: Path, kind: str) -> None:
    found = []
    for count in (10, 50_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        world = World(folder, seed=1)
        await asyncio.to_thread(prepare, world, count, kind)
        found.append(await reads_of_a_start(world))
    assert found[0] == found[1]
    assert found[0] < 20


async def test_the_first_page_is_bounded_whatever_waits(tmp_path: Path) -> None:
    world = World(tmp_path, seed=1)
    await asyncio.to_thread(prepare, world, 50_000, "queue")
    sink = script(world, "sink", lambda _: OK)
    sink.stalled = True
    async with world.running() as engine:
        await until(lambda: sink.requests == 3)
        assert sole(engine).memory_messages < 200
        assert engine.budget.held_bytes < 1 << 20


async def test_reads_grow_with_the_sinks_and_not_with_what_waits_elsewhere(tmp_path: Path) -> None:
    """The backlog of one sink costs the start of another nothing."""
    found = []
    for count in (10, 20_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        world = World(folder, seed=1)
        await asyncio.to_thread(prepare, world, count, "queue")
        script(world, "sink", lambda _: OK)
        other = script(world, "other", lambda _: OK)
        world.postgres.confirmed_lsn = 0
        async with world.running() as engine:
            engine.deliveries["sink"].paused = True
            world.postgres.commit(("insert", "a"))
            await until(lambda other=other: other.requests)
            found.append(engine.store.reads)
    assert abs(found[0] - found[1]) <= 2

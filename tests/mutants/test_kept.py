"""What the five mutants break, as it is kept: each at the one moment at which the defect shows, made to last.

The flow runs in the world of ``tests/invariants`` with a store whose commits can be held up: what is asked of it while
it is held becomes durable only when it is let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from invariants import world as the_world
from invariants.world import FakeSink, FakeStream, World
from spillway.flow.watermark import Watermark

LOOP_TURNS = 200  # of the event loop: far more than a message needs from one step to the next


class HeldStore:
    """A store whose writes wait while it is held; in all else the real one."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.held = False
        self.waiting: list[tuple[Any, Future[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, write: Any) -> Future[Any]:
        if not self.held:
            return self._store.write(write)
        future: Future[Any] = Future()
        self.waiting.append((write, future))
        return future

    def let_go(self) -> None:
        self.held = False
        for write, future in self.waiting:
            self._store.write(write).add_done_callback(lambda done, future=future: future.set_result(done.result()))
        self.waiting.clear()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, seed=1)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[HeldStore]:
    """The stores that the world opens, the newest last."""
    opened: list[HeldStore] = []
    open_store = the_world.open_store

    def open_held(path: Path, clock: the_world.FastClock) -> HeldStore:
        opened.append(HeldStore(open_store(path, clock)))
        return opened[-1]

    monkeypatch.setattr(the_world, "open_store", open_held)
    return opened


@pytest.fixture
def feedbacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every position that the world's Postgres is told."""
    told: list[int] = []
    send_feedback = FakeStream.send_feedback

    def tell(stream: FakeStream, write_lsn: int, flush_lsn: int, reply: bool = False) -> None:
        told.append(flush_lsn)
        send_feedback(stream, write_lsn, flush_lsn, reply)

    monkeypatch.setattr(FakeStream, "send_feedback", tell)
    return told


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.001)


async def turns() -> None:
    """Lets everything happen that can."""
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


def asked(sink: FakeSink) -> list[tuple[int, int]]:
    """Commit LSN and index of every message that the sink was sent, whatever it said."""
    return [position[:2] for batch in sink.asked for position, _ in batch]


def applied(sink: FakeSink) -> list[tuple[int, int]]:
    return [position[:2] for position, _ in sink.applied]


async def test_nothing_is_confirmed_before_its_commit_is_on_disk(
    world: World, stores: list[HeldStore], feedbacks: list[int]
) -> None:
    sink = world.sink("events", "events")
    sink.down = True
    async with world.running():
        stores[-1].held = True
        world.postgres.commit(("insert", "a"))
        await until(lambda: any(write.put for write, _ in stores[-1].waiting))
        before = len(feedbacks)
        await until(lambda: len(feedbacks) >= before + 3)
        assert world.postgres.confirmed_lsn < world.postgres.transactions[0][0]
        stores[-1].let_go()
        await until(lambda: world.postgres.confirmed_lsn >= world.postgres.transactions[0][1])


def test_what_is_confirmed_is_the_end_of_the_commit() -> None:
    watermark = Watermark(0)
    watermark.commit(100, 148, routed=True)
    assert watermark.advance(100) == 0
    assert watermark.advance(None) == 148


async def test_a_parked_key_is_not_overtaken_after_a_restart(world: World, stores: list[HeldStore]) -> None:
    sink = world.sink("events", "events")
    sink.bad = {"public.t:a"}
    engine = await world.start()
    world.postgres.commit(("insert", "a"))
    await until(lambda: engine.deliveries["events"].counters.parked_keys == 1)
    await world.crash(engine)
    engine = await world.start()
    world.postgres.commit(("update", "a"), ("insert", "b"))
    first, (lsn, _, _) = world.postgres.transactions[0][0], world.postgres.transactions[1]
    await until(lambda: (lsn, 1) in applied(sink))
    await turns()
    assert (lsn, 0) not in asked(sink)
    sink.bad = set()
    engine.deliveries["events"].try_now()
    await engine.settled()
    assert [at for at in applied(sink) if at[1] == 0] == [(first, 0), (lsn, 0)]
    await world.end(engine)


async def test_a_key_is_free_only_when_the_removal_of_its_row_has_committed(
    world: World, stores: list[HeldStore]
) -> None:
    sink = world.sink("events", "events")
    async with world.running() as engine:
        delivery = engine.deliveries["events"]
        delivery.paused = True
        world.postgres.commit(("insert", "a"), ("update", "a"))
        await until(lambda: delivery.counters.messages == 2)
        lsn = world.postgres.transactions[0][0]
        stores[-1].held = True
        delivery.paused = False
        delivery.wake()
        await until(lambda: any(write.resolved for write, _ in stores[-1].waiting))
        world.postgres.commit(("insert", "b"))  # a newcomer wakes the delivery, which looks for work
        later = (world.postgres.transactions[1][0], 0)
        await until(lambda: later in asked(sink) or any(write.put for write, _ in stores[-1].waiting))
        await turns()
        assert (lsn, 0) in applied(sink)
        assert (lsn, 1) not in asked(sink)
        stores[-1].let_go()
        await engine.settled()
    assert [at for at in applied(sink) if at != later] == [(lsn, 0), (lsn, 1)]


async def test_a_key_change_waits_for_the_old_key(world: World, stores: list[HeldStore]) -> None:
    sink = world.sink("events", "events")
    sink.bad = {"public.t:a"}
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"))
        await until(lambda: engine.deliveries["events"].counters.parked_keys == 1)
        # What is sent may be rejected for its old key or not be sent at all; it must not be sent.
        world.postgres.commit(("move", "a", "b"), ("insert", "c"))
        lsn = world.postgres.transactions[1][0]
        await until(lambda: (lsn, 1) in applied(sink))
        await turns()
        assert (lsn, 0) not in asked(sink)
        sink.bad = set()
        engine.deliveries["events"].try_now()
        await engine.settled()
    assert applied(sink)[-1] == (lsn, 0)


async def test_a_key_change_holds_the_old_key(world: World, stores: list[HeldStore]) -> None:
    sink = world.sink("events", "events")
    sink.bad = {"public.t:b"}
    async with world.running() as engine:
        world.postgres.commit(("move", "a", "b"))
        await until(lambda: engine.deliveries["events"].counters.parked_keys >= 1)
        world.postgres.commit(("insert", "a"), ("insert", "c"))
        lsn = world.postgres.transactions[1][0]
        await until(lambda: (lsn, 1) in applied(sink))
        await turns()
        assert (lsn, 0) not in asked(sink)
        sink.bad = set()
        engine.deliveries["events"].try_now()
        await engine.settled()
    assert applied(sink)[-1] == (lsn, 0)

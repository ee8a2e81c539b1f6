"""What the five mutants break, as it is kept: each at the one moment at which the defect shows, made to last.

The flow runs in the world of ``tests/invariants`` with a store whose commits can be held up: what is asked of it while
it is held becomes durable only when it is let go.
"""

from __future__ import annotations

import pytest

from invariants.instruments import HeldStore, turns, until
from invariants.world import FakeSink, FakeStream, World
from spillway.flow.watermark import Watermark


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
        await until(lambda: stores[-1].waits(lambda write: write.put))
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
        await until(lambda: stores[-1].waits(lambda write: write.resolved))
        world.postgres.commit(("insert", "b"))  # a newcomer wakes the delivery, which looks for work
        later = (world.postgres.transactions[1][0], 0)
        await until(lambda: later in asked(sink) or stores[-1].waits(lambda write: write.put))
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

"""A TRUNCATE is a barrier of its table: what was before it goes with it, nothing behind it overtakes it (I2, I3)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from invariants.instruments import HeldStore, positions, script, sole, turns, until
from invariants.world import Selection, World
from spillway.chunk import Message
from spillway.flow.health import judge
from spillway.sinks.base import OK, Result, reject, retry, sink_down
from spillway.store.base import Select

TRUNCATES = Selection(truncates=True)


def unless(bad: set[str]) -> Callable[[Message], Result]:
    return lambda m: OK if bad.isdisjoint(m.keys) else reject("constraint")


async def test_a_lane_that_falls_due_while_the_drop_commits_is_not_sent(world: World, stores: list[HeldStore]) -> None:
    bad = {"public.t:a"}
    sink = script(world, "rows", unless(bad), "atomic", TRUNCATES)
    async with world.running() as engine:
        delivery, store = sole(engine), stores[-1]
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.counters.parked_keys == 1 and not delivery._retrying)
        delivery._lane_at = delivery.lane_throttle.not_before = float("inf")
        bad.clear()
        store.held = True
        world.postgres.commit(("truncate", "t"))
        await until(lambda: store.waits(lambda w: w.drop_table_below))
        delivery.try_now()
        await until(lambda: not delivery._retrying or delivery._lane_waits)
        await turns()
        store.let_go()
        await engine.settled()
    assert [keys for _, keys in sink.applied] == [()]


async def test_what_is_blocked_before_a_truncate_of_its_batch_goes_with_it(world: World) -> None:
    sink = script(
        world, "rows", lambda m: reject("constraint") if m.change.action == "insert" else OK,
        "atomic", TRUNCATES, on_reject="dead_letter",
    )  # fmt: skip
    world.postgres.chunks = (60,)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"), ("update", "a"), ("truncate", "t"), ("update", "b"))
        await engine.settled()
    assert [at for _, at in positions(sink.applied)] == [2, 3]


@pytest.mark.parametrize("refusal", [reject("locked"), retry("locked")])
async def test_nothing_overtakes_a_truncate_that_is_refused(world: World, refusal: Result) -> None:
    refused = [refusal]
    sink = script(
        world, "rows", lambda m: refused[0] if refused and m.change.action == "truncate" else OK, "atomic", TRUNCATES
    )
    world.postgres.chunks = (60,)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"), ("truncate", "t"), ("insert", "b"))
        await until(lambda: delivery.breaker.failures > 2)
        world.postgres.commit(("insert", "c"))
        await until(lambda: delivery.breaker.failures > 4)
        assert judge(delivery, 0.0)[:2] == ("down", "locked")
        assert delivery.counters.parked_keys == 0
        refused.clear()
        await engine.settled()
    got = positions(sink.applied)
    assert got == sorted(got)
    assert len(set(got)) == 4


async def test_a_lane_does_not_overtake_a_truncate(world: World) -> None:
    bad, down = {"public.t:a"}, [True]

    def answer(message: Message) -> Result:
        if message.change.action == "truncate" and down:
            return sink_down("locked")
        return unless(bad)(message)

    sink = script(world, "rows", answer, "atomic", TRUNCATES)
    world.postgres.chunks = (60,)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.counters.parked_keys == 1)
        world.postgres.commit(("truncate", "t"), ("update", "a"))
        await until(lambda: delivery.counters.messages + delivery.memory_messages >= 3 and delivery.breaker.open)
        bad.clear()
        failures = delivery.breaker.failures
        delivery.try_now()
        await until(lambda: delivery.breaker.failures > failures + 2)
        assert [at for at, _ in sink.applied if at[:2] == (world.postgres.transactions[1][0], 1)] == []
        down.clear()
        await engine.settled()
    assert positions(sink.applied)[-2:] == [
        (world.postgres.transactions[1][0], 0),
        (world.postgres.transactions[1][0], 1),
    ]


async def test_a_head_that_is_discarded_while_it_is_read_is_not_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"public.t:a"}
    sink = script(world, "events", unless(bad))
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.counters.parked_keys == 1)
        bad.clear()
        read, go = threading.Event(), threading.Event()
        due = engine.store.due

        def slow(*given: object) -> object:
            heads = due(*given)  # type: ignore[arg-type]
            if heads and not go.is_set():
                read.set()
                go.wait(20)
            return heads

        monkeypatch.setattr(engine.store, "due", slow)
        await until(read.is_set)
        assert await delivery.discard(Select(key="public.t:a")) == 1
        world.postgres.commit(("update", "a"))
        await until(lambda: len(sink.applied) == 1)
        go.set()
        await until(lambda: not delivery._retrying)
        await engine.settled()
    assert positions(sink.applied) == [(world.postgres.transactions[1][0], 0)]


async def test_lanes_keep_to_the_size_of_batches_that_the_sink_takes(world: World) -> None:
    bad, sizes = [True], []
    sink = script(world, "events", lambda _: reject("mapping") if bad else OK, batch_size=50)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(*(("insert", f"k{n}") for n in range(60)))
        await until(lambda: (delivery.try_now(), delivery.counters.parked_keys == 60)[1])
        await until(lambda: not delivery._retrying)
        delivery._lane_at = delivery.lane_throttle.not_before = float("inf")
        delivery.batch_size.refused(8)
        before = len(sink.asked)
        bad.clear()
        delivery.try_now()
        await until(lambda: len(sink.asked) > before + 1)
        sizes = [len(batch) for batch in sink.asked[before : before + 2]]
        await engine.settled()
    assert max(sizes) <= 8


async def test_a_piece_that_fits_no_limit_any_more_stops_its_sink_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = script(world, "a", lambda _: OK), script(world, "b", lambda _: OK)
    async with world.running() as engine:
        delivery = engine.deliveries["a"]
        delivery.paused = True
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.stored and not delivery._puts)
        share = type(delivery._share)
        most = share.most_bytes
        monkeypatch.setattr(
            share,
            "most_bytes",
            property(lambda s: 1 if s is delivery._share else most.fget(s)),  # type: ignore[attr-defined]
        )
        delivery.paused = False
        delivery.try_now()
        await until(lambda: delivery.breaker.failures > 2)
        state, reason, _ = judge(delivery, 0.0)
        assert state == "down" and reason.startswith("memory_limit") and "raise memory.limit_mb" in reason
        world.postgres.commit(("insert", "b"))
        await until(lambda: len(other.applied) == 2)
        assert not first.applied
        monkeypatch.undo()
        await engine.settled()
    assert len(first.applied) == 2

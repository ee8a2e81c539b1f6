"""I7: reading stops only for want of credit, at a declared block, or at a full state disk; every wait has a deadline or
a named reason; replies to keepalives and status updates go out on a timer of their own, whatever else is blocked.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from invariants.instruments import (
    HeldStore,
    RecordedStream,
    Script,
    commit_sized,
    script,
    sole,
    until,
)
from invariants.world import FastClock, World
from spillway.errors import SourceUnavailable
from spillway.flow.limits import Limits
from spillway.sinks.base import OK, reject, sink_down


async def replies(streams: list[RecordedStream], times: int = 3) -> None:
    """A keepalive that asks for a reply gets it; status updates come by themselves."""
    for _ in range(times):
        told = len(streams[-1].told)
        await until(lambda told=told: len(streams[-1].told) > told, "feedback goes on")


async def test_feedback_goes_on_while_reading_waits_for_credit(world: World, streams: list[RecordedStream]) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        await until(lambda: engine.capture.connected)
        pool = engine.budget.capture
        await until(lambda: pool.try_take(pool.limit_bytes))
        world.postgres.commit(("insert", "a"))
        await until(lambda: engine.capture.why_waiting.startswith("memory"))
        since = engine.capture.waiting_since
        await replies(streams)
        assert engine.capture.waiting_since == since
        pool.give(pool.limit_bytes)
        await engine.settled()
        await until(lambda: engine.capture.why_waiting == "")


async def test_feedback_goes_on_while_a_block_holds_the_slot(world: World, streams: list[RecordedStream]) -> None:
    script(world, "s", lambda _: sink_down("refused"), limits=Limits(max_messages=3))
    async with world.running() as engine:
        for n in range(5):
            world.postgres.commit(("insert", f"a{n}"))
        await until(lambda: sole(engine).counters.messages >= 3)
        await sole(engine).check_limits()
        world.postgres.commit(("insert", "b"))
        await until(lambda: engine.capture.why_waiting.startswith("blocked"))
        await replies(streams)


async def test_feedback_goes_on_while_the_state_disk_takes_nothing(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    """Neither puts nor marks commit: what was covered before is repeated, and no more."""
    sink = script(world, "s", lambda _: OK)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"))
        await engine.settled()
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[0][1])
        stores[-1].held = stores[-1].holds_mark = True
        for n in range(20):  # beyond the mark
            world.postgres.commit(("insert", f"b{n}"))
        await until(lambda: any(method == "write_identity" for method, _, _ in stores[-1].waiting))
        await replies(streams, 5)
        covered = stores[-1].real.identity("slot").mark
        assert world.postgres.confirmed_lsn <= covered
        await until(lambda: engine.capture.why_waiting != "", "the wait has a name")
        stores[-1].holds_mark = False
        stores[-1].let_go()
        await engine.settled()
        assert len(sink.applied) == 21
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])


async def test_feedback_goes_on_while_a_keepalive_beyond_the_mark_waits_for_it(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"))
        await engine.settled()
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[0][1])
        before = world.postgres.confirmed_lsn
        stores[-1].held = stores[-1].holds_mark = True
        streams[-1].say(1 << 40)
        await until(lambda: stores[-1].waiting)
        await replies(streams, 5)
        assert world.postgres.confirmed_lsn == before
        stores[-1].holds_mark = False
        stores[-1].let_go()
        await until(lambda: world.postgres.confirmed_lsn == 1 << 40)


async def test_an_idle_connection_sends_status_updates(world: World, streams: list[RecordedStream]) -> None:
    script(world, "s", lambda _: OK)
    async with world.running():
        await until(lambda: streams)
        await replies(streams, 5)


async def test_a_reply_that_is_asked_for_comes_at_once(world: World, streams: list[RecordedStream]) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        await until(lambda: streams and engine.capture.connected)
        for _ in range(10):
            told = len(streams[-1].told)
            streams[-1].say(0, reply_requested=True)
            await until(lambda told=told: len(streams[-1].told) > told)


async def test_a_request_that_stalls_times_out_and_the_sink_is_probed(world: World) -> None:
    sink = script(world, "s", lambda _: OK, timeout_seconds=5.0)
    sink.stalled = True
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"))
        began = FastClock().monotonic()
        await until(lambda: delivery.breaker.open)
        assert delivery.breaker.reason == "timeout"
        assert FastClock().monotonic() - began < 60
        await until(lambda: sink.requests >= 4, "probes go on")
        sink.stalled = False
        await engine.settled()
        assert not delivery.breaker.open
        assert delivery.counters.parked_keys == 0
        assert {batch[0][0] for batch in sink.asked} == {(1100, 0, 0)}


@pytest.mark.parametrize("phase", ["open", "send"])
async def test_opening_is_under_the_same_deadline(world: World, phase: str) -> None:
    sink = script(world, "s", lambda _: OK, timeout_seconds=2.0)
    never = asyncio.Event()
    hanging = asyncio.Event()

    async def hang(*_: object) -> None:
        hanging.set()
        await never.wait()

    plain = getattr(sink, phase)
    setattr(sink, phase, hang)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"))
        await hanging.wait()
        await until(lambda: sole(engine).breaker.failures >= 2)
        setattr(sink, phase, plain)
        await engine.settled()
        assert len(sink.applied) == 1


def moments_of(sink: Script) -> list[float]:
    """When the sink is asked from now on."""
    moments: list[float] = []
    send = sink.send

    async def timed(batch: object) -> object:
        moments.append(FastClock().monotonic())
        return await send(batch)  # type: ignore[arg-type]

    sink.send = timed  # type: ignore[method-assign, assignment]
    return moments


async def test_probes_of_a_failing_sink_come_at_least_every_thirty_seconds(world: World) -> None:
    sink = script(world, "s", lambda _: sink_down("refused"))
    moments = moments_of(sink)
    async with world.running():
        world.postgres.commit(("insert", "a"))
        await until(lambda: len(moments) >= 14)
    pauses = [b - a for a, b in itertools.pairwise(moments)]
    assert max(pauses) < 30
    assert pauses[-1] > 5, "and no more often than that, after a while"


async def test_a_held_key_is_retried_at_least_every_three_minutes(world: World) -> None:
    sink = script(world, "s", lambda _: reject("mapping"))
    moments = moments_of(sink)
    async with world.running():
        world.postgres.commit(("insert", "a"))
        await until(lambda: len(moments) >= 10)
    pauses = [b - a for a, b in itertools.pairwise(moments)]
    assert max(pauses) < 180
    assert pauses[-1] > 60


async def test_a_source_that_is_down_is_a_named_wait_that_grows_old(
    world: World, streams: list[RecordedStream]
) -> None:
    """Each attempt to connect is not a new wait: else a source that is down for hours would look as if it were read."""
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        capture = engine.capture
        await until(lambda: capture.connected and capture.why_waiting == "")
        connect, attempts = capture._connect, 0

        async def refuse() -> object:
            nonlocal attempts
            attempts += 1
            raise SourceUnavailable("connection_refused", "nobody listens")

        capture._connect = refuse  # type: ignore[assignment]
        streams[-1].is_cut = True
        began = FastClock().monotonic()
        await until(lambda: attempts >= 6)
        assert "nobody listens" in capture.why_waiting or capture.why_waiting == "connecting"
        assert not capture.connected
        assert capture.last_error is not None
        assert "nobody listens" in capture.last_error
        assert capture.waiting_since <= began + 5, "it is the same wait"
        capture._connect = connect
        world.postgres.commit(("insert", "a"))
        await engine.settled()
        assert capture.last_error is None


@pytest.mark.parametrize("semantics", ["events", "ordered"])
async def test_nobody_waits_for_credit_that_is_held_by_those_who_wait(world: World, semantics: str) -> None:
    """Retries, pages and caches of all sinks compete for less credit than they want; all of them end."""
    world.limit_bytes = 256 << 10
    sinks = [
        script(world, f"s{n}", lambda _: reject("mapping"), semantics=semantics, max_message_bytes=30_000)
        for n in range(4)
    ]
    async with world.running() as engine:
        for n in range(12):
            commit_sized(world, *((f"k{i}", 200 if i % 3 else 14_000) for i in range(n, n + 6)))
        await until(lambda: all(d.counters.messages for d in engine.deliveries.values()))
        for sink in sinks:
            sink.answer = lambda _: OK
        for delivery in engine.deliveries.values():
            delivery.try_now()
        await engine.settled()
        assert engine.held_bytes == 0
    assert all(len({p for p, _ in sink.applied}) == 72 for sink in sinks)

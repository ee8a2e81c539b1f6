"""I6: a sink that is down, slow, paused, broken or full never delays another sink or the reading of the slot, except
under a declared ``on_full: block`` or a full state disk, and then every sink of the slot says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from invariants.instruments import Script, commit_sized, positions, script, turns, until
from invariants.world import FastClock, World
from spillway.chunk import Message
from spillway.flow import readback
from spillway.flow.health import judge
from spillway.flow.limits import Limits
from spillway.sinks.base import OK, Result, reject, retry, sink_down


def crashing(_: Message) -> Result:
    raise RuntimeError("a defect of this sink")


def hangs(sink: Script) -> None:
    sink.stalled = True


def answers(answer: Callable[[Message], Result]) -> Callable[[Script], None]:
    def break_it(sink: Script) -> None:
        sink.answer = answer

    return break_it


TROUBLES: dict[str, Callable[[Script], None]] = {
    "hangs": hangs,
    "is down": answers(lambda _: sink_down("refused")),
    "rejects everything": answers(lambda _: reject("mapping")),
    "asks to retry everything": answers(lambda _: retry("busy")),
    "has a defect": answers(crashing),
}


async def flows_past(world: World, well: Script, transactions: int = 60) -> None:
    """The well sink gets everything, and the slot is read to its end without one wait."""
    before = len(well.applied)
    for n in range(transactions):
        world.postgres.commit(*(("insert", f"k{n}-{i}") for i in range(5)))
        await asyncio.sleep(0)
    await until(lambda: len(well.applied) == before + 5 * transactions, "the well sink has everything")


@pytest.mark.parametrize("semantics", ["events", "state", "ordered", "atomic"])
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_one_sink_in_trouble_and_the_others_flow(world: World, trouble: str, semantics: str) -> None:
    broken = script(world, "broken", lambda _: OK, semantics=semantics)
    well = script(world, "well", lambda _: OK)
    TROUBLES[trouble](broken)
    async with world.running() as engine:
        waits: set[str] = set()
        wait = engine.capture._wait
        engine.capture._wait = lambda why: (waits.add(why), wait(why))  # type: ignore[method-assign, assignment, func-returns-value]
        await flows_past(world, well)
        # By the watermark: what the broken one has not delivered is on disk and does not hold the slot.
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
        assert not {why for why in waits if why.startswith(("blocked", "memory"))}
        assert engine.deliveries["broken"].counters.messages > 200 or broken.applied
        await until(lambda: not engine.deliveries["well"].counters.messages)
        broken.stalled, broken.answer = False, lambda _: OK
        engine.deliveries["broken"].try_now()
        await engine.settled()
    world.judge("broken", crashed=True)


async def test_a_paused_sink_delays_nobody(world: World) -> None:
    script(world, "paused", lambda _: OK)
    well = script(world, "well", lambda _: OK)
    async with world.running() as engine:
        await engine.deliveries["paused"].pause()
        await flows_past(world, well)
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
        assert engine.deliveries["paused"].counters.messages == 300


async def test_a_sink_that_is_full_and_steps_aside_delays_nobody(world: World) -> None:
    script(world, "full", lambda _: sink_down("refused"), limits=Limits(max_messages=10, on_full="pause"))
    well = script(world, "well", lambda _: OK)
    async with world.running() as engine:
        await flows_past(world, well, 10)
        full = engine.deliveries["full"]
        await until(lambda: full.counters.messages == 50)
        await full.check_limits()
        await flows_past(world, well)
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
        assert full.counters.messages == 50, "it takes nothing more"
        assert not any(d.blocks for d in engine.deliveries.values())


async def test_a_declared_block_holds_the_slot_says_so_and_ends_with_room(world: World) -> None:
    broken = script(world, "broken", lambda _: sink_down("refused"), limits=Limits(max_messages=10))
    well = script(world, "well", lambda _: OK)
    async with world.running() as engine:
        full = engine.deliveries["broken"]
        for n in range(10):
            world.postgres.commit(("insert", f"a{n}"))
        await until(lambda: full.counters.messages == 10)
        await full.check_limits()
        for n in range(10):
            world.postgres.commit(("insert", f"b{n}"))
        await until(lambda: engine.capture.why_waiting.startswith("blocked"))
        assert "broken" in engine.capture.why_waiting
        assert "max_messages is 10" in engine.capture.why_waiting
        state, reason, remedy = judge(full, FastClock().monotonic())
        assert (state, "not read" in reason, "discard broken" in remedy) == ("full", True, True)
        await turns()  # one chunk was taken before the block was looked at
        held = len(well.applied)
        await turns()
        assert len(well.applied) == held < 20
        broken.answer = lambda _: OK
        full.try_now()
        await until(lambda: full.counters.messages == 0)
        await full.check_limits()
        await engine.settled()
        assert len(well.applied) == len(broken.applied) == 20


async def test_a_block_that_nobody_lifts_aloud_ends_all_the_same(world: World) -> None:
    """The reading side looks for itself, every second."""
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        delivery = engine.deliveries["s"]
        delivery.full = "for the test"
        delivery._judge_limits = lambda: None  # type: ignore[method-assign]
        world.postgres.commit(("insert", "a"))
        world.postgres.commit(("insert", "b"))
        await until(lambda: engine.capture.why_waiting.startswith("blocked"))
        delivery._moved = lambda: None  # nobody tells it
        delivery.full = None
        await engine.settled()


async def test_a_full_state_disk_is_said_on_every_sink(world: World) -> None:
    script(world, "one", lambda _: OK)
    script(world, "other", lambda _: OK, limits=Limits(max_messages=10, on_full="pause"))
    async with world.running() as engine:
        engine.store.disk_full_since = 1.0
        for delivery in engine.deliveries.values():
            await asyncio.wait_for(delivery.check_limits(), 10)
            state, reason, _ = judge(delivery, FastClock().monotonic())
            assert state == "full"
            assert "disk" in reason
            assert "not read" in reason
            assert delivery.blocks
            assert delivery.gap is None, "nothing is missed while nothing is read"
        engine.store.disk_full_since = None
        for delivery in engine.deliveries.values():
            await delivery.check_limits()
            assert not delivery.blocks


async def test_stalled_sinks_with_jumbo_messages_leave_every_other_its_guarantee(world: World) -> None:
    world.limit_bytes = 1 << 20
    stalled = [script(world, f"stalled{n}", lambda _: OK, max_message_bytes=200_000) for n in range(5)]
    well = script(world, "well", lambda _: OK)
    async with world.running() as engine:
        for sink in stalled:
            sink.stalled = True
        for n in range(6):
            commit_sized(world, (f"jumbo{n}", 60_000), *((f"k{n}-{i}", 300) for i in range(10)))
        engine.deliveries["well"].paused = True  # so that what it gets has to come over the delivery pool
        commit_sized(world, *((f"z{i}", 300) for i in range(50)))
        await until(lambda: engine.deliveries["well"].counters.messages >= 50)
        await until(lambda: all(sink.requests for sink in stalled))
        engine.deliveries["well"].paused = False
        engine.deliveries["well"].wake()
        await until(lambda: len(well.applied) == 6 * 11 + 50, "the well sink has everything")
        assert all(not sink.applied for sink in stalled)
        for sink in stalled:
            sink.stalled = False
        await engine.settled()


async def test_what_a_stalled_sink_has_read_ahead_is_given_up_for_a_jumbo_message(world: World) -> None:
    """It is only a cache: whoever waits for credit gets it, although the request of the other never ends."""
    world.limit_bytes = 1 << 20
    stalled = script(world, "stalled", lambda _: OK, semantics="ordered", timeout_seconds=1e6, batch_size=20)
    stalled.stalled = True
    well = script(world, "well", lambda _: OK, max_message_bytes=150_000)
    async with world.running() as engine:
        slow, fast = engine.deliveries["stalled"], engine.deliveries["well"]
        slow.paused = fast.paused = True
        for n in range(20):
            commit_sized(world, *((f"k{n}-{i}", 5000) for i in range(3)))
        await until(lambda: slow.counters.messages == fast.counters.messages == 60)
        fast.paused = False
        fast.wake()
        await until(lambda: len(well.applied) == 60)
        commit_sized(world, ("jumbo", 78_000))
        fast.paused = True
        await until(lambda: fast.counters.messages == 1 or len(well.applied) == 61)
        slow.paused = False
        slow.wake()
        await until(lambda: stalled.requests and slow.window.waiting, "it has read ahead")
        commit_sized(world, ("another", 78_000))
        await until(lambda: fast.counters.messages or len(well.applied) == 62)
        least = 2 * 78_000
        common = engine.budget.common
        missing = least - fast._share.guaranteed_bytes
        await until(lambda: common.held_bytes + missing > common.limit_bytes, "the other has read ahead")
        fast.paused = False
        fast.wake()
        await until(lambda: len(well.applied) == 62, "the jumbo messages are delivered")
        assert not stalled.applied
        stalled.stalled = False
        await engine.settled()


async def test_twenty_five_sinks_and_one_of_each_trouble(world: World) -> None:
    wells = [script(world, f"well{n}", lambda _: OK) for n in range(20)]
    for name, break_it in TROUBLES.items():
        break_it(script(world, name.replace(" ", "-"), lambda _: OK))
    async with world.running() as engine:
        for n in range(40):
            world.postgres.commit(*(("insert", f"k{n}-{i}") for i in range(3)))
        await until(lambda: all(len(well.applied) == 120 for well in wells))
        for well in wells:
            assert len(set(positions(well.applied))) == 120
        assert engine.budget.held_bytes <= engine.budget.limit_bytes


async def test_a_sink_of_small_requests_reads_its_page_once_though_others_wait_for_credit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readback, "KEEP_SECONDS", 60.0)  # the clock of this world is fast
    world.limit_bytes = 1 << 20
    sink = script(world, "small", lambda _: OK, batch_size=1)
    async with world.running() as engine:
        delivery = engine.deliveries["small"]
        delivery.paused = True
        commit_sized(world, *((f"k{i}", 100) for i in range(60)))
        await until(lambda: delivery.counters.messages == 60)
        common = engine.budget.common
        assert common.try_take(1)
        waits = asyncio.create_task(common.take(common.limit_bytes))
        await until(lambda: delivery._share.contended)
        reads = engine.store.reads
        delivery.paused = False
        delivery.wake()
        await until(lambda: len(sink.applied) == 60)
        assert engine.store.reads - reads < 15, engine.store.reads - reads
        common.give(1)
        await waits
        common.give(common.limit_bytes)

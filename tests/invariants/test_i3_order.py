"""I3: per (sink, key) messages take effect in commit order, also over parks, outages and crashes (replay closure)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from invariants.instruments import (
    HeldStore,
    RecordedStream,
    asked,
    positions,
    script,
    sole,
    turns,
    until,
)
from invariants.world import SPEED, Engine, FastClock, Selection, World
from spillway.change import Action
from spillway.sinks.base import OK, reject, sink_down

KEYS = "abcdef"


def load(world: World, transactions: int) -> None:
    """Transactions over few keys: inserts, updates, deletes, and moves of a row from one key to another."""
    dice = world.dice
    for _ in range(transactions):
        rows: list[tuple[str, str] | tuple[str, str, str]] = []
        for _ in range(dice.choice((1, 1, 1, 3, 12))):
            table = dice.choice(("", "", "", "u:"))
            if dice.random() < 0.15:
                old, new = dice.sample(KEYS, 2)
                rows.append(("move", table + old, table + new))
            else:
                rows.append((dice.choice(("insert", "update", "delete")), table + dice.choice(KEYS)))
        world.postgres.commit(*rows)


def mischief(world: World) -> None:
    for sink in world.sinks.values():
        sink.trouble = world.dice.choice((0.0, 0.1, 0.4))
        sink.down = world.dice.random() < 0.2
        keys = [f"public.{table}:{key}" for table in "tu" for key in (*KEYS, "group 0")]
        sink.bad = set(world.dice.sample(keys, world.dice.choice((0, 0, 2, 4))))


def peace(world: World) -> None:
    for sink in world.sinks.values():
        sink.trouble, sink.down, sink.bad = 0.0, False, set()


async def play(world: World, rounds: int) -> None:
    engine: Engine = await world.start()
    crashes = 0
    for _ in range(rounds):
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


@pytest.mark.parametrize("seed", range(12))
async def test_order_and_nothing_lost_under_mischief_and_crashes(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name in ("events", "state", "ordered", "atomic"):
        world.sink(name, name)  # type: ignore[arg-type]
    await play(world, rounds=8)


@pytest.mark.parametrize("seed", range(100, 108))
async def test_the_same_for_sinks_that_want_parts_of_the_stream_by_orders_of_their_own(
    worlds: Callable[[int], World], seed: int
) -> None:
    world = worlds(seed)
    changes: frozenset[Action] = frozenset({"insert", "update"})
    world.sink("one table", "events", Selection(tables=("u",)))
    world.sink("no deletes", "events", Selection(actions=changes))
    world.sink("rows without deletes", "state", Selection(actions=changes))
    world.sink("by group", "events", Selection(groups_of=("t",)))
    world.sink("by group, a line at a time", "ordered", Selection(groups_of=("t", "u")))
    world.sink("in no order", "events", Selection(grouping=False))
    world.sink("lines in no order", "ordered", Selection(grouping=False, tables=("t",)))
    await play(world, rounds=5)


@pytest.mark.parametrize("seed", range(200, 206))
async def test_the_same_when_many_keys_have_the_same_hash(
    worlds: Callable[[int], World], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.chunk.crc32", lambda key: sum(key) % 3)
    world = worlds(seed)
    for name in ("events", "state", "ordered"):
        world.sink(name, name)  # type: ignore[arg-type]
    world.sink("by group", "events", Selection(groups_of=("t",)))
    await play(world, rounds=6)


# -- one moment at a time ----------------------------------------------------------------------------------------------
async def test_while_the_head_of_a_key_waits_the_others_flow_and_its_own_queue_behind_it(world: World) -> None:
    sink = script(world, "events", lambda m: reject("mapping") if m.keys == ("public.t:a",) else OK)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.counters.parked_keys == 1)
        for _ in range(20):
            world.postgres.commit(("update", "a"), ("update", "b"))
        await until(lambda: len(sink.applied) == 20)
        await until(lambda: delivery.counters.messages == 21)
        head = (world.postgres.transactions[0][0], 0)
        assert {at for at in asked(sink) if at[1] == 0} == {head}
        assert delivery.counters.parked_keys == 1
        sink.answer = lambda _: OK
        delivery.try_now()
        await engine.settled()
        assert [at for at in positions(sink.applied) if at[1] == 0] == [
            (lsn, 0) for lsn, _, _ in world.postgres.transactions
        ]


async def test_a_batch_of_rows_and_newcomers_is_not_done_before_the_removal_of_its_rows(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    """Replay closure: a death now would bring the row again; then the newcomer must come again, too."""
    sink = script(world, "events", lambda _: OK)
    sink.max_in_flight = 1
    sink.stalls = {"public.t:x"}
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "x"))
        await until(lambda: delivery.counters.messages == 1)
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.counters.messages == 2)
        await until(lambda: not delivery.stored, "read back, and direct again")
        world.postgres.commit(("insert", "b"))
        await until(lambda: delivery.memory_messages == 3)
        delivery._spill = lambda *_: None  # type: ignore[method-assign]  # the newcomer stays without a row
        sink.stalls = {"public.t:a"}
        await until(lambda: sink.requests == 2)
        assert len(sink.asked[-1]) == 2, "a and b share a batch"
        stores[-1].held = True
        sink.stalls = set()
        await until(lambda: stores[-1].waits(lambda w: w.resolved))
        await turns()
        streams[-1].say(9999, reply_requested=True)
        told = len(streams[-1].told)
        await until(lambda: len(streams[-1].told) > told)
        assert world.postgres.confirmed_lsn < world.postgres.transactions[2][0]
        stores[-1].let_go()
        await engine.settled()


async def test_an_ordered_sink_stops_at_the_culprit_and_goes_on_without_its_key(world: World) -> None:
    sink = script(world, "file", lambda m: reject("constraint") if "public.t:b" in m.keys else OK, semantics="ordered")
    async with world.running() as engine:
        world.postgres.commit(*(("insert", key) for key in "abcd"), ("update", "b"), ("update", "a"))
        await until(lambda: len(set(positions(sink.applied))) == 4)
        await until(lambda: sole(engine).counters.messages == 2 and sole(engine).counters.parked_keys == 1)
        assert {i for _, i in positions(sink.applied)} == {0, 2, 3, 5}
        sink.answer = lambda _: OK
        sole(engine).try_now()
        await engine.settled()
        assert [i for _, i in positions(sink.applied)][-2:] == [1, 4]


async def test_a_state_sink_gets_the_newest_image_and_never_an_older_one_after_it(world: World) -> None:
    sink = script(world, "index", lambda _: OK, semantics="state")
    async with world.running() as engine:
        sink.stalled = True
        world.postgres.commit(("insert", "a"))
        await until(lambda: sink.requests == 1)
        for _ in range(30):
            world.postgres.commit(("update", "a"))
        await until(lambda: sole(engine).counters.messages == 31)
        sink.stalled = False
        await engine.settled()
        got = positions(sink.applied)
        assert got == sorted(got)
        assert got[-1] == (world.postgres.transactions[-1][0], 0)
        assert len(got) < 10, "what was superseded was not sent"


async def test_a_restart_asks_for_the_head_of_a_key_before_anything_later_of_it(world: World) -> None:
    sink = script(world, "events", lambda m: reject("mapping") if m.keys == ("public.t:a",) else OK)
    engine = await world.start()
    world.postgres.commit(("insert", "a"), ("update", "a"), ("update", "a"))
    await until(lambda: sole(engine).counters.messages == 3)
    await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[0][1])
    for _ in range(3):
        await world.crash(engine)
        sink.asked.clear()
        engine = await world.start()
        world.postgres.commit(("update", "a"), ("insert", "b"))
        # What was delivered right before the crash may come again, and before the head.
        await until(lambda: (1100, 0) in asked(sink) and len(sink.asked) >= 2)
        await turns()
        assert {at for at in asked(sink) if at[0] == world.postgres.transactions[0][0]} == {(1100, 0)}
    sink.answer = lambda _: OK
    sole(engine).try_now()
    await engine.settled()
    await world.end(engine)
    got = [p for p, keys in sink.applied if keys == ("public.t:a",)]
    assert got == [p for p, keys in world.history("events") if keys == ("public.t:a",)]


async def test_the_head_of_two_lanes_waits_for_an_earlier_row_that_is_on_its_way_into_one_of_them(
    world: World, stores: list[HeldStore]
) -> None:
    sink = script(world, "events", lambda _: reject("mapping"), batch_size=1)
    sink.stalls = {"public.t:a"}
    engine = await world.start()
    world.postgres.commit(("insert", "b"), ("insert", "a"), ("move", "a", "b"))
    await until(lambda: sole(engine).counters.parked_keys == 2 and sole(engine).counters.messages == 3)
    assert sole(engine).counters.queued == 1, "the insert of a is in flight, from the queue"
    await world.crash(engine)
    sink.stalls, sink.answer = set(), lambda _: OK
    sink.asked.clear()
    engine = await world.start()
    delivery = sole(engine)
    delivery.queue_throttle.not_before = float("inf")
    await until(lambda: len(sink.applied) == 1 and not delivery._in_flight, "the insert of b")
    delivery.lane_throttle.not_before = float("inf")
    await until(lambda: not delivery._retrying)
    stores[-1].held = True
    delivery.queue_throttle.not_before = 0.0
    delivery.wake()
    await until(lambda: stores[-1].waits(lambda w: w.hold), "the insert of a was read")
    reads = engine.store.reads
    delivery.lane_throttle.not_before = delivery._lane_at = 0.0
    delivery.wake()
    await until(lambda: engine.store.reads > reads + 4, "the lanes are looked at")
    await turns()
    assert len(sink.asked) == 1
    stores[-1].let_go()
    await engine.settled()
    await world.end(engine)
    assert [i for _, i in positions(sink.applied)] == [0, 1, 2]


# -- very many keys for one reason -------------------------------------------------------------------------------------
async def test_five_thousand_rejected_keys_cost_some_hundred_attempts_and_drain_fast_when_mended(
    world: World,
) -> None:
    keys = [f"k{n}" for n in range(5000)]
    sink = script(world, "index", lambda _: reject("strict_dynamic_mapping_exception"), semantics="state")
    world.specs["index"] |= {"batch_size": 100}
    async with world.running() as engine:
        delivery = sole(engine)
        for start in range(0, 5000, 50):
            world.postgres.commit(*(("insert", key) for key in keys[start : start + 50]))
        await until(lambda: delivery.counters.messages == 5000)
        await until(lambda: delivery.queue_throttle.narrow)
        began = FastClock().monotonic()
        await until(lambda: FastClock().monotonic() - began > 180)  # three minutes of the flow's time
        assert sum(map(len, sink.asked)) < 900
        assert delivery.counters.messages == 5000
        tried = {key for batch in sink.asked for _, (key,) in batch}
        assert keys[-1] in {key.rsplit(":", 1)[1] for key in tried}, "the newest is probed"
        sink.answer = lambda _: OK
        began = FastClock().monotonic()
        await engine.settled()
        assert FastClock().monotonic() - began < 25 + 50 * 4, "the next probe comes within 25 s, then it drains"
        assert len({key for _, (key,) in sink.applied}) == 5000


async def test_good_keys_flow_between_very_many_that_are_rejected(world: World) -> None:
    sink = script(world, "index", lambda m: reject("mapping") if "bad" in m.keys[0] else OK, semantics="state")
    async with world.running() as engine:
        for n in range(0, 2000, 50):
            world.postgres.commit(*(("insert", f"bad{n + i}") for i in range(50)))
        await until(lambda: sole(engine).queue_throttle.narrow)
        world.postgres.commit(*(("insert", f"good{n}") for n in range(300)))
        await until(lambda: len(sink.applied) == 300)
        assert sum(map(len, sink.asked)) < 300 + 4000


@pytest.mark.parametrize("trouble", ["rejects", "down"])
async def test_the_first_request_comes_within_two_seconds_of_a_restart(world: World, trouble: str) -> None:
    answer = reject("mapping") if trouble == "rejects" else sink_down("refused")
    sink = script(world, "index", lambda _: answer, semantics="state")
    engine = await world.start()
    for n in range(0, 1000, 50):
        world.postgres.commit(*(("insert", f"k{n + i}") for i in range(50)))
    delivery = sole(engine)
    await until(lambda: delivery.counters.messages == 1000)
    narrow = (
        (lambda: delivery.queue_throttle.streak > 14) if trouble == "rejects" else lambda: delivery.breaker.failures > 8
    )
    await until(narrow, "the next probe by itself is far away")
    await world.crash(engine)
    before = sink.requests
    began = FastClock().monotonic()
    engine = await world.start()
    await until(lambda: sink.requests > before)
    # Two seconds of a real clock; this one is fifty times as fast, and opening the file is not.
    assert (FastClock().monotonic() - began) / SPEED < 2
    await world.end(engine)

"""I2: every routed message at or below a sink's position is resolved, waits in the store, is a dead letter, or lies in
a gap that was durable before the position passed it. What people remove is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from invariants.disk import on_disk
from invariants.instruments import (
    HeldStore,
    RecordedStream,
    Script,
    asked,
    commit_sized,
    positions,
    script,
    sole,
    state_file,
    turns,
    until,
)
from invariants.test_i3_order import load, mischief, peace
from invariants.world import Engine, Selection, World
from spillway.chunk import Span
from spillway.errors import SpillwayError
from spillway.flow.delivery import Delivery
from spillway.flow.limits import Limits
from spillway.flow.parking import Parked
from spillway.sinks.base import OK, reject, retry, sink_down
from spillway.store.base import Select

SMALL = Limits(max_messages=3, on_full="pause")


async def into_the_gap(world: World, delivery: Delivery) -> None:
    """Five messages wait, two more than may: the gap opens behind them and is durable."""
    for key in "abcde":
        world.postgres.commit(("insert", key))
    await until(lambda: delivery.counters.messages == 5)
    await delivery.check_limits()
    await until(lambda: delivery.gap is not None and on_disk(state_file(world), delivery.name).gap is not None)


# -- dead letters ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stored", [False, True])
async def test_a_row_that_is_too_large_is_a_dead_letter_with_key_size_and_reason(world: World, stored: bool) -> None:
    sink = script(world, "events", lambda _: OK, max_message_bytes=1000)
    async with world.running() as engine:
        delivery = sole(engine)
        delivery.paused = stored
        if stored:
            world.postgres.commit(("insert", "first"))
            await until(lambda: delivery.stored and delivery.counters.messages == 1)
        commit_sized(world, ("a", 100), ("large", 5000), ("b", 100))
        await until(lambda: delivery.counters.dead_letters == 1)
        delivery.paused = False
        delivery.wake()
        await engine.settled()
        (letter,) = engine.store.dead("events", None, 10)
        assert (letter.key, letter.reason) == ("public.t:large", "too_large")
        assert "5000 bytes" in letter.detail
        assert letter.bytes == 5000
        assert [k for _, keys in sink.applied for k in keys if k != "public.t:first"] == ["public.t:a", "public.t:b"]
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])


@pytest.mark.parametrize(("count", "attempts"), [(0, 1), (2, 3)])
async def test_retries_that_are_used_up_end_in_a_dead_letter(world: World, count: int, attempts: int) -> None:
    sink = script(world, "events", lambda m: retry("busy", "try later") if m.keys == ("public.t:a",) else OK)
    world.specs["events"]["max_retry_count"] = count
    engine = await world.start()
    world.postgres.commit(("insert", "a"), ("insert", "b"), ("update", "a"))
    await until(lambda: sole(engine).counters.dead_letters == 2)
    lsn = world.postgres.transactions[0][0]
    assert [at for at in asked(sink) if at != (lsn, 1)] == [(lsn, 0)] * attempts + [(lsn, 2)] * attempts
    assert positions(sink.applied) == [(lsn, 1)]
    await world.crash(engine)
    async with world.running() as again:
        (letters,) = again.store.dead("events", None, 10)
        assert (letters.messages, letters.attempts, letters.reason) == (2, attempts, "busy")
        assert letters.detail == "try later"
        await again.settled()


async def test_on_reject_dead_letter_buries_rejections_and_retries_the_rest(world: World) -> None:
    answers = {"public.t:a": reject("mapping", "no such field"), "public.t:b": retry("busy")}
    sink = script(world, "events", lambda m: answers.get(m.keys[0], OK), on_reject="dead_letter")
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"), ("insert", "b"), ("insert", "c"), ("update", "a"))
        delivery = sole(engine)
        await until(lambda: delivery.counters.dead_letters == 2)
        await until(lambda: delivery.counters.parked_keys == 1)
        (letters,) = engine.store.dead("events", None, 10)
        assert (letters.key, letters.reason, letters.messages) == ("public.t:a", "mapping", 2)
        answers.clear()
        delivery.try_now()
        await engine.settled()
        assert sorted(i for _, i in positions(sink.applied)) == [1, 2]


async def test_a_logged_error_is_no_resolution(world: World) -> None:
    """A sink whose code breaks, or that answers for too few messages, has resolved nothing."""
    failures = [RuntimeError("defect"), SpillwayError("sink_broken", "cannot")]

    def broken(_: object) -> object:
        if failures:
            raise failures.pop()
        return OK

    sink = script(world, "events", broken)  # type: ignore[arg-type]
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"), ("insert", "b"))
        await engine.settled()
    assert not failures
    assert sorted(positions(sink.applied)) == [(world.postgres.transactions[0][0], n) for n in (0, 1)]


# -- gaps --------------------------------------------------------------------------------------------------------------
async def test_a_gap_is_durable_before_anything_it_swallows_is_confirmed(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    async with world.running() as engine:
        delivery = sole(engine)
        for key in "abcde":
            world.postgres.commit(("insert", key))
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
        stores[-1].held = True
        limits = asyncio.create_task(delivery.check_limits())
        await until(lambda: stores[-1].waits(lambda w: w.gap))
        assert not delivery.participates
        world.postgres.commit(("insert", "swallowed"))
        await until(lambda: engine.capture.received_lsn == world.postgres.transactions[-1][1])
        for _ in range(3):
            told = len(streams[-1].told)
            streams[-1].say(0, reply_requested=True)
            await until(lambda told=told: len(streams[-1].told) > told)
        assert world.postgres.confirmed_lsn <= world.postgres.transactions[-2][1]
        stores[-1].let_go()
        await limits
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
        assert on_disk(state_file(world), "events").gap == (world.postgres.transactions[4][0], None)


async def test_a_gap_outlives_a_crash_and_ends_behind_all_that_was_missed(
    world: World, streams: list[RecordedStream]
) -> None:
    sink = script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    engine = await world.start()
    await into_the_gap(world, sole(engine))
    for key in "vwx":
        world.postgres.commit(("insert", key))
    await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
    await world.crash(engine)
    missed = {lsn for lsn, _, _ in world.postgres.transactions[5:]}
    async with world.running() as engine:
        delivery = sole(engine)
        assert not delivery.participates
        await until(lambda: engine.capture.connected)
        sink.answer = lambda _: OK
        await delivery.resume(engine.capture.received_lsn)
        first, last = on_disk(state_file(world), "events").gap or (0, 0)
        assert last is not None
        assert all(first < lsn <= last for lsn in missed), f"{sorted(missed)} are missed, the gap is {first} to {last}"
        world.postgres.commit(("insert", "y"))
        await engine.settled()
        assert not missed & {lsn for lsn, _ in asked(sink)}
        assert positions(sink.applied)[-1] == (world.postgres.transactions[-1][0], 0)


async def test_what_comes_while_a_gap_is_being_closed_is_taken_or_inside(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    sink = script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    async with world.running() as engine:
        delivery = sole(engine)
        await into_the_gap(world, delivery)
        world.postgres.commit(("insert", "missed"))
        await until(lambda: engine.capture.received_lsn == world.postgres.transactions[-1][1])
        sink.answer = lambda _: OK
        stores[-1].held = True
        closing = asyncio.create_task(delivery.resume(engine.capture.received_lsn))
        await until(lambda: stores[-1].waits(lambda w: w.gap))
        world.postgres.commit(("insert", "during"))
        await until(lambda: engine.capture.received_lsn == world.postgres.transactions[-1][1])
        stores[-1].let_go()
        await closing
        await engine.settled()
        gap = delivery.gap
        assert gap is not None
        assert gap.last_lsn is not None
        took = {lsn for lsn, _ in positions(sink.applied)}
        for lsn, _, _ in world.postgres.transactions:
            assert lsn in took or gap.first_lsn < lsn <= gap.last_lsn, f"{lsn} is nowhere: {gap}"


async def test_a_transaction_that_is_cut_by_the_end_of_a_gap_lies_inside(
    world: World, streams: list[RecordedStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.flow.capture.CHUNK_CHANGES", 4)
    sink = script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    async with world.running() as engine:
        delivery = sole(engine)
        await into_the_gap(world, delivery)
        sink.answer = lambda _: OK
        intake, closings = delivery.intake, []

        def intake_and_close(span: Span, parked: Parked | None) -> object:
            written = intake(span, parked)
            if not closings and span.first_lsn == world.postgres.transactions[-1][0]:
                closings.append(asyncio.create_task(delivery.resume(engine.capture.received_lsn)))
            return written

        delivery.intake = intake_and_close  # type: ignore[method-assign, assignment]
        world.postgres.commit(*(("insert", f"k{n}") for n in range(12)))
        await until(lambda: engine.capture.received_lsn == world.postgres.transactions[-1][1])
        await closings[0]
        await engine.settled()
        lsn = world.postgres.transactions[-1][0]
        assert 0 < sum(at[0] == lsn for at in positions(sink.applied)) < 12
        assert delivery.gap is not None
        assert delivery.gap.last_lsn is not None
        assert delivery.gap.last_lsn >= lsn, "part of the transaction was missed, and the gap does not say so"


async def test_a_gap_cannot_be_closed_before_the_slot_was_met(world: World) -> None:
    """Right after a start nobody knows yet how far the slot was confirmed in the life before."""
    script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    async with world.running() as engine:
        delivery = sole(engine)
        await into_the_gap(world, delivery)
        with pytest.raises(SpillwayError, match="again"):
            await delivery.resume(0)
        assert not delivery.participates


async def test_what_waits_before_a_gap_is_delivered(world: World) -> None:
    """A sink in a gap takes no part in the slot; what it has is delivered as soon as the sink is well."""
    sink = script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    async with world.running() as engine:
        delivery = sole(engine)
        await into_the_gap(world, delivery)
        sink.answer = lambda _: OK
        await engine.settled()
        assert len(sink.applied) == 5
        assert not delivery.participates
        await delivery.resume(engine.capture.received_lsn)
        await delivery.check_limits()
        assert delivery.participates


async def test_a_second_gap_does_not_hide_the_first(world: World) -> None:
    sink = script(world, "events", lambda _: sink_down("refused"), limits=SMALL)
    async with world.running() as engine:
        delivery = sole(engine)
        await into_the_gap(world, delivery)
        first = delivery.gap
        assert first is not None
        world.postgres.commit(("insert", "missed"))
        await until(lambda: engine.capture.received_lsn == world.postgres.transactions[-1][1])
        sink.answer = lambda _: OK
        await delivery.resume(engine.capture.received_lsn)
        await engine.settled()
        await delivery.check_limits()
        assert delivery.full is None
        sink.answer = lambda _: sink_down("refused")
        await into_the_gap(world, delivery)
        await until(lambda: not delivery.participates)
        await until(lambda: on_disk(state_file(world), "events").gap == (first.first_lsn, None))
        await delivery.resume(engine.capture.received_lsn)
        assert delivery.gap.first_lsn == first.first_lsn
        await delivery.resume(0)
        assert delivery.gap is None
        assert on_disk(state_file(world), "events").gap is None


async def test_with_a_full_backlog_that_blocks_nothing_is_missed(world: World) -> None:
    sink = script(world, "events", lambda _: sink_down("refused"), limits=Limits(max_messages=3))
    async with world.running() as engine:
        delivery = sole(engine)
        for key in "abcde":
            world.postgres.commit(("insert", key))
        await until(lambda: delivery.counters.messages == 5)
        await delivery.check_limits()
        assert delivery.blocks
        for key in "fghij":
            world.postgres.commit(("insert", key))
        await until(lambda: engine.capture.why_waiting.startswith("blocked"))
        assert delivery.gap is None
        sink.answer = lambda _: OK
        delivery.try_now()
        await until(lambda: delivery.counters.messages == 0)
        await delivery.check_limits()
        await until(lambda: len(sink.applied) == 10)
        assert sorted(positions(sink.applied)) == [(lsn, 0) for lsn, _, _ in world.postgres.transactions]


# -- TRUNCATE ---------------------------------------------------------------------------------------------------------
TRUNCATES = Selection(truncates=True)


async def test_a_truncate_takes_along_what_waits_of_its_table_and_nothing_else(world: World) -> None:
    sink = script(world, "rows", lambda m: reject("constraint") if "public.t:a" in m.keys or "public.u:a" in m.keys
                  else OK, semantics="atomic", selection=TRUNCATES)  # fmt: skip
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"), ("update", "a"), ("insert", "u:a"), ("insert", "b"))
        await until(lambda: delivery.counters.parked_keys == 2 and delivery.counters.messages == 3)
        world.postgres.commit(("update", "a"), ("truncate", "t"), ("insert", "c"))
        await until(lambda: delivery.counters.messages == 1 and not delivery.memory_messages)
        assert [w.key for w in engine.store.held("rows", None, 10)] == ["public.u:a"]
        sink.answer = lambda _: OK
        delivery.try_now()
        await engine.settled()
        first, second = (lsn for lsn, _, _ in world.postgres.transactions)
        await until(lambda: len(sink.applied) == 4)
        assert positions(sink.applied) == [(first, 3), (second, 1), (second, 2), (first, 2)]
        assert engine.held_bytes == 0


async def test_a_retry_that_waited_for_a_truncate_is_not_sent_after_it(world: World) -> None:
    sink = script(world, "rows", lambda _: reject("constraint"), semantics="atomic", selection=TRUNCATES)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"))
        await until(lambda: delivery.counters.parked_keys == 1)
        delivery.lane_throttle.not_before = float("inf")  # until it is told to
        await until(lambda: not delivery._retrying)
        sink.answer, sink.stalled, before = (lambda _: OK), True, sink.requests
        world.postgres.commit(("truncate", "t"), ("insert", "b"))
        await until(lambda: sink.requests > before and sink.asked[-1][0][1] == ())
        delivery.try_now()
        await until(lambda: delivery._lane_waits)
        sink.stalled = False
        await engine.settled()
        lsn = world.postgres.transactions[1][0]
        assert positions(sink.applied) == [(lsn, 0), (lsn, 1)]
        assert engine.held_bytes == 0


async def test_a_truncate_that_is_ignored_is_counted(world: World) -> None:
    sink = script(world, "events", lambda _: OK)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"), ("truncate", "t"), ("truncate", "u"), ("update", "a"))
        await engine.settled()
        assert [i for _, i in positions(sink.applied)] == [0, 3]
        assert sole(engine).truncates_ignored == 2


# -- what people do ----------------------------------------------------------------------------------------------------
def rejecting(world: World) -> Script:
    """Everything is rejected: a and b by their mapping, others by 422."""
    return script(world, "events", lambda m: reject("mapping" if m.keys[0][-1] in "ab" else "http_422"))


async def test_discards_are_counted_and_are_what_was_meant(world: World) -> None:
    rejecting(world)
    async with world.running() as engine:
        delivery, store = sole(engine), engine.store
        world.postgres.commit(*(("insert", key) for key in "abcd"))
        world.postgres.commit(*(("update", key) for key in "abcd"))
        await until(lambda: delivery.counters.parked_keys == 4 and delivery.counters.messages == 8)
        await until(lambda: not delivery._in_flight)
        assert await delivery.discard(Select(key="public.t:a")) == 2
        assert {w.key: w.messages for w in store.held("events", None, 10)} == {f"public.t:{key}": 2 for key in "bcd"}
        await until(lambda: not delivery._in_flight)
        assert await delivery.discard(Select(reason="mapping")) == 2
        assert [w.key for w in store.held("events", None, 10)] == ["public.t:c", "public.t:d"]
        await until(lambda: not delivery._in_flight)
        assert await delivery.discard(Select(all=True)) == 4
        assert (delivery.counters.messages, delivery.counters.parked_keys, delivery.counters.bytes) == (0, 0, 0)
        assert delivery.counters.dead_letters == 0
        world.postgres.commit(("insert", "z"))
        await until(lambda: delivery.counters.parked_keys == 1, "the flow goes on")


async def test_a_discard_spares_what_is_in_flight(world: World) -> None:
    sink = script(world, "events", lambda _: OK)
    async with world.running() as engine:
        delivery = sole(engine)
        delivery.paused = True
        world.postgres.commit(*(("insert", f"k{n}") for n in range(60)))
        await until(lambda: delivery.counters.messages == 60)
        sink.stalled = True
        delivery.paused = False
        delivery.wake()
        await until(lambda: sink.requests == 3)
        in_flight = set(asked(sink))
        discarded = await delivery.discard(Select(all=True))
        sink.stalled = False
        await engine.settled()
        assert discarded == 60 - len(in_flight)
        assert set(positions(sink.applied)) == in_flight
        assert engine.held_bytes == 0


async def test_a_retry_by_command_asks_at_once(world: World) -> None:
    sink = rejecting(world)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(*(("insert", key) for key in "abcd"))
        await until(lambda: delivery.counters.parked_keys == 4)
        for attempts in range(8):  # far enough in the back-off that nothing comes by itself
            await until(lambda: not delivery._in_flight and not delivery._retrying)
            await delivery.retry(Select(all=True))
            await until(lambda n=attempts: min(_attempts(engine).values()) >= n + 2)
        before = _attempts(engine)
        await until(lambda: not delivery._in_flight)
        assert await delivery.retry(Select(key="public.t:d")) == 1
        await until(lambda: _attempts(engine)["public.t:d"] > before["public.t:d"])
        assert await delivery.retry(Select(reason="mapping")) == 2
        await until(lambda: all(_attempts(engine)[k] > before[k] for k in ("public.t:a", "public.t:b")))
        sink.answer = lambda _: OK
        assert await delivery.retry(Select(all=True)) == 4
        await engine.settled()
        assert len(sink.applied) == 4


def _attempts(engine: Engine) -> dict[str, int]:
    return {w.key: w.attempts for w in engine.store.held("events", None, 100)}


async def test_a_dead_letter_that_is_revived_goes_behind_what_waits_of_its_key(world: World) -> None:
    sink = script(world, "events", lambda _: reject("mapping"), max_retry_count=0)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "a"), ("insert", "b"))
        await until(lambda: delivery.counters.dead_letters == 2)
        await delivery.pause()
        world.postgres.commit(("update", "a"))
        await until(lambda: delivery.counters.messages == 1)
        sink.answer = lambda _: OK
        letters = engine.store.read_dead("events", Select(all=True), 0, 10)
        await delivery.revive([(letter.row, letter) for letter in letters])
        assert delivery.counters.dead_letters == 0
        assert delivery.counters.messages == 3
        assert sink.applied == [], "it is paused"
        await delivery.resume(0)
        await engine.settled()
        first, second = (lsn for lsn, _, _ in world.postgres.transactions)
        assert [at for at in positions(sink.applied) if at != (first, 1)] == [(second, 0), (first, 0)]
        assert (first, 1) in positions(sink.applied)
        assert engine.held_bytes == 0


async def test_a_paused_sink_takes_in_delivers_nothing_and_remembers_it(world: World) -> None:
    sink = script(world, "events", lambda _: OK)
    engine = await world.start()
    await sole(engine).pause()
    world.postgres.commit(("insert", "a"), ("insert", "b"))
    await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
    await world.crash(engine)
    async with world.running() as engine:
        delivery = sole(engine)
        assert engine.store.open_sink("events", "slot").paused is True
        delivery.paused = True  # as the engine does by what `open_sink` says
        await turns()
        assert not sink.asked
        assert delivery.counters.messages == 2
        await delivery.resume(0)
        await engine.settled()
        assert engine.store.open_sink("events", "slot").paused is False
    assert len(sink.applied) == 2


@pytest.mark.parametrize("seed", range(6))
async def test_everything_is_somewhere_after_mischief_crashes_and_commands(
    worlds: Callable[[int], World], seed: int
) -> None:
    """At the end: delivered, dead, or discarded; and what each of these counts is what is there."""
    world = worlds(seed)
    world.sink("events", "events", max_retry_count=1)
    world.sink("state", "state", max_retry_count=1)
    engine = await world.start()
    for _ in range(8):
        mischief(world)
        load(world, 15)
        await asyncio.sleep(world.dice.random() * 0.05)
        if world.dice.random() < 0.4:
            await engine.deliveries["events"].pause()
            await engine.deliveries["events"].resume(0)
        if world.dice.random() < 0.4:
            await world.crash(engine)
            engine = await world.start()
    peace(world)
    for delivery in engine.deliveries.values():
        delivery.try_now()
    await engine.settled()
    for name in ("events", "state"):
        disk = on_disk(state_file(world), name)
        delivery = engine.deliveries[name]
        assert not disk.waiting
        assert delivery.counters.dead_letters == len(disk.dead)
        applied = {p for p, _ in world.sinks[name].applied}
        if name == "events":
            assert {p for p, _ in world.history(name)} == applied | disk.dead
        else:
            last = {keys[0]: p for p, keys in world.history(name)}
            assert set(last.values()) <= applied | disk.dead
    await world.end(engine)

"""I1: a position is confirmed only when, by the committed state, everything at or below it is resolved or durable in
the store, for every sink; what is sent is the end of such a commit, or a keepalive's position; and it never goes back.

Durable means that fsync has returned; a failed fsync ends the process. Here against the small world, whose commits can
be held up; ``test_i1_servers.py`` asks a real server.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from invariants.disk import on_disk
from invariants.instruments import (
    HeldStore,
    RecordedStream,
    positions,
    script,
    sole,
    state_file,
    turns,
    until,
)
from invariants.test_i3_order import KEYS, load, mischief
from invariants.world import World
from spillway.errors import StoreFailed
from spillway.sinks.base import OK, reject, sink_down
from spillway.store.base import Write


async def heartbeat(streams: list[RecordedStream], times: int = 3) -> None:
    """Several feedback messages more."""
    before = len(streams[-1].told)
    await until(lambda: len(streams[-1].told) >= before + times, "feedback")


async def feedback_of_all_that_may_be(world: World, streams: list[RecordedStream]) -> int:
    """Ask for a reply three times; returns what is confirmed then."""
    for _ in range(3):
        before = len(streams[-1].told)
        streams[-1].say(0, reply_requested=True)
        await until(lambda before=before: len(streams[-1].told) > before, "a reply")
    return world.postgres.confirmed_lsn


async def test_not_while_the_commit_of_a_put_is_under_way(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    script(world, "down", lambda _: sink_down("refused"))
    async with world.running():
        world.postgres.commit(("insert", "a"))
        stores[-1].held = True
        await until(lambda: stores[-1].waits(lambda w: w.put))
        await turns()
        first = world.postgres.transactions[0]
        assert await feedback_of_all_that_may_be(world, streams) < first[0]
        stores[-1].let_go()
        await until(lambda: world.postgres.confirmed_lsn >= first[1], "it is durable")


async def test_not_while_the_commit_of_a_park_or_burial_is_under_way(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    sink = script(world, "rejects", lambda m: reject("mapping") if m.keys == ("public.t:a",) else OK, max_retry_count=0)
    async with world.running() as engine:
        stores[-1].held = True
        world.postgres.commit(("insert", "a"))
        await until(lambda: stores[-1].waits(lambda w: w.bury))
        await turns()
        first = world.postgres.transactions[0]
        assert await feedback_of_all_that_may_be(world, streams) < first[0]
        stores[-1].let_go()
        await until(lambda: world.postgres.confirmed_lsn >= first[1])
        await until(lambda: sole(engine).counters.dead_letters == 1)
        assert sink.applied == []


async def test_the_slowest_of_the_sinks_decides(world: World, streams: list[RecordedStream]) -> None:
    fast = script(world, "fast", lambda _: OK)
    slow = script(world, "slow", lambda _: OK)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"))
        await until(lambda: slow.applied and fast.applied)
        slow.stalled = True
        engine.deliveries["slow"]._spill = lambda *_: None  # type: ignore[method-assign]  # what spills is durable
        world.postgres.commit(("insert", "b"))
        await until(lambda: len(fast.applied) == 2 and slow.requests == 2)
        await turns()
        assert await feedback_of_all_that_may_be(world, streams) < world.postgres.transactions[1][0]
        slow.stalled = False
        await until(lambda: world.postgres.confirmed_lsn >= world.postgres.transactions[1][1])


async def test_the_oldest_message_decides_whatever_is_resolved_behind_it(
    world: World, streams: list[RecordedStream]
) -> None:
    sink = script(world, "events", lambda _: OK, batch_size=1)
    sink.stalls = {"public.t:a"}
    async with world.running() as engine:
        sole(engine)._spill = lambda *_: None  # type: ignore[method-assign]
        world.postgres.commit(("insert", "a"), ("insert", "b"))
        world.postgres.commit(("insert", "c"))
        await until(lambda: len(sink.applied) == 2)
        await turns()
        assert await feedback_of_all_that_may_be(world, streams) < world.postgres.transactions[0][0]
        sink.stalls = set()
        await until(lambda: world.postgres.confirmed_lsn >= world.postgres.transactions[1][1])


async def test_the_end_of_a_commit_is_sent_and_not_its_lsn(
    world: World, streams: list[RecordedStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedStream, "keepalives", False)
    sink = script(world, "events", lambda _: OK)
    async with world.running():
        for key in KEYS:
            world.postgres.commit(("insert", key))
            await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
        streams[-1].is_cut = True
        await until(lambda: len(streams) == 2)
        world.postgres.commit(("insert", "z"))
        await until(lambda: len(sink.applied) == len(KEYS) + 1)
        await turns()
    ends = {end for _, end, _ in world.postgres.transactions}
    assert set(streams[0].told) <= {0} | ends
    assert len(positions(sink.applied)) == len(set(positions(sink.applied))), "a confirmed transaction came again"


async def test_a_keepalive_moves_an_idle_slot_but_never_past_an_open_message(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    sink = script(world, "events", lambda _: OK)
    async with world.running() as engine:
        await until(lambda: streams)
        streams[-1].say(900)
        await until(lambda: world.postgres.confirmed_lsn == 900, "nothing is open: the keepalive counts")
        sink.stalled = True
        sole(engine)._spill = lambda *_: None  # type: ignore[method-assign]
        world.postgres.commit(("insert", "a"))
        await until(lambda: sink.requests)
        streams[-1].say(5000)
        assert await feedback_of_all_that_may_be(world, streams) < world.postgres.transactions[0][0]
        sink.stalled = False
        await until(lambda: world.postgres.confirmed_lsn == 5000)


async def test_a_keepalive_inside_of_a_transaction_does_not_count(world: World, streams: list[RecordedStream]) -> None:
    script(world, "events", lambda _: OK)
    async with world.running():
        await until(lambda: streams)
        stream = streams[-1]
        world.postgres.commit(("insert", "a"), ("insert", "b"))
        plain_next = stream.next

        def next_frame() -> object:
            frame = plain_next()
            if len(stream._frames) == 3:  # to come: an insert, the commit, a keepalive
                stream.next = plain_next  # type: ignore[method-assign]
                stream.say(9999, reply_requested=True)
            return frame

        stream.next = next_frame  # type: ignore[method-assign, assignment]
        await until(lambda: world.postgres.confirmed_lsn >= world.postgres.transactions[0][1])
        assert await feedback_of_all_that_may_be(world, streams) < 9999


async def test_never_back_over_reconnects(world: World, streams: list[RecordedStream]) -> None:
    sink = script(world, "events", lambda _: OK)
    flaky = script(world, "flaky", lambda m: reject("mapping") if world.dice.random() < 0.3 else OK)
    async with world.running() as engine:
        for turn in range(6):
            load(world, 10)
            await heartbeat(streams or await _connected(streams), 1)
            if turn % 2:
                streams[-1].is_cut = True
                opened = len(streams)
                await until(lambda opened=opened: len(streams) > opened, "a new connection")
        flaky.answer = lambda _: OK
        for delivery in engine.deliveries.values():
            delivery.try_now()
        await engine.settled()
        await until(lambda: world.postgres.confirmed_lsn == world.postgres.transactions[-1][1])
    told = [lsn for stream in streams for lsn in stream.told]
    assert told == sorted(told)
    assert len(streams) >= 4
    assert set(positions(sink.applied)) == {p[:2] for p, _ in world.history("events")}


async def _connected(streams: list[RecordedStream]) -> list[RecordedStream]:
    await until(lambda: streams)
    return streams


@pytest.mark.parametrize("seed", range(4))
async def test_what_is_confirmed_is_at_the_sink_or_on_disk(worlds: Callable[[int], World], seed: int) -> None:
    """At any moment under mischief: read what Postgres was told, then what the disk has and the sinks applied."""
    world = worlds(seed)
    names = ("events", "ordered", "atomic")  # where every message counts
    for name in names:
        world.sink(name, name, max_retry_count=world.dice.choice((None, 2)))  # type: ignore[arg-type]
    engine = await world.start()
    looked = 0
    for _ in range(30):
        mischief(world)
        load(world, 4)
        await asyncio.sleep(world.dice.random() * 0.02)
        confirmed = world.postgres.confirmed_lsn
        ends = {lsn: end for lsn, end, _ in world.postgres.transactions}
        for name in names:
            disk = on_disk(state_file(world), name)
            known = {p for p, _ in world.sinks[name].applied} | disk.waiting | disk.dead
            lost = [p for p, _ in world.history(name) if ends[p[0]] <= confirmed and p not in known]
            assert not lost, f"{name}: confirmed up to {confirmed}, but {lost} are nowhere"
            looked += confirmed > 0
        if world.dice.random() < 0.3:
            await world.crash(engine)
            engine = await world.start()
    assert looked > 30
    await world.end(engine)


class FailingDatabase:
    """The writer's connection, whose commits fail from now on as after a failed fsync."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *given: Any) -> Any:
        if self.fails and statement == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return self._db.execute(statement, *given)


async def test_after_a_failed_fsync_nothing_is_confirmed_and_the_store_says_that_it_failed(
    world: World, stores: list[HeldStore], streams: list[RecordedStream]
) -> None:
    script(world, "down", lambda _: sink_down("refused"))
    engine = await world.start()
    real = stores[-1].real
    real._db = database = FailingDatabase(real._db)
    database.fails = True
    world.postgres.commit(("insert", "a"))
    with pytest.raises(StoreFailed):
        await asyncio.wait_for(asyncio.wrap_future(real.failed), 20)
    await turns()
    assert all(lsn < world.postgres.transactions[0][0] for lsn in streams[-1].told)
    with pytest.raises(StoreFailed):
        await asyncio.wrap_future(real.write(Write("down")))
    engine.task.cancel()
    await asyncio.gather(engine.task, return_exceptions=True)
    await asyncio.to_thread(real.close)


async def test_the_last_feedback_is_sent_though_changes_are_on_their_way(world: World) -> None:
    """What comes before the server's answer is passed over: a stop under load confirms what was delivered."""
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        world.postgres.commit(("insert", "a"))
        await engine.settled()
        delivered = world.postgres.transactions[-1][1]
        for n in range(50):
            world.postgres.commit(*(("insert", f"b{n}-{i}") for i in range(20)))
        async with asyncio.timeout(20):
            await engine.capture.last_feedback()
        assert world.postgres.confirmed_lsn >= delivered

"""I4: every payload byte in memory is covered by a credit that was taken before it was held; the sum never exceeds the
process limit; no call skips the check; and everything is given back.

Every change of every pool and share is watched: `WatchedPool` and `WatchedShare` stand in for theirs and judge each
assignment of what is held.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from invariants.instruments import (
    HeldStore,
    RecordedStream,
    commit_sized,
    script,
    sole,
    turns,
    until,
)
from invariants.test_i3_order import load, mischief, peace
from invariants.world import Engine, World
from spillway.chunk import MESSAGE_OVERHEAD_BYTES, Span
from spillway.flow import budget as the_budget
from spillway.flow.budget import Budget, Pool, Share
from spillway.flow.delivery import Delivery
from spillway.flow.inflow import Process
from spillway.sinks.base import OK, reject, sink_down


class WatchedPool(Pool):
    most_held = 0

    @property
    def held_bytes(self) -> int:
        return self._held

    @held_bytes.setter
    def held_bytes(self, size_bytes: int) -> None:
        assert 0 <= size_bytes <= self.limit_bytes, f"the {self.name} pool holds {size_bytes} of {self.limit_bytes}"
        self._held = size_bytes
        self.most_held = max(self.most_held, size_bytes)


class WatchedShare(Share):
    _from_common = 0
    _held = 0

    @property
    def held_bytes(self) -> int:
        return self._held

    @held_bytes.setter
    def held_bytes(self, size_bytes: int) -> None:
        assert size_bytes >= 0, "a share was given more than was taken"
        covered = self.guaranteed_bytes + self._from_common
        assert size_bytes <= covered, f"a share holds {size_bytes}, and its credit is {covered}"
        self._held = size_bytes


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_budget, "Pool", WatchedPool)
    monkeypatch.setattr(the_budget, "Share", WatchedShare)


def in_memory(delivery: Delivery) -> Counter[Span]:
    """How many messages of which spans a delivery's window holds."""
    window = delivery.window
    found: Counter[Span] = Counter()
    for batch in window._flying.values():
        for span, start, stop in batch.pieces:
            found[span] += stop - start
        found.update(m.span for m in batch.superseded)
    for span, start, stop in window._waiting():
        found[span] += stop - start
    return found


def covered(engine: Engine) -> None:
    """The bodies that windows hold are not more than the credit that was taken for them."""
    held = {delivery: in_memory(delivery) for delivery in engine.deliveries.values()}
    spans = [span for counts in held.values() for span in counts]
    assert all(bool(span.credit) != span.windowed for span in spans), "each span is covered by one of the pools"
    shared = {span.chunk for span in spans if span.windowed}
    own = sum(MESSAGE_OVERHEAD_BYTES * len(span) for span in spans if span.windowed)
    assert sum(chunk.cost for chunk in shared) + own <= engine.budget.window.held_bytes
    for delivery, counts in held.items():
        assert all(count <= span.held <= len(span) for span, count in counts.items())
        assert all(span.chunk.count for span in counts), "what is held is there"
        read_back = [span for span in counts if span.credit]
        assert all(2 * len(span.chunk.data) <= span.credit for span in read_back)
        assert sum(span.credit for span in read_back) <= delivery._share.held_bytes
        windowed = {span.chunk for span in counts if span.windowed}
        assert sum(span.credit for span in read_back) + sum(c.cost for c in windowed) <= delivery.memory_bytes
        assert counts.total() <= delivery.memory_messages  # more: on its way past the window to disk
    assert engine.budget.held_bytes <= engine.budget.limit_bytes


async def all_given_back(engine: Engine) -> None:
    budget = engine.budget
    await until(lambda: engine.held_bytes == 0, "everything is given back")
    assert budget.common.held_bytes == budget.window.held_bytes == 0
    assert budget.capture.held_bytes == engine.capture._libpq_bytes <= budget.capture.limit_bytes // 3
    assert all(share.held_bytes == 0 and share._from_common == 0 for share in budget._shares)
    assert all(d.memory_bytes == 0 and d.memory_messages == 0 for d in engine.deliveries.values())


@pytest.mark.parametrize("seed", range(6))
async def test_never_above_the_limit_under_mischief_and_all_given_back(
    worlds: Callable[[int], World], seed: int, watched: None
) -> None:
    world = worlds(seed)
    world.limit_bytes = 256 << 10  # so small that everybody waits for everybody
    for name in ("events", "state", "ordered", "atomic"):
        spec = {"max_memory_bytes": 40_000, "max_messages": 60, "max_message_bytes": 16_000}
        world.sink(name, name, **spec)  # type: ignore[arg-type]
    engine = await world.start()
    for turn in range(6):
        mischief(world)
        load(world, 15)
        commit_sized(world, *((f"big{turn}-{n}", world.dice.randrange(100, 20_000)) for n in range(4)))
        for _ in range(20):
            await asyncio.sleep(world.dice.random() * 0.003)
            covered(engine)
        if world.dice.random() < 0.4:
            await world.crash(engine)
            engine = await world.start()
    peace(world)
    for delivery in engine.deliveries.values():
        delivery.try_now()
    await engine.settled()
    await all_given_back(engine)
    await world.end(engine)


async def test_twenty_four_broken_sinks_and_one_that_is_well(world: World, watched: None) -> None:
    world.limit_bytes = 1 << 20
    troubles = (sink_down("refused"), reject("mapping"))
    for n in range(24):
        script(world, f"broken{n}", lambda _, n=n: troubles[n % 2])
        world.sinks[f"broken{n}"].stalled = n % 3 == 0  # type: ignore[attr-defined]
    well = script(world, "well", lambda _: OK)
    async with world.running() as engine:
        for n in range(40):
            commit_sized(world, *((f"k{n}-{i}", 2000) for i in range(5)))
            await asyncio.sleep(0)
            covered(engine)
        await until(lambda: len(well.applied) == 200)
        covered(engine)
        for n in range(24):
            sink = world.sinks[f"broken{n}"]
            sink.answer, sink.stalled = (lambda _: OK), False  # type: ignore[attr-defined]
        for delivery in engine.deliveries.values():
            delivery.try_now()
        await engine.settled()
        await all_given_back(engine)


async def test_jumbo_messages_get_their_turn_between_small_ones(world: World, watched: None) -> None:
    """Each needs more than half of the common part of the delivery pool."""
    world.limit_bytes = 1 << 20
    jumbo = 100_000
    sinks = [script(world, f"s{n}", lambda _: OK, max_message_bytes=200_000) for n in range(4)]
    async with world.running() as engine:
        for delivery in engine.deliveries.values():
            delivery.paused = True
        for n in range(6):
            commit_sized(world, (f"jumbo{n}", jumbo), *((f"k{n}-{i}", 500) for i in range(30)))
            await until(lambda n=n: all(d.counters.messages == 31 * (n + 1) for d in engine.deliveries.values()))
        for delivery in engine.deliveries.values():
            delivery.paused = False
            delivery.wake()
        while any(len(sink.applied) < 6 * 31 for sink in sinks):
            covered(engine)
            if engine.task.done():
                engine.task.result()
            await asyncio.sleep(0.001)
        await engine.settled()
        await all_given_back(engine)


async def test_a_row_larger_than_a_page_is_read_alone(world: World, watched: None) -> None:
    world.limit_bytes = 1 << 20
    sink = script(world, "s", lambda _: OK, max_message_bytes=150_000)
    async with world.running() as engine:
        sole(engine).paused = True
        commit_sized(world, *((f"k{n}", 140_000 if n % 2 else 50) for n in range(6)))
        await until(lambda: sole(engine).counters.messages == 6)
        sole(engine).paused = False
        sole(engine).wake()
        await engine.settled()
        assert len(sink.applied) == 6
        await all_given_back(engine)


class CreditBeforeReading:
    """A store that asks, at every page that is read, for the credit which covers it already."""

    def __init__(self, store: Any, reads: list[str]) -> None:
        self._store = store
        self._reads = reads
        self.deliveries: dict[str, Delivery] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _covered(self, name: str, sink: str, held_before: int, bodies: list[bytes]) -> None:
        delivery = self.deliveries[sink]
        needed = sum(2 * len(body) for body in bodies)
        assert delivery._share.held_bytes >= needed, f"{name} gave {needed} bytes without a credit"
        assert held_before >= needed, f"{name}: the credit came after the bytes"
        if bodies:
            self._reads.append(name)

    def page(self, sink: str, *given: Any) -> Any:
        held = self.deliveries[sink]._share.held_bytes
        found = self._store.page(sink, *given)
        self._covered("page", sink, held, [span.chunk.data for span in found])
        return found

    def due(self, sink: str, *given: Any) -> Any:
        held = self.deliveries[sink]._share.held_bytes
        found = self._store.due(sink, *given)
        self._covered("due", sink, held, [h.message.span.chunk.data for h in found])
        return found

    def newest(self, sink: str, *given: Any) -> Any:
        held = self.deliveries[sink]._share.held_bytes
        found = self._store.newest(sink, *given)
        self._covered("newest", sink, held, [found.span.chunk.data] if found is not None else [])
        return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read of the store with a body, as it is read; a read that no credit covers ends the engine."""
    names: list[str] = []
    plain = Delivery.__init__

    def init(self: Delivery, spec: Any, sink: Any, state: Any, process: Process, moved: Any) -> None:
        checked = CreditBeforeReading(process.store, names)
        checked.deliveries[spec.name] = self
        plain(self, spec, sink, state, replace(process, store=checked), moved)  # type: ignore[arg-type]

    monkeypatch.setattr(Delivery, "__init__", init)
    return names


@pytest.mark.parametrize("kind", ["page", "due", "newest"])
async def test_the_credit_is_taken_before_a_body_is_read(world: World, reads: list[str], kind: str) -> None:
    refused = reject("mapping") if kind != "page" else sink_down("refused")
    sink = script(world, "s", lambda _: refused, max_message_bytes=150_000)
    async with world.running() as engine:
        delivery = sole(engine)
        for n in range(40):
            commit_sized(world, *((f"k{n}-{i}", 3000) for i in range(5)))
        await until(lambda: delivery.counters.messages == 200)
        await until(lambda: kind in reads or engine.task.done())
        if engine.task.done():
            engine.task.result()
        sink.answer = lambda _: OK
        delivery.try_now()
        await engine.settled()


async def test_a_frame_is_not_decoded_before_its_credit_is_taken(world: World, streams: list[RecordedStream]) -> None:
    """With the capture pool taken by somebody else nothing is decoded; it goes on when there is room."""
    sink = script(world, "s", lambda _: OK)
    async with world.running() as engine:
        await until(lambda: streams and engine.capture.connected)
        pool = engine.budget.capture
        await until(lambda: pool.held_bytes == 0)
        assert pool.try_take(pool.limit_bytes)
        world.postgres.commit(("insert", "a"))
        await until(lambda: engine.capture.why_waiting.startswith("memory"))
        await turns()
        assert not streams[-1].decoded
        assert not sink.requests
        told = len(streams[-1].told)
        await until(lambda: len(streams[-1].told) > told + 3, "feedback goes on meanwhile")
        pool.give(pool.limit_bytes)
        await engine.settled()
        await all_given_back(engine)


async def test_what_is_on_its_way_to_disk_keeps_its_credit(world: World, stores: list[HeldStore]) -> None:
    script(world, "s", lambda _: sink_down("refused"))
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "first"))
        await until(lambda: delivery.stored and delivery.counters.messages == 1)
        await until(lambda: engine.held_bytes == 0)
        stores[-1].held = True
        commit_sized(world, *((f"k{n}", 1000) for n in range(50)))
        await until(lambda: sum(len(span) for _, write, _ in stores[-1].waiting for span in write.put) == 50)
        await turns()
        assert engine.budget.capture.held_bytes >= 50 * 1000
        stores[-1].let_go()
        await until(lambda: engine.held_bytes == 0)


async def test_a_cut_connection_gives_everything_back(world: World, streams: list[RecordedStream]) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        for _ in range(5):
            load(world, 20)
            await until(lambda: streams)
            streams[-1].is_cut = True
            opened = len(streams)
            await until(lambda opened=opened: len(streams) > opened)
        await engine.settled()
        await all_given_back(engine)


async def test_a_sinks_own_ceiling_sends_the_rest_over_the_spillway(
    world: World, watched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.flow.delivery.SPILL_AGE_SECONDS", 1e6)  # so that the ceiling alone does it
    sink = script(world, "s", lambda _: OK, max_memory_bytes=20_000, max_messages=1000)
    sink.stalled = True
    other = script(world, "other", lambda _: OK)
    async with world.running() as engine:
        delivery = engine.deliveries["s"]
        most = 0
        for n in range(30):
            commit_sized(world, *((f"k{n}-{i}", 1000) for i in range(5)))
            await asyncio.sleep(0.001)
            most = max(most, delivery.memory_bytes)
        await until(lambda: len(other.applied) == 150)
        assert most <= 20_000
        assert delivery.stored
        assert not engine.deliveries["other"].stored
        assert not engine.deliveries["other"].counters.messages
        sink.stalled = False
        await engine.settled()
        await all_given_back(engine)


# -- pools and shares, with waiters that are cancelled -----------------------------------------------------------------
async def test_a_sinks_own_guarantee_serves_those_who_stand_in_line(watched: None) -> None:
    """Whoever is in line for the common part is not held up by it once what the sink gave back itself suffices."""
    budget = Budget(1 << 20, sinks=2)
    greedy, modest = budget.share(lambda: None), budget.share(lambda: None)
    assert greedy.try_take(greedy.most_bytes)
    assert modest.try_take(modest.guaranteed_bytes)
    jumbo = asyncio.create_task(modest.take(modest.guaranteed_bytes + 10))
    small = asyncio.create_task(modest.take(1000))
    await turns()
    assert not jumbo.done()
    assert not small.done()
    modest.give(modest.guaranteed_bytes)
    await turns()
    assert small.done(), "it needs nothing of what the greedy one has"
    assert not jumbo.done()
    greedy.give(greedy.most_bytes)
    modest.give(1000)
    await jumbo
    modest.give(modest.guaranteed_bytes + 10)
    assert budget.held_bytes == budget.common.held_bytes == 0


async def test_more_than_a_share_can_ever_have_is_an_error_and_no_wait(watched: None) -> None:
    share = Budget(1 << 20, sinks=2).share(lambda: None)
    with pytest.raises(ValueError, match="never"):
        await share.take(share.most_bytes + 1)


TAKES = st.lists(
    st.tuples(st.sampled_from(["take", "give", "cancel", "try", "turn"]), st.integers(0, 3), st.integers(1, 60_000)),
    max_size=60,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=TAKES)
def test_shares_with_waiters_and_cancellations(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is taken, waited for, cancelled and given back: never above the limit, in the end nothing."""

    async def play() -> None:
        budget = Budget(256 << 10, sinks=4)
        shares = [budget.share(lambda: None) for _ in range(4)]
        held: list[list[int]] = [[] for _ in shares]
        waiters: list[tuple[int, int, asyncio.Task[None]]] = []

        async def wait(share: int, size: int) -> None:
            await shares[share].take(size)
            held[share].append(size)

        for step, share, size in steps:
            if step == "take":
                waiters.append((share, size, asyncio.create_task(wait(share, size))))
            elif step == "try" and shares[share].try_take(size):
                held[share].append(size)
            elif step == "give" and held[share]:
                shares[share].give(held[share].pop())
            elif step == "cancel" and waiters:
                waiters.pop(size % len(waiters))[2].cancel()
            elif step == "turn":
                await asyncio.sleep(0)
            assert budget.held_bytes <= budget.limit_bytes
            assert budget.common.held_bytes <= budget.common.limit_bytes
        async with asyncio.timeout(10):
            while any(not task.done() for _, _, task in waiters) or any(held):
                for share, sizes in zip(shares, held, strict=True):
                    while sizes:
                        share.give(sizes.pop())
                await asyncio.sleep(0)
                assert budget.held_bytes <= budget.limit_bytes
        await asyncio.gather(*(task for _, _, task in waiters), return_exceptions=True)
        assert budget.held_bytes == budget.common.held_bytes == 0

    asyncio.run(play())


LOADS = st.lists(
    st.tuples(
        st.sampled_from(["commit", "big", "down", "reject", "well", "pause", "resume", "cut"]), st.integers(0, 2)
    ),
    min_size=4,
    max_size=14,
)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / str(n) for n in range(1000))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=LOADS, seed=st.integers(0, 100))
def test_random_loads_stay_below_the_limit(
    folders: Iterator[Path], watched: None, steps: list[tuple[str, int]], seed: int
) -> None:
    async def play() -> None:
        folder = next(folders)
        folder.mkdir()
        world = World(folder, seed, limit_bytes=200 << 10)
        sinks = [script(world, f"s{n}", lambda _: OK, max_message_bytes=12_000) for n in range(3)]
        answers = {"down": sink_down("refused"), "reject": reject("mapping"), "well": OK}
        async with world.running() as engine:
            deliveries = list(engine.deliveries.values())
            for step, n in steps:
                if step == "commit":
                    load(world, 10)
                elif step == "big":
                    commit_sized(world, *((f"b{i}", 11_000) for i in range(10)))
                elif step in answers:
                    sinks[n].answer = lambda _, step=step: answers[step]
                elif step in ("pause", "resume"):
                    deliveries[n].paused = step == "pause"
                for _ in range(5):
                    await asyncio.sleep(0.001)
                    covered(engine)
            for sink, delivery in zip(sinks, deliveries, strict=True):
                sink.answer, delivery.paused = (lambda _: OK), False
                delivery.try_now()
            await engine.settled()
            await all_given_back(engine)

    asyncio.run(play())

"""`backlog.on_full: compact`: an outage costs space by keys, nothing newer is lost, nothing older comes after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest

from invariants.instruments import sole, until
from invariants.world import Engine, FakeSink, Took, World, version_of
from spillway.flow import compacting
from spillway.flow.delivery import Delivery
from spillway.flow.health import judge
from spillway.flow.limits import Limits
from spillway.store import compact

COMPACT = Limits(on_full="compact")
KEYS = "abcdefgh"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over backlogs of a few messages, in many steps."""
    monkeypatch.setattr(compacting, "LEAST_MESSAGES", 4)
    monkeypatch.setattr(compacting, "BETWEEN_SECONDS", 0.2)
    monkeypatch.setattr(compacting, "REST", 0)
    monkeypatch.setattr(compacting, "LONG_REST", 0)
    monkeypatch.setattr(compact, "SPANS_AT_ONCE", 3)


def holds(took: Iterable[Took]) -> dict[str, tuple[int, int]]:
    """What is in the sink after all this: key to version."""
    rows: dict[str, tuple[int, int]] = {}
    for one in took:
        if one.action == "truncate":
            for key in [key for key in rows if key.startswith(one.key)]:
                del rows[key]
        elif one.action == "delete":
            rows.pop(one.key, None)
        else:
            rows[one.key] = one.version
    return rows


def source(world: World) -> dict[str, tuple[int, int]]:
    return {
        f"public.{table}:{name}": version_of(image.body)
        for table, images in world.postgres.images.items()
        for name, image in images.items()
    }


def goes_back(took: Iterable[Took]) -> list[Took]:
    """What is older than what a sink had of that key in the same life of the process."""
    newest: dict[tuple[int, str], tuple[int, int, int]] = {}
    back = []
    for one in took:
        own = (one.life, one.key)
        if one.position < newest.get(own, (0, 0, 0)):
            back.append(one)
        newest[own] = max(one.position, newest.get(own, (0, 0, 0)))
    return back


def load(world: World, transactions: int, moves: float = 0.1) -> None:
    dice = world.dice
    for _ in range(transactions):
        rows: list[tuple[str, str] | tuple[str, str, str]] = []
        free = set(KEYS)
        for _ in range(dice.choice((1, 1, 2, 6))):
            key = dice.choice(sorted(free))
            if dice.random() < moves and len(free) > 1:
                old, new = dice.sample(sorted(free), 2)
                rows.append(("move", old, new))
                free -= {old, new}
            else:
                rows.append((dice.choice(("insert", "update", "update", "delete")), key))
                free.discard(key)
            if not free:
                break
        world.postgres.commit(*rows)


async def play(world: World, rounds: int, *, crashes: bool) -> int:
    compacted = 0
    engine = await world.start()
    for _ in range(rounds):
        for sink in world.sinks.values():
            sink.trouble = world.dice.choice((0.0, 0.1, 0.4))
            sink.down = world.dice.random() < 0.6
            sink.bad = {f"public.t:{key}" for key in world.dice.sample(KEYS, world.dice.choice((0, 0, 1, 3)))}
        load(world, 30)
        await asyncio.sleep(world.dice.random() * 0.1)
        if crashes and world.dice.random() < 0.5:
            compacted += sum(delivery.passes.removed for delivery in engine.deliveries.values())
            await world.crash(engine)
            engine = await world.start()
    for sink in world.sinks.values():
        sink.trouble, sink.down, sink.bad = 0.0, False, set()
    for delivery in engine.deliveries.values():
        delivery.try_now()
    await engine.settled()
    compacted += sum(delivery.passes.removed for delivery in engine.deliveries.values())
    await world.end(engine)
    assert engine.budget.held_bytes == 0
    return compacted


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("seed", range(10))
async def test_the_sink_ends_equal_under_mischief_and_crashes(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name in ("state", "atomic"):
        world.sink(name, name, limits=COMPACT)  # type: ignore[arg-type]
    assert await play(world, 12, crashes=True)
    for sink in world.sinks.values():
        assert holds(sink.took) == source(world)
    world.judge("state", crashed=True)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("seed", range(10, 16))
async def test_nothing_older_comes_after_what_is_newer(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name in ("state", "atomic"):
        world.sink(name, name, limits=COMPACT).loses_answers = False  # type: ignore[arg-type]
    assert await play(world, 12, crashes=False)
    for sink in world.sinks.values():
        assert not goes_back(sink.took)
        assert holds(sink.took) == source(world)


def updates(world: World, count: int, keys: int) -> None:
    for number in range(count):
        world.postgres.commit(("update", f"{number % keys:05}"))


async def received(engine: Engine, world: World) -> None:
    """Until all is durable."""
    last = world.postgres.transactions[-1][1]
    delivery = sole(engine)
    await until(lambda: engine.capture.received_lsn >= last and delivery.open_lsn is None, "all is in the store")


def down(world: World, semantics: str = "state", **spec: object) -> FakeSink:
    sink = world.sink("index", semantics, **{"limits": COMPACT, **spec})  # type: ignore[arg-type]
    sink.down = True
    return sink


@pytest.mark.parametrize("semantics", ["state", "atomic"])
async def test_an_outage_leaves_a_message_of_each_key(world: World, semantics: str) -> None:
    sink = down(world, semantics)
    world.postgres.chunks = (60,)
    async with world.running() as engine:
        delivery = sole(engine)
        updates(world, 6_000, 100)
        await received(engine, world)
        await until(lambda: delivery.counters.messages == 100, "one message of each key")
        assert delivery.passes.removed > 5_000
        state, reason, _ = judge(delivery, delivery._clock.monotonic())
        assert state == "down"
        removed = delivery.passes.removed
        assert f"compacted: newer ones of their keys have taken the place of {removed} messages" in reason
        sink.down = False
        delivery.try_now()
        await engine.settled()
    assert holds(sink.took) == source(world)
    assert len(sink.took) <= 200  # the batch that was probed with may be one of before


@pytest.mark.usefixtures("often")
async def test_what_came_while_a_pass_ran_is_compacted_too(world: World) -> None:
    """The last update of an outage comes in the middle of a pass; nothing comes after that."""
    down(world)
    async with world.running() as engine:
        delivery = sole(engine)
        for _ in range(5):
            updates(world, 40, 10)
            await until(lambda: delivery.passes.running, "a pass")
            updates(world, 40, 10)
            await until(lambda: delivery.counters.messages == 10, "one message of each key")


async def test_a_cap_is_held_however_small_it_is(world: World) -> None:
    down(world, limits=Limits(max_messages=50, on_full="compact"))
    world.postgres.chunks = (5,)
    async with world.running() as engine:
        delivery = sole(engine)
        most = 0
        updates(world, 500, 500)
        await until(lambda: delivery.full is not None, "full")
        for _ in range(50):
            await asyncio.sleep(0.002)
            most = max(most, delivery.counters.messages)
        assert delivery.blocks
        assert 50 <= most < 120


async def test_at_the_cap_it_goes_on_as_long_as_that_helps(world: World) -> None:
    sink = down(world, limits=Limits(max_messages=50, on_full="compact"))
    async with world.running() as engine:
        delivery = sole(engine)
        updates(world, 2_000, 20)
        await received(engine, world)
        assert delivery.counters.messages < 120
        sink.down = False
        delivery.try_now()
        await engine.settled()
    assert holds(sink.took) == source(world)


async def test_a_start_does_not_look_at_what_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after it what another run has put is compacted, though nothing comes."""
    monkeypatch.setattr(Delivery, "_compaction_due", lambda *_: False)
    sink = down(world)
    world.postgres.chunks = (60,)
    async with world.running() as engine:
        updates(world, 6_000, 3_000)
        await received(engine, world)
    monkeypatch.undo()
    monkeypatch.setattr(compacting, "START_SECONDS", float("inf"))
    async with world.running() as engine:
        await until(lambda: len(sink.asked) > 3)
        await asyncio.sleep(0.2)
        assert not sole(engine).passes.removed
        assert sole(engine).counters.messages == 6_000
    monkeypatch.setattr(compacting, "START_SECONDS", 1.0)
    async with world.running() as engine:
        await until(lambda: sole(engine).counters.messages == 3_000, "one message of each key")
        sink.down = False
        sole(engine).try_now()
        await engine.settled()
    assert holds(sink.took) == source(world)


@pytest.mark.usefixtures("often")
async def test_passes_do_not_keep_a_sink_from_delivering(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass goes on and on; what waits is delivered meanwhile."""
    sink = down(world)
    world.postgres.chunks = (5,)
    async with world.running() as engine:
        delivery = sole(engine)
        updates(world, 2_000, 2_000)
        await received(engine, world)
        await until(lambda: not delivery.passes.running)
        monkeypatch.setattr(compact, "SPANS_AT_ONCE", 1)
        monkeypatch.setattr(type(delivery), "_compaction_due", lambda *_: True)
        sink.down = False
        delivery.try_now()
        await until(lambda: len(sink.took) >= 1_000, "delivered beside passes")

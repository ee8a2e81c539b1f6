"""I8: health follows progress, not connectivity. Each of the ten states is reached by what it is for, with a reason and
a remedy, since when it began; and ``ready`` is false when, and only when, the slot is not being read.
"""

from __future__ import annotations

import asyncio

import pytest

from invariants.instruments import RecordedStream, Script, script, sole, until
from invariants.world import Engine, FastClock, World
from spillway.engine.backfills import Backfills
from spillway.engine.owed import Owed
from spillway.engine.pipeline import Pipeline
from spillway.errors import Finding, SourceUnavailable
from spillway.flow.health import Health
from spillway.flow.limits import Limits
from spillway.sinks.base import OK, reject, sink_down
from spillway.store.base import Select

STATES = ("idle", "caught_up", "behind", "retrying", "parked", "paused", "full", "down", "stalled", "gap")


def pipeline(engine: Engine) -> Pipeline:
    """The part of the engine that asks for health and readiness, around the world's objects."""
    made = Pipeline.__new__(Pipeline)
    made.capture, made.deliveries, made._clock = engine.capture, list(engine.deliveries.values()), FastClock()
    made.router = engine.capture._router
    made.health = {name: Health() for name in engine.deliveries}
    made.companions = {}
    made.backfills = Backfills.__new__(Backfills)
    made.backfills._sinks, made.backfills._owed = {}, Owed()
    return made


class Watch:
    """The health of one sink, as the engine asks for it."""

    def __init__(self, engine: Engine, name: str = "s") -> None:
        self.delivery = engine.deliveries[name]
        self._pipeline = pipeline(engine)
        self.health = self._pipeline.health[name]

    def look(self) -> str:
        self._pipeline.health_of(self.delivery)
        assert self.health.state in STATES
        assert self.health.since > 0
        return self.health.state

    async def becomes(self, state: str) -> Health:
        await until(lambda: self.look() == state, f"{state}, but {self.health.state}: {self.health.reason}")
        return self.health


def unready(engine: Engine) -> str:
    """Why ``/ready`` would say 503."""
    return pipeline(engine).stalled()


async def test_idle_then_caught_up_then_idle(world: World) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        watch = Watch(engine)
        assert watch.look() == "idle"
        began = watch.health.since
        assert watch.look() == "idle"
        assert watch.health.since == began, "since when it is so, not since when it was last looked at"
        world.postgres.commit(("insert", "a"))
        await engine.settled()
        assert watch.look() == "caught_up"
        assert watch.health.since > began
        await watch.becomes("idle")
        assert watch.health.reason == watch.health.remedy == ""


async def test_behind_says_how_much_and_warns_at_the_threshold(world: World) -> None:
    sink = script(world, "s", lambda _: OK, timeout_seconds=600.0, limits=Limits(warn_messages=30))
    sink.stalled = True
    async with world.running() as engine:
        watch = Watch(engine)
        for n in range(20):
            world.postgres.commit(("insert", f"k{n}"))
        await until(lambda: sole(engine).counters.messages == 20)
        await sole(engine).check_limits()
        assert watch.look() == "behind"
        assert watch.health.reason.startswith("20 messages wait on disk")
        assert "warn" not in watch.health.reason
        world.postgres.commit(*(("insert", f"l{n}") for n in range(20)))
        await until(lambda: sole(engine).counters.messages == 40)
        assert watch.look() == "behind"
        assert "warn_messages is 30" in watch.health.reason
        sink.stalled = False
        await engine.settled()
        assert watch.look() == "caught_up"


async def test_stalled_when_there_is_work_and_nothing_moves_for_a_minute(world: World) -> None:
    """However much comes in meanwhile: what comes in is no progress."""
    sink = script(world, "s", lambda _: OK, timeout_seconds=100_000.0)
    sink.stalled = True
    async with world.running() as engine:
        watch = Watch(engine)
        began = FastClock().monotonic()

        async def trickle() -> None:
            while True:
                world.postgres.commit(("insert", "k"))
                await asyncio.sleep(0.02)  # a second of the flow's time: a source, not a synchronisation

        source = asyncio.create_task(trickle())
        await watch.becomes("stalled")
        assert FastClock().monotonic() - began >= 60
        assert "messages wait" in watch.health.reason
        assert watch.health.remedy
        source.cancel()
        sink.stalled = False
        await engine.settled()
        assert watch.look() == "caught_up"


async def test_what_comes_after_a_long_idleness_is_not_stalled_at_once(world: World) -> None:
    sink = script(world, "s", lambda _: OK, timeout_seconds=600.0)
    async with world.running() as engine:
        watch = Watch(engine)
        world.postgres.commit(("insert", "a"))
        await engine.settled()
        await watch.becomes("idle")  # for more than a minute
        sink.stalled = True
        world.postgres.commit(("insert", "b"))
        await until(lambda: sole(engine).counters.messages == 1)
        assert watch.look() == "behind"
        sink.stalled = False


async def test_what_is_resumed_after_a_long_pause_is_not_stalled_at_once(world: World) -> None:
    script(world, "s", lambda _: OK, timeout_seconds=600.0).stalled = True
    async with world.running() as engine:
        delivery = sole(engine)
        watch = Watch(engine)
        await delivery.pause()
        world.postgres.commit(("insert", "b"))
        await until(lambda: delivery.counters.messages == 1)
        began = FastClock().monotonic()
        await until(lambda: FastClock().monotonic() - began > 61)
        await delivery.resume(0)
        assert watch.look() == "behind"


async def test_parked_names_the_keys_the_reason_and_where_to_look(world: World) -> None:
    sink = script(world, "s", lambda m: reject("mapping", "no field x") if m.keys == ("public.t:a",) else OK)
    async with world.running() as engine:
        watch = Watch(engine)
        world.postgres.commit(("insert", "a"), ("insert", "b"))
        await watch.becomes("parked")
        assert "1 keys" in watch.health.reason
        assert "mapping: no field x" in watch.health.reason
        assert "spillway backlog list s" in watch.health.remedy
        assert not unready(engine)
        sink.answer = lambda _: OK
        sole(engine).try_now()
        await engine.settled()
        assert watch.look() == "caught_up"


async def test_retrying_when_everything_is_rejected(world: World) -> None:
    sink = script(world, "s", lambda _: reject("strict_dynamic_mapping_exception", "[x] is not allowed"))
    async with world.running() as engine:
        watch = Watch(engine)
        for n in range(200):
            world.postgres.commit(("insert", f"k{n}"))
        await watch.becomes("retrying")
        assert "strict_dynamic_mapping_exception: [x] is not allowed" in watch.health.reason
        assert "backlog retry s" in watch.health.remedy
        assert not unready(engine), "the slot is read all the same"
        sink.answer = lambda _: OK
        await sole(engine).retry(Select(all=True))
        await engine.settled()
        assert watch.look() == "caught_up"


async def test_down_while_the_sink_refuses_and_nothing_is_called_well_because_it_connects(world: World) -> None:
    sink = script(world, "s", lambda _: sink_down("http_503", "overloaded"))
    async with world.running() as engine:
        watch = Watch(engine)
        world.postgres.commit(("insert", "a"))
        await watch.becomes("down")
        since = watch.health.since
        assert watch.health.reason == "http_503: overloaded"
        assert "30 s" in watch.health.remedy
        await until(lambda: sink.requests >= 5)
        assert watch.look() == "down"
        assert watch.health.since == since
        assert not unready(engine)
        sink.answer = lambda _: OK
        await engine.settled()
        assert watch.look() == "caught_up"


async def test_paused(world: World) -> None:
    script(world, "s", lambda _: sink_down("refused"))
    async with world.running() as engine:
        watch = Watch(engine)
        world.postgres.commit(("insert", "a"))
        await watch.becomes("down")
        await sole(engine).pause()
        assert watch.look() == "paused"
        assert watch.health.remedy == "spillway sinks resume s"
        assert not unready(engine)


async def test_full_and_the_block_that_it_means(world: World) -> None:
    sink = script(world, "s", lambda _: sink_down("refused"), limits=Limits(max_messages=2))
    script(world, "other", lambda _: OK)
    async with world.running() as engine:
        watch = Watch(engine)
        for key in "abc":
            world.postgres.commit(("insert", key))
        await watch.becomes("full")
        assert "max_messages is 2" in watch.health.reason
        assert "not read" in watch.health.reason
        assert "discard s" in watch.health.remedy
        assert "s is full" in unready(engine)
        other = Watch(engine, "other")
        other.look()
        assert "not read: the backlog of s is full" in other.health.reason, "every sink of the slot says so"
        sink.answer = lambda _: OK
        engine.deliveries["s"].try_now()
        await until(lambda: not engine.deliveries["s"].counters.messages)
        await engine.deliveries["s"].check_limits()
        assert watch.look() == "caught_up"
        assert not unready(engine)


async def test_gap_while_it_grows_and_until_it_is_acknowledged(world: World) -> None:
    sink = script(world, "s", lambda _: sink_down("refused"), limits=Limits(max_messages=2, on_full="pause"))
    async with world.running() as engine:
        delivery = sole(engine)
        watch = Watch(engine)
        for key in "abc":
            world.postgres.commit(("insert", key))
        await until(lambda: delivery.counters.messages == 3)
        await delivery.check_limits()
        assert watch.look() == "gap"
        assert "takes no part since" in watch.health.reason
        assert "max_messages is 2" in watch.health.reason
        assert "spillway sinks resume s" in watch.health.remedy
        assert "spillway backfill start s --gap" in watch.health.remedy
        assert not unready(engine)
        sink.answer = lambda _: OK
        await delivery.resume(engine.capture.received_lsn)
        await engine.settled()
        assert watch.look() == "gap", "delivering is not repairing"
        assert "missed changes from" in watch.health.reason
        assert "acknowledge: spillway sinks resume s" in watch.health.remedy
        await delivery.resume(engine.capture.received_lsn)
        await delivery.check_limits()
        assert watch.look() == "caught_up"


async def test_a_refused_table_is_a_gap_that_grows(world: World) -> None:
    """What comes of it passes by."""
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        watch = Watch(engine)
        finding = Finding("no_primary_key", "table public.x has no primary key", "ALTER TABLE x ...")
        engine.capture._router._refusals["s", ("public", "x")] = {("public", "x"): (finding, 0)}
        assert watch.look() == "gap"
        assert watch.health.reason == "table public.x has no primary key"
        assert watch.health.remedy == "ALTER TABLE x ..."


async def test_a_failed_backfill_is_said_beside_whatever_the_state_is(world: World) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        watch = Watch(engine)
        failed = Finding("backfill_failed", "the initial backfill of public.x failed: no grant", "GRANT ...")
        also = Finding("backfill_failed", "the initial backfill of public.y failed: no grant", "GRANT ...")
        watch._pipeline.backfills.owed = lambda name: [failed, also] if name == "s" else []  # type: ignore[method-assign]
        assert watch.look() == "idle"
        assert watch.health.reason == f"{failed.what}; {also.what}"
        assert watch.health.remedy == "GRANT ..."
        watch._pipeline.backfills.owed = lambda _: []  # type: ignore[method-assign]
        watch.look()
        assert watch.health.reason == ""


async def test_ready_is_false_when_the_source_is_gone_for_a_minute(world: World, streams: list[RecordedStream]) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        capture = engine.capture
        await until(lambda: capture.connected and capture.why_waiting == "")
        assert not unready(engine)
        connect = capture._connect

        async def refuse() -> object:
            raise SourceUnavailable("connection_refused", "nobody listens")

        capture._connect = refuse  # type: ignore[assignment]
        streams[-1].is_cut = True
        await until(lambda: not capture.connected)
        assert not unready(engine), "a reconnect is normal"
        await until(lambda: unready(engine), "it is not, after a minute")
        capture._connect = connect
        await until(lambda: capture.connected)
        await until(lambda: not unready(engine))


async def test_ready_is_false_when_reading_waits_for_memory_for_a_minute(world: World) -> None:
    script(world, "s", lambda _: OK)
    async with world.running() as engine:
        pool = engine.budget.capture
        await until(lambda: engine.capture.connected and pool.try_take(pool.limit_bytes))
        world.postgres.commit(("insert", "a"))
        await until(lambda: engine.capture.why_waiting.startswith("memory"))
        assert not unready(engine)
        await until(lambda: unready(engine))
        assert "memory" in unready(engine)
        pool.give(pool.limit_bytes)
        await engine.settled()
        await until(lambda: not unready(engine))


@pytest.mark.parametrize("busy", [False, True])
async def test_ready_under_sinks_that_merely_fail(world: World, busy: bool) -> None:
    sinks: list[Script] = [script(world, "down", lambda _: sink_down("refused"))]
    sinks.append(script(world, "rejects", lambda _: reject("mapping")))
    sinks.append(script(world, "hangs", lambda _: OK, timeout_seconds=10_000.0))
    sinks[2].stalled = True
    async with world.running() as engine:
        began = FastClock().monotonic()
        while FastClock().monotonic() - began < 90:
            if busy or not world.postgres.transactions:
                world.postgres.commit(("insert", "a"))
            assert not unready(engine)
            await asyncio.sleep(0.01)

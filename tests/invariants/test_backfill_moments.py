"""Backfills, one moment at a time: what people do meanwhile, sinks that fail, gaps, TRUNCATEs, what is not whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from invariants.instruments import HeldStore, Script, positions, script, sole, turns, until
from invariants.paging import FakePages, judge_rows, pages
from invariants.world import Engine, Selection, World
from spillway.change import Action
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.flow.limits import Limits
from spillway.sinks.base import OK, reject, sink_down

NAMES = [f"k{n:02}" for n in range(20)]
NO_UPDATES: frozenset[Action] = frozenset({"insert", "delete"})


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spillway.flow.pagesize.FIRST_ROWS", 5)
    monkeypatch.setattr("spillway.flow.pagesize.LEAST_ROWS", 5)
    monkeypatch.setattr("spillway.flow.pagesize.MOST_ROWS", 5)


def filled(world: World, **standby: bool) -> FakePages:
    world.postgres.exists(*NAMES)
    return pages(world, **standby)


def names(sink: Script) -> list[str]:
    return [one.key.rpartition(":")[2] for one in sink.took]


def no_turns(engine: Engine) -> Callable[[], None]:
    """No page gets its place before what this returns is called."""
    take_turns = engine.capture._take_turns

    async def later() -> None:
        pass

    def let_go() -> None:
        engine.capture._take_turns = take_turns  # type: ignore[method-assign]

    engine.capture._take_turns = later  # type: ignore[method-assign]
    return let_go


async def all_read(engine: Engine) -> None:
    await engine.backfilled()
    await engine.settled()


# -- what people do ----------------------------------------------------------------------------------------------------
async def test_existing_rows_come_page_by_page_in_the_order_of_the_key(world: World) -> None:
    sink, source = script(world, "events", lambda _: OK), filled(world)
    async with world.running() as engine:
        backfill = await engine.backfill("events")
        await all_read(engine)
        state = backfill.state
        assert (state.state, state.rows, state.pages, state.superseded) == ("completed", 20, 5, 0)
    assert sorted(names(sink)) == NAMES
    assert [len(one.keys) for one in source.asked] == [5, 5, 5, 5, 0]
    judge_rows(world, "events")


async def test_paused_it_reads_nothing_and_resumed_it_goes_on_where_it_was(world: World) -> None:
    sink, source = script(world, "events", lambda _: OK), filled(world)
    async with world.running() as engine:
        backfill = await engine.backfill("events")
        await until(lambda: backfill.state.pages == 2)
        await backfill.change("paused")
        await until(lambda: backfill.waiting == "paused")
        pages_read = len(source.asked)
        await turns()
        assert len(source.asked) == pages_read < 5
        await backfill.change("active")
        await all_read(engine)
    assert sorted(names(sink)) == NAMES


@pytest.mark.parametrize("parallel", [1, 3])
async def test_a_pause_of_a_moment_loses_no_rows(world: World, parallel: int) -> None:
    sink = script(world, "events", lambda _: OK)
    filled(world)
    async with world.running() as engine:
        backfill = await engine.backfill("events", parallel=parallel)
        while not backfill.state.has_ended:
            await backfill.change("paused")
            if world.dice.random() < 0.5:
                await turns()
            await backfill.change("active")
            before = backfill.state.pages
            await until(lambda before=before: backfill.state.pages > before or backfill.state.has_ended)
        await all_read(engine)
    assert sorted(set(names(sink))) == NAMES


async def test_cancelled_it_ends_at_once_and_cannot_go_on(world: World) -> None:
    script(world, "events", lambda _: OK)
    source = filled(world)
    source.trouble = 1.0
    async with world.running() as engine:
        backfill = await engine.backfill("events")
        await until(lambda: backfill.waiting)
        await backfill.change("cancelled")
        await until(lambda: source.open_readers == 0 and engine.capture.carried._bytes == 0)
        with pytest.raises(SpillwayError, match="cancelled"):
            await backfill.change("active")
        assert engine.store.backfills("events", ended=False) == []
        assert engine.budget.pages.held_bytes == 0


async def test_a_lock_on_the_table_at_its_beginning_is_waited_for(world: World) -> None:
    script(world, "events", lambda _: OK)
    filled(world)
    world.postgres.lag = 1.0
    world.postgres.commit(("truncate", "u"))
    async with world.running() as engine:
        backfill = await engine.backfill("events", "u")
        await engine.backfilled()
        assert backfill.state.state == "completed"


# -- sinks that fail ---------------------------------------------------------------------------------------------------
async def test_while_the_sink_is_paused_nothing_is_read(world: World) -> None:
    sink, source = script(world, "events", lambda _: OK), filled(world)
    async with world.running() as engine:
        await sole(engine).pause()
        backfill = await engine.backfill("events")
        await until(lambda: backfill.waiting == "the sink is paused")
        assert not source.asked
        await sole(engine).resume(engine.capture.received_lsn)
        await all_read(engine)
    assert sorted(names(sink)) == NAMES


async def test_a_sink_that_is_down_gets_its_rows_later_and_no_more_is_read_meanwhile(world: World) -> None:
    down = [True]
    sink = script(world, "events", lambda _: sink_down("refused") if down else OK)
    source = filled(world)
    async with world.running() as engine:
        backfill = await engine.backfill("events")
        await until(lambda: backfill.waiting.startswith("the sink is down"))
        assert len(source.asked) == 1
        world.postgres.commit(("update", NAMES[0]), ("update", NAMES[-1]))
        await until(lambda: world.postgres.confirmed_lsn >= world.postgres.transactions[-1][1])
        down.clear()
        sole(engine).try_now()
        await all_read(engine)
    judge_rows(world, "events")
    assert len(positions(sink.applied)) == 2


async def test_rows_behind_a_parked_key_wait_and_the_others_flow(world: World) -> None:
    bad = {"public.t:k03"}
    sink = script(world, "events", lambda m: OK if bad.isdisjoint(m.keys) else reject("mapping"))
    filled(world)
    async with world.running() as engine:
        world.postgres.commit(("update", "k03"))
        await until(lambda: sole(engine).counters.parked_keys == 1)
        await engine.backfill("events")
        await engine.backfilled()
        await until(lambda: len(set(names(sink))) == 19)
        assert "k03" not in names(sink)
        bad.clear()
        sole(engine).try_now()
        await engine.settled()
    judge_rows(world, "events")
    assert [one.action for one in sink.took if one.key == "public.t:k03"] == ["update", "read"]


async def test_what_a_growing_gap_swallows_is_read_by_a_backfill_behind_it(world: World) -> None:
    down: list[bool] = [True]
    sink = script(
        world, "state", lambda _: sink_down("refused") if down else OK, "state",
        limits=Limits(max_messages=3, on_full="pause"),
    )  # fmt: skip
    filled(world)
    async with world.running() as engine:
        delivery = sole(engine)
        backfill = await engine.backfill("state")
        await until(lambda: delivery.breaker.open)
        for name in NAMES[:5]:
            world.postgres.commit(("update", name))
        await until(lambda: delivery.counters.messages >= 3)
        await delivery.check_limits()
        await until(lambda: not delivery.participates)
        for name in NAMES:
            world.postgres.commit(("update", name))
        await until(lambda: engine.capture.received_lsn >= world.postgres.transactions[-1][1])
        await until(lambda: backfill.waiting.startswith("the sink takes no part"))
        down.clear()
        await delivery.resume(engine.capture.received_lsn)
        await until(lambda: not delivery.counters.messages)
        await delivery.check_limits()
        await all_read(engine)
        await engine.backfill("state")
        await all_read(engine)
    judge_rows(world, "state")
    assert sink.took


async def test_a_gap_that_opens_while_keys_are_looked_up_does_not_take_the_page(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"public.t:zz"}
    sink = script(world, "events", lambda m: OK if bad.isdisjoint(m.keys) else reject("mapping"))
    filled(world)
    async with world.running() as engine:
        delivery = sole(engine)
        world.postgres.commit(("insert", "zz"))
        await until(lambda: delivery.counters.parked_keys == 1 and not delivery.stored)
        look = delivery.parked_among
        looked: list[int] = []

        async def slow(span: object) -> object:
            found = await look(span)  # type: ignore[arg-type]
            if not looked:
                looked.append(1)
                delivery._open_gap("full")
            return found

        monkeypatch.setattr(delivery, "parked_among", slow)
        backfill = await engine.backfill("events")
        await until(lambda: looked and backfill.waiting.startswith("the sink takes no part"))
        bad.clear()
        await delivery.resume(engine.capture.received_lsn)
        await all_read(engine)
    assert set(NAMES) <= set(names(sink))


# -- TRUNCATE ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("applied", [True, False])
async def test_a_truncate_that_a_page_does_not_see_makes_it_void(
    world: World, stores: list[HeldStore], applied: bool
) -> None:
    sink = script(world, "rows", lambda _: OK, "atomic", Selection(truncates=applied))
    source = filled(world)
    async with world.running() as engine:
        let_go = no_turns(engine)
        backfill = await engine.backfill("rows")
        await until(lambda: len(source.asked) == 1)
        world.postgres.commit(("truncate", "t"))
        world.postgres.commit(("insert", "k99"))
        await until(lambda: engine.capture.received_lsn >= world.postgres.transactions[-1][1])
        let_go()
        await all_read(engine)
        assert backfill.state.rows <= 1
    assert "k00" not in names(sink)
    assert "k99" in names(sink)


# -- what is not whole, and what is not taken --------------------------------------------------------------------------
async def test_a_row_of_which_the_sink_got_only_a_part_is_read_again_by_key(world: World) -> None:
    sink = script(world, "state", lambda _: OK, "state")
    source = filled(world)
    world.postgres.lag = 1.0
    async with world.running() as engine:
        let_go = no_turns(engine)
        backfill = await engine.backfill("state")
        await until(lambda: len(source.asked) == 1)
        world.postgres.commit(("partial", "k02"), ("update", "k03"))
        await until(lambda: engine.capture.received_lsn >= world.postgres.transactions[-1][1])
        let_go()
        await all_read(engine)
        assert (backfill.state.superseded, backfill.state.rows) == (1, 21)
        assert backfill.state.parts is not None
        assert backfill.state.parts[0].again == []
    judge_rows(world, "state")
    assert [one.keys for one in source.asked if one.within is None] == [("k02",)]
    assert [one.action for one in sink.took if one.key == "public.t:k02"] == ["update", "read"]
    assert [one.action for one in sink.took if one.key == "public.t:k03"] == ["update"]


async def test_what_a_page_has_brought_is_not_followed_by_what_was_before_it_after_a_crash(world: World) -> None:
    """Of a sink without updates the stream would bring the insert again, and nothing after it."""
    sink = script(world, "state", lambda _: OK, "state", Selection(actions=NO_UPDATES))
    filled(world)
    engine = await world.start()
    confirmed = world.postgres.confirmed_lsn
    world.postgres.commit(("insert", "new"))
    world.postgres.commit(("update", "new"))
    await engine.backfill("state")
    await all_read(engine)
    await world.crash(engine)
    world.postgres.confirmed_lsn = confirmed  # the server had not heard of it
    async with world.running() as again:
        world.postgres.commit(("insert", "last"))
        await until(lambda: "last" in names(sink))
        await again.settled()
    assert [one.action for one in sink.took if one.key == "public.t:new"][-1] == "read"


async def test_a_row_that_no_credit_covers_fails_the_backfill_with_what_it_needs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(world, "events", lambda _: OK)
    filled(world)
    image = world.postgres.images["t"]["k01"]
    world.postgres.images["t"]["k01"] = replace(image, body=image.body.ljust(8 << 20))
    async with world.running() as engine:
        backfill = await engine.backfill("events")
        await engine.backfilled()
        assert backfill.state.state == "failed"
        assert "needs a credit" in (backfill.state.error or "")
        assert engine.budget.pages.held_bytes == 0


async def test_a_source_that_cannot_be_reached_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, source = script(world, "events", lambda _: OK), filled(world)
    opened = source.open
    refused = [SourceUnavailable("refused", "no connection")] * 3

    async def fail_first(*given: object) -> object:
        if refused:
            raise refused.pop()
        return await opened(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(source, "open", fail_first)
    async with world.running() as engine:
        await engine.backfill("events")
        await all_read(engine)
    assert sorted(names(sink)) == NAMES


async def test_what_is_carried_outgrows_its_part_and_the_page_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.flow.carried._PART_BYTES", 1 << 20)  # nothing can be remembered
    sink, source = script(world, "events", lambda _: OK), filled(world)
    async with world.running() as engine:
        let_go = no_turns(engine)
        await engine.backfill("events")
        await until(lambda: len(source.asked) == 1)
        began = engine.capture.carried.began
        world.postgres.commit(("update", "k01"))
        await until(lambda: engine.capture.carried.began > began)
        let_go()
        await all_read(engine)
    judge_rows(world, "events")
    assert names(sink).count("k01") == 2

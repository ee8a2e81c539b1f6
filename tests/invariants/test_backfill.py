"""Backfills beside the live stream, by dice: a sink ends equal to the source, in order, whatever happens (I1 to I4).

The world has visibility that lags behind the stream, transactions that run for a while, rows that move, connections
that break, sinks that misbehave, and crashes. The judge is `invariants.paging.judge_rows`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from invariants.paging import FakePages, judge_rows, pages
from invariants.test_i3_order import peace
from invariants.world import Engine, Selection, Transaction, World
from spillway.change import Action
from spillway.flow.progress import of_json
from spillway.sinks.base import Semantics

NAMES = [f"{letter}{digit}" for letter in "abcdef" for digit in range(8)]
SEMANTICS: tuple[Semantics, ...] = ("events", "state", "ordered", "atomic")
Change = tuple[str, str] | tuple[str, str, str]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a table of some dozen rows has many."""
    monkeypatch.setattr("spillway.flow.pagesize.FIRST_ROWS", 3)
    monkeypatch.setattr("spillway.flow.pagesize.LEAST_ROWS", 1)
    monkeypatch.setattr("spillway.flow.pagesize.MOST_ROWS", 8)


@dataclass
class Clients:
    """Who changes the rows: single statements, larger transactions, and some that take their time."""

    world: World
    actions: tuple[str, ...] = ("insert", "update", "update", "update", "delete", "move")
    truncates: float = 0.0
    slow: list[tuple[Transaction, list[Change]]] = field(default_factory=list)

    def some(self, transactions: int) -> None:
        dice, postgres = self.world.dice, self.world.postgres
        for _ in range(transactions):
            busy = {key.rpartition(":")[2] for one, _ in self.slow for key in one.touches}
            free = [name for name in NAMES if name not in busy]
            hot = free[:6] if dice.random() < 0.5 else free
            if dice.random() < self.truncates and not self.slow:
                postgres.commit(("truncate", "t"))
                continue
            rows = self._rows(hot)
            if dice.random() < 0.2:
                self.slow.append((postgres.begin(*rows), rows))
            else:
                postgres.commit(*rows)
            if self.slow and dice.random() < 0.3:
                self._end(*self.slow.pop(dice.randrange(len(self.slow))))
            postgres.show_some(0.1)

    def _rows(self, names: list[str]) -> list[Change]:
        """Of rows that are there, or are not, as the statement needs it."""
        dice = self.world.dice
        rows: list[Change] = []
        now: dict[str, bool] = {}  # for this transaction

        def there(key: str) -> bool:
            return now.get(key, self.world.postgres.has(key))

        for _ in range(dice.choice((1, 1, 1, 2, 6))):
            table = dice.choice(("", "", "", "u:"))
            action = dice.choice(self.actions)
            key, new = (table + name for name in dice.sample(names, 2))
            if not there(key):
                action = "insert"
            elif action == "insert" or (action == "move" and there(new)):
                action = "update"
            rows.append((action, key, new) if action == "move" else (action, key))
            now[key] = action not in ("delete", "move")
            if action == "move":
                now[new] = True
        return rows

    def _end(self, transaction: Transaction, rows: list[Change]) -> None:
        if self.world.dice.random() < 0.8:
            self.world.postgres.finish(transaction, *rows)
        else:  # rolled back
            self.world.postgres.show(transaction)

    def done(self) -> None:
        for transaction, rows in self.slow:
            self._end(transaction, rows)
        self.slow.clear()
        self.world.postgres.show_some(1.0)


def mischief(world: World, source: FakePages) -> None:
    dice = world.dice
    source.trouble = dice.choice((0.0, 0.0, 0.3))
    for sink in world.sinks.values():
        sink.trouble = dice.choice((0.0, 0.1, 0.4))
        sink.down = dice.random() < 0.15
        keys = [f"public.{table}:{name}" for table in "tu" for name in (*NAMES, "group 0")]
        sink.bad = set(dice.sample(keys, dice.choice((0, 0, 2, 4))))
    if dice.random() < 0.3:
        world.postgres.cuts += 1


async def watch_memory(engine: Engine) -> None:
    """No pool above its limit, nor what is remembered of the stream."""
    budget, carried = engine.budget, engine.capture.carried
    while True:
        for pool in (budget.capture, budget.window, budget.common):
            assert 0 <= pool.held_bytes <= pool.limit_bytes, pool.name
        assert 0 <= carried._bytes <= carried._limit_bytes
        await asyncio.sleep(0.001)


def judge_pages(source: FakePages) -> None:
    """A crash repeats one page of a reader at most: what comes first in the next life is what came last in the one
    before, or what comes behind that."""
    by_part: dict[object, list[tuple[int, tuple[str, ...] | None]]] = {}
    for one in source.asked:
        if one.within is not None:
            by_part.setdefault((one.backfill, one.within), []).append((one.life, one.cursor))
    for part, asked in by_part.items():
        for (life, cursor), (next_life, again) in pairwise(asked):
            assert (again or ()) >= (cursor or ()), f"{part}: {again} after {cursor}, in lives {life} and {next_life}"


@dataclass
class Play:
    world: World
    source: FakePages
    clients: Clients
    crashes: float = 0.4
    parallel: int = 1
    tables: tuple[str, ...] = ("t",)

    async def run(self, rounds: int) -> None:
        world, dice = self.world, self.world.dice
        self.clients.some(10)
        engine = await world.start()
        watch = asyncio.create_task(watch_memory(engine))
        try:
            for _ in range(rounds):
                mischief(world, self.source)
                self.clients.some(6)
                await self._begin(engine)
                for _ in range(5):
                    await asyncio.sleep(dice.random() * 0.02)
                    self.clients.some(3)
                if dice.random() < self.crashes:
                    watch.cancel()
                    await world.crash(engine)
                    engine = await world.start()
                    watch = asyncio.create_task(watch_memory(engine))
                if watch.done():
                    watch.result()
            await self._finish(engine)
        finally:
            watch.cancel()
            await world.end(engine)
        assert engine.budget.held_bytes == 0

    async def _begin(self, engine: Engine) -> None:
        """Now and then, one where there is none."""
        for name, selection in self.world.selections.items():
            for table in self.tables:
                busy = any(
                    (b.state.sink, b.state.request.table) == (name, table) and not b.state.has_ended
                    for b in engine.backfills
                )
                if table in selection.tables and not busy and self.world.dice.random() < 0.4:
                    await engine.backfill(name, table, parallel=self.parallel)

    async def _finish(self, engine: Engine) -> None:
        """Peace. What the sinks have is judged after one backfill each that was complete, whenever that was."""
        world = self.world
        peace(world)
        self.source.trouble = 0.0
        for name, selection in world.selections.items():
            states = [of_json(document) for _, document in engine.store.backfills(name, ended=True)]
            done = {state.request.table for state in states if state.state != "cancelled"}
            for table in self.tables:
                if table in selection.tables and table not in done:
                    await engine.backfill(name, table, parallel=self.parallel)
        for delivery in engine.deliveries.values():
            delivery.try_now()
        self.clients.some(10)
        before = world.postgres.confirmed_lsn
        self.clients.done()
        await engine.backfilled()
        await engine.settled()
        assert all(b.state.state == "completed" for b in engine.backfills)
        assert world.postgres.confirmed_lsn >= before
        judge_pages(self.source)
        for name, sink in world.sinks.items():
            judge_rows(world, name, self.tables)
            if sink.semantics != "state":
                world.judge(name, crashed=world.lives > 0, excused=_truncated_away(world, name))
        async with asyncio.timeout(20):
            while world.postgres.confirmed_lsn < world.postgres.transactions[-1][1]:
                await asyncio.sleep(0.001)
        assert engine.capture.carried._bytes == 0
        assert engine.budget.pages.held_bytes == 0
        assert self.source.open_readers == 0 or world.lives > 0


def _truncated_away(world: World, sink: str) -> set[tuple[int, int, int]]:
    """What goes with a TRUNCATE if it waits until then."""
    history = world.history(sink)
    last = max((position for position, keys in history if not keys), default=(0, 0, 0))
    return {position for position, _ in history if position < last} if world.selections[sink].truncates else set()


def plays(world: World, *, standby: bool = False, primary: bool = True, **clients: object) -> Play:
    world.postgres.exists(*NAMES[::2], *(f"u:{name}" for name in NAMES[::3]))
    source = pages(world, standby=standby, primary=primary)
    source.lag = True
    source.stream_may_miss_a_table = world.dice.random() < 0.3
    world.postgres.lag = 0.5
    for sink in world.sinks.values():
        sink.loses_answers = world.dice.random() < 0.3
    return Play(world, source, Clients(world, **clients))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
async def test_a_sink_ends_equal_to_the_source(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name in SEMANTICS:
        world.sink(name, name)
    await plays(world).run(rounds=6)


@pytest.mark.parametrize("seed", range(100, 104))
async def test_the_same_for_sinks_that_want_parts_by_orders_of_their_own(
    worlds: Callable[[int], World], seed: int
) -> None:
    world = worlds(seed)
    world.sink("one table", "events", Selection(tables=("u",)))
    world.sink("by group", "events", Selection(groups_of=("t",)))
    world.sink("by group, a line at a time", "ordered", Selection(groups_of=("t", "u")))
    world.sink("in no order", "events", Selection(grouping=False))
    play = plays(world)
    play.tables = ("t", "u")
    await play.run(rounds=4)


@pytest.mark.parametrize("seed", range(150, 156))
async def test_every_row_comes_to_sinks_that_do_not_take_all_changes(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    no_updates: frozenset[Action] = frozenset({"insert", "delete"})
    world.sink("no deletes", "state", Selection(actions=frozenset({"insert", "update"})))
    world.sink("no updates", "state", Selection(actions=no_updates))
    world.sink("events without updates", "events", Selection(actions=no_updates))
    world.sink("lines without updates", "ordered", Selection(actions=no_updates))
    await plays(world, actions=("insert", "update", "update", "delete")).run(rounds=5)


@pytest.mark.parametrize("seed", range(200, 206))
async def test_the_same_by_readers_in_parallel_from_a_standby(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name in SEMANTICS:
        world.sink(name, name)
    play = plays(world, standby=True, primary=seed % 2 == 0)
    play.parallel = 3
    await play.run(rounds=5)


@pytest.mark.parametrize("seed", range(300, 306))
async def test_the_same_with_updates_that_are_not_whole(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    for name in SEMANTICS:
        world.sink(name, name)
    play = plays(world, actions=("insert", "update", "partial", "partial", "delete", "move"))
    play.parallel = 2
    await play.run(rounds=5)


@pytest.mark.parametrize("seed", range(400, 406))
async def test_the_same_with_truncates_and_little_memory(worlds: Callable[[int], World], seed: int) -> None:
    world = worlds(seed)
    world.sink("applied", "atomic", Selection(truncates=True), max_memory_bytes=30_000, max_messages=12)
    world.sink("ignored", "state", max_messages=12)
    world.sink("events", "events", max_messages=12)
    await plays(world, truncates=0.05).run(rounds=5)


@pytest.mark.parametrize("seed", range(500, 504))
async def test_the_same_when_what_is_carried_is_forgotten_again_and_again(
    worlds: Callable[[int], World], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.flow.carried._PART_BYTES", 250_000)  # one chunk is all there may be
    world = worlds(seed)
    for name in ("events", "state"):
        world.sink(name, name)  # type: ignore[arg-type]
    await plays(world).run(rounds=5)

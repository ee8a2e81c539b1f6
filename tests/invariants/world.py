"""A small world for the flow: a source of made-up transactions, sinks that misbehave by dice, crashes by copy.

The real store, window, delivery and capture run; the stream, the decoder and the sinks are replaced. A crash is what
the disk held at that moment: the state file and its log are copied as they are, everything in memory is dropped, and
a new engine starts on the copy, reading the slot from what "Postgres" was told. The record of what each sink applied
survives, as the outside world does. Time runs fifty times as fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spillway.change import Change, Message
from spillway.errors import Finding
from spillway.flow.budget import Budget
from spillway.flow.capture import Capture
from spillway.flow.delivery import Delivery
from spillway.flow.inflow import SinkSpec
from spillway.flow.route import Router, Subscription
from spillway.metrics import Metrics
from spillway.pgoutput.messages import Begin, Commit
from spillway.pgoutput.relation import Relation, TableInfo
from spillway.sinks.base import OK, Result, Semantics, reject, retry, sink_down
from spillway.source.stream import Keepalive, XLogData
from spillway.store.base import Identity, Store
from spillway.store.sqlite import open_store

SPEED = 50.0


class FastClock:
    def monotonic(self) -> float:
        return time.monotonic() * SPEED

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / SPEED)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds / SPEED)


@dataclass
class Postgres:
    """What the server remembers: committed transactions, and what it was told may go."""

    transactions: list[tuple[int, int, list[Change]]] = field(default_factory=list)  # commit_lsn, end_lsn, changes
    confirmed_lsn: int = 0
    lsn: int = 1000

    def commit(self, *rows: tuple[str, str] | tuple[str, str, str]) -> None:
        """A transaction: (action, key) or ("move", old key, new key)."""
        self.lsn += 100
        changes = [self._change(idx, *row) for idx, row in enumerate(rows)]
        self.transactions.append((self.lsn, self.lsn + 48, changes))
        self.lsn += 48

    def _change(self, idx: int, action: str, key: str, new: str | None = None) -> Change:
        def one(action: str, key: str) -> Change:
            body = b'{"record":{"id":"%b","v":"%d/%d"}' % (key.encode(), self.lsn, idx)
            return Change(
                self.lsn, idx, "public", "t", action, f"public.t:{key}", (key,), body, len(body) - 10, idx + 1, True,  # type: ignore[arg-type]
                time.time(),
            )  # fmt: skip

        if new is None:
            return one(action, key)
        return replace(one("update", new), old=one("delete", key))


class FakeStream:
    largest_frame_bytes = 0

    def __init__(self, postgres: Postgres, events: list[object]) -> None:
        self._postgres = postgres
        self._events = events
        self._frames: list[XLogData | Keepalive] = []
        self._sent = 0
        self._start = postgres.confirmed_lsn
        self.flush_sent = postgres.confirmed_lsn

    def next(self) -> XLogData | Keepalive | None:
        while not self._frames and self._sent < len(self._postgres.transactions):
            commit_lsn, end_lsn, changes = self._postgres.transactions[self._sent]
            self._sent += 1
            if end_lsn <= self._start:
                continue
            for event in (Begin(1, commit_lsn, 0.0, 0), *changes, Commit(commit_lsn, end_lsn, 0.0)):
                self._events.append(event)
                self._frames.append(XLogData(0, 0, b"E" + (len(self._events) - 1).to_bytes(8, "big")))
            self._frames.append(Keepalive(end_lsn, False))
        return self._frames.pop(0) if self._frames else None

    async def more(self) -> None:
        while self._sent >= len(self._postgres.transactions):
            await asyncio.sleep(0.001)

    def send_feedback(self, write_lsn: int, flush_lsn: int, reply: bool = False) -> None:
        assert flush_lsn >= self._postgres.confirmed_lsn or flush_lsn == 0, "the confirmed position went back (I1)"
        self._postgres.confirmed_lsn = max(self._postgres.confirmed_lsn, flush_lsn)

    async def flush(self) -> None:
        pass


@dataclass
class FakeConnection:
    stream: FakeStream

    async def describe(self, relation: Relation) -> TableInfo:
        return TableInfo(1, ("id",), {})

    def unkeyable(
        self, relation: Relation, info: TableInfo, columns: tuple[str, ...] | None, needs_key: bool
    ) -> Finding | None:
        return None

    async def close(self) -> None:
        pass


class FakeDecoder:
    def __init__(self, events: list[object]) -> None:
        self._events = events

    def feed(self, payload: bytes) -> object:
        event = self._events[int.from_bytes(payload[1:], "big")]
        return replace(event, holders=0) if isinstance(event, Change) else event


Applied = tuple[tuple[int, int, int], tuple[str, ...]]  # position, keys


@dataclass
class FakeSink:
    """Misbehaves with probability ``trouble``; ``bad`` keys are rejected always. What was applied is on record."""

    semantics: Semantics
    dice: random.Random
    max_in_flight: int = 3
    single: bool = False
    trouble: float = 0.0
    down: bool = False
    bad: set[str] = field(default_factory=set)
    applied: list[Applied] = field(default_factory=list)
    asked: list[list[Applied]] = field(default_factory=list)

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def send(self, batch: Sequence[Message]) -> Sequence[Result] | Result:
        self.asked.append([(m.position, m.keys) for m in batch])
        if self.dice.random() < 0.5:
            await asyncio.sleep(self.dice.random() * 0.01)
        if self.down:
            return sink_down("refused")
        if self.dice.random() < self.trouble / 3:
            if self.dice.random() < 0.5:  # applied, but the answer is lost
                self._apply(batch)
            return sink_down("cut")
        if self.semantics in ("atomic", "ordered"):
            refused = next((n for n, m in enumerate(batch) if self._refuses(m)), None)
            if refused is not None:
                if self.semantics == "ordered":  # what stands before the first failure was applied
                    self._apply(batch[:refused])
                return reject("constraint")
            self._apply(batch)
            return OK
        results = []
        for message in batch:
            if self._refuses(message):
                results.append(reject("mapping"))
            elif self.dice.random() < self.trouble:
                results.append(retry("busy"))
            else:
                self._apply([message])
                results.append(OK)
        return results

    def _refuses(self, message: Message) -> bool:
        return not self.bad.isdisjoint(message.keys) or self.dice.random() < self.trouble / 5

    def _apply(self, batch: Sequence[Message]) -> None:
        self.applied += [(m.position, m.keys) for m in batch]


@dataclass
class Engine:
    """One life of the process."""

    store: Store
    deliveries: dict[str, Delivery]
    capture: Capture
    budget: Budget
    stop: asyncio.Event
    task: asyncio.Task[None]
    postgres: Postgres

    async def settled(self, seconds: float = 60.0) -> None:
        """Until everything was read and nothing waits anywhere but in dead letters."""
        async with asyncio.timeout(seconds):
            while self._reads or any(map(_unsettled, self.deliveries.values())):
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.005)

    @property
    def _reads(self) -> bool:
        transactions = self.postgres.transactions
        return bool(transactions) and self.capture.received_lsn < transactions[-1][1]


def _unsettled(delivery: Delivery) -> bool:
    return bool(delivery.counters.messages or delivery.memory_messages or delivery.open_lsn is not None)


class World:
    def __init__(self, folder: Path, seed: int, limit_bytes: int = 8 << 20) -> None:
        self.folder = folder
        self.dice = random.Random(seed)
        self.postgres = Postgres()
        self.sinks: dict[str, FakeSink] = {}
        self.specs: dict[str, dict[str, object]] = {}
        self.limit_bytes = limit_bytes
        self._lives = 0
        self._state = folder / "state-0.db"

    def sink(self, name: str, semantics: Semantics, **spec: object) -> FakeSink:
        in_flight = 1 if semantics in ("ordered", "atomic") else 3
        self.sinks[name] = FakeSink(semantics, random.Random(self.dice.random()), in_flight)
        self.specs[name] = spec
        return self.sinks[name]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncEngine:
        engine = await self.start()
        try:
            yield engine
        finally:
            await self.end(engine)

    async def start(self) -> Engine:
        clock = FastClock()
        store = open_store(self._state, clock)
        budget = Budget(self.limit_bytes, len(self.sinks))
        deliveries: dict[str, Delivery] = {}
        wants = []
        captures: list[Capture] = []
        for name, sink in self.sinks.items():
            spec = SinkSpec(**{
                "name": name, "batch_size": 7, "max_memory_bytes": 1 << 20, "max_messages": 200,
                "max_message_bytes": 1 << 20, "timeout_seconds": 60.0, **self.specs[name],
            })  # type: ignore[arg-type]  # fmt: skip
            delivery = Delivery(
                spec, sink, store, store.open_sink(name, "slot"), budget, clock, Metrics(),
                lambda: [c.moved() for c in captures],  # type: ignore[arg-type, return-value]
            )  # fmt: skip
            deliveries[name] = delivery
            splits = sink.semantics == "state"
            wants.append(Subscription(delivery, lambda _s, _t: True, splits_key_change=splits))
        router = Router(wants)
        router.learn("public", "t", lambda _columns, _needs: None)
        identity = store.identity("slot") or Identity("1", 1, "slot", 1, 0)

        async def reserve(lsn: int) -> None:
            nonlocal identity
            if lsn > identity.mark:
                identity = replace(identity, mark=lsn + 500)
                await asyncio.wrap_future(store.write_identity(identity))

        events: list[object] = []

        async def connect() -> FakeConnection:
            return FakeConnection(FakeStream(self.postgres, events))

        capture = Capture(
            "db",
            connect,
            lambda: FakeDecoder(events),
            router,
            list(deliveries.values()),
            budget,
            reserve,
            clock,  # type: ignore[arg-type, return-value]
        )
        captures.append(capture)
        capture.watermark.confirmed_lsn = self.postgres.confirmed_lsn
        stop = asyncio.Event()

        async def live() -> None:
            async with asyncio.TaskGroup() as tasks:
                for delivery in deliveries.values():
                    tasks.create_task(delivery.run())
                await tasks.create_task(capture.run(stop))

        return Engine(store, deliveries, capture, budget, stop, asyncio.create_task(live()), self.postgres)

    async def crash(self, engine: Engine) -> None:
        """What is on disk now is what is left."""
        self._lives += 1
        copy = self.folder / f"state-{self._lives}.db"
        # The log first: a checkpoint between the two copies moves pages from the log to the file, never back.
        for suffix in ("-wal", ""):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{self._state}{suffix}", f"{copy}{suffix}")
        confirmed = self.postgres.confirmed_lsn
        await self.end(engine)
        self.postgres.confirmed_lsn = confirmed
        self._state = copy

    async def end(self, engine: Engine) -> None:
        engine.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await engine.task
        await asyncio.to_thread(engine.store.close)

    # -- the oracle -------------------------------------------------------------------------------------------------
    def history(self, sink: str) -> list[Applied]:
        """What the sink should see, in order."""
        state = self.sinks[sink].semantics == "state"
        out: list[Applied] = []
        for commit_lsn, _, changes in self.postgres.transactions:
            for change in changes:
                at = (commit_lsn, change.commit_idx)
                assert change.key is not None
                if change.old is None or change.old.key is None:
                    out.append(((*at, 0), (change.key,)))
                elif state:
                    out += [((*at, 0), (change.old.key,)), ((*at, 1), (change.key,))]
                else:
                    out.append(((*at, 0), (change.old.key, change.key)))
        return out

    def judge(self, sink: str, *, crashed: bool, excused: set[tuple[int, int, int]] = frozenset()) -> None:  # type: ignore[assignment]
        """Nothing lost, nothing invented, order per key with replay closure (I2, I3)."""
        expected = self.history(sink)
        applied = self.sinks[sink].applied
        known = dict(expected)
        state = self.sinks[sink].semantics == "state"
        crashed = crashed or self.sinks[sink].semantics == "ordered"  # a batch is repeated after a part of it failed
        for position, keys in applied:
            assert known.get(position) == keys, f"{sink}: invented {position} {keys}"
        for key in sorted({k for _, keys in expected for k in keys}):
            should = [p for p, keys in expected if key in keys and p not in excused]
            got = [p for p, keys in applied if key in keys and p not in excused]
            if not state:
                assert set(got) == set(should), f"{sink} {key}: lost {sorted(set(should) - set(got))}"
            assert got[-1:] == should[-1:], f"{sink} {key}: ends with {got[-1:]}, not {should[-1:]}"
            highest = -1
            previous = -1
            for position in got:
                index = should.index(position)
                if index <= previous:  # a repetition: it must go on through all later ones, which the end shows
                    assert crashed or index == previous or state, f"{sink} {key}: {position} after {should[previous]}"
                    assert index <= highest
                elif not state:
                    assert index == previous + 1, f"{sink} {key}: {position} skips {should[previous + 1]}"
                previous = index
                highest = max(highest, index)


AsyncEngine = contextlib.AbstractAsyncContextManager[Engine]

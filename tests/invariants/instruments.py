"""What the tests take hold of in the small world: commits that wait, a server that cuts or asks, rows of any size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from invariants.world import Applied, Engine, FakeSink, FakeStream, Frame, Selection, World
from spillway.change import ACTIONS
from spillway.chunk import Batch, ChunkBuilder, Keying, Message, Span
from spillway.errors import SourceUnavailable
from spillway.flow.delivery import Delivery
from spillway.pgoutput import Keepalive
from spillway.position import Position
from spillway.sinks.base import Result
from spillway.store.base import Identity, Write

DEADLINE_SECONDS = 20.0
LOOP_TURNS = 200  # of the event loop: far more than a message needs from one step to the next


async def until(done: Callable[[], object], what: str = "") -> None:
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not done():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"never: {what or done}") from None


async def turns() -> None:
    """Lets everything happen that can."""
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


class HeldStore:
    """The real store, whose commits wait while it is held; they keep their order. Nothing else is changed.

    The mark (I9), which is asked for before a sink takes anything, waits only if ``holds_mark``.
    """

    def __init__(self, store: Any) -> None:
        self.real = store
        self.held = False
        self.holds_mark = False
        self.waiting: list[tuple[str, object, Future[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def write(self, write: Write) -> Future[Any]:
        return self._ask("write", write)

    def write_identity(self, identity: Identity) -> Future[Any]:
        return self._ask("write_identity", identity) if self.holds_mark else self.real.write_identity(identity)

    def _ask(self, method: str, what: object) -> Future[Any]:
        if not self.held:
            return getattr(self.real, method)(what)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.waiting.append((method, what, future))
        return future

    def waits(self, is_it: Callable[[Write], object]) -> bool:
        """Whether a write of that kind is held up."""
        return any(isinstance(what, Write) and is_it(what) for _, what, _ in self.waiting)

    def let_go(self, count: int | None = None) -> None:
        """All of it, or only the first ones asked for."""
        let = self.waiting if count is None else self.waiting[:count]
        self.waiting = [] if count is None else self.waiting[count:]
        self.held = bool(self.waiting) or count is not None
        for method, what, future in let:
            getattr(self.real, method)(what).add_done_callback(lambda done, future=future: _pass_on(done, future))


def _pass_on(done: Future[Any], future: Future[Any]) -> None:
    error = done.exception()
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


class RecordedStream(FakeStream):
    """The world's stream: everything it is told is on record; it can be cut, and it can ask for a reply."""

    streams: list[RecordedStream]
    keepalives = True

    def __init__(self, postgres: Any) -> None:
        super().__init__(postgres)
        self.told: list[int] = []
        self.is_cut = False
        self._said: list[Keepalive] = []
        self.streams.append(self)

    def next(self) -> Frame | None:
        if self.is_cut:
            raise SourceUnavailable("cut", "the connection is gone")
        if self._said:
            return self._said.pop(0)
        frame = super().next()
        while isinstance(frame, Keepalive) and not self.keepalives:
            frame = super().next()
        return frame

    def say(self, wal_end: int, reply_requested: bool = False) -> None:
        self._said.append(Keepalive(wal_end, reply_requested))

    async def more(self) -> None:
        while not self.is_cut and not self._said and not self.something_is_buffered:
            await asyncio.sleep(0.001)

    def send_feedback(self, write_lsn: int, flush_lsn: int, reply: bool = False) -> None:
        self.told.append(flush_lsn)
        super().send_feedback(write_lsn, flush_lsn, reply)


class Script(FakeSink):
    """A sink that answers by a function of the test's; nothing is left to chance.

    ``stalled``: requests wait until it is cleared; ``stalls``: those with one of these keys.
    """

    def __init__(self, semantics: Any, answer: Callable[[Message], Result], dice: Any, max_in_flight: int) -> None:
        super().__init__(semantics, dice, max_in_flight)
        self.answer = answer
        self.stalled = False
        self.stalls: set[str] = set()
        self.requests = 0

    async def send(self, batch: Batch) -> Sequence[Result] | Result:
        self.requests += 1
        self.asked.append([(m.position, m.keys) for m in batch])
        with self._in_flight(batch):
            return await self._send(batch)

    async def _send(self, batch: Batch) -> Sequence[Result] | Result:
        while self.stalled or any(not self.stalls.isdisjoint(m.keys) for m in batch):
            await asyncio.sleep(0.001)
        results = [self.answer(m) for m in batch]
        if self.semantics in ("atomic", "ordered"):
            first = next((n for n, r in enumerate(results) if r.outcome != "ok"), None)
            if first is not None:
                if self.semantics == "ordered":
                    self._apply(batch[:first])
                return results[first]
        self._apply([m for m, r in zip(batch, results, strict=True) if r.outcome == "ok"])
        return results if self.semantics in ("state", "events") else results[0]


def script(
    world: World,
    name: str,
    answer: Callable[[Message], Result],
    semantics: str = "events",
    selection: Selection | None = None,
    **spec: object,
) -> Script:
    plain = world.sink(name, semantics, selection, **spec)  # type: ignore[arg-type]
    scripted = Script(plain.semantics, answer, plain.dice, plain.max_in_flight)
    world.sinks[name] = scripted
    return scripted


def positions(applied: list[Applied]) -> list[tuple[int, int]]:
    """Commit LSN and index."""
    return [position[:2] for position, _ in applied]


def asked(sink: FakeSink) -> list[tuple[int, int]]:
    """Of every message that the sink was sent, whatever it said."""
    return [position[:2] for batch in sink.asked for position, _ in batch]


def commit_sized(world: World, *rows: tuple[str, int]) -> None:
    """A transaction of inserts: (key, bytes of the body)."""
    world.postgres.commit(*(("insert", key) for key, _ in rows))
    commit_lsn, end_lsn, changes = world.postgres.transactions[-1]
    sized = [replace(c, body=c.body.ljust(size, b" ")) for c, (_, size) in zip(changes, rows, strict=True)]
    world.postgres.transactions[-1] = (commit_lsn, end_lsn, sized)


def stored_span(first: int, keys: Sequence[str], size_bytes: int = 100) -> Span:
    """Inserts of these keys, at the positions from a number on."""
    builder = ChunkBuilder()
    for number, key in enumerate(keys, first):
        body = (b'{"record":{"id":"%b"}' % key.encode()).ljust(size_bytes)
        texts = (f"public.t:{key}".encode(), b"")
        builder.add(("public", "t"), ACTIONS.index("insert"), number * 10, 0, 0, body, 10, texts)
    return Span(builder.take(), Keying.EVENTS)


def put(store: Any, sink: str, spans: Sequence[Span], slot: str = "slot") -> None:
    """Put a backlog into a state file past any engine."""
    store.open_sink(sink, slot)
    store.write_identity(Identity("1", 1, slot, 1, 1 << 60)).result()
    for start in range(0, len(spans), 100):
        part = spans[start : start + 100]
        store.write(Write(sink, put=part, position=Position(*part[-1].position(len(part[-1]) - 1)))).result()


def state_file(world: World) -> Path:
    return world._state


def sole(engine: Engine) -> Delivery:
    """The delivery of a world with one sink."""
    (delivery,) = engine.deliveries.values()
    return delivery

"""From the slot to the sinks: reads frames, decodes them into chunks, hands each chunk to the sinks that want it, and
tells Postgres what may be dropped.

A *chunk* is what one go at the socket gave, up to a number of changes and bytes: the decoder fills it without an await
between two frames. It is handed over when it is full, or at once when nothing more has come: at low load one change is
one chunk. Handing over costs something for each sink, so under load a small chunk takes another bite first.

Credit (I4). Credit for a chunk is taken from the capture pool before its frames are decoded; the decoder counts for
each frame three times its size (libpq holds it twice while it is received) and what rendering adds, and stops when the
credit is used up. It is given back when every sink has taken the chunk: windows charge their own pool, the store's part
is kept until its commit. Bytes that libpq's buffer keeps until the next connect are charged as long; after a large
frame the connection is renewed at a commit.

Reading stops only for want of credit, or while a sink's full backlog blocks the slot (I7); ``why_waiting`` says which.
The reply to Postgres goes out on a timer of its own (`_feed_back`), whatever else is blocked.

After a reconnect the server repeats what was not confirmed; sinks know their tail and take only what is new.

**Pages** of a backfill are placed in the stream between two chunks, outside of a transaction, once everything up to a
position has been carried (`Turn`). While somebody waits for that, chunks are broken at commits, and an idle server is
asked where it stands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from spillway.chunk import LSN, MESSAGE_OVERHEAD_BYTES
from spillway.clock import Clock
from spillway.errors import Finding, SourceUnavailable, SpillwayError, StoreFailed
from spillway.flow.budget import Budget
from spillway.flow.carried import Carried
from spillway.flow.delivery import Delivery
from spillway.flow.names import TableNames
from spillway.flow.retry import backoff_seconds
from spillway.flow.route import Router
from spillway.flow.watermark import Watermark
from spillway.pgoutput import Committed, Decoder, Full, Keepalive, Relation, Renew, TableInfo, unroutable
from spillway.pgoutput.conditions import compiled
from spillway.source.stream import Stream
from spillway.store.base import Written

CHUNK_CHANGES = 4000
CHUNK_BYTES = 8 << 20  # of credit
WORTH_CHANGES = 64  # per sink: while more comes at once, a chunk is not handed over for less
FRAME_OVERHEAD_BYTES = 1536  # what a row's metadata adds to its bytes, while it is built and while it is copied
RENEW_FRAME_BYTES = 8 << 20
FEEDBACK_SECONDS = 0.2
STATUS_SECONDS = 5.0  # a status update is sent so often even if nothing moved
RECONNECT_CAP_SECONDS = 15.0
_NOT_KEPT_BYTES = 1 << 62  # of credit, where nothing is rendered
NEAR_BYTES = 1 << 20
ASK_SECONDS = 0.01  # while a page waits for its turn, the server is asked so often where it stands
CARRIED_SECONDS = 1.0  # so long credit is waited for before backfills give up what they remember
WHOLE_SECONDS = 0.05
GATE_SECONDS = 1.0  # a block is looked at again so often, whoever forgets to say that there is room

_log = structlog.get_logger()


class Connection(Protocol):
    """An open source: the stream, and the catalogue beside it."""

    stream: Stream

    async def describe(self, relation: Relation) -> TableInfo: ...

    def unkeyable(
        self, relation: Relation, info: TableInfo, columns: tuple[str, ...] | None, needs_key: bool
    ) -> Finding | None: ...

    async def published_as(self, name: tuple[str, str], oid: int) -> bool: ...

    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Turn:
    """A page waits for its place: behind everything up to ``lsn``. ``place`` gets the position that everything up to
    which has been handed to the sinks, and nothing else; False: it is too early."""

    lsn: int
    place: Callable[[int], Awaitable[bool]]
    placed: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Capture:
    def __init__(
        self,
        database: str,
        connect: Callable[[], Awaitable[Connection]],
        new_decoder: Callable[[Router, int, int], Decoder],
        router: Router,
        deliveries: Sequence[Delivery],
        budget: Budget,
        reserve_mark: Callable[[int], Awaitable[None]],
        reshaped: Callable[[str, str], None],
        names: TableNames,
        clock: Clock,
        slots: int = 1,
    ) -> None:
        self.database = database
        self._connect = connect
        self._new_decoder = new_decoder  # by its router, frame_overhead_bytes and renew_frame_bytes
        self._router = router
        self._deliveries = deliveries
        self._pool = budget.capture
        self._reserve_mark = reserve_mark  # returns when a durable mark covers the position (I9)
        self._reshaped = reshaped  # is told of each table, by the name that messages have, whose shape has come
        self._names = names
        self._clock = clock
        self.watermark = Watermark(0)
        self.received_lsn = 0
        self.connected = False
        self.why_waiting = "connecting"  # "": reading
        self.waiting_since = clock.monotonic()
        self.last_error: str | None = None
        self.truncates = 0
        self._room = asyncio.Event()  # a blocking backlog may have room
        self._feedback_now = asyncio.Event()
        self._credit = 0
        self._allowed_bytes = 0  # what the decoder may use of it, or what the next frame needs if no credit is so large
        self._routed = False  # since the last commit that the watermark knows
        self._libpq_bytes = 0
        self._fatal_at_start = slots == 1
        self._libpq_most_bytes = budget.capture.limit_bytes // 3 // slots
        self._size_up()
        self._covered_lsn = 0  # what may be confirmed, and a mark covers it
        self._covering: asyncio.Task[int] | None = None
        self._owing: set[asyncio.Task[None]] = set()
        self.carried = Carried(budget.capture, budget.capture.limit_bytes // 8 // slots)
        self._turns: list[Turn] = []
        self._own_names: dict[int, tuple[str, str]] = {}  # of tables, by OID, as they were last
        self.sent_lsn = 0  # the server was told that it is confirmed
        self._renew = False  # the connection, as soon as a transaction has ended

    def _size_up(self) -> None:
        """What depends on how many sinks there are."""
        deliveries = self._deliveries
        self.frame_overhead_bytes = FRAME_OVERHEAD_BYTES + MESSAGE_OVERHEAD_BYTES * len(deliveries)
        # So that no sink is stored only for want of room for a single chunk.
        least = min((d.spec.max_messages for d in deliveries), default=CHUNK_CHANGES)
        self._chunk_changes = max(1, min(CHUNK_CHANGES, least // 4))
        self._worth_changes = min(WORTH_CHANGES * len(deliveries), self._chunk_changes)

    async def rewire(self, router: Router, deliveries: Sequence[Delivery]) -> None:
        """Other sinks from the next commit on. The connection is renewed there: what is not confirmed comes again, and
        with it every table is named again, so that a sink that is new misses nothing from then on."""

        async def swap(_: int) -> bool:
            self._router, self._deliveries = router, deliveries
            self._size_up()
            self._renew = True
            return True

        await self.placed(Turn(0, swap))

    async def renew(self) -> None:
        """Begin a new connection at the next commit, which sees nothing of before what the server was told is confirmed
        (``sent_lsn``)."""

        async def swap(_: int) -> bool:
            self._renew = True
            return True

        await self.placed(Turn(0, swap))

    async def placed(self, turn: Turn) -> None:
        """Wait until the page has its place. Cancellable; `Turn.place` must be able to tell then."""
        self._turns.append(turn)
        self._feedback_now.set()
        try:
            await turn.placed
        finally:
            if turn in self._turns:
                self._turns.remove(turn)

    def moved(self) -> None:
        """A sink's watermark may have moved, or its backlog has room."""
        self._room.set()

    # -- life -------------------------------------------------------------------------------------------------------
    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop`, reconnecting with back-off. What somebody must mend ends the process only at the start of
        a process with one slot; later it is shown and tried again, while the sinks work off what they have."""
        failures, connected = 0, False
        while not stop.is_set():
            try:
                self._wait("connecting")
                connection = await self._connect()
                try:
                    failures, connected = 0, True
                    self.connected = True
                    self.last_error = None
                    await self._session(connection, stop)
                finally:
                    self.connected = False
                    await connection.close()
            except StoreFailed:
                raise
            except SpillwayError as error:
                if self._fatal_at_start and not connected and not isinstance(error, SourceUnavailable):
                    raise
                self.last_error = str(error)
                self._wait(f"source: {error}")
                delay = backoff_seconds(failures, 0.25, RECONNECT_CAP_SECONDS)
                failures += 1
                _log.warning(
                    "source unavailable", database=self.database, error=str(error), retry_seconds=round(delay, 2)
                )
                await _first_of(stop.wait(), self._clock.sleep(delay))
            finally:  # what was not handed over is read again
                self._give_credit()
                self._pool.give(self._libpq_bytes)
                self._libpq_bytes = 0

    async def _session(self, connection: Connection, stop: asyncio.Event) -> None:
        """One connection, until `stop`, the loss of the connection, or a wish to renew it."""
        stream = connection.stream
        self.received_lsn = max(self.received_lsn, self.watermark.confirmed_lsn)
        feedback = asyncio.create_task(self._feed_back(stream), name=f"feedback {self.database}")
        reading = asyncio.create_task(self._read(connection), name=f"capture {self.database}")
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({feedback, reading, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in (feedback, reading):
                if task.done():
                    await task  # raises what ended it
        finally:
            stopped.cancel()
            feedback.cancel()
            reading.cancel()
            await asyncio.gather(feedback, reading, stopped, return_exceptions=True)

    async def last_feedback(self) -> None:
        """At the end of a clean stop, when everything is settled: connect once more and confirm."""
        connection = await self._connect()
        try:
            lsn = await self._cover(self._confirmable())
            # Who hangs up with something unread makes the other side forget what it has not read: the server is asked
            # until it answers from there. What it sends before that was confirmed just now.
            decoder = self._decoder()
            reached = 0
            while reached < lsn:
                connection.stream.send_feedback(lsn, lsn, reply=True)
                await connection.stream.flush()
                reached = await self._next_keepalive(connection.stream, decoder)
        finally:
            await connection.close()

    async def _next_keepalive(self, stream: Stream, decoder: Decoder) -> int:
        """Changes that come before it are passed over: nobody wants them any more."""
        while True:
            stop = stream.fill(decoder, _NOT_KEPT_BYTES, CHUNK_CHANGES)
            if isinstance(stop, Keepalive):
                return stop.wal_end
            if isinstance(stop, Relation):
                decoder.learn(stop, TableInfo(stop.oid, (), {}), frozenset())
            decoder.take()
            if stop is None:
                await stream.more()

    # -- reading ----------------------------------------------------------------------------------------------------
    def _decoder(self) -> Decoder:
        return self._new_decoder(
            self._router, self.frame_overhead_bytes, min(RENEW_FRAME_BYTES, self._pool.limit_bytes // 6)
        )

    async def _read(self, connection: Connection) -> None:
        stream = connection.stream
        decoder = self._decoder()
        self._renew = False
        self._wait("")
        while True:
            decoder.break_at_lsn = min((max(1, turn.lsn) for turn in self._turns), default=0)
            stop = stream.fill(decoder, self._allowed_bytes, self._chunk_changes)
            if stop is None:
                few = 0 < decoder.count < self._worth_changes
                if not (few and await stream.again()) and not await self._whole(stream, decoder):
                    await self._hand_over(decoder)
                    await stream.more()
            elif isinstance(stop, Full):
                await self._hand_over(decoder)
                await self._take_credit(stop.needed_bytes, decoder.largest_frame_bytes)
            elif isinstance(stop, Keepalive):
                if not decoder.in_transaction:
                    await self._hand_over(decoder)
                    self.watermark.keepalive(stop.wal_end)
                    self.received_lsn = max(self.received_lsn, stop.wal_end)
                    await self._take_turns()
                if stop.reply_requested:
                    self._feedback_now.set()
                if self._renew:
                    return
            elif isinstance(stop, Committed):
                await self._hand_over(decoder)
                await self._take_turns()
                if self._renew:
                    return
            elif isinstance(stop, Renew):  # libpq keeps its buffer until then
                await self._hand_over(decoder)
                return
            else:
                await self._hand_over(decoder)  # what was decoded by the old shape goes by the old routes
                await self._learn(connection, decoder, stop)

    async def _whole(self, stream: Stream, decoder: Decoder) -> bool:
        """Where sinks ask for the total of a transaction its end, which is on its way, is worth a moment."""
        if not self._router.totals or not decoder.in_transaction or decoder.count >= self._chunk_changes:
            return False
        try:
            async with self._clock.timeout(WHOLE_SECONDS):
                await stream.more()
        except TimeoutError:
            return False
        return True

    async def _learn(self, connection: Connection, decoder: Decoder, relation: Relation) -> None:
        info = await connection.describe(relation)
        schema, table = info.root or (relation.schema, relation.table)
        self._reshaped(schema, table)
        own_name = (relation.schema, relation.table)
        before_own, self._own_names[relation.oid] = self._own_names.get(relation.oid, own_name), own_name
        if before_own not in self._own_names.values():  # nor has another table taken its place
            self._router.left(before_own, self.received_lsn)
        wanted = self._router.learn(
            schema,
            table,
            lambda columns, needs_key: connection.unkeyable(relation, info, columns, needs_key),
            self.received_lsn,
            lambda conditions: compiled(relation, info, conditions),
            lambda column, actions: unroutable(relation, info, column, actions),
            None if info.root is None else own_name,
        )
        before = await self._names.before(relation, info, connection)
        partition = None if info.root is None else own_name
        renamed = before is not None and self._router.renamed(before, (schema, table), partition, self.received_lsn)
        if not renamed and self._router.takes(schema, table):
            self._names.take(relation, info)
        decoder.learn(relation, info, wanted)

    async def _take_credit(self, size: int, largest_frame_bytes: int) -> None:
        """Credit for the next chunk, the next frame included, and for what libpq's buffer has grown to."""
        # What libpq keeps never passes a third of the pool, over all slots: so this much is always granted in the end.
        most = self._pool.limit_bytes - self._pool.limit_bytes // 3
        wanted = min(max(size, min(CHUNK_BYTES, self._pool.limit_bytes // 8)), most)
        grown = min(2 * largest_frame_bytes, self._libpq_most_bytes) - self._libpq_bytes
        if not self._pool.try_take(wanted):
            self._wait("memory: everything read is held by sinks or on its way to disk")
            try:
                async with self._clock.timeout(CARRIED_SECONDS):
                    await self._pool.take(wanted)
            except TimeoutError:  # what is remembered for pages is not given back by anybody while nothing is read
                self.carried.forget_all()
                await self._pool.take(wanted)
            self._wait("")
        self._credit = wanted
        self._allowed_bytes = max(wanted, size)  # a frame that never fits is here already: waiting would not end
        if grown > 0 and self._pool.try_take(grown):
            self._libpq_bytes += grown

    async def _hand_over(self, decoder: Decoder) -> None:
        """Give the chunk to the sinks. When this returns, every sink answers for its part of it."""
        chunk = decoder.take()
        if not chunk.count and not chunk.commit_lsn:
            self._give_credit()
            return
        self.truncates += chunk.truncates
        stored = []
        if chunk.count:
            self.carried.add(chunk)
            # The mark covers whatever a sink has taken, not only what is confirmed: after a failover to a server that
            # forked below it nothing may count as known already (I9).
            self._wait("state: the mark is on its way to disk")
            await self._reserve_mark(chunk.word(chunk.count - 1, LSN))
            self._wait("")
            routed = self._router.route(chunk)
            asked = [(d, span) for d, span in routed if d.needs_look_up]
            answers = await asyncio.gather(*(d.parked_among(span) for d, span in asked))
            parked = {d: answer for (d, _), answer in zip(asked, answers, strict=True)}
            self._routed = self._routed or bool(routed)
            for delivery, span in routed:
                written = delivery.intake(span, parked.get(delivery))
                if written is not None:
                    stored.append(written)
        if chunk.commit_lsn:
            self.received_lsn = chunk.end_lsn
            self.watermark.commit(chunk.commit_lsn, chunk.end_lsn, routed=self._routed)
            # What is behind the last commit belongs to a transaction that is not complete yet.
            self._routed = self._routed and bool(chunk.count) and chunk.word(chunk.count - 1, LSN) > chunk.commit_lsn
        kept = 0
        if stored:
            kept = min(self._credit, chunk.cost + MESSAGE_OVERHEAD_BYTES * chunk.count * len(stored))
        self._give_credit(but=kept)
        if kept:
            task = asyncio.create_task(self._give_when_durable(kept, stored))
            self._owing.add(task)
            task.add_done_callback(self._owing.discard)
        await self._gate()
        await asyncio.sleep(0)  # let deliveries run between two chunks

    async def _take_turns(self) -> None:
        """Outside of a transaction, with nothing in hand: the pages whose position has been passed get their place."""
        for turn in [t for t in self._turns if t.lsn <= self.received_lsn]:
            await self._reserve_mark(self.received_lsn)
            if await turn.place(self.received_lsn):
                if not turn.placed.done():
                    turn.placed.set_result(None)
                if turn in self._turns:
                    self._turns.remove(turn)

    def _give_credit(self, but: int = 0) -> None:
        self._pool.give(self._credit - but)
        self._credit = self._allowed_bytes = 0

    async def _give_when_durable(self, size: int, stored: Sequence[asyncio.Future[Written]]) -> None:
        try:
            await asyncio.wait(stored)
        finally:
            self._pool.give(size)

    async def _gate(self) -> None:
        """Wait while a full backlog blocks the slot."""
        while True:
            blocking = [d for d in self._deliveries if d.blocks]
            if not blocking:
                self._wait("")
                return
            self._wait("blocked: " + "; ".join(f"the backlog of {d.name} is full ({d.full})" for d in blocking))
            self._room.clear()
            await _first_of(self._room.wait(), self._clock.sleep(GATE_SECONDS))

    # -- confirming -------------------------------------------------------------------------------------------------
    async def _feed_back(self, stream: Stream) -> None:
        sent, sent_at, heard = 0, 0.0, -1
        while True:
            self._feedback_now.clear()
            lsn = await self._covered()
            now = self._clock.monotonic()
            quiet = heard == self.received_lsn
            near = self.received_lsn + NEAR_BYTES
            asked_for = any(turn.lsn <= near for turn in self._turns)  # else it says by itself how far it is
            if (
                lsn != sent
                or asked_for
                or self._feedback_due
                or now - sent_at >= (FEEDBACK_SECONDS * 5 if quiet else STATUS_SECONDS)
            ):
                # PostgreSQL 12 sends no keepalive to a client that is quiet: ask for one.
                stream.send_feedback(lsn, lsn, quiet or asked_for)
                await stream.flush()
                sent, sent_at, heard = lsn, now, self.received_lsn
                self.sent_lsn = lsn
            self._feedback_due = False
            pause = ASK_SECONDS if asked_for else FEEDBACK_SECONDS
            await _first_of(self._feedback_now.wait(), self._clock.sleep(pause))
            self._feedback_due = self._feedback_now.is_set()

    _feedback_due = True

    def _confirmable(self) -> int:
        """The LSN that may be confirmed now (I1), once a durable mark covers it (I9)."""
        lsns = [lsn for d in self._deliveries if (lsn := d.open_lsn) is not None]
        gaps = [lsn for d in self._deliveries if (lsn := d.gaps.lsn) is not None]
        return self.watermark.advance(min(lsns, default=None), min(gaps, default=None))

    async def _covered(self) -> int:
        """The same, as far as a mark covers it. The mark is not waited for longer than a feedback may be late."""
        if self._covering is None:
            self._covering = asyncio.create_task(self._cover(self._confirmable()))
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(FEEDBACK_SECONDS):
                self._covered_lsn = await asyncio.shield(self._covering)
                self._covering = None
        return self._covered_lsn

    async def _cover(self, lsn: int) -> int:
        await self._reserve_mark(lsn)
        return lsn

    def _wait(self, why: str) -> None:
        if not self.why_waiting:
            self.waiting_since = self._clock.monotonic()  # not at a change of the reason: a source that is down is so
        self.why_waiting = why


async def _first_of(*waits: Awaitable[object]) -> None:
    """Wait for the first; cancel and await the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

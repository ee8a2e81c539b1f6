"""The engine: the one place that builds and wires concrete objects, and the facade of the process for people.

Per process: one `Store` (locked before any slot is taken), one `Budget`. Per database: one `Pipeline`, that is one
slot, its `Capture`, its `Router` and one `Delivery` per sink. `Engine.run` owns every task; the first that fails takes
the process down with its error, since what is not confirmed is read again after a restart.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from spillway import sinks
from spillway.change import Message
from spillway.clock import SystemClock
from spillway.config import Config, Database, Sink
from spillway.errors import SpillwayError
from spillway.flow.budget import Budget
from spillway.flow.capture import Capture
from spillway.flow.delivery import Delivery, SinkSpec
from spillway.flow.health import Health
from spillway.flow.identity import MARK_RESERVE_BYTES, judge
from spillway.flow.limits import Limits
from spillway.flow.route import Router, Subscription
from spillway.metrics import Metrics
from spillway.pgoutput.decoder import Decoder
from spillway.pgoutput.plan import DatabaseMeta
from spillway.position import format_lsn
from spillway.sinks.base import SinkContext, message_suffix
from spillway.source.connect import querying
from spillway.source.reread import Rereader
from spillway.source.session import Session, open_session
from spillway.source.slot import lag
from spillway.store.base import Identity, Select, Store, Waiting
from spillway.store.sqlite import open_store

TICK_SECONDS = 0.5
LAG_SECONDS = 1.0
STOP_SECONDS = 10.0  # how long a clean stop waits for what is in flight
STALLED_SECONDS = 60.0  # reading that does not go on for so long is not ready

_log = structlog.get_logger()


class Pipeline:
    """One database: a slot and its sinks."""

    def __init__(self, config: Config, database: Database, store: Store, budget: Budget, metrics: Metrics) -> None:
        self.database = database
        self._clock = SystemClock()
        self._store = store
        self._slot = database.slot.name
        self.identity = store.identity(self._slot)
        self.lag_bytes: int | None = None
        self.confirmed_lsn: int | None = None
        self.sinks = [s for s in config.sinks if s.database == database.name and s.status != "disabled"]
        self.deliveries: list[Delivery] = []
        self.suffixes: dict[str, bytes] = {}
        self.health: dict[str, Health] = {}
        self._wants: list[Subscription] = []
        for sink in self.sinks:
            self._add(config, sink, budget, metrics)
        self.router = Router(self._wants)
        self._max_message_bytes = max((s.max_message_bytes for s in self.sinks), default=1 << 20)
        self.capture = Capture(
            database.name,
            self._connect,
            self._new_decoder,
            self.router,
            self.deliveries,
            budget,
            self._reserve_mark,
            self._clock,
        )

    def _new_decoder(self) -> Decoder:
        db = self.database
        meta = DatabaseMeta(db.id, db.name, db.annotations, db.database, db.hostname)
        return Decoder(meta, self.router.group_columns, self._max_message_bytes)

    def _add(self, config: Config, sink: Sink, budget: Budget, metrics: Metrics) -> None:
        suffix = message_suffix(sink.id, sink.name, sink.annotations)
        epoch = self.identity.epoch if self.identity is not None else 1
        built = sinks.build(config, sink, SinkContext(sink.name, suffix, config.base_dir, epoch, 0))
        state = self._store.open_sink(sink.name, self._slot)
        spec = SinkSpec(
            name=sink.name,
            batch_size=1 if getattr(built, "single", False) else sink.batch_size,
            max_memory_bytes=sink.max_memory_mb << 20,
            max_messages=sink.max_messages,
            max_message_bytes=sink.max_message_bytes,
            timeout_seconds=sink.request_timeout_seconds,
            max_retry_count=sink.max_retry_count,
            on_reject=sink.on_reject,
            toast_fails=sink.toast == "fail",
            limits=Limits(
                sink.backlog.warn_messages,
                sink.backlog.max_messages,
                sink.backlog.max_bytes,
                sink.backlog.max_age_seconds,
                sink.backlog.on_full,
            ),
        )
        delivery = Delivery(spec, built, self._store, state, budget, self._clock, metrics, self._moved)
        delivery.paused = sink.status == "paused" if state.paused is None else state.paused
        self.deliveries.append(delivery)
        self.suffixes[sink.name] = suffix
        self.health[sink.name] = Health()
        is_state = built.semantics == "state"
        atomic = built.semantics == "atomic"
        self._wants.append(
            Subscription(
                delivery,
                sink.source.selects,
                frozenset(sink.actions),
                sink.group_columns,
                grouping=sink.message_grouping or is_state or atomic,
                needs_key=is_state or atomic,
                splits_key_change=is_state or atomic,
                applies_truncate=sink.on_truncate == "apply",
            )
        )

    def _moved(self) -> None:
        self.capture.moved()

    # -- the slot ---------------------------------------------------------------------------------------------------
    async def _connect(self) -> Session:
        """Open the stream, after the state was held against the slot (I9)."""
        session = await open_session(
            self.database,
            [s.source for s in self.sinks],
            self.identity.timeline if self.identity else None,
            create_slot=self.identity is None,
        )
        try:
            server = session.server
            finding = judge(self._slot, self.identity, server)
            if finding is not None:
                raise SpillwayError.of(finding)
            if self.identity is None:
                await self._remember(
                    Identity(
                        server.system_id, server.timeline, self._slot, 1, server.confirmed_lsn + MARK_RESERVE_BYTES
                    )
                )
            elif self.identity.timeline != server.timeline:
                await self._remember(replace(self.identity, timeline=server.timeline))
            self.capture.watermark.confirmed_lsn = max(self.capture.watermark.confirmed_lsn, server.confirmed_lsn)
            await session.start()
        except BaseException:
            await session.close()
            raise
        return session

    async def _remember(self, identity: Identity) -> None:
        await asyncio.wrap_future(self._store.write_identity(identity))
        self.identity = identity

    async def _reserve_mark(self, lsn: int) -> None:
        if self.identity is not None and lsn > self.identity.mark:
            await self._remember(replace(self.identity, mark=lsn + MARK_RESERVE_BYTES))

    async def watch_lag(self) -> None:
        """The slot's lag as the server sees it, every second, on a connection of its own."""
        while True:
            try:
                async with querying(self.database.conninfo(), self._slot) as query:
                    while True:
                        self.lag_bytes, self.confirmed_lsn = await lag(query, self._slot)
                        await self._clock.sleep(LAG_SECONDS)
            except SpillwayError:  # capture meets and reports the same
                self.lag_bytes = None
                await self._clock.sleep(LAG_SECONDS)

    async def revive(self, delivery: Delivery, letters: Sequence[Message]) -> int:
        """Send dead letters again: events as they were, marked ``replayed``; of a state the row as it is now."""
        if delivery.is_state:
            async with querying(self.database.conninfo(), self._slot) as query:
                reread = Rereader(query, self._new_decoder)
                fresh = [await reread.read(m.change.schema, m.change.table, m.change.pks) for m in letters]
        else:
            fresh = [replace(m.change, body=m.change.body + b',"replayed":true') for m in letters]
        revived = [(m.row, Message(change, m.keys)) for m, change in zip(letters, fresh, strict=True)]
        await delivery.revive(revived)
        return len(revived)

    async def tick(self) -> None:
        for delivery in self.deliveries:
            await delivery.check_limits()
            health = self.health[delivery.name]
            health.refused = [f for (sink, _, _), f in self.router.refused.items() if sink == delivery.name]
            health.update(delivery, self._clock.monotonic(), self._clock.wall())

    def stalled(self) -> str | None:
        """Why the slot is not being read, if that is so for longer than is normal."""
        why = self.capture.why_waiting
        if why.startswith("blocked"):
            return why
        if why and self._clock.monotonic() - self.capture.waiting_since > STALLED_SECONDS:
            return why
        return None

    def delivery(self, sink: str) -> Delivery | None:
        return next((d for d in self.deliveries if d.name == sink), None)


class Engine:
    def __init__(self, config: Config) -> None:
        self._config = config
        self.metrics = Metrics()
        self._started = datetime.now(UTC)
        self._store = open_store(config.state_path)
        self._budget = Budget(config.memory.limit_bytes, len(config.sinks))
        self.pipelines = [Pipeline(config, d, self._store, self._budget, self.metrics) for d in config.databases]

    # -- life -------------------------------------------------------------------------------------------------------
    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set, then a clean stop. Raises the SpillwayError that ended it."""
        reading_ends = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                deliveries = [
                    tasks.create_task(d.run(), name=f"delivery {d.name}") for p in self.pipelines for d in p.deliveries
                ]
                captures = [
                    tasks.create_task(p.capture.run(reading_ends), name=f"slot {p.database.slot.name}")
                    for p in self.pipelines
                ]
                background = [tasks.create_task(self._tick()), tasks.create_task(self._store_failure())]
                background += [tasks.create_task(p.watch_lag()) for p in self.pipelines]
                await stop.wait()
                _log.info("stopping")
                reading_ends.set()
                await asyncio.wait(captures)
                await self._stop(deliveries)
                for task in background:
                    task.cancel()
        except* SpillwayError as group:
            raise _first(group) from None
        finally:
            await asyncio.to_thread(self._store.close)

    async def _stop(self, deliveries: Sequence[asyncio.Task[None]]) -> None:
        """What is in flight finishes until the deadline, is settled, and confirmed."""
        for pipeline in self.pipelines:
            for delivery in pipeline.deliveries:
                delivery.stop()
        if deliveries:
            _, late = await asyncio.wait(deliveries, timeout=STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for pipeline in self.pipelines:
            try:
                async with asyncio.timeout(STOP_SECONDS / 2):
                    await pipeline.capture.last_feedback()
            except (SpillwayError, TimeoutError) as error:  # it is sent again after the next start
                _log.info("last feedback not sent", database=pipeline.database.name, error=str(error))

    async def _tick(self) -> None:
        clock = SystemClock()
        while True:
            for pipeline in self.pipelines:
                await pipeline.tick()
            await clock.sleep(TICK_SECONDS)

    async def _store_failure(self) -> None:
        await asyncio.wrap_future(self._store.failed)

    # -- what people see --------------------------------------------------------------------------------------------
    def ready(self) -> tuple[bool, str]:
        reasons = [why for p in self.pipelines if (why := p.stalled())]
        return not reasons, "; ".join(reasons)

    def status(self) -> dict[str, object]:
        return {
            "version": importlib.metadata.version("spillway-cdc"),
            "impl": "python",
            "started": self._started.isoformat(),
            "memory": {
                "limit_bytes": self._budget.limit_bytes,
                "held_bytes": self._budget.held_bytes,
                "capture_bytes": self._budget.capture.held_bytes,
                "window_bytes": self._budget.window.held_bytes,
                "store_reads": self._store.reads,
            },
            "databases": [self._database_status(p) for p in self.pipelines],
            "sinks": [
                self._sink_status(p, sink, d)
                for p in self.pipelines
                for sink, d in zip(p.sinks, p.deliveries, strict=True)
            ],
        }

    def _database_status(self, pipeline: Pipeline) -> dict[str, object]:
        capture = pipeline.capture
        return {
            "name": pipeline.database.name,
            "slot": pipeline.database.slot.name,
            "connected": capture.connected,
            "waiting": capture.why_waiting,
            "slot_lag_bytes": pipeline.lag_bytes,
            "confirmed_lsn": None if pipeline.confirmed_lsn is None else format_lsn(pipeline.confirmed_lsn),
            "received_lsn": format_lsn(capture.received_lsn),
            "last_error": capture.last_error,
            "truncates": capture.truncates,
            "epoch": pipeline.identity.epoch if pipeline.identity else None,
        }

    def _sink_status(self, pipeline: Pipeline, sink: Sink, delivery: Delivery) -> dict[str, object]:
        health = pipeline.health[sink.name]
        counters = delivery.counters
        gap = delivery.gap
        return {
            "name": sink.name,
            "database": sink.database,
            "type": sink.destination.type,
            "state": health.state,
            "reason": "; ".join(filter(None, [health.reason, self._blocked_by(pipeline, delivery)])),
            "since": datetime.fromtimestamp(health.since, UTC).isoformat(),
            "remedy": health.remedy,
            "backlog_messages": counters.messages,
            "backlog_bytes": counters.bytes,
            "backlog_oldest_seconds": round(delivery.oldest_seconds, 3) if counters.messages else 0,
            "parked_keys": counters.parked_keys,
            "dead_letters": counters.dead_letters,
            "messages_in_memory": delivery.memory_messages,
            "bytes_in_memory": delivery.memory_bytes,
            "stored": delivery.stored,
            "delivered": delivery.delivered,
            "truncates_ignored": delivery.truncates_ignored,
            "last_error": delivery.last_error,
            "position": str(delivery.tail),
            "gap": None
            if gap is None
            else {
                "first_lsn": format_lsn(gap.first_lsn),
                "last_lsn": None if gap.last_lsn is None else format_lsn(gap.last_lsn),
                "since": datetime.fromtimestamp(gap.since, UTC).isoformat(),
                "reason": gap.reason,
            },
        }

    def _blocked_by(self, pipeline: Pipeline, delivery: Delivery) -> str:
        """A block holds the slot for every sink, and every sink says so."""
        others = [d.name for d in pipeline.deliveries if d.blocks and d is not delivery]
        return f"the slot is not read: the backlog of {', '.join(others)} is full" if others else ""

    # -- what people ask for ----------------------------------------------------------------------------------------
    def _of(self, sink: str) -> tuple[Pipeline, Delivery]:
        for pipeline in self.pipelines:
            delivery = pipeline.delivery(sink)
            if delivery is not None:
                return pipeline, delivery
        names = ", ".join(d.name for p in self.pipelines for d in p.deliveries)
        raise SpillwayError("unknown_sink", f"there is no sink {sink!r}", f"there are: {names}")

    async def pause(self, sink: str) -> None:
        await self._of(sink)[1].pause()

    async def resume(self, sink: str) -> None:
        pipeline, delivery = self._of(sink)
        await delivery.resume(pipeline.capture.received_lsn)

    async def waiting(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]:
        self._of(sink)
        return await asyncio.to_thread(self._store.waiting, sink, after_key, limit, reason)

    async def show(self, sink: str, key: str, limit: int) -> list[bytes]:
        pipeline, _ = self._of(sink)
        messages = await asyncio.to_thread(self._store.show, sink, key, limit)
        return [m.change.body + pipeline.suffixes[sink] for m in messages]

    async def retry(self, sink: str, select: Select) -> int:
        return await self._of(sink)[1].retry(select)

    async def discard(self, sink: str, select: Select) -> int:
        return await self._of(sink)[1].discard(select)

    async def dead(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]:
        self._of(sink)
        return await asyncio.to_thread(self._store.dead, sink, after_key, limit, reason)

    async def show_dead(self, sink: str, key: str, limit: int) -> list[bytes]:
        pipeline, _ = self._of(sink)
        messages = await asyncio.to_thread(self._store.show_dead, sink, key, limit)
        return [m.change.body + pipeline.suffixes[sink] for m in messages]

    async def discard_dead(self, sink: str, select: Select) -> int:
        delivery = self._of(sink)[1]
        total = 0
        while count := await asyncio.wrap_future(self._store.discard_dead(sink, select, PAGE_MESSAGES)):
            total += count
        await delivery.refresh()
        return total

    async def retry_dead(self, sink: str, select: Select) -> int:
        """Events are sent again marked ``replayed``; of a state the row is read anew, and deleted if it is gone."""
        pipeline, delivery = self._of(sink)
        total, after = 0, 0
        while letters := await asyncio.to_thread(self._store.read_dead, sink, select, after, PAGE_MESSAGES):
            after = letters[-1].row
            total += await pipeline.revive(delivery, letters)
        return total

    async def export_dead(self, sink: str, select: Select) -> AsyncIterator[bytes]:
        pipeline, _ = self._of(sink)
        after = 0
        while letters := await asyncio.to_thread(self._store.read_dead, sink, select, after, 1):
            after = letters[-1].row
            for letter in letters:
                yield letter.change.body + pipeline.suffixes[sink] + b"\n"


PAGE_MESSAGES = 100


def _first(group: BaseExceptionGroup[SpillwayError]) -> SpillwayError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SpillwayError)
    return error

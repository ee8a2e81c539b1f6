"""The engine: the one place that builds and wires concrete objects, and the facade of the process for people.

Per process: one `Store` (locked before any slot is taken), one `Budget`. Per database: one `Pipeline`. `Engine.run`
owns every task; the first that fails takes the process down with its error, since what is not confirmed is read again
after a restart.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Literal

import structlog

from spillway import impl
from spillway.chunk import Message
from spillway.clock import SystemClock
from spillway.config import Config, Sink
from spillway.config.orders import BackfillOrder, ReindexOrder
from spillway.engine.listing import Page, dead_page, waiting_page
from spillway.engine.ordered import requests
from spillway.engine.pipeline import Pipeline
from spillway.engine.reindexes import Reindexes
from spillway.engine.related import COMPANION, Companion
from spillway.engine.shadow import shadows
from spillway.engine.shaping import new_budget
from spillway.errors import SpillwayError, first_of
from spillway.flow.delivery import Delivery
from spillway.flow.inflow import Process
from spillway.metrics import Metrics
from spillway.position import format_lsn
from spillway.store.base import Select
from spillway.store.people import PEOPLE_BYTES
from spillway.store.sqlite import open_store

TICK_SECONDS = 0.5
STOP_SECONDS = 10.0  # how long a clean stop waits for what is in flight

_log = structlog.get_logger()


class Engine:
    def __init__(self, config: Config) -> None:
        self.config = config  # as of the start
        self.metrics = Metrics()
        self._started = datetime.now(UTC)
        self._store = open_store(config.state_path)
        self._budget = new_budget(
            config, [*config.sinks, *(shadow for shadow, _ in shadows(config.sinks, self._store))]
        )
        process = Process(self._store, self._budget, SystemClock(), self.metrics)
        self._tasks: asyncio.TaskGroup
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._refreshing: dict[str, asyncio.Task[None]] = {}  # by companion
        self.pipelines = [Pipeline(config, database, process) for database in config.databases]
        self._reindexes = Reindexes(
            config, self.pipelines, self._store, self._budget.pages, process.clock, self.enlist, self.dismiss
        )

    # -- life -------------------------------------------------------------------------------------------------------
    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set, then a clean stop. Raises the SpillwayError that ended it."""
        reading_ends = asyncio.Event()
        if impl.WHY:
            _log.warning("the compiled part is not there: it goes on in Python, more slowly", reason=impl.WHY)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for pipeline in self.pipelines:
                    for delivery in pipeline.flowing:
                        self._deliver(delivery)
                captures = [
                    tasks.create_task(p.capture.run(reading_ends), name=f"slot {p.database.slot.name}")
                    for p in self.pipelines
                ]
                background = [tasks.create_task(self._tick()), tasks.create_task(self._store_failure())]
                background += [tasks.create_task(p.watch_lag()) for p in self.pipelines]
                background += [tasks.create_task(p.forget_related()) for p in self.pipelines]
                backfills = [tasks.create_task(p.backfills.run(), name="backfills") for p in self.pipelines]
                backfills.append(tasks.create_task(self._reindexes.run(), name="re-indexes"))
                for pipeline in self.pipelines:
                    for companion in pipeline.companions.values():
                        self._refresh(pipeline, companion)
                await stop.wait()
                _log.info("stopping")
                backfills += self._refreshing.values()
                for task in backfills:  # a page that is under way is read again
                    task.cancel()
                await asyncio.gather(*backfills, return_exceptions=True)
                reading_ends.set()
                _, connecting = await asyncio.wait(captures, timeout=STOP_SECONDS / 2)
                for task in connecting:
                    task.cancel()
                await self._stop()
                for task in background:
                    task.cancel()
        except* SpillwayError as group:
            raise first_of(group) from None
        finally:
            await asyncio.to_thread(self._store.close)

    def _deliver(self, delivery: Delivery) -> None:
        self._deliveries[delivery.name] = self._tasks.create_task(delivery.run(), name=f"delivery {delivery.name}")

    def _refresh(self, pipeline: Pipeline, companion: Companion) -> None:
        work = companion.run(pipeline.refreshes(companion))
        self._refreshing[companion.delivery.name] = self._tasks.create_task(work, name=companion.delivery.name)

    async def enlist(self, pipeline: Pipeline, sink: Sink, told_as: Sink) -> Delivery:
        """A sink joins while the process runs; when this returns it gets whatever is committed from here on, and more.
        ``told_as``: the sink that its messages name."""
        delivery = pipeline.enlist(sink, told_as)
        self._deliver(delivery)
        companion = pipeline.companions.get(sink.name)
        if companion is not None:
            self._deliver(companion.delivery)
        await pipeline.rewire()
        pipeline.joined(sink)
        if companion is not None:
            self._refresh(pipeline, companion)
        return delivery

    async def dismiss(self, pipeline: Pipeline, name: str) -> None:
        """A sink leaves while the process runs, and what waits for it is gone."""
        delivery = self._of(name)[1]
        companion = pipeline.companions.get(name)
        pipeline.dismiss(name)
        leaving = [delivery] if companion is None else [companion.delivery, delivery]
        for one in leaving:
            one.stop()
        if companion is not None:
            refreshing = self._refreshing.pop(companion.delivery.name)
            refreshing.cancel()
            await asyncio.gather(refreshing, return_exceptions=True)
        await pipeline.rewire()
        tasks = [self._deliveries.pop(one.name) for one in leaving]
        _, late = await asyncio.wait(tasks, timeout=STOP_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for one in leaving:
            await one.left()

    async def _stop(self) -> None:
        """What is in flight finishes until the deadline, is settled, and confirmed."""
        deliveries = list(self._deliveries.values())
        for pipeline in self.pipelines:
            for delivery in pipeline.flowing:
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
            "impl": impl.NAME,
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
            "backfills": [item for p in self.pipelines for item in p.backfills.active()],
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
        health = pipeline.health_of(delivery)
        counters = delivery.counters
        gap = delivery.gap
        companion = pipeline.companions.get(sink.name)
        return {
            "name": sink.name,
            "database": sink.database,
            "type": sink.destination.type,
            "state": health.state,
            "reason": health.reason,
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
            "compacted": delivery.passes.removed,
            "enrichment_queries": 0 if delivery.shaping is None else delivery.shaping.queries,
            "enrichment_repeated": 0 if delivery.shaping is None else delivery.shaping.repeated,
            "truncates_ignored": delivery.truncates_ignored,
            "last_error": delivery.last_error,
            "due_refreshes": counters.refreshes,
            "due_refreshes_oldest_seconds": 0 if companion is None else round(companion.oldest_seconds, 3),
            "related": None if companion is None else companion.as_item(),
            "store_reads_at_first_request": delivery.reads_before_first_request,
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

    # -- what people ask for ----------------------------------------------------------------------------------------
    def _of(self, sink: str) -> tuple[Pipeline, Delivery]:
        for pipeline in self.pipelines:
            delivery = pipeline.delivery(sink)
            if delivery is not None:
                return pipeline, delivery
        names = ", ".join(d.name for p in self.pipelines for d in p.deliveries)
        raise SpillwayError("unknown_sink", f"there is no sink {sink!r}", f"there are: {names}")

    def _pipeline_of(self, sink: str) -> Pipeline:
        """Of a sink that people have configured, or its shadow; a companion has no rows of its own."""
        pipeline, delivery = self._of(sink)
        if delivery not in pipeline.deliveries:
            named = sink.removesuffix(COMPANION)
            raise SpillwayError("unknown_sink", f"{sink} has no rows of its own", f"name its sink: {named}")
        return pipeline

    async def pause(self, sink: str) -> None:
        await self._of(sink)[1].pause()

    async def resume(self, sink: str) -> None:
        pipeline, delivery = self._of(sink)
        await delivery.resume(pipeline.capture.received_lsn)

    # -- backfills ---------------------------------------------------------------------------------------------------
    async def backfills(self, sink: str | None, *, ended: bool) -> list[dict[str, object]]:
        """Items as `spillway.engine.backfills.item` makes them, the newest last."""
        if sink is not None:
            self._of(sink)
        if not ended:
            return [item for p in self.pipelines for item in p.backfills.active(sink)]
        names = [sink] if sink is not None else [s.name for p in self.pipelines for s in p.sinks]
        return [item for name in names for item in await self._of(name)[0].backfills.all(name)]

    async def start_backfill(self, sink: str, order: BackfillOrder) -> list[dict[str, object]]:
        """One for each table of the order; with ``gap`` for those that missed changes."""
        pipeline = self._pipeline_of(sink)
        if order.gap:
            started = await pipeline.backfills.refill(sink)
        else:
            configured = next(s for s in pipeline.sinks if s.name == sink)
            tables = [] if order.tables else await pipeline.backfills.tables(sink)
            wanted = await requests(pipeline.database, configured, order, tables)
            started = await pipeline.backfills.start_all(sink, wanted)
        ids = {state.id for state in started}
        return [item for item in await pipeline.backfills.all(sink) if item["id"] in ids]

    async def change_backfill(
        self, sink: str, id_or_table: str, verb: Literal["pause", "resume", "cancel"]
    ) -> dict[str, object]:
        return await self._pipeline_of(sink).backfills.change(sink, id_or_table, verb)

    # -- re-indexes --------------------------------------------------------------------------------------------------
    async def reindexes(self) -> list[dict[str, object]]:
        """The last of each sink, as `spillway.engine.shadow.ReindexState.as_item` makes it."""
        return await self._reindexes.items()

    async def reindex(self, sink: str, order: ReindexOrder) -> dict[str, object]:
        return await self._reindexes.start(self._pipeline_of(sink), sink, order)

    async def change_reindex(self, sink: str, verb: Literal["cancel", "drop_old"]) -> dict[str, object]:
        self._of(sink)
        return await self._reindexes.change(sink, verb)

    # -- backlog and dead letters ------------------------------------------------------------------------------------
    async def waiting(self, sink: str, after: str | None, limit: int, reason: str | None = None) -> Page:
        """What waits (`waiting_page`)."""
        self._of(sink)
        return await asyncio.wrap_future(self._store.ask(waiting_page, self._store, sink, after, limit, reason))

    async def show(self, sink: str, key: str, limit: int) -> list[bytes]:
        pipeline, delivery = self._of(sink)
        async with self._budget.lent(_page_bytes(delivery)):
            messages = await asyncio.wrap_future(self._store.ask(self._store.show, sink, key, limit))
            return [m.body + pipeline.suffixes[sink] for m in messages]

    async def retry(self, sink: str, select: Select) -> int:
        return await self._of(sink)[1].retry(select)

    async def discard(self, sink: str, select: Select) -> int:
        return await self._of(sink)[1].discard(select)

    async def dead(self, sink: str, after: str | None, limit: int, reason: str | None = None) -> Page:
        """The dead letters (`dead_page`)."""
        self._of(sink)
        return await asyncio.wrap_future(self._store.ask(dead_page, self._store, sink, after, limit, reason))

    async def show_dead(self, sink: str, key: str, limit: int) -> list[bytes]:
        pipeline, delivery = self._of(sink)
        async with self._budget.lent(_page_bytes(delivery)):
            messages = await asyncio.wrap_future(self._store.ask(self._store.show_dead, sink, key, limit))
            return [m.body + pipeline.suffixes[sink] for m in messages]

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
        async with self._budget.lent(2 * _page_bytes(delivery)):
            return await pipeline.revive(delivery, self._letters(sink, select))

    async def _letters(self, sink: str, select: Select) -> AsyncIterator[Sequence[Message]]:
        after = 0
        while letters := await asyncio.wrap_future(
            self._store.ask(self._store.read_dead, sink, select, after, PAGE_MESSAGES)
        ):
            yield letters
            after = letters[-1].row

    async def export_dead(self, sink: str, select: Select) -> AsyncIterator[bytes]:
        pipeline, delivery = self._of(sink)
        after = 0
        while True:
            # The credit is for the reading alone: who exports slowly must not keep it from the sinks. One letter a
            # request is what stands beside the limit meanwhile.
            async with self._budget.lent(_page_bytes(delivery)):
                letters = await asyncio.wrap_future(self._store.ask(self._store.read_dead, sink, select, after, 1))
            if not letters:
                return
            after = letters[-1].row
            yield letters.pop().body + pipeline.suffixes[sink] + b"\n"


PAGE_MESSAGES = 100


def _page_bytes(delivery: Delivery) -> int:
    """What a page for people can hold: the store's page, or one message."""
    return 2 * max(PEOPLE_BYTES, delivery.spec.max_message_bytes)

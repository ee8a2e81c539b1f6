"""One database: a slot and its sinks, built from the configuration and wired.

A `Pipeline` is one slot with its `Capture`, its `Router` and one `Delivery` per sink. It opens the sessions with the
source, holds the state against what the server says before anything is read (I9), and keeps the durable mark ahead of
what is confirmed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

import structlog

from spillway import sinks
from spillway.chunk import Message
from spillway.config import Config, Database, Sink
from spillway.engine.backfills import Backfills, Table
from spillway.engine.related import Companion, forget
from spillway.engine.retries import retry_rows
from spillway.engine.shadow import shadows
from spillway.engine.shaping import is_routed, meta_of, new_shaping, routing_column
from spillway.errors import Finding, SourceUnavailable, SpillwayError
from spillway.flow.capture import RENEW_FRAME_BYTES, Capture
from spillway.flow.delivery import Delivery
from spillway.flow.health import BEHIND_SECONDS, Health
from spillway.flow.identity import MARK_RESERVE_BYTES, judge
from spillway.flow.inflow import Process, SinkSpec
from spillway.flow.limits import Limits
from spillway.flow.names import TableNames
from spillway.flow.paging import Manners
from spillway.flow.progress import Request
from spillway.flow.refresh import Refresh
from spillway.flow.route import Router, Subscription, filters_of_pages
from spillway.pgoutput import Decoder
from spillway.pgoutput.conditions import Condition
from spillway.sinks.base import Sink as BuiltSink
from spillway.sinks.base import SinkContext, message_suffix
from spillway.source.connect import Connection, querying
from spillway.source.origin import Expected
from spillway.source.page import PageReader
from spillway.source.session import Session, open_session
from spillway.source.slot import lag
from spillway.source.timestamps import TimestampColumns
from spillway.source.unpublished import unpublished
from spillway.store.base import Identity

LAG_SECONDS = 1.0
PUBLISHED_SECONDS = 30.0
RENEW_PART = 32  # of what pages may have: sixteen readers that keep twice that in libpq's buffers have as much again
REPLAYED = b',"replayed":true'  # ends the body of an event that was a dead letter
STALLED_SECONDS = 60.0  # reading that does not go on for so long is not ready
UNREACHABLE_SECONDS = 10.0  # of a source: a restart of the server passes in less

_log = structlog.get_logger()


class Pipeline:
    """One database: a slot and its sinks."""

    def __init__(self, config: Config, database: Database, process: Process) -> None:
        self.database = database
        self._meta = meta_of(database)
        self._clock = process.clock
        self._store = process.store
        self._slot = database.slot.name
        self.identity = self._store.identity(self._slot)
        self.lag_bytes: int | None = None
        self.confirmed_lsn: int | None = None
        self._published_lsn = 0  # received, when all tables that sinks take were published
        self.sinks = [s for s in config.sinks if s.database == database.name and s.status != "disabled"]
        self.deliveries: list[Delivery] = []
        self.suffixes: dict[str, bytes] = {}
        self.health: dict[str, Health] = {}
        self._wants: list[Subscription] = []
        self._shadow_of: dict[str, str] = {}  # by shadow: the sink
        self.companions: dict[str, Companion] = {}  # by the sink that has related tables
        self._config = config
        self._process = process
        self._timestamps = TimestampColumns(database.conninfo(), self._slot)
        for sink in self.sinks:
            self._add(sink)
        for shadow, told_as in shadows(self.sinks, self._store):
            self.enlist(shadow, told_as)
        self.router = Router(self._subscriptions)
        self._names = TableNames(self._store, self._slot)
        self.capture = Capture(
            database.name,
            self._connect,
            self._new_decoder,
            self.router,
            self.flowing,
            process.budget,
            self._reserve_mark,
            self._timestamps.forget,
            self._names,
            self._clock,
            len(config.databases),
        )
        self.backfills = Backfills(
            database,
            self.capture,
            lambda: self.router,
            process.budget.pages,
            self._store,
            self.open_reader,
            lambda: self.identity.epoch if self.identity is not None else 1,
            self._clock,
            config.sinks,
        )
        for sink, subscription in zip(self.sinks, self._wants, strict=True):
            self.backfills.add_sink(sink, subscription)

    @property
    def flowing(self) -> list[Delivery]:
        """All that take part in the slot: the sinks' deliveries, and those of their companions."""
        return [*self.deliveries, *(companion.delivery for companion in self.companions.values())]

    @property
    def _subscriptions(self) -> list[Subscription]:
        return [*self._wants, *(companion.subscription for companion in self.companions.values())]

    @property
    def _max_message_bytes(self) -> int:
        return max((s.max_message_bytes for s in self.sinks), default=1 << 20)

    def _system_id(self) -> str:
        if self.identity is None:
            raise SourceUnavailable("slot_not_reached", f"slot {self._slot} was not reached yet")
        return self.identity.system_id

    async def open_reader(
        self, page_id: str, *, primary: bool = False, filters: Sequence[Condition] = ()
    ) -> PageReader:
        overhead_bytes = self.capture.frame_overhead_bytes
        replica = self.database.replica_url is not None and not primary
        return await PageReader.open(
            self.database.conninfo() if primary else self.database.page_conninfo(),
            self._slot,
            self.database.publication.name,
            lambda: self._page_decoder(overhead_bytes, filters),
            page_id.encode(),
            Expected(self._system_id(), replica),
            min(RENEW_FRAME_BYTES, self._process.budget.pages.limit_bytes // RENEW_PART),
        )

    def _new_decoder(self, router: Router, frame_overhead_bytes: int, renew_frame_bytes: int) -> Decoder:
        return Decoder(
            self._meta,
            router.group_columns,
            router.groups,
            self._max_message_bytes,
            frame_overhead_bytes,
            renew_frame_bytes,
            self._warn,
            router.filters,
            router.filter_count,
            router.totals,
            router.prefixes,
        )

    def _page_decoder(self, frame_overhead_bytes: int, filters: Sequence[Condition]) -> Decoder:
        """For pages of one sink, with these filters."""
        router = self.router
        return Decoder(
            self._meta,
            router.group_columns,
            router.groups,
            self._max_message_bytes,
            frame_overhead_bytes,
            1 << 62,
            self._warn,
            filters_of_pages(filters),
            1 if filters else 0,
        )

    def _add(self, sink: Sink, told_as: Sink | None = None) -> Delivery:
        """``told_as``: the sink that the messages name, where it is another."""
        config, process = self._config, self._process
        named = told_as or sink
        suffix = message_suffix(named.id, named.name, named.annotations)
        epoch = self.identity.epoch if self.identity is not None else 1
        built = sinks.build(config, sink, SinkContext(sink.name, suffix, config.base_dir, epoch, 0))
        shaping = new_shaping(config, self.database, sink, built, suffix, self._system_id, process, self._timestamps)
        state = self._store.open_sink(sink.name, self._slot)
        delivery = Delivery(_spec(sink, built), built, state, process, self._moved, shaping)
        delivery.paused = sink.status == "paused" if state.paused is None else state.paused
        self.deliveries.append(delivery)
        self.suffixes[sink.name] = suffix
        self.health[sink.name] = Health()
        keeps_rows = built.semantics in ("state", "atomic")
        self._wants.append(
            Subscription(
                delivery,
                sink.selects,
                frozenset(sink.taken_actions),
                sink.group_columns,
                grouping=sink.message_grouping or keeps_rows,
                needs_key=keeps_rows,
                splits_key_change=built.semantics == "state",
                applies_truncate=sink.on_truncate == "apply",
                filters=sink.filters,
                routing_column=routing_column(sink),
                wants_totals=sink.tx,
                prefix=sink.outbox.prefix if sink.outbox is not None else None,
            )
        )
        if sink.related:
            most_bytes = self._max_message_bytes
            companion = Companion(sink, delivery, self.database, self._system_id, most_bytes, process, self._moved)
            self.companions[sink.name] = companion
            self.suffixes[companion.delivery.name] = suffix
        return delivery

    def refreshes(self, companion: Companion) -> list[Refresh]:
        """What works off what is due of a sink."""
        at = self._at(companion.sink.name)
        subscription, manners = self._wants[at], self.sinks[at].backfill
        return [
            Refresh(
                table,
                subscription,
                self.router.keying(companion.main),
                self.capture,
                self._process.budget.pages,
                self.open_reader,
                Manners(manners.run_ahead, manners.timeout_ms / 1000),
                self._clock,
                self._store,
                lambda: companion.delivery.tail.commit_lsn,
                partial(self._order_everything, companion.sink.name),
            )
            for table in companion.tables
        ]

    async def _order_everything(self, sink: str, table: Table) -> str:
        if self.companions[sink].health.refused:
            return "all documents are due: waits until each related table can be taken"
        manners = self.sinks[self._at(sink)].backfill
        request = Request(*table, "related", parallel=manners.parallel, max_rows_per_second=manners.max_rows_per_second)
        try:
            await self.backfills.start(sink, request)
        except SpillwayError as error:
            if error.code != "backfill_active":
                raise
            return "waits for the end of a backfill, to begin another"
        return ""

    def enlist(self, sink: Sink, told_as: Sink) -> Delivery:
        """A sink joins while the process runs: from `rewire` on, at a commit, it gets what the others get."""
        delivery = self._add(sink, told_as)
        self.sinks.append(sink)
        if sink.name != told_as.name:
            self._shadow_of[sink.name] = told_as.name
        return delivery

    def joined(self, sink: Sink) -> None:
        """After `rewire`: its backfills may begin."""
        at = self._at(sink.name)  # it may have changed meanwhile
        self.backfills.add_sink(self.sinks[at], self._wants[at])

    async def change(self, sink: Sink) -> None:
        """The sink takes other tables, or has other backfills, from the next commit on; so does its shadow."""
        concerned = [known.name for known in self.sinks if self._shadow_of.get(known.name, known.name) == sink.name]
        for name in concerned:
            at = self._at(name)
            shadow = self.sinks[at].model_copy(update={"source": sink.source, "backfill": sink.backfill})
            self.sinks[at] = sink if name == sink.name else shadow
            self._wants[at] = replace(self._wants[at], wants_table=sink.selects)
        await self.rewire()
        for at, known in enumerate(self.sinks):  # a shadow may have left meanwhile
            if known.name in concerned:
                self.backfills.change_sink(known, self._wants[at])

    def _at(self, name: str) -> int:
        return next(i for i, known in enumerate(self.sinks) if known.name == name)

    def dismiss(self, name: str) -> None:
        """The sink is no more; after `rewire` nothing comes for it."""
        at = self._at(name)
        self.backfills.remove_sink(name)
        self._shadow_of.pop(name, None)
        del self.sinks[at], self.deliveries[at], self._wants[at], self.suffixes[name], self.health[name]
        companion = self.companions.pop(name, None)
        if companion is not None:
            del self.suffixes[companion.delivery.name]

    async def rewire(self) -> None:
        """The stream goes to the sinks as they are now."""
        self.router = Router(self._subscriptions, self.router)
        await self.capture.rewire(self.router, self.flowing)

    def _warn(self, finding: Finding) -> None:
        _log.warning(finding.what, database=self.database.name, code=finding.code, remedy=finding.remedy)

    def _moved(self) -> None:
        self.capture.moved()
        self.backfills.wake()

    # -- the slot ---------------------------------------------------------------------------------------------------
    async def _connect(self) -> Session:
        """Open the stream, after the state was held against the slot (I9)."""
        session = await open_session(
            self.database,
            [*(s.source for s in self.sinks), *(c.source for c in self.companions.values())],
            self.identity.timeline if self.identity else None,
            create_slot=self.identity is None,
        )
        try:
            server = session.server
            finding = judge(self._slot, self.identity, server, self.capture.received_lsn)
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
                    looked_at = float("-inf")  # for tables that are not published any more
                    while True:
                        self.lag_bytes, self.confirmed_lsn = await lag(query, self._slot)
                        now = self._clock.monotonic()
                        if self.capture.connected and now - looked_at > PUBLISHED_SECONDS:
                            looked_at = now
                            await self._look_for_unpublished(query)
                        await self._clock.sleep(LAG_SECONDS)
            except SpillwayError:  # capture meets and reports the same
                self.lag_bytes = None
                await self._clock.sleep(LAG_SECONDS)

    async def _look_for_unpublished(self, query: Connection) -> None:
        """Whether each table that a sink names still comes; the stream says nothing of it. Who takes whatever is
        published misses nothing that is not."""
        named: dict[str, set[Table]] = {sink.name: set(sink.source.include_tables or ()) for sink in self.sinks}
        named |= {c.delivery.name: set(c.source.include_tables or ()) for c in self.companions.values()}
        all_named = set().union(*named.values())
        taken = {oid: table.name for oid, table in self._names.taken.items() if table.name in all_named}
        lsn = self.capture.received_lsn
        found = await unpublished(query, self.database.publication.name, taken)
        by_sink = {name: {t: f for t, f in found.items() if t in tables} for name, tables in named.items()}
        self.router.unpublished(by_sink, self._published_lsn or lsn, lsn)
        if not found:
            self._published_lsn = lsn

    async def forget_related(self) -> None:
        """What the store has of related tables that were named in an earlier run."""
        for sink, delivery in list(zip(self.sinks, self.deliveries, strict=True)):
            await forget(self._store, self._slot, delivery, sink.related)

    async def revive(self, delivery: Delivery, pages: AsyncIterator[Sequence[Message]]) -> int:
        """Send dead letters again: events as they were, marked ``replayed``; of a sink that keeps rows these are read
        as they are now (`Backfills.retry`). Returns how many letters; of rows not all, if there are too many."""
        if delivery.is_state:
            return await retry_rows(self.backfills, delivery.name, pages)
        total = 0
        async for letters in pages:
            revived = [(m.row, m.with_body(m.change.body.removesuffix(REPLAYED) + REPLAYED)) for m in letters]
            await delivery.revive(revived)
            total += len(revived)
        return total

    async def tick(self) -> None:
        for delivery in list(self.deliveries):
            await delivery.check_limits()
            if delivery in self.deliveries:  # it may have left meanwhile
                self.health_of(delivery)
        for companion in list(self.companions.values()):
            await companion.tick(self.capture.received_lsn)

    def health_of(self, delivery: Delivery) -> Health:
        """As of now."""
        health = self.health[delivery.name]
        health.refused = self._refused(delivery)
        health.owed = self.backfills.owed(delivery.name)
        companion = self.companions.get(delivery.name)
        if companion is not None:
            health.owed += companion.findings(self._refused(companion.delivery))
            health.refreshing = companion.behind(BEHIND_SECONDS)
        health.not_read = self.not_read()
        health.update(delivery, self._clock.monotonic(), self._clock.wall())
        return health

    def _refused(self, delivery: Delivery) -> list[Finding]:
        return [f for (sink, _, _), f in self.router.refused.items() if sink == delivery.name]

    def not_read(self) -> str:
        """Why the slot is not being read, "" while it is."""
        blocking = [d for d in self.flowing if d.blocks]
        if blocking:
            return "; ".join(f"the backlog of {d.name} is full: {d.full}" for d in blocking)
        capture = self.capture
        if capture.connected or self._clock.monotonic() - capture.waiting_since < UNREACHABLE_SECONDS:
            return ""
        return f"the source cannot be read: {capture.last_error or capture.why_waiting}"

    def stalled(self) -> str:
        """What makes this process not ready: the slot is not read, or nothing has moved in it for too long."""
        why = self.capture.why_waiting
        long = self._clock.monotonic() - self.capture.waiting_since > STALLED_SECONDS
        return self.not_read() or (why if long else "")

    def delivery(self, sink: str) -> Delivery | None:
        """Of a sink, or of its companion."""
        return next((d for d in self.flowing if d.name == sink), None)


def _spec(sink: Sink, built: BuiltSink) -> SinkSpec:
    return SinkSpec(
        name=sink.name,
        batch_size=1 if built.single else sink.batch_size,
        max_memory_bytes=sink.max_memory_mb << 20,
        max_messages=sink.max_messages,
        max_message_bytes=sink.max_message_bytes,
        timeout_seconds=sink.request_timeout_seconds,
        max_retry_count=sink.max_retry_count,
        on_reject=sink.on_reject,
        toast_fails=sink.toast == "fail",
        partial_images=sink.toast == "reselect",
        routed=is_routed(sink),
        supersedes=all(name is None for name in (sink.filter, sink.routing, sink.transform, routing_column(sink))),
        limits=Limits(
            sink.backlog.warn_messages,
            sink.backlog.max_messages,
            sink.backlog.max_bytes,
            sink.backlog.max_age_seconds,
            sink.backlog.on_full,
        ),
    )

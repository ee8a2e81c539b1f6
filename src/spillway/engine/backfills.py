"""The backfills of one database: who owns them, and what begins by itself.

`Backfills.run` owns a task per backfill that has not ended; a restart finds them in the store and goes on at their
cursors. There is at most one active or paused backfill per sink and table.

**Retries.** A dead letter of a sink that keeps rows is not sent again as it was: a later change may have been applied
since. A backfill reads the rows of such letters by their keys (`spillway.flow.named`), and deletes what is gone; it
takes the place of its letters in one commit. Retries go beside whatever else is read of the table, those of a sink one
after the other.

**Initial backfills.** A sink with ``initial_backfill`` gets the existing rows of its tables once: which tables have had
theirs is a document of its own in the store, written right behind the beginning; a crash in between finds the backfill
and takes it for what it is. Tables that enter the publication later get theirs when they are noticed
(`LOOK_SECONDS`). One that the sink cannot take is looked at again, until it can.

**Gaps.** A refill reads the tables that missed changes, and sweeps: what the sink has and the source has not is
deleted, where the sink takes deletes and can say which rows of a table it has. The gap holds the tables that are still
to be repaired (`spillway.flow.gap.Gaps.refilled`): each that is complete leaves it, and with the last one the
gap is cleared; where deletes could not be repaired it stays, and says so. A refill belongs to the gap as it was when it
began (``Request.gap``): one that has grown since is not repaired by it. Nothing is swept from a search index in which
documents may be another's: of another sink, or of another table that the sink may take and nobody could tell apart.

**Owed.** An initial backfill or a refill that failed is not had (spillway.engine.owed).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

import orjson
import structlog

from spillway.clock import Clock
from spillway.config import Database, Search, Sink
from spillway.engine.owed import Owed
from spillway.engine.related import COLUMNS
from spillway.engine.shadow import REINDEX
from spillway.errors import Finding, SourceUnavailable, SpillwayError
from spillway.flow.backfill import Backfill
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture
from spillway.flow.gap import gap_token
from spillway.flow.named import MOST_BYTES, NamedKeys, drop_block, is_block, key_bytes, without_backfill
from spillway.flow.paging import Manners, OpenReader
from spillway.flow.progress import BackfillState, Request, of_json
from spillway.flow.route import Router, Subscription
from spillway.source import catalog
from spillway.source.catalog import PublishedTable
from spillway.source.connect import querying
from spillway.source.page import Cursor
from spillway.source.refusal import quoted
from spillway.source.tables import refusal
from spillway.store.base import BackfillDocument, Gap, Store

LOOK_SECONDS = 5.0  # tables that have entered the publication are looked for so often
CATALOGUE_LOCK_SECONDS = 1
FIRST_LOOK_SECONDS = 0.5  # as long as there is no publication, or no source
INITIAL = "initial"  # the id of the document that says which tables have had their initial backfill

Table = tuple[str, str]

_STATES: dict[str, Literal["active", "paused", "cancelled"]] = {
    "pause": "paused", "resume": "active", "cancel": "cancelled"
}  # fmt: skip

_log = structlog.get_logger()


class Backfills:
    def __init__(
        self,
        database: Database,
        capture: Capture,
        router: Callable[[], Router],
        spare: Spare,
        store: Store,
        open_reader: OpenReader,
        epoch: Callable[[], int],
        clock: Clock,
        configured: Sequence[Sink],
    ) -> None:
        """``configured``: all sinks of the configuration, of other databases, too."""
        self._database = database
        self._capture = capture
        self._router = router
        self._spare = spare
        self._store = store
        self._open_reader = open_reader
        self._epoch = epoch
        self._clock = clock
        self._configured = configured
        self._sinks: dict[str, tuple[Sink, Subscription]] = {}
        self._initial: dict[str, set[str]] = {}  # by sink: tables that have had theirs
        self._backfills: dict[str, Backfill] = {}  # by id: those that have not ended
        self._owed = Owed()
        self._retries: dict[str, asyncio.Lock] = {}  # by sink
        self._starting: set[tuple[str, Table]] = set()  # sink and table, while the beginning is being written
        self._left_behind: list[tuple[str, str]] = []  # sink and document: blocks of keys without a backfill
        self._told: set[tuple[str, Table, str]] = set()  # what initial backfills were refused for
        self._tasks: asyncio.TaskGroup | None = None
        self._look = asyncio.Event()

    def add_sink(self, sink: Sink, subscription: Subscription) -> None:
        """Known from now on, with what the store has of its backfills."""
        self._sinks[sink.name] = (sink, subscription)
        self._initial[sink.name] = set()
        documents = self._store.backfills(sink.name, ended=False)
        for number, document in documents:
            if number == INITIAL:
                self._initial[sink.name] = set(orjson.loads(document))
            elif number != REINDEX and not is_block(number):
                state = of_json(document)
                if state.is_owed:
                    self._owed.add(state)
                else:
                    self._own(state)
        lost = without_backfill([number for number, _ in documents], self._backfills)
        self._left_behind += [(sink.name, number) for number in lost]
        self._look.set()

    def change_sink(self, sink: Sink, subscription: Subscription) -> None:
        """As it is now; backfills that are under way go on as they were begun."""
        self._sinks[sink.name] = (sink, subscription)
        self._look.set()

    def remove_sink(self, name: str) -> None:
        del self._sinks[name], self._initial[name]
        self._owed.forget_sink(name)

    # -- life -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for backfill in list(self._backfills.values()):
                tasks.create_task(self._run(backfill))
            for sink in list(self._sinks):
                await self._note_refilled(sink)
            while True:
                self._look.clear()
                while self._left_behind:
                    sink, number = self._left_behind.pop()
                    if sink in self._sinks:
                        await drop_block(self._sinks[sink][1].delivery, number)
                known = await self._start_initial()
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(LOOK_SECONDS if known else FIRST_LOOK_SECONDS):
                        await self._look.wait()

    def wake(self) -> None:
        """A sink has moved."""
        for backfill in self._backfills.values():
            backfill.wake()

    async def _run(self, backfill: Backfill) -> None:
        state = backfill.state
        if state.request.origin == "retry":
            async with self._retries.setdefault(state.sink, asyncio.Lock()):
                await backfill.run()
        else:
            await backfill.run()
        self._backfills.pop(state.id, None)
        named = state.request.named
        if named is not None and state.sink in self._sinks:  # it may have left meanwhile
            await self._keys_of(state).drop(range(state.block, named.blocks))
        _log.info("backfill ended", sink=state.sink, table=state.request.text, state=state.state, rows=state.rows)
        if state.is_owed:
            self._owed.add(state)
        elif state.state == "completed":
            for owed in self._owed.made_up_for(state):
                await self._no_longer_owed(owed)
        if state.request.origin == "gap" and state.state == "completed":
            await self._refilled([state])

    def _own(self, state: BackfillState) -> Backfill:
        sink, subscription = self._sinks[state.sink]
        backfill = Backfill(
            state,
            subscription,
            self._router().keying(subscription.delivery),
            self._capture,
            self._spare,
            self._open_reader,
            Manners(sink.backfill.run_ahead, sink.backfill.timeout_ms / 1000),
            self._epoch,
            self._clock,
            self._keys_of(state),
        )
        self._backfills[state.id] = backfill
        if self._tasks is not None:
            self._tasks.create_task(self._run(backfill))
        return backfill

    def _keys_of(self, state: BackfillState) -> NamedKeys:
        return NamedKeys(self._store, self._sinks[state.sink][1].delivery, state.id)

    # -- what has failed --------------------------------------------------------------------------------------------
    def owed(self, sink: str) -> list[Finding]:
        """What was promised to the sink and did not come, for its health."""
        if sink not in self._sinks:  # one that is joining
            return []
        configured, subscription = self._sinks[sink]
        return self._owed.findings(configured, subscription.delivery.gap)

    async def _no_longer_owed(self, state: BackfillState) -> None:
        document = BackfillDocument(state.id, state.as_json(), ended=True)
        if state.sink in self._sinks:  # it may have left meanwhile
            await self._sinks[state.sink][1].delivery.note(document)

    # -- what begins by itself --------------------------------------------------------------------------------------
    async def _start_initial(self) -> bool:
        """False: what is published is not known yet."""
        waiting = [name for name, (sink, _) in self._sinks.items() if sink.initial_backfill]
        if not waiting:
            return True
        try:
            published = await self.published()
        except SpillwayError as error:
            _log.info("tables of the publication are not known", database=self._database.name, error=str(error))
            return False
        tables = _names(published)
        for name in waiting:
            if name not in self._sinks:  # it has left meanwhile
                continue
            for table, request in _initial_requests(self._sinks[name][0], tables).items():
                if ".".join(table) not in self._initial[name]:
                    await self._begin_initial(name, request, published)
        return bool(published)

    async def _begin_initial(self, sink: str, request: Request, published: Sequence[PublishedTable]) -> None:
        table = request.name
        active = self._active_of(sink, table)
        if active is None:
            try:
                self._check(sink, table, published)
                await self._begin(sink, request)
            except SpillwayError as error:
                if (sink, table, error.code) not in self._told:
                    self._told.add((sink, table, error.code))
                    _log.warning("no initial backfill", sink=sink, table=".".join(table), error=str(error))
                return
        elif active.state.request.origin != "initial":
            return  # it may read some rows only: after it
        self._initial[sink].add(".".join(table))
        document = BackfillDocument(INITIAL, orjson.dumps(sorted(self._initial[sink])), ended=False)
        await self._sinks[sink][1].delivery.note(document)

    async def published(self) -> list[PublishedTable]:
        """From PostgreSQL 16 on this waits for whoever holds a published table in ACCESS EXCLUSIVE mode, a while."""
        database = self._database
        async with querying(
            database.conninfo(), database.slot.name, lock_timeout_seconds=CATALOGUE_LOCK_SECONDS
        ) as query:
            return await catalog.tables(query, self._database.publication.name)

    # -- what people ask for ----------------------------------------------------------------------------------------
    async def tables(self, sink: str) -> list[Table]:
        """The published tables that the sink takes."""
        selects = self._sinks[sink][0].selects
        return [table for table in _names(await self.published()) if selects(*table)]

    async def start(self, sink: str, request: Request) -> BackfillState:
        return (await self.start_all(sink, [request]))[0]

    async def start_all(self, sink: str, requests: Sequence[Request]) -> list[BackfillState]:
        """All of them or none. Durable when this returns. Raises SpillwayError: one is active, or the sink does not
        take a table."""
        tables = [request.name for request in requests]
        for table in tables:
            self._check(sink, table, ())
        if sum(key_bytes(key) for request in requests for key in request.keys or ()) > self.key_bytes_left(sink):
            raise SpillwayError(
                "too_many_keys",
                f"backfills of {sink} by keys may have {MOST_BYTES} bytes of keys under way",
                f"name fewer, or wait for those that are: spillway backfill list {sink}",
            )
        try:
            published = await self.published()
        except SourceUnavailable:  # or a table is locked; then it is the stream that refuses, when it comes to that
            published = []
        for table in tables:
            self._check(sink, table, published)
        return [await self._begin(sink, request) for request in requests]

    def retrying(self, sink: str) -> int:
        """Rows whose retry has not ended."""
        requests = [b.state.request for b in self._backfills.values() if b.state.sink == sink]
        return sum(r.named.rows for r in requests if r.named is not None and r.origin == "retry")

    def key_bytes_left(self, sink: str) -> int:
        """What may come under way of the keys of named rows."""
        named = [b.state.request.named for b in self._backfills.values() if b.state.sink == sink]
        return MOST_BYTES - sum(one.size_bytes for one in named if one is not None)

    async def retry(self, sink: str, table: Table, keys: Iterable[Cursor], letters: Sequence[int]) -> None:
        """These rows of the table come, or their deletes, in place of these dead letters. Durable when this returns.
        `check_table` has been asked."""
        deletes = "delete" in self._sinks[sink][0].taken_actions
        await self._begin(sink, Request(*table, "retry", keys=tuple(keys), sweep=deletes), letters)

    def _check(self, sink: str, table: Table, published: Sequence[PublishedTable]) -> None:
        """Whether a backfill may begin. Raises SpillwayError."""
        self.check_table(sink, table, published)
        active = self._active_of(sink, table)
        name = ".".join(table)
        if active is not None or (sink, table) in self._starting:
            raise SpillwayError(
                "backfill_active",
                f"a backfill of {name} into {sink} is {'active' if active is None else active.state.state} already",
                f"wait for it, or: spillway backfill cancel {sink} {name}",
            )

    def check_table(self, sink: str, table: Table, published: Sequence[PublishedTable]) -> None:
        """Raises SpillwayError if its rows cannot be read into the sink."""
        configured, name = self._sinks[sink][0], ".".join(table)
        if not configured.selects(*table):
            raise SpillwayError(
                "table_not_taken", f"sink {sink} does not take {name}", "add it to the sink's source, or name another"
            )
        if published and table not in _names(published):
            publication = self._database.publication.name
            raise SpillwayError(
                "not_published",
                f"there is no table {name} in publication {publication}",
                f"correct the name, or: ALTER PUBLICATION {quoted(publication)} ADD TABLE {quoted(*table)};",
            )
        refused = self._router().refused.get((sink, *table))
        if refused is None:
            refused = refusal(configured, [relation for relation in published if relation.name == table])
        if refused is not None:
            raise SpillwayError.of(refused)

    async def _begin(self, sink: str, request: Request, letters: Sequence[int] = ()) -> BackfillState:
        """Nothing is awaited between `_check` and this. ``letters``: dead letters whose place it takes."""
        now = self._clock.wall()
        state = BackfillState(str(uuid.uuid4()), sink, request, created=now, changed=now)
        if request.gap is not None:
            state.started_lsn = request.gap[0]  # nothing that the sink has from before is above
        delivery = self._sinks[sink][1].delivery
        if request.origin == "retry":
            await self._name(state)
            await delivery.retried_by(BackfillDocument(state.id, state.as_json(), ended=False), letters)
            self._own(state)
            return state
        starting = (sink, request.name)
        self._starting.add(starting)
        try:
            await self._name(state)
            await delivery.note(BackfillDocument(state.id, state.as_json(), ended=False))
            self._own(state)
        finally:
            self._starting.discard(starting)
        return state

    async def _name(self, state: BackfillState) -> None:
        """Keep the keys that were asked for, if any were."""
        request = state.request
        if request.keys is not None:
            named = await self._keys_of(state).keep(request.keys)
            state.request, state.estimate_rows = replace(request, keys=None, named=named), named.rows

    def _active_of(self, sink: str, table: Table) -> Backfill | None:
        """The one that has not ended; retries do not count."""
        for backfill in self._backfills.values():
            state = backfill.state
            others = state.request.origin == "retry" or state.has_ended
            if state.sink == sink and state.request.name == table and not others:
                return backfill
        return None

    async def refill(self, sink: str) -> list[BackfillState]:
        """After a gap: the tables that missed changes, swept; those whose refill is under way go on. Raises
        SpillwayError without a gap that has ended, or if one of the tables cannot be read into the sink."""
        configured, subscription = self._sinks[sink]
        delivery = subscription.delivery
        _ended_gap(sink, delivery.gap)
        published = await self.published()
        gap = _ended_gap(sink, delivery.gap)
        taken = [table for table in _names(published) if configured.selects(*table)]
        shared = _shares(configured, [*self._configured, *(known for known, _ in self._sinks.values())])
        sweep = delivery.readable is not None and "delete" in configured.actions and not shared
        if gap.tables == () and not sweep:
            raise SpillwayError("nothing_missed", f"sink {sink} has no rows to refill", _acknowledge(sink))
        missed = [table for table in taken if gap.tables is None or table in gap.tables]
        token = gap_token(gap)
        going_on: list[BackfillState] = []
        for table in missed:
            active = self._active_of(sink, table)
            if active is None or active.state.request.origin != "gap":
                self._check(sink, table, published)
            elif active.state.request.gap == token:
                going_on.append(active.state)
        # Tables that are no longer there to be read cannot be repaired, and are not the sink's any more.
        await delivery.gaps.refilled(missed, deletes_repaired=sweep or "delete" not in configured.actions)
        started = list(going_on)
        for table in missed:
            active = self._active_of(sink, table)
            if active is not None and active.state in going_on:
                continue
            if active is not None and active.state.request.origin == "gap":
                await active.change("cancelled")  # of a gap that has grown since
            self._check(sink, table, published)
            limits = configured.backfill
            request = Request(
                *table,
                "gap",
                parallel=limits.parallel,
                max_rows_per_second=limits.max_rows_per_second,
                sweep=sweep,
                gap=token,
            )
            started.append(await self._begin(sink, request))
        return started

    async def _kept(self, sink: str) -> list[BackfillState]:
        """All that the store knows of."""
        found = await asyncio.wrap_future(self._store.ask(self._store.backfills, sink, ended=True))
        others = (INITIAL, REINDEX, COLUMNS)
        return [of_json(document) for number, document in found if number not in others and not is_block(number)]

    async def _note_refilled(self, sink: str) -> None:
        """A crash may have come between the end of a refill and the gap's."""
        if self._sinks[sink][1].delivery.gap is None:
            return
        states = await self._kept(sink)
        await self._refilled([s for s in states if s.request.origin == "gap" and s.state == "completed"])

    async def _refilled(self, states: Sequence[BackfillState]) -> None:
        """These refills, all of one sink, are complete: their tables leave the gap, if it is still theirs."""
        for state in states:
            configured, subscription = self._sinks[state.sink]
            delivery = subscription.delivery
            gap = delivery.gap
            table = state.request.name
            if gap is None or gap.tables is None or table not in gap.tables or state.request.gap != gap_token(gap):
                continue
            await delivery.gaps.refilled(
                [other for other in gap.tables if other != table],
                deletes_repaired=state.request.sweep or "delete" not in configured.actions,
            )

    async def change(
        self, sink: str, id_or_table: str, verb: Literal["pause", "resume", "cancel"]
    ) -> dict[str, object]:
        # A table's name means a retry only where nothing else is read of it.
        for backfill in sorted(self._backfills.values(), key=lambda one: one.state.request.origin == "retry"):
            state = backfill.state
            if state.sink == sink and state.is_called(id_or_table):
                await backfill.change(_STATES[verb])
                return item(backfill.state, backfill)
        owed = self._owed.done_without(sink, id_or_table) if verb == "cancel" else None
        if owed is not None:
            owed.state, owed.ended = "cancelled", self._clock.wall()
            owed.changed = owed.ended
            await self._no_longer_owed(owed)
            return item(owed, None)
        raise SpillwayError(
            "unknown_backfill",
            f"no backfill {id_or_table!r} of sink {sink} is active or paused",
            f"see: spillway backfill list {sink}",
        )

    def active(self, sink: str | None = None) -> list[dict[str, object]]:
        return [item(b.state, b) for b in self._backfills.values() if sink in (None, b.state.sink)]

    async def all(self, sink: str) -> list[dict[str, object]]:
        """Those that have ended, too, the newest last. Reads the store."""
        states = await self._kept(sink)
        known = [self._backfills.get(state.id) for state in states]
        return [item(b.state if b else s, b) for s, b in zip(states, known, strict=True)]


def _names(published: Sequence[PublishedTable]) -> list[Table]:
    return sorted({relation.name for relation in published})


def _shares(sink: Sink, sinks: Iterable[Sink]) -> bool:
    """What is in the sink's index may be another's: another sink writes there, or documents, which do not say of which
    table they are, are those of several, now or at another time."""
    index = _index(sink)
    if index is None:
        return False
    if any(other.name != sink.name and _index(other) == index for other in sinks):
        return True
    tables = sink.source.include_tables
    one_table = tables is not None and len(set(tables)) == 1
    return isinstance(sink.destination, Search) and sink.destination.document == "record" and not one_table


def _index(sink: Sink) -> tuple[str, str] | None:
    """Where a search sink writes."""
    to = sink.destination
    return (to.endpoint_url.lower(), to.index_name) if isinstance(to, Search) else None


def _acknowledge(sink: str) -> str:
    return f"acknowledge the gap: spillway sinks resume {sink}"


def _ended_gap(sink: str, gap: Gap | None) -> Gap:
    if gap is None:
        raise SpillwayError("no_gap", f"sink {sink} has no gap", "name the tables to backfill")
    if gap.last_lsn is None:
        raise SpillwayError(
            "gap_open", f"sink {sink} takes no part yet: {gap.reason}", f"spillway sinks resume {sink}, then again"
        )
    return gap


def _initial_requests(sink: Sink, tables: Sequence[Table]) -> dict[Table, Request]:
    """What the configuration wants of the tables that there are."""
    wanted: dict[Table, Request] = {}
    manners = sink.backfill
    for entry in sink.initial_backfill:
        for table in tables:
            named = entry.table is None or (entry.table.schema, entry.table.table) == table
            if named and sink.selects(*table):
                wanted[table] = Request(
                    *table,
                    "initial",
                    sort_column=entry.sort_column,
                    start=entry.start_position,
                    parallel=manners.parallel,
                    max_rows_per_second=manners.max_rows_per_second,
                )
    return wanted


def item(state: BackfillState, backfill: Backfill | None) -> dict[str, object]:
    """For people and their programs; Sequin's names where it has one."""
    request = state.request
    rate = backfill.rows_per_second if backfill is not None else 0.0
    left = None
    if state.estimate_rows is not None and rate > 0 and state.state == "active":
        left = round(max(0, state.estimate_rows - state.rows) / rate, 1)
    ended = None if state.ended is None else _time(state.ended)
    return {
        "id": state.id,
        "sink": state.sink,
        "table": request.text,
        "origin": request.origin,
        "state": state.state,
        "waiting": backfill.waiting if backfill is not None else "",
        "rows_initial_count": state.estimate_rows,
        "rows_processed_count": state.rows,
        "rows_ingested_count": state.rows - state.superseded,
        "superseded": state.superseded,
        "swept": state.swept,
        "pages": state.pages,
        "rows_per_second": round(rate, 1),
        "seconds_left": left,
        "parallel": request.parallel,
        "where": request.where,
        "sort_column": request.sort_column,
        "start_position": request.start,
        "error": state.error,
        "inserted_at": _time(state.created),
        "updated_at": _time(state.changed),
        "completed_at": ended if state.state == "completed" else None,
        "canceled_at": ended if state.state == "cancelled" else None,
    }


def _time(wall_seconds: float) -> str:
    return datetime.fromtimestamp(wall_seconds, UTC).isoformat(timespec="milliseconds")

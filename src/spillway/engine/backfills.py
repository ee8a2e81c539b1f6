"""The backfills of one database: who owns them, and what begins by itself.

`Backfills.run` owns a task per backfill that has not ended; a restart finds them in the store and goes on at their
cursors. There is at most one active or paused backfill per sink and table.

**Initial backfills.** A sink with ``initial_backfill`` gets the existing rows of its tables once: which tables have had
theirs is a document of its own in the store, written together with the beginning. Tables that enter the publication
later get theirs when they are noticed (`LOOK_SECONDS`).

**Gaps.** A refill reads the tables that missed changes, and sweeps: what the sink has and the source has not is
deleted, where the sink can be read. When the last of them is complete the gap is cleared; where deletes could not be
repaired it stays, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal

import orjson
import structlog

from spillway.clock import Clock
from spillway.config import Database, Sink
from spillway.errors import SpillwayError
from spillway.flow.backfill import Backfill, Manners, OpenReader
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture
from spillway.flow.progress import BackfillState, Request, of_json
from spillway.flow.route import Router, Subscription
from spillway.source import catalog
from spillway.source.connect import querying
from spillway.store.base import BackfillDocument, Store

LOOK_SECONDS = 10.0  # tables that have entered the publication are looked for so often
INITIAL = "initial"  # the id of the document that says which tables have had their initial backfill

Table = tuple[str, str]

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
    ) -> None:
        self._database = database
        self._capture = capture
        self._router = router
        self._spare = spare
        self._store = store
        self._open_reader = open_reader
        self._epoch = epoch
        self._clock = clock
        self._sinks: dict[str, tuple[Sink, Subscription]] = {}
        self._initial: dict[str, set[str]] = {}  # by sink: tables that have had theirs
        self._backfills: dict[str, Backfill] = {}  # by id: those that have not ended
        self._tasks: asyncio.TaskGroup | None = None
        self._look = asyncio.Event()

    def add_sink(self, sink: Sink, subscription: Subscription) -> None:
        """Known from now on, with what the store has of its backfills."""
        self._sinks[sink.name] = (sink, subscription)
        self._initial[sink.name] = set()
        for number, document in self._store.backfills(sink.name, ended=False):
            if number == INITIAL:
                self._initial[sink.name] = set(orjson.loads(document))
            else:
                self._own(of_json(document))
        self._look.set()

    def remove_sink(self, name: str) -> None:
        del self._sinks[name], self._initial[name]

    # -- life -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for backfill in list(self._backfills.values()):
                tasks.create_task(self._run(backfill))
            while True:
                self._look.clear()
                await self._start_initial()
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(LOOK_SECONDS):
                        await self._look.wait()

    def wake(self) -> None:
        """A sink has moved."""
        for backfill in self._backfills.values():
            backfill.wake()

    async def _run(self, backfill: Backfill) -> None:
        state = backfill.state
        await backfill.run()
        self._backfills.pop(state.id, None)
        _log.info("backfill ended", sink=state.sink, table=_name(state), state=state.state, rows=state.rows)
        if state.request.origin == "gap" and state.state == "completed":
            await self._gap_filled(state.sink)

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
        )
        self._backfills[state.id] = backfill
        if self._tasks is not None:
            self._tasks.create_task(self._run(backfill))
        return backfill

    # -- what begins by itself --------------------------------------------------------------------------------------
    async def _start_initial(self) -> None:
        waiting = [name for name, (sink, _) in self._sinks.items() if sink.initial_backfill]
        if not waiting:
            return
        try:
            tables = await self._published()
        except SpillwayError as error:
            _log.info("tables of the publication are not known", database=self._database.name, error=str(error))
            return
        for name in waiting:
            sink, _ = self._sinks[name]
            for table, request in _initial_requests(sink, tables).items():
                if ".".join(table) not in self._initial[name]:
                    await self._begin_initial(name, request)

    async def _begin_initial(self, sink: str, request: Request) -> None:
        name = f"{request.schema}.{request.table}"
        try:
            await self.start(sink, request)
        except SpillwayError as error:
            if error.code != "backfill_active":
                _log.warning("no initial backfill", sink=sink, table=name, error=str(error), remedy=error.remedy)
                return
        self._initial[sink].add(name)
        document = BackfillDocument(INITIAL, orjson.dumps(sorted(self._initial[sink])), ended=False)
        await self._sinks[sink][1].delivery.note(document)

    async def _published(self) -> list[Table]:
        async with querying(self._database.conninfo(), self._database.slot.name) as query:
            found = await catalog.tables(query, self._database.publication.name)
        return sorted({table.name for table in found})

    # -- what people ask for ----------------------------------------------------------------------------------------
    async def tables(self, sink: str) -> list[Table]:
        """The published tables that the sink takes."""
        selects = self._sinks[sink][0].source.selects
        return [table for table in await self._published() if selects(*table)]

    async def start(self, sink: str, request: Request) -> BackfillState:
        """Durable when this returns. Raises SpillwayError: one is active, or the sink does not take the table."""
        configured, subscription = self._sinks[sink]
        name = f"{request.schema}.{request.table}"
        if not configured.source.selects(request.schema, request.table):
            raise SpillwayError(
                "table_not_taken", f"sink {sink} does not take {name}", "add it to the sink's source, or name another"
            )
        refused = self._router().refused.get((sink, request.schema, request.table))
        if refused is not None:
            raise SpillwayError.of(refused)
        for other in self._backfills.values():
            if other.state.sink == sink and _name(other.state) == name and not other.state.has_ended:
                raise SpillwayError(
                    "backfill_active",
                    f"a backfill of {name} into {sink} is {other.state.state} already",
                    f"wait for it, or: spillway backfill cancel {sink} {name}",
                )
        now = self._clock.wall()
        state = BackfillState(str(uuid.uuid4()), sink, request, created=now, changed=now)
        await subscription.delivery.note(BackfillDocument(state.id, state.as_json(), ended=False))
        self._own(state)
        return state

    async def refill(self, sink: str) -> list[BackfillState]:
        """After a gap: the tables that missed changes, swept. Raises SpillwayError without a gap that has ended."""
        delivery = self._sinks[sink][1].delivery
        gap = delivery.gap
        if gap is None:
            raise SpillwayError("no_gap", f"sink {sink} has no gap", "name the tables to backfill")
        if gap.last_lsn is None:
            raise SpillwayError(
                "gap_open", f"sink {sink} takes no part yet: {gap.reason}", f"spillway sinks resume {sink}, then again"
            )
        missed = set(gap.tables) if gap.tables is not None else None
        parallel = self._sinks[sink][0].backfill.parallel
        started = []
        for schema, table in await self.tables(sink):
            if missed is None or (schema, table) in missed:
                request = Request(schema, table, "gap", parallel=parallel, sweep=delivery.readable is not None)
                started.append(await self.start(sink, request))
        return started

    async def _gap_filled(self, sink: str) -> None:
        """A refill is complete: when it was the last, the gap is repaired."""
        if any(b.state.sink == sink and b.state.request.origin == "gap" for b in self._backfills.values()):
            return
        await self._sinks[sink][1].delivery.refilled()

    async def change(
        self, sink: str, id_or_table: str, verb: Literal["pause", "resume", "cancel"]
    ) -> dict[str, object]:
        for backfill in self._backfills.values():
            state = backfill.state
            if state.sink == sink and id_or_table in (state.id, _name(state), state.request.table):
                await backfill.change({"pause": "paused", "resume": "active", "cancel": "cancelled"}[verb])
                return item(backfill.state, backfill)
        raise SpillwayError(
            "unknown_backfill",
            f"no backfill {id_or_table!r} of sink {sink} is active or paused",
            f"see: spillway backfill list {sink}",
        )

    def active(self, sink: str | None = None) -> list[dict[str, object]]:
        return [item(b.state, b) for b in self._backfills.values() if sink in (None, b.state.sink)]

    def all(self, sink: str) -> list[dict[str, object]]:
        """Those that have ended, too, the newest last. Reads the store."""
        states = [of_json(d) for number, d in self._store.backfills(sink, ended=True) if number != INITIAL]
        known = [self._backfills.get(state.id) for state in states]
        return [item(b.state if b else s, b) for s, b in zip(states, known, strict=True)]


def _initial_requests(sink: Sink, tables: Sequence[Table]) -> dict[Table, Request]:
    """What the configuration wants of the tables that there are."""
    wanted: dict[Table, Request] = {}
    manners = sink.backfill
    for entry in sink.initial_backfill:
        for table in tables:
            named = entry.table is None or (entry.table.schema, entry.table.table) == table
            if named and sink.source.selects(*table):
                wanted[table] = Request(
                    *table,
                    "initial",
                    sort_column=entry.sort_column,
                    start=entry.start_position,
                    parallel=manners.parallel,
                    max_rows_per_second=manners.max_rows_per_second,
                )
    return wanted


def _name(state: BackfillState) -> str:
    return f"{state.request.schema}.{state.request.table}"


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
        "table": _name(state),
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

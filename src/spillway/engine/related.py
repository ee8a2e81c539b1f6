"""A sink's companion: what keeps its documents right when related tables change.

It has a delivery of its own, with a position, a backlog and parked keys in the store under ``NAME~related``, that takes
the changes of the related tables and turns them into due refreshes of its sink (spillway.flow.fanout); and for every
table that is refreshed a `spillway.flow.refresh.Refresh`, which works them off. Shadows of re-indexes have one, too:
the new index is to be as right as the old one.

People see the sink alone. What is wrong with its companion is said in the sink's health, and what waits there in its
status; commands about the backlog know it by its name.

**Nothing of it is lost silently.** A companion has no limits of its own; where the disk is the limit it takes no part
under ``on_full: pause``, as its sink. What it missed then cannot be told row by row, so all documents are due as soon
as there is room again, and the gap is closed by that. So they are after a TRUNCATE. They are due as well as soon as a
related table is refused, and are seen to when it is not any more: it may be mended while the process is not there.

**Entries that are others by the next run.** What is due is due by table and key, so it stays due whatever becomes of
the SQL that asked for it; but of a table that no entry refreshes any more it is forgotten (`forget`), and so is all
that the companion had if there is none. Changes that wait in the store are asked for with the SQL of now. Should it
need values of other columns than they were kept with, which the document `COLUMNS` tells, nobody knows whose documents
they are part of, and all are due (spillway.flow.fanout). Of changes from before there was an entry nothing is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import orjson
import structlog

from spillway.config import Database, Sink, Source
from spillway.config.shape import Related
from spillway.errors import Finding
from spillway.flow.delivery import Delivery
from spillway.flow.fanout import FanOut, group_columns
from spillway.flow.health import RELATED, Health
from spillway.flow.inflow import Process, SinkSpec
from spillway.flow.limits import Limits
from spillway.flow.refresh import Refresh, Table
from spillway.flow.route import Subscription
from spillway.position import Position
from spillway.source.origin import Expected
from spillway.source.parents import SETTINGS, Parents
from spillway.source.sessions import Sessions
from spillway.store.base import EVERYTHING, AskedRefreshes, BackfillDocument, Select, Store, Write

COMPANION = "~related"  # what its name ends with
COLUMNS = "columns"  # the id of its document: by which columns changes are kept
BATCH_CHANGES = 1000  # what one question is asked for
SEND_SECONDS = 86_400.0  # a fan-out may take long; each of its steps has a deadline
WELL = ("idle", "caught_up", "behind")  # states of which people need not hear
PAGE = 1000

_log = structlog.get_logger()


class Companion:
    def __init__(
        self,
        sink: Sink,
        main: Delivery,
        database: Database,
        system_id: Callable[[], str],
        max_message_bytes: int,
        process: Process,
        moved: Callable[[], None],
    ) -> None:
        """``system_id``: of the server that the slot is on."""
        self.sink = sink
        self.main = main
        self.refreshes: dict[Table, Refresh] = {}
        self.health = Health()
        self._owes = False  # what a table that is refused has missed so far, which was asked for
        self._store: Store = process.store
        self._clock = process.clock
        related = sink.related
        self.source = Source(include_tables=tuple(dict.fromkeys(entry.table for entry in related)))
        sessions = Sessions(
            database.conninfo(),
            database.slot.name,
            "related",
            lambda: Expected(system_id()),
            SEND_SECONDS,
            1,
            own_search_path=True,
            settings=SETTINGS,
        )
        name = f"{sink.name}{COMPANION}"
        state = self._store.open_sink(name, database.slot.name)
        self.others_below = _others_below(self._store, name, related, state.position)
        fan_out = FanOut(related, Parents(sessions), process.budget.pages, self.ask, process.clock, self.others_below)
        spec = SinkSpec(
            name=name,
            batch_size=BATCH_CHANGES,
            max_memory_bytes=sink.max_memory_mb << 20,
            max_messages=sink.max_messages,
            max_message_bytes=max_message_bytes,
            timeout_seconds=SEND_SECONDS,
            limits=Limits(
                sink.backlog.warn_messages, None, None, None, "pause" if sink.backlog.on_full == "pause" else "block"
            ),
        )
        self.delivery = Delivery(spec, fan_out, state, process, moved)
        self.subscription = Subscription(
            self.delivery,
            self.source.selects,
            group_columns=group_columns(related),
            applies_truncate=True,
            truncates_of_partitions=True,
        )

    @property
    def tables(self) -> list[Table]:
        """Those that are refreshed."""
        return _refreshed(self.sink.related)

    async def run(self, refreshes: Sequence[Refresh]) -> None:
        """Work off what is due, for ever. Its delivery has a task of its own."""
        self.refreshes = {refresh.table: refresh for refresh in refreshes}
        async with asyncio.TaskGroup() as tasks:
            for refresh in refreshes:
                tasks.create_task(refresh.run(), name=f"refresh {refresh.table} {self.main.name}")

    async def hand_over(self, other: Companion) -> None:
        """What is due here is due there, too. Durable when this returns."""
        for table in self.tables:
            after = 0
            while due := await asyncio.to_thread(self._store.refreshes, self.main.name, table, after, PAGE):
                await other.ask(AskedRefreshes(table, [one.key for one in due]))
                after = due[-1].place

    async def ask(self, asked: AskedRefreshes) -> None:
        await self.main.ask(asked)
        refresh = self.refreshes.get(asked.table)
        if refresh is not None:
            refresh.ask()

    async def _ask_everything(self) -> None:
        for table in self.tables:
            await self.ask(AskedRefreshes(table, [EVERYTHING]))

    async def tick(self, received_lsn: int) -> None:
        """To be called every second or so."""
        await self.delivery.check_limits()
        if self.health.refused and not self._owes:
            await self._ask_everything()
        self._owes = bool(self.health.refused)
        gap = None if self.delivery.paused else self.delivery.gap
        if gap is not None and gap.last_lsn is None and self.delivery.full is None and received_lsn:
            await self.delivery.resume(received_lsn)
        elif gap is not None and gap.last_lsn is not None:
            await self._ask_everything()
            await self.delivery.resume(received_lsn)  # what it missed is known to be due
        for refresh in self.refreshes.values():
            await refresh.look()

    # -- what people see --------------------------------------------------------------------------------------------
    def findings(self, refused: Sequence[Finding]) -> list[Finding]:
        """What is wrong with it, for its sink's health. ``refused``: tables that it cannot take."""
        self.health.refused = [self._told(finding) for finding in refused]
        self.health.update(self.delivery, self._clock.monotonic(), self._clock.wall())
        found = [Finding("refresh", refresh.trouble, "") for refresh in self.refreshes.values() if refresh.trouble]
        if self.health.state not in WELL or self.health.refused:
            what = f"documents wait for changes of related tables ({self.health.state}): {self.health.reason}"
            remedy = self.health.remedy
            if self.health.state == "gap":  # what it missed is seen to in `tick`
                remedy = "; ".join(finding.remedy for finding in self.health.refused)
            found.append(Finding(f"{RELATED}{self.health.state}", what, remedy))
        return found

    def _told(self, finding: Finding) -> Finding:
        """What is said of a sink's table is not what mends a related one."""
        if finding.code != "table_renamed":
            return finding
        remedy = f"rename it back, or name the new one in related of sink {self.sink.name} and start again"
        return replace(finding, remedy=f"{remedy}; either way all documents are refreshed then")

    def has_passed(self, lsn: int) -> bool:
        """What changes up to there have called for is due, or done."""
        first = self.delivery.window.first_open()
        return not self.delivery.counters.messages and (first is None or first.first_lsn > lsn)

    def behind(self, seconds: float) -> str:
        """What keeps the documents from being right as of so long ago."""
        first = self.delivery.window.first_open()
        open_seconds = 0.0 if first is None else self._clock.monotonic() - first.arrived
        if self.delivery.counters.messages or open_seconds >= seconds:
            return f"changes of related tables wait: {self.health.reason or self.health.state}"
        if self.main.counters.refreshes and self.oldest_seconds >= seconds and not self.health.refused:
            return f"{self.main.counters.refreshes} documents are to be refreshed"
        return ""

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest due refresh, as of the last `tick`."""
        since = [refresh.since for refresh in self.refreshes.values() if refresh.since is not None]
        return max(0.0, self._clock.wall() - min(since)) if since else 0.0

    def as_item(self) -> dict[str, object]:
        """For a sink's status."""
        counters = self.delivery.counters
        waiting = [f"{'.'.join(r.table)}: {r.waiting}" for r in self.refreshes.values() if r.waiting]
        return {
            "name": self.delivery.name,
            "tables": [str(table) for table in self.source.include_tables or ()],
            "state": self.health.state,
            "reason": self.health.reason,
            "waiting": "; ".join(waiting),
            "backlog_messages": counters.messages + self.delivery.memory_messages,
            "parked_keys": counters.parked_keys,
            "dead_letters": counters.dead_letters,
            "due": self.main.counters.refreshes,
            "due_oldest_seconds": round(self.oldest_seconds, 3),
            "refreshed": sum(refresh.rows for refresh in self.refreshes.values()),
        }


async def forget(store: Store, slot: str, main: Delivery, related: Sequence[Related]) -> None:
    """What is left in the store of entries that the sink had in an earlier run."""
    kept = _refreshed(related)
    gone = [table for table in await asyncio.to_thread(store.due_tables, main.name) if table not in kept]
    for table in gone:
        _log.info("refreshes forgotten: no related entry refreshes the table", sink=main.name, table=".".join(table))
        await _drop(store, main.name, table)
    if gone:
        await main.refresh()
    if not related:
        await _clear_companion(store, slot, f"{main.name}{COMPANION}")


async def clear(store: Store, slot: str, sink: str) -> None:
    """A sink that is not there any more has nothing due, and its companion leaves nothing behind."""
    for table in await asyncio.to_thread(store.due_tables, sink):
        await _drop(store, sink, table)
    await _clear_companion(store, slot, f"{sink}{COMPANION}")


async def _drop(store: Store, sink: str, table: Table) -> None:
    while due := await asyncio.to_thread(store.refreshes, sink, table, 0, PAGE):
        await asyncio.wrap_future(store.write(Write(sink, refreshed=due)))


async def _clear_companion(store: Store, slot: str, name: str) -> None:
    if not await asyncio.to_thread(store.backfills, name, ended=False):
        return  # there was none
    await asyncio.to_thread(store.open_sink, name, slot)
    while await asyncio.wrap_future(store.discard(name, Select(all=True), PAGE, frozenset())):
        pass
    while await asyncio.wrap_future(store.discard_dead(name, Select(all=True), PAGE)):
        pass
    forgotten = BackfillDocument(COLUMNS, b"", ended=False, forgotten=True)
    await asyncio.wrap_future(store.write(Write(name, clear_gap=True, backfill=forgotten)))


def _others_below(store: Store, name: str, related: Sequence[Related], position: Position | None) -> dict[Table, int]:
    """By related table: up to which LSN its changes may have been kept with values of other columns than the entries
    name now. What they name is on its way to the disk when this returns, before any change."""
    document = next((document for number, document in store.backfills(name, ended=False) if number == COLUMNS), b"[]")
    before = {(schema, table): (columns, below) for schema, table, columns, below in orjson.loads(document)}
    now, groups = dict(before), group_columns(related)
    for entry in related:
        table = (entry.table.schema, entry.table.table)
        columns = list(groups[table]) if table in groups else None
        were, below = before.get(table, (columns, -1))
        if were != columns and position is not None:
            below = position.commit_lsn
        now[table] = (columns, below)
    if now != before:
        listed = orjson.dumps([(*table, *known) for table, known in now.items()])
        store.write(Write(name, backfill=BackfillDocument(COLUMNS, listed, ended=False)))
    return {table: below for table, (_, below) in now.items()}


def _refreshed(related: Sequence[Related]) -> list[Table]:
    return list(dict.fromkeys((entry.refreshes.schema, entry.refreshes.table) for entry in related))

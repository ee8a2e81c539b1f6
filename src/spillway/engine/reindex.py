"""One re-index: a new index is filled beside the one that a search sink fills, compared, and put in its place.

::

    backfilling   the shadow (spillway.engine.shadow) has joined, and gets everything committed from then on; a backfill
                  into it for each table of the sink
    catching_up   nothing waits for the shadow, and nothing that was rejected or given up on; its oldest open change is
                  younger than `YOUNG_SECONDS`
    verifying     every row of the source is in the new index, and nothing else (spillway.engine.equality); then the
                  new index is refreshed, the shadow has caught up again, and the alias moves, in one request
    swapped       the shadow goes on until it has delivered everything that the stream had carried when the alias moved:
                  requests of the main sink that were under way went to the old index
    done          the shadow has left; the old index stays until it is dropped by command

The tables of the sink may change meanwhile, in the publication and (SIGHUP) in its ``source``, which the shadow
follows at the same commit. They are asked for before the comparison and right before the alias moves: if one has no
backfill into the new index, or one that is older than an initial backfill of it that the main sink has under way, that
is made up for, and the comparison repeated. An initial backfill that began before is not waited for: it may be held up
by what the new index mends. What enters in the moment of the switch is backfilled while the shadow is still there.

The main sink is not touched: it writes through the alias. Both write the same versions (external_gte), so what is
written twice is written once.

Each step may be repeated, so a restart goes on with the one that it finds. Whether the alias has moved is asked of the
server: it is known there alone. What was decided (``ending``) is durable before it is done. Until the alias moves a
cancel leaves everything as it was; the new index, which is deleted then, says in its mapping whose it is.

What concerns the servers for a while is tried again, with back-off; what somebody must mend fails the re-index. The
index of one that has failed stays to be looked at, until it is cancelled or begun anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog

from spillway.clock import Clock
from spillway.config import Search, Sink
from spillway.engine.equality import ENOUGH, Equality, Source
from spillway.engine.newindex import NewIndex
from spillway.engine.pipeline import Pipeline
from spillway.engine.related import clear
from spillway.engine.shadow import ReindexState, Step, shadow_of
from spillway.engine.shaping import is_shaped
from spillway.errors import SourceUnavailable, SpillwayError, StoreFailed
from spillway.flow.budget import Spare
from spillway.flow.capture import Turn
from spillway.flow.delivery import Delivery
from spillway.flow.progress import Request
from spillway.flow.retry import backoff_seconds
from spillway.position import format_lsn
from spillway.source.page import LockTimeout, PageTimeout
from spillway.store.base import BackfillDocument, Select, Store, Write

LOOK_SECONDS = 0.25
SWAP_LOOK_SECONDS = 0.02
YOUNG_SECONDS = 1.0
RETRY_CAP_SECONDS = 15.0
EXAMPLES = 5
DISCARDED_AT_ONCE = 1_000

_log = structlog.get_logger()


class _Ended(Exception):
    """It is to end, whatever was being done."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    pipeline: Pipeline
    store: Store
    spare: Spare
    clock: Clock
    enlist: Callable[[Sink, Sink], Awaitable[object]]  # a sink, and the one that its messages name
    dismiss: Callable[[str], Awaitable[None]]


class Reindex:
    def __init__(self, state: ReindexState, index: NewIndex, around: Surroundings) -> None:
        self.state = state
        self.waiting = ""
        self.index = index
        self._around = around
        self._pipeline = around.pipeline
        self._clock = around.clock
        self._moving = False  # the alias may have moved: there is no way back
        self._woken = asyncio.Event()

    # -- what people do ---------------------------------------------------------------------------------------------
    async def as_item(self) -> dict[str, object]:
        state = self.state
        backfills = state.ended_backfills
        if state.under_way:
            mine = set(state.backfills.values())
            backfills = [b for b in await self._pipeline.backfills.all(state.shadow) if b["id"] in mine]
        return state.as_item(self.waiting if state.under_way else "", backfills)

    async def cancel(self) -> None:
        """Durable when this returns; `run` does it. The index of one that has failed is deleted at once."""
        state = self.state
        if state.state == "failed":
            await self.index.delete()
            state.state = "cancelled"
            await self._save()
            return
        if not state.under_way:
            raise SpillwayError("reindex_ended", f"the re-index into {state.into} is {state.state}", "begin another")
        if self._moving or state.state == "swapped":
            raise SpillwayError(
                "reindex_swapped",
                f"the alias {state.alias} stands for {state.into} already, or is about to",
                "to go back, re-index into another index",
            )
        await self._end_as("cancelled", "")

    async def drop_old(self) -> list[str]:
        """Delete the indexes that the alias stood for, before this re-index and earlier ones. Refused while any alias
        stands for one of them. Returns which they were."""
        state = self.state
        if state.under_way:
            raise SpillwayError(
                "reindex_active", f"the re-index into {state.into} is {state.state}", "wait for it, or cancel it"
            )
        deleted: list[str] = []
        for index in list(state.old):
            try:
                await self.index.delete_old(index)
            except SpillwayError as error:
                if not deleted:
                    raise
                what = f"{error.what} (deleted by then: {', '.join(deleted)})"
                raise SpillwayError(error.code, what, error.remedy) from error
            _log.info("old index deleted", sink=state.sink, index=index)
            deleted.append(index)
            state.old.remove(index)
            await self._save()
        return deleted

    async def _end_as(self, ending: Literal["failed", "cancelled"], reason: str) -> None:
        self.state.ending = ending
        self.state.reason = reason
        self._woken.set()
        await self._save()

    # -- the work ---------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until it has ended."""
        failures = 0
        try:
            while self.state.under_way:
                before = self.state.state
                try:
                    await self._step()
                    failures = 0
                except _Ended:
                    continue
                except StoreFailed:
                    raise
                except SpillwayError as error:
                    if self.state.state != "swapped" and self.state.ending is None and not _passes(error):
                        await self._fail(f"{error} [{error.code}]")
                        continue
                    failures = failures + 1 if self.state.state == before else 1
                    self.waiting = str(error)
                    await self._sleep(backoff_seconds(failures - 1, 0.25, RETRY_CAP_SECONDS))
        finally:
            await self.index.close()

    async def _step(self) -> None:
        state = self.state
        if state.ending is not None:
            await self._end()
            return
        if state.state != "swapped":
            destination = self._sink.destination
            identity = self._pipeline.identity
            if not isinstance(destination, Search) or destination.index_name != state.alias:
                await self._fail(f"destination.index_name of {state.sink} is {state.alias} no more")
                return
            if identity is not None and identity.epoch != state.epoch:
                await self._fail("the state was adopted for another history of the source")
                return
        match state.state:
            case "backfilling":
                await self._backfill()
            case "catching_up":
                await self._caught_up()
                await self._enter("verifying")
            case "verifying":
                await self._verify()
            case _:
                await self._drain()

    async def _enter(self, step: Step) -> None:
        state = self.state
        state.state = step
        self.waiting = ""
        _log.info("re-index", sink=state.sink, into=state.into, state=state.state)
        await self._save()

    async def _fail(self, reason: str) -> None:
        _log.warning("re-index failed", sink=self.state.sink, into=self.state.into, reason=reason)
        await self._end_as("failed", reason)

    # -- backfilling ------------------------------------------------------------------------------------------------
    async def create(self) -> None:
        """The new index. Repeatable."""
        if self.state.definition is not None:
            await self.index.create(self.state.definition)
            self.state.definition = None
            await self._save()

    async def _backfill(self) -> None:
        state, backfills = self.state, self._pipeline.backfills
        await self.create()
        if self._pipeline.delivery(state.shadow) is None:
            self.waiting = "waits for a commit or a sign of life of the source, to join there"
            await self._around.enlist(shadow_of(self._sink, state.into), self._sink)
            self._go_on()
        self.waiting = ""
        for table in await self._not_backfilled():
            self._go_on()
            await self._begin(table)
        while backfills.active(state.shadow):
            _has_missed_nothing(self._shadow)
            await self._sleep(LOOK_SECONDS)
            self._go_on()
        if await self._not_backfilled():
            return
        states = {item["id"]: item for item in await backfills.all(state.shadow)}
        for name, number in state.backfills.items():
            item = states.get(number)  # of very many only the last are kept; what one missed is seen later
            if item is not None and item["state"] != "completed":
                await self._fail(f"the backfill of {name} is {item['state']}: {item['error'] or 'by command'}")
                return
        await self._enter("catching_up")

    async def _not_backfilled(self) -> list[tuple[str, str]]:
        """Tables of the sink, as of now, whose rows the new index may lack. One that has left is forgotten: it is
        backfilled anew if it comes back."""
        state, backfills = self.state, self._pipeline.backfills
        tables = {".".join(table): table for table in await backfills.tables(state.sink)}
        for name in state.backfills.keys() - tables.keys():
            del state.backfills[name]
        began = {item["id"]: str(item["inserted_at"]) for item in await backfills.all(state.shadow)}
        for item in backfills.active(state.sink):
            name = str(item["table"])
            mine = began.get(state.backfills.get(name))
            if item["origin"] == "initial" and mine is not None and mine < str(item["inserted_at"]):
                del state.backfills[name]
        return [table for name, table in tables.items() if name not in state.backfills]

    async def _begin(self, table: tuple[str, str]) -> None:
        """Its backfill; one that was begun right before a crash is taken over."""
        state, backfills = self.state, self._pipeline.backfills
        name = ".".join(table)
        number = next((str(item["id"]) for item in backfills.active(state.shadow) if item["table"] == name), None)
        if number is None:
            # Known before the first page: rows of a partition that goes later may be in the new index.
            reader = await self._pipeline.open_reader(state.id)
            try:
                relations = {*state.relations.get(name, ()), *await reader.relations(*table)}
            finally:
                await reader.close()
            state.relations[name] = sorted(relations)
            await self._save()
            rate = self._sink.backfill.max_rows_per_second
            request = Request(*table, "reindex", parallel=state.parallel, max_rows_per_second=rate)
            number = (await backfills.start(state.shadow, request)).id
        state.backfills[name] = number
        await self._save()

    # -- catching up ------------------------------------------------------------------------------------------------
    async def _caught_up(self) -> None:
        """Returns when the shadow has delivered everything that was committed a second ago, as far as the clocks of
        source and process agree."""
        while True:
            self._go_on()
            shadow = self._shadow
            self.waiting = self._in_the_way(shadow) or await self._stored(shadow)
            if not self.waiting:
                return
            await self._sleep(LOOK_SECONDS)

    async def _come_by(self, lsn: int) -> None:
        """Returns when the stream has carried everything up to there."""

        async def passed(_: int) -> bool:
            return True

        waits = asyncio.ensure_future(self._pipeline.capture.placed(Turn(lsn, passed)))
        try:
            while not waits.done():
                self._go_on()
                await asyncio.wait([waits], timeout=LOOK_SECONDS)
                self.waiting = f"waits for the stream to come by {format_lsn(lsn)}"
        finally:
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)

    async def _has_nothing_waiting(self) -> None:
        """Returns in a moment in which that needs no clock: nothing at all is on disk."""
        while True:
            self._go_on()
            self.waiting = self._what_waits()
            if not self.waiting:
                return
            await self._sleep(SWAP_LOOK_SECONDS)

    def _what_waits(self) -> str:
        waiting = self._shadow.counters.messages
        return self._in_the_way(self._shadow) or (f"{waiting} messages wait for the new index" if waiting else "")

    async def _stored(self, shadow: Delivery) -> str:
        if not shadow.counters.messages:
            return ""
        oldest = await asyncio.to_thread(self._around.store.oldest, shadow.name)
        if oldest is None or self._clock.wall() - oldest < YOUNG_SECONDS:
            return ""
        return f"{shadow.counters.messages} messages wait for the new index"

    def _in_the_way(self, shadow: Delivery) -> str:
        """What keeps the shadow from having caught up, but for what waits on disk."""
        counters, name = shadow.counters, shadow.name
        _has_missed_nothing(shadow)
        if shadow.paused:
            return f"{name} is paused; see: spillway sinks resume {name}"
        if shadow.breaker.open:
            return f"the new index does not take anything: {shadow.last_error}"
        if counters.dead_letters:
            return (
                f"{counters.dead_letters} rows cannot be in any index; see: spillway dead-letters list {name}; "
                f"go on without them: spillway dead-letters discard {name} --all"
            )
        if counters.parked_keys:
            return (
                f"the new index has rejected {counters.parked_keys} rows, last: {shadow.last_error or ''}; see: "
                f"spillway backlog list {name}; mend the mapping of {self.state.into} or the rows, or cancel"
            )
        first = shadow.window.first_open()
        open_seconds = 0.0 if first is None else self._clock.monotonic() - first.arrived
        if open_seconds >= YOUNG_SECONDS:
            return f"a change is on its way since {open_seconds:.1f} s"
        companion = self._pipeline.companions.get(name)
        return "" if companion is None else companion.behind(YOUNG_SECONDS)

    # -- verifying, and the switch ----------------------------------------------------------------------------------
    async def _verify(self) -> None:
        state = self.state
        if await self.index.has_alias():
            await self._enter("swapped")
            return
        self._moving = False
        if await self._not_backfilled():
            await self._go_back()
            return
        tables = await self._pipeline.backfills.tables(state.sink)
        timeout_seconds = self._sink.backfill.timeout_ms / 1000
        open_reader = partial(self._pipeline.open_reader, filters=self._sink.filters)
        source = Source(open_reader, self._around.spare, timeout_seconds)
        shaping = self._shadow.shaping if is_shaped(self._sink) else None
        equality = Equality(
            self.index.sink, self._sink, state, source, self._caught_up, self._come_by, self._clock, shaping
        )
        await equality.compare([table for table in tables if ".".join(table) in state.backfills])
        self._go_on()
        if equality.found:
            examples = [f"{key} {how}" for key, how in list(equality.found.items())[:EXAMPLES]]
            count = f"at least {ENOUGH}" if len(equality.found) >= ENOUGH else str(len(equality.found))
            await self._fail(f"{count} rows differ from the source: {'; '.join(examples)}")
            return
        await self._save()
        await self._swap()

    async def _swap(self) -> None:
        state = self.state
        await self.index.refresh()
        state.old = list(dict.fromkeys([*state.old, *await self.index.in_its_place()]))
        await self._save()
        failures = 0
        while True:
            await self._has_nothing_waiting()
            if not failures:  # else the alias may have moved
                if await self._not_backfilled():
                    await self._go_back()
                    return
                if self._what_waits():  # it has come meanwhile
                    continue
            self._go_on()
            self._moving = True
            try:
                if not failures or not await self.index.has_alias():
                    await self.index.take_alias()
                break
            except SpillwayError as error:
                if not _passes(error):
                    self._moving = False
                    raise
                failures += 1
                self.waiting = str(error)
                await self._clock.sleep(backoff_seconds(failures - 1, 0.25, RETRY_CAP_SECONDS))
        if not failures:
            state.swapped_lsn = max(self._pipeline.capture.received_lsn, self._shadow.tail.commit_lsn)
        await self._enter("swapped")

    async def _go_back(self) -> None:
        state = self.state
        there = await self.index.in_its_place()
        state.old = [index for index in state.old if index not in there]
        await self._enter("backfilling")

    async def _drain(self) -> None:
        state, capture = self.state, self._pipeline.capture
        if not state.swapped_lsn:
            reader = await self._pipeline.open_reader(state.id, primary=True)
            try:
                state.swapped_lsn = await reader.flushed_lsn()
            finally:
                await reader.close()
            await self._save()
        await self._backfill_late()
        shadow, backfills = self._shadow, self._pipeline.backfills
        companions = self._pipeline.companions
        companion, main = companions.get(state.shadow), companions.get(state.sink)
        while True:
            first = shadow.window.first_open()
            waiting = shadow.counters.messages
            if (
                capture.received_lsn >= state.swapped_lsn
                and not backfills.active(state.shadow)
                and not waiting
                and (first is None or first.first_lsn > state.swapped_lsn)
                and (companion is None or companion.has_passed(state.swapped_lsn))
            ):
                break
            self.waiting = f"what was under way when the alias moved; {waiting} messages wait"
            if shadow.counters.parked_keys:
                self.waiting += f", {shadow.counters.parked_keys} rows were rejected, last: {shadow.last_error or ''}"
            await self._sleep(LOOK_SECONDS)
        if companion is not None and main is not None:  # it may have refreshed the documents of the old index
            await companion.hand_over(main)
        await self._leave()
        state.ended = self._clock.wall()
        await self._enter("done")

    async def _backfill_late(self) -> None:
        """Tables that have entered in the moment of the switch: the main sink may have had the first of their rows
        written into the old index."""
        for table in await self._not_backfilled():
            try:
                await self._begin(table)
            except SpillwayError as error:
                if _passes(error) or isinstance(error, StoreFailed):
                    raise
                name = ".".join(table)
                _log.warning("no backfill after the switch", sink=self.state.sink, table=name, error=str(error))

    # -- the end ----------------------------------------------------------------------------------------------------
    async def _end(self) -> None:
        """As it was decided; but after a crash only the server knows whether the alias had moved."""
        state = self.state
        if state.state == "verifying":
            if await self.index.has_alias():
                state.ending, state.reason = None, ""
                await self._enter("swapped")
                return
            there = await self.index.in_its_place()
            state.old = [index for index in state.old if index not in there]
        await self._leave()
        if state.ending == "cancelled":
            await self.index.delete()
        state.state, state.ending = state.ending or "failed", None
        state.ended = self._clock.wall()
        _log.info("re-index ended", sink=state.sink, into=state.into, state=state.state, reason=state.reason)
        await self._save()

    async def _leave(self) -> None:
        """The shadow is no more, and leaves nothing behind: another of its name begins anew."""
        state, backfills = self.state, self._pipeline.backfills
        name = state.shadow
        if self._pipeline.delivery(name) is not None:
            for item in backfills.active(name):
                await backfills.change(name, str(item["id"]), "cancel")
            while backfills.active(name):
                self.waiting = "waits for its backfills to end"
                await self._clock.sleep(LOOK_SECONDS)
            self.waiting = "waits for a commit or a sign of life of the source, to leave there"
            await self._around.dismiss(name)
        await self._clear(name)
        mine = set(state.backfills.values())
        state.ended_backfills = [item for item in await backfills.all(name) if item["id"] in mine]
        self.waiting = ""

    async def _clear(self, name: str) -> None:
        store = self._around.store
        await asyncio.to_thread(store.open_sink, name, self._pipeline.database.slot.name)
        while await asyncio.wrap_future(store.discard(name, Select(all=True), DISCARDED_AT_ONCE, frozenset())):
            pass
        while await asyncio.wrap_future(store.discard_dead(name, Select(all=True), DISCARDED_AT_ONCE)):
            pass
        for number, document in store.backfills(name, ended=False):  # it was not there to cancel them
            forgotten = BackfillDocument(number, document, ended=True, forgotten=True)
            await asyncio.wrap_future(store.write(Write(name, backfill=forgotten)))
        await asyncio.wrap_future(store.write(Write(name, paused=False, clear_gap=True)))
        await clear(store, self._pipeline.database.slot.name, name)

    # -- state ------------------------------------------------------------------------------------------------------
    @property
    def _sink(self) -> Sink:
        """As it is configured now."""
        return next(sink for sink in self._pipeline.sinks if sink.name == self.state.sink)

    @property
    def _shadow(self) -> Delivery:
        shadow = self._pipeline.delivery(self.state.shadow)
        assert shadow is not None, "the shadow takes part until it is dismissed"
        return shadow

    def _go_on(self) -> None:
        if self.state.ending is not None:
            raise _Ended

    async def _save(self) -> None:
        main = self._pipeline.delivery(self.state.sink)
        assert main is not None
        await main.note(self.state.as_document())

    async def _sleep(self, seconds: float) -> None:
        self._woken.clear()
        if self.state.ending is None:
            try:
                async with self._clock.timeout(seconds):
                    await self._woken.wait()
            except TimeoutError:
                pass
        else:
            await self._clock.sleep(seconds)


def _has_missed_nothing(shadow: Delivery) -> None:
    if shadow.gap is not None:
        raise SpillwayError(
            "reindex_gap", f"{shadow.name} has missed changes: {shadow.gap.reason}", "raise the limits, and begin anew"
        )


def _passes(error: SpillwayError) -> bool:
    """Whether asking again may help."""
    return isinstance(error, SourceUnavailable | LockTimeout | PageTimeout) or error.code == "sink_unreachable"

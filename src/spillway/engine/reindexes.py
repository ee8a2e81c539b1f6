"""The re-indexes of all databases: begun, ended, listed by command; a restart finds them in the store and goes on.

Each sink has at most one under way. What a new index is created with is that of the order, else what the order says to
derive from the tables, else the file that ``destination.mapping`` names, read anew: it is changed for this.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

from spillway import sinks
from spillway.clock import Clock
from spillway.config import Config, ReindexOrder, Search, Sink
from spillway.config.destination import Elasticsearch, OpenSearch
from spillway.engine.newindex import NewIndex, owned
from spillway.engine.pipeline import Pipeline
from spillway.engine.reindex import Reindex, Surroundings
from spillway.engine.shadow import REINDEX, ReindexState, kept, shadow_of
from spillway.engine.shaping import is_routed
from spillway.errors import SpillwayError
from spillway.flow.budget import Spare
from spillway.sinks.base import SinkContext
from spillway.sinks.mapping import derived, read_definition
from spillway.source import catalog
from spillway.source.connect import querying
from spillway.store.base import BackfillDocument, Store

if TYPE_CHECKING:
    from spillway.sinks.search import SearchSink

Enlist = Callable[[Pipeline, Sink, Sink], Awaitable[object]]
Dismiss = Callable[[Pipeline, str], Awaitable[None]]
Table = tuple[str, str]


class Reindexes:
    def __init__(
        self,
        config: Config,
        pipelines: Sequence[Pipeline],
        store: Store,
        spare: Spare,
        clock: Clock,
        enlist: Enlist,
        dismiss: Dismiss,
    ) -> None:
        self._config = config
        self._store = store
        self._spare = spare
        self._clock = clock
        self._enlist = enlist
        self._dismiss = dismiss
        self._reindexes: dict[str, Reindex] = {}  # by sink: the last one
        self._tasks: asyncio.TaskGroup | None = None
        self._one_at_a_time = asyncio.Lock()
        for pipeline in pipelines:
            for sink in pipeline.sinks:
                state = kept(store, sink.name)
                if state is not None and isinstance(sink.destination, Search):
                    self._reindexes[sink.name] = self._of_state(pipeline, sink, state)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for reindex in self._reindexes.values():
                if reindex.state.under_way:
                    tasks.create_task(reindex.run())
            await asyncio.Event().wait()  # until it is cancelled

    def _of_state(self, pipeline: Pipeline, sink: Sink, state: ReindexState) -> Reindex:
        around = Surroundings(
            pipeline,
            self._store,
            self._spare,
            self._clock,
            lambda shadow, told_as: self._enlist(pipeline, shadow, told_as),
            lambda name: self._dismiss(pipeline, name),
        )
        return Reindex(state, self._index(sink, state), around)

    def _index(self, sink: Sink, state: ReindexState) -> NewIndex:
        """To ask about the new index, on connections of its own: those of the sinks are theirs."""
        context = SinkContext(state.shadow, b"", self._config.base_dir, state.epoch, 0)
        built = sinks.build(self._config, shadow_of(sink, state.into), context)
        return NewIndex(cast("SearchSink", built), state, self._clock)

    # -- what people ask for ----------------------------------------------------------------------------------------
    async def items(self) -> list[dict[str, object]]:
        return [await reindex.as_item() for reindex in self._reindexes.values()]

    async def start(self, pipeline: Pipeline, name: str, order: ReindexOrder) -> dict[str, object]:
        """The new index is there, and the beginning durable, when this returns."""
        sink = next(sink for sink in pipeline.sinks if sink.name == name)
        if not isinstance(sink.destination, Search) or self._is_shadow(name):
            raise SpillwayError(
                "no_search_sink", f"sink {name} fills no index of a search server", "name one that does"
            )
        if is_routed(sink):
            raise SpillwayError(
                "routed",
                f"sink {name} has a routing function, a routing_column or op: update: the key of a row does not say"
                " where its document is, or what it is",
                "fill a new index by a sink of its own, with a backfill",
            )
        async with self._one_at_a_time:
            return await self._start(pipeline, sink, sink.destination, order)

    async def _start(
        self, pipeline: Pipeline, sink: Sink, destination: Elasticsearch | OpenSearch, order: ReindexOrder
    ) -> dict[str, object]:
        last = self._reindexes.get(sink.name)
        if last is not None and last.state.under_way:
            what = last.state.ending or last.state.state
            raise SpillwayError(
                "reindex_active",
                f"a re-index of {sink.name} into {last.state.into} is under way ({what})",
                f"wait for it, or: spillway reindex {sink.name} --cancel",
            )
        tables = await self._tables(pipeline, sink)
        definition = await self._definition(pipeline, sink, destination, order, tables)
        state = ReindexState(
            str(uuid.uuid4()),
            sink.name,
            destination.index_name,
            order.into,
            pipeline.identity.epoch if pipeline.identity is not None else 1,
            replace_index=order.replace_index,
            parallel=order.parallel or sink.backfill.parallel,
            started=self._clock.wall(),
        )
        state.definition = owned(definition, state.id)
        if last is not None:
            state.old = list(last.state.old)
        reindex = self._of_state(pipeline, sink, state)
        try:
            await reindex.index.check(last.state if last is not None else None)
            await self._note(pipeline, sink, state)
            try:
                await reindex.create()
            except SpillwayError as error:
                if error.code != "sink_unreachable":  # then it may have been created, and `run` asks again
                    await self._note(pipeline, sink, last.state if last is not None else None)
                    raise
        except SpillwayError:
            await reindex.index.close()
            raise
        self._reindexes[sink.name] = reindex
        if self._tasks is not None:
            self._tasks.create_task(reindex.run(), name=f"re-index {sink.name}")
        return await reindex.as_item()

    async def change(self, sink: str, verb: Literal["cancel", "drop_old"]) -> dict[str, object]:
        """The item; of ``drop_old`` with the indexes that were ``deleted``."""
        async with self._one_at_a_time:
            reindex = self._reindexes.get(sink)
            if reindex is None:
                raise SpillwayError(
                    "unknown_reindex", f"sink {sink} was never re-indexed", "see: spillway reindex --status"
                )
            if verb == "cancel":
                await reindex.cancel()
                return await reindex.as_item()
            deleted = await reindex.drop_old()
            return {**await reindex.as_item(), "deleted": deleted}

    def _is_shadow(self, name: str) -> bool:
        return any(reindex.state.shadow == name for reindex in self._reindexes.values())

    async def _note(self, pipeline: Pipeline, sink: Sink, state: ReindexState | None) -> None:
        delivery = pipeline.delivery(sink.name)
        assert delivery is not None
        if state is not None:
            await delivery.note(state.as_document())
        else:
            await delivery.note(BackfillDocument(REINDEX, b"", ended=False, forgotten=True))

    # -- what it is created with ------------------------------------------------------------------------------------
    async def _tables(self, pipeline: Pipeline, sink: Sink) -> list[Table]:
        tables = await pipeline.backfills.tables(sink.name)
        if not tables:
            raise SpillwayError(
                "no_tables", f"sink {sink.name} takes no table of the publication", "see: spillway check"
            )
        for table in tables:
            refused = pipeline.router.refused.get((sink.name, *table))
            if refused is not None:
                raise SpillwayError.of(refused)
        return tables

    async def _definition(
        self,
        pipeline: Pipeline,
        sink: Sink,
        destination: Elasticsearch | OpenSearch,
        order: ReindexOrder,
        tables: Sequence[Table],
    ) -> dict[str, object]:
        if order.mapping is not None:
            return order.mapping
        if order.derive_mapping:
            columns = await _columns(pipeline, tables)
            return dict(derived(columns.items(), destination.document))
        if destination.mapping is not None:
            return dict(await asyncio.to_thread(read_definition, self._config.base_dir / destination.mapping))
        raise SpillwayError(
            "no_mapping",
            f"nothing says what to create {order.into} with",
            f"give --mapping FILE or --derive-mapping, or set destination.mapping of sink {sink.name}",
        )


async def _columns(pipeline: Pipeline, tables: Sequence[Table]) -> dict[str, str]:
    """Name and type of the published columns of all of the tables."""
    database = pipeline.database
    columns: dict[str, str] = {}
    async with querying(database.conninfo(), database.slot.name) as query:
        for one in await catalog.tables(query, database.publication.name):
            if one.name not in tables:
                continue
            for column, type_name in (await catalog.column_types(query, one.oid)).items():
                if column not in one.published_columns:
                    continue
                if columns.setdefault(column, type_name) != type_name:
                    raise SpillwayError(
                        "mapping_not_derived",
                        f"column {column} is {columns[column]} in one table and {type_name} in another",
                        "give --mapping FILE",
                    )
    return columns

"""What takes the changes of related tables: they become due refreshes of the rows whose documents they are part of.

A sink with related tables has a *companion*, a `spillway.flow.delivery.Delivery` of its own which no people know by
name, with a `FanOut` as its sink. So a change of a related table is waited for, spilled, parked, retried and read again
after a crash as any other message is, and is confirmed only when the refreshes that it calls for are durable. One that
was seen to in part and comes again asks for the same once more, which changes nothing (spillway.store.refreshes).

Of the changes nothing but the values of some columns is used, as keys of groups have them
(``Subscription.group_columns``): those of all related entries of a table together, each of which takes its own. A
change of them has both, the old and the new; a table whose replica identity does not bring the old ones is refused, as
for any sink. What is in the store may be of a time when these were other columns (``others_below``): it does not say
which rows are concerned, and counts as a TRUNCATE does.

A TRUNCATE says nothing of rows: all documents of the table that is refreshed are due (`EVERYTHING`). Partitions that
are published by themselves are emptied under their own names. Of which table one is, or was, need not be known by the
time it is told (it may be gone): all documents of the sink are due then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType

from spillway.change import group_values
from spillway.chunk import HASH, LARGE, LSN, TIME, Batch, Keying
from spillway.clock import Clock
from spillway.config.shape import Related
from spillway.flow.budget import Spare
from spillway.flow.rows import LONG_SECONDS
from spillway.sinks.base import OK, Result, Semantics, reject
from spillway.source.parents import PAGE_BYTES, Parents, QuestionFailed, Values
from spillway.source.snapshot import Seen
from spillway.store.base import EVERYTHING, AskedRefreshes

LOOK_SECONDS = 0.02
_XID_SHIFT = 32

Table = tuple[str, str]


def group_columns(related: Sequence[Related]) -> dict[Table, tuple[str, ...]]:
    """By table: the columns that the entries which name some need, together."""
    found: dict[Table, tuple[str, ...]] = {}
    for entry in related:
        if entry.columns is not None:
            table = (entry.table.schema, entry.table.table)
            found[table] = tuple(dict.fromkeys([*found.get(table, ()), *entry.columns]))
    return found


class FanOut:
    semantics: Semantics = "ordered"  # one batch at a time, with as many changes of a row as there are
    max_in_flight = 1
    single = False

    def __init__(
        self,
        related: Sequence[Related],
        parents: Parents,
        spare: Spare,
        ask: Callable[[AskedRefreshes], Awaitable[None]],
        clock: Clock,
        others_below: Mapping[Table, int] = MappingProxyType({}),
    ) -> None:
        """``ask`` returns when it is durable. ``others_below``: up to this LSN changes of a table may have values of
        columns other than the entries name."""
        self._related = related
        self._others_below = others_below
        self._tables = {(entry.table.schema, entry.table.table) for entry in related}
        self._groups = group_columns(related)
        self._by_primary_key = {(one.table.schema, one.table.table) for one in related if one.columns is None}
        self._parents = parents
        self._spare = spare
        self._ask = ask
        self._clock = clock

    async def open(self) -> None:
        """Connections are made as they are needed."""

    async def send(self, batch: Batch) -> Result:
        try:
            wanted, emptied, seen = self._read(batch)
        except QuestionFailed as error:
            return reject(error.code, str(error))
        if wanted or emptied:
            while not self._spare.try_take(PAGE_BYTES):
                await self._clock.sleep(LOOK_SECONDS)
            try:
                await self._parents.find(wanted, seen, self._take)
            except QuestionFailed as error:
                return reject(error.code, str(error))
            finally:
                self._spare.give(PAGE_BYTES)
        for table in emptied:  # not before there is a snapshot that sees why
            await self._take(table, [EVERYTHING])
        return OK

    async def close(self) -> None:
        await self._parents.close()

    async def _take(self, table: Table, keys: Sequence[str]) -> None:
        await self._ask(AskedRefreshes(table, keys))

    def _read(self, batch: Batch) -> tuple[list[tuple[Related, list[Values]]], list[Table], Seen]:
        """What to ask for each entry, the tables of which everything is due, and what must be seen."""
        # By table, and whether by the columns of the group. (Where these are in a record differs from span to span:
        # what was read back has no group but its own.)
        texts: dict[tuple[Table, bool], dict[bytes, None]] = {}
        emptied: dict[Table, None] = {}
        xids: set[int] = set()
        lsn = 0
        since = (self._clock.wall() - LONG_SECONDS) * 1_000_000
        for span, start, stop in batch.pieces:
            chunk, group = span.chunk, Keying.hash_word(span.keying) - HASH
            for index in span.indices[start:stop]:
                table = chunk.table(index)
                if chunk.word(index, TIME) > since:  # else it is seen, and its id may be another's by now
                    xids.add(chunk.word(index, LARGE) >> _XID_SHIFT)
                    lsn = max(lsn, chunk.word(index, LSN))
                if chunk.action(index) == "truncate":
                    emptied |= dict.fromkeys(self._refreshed_with(table))
                    continue
                keys = chunk.key_texts(index)
                if not keys[0] and table in self._by_primary_key:
                    raise QuestionFailed(
                        "related_no_key",
                        f"a change of related table {'.'.join(table)} does not tell its primary key",
                        "add one that its replica identity has, or name columns",
                    )
                places = [(False, 0), (True, group)]
                if chunk.word(index, LSN) <= self._others_below.get(table, -1):
                    emptied |= dict.fromkeys(self._refreshed_with(table, by_columns=True))
                    del places[1]
                for by_group, at in places:
                    texts.setdefault((table, by_group), {}).update(dict.fromkeys(filter(None, keys[at : at + 2])))
        wanted: list[tuple[Related, list[Values]]] = []
        for entry in self._related:
            table = (entry.table.schema, entry.table.table)
            values = self._values(entry, table, texts.get((table, entry.columns is not None), {}))
            if values:
                wanted.append((entry, values))
        xids.discard(0)
        return wanted, list(emptied), Seen(xids, lsn)

    def _refreshed_with(self, table: Table, *, by_columns: bool = False) -> list[Table]:
        """What is refreshed by a related table, or by the one that this is a partition of; or by those entries of it
        alone that name columns."""
        return [
            (entry.refreshes.schema, entry.refreshes.table)
            for entry in self._related
            if table == (entry.table.schema, entry.table.table) or table not in self._tables
            if not by_columns or entry.columns is not None
        ]

    def _values(self, entry: Related, table: Table, texts: dict[bytes, None]) -> list[Values]:
        found = (group_values(*table, text.decode()) for text in texts)
        if entry.columns is None:
            return list(found)
        places = [self._groups[table].index(name) for name in entry.columns]
        return list(dict.fromkeys(tuple(values[place] for place in places) for values in found))

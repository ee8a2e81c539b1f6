"""What the tables of the stream are called: how a rename is noticed.

The stream names a table by its OID and by the name that it had at that place of the WAL. Here is kept, durably, under
which name a sink took it last (of a partition: the name of its root). A table that comes with another name was renamed,
while we looked on or not; but

- not one whose old name another published table has by now: the two were swapped, and changes of that name come;
- nor a partition that was detached: its rows are no rows of its root any more;
- nor a table that was dropped and made anew: it has another OID.

As long as a sink that took it by the old name cannot take it by the new one the old name is what is kept: so the next
start refuses it, too. What is kept is written behind the changes: a crash may forget a table that was named for the
first time some milliseconds before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from spillway.pgoutput import Relation, TableInfo
from spillway.store.base import Store, TakenTable


class Published(Protocol):
    async def published_as(self, name: tuple[str, str], oid: int) -> bool: ...


class TableNames:
    """Of one slot."""

    def __init__(self, store: Store, slot: str) -> None:
        self._store = store
        self._slot = slot
        self._taken = store.taken_tables(slot)

    async def before(self, relation: Relation, info: TableInfo, source: Published) -> tuple[str, str] | None:
        """The name that the table had, if it was renamed."""
        before, now = self._taken.get(relation.oid), _named(relation, info)
        if before is None or before.name == now.name or (before.partition and not now.partition):
            return None
        return None if await source.published_as(before.name, relation.oid) else before.name

    @property
    def taken(self) -> Mapping[int, TakenTable]:
        return self._taken

    def take(self, relation: Relation, info: TableInfo) -> None:
        """A sink takes it as it is called now."""
        now = _named(relation, info)
        if self._taken.get(relation.oid) != now:
            self._taken[relation.oid] = now
            self._store.write_taken_table(self._slot, relation.oid, now)


def _named(relation: Relation, info: TableInfo) -> TakenTable:
    return TakenTable(*(info.root or (relation.schema, relation.table)), partition=info.root is not None)

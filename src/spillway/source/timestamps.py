"""Which columns of a table are timestamps: what a sink with ``timestamp_format`` must know of messages that may be as
old as its backlog.

The catalogue is asked once per table, and again

- when the stream has told of the table's shape (`TimestampColumns.forget`);
- when a record has a column that no record had before the asking. A column that is gone from the table is asked for
  once, and not converted: nobody knows its type any more;
- after a while, since rows of a backfill may be of a shape that the stream has not told yet. If there are no timestamps
  then, though there were, the table is taken for dropped: what waits of it is converted as before.

**What is known holds as long as nobody can be asked**: a sink goes on with its backlog while the source is away, for
the tables that it has had messages of (I6). So an answer that is merely old is used where asking fails, and then nobody
asks for one for a while: an attempt may take as long as a connection's time-out.

One asks at a time, however many batches and tables there are, and what it has learned is the others' as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from spillway.errors import SpillwayError
from spillway.source.connect import querying
from spillway.source.queries import fetch

ASK_AGAIN_SECONDS: Final = 10.0
MOST_NAMES: Final = 10_000  # of columns of one table that are remembered


@dataclass(slots=True)
class _Known:
    timestamps: frozenset[str]
    names: set[str]  # of all columns that were asked for
    asked_at: float


class TimestampColumns:
    """Of one database."""

    def __init__(self, conninfo: str, slot: str) -> None:
        self._conninfo = conninfo
        self._slot = slot
        self._known: dict[tuple[str, str], _Known] = {}
        self._forgotten = 0  # how often
        self._failed_at = float("-inf")
        self._asking = asyncio.Lock()

    def forget(self, schema: str, table: str) -> None:
        """It may have another shape from here on."""
        self._known.pop((schema, table), None)
        self._forgotten += 1

    async def of(self, schema: str, table: str, names: Collection[str]) -> frozenset[str]:
        """Columns of type timestamp or timestamptz, arrays and domains included; none of a table that has gone.
        ``names``: the columns of the record that it is asked for. Raises SpillwayError where nothing is known of these,
        and nobody can be asked."""
        known = self._answer(schema, table, names)
        if known is not None and not self._is_old(known):
            return known.timestamps
        async with self._asking:
            known = self._answer(schema, table, names)
            if known is None or self._is_old(known):
                try:
                    known = await self._ask(schema, table, names)
                except SpillwayError:
                    self._failed_at = time.monotonic()
                    known = self._answer(schema, table, names)
                    if known is None:
                        raise
        return known.timestamps

    def _answer(self, schema: str, table: str, names: Collection[str]) -> _Known | None:
        """What holds for these columns, as far as the stream has told."""
        known = self._known.get((schema, table))
        return known if known is not None and known.names.issuperset(names) else None

    def _is_old(self, known: _Known) -> bool:
        """And it is time to ask for another."""
        return time.monotonic() - max(known.asked_at, self._failed_at) > ASK_AGAIN_SECONDS

    async def _ask(self, schema: str, table: str, names: Collection[str]) -> _Known:
        before, forgotten = self._known.get((schema, table)), self._forgotten
        async with querying(self._conninfo, self._slot) as query:
            rows = await fetch(query, "timestamp_columns", schema=schema, table=table)
        found = frozenset(row["name"] for row in rows)
        if not found and before is not None:
            found = before.timestamps
        seen: set[str] = set() if before is None or len(before.names) > MOST_NAMES else before.names
        known = _Known(found, seen | set(names), time.monotonic())
        if forgotten == self._forgotten:  # else the answer may be of the time before
            self._known[schema, table] = known
        return known

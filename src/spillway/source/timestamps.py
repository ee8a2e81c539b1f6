"""Which columns of a table are timestamps: what a sink with ``timestamp_format`` must know of messages that may be as
old as its backlog.

The catalogue is asked once per table, and again

- when the stream has told of the table's shape (`TimestampColumns.forget`);
- when a record has a column that no record had before the asking. A column that is gone from the table is asked for
  once, and not converted: nobody knows its type any more;
- after a while, since rows of a backfill may be of a shape that the stream has not told yet. If there are no timestamps
  then, though there were, the table is taken for dropped: what waits of it is converted as before.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from spillway.source.connect import querying
from spillway.source.queries import fetch

ASK_AGAIN_SECONDS: Final = 10.0
MOST_NAMES: Final = 10_000  # of columns of one table that are remembered


@dataclass(slots=True)
class _Known:
    timestamps: frozenset[str]
    names: set[str]  # of all columns that were asked for
    asked_at: float

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self.asked_at > ASK_AGAIN_SECONDS


class TimestampColumns:
    """Of one database."""

    def __init__(self, conninfo: str, slot: str) -> None:
        self._conninfo = conninfo
        self._slot = slot
        self._known: dict[tuple[str, str], _Known] = {}
        self._forgotten = 0  # how often

    def forget(self, schema: str, table: str) -> None:
        """It may have another shape from here on."""
        self._known.pop((schema, table), None)
        self._forgotten += 1

    async def of(self, schema: str, table: str, names: Collection[str]) -> frozenset[str]:
        """Columns of type timestamp or timestamptz, arrays and domains included; none of a table that has gone.
        ``names``: the columns of the record that it is asked for. Raises SourceUnavailable."""
        known = self._known.get((schema, table))
        if known is None or not known.names.issuperset(names) or known.is_old:
            forgotten = self._forgotten
            async with querying(self._conninfo, self._slot) as query:
                rows = await fetch(query, "timestamp_columns", schema=schema, table=table)
            seen: set[str] = set() if known is None or len(known.names) > MOST_NAMES else known.names
            found = frozenset(row["name"] for row in rows)
            if not found and known is not None:
                found = known.timestamps
            known = _Known(found, seen | set(names), time.monotonic())
            if forgotten == self._forgotten:  # else the answer may be of the time before
                self._known[schema, table] = known
        return known.timestamps

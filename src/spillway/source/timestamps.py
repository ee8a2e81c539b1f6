"""Which columns of a table are timestamps: what a sink with ``timestamp_format`` must know of messages that may be as
old as its backlog.

The catalogue is asked once per table, and again when a record has a column that no record had before the asking: a
column that is added comes with its first record. A column that is gone from the table is asked for once, and not
converted: nobody knows its type any more. Of a table that is not there the catalogue is asked again after a while,
since it may be created anew.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from spillway.source.connect import querying
from spillway.source.queries import fetch

ASK_AGAIN_SECONDS: Final = 10.0  # for a table without timestamps, which may be one that is not there
MOST_NAMES: Final = 10_000  # of columns of one table that are remembered


@dataclass(slots=True)
class _Known:
    timestamps: frozenset[str]
    names: set[str]  # of all columns that were asked for
    asked_at: float

    @property
    def may_be_gone(self) -> bool:
        return not self.timestamps and time.monotonic() - self.asked_at > ASK_AGAIN_SECONDS


class TimestampColumns:
    def __init__(self, conninfo: str, slot: str) -> None:
        self._conninfo = conninfo
        self._slot = slot
        self._known: dict[tuple[str, str], _Known] = {}

    async def of(self, schema: str, table: str, names: Collection[str]) -> frozenset[str]:
        """Columns of type timestamp or timestamptz, arrays and domains included; none of a table that has gone.
        ``names``: the columns of the record that it is asked for. Raises SourceUnavailable."""
        known = self._known.get((schema, table))
        if known is None or not known.names.issuperset(names) or known.may_be_gone:
            async with querying(self._conninfo, self._slot) as query:
                rows = await fetch(query, "timestamp_columns", schema=schema, table=table)
            seen: set[str] = set() if known is None or len(known.names) > MOST_NAMES else known.names
            known = _Known(frozenset(row["name"] for row in rows), seen | set(names), time.monotonic())
            self._known[schema, table] = known
        return known.timestamps

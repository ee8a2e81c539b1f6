"""Which columns of a table are timestamps: what a sink with ``timestamp_format`` must know of messages that may be as
old as its backlog. Asked of the catalogue once per table, and again after its shape has changed (`forget`)."""

from __future__ import annotations

from spillway.source.connect import querying
from spillway.source.queries import fetch


class TimestampColumns:
    def __init__(self, conninfo: str, slot: str) -> None:
        self._conninfo = conninfo
        self._slot = slot
        self._known: dict[tuple[str, str], frozenset[str]] = {}

    async def of(self, schema: str, table: str) -> frozenset[str]:
        """Columns of type timestamp or timestamptz, arrays and domains included; none of a table that has gone. Raises
        SourceUnavailable."""
        known = self._known.get((schema, table))
        if known is None:
            async with querying(self._conninfo, self._slot) as query:
                rows = await fetch(query, "timestamp_columns", schema=schema, table=table)
            known = self._known[schema, table] = frozenset(row["name"] for row in rows)
        return known

    def forget(self, schema: str, table: str) -> None:
        self._known.pop((schema, table), None)

"""Rows by key as the stream would render them now: for updates that came without their large values (TOAST).

What is asked for has the shape of a page (`spillway.source.shape`): the published columns in the table's order,
generated ones where the publication has them, only rows that its filter lets through. A row that is filtered is
missing, as one that was deleted is. Of partitions that are published by themselves each is asked for its own rows.

A sink's conditions are asked of the row that was read: the stream could not tell them of a value that it did not have.

Freshness, memory and errors are those of `spillway.source.bykeys`; row security that would hide a row is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from spillway.errors import Finding, SpillwayError
from spillway.pgoutput.conditions import Condition, compiled
from spillway.pgoutput.filters import Check
from spillway.source import catalog
from spillway.source.bykeys import VISIBLE_SECONDS, ByKeys
from spillway.source.connect import Connection
from spillway.source.origin import Expected
from spillway.source.queries import fetch_one
from spillway.source.sessions import Sessions
from spillway.source.shape import Selection, Shape, rows_of
from spillway.source.view import BY_LIST, no_primary_key, not_published
from spillway.source.wrapped import Parameter, Question

_TEXT_ARRAY_OID: Final = 1009


class Reselect(ByKeys):
    """For one publication on one server. `fetch` raises ``reselect_failed``, ``not_published``, ``no_primary_key``,
    ``reselect_columns``, ``reselect_timeout``, or what is wrong with the conditions."""

    def __init__(
        self,
        conninfo: str,
        slot: str,
        publication: str,
        expected: Callable[[], Expected],
        conditions: Sequence[Condition] = (),
        *,
        timeout_seconds: float = 15.0,
        connections: int = 2,
        visible_seconds: float = VISIBLE_SECONDS,
    ) -> None:
        self._publication = publication
        self._conditions = conditions
        sessions = Sessions(
            conninfo,
            slot,
            "reselect",
            expected,
            timeout_seconds,
            connections,
            own_search_path=False,
            settings={"row_security": "off", **dict.fromkeys(BY_LIST, "off")},
        )
        remedy = "use toast: omit for this sink, or REPLICA IDENTITY FULL"
        super().__init__(sessions, "reselect", "rows read anew", remedy, visible_seconds)

    async def _question(self, connection: Connection, table: tuple[str, str]) -> Question:
        shape = await self._shape(connection, *table)
        shapes = [shape] if shape is not None else await self._leaves(connection, *table)
        first = shapes[0]
        names = [column.name for column in first.relation.columns]
        key = tuple(column.name for column in first.in_column_order)
        selects = [_select(connection, one, names, key) for one in shapes]
        parameters = tuple(Parameter(place, _TEXT_ARRAY_OID, ",") for place in range(len(key)))
        return Question(" UNION ALL ".join(selects), key, parameters, await self._checks(connection, first, table))

    async def _checks(self, connection: Connection, shape: Shape, table: tuple[str, str]) -> tuple[Check, ...]:
        conditions = [condition for condition in self._conditions if condition.table == table]
        if not conditions:
            return ()
        checks = compiled(shape.relation, await catalog.describe(connection, shape.relation), conditions)
        if isinstance(checks, Finding):
            raise SpillwayError.of(checks)
        return checks

    async def _shape(self, connection: Connection, schema: str, table: str) -> Shape | None:
        """None: the publication does not have it by itself."""
        published = await fetch_one(
            connection, "published_table", publication=self._publication, schema=schema, table=table
        )
        if published is None:
            return None
        seen = await fetch_one(
            connection, "page", schema=schema, table=table, sort_column=None, publication=self._publication
        )
        if seen is None or seen["shape"] is None:
            return None
        shape = Shape.of(seen["shape"], schema, table, published, connection.info.server_version)
        if not shape.keyed:
            raise no_primary_key(schema, table)
        return shape

    async def _leaves(self, connection: Connection, schema: str, table: str) -> list[Shape]:
        """Of a table whose partitions are published by themselves."""
        names = [
            (one.schema, one.table)
            for one in await catalog.tables(connection, self._publication)
            if one.name == (schema, table)
        ]
        shapes = [await self._shape(connection, *name) for name in names]
        found = [shape for shape in shapes if shape is not None]
        if not found:
            raise not_published(self._publication, schema, table)
        return found


def _select(connection: Connection, shape: Shape, names: Sequence[str], key: tuple[str, ...]) -> str:
    schema, table = shape.relation.schema, shape.relation.table
    columns = shape.in_column_order
    own_key = tuple(column.name for column in columns)
    if set(names) != {column.name for column in shape.relation.columns} or key != own_key:
        raise SpillwayError(
            "reselect_columns",
            f"partition {schema}.{table} is published with other columns, or has another primary key, than its sisters,"
            " or its key's columns in another order",
            "publish the same columns of all of them, or by their root (publish_via_partition_root)",
        )
    rows = rows_of(shape, Selection(schema, table))
    assert rows is not None  # it has a primary key
    ordered = replace(rows, streamed=tuple(names))
    return ordered.by_arrays(columns).as_string(connection)

"""A table as its pages are read: the catalogue's answer to the query ``page``, made into what the SQL of a page and the
decoder need. The answer's text is kept: as long as it stays the same, so does everything here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

from psycopg import sql
from psycopg.rows import DictRow

from spillway.errors import SpillwayError
from spillway.pgoutput.relation import Column as StreamedColumn
from spillway.pgoutput.relation import Relation
from spillway.source import keyspace
from spillway.source.keyspace import CTID, Cursor, Order, Rows

_FIRST_OWN_OID = 16384  # types below came with the server
_GENERATED_PUBLISHED_SINCE = 180000
# What an index on the sort column gives is sorted on by the key, group by group; before, the whole table would be.
_SORTS_ON_SINCE = 130000


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be read of one relation (a partition that is published by itself is a relation of its own)."""

    schema: str
    table: str
    where: str | None = None  # SQL, the user's
    sort_column: str | None = None
    start: str | None = None  # the least value of sort_column that is read; needs sort_column
    committed_since: str | None = None  # rows that were last changed later, by what the server keeps of that
    # Bounds of the primary key, included, in column order. Where that is the index's, the least is a bound that the
    # index serves, and `PageReader.bounded` makes a range of the most, which counts for nothing here.
    least_key: Cursor | None = None
    most_key: Cursor | None = None


class _Column(TypedDict):
    number: int
    name: str
    type_oid: int
    type_modifier: int
    type: str
    generated: bool
    not_null: bool
    collation: tuple[str, str] | None


class _KeyColumn(TypedDict):
    number: int
    operators: dict[str, tuple[str, str]]


class _Index(TypedDict):
    primary: bool
    key: list[_KeyColumn]


class _Answer(TypedDict):
    oid: int
    kind: str
    file: int
    columns: list[_Column]
    indexes: list[_Index] | None


@dataclass(frozen=True, slots=True)
class Shape:
    text: str
    relation: Relation  # as the stream would describe it
    partitioned: bool
    file: int
    row_filter: str | None
    columns: dict[int, _Column]  # by number, in order
    primary: tuple[keyspace.Column, ...]  # in the order of the index
    primary_numbers: tuple[int, ...]
    leading: keyspace.Column | None  # the sort column, if an index begins with it

    @classmethod
    def of(cls, text: str, schema: str, table: str, published: DictRow | None, server_version: int) -> Shape:
        """``published``: what the publication shows of it; None: everything but generated columns."""
        answer = cast(_Answer, json.loads(text))
        listed, row_filter = None, None
        if published is not None:
            listed, row_filter = published["published_columns"], published["row_filter"]
        columns = {column["number"]: column for column in answer["columns"]}
        key: list[_KeyColumn] = []
        leading: keyspace.Column | None = None
        for index in answer["indexes"] or ():
            if index["primary"]:
                key = index["key"]
            elif server_version >= _SORTS_ON_SINCE:
                leading = leading or _ordered(columns, index["key"][0])
        numbers = tuple(column["number"] for column in key)
        streamed = _streamed(answer["columns"], listed, server_version)
        whole_key = {columns[number]["name"] for number in numbers} <= {column["name"] for column in streamed}
        relation = Relation(
            answer["oid"],
            schema,
            table,
            "d",
            tuple(
                StreamedColumn(c["name"], c["type_oid"], c["type_modifier"], whole_key and c["number"] in numbers)
                for c in streamed
            ),
        )
        return cls(
            text=text,
            relation=relation,
            partitioned=answer["kind"] == "p",
            file=answer["file"],
            row_filter=row_filter,
            columns=columns,
            primary=tuple(_ordered(columns, column) for column in key),
            primary_numbers=numbers,
            leading=leading,
        )

    @property
    def has_own_types(self) -> bool:
        return any(column.type_oid >= _FIRST_OWN_OID for column in self.relation.columns)

    @property
    def keyed(self) -> bool:
        """The stream sends the primary key."""
        return any(column.in_identity for column in self.relation.columns)

    @property
    def key_in_column_order(self) -> bool:
        return self.primary_numbers == tuple(sorted(self.primary_numbers))

    @property
    def in_column_order(self) -> tuple[keyspace.Column, ...]:
        """The primary key's columns."""
        pairs = sorted(zip(self.primary_numbers, self.primary, strict=True), key=lambda pair: pair[0])
        return tuple(column for _, column in pairs)

    def key_places(self, order: Order) -> tuple[int, ...] | None:
        """For each column of an order that is the primary key's: its place among the values of a key, which are in
        column order. None: a key does not give the order's values."""
        if order.columns != self.primary or not self.keyed:
            return None
        in_column_order = sorted(self.primary_numbers)
        return tuple(in_column_order.index(number) for number in self.primary_numbers)

    def cursor(self, order: Order, key: Sequence[str]) -> Cursor:
        places = self.key_places(order)
        assert places is not None
        return (order.tag, *(key[place] for place in places))


def rows_of(shape: Shape, selection: Selection) -> Rows | None:
    """The rows that a selection asks for. None: there is nothing to order them by."""
    schema, table = selection.schema, selection.table
    conditions = [] if shape.row_filter is None else [keyspace.condition(shape.row_filter)]
    if selection.where is not None:
        conditions.append(keyspace.condition(selection.where))
    if selection.committed_since is not None:
        conditions.append(keyspace.committed_since(schema, table, selection.committed_since))
    order, floor = _order(shape, selection, conditions)
    if selection.least_key is not None or selection.most_key is not None:
        ranged = shape.key_in_column_order
        bounds = _key_bounds(shape, selection, None if ranged else selection.most_key)
        if ranged and bounds and floor is None:
            (floor,) = bounds
        else:
            conditions += bounds
    if order is None:
        return None
    return Rows(
        schema=schema,
        table=table,
        partitioned=shape.partitioned,
        streamed=tuple(column.name for column in shape.relation.columns),
        order=order,
        floor=floor,
        condition=sql.SQL(" AND ").join(conditions) if conditions else None,
    )


def _order(
    shape: Shape, selection: Selection, conditions: list[sql.Composable]
) -> tuple[Order | None, sql.Composable | None]:
    """The order, and the bound that a start is to it; a start that is none becomes a condition."""
    by_key = _by_key(shape)
    if selection.sort_column is None:
        return by_key, None
    names = {column["name"]: column for column in shape.columns.values()}
    sort = names.get(selection.sort_column)
    if sort is None:
        raise SpillwayError(
            "no_column",
            f"table {selection.schema}.{selection.table} has no column {selection.sort_column}",
            "correct sort_column",
        )
    start, first = selection.start, shape.leading
    if shape.primary and shape.primary[0].name == selection.sort_column:
        first = shape.primary[0]
    # Without a start rows that are null there are wanted as well, and no comparison finds them.
    if first is None or not shape.primary or (start is None and not sort["not_null"]):
        if start is not None:
            unordered = keyspace.Column(sort["name"], sort["type"], _pair(sort["collation"]), {})
            conditions.append(keyspace.from_start(selection.schema, selection.table, unordered, start))
        return by_key, None
    rest = [
        (number, column)
        for number, column in zip(shape.primary_numbers, shape.primary, strict=True)
        if number != sort["number"]
    ]
    tag = ",".join(str(number) for number in (sort["number"], *(number for number, _ in rest)))
    floor = None if start is None else keyspace.floor(selection.schema, selection.table, first, start)
    return Order(tag, (first, *(column for _, column in rest))), floor


def _key_bounds(shape: Shape, selection: Selection, most: Cursor | None) -> list[sql.Composable]:
    columns, least = shape.in_column_order, selection.least_key
    if any(len(key) != len(columns) for key in (least, most) if key is not None):
        raise SpillwayError(
            "order_changed",
            f"the primary key of {selection.schema}.{selection.table} has changed",
            "cancel this backfill and start another, with bounds of its key",
        )
    return keyspace.key_bounds(selection.schema, selection.table, columns, least, most)


def _by_key(shape: Shape) -> Order | None:
    if shape.primary:
        return Order(",".join(str(number) for number in shape.primary_numbers), shape.primary)
    return None if shape.partitioned else Order(f"ctid {shape.file}", (CTID,))


def _streamed(columns: Sequence[_Column], published: Sequence[str] | None, server_version: int) -> list[_Column]:
    """In the table's order, whatever the publication's list says of it."""
    if published is None:
        return [column for column in columns if not column["generated"]]
    return [
        column
        for column in columns
        if column["name"] in published and (not column["generated"] or server_version >= _GENERATED_PUBLISHED_SINCE)
    ]


def _ordered(columns: dict[int, _Column], key: _KeyColumn) -> keyspace.Column:
    column = columns[key["number"]]
    operators = {int(strategy): _name(operator) for strategy, operator in key["operators"].items()}
    return keyspace.Column(column["name"], column["type"], _pair(column["collation"]), operators)


def _pair(collation: Sequence[str] | None) -> tuple[str, str] | None:
    return None if collation is None else _name(collation)


def _name(parts: Sequence[str]) -> tuple[str, str]:
    schema, name = parts
    return schema, name

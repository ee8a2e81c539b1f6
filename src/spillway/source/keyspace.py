"""The order in which a table's rows are paged, and the SQL of it.

The order is total, and an index serves it: the primary key's columns in the order of its index, a sort column before
them where an index begins with one, or the physical order (``ctid``) of a table without primary key. Nothing is assumed
of the types: bounds are text cast to the column's own type (`format_type`), compared by the operators of the index's
own operator class, under the column's own collation. Operators are written out with their schema since the session's
``search_path`` is empty: a bare ``>`` on a citext would be the one of text, which orders differently.

A **cursor** is the order's tag and then the values of its columns as PostgreSQL's text. The tag says which order it is
a place in (the columns' numbers; of a ctid order the table's file, which changes when the table is rewritten), so that
a cursor never means another place after an ALTER TABLE between two pages.

Columns are always written with schema and table: in an ORDER BY a bare name would be one of the output's first, and
the user's condition may name the table. `Condition` says why one may be trusted between parentheses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from spillway.errors import SpillwayError

Cursor = tuple[str, ...]

# Strategies of a B-tree operator class (pg_amop.amopstrategy).
LESS, LESS_EQUAL, EQUAL, GREATER_EQUAL, GREATER = range(1, 6)

LAST_OFFSET: Final = 65535  # of a row in its block, more than any block has
_AND: Final = sql.SQL(" AND ")


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type: str  # in SQL, with its schema where it is not in pg_catalog
    collation: tuple[str, str] | None  # of a type that has any
    operators: Mapping[int, tuple[str, str]]  # schema and name, by strategy

    def literal(self, value: str) -> sql.Composable:
        return self.made_of(sql.Literal(value))

    def made_of(self, text: sql.Composable) -> sql.Composable:
        """An expression for a text, as one of the column's own type and collation."""
        cast_value = sql.SQL("CAST({} AS {})").format(text, _verbatim(self.type))
        if self.collation is None:
            return cast_value
        return sql.SQL("{} COLLATE {}").format(cast_value, sql.Identifier(*self.collation))


CTID: Final = Column(
    "ctid",
    "pg_catalog.tid",
    None,
    {strategy: ("pg_catalog", name) for strategy, name in enumerate(("<", "<=", "=", ">=", ">"), 1)},
)


@dataclass(frozen=True, slots=True)
class Order:
    tag: str
    columns: tuple[Column, ...]

    @property
    def physical(self) -> bool:
        return self.columns == (CTID,)


@dataclass(frozen=True, slots=True)
class Rows:
    """A part of one relation's rows: what all statements about it have in common."""

    schema: str
    table: str
    partitioned: bool
    streamed: tuple[str, ...]  # the columns that the stream sends, in its order
    order: Order
    floor: sql.Composable | None = None  # a lower bound that the order's index serves
    condition: sql.Composable | None = None  # what has to be looked at row by row

    @property
    def source(self) -> sql.Composable:
        """ONLY: a table that inherits from an ordinary one streams under its own name."""
        name = sql.Identifier(self.schema, self.table)
        return name if self.partitioned else sql.SQL("ONLY {}").format(name)

    def column(self, name: str) -> sql.Composable:
        return sql.Identifier(self.schema, self.table, name)

    def values(self, cursor: Cursor) -> Sequence[str]:
        tag, *values = cursor
        if tag != self.order.tag or len(values) != len(self.order.columns):
            raise SpillwayError(
                "order_changed",
                f"table {self.schema}.{self.table} was rewritten or has another primary key or index since the last "
                "page was read",
                "cancel this backfill and start it again",
            )
        return values

    def between(self, low: Cursor | None, high: Cursor | None) -> list[sql.Composable]:
        """Above low, up to and including high."""
        bounds = [] if self.floor is None else [self.floor]
        if low is not None:
            bounds.append(self.compared(GREATER, self.values(low)))
        if high is not None:
            bounds.append(self.compared(LESS_EQUAL, self.values(high)))
        return bounds

    def copy(self, bounds: Sequence[sql.Composable], limit: int) -> sql.Composed:
        return sql.SQL("COPY (SELECT {} FROM {}{}{} LIMIT {}) TO STDOUT").format(
            self._list(self.streamed),
            self.source,
            self._where([*bounds, self.condition]),
            self._order_by(),
            sql.Literal(limit),
        )

    def nth(self, bounds: Sequence[sql.Composable], n: int, *, conditioned: bool) -> sql.Composed:
        """The order's values of the n-th row, counted from 1."""
        return sql.SQL("SELECT {} FROM {}{}{} OFFSET {} LIMIT 1").format(
            self._list([c.name for c in self.order.columns]),
            self.source,
            self._where([*bounds, self.condition if conditioned else None]),
            self._order_by(),
            sql.Literal(n - 1),
        )

    def planned(self, bounds: Sequence[sql.Composable]) -> sql.Composed:
        return sql.SQL("EXPLAIN (FORMAT JSON) SELECT 1 FROM {}{}").format(
            self.source, self._where([*bounds, self.condition])
        )

    def quantiles(self, ranges: int, sampled_percent: float) -> sql.Composed:
        """The order's values at the ends of so many equal parts but the last, of a sample of the table's blocks."""
        names = [sql.Identifier(f"spillway {i}") for i in range(len(self.order.columns))]
        columns = [self.column(c.name) for c in self.order.columns]
        listed = sql.SQL(", ").join(columns)
        return sql.SQL(
            "SELECT {names} FROM (SELECT {named}, row_number() OVER (ORDER BY {listed}) AS n, count(*) OVER () AS rows"
            " FROM {source} TABLESAMPLE SYSTEM ({percent}){where}) AS sampled"
            " WHERE n < rows AND n * {ranges} / rows > (n - 1) * {ranges} / rows ORDER BY n"
        ).format(
            names=sql.SQL(", ").join(names),
            named=sql.SQL(", ").join(
                sql.SQL("{} AS {}").format(column, name) for column, name in zip(columns, names, strict=True)
            ),
            listed=listed,
            source=self.source,
            percent=sql.Literal(sampled_percent),
            where=self._where([self.floor]),
            ranges=sql.Literal(ranges),
        )

    # By keys.

    def by_arrays(self, columns: Sequence[Column]) -> sql.Composed:
        """The rows with the keys in $1 ... $n, arrays of text of these columns, which are the order's; text for text as
        by `copy_keys`."""
        numbers = range(len(columns))
        made = [column.made_of(sql.Identifier(_GIVEN, str(i))) for i, column in zip(numbers, columns, strict=True)]
        # With several arrays it is a notation, not a function that has a schema.
        return sql.SQL("SELECT {} FROM {} JOIN unnest({}) AS {} ({}) ON {}{}").format(
            self._list(self.streamed),
            self.source,
            sql.SQL(", ").join(_verbatim(f"${i + 1}") for i in numbers),
            sql.Identifier(_GIVEN),
            sql.SQL(", ").join(sql.Identifier(str(i)) for i in numbers),
            self._matches(columns, made),
            self._where([self.condition]),
        )

    def copy_keys(self, keys: Sequence[Sequence[str]], only: Collection[str] | None = None) -> sql.Composed:
        """The rows with these values of the order's columns, text for text: what is equal under a collation or as a
        number and reads otherwise is another key. ``only``: all other columns but the order's come as null."""
        shown = self.streamed if only is None else {*only, *(column.name for column in self.order.columns)}
        return sql.SQL("COPY (SELECT {} FROM {} JOIN {} ON {}{}) TO STDOUT").format(
            sql.SQL(", ").join(self.column(name) if name in shown else sql.NULL for name in self.streamed),
            self.source,
            self._given(keys),
            self._matches_given(),
            self._where([self.condition]),
        )

    def missing_keys(self, keys: Sequence[Sequence[str]]) -> sql.Composed:
        """The numbers of those that `copy_keys` does not give."""
        return sql.SQL("SELECT {} FROM {} WHERE NOT EXISTS (SELECT FROM {}{})").format(
            _GIVEN_NUMBER, self._given(keys), self.source, self._where([self._matches_given(), self.condition])
        )

    def _given(self, keys: Sequence[Sequence[str]]) -> sql.Composable:
        columns = self.order.columns
        rows = [
            sql.SQL("({}, {})").format(
                sql.Literal(number),
                sql.SQL(", ").join(column.literal(value) for column, value in zip(columns, key, strict=True)),
            )
            for number, key in enumerate(keys)
        ]
        names = [sql.Identifier("number"), *(sql.Identifier(str(i)) for i in range(len(columns)))]
        return sql.SQL("(VALUES {}) AS {} ({})").format(
            sql.SQL(", ").join(rows), sql.Identifier(_GIVEN), sql.SQL(", ").join(names)
        )

    def _matches(self, columns: Sequence[Column], given: Sequence[sql.Composable]) -> sql.Composable:
        pairs: list[sql.Composable] = []
        for column, other in zip(columns, given, strict=True):
            one = self.column(column.name)
            pairs.append(_operation(one, column.operators[EQUAL], other))
            as_text = sql.SQL('CAST({} AS pg_catalog.text) COLLATE pg_catalog."C"')
            pairs.append(_operation(as_text.format(one), ("pg_catalog", "="), as_text.format(other)))
        return _AND.join(pairs)

    def _matches_given(self) -> sql.Composable:
        columns = self.order.columns
        return self._matches(columns, [sql.Identifier(_GIVEN, str(i)) for i in range(len(columns))])

    # Parts.

    def _list(self, names: Sequence[str]) -> sql.Composable:
        return sql.SQL(", ").join(self.column(name) for name in names)

    def _where(self, conditions: Sequence[sql.Composable | None]) -> sql.Composable:
        given = [condition for condition in conditions if condition is not None]
        return sql.SQL(" WHERE {}").format(_AND.join(given)) if given else sql.SQL("")

    def _order_by(self) -> sql.Composable:
        """A scan by ranges of ctid gives that order by itself; asked for it, the planner would sort."""
        if self.order.physical:
            return sql.SQL("")
        return sql.SQL(" ORDER BY {}").format(self._list([c.name for c in self.order.columns]))

    def compared(self, strategy: int, values: Sequence[str]) -> sql.Composable:
        columns = self.order.columns
        left = [self.column(column.name) for column in columns]
        right = [column.literal(value) for column, value in zip(columns, values, strict=True)]
        if len(columns) == 1:
            return _operation(left[0], columns[0].operators[strategy], right[0])
        operators = {column.operators[strategy] for column in columns}
        if len(operators) == 1:
            rows = [sql.SQL("ROW({})").format(sql.SQL(", ").join(side)) for side in (left, right)]
            return _operation(rows[0], operators.pop(), rows[1])
        return self._compare_by_columns(strategy, left, right)

    def _compare_by_columns(
        self, strategy: int, left: Sequence[sql.Composable], right: Sequence[sql.Composable]
    ) -> sql.Composable:
        """A row comparison whose operators are in several schemas, for which SQL has no notation. The first term is
        what the index is searched by."""
        columns = self.order.columns
        above = strategy in (GREATER, GREATER_EQUAL)
        strict, weak = (GREATER, GREATER_EQUAL) if above else (LESS, LESS_EQUAL)
        cases: list[sql.Composable] = []
        for i, column in enumerate(columns):
            last = i == len(columns) - 1
            terms = [_operation(left[j], columns[j].operators[EQUAL], right[j]) for j in range(i)]
            terms.append(_operation(left[i], column.operators[strategy if last else strict], right[i]))
            cases.append(_AND.join(terms))
        first = _operation(left[0], columns[0].operators[weak], right[0])
        return sql.SQL("{} AND ({})").format(first, sql.SQL(" OR ").join(cases))


def floor(schema: str, table: str, column: Column, start: str) -> sql.Composable:
    """Rows from this value of the sort column on."""
    return _operation(
        sql.Identifier(schema, table, column.name), column.operators[GREATER_EQUAL], column.literal(start)
    )


def from_start(schema: str, table: str, column: Column, start: str) -> sql.Composable:
    """The same of a column without an index, whose operators are not looked up."""
    return sql.SQL("{} >= {}").format(sql.Identifier(schema, table, column.name), column.literal(start))


def condition(text: str) -> sql.Composable:
    """The user's, or the publication's filter. A comment at its end must not take the parenthesis with it."""
    return sql.SQL("(\n{}\n)").format(_verbatim(text))


def key_bounds(
    schema: str, table: str, columns: tuple[Column, ...], least: Cursor | None, most: Cursor | None
) -> list[sql.Composable]:
    """Conditions for keys from one to another, both included, compared in the order of these columns."""
    rows = Rows(schema, table, partitioned=False, streamed=(), order=Order("", columns))
    return [
        rows.compared(strategy, key)
        for strategy, key in ((GREATER_EQUAL, least), (LESS_EQUAL, most))
        if key is not None
    ]


def committed_since(schema: str, table: str, time: str) -> sql.Composable:
    return sql.SQL("pg_catalog.pg_xact_commit_timestamp({}) >= CAST({} AS pg_catalog.timestamptz)").format(
        sql.Identifier(schema, table, "xmin"), sql.Literal(time)
    )


def tests_of_condition(source: sql.Composable, text: str) -> list[sql.Composed]:
    """Statements that are all accepted only if the text is one expression: what closes the parenthesis early and opens
    another ("true) OR (true") does not fit between brackets. To be sent by the extended protocol, which takes one
    statement, and planned only."""
    return [
        sql.SQL("EXPLAIN SELECT 1 FROM {} WHERE {}").format(source, condition(text)),
        sql.SQL("EXPLAIN SELECT ARRAY[\n{}\n]::pg_catalog.bool[] FROM {}").format(_verbatim(text), source),
    ]


def _operation(left: sql.Composable, operator: tuple[str, str], right: sql.Composable) -> sql.Composable:
    schema, name = operator
    return sql.SQL("{} OPERATOR({}.{}) {}").format(left, sql.Identifier(schema), _verbatim(name), right)


def _verbatim(text: str) -> sql.SQL:
    """SQL that the catalogue or the user has written."""
    return sql.SQL(text)


_GIVEN: Final = "spillway keys"
_GIVEN_NUMBER: Final = sql.Identifier(_GIVEN, "number")

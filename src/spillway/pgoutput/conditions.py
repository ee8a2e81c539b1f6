"""A sink's conditions on a table, compiled against what the stream says of that table.

Values are compared as PostgreSQL would compare the column with the value written as a literal of the column's type:

- integers exactly; ``numeric`` exactly, as decimal numbers; ``real`` and ``double precision`` after the value was made
  one of these. NaN equals itself and is above everything, infinity included.
- text (``text``, ``varchar``, ``char``, ``name``) by code point: collations are not followed, so ``lt`` and ``gt`` may
  differ from the server's. Blanks at the end of a ``char(n)`` count only for ``like``.
- ``boolean``, ``uuid``; ``date``, ``timestamp`` and ``timestamptz`` as moments, with BC and infinity. A value for a
  ``timestamptz`` that names no time zone is UTC.
- an enum as text; it has no order here, since its labels' order is the server's.
- ``json`` and ``jsonb`` by ``path``, as ``#>`` follows it (keys; indices of arrays, from the end if negative). What is
  there is compared with a value of its own type: number with number, text with text. One of another type is different
  from the value, and neither above nor below it. JSON's null, and what is not there, count as null. Without a path the
  whole value is looked at, and null is the column's.
- of every other type the text that PostgreSQL prints: equal or not.

``like`` has ``%``, ``_`` and the backslash as its escape.

What no such column could hold, and columns that the stream does not have, are findings.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Final, Literal, Protocol, TypeVar

from spillway.errors import Finding
from spillway.pgoutput import paths
from spillway.pgoutput.filters import Check, CheckKind, CheckOperator
from spillway.pgoutput.like import Wild, like, like_parts
from spillway.pgoutput.literals import (
    DATE,
    INT8,
    TIMESTAMP,
    TIMESTAMPTZ,
    UnfitError,
    as_it_is,
    boolean_of,
    float_of,
    integer_of,
    moment_of,
    numeric_of,
    read_float4,
    read_float8,
    read_integer,
    read_moment,
    read_numeric,
    read_trimmed,
    text_of,
    uuid_of,
)
from spillway.pgoutput.relation import Column, Relation, TableInfo

Operator = Literal["eq", "ne", "gt", "lt", "gte", "lte", "in", "not_in", "is_null", "is_not_null", "like"]
_ORDER: Final = {"lt": operator.lt, "lte": operator.le, "gt": operator.gt, "gte": operator.ge}
_EQUALITY: Final = ("eq", "ne", "in", "not_in")


class Condition(Protocol):
    """What the configuration says (spillway.config.shape)."""

    @property
    def table(self) -> tuple[str, str]: ...
    @property
    def column(self) -> str: ...
    @property
    def operator(self) -> Operator: ...
    @property
    def value(self) -> object: ...
    @property
    def path(self) -> tuple[str, ...]: ...


def compiled(relation: Relation, info: TableInfo, conditions: Sequence[Condition]) -> tuple[Check, ...] | Finding:
    """Checks that hold if and only if the conditions do; or what is wrong with one of them. The conditions are those on
    this table."""
    places = {column.name: place for place, column in enumerate(relation.columns)}
    checks: list[Check] = []
    for condition in conditions:
        place = places.get(condition.column)
        table = f"{relation.schema}.{relation.table}"
        if place is None:
            return Finding(
                code="filter_column_missing",
                what=f'the published columns of table {table} have no "{condition.column}", which a filter names',
                remedy="name a column that exists and, if the publication lists the table's columns, add it there",
            )
        try:
            checks.append(_check(place, _type_of(relation.columns[place], info), condition))
        except UnfitError as unfit:
            return Finding(
                code="filter_does_not_fit",
                what=f'the filter on column "{condition.column}" of table {table} does not fit: {unfit}',
                remedy="change operator or value of this filter, or write a filter function",
            )
    return tuple(checks)


# Types.

_INTEGERS = frozenset({20, 21, 23, 26})
_INTEGER_RANGES: Final = {21: (-(1 << 15), (1 << 15) - 1), 23: (-(1 << 31), (1 << 31) - 1), 26: (0, (1 << 32) - 1)}
_TEXTS = frozenset({18, 19, 25, 1043})
_BOOLEAN, _BPCHAR, _NUMERIC, _FLOAT4, _FLOAT8, _UUID = 16, 1042, 1700, 700, 701, 2950
_JSON, _JSONB = 114, 3802
_ENUM, _OTHER, _CITEXT = -1, -2, -3  # no OIDs
_FIRST_OWN_OID = 16384  # FirstNormalObjectId: below are the types that every server has


def _type_of(column: Column, info: TableInfo) -> int:
    """The OID of a built-in type, of a domain that of its base; or what stands for a kind."""
    oid = column.type_oid
    while (known := info.types.get(oid)) is not None and known.kind == "domain":
        oid = known.base_oid
    if known is None or (known.kind == "base" and oid < _FIRST_OWN_OID):
        return oid
    if known.kind == "enum":
        return _ENUM
    return _CITEXT if known.kind == "base" and known.name == "citext" else _OTHER


def _check(place: int, type_oid: int, condition: Condition) -> Check:
    is_json = type_oid in (_JSON, _JSONB)
    if condition.path and not is_json:
        raise UnfitError("only json and jsonb have paths")
    if condition.operator in ("is_null", "is_not_null"):
        wants_null = condition.operator == "is_null"
        if condition.path:
            return Check(place, wants_null, paths.null_test(condition.path, wants_null=wants_null), "path")
        return Check(place, wants_null, lambda _: not wants_null, "null")
    if is_json:
        return Check(place, False, paths.Told(condition.path, _json_test(condition)), "path")
    if type_oid in _INTEGERS:
        least, most = _INTEGER_RANGES.get(type_oid, INT8)
        return _compared(place, condition, read_integer, lambda value: integer_of(value, least, most), "integer")
    if type_oid in _TEXTS or type_oid == _BPCHAR:
        return _text_check(place, condition, trimmed=type_oid == _BPCHAR)
    if type_oid == _BOOLEAN:
        return _compared(place, condition, as_it_is, boolean_of, "text")
    if type_oid == _UUID:
        return _compared(place, condition, as_it_is, uuid_of, "text")
    if type_oid == _NUMERIC:
        return _compared(place, condition, read_numeric, numeric_of)
    if type_oid in (_FLOAT4, _FLOAT8):
        single = type_oid == _FLOAT4
        return _compared(place, condition, read_float4 if single else read_float8, lambda v: float_of(v, single=single))
    if type_oid in (DATE, TIMESTAMP, TIMESTAMPTZ):
        return _compared(place, condition, read_moment, lambda value: moment_of(value, type_oid), "moment")
    if type_oid == _CITEXT:
        raise UnfitError("citext is compared by rules that only the server knows")
    if type_oid == _ENUM and condition.operator == "like":
        return _text_check(place, condition)
    if condition.operator not in _EQUALITY:
        what = "an enum has no order here" if type_oid == _ENUM else "of this type only the text is known"
        raise UnfitError(f"{what}: eq, ne, in and not_in can be told")
    return _text_check(place, condition)


# Comparing.

T = TypeVar("T", int, bytes, tuple[int, Decimal], tuple[int, float])


def _compared(
    place: int,
    condition: Condition,
    read: Callable[[bytes], T | None],
    constant: Callable[[object], T],
    kind: CheckKind = "python",
    *,
    trimmed: bool = False,
) -> Check:
    """``read`` makes a value of the column's text, None where it cannot be; ``constant`` one of the condition's."""
    if condition.operator == "like":
        raise UnfitError("like is for text")
    given = condition.value if condition.operator in ("in", "not_in") else (condition.value,)
    if not isinstance(given, tuple):
        raise UnfitError(f"{condition.operator} needs a list")
    values: list[T] = [constant(value) for value in given if value is not None]
    if None in given and condition.operator != "in":  # as in SQL: nothing is unequal to null
        return Check(place, False, lambda _: False)
    holds = _comparison(condition.operator, read, values)
    if kind == "python" or (kind == "moment" and not all(abs(value) < 1 << 63 for value in values)):  # type: ignore[arg-type]
        return Check(place, False, holds)
    told: CheckOperator = condition.operator  # type: ignore[assignment]
    return Check(place, False, holds, kind, told, tuple(sorted(values)), trimmed)  # type: ignore[arg-type]


def _comparison(
    operator_name: str, read: Callable[[bytes], T | None], values: list[T]
) -> Callable[[bytes], bool | None]:
    order = _ORDER.get(operator_name)
    if order is not None:
        (bound,) = values

        def ordered(text: bytes) -> bool | None:
            value = read(text)
            return None if value is None else bool(order(value, bound))

        return ordered
    known = frozenset(values)
    wanted = operator_name in ("eq", "in")

    def equal(text: bytes) -> bool | None:
        value = read(text)
        return None if value is None else (value in known) == wanted

    return equal


# Text.


def _text_check(place: int, condition: Condition, *, trimmed: bool = False) -> Check:
    if condition.operator != "like":
        read = read_trimmed if trimmed else as_it_is
        return _compared(place, condition, read, lambda value: read(text_of(value)) or b"", "text", trimmed=trimmed)
    parts = like_parts(text_of(condition.value).decode())
    literal = "".join(part for part in parts if isinstance(part, str)).encode()
    wild = [part for part in parts if not isinstance(part, str)]
    if not wild:
        return Check(place, False, lambda text: text == literal, "text", "eq", (literal,))
    if wild == [Wild.MANY] and parts[-1] is Wild.MANY:
        return Check(place, False, lambda text: text.startswith(literal), "text", "prefix", (literal,))
    matches = like(parts)
    return Check(place, False, lambda text: matches(text.decode("utf-8", "surrogateescape")))


# JSON.


def _json_test(condition: Condition) -> Callable[[object], bool]:
    if condition.operator == "like":
        matches = like(like_parts(text_of(condition.value).decode()))
        return lambda value: isinstance(value, str) and matches(value)
    order = _ORDER.get(condition.operator)
    if order is not None:
        bound = paths.value_of(condition.value)
        return lambda value: type(value) is type(bound) and bool(order(value, bound))
    given = condition.value if condition.operator in ("in", "not_in") else (condition.value,)
    if not isinstance(given, tuple):
        raise UnfitError(f"{condition.operator} needs a list")
    values = [paths.value_of(value) for value in given if value is not None]
    wanted = condition.operator in ("eq", "in")
    if None in given and condition.operator != "in":
        return lambda _: False

    def test(value: object) -> bool:
        if value is None or value is paths.ABSENT:
            return False
        return any(paths.same(value, known) for known in values) == wanted

    return test

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

import json
import operator
import re
import struct
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Final, Literal, Protocol, TypeVar
from uuid import UUID

from spillway.errors import Finding
from spillway.pgoutput.filters import Check, CheckKind, CheckOperator
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


class _UnfitError(Exception):
    """Why a condition makes no sense for its column."""


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
        except _UnfitError as unfit:
            return Finding(
                code="filter_does_not_fit",
                what=f'the filter on column "{condition.column}" of table {table} does not fit: {unfit}',
                remedy="change operator or value of this filter, or write a filter function",
            )
    return tuple(checks)


# Types.

_INTEGERS = frozenset({20, 21, 23, 26})
_INTEGER_RANGES: Final = {21: (-(1 << 15), (1 << 15) - 1), 23: (-(1 << 31), (1 << 31) - 1), 26: (0, (1 << 32) - 1)}
_INT8: Final = (-(1 << 63), (1 << 63) - 1)
_TEXTS = frozenset({18, 19, 25, 1043})
_BOOLEAN, _BPCHAR, _NUMERIC, _FLOAT4, _FLOAT8, _UUID = 16, 1042, 1700, 700, 701, 2950
_DATE, _TIMESTAMP, _TIMESTAMPTZ, _JSON, _JSONB = 1082, 1114, 1184, 114, 3802
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
        raise _UnfitError("only json and jsonb have paths")
    if condition.operator in ("is_null", "is_not_null"):
        wants_null = condition.operator == "is_null"
        if condition.path:
            return Check(place, wants_null, _json_null(condition.path, wants_null=wants_null))
        return Check(place, wants_null, lambda _: not wants_null, "null")
    if is_json:
        return Check(place, False, _json_check(condition))
    if type_oid in _INTEGERS:
        least, most = _INTEGER_RANGES.get(type_oid, _INT8)
        return _compared(place, condition, _read_integer, lambda value: _integer(value, least, most), "integer")
    if type_oid in _TEXTS or type_oid == _BPCHAR:
        return _text_check(place, condition, trimmed=type_oid == _BPCHAR)
    if type_oid == _BOOLEAN:
        return _compared(place, condition, _as_it_is, _boolean, "text")
    if type_oid == _UUID:
        return _compared(place, condition, _as_it_is, _uuid, "text")
    if type_oid == _NUMERIC:
        return _compared(place, condition, _read_numeric, _numeric)
    if type_oid in (_FLOAT4, _FLOAT8):
        single = type_oid == _FLOAT4
        return _compared(place, condition, _read_float4 if single else _read_float8, lambda v: _float(v, single=single))
    if type_oid in (_DATE, _TIMESTAMP, _TIMESTAMPTZ):
        return _compared(place, condition, _read_moment, lambda value: _moment(value, type_oid), "moment")
    if type_oid == _CITEXT:
        raise _UnfitError("citext is compared by rules that only the server knows")
    if type_oid == _ENUM and condition.operator == "like":
        return _text_check(place, condition)
    if condition.operator not in _EQUALITY:
        what = "an enum has no order here" if type_oid == _ENUM else "of this type only the text is known"
        raise _UnfitError(f"{what}: eq, ne, in and not_in can be told")
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
        raise _UnfitError("like is for text")
    given = condition.value if condition.operator in ("in", "not_in") else (condition.value,)
    if not isinstance(given, tuple):
        raise _UnfitError(f"{condition.operator} needs a list")
    values: list[T] = [constant(value) for value in given if value is not None]
    if None in given and condition.operator != "in":  # as in SQL: nothing is unequal to null
        return Check(place, False, lambda _: False)
    holds = _comparison(condition.operator, read, values)
    if kind == "python" or (kind == "moment" and any(abs(value) >= _ENDLESS for value in values)):  # type: ignore[arg-type]
        return Check(place, False, holds)
    told: CheckOperator = condition.operator  # type: ignore[assignment]
    return Check(place, False, holds, kind, told, tuple(values), trimmed)  # type: ignore[arg-type]


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


def _as_it_is(text: bytes) -> bytes | None:
    return text


def _read_trimmed(text: bytes) -> bytes | None:
    return text.rstrip(b" ")


def _text(value: object) -> bytes:
    if not isinstance(value, str):
        raise _UnfitError(f"the column is text, {value!r} is not; put it in quotes")
    if "\0" in value:
        raise _UnfitError("text holds no zero byte")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise _UnfitError("the value is not valid text") from None


def _text_check(place: int, condition: Condition, *, trimmed: bool = False) -> Check:
    if condition.operator != "like":
        read = _read_trimmed if trimmed else _as_it_is
        return _compared(place, condition, read, lambda value: read(_text(value)) or b"", "text", trimmed=trimmed)
    parts = _like_parts(_text(condition.value).decode())
    literal = "".join(part for part in parts if isinstance(part, str)).encode()
    wild = [part for part in parts if not isinstance(part, str)]
    if not wild:
        return Check(place, False, lambda text: text == literal, "text", "eq", (literal,))
    if wild == [_Wild.MANY] and parts[-1] is _Wild.MANY:
        return Check(place, False, lambda text: text.startswith(literal), "text", "prefix", (literal,))
    matches = _like(parts)
    return Check(place, False, lambda text: matches(text.decode("utf-8", "surrogateescape")))


class _Wild(Enum):
    ONE = "."
    MANY = "%"


_Part = str | _Wild


def _like_parts(pattern: str) -> list[_Part]:
    """Characters that stand for themselves, and wild ones."""
    parts: list[_Part] = []
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            escaped = next(characters, None)
            if escaped is None:
                raise _UnfitError("the pattern of like may not end with its escape character")
            parts.append(escaped)
        else:
            parts.append({"%": _Wild.MANY, "_": _Wild.ONE}.get(character, character))
    return parts


def _like(parts: Sequence[_Part]) -> Callable[[str], bool]:
    """What lies between two % has a fixed length: the first place that fits is the right one, and nothing is tried
    again."""
    pieces = [""]
    for part in parts:
        if part is _Wild.MANY:
            pieces.append("")
        else:
            pieces[-1] += part.value if isinstance(part, _Wild) else re.escape(part)
    first, *middle = [re.compile(piece, re.DOTALL) for piece in pieces]
    if not middle:
        return lambda text: first.fullmatch(text) is not None
    last = middle.pop()
    last_length = sum(1 for part in parts[len(parts) - parts[::-1].index(_Wild.MANY) :])

    def matches(text: str) -> bool:
        found = first.match(text)
        for piece in middle:
            if found is None:
                return False
            found = piece.search(text, found.end())
        if found is None or len(text) - last_length < found.end():
            return False
        return last.fullmatch(text, len(text) - last_length) is not None

    return matches


# Numbers and flags.

_INTEGER_TEXT = re.compile(rb"-?[0-9]{1,19}")
_NUMERIC_TEXT = re.compile(rb"-?(?:[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,6})?|Infinity)|NaN")
_NUMBER_GIVEN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?")
_SPECIAL: Final = {
    "nan": "NaN",
    "inf": "Infinity",
    "infinity": "Infinity",
    "-inf": "-Infinity",
    "-infinity": "-Infinity",
}
_WORDS: Final = {"true": b"t", "t": b"t", "yes": b"t", "on": b"t", "1": b"t",
                 "false": b"f", "f": b"f", "no": b"f", "off": b"f", "0": b"f"}  # fmt: skip


def _read_integer(text: bytes) -> int | None:
    if _INTEGER_TEXT.fullmatch(text) is None:
        return None
    number = int(text)
    return number if _INT8[0] <= number <= _INT8[1] else None


def _integer(value: object, least: int, most: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value, re.ASCII):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _UnfitError(f"{value!r} is no integer")
    if not least <= value <= most:
        raise _UnfitError(f"{value} is out of range for the column's type")
    return value


def _given_number(value: object) -> str:
    """The literal of a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _UnfitError(f"{value!r} is no number")
    text = str(value).strip()
    text = _SPECIAL.get(text.lower(), text)
    if _NUMBER_GIVEN.fullmatch(text) is None and text not in _SPECIAL.values():
        raise _UnfitError(f"{value!r} is no number")
    return text


def _ranked(number: Decimal) -> tuple[int, Decimal]:
    return (1, Decimal(0)) if number.is_nan() else (0, number)


def _read_numeric(text: bytes) -> tuple[int, Decimal] | None:
    return _ranked(Decimal(text.decode())) if _NUMERIC_TEXT.fullmatch(text) else None


def _numeric(value: object) -> tuple[int, Decimal]:
    return _ranked(Decimal(_given_number(value)))


def _ranked_float(number: float) -> tuple[int, float]:
    return (1, 0.0) if number != number else (0, number)  # noqa: PLR0124 - only NaN differs from itself


def _read_float8(text: bytes) -> tuple[int, float] | None:
    return _ranked_float(float(text)) if _NUMERIC_TEXT.fullmatch(text) else None


def _read_float4(text: bytes) -> tuple[int, float] | None:
    if _NUMERIC_TEXT.fullmatch(text) is None:
        return None
    try:
        return _ranked_float(_single(float(text)))
    except OverflowError:
        return None


def _single(number: float) -> float:
    """Raises OverflowError."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


def _float(value: object, *, single: bool) -> tuple[int, float]:
    text = _given_number(value)
    try:
        number = _single(float(text)) if single else float(text)
    except OverflowError:
        number = float("inf")
    if text not in _SPECIAL.values() and (number in (float("inf"), float("-inf")) or (not number and Decimal(text))):
        raise _UnfitError(f"{text} is out of range for the column's type")
    return _ranked_float(number)


def _boolean(value: object) -> bytes:
    if isinstance(value, bool):
        return b"t" if value else b"f"
    word = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if word is None:
        raise _UnfitError(f"{value!r} is neither true nor false")
    return word


def _uuid(value: object) -> bytes:
    try:
        if isinstance(value, str) and not value.lower().startswith("urn:"):
            return str(UUID(value)).encode()
    except ValueError:
        pass
    raise _UnfitError(f"{value!r} is no UUID")


# Moments: microseconds since 1970, as if there were no time zone where there is none.

_MOMENT = re.compile(
    r"([0-9]{4,7})-([0-9]{2})-([0-9]{2})"
    r"(?:[ T]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,6}))?)?"
    r" ?(Z|[+-][0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2})?)?)?)?( BC)?",
    re.ASCII,
)
_ENDLESS: Final = 1 << 80
_DAY: Final = 86_400_000_000
_LAST_YEAR: Final = {_DATE: 5_874_897, _TIMESTAMP: 294_276, _TIMESTAMPTZ: 294_276}
_FIRST_YEAR: Final = -4712
_MONTH_DAYS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _days(year: int, month: int, day: int) -> int:
    """Since 1970-01-01, in the Gregorian calendar for all time (Howard Hinnant, ``days_from_civil``)."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468


def _parse_moment(text: str) -> tuple[int, int, bool, bool] | None:
    """The moment, its year, and whether a time and a time zone were named; None: it is none."""
    found = _MOMENT.fullmatch(text)
    if found is None:
        return None
    year, month, day = int(found[1]), int(found[2]), int(found[3])
    hour, minute, second = (int(found[group] or 0) for group in (4, 5, 6))
    if found[9]:
        year = 1 - year
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if (found[9] or year) == 0 or not 1 <= month <= 12 or hour > 23 or minute > 59 or second > 59:
        return None
    if not 1 <= day <= _MONTH_DAYS[month - 1] + (leap and month == 2):
        return None
    seconds = (hour * 60 + minute) * 60 + second - _offset_seconds(found[8])
    micros = int((found[7] or "").ljust(6, "0"))
    return _days(year, month, day) * _DAY + seconds * 1_000_000 + micros, year, bool(found[4]), bool(found[8])


def _offset_seconds(zone: str | None) -> int:
    if zone is None or zone == "Z":
        return 0
    digits = zone[1:].replace(":", "").ljust(6, "0")
    seconds = (int(digits[:2]) * 60 + int(digits[2:4])) * 60 + int(digits[4:])
    return -seconds if zone[0] == "-" else seconds


def _read_moment(text: bytes) -> int | None:
    if text in (b"infinity", b"-infinity"):
        return _ENDLESS if text == b"infinity" else -_ENDLESS
    try:
        found = _parse_moment(text.decode())
    except UnicodeDecodeError:
        return None
    return None if found is None else found[0]


def _moment(value: object, type_oid: int) -> int:
    if isinstance(value, date):  # a file's loader may have made one
        value = value.isoformat()
    if not isinstance(value, str):
        raise _UnfitError(f"{value!r} is no date or time")
    if value in ("infinity", "-infinity"):
        return _ENDLESS if value == "infinity" else -_ENDLESS
    found = _parse_moment(value)
    if found is None:
        raise _UnfitError(f"{value!r} is no date or time; write 2024-12-31 or 2024-12-31 23:59:59.5")
    moment, year, has_time, has_zone = found
    if not _FIRST_YEAR <= year <= _LAST_YEAR[type_oid]:
        raise _UnfitError(f"{value!r} is out of range for the column's type")
    if has_time and type_oid == _DATE:
        raise _UnfitError("the column is a date, and the value has a time")
    if has_zone and type_oid == _TIMESTAMP:
        raise _UnfitError("the column is a timestamp without time zone, and the value names one")
    return moment


# JSON.

_ABSENT: Final = object()
_read_json = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal).decode
_INDEX = re.compile(r"[+-]?[0-9]{1,9}", re.ASCII)


def _at_path(text: bytes, path: Sequence[str]) -> object:
    """What is there; `_ABSENT`. Raises ValueError, RecursionError and InvalidOperation."""
    value = _read_json(text.decode("utf-8", "surrogateescape"))
    for step in path:
        if isinstance(value, dict):
            value = value.get(step, _ABSENT)
        elif isinstance(value, list) and _INDEX.fullmatch(step):
            index = int(step)
            value = value[index] if -len(value) <= index < len(value) else _ABSENT
        else:
            return _ABSENT
    return value


def _json_told(path: Sequence[str], tell: Callable[[object], bool]) -> Callable[[bytes], bool | None]:
    def holds(text: bytes) -> bool | None:
        try:
            return tell(_at_path(text, path))
        except (ValueError, RecursionError, InvalidOperation):  # nested too deeply, a number beyond everything
            return None

    return holds


def _json_null(path: Sequence[str], *, wants_null: bool) -> Callable[[bytes], bool | None]:
    return _json_told(path, lambda value: (value is None or value is _ABSENT) == wants_null)


def _json_value(value: object) -> str | Decimal | bool:
    if isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        number = Decimal(str(value))
        if number.is_finite():
            return number
    raise _UnfitError(f"{value!r} is no JSON text, number, true or false")


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _json_check(condition: Condition) -> Callable[[bytes], bool | None]:
    if condition.operator == "like":
        matches = _like(_like_parts(_text(condition.value).decode()))
        return _json_told(condition.path, lambda value: isinstance(value, str) and matches(value))
    order = _ORDER.get(condition.operator)
    if order is not None:
        bound = _json_value(condition.value)
        return _json_told(condition.path, lambda value: type(value) is type(bound) and bool(order(value, bound)))
    given = condition.value if condition.operator in ("in", "not_in") else (condition.value,)
    if not isinstance(given, tuple):
        raise _UnfitError(f"{condition.operator} needs a list")
    values = [_json_value(value) for value in given if value is not None]
    wanted = condition.operator in ("eq", "in")
    if None in given and condition.operator != "in":
        return lambda _: False

    def told(value: object) -> bool:
        return value is not None and value is not _ABSENT and any(_same(value, known) for known in values) == wanted

    return _json_told(condition.path, told)

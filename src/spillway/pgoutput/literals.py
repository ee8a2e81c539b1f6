"""Values as conditions have them and as PostgreSQL prints them, made into what can be compared.

Of each type ``read_...`` takes the column's text, and gives None where that is none of the type; ``..._of`` takes what
the configuration says, and raises `UnfitError` where no literal of the type says that.
"""

from __future__ import annotations

import re
import struct
from datetime import date
from decimal import Decimal
from typing import Final
from uuid import UUID

INT8: Final = (-(1 << 63), (1 << 63) - 1)
DATE, TIMESTAMP, TIMESTAMPTZ = 1082, 1114, 1184


class UnfitError(Exception):
    """Why a condition makes no sense for its column."""


def written(value: object) -> str:
    """As the file has it, for people."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


# Text.


def as_it_is(text: bytes) -> bytes | None:
    return text


def read_trimmed(text: bytes) -> bytes | None:
    return text.rstrip(b" ")


def text_of(value: object) -> bytes:
    if not isinstance(value, str):
        raise UnfitError(f"the column is text, {written(value)} is not; put it in quotes")
    if "\0" in value:
        raise UnfitError("text holds no zero byte")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise UnfitError("the value is not valid text") from None


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


def read_integer(text: bytes) -> int | None:
    if _INTEGER_TEXT.fullmatch(text) is None:
        return None
    number = int(text)
    return number if INT8[0] <= number <= INT8[1] else None


def integer_of(value: object, least: int, most: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value, re.ASCII):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnfitError(f"{written(value)} is no integer")
    if not least <= value <= most:
        raise UnfitError(f"{value} is out of range for the column's type")
    return value


def _given_number(value: object) -> str:
    """The literal of a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnfitError(f"{written(value)} is no number")
    text = str(value).strip()
    text = _SPECIAL.get(text.lower(), text)
    if _NUMBER_GIVEN.fullmatch(text) is None and text not in _SPECIAL.values():
        raise UnfitError(f"{written(value)} is no number")
    return text


def _ranked(number: Decimal) -> tuple[int, Decimal]:
    return (1, Decimal(0)) if number.is_nan() else (0, number)


def read_numeric(text: bytes) -> tuple[int, Decimal] | None:
    return _ranked(Decimal(text.decode())) if _NUMERIC_TEXT.fullmatch(text) else None


def numeric_of(value: object) -> tuple[int, Decimal]:
    return _ranked(Decimal(_given_number(value)))


def _ranked_float(number: float) -> tuple[int, float]:
    return (1, 0.0) if number != number else (0, number)  # noqa: PLR0124 - only NaN differs from itself


def read_float8(text: bytes) -> tuple[int, float] | None:
    return _ranked_float(float(text)) if _NUMERIC_TEXT.fullmatch(text) else None


def read_float4(text: bytes) -> tuple[int, float] | None:
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


def float_of(value: object, *, single: bool) -> tuple[int, float]:
    text = _given_number(value)
    try:
        number = _single(float(text)) if single else float(text)
    except OverflowError:
        number = float("inf")
    if text not in _SPECIAL.values() and (number in (float("inf"), float("-inf")) or (not number and Decimal(text))):
        raise UnfitError(f"{text} is out of range for the column's type")
    return _ranked_float(number)


def boolean_of(value: object) -> bytes:
    if isinstance(value, bool):
        return b"t" if value else b"f"
    word = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if word is None:
        raise UnfitError(f"{written(value)} is neither true nor false")
    return word


def uuid_of(value: object) -> bytes:
    try:
        if isinstance(value, str) and not value.lower().startswith("urn:"):
            return str(UUID(value)).encode()
    except ValueError:
        pass
    raise UnfitError(f"{written(value)} is no UUID")


# Moments: microseconds since 1970, as if there were no time zone where there is none.

_MOMENT = re.compile(
    r"([0-9]{4,7})-([0-9]{2})-([0-9]{2})"
    r"(?:[ T]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,6}))?)?"
    r" ?(Z|[+-][0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2})?)?)?)?( BC)?",
    re.ASCII,
)
ENDLESS: Final = 1 << 80
_DAY: Final = 86_400_000_000
_LAST_YEAR: Final = {DATE: 5_874_897, TIMESTAMP: 294_276, TIMESTAMPTZ: 294_276}
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


def read_moment(text: bytes) -> int | None:
    if text in (b"infinity", b"-infinity"):
        return ENDLESS if text == b"infinity" else -ENDLESS
    try:
        found = _parse_moment(text.decode())
    except UnicodeDecodeError:
        return None
    return None if found is None else found[0]


def moment_of(value: object, type_oid: int) -> int:
    if isinstance(value, date):  # a file's loader may have made one
        value = value.isoformat()
    if not isinstance(value, str):
        raise UnfitError(f"{written(value)} is no date or time")
    if value in ("infinity", "-infinity"):
        return ENDLESS if value == "infinity" else -ENDLESS
    found = _parse_moment(value)
    if found is None:
        raise UnfitError(f"{value!r} is no date or time; write 2024-12-31 or 2024-12-31 23:59:59.5")
    moment, year, has_time, has_zone = found
    if not _FIRST_YEAR <= year <= _LAST_YEAR[type_oid]:
        raise UnfitError(f"{value!r} is out of range for the column's type")
    if has_time and type_oid == DATE:
        raise UnfitError("the column is a date, and the value has a time")
    if has_zone and type_oid == TIMESTAMP:
        raise UnfitError("the column is a timestamp without time zone, and the value names one")
    return moment

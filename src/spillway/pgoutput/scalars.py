"""Postgres text to JSON, one function per family of scalar types. ``bytes`` in, ``bytes`` out, no state.

The text is what the server prints under the session settings that the source forces (DateStyle ISO, IntervalStyle
postgres, TimeZone UTC, bytea_output hex, extra_float_digits above 0, client_encoding UTF8), so one value has one form.
What each function returns is JSON on one line and valid UTF-8.

- Numbers keep the digits that Postgres printed; NaN and the infinities are strings.
- Timestamps are ISO 8601 with six fractional digits, ``timestamptz`` in UTC with ``Z``. Years beyond 9999 and before
  Christ have the expanded form of ISO 8601 with astronomical years: 44 BC is ``-0043``, 1 BC ``0000``, 10000 is
  ``+10000``. ``infinity`` and ``-infinity`` stay words. ``time`` and ``timetz`` stay as printed, fraction and offset
  included.
- Intervals are ``{"months", "days", "microseconds"}``, the three numbers that Postgres itself stores.
- json and jsonb are embedded as they are: no digit, key or escape is touched. A raw newline can only stand between
  tokens and becomes a space.
- Bytes that are not UTF-8 (only a database with encoding SQL_ASCII can hold them) are shown as ``\\xNN``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

import orjson

Renderer = Callable[[bytes], bytes]

_dumps = orjson.dumps

# A value longer than this is escaped in pieces: decoded as a whole it may take four times its size (one emoji does).
_PIECE_BYTES = 1 << 16

_JSON_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?").fullmatch
# Possessive repeats: nothing to go back to, so no state is kept per number.
_NUMBER = r"-?[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_VECTOR = re.compile(rf"\[(?:{_NUMBER}(?:,{_NUMBER})*+)?+\]".encode()).fullmatch
_LINE_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")
_INTERVAL = re.compile(
    rb"(?:([+-]?\d+) years? ?)?(?:([+-]?\d+) mons? ?)?(?:([+-]?\d+) days? ?)?"
    rb"(?:([+-])?(\d+):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?"
).fullmatch
_DATE = re.compile(rb"(\d{4,})(-\d\d-\d\d)( BC)?").fullmatch
_TIMESTAMP = re.compile(rb"(\d{4,})(-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?(\+00)?( BC)?").fullmatch


def to_text(value: bytes) -> str:
    """The value as str: for keys, and where a whole value is small."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode(errors="backslashreplace")


def text(value: bytes) -> bytes:
    """Any text as a JSON string."""
    if len(value) > _PIECE_BYTES:
        return _long_text(value)
    try:
        return _dumps(value.decode())
    except UnicodeDecodeError:
        return _dumps(value.decode(errors="backslashreplace"))


def _long_text(value: bytes) -> bytes:
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    out = bytearray(b'"')
    with memoryview(value) as view:
        for start in range(0, len(view), _PIECE_BYTES):
            out += _dumps(decode(bytes(view[start : start + _PIECE_BYTES])))[1:-1]
    out += _dumps(decode(b"", True))[1:]
    return bytes(out)


def quoted(value: bytes) -> bytes:
    """Text of types whose alphabet has nothing to escape (uuid, inet, bit, time...)."""
    return b'"' + value + b'"'


def boolean(value: bytes) -> bytes:
    return b"true" if value == b"t" else b"false"


def number(value: bytes) -> bytes:
    """float and numeric. The integer types need no look: their text is always a JSON number."""
    return value if _JSON_NUMBER(value) else b'"' + value + b'"'


def bytea(value: bytes) -> bytes:
    return b'"\\' + value + b'"' if value.startswith(b"\\x") else text(value)


def json(value: bytes) -> bytes:
    if b"\n" in value or b"\r" in value:
        value = value.translate(_LINE_BREAKS_TO_SPACES)
    if value.isascii() or _is_utf8(value):
        return value
    # Only inside of a string literal can such a byte stand: there the backslash itself needs one.
    escaped = re.sub(
        "[\udc80-\udcff]", lambda m: f"\\\\x{ord(m[0]) - 0xDC00:02x}", value.decode(errors="surrogateescape")
    )
    return escaped.encode()


def _is_utf8(value: bytes) -> bool:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        with memoryview(value) as view:
            for start in range(0, len(view), _PIECE_BYTES):
                decode(bytes(view[start : start + _PIECE_BYTES]))
        decode(b"", True)
    except UnicodeDecodeError:
        return False
    return True


def date(value: bytes) -> bytes:
    if len(value) == 10:
        return b'"' + value + b'"'
    match = _DATE(value)
    return b'"%b%b"' % (_year(match[1], match[3]), match[2]) if match else text(value)


def timestamp(value: bytes) -> bytes:
    length = len(value)
    # The common form: a year of four digits (the dash at 4), no BC (a digit at the end).
    if 19 <= length <= 26 and value[4] == 0x2D and value[-1] <= 0x39:
        if length == 26:
            return b'"%bT%b"' % (value[:10], value[11:])
        fraction = value[20:] if length > 20 else b""
        return b'"%bT%b.%b"' % (value[:10], value[11:19], fraction.ljust(6, b"0"))
    return _rare_timestamp(value, b"")


def timestamptz(value: bytes) -> bytes:
    length = len(value)
    if 22 <= length <= 29 and value[4] == 0x2D and value[-3:] == b"+00":
        if length == 29:
            return b'"%bT%bZ"' % (value[:10], value[11:26])
        fraction = value[20:-3] if length > 23 else b""
        return b'"%bT%b.%bZ"' % (value[:10], value[11:19], fraction.ljust(6, b"0"))
    return _rare_timestamp(value, b"Z")


def _rare_timestamp(value: bytes, zone: bytes) -> bytes:
    match = _TIMESTAMP(value)
    if match is None:  # infinity
        return text(value)
    year, day, clock, fraction, _, bc = match.groups()
    return b'"%b%bT%b.%b%b"' % (_year(year, bc), day, clock, (fraction or b"").ljust(6, b"0"), zone)


def _year(digits: bytes, bc: bytes | None) -> bytes:
    if bc:
        year = int(digits) - 1
        return b"-%04d" % year if year else b"0000"
    return b"+" + digits if len(digits) > 4 else digits


def interval(value: bytes) -> bytes:
    match = _INTERVAL(value)
    if match is None:  # infinity (PostgreSQL 17 and later)
        return text(value)
    years, months, days, sign, hours, minutes, seconds, fraction = match.groups()
    microseconds = 0
    if hours is not None:
        whole_seconds = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
        microseconds = whole_seconds * 1_000_000 + int((fraction or b"0").ljust(6, b"0"))
        if sign == b"-":
            microseconds = -microseconds
    return b'{"months":%d,"days":%d,"microseconds":%d}' % (
        int(years or 0) * 12 + int(months or 0),
        int(days or 0),
        microseconds,
    )


def vector(value: bytes) -> bytes:
    """pgvector's ``vector`` and ``halfvec``: ``[1,2.5,-3e-05]`` is a JSON array as it stands."""
    return value if _VECTOR(value) else text(value)

"""JSON in and out, by orjson, and by the standard library for what orjson cannot do.

**Integers are exact** at any length, in and out. orjson makes a double of an integer beyond 64 bits; so a text that may
hold one (20 digits in a row, or 19 behind a minus) is read by the standard library. **Fractions are doubles**, as with
nearly every reader of JSON; numerics of PostgreSQL are strings in a message and keep every digit. A fraction beyond the
doubles (``1e400`` in a ``json`` column) is an error: nothing is sent that says something else.

Out: ``datetime``, ``date``, ``time`` and ``UUID`` become text in their usual form, ``Decimal`` text like a numeric
column, ``Enum`` its value, a dataclass an object; keys that are none become text; ``nan`` and infinities become null.
Half a surrogate pair, which a ``json`` column may hold, is kept as an escape. Anything else raises `TypeError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from enum import Enum
from math import isfinite
from typing import Final

import orjson

_SHOW_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG: Final = b"0" * 20
_LONG_NEGATIVE: Final = b"-" + b"0" * 19


def loads(text: bytes) -> object:
    digits = text.translate(_SHOW_DIGITS)
    if _LONG in digits or _LONG_NEGATIVE in digits:
        return _exact(text)
    try:
        value: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _exact(text)
    return value


def dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value, _other, orjson.OPT_UTC_Z)
    except TypeError:  # keys that are no text, integers beyond 64 bits, half surrogates, depth; or really an error
        return json.dumps(_plain(value), separators=(",", ":"), check_circular=False).encode()


def _exact(text: bytes) -> object:
    value: object = json.loads(text, parse_float=_double)
    return value


def _double(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"the number {text} is beyond what a double holds")
    return number


def _text(value: object) -> str:
    return str(value)


# By the name of the type, so that neither decimal nor uuid is imported for this.
_TEXTS: Final[dict[tuple[str, str], Callable[[object], str]]] = {("decimal", "Decimal"): _text, ("uuid", "UUID"): _text}
_TIMES: Final = ("datetime", "date", "time")


def _other(value: object) -> object:
    kind = type(value)
    text = _TEXTS.get((kind.__module__, kind.__name__))
    if text is None:
        raise TypeError(f"{kind.__name__} is no JSON")
    return text(value)


def _plain(value: object) -> object:
    """As the standard library can write it, by the rules above."""
    if value is None or (isinstance(value, str | int) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if type(value).__module__ == "datetime" and type(value).__name__ in _TIMES:
        return orjson.dumps(value, option=orjson.OPT_UTC_Z).decode().strip('"')
    return _other(value)


def _key(key: object) -> str:
    if isinstance(key, str):
        return key
    plain = _plain(key)
    return plain if isinstance(plain, str) else json.dumps(plain)

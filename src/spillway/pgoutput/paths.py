"""What stands at a path inside of a JSON text, and what can be told of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final

from spillway.pgoutput.literals import UnfitError

ABSENT: Final = object()
_read_json = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal).decode
_INDEX = re.compile(r"[+-]?[0-9]{1,9}", re.ASCII)


def _at_path(text: bytes, path: Sequence[str]) -> object:
    """What is there; `ABSENT`. Raises ValueError, RecursionError and InvalidOperation."""
    value = _read_json(text.decode("utf-8", "surrogateescape"))
    for step in path:
        if isinstance(value, dict):
            value = value.get(step, ABSENT)
        elif isinstance(value, list) and _INDEX.fullmatch(step):
            index = int(step)
            value = value[index] if -len(value) <= index < len(value) else ABSENT
        else:
            return ABSENT
    return value


def told(path: Sequence[str], tell: Callable[[object], bool]) -> Callable[[bytes], bool | None]:
    def holds(text: bytes) -> bool | None:
        try:
            return tell(_at_path(text, path))
        except (ValueError, RecursionError, InvalidOperation):  # nested too deeply, a number beyond everything
            return None

    return holds


def null_test(path: Sequence[str], *, wants_null: bool) -> Callable[[bytes], bool | None]:
    return told(path, lambda value: (value is None or value is ABSENT) == wants_null)


def value_of(value: object) -> str | Decimal | bool:
    if isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        number = Decimal(str(value))
        if number.is_finite():
            return number
    raise UnfitError(f"{value!r} is no JSON text, number, true or false")


def same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other

"""What stands at a path inside of a JSON text, and what can be told of it.

`Told` is the reference, which parses the whole text. The compiled decoder (src/native/paths.pxi) walks through it
instead and lets `Told.of_value` parse what it finds there; it asks the reference wherever it is not sure: keys with
escapes, indices from the end, deep nesting, text that is no JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final

from spillway.pgoutput.literals import UnfitError

ABSENT: Final = object()
_INDEX = re.compile(r"[+-]?[0-9]{1,9}", re.ASCII)


class _Number(str):
    """As it is written: some are beyond everything, which concerns only who asks for them."""

    __slots__ = ()


_read_json = json.JSONDecoder(parse_float=_Number, parse_int=_Number).decode


class Told:
    """What is told of the value at a path: true, false, or None where nobody can say.

    ``steps`` are the path's: the key in UTF-8, and the index of an array that it is (-1: none; -2: from the end).
    """

    def __init__(self, path: Sequence[str], tell: Callable[[object], bool]) -> None:
        """``tell`` gets str, Decimal, bool, None or `ABSENT`; of an object or array what equals none of these."""
        self._path = tuple(path)
        self._tell = tell
        self.steps = tuple((step.encode(), _index(step)) for step in path)
        self.absent = tell(ABSENT)

    def __call__(self, text: bytes) -> bool | None:
        return self._of(text, self._path)

    def of_value(self, text: bytes) -> bool | None:
        """Of the JSON text of the value itself."""
        return self._of(text, ())

    def _of(self, text: bytes, path: Sequence[str]) -> bool | None:
        try:
            value = _at_path(_read_json(text.decode("utf-8", "surrogateescape")), path)
            return self._tell(Decimal(value) if isinstance(value, _Number) else value)
        except (ValueError, RecursionError, InvalidOperation):  # nested too deeply, a number beyond everything
            return None


def _index(step: str) -> int:
    if not _INDEX.fullmatch(step):
        return -1
    return int(step) if int(step) >= 0 else -2


def _at_path(value: object, path: Sequence[str]) -> object:
    """What is there; `ABSENT`."""
    for step in path:
        if isinstance(value, dict):
            value = value.get(step, ABSENT)
        elif isinstance(value, list) and _INDEX.fullmatch(step):
            index = int(step)
            value = value[index] if -len(value) <= index < len(value) else ABSENT
        else:
            return ABSENT
    return value


def null_test(path: Sequence[str], *, wants_null: bool) -> Told:
    return Told(path, lambda value: (value is None or value is ABSENT) == wants_null)


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

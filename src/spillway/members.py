"""The members of a JSON object as slices of its text: what is only moved or replaced is neither parsed nor rendered.

The text is valid JSON: the decoder has rendered it, or a function's result was read back. `spillway.impl` has the
compiled twin of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import orjson

_SPACE: Final = re.compile(rb"[ \t\n\r]*").match
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL).match
_PLAIN: Final = re.compile(rb"[^,}\] \t\n\r]+").match
_STRUCTURE: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]', re.DOTALL).finditer


def members(text: bytes) -> list[tuple[bytes, bytes]]:
    """Name, with its quotes, and value of each."""
    found: list[tuple[bytes, bytes]] = []
    at = _skip(text, 1)
    while text[at] != 0x7D:  # }
        end = end_of_value(text, at)
        name = text[at:end]
        at = _skip(text, _skip(text, end) + 1)  # behind the colon
        end = end_of_value(text, at)
        found.append((name, text[at:end]))
        at = _skip(text, end)
        if text[at] == 0x2C:  # ,
            at = _skip(text, at + 1)
    return found


def named(parts: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """By name, written as orjson does: a key of a ``json`` column may have needless escapes, and come twice."""
    return {_plain(name) if b"\\" in name else name: value for name, value in parts}


def joined(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"{" + b",".join([name + b":" + value for name, value in parts]) + b"}"


def end_of_value(text: bytes, start: int) -> int:
    """Where the value that begins at ``start`` ends, however deep it goes."""
    first = text[start]
    if first in b"{[":
        depth = 0
        for match in _STRUCTURE(text, start):
            found = match[0]
            if found in b"{[":
                depth += 1
            elif found in b"}]":
                depth -= 1
                if depth == 0:
                    return match.end()
    scalar = (_STRING if first == 0x22 else _PLAIN)(text, start)
    if scalar is None:
        raise ValueError("this is no JSON")
    return scalar.end()


def _plain(name: bytes) -> bytes:
    try:
        return orjson.dumps(orjson.loads(name))
    except orjson.JSONDecodeError:  # half of a surrogate pair
        return name


def _skip(text: bytes, at: int) -> int:
    match = _SPACE(text, at)
    assert match is not None  # it may be empty
    return match.end()

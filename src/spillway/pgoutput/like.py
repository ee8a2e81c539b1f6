"""``LIKE``, with ``%``, ``_`` and the backslash as its escape."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum

from spillway.pgoutput.literals import UnfitError


class Wild(Enum):
    ONE = "."
    MANY = "%"


Part = str | Wild


def like_parts(pattern: str) -> list[Part]:
    """Characters that stand for themselves, and wild ones."""
    parts: list[Part] = []
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            escaped = next(characters, None)
            if escaped is None:
                raise UnfitError("the pattern of like may not end with its escape character")
            parts.append(escaped)
        else:
            parts.append({"%": Wild.MANY, "_": Wild.ONE}.get(character, character))
    return parts


def like(parts: Sequence[Part]) -> Callable[[str], bool]:
    """What lies between two % has a fixed length: the first place that fits is the right one, and nothing is tried
    again."""
    pieces = [""]
    for part in parts:
        if part is Wild.MANY:
            pieces.append("")
        else:
            pieces[-1] += part.value if isinstance(part, Wild) else re.escape(part)
    first, *middle = [re.compile(piece, re.DOTALL) for piece in pieces]
    if not middle:
        return lambda text: first.fullmatch(text) is not None
    last = middle.pop()
    last_length = sum(1 for part in parts[len(parts) - parts[::-1].index(Wild.MANY) :])

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

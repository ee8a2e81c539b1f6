r"""Lines of ``COPY ... TO STDOUT`` in text format: what the server sends for existing rows.

Source: PostgreSQL documentation, COPY, "Text Format". Fields are separated by tabs and the line ends with a newline;
null is a field ``\N``; a backslash stands before what cannot stand for itself, and the server writes no other escapes
than those here. So a tab always separates, and what is between two of them is the value unless a backslash is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spillway.pgoutput.messages import ProtocolError

_NULL = rb"\N"
_VALUES = {
    rb"\b": b"\b", rb"\f": b"\f", rb"\n": b"\n", rb"\r": b"\r", rb"\t": b"\t", rb"\v": b"\v", rb"\\": b"\\"
}  # fmt: skip
_ESCAPE = re.compile(rb"\\.?", re.DOTALL)
_END = re.compile(rb"\t|\Z")


def split(line: bytes, count: int) -> list[bytes | None]:
    """The values of so many fields."""
    if not line.endswith(b"\n"):
        raise ProtocolError("a line without an end")
    parts = line[:-1].split(b"\t") if count or len(line) > 1 else []
    if len(parts) != count:
        raise ProtocolError(f"a line of {len(parts)} fields where {count} are due")
    if b"\\" not in line:
        return [*parts]
    return [None if part == _NULL else unescaped(part) for part in parts]


def unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: _value(match[0]), field) if b"\\" in field else field


def fields(line: memoryview, count: int) -> Iterator[tuple[int, int, int | None]]:
    """As `split`, of a line that is not to be copied: where each field begins and ends, and how long its value is, None
    for null."""
    end = len(line) - 1
    if end < 0 or line[end] != ord("\n"):
        raise ProtocolError("a line without an end")
    start = 0
    for number in range(1, count + 1):
        match = _END.search(line, start, end)
        stop = end if match is None else match.start()
        if (stop == end) != (number == count):
            raise ProtocolError(f"a line that has not the {count} fields that are due")
        yield start, stop, _length(line, start, stop)
        start = stop + 1
    if not count and end:
        raise ProtocolError("a line with fields where none are due")


def _length(line: memoryview, start: int, stop: int) -> int | None:
    if stop - start == len(_NULL) and line[start:stop] == _NULL:
        return None
    return stop - start - sum(len(_value(match[0])) for match in _ESCAPE.finditer(line, start, stop))


def _value(escape: bytes) -> bytes:
    value = _VALUES.get(escape)
    if value is None:
        raise ProtocolError(f"an escape {escape!r} that COPY does not write")
    return value

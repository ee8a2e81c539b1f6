"""Long values that come in pieces (`spillway.source.wrapped`): each becomes JSON as it comes, so that a large row is in
memory once, and grows in place.

Texts and json are made piece by piece, as `spillway.pgoutput.scalars` makes them whole; a piece may end within a
character. Values of other types, and those that a check looks at, are collected: they are taken for `COLLECTED` times
their size more.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable
from typing import Final

import orjson

from spillway.pgoutput import scalars
from spillway.pgoutput.scalars import Renderer

_LINE_BREAKS_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")
_NO_UTF8: Final = re.compile("[\udc80-\udcff]")


class Pieces:
    """Of one value. What it takes as JSON is counted (``size_bytes``) also beyond what may be kept of it."""

    def __init__(self, renderer: Renderer | None, *, collected: bool) -> None:
        self.size_bytes = 0
        self._renderer = renderer
        self._out: io.BytesIO | None = io.BytesIO()  # grows in place, and becomes bytes without a copy
        self._json = _json if renderer is scalars.json else _text
        errors = "surrogateescape" if renderer is scalars.json else "backslashreplace"
        self._decode: Callable[..., str] | None = None
        if not collected:
            self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
            if renderer is not scalars.json:
                self._write(b'"')

    def add(self, piece: bytes) -> None:
        if self._decode is None:
            self._write(piece)
            return
        for start in range(0, len(piece), _STEP_BYTES):
            self._write(self._json(self._decode(piece[start : start + _STEP_BYTES])))

    def drop(self) -> None:
        """Nothing is kept."""
        self._out = None

    def raw(self) -> bytes:
        """Of a value that is collected."""
        assert self._out is not None
        return self._out.getvalue()

    def end(self) -> bytes:
        """The value as JSON."""
        if self._decode is not None:
            self._write(self._json(self._decode(b"", True)))
            if self._renderer is not scalars.json:
                self._write(b'"')
        assert self._out is not None
        value, self._out = self._out.getvalue(), None
        if self._decode is None and self._renderer is not None:
            value = self._renderer(value)
            self.size_bytes = len(value)
        return value

    def _write(self, some: bytes) -> None:
        self.size_bytes += len(some)
        if self._out is not None:
            self._out.write(some)


def streamed(renderer: Renderer | None) -> bool:
    """Whether values of such a type are made piece by piece."""
    return renderer in (scalars.text, scalars.json, scalars.bytea, scalars.quoted)


_STEP_BYTES: Final = 64 << 10  # a text may take four times its size, decoded


def _text(some: str) -> bytes:
    return orjson.dumps(some)[1:-1]


def _json(some: str) -> bytes:
    escaped = _NO_UTF8.sub(lambda m: f"\\\\x{ord(m[0]) - 0xDC00:02x}", some)
    return escaped.encode().translate(_LINE_BREAKS_TO_SPACES)

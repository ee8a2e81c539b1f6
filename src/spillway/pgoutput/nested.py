"""Arrays and composites: the text of ``array_out`` and ``record_out`` to JSON.

Sources: PostgreSQL documentation, "Array Input and Output Syntax" and "Composite Type Input and Output Syntax".

An array is ``{a,b,{...}}``, before it its bounds when they are not the default (``[2:4]={...}``, which JSON cannot
say). Elements are separated by the delimiter of the element type (``;`` for box, else a comma). An element that is
empty, reads ``NULL`` or holds a brace, the delimiter, a quote, a backslash or white space is in double quotes, with
backslashes before quotes and backslashes; a bare ``NULL`` is null.

A composite is ``(a,b,)``: a field without text is null, one with double quotes around it may hold anything, quotes and
backslashes doubled.

Memory: tokens are taken one at a time and appended to one buffer, so an array of 8 million elements costs its text
and its JSON, never an object per element held at once. The possessive repeats of the patterns keep no state to go
back to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import orjson

from spillway.pgoutput.scalars import Renderer, number, text

_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NUMBERS_ONLY = b"0123456789+-.eE,{}"
_ARRAY_PART = r'([{{}}])|{0}|"((?:[^"\\]++|\\.)*+)"|([^"{{}}{0}]++)'
_COMPOSITE_PART = re.compile(rb'(?:"((?:[^"\\]++|""|\\.)*+)"|([^,()"\\]++)|)([,)])', re.DOTALL).match


def array(element: Renderer | None, delimiter: str = ",") -> Renderer:
    """The renderer of arrays of what ``element`` renders (None: as it stands)."""
    tokens = re.compile(_ARRAY_PART.format(re.escape(delimiter)).encode(), re.DOTALL).finditer
    plain_numbers = element is None or element is number

    def render(value: bytes) -> bytes:
        if value[0] != 0x7B:  # bounds before the brace
            value = value[value.index(b"=") + 1 :]
        if plain_numbers and not value.translate(None, _NUMBERS_ONLY):
            return value.translate(_BRACES_TO_BRACKETS)
        out = bytearray()
        for token in tokens(value):
            group = token.lastindex
            if group is None:
                out += b","
            elif group == 1:
                out += b"[" if token[1] == b"{" else b"]"
            elif group == 2:
                out += _rendered(element, _unescape(token[2]))
            else:
                out += b"null" if token[3] == b"NULL" else _rendered(element, token[3])
        return bytes(out)

    return render


def composite(attributes: Sequence[tuple[str, Renderer | None]]) -> Renderer:
    """The renderer of a composite type: a JSON object of its attributes, in their order.

    A row whose number of fields is another (the type was altered between the row and the look at the catalogue) is
    given as its text.
    """
    names = [orjson.dumps(name).replace(b"%", b"%%") + b":%b" for name, _ in attributes]
    template = b"{" + b",".join(names) + b"}"
    renderers = [renderer for _, renderer in attributes]

    def render(value: bytes) -> bytes:
        fields = _fields(value)
        if len(fields) != len(renderers):
            return b"{}" if not renderers and value == b"()" else text(value)
        return template % tuple(
            b"null" if field is None else _rendered(renderer, field)
            for field, renderer in zip(fields, renderers, strict=True)
        )

    return render


def _fields(value: bytes) -> list[bytes | None]:
    fields: list[bytes | None] = []
    position, end = 1, len(value)
    while position < end:
        field = _COMPOSITE_PART(value, position)
        if field is None:
            return []
        quoted: bytes | None = field[1]
        fields.append(field[2] if quoted is None else quoted.replace(b'""', b'"').replace(b"\\\\", b"\\"))
        position = field.end()
    return fields


def _rendered(renderer: Renderer | None, value: bytes) -> bytes:
    return value if renderer is None else renderer(value)


def _unescape(quoted: bytes) -> bytes:
    if b"\\" not in quoted:
        return quoted
    # No Postgres text holds a zero byte: it can stand for the escaped backslash meanwhile.
    return quoted.replace(b"\\\\", b"\0").replace(b"\\", b"").replace(b"\0", b"\\")

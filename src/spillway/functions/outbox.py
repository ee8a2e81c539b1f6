"""The transactional outbox: rows of a table, or emitted logical messages, sent as messages of their own.

An application writes its events into a table, or with ``pg_logical_emit_message(true, prefix, content)`` (PostgreSQL
documentation, "Functions for Replication Management"), in the transaction that changes its data. `OutboxFunctions` is
what makes messages of them: the body is the payload column, what it is routed by are texts with columns in braces.

Of a table only inserts are events: an application may delete what it wrote, and often does right away. Of an emitted
message the columns are those of its content, if that is a JSON object; the payload is the whole content unless named.

A payload of type json or jsonb is sent as it is; a text is sent as JSON if it is that, else as a JSON string. A column
that is named and is not there, or null, fails the message; that by which messages are ordered, too; and so does half a
surrogate pair in a column that a message is routed by. Whatever a row holds, it costs that message alone.

What a row holds is data, and may be anybody's: in ``endpoint_path`` every character of a value but the unreserved ones
of RFC 3986 is percent-encoded, so that a value is one part of a path or query and never its structure. The dot segments
that may be left, ``.`` and ``..``, are refused by `spillway.sinks.routing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

import orjson

from spillway.change import RECORD_START
from spillway.functions import jsontext
from spillway.functions.base import Failure, Outcome, Output
from spillway.impl import end_of_value, members

_COLUMN = re.compile(r"\{([^{}]*)\}")


class OutboxFunctions:
    """``emitted``: the messages are logical ones, with ``content`` as their record's column."""

    def __init__(
        self,
        payload: str | None,
        routing: Mapping[str, str],
        headers: Mapping[str, str],
        *,
        emitted: bool,
        key: str | None = None,  # the column by which messages are ordered
    ) -> None:
        self._payload = payload
        self._key = key
        self._routing = routing
        self._headers = headers
        self._emitted = emitted

    async def __call__(
        self,
        messages: Sequence[bytes],
        deletes: Sequence[bool],  # noqa: ARG002 - of a state; there is none
        answer_bytes: int = 0,  # noqa: ARG002 - no payload is larger than its message
    ) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        for message in messages:
            try:
                outcomes.append(self._event(message))
            except Exception as error:  # noqa: BLE001 - data of one message: it alone fails
                outcomes.append(Failure("outbox_failed", f"{type(error).__name__}: {error}"))
        return outcomes

    async def open(self) -> None:
        """There is nothing to open."""

    async def close(self) -> None:
        """Nothing is open."""

    def _event(self, raw: bytes) -> Outcome:
        end = end_of_value(raw, RECORD_START)
        if not raw.startswith(_EVENTS, end):
            return ()
        columns = _columns(raw[RECORD_START:end])
        missing = "is null or not there"
        if self._emitted:
            content = columns["content"]
            if content.startswith(b"{"):
                columns = _columns(content)
            else:
                columns, missing = {}, "is not there: the content is no JSON object"
            payload = content if self._payload is None else columns.get(self._payload, _NULL)
        else:
            payload = columns.get(self._payload or "", _NULL)
        if payload == _NULL:
            return Failure("outbox_failed", f"the payload {self._payload or 'content'} {missing}")
        if self._key is not None and columns.get(self._key, _NULL) == _NULL:
            return Failure("outbox_failed", f"the key {self._key} {missing}")
        try:
            route: dict[str, object] = {
                key: _filled(text, columns, _encoded if key == "endpoint_path" else str)
                for key, text in self._routing.items()
            }
            if self._headers:
                route["headers"] = {key: _filled(text, columns) for key, text in self._headers.items()}
        except KeyError as error:
            return Failure("outbox_failed", f"column {error.args[0]} {missing}")
        except _NoTextError as error:
            return Failure("outbox_failed", f"column {error.args[0]} holds half a surrogate pair, which is no text")
        return (Output(_body(payload), route or None),)


_NULL = b"null"
_EVENTS = (b',"changes":null,"action":"insert"', b',"changes":null,"action":"read"')


class _NoTextError(Exception):
    """A column's value is a JSON string, and yet no text."""


def _columns(record: bytes) -> dict[object, bytes]:
    """Values as they stand: json may hold what no parser takes, or more digits than one keeps; its names as well."""
    return {jsontext.loads(name): value for name, value in members(record)}


def _body(payload: bytes) -> bytes:
    if not payload.startswith(b'"'):
        return payload
    try:
        text = orjson.loads(payload).encode()
        orjson.loads(text)
    except orjson.JSONDecodeError:  # plain text, or half a surrogate pair
        return payload
    return b" ".join(text.splitlines())  # one line: between its tokens a newline is a space


def _encoded(value: str) -> str:
    return quote(value, safe="")


def _filled(text: str, columns: Mapping[object, bytes], written: Callable[[str], str] = str) -> str:
    def value(match: re.Match[str]) -> str:
        found = columns.get(match[1], _NULL)
        if found == _NULL:
            raise KeyError(match[1])
        if not found.startswith(b'"'):
            return written(found.decode())
        try:
            return written(orjson.loads(found))
        except orjson.JSONDecodeError as error:
            raise _NoTextError(match[1]) from error

    return _COLUMN.sub(value, text)

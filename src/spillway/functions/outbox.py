"""The transactional outbox: rows of a table, or emitted logical messages, sent as messages of their own.

An application writes its events into a table, or with ``pg_logical_emit_message(true, prefix, content)`` (PostgreSQL
documentation, "Functions for Replication Management"), in the transaction that changes its data. `OutboxFunctions` is
what makes messages of them: the body is the payload column, what it is routed by are texts with columns in braces.

Of a table only inserts are events: an application may delete what it wrote, and often does right away. Of an emitted
message the columns are those of its content, if that is a JSON object; the payload is the whole content unless named.

A payload of type json or jsonb is sent as it is; a text is sent as JSON if it is that, else as a JSON string. A column
that is named and is not there, or null, fails the message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import orjson

from spillway.functions.base import Failure, Outcome, Output

_COLUMN = re.compile(r"\{([^{}]*)\}")


class OutboxFunctions:
    """``emitted``: the messages are logical ones, with ``content`` as their record's column."""

    def __init__(
        self, payload: str | None, routing: Mapping[str, str], headers: Mapping[str, str], *, emitted: bool
    ) -> None:
        self._payload = payload
        self._routing = routing
        self._headers = headers
        self._emitted = emitted

    async def __call__(
        self,
        messages: Sequence[bytes],
        deletes: Sequence[bool],  # noqa: ARG002 - of a state; there is none
        answer_bytes: int = 0,  # noqa: ARG002 - no payload is larger than its message
    ) -> Sequence[Outcome]:
        return [self._event(message) for message in messages]

    async def open(self) -> None:
        """There is nothing to open."""

    async def close(self) -> None:
        """Nothing is open."""

    def _event(self, raw: bytes) -> Outcome:
        try:
            message = orjson.loads(raw)
        except orjson.JSONDecodeError as error:  # half of a surrogate pair, or too deep: PostgreSQL's json may hold it
            return Failure("outbox_failed", f"the row cannot be read: {error}")
        if message["action"] not in ("insert", "read"):
            return ()
        columns = message["record"]
        if self._emitted:
            content = columns["content"]
            columns = content if isinstance(content, dict) else {}
            payload = content if self._payload is None else columns.get(self._payload)
        else:
            payload = columns.get(self._payload)
        if payload is None:
            return Failure("outbox_failed", f"the payload {self._payload or 'content'} is null or not there")
        try:
            route: dict[str, object] = {key: _filled(text, columns) for key, text in self._routing.items()}
            if self._headers:
                route["headers"] = {key: _filled(text, columns) for key, text in self._headers.items()}
        except KeyError as error:
            return Failure("outbox_failed", f"column {error.args[0]} is null or not there")
        return (Output(_body(payload), route or None),)


def _body(payload: object) -> bytes:
    if isinstance(payload, str):
        try:
            orjson.loads(payload)
        except orjson.JSONDecodeError:
            return orjson.dumps(payload)
        return b" ".join(payload.encode().splitlines())  # one line: between its tokens a newline is a space
    return orjson.dumps(payload)


def _filled(text: str, columns: Mapping[str, object]) -> str:
    def value(match: re.Match[str]) -> str:
        found = columns.get(match[1])
        if found is None:
            raise KeyError(match[1])
        return found if isinstance(found, str) else orjson.dumps(found).decode()

    return _COLUMN.sub(value, text)

"""``timestamp_format: unix_microsecond``: timestamps of a row as numbers, microseconds since 1970-01-01 00:00 UTC.

It concerns the columns that the caller names, which are those of type ``timestamp`` and ``timestamptz``, their arrays
and domains, in ``record`` and in ``changes``; as in Sequin neither ``date`` nor ``metadata.commit_timestamp``. A
``timestamp`` without a zone counts as UTC. Text in other columns that reads like a timestamp is left alone, and nothing
else of the body changes by a byte.

Times before 1970 are negative, and those before Christ are counted in the proleptic Gregorian calendar, as PostgreSQL
itself counts: ``EXTRACT(epoch FROM ...)`` times a million, exactly; the last thirty years that it can store, from
294247 on, are beyond 64 bits.
``infinity`` and ``-infinity`` have no number and stay the texts that they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Final

import orjson

from spillway.change import BODY_START, RECORD_START
from spillway.chunk import INDEX, Message
from spillway.impl import end_of_value, joined, members

_CHANGES: Final = b',"changes":'
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS_OF_400_YEARS: Final = 146_097 * 86_400
_TIMESTAMP: Final = re.compile(rb'"([+-]?\d{4,})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?Z?"')


def as_numbers(message: Message, columns: Collection[str]) -> Message:
    """The same message with the values of these columns as numbers; it itself if it has none."""
    if not columns:
        return message
    names = {orjson.dumps(column) for column in columns}
    chunk, index = message.span.chunk, message.span.indices[message.place]
    body, end = chunk.body(index), RECORD_START + (chunk.word(index, INDEX) >> 32)
    record = _converted(body[RECORD_START:end], names)
    start = end + len(_CHANGES)
    changes_end = end_of_value(body, start)
    changes = _converted(body[start:changes_end], names)
    return message.with_body(BODY_START + record + _CHANGES + changes + body[changes_end:], len(record))


def columns_of(message: Message) -> set[str]:
    """The names of its record's columns."""
    chunk, index = message.span.chunk, message.span.indices[message.place]
    record = chunk.body(index)[RECORD_START : RECORD_START + (chunk.word(index, INDEX) >> 32)]
    return {orjson.loads(name) for name, _ in members(record)} if record.startswith(b"{") else set()


def _converted(row: bytes, names: Collection[bytes]) -> bytes:
    if not row.startswith(b"{"):
        return row  # changes that are null
    return joined((name, _TIMESTAMP.sub(_number, value) if name in names else value) for name, value in members(row))


def _number(match: re.Match[bytes]) -> bytes:
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    # The calendar repeats every 400 years, and datetime knows the years from 1 to 9999.
    rounds = (year - 2000) // 400
    at = datetime(year - 400 * rounds, month, day, hour, minute, second, tzinfo=UTC)
    seconds = round((at - _EPOCH).total_seconds()) + rounds * _SECONDS_OF_400_YEARS
    return b"%d" % (seconds * 1_000_000 + int((match[7] or b"").ljust(6, b"0")))

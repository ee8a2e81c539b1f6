"""``format``: the envelope that a message goes in, made of the parts of Sequin's message without rendering them again.

**record**: the row alone; of a delete the old row, as far as the replica identity holds it.

**debezium**: the envelope of Debezium's PostgreSQL connector, without schemas (``schemas.enable=false``), for consumers
that read it: ``before``, ``after``, ``source``, ``op``, ``ts_ms``. What is not as there:

- Values are those of Sequin's format: timestamps are ISO 8601 (or numbers, with ``timestamp_format``), numerics exact.
- A change of the primary key is one event ``u``, not ``d`` and ``c``. A delete has no tombstone behind it.
- ``before`` of an update is the old row with replica identity FULL, put together of ``record`` and ``changes``. It is
  null where the old row is not known, and of an update that has changed nothing, which looks the same from here.
- ``source.lsn`` is that of the commit, the same for a transaction; ``sequence`` orders events: that LSN, and the place
  in the transaction. ``source.ts_ms`` is the commit's time. ``name`` is the database's name in the configuration,
  ``version`` that of Spillway. An existing row is ``r``, ``snapshot: "incremental"``, without a ``txId``.
- ``ts_ms`` beside ``op`` is when the event was made, and so differs when it is sent again.

**cloudevents**: CloudEvents 1.0 in the JSON format (structured mode), ``data`` being Sequin's message. ``id`` is the
idempotency key, unique under ``source``, which names the database; ``type`` is ``spillway.`` and the action;
``subject`` is the key (``public.jobs:42``), or the table where there is none; ``time`` is the commit's.

Of a truncated table there is no row, and of these only CloudEvents and Debezium know it (``op: t``).

Sources: "PostgreSQL connector", section "Data change events", of Debezium's documentation, and what version 3.6.3
sends; "CloudEvents" 1.0.2 and "JSON Event Format for CloudEvents" 1.0.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote

import orjson

from spillway import __version__
from spillway.change import ACTIONS, RECORD_START, Action
from spillway.chunk import ACTION, FLAGS, INDEX, LARGE, LOW, LSN, TIME, WHOLE, Message
from spillway.clock import Clock
from spillway.impl import end_of_value, joined, members
from spillway.pgoutput.plan import DatabaseMeta

Format = Literal["record", "debezium", "cloudevents"]
Envelope = Callable[[Message, bytes], bytes]

_CHANGES: Final = b',"changes":'
_KEY: Final = b'"idempotency_key":"'
_TIMESTAMP: Final = b'"commit_timestamp":"'
_OPS: Final[dict[Action, bytes]] = {"insert": b"c", "update": b"u", "delete": b"d", "read": b"r", "truncate": b"t"}


def envelope(kind: Format, database: DatabaseMeta, clock: Clock) -> Envelope:
    """What makes an event of a message, given the message as Sequin has it."""
    match kind:
        case "record":
            return record
        case "debezium":
            return _Debezium(database, clock)
        case "cloudevents":
            return _CloudEvents(database)


def record(message: Message, _whole: bytes) -> bytes:
    return _parts(message).record


@dataclass(frozen=True, slots=True)
class _Parts:
    record: bytes
    changes: bytes  # null, or the old values of what was changed
    rest: bytes  # behind them: action and metadata


def _parts(message: Message) -> _Parts:
    chunk, index = message.span.chunk, message.span.indices[message.place]
    body = chunk.body(index)
    end = RECORD_START + (chunk.word(index, INDEX) >> 32)
    changes_end = end_of_value(body, end + len(_CHANGES))
    return _Parts(body[RECORD_START:end], body[end + len(_CHANGES) : changes_end], body[changes_end:])


def _text_behind(name: bytes, metadata: bytes) -> bytes:
    """Of a member whose text needs no escapes, and in front of which no text of a user's stands unescaped."""
    start = metadata.index(name) + len(name)
    return metadata[start : metadata.index(b'"', start)]


class _Debezium:
    def __init__(self, database: DatabaseMeta, clock: Clock) -> None:
        self._clock = clock
        name, version = orjson.dumps(database.name), orjson.dumps(__version__)
        self._source = b'"source":{"version":%b,"connector":"postgresql","name":%b,' % (version, name)
        self._database = orjson.dumps(database.database)
        self._tables: dict[tuple[str, str], bytes] = {}

    def __call__(self, message: Message, _whole: bytes) -> bytes:
        chunk, index = message.span.chunk, message.span.indices[message.place]
        action = ACTIONS[chunk.byte(index, ACTION)]
        before, after = _images(message, action)
        lsn, position, xid = chunk.word(index, LSN), chunk.word(index, INDEX) & LOW, chunk.word(index, LARGE) >> 32
        return b"".join(
            (
                b'{"before":%b,"after":%b,' % (before, after),
                self._source,
                _times(chunk.word(index, TIME)),
                b',"snapshot":"%b"' % (b"incremental" if action == "read" else b"false"),
                b',"db":%b,"sequence":"[\\"%d\\",\\"%d\\"]",' % (self._database, lsn, position),
                self._table(chunk.table(index)),
                b',"txId":%b,"lsn":%d,' % (b"%d" % xid if xid else b"null", lsn),
                b'"xmin":null,"origin":null,"origin_lsn":null},"transaction":null,"op":"%b",' % _OPS[action],
                _times(int(self._clock.wall() * 1_000_000)),
                b"}",
            )
        )

    def _table(self, name: tuple[str, str]) -> bytes:
        if name not in self._tables:
            self._tables[name] = b'"schema":%b,"table":%b' % (orjson.dumps(name[0]), orjson.dumps(name[1]))
        return self._tables[name]


def _images(message: Message, action: Action) -> tuple[bytes, bytes]:
    """The row before and after."""
    if action == "truncate":
        return b"null", b"null"
    parts = _parts(message)
    if action == "delete":
        return parts.record, b"null"
    whole = message.span.chunk.byte(message.span.indices[message.place], FLAGS) & WHOLE
    if action != "update" or not whole or parts.changes in (b"null", b"{}"):
        return b"null", parts.record
    old = dict(members(parts.changes))
    return joined((name, old.get(name, value)) for name, value in members(parts.record)), parts.record


def _times(microseconds: int) -> bytes:
    return b'"ts_ms":%d,"ts_us":%d,"ts_ns":%d' % (microseconds // 1000, microseconds, microseconds * 1000)


class _CloudEvents:
    def __init__(self, database: DatabaseMeta) -> None:
        self._source = orjson.dumps("/spillway/" + quote(database.name, safe=""))

    def __call__(self, message: Message, whole: bytes) -> bytes:
        chunk, index = message.span.chunk, message.span.indices[message.place]
        metadata = _parts(message).rest
        subject = chunk.key_texts(index)[0] or ".".join(chunk.table(index)).encode()
        return (
            b'{"specversion":"1.0","id":"%b","source":%b,"type":"spillway.%b","subject":%b,"time":"%b",%b,"data":%b}'
            % (
                _text_behind(_KEY, metadata),
                self._source,
                ACTIONS[chunk.byte(index, ACTION)].encode(),
                orjson.dumps(subject.decode()),
                _text_behind(_TIMESTAMP, metadata),
                b'"datacontenttype":"application/json"',
                whole,
            )
        )

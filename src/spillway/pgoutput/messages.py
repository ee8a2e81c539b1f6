"""The small messages of pgoutput, protocol version 1.

Source: PostgreSQL documentation, "Logical Replication Message Formats". All integers are big-endian; a string ends
with a zero byte. Rows (Insert, Update, Delete) are the plan's and the decoder's business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import cast

from spillway.pgoutput.relation import Column, Relation, ReplicaIdentity

# Microseconds from the Unix epoch to PostgreSQL's, 2000-01-01 00:00 UTC.
POSTGRES_EPOCH_MICROSECONDS = 946_684_800_000_000

_BEGIN = struct.Struct(">xQqI")
_COMMIT = struct.Struct(">xBQQq")
_RELATION = struct.Struct(">xI")
_COLUMN_COUNT = struct.Struct(">H")
_COLUMN_TYPE = struct.Struct(">Ii")
_TRUNCATE = struct.Struct(">xIB")
_LOGICAL_MESSAGE = struct.Struct(">xBQ")
_LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """A frame that pgoutput does not send, or a call out of order: a defect of ours, not the user's to mend."""


@dataclass(frozen=True, slots=True)
class Begin:
    final_lsn: int  # position of the commit record: the commit_lsn of everything in the transaction
    commit_microseconds: int  # since the Unix epoch
    xid: int


@dataclass(frozen=True, slots=True)
class Commit:
    commit_lsn: int
    end_lsn: int  # what may be confirmed once the transaction is resolved or durable


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    """What ``pg_logical_emit_message`` wrote."""

    transactional: bool
    lsn: int
    prefix: bytes
    content: memoryview


def read_begin(payload: bytes) -> Begin:
    final_lsn, time, xid = _BEGIN.unpack_from(payload)
    microseconds = time + POSTGRES_EPOCH_MICROSECONDS
    if microseconds < 0:
        raise ProtocolError("a transaction from before 1970")
    return Begin(final_lsn, microseconds, xid)


def read_commit(payload: bytes) -> Commit:
    _flags, commit_lsn, end_lsn, _time = _COMMIT.unpack_from(payload)
    return Commit(commit_lsn, end_lsn)


def read_relation(payload: bytes) -> Relation:
    (oid,) = _RELATION.unpack_from(payload)
    schema, position = _read_string(payload, _RELATION.size)
    table, position = _read_string(payload, position)
    identity = chr(payload[position])
    if identity not in "dnfi":
        raise ProtocolError(f"replica identity {identity!r} of relation {oid}")
    (count,) = _COLUMN_COUNT.unpack_from(payload, position + 1)
    position += 3
    columns = []
    for _ in range(count):
        in_identity = bool(payload[position] & 1)
        name, position = _read_string(payload, position + 1)
        type_oid, type_modifier = _COLUMN_TYPE.unpack_from(payload, position)
        position += _COLUMN_TYPE.size
        columns.append(Column(name, type_oid, type_modifier, in_identity))
    # An empty schema is pgoutput's way to say pg_catalog.
    return Relation(oid, schema or "pg_catalog", table, cast(ReplicaIdentity, identity), tuple(columns))


def read_truncate(payload: bytes) -> tuple[int, ...]:
    """OIDs of the relations."""
    count, _options = _TRUNCATE.unpack_from(payload)
    return struct.unpack_from(f">{count}I", payload, _TRUNCATE.size)


def read_logical_message(payload: memoryview) -> LogicalMessage:
    flags, lsn = _LOGICAL_MESSAGE.unpack_from(payload)
    start = _LOGICAL_MESSAGE.size
    # A prefix may have any length: the ones that matter are short, so only so much is looked at.
    prefix, found, _ = bytes(payload[start : start + 256]).partition(b"\0")
    if not found:
        return LogicalMessage(bool(flags & 1), lsn, b"", payload[:0])
    content = start + len(prefix) + 1 + _LENGTH.size
    return LogicalMessage(bool(flags & 1), lsn, prefix, payload[content:])


def _read_string(payload: bytes, start: int) -> tuple[str, int]:
    end = payload.find(b"\0", start)
    if end < 0:
        raise ProtocolError("a string without an end")
    return payload[start:end].decode(errors="backslashreplace"), end + 1

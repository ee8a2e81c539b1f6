"""Rows as frames of the stream, made of PostgreSQL's own text values: what the decoder makes of them is byte for byte
what the stream would have carried."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

from spillway.pgoutput.relation import Relation

_Value = bytes | None

_XLOG_HEADER = b"w" + bytes(24)  # XLogData; its positions and time are not looked at


class Frames:
    """What the decoder takes for a connection: these payloads, and no more."""

    def __init__(self, *payloads: bytes) -> None:
        self._frames = deque(_XLOG_HEADER + payload for payload in payloads)

    def get_copy_data(self, async_: int) -> tuple[int, memoryview]:  # noqa: ARG002 - libpq's signature
        if not self._frames:
            return 0, memoryview(b"")
        frame = self._frames.popleft()
        return len(frame), memoryview(frame)


def begin_frame(lsn: int, microseconds_since_2000: int) -> bytes:
    return struct.pack(">cQqI", b"B", lsn, microseconds_since_2000, 0)


def commit_frame(lsn: int) -> bytes:
    return struct.pack(">cBQQq", b"C", 0, lsn, lsn, 0)


def row_frame(relation: Relation, row: Sequence[_Value] | None, pks: dict[str, str]) -> bytes:
    """Insert of the row, or Delete of the key (PostgreSQL documentation, "Logical Replication Message Formats")."""
    values = row if row is not None else [pks[c.name].encode() if c.name in pks else None for c in relation.columns]
    head = struct.pack(
        ">cIcH", b"I" if row is not None else b"D", relation.oid, b"N" if row is not None else b"K", len(values)
    )
    return head + b"".join(b"n" if v is None else b"t" + len(v).to_bytes(4, "big") + v for v in values)

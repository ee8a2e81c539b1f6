"""Builds pgoutput frames from PostgreSQL's documentation ("Logical Replication Message Formats"), not from our code."""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from spillway.change import ACTIONS, Action, Change
from spillway.chunk import Chunk
from spillway.pgoutput import DatabaseMeta, Ended, Full, Relation, Stop, TableInfo, TypeInfo
from spillway.pgoutput.decoder import Decoder

INT8, TEXT, JSON, NUMERIC, TIMESTAMPTZ = 20, 25, 114, 1700, 1184
FINAL_LSN = 0x16_B374_D848
SUFFIX = b',"enrichment":null,"consumer":{"id":"c","name":"s","annotations":{}}}}'
META = DatabaseMeta("00-11", "app", {"team": "a"}, "app_production", "db.example.com")
COMMITTED = datetime(2024, 10, 28, 21, 39, 21, 127470, tzinfo=UTC)
UNCHANGED = object()
FRAME_OVERHEAD_BYTES = 100
RENEW_FRAME_BYTES = 1 << 23
PLENTY_BYTES = sys.maxsize

Value = bytes | None | object


def _microseconds(moment: datetime) -> int:
    since = moment - datetime(2000, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _string(text: str) -> bytes:
    return text.encode() + b"\0"


def begin(final_lsn: int = FINAL_LSN, xid: int = 731) -> bytes:
    return b"B" + struct.pack(">QqI", final_lsn, _microseconds(COMMITTED), xid)


def commit(commit_lsn: int = FINAL_LSN, end_lsn: int = FINAL_LSN + 48) -> bytes:
    return b"C" + struct.pack(">BQQq", 0, commit_lsn, end_lsn, _microseconds(COMMITTED))


def relation(
    columns: Sequence[tuple[str, int]],
    key: Sequence[str] = ("id",),
    *,
    oid: int = 16_400,
    schema: str = "public",
    table: str = "jobs",
    identity: str = "d",
) -> bytes:
    parts = [b"R", struct.pack(">I", oid), _string(schema), _string(table), identity.encode()]
    parts.append(struct.pack(">H", len(columns)))
    for name, type_oid in columns:
        in_identity = identity == "f" or (identity != "n" and name in key)
        parts.append(bytes([in_identity]) + _string(name) + struct.pack(">Ii", type_oid, -1))
    return b"".join(parts)


def row(*values: Value) -> bytes:
    parts = [struct.pack(">H", len(values))]
    for value in values:
        if value is None:
            parts.append(b"n")
        elif isinstance(value, bytes):
            parts.append(b"t" + struct.pack(">I", len(value)) + value)
        else:
            parts.append(b"u")
    return b"".join(parts)


def insert(*values: Value, oid: int = 16_400) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + row(*values)


def update(*values: Value, key: Sequence[Value] = (), old: Sequence[Value] = (), oid: int = 16_400) -> bytes:
    before = b"K" + row(*key) if key else b"O" + row(*old) if old else b""
    return b"U" + struct.pack(">I", oid) + before + b"N" + row(*values)


def delete(*, key: Sequence[Value] = (), old: Sequence[Value] = (), oid: int = 16_400) -> bytes:
    return b"D" + struct.pack(">I", oid) + (b"K" + row(*key) if key else b"O" + row(*old))


def truncate(*oids: int) -> bytes:
    return b"T" + struct.pack(">IB", len(oids), 0) + struct.pack(f">{len(oids)}I", *oids)


def message(prefix: str, content: bytes, *, transactional: bool = True) -> bytes:
    return b"M" + struct.pack(">BQ", transactional, 77) + _string(prefix) + struct.pack(">I", len(content)) + content


def xlog(payload: bytes) -> memoryview:
    """The whole CopyData: wal_start, wal_end, the time, and the payload."""
    return memoryview(b"w" + struct.pack(">QQq", 1, 2, 3) + payload)


_ESCAPES = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v", "\\": "\\\\"}


def copy_line(*values: bytes | None) -> memoryview:
    """A line of COPY TO STDOUT in text format."""
    table = {ord(char): escape for char, escape in _ESCAPES.items()}
    texts = ["\\N" if v is None else v.decode("latin-1").translate(table) for v in values]
    return memoryview(("\t".join(texts) + "\n").encode("latin-1"))


def keepalive(wal_end: int, *, reply_requested: bool = False) -> memoryview:
    return memoryview(b"k" + struct.pack(">QqB", wal_end, 3, reply_requested))


class Connection:
    """A connection in COPY BOTH that has received ``frames``."""

    def __init__(self, *frames: memoryview) -> None:
        self.frames = deque(frames)
        self.ended = False

    def get_copy_data(self, async_: int) -> tuple[int, memoryview]:
        assert async_ == 1
        if self.frames:
            frame = self.frames.popleft()
            return len(frame), frame
        return (-1 if self.ended else 0), memoryview(b"")


class Stream:
    """A decoder that has learned one table and is inside of a transaction."""

    def __init__(
        self,
        decoder_class: type[Decoder],
        columns: Sequence[tuple[str, int]] = (("id", INT8), ("name", TEXT)),
        key: Sequence[str] = ("id",),
        *,
        schema: str = "public",
        table: str = "jobs",
        identity: str = "d",
        groups: tuple[tuple[str, ...] | None, ...] = (),
        types: dict[int, TypeInfo] | None = None,
        root: tuple[str, str] | None = None,
        max_message_bytes: int = 1 << 20,
        group_columns: Callable[[str, str], tuple[tuple[str, ...] | None, ...]] | None = None,
        wanted: Sequence[Action] = ACTIONS,
    ) -> None:
        self.warnings: list[str] = []
        self.connection = Connection()
        self.decoder = decoder_class(
            META,
            group_columns or (lambda *_: groups),
            len(groups),
            max_message_bytes,
            FRAME_OVERHEAD_BYTES,
            RENEW_FRAME_BYTES,
            lambda finding: self.warnings.append(finding.code),
        )
        self.relation = self.learn(
            relation(columns, key, schema=schema, table=table, identity=identity),
            key,
            types=types,
            root=root,
            wanted=wanted,
        )
        assert self.feed(begin()) is None
        self.decoder.take()

    def learn(
        self,
        payload: bytes,
        key: Sequence[str] = ("id",),
        *,
        types: dict[int, TypeInfo] | None = None,
        root: tuple[str, str] | None = None,
        wanted: Sequence[Action] = ACTIONS,
    ) -> Relation:
        stop = self.feed(payload)
        assert isinstance(stop, Relation)
        self.decoder.learn(stop, TableInfo(stop.oid, tuple(key), types or {}, root), frozenset(wanted))
        return stop

    def fill(self, *frames: memoryview, credit_bytes: int = PLENTY_BYTES, max_changes: int = 1000) -> Stop:
        self.connection.frames.extend(frames)
        return self.decoder.fill(self.connection, credit_bytes, max_changes)

    def fill_page(
        self, *lines: memoryview, credit_bytes: int = PLENTY_BYTES, max_changes: int = 1000
    ) -> Full | Ended | None:
        self.connection.frames.extend(lines)
        return self.decoder.fill_page(self.connection, self.relation.oid, credit_bytes, max_changes)

    def feed(self, *payloads: bytes) -> Stop:
        return self.fill(*map(xlog, payloads))

    def chunk(self, *payloads: bytes) -> Chunk:
        """What these give, and what was fed before."""
        assert self.feed(*payloads) is None
        return self.decoder.take()

    def changes(self, *payloads: bytes) -> list[Change]:
        return changes_of(self.chunk(*payloads))

    def change(self, payload: bytes) -> Change:
        (change,) = self.changes(payload)
        return change


def changes_of(chunk: Chunk) -> list[Change]:
    return [chunk.change(index) for index in range(chunk.count)]


def groups_of(chunk: Chunk, index: int = 0) -> list[str]:
    return [text.decode() for text in chunk.key_texts(index)[2::2]]


def groups_before(chunk: Chunk, index: int = 0) -> list[str]:
    return [text.decode() for text in chunk.key_texts(index)[3::2]]

"""pgoutput, protocol version 1, text format: frames in, changes out. No input or output, no clock.

One `Decoder` per replication connection: the server names every relation anew on a new one. The caller feeds the
payload of each XLogData message in order. After a `Relation` it asks the catalogue and calls `learn` before the next
frame; a row of a relation that was not learned is an error of ours.

Promises:

- A row is rendered once (see spillway.change). Its position is the transaction's final LSN and ``commit_idx``, which
  counts row operations, a TRUNCATE (once, however many tables) and transactional logical messages, annotations
  included; the same at every replay, as is ``n``.
- An unchanged TOAST column is taken from the old row where that was sent, else left out (``Change.whole`` is False);
  it is never null. A delete is always ``whole``: under replica identity default or index it has the key's columns,
  and null in the others.
- A row that is too large (its frame or its body above ``max_message_bytes``) becomes a change that holds its key's
  columns alone. Of a frame that is too large only those values are copied.
- The values of a key that the old row does not carry, because they are not part of the replica identity, are taken as
  unchanged on update; a delete without its primary key has no key. `unkeyable` finds such tables beforehand.
- A partition published by its root (``publish_via_partition_root``) is logged with its own replica identity while the
  server's frames claim the root's. A root with identity full over a partition without it gives old rows that are null
  outside of the key and cannot be told from real ones: who asks the catalogue has to find that.
- A partition published under its own name has the identity of its root, but for TRUNCATE: that emptied the partition,
  not the table, and is reported under the partition's own name.

Annotations: ``pg_logical_emit_message(true, 'sequin:transaction_annotations.set', '{...}')`` counts for what follows
in its transaction, ``...clear`` takes it back. What is not JSON gives null and a warning.
"""

from __future__ import annotations

import struct
from binascii import b2a_base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zlib import crc32

import orjson

from spillway.change import BODY_START, RECORD_START, Action, Change
from spillway.errors import Finding
from spillway.pgoutput.messages import (
    Begin,
    Commit,
    ProtocolError,
    Truncation,
    read_begin,
    read_commit,
    read_logical_message,
    read_relation,
    read_truncate,
)
from spillway.pgoutput.plan import (
    UNCHANGED,
    DatabaseMeta,
    Row,
    TablePlan,
    before,
    differing,
    filled,
    growth_bytes,
    known,
)
from spillway.pgoutput.relation import Relation, TableInfo
from spillway.pgoutput.scalars import json as embed_json
from spillway.position import format_lsn

Event = Begin | Commit | Relation | Change | Truncation

ANNOTATION_SET = b"sequin:transaction_annotations.set"
ANNOTATION_CLEAR = b"sequin:transaction_annotations.clear"

# Kinds of frames and, inside of a row's frame, of tuples.
_BEGIN, _COMMIT, _RELATION, _TRUNCATE, _MESSAGE = b"BCRTM"
_INSERT, _UPDATE, _DELETE = _ROWS = b"IUD"
_ACTIONS: dict[int, Action] = {_INSERT: "insert", _UPDATE: "update", _DELETE: "delete"}
_IGNORED = b"OYA"  # origin, type; stream abort, which PostgreSQL 18 may send though nothing is streamed
_NEW, _OLD = b"NO"  # the third, K, is an old row of which only the replica identity is there

_row_head = struct.Struct(">xIB").unpack_from
_ROW_START = 6

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Earlier changes of a key are counted per bucket, in one byte each.
_BUCKETS = 65536
_MOST = 255

# No byte of text becomes more than six bytes of JSON.
_LARGEST_GROWTH = 6


class _TooLargeError(Exception):
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class Decoder:
    """``group_columns``: the sets of group columns configured for a table, by schema and name (of its root)."""

    def __init__(
        self,
        database: DatabaseMeta,
        group_columns: Callable[[str, str], tuple[tuple[str, ...], ...]],
        max_message_bytes: int,
        on_warning: Callable[[Finding], None] = lambda _: None,
    ) -> None:
        self._database_name = database.name
        self._database_json = database.as_json()
        self._group_columns = group_columns
        self._max_message_bytes = max_message_bytes
        self._max_annotation_bytes = max_message_bytes // 4  # so that every body has room for it
        self._on_warning = on_warning
        self._plans: dict[int, TablePlan] = {}
        # Of the open transaction; without one, final_lsn is 0.
        self._final_lsn = 0
        self._commit_time = 0.0
        self._idx = 0
        self._counts = bytearray()
        self._commit_json = b""  # commit_timestamp's value and commit_lsn
        self._database_part = b""  # database_name's value, transaction_annotations and database

    def feed(self, payload: bytes | memoryview) -> Event | None:
        """The payload of one XLogData message. A memoryview is not kept, and copied only if it is not too large."""
        kind = payload[0]
        try:
            if kind in _ROWS:
                return self._row(kind, payload)
            if kind == _MESSAGE:
                self._logical_message(memoryview(payload))
                return None
            return self._other(kind, bytes(payload))
        except (struct.error, IndexError, OverflowError) as error:
            raise ProtocolError(f"a frame of kind {chr(kind)!r} ends too early or is garbled") from error

    def learn(self, relation: Relation, info: TableInfo) -> None:
        """What the catalogue says of the relation that `feed` has returned."""
        schema, table = info.root or (relation.schema, relation.table)
        self._plans[relation.oid] = TablePlan(relation, info, self._group_columns(schema, table))

    # Transactions, and what is not a row.

    def _other(self, kind: int, payload: bytes) -> Event | None:
        if kind == _BEGIN:
            return self._start(read_begin(payload))
        if kind == _COMMIT:
            self._final_lsn = 0
            return read_commit(payload)
        if kind == _RELATION:
            relation = read_relation(payload)
            self._plans.pop(relation.oid, None)
            return relation
        if kind == _TRUNCATE:
            return self._truncate(payload)
        if kind in _IGNORED:
            return None
        raise ProtocolError(f"a frame of kind {chr(kind)!r}")

    def _start(self, begin: Begin) -> Begin:
        self._final_lsn, self._commit_time = begin.final_lsn, begin.commit_time
        self._idx = 0
        self._counts = bytearray(_BUCKETS)
        time = _EPOCH + timedelta(microseconds=begin.commit_microseconds)
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
        self._commit_json = b'"%b","commit_lsn":%d' % (timestamp, begin.final_lsn)
        self._annotate(b"null")
        return begin

    def _annotate(self, annotations: bytes) -> None:
        self._database_part = b'%b,"transaction_annotations":%b,"database":%b' % (
            orjson.dumps(self._database_name),
            annotations,
            self._database_json,
        )

    def _logical_message(self, payload: memoryview) -> None:
        message = read_logical_message(payload)
        if not message.transactional:
            return
        self._idx += 1
        if message.prefix == ANNOTATION_CLEAR:
            self._annotate(b"null")
        elif message.prefix == ANNOTATION_SET:
            self._annotate(self._annotations(message.content))

    def _annotations(self, content: memoryview) -> bytes:
        if len(content) > self._max_annotation_bytes:
            return self._no_annotations(f"of {len(content)} bytes, above the {self._max_annotation_bytes} allowed")
        text = bytes(content)
        try:
            orjson.loads(text)
        except orjson.JSONDecodeError:
            return self._no_annotations("that is not JSON")
        return embed_json(text)

    def _no_annotations(self, why: str) -> bytes:
        finding = Finding(
            code="invalid_transaction_annotation",
            what=f"the transaction at {format_lsn(self._final_lsn)} has an annotation {why}; its messages go without",
            remedy=f"pass a short JSON object to pg_logical_emit_message(true, '{ANNOTATION_SET.decode()}', ...)",
            severity="warning",
            database=self._database_name,
        )
        self._on_warning(finding)
        return b"null"

    def _truncate(self, payload: bytes) -> Truncation:
        changes = []
        for oid in read_truncate(payload):
            plan = self._plan(oid)
            tail = self._tail(plan, "truncate", b"null", ())
            body = BODY_START + b"null" + tail
            change = self._assemble(plan, "truncate", (), (), body, tail, True)
            change.schema, change.table = plan.own_name
            changes.append(change)
        self._idx += 1
        return Truncation(tuple(changes))

    # Rows.

    def _row(self, kind: int, payload: bytes | memoryview) -> Change:
        if not self._final_lsn:
            raise ProtocolError("a row outside of a transaction")
        size_bytes = len(payload)
        if size_bytes > self._max_message_bytes:
            change = self._large_row(kind, memoryview(payload), size_bytes)
        else:
            payload = bytes(payload)
            try:
                change = self._update(payload) if kind == _UPDATE else self._insert_or_delete(kind, payload)
            except _TooLargeError as too_large:
                change = self._large_row(kind, memoryview(payload), too_large.size_bytes)
        self._idx += 1
        # Numbered last: a change that was given up as too large must not count twice.
        if change.old is not None:
            change.old.n = self._number(change.old.key)
        change.n = self._number(change.key)
        return change

    def _insert_or_delete(self, kind: int, payload: bytes) -> Change:
        oid, _ = _row_head(payload)
        plan = self._plan(oid)
        row, end, unchanged = plan.split(payload, _ROW_START)
        self._check(payload, end, row)
        return self._change(plan, "insert" if kind == _INSERT else "delete", row, b"null", unchanged)

    def _update(self, payload: bytes) -> Change:
        oid, mark = _row_head(payload)
        plan = self._plan(oid)
        if mark == _NEW:
            row, end, unchanged = plan.split(payload, _ROW_START)
            self._check(payload, end, row)
            return self._change(plan, "update", row, b"{}", unchanged)
        old, position, _ = plan.split(payload, _ROW_START)
        row, end, unchanged = plan.split(payload, _after_new(payload, position))
        self._check(payload, end, old, row)
        if unchanged:
            row = filled(row, old)
            unchanged = any(value is UNCHANGED for value in row)
        changes = plan.columns(old, differing(old, row)) if mark == _OLD else b"{}"
        change = self._change(plan, "update", row, changes, unchanged)
        change.old = self._old_key(plan, change, old, row, mark == _OLD)
        return change

    def _large_row(self, kind: int, payload: memoryview, size_bytes: int) -> Change:
        oid, mark = _row_head(payload)
        plan = self._plan(oid)
        row, position = plan.split_key(payload, _ROW_START)
        if kind != _UPDATE or mark == _NEW:
            return self._large_change(plan, _ACTIONS[kind], row, size_bytes)
        old = row
        row, _ = plan.split_key(payload, _after_new(payload, position))
        row = filled(row, old)
        change = self._large_change(plan, "update", row, size_bytes)
        change.old = self._old_key(plan, change, old, row, mark == _OLD)
        return change

    def _check(self, payload: bytes, end: int, *rows: Row) -> None:
        """The rows fill their frame, and rendering them is not known beforehand to exceed what a message may have."""
        size_bytes = len(payload)
        if end != size_bytes:
            raise ProtocolError(f"a row ends at byte {end} of a frame of {size_bytes}")
        if size_bytes * _LARGEST_GROWTH > self._max_message_bytes:
            size_bytes += sum(growth_bytes(row) for row in rows)
            if size_bytes > self._max_message_bytes:
                raise _TooLargeError(size_bytes)

    def _change(self, plan: TablePlan, action: Action, row: Row, changes: bytes, unchanged: bool) -> Change:
        key_row = known(row) if unchanged else row
        pks = plan.pks(key_row)
        tail = self._tail(plan, action, changes, pks)
        body = plan.partial_body(row, tail) if unchanged else plan.body(row, tail)
        if len(body) > self._max_message_bytes:
            raise _TooLargeError(len(body))
        return self._assemble(plan, action, pks, plan.groups(key_row), body, tail, not unchanged)

    def _large_change(self, plan: TablePlan, action: Action, row: Row, size_bytes: int) -> Change:
        key_row = known(row)
        pks = plan.pks(key_row)
        tail = self._tail(plan, action, b"{}" if action == "update" else b"null", pks)
        body = plan.key_body(row, tail)
        return self._assemble(plan, action, pks, plan.groups(key_row), body, tail, False, size_bytes)

    def _old_key(self, plan: TablePlan, change: Change, old: Row, row: Row, full: bool) -> Change | None:
        """The delete of the old key, if the update has changed the key."""
        key_row = old if full else before(old, known(row))
        pks, groups = plan.pks(key_row), plan.groups(key_row)
        if pks == change.pks and groups == change.groups:
            return None
        tail = self._tail(plan, "delete", b"null", pks)
        return self._assemble(plan, "delete", pks, groups, plan.body(old, tail), tail, True)

    def _tail(self, plan: TablePlan, action: Action, changes: bytes, pks: tuple[str, ...]) -> bytes:
        return plan.tails[action] % (
            changes,
            b2a_base64(b"%d:%d" % (self._final_lsn, self._idx), newline=False),
            self._commit_json,
            self._idx,
            self._database_part,
            orjson.dumps(pks),
        )

    def _assemble(
        self,
        plan: TablePlan,
        action: Action,
        pks: tuple[str, ...],
        groups: tuple[str, ...],
        body: bytes,
        tail: bytes,
        whole: bool,
        too_large_bytes: int = 0,
    ) -> Change:
        """``n`` is still to be given: see `_row`."""
        return Change(
            self._final_lsn,
            self._idx,
            plan.schema,
            plan.table,
            action,
            plan.key(pks),
            pks,
            body,
            len(body) - len(tail) - RECORD_START,
            1,
            whole,
            self._commit_time,
            groups,
            None,
            too_large_bytes,
        )

    def _number(self, key: str | None) -> int:
        """1 + the number of earlier changes of the key's bucket in this transaction, saturating."""
        if key is None:
            return 1
        bucket = crc32(key.encode()) & 0xFFFF
        count = self._counts[bucket]
        if count < _MOST:
            count += 1
            self._counts[bucket] = count
        return count

    def _plan(self, oid: int) -> TablePlan:
        plan = self._plans.get(oid)
        if plan is None:
            raise ProtocolError(f"a row of relation {oid} before learn() was called for it")
        return plan


def _after_new(payload: bytes | memoryview, position: int) -> int:
    if payload[position] != _NEW:
        raise ProtocolError("an update without a new row")
    return position + 1

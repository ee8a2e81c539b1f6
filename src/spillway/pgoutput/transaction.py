"""The open transaction, or page of existing rows: what all of its changes share, and what is counted in it.

Annotations: ``pg_logical_emit_message(true, 'sequin:transaction_annotations.set', '{...}')`` counts for what follows
in its transaction, ``...clear`` takes it back. What is not JSON gives null and a warning.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final
from zlib import crc32

import orjson

from spillway.errors import Finding
from spillway.pgoutput.messages import POSTGRES_EPOCH_MICROSECONDS, LogicalMessage, ProtocolError, read_begin
from spillway.pgoutput.plan import DatabaseMeta
from spillway.pgoutput.scalars import json as embed_json
from spillway.position import format_lsn

ANNOTATION_SET = b"sequin:transaction_annotations.set"
ANNOTATION_CLEAR = b"sequin:transaction_annotations.clear"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Earlier changes of a key are counted per bucket, in one byte each.
_BUCKETS: Final = 65536
_MOST: Final = 255


class Transaction:
    """One after another. Without an open one ``final_lsn`` is 0. A page has the place of one."""

    def __init__(
        self, database: DatabaseMeta, max_annotation_bytes: int, on_warning: Callable[[Finding], None]
    ) -> None:
        self.final_lsn = 0
        self.commit_microseconds = 0
        self.idx = 0  # commit_idx of the next operation
        self.xid = 0
        self.page_id: bytes | None = None  # of a page
        self._database_name = database.name
        self._database_json = database.as_json()
        self._max_annotation_bytes = max_annotation_bytes
        self._on_warning = on_warning
        self._counts = bytearray()
        self._commit_json = b""  # commit_timestamp's value and commit_lsn
        self._database_part = b""  # database_name's value, transaction_annotations and database
        self.annotation_bytes = 0  # what annotations add to each change, while it is built and while it is copied

    def begin(self, payload: bytes) -> None:
        begin = read_begin(payload)
        self._counts = bytearray(_BUCKETS)
        self._start(begin.final_lsn, begin.commit_microseconds, begin.xid, None)

    def begin_page(self, page_id: bytes, lsn: int, microseconds: int) -> None:
        if self.open:
            raise ProtocolError("a page inside of a transaction")
        if microseconds < 0:
            raise ProtocolError("a page from before 1970")
        self._start(lsn, microseconds, 0, page_id)

    def _start(self, final_lsn: int, microseconds: int, xid: int, page_id: bytes | None) -> None:
        time = _EPOCH + timedelta(microseconds=microseconds)
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
        self._commit_json = b'"%b","commit_lsn":%d' % (timestamp, final_lsn)
        self.final_lsn, self.commit_microseconds, self.xid, self.page_id = final_lsn, microseconds, xid, page_id
        self.idx = 0
        self._annotate(b"null")

    def end(self) -> None:
        self.final_lsn, self.page_id = 0, None

    @property
    def open(self) -> bool:
        """A transaction is, and no page."""
        return self.final_lsn != 0 and self.page_id is None

    def tail(self, template: bytes, changes: bytes, pks: bytes, key: bytes | None) -> bytes:
        """What stands behind the record of the next operation. ``template``: see `TablePlan.tails`. ``key``: the text
        of the primary key without the table's prefix; None for none."""
        identity = b"%d:%d" % (self.final_lsn, self.idx)
        if self.page_id is not None:
            identity = self.page_id + b":" + (identity if key is None else key)
        return template % (
            changes,
            b2a_base64(identity, newline=False),
            self._commit_json,
            self.idx,
            self._database_part,
            pks,
        )

    def number(self, key: bytes) -> int:
        """1 + the number of earlier changes of the key's bucket in this transaction, saturating; 0 in a page."""
        if self.page_id is not None:
            return 0
        if not key:
            return 1
        bucket = crc32(key) & 0xFFFF
        count = self._counts[bucket]
        if count < _MOST:
            count += 1
            self._counts[bucket] = count
        return count

    def _annotate(self, annotations: bytes) -> None:
        self.annotation_bytes = 2 * max(0, len(annotations) - len(b"null"))
        self._database_part = b'%b,"transaction_annotations":%b,"database":%b' % (
            orjson.dumps(self._database_name),
            annotations,
            self._database_json,
        )

    def begin_message(self, lsn: int, sent_microseconds: int) -> None:
        """A message that belongs to none has the place of one; its record ends at ``lsn``, and it was sent at this time
        since 2000."""
        microseconds = sent_microseconds + POSTGRES_EPOCH_MICROSECONDS
        if self.open or lsn <= 1:
            raise ProtocolError("a message that is not transactional inside of a transaction, or nowhere")
        if microseconds < 0:
            raise ProtocolError("a message from before 1970")
        self._start(lsn - 1, microseconds, 0, None)

    def logical_message(self, message: LogicalMessage) -> None:
        if not message.transactional:
            return
        self.idx += 1
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
            what=f"the transaction at {format_lsn(self.final_lsn)} has an annotation {why}; its messages go without",
            remedy=f"pass a short JSON object to pg_logical_emit_message(true, '{ANNOTATION_SET.decode()}', ...)",
            severity="warning",
            database=self._database_name,
        )
        self._on_warning(finding)
        return b"null"

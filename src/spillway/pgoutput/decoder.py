"""pgoutput, protocol version 1, text format: frames in, a chunk of changes out. No clock; of the connection it takes
frames that have arrived, no more (`frames`).

One `Decoder` per replication connection: the server names every relation anew on a new one. `Decoder.fill` takes frames
and adds to the chunk that is being filled, until there is a reason to stop; `Decoder.take` hands the chunk out. After
a `Relation` the caller asks the catalogue and calls `learn` before it goes on; a row of a relation that was not learned
is an error of ours. After an error the decoder is of no use any more. With ``break_at_lsn`` a commit
that ends there or behind it is a reason to stop.

**Pages.** A decoder may also be fed with existing rows: `Decoder.begin_page`, then `Decoder.fill_page`, which takes
lines of COPY (`lines`) off the connection as `fill` takes frames. What comes out is an insert of the same row but for
what is said of where it comes from: the action is read (whatever is wanted), the position is the page's LSN and the
number of the row in the page, n is 0, the idempotency key is made of the page's id and the primary key. Of a row
without one it is made of the id and the position; so every page of a table without primary key needs its own id.

**Credit.** Every frame or line costs three times its payload (libpq holds it twice while it is received), a fixed sum,
and, if it is a row, what the names of its columns come to in JSON. What the frames of a chunk cost never exceeds the
credit that `fill` was given for the chunk: a frame that would is kept undecoded.

What becomes of a row is said in spillway.pgoutput.records.

Promises:

- With ``totals`` every change of a transaction that is in one chunk as a whole has the number of its operations
  (`Chunk.total`). For more of them to be, a commit is a reason to stop once half of the chunk's credit or changes are
  used.
- A partition published by its root (``publish_via_partition_root``) is logged with its own replica identity while the
  server's frames claim the root's. A root with identity full over a partition without it gives old rows that are null
  outside of the key and cannot be told from real ones. The server sends the partition's own Relation message, too,
  behind the root's and before the first row of it, and both anew when it is altered: from the one that tells of such a
  partition (`TableInfo.partial`) the root's old rows count as keys.
- A partition published under its own name has the identity of its root, but for TRUNCATE: that emptied the partition,
  not the table, and is reported under the partition's own name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from typing import Final

from spillway.change import Action
from spillway.chunk import (
    LOW,
    TOTAL,
    WORD_BYTES,
    Chunk,
)
from spillway.errors import Finding
from spillway.pgoutput.emitted import NO_INFO, OVERHEAD_BYTES, relations
from spillway.pgoutput.filters import Filters, no_filters
from spillway.pgoutput.frames import Committed, Copy, Ended, Full, Keepalive, Renew, Stop
from spillway.pgoutput.messages import (
    ProtocolError,
    read_commit,
    read_logical_message,
    read_relation,
    read_truncate,
)
from spillway.pgoutput.plan import (
    DatabaseMeta,
    TablePlan,
)
from spillway.pgoutput.records import DELETED, INSERTED, UPDATED, Records
from spillway.pgoutput.relation import Relation, TableInfo
from spillway.pgoutput.transaction import Transaction

# Of the replication protocol: XLogData, whose header is wal_start, wal_end and the time; keepalive.
_XLOG_DATA, _KEEPALIVE = b"wk"
_XLOG_HEADER_BYTES: Final = 25
_keepalive = struct.Struct(">xQqB").unpack_from  # wal_end, time, reply requested

# Kinds of pgoutput's messages.
_BEGIN, _COMMIT, _RELATION, _TRUNCATE, _MESSAGE = b"BCRTM"
_IGNORED = b"OYA"  # origin, type; stream abort, which PostgreSQL 18 may send though nothing is streamed

_ROWS: Final = {ord("I"): INSERTED, ord("U"): UPDATED, ord("D"): DELETED}

_oid_at = struct.Struct(">xI").unpack_from
_sent_at = struct.Struct(">17xq").unpack_from  # in the header of XLogData
_total = struct.Struct("=H")
_MOST_IN_TOTAL: Final = 0xFFFF


class Decoder:
    """``group_columns``: the ``groups`` sets of group columns for a table, by schema and name (of its root); None for a
    set that is the primary key. ``filters``: those of a relation, of ``filter_count`` that there are in
    all. ``prefixes``: of logical messages that are wanted."""

    def __init__(
        self,
        database: DatabaseMeta,
        group_columns: Callable[[str, str], tuple[tuple[str, ...] | None, ...]],
        groups: int,
        max_message_bytes: int,
        frame_overhead_bytes: int,
        renew_frame_bytes: int,
        on_warning: Callable[[Finding], None] = lambda _: None,
        filters: Filters = no_filters,
        filter_count: int = 0,
        totals: bool = False,
        prefixes: Collection[str] = (),
    ) -> None:
        self.largest_frame_bytes = 0  # the payload of one that was decoded, since the decoder was made
        self.taken_frames = 0  # since the caller last set it to 0
        self.taken_bytes = 0  # the same
        self.used_bytes = 0  # credit used by the chunk that is being filled
        self.break_at_lsn = 0  # a commit that ends there or behind it is a reason to stop; 0: none is
        self._group_columns = group_columns
        self._groups = groups
        self._filters = filters
        self._frame_overhead_bytes = frame_overhead_bytes
        self._renew_frame_bytes = renew_frame_bytes
        # An annotation is small enough that every body has room for it.
        self._transaction = Transaction(database, max_message_bytes // 4, on_warning)
        self._plans: dict[int, TablePlan] = {}
        self._kept: memoryview | None = None  # the frame that the chunk had no credit for
        # The chunk that is being filled.
        self._records = Records(self._transaction, groups, max_message_bytes, filter_count)
        self._emitted = {
            prefix: tuple([TablePlan(one, NO_INFO, (None,) * groups, frozenset({"insert"})) for one in both])
            for prefix, both in relations(prefixes).items()
        }
        self._with_totals = totals
        self._totals: list[tuple[int, int, int]] = []  # first change of a transaction, the one behind it, the total
        self._first: int | None = 0  # change of the open transaction; None: the chunk does not have them all
        self._commit_lsn = self._end_lsn = self._truncates = 0

    @property
    def in_transaction(self) -> bool:
        return self._transaction.open

    @property
    def page_rows(self) -> int:
        """Rows of the page that were read, passed over or not."""
        return self._transaction.idx

    @property
    def count(self) -> int:
        """Changes in the chunk that is being filled."""
        return self._records.count

    @property
    def last_key(self) -> bytes:
        """The primary key's text behind the table's prefix, of the row of the page read last."""
        return self._records.last_key

    def fill(self, copy: Copy, credit_bytes: int, max_changes: int) -> Stop:
        """Take frames until there is a reason to stop. ``credit_bytes`` and ``max_changes`` are for the chunk as a
        whole, over all calls since the last `take`."""
        while True:
            frame = self._next(copy)
            if isinstance(frame, int):
                return Ended(frame) if frame else None
            try:
                stop = self._frame(frame, credit_bytes, max_changes)
            except (struct.error, IndexError, OverflowError, ValueError) as error:
                kind = bytes(frame[_XLOG_HEADER_BYTES:][:1]).decode("latin-1")
                raise ProtocolError(f"a frame of kind {kind!r} ends too early or is garbled") from error
            if stop is not None:
                return stop

    def begin_page(self, page_id: bytes, lsn: int, microseconds: int) -> None:
        """What follows are rows of a page, read at this LSN and this time since the Unix epoch; not inside of a
        transaction. A line that was kept is forgotten; what was filled and not taken stays."""
        self._transaction.begin_page(page_id, lsn, microseconds)
        self._kept = None

    def fill_page(self, copy: Copy, oid: int, credit_bytes: int, max_changes: int) -> Full | Ended | None:
        """As `fill`, of lines of COPY of the learned relation with this OID, its columns in their order."""
        plan = self._plan(oid)
        if self._transaction.page_id is None:
            raise ProtocolError("a line outside of a page")
        while True:
            line = self._next(copy)
            if isinstance(line, int):
                return Ended(line) if line else None
            try:
                full = self._line(plan, line, credit_bytes, max_changes)
            except (struct.error, IndexError, OverflowError, ValueError) as error:
                raise ProtocolError("a line of a page is garbled") from error
            if full is not None:
                return full

    def take(self) -> Chunk:
        """What was filled, and the last commit that was read meanwhile. The next chunk begins."""
        if self._transaction.idx > LOW:
            raise ProtocolError(f"a transaction of more than {LOW} operations")
        taken, matched = self._records.take()
        meta = bytearray(taken.meta)
        for first, end, total in self._totals:
            for at in range(first * taken.stride, end * taken.stride, taken.stride):
                _total.pack_into(meta, at * WORD_BYTES + TOTAL, total)
        chunk = Chunk(
            taken.count, taken.data, bytes(meta), taken.keys, taken.tables, taken.groups, self._commit_lsn,
            self._end_lsn, self._truncates, matched, self._records.filter_count,
        )  # fmt: skip
        self._totals.clear()
        self._first = None if self.in_transaction and self._transaction.idx else 0
        self._commit_lsn = self._end_lsn = self._truncates = 0
        self.used_bytes = 0
        return chunk

    def learn(self, relation: Relation, info: TableInfo, wanted: frozenset[Action]) -> None:
        """What the catalogue says of the relation that `fill` has returned, and the actions of which a sink wants all
        rows. Raises what the filters raise."""
        schema, table = info.root or (relation.schema, relation.table)
        groups = self._group_columns(schema, table)
        if len(groups) != self._groups:
            raise ProtocolError(
                f"{len(groups)} sets of group columns for {schema}.{table} where {self._groups} are due"
            )
        self._plans[relation.oid] = TablePlan(relation, info, groups, wanted, self._filters(relation, info))
        if info.root is not None and not info.partitioned:
            for plan in self._plans.values():
                if plan.partitioned and plan.name == info.root:
                    plan.partial = info.partial

    # Frames.

    def _next(self, copy: Copy) -> memoryview | int:
        """The frame that was kept, or the next; what libpq said in place of a size if there is none."""
        frame, self._kept = self._kept, None
        if frame is None:
            size, frame = copy.get_copy_data(1)
            if size <= 0:
                return size
            self.taken_frames += 1
            self.taken_bytes += size
        return frame

    def _covered(
        self, frame: memoryview, payload_bytes: int, needed_bytes: int, credit_bytes: int, max_changes: int
    ) -> Full | None:
        """Takes the frame's credit, or keeps it for lack of that."""
        if self.used_bytes + needed_bytes > credit_bytes or self._records.count >= max_changes:
            self._kept = memoryview(bytes(frame))
            return Full(needed_bytes)
        self.used_bytes += needed_bytes
        self.largest_frame_bytes = max(self.largest_frame_bytes, payload_bytes)
        return None

    def _line(self, plan: TablePlan, line: memoryview, credit_bytes: int, max_changes: int) -> Full | None:
        needed_bytes = 3 * len(line) + self._frame_overhead_bytes + plan.overhead_bytes
        full = self._covered(line, len(line), needed_bytes, credit_bytes, max_changes)
        if full is None:
            self._records.existing(plan, line)
            self._transaction.idx += 1
        return full

    def _frame(self, frame: memoryview, credit_bytes: int, max_changes: int) -> Stop:
        if frame[0] != _XLOG_DATA:
            return self._keepalive(frame)
        payload = frame[_XLOG_HEADER_BYTES:]
        kind = payload[0]
        payload_bytes = len(payload)
        needed_bytes = 3 * payload_bytes + self._frame_overhead_bytes
        action = _ROWS.get(kind)
        if action is not None:
            (oid,) = _oid_at(payload)
            plan = self._plan(oid)
            needed_bytes += plan.overhead_bytes + self._transaction.annotation_bytes
        elif kind == _MESSAGE and self._emitted:
            needed_bytes += OVERHEAD_BYTES + self._transaction.annotation_bytes
        full = self._covered(frame, payload_bytes, needed_bytes, credit_bytes, max_changes)
        if full is not None:
            return full
        if action is not None:
            self._records.row(plan, action, payload)
            return None
        if kind == _MESSAGE:
            self._message(payload, frame)
            return None
        stop = self._other(kind, payload)
        if stop is None and kind == _COMMIT and self._with_totals:
            half = self.used_bytes >= credit_bytes // 2 or self._records.count >= max_changes // 2
            return Committed() if half else None
        return stop

    def _keepalive(self, frame: memoryview) -> Keepalive | None:
        if frame[0] != _KEEPALIVE:
            raise ProtocolError(f"a replication message of kind {frame[0]:#04x}")
        wal_end, _, reply_requested = _keepalive(frame)
        if self._transaction.open and not reply_requested:
            return None
        return Keepalive(wal_end, reply_requested != 0)

    # Transactions, and what is not a row.

    def _other(self, kind: int, payload: memoryview) -> Relation | Renew | Committed | None:
        if kind == _BEGIN:
            self._transaction.begin(bytes(payload))
            self._first = self._records.count
        elif kind == _COMMIT:
            return self._commit(bytes(payload))
        elif kind == _RELATION:
            relation = read_relation(bytes(payload))
            self._plans.pop(relation.oid, None)
            return relation
        elif kind == _TRUNCATE:
            self._records.truncate([self._plan(oid) for oid in read_truncate(bytes(payload))])
            self._truncates += 1
        elif kind not in _IGNORED:
            raise ProtocolError(f"a frame of kind {chr(kind)!r}")
        return None

    def _commit(self, payload: bytes) -> Renew | Committed | None:
        commit = read_commit(payload)
        self._commit_lsn, self._end_lsn = commit.commit_lsn, commit.end_lsn
        self._end()
        if self.largest_frame_bytes > self._renew_frame_bytes:
            return Renew()
        return Committed() if 0 < self.break_at_lsn <= self._end_lsn else None

    def _end(self) -> None:
        if self._with_totals and self._first is not None and self._transaction.idx <= _MOST_IN_TOTAL:
            self._totals.append((self._first, self._records.count, self._transaction.idx))
        self._transaction.end()

    def _message(self, payload: memoryview, frame: memoryview) -> None:
        message = read_logical_message(payload)
        plans = self._emitted.get(message.prefix)
        if plans is None:
            self._transaction.logical_message(message)
        elif message.transactional:
            if not self._transaction.open:
                raise ProtocolError("a message outside of a transaction")
            self._records.emitted(plans, payload, message)
            self._transaction.logical_message(message)
        else:
            (sent,) = _sent_at(frame)
            self._transaction.begin_message(message.lsn, sent)
            self._first = self._records.count
            self._records.emitted(plans, payload, message)
            self._transaction.idx += 1
            self._end()
            self._commit_lsn, self._end_lsn = message.lsn - 1, message.lsn

    def _plan(self, oid: int) -> TablePlan:
        plan = self._plans.get(oid)
        if plan is None:
            raise ProtocolError(f"a row of relation {oid} before learn() was called for it")
        return plan

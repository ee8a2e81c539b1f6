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

Promises:

- With ``totals`` every change of a transaction that is in one chunk as a whole has the number of its operations
  (`Chunk.total`). For more of them to be, a commit is a reason to stop once half of the chunk's credit or changes are
  used.
- A row is rendered once (see spillway.change). Its position is the transaction's final LSN and ``commit_idx``, which
  counts row operations, a TRUNCATE (once, however many tables) and transactional logical messages, annotations
  included; the same at every replay, as is ``n``.
- A row of an action that no sink wants is passed over: it counts for ``commit_idx``, and not for ``n``. A TRUNCATE is
  always reported, one record per table.
- **Filters** (`filters`): what each of them says of a change is in ``Chunk.matched``. A row that nobody wants whatever
  it says, and that no filter whose sinks want the action lets through, is not rendered and takes no place; it counts
  for ``commit_idx`` and ``n``. An update that has left a filter whose sinks keep rows has right before it, or in its
  place where nobody wants the update itself, the delete of the old row (flags OLD and GONE, the same n), unless its key
  has changed: then there is one already. An existing row is passed over where no filter lets it through, if there is
  one; `page_rows` and `last_key` count it.
- An update that has changed the primary key is two records: the delete of the old key (flag OLD), if that is known, and
  right behind it the update (flag MOVED). One that has changed a group's key alone is one record, with that group's
  WAS.
- A logical message under one of the ``prefixes`` is a row (`emitted`).
- An unchanged TOAST column is taken from the old row where that was sent, else left out (flag WHOLE is missing);
  it is never null. A delete is always whole: under replica identity default or index it has the key's columns,
  and null in the others.
- A row that is too large (its frame or its body above ``max_message_bytes``) becomes a change that holds its key's
  columns alone. Of a frame that is too large only those values are copied. An existing row is too large if its insert
  would be: what COPY adds by escapes does not count.
- The values of a key that the old row does not carry, because they are not part of the replica identity, are taken as
  unchanged on update; a delete without its primary key has no key. `unkeyable` finds such tables beforehand.
- A partition published by its root (``publish_via_partition_root``) is logged with its own replica identity while the
  server's frames claim the root's. A root with identity full over a partition without it gives old rows that are null
  outside of the key and cannot be told from real ones: who asks the catalogue has to find that.
- A partition published under its own name has the identity of its root, but for TRUNCATE: that emptied the partition,
  not the table, and is reported under the partition's own name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Final

from spillway.change import ACTIONS, BODY_START, RECORD_START, Action
from spillway.chunk import (
    GONE,
    LEFT,
    LOW,
    MOVED,
    OLD,
    TOO_LARGE,
    TOTAL,
    WHOLE,
    WORD_BYTES,
    YES,
    Chunk,
    ChunkBuilder,
)
from spillway.errors import Finding
from spillway.pgoutput.emitted import NO_INFO, OVERHEAD_BYTES, content_value, relations
from spillway.pgoutput.filters import UNCHANGED, Filters, no_filters, said_of_row, said_of_update
from spillway.pgoutput.frames import Committed, Copy, Ended, Full, Keepalive, Renew, Stop
from spillway.pgoutput.messages import (
    LogicalMessage,
    ProtocolError,
    read_commit,
    read_logical_message,
    read_relation,
    read_truncate,
)
from spillway.pgoutput.plan import (
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
from spillway.pgoutput.transaction import Transaction

# Of the replication protocol: XLogData, whose header is wal_start, wal_end and the time; keepalive.
_XLOG_DATA, _KEEPALIVE = b"wk"
_XLOG_HEADER_BYTES: Final = 25
_keepalive = struct.Struct(">xQqB").unpack_from  # wal_end, time, reply requested

# Kinds of pgoutput's messages and, inside of a row's, of tuples.
_BEGIN, _COMMIT, _RELATION, _TRUNCATE, _MESSAGE = b"BCRTM"
_IGNORED = b"OYA"  # origin, type; stream abort, which PostgreSQL 18 may send though nothing is streamed
_NEW, _OLD = b"NO"  # the third, K, is an old row of which only the replica identity is there

# Codes of actions, as a chunk has them.
_INSERTED, _UPDATED, _DELETED, _READ, _TRUNCATED = range(len(ACTIONS))
_ROWS: Final = {ord("I"): _INSERTED, ord("U"): _UPDATED, ord("D"): _DELETED}

_row_head = struct.Struct(">xIB").unpack_from
_oid_at = struct.Struct(">xI").unpack_from
_ROW_START: Final = 6
_sent_at = struct.Struct(">17xq").unpack_from  # in the header of XLogData
_total = struct.Struct("=H")
_MOST_IN_TOTAL: Final = 0xFFFF

# A record has one byte for the place within a TRUNCATE. What counts is that the places do not fall.
_LAST_SUB: Final = 255

# No byte of text becomes more than six bytes of JSON.
_LARGEST_GROWTH: Final = 6


class _TooLargeError(Exception):
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


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
        self.last_key = b""  # the primary key's text behind the table's prefix, of the row of the page read last
        self.break_at_lsn = 0  # a commit that ends there or behind it is a reason to stop; 0: none is
        self._group_columns = group_columns
        self._groups = groups
        self._filters = filters
        self._filter_count = filter_count
        self._max_message_bytes = max_message_bytes
        self._frame_overhead_bytes = frame_overhead_bytes
        self._renew_frame_bytes = renew_frame_bytes
        # An annotation is small enough that every body has room for it.
        self._transaction = Transaction(database, max_message_bytes // 4, on_warning)
        self._plans: dict[int, TablePlan] = {}
        self._kept: memoryview | None = None  # the frame that the chunk had no credit for
        # The chunk that is being filled.
        self._builder = ChunkBuilder(groups)
        self._no_texts = (b"",) * (2 + 2 * groups)
        self._matched = bytearray()
        self._emitted = {
            prefix: tuple([TablePlan(one, NO_INFO, (None,) * groups, frozenset({"insert"})) for one in both])
            for prefix, both in relations(prefixes).items()
        }
        self._with_totals = totals
        self._totals: list[tuple[int, int, int]] = []  # first change of a transaction, the one behind it, the total
        self._first: int | None = 0  # change of the open transaction; None: the chunk does not have them all
        self._all_say_yes = bytes([YES]) * filter_count
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
        return self._builder.count

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
        taken = self._builder.take()
        meta = bytearray(taken.meta)
        for first, end, total in self._totals:
            for at in range(first * taken.stride, end * taken.stride, taken.stride):
                _total.pack_into(meta, at * WORD_BYTES + TOTAL, total)
        chunk = Chunk(
            taken.count, taken.data, bytes(meta), taken.keys, taken.tables, taken.groups, self._commit_lsn,
            self._end_lsn, self._truncates, bytes(self._matched), self._filter_count,
        )  # fmt: skip
        self._matched.clear()
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
        if self.used_bytes + needed_bytes > credit_bytes or self._builder.count >= max_changes:
            self._kept = memoryview(bytes(frame))
            return Full(needed_bytes)
        self.used_bytes += needed_bytes
        self.largest_frame_bytes = max(self.largest_frame_bytes, payload_bytes)
        return None

    def _line(self, plan: TablePlan, line: memoryview, credit_bytes: int, max_changes: int) -> Full | None:
        needed_bytes = 3 * len(line) + self._frame_overhead_bytes + plan.overhead_bytes
        full = self._covered(line, len(line), needed_bytes, credit_bytes, max_changes)
        if full is None:
            self._existing_row(plan, line)
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
            self._row(plan, action, payload)
            return None
        if kind == _MESSAGE:
            self._message(payload, frame)
            return None
        stop = self._other(kind, payload)
        if stop is None and kind == _COMMIT and self._with_totals:
            half = self.used_bytes >= credit_bytes // 2 or self._builder.count >= max_changes // 2
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
            self._first = self._builder.count
        elif kind == _COMMIT:
            return self._commit(bytes(payload))
        elif kind == _RELATION:
            relation = read_relation(bytes(payload))
            self._plans.pop(relation.oid, None)
            return relation
        elif kind == _TRUNCATE:
            self._truncate(bytes(payload))
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
            self._totals.append((self._first, self._builder.count, self._transaction.idx))
        self._transaction.end()

    def _message(self, payload: memoryview, frame: memoryview) -> None:
        message = read_logical_message(payload)
        plans = self._emitted.get(message.prefix)
        if plans is None:
            self._transaction.logical_message(message)
        elif message.transactional:
            if not self._transaction.open:
                raise ProtocolError("a message outside of a transaction")
            self._emit(plans, payload, message)
            self._transaction.logical_message(message)
        else:
            (sent,) = _sent_at(frame)
            self._transaction.begin_message(message.lsn, sent)
            self._first = self._builder.count
            self._emit(plans, payload, message)
            self._transaction.idx += 1
            self._end()
            self._commit_lsn, self._end_lsn = message.lsn - 1, message.lsn

    def _emit(self, plans: Sequence[TablePlan], payload: memoryview, message: LogicalMessage) -> None:
        """A logical message as a row."""
        plan, json_plan = plans
        row: Row = [message.prefix, None]
        n = self._transaction.number(b"")
        if len(payload) > self._max_message_bytes:
            self._key_alone(plan, _INSERTED, row, len(payload), n, self._all_say_yes)
            return
        row[1], is_json = content_value(bytes(message.content))
        plan = json_plan if is_json else plan
        try:
            self._limit(len(payload), row)
            body, tail, texts = self._render(plan, _INSERTED, row, b"null", False)
        except _TooLargeError as too_large:
            self._key_alone(plan, _INSERTED, row, too_large.size_bytes, n, self._all_say_yes)
        else:
            self._add(plan.name, _INSERTED, body, tail, texts, n, self._all_say_yes)

    def _truncate(self, payload: bytes) -> None:
        for place, oid in enumerate(read_truncate(payload)):
            plan = self._plan(oid)
            tail = self._transaction.tail(plan.tails[_TRUNCATED], b"null", b"[]", None)
            body = BODY_START + b"null" + tail
            n = self._transaction.number(b"")
            sub = min(place, _LAST_SUB)
            self._add(plan.own_name, _TRUNCATED, body, tail, self._no_texts, n, self._all_say_yes, sub=sub)
        self._truncates += 1
        self._transaction.idx += 1

    # Rows.

    def _row(self, plan: TablePlan, action: int, payload: memoryview) -> None:
        if not self._transaction.open:
            raise ProtocolError("a row outside of a transaction")
        if action in plan.wanted:
            if len(payload) > self._max_message_bytes:
                self._large_row(plan, action, payload)
            elif action == _UPDATED:
                self._update(plan, bytes(payload))
            else:
                self._insert_or_delete(plan, action, bytes(payload))
        self._transaction.idx += 1

    def _insert_or_delete(self, plan: TablePlan, action: int, payload: bytes) -> None:
        row, end, unchanged = plan.split(payload, _ROW_START)
        self._check(payload, end)
        said = self._said_of_row(plan, row, partial=_is_key(action, payload))
        n = self._number(plan, row)
        if not self._is_wanted(plan, action, said):
            return
        try:
            self._limit(len(payload), row)
            body, tail, texts = self._render(plan, action, row, b"null", unchanged)
        except _TooLargeError as too_large:
            self._large_alone(plan, action, memoryview(payload), too_large.size_bytes, n, said)
        else:
            self._add(plan.name, action, body, tail, texts, n, said, flags=0 if unchanged else WHOLE)

    def _update(self, plan: TablePlan, payload: bytes) -> None:
        mark = payload[_ROW_START - 1]
        old: Row | None = None
        if mark == _NEW:
            row, end, unchanged = plan.split(payload, _ROW_START)
        else:
            old, position, _ = plan.split(payload, _ROW_START)
            row, end, unchanged = plan.split(payload, _after_new(payload, position))
        self._check(payload, end)
        sent = row
        if unchanged and old is not None:
            row = filled(row, old)
            unchanged = any(value is UNCHANGED for value in row)
        said, of_old = self._said_of_update(plan, row, old, full=mark == _OLD)
        wanted = self._is_wanted(plan, _UPDATED, said)
        if not wanted:
            self._before_update(plan, old, row, mark == _OLD, plan.texts(*_primary(plan, row)), said, of_old)
            return
        changes = plan.columns(old, differing(old, row)) if old is not None and mark == _OLD else b"{}"
        try:
            self._limit(len(payload), sent, *([] if old is None else [old]))
            body, tail, texts = self._render(plan, _UPDATED, row, changes, unchanged)
        except _TooLargeError as too_large:
            self._large_update_alone(plan, memoryview(payload), too_large.size_bytes, said, of_old)
            return
        moved, n, texts = self._before_update(plan, old, row, mark == _OLD, texts, said, of_old)
        self._add(plan.name, _UPDATED, body, tail, texts, n, said, flags=moved if unchanged else moved | WHOLE)

    def _existing_row(self, plan: TablePlan, line: memoryview) -> None:
        most = self._max_message_bytes
        if len(line) > most:
            row, size_bytes = plan.split_line_key(line)
            if size_bytes > most:
                said = self._said_of_row(plan, plan.split_line_checked(line)) if plan.filters else self._all_say_yes
                if self._is_page_wanted(plan, row, said):
                    self._key_alone(plan, _READ, row, size_bytes, 0, said)
                return
        row, size_bytes = plan.split_line(bytes(line))
        said = self._said_of_row(plan, row)
        if not self._is_page_wanted(plan, row, said):
            return
        try:
            if size_bytes > most:
                raise _TooLargeError(size_bytes)
            self._limit(size_bytes, row)
            body, tail, texts = self._render(plan, _READ, row, b"null", False)
        except _TooLargeError as too_large:
            self._key_alone(plan, _READ, row, too_large.size_bytes, 0, said)
        else:
            self._add(plan.name, _READ, body, tail, texts, 0, said)

    # Filters.

    def _said_of_row(self, plan: TablePlan, row: Row, *, partial: bool = False) -> bytes:
        if not plan.filters:
            return self._all_say_yes
        return said_of_row(plan.filters, self._filter_count, row, partial=partial)

    def _said_of_update(self, plan: TablePlan, row: Row, old: Row | None, *, full: bool) -> tuple[bytes, bytes]:
        if not plan.filters:
            return self._all_say_yes, self._all_say_yes
        before = old if old is not None and full else plan.told(old, row)
        return said_of_update(plan.filters, self._filter_count, row, before, full=full)

    def _is_wanted(self, plan: TablePlan, action: int, said: bytes) -> bool:
        return action in plan.always or any(said[one.number] == YES for one in plan.filters_of[action])

    def _is_page_wanted(self, plan: TablePlan, row: Row, said: bytes) -> bool:
        """The same of an existing row, which is the last one."""
        self.last_key = plan.key_of(plan.primary(known(row))[0]) or b""
        return not plan.filters or any(said[one.number] == YES for one in plan.filters)

    # Rows that are too large.

    def _large_row(self, plan: TablePlan, action: int, payload: memoryview) -> None:
        """A frame that is too large."""
        said = of_old = self._all_say_yes
        if plan.filters:
            row, position = plan.split_checked(payload, _ROW_START)
            if action != _UPDATED:
                said = self._said_of_row(plan, row, partial=_is_key(action, payload))
            elif payload[_ROW_START - 1] == _NEW:
                said, of_old = self._said_of_update(plan, row, None, full=False)
            else:
                old = row
                row, _ = plan.split_checked(payload, _after_new(payload, position))
                full = payload[_ROW_START - 1] == _OLD
                said, of_old = self._said_of_update(plan, filled(row, old), old, full=full)
        if action == _UPDATED:
            self._large_update_alone(plan, payload, len(payload), said, of_old)
            return
        row, _ = plan.split_key(payload, _ROW_START)
        n = self._number(plan, row)
        if self._is_wanted(plan, action, said):
            self._key_alone(plan, action, row, len(payload), n, said)

    def _large_alone(
        self, plan: TablePlan, action: int, payload: memoryview, size_bytes: int, n: int, said: bytes
    ) -> None:
        row, _ = plan.split_key(payload, _ROW_START)
        self._key_alone(plan, action, row, size_bytes, n, said)

    def _large_update_alone(
        self, plan: TablePlan, payload: memoryview, size_bytes: int, said: bytes, of_old: bytes
    ) -> None:
        _, mark = _row_head(payload)
        row, position = plan.split_key(payload, _ROW_START)
        old = None
        if mark != _NEW:
            old = row
            row, _ = plan.split_key(payload, _after_new(payload, position))
            row = filled(row, old)
        texts = plan.texts(*_primary(plan, row))
        moved, n, texts = self._before_update(plan, old, row, mark == _OLD, texts, said, of_old)
        if self._is_wanted(plan, _UPDATED, said):
            self._key_alone(plan, _UPDATED, row, size_bytes, n, said, moved, texts)

    def _key_alone(
        self,
        plan: TablePlan,
        action: int,
        row: Row,
        size_bytes: int,
        n: int,
        said: bytes,
        moved: int = 0,
        texts: tuple[bytes, ...] = (),
    ) -> None:
        """Adds a row that is too large."""
        key_row = known(row)
        primary, pks = plan.primary(key_row)
        changes = b"{}" if action == _UPDATED else b"null"
        tail = self._transaction.tail(plan.tails[action], changes, pks, plan.key_of(primary))
        body = plan.key_body(row, tail)
        texts = texts or plan.texts(primary, key_row)
        self._add(plan.name, action, body, tail, texts, n, said, flags=moved | TOO_LARGE, too_large_bytes=size_bytes)

    def _check(self, payload: bytes, end: int) -> None:
        """The rows fill their frame."""
        if end != len(payload):
            raise ProtocolError(f"a row ends at byte {end} of a frame of {len(payload)}")

    def _limit(self, size_bytes: int, *rows: Row) -> None:
        """Rendering them is not known beforehand to exceed what a message may have."""
        if size_bytes * _LARGEST_GROWTH > self._max_message_bytes:
            size_bytes += sum(growth_bytes(row) for row in rows)
            if size_bytes > self._max_message_bytes:
                raise _TooLargeError(size_bytes)

    # Records.

    def _render(
        self, plan: TablePlan, action: int, row: Row, changes: bytes, unchanged: bool
    ) -> tuple[bytes, bytes, tuple[bytes, ...]]:
        """Body, its tail, and the texts of the keys. Nothing is added yet: the row may turn out to be too large."""
        key_row = known(row) if unchanged else row
        primary, pks = plan.primary(key_row)
        tail = self._transaction.tail(plan.tails[action], changes, pks, plan.key_of(primary))
        body = plan.partial_body(row, tail) if unchanged else plan.body(row, tail)
        if len(body) > self._max_message_bytes:
            raise _TooLargeError(len(body))
        return body, tail, plan.texts(primary, key_row)

    def _before_update(
        self,
        plan: TablePlan,
        old: Row | None,
        row: Row,
        full: bool,
        texts: tuple[bytes, ...],
        said: bytes,
        of_old: bytes,
    ) -> tuple[int, int, tuple[bytes, ...]]:
        """What an update has done to its keys: the flag, its n, and the texts with those before where they were others.
        Adds the delete of the old row, if somebody wants that and its key is known."""
        is_gone = any(one.leaves and said[one.number] == LEFT for one in plan.filters_of[_UPDATED])
        old_texts = texts
        if old is not None:
            key_row = old if full else before(old, known(row))
            old_texts = plan.texts(*_primary(plan, key_row))
        elif is_gone:
            old = key_row = plan.key_alone(row)
        else:
            return 0, self._transaction.number(texts[0]), texts
        moved = MOVED if old_texts[0] not in (b"", texts[0]) else 0
        n_of_old = n = self._transaction.number(old_texts[0] if moved else texts[0])
        if moved:
            n = self._transaction.number(texts[0])
        if old_texts[0] and (is_gone or (moved and self._is_wanted(plan, _UPDATED, said))):
            primary, pks = plan.primary(key_row)
            tail = self._transaction.tail(plan.tails[_DELETED], b"null", pks, plan.key_of(primary))
            flags = WHOLE | OLD if moved else WHOLE | OLD | GONE
            self._add(plan.name, _DELETED, plan.body(old, tail), tail, old_texts, n_of_old, of_old, flags=flags)
        pairs = [(now, b"" if then == now else then) for now, then in zip(texts[::2], old_texts[::2], strict=True)]
        return moved, n, tuple(chain.from_iterable(pairs))

    def _number(self, plan: TablePlan, row: Row) -> int:
        return self._transaction.number(plan.primary(known(row))[0])

    def _add(
        self,
        table: tuple[str, str],
        action: int,
        body: bytes,
        tail: bytes,
        texts: Sequence[bytes],
        n: int,
        said: bytes,
        *,
        flags: int = WHOLE,
        sub: int = 0,
        too_large_bytes: int = 0,
    ) -> None:
        """A record."""
        transaction = self._transaction
        self._builder.add(
            table,
            action,
            transaction.final_lsn,
            transaction.idx,
            transaction.commit_microseconds,
            body,
            len(body) - len(tail) - RECORD_START,
            texts,
            n=n,
            flags=flags,
            sub=sub,
            too_large_bytes=too_large_bytes,
            xid=transaction.xid,
        )
        self._matched += said

    def _plan(self, oid: int) -> TablePlan:
        plan = self._plans.get(oid)
        if plan is None:
            raise ProtocolError(f"a row of relation {oid} before learn() was called for it")
        return plan


def _is_key(action: int, payload: bytes | memoryview) -> bool:
    """The row of a delete is a key alone."""
    return action == _DELETED and payload[_ROW_START - 1] != _OLD


def _primary(plan: TablePlan, row: Row) -> tuple[bytes, Row]:
    """The text of the primary key, and the row with null for what is not known, as `TablePlan.texts` takes them."""
    key_row = known(row)
    return plan.primary(key_row)[0], key_row


def _after_new(payload: bytes | memoryview, position: int) -> int:
    if payload[position] != _NEW:
        raise ProtocolError("an update without a new row")
    return position + 1

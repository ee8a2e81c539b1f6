"""The rows of a transaction or a page become records of a chunk: bodies, keys, flags, and what filters say.

`Records` belongs to a decoder (spillway.pgoutput.decoder), which has it add one row after the other: those of the
stream, lines of COPY, logical messages that are wanted, and TRUNCATE. A row that is passed over leaves no record.

Promises:

- A row is rendered once (see spillway.change). Its position is the transaction's final LSN and ``commit_idx``, which
  counts row operations, a TRUNCATE (once, however many tables) and transactional logical messages, annotations
  included; the same at every replay, as is ``n``.
- A row of an action that no sink wants is passed over: it counts for ``commit_idx``, and not for ``n``. A TRUNCATE is
  always reported, one record per table.
- **Filters** (spillway.pgoutput.filters): what each of them says of a change is in ``Chunk.matched``. A row that nobody
  wants whatever it says, and that no filter whose sinks want the action lets through, is not rendered and takes no
  place; it counts for ``commit_idx`` and ``n``. An update that has left a filter whose sinks keep rows has right before
  it, or in its place where nobody wants the update itself, the delete of the old row (flags OLD and GONE, the same n),
  unless its key has changed: then there is one already. An existing row is passed over where no filter lets it through,
  if there is one; `Decoder.page_rows` and ``last_key`` count it.
- An update that has changed the primary key is two records: the delete of the old key (flag OLD), if that is known, and
  right behind it the update (flag MOVED). One that has changed a group's key alone is one record, with that group's
  WAS.
- A logical message under one of the ``prefixes`` is a row (spillway.pgoutput.emitted).
- An unchanged TOAST column is taken from the old row where that was sent, else left out (flag WHOLE is missing);
  it is never null. A delete is always whole: under replica identity default or index it has the key's columns,
  and null in the others.
- A row that is too large (its frame or its body above ``max_message_bytes``) becomes a change that holds its key's
  columns alone. Of a frame that is too large only those values are copied. An existing row is too large if its insert
  would be: what COPY adds by escapes does not count.
- The values of a key that the old row does not carry, because they are not part of the replica identity, are taken as
  unchanged on update; a delete without its primary key has no key. `unkeyable` finds such tables beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Final

from spillway.change import ACTIONS, BODY_START, RECORD_START
from spillway.chunk import (
    GONE,
    LEFT,
    MOVED,
    OLD,
    TOO_LARGE,
    WHOLE,
    YES,
    Chunk,
    ChunkBuilder,
)
from spillway.pgoutput.emitted import content_value
from spillway.pgoutput.filters import UNCHANGED, said_of_row, said_of_update
from spillway.pgoutput.messages import LogicalMessage, ProtocolError
from spillway.pgoutput.plan import (
    Row,
    TablePlan,
    before,
    differing,
    filled,
    growth_bytes,
    known,
)
from spillway.pgoutput.transaction import Transaction

# Codes of actions, as a chunk has them.
INSERTED, UPDATED, DELETED, READ, TRUNCATED = range(len(ACTIONS))

# Kinds of tuples inside of a row's message.
_NEW, _OLD, _KEY = b"NOK"  # of the third, an old row, only the replica identity is there

_ROW_START: Final = 6

# A record has one byte for the place within a TRUNCATE. What counts is that the places do not fall.
_LAST_SUB: Final = 255

# No byte of text becomes more than six bytes of JSON.
_LARGEST_GROWTH: Final = 6


class _TooLargeError(Exception):
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class Records:
    """Those of the chunk that is being filled, with ``groups`` sets of group columns, by ``filter_count`` filters."""

    def __init__(self, transaction: Transaction, groups: int, max_message_bytes: int, filter_count: int) -> None:
        self.filter_count = filter_count
        self.last_key = b""  # the primary key's text behind the table's prefix, of the row of the page read last
        self._transaction = transaction
        self._max_message_bytes = max_message_bytes
        self._builder = ChunkBuilder(groups)
        self._no_texts = (b"",) * (2 + 2 * groups)
        self._matched = bytearray()
        self._all_say_yes = bytes([YES]) * filter_count

    @property
    def count(self) -> int:
        return self._builder.count

    def take(self) -> tuple[Chunk, bytes]:
        """And what the filters have said (`Chunk.matched`). The next chunk begins."""
        matched = bytes(self._matched)
        self._matched.clear()
        return self._builder.take(), matched

    def truncate(self, plans: Sequence[TablePlan]) -> None:
        """One operation, however many tables."""
        for place, plan in enumerate(plans):
            tail = self._transaction.tail(plan.tails[TRUNCATED], b"null", b"[]", None)
            body = BODY_START + b"null" + tail
            n = self._transaction.number(b"")
            sub = min(place, _LAST_SUB)
            self._add(plan.own_name, TRUNCATED, body, tail, self._no_texts, n, self._all_say_yes, sub=sub)
        self._transaction.idx += 1

    def emitted(self, plans: Sequence[TablePlan], payload: memoryview, message: LogicalMessage) -> None:
        """A logical message as a row."""
        plan, json_plan = plans
        row: Row = [message.prefix, None]
        n = self._transaction.number(b"")
        if len(payload) > self._max_message_bytes:
            self._key_alone(plan, INSERTED, row, len(payload), n, self._all_say_yes)
            return
        row[1], is_json = content_value(bytes(message.content))
        plan = json_plan if is_json else plan
        try:
            self._limit(len(payload), row)
            body, tail, texts = self._render(plan, INSERTED, row, b"null", False)
        except _TooLargeError as too_large:
            self._key_alone(plan, INSERTED, row, too_large.size_bytes, n, self._all_say_yes)
        else:
            self._add(plan.name, INSERTED, body, tail, texts, n, self._all_say_yes)

    def row(self, plan: TablePlan, action: int, payload: memoryview) -> None:
        """One of the stream: pgoutput's message."""
        if not self._transaction.open:
            raise ProtocolError("a row outside of a transaction")
        if action in plan.wanted:
            if len(payload) > self._max_message_bytes:
                self._large_row(plan, action, payload)
            elif action == UPDATED:
                self._update(plan, bytes(payload))
            else:
                self._insert_or_delete(plan, action, bytes(payload))
        self._transaction.idx += 1

    def _insert_or_delete(self, plan: TablePlan, action: int, payload: bytes) -> None:
        row, end, unchanged = plan.split(payload, _ROW_START)
        self._check(payload, end)
        said = self._said_of_row(plan, row, partial=_is_key(plan, action, payload))
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
        mark = _mark(plan, payload)
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
        wanted = self._is_wanted(plan, UPDATED, said)
        if not wanted:
            self._before_update(plan, old, row, mark == _OLD, plan.texts(*_primary(plan, row)), said, of_old)
            return
        changes = plan.columns(old, differing(old, row)) if old is not None and mark == _OLD else b"{}"
        try:
            self._limit(len(payload), sent, *([] if old is None else [old]))
            body, tail, texts = self._render(plan, UPDATED, row, changes, unchanged)
        except _TooLargeError as too_large:
            self._large_update_alone(plan, memoryview(payload), too_large.size_bytes, said, of_old)
            return
        moved, n, texts = self._before_update(plan, old, row, mark == _OLD, texts, said, of_old)
        self._add(plan.name, UPDATED, body, tail, texts, n, said, flags=moved if unchanged else moved | WHOLE)

    def existing(self, plan: TablePlan, line: memoryview) -> None:
        """One of a page: a line of COPY."""
        most = self._max_message_bytes
        if len(line) > most:
            row, size_bytes = plan.split_line_key(line)
            if size_bytes > most:
                said = self._said_of_row(plan, plan.split_line_checked(line)) if plan.filters else self._all_say_yes
                if self._is_page_wanted(plan, row, said):
                    self._key_alone(plan, READ, row, size_bytes, 0, said)
                return
        row, size_bytes = plan.split_line(bytes(line))
        said = self._said_of_row(plan, row)
        if not self._is_page_wanted(plan, row, said):
            return
        try:
            if size_bytes > most:
                raise _TooLargeError(size_bytes)
            self._limit(size_bytes, row)
            body, tail, texts = self._render(plan, READ, row, b"null", False)
        except _TooLargeError as too_large:
            self._key_alone(plan, READ, row, too_large.size_bytes, 0, said)
        else:
            self._add(plan.name, READ, body, tail, texts, 0, said)

    # Filters.

    def _said_of_row(self, plan: TablePlan, row: Row, *, partial: bool = False) -> bytes:
        if not plan.filters:
            return self._all_say_yes
        return said_of_row(plan.filters, self.filter_count, row, partial=partial)

    def _said_of_update(self, plan: TablePlan, row: Row, old: Row | None, *, full: bool) -> tuple[bytes, bytes]:
        if not plan.filters:
            return self._all_say_yes, self._all_say_yes
        before = old if old is not None and full else plan.told(old, row)
        return said_of_update(plan.filters, self.filter_count, row, before, full=full)

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
            if action != UPDATED:
                said = self._said_of_row(plan, row, partial=_is_key(plan, action, payload))
            elif _mark(plan, payload) == _NEW:
                said, of_old = self._said_of_update(plan, row, None, full=False)
            else:
                old = row
                row, _ = plan.split_checked(payload, _after_new(payload, position))
                full = _mark(plan, payload) == _OLD
                said, of_old = self._said_of_update(plan, filled(row, old), old, full=full)
        if action == UPDATED:
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
        mark = _mark(plan, payload)
        row, position = plan.split_key(payload, _ROW_START)
        old = None
        if mark != _NEW:
            old = row
            row, _ = plan.split_key(payload, _after_new(payload, position))
            row = filled(row, old)
        texts = plan.texts(*_primary(plan, row))
        moved, n, texts = self._before_update(plan, old, row, mark == _OLD, texts, said, of_old)
        if self._is_wanted(plan, UPDATED, said):
            self._key_alone(plan, UPDATED, row, size_bytes, n, said, moved, texts)

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
        changes = b"{}" if action == UPDATED else b"null"
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
        is_gone = any(one.leaves and said[one.number] == LEFT for one in plan.filters_of[UPDATED])
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
        if old_texts[0] and (is_gone or (moved and self._is_wanted(plan, UPDATED, said))):
            primary, pks = plan.primary(key_row)
            tail = self._transaction.tail(plan.tails[DELETED], b"null", pks, plan.key_of(primary))
            flags = WHOLE | OLD if moved else WHOLE | OLD | GONE
            self._add(plan.name, DELETED, plan.body(old, tail), tail, old_texts, n_of_old, of_old, flags=flags)
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


def _mark(plan: TablePlan, payload: bytes | memoryview) -> int:
    """What kind of row comes first. By the root's identity it may be called whole where the partition's is a key."""
    mark = payload[_ROW_START - 1]
    return _KEY if mark == _OLD and plan.partial else mark


def _is_key(plan: TablePlan, action: int, payload: bytes | memoryview) -> bool:
    """The row of a delete is a key alone."""
    return action == DELETED and _mark(plan, payload) != _OLD


def _primary(plan: TablePlan, row: Row) -> tuple[bytes, Row]:
    """The text of the primary key, and the row with null for what is not known, as `TablePlan.texts` takes them."""
    key_row = known(row)
    return plan.primary(key_row)[0], key_row


def _after_new(payload: bytes | memoryview, position: int) -> int:
    if payload[position] != _NEW:
        raise ProtocolError("an update without a new row")
    return position + 1

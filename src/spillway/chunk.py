"""Chunks: the changes of one go at the socket, in columns; and what flow makes of them for a sink.

Flow works on chunks, so that nothing happens per message where nothing went wrong: no object, dict, task or lock.

- A `Chunk` is immutable: the rendered bodies back to back (``data``), the texts of the keys (``keys``), and one record
  of fixed size per change (``meta``). The decoder makes it, all sinks share it.
- A `Span` is one sink's part of a chunk: which of its changes the sink gets, ordered by which keys. It is the unit of
  the window and of the store: unresolved messages of a span lie in one row of the store.
- A `Batch` is what a sink is asked to take: pieces of spans. It is a sequence of messages for whoever must look at
  them one by one, and columns for whoever need not.
- A `Message` is one change as one sink gets it: a reference into a span, made when something looks at it.

**Records.** ``meta`` holds ``count`` records of ``WORDS + 2 * groups`` words of 64 bits in the machine's byte order (a
state file stays on one architecture)::

    LSN    commit_lsn                              (spillway.position)
    INDEX  commit_idx | record_bytes << 32         length of the row's JSON inside its body
    TIME   commit time, microseconds since the Unix epoch
    ENDS   where the body ends in data | where its key texts end in keys << 32
    KIND   bytes: action, n, flags, sub, table (16 bits), total (16 bits): operations of its transaction, as commit_idx
           counts; 0 if nobody asks, if the chunk has not all of them, or if they are above 65,535
    LARGE  too_large_bytes | xid << 32             the transaction's 32 bits of an id; 0 for a backfilled row
    HASH   of the primary key's text, 0 without one
    WAS    of the primary key's text before, if the change has moved the row, else 0
    ...    HASH and WAS of every configured set of group columns (`Keying`)

``keys`` holds, per record, as many texts as there are HASH and WAS words, each ended by a zero byte, empty for none;
no text of PostgreSQL holds a zero byte. A hash is `key_hash`: equal texts have equal hashes, and whoever must be sure
of the converse compares texts.

**Filters.** ``matched`` has ``filters`` bytes per change, one for each filter that the decoder was given: `NO`, `YES`,
or `LEFT` for an update whose new row does not match while the old one did, or is not known. It serves the router and is
not stored. A sink of state gets in place of such an update the delete of its old row, a record of its own right before
it (flags OLD and GONE; for an update that has changed its key, the delete of the old key).

**Shaped** chunks are made of a batch right before it is sent (`reshaped`), and live no longer than the attempt: their
bodies are whole messages, to which nothing is appended (``complete``; where a sink keeps rows, the body is the row),
and ``routes`` has by index what the sink's routing function said, checked by the sink's type.

**A change of the primary key** is two records: the delete of the old key (flag OLD), which only sinks of state take,
and the change itself (flag MOVED, WAS set).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final, overload
from zlib import crc32

from spillway.change import ACTIONS, BODY_START, RECORD_START, Action, Change, key_values

WORDS: Final = 8
LSN, INDEX, TIME, ENDS, KIND, LARGE, HASH, WAS = range(WORDS)
WORD_BYTES: Final = 8
LOW: Final = 0xFFFFFFFF
HASHED: Final = 1 << 32  # set in every hash, so that none is 0

# Bytes of the word KIND.
ACTION, N, FLAGS, SUB, TABLE = range(KIND * WORD_BYTES, KIND * WORD_BYTES + 5)
TOTAL: Final = TABLE + 2

WHOLE, OLD, MOVED, TOO_LARGE, GONE = 1, 2, 4, 8, 16  # flags
NO, YES, LEFT = range(3)  # what a filter says of a change

Route = Mapping[str, object]  # where a message goes: values by the sink's routing keys

# The credit that covers a change in memory beyond its body: at least so much; its record and key texts as they are,
# which grow with the groups, and what is made of them (hashes and ends as Python integers, a place in a line: some 170
# bytes). Once for the process; and once for each further sink.
CHANGE_OVERHEAD_BYTES = 512
CHANGE_OBJECTS_BYTES = 256
MESSAGE_OVERHEAD_BYTES = 128


class Keying:
    """By what a sink orders its messages; a number, since it is kept in the store.

    UNGROUPED: by nothing. STATE: by the primary key; a change of the key is two messages. EVENTS: by the primary key; a
    change of the key is one message, ordered under both. ``GROUPED + g``: as EVENTS, by the g-th set of group columns.
    """

    UNGROUPED, STATE, EVENTS, GROUPED = range(4)

    @staticmethod
    def hash_word(keying: int) -> int:
        """Which word of a record holds the hash; WAS is the next."""
        return HASH if keying < Keying.GROUPED else WORDS + 2 * (keying - Keying.GROUPED)


def key_hash(key: bytes) -> int:
    return crc32(key) | HASHED


class Chunk:
    """See the module. ``commit_lsn`` and ``end_lsn`` are those of the last commit that was read with it, 0 without one;
    ``truncates`` counts TRUNCATE statements."""

    __slots__ = ("_ends", "commit_lsn", "complete", "count", "data", "end_lsn", "filters", "groups", "holders", "keys",
                 "matched", "meta", "routes", "stride", "tables", "truncates", "words")  # fmt: skip

    def __init__(
        self,
        count: int,
        data: bytes,
        meta: bytes,
        keys: bytes,
        tables: tuple[tuple[str, str], ...],
        groups: int = 0,
        commit_lsn: int = 0,
        end_lsn: int = 0,
        truncates: int = 0,
        matched: bytes = b"",
        filters: int = 0,
    ) -> None:
        self.count = count
        self.data = data
        self.meta = meta
        self.keys = keys
        self.tables = tables
        self.groups = groups
        self.commit_lsn = commit_lsn
        self.end_lsn = end_lsn
        self.truncates = truncates
        self.stride = WORDS + 2 * groups  # in words
        self.words = memoryview(meta).cast("Q")
        self.matched = matched
        self.filters = filters
        self.complete = False
        self.routes: Sequence[Route | None] | None = None
        self.holders = 0  # owned by flow.budget: how many windows hold it
        self._ends: list[int] | None = None

    def column(self, word: int) -> list[int]:
        return self.words[word :: self.stride].tolist()

    def byte_column(self, at: int) -> bytes:
        """One byte per change: ACTION, N, FLAGS or SUB."""
        return self.meta[at :: self.stride * WORD_BYTES]

    @property
    def ends(self) -> list[int]:
        """Where each body ends in data."""
        if self._ends is None:
            self._ends = [word & LOW for word in self.column(ENDS)]
        return self._ends

    @property
    def cost(self) -> int:
        """The credit that covers it, in bytes."""
        columns = len(self.meta) + len(self.keys) + CHANGE_OBJECTS_BYTES * self.count
        return len(self.data) + max(columns, CHANGE_OVERHEAD_BYTES * self.count)

    def word(self, index: int, word: int) -> int:
        return self.words[index * self.stride + word]

    def byte(self, index: int, at: int) -> int:
        return self.meta[index * self.stride * WORD_BYTES + at]

    def table(self, index: int) -> tuple[str, str]:
        at = index * self.stride * WORD_BYTES + TABLE
        return self.tables[int.from_bytes(self.meta[at : at + 2], _BYTE_ORDER)]

    def total(self, index: int) -> int:
        """How many operations its transaction has; 0: that is not known."""
        at = index * self.stride * WORD_BYTES + TOTAL
        return int.from_bytes(self.meta[at : at + 2], _BYTE_ORDER)

    def body(self, index: int) -> bytes:
        start = self.word(index - 1, ENDS) & LOW if index else 0
        return self.data[start : self.word(index, ENDS) & LOW]

    def key_texts(self, index: int) -> list[bytes]:
        """As many as there are HASH and WAS words, in their order; empty for none."""
        start = self.word(index - 1, ENDS) >> 32 if index else 0
        return self.keys[start : (self.word(index, ENDS) >> 32) - 1].split(b"\0")

    def change(self, index: int) -> Change:
        schema, table = self.table(index)
        texts = self.key_texts(index)
        key = texts[0].decode() or None
        flags = self.byte(index, FLAGS)
        position = self.word(index, INDEX)
        return Change(
            commit_lsn=self.word(index, LSN),
            commit_idx=position & LOW,
            schema=schema,
            table=table,
            action=self.action(index),
            key=key,
            pks=key_values(schema, table, key) if key is not None else (),
            body=self.body(index),
            record_bytes=position >> 32,
            n=self.byte(index, N),
            whole=bool(flags & WHOLE),
            commit_time=self.word(index, TIME) / 1_000_000,
            was=texts[1].decode() or None,
            too_large_bytes=self.word(index, LARGE) & LOW,
        )

    def action(self, index: int) -> Action:
        return ACTIONS[self.byte(index, ACTION)]

    def placed(self, commit_lsn: int, first_idx: int) -> Chunk:
        """The same changes at another position: one commit LSN for all, and commit_idx from ``first_idx`` on. What the
        bodies say of their position stays."""
        meta = bytearray(self.meta)
        with memoryview(meta) as view, view.cast("Q") as words, view.cast("I") as halves:
            words[LSN :: self.stride] = array("Q", [commit_lsn]) * self.count
            halves[2 * INDEX + _LOW_HALF :: 2 * self.stride] = array("I", range(first_idx, first_idx + self.count))
        return Chunk(
            self.count, self.data, bytes(meta), self.keys, self.tables, self.groups, self.commit_lsn, self.end_lsn,
            self.truncates, self.matched, self.filters,
        )  # fmt: skip

    def route(self, index: int) -> Route:
        """What was said of this change; empty: nothing."""
        return (self.routes[index] if self.routes is not None else None) or {}

    def numbered(self, n: int) -> Chunk:
        """The same changes, each with this n."""
        meta = bytearray(self.meta)
        meta[N :: self.stride * WORD_BYTES] = bytes([n]) * self.count
        return Chunk(
            self.count, self.data, bytes(meta), self.keys, self.tables, self.groups, self.commit_lsn, self.end_lsn,
            self.truncates, self.matched, self.filters,
        )  # fmt: skip


_BYTE_ORDER: Final = "little" if memoryview(b"\1\0").cast("H")[0] == 1 else "big"
_LOW_HALF: Final = 0 if _BYTE_ORDER == "little" else 1  # of a word, in halves


class ChunkBuilder:
    """Makes a chunk change by change. The compiled decoder writes the same bytes by itself."""

    def __init__(self, groups: int = 0) -> None:
        self.groups = groups
        self._record = struct.Struct(f"=4Q4BHxx{3 + 2 * groups}Q").pack
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.size_bytes = 0
        self._bodies: list[bytes] = []
        self._records: list[bytes] = []
        self._keys: list[bytes] = []
        self._keys_bytes = 0
        self._tables: dict[tuple[str, str], int] = {}

    def add(
        self,
        table: tuple[str, str],
        action: int,
        commit_lsn: int,
        commit_idx: int,
        commit_microseconds: int,
        body: bytes,
        record_bytes: int,
        keys: Sequence[bytes],
        *,
        n: int = 1,
        flags: int = WHOLE,
        sub: int = 0,
        too_large_bytes: int = 0,
        xid: int = 0,
    ) -> None:
        """``keys``: the texts as `Chunk.key_texts` gives them, ``2 + 2 * groups`` of them."""
        self.count += 1
        self.size_bytes += len(body)
        self._bodies.append(body)
        texts = b"\0".join(keys)
        self._keys.append(texts)
        self._keys_bytes += len(texts) + 1
        number = self._tables.setdefault(table, len(self._tables))
        self._records.append(
            self._record(
                commit_lsn,
                commit_idx | record_bytes << 32,
                commit_microseconds,
                self.size_bytes | self._keys_bytes << 32,
                action,
                n,
                flags,
                sub,
                number,
                min(too_large_bytes, LOW) | xid << 32,
                *[crc32(key) | HASHED if key else 0 for key in keys],
            )
        )

    def take(self, commit_lsn: int = 0, end_lsn: int = 0, truncates: int = 0) -> Chunk:
        """What was added so far; the builder begins anew."""
        self._keys.append(b"")  # so that the last text is ended too
        chunk = Chunk(
            self.count, b"".join(self._bodies), b"".join(self._records), b"\0".join(self._keys), tuple(self._tables),
            self.groups, commit_lsn, end_lsn, truncates,
        )  # fmt: skip
        self.clear()
        return chunk


def chunk_of(changes: Sequence[Change]) -> Chunk:
    """A chunk of single changes, without group keys."""
    builder = ChunkBuilder()
    for change in changes:
        flags = (WHOLE if change.whole else 0) | (MOVED if change.was else 0)
        builder.add(
            (change.schema, change.table),
            ACTIONS.index(change.action),
            change.commit_lsn,
            change.commit_idx,
            round(change.commit_time * 1_000_000),
            change.body,
            change.record_bytes,
            ((change.key or "").encode(), (change.was or "").encode()),
            n=change.n,
            flags=flags | (TOO_LARGE if change.too_large_bytes else 0),
            too_large_bytes=change.too_large_bytes,
        )
    return builder.take()


NOT_STORED = 0
PENDING = -1  # on its way to the store

PLACE_BITS = 16
MOST_PLACES = 1 << PLACE_BITS  # in a span


class Span:
    """One sink's messages of one chunk, in position order, numbered by their *place*.

    The rows of a span in the store are numbered ``base | number``: ``base`` is 0 until it is there; ``numbers`` says
    which number each place has, -1 for what was resolved before; None: its own. What is resolved is remembered here.
    """

    __slots__ = ("_ends", "_hashes", "_moved", "arrived", "base", "chunk", "credit", "durable", "first_lsn", "held",
                 "indices", "keying", "left", "numbers", "resolved", "size", "windowed")  # fmt: skip

    def __init__(
        self,
        chunk: Chunk,
        keying: int,
        indices: Sequence[int] | None = None,
        base: int = NOT_STORED,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.chunk = chunk
        self.keying = keying
        self.indices = range(chunk.count) if indices is None else indices  # by place: which change of the chunk
        self.size = len(self.indices)
        self.base = base
        self.numbers = numbers
        self.first_lsn = chunk.word(self.indices[0], LSN) if self.size else 0
        self.left = self.size  # messages that are not resolved
        self.resolved = bytearray(self.size)  # by place
        self.held = 0  # messages in memory: waiting or in flight
        self.durable = False  # what is left of it is in the store
        self.arrived = 0.0  # monotonic seconds at which the flow took it
        self.windowed = False  # the window pool covers its chunk
        self.credit = 0  # bytes taken from the delivery pool for it
        self._ends: list[int] | None = None
        self._hashes: list[int] | None = None
        self._moved: dict[int, int] | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def whole_chunk(self) -> bool:
        return self.size == self.chunk.count

    @property
    def plain(self) -> bool:
        """Every change is a whole row that has not changed its key and is not too large."""
        return self.byte_column(FLAGS, 0, self.size).count(WHOLE) == self.size

    @property
    def hashes(self) -> list[int]:
        """By place: the hash of the key, 0 for none."""
        if self._hashes is None:
            if self.keying == Keying.UNGROUPED:
                self._hashes = [0] * self.size
            else:
                self._hashes = self.column(Keying.hash_word(self.keying), 0, self.size)
        return self._hashes

    @property
    def moved(self) -> dict[int, int]:
        """The hash of the other key of those messages that have two, by place."""
        if self._moved is None:
            word = Keying.hash_word(self.keying) + 1
            column = self.column(word, 0, self.size) if self.keying >= Keying.EVENTS else ()
            self._moved = {place: was for place, was in enumerate(column) if was} if any(column) else {}
        return self._moved

    @property
    def ends(self) -> list[int]:
        """By place: the bytes of the bodies up to and including this one."""
        if self._ends is None:
            ends = self.chunk.ends
            if not self.whole_chunk:
                ends = list(accumulate(ends[i] - (ends[i - 1] if i else 0) for i in self.indices))
            self._ends = ends
        return self._ends

    def column(self, word: int, start: int, stop: int) -> list[int]:
        """A word of the records of these places, without a look at the others."""
        words, stride = self.chunk.words, self.chunk.stride
        if self.whole_chunk:
            return words[start * stride + word : stop * stride : stride].tolist()
        return [words[index * stride + word] for index in self.indices[start:stop]]

    def byte_column(self, at: int, start: int, stop: int) -> bytes:
        """One byte of the records of these places: ACTION, N, FLAGS or SUB."""
        meta, stride = self.chunk.meta, self.chunk.stride * WORD_BYTES
        if self.whole_chunk:
            return meta[start * stride + at : stop * stride : stride]
        return bytes([meta[index * stride + at] for index in self.indices[start:stop]])

    def bytes_between(self, start: int, stop: int) -> int:
        if start >= stop:
            return 0
        return self.ends[stop - 1] - (self.ends[start - 1] if start else 0)

    def row(self, place: int) -> int:
        """The row's number in the store; NOT_STORED or PENDING while it has none."""
        if self.base <= 0:
            return self.base
        return self.base | (place if self.numbers is None else self.numbers[place])

    def position(self, place: int) -> tuple[int, int, int]:
        index = self.indices[place]
        sub = self.chunk.byte(index, SUB)
        if self.keying == Keying.STATE and self.chunk.byte(index, FLAGS) & MOVED:
            sub = 1
        return (self.chunk.word(index, LSN), self.chunk.word(index, INDEX) & LOW, sub)

    def keys(self, place: int) -> tuple[str, ...]:
        """What the message is ordered by: none, one, or two for an event that changes its key, the old one first."""
        if self.keying == Keying.UNGROUPED:
            return ()
        at = Keying.hash_word(self.keying) - HASH
        key, was = self.chunk.key_texts(self.indices[place])[at : at + 2]
        if not key:
            return ()
        if was and self.keying >= Keying.EVENTS:
            return (was.decode(), key.decode())
        return (key.decode(),)

    def leave(self) -> None:
        """Nothing of it is in memory any more; what is known of its progress stays."""
        self.chunk = _EMPTY
        self.indices = range(0)
        self._ends = self._hashes = self._moved = None


_EMPTY = Chunk(0, b"", b"", b"", ())


# What stands behind the record of such an update, and of a delete.
_UPDATED: Final = b',"changes":{},"action":"update"'
_DELETED: Final = b',"changes":null,"action":"delete"'


class Message:
    """One change as one sink gets it: the message at ``place`` of its span."""

    __slots__ = ("_change", "_keys", "attempts", "place", "span", "superseded")

    def __init__(self, span: Span, place: int) -> None:
        self.span = span
        self.place = place
        self.attempts = 0  # failed ones, of the head of a lane
        self.superseded: list[Message] | None = None  # earlier messages of its key that are resolved with it
        self._change: Change | None = None
        self._keys: tuple[str, ...] | None = None

    @property
    def change(self) -> Change:
        if self._change is None:
            self._change = self.span.chunk.change(self.span.indices[self.place])
        return self._change

    @property
    def action(self) -> Action:
        return self.span.chunk.action(self.span.indices[self.place])

    @property
    def whole(self) -> bool:
        return bool(self.span.chunk.byte(self.span.indices[self.place], FLAGS) & WHOLE)

    @property
    def keys(self) -> tuple[str, ...]:
        if self._keys is None:
            self._keys = self.span.keys(self.place)
        return self._keys

    @property
    def row(self) -> int:
        return self.span.row(self.place)

    @property
    def position(self) -> tuple[int, int, int]:
        return self.span.position(self.place)

    @property
    def body(self) -> bytes:
        """As `Change.body`, without the rest of it."""
        return self.span.chunk.body(self.span.indices[self.place])

    @property
    def record(self) -> bytes:
        """The row alone, as `Change.record`."""
        chunk, index = self.span.chunk, self.span.indices[self.place]
        start = (chunk.word(index - 1, ENDS) & LOW if index else 0) + RECORD_START
        return chunk.data[start : start + (chunk.word(index, INDEX) >> 32)]

    @property
    def body_bytes(self) -> int:
        return self.span.bytes_between(self.place, self.place + 1)

    def with_body(self, body: bytes, record_bytes: int | None = None, *, whole: bool = False) -> Message:
        """The same change with another body, alone in a span, without a row."""
        chunk, index = self.span.chunk, self.span.indices[self.place]
        stride = chunk.stride * WORD_BYTES
        keys = b"\0".join(chunk.key_texts(index)) + b"\0"
        record = bytearray(chunk.meta[index * stride : (index + 1) * stride])
        words = memoryview(record).cast("Q")
        words[ENDS] = len(body) | len(keys) << 32
        if record_bytes is not None:
            words[INDEX] = words[INDEX] & LOW | record_bytes << 32
        if whole:
            record[FLAGS] |= WHOLE
        return Message(Span(Chunk(1, body, bytes(record), keys, chunk.tables, chunk.groups), self.span.keying), 0)

    def with_record(self, record: Sequence[bytes]) -> Message:
        """The same change with another row, a whole one. It comes in parts, which are copied once: it may be large."""
        change = self.change
        body = b"".join([BODY_START, *record, change.body[RECORD_START + change.record_bytes :]])
        return self.with_body(body, sum(map(len, record)), whole=True)

    def as_delete(self) -> Message:
        """In place of an update that came without its TOAST columns: the delete of its row; where the update moves a
        row by itself, of the row under its old key."""
        change, keying = self.change, self.span.keying
        tail = change.body[RECORD_START + change.record_bytes :]
        if tail.startswith(_UPDATED):
            tail = _DELETED + tail[len(_UPDATED) :]
        body = BODY_START + change.record + tail
        key = change.was if change.was is not None and keying != Keying.STATE else change.key
        delete = replace(change, action="delete", key=key, was=None, body=body, whole=True)
        return Message(Span(chunk_of([delete]), keying), 0)


def reshaped(messages: Sequence[Message], bodies: Sequence[bytes], routes: Sequence[Route | None] | None) -> Batch:
    """These changes, in this order, with these whole messages as bodies. One may stand there several times. All are of
    one sink, and so of one keying."""
    groups = max(message.span.chunk.groups for message in messages)  # they differ where the sinks have changed since
    record_bytes = (WORDS + 2 * groups) * WORD_BYTES
    tables: dict[tuple[str, str], int] = {}
    records: list[bytes] = []
    keys: list[bytes] = []
    ends = keys_end = 0
    for message, body in zip(messages, bodies, strict=True):
        chunk, index = message.span.chunk, message.span.indices[message.place]
        stride = chunk.stride * WORD_BYTES
        record = bytearray(chunk.meta[index * stride : (index + 1) * stride].ljust(record_bytes, b"\0"))
        texts = b"\0".join(chunk.key_texts(index)) + b"\0" * (1 + 2 * (groups - chunk.groups))
        ends += len(body)
        keys_end += len(texts)
        with memoryview(record) as view, view.cast("Q") as words:
            words[ENDS] = ends | keys_end << 32
            words[INDEX] &= LOW
        record[TABLE : TABLE + 2] = tables.setdefault(chunk.table(index), len(tables)).to_bytes(2, _BYTE_ORDER)
        records.append(bytes(record))
        keys.append(texts)
    shaped = Chunk(len(records), b"".join(bodies), b"".join(records), b"".join(keys), tuple(tables), groups)
    shaped.complete = True
    shaped.routes = routes
    return Batch([(Span(shaped, messages[0].span.keying), 0, shaped.count)])


Piece = tuple[Span, int, int]  # the messages of a span from one place up to, not including, another


class Batch(Sequence[Message]):
    """Messages on their way to a sink, in the order in which they are to be sent."""

    __slots__ = ("_messages", "_size", "pieces")

    def __init__(self, pieces: Sequence[Piece], messages: list[Message] | None = None) -> None:
        """``messages``: the same, if somebody has looked at them already."""
        self.pieces = pieces
        self._size = sum([stop - start for _, start, stop in pieces])
        self._messages = messages

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Batch:
        return cls([(m.span, m.place, m.place + 1) for m in messages], list(messages))

    @property
    def messages(self) -> list[Message]:
        """One object each. They are kept: what is noted on one is found again."""
        if self._messages is None:
            self._messages = [Message(span, place) for span, start, stop in self.pieces for place in range(start, stop)]
        return self._messages

    @property
    def plain(self) -> bool:
        """Every change is a whole row that has not changed its key and is not too large."""
        return all(
            span.byte_column(FLAGS, start, stop).count(WHOLE) == stop - start for span, start, stop in self.pieces
        )

    @property
    def complete(self) -> bool:
        """Its bodies are whole messages (see the module)."""
        return self.pieces[0][0].chunk.complete

    @property
    def body_bytes(self) -> int:
        return sum([span.bytes_between(start, stop) for span, start, stop in self.pieces])

    @property
    def superseded(self) -> list[Message]:
        """What is resolved along with these."""
        return [one for m in self._messages or () for one in m.superseded or ()]

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    @overload
    def __getitem__(self, at: int) -> Message: ...
    @overload
    def __getitem__(self, at: slice) -> Batch: ...
    def __getitem__(self, at: int | slice) -> Message | Batch:
        return Batch.of(self.messages[at]) if isinstance(at, slice) else self.messages[at]

"""Compaction: of what waits for a sink that keeps rows, only the newest image of each key stays.

A message is *superseded* when a later one of its key waits that is the whole row or its delete (`spillway.store.base`:
it goes to the same document, which is what the configuration sees to). One pass goes over the queue from its end to
its beginning, and remembers of each key the row of the newest image; what is earlier is removed. Then it goes over the
lanes: what a later image in the queue supersedes is removed, and of a lane all that stands before its newest image. The
newest image stays where it is, so nothing overtakes anything.

**In steps.** A step looks at about `STEP_MESSAGES` messages, or `CHUNK` lanes, in one transaction. Between steps the
flow goes on: what was put meanwhile is newer than all that the pass looks at, and is left to the next one; what was
resolved meanwhile was so after all that is earlier of its key; so what is remembered stays true. Each span is looked at
once in a pass, so that no row supersedes itself: what a step had found that was rolled back (the disk was full) is left
to the next pass, too. Rows in ``spare`` are in flight: they supersede, and are not removed.

**Never past a barrier.** A TRUNCATE and an event that moves a row from one key to another stand for more than one row:
what is newer than they are supersedes nothing that is older. In lanes that have such an event, or a dead letter that
was revived (its row number says nothing of its age), nothing is superseded.

**Bounded.** At most ``most_keys`` keys are remembered. If there are more, the pass begins again with the keys in two
parts, by their hashes, one part after the other; and so on, up to `MOST_PARTS`.

**Space.** A span of which all is gone is removed. One that has lost more than half of its bytes or messages is written
anew with what is left; its column ``kept`` says which numbers that has. So each message is written again once or twice
at most, on average.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import and_
from typing import Final, cast

from spillway.change import ACTIONS
from spillway.chunk import (
    ACTION,
    FLAGS,
    HASH,
    PLACE_BITS,
    TOO_LARGE,
    WHOLE,
    WORD_BYTES,
    Keying,
    Span,
)
from spillway.impl import gather
from spillway.store.apply import Transaction, by_span
from spillway.store.queue import Taken, find_spans
from spillway.store.rows import (
    CHUNK,
    SPAN_COLUMNS,
    SinkRow,
    SpanRow,
    as_json,
    mark,
    read_blobs,
    rows_of,
    runs,
    span_rows,
)

SPANS_AT_ONCE: Final = 64
STEP_MESSAGES: Final = 40_000
LAST: Final = (1 << 63) - 1
KEY_BYTES: Final = 200  # of memory, for each key that is remembered
ENTRY_BYTES: Final = 140  # of these, beside its text
MOST_PARTS: Final = 256  # by a byte of the hash
RECORD_BYTES: Final = 100  # of a message in a span, beside its body
PARKED_AT_ONCE: Final = 20_000  # keys whose lanes are looked at in one step

_DELETE, _TRUNCATE, _READ = ACTIONS.index("delete"), ACTIONS.index("truncate"), ACTIONS.index("read")
_IMAGE = f"instr('13579BDF', substr(hex(substr(w.meta, {FLAGS + 1}, 1)), 2)) > 0"

_OF_ROWS = f"w.keying IN ({Keying.STATE}, {Keying.EVENTS})"
# Whether flags are those of an image, which supersedes; and where updates without their TOAST columns count, too.
_IMAGES = bytes([int(flags & (WHOLE | TOO_LARGE) == WHOLE) for flags in range(256)])
_PARTIAL_IMAGES = bytes([int(not flags & TOO_LARGE) for flags in range(256)])
_ONE = ord("1")
_NOT = bytes([1, 0]) + bytes(254)
_HASH_BYTE = HASH * WORD_BYTES + (0 if sys.byteorder == "little" else WORD_BYTES - 1)  # the lowest

SELECT_BEFORE = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT {SPAN_COLUMNS} FROM span WHERE sink = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3)"""
# Of these keys what stands in their lanes below a row, where no message stands in them that may wait for earlier ones.
SELECT_BELOW = f"""
    SELECT json_group_array(l.id) FROM json_each(?2) j CROSS JOIN lane l
        ON l.sink = ?1 AND l.key = CAST(json_extract(j.value, '$[0]') AS TEXT)
        AND l.id < json_extract(j.value, '$[1]')
    CROSS JOIN message w ON w.id = l.id AND {_OF_ROWS}
    WHERE NOT EXISTS (SELECT 1 FROM lane o WHERE o.sink = ?1 AND o.key = l.key AND o.waits)"""
# The newest images of the next lanes.
SELECT_IMAGES = f"""
    SELECT json_group_array(json_array(key, newest)) FROM (
        SELECT l.key AS key, max(l.id) FILTER (WHERE {_OF_ROWS} AND {_IMAGE}) AS newest
        FROM lane l CROSS JOIN message w ON w.id = l.id
        WHERE l.sink = ?1 AND l.key > ?2 GROUP BY l.key ORDER BY l.key LIMIT ?3)"""
UPDATE_DATA = "UPDATE span_data SET keys = ?, meta = ?, data = ? WHERE id = ?"
UPDATE_KEPT = "UPDATE span SET messages = messages_left, bytes = bytes_left, done = '0', kept = ? WHERE id = ?"


@dataclass(slots=True)
class Compaction:
    """One pass. ``partial_images``: an update without its TOAST columns is a whole row, too (it is read anew)."""

    most_keys: int  # of usual length; a longer one counts for several
    partial_images: bool
    parts: int = 1  # a power of two
    part: int = 0
    end: int = LAST  # spans from here on were put after the first step
    below: int = LAST  # spans below this are still to be looked at; 0: all have been
    lane: str | None = None  # behind this key lanes are still to be looked at; None: not there yet
    to_compare: list[tuple[bytes, int]] | None = None  # of ``newest`` what was not held against the lanes yet
    done: bool = False
    reads: int = 0  # rows of backfills that were removed
    spared: bool = False  # something was not removed only because it is in flight
    newest: dict[bytes, int] = field(default_factory=dict)  # by key: the row of its newest image
    text_bytes: int = 0  # of the keys in it
    keys: int = 0  # that were found in the parts before this one

    @property
    def is_crowded(self) -> bool:
        """More is remembered than may be."""
        return len(self.newest) * ENTRY_BYTES + self.text_bytes > self.most_keys * KEY_BYTES

    def begin_again(self) -> None:
        self.parts *= 2
        self.keys = 0
        self._from_the_end(0)

    def next_part(self) -> None:
        self.keys += len(self.newest)
        if self.part + 1 < self.parts:
            self._from_the_end(self.part + 1)
        else:
            self.done = True

    def forget(self, keys: Iterable[bytes] | None = None) -> None:
        """The images of these keys, or all."""
        if keys is None:
            self.newest.clear()
            self.text_bytes = 0
        else:
            self.text_bytes -= sum([len(key) for key in keys if self.newest.pop(key, None) is not None])

    def _from_the_end(self, part: int) -> None:
        self.part = part
        self.below, self.lane, self.to_compare = self.end, None, None
        self.forget()


def parts_for(keys: int, most_keys: int) -> int:
    """In how many parts to begin with so many keys."""
    return min(MOST_PARTS, 1 << (max(0, keys - 1) // max(1, most_keys)).bit_length())


class Compacting(Transaction):
    """A transaction that can do this, too."""

    def compact(self, name: str, work: Compaction, spare: frozenset[int]) -> int:
        """One step. Returns how many messages it has removed; ``work.done`` says whether it was the last."""
        if work.below:
            return self._compact_spans(name, work, by_span(spare))
        return self._compact_lanes(self._sink(name), work, spare)

    def _compact_spans(self, name: str, work: Compaction, spare: dict[int, int]) -> int:
        sink = self._committed[name].id
        found = span_rows(self._db.execute(SELECT_BEFORE, (sink, work.below, SPANS_AT_ONCE)))
        if work.end == LAST and found:
            work.end = found[0].id + 1
        looked_at = 0
        taken: list[Taken] = []
        for row in found:
            if looked_at and looked_at + row.messages > STEP_MESSAGES:
                break
            looked_at += row.messages
            work.below = row.id
            (blobs,) = read_blobs(self._db, ("keys", "meta"), [row.id])
            if blobs is not None:
                bits = _superseded(row, blobs, work, spare.get(row.id, 0))
                if bits:
                    taken.append(Taken(row, row.done, bits))
            if work.is_crowded:
                if work.parts == MOST_PARTS:  # so many keys cannot be known at once; the oldest keep what they have
                    work.below = 0
                else:
                    work.begin_again()
                break
        else:
            if len(found) < SPANS_AT_ONCE:
                work.below = 0
        return self._take_out(self._sink(name), taken) if taken else 0

    def _take_out(self, sink: SinkRow, taken: list[Taken]) -> int:
        removed = self._queue.take(sink, taken)
        for row in find_spans(self._db, sink.id, [one.row.id for one in taken]):
            stored = row.body_bytes + RECORD_BYTES * row.messages
            if 2 * (row.bytes_left + RECORD_BYTES * row.messages_left) < stored:
                _write_anew(self._db, row)
        return removed

    def _compact_lanes(self, sink: SinkRow, work: Compaction, spare: frozenset[int]) -> int:
        if not sink.counters.parked_keys:
            work.next_part()
            return 0
        if work.to_compare is None:
            work.to_compare = list(work.newest.items())
        if work.to_compare:
            some, work.to_compare = work.to_compare[:PARKED_AT_ONCE], work.to_compare[PARKED_AT_ONCE:]
            return self._remove_below(sink, some, work, spare)
        given = (sink.id, work.lane or "", CHUNK)
        images = cast("list[tuple[str, int | None]]", rows_of(self._db.execute(SELECT_IMAGES, given)))
        newest = [(key.encode(), row) for key, row in images if row is not None]
        removed = self._remove_below(sink, newest, work, spare)
        if len(images) < CHUNK:
            work.next_part()
        else:
            work.lane = images[-1][0]
        return removed

    def _remove_below(
        self, sink: SinkRow, newest: list[tuple[bytes, int]], work: Compaction, spare: frozenset[int]
    ) -> int:
        removed = 0
        for start in range(0, len(newest), CHUNK):
            pairs = [(key.decode(), row) for key, row in newest[start : start + CHUNK]]
            rows = cast("list[int]", rows_of(self._db.execute(SELECT_BELOW, (sink.id, as_json(pairs)))))
            work.spared = work.spared or not spare.isdisjoint(rows)
            rows = [row for row in rows if row not in spare]
            removed += self._lanes.remove(sink, rows, self._clock.monotonic())
        return removed


def _superseded(row: SpanRow, blobs: list[bytes], work: Compaction, spare: int) -> int:
    """The numbers of a span, as bits, that a later image supersedes; remembers its own images."""
    keys_blob, meta = blobs
    span = row.span(keys_blob, meta, b"")
    mark(span, row.places(row.done))
    chunk = span.chunk
    actions = chunk.byte_column(ACTION)
    if _TRUNCATE in actions:
        work.forget()
        return 0
    if span.keying not in (Keying.STATE, Keying.EVENTS):  # from when the sink was another: no order of rows
        return 0
    width = 2 + 2 * chunk.groups
    texts = keys_blob.split(b"\0")[:-1]  # the last one is ended, too
    keys, others = texts[::width], texts[1::width]
    if span.keying != Keying.EVENTS or not any(others):
        others = []
    images = chunk.byte_column(FLAGS).translate(_PARTIAL_IMAGES if work.partial_images else _IMAGES)
    if images.count(1) == len(images) and not others and all(keys):
        bits = _of_images(row, span, keys, work)
    else:
        bits = _of_any(row, span, (keys, others, images), work)
    work.spared = work.spared or bits & spare > 0
    bits &= ~spare
    if bits and _READ in actions:
        work.reads += _reads(actions, row.places(bits))
    return bits


def _of_images(row: SpanRow, span: Span, keys: list[bytes], work: Compaction) -> int:
    """Where every message is an image: nothing is done message by message, but for those that are the newest."""
    numbers: Sequence[int] = span.numbers or range(span.size)
    chosen = _chosen(span, work)
    if chosen is None:
        mine = row.kept & ~row.done
        last = dict(zip(keys, numbers, strict=True))
    else:
        numbers = list(compress(numbers, chosen))
        mine = _bits(numbers)
        last = dict(zip(compress(keys, chosen), numbers, strict=True))
    fresh = last.keys() - work.newest.keys()
    base = row.id << PLACE_BITS
    work.newest.update({key: base | last[key] for key in fresh})
    work.text_bytes += sum(map(len, fresh))
    return mine & ~_bits([last[key] for key in fresh])


def _of_any(row: SpanRow, span: Span, columns: tuple[list[bytes], list[bytes], bytes], work: Compaction) -> int:
    keys, others, images = columns
    actions = span.chunk.byte_column(ACTION)
    newest = work.newest
    chosen = _chosen(span, work)
    base, numbers = row.id << PLACE_BITS, span.numbers or range(span.size)
    found: list[int] = []
    for place in range(span.size - 1, -1, -1):
        key = keys[place]
        if others and others[place] and not span.resolved[place]:  # it belongs to all parts
            work.forget((key, others[place]))
        elif not key or (chosen is not None and not chosen[place]):
            continue
        elif key in newest:
            found.append(numbers[place])
        elif images[place] or actions[place] == _DELETE:
            newest[key] = base | numbers[place]
            work.text_bytes += len(key)
    return _bits(found)


def _chosen(span: Span, work: Compaction) -> bytes | None:
    """By place: whether it is left and of this part; None: all are."""
    left = bytes(span.resolved.translate(_NOT)) if span.left < span.size else None
    if work.parts == 1:
        return left
    mask = work.parts - 1
    its_part = bytes([byte & mask == work.part for byte in range(256)])
    part = span.byte_column(_HASH_BYTE, 0, span.size).translate(its_part)
    return part if left is None else bytes(map(and_, part, left))


def _bits(numbers: Sequence[int]) -> int:
    if not numbers:
        return 0
    digits = bytearray(b"0" * (max(numbers) + 1))
    for number in numbers:
        digits[-1 - number] = _ONE
    return int(digits, 2)


def _reads(actions: bytes, places: int) -> int:
    return sum([actions.count(_READ, start, stop) for start, stop in runs(places)])


def _write_anew(db: sqlite3.Connection, row: SpanRow) -> None:
    """A span with what is left of it."""
    ((keys, meta, data),) = cast("list[list[bytes]]", read_blobs(db, ("keys", "meta", "data"), [row.id]))
    span = row.span(keys, meta, data)
    gone = row.places(row.done)
    left = [place for start, stop in runs(row.places(row.kept) & ~gone) for place in range(start, stop)]
    hash_word = HASH if row.groups == 0 else Keying.hash_word(Keying.GROUPED)
    chunk = gather(span.chunk, left, hash_word)
    db.execute(UPDATE_DATA, (chunk.keys, chunk.meta, chunk.data, row.id))
    db.execute(UPDATE_KEPT, (f"{row.kept & ~row.done:x}", row.id))

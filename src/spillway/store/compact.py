"""Compaction: of what waits for a sink that keeps rows, only the newest image of each key stays.

A message is *superseded* when a later one of its key waits that is the whole row or its delete (`spillway.store.base`:
it goes to the same document, which is what the configuration sees to). One pass goes over the queue from its end to
its beginning, and remembers of each key the row of the newest image; what is earlier is removed. Then it goes over the
lanes: what a later image in the queue supersedes is removed, and of a lane all that stands before its newest image. The
newest image stays where it is, so nothing overtakes anything.

**In steps.** A step looks at about `STEP_MESSAGES` messages, or `CHUNK` lanes, in one transaction. Between steps the
flow goes on: what was put meanwhile is newer than all that is still to be looked at, and what was resolved meanwhile
was so after all that is earlier of its key; so what is remembered stays true. Each span is looked at once in a pass,
so that no row supersedes itself: what a step had found that was rolled back (the disk was full) is left to the next
pass. Rows in ``spare`` are in flight: they supersede, and are not removed.

**Never past a barrier.** A TRUNCATE and an event that moves a row from one key to another stand for more than one row:
what is newer than they are supersedes nothing that is older. In lanes that have such an event, or a dead letter that
was revived (its row number says nothing of its age), nothing is superseded.

**Bounded.** At most ``most_keys`` keys are remembered. If there are more, the pass begins again with the keys in two
parts, by their hashes, one part after the other; and so on.

**Space.** A span of which all is gone is removed. One that has lost more than half of its bytes or messages is written
anew with what is left; its column ``kept`` says which numbers that has. So each message is written again once or twice
at most, on average.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from spillway.change import ACTIONS
from spillway.chunk import (
    ACTION,
    FLAGS,
    HASH,
    LOW,
    PLACE_BITS,
    TOO_LARGE,
    WHOLE,
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
RECORD_BYTES: Final = 100  # of a message in a span, beside its body
PARKED_AT_ONCE: Final = 20_000  # keys whose lanes are looked at in one step

_DELETE, _TRUNCATE, _READ = ACTIONS.index("delete"), ACTIONS.index("truncate"), ACTIONS.index("read")
_IMAGE = f"instr('13579BDF', substr(hex(substr(w.meta, {FLAGS + 1}, 1)), 2)) > 0"

_OF_ROWS = f"w.keying IN ({Keying.STATE}, {Keying.EVENTS})"
# Whether flags are those of an image, which supersedes; and where updates without their TOAST columns count, too.
_IMAGES = bytes([int(flags & (WHOLE | TOO_LARGE) == WHOLE) for flags in range(256)])
_PARTIAL_IMAGES = bytes([int(not flags & TOO_LARGE) for flags in range(256)])
_ONE = ord("1")

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

    most_keys: int
    partial_images: bool
    parts: int = 1
    part: int = 0
    below: int = LAST  # spans below this are still to be looked at; 0: all have been
    lane: str | None = None  # behind this key lanes are still to be looked at; None: not there yet
    to_compare: list[tuple[bytes, int]] | None = None  # of ``newest`` what was not held against the lanes yet
    done: bool = False
    reads: int = 0  # rows of backfills that were removed
    newest: dict[bytes, int] = field(default_factory=dict)  # by key: the row of its newest image

    def begin_again(self) -> None:
        self.parts *= 2
        self._from_the_end(0)

    def next_part(self) -> None:
        if self.part + 1 < self.parts:
            self._from_the_end(self.part + 1)
        else:
            self.done = True

    def _from_the_end(self, part: int) -> None:
        self.part = part
        self.below, self.lane, self.to_compare = LAST, None, None
        self.newest.clear()


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
            if len(work.newest) > work.most_keys:
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
        now = self._clock.monotonic()
        if not sink.counters.parked_keys:
            work.next_part()
            return 0
        if work.to_compare is None:
            work.to_compare = list(work.newest.items())
        if work.to_compare:
            some, work.to_compare = work.to_compare[:PARKED_AT_ONCE], work.to_compare[PARKED_AT_ONCE:]
            return self._remove_below(sink, some, spare, now)
        given = (sink.id, work.lane or "", CHUNK)
        images = cast("list[tuple[str, int | None]]", rows_of(self._db.execute(SELECT_IMAGES, given)))
        newest = [(key.encode(), row) for key, row in images if row is not None]
        removed = self._remove_below(sink, newest, spare, now)
        if len(images) < CHUNK:
            work.next_part()
        else:
            work.lane = images[-1][0]
        return removed

    def _remove_below(self, sink: SinkRow, newest: list[tuple[bytes, int]], spare: frozenset[int], now: float) -> int:
        removed = 0
        for start in range(0, len(newest), CHUNK):
            pairs = [(key.decode(), row) for key, row in newest[start : start + CHUNK]]
            rows = cast("list[int]", rows_of(self._db.execute(SELECT_BELOW, (sink.id, as_json(pairs)))))
            removed += self._lanes.remove(sink, [row for row in rows if row not in spare], now)
        return removed


def _superseded(row: SpanRow, blobs: list[bytes], work: Compaction, spare: int) -> int:
    """The numbers of a span, as bits, that a later image supersedes; remembers its own images."""
    keys_blob, meta = blobs
    span = row.span(keys_blob, meta, b"")
    mark(span, row.places(row.done))
    chunk = span.chunk
    actions = chunk.byte_column(ACTION)
    if _TRUNCATE in actions:
        work.newest.clear()
        return 0
    if span.keying not in (Keying.STATE, Keying.EVENTS):  # from when the sink was another: no order of rows
        return 0
    width = 2 + 2 * chunk.groups
    texts = keys_blob.split(b"\0")[:-1]  # the last one is ended, too
    keys, others = texts[::width], texts[1::width]
    moves = span.keying == Keying.EVENTS and any(others)
    images = chunk.byte_column(FLAGS).translate(_PARTIAL_IMAGES if work.partial_images else _IMAGES)
    plain = images.count(1) == len(images) and not moves and work.parts == 1 and all(keys)
    bits = _of_images(row, span, keys, work) if plain else _of_any(row, span, (keys, others, images), moves, work)
    bits &= ~spare
    if bits and _READ in actions:
        work.reads += _reads(actions, row.places(bits))
    return bits


def _of_images(row: SpanRow, span: Span, keys: list[bytes], work: Compaction) -> int:
    """Where every message is an image: nothing is done message by message, but for those that are the newest."""
    newest = work.newest
    numbers: Sequence[int] = span.numbers or range(span.size)
    if span.left == span.size:
        last = dict(zip(keys, numbers, strict=True))
    else:
        gone = span.resolved
        last = {key: number for key, number, is_gone in zip(keys, numbers, gone, strict=True) if not is_gone}
    fresh = last.keys() - newest.keys()
    base = row.id << PLACE_BITS
    newest.update({key: base | last[key] for key in fresh})
    return row.kept & ~row.done & ~_bits([last[key] for key in fresh])


def _of_any(
    row: SpanRow, span: Span, columns: tuple[list[bytes], list[bytes], bytes], moves: bool, work: Compaction
) -> int:
    keys, others, images = columns
    actions = span.chunk.byte_column(ACTION)
    newest = work.newest
    base, numbers = row.id << PLACE_BITS, span.numbers or range(span.size)
    found: list[int] = []
    for place in _to_look_at(span, others if moves else None, work):
        key = keys[place]
        if not key:
            continue
        if moves and others[place]:
            newest.pop(key, None)
            newest.pop(others[place], None)
        elif key in newest:
            found.append(numbers[place])
        elif images[place] or actions[place] == _DELETE:
            newest[key] = base | numbers[place]
    return _bits(found)


def _to_look_at(span: Span, others: list[bytes] | None, work: Compaction) -> Iterable[int]:
    """The places of what is left and belongs to this part, the last first. What moves a row belongs to all parts."""
    places: Iterable[int] = range(span.size - 1, -1, -1)
    if span.left < span.size:
        gone = span.resolved
        places = [place for place in places if not gone[place]]
    if work.parts > 1:
        words = span.column(HASH, 0, span.size)
        parts, part = work.parts, work.part
        places = [p for p in places if (words[p] & LOW) % parts == part or (others is not None and others[p])]
    return places


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

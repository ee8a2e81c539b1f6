"""Compaction: of what waits for a sink that keeps rows, only the newest image of each key stays.

A message is *superseded* when a later one of its key waits that is the whole row or its delete (`spillway.store.base`:
it goes to the same document, which is what the configuration sees to). One pass goes over the queue from its end to
its beginning, and remembers of each key the row of the newest image; what is earlier is removed. Then it goes over the
lanes: what a later image in the queue supersedes is removed, and of a lane all that stands before its newest image.

**In steps.** A step looks at `SPANS_AT_ONCE` spans, or `CHUNK` lanes, in one transaction. Between steps the flow goes
on: what was put meanwhile is newer than all that is still to be looked at, so what is remembered stays true. A step
that is done again (the disk was full) does no more than once: a row never supersedes itself. Rows in ``spare`` are in
memory, perhaps in flight: they supersede, and are not removed.

**Never past a barrier.** A TRUNCATE and an event that moves a row from one key to another stand for more than one row:
what is newer than they are supersedes nothing that is older.

**Bounded.** At most ``most_keys`` keys are remembered. If there are more, the pass begins again with the keys in two
parts, by their hashes, one part after the other; and so on.

**Space.** A span of which all is gone is removed. Of one that has lost more than half of its bytes the bodies of what
is gone are cut out; its records keep their places, 80 bytes each, because rows are numbered by them.
"""

from __future__ import annotations

import sqlite3
from array import array
from dataclasses import dataclass, field
from typing import Final, cast

from spillway.change import ACTIONS
from spillway.chunk import ACTION, ENDS, FLAGS, HASH, LOW, PLACE_BITS, TOO_LARGE, WHOLE, WORDS, Keying, Span
from spillway.store.apply import Transaction, by_span
from spillway.store.queue import Taken, find_spans
from spillway.store.rows import (
    CHUNK,
    SPAN_COLUMNS,
    SinkRow,
    SpanRow,
    as_json,
    mark,
    ones,
    read_blobs,
    rows_of,
    runs,
    span_rows,
)

SPANS_AT_ONCE: Final = 32
LAST: Final = (1 << 63) - 1
KEY_BYTES: Final = 160  # of memory, for each key that is remembered

_DELETE: Final = ACTIONS.index("delete")
_TRUNCATE: Final = ACTIONS.index("truncate")
_IMAGE = f"instr('13579BDF', substr(hex(substr(w.meta, {FLAGS + 1}, 1)), 2)) > 0"

SELECT_BEFORE = f"""
    SELECT json_group_array(json_array({SPAN_COLUMNS})) FROM (
        SELECT {SPAN_COLUMNS} FROM span WHERE sink = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3)"""
# Of these keys what stands in their lanes below a row, where no message with two keys stands in them.
SELECT_BELOW = """
    SELECT json_group_array(l.id) FROM json_each(?2) j CROSS JOIN lane l
        ON l.sink = ?1 AND l.key = CAST(json_extract(j.value, '$[0]') AS TEXT)
        AND l.id < json_extract(j.value, '$[1]')
    WHERE NOT EXISTS (SELECT 1 FROM lane o WHERE o.sink = ?1 AND o.key = l.key AND o.other IS NOT NULL)"""
# The newest images of the next lanes that have more than one message.
SELECT_IMAGES = f"""
    SELECT json_group_array(json_array(key, newest)) FROM (
        SELECT l.key AS key, max(l.id) FILTER (WHERE {_IMAGE}) AS newest FROM lane l CROSS JOIN message w ON w.id = l.id
        WHERE l.sink = ?1 AND l.key > ?2 GROUP BY l.key ORDER BY l.key LIMIT ?3)"""
UPDATE_DATA = "UPDATE span_data SET meta = ?, data = ? WHERE id = ?"
UPDATE_BYTES = "UPDATE span SET bytes = bytes_left WHERE id = ?"


@dataclass(slots=True)
class Compaction:
    """One pass. ``partial_images``: an update without its TOAST columns is a whole row, too (it is read anew)."""

    most_keys: int
    partial_images: bool
    parts: int = 1
    part: int = 0
    below: int = LAST  # spans below this are still to be looked at; 0: all have been
    lane: str | None = None  # behind this key lanes are still to be looked at; None: not there yet
    done: bool = False
    removed: int = 0
    newest: dict[bytes, int] = field(default_factory=dict)  # by key: the row of its newest image

    def _again(self) -> None:
        self.parts *= 2
        self._from_the_end(0)

    def _from_the_end(self, part: int) -> None:
        self.part = part
        self.below, self.lane = LAST, None
        self.newest.clear()


class Compacting(Transaction):
    """A transaction that can do this, too."""

    def compact(self, name: str, work: Compaction, spare: frozenset[int]) -> int:
        """One step. Returns how many messages it has removed; ``work.done`` says whether it was the last."""
        sink = self._sink(name)
        if work.below:
            removed = self._compact_spans(sink, work, by_span(spare))
        else:
            removed = self._compact_lanes(sink, work, spare)
        work.removed += removed
        return removed

    def _compact_spans(self, sink: SinkRow, work: Compaction, spare: dict[int, int]) -> int:
        found = span_rows(self._db.execute(SELECT_BEFORE, (sink.id, work.below, SPANS_AT_ONCE)))
        blobs = read_blobs(self._db, ("keys", "meta"), [row.id for row in found])
        taken: list[Taken] = []
        for row, one in zip(found, blobs, strict=True):
            if one is not None:
                span = row.span(one[0], one[1], b"")
                mark(span, row.done)
                bits = _superseded(span, row.id, work) & ~spare.get(row.id, 0)
                if bits:
                    taken.append(Taken(row, row.done, bits))
            if len(work.newest) > work.most_keys:
                work._again()
                return self._take(sink, taken)
        work.below = found[-1].id if len(found) == SPANS_AT_ONCE else 0
        return self._take(sink, taken)

    def _take(self, sink: SinkRow, taken: list[Taken]) -> int:
        if not taken:
            return 0
        removed = self._queue.take(sink, taken)
        for row in find_spans(self._db, sink.id, [one.row.id for one in taken]):
            if 2 * row.bytes_left < row.body_bytes:
                _cut_out(self._db, row)
        return removed

    def _compact_lanes(self, sink: SinkRow, work: Compaction, spare: frozenset[int]) -> int:
        now = self._clock.monotonic()
        if not sink.counters.parked_keys:
            self._next_part(work)
            return 0
        if work.lane is None:
            work.lane = ""
            return self._remove_below(sink, list(work.newest.items()), spare, now)
        given = (sink.id, work.lane, CHUNK)
        images = cast("list[tuple[str, int | None]]", rows_of(self._db.execute(SELECT_IMAGES, given)))
        newest = [(key.encode(), row) for key, row in images if row is not None]
        removed = self._remove_below(sink, newest, spare, now)
        if len(images) < CHUNK:
            self._next_part(work)
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

    def _next_part(self, work: Compaction) -> None:
        if work.part + 1 < work.parts:
            work._from_the_end(work.part + 1)
        else:
            work.done = True


def _superseded(span: Span, number: int, work: Compaction) -> int:
    """The places of a span, as bits, that a later image supersedes; remembers its own images."""
    chunk, base = span.chunk, number << PLACE_BITS
    width = 2 + 2 * chunk.groups
    at = Keying.hash_word(span.keying) - HASH
    texts = chunk.keys.split(b"\0")
    keys, others = texts[at::width], texts[at + 1 :: width]
    actions, flags = chunk.byte_column(ACTION), chunk.byte_column(FLAGS)
    if _TRUNCATE in actions:
        work.newest.clear()
        return 0
    hashes = [word & LOW for word in chunk.column(Keying.hash_word(span.keying))] if work.parts > 1 else None
    bits = 0
    gone = span.resolved
    newest = work.newest
    for place in range(span.size - 1, -1, -1):
        key = keys[place]
        if not key or gone[place]:
            continue
        if others[place] and span.keying >= Keying.EVENTS:  # whichever part they are in
            newest.pop(key, None)
            newest.pop(others[place], None)
            continue
        if hashes is not None and hashes[place] % work.parts != work.part:
            continue
        known = newest.get(key, -1)
        if known > base | place:
            bits |= 1 << place
        elif actions[place] == _DELETE or (
            not flags[place] & TOO_LARGE and (work.partial_images or flags[place] & WHOLE)
        ):
            newest[key] = base | place
    return bits


def _cut_out(db: sqlite3.Connection, row: SpanRow) -> None:
    """The bodies of what is gone."""
    ((meta, data),) = cast("list[list[bytes]]", read_blobs(db, ("meta", "data"), [row.id]))
    changed = bytearray(meta)
    left = ones(0, row.messages) & ~row.done
    stride = WORDS + 2 * row.groups
    with memoryview(changed) as view, view.cast("Q") as words:
        before = words[ENDS::stride].tolist()
        ends = [word & LOW for word in before]
        kept: list[bytes] = []
        new: list[int] = []
        total = 0
        for start, stop in runs(left):
            new += [total] * (start - len(new))
            first = ends[start - 1] if start else 0
            new += [total + end - first for end in ends[start:stop]]
            kept.append(data[first : ends[stop - 1]])
            total += len(kept[-1])
        new += [total] * (row.messages - len(new))
        words[ENDS::stride] = array("Q", [word & ~LOW | end for word, end in zip(before, new, strict=True)])
    db.execute(UPDATE_DATA, (bytes(changed), b"".join(kept), row.id))
    db.execute(UPDATE_BYTES, (row.id,))

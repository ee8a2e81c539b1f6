"""What a store must do, in dicts and lists: an independent reading of `spillway.store.base`, slow and plain.

Everything that can be derived is derived anew each time: which keys are parked (those of held rows), the heads, which
heads may be sent. Kept are the rows, whether each is held, and what failed attempts said.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from spillway.chunk import Chunk, Message, Span
from spillway.store.base import BackfillDocument, Counters, Gap, Park, Select, Write

_FOREVER = float("-inf")


@dataclass
class Record:
    row: int
    position: tuple[int, int, int]
    keys: tuple[str, ...]  # what it stands under: a private key if it has none
    message_keys: tuple[str, ...]
    table: tuple[str, str]
    body: bytes
    commit_time: float
    chunk: Chunk
    index: int
    keying: int
    held: bool = False
    revived: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> Record:
        return copy.copy(self)


@dataclass
class Said:
    """Of a parked key: of which head, and what."""

    row: int
    attempts: int
    reason: str
    waits: bool


@dataclass
class Letter:
    record: Record
    attempts: int
    reason: str


@dataclass
class Model:
    """One sink."""

    next_span: int = 1
    ended_kept: int = 100
    last_span: int = 0  # of which anything was stored
    position: tuple[int, int, int] | None = None
    paused: bool | None = None
    gap: Gap | None = None
    rows: dict[int, Record] = field(default_factory=dict)
    dead: dict[int, Letter] = field(default_factory=dict)
    said: dict[str, Said] = field(default_factory=dict)
    backfills: dict[str, bytes] = field(default_factory=dict)  # in the order of first writing
    ended: list[str] = field(default_factory=list)  # of these, in the order in which they ended
    due_at: dict[int, float] = field(default_factory=dict)  # row of a head of all its lanes -> when

    def copy(self) -> Model:
        return copy.deepcopy(self)

    # -- what is so -------------------------------------------------------------------------------------------------
    def of_key(self, key: str) -> list[Record]:
        return [self.rows[row] for row in sorted(self.rows) if key in self.rows[row].keys]

    def lane(self, key: str) -> list[Record]:
        return [record for record in self.of_key(key) if record.held]

    def parked_keys(self) -> set[str]:
        return {key for record in self.rows.values() if record.held for key in record.keys}

    def queue(self) -> list[Record]:
        return [self.rows[row] for row in sorted(self.rows) if not self.rows[row].held]

    def first(self, record: Record) -> bool:
        """Of everything that waits under each of its keys."""
        return all(self.of_key(key)[0] is record for key in record.keys)

    def head(self, record: Record) -> bool:
        """Of all its lanes."""
        return record.held and all(self.lane(key)[0] is record for key in record.keys)

    def due(self, now: float, read_up_to: int, *, regardless: bool = False) -> dict[int, float]:
        """The row of each, with its time."""
        found = {}
        for row, at in self.due_at.items():
            unread = any(read_up_to < other.row <= row for other in self.queue())
            waits = self.said[min(self.rows[row].keys)].waits
            if (regardless or at <= now) and not (waits and unread):
                found[row] = at
        return found

    def counters(self) -> Counters:
        return Counters(
            messages=len(self.rows),
            bytes=sum(len(r.body) for r in self.rows.values()),
            queued=len(self.queue()),
            parked_keys=len(self.parked_keys()),
            dead_letters=len(self.dead),
        )

    # -- what happens -----------------------------------------------------------------------------------------------
    def write(self, write: Write, now: float) -> list[list[int]]:
        """Returns the row of each place of what was put; 0 for none."""
        placed: dict[int, list[int]] = {}
        for span in write.put:
            placed[id(span)] = self._put(span)

        def row(message: Message) -> int:
            return _row(placed, message.span, message.place)

        if write.position is not None:
            self.position = tuple(write.position)
        self._remove(
            {_row(placed, span, place) for span, start, stop in write.resolved for place in range(start, stop)}, now,
            held=False,
        )  # fmt: skip
        self._remove({row(message) for message in write.resolved_held}, now, held=True)
        for message in write.superseded_by:
            (key,) = message.keys
            self._remove({r.row for r in self.lane(key) if r.row < row(message)}, now)
        self._park([(row(park.message), park) for park in write.park], now)
        for message in write.hold:
            if row(message) in self.rows:
                self.rows[row(message)].held = True
        self._look(now)
        self._bury([(row(bury.message), bury) for bury in write.bury], now)
        self._revive(write)
        for row in write.unbury:
            self.dead.pop(row, None)
        self._look(now)
        if write.drop_table_below is not None:
            schema, table, below = write.drop_table_below
            dropped = [r for r in self.rows.values() if r.table == (schema, table) and r.position < tuple(below)]
            self._remove({r.row for r in dropped}, now)
        self.paused = self.paused if write.paused is None else write.paused
        self.gap = None if write.clear_gap else write.gap or self.gap
        if write.backfill is not None:
            self._backfill(write.backfill)
        return [placed[id(span)] for span in write.put]

    def running(self) -> dict[str, bytes]:
        return {its_id: document for its_id, document in self.backfills.items() if its_id not in self.ended}

    def _backfill(self, written: BackfillDocument) -> None:
        if written.id in self.ended and (written.forgotten or not written.ended):
            self.ended.remove(written.id)
        if written.forgotten:
            self.backfills.pop(written.id, None)
            return
        self.backfills[written.id] = written.document
        if written.ended and written.id not in self.ended:
            self.ended.append(written.id)
        if len(self.ended) > self.ended_kept:
            del self.backfills[self.ended.pop(0)]

    def retry(self, select: Select, now: float) -> None:
        for row in self.due_at:
            keys = self.rows[row].keys
            if select.all:
                self.due_at[row] = _FOREVER
            elif select.key in keys or select.reason == self.said[min(keys)].reason:
                self.due_at[row] = now

    def discarded(self, rows: set[int], now: float) -> None:
        self._remove(rows, now)

    def selected(self, select: Select) -> set[int]:
        if select.all:
            return set(self.rows)
        if select.key is not None:
            return {r.row for r in self.of_key(select.key)}
        keys = {key for key in self.parked_keys() if self.said[key].reason == select.reason}
        return {r.row for key in keys for r in self.lane(key)}

    def restarted(self) -> None:
        self.next_span = self.last_span + 1
        self.due_at = dict.fromkeys(self.due_at, _FOREVER)

    def _put(self, span: Span) -> list[int]:
        base, self.next_span = self.next_span << 16, self.next_span + 1
        rows = []
        count = 0
        for place in range(span.size):
            if span.resolved[place]:
                rows.append(0)
            else:
                rows.append(base + count)
                self._append(base + count, Message(span, place))
                count += 1
        return rows

    def _append(self, row: int, message: Message) -> Record:
        change, span = message.change, message.span
        self.last_span = row >> 16
        keys = message.keys or (f"{change.schema}.{change.table}:\\#{row}",)
        record = self.rows[row] = Record(
            row, message.position, keys, message.keys, (change.schema, change.table), change.body, change.commit_time,
            span.chunk, span.indices[message.place], span.keying,
        )  # fmt: skip
        return record

    def _park(self, parks: list[tuple[int, Park]], now: float) -> None:
        there = {row: park for row, park in parks if row in self.rows}
        for row in there:
            self.rows[row].held = True
        self._look(now)
        for row, park in there.items():
            record = self.rows[row]
            if self.head(record):
                for key in record.keys:
                    said = self.said[key]
                    self.said[key] = Said(row, said.attempts + park.counts_attempt, park.reason, waits=False)
                self.due_at[row] = now + park.due_seconds

    def _bury(self, buries: list[tuple[int, Park]], now: float) -> None:
        for row, bury in buries:
            record = self.rows.pop(row, None)
            if record is not None:
                said = self.said.get(record.keys[0])
                before = said.attempts if said is not None and said.row == row else 0
                self.dead[row] = Letter(record, before + bury.counts_attempt, bury.reason)
        self._look(now)

    def _revive(self, write: Write) -> None:
        revived = [message for number, message in write.revive if self.dead.pop(number, None) is not None]
        if revived:
            base, self.next_span = self.next_span << 16, self.next_span + 1
            for row, message in enumerate(revived, base):
                record = self._append(row, message)
                record.held = record.revived = True

    def _remove(self, rows: set[int], now: float, held: bool | None = None) -> None:
        for row in rows:
            if row in self.rows and held in (None, self.rows[row].held):
                del self.rows[row]
        self._look(now)

    def _look(self, now: float) -> None:
        """New heads begin anew; those of all their lanes are due now."""
        said = {}
        for key in self.parked_keys():
            head = self.lane(key)[0]
            known = self.said.get(key)
            fresh = Said(head.row, 0, "", waits=head.revived or len(head.keys) == 2)
            said[key] = known if known is not None and known.row == head.row else fresh
        self.said = said
        heads = [self.lane(key)[0] for key in said]
        self.due_at = {r.row: self.due_at.get(r.row, now) for r in heads if self.head(r)}


def _row(placed: dict[int, list[int]], span: Span, place: int) -> int:
    return placed[id(span)][place] if id(span) in placed else span.row(place)

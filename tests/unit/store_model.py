"""What a store must do, in dicts and lists: an independent reading of `spillway.store.base`, slow and plain.

Everything that can be derived is derived anew each time: which keys are parked (those of held rows), the heads, which
heads may be sent. Kept are the rows, whether each is held, and what failed attempts said.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from spillway.change import Change, Message
from spillway.store.base import Counters, Gap, Select, Write

_FOREVER = float("-inf")


@dataclass
class Record:
    row: int
    position: tuple[int, int, int]
    keys: tuple[str, ...]  # what it stands under: a private key if it has none
    change: Change
    message_keys: tuple[str, ...]
    held: bool = False

    @property
    def bytes(self) -> int:
        return len(self.change.body)


@dataclass
class Letter:
    record: Record
    attempts: int
    reason: str


@dataclass
class Model:
    """One sink."""

    next_row: int = 1
    position: tuple[int, int, int] | None = None
    paused: bool | None = None
    gap: Gap | None = None
    rows: dict[int, Record] = field(default_factory=dict)
    dead: dict[int, Letter] = field(default_factory=dict)
    said: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # key -> head row, attempts, reason
    due_at: dict[int, float] = field(default_factory=dict)  # row of a head that may be sent -> when

    def copy(self) -> Model:
        return copy.deepcopy(self, {id(r.change): r.change for r in self.rows.values()})

    # -- what is so -------------------------------------------------------------------------------------------------
    def of_key(self, key: str) -> list[Record]:
        return [self.rows[row] for row in sorted(self.rows) if key in self.rows[row].keys]

    def parked_keys(self) -> set[str]:
        return {key for record in self.rows.values() if record.held for key in record.keys}

    def head(self, key: str) -> Record:
        return next(record for record in self.of_key(key) if record.held)

    def queue(self) -> list[Record]:
        return [self.rows[row] for row in sorted(self.rows) if not self.rows[row].held]

    def sendable(self, record: Record) -> bool:
        """The first of everything that waits under each of its keys."""
        return all(self.of_key(key)[0] is record for key in record.keys)

    def due(self, now: float, *, regardless: bool = False) -> set[int]:
        return {row for row, at in self.due_at.items() if regardless or at <= now}

    def counters(self) -> Counters:
        return Counters(
            messages=len(self.rows),
            bytes=sum(r.bytes for r in self.rows.values()),
            queued=len(self.queue()),
            parked_keys=len(self.parked_keys()),
            dead_letters=len(self.dead),
        )

    # -- what happens -----------------------------------------------------------------------------------------------
    def write(self, write: Write, rows: dict[int, int], now: float) -> set[int]:
        """``rows``: the row of each message of the Write by identity, known or to be given; extended by `put`."""
        first = self.next_row
        for message in write.put:
            rows[id(message)] = self.next_row
            self._append(message, held=not self.parked_keys().isdisjoint(message.keys))
        if write.position is not None:
            self.position = tuple(write.position)
        self._remove({rows.get(id(m), m.row) for m in write.resolved}, now)
        for park in write.park:
            self._park(rows.get(id(park.message), park.message.row), park.reason, now + park.due_seconds, now)
        for bury in write.bury:
            row = rows.get(id(bury.message), bury.message.row)
            if row in self.rows:
                record = self.rows[row]
                said = self.said.get(record.keys[0])
                before = said[1] if said is not None and said[0] == row else 0
                self.dead[row] = Letter(record, before + 1, bury.reason)
                self._remove({row}, now)
        for number, message in write.revive:
            if self.dead.pop(number, None) is not None:
                self._append(message, held=True)
        self._look(now)
        if write.drop_table_below is not None:
            prefix, below = write.drop_table_below
            self._remove(
                {r.row for r in self.rows.values() if r.keys[0].startswith(prefix) and r.position < tuple(below)}, now
            )
        self.paused = self.paused if write.paused is None else write.paused
        self.gap = None if write.clear_gap else write.gap or self.gap
        return {row for row in range(first, first + len(write.put)) if row in self.rows and self.rows[row].held}

    def retry(self, select: Select, now: float) -> None:
        for row in self.due_at:
            keys = self.rows[row].keys
            if select.all:
                self.due_at[row] = _FOREVER
            elif select.key in keys or select.reason == self.said[min(keys)][2]:
                self.due_at[row] = now

    def discarded(self, rows: set[int], now: float) -> None:
        self._remove(rows, now)

    def selected(self, select: Select) -> set[int]:
        if select.all:
            return set(self.rows)
        if select.key is not None:
            return {r.row for r in self.of_key(select.key)}
        keys = {key for key in self.parked_keys() if self.said[key][2] == select.reason}
        return {r.row for key in keys for r in self.of_key(key) if r.held}

    def restarted(self) -> None:
        self.due_at = dict.fromkeys(self.due_at, _FOREVER)

    def _append(self, message: Message, *, held: bool) -> None:
        row, change = self.next_row, message.change
        self.next_row += 1
        keys = message.keys or (f"{change.schema}.{change.table}:\\#{row}",)
        self.rows[row] = Record(row, message.position, keys, change, message.keys, held)

    def _park(self, row: int, reason: str, due: float, now: float) -> None:
        record = self.rows.get(row)
        if record is None:
            return
        if record.held:
            if any(self.head(key) is not record for key in record.keys):
                return
        else:
            self._hold(record)
        self._look(now)
        for key in record.keys:
            head = self.head(key)
            attempts = self.said[key][1]
            self.said[key] = (head.row, attempts + 1, reason)
            if self.sendable(head):
                self.due_at[head.row] = due

    def _hold(self, record: Record) -> None:
        starts = dict.fromkeys(record.keys, 0)
        changed = True
        while changed:
            changed = False
            for other in self.queue():
                if any(key in starts and other.row >= starts[key] for key in other.keys):
                    other.held = changed = True
                    for key in other.keys:
                        starts[key] = min(starts.get(key, other.row), other.row)

    def _remove(self, rows: set[int], now: float) -> None:
        for row in rows:
            self.rows.pop(row, None)
        self._look(now)

    def _look(self, now: float) -> None:
        """New heads begin anew; those that may be sent are due now."""
        keys = self.parked_keys()
        self.said = {
            key: self.said[key] if key in self.said and self.said[key][0] == self.head(key).row
            else (self.head(key).row, 0, "")
            for key in keys
        }  # fmt: skip
        heads = {self.head(key).row for key in keys}
        self.due_at = {row: self.due_at.get(row, now) for row in heads if self.sendable(self.rows[row])}

"""The rules for sinks that get existing rows (action ``read``) beside the stream. Pure, as `rules`.

Every row of a workload carries a *stamp* that no two operations share, so a read says by itself which change of its key
made the row that it shows: the change with its key and its stamp. Of each key the history is numbered 0, 1, 2, ...; the
live message of change ``i`` stands at ``2 i``, a read of the row that change ``i`` made at ``2 i + 1``. Reads are
optional and may come again and again; of the live messages everything that `judge_events` says still holds, without the
reads. Beyond that, for each key, in order of arrival:

- **invented**: a read shows a row that was committed under its key, every column of it, and no change that was
  committed behind the read's own ``commit_lsn``.
- **went back**: places never fall within a life of the process. An older row after a newer one, or a row after the
  delete that ended it, stands lower.
- **ahead**: before a read of ``i`` every live message of the key up to ``i`` was sent, unless it is excused (committed
  before the slot began, or an action that the sink does not take). A read that runs ahead of the stream would be
  followed by older states.
- **overtaken**: what a read follows was acknowledged by an earlier request, and a live message that follows a read
  comes after the read was acknowledged.

A later life may go back, as ever, and then goes on by the same rules.

`folded` is what somebody has who applies all messages in order: compared with the source by `judge_rows` it shows that
nothing of what existed was left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .history import Event, History, Key
from .rules import Delivery, Row, Rule, Violation, as_text, judge_events

WAL_BLOCK_BYTES = 8192


def judge_backfilled(
    history: History,
    tables: Collection[str],
    deliveries: Iterable[Delivery],
    excused: Collection[int] = (),
    stamp: str = "seq",
) -> list[Violation]:
    """All violations of an events sink of these tables. ``excused``: numbers of events that the sink is not sent."""
    given = list(deliveries)
    judge = _ReadsJudge(history, tables, frozenset(excused), stamp)
    for delivery in given:
        judge.take(delivery)
    live = [delivery for delivery in given if not is_read(delivery)]
    return judge_events(history, tables, live, excused) + judge.found


def is_read(delivery: Delivery) -> bool:
    return delivery.message.get("action") == "read"


def folded(history: History, deliveries: Iterable[Delivery]) -> dict[Key, Row]:
    """The rows that applied deliveries come to, in order of arrival; columns that a message lacks keep their value."""
    rows: dict[Key, Row] = {}
    for delivery in deliveries:
        record = delivery.message.get("record")
        if not delivery.applied or not isinstance(record, dict):
            continue
        row = {str(column): as_text(value) for column, value in record.items()}
        if is_read(delivery):
            key = _key_of(delivery)
            if key is not None:
                rows[key] = row
            continue
        event = _live(history, delivery)
        if event is None:
            continue
        before = rows.pop(event.keys[0], {})
        if event.action != "delete":
            rows[event.keys[-1]] = {**before, **row}
    return rows


def whole_rows(history: History) -> list[Row]:
    """The row after each event, by its number: what the stream left out (TOAST) is what it was before. The history must
    begin before the first row."""
    now: dict[Key, Row] = {}
    rows: list[Row] = []
    for event in history.events:
        before = now.pop(event.keys[0], {}) if event.action != "insert" else {}
        row = {**before, **event.row}
        if event.action != "delete":
            now[event.keys[-1]] = row
        rows.append(row)
    return rows


@dataclass(slots=True)
class _Last:
    """The last attempt at a key."""

    place: int
    life: int
    acknowledged_by: int | None  # the request whose answer said 2xx
    text: str

    @property
    def is_read(self) -> bool:
        return self.place % 2 == 1


class _ReadsJudge:
    """Judges each step to a read and from a read; the others are `judge_events`' business."""

    def __init__(self, history: History, tables: Collection[str], excused: frozenset[int], stamp: str) -> None:
        self._history, self._excused, self._stamp = history, excused, stamp
        self._rows = whole_rows(history)
        self._of_key: dict[Key, list[Event]] = defaultdict(list)
        self._index: dict[tuple[Key, int], int] = {}
        self._made: dict[tuple[Key, str | None], Event] = {}  # by key and stamp: what made this row
        self._ends: dict[int, tuple[int, int]] = {}  # of the events' transactions: their end and their last change
        for transaction in history.transactions:
            ends = (transaction.end_lsn, transaction.last_change_lsn)
            self._ends.update((event.number, ends) for event in transaction.events)
        for event in history.of(tables):
            for key in event.keys:
                self._index[key, event.number] = len(self._of_key[key])
                self._of_key[key].append(event)
            if event.action != "delete":
                self._made[event.keys[-1], event.row.get(stamp)] = event
        self._last: dict[Key, _Last] = {}
        self.found: list[Violation] = []

    def take(self, delivery: Delivery) -> None:
        if is_read(delivery):
            event = self._read(delivery)
            if event is not None:
                key = event.keys[-1]
                self._step(key, 2 * self._index[key, event.number] + 1, f"a read of {event}", delivery)
            return
        event = _live(self._history, delivery)
        for key in event.keys if event is not None else ():
            if (key, event.number) in self._index:
                self._step(key, 2 * self._index[key, event.number], str(event), delivery)

    def _read(self, delivery: Delivery) -> Event | None:
        """The change that made the row which it shows; None: there is none, which is said."""
        key, record = _key_of(delivery), delivery.message.get("record")
        if key is None or not isinstance(record, dict):
            self._say("malformed", f"a read without key or record: {str(delivery.message)[:300]}")
            return None
        event = self._made.get((key, as_text(record.get(self._stamp))))
        if event is None:
            self._say("invented", f"no change of {key} has made {str(record)[:300]}")
            return None
        row = {column: as_text(value) for column, value in record.items()}
        expected = self._rows[event.number]
        if row != expected:
            columns = [c for c in {*row, *expected} if row.get(c, "absent") != expected.get(c, "absent")]
            self._say("content", f"a read of {event} differs in {', '.join(sorted(columns))}")
        metadata = delivery.message["metadata"]
        lsn = metadata.get("commit_lsn") if isinstance(metadata, dict) else None
        end_lsn, last_change_lsn = self._ends[event.number]
        if not isinstance(lsn, int) or not (lsn + 1 >= end_lsn or _inside_a_commit(lsn, last_change_lsn)):
            self._say("invented", f"a read at {lsn} shows {event}, committed up to {end_lsn}")
        return event

    def _step(self, key: Key, place: int, text: str, delivery: Delivery) -> None:
        last = self._last.get(key)
        reading = place % 2 == 1
        concerns_reads = reading or (last is not None and last.is_read)
        if reading:
            self._ahead(key, -1 if last is None else last.place // 2, place // 2, text)
        if last is not None and concerns_reads:
            if place > last.place:
                free = last.acknowledged_by is not None and last.acknowledged_by < delivery.request
                if not free and self._of_key[key][last.place // 2].number not in self._excused:
                    self._say("overtaken", f"{text} was sent while {last.text} of {key} was not acknowledged")
            elif place < last.place and delivery.life == last.life:
                self._say("went back", f"{text} was sent after {last.text} of {key}, without a restart between")
        self._last[key] = _Last(place, delivery.life, delivery.request if delivery.acknowledged else None, text)

    def _ahead(self, key: Key, last: int, index: int, text: str) -> None:
        for event in self._events_between(key, last, index):
            if event.number not in self._excused:
                self._say("ahead", f"{text} was sent before {event} itself was")
                return

    def _events_between(self, key: Key, last: int, index: int) -> Sequence[Event]:
        return self._of_key[key][last + 1 : index + 1]

    def _say(self, rule: Rule, text: str) -> None:
        self.found.append(Violation(rule, text))


def _inside_a_commit(lsn: int, last_change_lsn: int) -> bool:
    """Whether this may be an insert position behind the commit, less the header of a WAL block: where the commit record
    goes on behind the header (its last 16 bytes end where a long header would), that is a place inside the record."""
    return lsn % WAL_BLOCK_BYTES == 0 and lsn > last_change_lsn


def _live(history: History, delivery: Delivery) -> Event | None:
    metadata = delivery.message.get("metadata")
    if not isinstance(metadata, dict):
        return None
    lsn, idx = metadata.get("commit_lsn"), metadata.get("commit_idx")
    return history.at(lsn, idx) if isinstance(lsn, int) and isinstance(idx, int) else None


def _key_of(delivery: Delivery) -> Key | None:
    metadata = delivery.message.get("metadata")
    pks = metadata.get("record_pks") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(pks, list):
        return None
    return (f"{metadata.get('table_schema')}.{metadata.get('table_name')}", *map(str, pks))

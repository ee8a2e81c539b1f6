"""The rules: history and deliveries in, violations out. Pure functions; they know neither servers nor the product.

A **delivery** is one message in one request (or one line of a file), in the order of arrival. It was *applied* or not,
and *acknowledged* (the endpoint answered 2xx) or not: an endpoint that applies a request and cuts the connection leaves
an applied delivery without acknowledgement. ``life`` numbers the runs of the process: it rises at each kill.

`judge_events`, for sinks where every message counts:

- **lost**: every event of the sink's tables was applied at least once, unless it is excused (reported as dead letter
  or backlog).
- **invented**: every delivery stands in the history at the place it claims, with the key, action and row that were
  committed there.
- **order with replay closure**, per key. Let the history of a key be numbered 0, 1, 2, ...; the attempts at this key's
  messages, in order of arrival, may go from ``i`` only

  * to ``i`` again: a repetition;
  * to ``i + 1``, and only after an attempt at ``i`` that was acknowledged by an earlier request: else a later message
    has *overtaken* the head of its key;
  * back to an earlier one, and only in a later life: in the same life that would be sent after a later one was
    resolved. From there the rule goes on, so a replay passes through every later message of the key: it never jumps.

  A key begins with its first event. So attempts form runs, each consecutive in commit order. At the end (quiescence)
  every key stands at its newest event, and the last attempt at it was acknowledged: **stale** otherwise.
- An event that changes the key is in the histories of both keys and must satisfy both.

Excused events are stepped over: their failure was reported instead.

`judge_rows` compares a final state with the source's table, row by row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from .history import Event, History, Key

Rule = Literal[
    "lost", "invented", "content", "overtaken", "skipped", "went back", "stale", "state", "malformed", "ahead"
]
Row = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Violation:
    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message of one request. ``request`` rises with arrival; messages of a batch share it."""

    request: int
    life: int
    message: Mapping[str, object]
    applied: bool = True
    acknowledged: bool = True


@dataclass(slots=True)
class _Last:
    """The last attempt at a key's messages."""

    index: int
    life: int
    acknowledged_by: int | None  # the request whose answer said 2xx


def judge_events(
    history: History,
    tables: Collection[str],
    deliveries: Iterable[Delivery],
    excused: Collection[int] = (),
) -> list[Violation]:
    """All violations of an events sink of these tables. ``excused``: numbers of events reported as not delivered."""
    judge = _EventsJudge(history, tables, frozenset(excused))
    for delivery in deliveries:
        judge.take(delivery)
    return judge.end()


class _EventsJudge:
    def __init__(self, history: History, tables: Collection[str], excused: frozenset[int]) -> None:
        self._history, self._tables, self._excused = history, set(tables), excused
        self._events = history.of(tables)
        self._of_key: dict[Key, list[Event]] = defaultdict(list)
        self._index: dict[tuple[Key, int], int] = {}
        for event in self._events:
            for key in event.keys:
                self._index[key, event.number] = len(self._of_key[key])
                self._of_key[key].append(event)
        self._last: dict[Key, _Last] = {}
        self._applied: set[int] = set()
        self._found: list[Violation] = []

    def take(self, delivery: Delivery) -> None:
        event = self._placed(delivery)
        if event is None:
            return
        if delivery.applied:
            self._applied.add(event.number)
        for key in event.keys:
            self._step(key, event, delivery)

    def end(self) -> list[Violation]:
        for event in self._events:
            if event.number not in self._applied and event.number not in self._excused:
                self._found.append(Violation("lost", f"{event} was never applied"))
        for key, events in self._of_key.items():
            newest = next((e for e in reversed(events) if e.number not in self._excused), None)
            last = self._last.get(key)
            if newest is None or last is None:
                continue  # all excused; or nothing came at all, which is said above
            if last.index < self._index[key, newest.number]:
                self._found.append(Violation("stale", f"{_named(key)} ended at {events[last.index]}, not at {newest}"))
            elif last.acknowledged_by is None and events[last.index].number not in self._excused:
                self._found.append(Violation("stale", f"the last attempt at {newest} was not acknowledged"))
        return self._found

    def _placed(self, delivery: Delivery) -> Event | None:
        metadata = delivery.message.get("metadata")
        if not isinstance(metadata, dict):
            self._found.append(Violation("malformed", f"no metadata: {str(delivery.message)[:200]}"))
            return None
        lsn, idx = metadata.get("commit_lsn"), metadata.get("commit_idx")
        event = self._history.at(lsn, idx) if isinstance(lsn, int) and isinstance(idx, int) else None
        if event is None or event.table not in self._tables:
            self._found.append(Violation("invented", f"nothing was committed at {lsn}/{idx}: {str(metadata)[:300]}"))
            return None
        wrong = content_differs(event, delivery.message)
        if wrong:
            self._found.append(Violation("content", f"{event} at {lsn}/{idx}: {wrong}"))
        return event

    def _step(self, key: Key, event: Event, delivery: Delivery) -> None:
        events, index = self._of_key[key], self._index[key, event.number]
        last = self._last.get(key)
        acknowledged_by = delivery.request if delivery.acknowledged else None
        if last is None:
            self._unsent(key, events, 0, index)
        elif index > last.index:
            before = events[last.index]
            free = last.acknowledged_by is not None and last.acknowledged_by < delivery.request
            if not free and before.number not in self._excused:
                text = f"{event} was sent while {before} of the same key {_named(key)} was not acknowledged"
                self._found.append(Violation("overtaken", text))
            self._unsent(key, events, last.index + 1, index)
        elif index < last.index and delivery.life == last.life:
            text = f"{event} was sent after {events[last.index]} of {_named(key)}, without a restart between"
            self._found.append(Violation("went back", text))
        self._last[key] = _Last(index, delivery.life, acknowledged_by)

    def _unsent(self, key: Key, events: Sequence[Event], start: int, stop: int) -> None:
        for missing in events[start:stop]:
            if missing.number not in self._excused:
                text = f"{_named(key)} went on to {events[stop]} and left out {missing}"
                self._found.append(Violation("skipped", text))
                return


def content_differs(event: Event, message: Mapping[str, object]) -> str:
    """What of a message does not agree with what was committed; empty when all does."""
    record, metadata = message.get("record"), message.get("metadata")
    if not isinstance(record, dict) or not isinstance(metadata, dict):
        return "record or metadata is no object"
    table = f"{metadata.get('table_schema')}.{metadata.get('table_name')}"
    if table != event.table or message.get("action") != event.action:
        return f"{message.get('action')} of {table}, where {event.action} of {event.table} was committed"
    pks = metadata.get("record_pks")
    if pks != list(event.keys[-1][1:]):
        return f"record_pks {pks}, where the key was {list(event.keys[-1][1:])}"
    for column, value in event.row.items():
        if column not in record or as_text(record[column]) != value:
            got = repr(record.get(column, "nothing"))[:80]
            return f"column {column} is {got}, where {value!r:.80} was committed"
    return ""


def judge_rows(expected: Mapping[Key, Row], actual: Mapping[Key, Row]) -> list[Violation]:
    """A final state against the source's table: same keys, same columns, same values."""
    found = []
    for key, row in expected.items():
        if key not in actual:
            found.append(Violation("state", f"{_named(key)} is missing"))
        elif actual[key] != row:
            columns = [c for c in {*row, *actual[key]} if row.get(c, "absent") != actual[key].get(c, "absent")]
            found.append(Violation("state", f"{_named(key)} differs in {', '.join(sorted(columns))}"))
    found.extend(
        Violation("state", f"{_named(key)} is there, and not in the source") for key in actual.keys() - expected
    )
    return found


def as_text(value: object) -> str | None:
    """A JSON or SQLite value as PostgreSQL prints it in text, for the types of our workloads."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal):
        return str(value)
    return json.dumps(value, separators=(",", ":"), default=str)


def _named(key: Key) -> str:
    return f"{key[0]}:{':'.join(key[1:])}"

"""What the source committed, in commit order, as PostgreSQL's own ``test_decoding`` tells it.

A slot of the oracle's own, created before the product's first start, is read through the SQL interface. The output
plugin shares nothing with pgoutput but the server, and nothing with the product.

Positions. The row of a COMMIT carries the end of the commit record; messages carry its start. Commit records do not
overlap and lie behind the last change of their transaction, so a claimed ``commit_lsn`` belongs to the one transaction
whose last change lies before it and whose end behind it, or to none (`History.at`). ``commit_idx`` counts the changes
of the published tables from 0.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

Key = tuple[str, ...]  # table, then the values of the primary key as PostgreSQL prints them

_CHANGE = re.compile(r"table (?P<table>\S+?): (?P<action>INSERT|UPDATE|DELETE|TRUNCATE): (?P<rest>.*)", re.DOTALL)
_COLUMN = re.compile(
    r"""\s*(?P<name>"(?:[^"]|"")+"|[^\s\[]+)\[(?P<type>.+?)\]:"""
    r"""(?P<value>null|unchanged-toast-datum|B?'(?:[^']|'')*'|[^\s']+)""",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Event:
    """One committed row operation. ``row`` lacks the columns whose value the stream did not carry (TOAST)."""

    number: int  # its place in the whole history
    idx: int  # its place in its transaction, among published tables
    table: str
    action: str
    keys: tuple[Key, ...]  # one, or the old and the new when the operation changed the key
    row: Mapping[str, str | None]

    def __str__(self) -> str:
        return f"#{self.number} {self.action} {' -> '.join(':'.join(key[1:]) for key in self.keys)} of {self.table}"


@dataclass(frozen=True, slots=True)
class Transaction:
    last_change_lsn: int
    end_lsn: int
    events: Sequence[Event]


class History:
    """Committed transactions in commit order; grows by `add`."""

    def __init__(self, transactions: Iterable[Transaction] = ()) -> None:
        self.transactions: list[Transaction] = []
        self.events: list[Event] = []
        self._ends: list[int] = []
        for transaction in transactions:
            self.add(transaction)

    def add(self, transaction: Transaction) -> None:
        if self._ends and transaction.end_lsn <= self._ends[-1]:
            raise ValueError(f"commit at {transaction.end_lsn} does not lie behind the one at {self._ends[-1]}")
        self.transactions.append(transaction)
        self._ends.append(transaction.end_lsn)
        self.events.extend(transaction.events)

    def at(self, commit_lsn: int, commit_idx: int) -> Event | None:
        """The event that stands where a message claims to; None: nothing was ever committed there."""
        place = bisect_right(self._ends, commit_lsn)
        if place == len(self._ends):
            return None
        transaction = self.transactions[place]
        if commit_lsn < transaction.last_change_lsn or not 0 <= commit_idx < len(transaction.events):
            return None
        return transaction.events[commit_idx]

    def of(self, tables: Iterable[str]) -> list[Event]:
        wanted = set(tables)
        return [event for event in self.events if event.table in wanted]


class SlotHistory:
    """Reads the history off a ``test_decoding`` slot. ``key_columns``: of each published table, in column order."""

    def __init__(self, conninfo: str, slot: str, key_columns: Mapping[str, tuple[str, ...]]) -> None:
        self.history = History()
        self._conninfo, self._slot, self._key_columns = conninfo, slot, key_columns
        self._reader = Reader(key_columns)

    def create(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute("select pg_create_logical_replication_slot(%s, 'test_decoding')", [self._slot])

    def drop(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute("select pg_drop_replication_slot(%s)", [self._slot])

    def read(self) -> History:
        """Everything committed so far. Consumes the slot in steps that end at commits."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            # text, not name[]: the rows are strings whatever the database's encoding is
            query = sql.SQL("select lsn::text, data from pg_logical_slot_get_changes(%s, null, 50000)")
            while rows := connection.execute(query, [self._slot]).fetchall():
                for lsn, data in rows:
                    transaction = self._reader.take(parse_lsn(lsn), data)
                    if transaction is not None:
                        self.history.add(transaction)
        return self.history


class Reader:
    """Lines of ``test_decoding`` -> transactions."""

    def __init__(self, key_columns: Mapping[str, tuple[str, ...]]) -> None:
        self._key_columns = key_columns
        self._number = 0
        self._last_change_lsn = 0
        self._events: list[Event] = []

    def take(self, lsn: int, line: str) -> Transaction | None:
        if line.startswith("BEGIN"):
            self._events, self._last_change_lsn = [], 0
            return None
        if line.startswith("COMMIT"):
            return Transaction(self._last_change_lsn, lsn, tuple(self._events))
        match = _CHANGE.fullmatch(line)
        if match is None:
            raise ValueError(f"test_decoding said something the oracle does not know: {line[:200]}")
        self._last_change_lsn = lsn
        if match["table"] in self._key_columns:
            self._events.append(self._event(match["table"], match["action"].lower(), match["rest"]))
            self._number += 1
        return None

    def _event(self, table: str, action: str, rest: str) -> Event:
        if action == "truncate":
            raise ValueError(f"the workloads of the oracle do not truncate, and {table} was")
        old: dict[str, str | None] = {}
        if action == "update" and rest.startswith("old-key: "):
            before, _, rest = rest.removeprefix("old-key: ").partition(" new-tuple: ")
            old = parse_row(before)
        row = parse_row(rest)
        columns = self._key_columns[table]
        new_key = (table, *(_known(row[column]) for column in columns))
        keys: tuple[Key, ...] = (new_key,)
        if old:
            old_key = (table, *(_known(old[column]) for column in columns))
            if old_key != new_key:
                keys = (old_key, new_key)
            for column, value in old.items():  # an unchanged TOAST value stands in the old row, under identity full
                row.setdefault(column, value)
        return Event(self._number, len(self._events), table, action, keys, row)


def parse_row(text: str) -> dict[str, str | None]:
    """``id[integer]:1 v[text]:'it''s'`` -> {"id": "1", "v": "it's"}; an unchanged TOAST value is left out."""
    row: dict[str, str | None] = {}
    at = 0
    while at < len(text):
        match = _COLUMN.match(text, at)
        if match is None:
            raise ValueError(f"not a row of test_decoding at {at}: {text[at : at + 80]}")
        at = match.end()
        name, value = match["name"], match["value"]
        if name.startswith('"'):
            name = name[1:-1].replace('""', '"')
        if value == "unchanged-toast-datum":
            continue
        if value == "null":
            row[name] = None
        elif value.endswith("'"):
            row[name] = value.removeprefix("B")[1:-1].replace("''", "'")
        else:
            row[name] = value
    return row


def parse_lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def _known(value: str | None) -> str:
    if value is None:
        raise ValueError("a primary key holds a null")
    return value

"""What the demo's checks rest on: the kernel, PostgreSQL and the files of the sinks. No counter of the engine."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

import psycopg

from spillway.demo.load import TABLE

MB = 1 << 20
_COLUMNS = ("id", "customer", "status", "amount", "note")
# As messages have it: ISO 8601, in UTC, with microseconds.
_CHANGED_AT = """to_char(changed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
_LAST_LINES_BYTES = 16 << 10

Row = tuple[str | None, ...]


def memory_mb(pid: int) -> tuple[float, float]:
    """What the process holds now, and the most it ever held (VmRSS, VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    now, peak = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmRSS", "VmHWM"))
    assert now and peak, "a living process has memory"
    return int(now[1]) / 1024, int(peak[1]) / 1024


def size_mb(file: Path) -> float:
    """Of an SQLite file and the log beside it."""
    return sum(path.stat().st_size for path in (file, Path(f"{file}-wal")) if path.exists()) / MB


class Source:
    """Asks PostgreSQL, on a connection of its own."""

    def __init__(self, url: str, slot: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._slot = slot

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def wal_bytes(self) -> int:
        """The end of the WAL, as a number that rises."""
        return self._number("SELECT (pg_current_wal_lsn() - '0/0')::bigint")

    def confirmed_bytes(self) -> int:
        """Up to where the WAL may be dropped as far as the slot goes; 0: there is no slot yet."""
        return self._number(
            "SELECT coalesce(max(confirmed_flush_lsn - '0/0'), 0)::bigint FROM pg_replication_slots"
            " WHERE slot_name = %s",
            [self._slot],
        )

    def rows(self) -> Iterator[Row]:
        """The table as text, by id, a page at a time."""
        columns = ", ".join(f"{name}::text" for name in _COLUMNS)
        with self._connection.transaction(), self._connection.cursor("compare") as cursor:
            yield from cursor.execute(f"SELECT {columns}, {_CHANGED_AT} FROM {TABLE} ORDER BY {TABLE}.id")

    def _number(self, query: str, parameters: list[str] | None = None) -> int:
        row = self._connection.execute(query, parameters).fetchone()
        assert row is not None
        return int(row[0])


def differences(source: Source, file: Path) -> tuple[int, int]:
    """Source and target side by side: how many rows the source has, and how many of either differ."""
    columns = ", ".join(f"CAST({name} AS TEXT)" for name in (*_COLUMNS, "changed_at"))
    rows = wrong = 0
    with closing(_open(file)) as connection:
        target = connection.execute(f"SELECT {columns} FROM {TABLE} ORDER BY id")
        for expected, found in zip_longest(source.rows(), target):
            rows += expected is not None
            wrong += expected != found
    return rows, wrong


def seconds_behind(audit: Path) -> float | None:
    """The age of the newest change in the file of the healthy sink; None: there is none."""
    if not audit.exists():
        return None
    with audit.open("rb") as file:
        file.seek(max(0, audit.stat().st_size - _LAST_LINES_BYTES))
        lines = file.read().split(b"\n")
    if len(lines) < 2:
        return None
    committed = datetime.fromisoformat(json.loads(lines[-2])["metadata"]["commit_timestamp"])
    return (datetime.now(UTC) - committed).total_seconds()


def audit_changes(audit: Path) -> tuple[int, int]:
    """How many different changes the file holds, and how many lines repeat one."""
    seen: set[tuple[int, int]] = set()
    lines = 0
    with audit.open("rb") as file:
        for line in file:
            lines += 1
            metadata = json.loads(line)["metadata"]
            seen.add((metadata["commit_lsn"], metadata["commit_idx"]))
    return len(seen), lines - len(seen)


def break_table(file: Path) -> None:
    """From now on the target rejects every row, as a search index does whose mapping does not fit."""
    with closing(sqlite3.connect(file, timeout=10)) as connection, connection:
        for event in _EVENTS:
            connection.execute(
                f"CREATE TRIGGER broken_{event} BEFORE {event} ON {TABLE}"
                " BEGIN SELECT RAISE(ABORT, 'this table accepts no rows'); END"
            )


def mend_table(file: Path) -> None:
    with closing(sqlite3.connect(file, timeout=10)) as connection, connection:
        for event in _EVENTS:
            connection.execute(f"DROP TRIGGER broken_{event}")


_EVENTS = ("INSERT", "UPDATE", "DELETE")


def _open(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)

"""What a state file holds, read past the store, as the disk has it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from spillway.chunk import Chunk, Message, Span


@dataclass
class OnDisk:
    """Of one sink."""

    position: tuple[int, int, int] | None
    waiting: set[tuple[int, int, int]]
    dead: set[tuple[int, int, int]]
    gap: tuple[int, int | None] | None


def on_disk(path: Path, sink: str) -> OnDisk:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("BEGIN")  # one state for all that follows
        number, *rest = db.execute(
            "SELECT id, lsn, idx, sub, gap_first, gap_last FROM sink WHERE name = ?", (sink,)
        ).fetchone()
        waiting = [m.position for m in _queued(db, number)]
        waiting += [m.position for m in _singles(db, "message", number)]
        assert len(waiting) == len(set(waiting)), f"stored twice: {sorted(waiting)}"
        return OnDisk(
            None if rest[0] is None else tuple(rest[:3]),  # type: ignore[arg-type]
            set(waiting),
            {m.position for m in _singles(db, "dead", number)},
            None if rest[3] is None else (rest[3], rest[4]),
        )


def messages_on_disk(path: Path) -> list[Message]:
    """Of all sinks, waiting or dead, without their bodies."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("BEGIN")
        return [
            message
            for (number,) in db.execute("SELECT id FROM sink").fetchall()
            for found in (_queued(db, number), _singles(db, "message", number), _singles(db, "dead", number))
            for message in found
        ]


def _queued(db: sqlite3.Connection, sink: int) -> Iterator[Message]:
    query = """SELECT messages, tables, key_groups, keying, done, keys, meta FROM span JOIN span_data USING (id)
        WHERE sink = ? ORDER BY id"""
    for count, tables, groups, keying, done, keys, meta in db.execute(query, (sink,)).fetchall():
        span = _span(count, meta, keys, tables, groups, keying)
        yield from (Message(span, place) for place in range(count) if not int(done, 16) >> place & 1)


def _singles(db: sqlite3.Connection, table: str, sink: int) -> Iterator[Message]:
    query = f"SELECT meta, keys, tables, key_groups, keying FROM {table} WHERE sink = ?"
    for row in db.execute(query, (sink,)).fetchall():
        yield Message(_span(1, *row), 0)


def _span(count: int, meta: bytes, keys: bytes, tables: str, groups: int, keying: int) -> Span:
    return Span(Chunk(count, b"", meta, keys, tuple((s, t) for s, t in json.loads(tables)), groups), keying)

"""The reading half of the SQLite store: one connection, one lock, any thread.

Every method is one or two statements on a snapshot of the committed state, and by index: it visits the rows it returns
and a constant number of others (a test holds every statement's plan against that). Two exceptions, for people only:
`waiting` sums up the index entries of the keys that it lists, `dead` the letters.

Bodies are loaded only for rows that fit the caller's bytes: the running sum is taken over the index before the
messages are joined. What people ask for is bounded to `PEOPLE_BYTES` a page.

`newest` looks among the newest `PROBED` messages of the queue for one that is the first of its keys. If there is none
(few keys, many changes) it takes the first message of the newest one's key.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import cast

from spillway.change import Message
from spillway.clock import Clock
from spillway.errors import StoreFailed
from spillway.store.base import Identity, LaneHead, Select, Waiting
from spillway.store.file import free_bytes, open_reader
from spillway.store.rows import CHUNK, MESSAGE_COLUMNS, Row, Value, as_json, read_message

PROBED = 64
PEOPLE_BYTES = 4 << 20  # bodies that a page for people loads, at least one

_COLUMNS = ", ".join(f"m.{name.strip()}" for name in MESSAGE_COLUMNS.split(","))
_RUN = "(SELECT run FROM sink WHERE id = ?1)"
_DUE = "p.sink = ?1 AND p.due IS NOT NULL"
# Heads of older runs, then those whose time has come: two ranges of one index.
_OLDER = f"{_DUE} AND p.run < {_RUN} AND ?2 IS NOT NULL"
_PASSED = f"{_DUE} AND p.run = {_RUN} AND p.due <= ?2"
_REGARDLESS = f"{_DUE} AND ?2 IS NOT NULL"


def _fitting(select: str, max_bytes: str, source: str = "message", *, first: bool) -> str:
    """The messages of a selection (id, bytes) as long as the sum of their bytes fits; ``first``: that in any case."""
    or_first = " OR q.total = q.bytes" if first else ""
    return f"""
    SELECT {_COLUMNS} FROM (SELECT id, bytes, sum(bytes) OVER (ROWS UNBOUNDED PRECEDING) AS total FROM ({select})) q
    CROSS JOIN {source} m ON m.id = q.id WHERE q.total <= {max_bytes}{or_first}"""


def _heads(which: str) -> str:
    """The same for heads of lanes, with their attempts and reason."""
    return f"""
    SELECT {_COLUMNS}, q.attempts, q.reason FROM (
        SELECT id, bytes, attempts, reason, sum(bytes) OVER (ROWS UNBOUNDED PRECEDING) AS total FROM (
            SELECT p.head AS id, p.attempts, p.reason, length(m.body) AS bytes
            FROM parked p INDEXED BY parked_due CROSS JOIN message m ON m.id = p.head
            WHERE {which} ORDER BY p.run, p.due LIMIT ?3)) q
    CROSS JOIN message m ON m.id = q.id WHERE q.total <= ?4"""


def _first_head_bytes(which: str) -> str:
    return f"""
    SELECT length(m.body) FROM parked p INDEXED BY parked_due CROSS JOIN message m ON m.id = p.head
    WHERE {which} ORDER BY p.run, p.due LIMIT 1"""


def _first_of(key: str) -> str:
    return f"(SELECT l.id FROM lane l WHERE l.sink = m.sink AND l.key = {key} ORDER BY l.id LIMIT 1)"


def _letters(where: str) -> str:
    letters = f"SELECT id, length(body) AS bytes FROM dead WHERE {where} ORDER BY id LIMIT ?4"
    return _fitting(letters, "?5", "dead", first=True)


def _dead_keys(where: str) -> str:
    # With min(id) alone, the columns beside it are those of the oldest letter (SQLite: bare columns).
    return f"""
    SELECT key1, reason, detail, attempts, stored, sum(max(length(body), too_large_bytes)), count(*), min(id) FROM dead
    WHERE {where} GROUP BY key1 ORDER BY key1 LIMIT ?4"""


SELECT_SINK_ID = "SELECT id FROM sink WHERE name = ?"
SELECT_IDENTITY = "SELECT system_id, timeline, name, epoch, mark FROM slot WHERE name = ?"
SELECT_PARKED = "SELECT p.key FROM json_each(?2) k CROSS JOIN parked p ON p.sink = ?1 AND p.key = k.value"
SELECT_PAGE = _fitting(
    "SELECT id, bytes FROM queue WHERE sink = ?1 AND id > ?2 ORDER BY id LIMIT ?3", "?4", first=False
)
SELECT_HEAD_BYTES = "SELECT bytes FROM queue WHERE sink = ? AND id > ? ORDER BY id LIMIT 1"
SELECT_NEWEST = f"""
    SELECT m.id, {_first_of("m.key1")}, iif(m.key2 IS NULL, NULL, {_first_of("m.key2")})
    FROM queue q CROSS JOIN message m ON m.id = q.id WHERE q.sink = ? ORDER BY q.id DESC LIMIT ?"""
SELECT_IF_HEAD = f"""
    SELECT {_COLUMNS} FROM message m WHERE m.id = ?2 AND length(m.body) <= ?3
    AND EXISTS (SELECT 1 FROM queue WHERE sink = ?1 AND id = ?2)
    AND {_first_of("m.key1")} = m.id AND (m.key2 IS NULL OR {_first_of("m.key2")} = m.id)"""
SELECT_OLDER, SELECT_PASSED, SELECT_REGARDLESS = _heads(_OLDER), _heads(_PASSED), _heads(_REGARDLESS)
SELECT_OLDER_BYTES, SELECT_PASSED_BYTES, SELECT_REGARDLESS_BYTES = (
    _first_head_bytes(_OLDER),
    _first_head_bytes(_PASSED),
    _first_head_bytes(_REGARDLESS),
)
SELECT_LATEST = f"""
    SELECT {_COLUMNS} FROM message m
    WHERE m.id = (SELECT id FROM lane WHERE sink = ?1 AND key = ?2 ORDER BY id DESC LIMIT 1) AND length(m.body) <= ?3
    AND NOT EXISTS (SELECT 1 FROM lane WHERE sink = ?1 AND key = ?2 AND other IS NOT NULL)"""
SELECT_NEXT_DUE = f"SELECT p.run < {_RUN}, p.due FROM parked p WHERE {_DUE} ORDER BY p.run, p.due LIMIT 1"
SELECT_OLDEST = """
    SELECT m.commit_time FROM (SELECT
        (SELECT id FROM queue WHERE sink = ?1 ORDER BY id LIMIT 1) AS queued,
        (SELECT head FROM parked WHERE sink = ?1 ORDER BY head LIMIT 1) AS held)
    CROSS JOIN message m ON m.id = min(coalesce(queued, held), coalesce(held, queued))"""
SELECT_WAITING = """
    SELECT g.key, p.reason, p.detail, p.attempts, m.stored, g.size, g.messages FROM (
        SELECT key, count(*) AS messages, sum(bytes) AS size, min(id) AS first FROM lane
        WHERE sink = ?1 AND key > ?2 GROUP BY key ORDER BY key LIMIT ?3) g
    CROSS JOIN message m ON m.id = g.first LEFT JOIN parked p ON p.sink = ?1 AND p.key = g.key"""
SELECT_WAITING_FOR = """
    SELECT p.key, p.reason, p.detail, p.attempts, m.stored,
        (SELECT sum(l.bytes) FROM lane l WHERE l.sink = p.sink AND l.key = p.key),
        (SELECT count(*) FROM lane l WHERE l.sink = p.sink AND l.key = p.key)
    FROM parked p CROSS JOIN message m
    ON m.id = (SELECT l.id FROM lane l WHERE l.sink = p.sink AND l.key = p.key ORDER BY l.id LIMIT 1)
    WHERE p.sink = ?1 AND p.key > ?2 AND p.reason = ?4 ORDER BY p.key LIMIT ?3"""
SELECT_KEY = _fitting("SELECT id, bytes FROM lane WHERE sink = ?1 AND key = ?2 ORDER BY id LIMIT ?3", "?4", first=True)
SELECT_DEAD = _dead_keys("sink = ?1 AND key1 > ?2 AND ?3 IS NULL")
SELECT_DEAD_FOR = _dead_keys("sink = ?1 AND key1 > ?2 AND reason = ?3")
SELECT_LETTERS = _letters("sink = ?1 AND id > ?2 AND ?3 IS NULL")
SELECT_LETTERS_OF = _letters("sink = ?1 AND id > ?2 AND key1 = ?3")
SELECT_LETTERS_FOR = _letters("sink = ?1 AND id > ?2 AND reason = ?3")


class Reads:
    """What `spillway.store.sqlite.SqliteStore` answers without its writer."""

    reads: int

    def __init__(self, path: Path, clock: Clock) -> None:
        self.reads = 0
        self._path = path
        self._clock = clock
        self._reader = open_reader(path)
        self._reading = Lock()
        self._people = open_reader(path)  # what people ask for never stands before what the stream asks for
        self._asking = Lock()
        self._sink_ids: dict[str, int] = {}

    def close_reader(self) -> None:
        with self._reading, self._asking:
            self._reader.close()
            self._people.close()

    def _rows(self, statement: str, given: Sequence[Value]) -> list[Row]:
        with self._reading, _failing():
            self.reads += 1
            return self._reader.execute(statement, given).fetchall()

    def _asked(self, statement: str, given: Sequence[Value]) -> list[Row]:
        with self._asking, _failing():
            return self._people.execute(statement, given).fetchall()

    def _first(self, statement: str, given: Sequence[Value]) -> Row | None:
        rows = self._rows(statement, given)
        return rows[0] if rows else None

    def _id(self, sink: str) -> int:
        """The number of a sink; 0, which none has, for one that was never opened."""
        number = self._sink_ids.get(sink)
        if number is None:
            found = self._first(SELECT_SINK_ID, (sink,))
            if found is None:
                return 0
            number = self._sink_ids[sink] = cast(int, found[0])
        return number

    # -- start ------------------------------------------------------------------------------------------------------
    def identity(self, slot: str) -> Identity | None:
        found = self._first(SELECT_IDENTITY, (slot,))
        return None if found is None else Identity(*cast("tuple[str, int, str, int, int]", found))

    # -- the stream -------------------------------------------------------------------------------------------------
    def parked(self, sink: str, keys: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for start in range(0, len(keys), CHUNK):
            rows = self._rows(SELECT_PARKED, (self._id(sink), as_json(keys[start : start + CHUNK])))
            found.update(cast(str, row[0]) for row in rows)
        return found

    def page(self, sink: str, after_row: int, max_messages: int, max_bytes: int) -> list[Message]:
        return [read_message(r) for r in self._rows(SELECT_PAGE, (self._id(sink), after_row, max_messages, max_bytes))]

    def bytes_at_head(self, sink: str, after_row: int) -> int | None:
        found = self._first(SELECT_HEAD_BYTES, (self._id(sink), after_row))
        return None if found is None else cast(int, found[0])

    def newest(self, sink: str, max_bytes: int) -> Message | None:
        number = self._id(sink)
        newest = cast("list[tuple[int, int, int | None]]", self._rows(SELECT_NEWEST, (number, PROBED)))
        if not newest:
            return None
        heads = [row for row, first1, first2 in newest if row == first1 and first2 in (None, row)]
        found = self._first(SELECT_IF_HEAD, (number, heads[0] if heads else newest[0][1], max_bytes))
        return None if found is None else read_message(found)

    def due(self, sink: str, max_keys: int, max_bytes: int, regardless: bool = False) -> list[LaneHead]:
        heads: list[LaneHead] = []
        for statement in (SELECT_REGARDLESS,) if regardless else (SELECT_OLDER, SELECT_PASSED):
            # Also when nothing more fits: the number of reads is the same whatever waits (I5).
            given = (self._id(sink), self._clock.monotonic(), max_keys - len(heads), max_bytes)
            for row in self._rows(statement, given):
                attempts, reason = cast("tuple[int, str]", row[-2:])
                message = read_message(row)
                heads.append(LaneHead(message, attempts, reason))
                max_bytes -= len(message.change.body)
        return heads

    def bytes_due(self, sink: str, regardless: bool = False) -> int | None:
        given = (self._id(sink), self._clock.monotonic())
        for statement in (SELECT_REGARDLESS_BYTES,) if regardless else (SELECT_OLDER_BYTES, SELECT_PASSED_BYTES):
            found = self._first(statement, given)
            if found is not None:
                return cast(int, found[0])
        return None

    def latest(self, sink: str, key: str, max_bytes: int) -> Message | None:
        found = self._first(SELECT_LATEST, (self._id(sink), key, max_bytes))
        return None if found is None else read_message(found)

    def next_due_seconds(self, sink: str) -> float | None:
        found = self._first(SELECT_NEXT_DUE, (self._id(sink),))
        if found is None:
            return None
        older, due = cast("tuple[int, float]", found)
        return 0.0 if older else due - self._clock.monotonic()

    def oldest(self, sink: str) -> float | None:
        found = self._first(SELECT_OLDEST, (self._id(sink),))
        return None if found is None else cast("float | None", found[0])

    # -- for people -------------------------------------------------------------------------------------------------
    def waiting(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]:
        given: tuple[Value, ...] = (self._id(sink), after_key or "", limit)
        rows = (
            self._asked(SELECT_WAITING, given) if reason is None else self._asked(SELECT_WAITING_FOR, (*given, reason))
        )
        return [_waiting(row) for row in rows]

    def show(self, sink: str, key: str, limit: int) -> list[Message]:
        return [read_message(r) for r in self._asked(SELECT_KEY, (self._id(sink), key, limit, PEOPLE_BYTES))]

    def dead(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]:
        statement = SELECT_DEAD if reason is None else SELECT_DEAD_FOR
        return [_waiting(row) for row in self._asked(statement, (self._id(sink), after_key or "", reason, limit))]

    def show_dead(self, sink: str, key: str, limit: int) -> list[Message]:
        return self.read_dead(sink, Select(key=key), 0, limit)

    def read_dead(self, sink: str, select: Select, after_row: int, limit: int) -> list[Message]:
        statement, value = SELECT_LETTERS, None
        if select.key is not None:
            statement, value = SELECT_LETTERS_OF, select.key
        elif select.reason is not None:
            statement, value = SELECT_LETTERS_FOR, select.reason
        given = (self._id(sink), after_row, value, limit, PEOPLE_BYTES)
        return [read_message(row) for row in self._asked(statement, given)]

    def free_bytes(self) -> int:
        return free_bytes(self._path.parent)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StoreFailed("store_failed", f"the state file cannot be read: {error}", "see the disk it is on") from error


def _waiting(row: Row) -> Waiting:
    key, reason, detail, attempts, first_seen, size, messages = cast(
        "tuple[str, str | None, str | None, int | None, float, int, int]", row[:7]
    )
    return Waiting(key, reason or "", detail or "", attempts or 0, first_seen, size, messages)

"""What people ask of the store: on a connection of their own, a page at a time.

`held` sums up the lanes of the keys that it lists, `dead` the letters; `show` scans the key texts of the queue.
A page holds bodies of `PEOPLE_BYTES`, but at least one.
"""

from __future__ import annotations

from typing import cast

from spillway.chunk import MOST_PLACES, PLACE_BITS, Message
from spillway.store.base import Select, Waiting
from spillway.store.queue import with_key
from spillway.store.reads import COLUMNS, Reads, behind, read_one, snapshot
from spillway.store.rows import Row, Value, lane_keys, read_blobs, read_message

PEOPLE_BYTES = 4 << 20


def _fitting(select: str, max_bytes: str, source: str = "message") -> str:
    """The messages of a selection (id, bytes), as long as the sum of their bytes fits, but the first in any case."""
    return f"""
    SELECT {COLUMNS} FROM (SELECT id, bytes, sum(bytes) OVER (ROWS UNBOUNDED PRECEDING) AS total FROM ({select})) q
    CROSS JOIN {source} m ON m.id = q.id WHERE q.total <= {max_bytes} OR q.total = q.bytes"""


def _letters(where: str) -> str:
    return _fitting(f"SELECT id, length(data) AS bytes FROM dead WHERE {where} ORDER BY id LIMIT ?4", "?5", "dead")


def _dead_keys(where: str) -> str:
    # With min(id) alone, the columns beside it are those of the oldest letter (SQLite: bare columns).
    return f"""
    SELECT key1, reason, detail, attempts, stored, sum(size), count(*), min(id) FROM dead
    WHERE {where} GROUP BY key1 ORDER BY key1 LIMIT ?4"""


SELECT_HELD = """
    SELECT g.key, p.reason, p.detail, p.attempts, m.stored, g.size, g.messages FROM (
        SELECT key, count(*) AS messages, sum(bytes) AS size, min(id) AS first FROM lane
        WHERE sink = ?1 AND key > ?2 GROUP BY key ORDER BY key LIMIT ?3) g
    CROSS JOIN message m ON m.id = g.first CROSS JOIN parked p ON p.sink = ?1 AND p.key = g.key"""
SELECT_HELD_FOR = """
    SELECT p.key, p.reason, p.detail, p.attempts, m.stored,
        (SELECT sum(l.bytes) FROM lane l WHERE l.sink = p.sink AND l.key = p.key),
        (SELECT count(*) FROM lane l WHERE l.sink = p.sink AND l.key = p.key)
    FROM parked p CROSS JOIN message m ON m.id = p.head
    WHERE p.sink = ?1 AND p.key > ?2 AND p.reason = ?4 ORDER BY p.key LIMIT ?3"""
SELECT_KEY = _fitting("SELECT id, bytes FROM lane WHERE sink = ?1 AND key = ?2 ORDER BY id LIMIT ?3", "?4")
SELECT_DEAD = _dead_keys("sink = ?1 AND key1 > ?2 AND ?3 IS NULL")
SELECT_DEAD_FOR = _dead_keys("sink = ?1 AND key1 > ?2 AND reason = ?3")
SELECT_LETTERS = _letters("sink = ?1 AND id > ?2 AND ?3 IS NULL")
SELECT_LETTERS_OF = _letters("sink = ?1 AND id > ?2 AND key1 = ?3")
SELECT_LETTERS_FOR = _letters("sink = ?1 AND id > ?2 AND reason = ?3")


class PeopleReads(Reads):
    """The reading half as a whole."""

    def held(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]:
        given: tuple[Value, ...] = (self._id(sink), after_key or "", limit)
        rows = self._asked(SELECT_HELD, given) if reason is None else self._asked(SELECT_HELD_FOR, (*given, reason))
        return [_waiting(row) for row in rows]

    def queued(self, sink: str, after_row: int, limit: int) -> list[tuple[int, Waiting]]:
        number = self._id(sink)
        found: list[tuple[int, Waiting]] = []
        while len(found) < limit:
            with self._asked_for() as db, snapshot(db):
                next_one = behind(db, number, after_row, 1)
                if not next_one:
                    break
                ((row, done),) = next_one
                (blobs,) = read_blobs(db, ("keys", "meta"), [row.id])
            after_row = row.id << PLACE_BITS | MOST_PLACES - 1
            if blobs is None:
                continue
            keys, meta = blobs
            span = row.span(keys, meta, b"")
            for place in range(span.size):
                if not done >> place & 1 and len(found) < limit:
                    key = lane_keys(span, place, span.row(place))[-1]
                    size = span.bytes_between(place, place + 1)
                    found.append((span.row(place), Waiting(key, "", "", 0, row.stored, size, 1)))
        return found

    def show(self, sink: str, key: str, limit: int) -> list[Message]:
        number = self._id(sink)
        with self._asked_for() as db, snapshot(db):
            lane = db.execute(SELECT_KEY, (number, key, limit, PEOPLE_BYTES)).fetchall()
            messages = [read_message(row) for row in lane]
            size = sum([message.body_bytes for message in messages])
            for _, span, places in with_key(db, number, key):
                for place in places:
                    size += span.bytes_between(place, place + 1)
                    if len(messages) >= limit or (messages and size > PEOPLE_BYTES):
                        return messages
                    messages.append(read_one(db, span, place))
        return messages

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


def _waiting(row: Row) -> Waiting:
    key, reason, detail, attempts, first_seen, size, messages = cast(
        "tuple[str, str | None, str | None, int | None, float, int, int]", row[:7]
    )
    return Waiting(key, reason or "", detail or "", attempts or 0, first_seen, size, messages)

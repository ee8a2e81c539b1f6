"""A change: one row operation of a committed transaction, rendered once and shared by every sink that wants it.

``Change`` is immutable after its creation. Its ``body`` is the part of Sequin's message that is the same for every
sink, as bytes of JSON on one line, cut off where the per-sink part begins::

    {"record":{...},"changes":{...},"action":"update","metadata":{"table_schema":"public",...,"record_pks":["1"]

A sink's message is ``body + suffix`` where ``suffix`` closes the metadata::

    ,"enrichment":null,"consumer":{"id":"...","name":"...","annotations":{}}}}

The row alone is ``body[RECORD_START : RECORD_START + record_bytes]``. Nothing is parsed or rendered again.

Keys. ``key`` is the message group of Sequin: table plus primary key, as text that is unique over the whole database
and fit to be shown and typed (see `make_key`); ``None`` for a table without a primary key, whose messages are not
ordered among themselves. ``groups`` holds the keys by configured ``group_column_names``, in the order in which the
decoder was given the column sets of that table.

A change of the key. ``old`` is the delete of the old key, rendered as a delete, at the same position. Sinks of
documents take ``old`` (sub 0) and then the change itself (sub 1); sinks of events take the change alone (sub 0),
ordered under both keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Action = Literal["insert", "update", "delete", "read", "truncate"]

BODY_START = b'{"record":'
RECORD_START = len(BODY_START)

# What a change costs in memory beyond its bytes: the objects around it (Change, Message, dict and deque entries).
CHANGE_OVERHEAD_BYTES = 768
# And what each further sink that it is on its way to adds: a Message of its own, and its places in lines.
MESSAGE_OVERHEAD_BYTES = 512


@dataclass(slots=True, eq=False)
class Change:
    commit_lsn: int
    commit_idx: int
    schema: str
    table: str
    action: Action
    key: str | None
    pks: tuple[str, ...]  # primary key values in Postgres text, in column order of the table
    body: bytes
    record_bytes: int  # length of the row's JSON inside body
    n: int  # 1 + earlier changes of this key in its transaction, saturating at 255; 0 for a backfilled row
    whole: bool  # the record is the whole row: no TOAST column is missing
    commit_time: float  # commit timestamp, seconds since the Unix epoch
    groups: tuple[str, ...] = ()
    old: Change | None = None
    too_large_bytes: int = 0  # > 0: the row was above max_message_bytes; the record holds the key's columns alone
    holders: int = field(default=0, repr=False)  # owned by flow.budget: how many windows hold this change

    @property
    def cost(self) -> int:
        """The credit that covers this change, in bytes."""
        cost = len(self.body) + CHANGE_OVERHEAD_BYTES
        return cost + self.old.cost if self.old is not None else cost

    @property
    def record(self) -> bytes:
        return self.body[RECORD_START : RECORD_START + self.record_bytes]


NOT_STORED = 0
PENDING = -1  # on its way to the store


@dataclass(slots=True, eq=False)
class Message:
    """A change as one sink gets it. Made by the router or read back from the store; its home is the sink's window.

    ``keys`` are what it is ordered by: none, one, or two for an event that changes its key. ``row`` is its number in
    the store, 0 while it is not there. The rest belongs to flow.window.
    """

    change: Change
    keys: tuple[str, ...]
    sub: int = 0
    row: int = 0  # NOT_STORED, PENDING, or the number of its row
    attempts: int = 0  # failed ones, of the head of a lane
    arrived: float = 0.0  # monotonic seconds at which the flow took it
    credit: int = 0  # bytes taken from the delivery pool for it; 0: the window pool covers it
    waits: int = 0  # at how many of its keys it is not the head
    done: bool = False  # resolved, or durable: the watermark may pass it
    passed: bool = False  # the watermark has passed it
    left: bool = False  # it has left memory but for the watermark
    superseded: list[Message] | None = None  # earlier messages of its key that are resolved with it

    @property
    def position(self) -> tuple[int, int, int]:
        return (self.change.commit_lsn, self.change.commit_idx, self.sub)


def make_key(schema: str, table: str, values: tuple[str | None, ...]) -> str:
    """``public.jobs:42``; parts that hold ``\\``, ``.`` or ``:`` are escaped with a backslash, null is ``\\N``.

    Unique: unescaped ``.`` and ``:`` only ever separate. All keys of a table begin with ``table_prefix(...)``.
    """
    return table_prefix(schema, table) + ":".join("\\N" if v is None else _escape(v) for v in values)


def table_prefix(schema: str, table: str) -> str:
    """What every key of the table begins with, and no other key."""
    return f"{_escape(schema)}.{_escape(table)}:"


def _escape(part: str) -> str:
    if "\\" in part or ":" in part or "." in part:
        return part.replace("\\", "\\\\").replace(":", "\\:").replace(".", "\\.")
    return part

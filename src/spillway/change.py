"""A change: one row operation of a committed transaction, rendered once and shared by every sink that wants it.

Changes live in the columns of a `spillway.chunk.Chunk`; a `Change` is one of them taken out, for whoever needs to look
at a single one: sinks that apply rows, parking, people. The stream itself never makes one.

``body`` is the part of Sequin's message that is the same for every sink, as bytes of JSON on one line, cut off where
the per-sink part begins::

    {"record":{...},"changes":{...},"action":"update","metadata":{"table_schema":"public",...,"record_pks":["1"]

A sink's message is ``body + suffix`` where ``suffix`` closes the metadata::

    ,"enrichment":null,"consumer":{"id":"...","name":"...","annotations":{}}}}

The row alone is ``body[RECORD_START : RECORD_START + record_bytes]``. Nothing is parsed or rendered again.

Keys. ``key`` is the message group of Sequin: table plus primary key, as text that is unique over the whole database
and fit to be shown and typed (see `make_key`); ``None`` for a table without a primary key, whose messages are not
ordered among themselves. By which keys a sink orders a change is said by `spillway.chunk.Keying`.

A change of the key: ``was`` is the key that the row had before. For sinks of documents the delete of the old key is a
change of its own, right before this one and at the same position.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Action = Literal["insert", "update", "delete", "read", "truncate"]
ACTIONS: tuple[Action, ...] = ("insert", "update", "delete", "read", "truncate")  # by their code in a chunk

BODY_START = b'{"record":'
RECORD_START = len(BODY_START)


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
    was: str | None = None  # the key before, if this change has moved the row
    too_large_bytes: int = 0  # > 0: the row was above max_message_bytes; the record holds the key's columns alone

    @property
    def record(self) -> bytes:
        return self.body[RECORD_START : RECORD_START + self.record_bytes]


def make_key(schema: str, table: str, values: tuple[str | None, ...]) -> str:
    """``public.jobs:42``; parts that hold ``\\``, ``.`` or ``:`` are escaped with a backslash, null is ``\\N``.

    Unique: unescaped ``.`` and ``:`` only ever separate. All keys of a table begin with ``table_prefix(...)``.
    """
    return table_prefix(schema, table) + ":".join("\\N" if v is None else _escape(v) for v in values)


def table_prefix(schema: str, table: str) -> str:
    """What every key of the table begins with, and no other key."""
    return f"{_escape(schema)}.{_escape(table)}:"


def key_values(schema: str, table: str, key: str) -> tuple[str, ...]:
    """The values that `make_key` made a primary key's key of (none of them is null)."""
    rest = key[len(table_prefix(schema, table)) :]
    if "\\" not in rest:
        return tuple(rest.split(":"))
    return tuple(_UNESCAPED.sub(r"\1", part) for part in _PART.findall(rest + ":"))


def group_values(schema: str, table: str, key: str) -> tuple[str | None, ...]:
    """The values that `make_key` made a key of, nulls among them."""
    parts = _PART.findall(key[len(table_prefix(schema, table)) :] + ":")
    return tuple(None if part == "\\N" else _UNESCAPED.sub(r"\1", part) for part in parts)


_PART = re.compile(r"((?:[^\\:]|\\.)*):", re.DOTALL)
_UNESCAPED = re.compile(r"\\(.)", re.DOTALL)


def _escape(part: str) -> str:
    if "\\" in part or ":" in part or "." in part:
        return part.replace("\\", "\\\\").replace(":", "\\:").replace(".", "\\.")
    return part

"""What the decoder is fed with, and why it stops.

`Decoder.fill` takes frames off a connection in COPY BOTH by itself, one after another, without an await between them,
and decodes each into the chunk that it is filling, until there is a reason to stop (`Stop`). The frames are those of
the streaming replication protocol (PostgreSQL documentation, "Streaming Replication Protocol"): XLogData, whose payload
is a message of pgoutput, and keepalives.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from spillway.pgoutput.relation import Relation


class Copy(Protocol):
    """A connection in COPY BOTH: psycopg's ``PGconn``, or frames from a test."""

    def get_copy_data(self, async_: int) -> tuple[int, memoryview]:
        """The next whole frame and its size; 0: none is buffered; -1: COPY has ended. Raises psycopg.Error. The
        compiled decoder asks libpq itself where there is a ``pgconn_ptr``."""


class Keepalive(NamedTuple):
    wal_end: int
    reply_requested: bool


class Full(NamedTuple):
    """The chunk is full, or the next frame needs more credit than is left. The frame is kept and comes first at the
    next ``fill``; that must have ``needed_bytes`` of credit for it."""

    needed_bytes: int


class Ended(NamedTuple):
    """What libpq said in place of a size: -1, the server has ended COPY; -2, an error, which the connection holds."""

    size: int


class Renew(NamedTuple):
    """A transaction has ended, and since the connection was made there was a frame above ``renew_frame_bytes``."""


class Committed(NamedTuple):
    """A transaction has ended, which ends at ``break_at_lsn`` or behind it."""


# None: everything that is buffered was taken. A Relation must be learned before the next `fill`.
Stop = Keepalive | Relation | Full | Ended | Renew | Committed | None

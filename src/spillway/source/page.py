"""Pages of existing rows: read by key, in a transaction of their own, without a write or a lasting lock.

`PageReader` has one query connection (to the source, or to a replica of it) and a decoder of its own. A page is one
transaction: repeatable read, read only; ``LOCK TABLE ... IN ACCESS SHARE MODE`` with a short lock_timeout *before* the
snapshot is taken (a rewriting ALTER between snapshot and SELECT would give an empty page); then in one statement the
snapshot (``txid_current_snapshot``: 12 has no other), the insert position and the table's shape; then the rows by COPY
in text format, whose values are those of the types' output functions and so byte for byte those of the stream. The
transaction is over before the page is used: the oldest snapshot that a backfill holds is as old as one page.

The insert position is read after the snapshot: what the snapshot sees was inserted before. If it stands right behind a
page header of the WAL (offset 24 or 40 of a block of 8 kB) the header is taken off: nobody passes it before there is a
record behind it.

**Order.** Pages follow the primary key in the order of its index, by row comparison, so that any type and collation that
can be a primary key works. With a sort column that leads an index, by that column and then the key. A table without
primary key is read by ranges of ``ctid`` (14 and later). A `Range` is open below and closed above. With a condition the
end of the page is found first (so many rows by the index, whether the condition holds or not), so that no statement
scans on and on for rows that match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spillway.chunk import Chunk
from spillway.source.snapshot import Snapshot

Cursor = tuple[str, ...]  # the values of the order's columns, in PostgreSQL text; of a ctid table the block's number


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be read of one relation (a partition that is published by itself is a relation of its own)."""

    schema: str
    table: str
    where: str | None = None  # SQL, the user's
    sort_column: str | None = None
    start: str | None = None  # the least value of sort_column that is read; needs sort_column


@dataclass(frozen=True, slots=True)
class Range:
    """Rows above ``low`` up to and including ``high``; None: no bound."""

    low: Cursor | None = None
    high: Cursor | None = None


@dataclass(slots=True)
class Page:
    snapshot: Snapshot
    chunk: Chunk  # actions read; its commit LSN is the snapshot's, to be set anew where the page is placed
    cursor: Cursor | None  # where the next page of the range begins; None: there is none
    missing: list[tuple[str, ...]]  # of a page by keys: those that are not there
    seconds: float  # for how long its transaction was open


class PageReader(Protocol):
    """Placeholder of the interface: to be replaced by the class that does it."""

    standby: bool  # the connection is to a server in recovery

    async def relations(self, publication: str, schema: str, table: str) -> list[tuple[str, str]]:
        """The relations whose rows stream under this name: itself, or the partitions that are published by themselves.
        Raises SpillwayError ``not_published``, ``no_grant``, ``no_primary_key`` (before 14)."""

    async def split(self, selection: Selection, ranges: int) -> list[Range]:
        """At most so many ranges of about the same size that cover everything."""

    async def estimate(self, selection: Selection) -> int:
        """How many rows there are, by the planner's statistics; never counts."""

    async def read(
        self,
        selection: Selection,
        within: Range,
        cursor: Cursor | None,
        max_rows: int,
        credit_bytes: int,
        timeout_seconds: float,
    ) -> Page:
        """The rows behind the cursor (None: from the beginning of the range), as many as max_rows and the credit
        allow: a page that is cut short by its credit ends at its last row. Raises `LockTimeout`, `PageTimeout` (read
        fewer rows), `NeedsCredit` (not even the first row fits), SourceUnavailable, SpillwayError."""

    async def read_keys(
        self, selection: Selection, keys: Sequence[tuple[str, ...]], credit_bytes: int, timeout_seconds: float
    ) -> Page:
        """The rows with these primary keys (values in column order, as `change.key_values` gives them)."""

    async def running(self) -> dict[int, str]:
        """Transactions (32 bits) that have an id and have not ended, and who they are for people. Of a standby: none."""

    async def flushed_lsn(self) -> int: ...

    async def close(self) -> None: ...

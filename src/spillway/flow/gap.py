"""The gap of a sink: what it should have had and did not get.

A gap *grows* while its sink takes no part in the slot (its ``last_lsn`` is not known yet); it has ended, and stays on
record, until it was refilled or somebody takes note of it. There is one at the most: another one before that makes it
wider. What a gap swallows is confirmed only after it is on record, with the tables concerned (I2): until then `lsn`
forbids it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from spillway.chunk import Span
from spillway.clock import Clock
from spillway.store.base import Gap, Write, Written

Table = tuple[str, str]


class Gaps:
    """Of one sink. ``commit`` queues a write; ``moved`` is called when `lsn` forbids nothing any more."""

    def __init__(
        self,
        sink: str,
        now: Gap | None,
        commit: Callable[[Write], asyncio.Future[Written]],
        moved: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.now = now
        self.lsn: int | None = None  # the gap begins here, or has swallowed this, and that is not durable yet
        self._sink = sink
        self._commit = commit
        self._moved = moved
        self._clock = clock
        self._writes = 0
        self._swallowed_lsn = 0  # the newest, in this run

    @property
    def growing(self) -> bool:
        return self.now is not None and self.now.last_lsn is None

    def begin(self, lsn: int, reason: str) -> None:
        """The sink takes no part from here on."""
        first_lsn, since = lsn, self._clock.wall()
        tables: tuple[Table, ...] | None = ()
        if self.now is not None:  # nobody has acknowledged that one yet: this one goes on from it
            first_lsn, since, tables = self.now.first_lsn, self.now.since, self.now.tables
        self.now = Gap(first_lsn, None, since, reason, tables)
        self._write(lsn)

    def swallow(self, span: Span, last_lsn: int) -> None:
        """While it grows. Its tables are durable before this can be confirmed."""
        assert self.now is not None
        self._swallowed_lsn = last_lsn
        if self.now.tables is None or set(self.now.tables).issuperset(span.chunk.tables):
            return
        missed = {*self.now.tables, *(span.chunk.table(index) for index in span.indices)}
        if len(missed) > len(self.now.tables):
            self.now = replace(self.now, tables=tuple(sorted(missed)))
            self._write(span.first_lsn)

    def _write(self, lsn: int) -> None:
        """Nothing from here on is confirmed before the gap as it is now is durable."""
        if self.lsn is None:
            self.lsn = lsn
        self._writes += 1
        number = self._writes

        def durable(written: asyncio.Future[Written]) -> None:
            if number == self._writes and not written.cancelled() and written.exception() is None:
                self.lsn = None
                self._moved()

        self._commit(Write(self._sink, gap=self.now)).add_done_callback(durable)

    def missed(self, first_lsn: int, last_lsn: int, reason: str, table: Table) -> None:
        """Changes of a table in this range were not for this sink to have, though it should have had them. Durable
        before what comes next can be confirmed."""
        since = self._clock.wall()
        tables: tuple[Table, ...] | None = (table,)
        if self.now is not None:
            if self.now.last_lsn is None:
                return  # inside of a growing one
            first_lsn, since = min(first_lsn, self.now.first_lsn), self.now.since
            known = self.now.tables
            tables = None if known is None else tuple(sorted({*known, table}))
        self.now = Gap(first_lsn, last_lsn, since, reason, tables)
        self._write(last_lsn)

    async def end(self, lsn: int) -> None:
        """The sink takes part again; the slot was received up to here. If the end is not on disk at a crash, the gap is
        found growing."""
        assert self.now is not None
        self.now = replace(self.now, last_lsn=max(self.now.first_lsn, lsn, self._swallowed_lsn))
        await self._commit(Write(self._sink, gap=self.now))

    async def forget(self) -> None:
        self.now = None  # first: what is missed meanwhile is another one
        await self._commit(Write(self._sink, clear_gap=True))

    async def refilled(self, left: Sequence[Table], *, deletes_repaired: bool) -> None:
        """Of what it has missed these tables are still to be read anew. None are left: it is repaired, but perhaps for
        the deletes in a sink that cannot say what it has."""
        if self.now is None or self.now.last_lsn is None:
            return
        if not left and deletes_repaired:
            await self.forget()
            return
        reason = self.now.reason
        if not left:
            reason = f"rows are refilled; deletes are not repaired, for this sink cannot tell its rows ({reason})"
        self.now = replace(self.now, tables=tuple(left), reason=reason)
        await self._commit(Write(self._sink, gap=self.now))


def gap_token(gap: Gap) -> tuple[int, float] | None:
    """Which gap it is, and that it has not grown since; None: it is growing."""
    return None if gap.last_lsn is None else (gap.last_lsn, gap.since)

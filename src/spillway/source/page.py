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

**Order.** Pages follow the primary key in the order of its index, by row comparison, so that any type and collation
that can be a primary key works. With a sort column that leads an index, by that column and then the key. A table
without primary key is read by ranges of ``ctid`` (14 and later), of which a page is so many blocks. A `Range` is open
below and closed above. With a condition the end of the page is found first (so many rows by the index, whether the
condition holds or not), so that no statement scans on and on for rows that match. The SQL is in
`spillway.source.keyspace`.

**What is asked for** is what the stream sends: the published columns of the table in its order, those rows that the
publication's filter lets through. This is the table's *shape* in the page's own snapshot, compared with every page's;
if it is another one than the last, the decoder learns the table anew. Row security that would hide rows is an error.

**Where a page ends** is its last row: known by its key, or asked of the server in the page's snapshot. When the credit
is used up before the rows are, the statement is cancelled.

One connection, one thing at a time; it is made anew by whatever comes next after it was lost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from spillway.change import key_values, table_prefix
from spillway.chunk import Chunk
from spillway.errors import SpillwayError
from spillway.pgoutput import Decoder, Full
from spillway.position import parse_lsn
from spillway.source import catalog, keyspace
from spillway.source.connect import Connection
from spillway.source.copying import CopyOut
from spillway.source.frames import Frames, begin_frame, commit_frame, row_frame
from spillway.source.keyspace import Cursor
from spillway.source.origin import Expected
from spillway.source.queries import fetch
from spillway.source.refusal import quoted
from spillway.source.shape import Selection
from spillway.source.snapshot import Snapshot, parsed
from spillway.source.view import (
    BY_CTID_SINCE,
    BY_LIST,
    LockTimeout,
    PageTimeout,
    View,
    Views,
    no_primary_key,
    not_published,
    off,
    one,
)

__all__ = [
    "Cursor", "LockTimeout", "NeedsCredit", "Page", "PageReader", "PageTimeout", "Range", "Selection"
]  # fmt: skip

QUESTION_TIMEOUT_SECONDS = 60.0  # of what is asked beside pages
KEYS_AT_ONCE = 500
SAMPLED_ROWS = 10_000
RANGE_ROWS = 1_000  # a range is not worth a connection of its own with fewer
USUAL_ROWS_TO_A_BLOCK = 50.0  # of a table that was never analyzed

_PUBLICATION_MENDED: Final = {13: 21, 14: 18, 15: 13, 16: 9, 17: 5}  # minor release, by major one
_POSTGRES_EPOCH_MICROSECONDS: Final = 946_684_800_000_000


class NeedsCredit(SpillwayError):
    """``needed_bytes`` of credit are needed: for the first row of a page, or for all rows of a page by keys."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__("needs_credit", f"a page needs a credit of {needed_bytes} bytes")
        self.needed_bytes = needed_bytes


@dataclass(frozen=True, slots=True)
class Range:
    """Rows above ``low`` up to and including ``high``; None: no bound. Cursors (`spillway.source.keyspace`) are made
    here, kept by others and looked into by nobody else."""

    low: Cursor | None = None
    high: Cursor | None = None


@dataclass(slots=True)
class Page:
    snapshot: Snapshot
    chunk: Chunk  # actions read; its commit LSN is the snapshot's, to be set anew where the page is placed
    cursor: Cursor | None  # where the next page of the range begins; None: there is none
    missing: list[tuple[str, ...]]  # of a page by keys: those that are not there
    seconds: float  # for how long its transaction was open
    looked_at: int = 0  # rows, whether they met the condition or not, as far as is known


class PageReader:
    """See the module. Made by `open`. Every method may raise SourceUnavailable, those about a table LockTimeout and
    PageTimeout as well, and SpillwayError ``bad_condition`` for a `where` or `start` that PostgreSQL does not take."""

    def __init__(self, views: Views, publication: str, page_id: bytes) -> None:
        self._views = views
        self._publication = publication
        self._page_id = page_id

    @classmethod
    async def open(
        cls,
        conninfo: str,
        slot: str,
        publication: str,
        new_decoder: Callable[[], Decoder],
        page_id: bytes,
        expected: Expected,
        renew_frame_bytes: int,
    ) -> PageReader:
        """``new_decoder``: as the stream's. ``page_id`` is in the metadata of the rows. After a row above
        ``renew_frame_bytes`` the connection is made anew. Raises SourceUnavailable as `source.origin` does."""
        views = Views(conninfo, slot, publication, new_decoder, expected, renew_frame_bytes)
        async with views.using(QUESTION_TIMEOUT_SECONDS):
            return cls(views, publication, page_id)

    @property
    def standby(self) -> bool:
        """The server is in recovery."""
        return self._views.standby

    @property
    def stream_may_miss_a_table(self) -> bool:
        """A walsender of this server that has decoded a transaction which was open when a table entered the publication
        takes the table for unpublished as long as it lives: "Fix data loss in logical replication" of the release notes
        of May 2025; 12 has no such release."""
        version = self._views.server_version
        return version % 10000 < _PUBLICATION_MENDED.get(version // 10000, 0) or version < 130000

    @property
    def wal_writer_delay_seconds(self) -> float:
        return self._views.wal_writer_delay_seconds

    async def relations(self, schema: str, table: str) -> list[tuple[str, str]]:
        """The relations whose rows stream under this name: itself, or the partitions that are published by themselves.
        Raises SpillwayError ``not_published``, ``no_grant``, ``no_primary_key`` (before 14)."""
        async with self._views.using(QUESTION_TIMEOUT_SECONDS) as session:
            published = await catalog.tables(session.connection, self._publication)
            role = session.connection.info.user
        found = [relation for relation in published if relation.name == (schema, table)]
        if not found:
            raise not_published(self._publication, schema, table)
        for relation in found:
            if not relation.readable:
                raise SpillwayError(
                    "no_grant",
                    f"table {relation.schema}.{relation.table} cannot be read by {role}",
                    f"GRANT USAGE ON SCHEMA {quoted(relation.schema)} TO {quoted(role)}; "
                    f"GRANT SELECT ON {quoted(relation.schema, relation.table)} TO {quoted(role)};",
                )
            if not relation.primary_key and (
                relation.kind == "p" or session.connection.info.server_version < BY_CTID_SINCE
            ):
                raise no_primary_key(relation.schema, relation.table)
        return [(relation.schema, relation.table) for relation in found]

    async def split(self, selection: Selection, ranges: int) -> list[Range]:
        """At most so many ranges of about the same size that cover everything; fewer of a small table."""
        if ranges <= 1:
            return [Range()]
        async with self._views.transaction(selection, QUESTION_TIMEOUT_SECONDS) as view:
            blocks, rows_to_a_block = await _size(view)
            rows = max(1.0, blocks * rows_to_a_block)
            ranges = max(1, min(ranges, int(rows / RANGE_ROWS)))
            order = view.rows.order
            if order.physical:
                ends: list[Cursor] = [(order.tag, _tid(blocks * i // ranges - 1)) for i in range(1, ranges)]
            else:
                percent = min(100.0, 100 * SAMPLED_ROWS / rows)
                found = await _texts(view.connection, view.rows.quantiles(ranges, percent))
                ends = [(order.tag, *values) for values in found]
        return [Range(low, high) for low, high in zip([None, *ends], [*ends, None], strict=True)]

    async def estimate(self, selection: Selection, within: Range | None = None) -> int:
        """How many rows there are, by the planner's statistics; never counts."""
        async with self._views.transaction(selection, QUESTION_TIMEOUT_SECONDS) as view:
            bounds = view.rows.between(*((None, None) if within is None else (within.low, within.high)))
            row = await (await view.connection.execute(view.rows.planned(bounds))).fetchone()
            assert row is not None
            return int(row[0][0]["Plan"]["Plan Rows"])

    async def bounded(self, selection: Selection) -> Range:
        """The range up to the selection's ``most_key``; its ``least_key`` is a bound of every page. No bounds at all
        where the index has the columns in another order: the selection's own conditions hold then."""
        plain, most = Selection(selection.schema, selection.table), selection.most_key
        async with self._views.transaction(plain, QUESTION_TIMEOUT_SECONDS) as view:
            if most is None or not view.shape.key_in_column_order:
                return Range()
            return Range(None, (view.rows.order.tag, *_in_order(view, [most])[0]))

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
        fewer rows), `NeedsCredit` (not even the first row fits), SpillwayError ``order_changed`` (a cursor of before
        the table was rewritten or got another key: nothing but a new beginning helps)."""
        low = within.low if cursor is None else cursor
        began = time.monotonic()
        async with self._views.transaction(selection, timeout_seconds) as view:
            end = await self._end(view, low, within.high, max_rows)
            bounds = view.rows.between(low, within.high if end is None else end)
            by_key = view.shape.key_places(view.rows.order) is not None
            if not by_key:  # a cancelled statement must not take the snapshot with it
                await view.connection.execute("SAVEPOINT rows")
            decoder = self._begin(view, low)
            full = await self._rows(view, view.rows.copy(bounds, max_rows), credit_bytes, max_rows)
            count = decoder.page_rows
            looked_at = max_rows if end is not None and full is None else count
            if full is not None and not count:
                raise NeedsCredit(full.needed_bytes)
            chunk = decoder.take()
            if full is not None or count == max_rows:
                if by_key:
                    end = view.shape.cursor(view.rows.order, _last_key(view, decoder))
                else:
                    await view.connection.execute("ROLLBACK TO rows")
                    end = await self._nth(view, bounds, count, conditioned=True)
        seconds = time.monotonic() - began
        return Page(view.snapshot, chunk, None if end == within.high else end, [], seconds, looked_at)

    async def read_keys(
        self, selection: Selection, keys: Sequence[tuple[str, ...]], credit_bytes: int, timeout_seconds: float
    ) -> Page:
        """The rows with these primary keys (values in column order, as `change.key_values` gives them), all of them or
        `NeedsCredit`. The selection's `where` and `start` count for nothing: a key is missing if the publication does
        not have it."""
        began = time.monotonic()
        wanted = list(dict.fromkeys(keys))
        plain = Selection(selection.schema, selection.table)
        missing: list[tuple[str, ...]] = []
        async with self._views.transaction(plain, timeout_seconds) as view:
            await view.connection.execute(off(BY_LIST))
            decoder = self._begin(view, None)
            for start in range(0, len(wanted), KEYS_AT_ONCE):
                some = wanted[start : start + KEYS_AT_ONCE]
                ordered = _in_order(view, some)
                full = await self._rows(view, view.rows.copy_keys(ordered), credit_bytes, len(wanted))
                if full is not None:
                    raise NeedsCredit(decoder.used_bytes + full.needed_bytes)
                absent = await _texts(view.connection, view.rows.missing_keys(ordered))
                missing += [some[int(number)] for (number,) in absent]
            chunk = decoder.take()
        return Page(view.snapshot, chunk, None, missing, time.monotonic() - began)

    async def key_columns(self, selection: Selection) -> tuple[str, ...]:
        """The primary key's columns, in column order."""
        plain = Selection(selection.schema, selection.table)
        async with self._views.transaction(plain, QUESTION_TIMEOUT_SECONDS) as view:
            return tuple(column.name for column in view.shape.relation.columns if column.in_identity)

    async def read_absent(
        self,
        selection: Selection,
        keys: Sequence[tuple[str, ...]],
        timeout_seconds: float,
        checked: Collection[str] = (),
        credit_bytes: int = 0,
    ) -> Page:
        """Deletes, with n = 0, of those rows with these primary keys that are not there (see `read_keys`). With
        ``checked``, the columns that the decoder's filters look at, a row that does not pass them is not there, either;
        these columns are read for it, within the credit (`NeedsCredit`)."""
        began = time.monotonic()
        wanted = list(dict.fromkeys(keys))
        async with self._views.transaction(Selection(selection.schema, selection.table), timeout_seconds) as view:
            await view.connection.execute(off(BY_LIST))
            missing: list[tuple[str, ...]] = []
            for start in range(0, len(wanted), KEYS_AT_ONCE):
                some = wanted[start : start + KEYS_AT_ONCE]
                ordered = _in_order(view, some)
                if checked:
                    decoder = self._begin(view, None)
                    full = await self._rows(view, view.rows.copy_keys(ordered, checked), credit_bytes, len(some))
                    if full is not None:
                        raise NeedsCredit(decoder.used_bytes + full.needed_bytes)
                    passed = _keys_of(decoder.take())
                    missing += [key for key in some if key not in passed]
                else:
                    absent = await _texts(view.connection, view.rows.missing_keys(ordered))
                    missing += [some[int(number)] for (number,) in absent]
            chunk = self._deletes(view, missing)
        return Page(view.snapshot, chunk, None, missing, time.monotonic() - began)

    def _deletes(self, view: View, keys: Sequence[tuple[str, ...]]) -> Chunk:
        """As the stream would carry them, in a transaction at the snapshot's position."""
        decoder, relation, snapshot = self._begin(view, None), view.shape.relation, view.snapshot
        names = [column.name for column in relation.columns if column.in_identity]
        deletes = [row_frame(relation, None, dict(zip(names, key, strict=True))) for key in keys]
        begin = begin_frame(snapshot.lsn, snapshot.microseconds - _POSTGRES_EPOCH_MICROSECONDS)
        stop = decoder.fill(Frames(begin, *deletes, commit_frame(snapshot.lsn)), sys.maxsize, len(deletes) + 2)
        assert stop is None
        return decoder.take().numbered(0)

    async def running(self) -> dict[int, str]:
        """Transactions (32 bits) that have an id and have not ended, and who they are. A standby has none."""
        async with self._views.using(QUESTION_TIMEOUT_SECONDS) as session:
            return {row["xid"]: row["who"] for row in await fetch(session.connection, "running")}

    async def horizon(self) -> tuple[int, int]:
        """Of a snapshot: below the first number every transaction has ended; from the second on none had."""
        async with self._views.using(QUESTION_TIMEOUT_SECONDS) as session:
            xmin, xmax, _ = parsed((await one(session.connection, "horizon"))["snapshot"])
            return xmin, xmax

    async def seen(self) -> Callable[[int, int], bool]:
        """What all snapshots of this server see from now on, as `Snapshot.sees` says it."""
        replayed_lsn = await self.flushed_lsn() if self.standby else None
        async with self._views.using(QUESTION_TIMEOUT_SECONDS) as session:
            xmin, xmax, running = parsed((await one(session.connection, "horizon"))["snapshot"])
        return Snapshot(0, xmin, xmax, running, 0, replayed_lsn).sees

    async def flushed_lsn(self) -> int:
        """What the server has on disk; of a standby what it has replayed."""
        async with self._views.using(QUESTION_TIMEOUT_SECONDS) as session:
            return parse_lsn((await one(session.connection, "flushed"))["lsn"])

    async def close(self) -> None:
        """For good. Waits for what is being done: cancel it first."""
        await self._views.close()

    # The rows.

    def _begin(self, view: View, low: Cursor | None) -> Decoder:
        decoder = view.decoder
        decoder.take()  # of a page that failed
        page_id = self._page_id
        if not view.shape.keyed:  # rows are told apart by the page's id and their number in it
            page_id += b":" + ":".join((str(view.shape.relation.oid), *(low or ()))).encode()
        decoder.begin_page(page_id, view.snapshot.lsn, view.snapshot.microseconds)
        return decoder

    async def _rows(self, view: View, query: sql.Composed, credit_bytes: int, max_rows: int) -> Full | None:
        copy = CopyOut(view.connection)
        await copy.start(query.as_bytes(view.connection))
        full = await copy.fill(view.decoder, view.shape.relation.oid, credit_bytes, max_rows)
        if full is not None:
            await copy.cancel()
        return full

    async def _end(self, view: View, low: Cursor | None, high: Cursor | None, max_rows: int) -> Cursor | None:
        """Where the page ends at the latest; None: at the end of the range."""
        if view.rows.order.physical:
            return await _end_of_blocks(view, low, high, max_rows)
        if view.rows.condition is None:
            return None
        return await self._nth(view, view.rows.between(low, high), max_rows, conditioned=False)

    async def _nth(self, view: View, bounds: Sequence[sql.Composable], n: int, *, conditioned: bool) -> Cursor | None:
        found = await _texts(view.connection, view.rows.nth(bounds, n, conditioned=conditioned))
        return (view.rows.order.tag, *found[0]) if found else None


async def _size(view: View) -> tuple[int, float]:
    """Blocks, and rows to a block."""
    row = await one(view.connection, "size", oid=view.shape.relation.oid)
    return int(row["blocks"] or 0), float(row["rows_to_a_block"] or USUAL_ROWS_TO_A_BLOCK)


async def _end_of_blocks(view: View, low: Cursor | None, high: Cursor | None, max_rows: int) -> Cursor | None:
    blocks, rows_to_a_block = await _size(view)
    first = 0
    if low is not None:
        block, offset = view.rows.values(low)[0].strip("()").split(",")
        first = int(block) + (int(offset) >= keyspace.LAST_OFFSET)
    last = first + max(1, int(max_rows / rows_to_a_block)) - 1
    limit = blocks - 1
    if high is not None:
        limit = min(limit, int(view.rows.values(high)[0].strip("()").split(",")[0]))
    return None if last >= limit else (view.rows.order.tag, _tid(last))


def _in_order(view: View, keys: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Primary keys, whose values are in column order, in the order of its index."""
    name = f"{view.rows.schema}.{view.rows.table}"
    places = view.shape.key_places(view.rows.order)
    if places is None:
        raise no_primary_key(view.rows.schema, view.rows.table)
    if any(len(key) != len(places) for key in keys):
        raise SpillwayError(
            "order_changed", f"the primary key of {name} has changed", "cancel this backfill and start it again"
        )
    return [[key[place] for place in places] for key in keys]


def _keys_of(chunk: Chunk) -> set[tuple[str, ...]]:
    return {key_values(*chunk.table(place), chunk.key_texts(place)[0].decode()) for place in range(chunk.count)}


def _tid(block: int) -> str:
    """Behind every row of the block."""
    return f"({block},{keyspace.LAST_OFFSET})"


def _last_key(view: View, decoder: Decoder) -> tuple[str, ...]:
    name = (view.shape.relation.schema, view.shape.relation.table)
    return key_values(*name, table_prefix(*name) + decoder.last_key.decode())


async def _texts(connection: Connection, query: sql.Composed) -> list[tuple[str, ...]]:
    """The rows of a query as the server writes them; none of the values is null."""
    result = (await connection.execute(query)).pgresult
    assert result is not None
    return [tuple(_text(result.get_value(i, j) or b"") for j in range(result.nfields)) for i in range(result.ntuples)]


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise SpillwayError(
            "not_utf8",
            "the key of a row is not valid UTF-8, though that is the database's encoding",
            "backfill the table without --where and --parallel",
        ) from None

"""Pages in the small world: a reader of its rows that misbehaves by dice, and the judge of what a sink has in the end.

`FakePageReader` does what the one of spillway.source.page promises, over the rows of `Postgres`: what a snapshot sees,
in the order of the key, as many as the credit and max_rows allow, and what may go wrong. Between the snapshot and the
insert position, and before the page is handed out, time goes by. A standby has rows of its own, replayed in the order
of the WAL, some time behind.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from invariants.world import Image, Postgres, Took, Version, World, apply, version_of
from spillway.change import ACTIONS
from spillway.chunk import ChunkBuilder
from spillway.errors import SourceUnavailable
from spillway.flow.route import Router
from spillway.source.page import LockTimeout, NeedsCredit, Page, PageTimeout, Range
from spillway.source.page import Selection as Wanted
from spillway.source.snapshot import Snapshot

Cursor = tuple[str, ...]

ROW_BYTES = 1536  # credit for a row, beside three times its body
_READ = ACTIONS.index("read")


@dataclass(frozen=True)
class Asked:
    """A page that was handed out."""

    life: int
    backfill: str
    within: Range | None  # None: by keys
    cursor: Cursor | None
    keys: tuple[str, ...]  # of its rows


@dataclass
class Standby:
    """Replays the WAL behind the primary."""

    images: dict[str, dict[str, Image]]
    next: int  # of the transactions
    lsn: int

    def replay(self, postgres: Postgres, most: int) -> None:
        for _, end_lsn, rows in postgres.transactions[self.next : self.next + most]:
            for row in rows:
                apply(self.images, row)
            self.next += 1
            self.lsn = end_lsn


@dataclass
class FakePages:
    """Opens the readers of a world. Made before anything is committed that is streamed."""

    postgres: Postgres
    dice: random.Random
    trouble: float = 0.0
    lag: bool = False  # time goes by where it may
    standby: Standby | None = None
    primary: bool = True  # there is one beside the standby
    stream_may_miss_a_table: bool = False
    asked: list[Asked] = field(default_factory=list)
    open_readers: int = 0

    async def open(self, router: Router, life: int, backfill: str, primary: bool) -> FakePageReader:
        await self.pause()
        if self.dice.random() < self.trouble / 4:
            raise SourceUnavailable("refused", "no connection")
        self.open_readers += 1
        return FakePageReader(self, router, life, backfill, primary)

    async def pause(self) -> None:
        if self.lag and self.dice.random() < 0.5:
            await asyncio.sleep(self.dice.random() * 0.01)
        self.postgres.show_some()


def pages(world: World, *, standby: bool = False, primary: bool = True) -> FakePages:
    postgres = world.postgres
    fake = FakePages(postgres, random.Random(world.dice.random()), primary=primary)
    if standby:
        images = {table: dict(rows) for table, rows in postgres.images.items()}
        fake.standby = Standby(images, len(postgres.transactions), postgres.lsn)
    world.pages = fake
    return fake


class FakePageReader:
    wal_writer_delay_seconds = 0.2

    def __init__(self, owner: FakePages, router: Router, life: int, backfill: str, primary: bool) -> None:
        self.standby = owner.standby is not None and not (primary and owner.primary)
        self.stream_may_miss_a_table = owner.stream_may_miss_a_table
        self._owner = owner
        self._postgres = owner.postgres
        self._router = router
        self._life = life
        self._backfill = backfill

    async def relations(self, schema: str, table: str) -> list[tuple[str, str]]:
        await self._trouble(table)
        return [(schema, table)]

    async def split(self, selection: Wanted, ranges: int) -> list[Range]:
        await self._trouble(selection.table)
        names = sorted(self._images(selection.table))
        ends = [("k", names[len(names) * n // ranges]) for n in range(1, ranges)] if len(names) > ranges else []
        return [Range(low, high) for low, high in zip([None, *ends], [*ends, None], strict=True)]

    async def estimate(self, selection: Wanted) -> int:
        await self._trouble(selection.table)
        return len(self._images(selection.table))

    async def read(
        self,
        selection: Wanted,
        within: Range,
        cursor: Cursor | None,
        max_rows: int,
        credit_bytes: int,
        timeout_seconds: float,
    ) -> Page:
        await self._trouble(selection.table)
        low, high = within.low if cursor is None else cursor, within.high
        images = self._images(selection.table)
        names = sorted(n for n in images if (low is None or ("k", n) > low) and (high is None or ("k", n) <= high))
        snapshot = self._snapshot()
        taken = self._fitting([(name, images[name]) for name in names[:max_rows]], credit_bytes)
        end = high if len(taken) == len(names) < max_rows else ("k", taken[-1][0])
        page = await self._page(snapshot, selection, taken, None if end == high else end, [])
        self._note(within, cursor, taken)
        return page

    async def read_keys(
        self, selection: Wanted, keys: Sequence[tuple[str, ...]], credit_bytes: int, timeout_seconds: float
    ) -> Page:
        await self._trouble(selection.table)
        images = self._images(selection.table)
        found = [(name, images[name]) for (name,) in dict.fromkeys(keys) if name in images]
        if len(self._fitting(found, credit_bytes)) < len(found):
            raise NeedsCredit(len(found) * (ROW_BYTES + 3 * max(len(image.body) for _, image in found)))
        missing = [key for key in keys if key[0] not in images]
        page = await self._page(self._snapshot(), selection, found, None, missing)
        self._note(None, None, found)
        return page

    async def running(self) -> dict[int, str]:
        await self._owner.pause()
        if self.standby:
            return {}
        return {one.xid & 0xFFFFFFFF: f"transaction {one.xid}" for one in self._postgres.running}

    async def horizon(self) -> tuple[int, int]:
        await self._owner.pause()
        oldest = min((one.xid for one in self._postgres.running), default=self._postgres.next_xid)
        return oldest, self._postgres.next_xid

    async def flushed_lsn(self) -> int:
        await self._owner.pause()
        if self.standby:
            self._replay()
            assert self._owner.standby is not None
            return self._owner.standby.lsn
        return self._postgres.lsn

    async def close(self) -> None:
        self._owner.open_readers -= 1

    async def _trouble(self, table: str) -> None:
        await self._owner.pause()
        dice, trouble = self._owner.dice, self._owner.trouble
        if self.standby:
            self._replay()
        elif any(row.action == "truncate" and row.table == table for one in self._postgres.running for row in one.rows):
            raise LockTimeout("lock_timeout", f"{table} is locked")
        if dice.random() < trouble:
            match dice.randrange(3):
                case 0:
                    raise LockTimeout("lock_timeout", f"{table} is locked")
                case 1:
                    raise PageTimeout("page_timeout", "it took too long")
                case 2:
                    raise SourceUnavailable("cut", "the connection is gone")

    def _replay(self) -> None:
        assert self._owner.standby is not None
        self._owner.standby.replay(self._postgres, self._owner.dice.choice((0, 1, 2, 100)))

    def _images(self, table: str) -> dict[str, Image]:
        standby = self._owner.standby
        return dict((self._postgres if standby is None else standby).images[table])

    def _snapshot(self) -> Snapshot:
        """As of now; of its insert position see `_page`."""
        postgres, standby = self._postgres, self._owner.standby
        xmax = postgres.ended_xid + 1
        if standby is not None:
            return Snapshot(standby.lsn, xmax, xmax, frozenset(), 0, standby.lsn)
        running = frozenset(one.xid for one in postgres.running if one.xid < xmax)
        return Snapshot(0, min(running, default=xmax), xmax, running, 0)

    def _fitting(self, rows: Sequence[tuple[str, Image]], credit_bytes: int) -> list[tuple[str, Image]]:
        left = credit_bytes
        for at, (_, image) in enumerate(rows):
            needed_bytes = ROW_BYTES + 3 * len(image.body)
            if needed_bytes > left:
                if not at:
                    raise NeedsCredit(needed_bytes)
                return list(rows[:at])
            left -= needed_bytes
        return list(rows)

    async def _page(
        self,
        snapshot: Snapshot,
        selection: Wanted,
        rows: Sequence[tuple[str, Image]],
        cursor: Cursor | None,
        missing: list[tuple[str, ...]],
    ) -> Page:
        await self._owner.pause()
        standby = self._owner.standby
        lsn = snapshot.lsn
        if standby is None:  # now and then more was inserted than is written out, and than the stream will come by
            lsn = self._postgres.lsn + self._owner.dice.choice((0, 0, 40))
        await self._owner.pause()
        builder = ChunkBuilder(self._router.groups)
        for idx, (name, image) in enumerate(rows):
            own = f"public.{selection.table}:{name}"
            texts = [own, ""]
            for columns in self._router.group_columns("public", selection.table):
                texts += (own if columns is None else image.group, "")
            builder.add(
                ("public", selection.table), _READ, lsn, idx, snapshot.microseconds, image.body, len(image.body) - 10,
                [text.encode() for text in texts], n=0,
            )  # fmt: skip
        seen = Snapshot(lsn, snapshot.xmin, snapshot.xmax, snapshot.running, 0, snapshot.replayed_lsn)
        return Page(seen, builder.take(lsn), cursor, missing, 0.0)

    def _note(self, within: Range | None, cursor: Cursor | None, rows: Sequence[tuple[str, Image]]) -> None:
        names = tuple(name for name, _ in rows)
        self._owner.asked.append(Asked(self._life, self._backfill, within, cursor, names))


# -- the judge ---------------------------------------------------------------------------------------------------------
def judge_rows(world: World, sink: str, tables: Sequence[str] = ("t",), missed: frozenset[str] = frozenset()) -> None:
    """Everything has drained, and a backfill of these tables is complete: the sink has every row, in its newest state,
    and none that is gone; per key nothing older was applied after something newer in one life; and what a crash has
    brought back ended with the newest that the sink had been given. ``missed``: keys that a gap has swallowed."""
    postgres, fake, selection = world.postgres, world.sinks[sink], world.selections[sink]
    assert not postgres.running, "the judge comes when all is visible"
    # What was applied and not answered is sent again, and so is what it had superseded.
    repeats = fake.semantics == "ordered" or (fake.semantics != "events" and fake.loses_answers)
    if not repeats:
        _judge_positions(fake.took, sink)
    everything = {"insert", "update", "delete"} <= selection.actions
    for table in tables:
        if table not in selection.tables:
            continue
        took = [one for one in fake.took if one.key.startswith(f"public.{table}:")]
        truncated = [one for one in took if one.action == "truncate"]
        ignored = set() if selection.truncates else _truncated(postgres, table)
        alive = {f"public.{table}:{name}": version_of(i.body) for name, i in postgres.images[table].items()}
        by_key: dict[str, list[Took]] = {key: list(truncated) for key in alive}
        for one in took:
            if one.action != "truncate":
                by_key.setdefault(one.key, [])
        for key in by_key:
            by_key[key] = [one for one in took if one.key == key or one.action == "truncate"]
        # By groups a row that goes and comes again in another group is in order with neither.
        ordered = selection.grouping and table not in selection.groups_of
        for key, entries in by_key.items():
            if key in missed:
                continue
            what = f"{sink} {key}: {[(one.life, one.action, one.version) for one in entries]}"
            if ordered and key not in ignored:
                _judge_order(entries, what, repeats=repeats)
            if key in alive:
                _judge_row(entries, alive[key], what, newest=everything, ordered=ordered)
            elif "delete" in selection.actions and ordered and entries and key not in ignored:
                assert entries[-1].action in ("delete", "truncate"), f"gone, but there: {what}"


def _judge_positions(took: Sequence[Took], sink: str) -> None:
    highest: dict[tuple[int, str], tuple[int, int, int]] = {}
    for one in took:
        for key in one.ordered_by:
            last = highest.get((one.life, key), (0, 0, 0))
            assert one.position >= last, f"{sink} {key}: {one.position} after {last}, {one.action}"
            highest[one.life, key] = one.position


def _truncated(postgres: Postgres, table: str) -> set[str]:
    """Keys that a TRUNCATE has taken away."""
    gone: set[str] = set()
    seen: set[str] = set()
    for _, _, rows in postgres.transactions:
        for row in rows:
            if row.table == table:
                if row.action == "truncate":
                    gone |= seen
                seen.add(row.key)
    return gone if not gone else gone | seen | {f"public.{table}:{name}" for name in postgres.images[table]}


def _judge_order(entries: Sequence[Took], what: str, *, repeats: bool) -> None:
    highest: dict[int, Version] = {}
    for one in entries:
        if not repeats:
            assert one.version >= highest.get(one.life, (0, 0)), f"{one.version} after {highest[one.life]}: {what}"
        highest[one.life] = max(highest.get(one.life, (0, 0)), one.version)
    if entries:
        assert entries[-1].version == max(highest.values()), f"ends with an older one: {what}"


def _judge_row(entries: Sequence[Took], version: Version, what: str, *, newest: bool, ordered: bool) -> None:
    assert entries, f"a row that never came: {what}, {version}"
    whole: bool | None = None
    for one in entries:
        if one.action in ("delete", "truncate"):
            whole = None
        elif one.whole:
            whole = True
        else:
            whole = whole or False
    if ordered:
        assert whole is not None, f"there, but gone: {what}"
    if newest:
        assert any(one.version == version for one in entries), f"the newest, {version}, is missing: {what}"
        if ordered:
            assert entries[-1].version == version, f"ends with {entries[-1].version}, not {version}: {what}"
            assert whole, f"never whole: {what}"

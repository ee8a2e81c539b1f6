"""A small world for the flow: a source of made-up transactions, sinks that misbehave by dice, crashes by copy.

The real store, window, delivery and capture run; the stream, the decoder and the sinks are replaced. Chunks end where
the dice say, so that spans of one change and of some dozens come about, and transactions that are cut. A crash is what
the disk held at that moment: the state file and its log are copied as they are, everything in memory is dropped, and
a new engine starts on the copy, reading the slot from what "Postgres" was told. The record of what each sink applied
survives, as the outside world does. Time runs fifty times as fast.

Rows have the key that a transaction gives them, in table ``t`` or, as ``u:key``, in table ``u``. In each table they
also belong to a group, which changes now and then: sinks that are ordered by groups get two keys with such a change.

**Rows and snapshots.** `Postgres` also keeps the rows themselves. A commit is carried by the stream at once; with
``lag`` it becomes visible to snapshots later, by dice, those of different rows in any order, as under synchronous
replication. Who changes a row waits for the one before, as row locks have it. `FakePageReader` (invariants.paging)
reads from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from spillway.change import ACTIONS, Action
from spillway.chunk import MOVED, OLD, WHOLE, Batch, Chunk, ChunkBuilder, Message
from spillway.errors import Finding, SourceUnavailable
from spillway.flow.backfill import Backfill
from spillway.flow.budget import Budget
from spillway.flow.capture import Capture
from spillway.flow.delivery import Delivery
from spillway.flow.inflow import Process, SinkSpec
from spillway.flow.names import TableNames
from spillway.flow.paging import Manners
from spillway.flow.progress import BackfillState, Request, of_json
from spillway.flow.route import ROW_ACTIONS, Router, Subscription
from spillway.metrics import Metrics
from spillway.pgoutput import Committed, Full, Keepalive, Relation, Renew, TableInfo
from spillway.sinks.base import OK, Result, Semantics, reject, retry, sink_down
from spillway.source.page import PageReader
from spillway.store.base import BackfillDocument, Identity, Store
from spillway.store.sqlite import open_store

SPEED = 50.0
TABLES = ("t", "u")
GROUPS = 3  # of rows, in each table
GROUP_CHANGES = 4  # an update of a row after so many changes of it moves it to another group
CHUNKS = (1, 1, 2, 3, 5, 8, 20, 60)  # changes after which a chunk ends, by dice
FIRST_XID = (3 << 32) - 40  # of 64 bits: what the stream says of it, 32 bits, begins anew soon


class FastClock:
    def monotonic(self) -> float:
        return time.monotonic() * SPEED

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / SPEED)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds / SPEED)


@dataclass(frozen=True)
class Row:
    """A row operation as the server logs it."""

    commit_lsn: int
    commit_idx: int
    table: str
    action: Action
    key: str
    body: bytes
    group: str
    was: str | None = None
    was_group: str | None = None
    xid: int = 0  # of 64 bits
    whole: bool = True  # False: an update without some large column


@dataclass(frozen=True)
class Image:
    """A row as it is in its table: the body that the newest change gave it."""

    body: bytes
    group: str


@dataclass(eq=False)
class Transaction:
    """One that has not ended for the others yet."""

    xid: int
    touches: set[str]  # keys, and tables that it truncates
    rows: list[Row] = field(default_factory=list)  # once its commit is in the WAL


@dataclass
class Postgres:
    """What the server remembers: committed transactions, what it was told may go; the rows as snapshots see them."""

    transactions: list[tuple[int, int, list[Row]]] = field(default_factory=list)  # commit_lsn, end_lsn, rows
    confirmed_lsn: int = 0
    lsn: int = 1000
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    chunks: Sequence[int] = CHUNKS
    _changes: dict[str, int] = field(default_factory=dict)  # of each row, so far
    _groups: dict[str, str] = field(default_factory=dict)  # in which each row is
    lag: float = 0.0  # the part of the transactions whose commit is carried before it is visible
    running: list[Transaction] = field(default_factory=list)  # open, or committed and not visible yet
    next_xid: int = FIRST_XID
    ended_xid: int = FIRST_XID - 1  # the highest that has ended for the others
    images: dict[str, dict[str, Image]] = field(default_factory=lambda: {table: {} for table in TABLES})
    cuts: int = 0  # of connections of streams

    def commit(self, *rows: tuple[str, str] | tuple[str, str, str]) -> None:
        """A transaction: (action, key), ("move", old key, new key), ("partial", key): an update without some large
        column, or ("truncate", table)."""
        self.finish(self.begin(*rows), *rows)

    def exists(self, *keys: str) -> None:
        """Rows that were there before the slot was made."""
        self.commit(*(("insert", key) for key in keys))
        self.transactions.pop()
        self.confirmed_lsn = self.lsn

    def begin(self, *rows: tuple[str, str] | tuple[str, str, str]) -> Transaction:
        """It has its id, and its locks on these rows: whoever has them must be done first."""
        touches = {_own(key) if action != "truncate" else f"public.{key}:" for action, *keys in rows for key in keys}
        for other in [one for one in self.running if _conflict(one.touches, touches)]:
            assert other.rows, "a row that an open transaction has changed: the test waits for itself"
            self.show(other)
        transaction = Transaction(self.next_xid, touches)
        self.next_xid += 1
        self.running.append(transaction)
        return transaction

    def finish(self, transaction: Transaction, *rows: tuple[str, str] | tuple[str, str, str]) -> None:
        """It commits, with these changes."""
        self.lsn += 100
        changes = [replace(self._change(idx, *row), xid=transaction.xid) for idx, row in enumerate(rows)]
        self.transactions.append((self.lsn, self.lsn + 48, changes))
        self.lsn += 48
        transaction.rows = changes
        if not changes or self.dice.random() >= self.lag:
            self.show(transaction)

    def show(self, transaction: Transaction) -> None:
        """It has ended for everybody: every snapshot from now on sees it, or that it was rolled back."""
        self.running.remove(transaction)
        self.ended_xid = max(self.ended_xid, transaction.xid)
        for row in transaction.rows:
            apply(self.images, row)

    def has(self, key: str) -> bool:
        """Whether the row is there for whoever has its lock."""
        return _own(key) in self._groups

    def show_some(self, part: float = 0.3) -> None:
        for transaction in [one for one in self.running if one.rows]:
            if self.dice.random() < part:
                self.show(transaction)

    def _change(self, idx: int, action: str, key: str, new: str | None = None) -> Row:
        if action == "truncate":
            for own in [own for own in self._groups if own.startswith(f"public.{key}:")]:
                del self._groups[own]
            return Row(self.lsn, idx, key, "truncate", "", b'{"record":null', "")
        table, _, name = key.rpartition(":")
        table = table or "t"
        old = f"public.{table}:{name}" if new is not None else None
        name = name if new is None else new.rpartition(":")[2]
        own = f"public.{table}:{name}"
        count = self._changes[own] = self._changes.get(own, 0) + 1
        was_group = self._groups.pop(old or own, None)
        group = f"public.{table}:group {(count // GROUP_CHANGES + ord(name[-1])) % GROUPS}"
        if action == "delete":
            group = was_group or group
        else:
            self._groups[own] = group
        return Row(
            self.lsn, idx, table, "update" if action in ("move", "partial") else action, own,  # type: ignore[arg-type]
            b'{"record":{"id":"%b","v":"%d/%d"}' % (name.encode(), self.lsn, idx), group, old,
            was_group if action in ("update", "move", "partial") and was_group != group else None,
            whole=action != "partial",
        )  # fmt: skip


def _own(key: str) -> str:
    table, _, name = key.rpartition(":")
    return f"public.{table or 't'}:{name}"


def _conflict(ours: set[str], theirs: set[str]) -> bool:
    if ours & theirs:
        return True
    truncated = tuple(one for one in ours | theirs if one.endswith(":"))
    return any(one.startswith(truncated) for one in ours) and any(one.startswith(truncated) for one in theirs)


def apply(images: dict[str, dict[str, Image]], row: Row) -> None:
    """What a change does to the rows."""
    rows = images[row.table]
    if row.action == "truncate":
        rows.clear()
        return
    rows.pop(name_of(row.was or row.key), None)
    if row.action != "delete":
        rows[name_of(row.key)] = Image(row.body, row.group)


def name_of(key: str) -> str:
    return key.rpartition(":")[2]


class Begin(NamedTuple):
    commit_lsn: int


class Commit(NamedTuple):
    commit_lsn: int
    end_lsn: int


Frame = Begin | Row | Commit | Keepalive


class FakeDecoder:
    """What capture uses of a decoder, and `FakeStream.fill`. It counts credit as the real one does."""

    def __init__(self, router: Router, frame_overhead_bytes: int) -> None:
        self.largest_frame_bytes = 0
        self.in_transaction = False
        self.break_at_lsn = 0
        self._truncates = 0
        self._group_columns = router.group_columns
        self._frame_overhead_bytes = frame_overhead_bytes
        self._builder = ChunkBuilder(router.groups)
        self._wanted: dict[str, frozenset[Action]] = {}
        self._commit = Commit(0, 0)
        self._used_bytes = 0

    @property
    def count(self) -> int:
        return self._builder.count

    def take(self) -> Chunk:
        chunk = self._builder.take(*self._commit, self._truncates)
        self._commit, self._used_bytes, self._truncates = Commit(0, 0), 0, 0
        return chunk

    def learn(self, relation: Relation, info: TableInfo, wanted: frozenset[Action]) -> None:
        self._wanted[relation.table] = wanted

    def needs(self, frame: Frame) -> Relation | None:
        """What must be learned first."""
        if isinstance(frame, Row) and frame.table not in self._wanted:
            return Relation(TABLES.index(frame.table), "public", frame.table, "d", ())
        return None

    def take_in(self, frame: Frame, credit_bytes: int, max_changes: int) -> Full | Committed | None:
        payload_bytes = len(frame.body) if isinstance(frame, Row) else 32
        self.largest_frame_bytes = max(self.largest_frame_bytes, payload_bytes)
        needed_bytes = 3 * payload_bytes + self._frame_overhead_bytes
        if self._used_bytes + needed_bytes > credit_bytes or self.count >= max_changes:
            return Full(needed_bytes)
        self._used_bytes += needed_bytes
        if isinstance(frame, Begin):
            self.in_transaction = True
        elif isinstance(frame, Commit):
            self._commit, self.in_transaction = frame, False
            return Committed() if 0 < self.break_at_lsn <= frame.end_lsn else None
        elif isinstance(frame, Row) and frame.action in (*self._wanted[frame.table], "truncate"):
            self._row(frame)
        return None

    def _row(self, row: Row) -> None:
        self._truncates += row.action == "truncate"
        groups: list[str] = []
        for columns in self._group_columns("public", row.table):
            groups += (row.key, row.was or "") if columns is None else (row.group, row.was_group or "")
        if row.was is not None:
            self._add(row, "delete", (row.was, "", *("",) * len(groups)), flags=WHOLE | OLD)
        flags = (WHOLE if row.whole else 0) | (MOVED if row.was else 0)
        self._add(row, row.action, (row.key, row.was or "", *groups), flags)

    def _add(self, row: Row, action: Action, keys: Sequence[str], flags: int) -> None:
        self._builder.add(
            ("public", row.table), ACTIONS.index(action), row.commit_lsn, row.commit_idx, int(time.time() * 1e6),
            row.body, len(row.body) - 10, [key.encode() for key in keys], n=min(row.commit_idx + 1, 255), flags=flags,
            xid=row.xid & 0xFFFFFFFF,
        )  # fmt: skip


class FakeStream:
    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._frames: list[Frame] = []
        self._kept: Frame | None = None  # for which there was no credit
        self._sent = 0
        self.decoded = 0  # frames
        self._start = postgres.confirmed_lsn
        self.flush_sent = postgres.confirmed_lsn
        self._chunk_ends = self._dice()
        self._sent_lsn = postgres.confirmed_lsn
        self._asked = False  # for a keepalive
        self._cuts = postgres.cuts

    def _dice(self) -> int:
        return self._postgres.dice.choice(self._postgres.chunks)

    def next(self) -> Frame | None:
        if self._cuts != self._postgres.cuts:
            raise SourceUnavailable("cut", "the connection is gone")
        if self._asked and (not self.something_is_buffered or self._postgres.dice.random() < 0.1):
            self._asked = False
            idle = not self._frames and self._sent == len(self._postgres.transactions)
            return Keepalive(max(self._sent_lsn, self._postgres.lsn if idle else 0), False)
        while not self._frames and self._sent < len(self._postgres.transactions):
            commit_lsn, end_lsn, rows = self._postgres.transactions[self._sent]
            self._sent += 1
            if end_lsn > self._start:
                self._frames = [Begin(commit_lsn), *rows, Commit(commit_lsn, end_lsn), Keepalive(end_lsn, False)]
        if not self._frames:
            return None
        frame = self._frames.pop(0)
        if isinstance(frame, Commit):
            self._sent_lsn = frame.end_lsn
        return frame

    def fill(
        self, decoder: FakeDecoder, credit_bytes: int, max_changes: int
    ) -> Full | Keepalive | Relation | Renew | Committed | None:
        while True:
            if decoder.count >= self._chunk_ends:  # no more has come yet
                self._chunk_ends = self._dice()
                return None
            frame, self._kept = self._kept, None
            frame = frame or self.next()
            if frame is None:
                return None
            if isinstance(frame, Keepalive):
                if decoder.in_transaction and not frame.reply_requested:
                    continue
                return frame
            stop = decoder.needs(frame) or decoder.take_in(frame, credit_bytes, max_changes)
            if isinstance(stop, Relation | Full):
                self._kept = frame
                return stop
            self.decoded += 1
            if stop is not None:
                return stop

    @property
    def something_is_buffered(self) -> bool:
        return bool(self._kept or self._frames or self._sent < len(self._postgres.transactions))

    async def again(self) -> bool:
        await asyncio.sleep(0)
        return self.something_is_buffered and self._postgres.dice.random() < 0.5

    async def more(self) -> None:
        while not self.something_is_buffered and not self._asked and self._cuts == self._postgres.cuts:
            await asyncio.sleep(0.001)

    def send_feedback(self, write_lsn: int, flush_lsn: int, reply: bool = False) -> None:
        assert flush_lsn >= self._postgres.confirmed_lsn or flush_lsn == 0, "the confirmed position went back (I1)"
        self._postgres.confirmed_lsn = max(self._postgres.confirmed_lsn, flush_lsn)
        self._asked = self._asked or reply

    async def flush(self) -> None:
        pass


@dataclass
class FakeConnection:
    stream: FakeStream

    async def describe(self, relation: Relation) -> TableInfo:
        return TableInfo(1, ("id",), {})

    def unkeyable(
        self, relation: Relation, info: TableInfo, columns: tuple[str, ...] | None, needs_key: bool
    ) -> Finding | None:
        return None

    async def published_as(self, name: tuple[str, str], oid: int) -> bool:
        return False

    async def close(self) -> None:
        pass


Applied = tuple[tuple[int, int, int], tuple[str, ...]]  # position, keys
Version = tuple[int, int]  # the position of the change that made a row what it is


class Took(NamedTuple):
    """What a sink applied, as rows: the row of this key is in this version now, or is gone."""

    life: int
    key: str  # of a TRUNCATE what the keys of its table begin with
    version: Version
    action: Action
    whole: bool
    position: tuple[int, int, int] = (0, 0, 0)  # in the stream, as flow has it
    ordered_by: tuple[str, ...] = ()


def version_of(body: bytes) -> Version:
    lsn, _, idx = body.rpartition(b'"v":"')[2].partition(b'"')[0].partition(b"/")
    return int(lsn), int(idx)


@dataclass
class FakeSink:
    """Misbehaves with probability ``trouble``; ``bad`` keys are rejected always. What was applied is on record: changes
    of the stream in ``applied``, and those and the rows of backfills in ``took``."""

    semantics: Semantics
    dice: random.Random
    max_in_flight: int = 3
    single: bool = False
    trouble: float = 0.0
    down: bool = False
    bad: set[str] = field(default_factory=set)
    applied: list[Applied] = field(default_factory=list)
    took: list[Took] = field(default_factory=list)
    life: int = 0  # of the process
    loses_answers: bool = True
    asked: list[list[Applied]] = field(default_factory=list)
    flying: list[str] = field(default_factory=list)  # keys of all requests
    twice: list[str] = field(default_factory=list)  # keys that were in flight twice at once

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def send(self, batch: Batch) -> Sequence[Result] | Result:
        if self.dice.random() < 0.5:
            batch = Batch(batch.pieces)  # a sink need not look at the messages that flow knows
        self.asked.append([(m.position, m.keys) for m in batch])
        with self._in_flight(batch):
            return await self._send(batch)

    async def _send(self, batch: Batch) -> Sequence[Result] | Result:
        if self.dice.random() < 0.5:
            await asyncio.sleep(self.dice.random() * 0.01)
        if self.down:
            return sink_down("refused")
        if self.dice.random() < self.trouble / 3:
            if self.dice.random() < 0.5 and self.loses_answers:  # of what was applied
                self._apply(batch)
            return sink_down("cut")
        if self.semantics in ("atomic", "ordered"):
            refused = next((n for n, m in enumerate(batch) if self._refuses(m)), None)
            if refused is not None:
                if self.semantics == "ordered":  # what stands before the first failure was applied
                    self._apply(batch[:refused])
                return reject("constraint")
            self._apply(batch)
            return OK
        if self.dice.random() < self.trouble / 3:
            return reject("too_long")  # all of it, for the one that is guilty
        results = [self._one(message) for message in batch]
        if all(result is OK for result in results) and self.dice.random() < 0.8:
            return OK
        return results

    def _one(self, message: Message) -> Result:
        if self._refuses(message):
            return reject("mapping")
        if self.dice.random() < self.trouble:
            return retry("busy") if self.dice.random() < 0.8 else sink_down("http_429")
        self._apply([message])
        return OK

    def _refuses(self, message: Message) -> bool:
        return not self.bad.isdisjoint(message.keys) or self.dice.random() < self.trouble / 5

    def _apply(self, batch: Sequence[Message]) -> None:
        self.applied += [(m.position, m.keys) for m in batch if m.action != "read"]
        for message in batch:
            self._take(message)

    def _take(self, message: Message) -> None:
        change = message.change
        if change.action == "truncate":
            at = (change.commit_lsn, change.commit_idx)
            table = f"{change.schema}.{change.table}:"
            self.took.append(Took(self.life, table, at, change.action, True, message.position))
        elif change.key is not None and change.body.rpartition(b'"v":"')[1]:
            at = version_of(change.body)
            if change.was is not None and self.semantics != "state":  # there the delete is a message of its own
                self.took.append(Took(self.life, change.was, at, "delete", True, message.position, message.keys))
            self.took.append(
                Took(self.life, change.key, at, change.action, change.whole, message.position, message.keys)
            )

    @contextlib.contextmanager
    def _in_flight(self, batch: Batch) -> Iterator[None]:
        keys = [] if self.semantics in ("atomic", "ordered") else [key for m in batch for key in m.keys]
        self.twice += [key for at, key in enumerate(keys) if key in self.flying or key in keys[:at]]
        self.flying += keys
        try:
            yield
        finally:
            for key in keys:
                self.flying.remove(key)


@dataclass(frozen=True)
class Selection:
    """What a sink gets, and what orders it: its key, the groups of these tables, or nothing."""

    tables: tuple[str, ...] = TABLES
    actions: frozenset[Action] = ROW_ACTIONS
    groups_of: tuple[str, ...] = ()
    grouping: bool = True
    truncates: bool = False

    def keys(self, row: Row) -> tuple[str, ...]:
        if not self.grouping or not row.key:
            return ()
        was, key = (row.was_group, row.group) if row.table in self.groups_of else (row.was, row.key)
        return (key,) if was is None or was == key else (was, key)


@dataclass
class Engine:
    """One life of the process."""

    store: Store
    deliveries: dict[str, Delivery]
    capture: Capture
    budget: Budget
    stop: asyncio.Event
    task: asyncio.Task[None]
    postgres: Postgres
    begin: Callable[[BackfillState], Backfill]
    backfills: list[Backfill] = field(default_factory=list)  # of this life

    async def backfill(self, sink: str, table: str = "t", **request: object) -> Backfill:
        """Begin one; durable when this returns."""
        state = BackfillState(str(uuid.uuid4()), sink, Request("public", table, **request))  # type: ignore[arg-type]
        await self.deliveries[sink].note(BackfillDocument(state.id, state.as_json(), ended=False))
        return self.begin(state)

    async def backfilled(self, seconds: float = 60.0) -> None:
        """Until all backfills have ended."""
        async with asyncio.timeout(seconds):
            while not all(backfill.state.has_ended for backfill in self.backfills):
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.005)

    async def settled(self, seconds: float = 60.0) -> None:
        """Until everything was read and nothing waits anywhere but in dead letters."""
        async with asyncio.timeout(seconds):
            while self._reads or any(map(_unsettled, self.deliveries.values())):
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.005)

    @property
    def held_bytes(self) -> int:
        """All credit, but for what libpq's buffer keeps until the next connection."""
        return self.budget.held_bytes - self.capture._libpq_bytes

    @property
    def _reads(self) -> bool:
        transactions = self.postgres.transactions
        return bool(transactions) and self.capture.received_lsn < transactions[-1][1]


def _unsettled(delivery: Delivery) -> bool:
    return bool(delivery.counters.messages or delivery.memory_messages or delivery.open_lsn is not None)


class Pages(Protocol):
    """Where backfills read from (invariants.paging)."""

    def open(self, router: Router, life: int, backfill: str, primary: bool) -> Awaitable[PageReader]: ...


class World:
    def __init__(self, folder: Path, seed: int, limit_bytes: int = 8 << 20) -> None:
        self.folder = folder
        self.dice = random.Random(seed)
        self.postgres = Postgres(dice=random.Random(seed))
        self.sinks: dict[str, FakeSink] = {}
        self.specs: dict[str, dict[str, object]] = {}
        self.selections: dict[str, Selection] = {}
        self.limit_bytes = limit_bytes
        self.lives = 0
        self.pages: Pages | None = None
        self.manners = Manners(run_ahead=100_000, timeout_seconds=30.0)
        self._state = folder / "state-0.db"

    def sink(self, name: str, semantics: Semantics, selection: Selection = Selection(), **spec: object) -> FakeSink:
        in_flight = 1 if semantics in ("ordered", "atomic") else 3
        self.sinks[name] = FakeSink(semantics, random.Random(self.dice.random()), in_flight)
        self.specs[name] = spec
        self.selections[name] = selection or Selection()
        return self.sinks[name]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncEngine:
        engine = await self.start()
        try:
            yield engine
        finally:
            await self.end(engine)

    async def start(self) -> Engine:
        clock = FastClock()
        store = open_store(self._state, clock)
        budget = Budget(self.limit_bytes, len(self.sinks))
        process = Process(store, budget, clock, Metrics())
        deliveries: dict[str, Delivery] = {}
        wants: dict[str, Subscription] = {}
        moved: list[Callable[[], None]] = []
        for name, sink in self.sinks.items():
            spec = SinkSpec(**{
                "name": name, "batch_size": 7, "max_memory_bytes": 1 << 20, "max_messages": 200,
                "max_message_bytes": 1 << 20, "timeout_seconds": 60.0, **self.specs[name],
            })  # type: ignore[arg-type]  # fmt: skip
            delivery = Delivery(
                spec,
                sink,
                store.open_sink(name, "slot"),
                process,
                lambda: [one() for one in moved],  # type: ignore[arg-type, return-value]
            )
            sink.life = self.lives
            deliveries[name] = delivery
            wants[name] = self._subscription(name, delivery)
        router = Router(list(wants.values()))
        identity = store.identity("slot") or Identity("1", 1, "slot", 1, 0)

        async def reserve(lsn: int) -> None:
            nonlocal identity
            if lsn > identity.mark:
                identity = replace(identity, mark=lsn + 500)
                await asyncio.wrap_future(store.write_identity(identity))

        async def connect() -> FakeConnection:
            return FakeConnection(FakeStream(self.postgres))

        capture = Capture(
            "db",
            connect,
            lambda router, frame_overhead_bytes, _: FakeDecoder(router, frame_overhead_bytes),
            router,
            list(deliveries.values()),
            budget,
            reserve,
            lambda *_: None,
            TableNames(store, "slot"),
            clock,  # type: ignore[arg-type, return-value]
        )
        moved.append(capture.moved)
        capture.watermark.confirmed_lsn = self.postgres.confirmed_lsn
        stop = asyncio.Event()
        group: list[asyncio.TaskGroup] = []

        async def live() -> None:
            async with asyncio.TaskGroup() as tasks:
                group.append(tasks)
                for delivery in deliveries.values():
                    tasks.create_task(delivery.run())
                for backfill in engine.backfills:
                    tasks.create_task(backfill.run())
                await tasks.create_task(capture.run(stop))

        life = self.lives

        async def open_reader(backfill: str, *, primary: bool = False) -> PageReader:
            assert self.pages is not None, "a world without pages"
            return await self.pages.open(router, life, backfill, primary)

        def begin(state: BackfillState) -> Backfill:
            delivery = deliveries[state.sink]
            backfill = Backfill(
                state, wants[state.sink], router.keying(delivery), capture, budget.pages, open_reader, self.manners,
                lambda: 1, clock,
            )  # fmt: skip
            moved.append(backfill.wake)
            engine.backfills.append(backfill)
            if group:
                assert not engine.task.done(), engine.task.result()
                group[0].create_task(backfill.run())
            return backfill

        engine = Engine(
            store, deliveries, capture, budget, stop, asyncio.create_task(live()), self.postgres, begin,
        )  # fmt: skip
        for name in self.sinks:
            for _, document in store.backfills(name, ended=False):
                begin(of_json(document))
        return engine

    def _subscription(self, name: str, delivery: Delivery) -> Subscription:
        selection, semantics = self.selections[name], self.sinks[name].semantics
        return Subscription(
            delivery,
            lambda _, table: table in selection.tables,
            selection.actions,
            {("public", table): ("group",) for table in selection.groups_of} or None,
            grouping=selection.grouping,
            needs_key=semantics in ("state", "atomic"),
            splits_key_change=semantics == "state",
            applies_truncate=selection.truncates,
        )

    async def crash(self, engine: Engine) -> None:
        """What is on disk now is what is left."""
        self.lives += 1
        copy = self.folder / f"state-{self.lives}.db"
        # The log first: a checkpoint between the two copies moves pages from the log to the file, never back.
        for suffix in ("-wal", ""):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{self._state}{suffix}", f"{copy}{suffix}")
        confirmed = self.postgres.confirmed_lsn
        await self.end(engine)
        self.postgres.confirmed_lsn = confirmed
        self._state = copy

    async def end(self, engine: Engine) -> None:
        engine.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await engine.task
        await asyncio.to_thread(engine.store.close)

    # -- the oracle -------------------------------------------------------------------------------------------------
    def history(self, sink: str) -> list[Applied]:
        """What the sink should see, in order."""
        state, selection = self.sinks[sink].semantics == "state", self.selections[sink]
        out: list[Applied] = []
        for commit_lsn, _, rows in self.postgres.transactions:
            for row in rows:
                at = (commit_lsn, row.commit_idx)
                wanted = selection.truncates if row.action == "truncate" else row.action in selection.actions
                if row.table not in selection.tables or not wanted:
                    continue
                if state and row.was is not None:
                    out += [((*at, 0), (row.was,)), ((*at, 1), (row.key,))]
                else:
                    out.append(((*at, 0), selection.keys(row)))
        return out

    def judge(self, sink: str, *, crashed: bool, excused: set[tuple[int, int, int]] = frozenset()) -> None:  # type: ignore[assignment]
        """Nothing lost, nothing invented, order per key with replay closure (I2, I3)."""
        expected = self.history(sink)
        applied = self.sinks[sink].applied
        known = dict(expected)
        state = self.sinks[sink].semantics == "state"
        # Two of a key may share a batch there, which is repeated when a part of it failed or the answer was lost.
        crashed = crashed or self.sinks[sink].semantics in ("ordered", "atomic")
        assert not self.sinks[sink].twice, f"{sink}: in flight twice at once {self.sinks[sink].twice}"
        for position, keys in applied:
            assert known.get(position) == keys, f"{sink}: invented {position} {keys}"
        if not state:
            lost = set(known) - {position for position, _ in applied} - excused
            assert not lost, f"{sink}: lost {sorted(lost)}"
        for key in sorted({k for _, keys in expected for k in keys}):
            should = [p for p, keys in expected if key in keys and p not in excused]
            got = [p for p, keys in applied if key in keys and p not in excused]
            if not state:
                assert set(got) == set(should), f"{sink} {key}: lost {sorted(set(should) - set(got))}"
            assert got[-1:] == should[-1:], f"{sink} {key}: ends with {got[-1:]}, not {should[-1:]}"
            highest = -1
            previous = -1
            for position in got:
                index = should.index(position)
                if index <= previous:  # a repetition: it must go on through all later ones, which the end shows
                    assert crashed or index == previous or state, f"{sink} {key}: {position} after {should[previous]}"
                    assert index <= highest
                elif not state:
                    assert index == previous + 1, f"{sink} {key}: {position} skips {should[previous + 1]}"
                previous = index
                highest = max(highest, index)


AsyncEngine = contextlib.AbstractAsyncContextManager[Engine]

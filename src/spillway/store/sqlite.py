"""The embedded store: one SQLite file, one thread that writes.

**Group commit.** `write` queues and returns; the writer's thread takes what is queued, up to `GROUP_BYTES` of bodies or
`GROUP_ROWS` rows, applies it in order in one transaction and commits; then the rows' numbers are set and the futures
resolved, on that thread. So the cost of an fsync is shared by all who wait, and no commit takes much longer than a
fraction of a second.

**Checkpoints** run on the same thread between transactions, after the futures: when the WAL has grown by
`CHECKPOINT_BYTES`, and once when there is nothing to do. They truncate the WAL; it stays below `CHECKPOINT_BYTES` plus
one group, unless somebody keeps a read transaction open. Pages freed by removals are used again; when there is nothing
to do and more than `SPARE_PAGES` are free, they are given back to the file system, `VACUUM_PAGES` at a time.

**The disk is full.** The transaction is rolled back and stays queued, `disk_full_since` is set, the reserve file is
released, and the same writes are tried again every `FULL_RETRY_SECONDS`, one to a transaction, in the same order:
nothing overtakes. So positions and removals that stand behind a put which does not fit wait with it; what the reserve
buys is that the puts already asked for, whose bytes are bounded by the memory limit, and what stands behind them
usually still fit, while a removal frees pages inside the file that the next put uses. When a commit has gone through,
`disk_full_since` is None again; the reserve is taken anew when four times its size is free.

**Any other failure** of a statement or a commit is final: after a failed fsync nothing is known about what is on disk.
All that is queued, and every later write, fails with `StoreFailed`, and so does `failed`.

**Jobs.** Everything that changes something is a job: a function of the transaction. One that raises `SpillwayError`
has changed nothing; only its own future fails.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Generic, TypeVar, cast

from spillway.chunk import PLACE_BITS
from spillway.clock import Clock, SystemClock
from spillway.errors import SpillwayError, StoreFailed
from spillway.store.base import Identity, Select, SinkState, TakenTable, Write, Written
from spillway.store.commands import Commands
from spillway.store.compact import Compaction
from spillway.store.file import Reserve, lock, open_writer
from spillway.store.people import PeopleReads
from spillway.store.queue import Put
from spillway.store.rows import CHUNK, SinkRow

GROUP_BYTES = 32 << 20
GROUP_ROWS = 20_000
CHECKPOINT_BYTES = 64 << 20
IDLE_SECONDS = 1.0  # without a write for so long there is time for checkpoint and vacuum
SPARE_PAGES = 512  # free pages that the file keeps
VACUUM_PAGES = 1024
FULL_RETRY_SECONDS = 1.0
MAX_LSN = (1 << 63) - 1
SELECT_LAST_SPAN = f"""
    SELECT coalesce(max(iif(name = 'span', seq, seq >> {PLACE_BITS})), 0) FROM sqlite_sequence
    WHERE name IN ('span', 'message')"""

# Beside SQLITE_FULL: the WAL's index could not be extended.
_FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)

_T = TypeVar("_T")


def open_store(path: Path, clock: Clock | None = None) -> SqliteStore:
    """Open or create the state file. Raises SpillwayError: state_locked, _unwritable, _unreadable, _foreign, _newer,
    _older."""
    return SqliteStore(path, clock or SystemClock())


@dataclass(slots=True)
class _Job(Generic[_T]):
    apply: Callable[[Commands], _T]
    rows: int
    bytes: int
    future: Future[_T]
    result: _T | None = None
    error: SpillwayError | None = None

    def run(self, transaction: Commands) -> None:
        self.error = None
        try:
            self.result = self.apply(transaction)
        except SpillwayError as error:
            self.error = error

    def done(self) -> None:
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type]  # None only where _T is None


class SqliteStore(PeopleReads):
    def __init__(self, path: Path, clock: Clock) -> None:
        self._lock = lock(path)
        try:
            self._db = open_writer(path)
            self._next_span = 1 + self._db.execute(SELECT_LAST_SPAN).fetchone()[0]
            super().__init__(path, clock)
        except BaseException:
            self._lock.close()
            raise
        self._wal = path.with_name(path.name + "-wal")
        self._reserve = Reserve(path)
        self.failed: Future[None] = Future()
        self.disk_full_since: float | None = None
        self._error: StoreFailed | None = None
        self._sinks: dict[str, SinkRow] = {}
        self._jobs: deque[_Job[object]] = deque()
        self._wake = Condition()
        self._closing = False
        self._checkpoint_at = CHECKPOINT_BYTES
        self._thread = Thread(target=self._run, name="spillway-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self.close_reader()
        self._lock.close()

    # -- asking -----------------------------------------------------------------------------------------------------
    def open_sink(self, sink: str, slot: str) -> SinkState:
        self.reads += 1
        state = self._submit(lambda transaction: transaction.open_sink(sink, slot)).result()
        self._sink_ids[sink] = self._sinks[sink].id
        return state

    def write_identity(self, identity: Identity) -> Future[None]:
        _check_lsn(identity.mark)
        return self._submit(lambda transaction: transaction.write_identity(identity))

    def write_taken_table(self, slot: str, oid: int, table: TakenTable) -> Future[None]:
        return self._submit(lambda transaction: transaction.write_taken_table(slot, oid, table))

    def write(self, write: Write) -> Future[Written]:
        if write.position is not None:
            _check_lsn(write.position.commit_lsn)
        elif write.put:
            raise ValueError("a put needs a position")
        puts = [Put.of(span) for span in write.put]
        rows = sum([len(singly) for singly in (puts, write.resolved, write.resolved_held, write.park, write.hold)])
        rows += len(write.refreshed) + (0 if write.ask is None else len(write.ask.keys))
        size = sum([put.size_bytes for put in puts])
        return self._submit(lambda transaction: transaction.write(write, puts), 1 + rows + len(write.bury), size)

    def retry_now(self, sink: str, select: Select) -> Future[int]:
        key, reason = select.key, select.reason
        if key is not None:
            return self._submit(lambda transaction: transaction.retry_key(sink, key))
        if reason is not None:
            counted: Future[int] = Future()
            counted.set_running_or_notify_cancel()
            self._retry_reason(sink, reason, "", 0, counted)
            return counted
        return self._submit(lambda transaction: transaction.retry_all(sink))

    def _retry_reason(self, sink: str, reason: str, after_key: str, count: int, counted: Future[int]) -> None:
        """In bounded transactions, one after another; between them come other writes."""

        def step_done(step: Future[tuple[int, str | None]]) -> None:
            error = step.exception()
            if error is not None:
                counted.set_exception(error)
                return
            more, go_on = step.result()
            if go_on is None:
                counted.set_result(count + more)
            else:
                self._retry_reason(sink, reason, go_on, count + more, counted)

        step = self._submit(lambda transaction: transaction.retry_reason(sink, reason, after_key))
        step.add_done_callback(step_done)

    def discard(self, sink: str, select: Select, limit: int, spare: frozenset[int]) -> Future[int]:
        return self._submit(lambda transaction: transaction.discard(sink, select, limit, spare), limit)

    def compact(self, sink: str, work: Compaction, spare: frozenset[int]) -> Future[int]:
        return self._submit(lambda transaction: transaction.compact(sink, work, spare), CHUNK)

    def discard_dead(self, sink: str, select: Select, limit: int) -> Future[int]:
        return self._submit(lambda transaction: transaction.discard_dead(sink, select, limit), limit)

    def _submit(self, apply: Callable[[Commands], _T], rows: int = 1, size: int = 0) -> Future[_T]:
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # what was asked is done: it cannot be cancelled
        with self._wake:
            if self._error is None and not self._closing:
                self._jobs.append(cast("_Job[object]", _Job(apply, rows, size, future)))
                self._wake.notify()
                return future
        future.set_exception(self._error or StoreFailed("store_closed", "the store is closed"))
        return future

    # -- the writer's thread ----------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while group := self._take():
                self._commit(group)
            self._checkpoint()
        except Exception as error:  # noqa: BLE001  # whatever it was, nothing is known about the disk any more
            self._fail(error)
        finally:
            self._db.close()

    def _take(self) -> list[_Job[object]]:
        """The next group; stays queued until it has committed. Empty: the store is closing. Tidies up meanwhile."""
        tidy = True
        while True:
            with self._wake:
                if not self._jobs and not self._closing:
                    self._wake.wait(IDLE_SECONDS if tidy else None)
                if self._jobs:
                    return self._group()
                if self._closing:
                    return []
            tidy = self._tidy()

    def _group(self) -> list[_Job[object]]:
        group: list[_Job[object]] = []
        rows = size = 0
        for job in self._jobs:
            rows += job.rows
            size += job.bytes
            if group and (rows > GROUP_ROWS or size > GROUP_BYTES or self.disk_full_since is not None):
                break
            group.append(job)
        return group

    def _commit(self, group: list[_Job[object]]) -> None:
        transaction = Commands(self._db, self._sinks, self._next_span, self._clock)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for job in group:
                job.run(transaction)
            transaction.finish()
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in _FULL_CODES:
                raise
            self._disk_is_full()
            return
        transaction.committed()
        self._next_span = transaction.next_span
        self.disk_full_since = None
        with self._wake:
            for _ in group:
                self._jobs.popleft()
        for job in group:
            job.done()
        self._reserve.take()
        if self._wal_bytes() >= self._checkpoint_at:
            self._checkpoint()

    def _disk_is_full(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        again = self.disk_full_since is not None
        self.disk_full_since = self.disk_full_since or self._clock.wall()
        self._reserve.release()
        self._checkpoint()  # what the WAL holds may fit into free pages of the database
        if not again:
            return
        with self._wake:
            if self._closing:
                raise StoreFailed("disk_full", "the disk of the state file is full", "free some space and start again")
            self._wake.wait_for(lambda: self._closing, FULL_RETRY_SECONDS)

    def _wal_bytes(self) -> int:
        try:
            return self._wal.stat().st_size
        except FileNotFoundError:
            return 0

    def _checkpoint(self) -> None:
        """Empty the WAL into the database. What a reader or a full disk prevents is done some time later."""
        with _unless_full():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._checkpoint_at = self._wal_bytes() + CHECKPOINT_BYTES

    def _tidy(self) -> bool:
        """One step of what there is time for now; False: nothing is left to do."""
        with _unless_full():
            if vacuum_step(self._db):
                return True
        if self._wal_bytes():
            self._checkpoint()
        return False

    def _fail(self, error: Exception) -> None:
        failed = error if isinstance(error, StoreFailed) else StoreFailed("store_failed", f"the state file: {error}")
        failed.__cause__ = error if failed is not error else None
        with self._wake:
            self._error = failed
            jobs = list(self._jobs)
            self._jobs.clear()
        self.failed.set_exception(failed)
        for job in jobs:
            job.future.set_exception(failed)


@contextmanager
def _unless_full() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in _FULL_CODES:
            raise


def vacuum_step(db: sqlite3.Connection) -> bool:
    """Give some free pages back to the file system; False: there are few."""
    if db.execute("PRAGMA freelist_count").fetchone()[0] <= SPARE_PAGES:
        return False
    # It yields a row without columns per page: fetchall() takes that for the end, a script goes on to the end.
    db.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
    return True


def _check_lsn(lsn: int) -> None:
    if lsn > MAX_LSN:
        raise ValueError(f"LSN {lsn:X} does not fit the state file")

"""The state file: whose it is, what it must be, and its connections.

One process at a time: the lock file beside it is locked for the life of the store, before anything else is touched; it
holds the number of the process that has it. The lock is flock's: it goes with the process, however that ends.

Files, all with mode 0600: ``X`` the database, ``X-wal`` and ``X-shm`` SQLite's own, ``X.lock`` the lock, ``X.reserve``
space that is given back to the disk when it is full (see `spillway.store.sqlite`).

Settings: pages of 16 KiB: larger ones cost a put a little less and a single park more; WAL with ``synchronous=FULL``;
``secure_delete`` off, which some builds turn on and which would write every freed page once more; the cache bounded to
8 MB for each of the three connections; no mmap, whose pages would count as memory of the process; no automatic
checkpoints, because they would run before a commit is reported.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from importlib import resources
from pathlib import Path
from typing import IO

from spillway.errors import SpillwayError

APPLICATION_ID = 0x53504C57  # "SPLW"
SCHEMA_VERSION = 5
PAGE_BYTES = 16384
CACHE_KIB = 8192
RESERVE_BYTES = 32 << 20
STATEMENTS = 256  # prepared statements that a connection keeps; there are about a hundred
SQLITE_HEAD = b"SQLite format 3\0"
UNREADABLE_REMEDY = "check state.url; restore the file, or remove it to start anew"
BUSY_MILLISECONDS = 1000  # how long a checkpoint waits for readers


def lock(path: Path) -> IO[str]:
    """The lock on the state file; closing it unlocks."""
    name = _beside(path, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    except OSError as error:
        raise SpillwayError(
            "state_unwritable", f"{name}: {error.strerror}", "state.url must be in a folder this user may write"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read().strip() or "unknown"
        file.close()
        raise SpillwayError(
            "state_locked",
            f"the state file {path} is in use by process {holder}",
            "stop that process, or give this one a state.url of its own",
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def open_writer(path: Path) -> sqlite3.Connection:
    """The writing connection; creates the file when it is not there."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            head = os.read(file, len(SQLITE_HEAD))
            if head not in (b"", SQLITE_HEAD):
                raise SpillwayError("state_unreadable", f"{path} is no state file", UNREADABLE_REMEDY)
            os.fchmod(file, 0o600)
        finally:
            os.close(file)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS)
        try:
            _configure(db)
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    except (OSError, sqlite3.OperationalError) as error:
        remedy = "state.url must name a file that this user may write"
        raise SpillwayError("state_unwritable", f"{path}: {error}", remedy) from error
    except sqlite3.DatabaseError as error:
        raise SpillwayError("state_unreadable", f"{path} is no state file: {error}", UNREADABLE_REMEDY) from error
    return db


def open_reader(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS)
    _configure(db)
    db.execute("PRAGMA query_only = on")
    return db


def _configure(db: sqlite3.Connection) -> None:
    for setting in (
        f"page_size = {PAGE_BYTES}",
        f"cache_size = -{CACHE_KIB}",
        "mmap_size = 0",
        "secure_delete = off",
        "wal_autocheckpoint = 0",
        f"busy_timeout = {BUSY_MILLISECONDS}",
    ):
        db.execute(f"PRAGMA {setting}")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    objects = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application != APPLICATION_ID and objects:
        raise SpillwayError(
            "state_foreign", f"{path} is a database of another program", "state.url must name a file of Spillway's own"
        )
    if version > SCHEMA_VERSION:
        raise SpillwayError(
            "state_newer",
            f"the state file {path} is of schema {version}, written by a newer Spillway (this one: {SCHEMA_VERSION})",
            "run that version, or give this one a state.url of its own",
        )
    if objects and version < SCHEMA_VERSION:
        raise SpillwayError(
            "state_older",
            f"the state file {path} is of schema {version}, written by an older Spillway (this one: {SCHEMA_VERSION})",
            "let that version deliver what waits in it, or remove the file to start anew",
        )
    if not objects:
        db.execute("PRAGMA auto_vacuum = incremental")
    db.execute("PRAGMA journal_mode = wal")
    db.execute("PRAGMA synchronous = full")
    if not objects:
        schema = resources.files("spillway.store").joinpath("schema.sql").read_text(encoding="utf-8")
        db.executescript(
            f"BEGIN; {schema}; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
        )
    db.execute("UPDATE sink SET run = run + 1")  # due times of the last run have passed


class Reserve:
    """Disk space that is kept for the moment when there is none."""

    def __init__(self, path: Path) -> None:
        self._path = _beside(path, ".reserve")
        self._folder = path.parent
        self.held = False
        self._path.unlink(missing_ok=True)  # of a run that was killed; its size is not known to be right
        self.take()

    def take(self) -> None:
        """Take it if the disk has plenty left; else some time later."""
        if self.held or free_bytes(self._folder) < 4 * RESERVE_BYTES:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, RESERVE_BYTES)
            self.held = True
        except OSError:  # the disk has filled up meanwhile, or its file system cannot do it
            self._path.unlink()
        finally:
            os.close(file)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self.held = False


def free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)

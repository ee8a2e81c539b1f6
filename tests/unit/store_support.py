"""What the tests of the store share: messages, a clock that stands still, stores in memory-backed folders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spillway.change import Action, Change, Message, make_key
from spillway.position import Position
from spillway.store.base import Park, Write
from spillway.store.sqlite import SqliteStore, open_store

SINK, SLOT = "search", "spillway"


class StillClock:
    """Moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here sleeps")


@contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder whose fsyncs cost nothing, where there is one: for tests that are not about the disk."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def opened(path: Path, clock: StillClock | None = None) -> Iterator[SqliteStore]:
    store = open_store(path, clock or StillClock())
    try:
        store.open_sink(SINK, SLOT)
        yield store
    finally:
        store.close()


def change(
    lsn: int,
    key: str | None = None,
    *,
    table: str = "jobs",
    body: bytes = b'{"record":{"id":1}',
    idx: int = 0,
    action: Action = "update",
) -> Change:
    pks = () if key is None else (key,)
    return Change(lsn, idx, "public", table, action, key, pks, body, 8, 1, True, 1_700_000_000.25 + lsn)


def message(lsn: int, *values: str, table: str = "jobs", body: bytes = b'{"record":{"id":1}') -> Message:
    """A message at this LSN under the keys with these values."""
    keys = tuple(make_key("public", table, (value,)) for value in values)
    return Message(change(lsn, keys[0] if keys else None, table=table, body=body), keys)


def key(value: str, table: str = "jobs") -> str:
    return make_key("public", table, (value,))


def put(*messages: Message) -> Write:
    return Write(SINK, put=messages, position=Position(*messages[-1].position))


def park(*messages: Message, reason: str = "mapping", due_seconds: float = 10.0) -> Write:
    return Write(SINK, park=[Park(m, reason, f"detail of {reason}", due_seconds) for m in messages])


def rows(messages: Sequence[Message]) -> list[int]:
    return [m.row for m in messages]


def everything(store: SqliteStore, page: int = 100) -> list[Message]:
    """The whole queue, page by page."""
    found: list[Message] = []
    while more := store.page(SINK, found[-1].row if found else 0, page, 1 << 30):
        found += more
    return found

"""What the tests of the store share: spans, a clock that stands still, stores in memory-backed folders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spillway.change import ACTIONS, Action, make_key
from spillway.chunk import MOVED, WHOLE, ChunkBuilder, Keying, Message, Span
from spillway.position import Position
from spillway.store.base import Park, Select, Store, Write
from spillway.store.sqlite import SqliteStore, open_store

SINK, SLOT = "search", "spillway"
BODY = b'{"record":{"id":1}'


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


def key(value: str, table: str = "jobs") -> str:
    return make_key("public", table, (value,))


def add(
    builder: ChunkBuilder,
    lsn: int,
    *values: str,
    table: str = "jobs",
    body: bytes = BODY,
    action: Action = "update",
    groups: Sequence[str] = (),
) -> None:
    """A change at this LSN: of the row with this value, or moved from the first to the second."""
    texts = [key(value, table).encode() for value in values]
    was = texts[0] if len(texts) == 2 else b""
    builder.add(
        ("public", table),
        ACTIONS.index(action),
        lsn,
        0,
        (1_700_000_000 + lsn % (1 << 32)) * 1_000_000 + 250_000,
        body,
        8,
        (texts[-1] if texts else b"", was, *[text.encode() for text in groups]),
        flags=WHOLE | (MOVED if was else 0),
    )


def span(
    *lines: tuple[int, str] | tuple[int, str, str] | tuple[int], keying: int = Keying.EVENTS, **given: object
) -> Span:
    """A span of changes: of each the LSN, and the values of its keys."""
    builder = ChunkBuilder()
    for lsn, *values in lines:
        add(builder, lsn, *values, **given)  # type: ignore[arg-type]
    return Span(builder.take(), keying)


def plain(first: int, last: int, *, body: bytes = BODY) -> Span:
    """A change of a row of its own per LSN from one up to, and including, another."""
    return span(*[(lsn, str(lsn)) for lsn in range(first, last + 1)], body=body)


def at(span: Span, *places: int) -> list[Message]:
    return [Message(span, place) for place in places or range(span.size)]


def whole(span: Span) -> tuple[Span, int, int]:
    return (span, 0, span.size)


def put(*spans: Span) -> Write:
    return Write(SINK, put=spans, position=Position(*spans[-1].position(spans[-1].size - 1)))


def park(*messages: Message, reason: str = "mapping", due_seconds: float = 10.0) -> Write:
    return Write(SINK, park=[Park(m, reason, f"detail of {reason}", due_seconds) for m in messages])


def rows(messages: Sequence[Message]) -> list[int]:
    return [m.row for m in messages]


def left_of(spans: Sequence[Span]) -> list[Message]:
    """What of these is not resolved."""
    return [Message(s, place) for s in spans for place in range(s.size) if not s.resolved[place]]


def everything(store: Store, page: int = 100) -> list[Message]:
    """The whole queue, in pages of so many messages or of one span."""
    found: list[Span] = []
    cursor = 0
    while head := store.bytes_at_head(SINK, cursor):
        found += store.page(SINK, cursor, max(page, head[1]), 1 << 30)
        cursor = found[-1].row(found[-1].size - 1)
    return left_of(found)


def lsns(messages: Sequence[Message]) -> list[int]:
    return [m.position[0] for m in messages]


ALL = Select(all=True)
END = (1 << 63) - 1  # read_up_to: everything

"""The SQLite store: what it promises beyond the model of its contract — the file, its limits, its failures."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from store_support import (
    ALL,
    BODY,
    END,
    SINK,
    SLOT,
    StillClock,
    add,
    at,
    everything,
    fast_folder,
    key,
    lsns,
    opened,
    park,
    plain,
    put,
    span,
    whole,
)  # fmt: skip

from spillway.chunk import ChunkBuilder, Keying, Message, Span
from spillway.errors import SpillwayError, StoreFailed
from spillway.position import Position
from spillway.store import apply, file, queue, reads, sqlite
from spillway.store.base import Counters, Identity, Park, Select, Write
from spillway.store.rows import SpanRow
from spillway.store.sqlite import SqliteStore, open_store, vacuum_step

CLOCK = StillClock()


@pytest.fixture
def path() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with opened(path) as store:
        yield store


# -- spans and messages ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keying", [Keying.UNGROUPED, Keying.STATE, Keying.EVENTS, Keying.GROUPED, Keying.GROUPED + 1])
def test_a_message_comes_back_as_it_was(store: SqliteStore, keying: int) -> None:
    """From the queue, from a lane, from the dead letters."""
    builder = ChunkBuilder(2)
    body = '{"record":{"näme":"日本\\u0000"},"x":1'.encode()
    keys = ("public.odd\\:table:7", "public.odd\\:table:6", "public.odd\\:table:g", "", "", "public.odd\\:table:h")
    for lsn in (5, 6, 7):
        builder.add(("a b", "c"), 0, lsn, 0, 1, BODY, 8, (b"a b.c:1", *[b""] * 5))
        builder.add(
            ("public", "odd:table"), 2, 0x16_B374_D848 + lsn, 3, 1_722_222_222_123_457, body, 20,
            [text.encode() for text in keys], n=255, flags=4, sub=1, too_large_bytes=50 << 20,
        )  # fmt: skip
    original = Span(builder.take(), keying, [1, 3, 5])
    store.write(put(original)).result()
    (read,) = store.page(SINK, 0, 10, 1 << 20)
    store.write(Write(SINK, park=[Park(Message(original, 1), "r", "d", 0.0)])).result()
    (head,) = store.due(SINK, 10, 1 << 20, END)
    store.write(Write(SINK, bury=[Park(Message(original, 2), "r", "d", 0.0)])).result()
    (letter,) = store.read_dead(SINK, ALL, 0, 10)
    for place, found in enumerate([Message(read, 0), head.message, letter]):
        message = Message(original, place)
        for name in message.change.__dataclass_fields__:
            assert getattr(found.change, name) == getattr(message.change, name), name
        assert (found.keys, found.row, found.position) == (message.keys, message.row, message.position)
        assert found.body_bytes == len(body)
    (waiting,) = store.dead(SINK, None, 10)
    assert waiting.bytes == 50 << 20


def test_what_is_resolved_when_it_is_put_is_left_out(store: SqliteStore) -> None:
    """And what is resolved after the call is not; the caller may let go of the chunk then."""
    gate = threading.Event()
    store._submit(lambda _: gate.wait(10))
    one, gone = plain(1, 6), plain(7, 8)
    one.resolved[0] = one.resolved[3] = 1
    gone.resolved[:] = b"\1\1"
    asked = store.write(put(one, gone))
    one.resolved[1] = 1
    one.leave()
    later = store.write(Write(SINK, resolved=[(one, 0, 3), whole(gone)]))
    gate.set()
    assert asked.result().counters.messages == 4
    assert later.result().counters.messages == 2
    assert lsns(everything(store)) == [5, 6]
    assert [one.row(place) & 0xFFFF for place in (1, 2, 4, 5)] == [0, 1, 2, 3]
    store.write(Write(SINK, park=[Park(Message(one, 4), "r", "d", 0.0)])).result()
    assert lsns(everything(store)) == [6]
    assert store.write(Write(SINK, resolved=[whole(one)], resolved_held=at(one, 4))).result().counters == Counters()


def test_a_private_key_is_like_no_key_of_its_table(store: SqliteStore) -> None:
    """A table can have a row whose key is spelt like a private one; they are told apart."""
    both = span((1,), (2, "#1"))
    store.write(put(both)).result()
    private = f"public.jobs:\\#{1 << 16}"
    assert [w.key for _, w in store.queued(SINK, 0, 10)] == [private, "public.jobs:#1"]
    assert lsns(store.show(SINK, private, 10)) == [1]
    assert store.show(SINK, f"public.jobs:\\#{(1 << 16) + 1}", 10) == []
    store.write(park(*at(both, 0))).result()
    assert lsns(everything(store)) == [2]
    assert [h.message.keys for h in store.due(SINK, 10, 1000, 0, regardless=True)] == [()]


def test_no_page_loads_more_than_it_may(store: SqliteStore) -> None:
    store.write(put(*[plain(lsn, lsn + 1, body=b"x" * 50) for lsn in range(1, 21, 2)])).result()
    assert store.bytes_at_head(SINK, 0) == (100, 2)
    spans = store.page(SINK, 0, 100, 350)
    assert [s.base >> 16 for s in spans] == [1, 2, 3]
    for most, found in ((1, []), (2, [4]), (3, [4]), (4, [4, 5])):
        assert [s.base >> 16 for s in store.page(SINK, spans[-1].row(1), most, 350)] == found
    (cut,) = store.page(SINK, 2 << 16, 2, 350)
    assert (cut.base >> 16, bytes(cut.resolved), cut.left) == (2, b"\1\0", 1)
    assert store.page(SINK, 0, 100, 10) == []
    assert store.page(SINK, 10 << 16 | 1, 100, 1000) == []
    assert store.bytes_at_head(SINK, 10 << 16 | 1) is None
    store.write(park(*[m for s in store.page(SINK, 0, 100, 1 << 20) for m in at(s)])).result()
    assert len(store.due(SINK, 100, 175, END, regardless=True)) == 3
    assert store.due(SINK, 100, 10, END, regardless=True) == []


def test_older_runs_and_this_one_share_the_bytes_of_due(path: Path) -> None:
    clock = StillClock()
    six = plain(1, 6, body=b"x" * 100)
    with opened(path, clock) as store:
        store.write(put(six)).result()
        store.write(park(*at(six, 0, 1, 2), due_seconds=50)).result()
    with opened(path, clock) as store:
        store.write(park(*at(six, 3, 4, 5), due_seconds=5)).result()
        assert lsns([h.message for h in store.due(SINK, 100, 1000, 0)]) == [1, 2, 3]
        clock.now += 5
        assert lsns([h.message for h in store.due(SINK, 100, 1000, 0)]) == [1, 2, 3, 4, 5, 6]
        assert lsns([h.message for h in store.due(SINK, 100, 420, 0)]) == [1, 2, 3, 4]
        assert lsns([h.message for h in store.due(SINK, 4, 1000, 0)]) == [1, 2, 3, 4]


def test_a_row_that_is_not_committed_yet_can_be_named(store: SqliteStore) -> None:
    """As the flow does: settle what an earlier, unfinished write has put."""
    gate = threading.Event()
    blocked = store._submit(lambda _: gate.wait(10))
    four = plain(1, 4)
    store.write(put(four))
    store.write(park(*at(four, 1)))
    store.write(Write(SINK, resolved=[(four, 0, 1)], bury=[Park(Message(four, 2), "too_large", "", 0.0)]))
    last = store.write(Write(SINK))
    assert four.base == 0
    gate.set()
    assert blocked.result()
    assert last.result().counters == Counters(2, 2 * len(BODY), queued=1, parked_keys=1, dead_letters=1)
    assert [m.row for m in at(four)] == [1 << 16 | n for n in range(4)]
    assert lsns(everything(store)) == [4]


def test_a_span_is_held_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory: what goes to lanes goes through Python a little at a time."""
    monkeypatch.setattr(apply, "INSERT_BYTES", 100)
    with opened(path) as store:
        hot = span(*[(lsn, "hot") for lsn in range(1, 101)])
        store.write(put(hot)).result()
        counters = store.write(Write(SINK, park=park(*at(hot, 0)).park, hold=at(hot)[1:])).result().counters
        assert (counters.messages, counters.bytes, counters.queued, counters.parked_keys) == (
            100,
            100 * len(BODY),
            0,
            1,
        )
        assert everything(store) == []
        for place in range(100):
            (head,) = store.due(SINK, 10, 1000, 0, regardless=True)
            assert head.message.row == hot.row(place)
            counters = store.write(Write(SINK, resolved_held=[head.message])).result().counters
        assert counters == Counters()


def test_an_event_that_changes_its_key_waits_for_both(store: SqliteStore) -> None:
    """Rows of its new key that came before are still in the queue when it becomes the head of its lanes."""
    first = span((1, "old"), (2, "new"), (3, "old", "new"), (4, "new"))
    store.write(put(first)).result()
    store.write(park(*at(first, 0))).result()
    assert lsns(everything(store)) == [2, 3, 4]
    store.write(Write(SINK, hold=at(first, 2, 3))).result()
    assert store.parked(SINK, [key("old"), key("new")]) == {key("old"), key("new")}
    assert lsns(everything(store)) == [2], "what was before the event under its new key is not held up"

    def due(read_up_to: int) -> list[int]:
        seconds = store.next_due_seconds(SINK, read_up_to)
        found = lsns([h.message for h in store.due(SINK, 10, 1000, read_up_to, regardless=True)])
        assert (store.bytes_due(SINK, read_up_to, regardless=True) is None) == (not found) == (seconds is None)
        return found

    assert due(END) == [1]
    store.write(Write(SINK, resolved_held=at(first, 0))).result()
    assert due(first.row(0)) == [], "its new key has an earlier row that may not have been read"
    assert due(first.row(1)) == [3], "read, though not sent: the caller knows"
    store.write(Write(SINK, resolved=[(first, 1, 2)])).result()
    assert due(0) == [3], "nothing is unread"
    store.write(park(*at(first, 2))).result()
    store.write(put(span((5, "x")))).result()
    assert due(0) == [3]
    store.write(Write(SINK, resolved_held=at(first, 2))).result()
    assert due(0) == [4]


def test_a_head_is_displaced_by_an_earlier_row(store: SqliteStore) -> None:
    first = span((1, "old"), (2, "new"), (3, "old", "new"))
    store.write(put(first)).result()
    store.write(Write(SINK, park=park(*at(first, 0)).park, hold=at(first, 2))).result()
    store.write(Write(SINK, resolved_held=at(first, 0))).result()
    assert lsns([h.message for h in store.due(SINK, 10, 1000, END)]) == [3]
    store.write(park(*at(first, 1))).result()
    assert lsns([h.message for h in store.due(SINK, 10, 1000, END, regardless=True)]) == [2]
    store.write(Write(SINK, resolved_held=at(first, 1))).result()
    assert lsns([h.message for h in store.due(SINK, 10, 1000, END)]) == [3]


def test_a_lane_is_discarded_from_its_end(store: SqliteStore) -> None:
    """Its head goes last: nothing behind it becomes due between two steps of a command."""
    lane = span(*[(lsn, "a") for lsn in range(1, 6)])
    store.write(put(lane)).result()
    store.write(Write(SINK, park=park(*at(lane, 0)).park, hold=at(lane, 1, 2, 3, 4))).result()
    for left in (3, 1, 0):
        assert store.discard(SINK, Select(key=key("a")), 2, frozenset()).result() == 2 - (left == 0)
        assert lsns(store.show(SINK, key("a"), 10)) == list(range(1, left + 1))
        assert store.due(SINK, 10, 1000, END) == []


async def test_who_asks_occupies_no_thread_of_the_stream(store: SqliteStore) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
    with store._asking:  # somebody's long scan
        asked = [asyncio.wrap_future(store.ask(store.newest, SINK, 1000)) for _ in range(8)]
        assert await asyncio.wait_for(asyncio.to_thread(store.parked, SINK, [key("a")]), 10) == set()
        asked.pop().cancel()
        assert not any(one.done() for one in asked)
    assert await asyncio.gather(*asked) == [None] * 7
    store.close()
    with pytest.raises(StoreFailed, match="closed"):
        store.ask(store.newest, SINK, 1000).result()


def test_what_servers_say_cannot_hurt(store: SqliteStore) -> None:
    one = plain(1, 1)
    store.write(put(one)).result()
    store.write(Write(SINK, park=[Park(Message(one, 0), "r", "\udce4" + "x" * 5000, 0.0)])).result()
    (waiting,) = store.held(SINK, None, 1)
    assert waiting.detail == "?" + "x" * 999


def test_newest_jumps_over_a_hot_key(store: SqliteStore) -> None:
    hot = span(*[(lsn, "hot") for lsn in range(2, 100)])
    store.write(put(plain(1, 1), hot)).result()
    newest = store.newest(SINK, 1 << 20)
    assert newest is not None
    assert newest.row == hot.row(0)
    assert store.newest(SINK, len(BODY) - 1) is None
    many = plain(1000, 1000 + reads.PROBED)
    store.write(put(many)).result()
    assert store.write(put(plain(2000, 2000), many_again(many))).result()
    assert lsns([m for m in [store.newest(SINK, 1 << 20)] if m is not None]) == [], "it looks at some, and not for ever"


def test_newest_stays_behind_a_truncate(store: SqliteStore) -> None:
    """It empties its table: neither it nor what follows may be sent before what is before it."""
    emptied, same = span((2,), action="truncate"), span((3, "3"), (4,))
    store.write(put(plain(1, 1), emptied, same)).result()
    assert store.newest(SINK, 1000) is None
    store.write(put(span((5, "5"), table="others"), span((6, "6")))).result()
    assert lsns([m for m in [store.newest(SINK, 1000)] if m is not None]) == [5]
    store.write(Write(SINK, resolved=[whole(emptied)])).result()
    assert lsns([m for m in [store.newest(SINK, 1000)] if m is not None]) == [6]
    store.write(put(span((7,)))).result()
    assert lsns([m for m in [store.newest(SINK, 1000)] if m is not None]) == [7], "without keys: nothing is before it"


def test_newest_is_true_of_one_state(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a key's rows in the queue goes to its lane between the look at what is parked and the scan."""
    first, last = plain(1, 1), span((2, "1"))
    store.write(put(first, last)).result()
    scan = reads.with_key

    def scan_after_park(db: sqlite3.Connection, sink: int, text: str) -> Iterator[tuple[SpanRow, Span, list[int]]]:
        store.write(park(*at(first))).result()
        return scan(db, sink, text)

    monkeypatch.setattr(reads, "with_key", scan_after_park)
    assert store.newest(SINK, 1000) is None
    assert store.parked(SINK, [key("1")])


def many_again(before: Span) -> Span:
    """More changes of the same rows."""
    builder = ChunkBuilder()
    for place in range(before.size):
        add(builder, 3000 + place, str(before.position(place)[0]))
    return Span(builder.take(), Keying.EVENTS)


def test_a_key_is_found_wherever_its_text_occurs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the beginning of another, behind another, as another kind of key, resolved: that is not it."""
    monkeypatch.setattr(queue, "SCANNED", 1)
    with opened(path) as store:
        builder = ChunkBuilder(1)
        add(builder, 1, "7", groups=(key("8"), ""))
        grouped = Span(builder.take(), Keying.GROUPED)
        gone, moved = span((2, "7")), span((3, "7", "9"), keying=Keying.STATE)
        store.write(put(grouped, gone, moved, span((4, "77")), span((5, "6"), (6, "7")), span((7, "7", "5")))).result()
        store.write(Write(SINK, resolved=[whole(gone)])).result()
        assert lsns(store.show(SINK, key("7"), 10)) == [6, 7]
        assert lsns(store.show(SINK, key("8"), 10)) == [1]
        assert store.discard(SINK, Select(key=key("7")), 10, frozenset([(5 << 16) + 1])).result() == 1
        assert lsns(everything(store)) == [1, 3, 4, 5, 6]


# -- the file -------------------------------------------------------------------------------------------------------
def test_nobody_else_may_read_it(path: Path) -> None:
    path.touch(mode=0o644)
    with opened(path) as store:
        store.write(put(plain(1, 1))).result()
        for beside in path.parent.iterdir():
            assert stat.S_IMODE(beside.stat().st_mode) == 0o600, beside.name


def test_a_second_process_is_refused_at_once(path: Path) -> None:
    with opened(path):
        code = (
            "import sys; from pathlib import Path; from spillway.store.sqlite import open_store\n"
            "from spillway.errors import SpillwayError\n"
            "try: open_store(Path(sys.argv[1]))\n"
            "except SpillwayError as error: print(error.code, str(error))"
        )
        said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert said.stdout.startswith("state_locked ")
        assert f"process {os.getpid()};" in said.stdout
    with opened(path):
        pass


def test_what_is_no_state_file_is_left_alone(path: Path) -> None:
    content = b"this is no database, and long enough to be seen as none" * 20
    path.write_bytes(content)
    with pytest.raises(SpillwayError) as refused:
        open_store(path)
    assert refused.value.code == "state_unreadable"
    assert path.read_bytes() == content


def test_another_programs_database_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(SpillwayError, match="another program") as refused:
        open_store(path)
    assert refused.value.code == "state_foreign"


@pytest.mark.parametrize(("version", "code"), [(99, "state_newer"), (1, "state_older")])
def test_another_schema_is_left_alone(path: Path, version: int, code: str) -> None:
    with opened(path):
        pass
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA user_version = {version}")
    other.close()
    with pytest.raises(SpillwayError) as refused:
        open_store(path)
    assert refused.value.code == code


def test_a_folder_that_cannot_be_written(path: Path) -> None:
    path.parent.joinpath("file").touch()
    with pytest.raises(SpillwayError) as refused:
        open_store(path.parent / "file" / "state.db")
    assert refused.value.code == "state_unwritable"


def test_the_wal_and_the_file_do_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "CHECKPOINT_BYTES", 1 << 20)
    monkeypatch.setattr(sqlite, "IDLE_SECONDS", 3600.0)
    monkeypatch.setattr(sqlite, "SPARE_PAGES", 8)
    wal = path.with_name("state.db-wal")
    largest = 0
    with opened(path) as store:
        for start in range(1, 4001, 100):
            store.write(put(plain(start, start + 99, body=b"x" * 1000))).result()
            largest = max(largest, wal.stat().st_size)
        assert largest < 2 << 20
        full = path.stat().st_size
        assert full > 3 << 20
        assert store.discard(SINK, ALL, 10_000, frozenset()).result() == 4000
    tidy = threading.Event()

    def step(db: sqlite3.Connection) -> bool:
        more = vacuum_step(db)
        if not more:
            tidy.set()
        return more

    monkeypatch.setattr(sqlite, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(sqlite, "vacuum_step", step)
    with opened(path):
        assert tidy.wait(10)
    assert path.stat().st_size < full / 4
    assert not wal.exists()


# -- start ----------------------------------------------------------------------------------------------------------
def test_a_sink_does_not_change_its_slot(store: SqliteStore) -> None:
    with pytest.raises(SpillwayError) as refused:
        store.open_sink(SINK, "another")
    assert refused.value.code == "sink_moved"
    assert store.write(Write(SINK)).result().counters == Counters()


def test_identity(path: Path) -> None:
    with opened(path) as store:
        assert store.identity(SLOT) is None
        first = Identity("7000000000000000001", 1, SLOT, 1, 5000)
        store.write_identity(first).result()
        assert store.identity(SLOT) == first
        store.write_identity(replace(first, mark=4000, timeline=2)).result()
        assert store.identity(SLOT) == replace(first, timeline=2), "the mark never goes back within an epoch"
        store.write(put(plain(100, 100))).result()
    with opened(path) as store:
        assert store.open_sink(SINK, SLOT).position == Position(100, 0)
        second = replace(first, epoch=2, mark=30)
        store.write_identity(second).result()
        assert store.identity(SLOT) == second
        state = store.open_sink(SINK, SLOT)
        assert state.position is None, "positions of another history are worth nothing"
        assert state.counters.messages == 1, "what waits is still to be delivered"
        store.write(put(plain(7, 7))).result()
    with opened(path) as store:
        assert store.open_sink(SINK, SLOT).position == Position(7, 0)


# -- defects and failures -------------------------------------------------------------------------------------------
def test_a_put_needs_its_position(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match="position"):
        store.write(Write(SINK, put=[plain(1, 1)]))
    with pytest.raises(ValueError, match="LSN"):
        store.write(put(plain(1 << 63, 1 << 63)))


@pytest.mark.parametrize("lsn", [4, 5])
def test_going_back_is_a_defect_and_ends_the_store(store: SqliteStore, lsn: int) -> None:
    store.write(put(plain(5, 5))).result()
    refused = store.write(put(plain(lsn, lsn)))
    with pytest.raises(StoreFailed):
        refused.result()
    with pytest.raises(StoreFailed):
        store.failed.result()
    with pytest.raises(StoreFailed):
        store.write(Write(SINK)).result()
    assert lsns(everything(store)) == [5], "nothing of it was written"


def test_a_failed_commit_fails_everything(path: Path) -> None:
    with opened(path) as store:
        kept = store.write(put(plain(1, 1))).result()
        assert kept.counters.messages == 1
        gate = threading.Event()
        store._submit(lambda _: gate.wait(10))
        store._submit(lambda transaction: transaction._db.execute("DROP TABLE span"))
        asked = [store.write(put(plain(lsn, lsn))) for lsn in (2, 3)]
        gate.set()
        for future in asked:
            with pytest.raises(StoreFailed):
                future.result()
        assert isinstance(store.failed.exception(10), StoreFailed)
    with opened(path) as store:
        assert lsns(everything(store)) == [1]


def test_after_close_nothing_is_taken(path: Path) -> None:
    with opened(path) as store:
        last = store.write(put(plain(1, 1)))
        store.close()
        assert last.result().counters.messages == 1, "what was asked before is done"
        with pytest.raises(StoreFailed):
            store.write(Write(SINK)).result()


def test_a_full_disk_delays_and_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FULL_RETRY_SECONDS", 0.01)
    reserve = path.with_name("state.db.reserve")
    with opened(path) as store:
        assert reserve.stat().st_size == file.RESERVE_BYTES
        full = threading.Event()
        monkeypatch.setattr(store._reserve, "take", lambda: None)  # the disk has no room for it any more
        room = threading.Event()
        release = store._reserve.release

        def released() -> None:
            """On the writer's thread, after each attempt that failed."""
            release()
            full.set()
            if room.is_set():
                store._db.execute("PRAGMA max_page_count = 100000")

        monkeypatch.setattr(store._reserve, "release", released)

        def limit(pages: int) -> int:
            """SQLite reports a database that may not grow like a disk that is full."""
            return store._submit(lambda t: t._db.execute(f"PRAGMA max_page_count = {pages}").fetchone()[0]).result(10)

        store.write(put(plain(1, 1, body=b"x" * 100_000))).result()
        limit(1)
        asked = [store.write(put(plain(lsn, lsn, body=b"x" * 200_000))) for lsn in (2, 3)]
        asked.append(store.write(Write(SINK, position=Position(9, 0))))
        assert full.wait(10)
        assert not reserve.exists()
        assert store.disk_full_since == CLOCK.wall()
        assert lsns(everything(store)) == [1]
        assert not any(f.done() for f in asked)
        room.set()
        assert [f.result(10).counters.messages for f in asked] == [2, 3, 3]
        assert store.disk_full_since is None
    with opened(path) as store:
        assert lsns(everything(store)) == [1, 2, 3]
        assert store.open_sink(SINK, SLOT).position == Position(9, 0)


def test_a_full_disk_does_not_prevent_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FULL_RETRY_SECONDS", 60.0)
    with opened(path) as store:
        store.write(put(plain(1, 1))).result()
        store._submit(lambda t: t._db.execute("PRAGMA max_page_count = 1").fetchone()).result()
        lost = store.write(put(plain(2, 2, body=b"x" * 200_000)))
        store.close()
        with pytest.raises(StoreFailed, match="full"):
            lost.result()
    with opened(path) as store:
        assert lsns(everything(store)) == [1]


# -- crashes --------------------------------------------------------------------------------------------------------
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from store_support import SINK, SLOT, ChunkBuilder, Keying, Span, add, at, put, park
from spillway.store.base import Write
from spillway.store.sqlite import open_store
store = open_store(Path(sys.argv[1]))
position = store.open_sink(SINK, SLOT).position
lsn = position.commit_lsn if position else 0
while True:
    builder = ChunkBuilder()
    for i in range(1, 51):
        add(builder, lsn + i, str((lsn + i) % 97), body=b"%020d" % (lsn + i) * 40)
    span = Span(builder.take(), Keying.EVENTS)
    lsn += 50
    written = store.write(put(span))
    parked = store.write(park(*at(span, 0)))
    resolved = store.write(Write(SINK, resolved=[(span, 1, 11)]))
    for acknowledged in (written, parked, resolved):
        acknowledged.result()
    print(lsn, flush=True)
"""


def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """On a real disk; the process dies in the middle of its commits, several times over the same file."""
    path = tmp_path / "state.db"
    acknowledged = 0
    for kill in range(1, 5):
        command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(3 * kill):
                acknowledged = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
            acknowledged = int(rest[-1]) if rest else acknowledged
        with opened(path) as store:
            state = store.open_sink(SINK, SLOT)
            assert state.position is not None
            assert state.position.commit_lsn >= acknowledged
            counters = state.counters
            queued = everything(store)
            assert len(queued) == counters.queued
            found = [w for k in range(97) for w in store.show(SINK, key(str(k)), 100_000)]
            assert len(found) == counters.messages
            assert sum(m.body_bytes for m in found) == counters.bytes
            waiting = {m.change.commit_lsn: m for m in found}
            for lsn in range(1, acknowledged + 1):
                assert (lsn in waiting) != (2 <= (lsn - 1) % 50 + 1 <= 11), lsn
            for lsn, message in waiting.items():
                assert message.change.body == b"%020d" % lsn * 40
            parked = store.parked(SINK, [key(str(k)) for k in range(97)])
            assert {key(str(lsn % 97)) for lsn in range(1, acknowledged, 50)} <= parked
            assert parked <= {key(str(lsn % 97)) for lsn in range(1, state.position.commit_lsn, 50)}

"""The SQLite store: what it promises beyond the model of its contract — the file, its limits, its failures."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store_support import SINK, SLOT, StillClock, change, everything, fast_folder, key, message, opened, park, put, rows

from spillway.change import Message
from spillway.errors import SpillwayError, StoreFailed
from spillway.position import Position
from spillway.store import apply, file, lanes, reads, sqlite
from spillway.store.base import Counters, Identity, Park, Select, Write
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


# -- messages -------------------------------------------------------------------------------------------------------
def test_a_message_comes_back_as_it_was(store: SqliteStore) -> None:
    body = '{"record":{"näme":"日本\\u0000"},"x":1'.encode()
    original = Message(
        replace(
            change(0x16_B374_D848, "public.odd\\:table:7", idx=3, action="delete", body=body),
            schema="a b",
            pks=("7", 'quo"te', "\n"),
            n=255,
            whole=False,
            commit_time=1_722_222_222.123457,
            too_large_bytes=50 << 20,
            groups=("g",),
            old=change(1),
        ),
        ("public.odd\\:table:7", "other"),
        sub=1,
    )
    store.write(put(original)).result()
    (found,) = store.page(SINK, 0, 10, 1 << 20)
    assert found.change.old is None
    assert found.change.groups == ()
    for name in set(original.change.__dataclass_fields__) - {"old", "groups"}:
        assert getattr(found.change, name) == getattr(original.change, name), name
    assert (found.keys, found.sub, found.row, found.position) == (original.keys, 1, original.row, original.position)


def test_a_private_key_is_like_no_key_of_its_table(store: SqliteStore) -> None:
    """A table can have a row whose key is spelt like a private one; they are told apart."""
    keyless, keyed = message(1), message(2, "#1")
    store.write(put(keyless, keyed)).result()
    first, second = store.waiting(SINK, None, 10)
    assert {first.key, second.key} == {"public.jobs:#1", "public.jobs:\\#1"}
    store.write(park(keyless)).result()
    assert rows(everything(store)) == [2]
    assert [h.message.keys for h in store.due(SINK, 10, 1000, regardless=True)] == [()]


def test_no_page_loads_more_than_it_may(store: SqliteStore) -> None:
    messages = [message(lsn, str(lsn), body=b"x" * 100) for lsn in range(1, 11)]
    store.write(put(*messages)).result()
    assert rows(store.page(SINK, 0, 100, 350)) == [1, 2, 3]
    assert rows(store.page(SINK, 3, 2, 350)) == [4, 5]
    assert store.page(SINK, 5, 100, 10) == []
    assert store.page(SINK, 10, 100, 10) == []
    store.write(park(*messages)).result()
    assert len(store.due(SINK, 100, 350, regardless=True)) == 3
    assert store.due(SINK, 100, 10, regardless=True) == []


def test_older_runs_and_this_one_share_the_bytes_of_due(path: Path) -> None:
    clock = StillClock()
    messages = [message(lsn, str(lsn), body=b"x" * 100) for lsn in range(1, 7)]
    with opened(path, clock) as store:
        store.write(put(*messages)).result()
        store.write(park(*messages[:3], due_seconds=50)).result()
    with opened(path, clock) as store:
        store.write(park(*messages[3:], due_seconds=5)).result()
        assert [h.message.row for h in store.due(SINK, 100, 1000)] == [1, 2, 3]
        clock.now += 5
        assert [h.message.row for h in store.due(SINK, 100, 1000)] == [1, 2, 3, 4, 5, 6]
        assert [h.message.row for h in store.due(SINK, 100, 420)] == [1, 2, 3, 4]
        assert [h.message.row for h in store.due(SINK, 4, 1000)] == [1, 2, 3, 4]


def test_a_row_that_is_not_committed_yet_can_be_named(store: SqliteStore) -> None:
    """As the flow does: settle what an earlier, unfinished write has put."""
    gate = threading.Event()
    blocked = store._submit(lambda _: gate.wait(10))
    a, b, c, d = (message(lsn, str(lsn)) for lsn in range(1, 5))
    store.write(put(a, b, c, d))
    store.write(park(b))
    store.write(Write(SINK, resolved=[a], bury=[Park(c, "too_large", "", 0.0)]))
    last = store.write(Write(SINK))
    gate.set()
    assert blocked.result()
    assert last.result().counters == Counters(2, 2 * len(a.change.body), queued=1, parked_keys=1, dead_letters=1)
    assert rows([a, b, c, d]) == [1, 2, 3, 4]
    assert rows(everything(store)) == [4]


def test_a_hot_key_is_parked_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory: the rows that leave the queue go through Python a few at a time, over both keys of events."""
    monkeypatch.setattr(lanes, "CHUNK", 7)
    monkeypatch.setattr(apply, "CHUNK", 7)
    with opened(path) as store:
        before = message(1, "other")
        events = [message(lsn, "hot", "other") if lsn % 10 == 0 else message(lsn, "hot") for lsn in range(2, 102)]
        store.write(put(before, *events)).result()
        counters = store.write(park(events[0])).result().counters
        assert (counters.queued, counters.parked_keys) == (1, 2)
        assert rows(everything(store)) == [1]
        for expected in range(2, 102):
            if expected == 10:
                assert store.due(SINK, 10, 1000, regardless=True) == [], "the other key still has a row in the queue"
                store.write(Write(SINK, resolved=[before])).result()
            (head,) = store.due(SINK, 10, 1000, regardless=True)
            assert head.message.row == expected
            counters = store.write(Write(SINK, resolved=[head.message])).result().counters
        assert counters == Counters()


def test_an_event_that_changes_its_key_waits_for_both(store: SqliteStore) -> None:
    """The head of a lane behind which another key is parked; rows of that key which came before still flow."""
    old, early, event, late = message(1, "old"), message(2, "new"), message(3, "old", "new"), message(4, "new")
    store.write(put(old, early, event, late)).result()
    store.write(park(old)).result()
    assert rows(everything(store)) == [2], "what was before the event under its new key is not held up"
    after = message(5, "new")
    assert store.write(put(after)).result().held == {5}
    assert [h.message.row for h in store.due(SINK, 10, 1000, regardless=True)] == [1]
    store.write(Write(SINK, resolved=[old])).result()
    assert store.due(SINK, 10, 1000, regardless=True) == [], "its new key has an earlier row on the way"
    store.write(park(early)).result()
    assert rows(everything(store)) == []
    assert [h.message.row for h in store.due(SINK, 10, 1000, regardless=True)] == [2]
    for expected in (2, 3, 4, 5):
        (head,) = store.due(SINK, 10, 1000, regardless=True)
        assert head.message.row == expected
        counters = store.write(Write(SINK, resolved=[head.message])).result().counters
    assert counters == Counters()


def test_a_newcomer_parks_its_other_key(store: SqliteStore) -> None:
    first, early = message(1, "old"), message(2, "new")
    store.write(put(first, early)).result()
    store.write(park(first)).result()
    event, late = message(3, "old", "new"), message(4, "new")
    assert store.write(put(event, late)).result().held == {3, 4}
    assert store.parked(SINK, [key("old"), key("new")]) == {key("old"), key("new")}
    assert rows(everything(store)) == [2]


def test_what_servers_say_cannot_hurt(store: SqliteStore) -> None:
    one = message(1, "a")
    store.write(put(one)).result()
    store.write(Write(SINK, park=[Park(one, "r", "\udce4" + "x" * 5000, 0.0)])).result()
    (waiting,) = store.waiting(SINK, None, 1)
    assert waiting.detail == "?" + "x" * 999


def test_newest_jumps_over_a_hot_key(store: SqliteStore) -> None:
    """Behind the last cold message more changes of one key than are looked at: its first one is taken."""
    hot = [message(lsn, "hot") for lsn in range(2, 3 + reads.PROBED)]
    store.write(put(message(1, "cold"), *hot)).result()
    newest = store.newest(SINK, 1 << 20)
    assert newest is not None
    assert newest.row == hot[0].row


# -- the file -------------------------------------------------------------------------------------------------------
def test_nobody_else_may_read_it(path: Path) -> None:
    path.touch(mode=0o644)
    with opened(path) as store:
        store.write(put(message(1, "a"))).result()
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


def test_a_newer_schema_is_left_alone(path: Path) -> None:
    with opened(path):
        pass
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(SpillwayError) as refused:
        open_store(path)
    assert refused.value.code == "state_newer"


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
            messages = [message(lsn, str(lsn), body=b"x" * 1000) for lsn in range(start, start + 100)]
            store.write(put(*messages)).result()
            largest = max(largest, wal.stat().st_size)
        assert largest < 2 << 20
        full = path.stat().st_size
        assert full > 3 << 20
        assert store.discard(SINK, Select(all=True), 10_000, frozenset()).result() == 4000
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
        store.write(put(message(100, "a"))).result()
    with opened(path) as store:
        assert store.open_sink(SINK, SLOT).position == Position(100, 0)
        second = replace(first, epoch=2, mark=30)
        store.write_identity(second).result()
        assert store.identity(SLOT) == second
        state = store.open_sink(SINK, SLOT)
        assert state.position is None, "positions of another history are worth nothing"
        assert state.counters.messages == 1, "what waits is still to be delivered"
        store.write(put(message(7, "a"))).result()
    with opened(path) as store:
        assert store.open_sink(SINK, SLOT).position == Position(7, 0)


# -- defects and failures -------------------------------------------------------------------------------------------
def test_a_put_needs_its_position(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match="position"):
        store.write(Write(SINK, put=[message(1, "a")]))
    with pytest.raises(ValueError, match="LSN"):
        store.write(put(message(1 << 63, "a")))


@pytest.mark.parametrize("lsn", [4, 5])
def test_going_back_is_a_defect_and_ends_the_store(store: SqliteStore, lsn: int) -> None:
    store.write(put(message(5, "a"))).result()
    refused = store.write(put(message(lsn, "b")))
    with pytest.raises(StoreFailed):
        refused.result()
    with pytest.raises(StoreFailed):
        store.failed.result()
    with pytest.raises(StoreFailed):
        store.write(Write(SINK)).result()
    assert rows(everything(store)) == [1], "nothing of it was written"


def test_a_failed_commit_fails_everything(path: Path) -> None:
    with opened(path) as store:
        kept = store.write(put(message(1, "a"))).result()
        assert kept.counters.messages == 1
        gate = threading.Event()
        store._submit(lambda _: gate.wait(10))
        store._submit(lambda transaction: transaction._db.execute("DROP TABLE queue"))
        asked = [store.write(put(message(lsn, "a"))) for lsn in (2, 3)]
        gate.set()
        for future in asked:
            with pytest.raises(StoreFailed):
                future.result()
        assert isinstance(store.failed.exception(10), StoreFailed)
    with opened(path) as store:
        assert rows(everything(store)) == [1]


def test_after_close_nothing_is_taken(path: Path) -> None:
    with opened(path) as store:
        last = store.write(put(message(1, "a")))
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

        store.write(put(message(1, "first", body=b"x" * 100_000))).result()
        limit(1)
        asked = [store.write(put(message(lsn, "a", body=b"x" * 200_000))) for lsn in (2, 3)]
        asked.append(store.write(Write(SINK, position=Position(9, 0))))
        assert full.wait(10)
        assert not reserve.exists()
        assert store.disk_full_since == CLOCK.wall()
        assert rows(everything(store)) == [1]
        assert not any(f.done() for f in asked)
        room.set()
        assert [f.result(10).counters.messages for f in asked] == [2, 3, 3]
        assert store.disk_full_since is None
    with opened(path) as store:
        assert rows(everything(store)) == [1, 2, 3]
        assert store.open_sink(SINK, SLOT).position == Position(9, 0)


def test_a_full_disk_does_not_prevent_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FULL_RETRY_SECONDS", 60.0)
    with opened(path) as store:
        store.write(put(message(1, "a"))).result()
        store._submit(lambda t: t._db.execute("PRAGMA max_page_count = 1").fetchone()).result()
        lost = store.write(put(message(2, "a", body=b"x" * 200_000)))
        store.close()
        with pytest.raises(StoreFailed, match="full"):
            lost.result()
    with opened(path) as store:
        assert rows(everything(store)) == [1]


# -- crashes --------------------------------------------------------------------------------------------------------
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from store_support import SINK, SLOT, message, put, park
from spillway.store.base import Write
from spillway.store.sqlite import open_store
store = open_store(Path(sys.argv[1]))
position = store.open_sink(SINK, SLOT).position
lsn = position.commit_lsn if position else 0
while True:
    messages = [message(lsn + i, str((lsn + i) % 97), body=b"%020d" % (lsn + i) * 40) for i in range(1, 51)]
    lsn += 50
    written = store.write(put(*messages))
    parked = store.write(park(messages[0]))
    resolved = store.write(Write(SINK, resolved=messages[1:11]))
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
            queue = everything(store)
            assert len(queue) == counters.queued
            keys = [w for k in range(97) for w in store.show(SINK, key(str(k)), 100_000)]
            assert len(keys) == counters.messages
            assert sum(len(m.change.body) for m in keys) == counters.bytes
            waiting = {m.change.commit_lsn: m for m in keys}
            for lsn in range(1, acknowledged + 1):
                assert (lsn in waiting) != (2 <= (lsn - 1) % 50 + 1 <= 11), lsn
            for lsn, found in waiting.items():
                assert found.change.body == b"%020d" % lsn * 40
            parked = store.parked(SINK, [key(str(k)) for k in range(97)])
            assert {key(str(lsn % 97)) for lsn in range(1, acknowledged, 50)} <= parked
            assert parked <= {key(str(lsn % 97)) for lsn in range(1, state.position.commit_lsn, 50)}

"""What the store keeps of backfills: their documents, written together with what else a write changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_support import SINK, SLOT, StillClock, at, everything, fast_folder, opened, park, plain, put

from spillway.position import Position
from spillway.store import backfills
from spillway.store.base import BackfillDocument, Write
from spillway.store.file import open_writer
from spillway.store.sqlite import SqliteStore, open_store


@pytest.fixture
def path() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with opened(path) as store:
        yield store


def note(
    store: SqliteStore,
    name: str,
    document: bytes = b"{}",
    *,
    ended: bool = False,
    forgotten: bool = False,
    sink: str = SINK,
) -> None:
    store.write(Write(sink, backfill=BackfillDocument(name, document, ended, forgotten))).result()


def ids(store: SqliteStore, *, ended: bool) -> list[str]:
    return [name for name, _ in store.backfills(SINK, ended=ended)]


def test_a_document_is_replaced_and_keeps_its_place(store: SqliteStore) -> None:
    for name in ("c", "a", "b"):
        note(store, name, b"first")
    note(store, "a", b"\0second")
    note(store, "c", b"third", ended=True)
    assert store.backfills(SINK, ended=True) == [("c", b"third"), ("a", b"\0second"), ("b", b"first")]
    assert store.backfills(SINK, ended=False) == [("a", b"\0second"), ("b", b"first")]


def test_documents_are_kept_over_reopening(path: Path) -> None:
    with opened(path) as store:
        note(store, "a", b"x")
        note(store, "b", b"y", ended=True)
    with opened(path) as store:
        note(store, "c")
        assert store.backfills(SINK, ended=True) == [("a", b"x"), ("b", b"y"), ("c", b"{}")]
        assert ids(store, ended=False) == ["a", "c"]


def test_sinks_have_their_own(store: SqliteStore) -> None:
    store.open_sink("other", SLOT)
    note(store, "a", b"mine")
    note(store, "a", b"theirs", sink="other")
    note(store, "a", forgotten=True)
    assert store.backfills(SINK, ended=True) == []
    assert store.backfills("other", ended=True) == [("a", b"theirs")]
    assert store.backfills("never opened", ended=True) == []


def test_one_that_ended_may_go_on(store: SqliteStore) -> None:
    note(store, "a", ended=True)
    note(store, "a", b"again")
    assert store.backfills(SINK, ended=False) == [("a", b"again")]


def test_what_is_forgotten_leaves_no_trace(store: SqliteStore) -> None:
    note(store, "never written", forgotten=True)
    for name in ("a", "b"):
        note(store, name, ended=name == "a")
        note(store, name, ended=name == "a", forgotten=True)
    assert store.backfills(SINK, ended=True) == []
    note(store, "c")
    note(store, "a")
    assert ids(store, ended=True) == ["c", "a"]


def test_the_last_hundred_that_ended_stay(store: SqliteStore) -> None:
    """The last to end: one that was begun long ago and ends now is not the first to go."""
    note(store, "running")
    note(store, "long")
    for n in range(backfills.ENDED_KEPT):
        note(store, str(n), ended=True)
    note(store, "0", b"written again, ended before", ended=True)
    note(store, "long", ended=True)
    assert ids(store, ended=True) == ["running", "long", *[str(n) for n in range(1, backfills.ENDED_KEPT)]]
    note(store, "last", ended=True)
    assert ids(store, ended=True) == ["running", "long", *[str(n) for n in range(2, backfills.ENDED_KEPT)], "last"]
    assert ids(store, ended=False) == ["running"]


def test_a_document_is_written_with_the_rest_of_its_write(path: Path) -> None:
    """Position, removal and document of a page: all of them or none."""
    span = plain(1, 3)
    with opened(path) as store:
        store.write(put(span)).result()
        store.write(
            Write(SINK, position=Position(9, 0), resolved=[(span, 0, 2)], backfill=BackfillDocument("a", b"9", False))
        ).result()
    with opened(path) as store:
        assert store.open_sink(SINK, SLOT).position == Position(9, 0)
        assert [m.position[0] for m in everything(store)] == [3]
        assert store.backfills(SINK, ended=False) == [("a", b"9")]


def test_a_document_whose_write_fails_is_not_there(path: Path) -> None:
    store = open_store(path, StillClock())
    store.open_sink(SINK, SLOT)
    store.write(Write(SINK, position=Position(9, 0), backfill=BackfillDocument("a", b"9", False))).result()
    back = store.write(Write(SINK, position=Position(8, 0), backfill=BackfillDocument("a", b"8", False)))
    assert back.exception() is not None
    store.close()
    with opened(path) as again:
        assert again.backfills(SINK, ended=False) == [("a", b"9")]


def test_numbers_of_spans_do_not_follow_those_of_backfills(path: Path) -> None:
    with opened(path):
        pass
    db = open_writer(path)
    db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('backfill', ?)", (1 << 40,))
    db.close()
    span = plain(1, 1)
    with opened(path) as store:
        note(store, "a")
        store.write(put(span)).result()
        store.write(park(*at(span, 0))).result()
    assert span.base >> 16 == 1

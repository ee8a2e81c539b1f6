"""Due refreshes in the store: each once, however often it is asked for, until it is done and not asked for again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from store_support import SLOT, StillClock, fast_folder

from spillway.store.base import AskedRefreshes, Counters, DueRefresh, Write
from spillway.store.sqlite import SqliteStore, open_store

SINK, OTHER = "jobs", "other"
JOBS, USERS = ("public", "jobs"), ("public", "users")
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
KEYS = [f"public.jobs:{n}" for n in range(6)] + [""]


@pytest.fixture
def store() -> Iterator[SqliteStore]:
    with fast_folder() as folder:
        store = open_store(folder / "state.db", StillClock())
        for sink in (SINK, OTHER):
            store.open_sink(sink, SLOT)
        yield store
        store.close()


def ask(store: SqliteStore, *keys: str, table: tuple[str, str] = JOBS, sink: str = SINK) -> Counters:
    return store.write(Write(sink, ask=AskedRefreshes(table, keys))).result().counters


def done(store: SqliteStore, *refreshes: DueRefresh, sink: str = SINK) -> Counters:
    return store.write(Write(sink, refreshed=refreshes)).result().counters


def due(store: SqliteStore, table: tuple[str, str] = JOBS, sink: str = SINK) -> list[str]:
    return [one.key for one in store.refreshes(sink, table, 0, 100)]


def test_each_is_due_once_in_the_order_of_the_first_asking(store: SqliteStore) -> None:
    assert ask(store, "b", "a", "b").refreshes == 2
    assert ask(store, "c", "b").refreshes == 3
    assert due(store) == ["b", "a", "c"]
    assert ask(store, "a", table=USERS).refreshes == 4
    assert due(store, USERS) == ["a"]
    assert due(store, JOBS, OTHER) == []


def test_what_was_asked_for_again_meanwhile_stays(store: SqliteStore) -> None:
    ask(store, "a", "b", "c")
    page = store.refreshes(SINK, JOBS, 0, 2)
    ask(store, "a")
    assert done(store, *page).refreshes == 2
    assert due(store) == ["a", "c"]
    assert done(store, *page).refreshes == 2
    assert done(store, *store.refreshes(SINK, JOBS, 0, 9)).refreshes == 0
    assert due(store) == []


def test_tables_of_which_something_is_due(store: SqliteStore) -> None:
    assert store.due_tables(SINK) == store.due_tables("never opened") == []
    for n, table in enumerate((JOBS, USERS, ('a "b" \\', "c"))):
        ask(store, *(str(i) for i in range(5)), table=table)
        assert len(store.due_tables(SINK)) == n + 1
    assert sorted(store.due_tables(SINK)) == sorted([JOBS, USERS, ('a "b" \\', "c")])
    assert store.due_tables(OTHER) == []
    done(store, *store.refreshes(SINK, JOBS, 0, 9))
    assert JOBS not in store.due_tables(SINK)


def test_a_number_is_never_used_again(store: SqliteStore) -> None:
    ask(store, "a")
    (first,) = store.refreshes(SINK, JOBS, 0, 9)
    done(store, first)
    ask(store, "a")
    assert done(store, first).refreshes == 1


@dataclass
class Model:
    asked: int = 0
    due: dict[tuple[tuple[str, str], str], list[int]] = field(default_factory=dict)  # place, number


class Refreshes(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = fast_folder()
        self.path = self.folder.__enter__() / "state.db"
        self.model = Model()
        self.read: list[DueRefresh] = []
        self.counters = Counters()
        self._open()

    def _open(self) -> None:
        self.store = open_store(self.path, StillClock())
        self.counters = self.store.open_sink(SINK, SLOT).counters

    @rule(table=st.sampled_from([JOBS, USERS]), keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def ask(self, table: tuple[str, str], keys: list[str]) -> None:
        self.counters = self.store.write(Write(SINK, ask=AskedRefreshes(table, keys))).result().counters
        for key in dict.fromkeys(keys):
            self.model.asked += 1
            self.model.due.setdefault((table, key), [self.model.asked, 0])[1] = self.model.asked

    @rule(table=st.sampled_from([JOBS, USERS]), after=st.integers(0, 30), limit=st.integers(1, 4))
    def read_page(self, table: tuple[str, str], after: int, limit: int) -> None:
        self.read = self.store.refreshes(SINK, table, after, limit)
        places = sorted(place for (of, _), (place, _) in self.model.due.items() if of == table and place > after)
        assert [one.place for one in self.read] == places[:limit]

    @rule(which=st.data())
    def see_to_some(self, which: st.DataObject) -> None:
        some = which.draw(st.lists(st.sampled_from(self.read), unique=True)) if self.read else []
        self.counters = self.store.write(Write(SINK, refreshed=some)).result().counters
        for one in some:
            if self.model.due.get((one.table, one.key)) == [one.place, one.number]:
                del self.model.due[one.table, one.key]

    @rule()
    def crash(self) -> None:
        """What was acknowledged is in a copy of the files."""
        copy = self.path.with_name("copy.db")
        for suffix in ("", "-wal"):
            if Path(f"{self.path}{suffix}").exists():
                shutil.copy(f"{self.path}{suffix}", f"{copy}{suffix}")
        self.store.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            if Path(f"{copy}{suffix}").exists():
                Path(f"{copy}{suffix}").rename(f"{self.path}{suffix}")
        self._open()

    @invariant()
    def is_as_the_model_says(self) -> None:
        found = {
            (table, one.key): [one.place, one.number]
            for table in (JOBS, USERS)
            for one in self.store.refreshes(SINK, table, 0, 100)
        }
        assert found == self.model.due
        assert self.counters.refreshes == len(found)

    def teardown(self) -> None:
        self.store.close()
        self.folder.__exit__(None, None, None)


def test_the_store_does_what_the_model_says() -> None:
    run_state_machine_as_test(
        Refreshes,
        settings=settings(
            max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

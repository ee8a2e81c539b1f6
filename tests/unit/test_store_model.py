"""The SQLite store against the model: random writes, retries, discards, restarts and crashes.

After every step everything that can be read must be what the model says. A crash is a copy of the database and its WAL,
taken while writes are under way: it must hold a prefix of what was asked, and all that was acknowledged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from store_model import Model, Record
from store_support import SINK, SLOT, StillClock, everything, fast_folder, key, message

from spillway.change import Message
from spillway.position import Position
from spillway.store import apply, file, lanes, rows, sqlite
from spillway.store.base import Gap, Park, Select, Write
from spillway.store.sqlite import SqliteStore, open_store

VALUES = ["a", "b", "c", "d"]
TABLES = ["jobs", "users"]
KEYS = [key(value, table) for table in TABLES for value in VALUES]
REASONS = ["mapping", "timeout"]

_values = st.one_of(
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=1),
    st.lists(st.sampled_from(VALUES), min_size=2, max_size=2, unique=True),
    st.just([]),
)
_newcomers = st.lists(st.tuples(_values, st.sampled_from(TABLES), st.integers(0, 30)), max_size=5)
_selects = st.one_of(
    st.sampled_from(KEYS).map(lambda k: Select(key=k)),
    st.sampled_from(REASONS).map(lambda r: Select(reason=r)),
    st.just(Select(all=True)),
)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = self.stack.enter_context(fast_folder())
        self.path = self.folder / "0" / "state.db"
        self.clock = StillClock()
        self.model = Model()
        self.lsn = 100
        self.messages: list[Message] = []  # kept, so that their identity is theirs alone
        self.row_of: dict[int, int] = {}
        self.store = self.open()

    def teardown(self) -> None:
        self.store.close()
        self.stack.close()

    def open(self) -> SqliteStore:
        store = open_store(self.path, self.clock)
        state = store.open_sink(SINK, SLOT)
        assert (state.position, state.paused, state.gap) == (self.model.position, self.model.paused, self.model.gap)
        assert state.counters == self.model.counters()
        return store

    # -- writes -----------------------------------------------------------------------------------------------------
    def draw(self, data: st.DataObject) -> Write:
        put = [self.newcomer(*given) for given in data.draw(_newcomers, label="put")]
        first = self.model.next_row
        targets = [(row, None) for row in self.model.rows] + [(first + i, m) for i, m in enumerate(put)]
        some = data.draw(st.lists(st.sampled_from(targets), unique=True, max_size=4), label="some") if targets else []
        uses = [(data.draw(st.sampled_from(["resolved", "park", "bury"])), self.named(*target)) for target in some]
        parks = [m for use, m in uses if use == "park"]
        if len(parks) > 1:  # several at once are the heads of different keys, as those in flight are
            parks = self.heads_among(parks)
        dead = (
            data.draw(st.lists(st.sampled_from(sorted(self.model.dead)), unique=True, max_size=2))
            if (self.model.dead)
            else []
        )
        return Write(
            SINK,
            put=put,
            position=Position(*put[-1].position) if put else None,
            resolved=[m for use, m in uses if use == "resolved"],
            park=[Park(m, data.draw(st.sampled_from(REASONS)), "why", data.draw(st.floats(0, 50))) for m in parks],
            bury=[Park(m, data.draw(st.sampled_from(REASONS)), "why", 0.0) for use, m in uses if use == "bury"],
            revive=[(row, self.revived(self.model.dead[row].record)) for row in dead],
        )

    def newcomer(self, values: list[str], table: str, size: int) -> Message:
        self.lsn += 1
        made = message(self.lsn, *values, table=table, body=b'{"record":' + b"x" * size)
        self.messages.append(made)
        return made

    def revived(self, record: Record) -> Message:
        made = Message(replace(record.change, body=record.change.body + b"!"), record.message_keys)
        self.messages.append(made)
        return made

    def named(self, row: int, put: Message | None) -> Message:
        """A message of this Write, or one as the caller has it after reading it back."""
        if put is not None:
            return put
        record = self.model.rows[row]
        made = Message(record.change, record.message_keys, row=row)
        self.messages.append(made)
        return made

    def heads_among(self, messages: list[Message]) -> list[Message]:
        taken: set[str] = set()
        heads = []
        for one in messages:
            record = self.model.rows.get(one.row)
            if record is not None and self.model.sendable(record) and taken.isdisjoint(record.keys):
                taken.update(record.keys)
                heads.append(one)
        return heads

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        write = self.draw(data)
        held = self.model.write(write, self.row_of, self.clock.now)
        written = self.store.write(write).result(10)
        assert written.held == held
        assert written.counters == self.model.counters()
        assert [m.row for m in write.put] == [self.row_of[id(m)] for m in write.put]

    @rule(position=st.booleans(), paused=st.none() | st.booleans(), gap=st.booleans(), clear=st.booleans())
    def mark(self, position: bool, paused: bool | None, gap: bool, clear: bool) -> None:
        self.lsn += 1
        write = Write(
            SINK,
            position=Position(self.lsn, 0) if position else None,
            paused=paused,
            gap=Gap(self.lsn, None, 1.5, "full") if gap else None,
            clear_gap=clear and not gap,
        )
        self.model.write(write, self.row_of, self.clock.now)
        self.store.write(write).result(10)

    @rule(table=st.sampled_from(TABLES), back=st.integers(0, 10))
    def truncate(self, table: str, back: int) -> None:
        write = Write(SINK, drop_table_below=(f"public.{table}:", Position(self.lsn - back, 0)))
        self.model.write(write, self.row_of, self.clock.now)
        assert self.store.write(write).result(10).counters == self.model.counters()

    @rule(select=_selects)
    def retry_now(self, select: Select) -> None:
        self.model.retry(select, self.clock.now)
        self.store.retry_now(SINK, select).result(10)

    @rule(select=_selects, limit=st.integers(1, 6), data=st.data())
    def discard(self, select: Select, limit: int, data: st.DataObject) -> None:
        rows = sorted(self.model.rows)
        spare = frozenset(data.draw(st.lists(st.sampled_from(rows), max_size=2)) if rows else [])
        selected = self.model.selected(select) - spare
        before = set(self.model.rows)
        count = self.store.discard(SINK, select, limit, spare).result(10)
        assert count == min(limit, len(selected))
        left = set(rows_of_everything(self.store))
        assert before - left <= selected
        assert len(before - left) == count
        self.model.discarded(before - left, self.clock.now)

    @rule(select=_selects, limit=st.integers(1, 3))
    def discard_dead(self, select: Select, limit: int) -> None:
        chosen = [
            row for row, letter in sorted(self.model.dead.items()) if _matches(select, letter.record, letter.reason)
        ]
        assert self.store.discard_dead(SINK, select, limit).result(10) == min(limit, len(chosen))
        left = {m.row for m in self.store.read_dead(SINK, Select(all=True), 0, 1000)}
        gone = set(self.model.dead) - left
        assert gone <= set(chosen)
        for row in gone:
            del self.model.dead[row]

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.model.restarted()
        self.store = self.open()

    @rule(data=st.data(), count=st.integers(1, 4))
    def crash(self, data: st.DataObject, count: int) -> None:
        models, asked = [self.model], []
        for _ in range(count):
            self.model = self.model.copy()
            write = self.draw(data)
            self.model.write(write, self.row_of, self.clock.now)
            models.append(self.model)
            asked.append(write)
        futures = [self.store.write(write) for write in asked]
        acknowledged = sum(f.done() for f in futures)
        torn = self.copy("torn")
        for future in futures:
            future.result(10)
        after = self.copy(f"after {len(list(self.folder.iterdir()))}")
        self.store.close()
        self.is_one_of(models[acknowledged:], torn)
        self.path = after
        self.model.restarted()
        self.store = self.open()

    def copy(self, name: str) -> Path:
        """What a crash at this moment would leave behind, but for the disk's own buffers."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file_name in (self.path.name + "-wal", self.path.name):
            shutil.copyfile(self.path.with_name(file_name), folder / file_name)
        return folder / self.path.name

    def is_one_of(self, models: list[Model], path: Path) -> None:
        """The file holds the state that one of the models says, in all that can be read."""
        self.store = open_store(path, self.clock)
        state = self.store.open_sink(SINK, SLOT)
        on_disk = (state.position, state.counters, rows_of_everything(self.store))
        candidates = [m for m in models if (m.position, m.counters(), sorted(m.rows)) == on_disk]
        assert candidates, f"{on_disk} is none of {len(models)} states"
        last, differences = self.model, []
        for candidate in candidates:
            self.model = candidate.copy()
            self.model.restarted()
            try:
                self.queue_is_right()
                self.lanes_are_right()
                self.letters_are_right()
            except AssertionError as difference:
                differences.append(difference)
        assert len(differences) < len(candidates), differences
        self.model = last
        self.store.close()

    # -- reads ------------------------------------------------------------------------------------------------------
    @initialize()
    def begin(self) -> None:
        assert self.store.newest(SINK, 1 << 20) is None

    @invariant()
    def queue_is_right(self) -> None:
        queue = self.model.queue()
        found = everything(self.store, page=3)
        assert [(m.row, m.keys, m.position, m.change.body) for m in found] == [
            (r.row, r.message_keys, r.position, r.change.body) for r in queue
        ]
        assert self.store.bytes_at_head(SINK, 0) == (queue[0].bytes if queue else None)
        heads = [r.row for r in queue if self.model.sendable(r)]
        newest = self.store.newest(SINK, 1 << 20)
        assert (newest.row if newest else None) == (max(heads) if heads else None)
        waiting = self.model.rows
        assert self.store.oldest(SINK) == (waiting[min(waiting)].change.commit_time if waiting else None)

    @invariant()
    def lanes_are_right(self) -> None:
        model, now = self.model, self.clock.now
        assert self.store.parked(SINK, KEYS) == model.parked_keys().intersection(KEYS)
        for regardless in (False, True):
            heads = self.store.due(SINK, 1000, 1 << 20, regardless)
            assert {h.message.row for h in heads} == model.due(now, regardless=regardless)
            assert len(heads) == len(model.due(now, regardless=regardless))
            times = [model.due_at[h.message.row] for h in heads]
            assert times == sorted(times)
            for head in heads:
                record = model.rows[head.message.row]
                assert (head.message.keys, head.message.change.body) == (record.message_keys, record.change.body)
                assert (head.attempts, head.reason) == model.said[min(record.keys)][1:]
            size = len(heads[0].message.change.body) if heads else None
            assert self.store.bytes_due(SINK, regardless) == size
        seconds = self.store.next_due_seconds(SINK)
        soonest = min(model.due_at.values(), default=None)
        assert (seconds is None) == (soonest is None)
        if seconds is not None and soonest is not None:
            assert seconds == (soonest - now if soonest > 0 else 0.0)

    @invariant()
    def people_see_what_is_so(self) -> None:
        model = self.model
        keys = sorted({k for r in model.rows.values() for k in r.keys})
        said = {k: model.said.get(k, (0, 0, "")) for k in keys}
        expected = [
            (k, said[k][2], said[k][1], sum(r.bytes for r in model.of_key(k)), len(model.of_key(k))) for k in keys
        ]
        found = list(_pages(lambda after: self.store.waiting(SINK, after, 3)))
        assert [(w.key, w.reason, w.attempts, w.bytes, w.messages) for w in found] == expected
        for reason in REASONS:
            found = list(_pages(lambda after, r=reason: self.store.waiting(SINK, after, 3, r)))
            assert [w.key for w in found] == [k for k in keys if said[k][2] == reason]
        for k in keys[:2]:
            assert [m.row for m in self.store.show(SINK, k, 100)] == [r.row for r in model.of_key(k)]

    @invariant()
    def letters_are_right(self) -> None:
        dead = self.model.dead
        for select in (Select(all=True), Select(reason=REASONS[0]), Select(key=KEYS[0])):
            found = self.store.read_dead(SINK, select, 0, 1000)
            chosen = [row for row in sorted(dead) if _matches(select, dead[row].record, dead[row].reason)]
            assert [m.row for m in found] == chosen
            assert [m.change.body for m in found] == [dead[row].record.change.body for row in chosen]
        oldest: dict[str, int] = {}
        for row in sorted(dead):
            oldest.setdefault(dead[row].record.keys[0], row)
        listed = list(_pages(lambda after: self.store.dead(SINK, after, 2)))
        assert [(w.key, w.reason, w.attempts) for w in listed] == [
            (k, dead[row].reason, dead[row].attempts) for k, row in sorted(oldest.items())
        ]


def _matches(select: Select, record: Record, reason: str) -> bool:
    return select.all or select.key == record.keys[0] or select.reason == reason


def _pages(read):  # type: ignore[no-untyped-def]
    after = None
    while page := read(after):
        yield from page
        after = page[-1].key


def rows_of_everything(store: SqliteStore) -> list[int]:
    """All waiting rows, held or not, by what people are shown."""
    return sorted({m.row for w in _pages(lambda a: store.waiting(SINK, a, 100)) for m in store.show(SINK, w.key, 1000)})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits so small that every loop over pieces goes round; no tidying up under the hand of a copy."""
    monkeypatch.setattr(lanes, "CHUNK", 2)
    monkeypatch.setattr(apply, "CHUNK", 2)
    monkeypatch.setattr(rows, "INSERT_BYTES", 40)
    monkeypatch.setattr(sqlite, "IDLE_SECONDS", 3600.0)
    monkeypatch.setattr(file, "RESERVE_BYTES", 4096)
    yield


def test_it_does_what_the_model_does(small: None) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )

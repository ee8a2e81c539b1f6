"""The SQLite store against the model: random writes, retries, discards, restarts and crashes.

After every step everything that can be read must be what the model says. A crash is a copy of the database and its WAL,
taken while writes are under way: it must hold a prefix of what was asked, and all that was acknowledged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from store_model import Model, Record
from store_support import ALL, END, SINK, SLOT, StillClock, add, everything, fast_folder, key

from spillway.chunk import ChunkBuilder, Keying, Message, Piece, Span
from spillway.position import Position
from spillway.store import apply, backfills, commands, file, lanes, queue, reads, rows, sqlite
from spillway.store.base import BackfillDocument, Gap, Park, Select, Write
from spillway.store.sqlite import SqliteStore, open_store

VALUES = ["a", "b", "c", "d"]
TABLES = ["jobs", "users"]
KEYS = [key(value, table) for table in TABLES for value in VALUES]
REASONS = ["mapping", "timeout"]
ENDED_KEPT = 2

_values = st.one_of(
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=1),
    st.lists(st.sampled_from(VALUES), min_size=2, max_size=2, unique=True),
    st.just([]),
)
_change = st.tuples(_values, _values, st.sampled_from(TABLES), st.integers(0, 30), st.integers(0, 9))
_keying = st.sampled_from(
    [Keying.EVENTS, Keying.EVENTS, Keying.STATE, Keying.UNGROUPED, Keying.GROUPED, Keying.GROUPED + 1]
)
_newcomers = st.lists(st.tuples(_keying, st.booleans(), st.lists(_change, min_size=1, max_size=5)), max_size=3)
_documents = st.none() | st.builds(
    BackfillDocument,
    st.sampled_from("12345"),
    st.binary(max_size=3),
    st.booleans(),
    st.sampled_from([False] * 4 + [True]),
)
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
        self.model = Model(ended_kept=ENDED_KEPT)
        self.lsn = 100
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
        """What the contract allows, more or less: whether it makes sense is not the store's concern."""
        put = [self.newcomer(*given) for given in data.draw(_newcomers, label="put")]
        queued = [self.named(record) for record in self.model.queue()]
        queued += [Message(span, place) for span in put for place in range(span.size)]
        held = [self.named(record) for record in self.model.rows.values() if record.held]
        chosen = self.some(data, queued, 6)
        uses = [(data.draw(st.sampled_from(["resolved", "park", "hold", "bury"])), message) for message in chosen]
        old = self.some(data, held, 4)
        uses += [(data.draw(st.sampled_from(["resolved_held", "park", "bury", "superseded_by"])), m) for m in old]
        dead = self.some(data, sorted(self.model.dead), 2)

        def park(message: Message) -> Park:
            reason, seconds = data.draw(st.sampled_from(REASONS)), data.draw(st.integers(0, 400)) / 8
            return Park(message, reason, "why", seconds, counts_attempt=data.draw(st.booleans()))

        return Write(
            SINK,
            put=put,
            position=Position(self.lsn, 0, 1) if put else None,
            resolved=[self.piece(message) for use, message in uses if use == "resolved"],
            resolved_held=[message for use, message in uses if use == "resolved_held"],
            superseded_by=[m for use, m in uses if use == "superseded_by" and len(m.keys) == 1],
            park=[park(message) for use, message in uses if use == "park"],
            hold=[message for use, message in uses if use == "hold"],
            bury=[park(message) for use, message in uses if use == "bury"],
            revive=[(row, self.named(self.model.dead[row].record)) for row in dead],
            backfill=data.draw(_documents),
        )

    def some(self, data, among, most):  # type: ignore[no-untyped-def]
        indices = st.lists(st.integers(0, len(among) - 1), unique=True, max_size=most)
        return [among[index] for index in data.draw(indices)] if among else []

    def newcomer(self, keying: int, cut: bool, changes: list[tuple[list[str], list[str], str, int, int]]) -> Span:
        groups = max(1, keying - Keying.GROUPED + 1) if keying != Keying.STATE else 0
        builder = ChunkBuilder(groups)
        for values, group, table, size, _ in changes:
            self.lsn += 1
            texts = ["", "", *[key(value, table) for value in group]][-2:]
            body = b'{"record":' + b"x" * size
            add(
                builder,
                self.lsn,
                *values,
                table=table,
                body=body,
                groups=(["?", ""] * (groups - 1) + texts[::-1])[: 2 * groups],
            )
        span = Span(builder.take(), keying)
        if cut:  # a sink that does not get every change
            indices = [index for index, change in enumerate(changes) if change[4] % 3] or [0]
            span = Span(span.chunk, keying, indices)
        for place in range(span.size):
            if changes[span.indices[place]][4] > 7:
                span.resolved[place] = 1
                span.left -= 1
        return span

    def named(self, record: Record) -> Message:
        """As the caller has it after reading it back."""
        number = record.row & 0xFFFF
        span = Span(record.chunk, record.keying, [record.index], record.row - number, [number])
        return Message(span, 0)

    def piece(self, message: Message) -> Piece:
        return (message.span, message.place, message.place + 1)

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        write = self.draw(data)
        future = self.store.write(write)
        placed = self.model.write(write, self.clock.now)
        assert future.result(10).counters == self.model.counters()
        for span, rows_ in zip(write.put, placed, strict=True):
            assert [span.row(place) for place in range(span.size) if rows_[place]] == [row for row in rows_ if row]

    @rule(data=st.data())
    def read_and_resolve(self, data: st.DataObject) -> None:
        """As a flow does that catches up."""
        spans = self.store.page(SINK, 0, 12, 1 << 20)
        count = data.draw(st.integers(0, len(spans)))
        pieces = [(span, 0, span.size) for span in spans[:count]]
        pieces += [(span, 0, span.size // 2) for span in spans[count:]]
        write = Write(SINK, resolved=pieces)
        self.model.write(write, self.clock.now)
        assert self.store.write(write).result(10).counters == self.model.counters()

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
        self.model.write(write, self.clock.now)
        self.store.write(write).result(10)

    @rule(table=st.sampled_from(TABLES), back=st.integers(0, 10))
    def truncate(self, table: str, back: int) -> None:
        write = Write(SINK, drop_table_below=("public", table, Position(self.lsn - back, 0)))
        self.model.write(write, self.clock.now)
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
        left = {m.row for m in self.store.read_dead(SINK, ALL, 0, 1000)}
        gone = set(self.model.dead) - left
        assert gone <= set(chosen)
        for row in gone:
            del self.model.dead[row]

    @rule(seconds=st.integers(0, 60))
    def time_passes(self, seconds: int) -> None:
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
            self.model.write(write, self.clock.now)
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
                self.backfills_are_right()
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
        for size in (1, 3, 1000):
            found = everything(self.store, page=size)
            assert [(m.row, m.keys, m.position, m.change.body) for m in found] == [
                (r.row, r.message_keys, r.position, r.body) for r in queue
            ]
        for message, record in zip(found, queue, strict=True):
            original = record.chunk.change(record.index)
            for name in original.__dataclass_fields__:
                assert getattr(message.change, name) == getattr(original, name), name
        head = self.store.bytes_at_head(SINK, 0)
        assert (head is None) == (not queue)
        if head is not None:
            size, count = head
            (span,) = self.store.page(SINK, 0, count, size)
            assert (len(span.chunk.data), span.size) == (size, count)
            assert span.left == sum(r.row >> 16 == queue[0].row >> 16 for r in queue)
            assert self.store.page(SINK, 0, count, size - 1) == self.store.page(SINK, 0, count - 1, size) == []
        if len(queue) > 1:
            behind = queue[len(queue) // 2 - 1].row
            rest = [m.row for s in self.store.page(SINK, behind, 1000, 1 << 20) for m in left(s)]
            assert rest, "at least the first"
            assert rest == [r.row for r in queue if r.row > behind][: len(rest)]
        parked = self.model.parked_keys()
        heads = [r.row for r in queue if self.model.first(r) and parked.isdisjoint(r.keys)]
        newest = self.store.newest(SINK, 1 << 20)
        assert (newest.row if newest else None) == (max(heads) if heads else None)
        times = [queue[0].commit_time] if queue else []
        lane = [record for record in self.model.rows.values() if record.held]
        times += [min(lane, key=lambda record: record.row).commit_time] if lane else []
        assert self.store.oldest(SINK) == min(times, default=None)

    @invariant()
    def lanes_are_right(self) -> None:
        model, now = self.model, self.clock.now
        assert self.store.parked(SINK, KEYS) == model.parked_keys().intersection(KEYS)
        cursors = {0, END, *[row for row in model.due_at if row], *[row - 1 for row in model.due_at]}
        for read_up_to in cursors:
            for regardless in (False, True):
                expected = model.due(now, read_up_to, regardless=regardless)
                heads = self.store.due(SINK, 1000, 1 << 20, read_up_to, regardless)
                assert sorted(h.message.row for h in heads) == sorted(expected)
                times = [model.due_at[h.message.row] for h in heads]
                assert times == sorted(times)
                for head in heads:
                    record = model.rows[head.message.row]
                    assert (head.message.keys, head.message.change.body) == (record.message_keys, record.body)
                    said = model.said[min(record.keys)]
                    assert (head.attempts, head.reason) == (said.attempts, said.reason)
                size = heads[0].message.body_bytes if heads else None
                first = self.store.bytes_due(SINK, read_up_to, regardless)
                waiting = any(model.said[min(model.rows[row].keys)].waits for row in expected)
                if first is None:
                    assert size is None
                else:
                    assert self.store.due(SINK, 1000, first, read_up_to, regardless), "so much is enough"
                    assert first in {len(model.rows[r].body) for r in expected}
                    if not waiting and len(set(times[:2])) == len(times[:2]):
                        assert first == size
            seconds = self.store.next_due_seconds(SINK, read_up_to)
            soonest = min(model.due(now, read_up_to, regardless=True).values(), default=None)
            assert (seconds is None) == (soonest is None)
            if seconds is not None and soonest is not None:
                assert seconds == (soonest - now if soonest > 0 else 0.0)
        for k in KEYS[:3]:
            lane = model.lane(k)
            latest = self.store.latest(SINK, k, 1 << 20, partial_images=False)
            row = lane[-1].row if lane and all(len(r.keys) == 1 for r in lane) else None
            assert (latest.row if latest else None) == row

    @invariant()
    def people_see_what_is_so(self) -> None:
        model = self.model
        keys = sorted(model.parked_keys())
        expected = [
            (k, said.reason, said.attempts, sum(len(r.body) for r in model.lane(k)), len(model.lane(k)))
            for k in keys
            for said in [model.said[k]]
        ]
        found = list(_pages(lambda after: self.store.held(SINK, after, 3)))
        assert [(w.key, w.reason, w.attempts, w.bytes, w.messages) for w in found] == expected
        for reason in REASONS:
            found = list(_pages(lambda after, r=reason: self.store.held(SINK, after, 3, r)))
            assert [w.key for w in found] == [k for k in keys if model.said[k].reason == reason]
        queue = model.queue()
        for limit in (2, 1000):
            listed = list(_queued(self.store, limit))
            assert [(row, w.key, w.bytes) for row, w in listed] == [(r.row, r.keys[-1], len(r.body)) for r in queue]
        for k in [*KEYS[:2], *[r.keys[0] for r in queue[:2]]]:
            shown = self.store.show(SINK, k, 100)
            assert [m.row for m in shown] == [r.row for r in sorted(model.of_key(k), key=lambda r: (not r.held, r.row))]
            assert [m.change.body for m in shown] == [model.rows[m.row].body for m in shown]

    @invariant()
    def letters_are_right(self) -> None:
        dead = self.model.dead
        for select in (Select(all=True), Select(reason=REASONS[0]), Select(key=KEYS[0])):
            found = self.store.read_dead(SINK, select, 0, 1000)
            chosen = [row for row in sorted(dead) if _matches(select, dead[row].record, dead[row].reason)]
            assert [m.row for m in found] == chosen
            assert [m.change.body for m in found] == [dead[row].record.body for row in chosen]
        oldest: dict[str, int] = {}
        for row in sorted(dead):
            oldest.setdefault(dead[row].record.keys[0], row)
        listed = list(_pages(lambda after: self.store.dead(SINK, after, 2)))
        assert [(w.key, w.reason, w.attempts) for w in listed] == [
            (k, dead[row].reason, dead[row].attempts) for k, row in sorted(oldest.items())
        ]

    @invariant()
    def backfills_are_right(self) -> None:
        assert self.store.backfills(SINK, ended=False) == list(self.model.running().items())
        assert self.store.backfills(SINK, ended=True) == list(self.model.backfills.items())


def _matches(select: Select, record: Record, reason: str) -> bool:
    return select.all or select.key == record.keys[0] or select.reason == reason


def _pages(read):  # type: ignore[no-untyped-def]
    after = None
    while page := read(after):
        yield from page
        after = page[-1].key


def _queued(store: SqliteStore, limit: int):  # type: ignore[no-untyped-def]
    after = 0
    while page := store.queued(SINK, after, limit):
        yield from page
        after = page[-1][0]


def left(span: Span) -> list[Message]:
    return [Message(span, place) for place in range(span.size) if not span.resolved[place]]


def rows_of_everything(store: SqliteStore) -> list[int]:
    """All waiting rows, held or not, by what people are shown."""
    held = {m.row for w in _pages(lambda a: store.held(SINK, a, 100)) for m in store.show(SINK, w.key, 1000)}
    return sorted(held.union(row for row, _ in _queued(store, 100)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits so small that every loop over pieces goes round; no tidying up under the hand of a copy."""
    monkeypatch.setattr(lanes, "CHUNK", 2)
    monkeypatch.setattr(apply, "CHUNK", 2)
    monkeypatch.setattr(commands, "CHUNK", 2)
    monkeypatch.setattr(queue, "CHUNK", 2)
    monkeypatch.setattr(queue, "SCANNED", 2)
    monkeypatch.setattr(apply, "INSERT_BYTES", 40)
    monkeypatch.setattr(rows, "INSERT_BYTES", 40)
    monkeypatch.setattr(rows, "WIDTH", 3)
    monkeypatch.setattr(reads, "PAGE_SPANS", 3)
    monkeypatch.setattr(reads, "PROBED", 10_000)
    monkeypatch.setattr(backfills, "ENDED_KEPT", ENDED_KEPT)
    monkeypatch.setattr(sqlite, "IDLE_SECONDS", 3600.0)
    monkeypatch.setattr(file, "RESERVE_BYTES", 4096)
    yield


def test_it_does_what_the_model_does(small: None) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )

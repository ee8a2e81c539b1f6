"""Compaction of a backlog, beside a model that keeps a list of each key: what is left, in which order, and what the
counters say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from store_support import BODY, SINK, StillClock, fast_folder, key, opened

from spillway.change import ACTIONS
from spillway.chunk import MOVED, TOO_LARGE, WHOLE, ChunkBuilder, Keying, Message, Span
from spillway.flow.compacting import Passes
from spillway.position import Position
from spillway.store import compact as the_compaction
from spillway.store.base import Counters, Park, Write
from spillway.store.compact import Compaction
from spillway.store.sqlite import SqliteStore

UPDATE, DELETE, TRUNCATE = ACTIONS.index("update"), ACTIONS.index("delete"), ACTIONS.index("truncate")


@dataclass(frozen=True)
class Said:
    """One message: its keys (two of an event that moves a row), and what it is."""

    keys: tuple[str, ...]
    action: int = UPDATE
    flags: int = WHOLE

    def is_image(self, *, partial: bool) -> bool:
        if len(self.keys) != 1 or self.action == TRUNCATE:
            return False
        return self.action == DELETE or (not self.flags & TOO_LARGE and (partial or bool(self.flags & WHOLE)))


@dataclass
class Backlog:
    """A store with what was said, by row, in order."""

    store: SqliteStore
    keying: int
    said: dict[int, Said] = field(default_factory=dict)
    messages: dict[int, Message] = field(default_factory=dict)
    lsn: int = 100

    def put(self, said: Sequence[Said]) -> None:
        builder = ChunkBuilder()
        for at, one in enumerate(said):
            texts = [key(text).encode() for text in reversed(one.keys)]
            texts += [b""] * (2 - len(texts))
            if one.action == TRUNCATE:
                texts = [b"", b""]
            body = BODY + b" " * (at % 7)
            builder.add(
                ("public", "jobs"), one.action, self.lsn + at, 0, 0, body, 0, texts,
                flags=one.flags | (MOVED if len(one.keys) == 2 else 0),
            )  # fmt: skip
        self.lsn += len(said)
        span = Span(builder.take(), self.keying)
        self.store.write(Write(SINK, put=[span], position=Position(self.lsn - 1, 0, 0))).result()
        for place, one in enumerate(said):
            self.said[span.row(place)] = one
            self.messages[span.row(place)] = Message(span, place)

    def compact(self, *, partial: bool = False, most_keys: int = 1000, spare: frozenset[int] = frozenset()) -> int:
        work = Compaction(most_keys, partial)
        removed = 0
        while not work.done:
            removed += self.store.compact(SINK, work, spare).result()
        return removed

    def rows(self) -> list[int]:
        found = [m.row for span in self.store.page(SINK, 0, 1 << 20, 1 << 30) for m in _left(span)]
        return sorted({*found, *(m.row for keys in KEYS for m in self.store.show(SINK, key(keys), 1000))})


KEYS = ["1", "2", "3", "4", "5"]


def _left(span: Span) -> list[Message]:
    return [Message(span, place) for place in range(len(span)) if not span.resolved[place]]


def expected(said: dict[int, Said], *, partial: bool) -> list[int]:
    """By the rule: what has a later image of its key, with nothing between that stands for more than one row."""
    rows = sorted(said)
    left: list[int] = []
    newest: set[str] = set()
    for row in reversed(rows):
        one = said[row]
        if one.action == TRUNCATE:
            newest.clear()
        elif len(one.keys) == 2:
            newest.difference_update(one.keys)
        elif one.keys[0] in newest:
            continue
        elif one.is_image(partial=partial):
            newest.add(one.keys[0])
        left.append(row)
    return sorted(left)


def any_said(keying: int) -> st.SearchStrategy[Said]:
    flags = st.sampled_from([WHOLE, WHOLE, WHOLE, 0, TOO_LARGE])
    one = st.builds(Said, st.tuples(st.sampled_from(KEYS)), st.sampled_from([UPDATE, UPDATE, DELETE]), flags)
    if keying == Keying.STATE:
        return one
    moved = st.permutations(KEYS).map(lambda keys: Said((keys[0], keys[1])))
    return st.one_of(one, one, one, moved)


@pytest.mark.parametrize("keying", [Keying.STATE, Keying.EVENTS])
@pytest.mark.parametrize("partial", [False, True])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_it_leaves_what_the_rule_leaves(keying: int, partial: bool, data: st.DataObject) -> None:
    spans = data.draw(st.lists(st.lists(any_said(keying), min_size=1, max_size=8), min_size=1, max_size=8))
    most_keys = data.draw(st.sampled_from([1, 2, 1000]))
    at_once = data.draw(st.sampled_from([1, 2, 32]))
    with fast_folder() as folder, opened(folder / "state.db") as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(the_compaction, "SPANS_AT_ONCE", at_once)
        backlog = Backlog(store, keying)
        for said in spans:
            backlog.put(said)
        removed = backlog.compact(partial=partial, most_keys=most_keys)
        left = backlog.rows()
        if most_keys == 1000:
            assert left == expected(backlog.said, partial=partial)
            assert removed == len(backlog.said) - len(left)
        else:  # a barrier clears what is known of all parts
            assert set(left) >= set(expected(backlog.said, partial=partial))
        counters = store.write(Write(SINK)).result().counters
        assert counters.messages == len(left)
        assert counters.bytes == sum(len(backlog.messages[row].change.body) for row in left)
        for span in store.page(SINK, 0, 1 << 20, 1 << 30):
            for message in _left(span):
                assert message.change.body == backlog.messages[message.row].change.body


def test_what_is_in_flight_is_spared_and_supersedes() -> None:
    with fast_folder() as folder, opened(folder / "state.db") as store:
        backlog = Backlog(store, Keying.STATE)
        backlog.put([Said(("1",)), Said(("1",)), Said(("1",)), Said(("2",))])
        rows = sorted(backlog.said)
        assert backlog.compact(spare=frozenset(rows[:1])) == 1
        assert backlog.rows() == [rows[0], rows[2], rows[3]]


def test_nothing_crosses_a_truncate() -> None:
    with fast_folder() as folder, opened(folder / "state.db") as store:
        backlog = Backlog(store, Keying.EVENTS)
        backlog.put([Said(("1",)), Said(("1",))])
        backlog.put([Said(("1",)), Said(("",), TRUNCATE), Said(("1",))])
        backlog.put([Said(("1",))])
        assert backlog.compact() == 1
        assert store.write(Write(SINK)).result().counters.messages == 5


@pytest.mark.parametrize("newer_in_queue", [False, True])
def test_lanes_keep_the_newest_image_alone(newer_in_queue: bool) -> None:
    with fast_folder() as folder, opened(folder / "state.db") as store:
        backlog = Backlog(store, Keying.STATE)
        backlog.put([Said(("1",)), Said(("2",)), Said(("1",)), Said(("1",)), Said(("1",), flags=0), Said(("2",))])
        rows = sorted(backlog.said)
        messages = backlog.messages
        store.write(
            Write(
                SINK,
                park=[Park(messages[rows[0]], "mapping", "", 60.0), Park(messages[rows[1]], "mapping", "", 60.0)],
                hold=[messages[row] for row in rows[2:]],
            )
        ).result()
        if newer_in_queue:
            backlog.put([Said(("1",))])
        backlog.compact()
        left = sorted(backlog.said)
        assert backlog.rows() == ([rows[5], left[6]] if newer_in_queue else [rows[3], rows[4], rows[5]])
        counters = store.write(Write(SINK)).result().counters
        assert counters.parked_keys == (1 if newer_in_queue else 2)
        heads = store.due(SINK, 10, 1 << 20, (1 << 63) - 1)
        assert sorted(head.message.row for head in heads) == ([rows[5]] if newer_in_queue else [rows[3], rows[5]])


def test_space_follows_the_keys() -> None:
    with fast_folder() as folder, opened(folder / "state.db") as store:
        backlog = Backlog(store, Keying.STATE)
        rng = random.Random(5)
        for _ in range(40):
            backlog.put([Said((rng.choice(KEYS),)) for _ in range(200)])
        assert backlog.compact() == 40 * 200 - len(KEYS)
        (span,) = store.page(SINK, 0, 1 << 20, 1 << 30)
        assert len(span.chunk.data) == sum(len(m.change.body) for m in _left(span))
        assert store.bytes_at_head(SINK, 0) == (len(span.chunk.data), len(_left(span)))


def test_after_a_restart_it_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path / "state.db", StillClock()) as store:
        backlog = Backlog(store, Keying.STATE)
        backlog.put([Said(("1",)), Said(("2",)), Said(("1",))])
        work = Compaction(1000, False)
        store.compact(SINK, work, frozenset()).result()
        said, messages = backlog.said, backlog.messages
    with opened(tmp_path / "state.db", StillClock()) as store:
        again = Backlog(store, Keying.STATE, said, messages)
        assert again.rows() == expected(said, partial=False)
        assert again.compact() == 0


def test_what_comes_between_the_steps_is_left_to_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass in parts goes over the same spans in each, however much comes meanwhile, and counts the keys in them."""
    monkeypatch.setattr(the_compaction, "SPANS_AT_ONCE", 1)
    with fast_folder() as folder, opened(folder / "state.db") as store:
        backlog = Backlog(store, Keying.STATE)
        backlog.put([Said((one,)) for one in KEYS * 4])
        backlog.put([Said((one,)) for one in KEYS])
        work = Compaction(1000, False, parts=4)
        removed = store.compact(SINK, work, frozenset()).result()
        steps = 1
        while not work.done:
            backlog.put([Said((one,)) for one in KEYS])
            removed += store.compact(SINK, work, frozenset()).result()
            steps += 1
        assert removed == 4 * len(KEYS)
        assert work.keys == len(KEYS)
        assert steps <= 4 * (2 + 1 + 1)
        assert backlog.compact() == (steps - 1) * len(KEYS)


def test_the_last_pass_says_how_many_keys_there_are() -> None:
    """Not what waits at a start: 900,000 messages may be 10,000 keys, and to look for them in parts takes long."""
    waiting = Counters(messages=900_000, bytes=900_000)
    passes = Passes(0.0, waiting)
    assert passes.keys == 0
    passes.put()
    assert passes.due(0.0, waiting, 0.0, newcomers=True, full=True)
    passes.begin(0.0, waiting)
    passes.step(1_400_000)  # much had come before the first step
    left = Counters(messages=150_000, bytes=150_000)
    passes.ended(1.0, left, keys=10_000, spared=False)
    assert passes.keys == 10_000
    passes.put()
    grown = Counters(messages=119_999, bytes=119_999)
    assert not passes.due(8.0, grown, 8.0, newcomers=True, full=False)  # 10,000, twice, and 100,000
    assert passes.due(8.0, Counters(messages=120_000, bytes=120_000), 8.0, newcomers=True, full=False)

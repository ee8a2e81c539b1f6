"""Passes of compaction among everything else that happens to a store, against the model: what a pass removes is what
the rule says, everything that can be read stays right, and a crash in the middle of a pass leaves whole steps."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from store_model import Model
from store_support import SINK
from test_store_model import StoreMachine, rows_of_everything, small

from spillway.chunk import Keying
from spillway.position import Position
from spillway.store import compact
from spillway.store.base import Write
from spillway.store.compact import Compaction

__all__ = ["small"]

ROWS = (Keying.STATE, Keying.EVENTS)


def superseded(model: Model) -> set[int]:
    """By the rule. All that the machine writes are whole images."""
    gone: set[int] = set()
    newest: dict[str, int] = {}
    for record in reversed(model.queue()):
        if record.keying not in ROWS or not record.message_keys:
            continue
        if len(record.keys) == 2:
            for key in record.keys:
                newest.pop(key, None)
        elif record.keys[0] in newest:
            gone.add(record.row)
        else:
            newest[record.keys[0]] = record.row
    for key in model.parked_keys():
        lane = model.lane(key)
        if any(len(one.keys) == 2 or one.revived for one in lane):
            continue
        rows = [one.row for one in lane if one.keying in ROWS]
        last = max([newest.get(key, 0), *rows])
        gone.update(row for row in rows if row < last)
    return gone


class CompactMachine(StoreMachine):
    def spare(self, data: st.DataObject) -> frozenset[int]:
        rows = sorted(self.model.rows)
        return frozenset(data.draw(st.lists(st.sampled_from(rows), max_size=2)) if rows else [])

    def step(self, work: Compaction, spare: frozenset[int]) -> None:
        before = set(self.model.rows)
        count = self.store.compact(SINK, work, spare).result(10)
        gone = before - set(rows_of_everything(self.store))
        assert count == len(gone)
        self.model = self.model.copy()
        self.model.discarded(gone, self.clock.now)
        assert self.store.write(Write(SINK)).result(10).counters == self.model.counters()

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        spare = self.spare(data)
        work = Compaction(data.draw(st.sampled_from([1, 2, 1000])), partial_images=False)
        before, expected = dict(self.model.rows), superseded(self.model)
        while not work.done:
            self.step(work, spare)
        gone = before.keys() - self.model.rows.keys()
        assert gone == expected - spare

    @rule(data=st.data())
    def crash_while_compacting(self, data: st.DataObject) -> None:
        spare, work = self.spare(data), Compaction(1000, partial_images=False)
        for _ in range(data.draw(st.integers(0, 4))):
            if not work.done:
                self.step(work, spare)
        models = [self.model]
        if not work.done:
            future = self.store.compact(SINK, work, spare)
            torn = self.copy("torn")
            future.result(10)
            self.model = self.model.copy()
            self.model.discarded(self.model.rows.keys() - set(rows_of_everything(self.store)), self.clock.now)
            models.append(self.model)
        else:
            torn = self.copy("torn")
        after = self.copy(f"after {len(list(self.folder.iterdir()))}")
        self.store.close()
        self.is_one_of(models, torn)
        self.path = after
        self.model.restarted()
        self.store = self.open()

    @rule(data=st.data())
    def rows_that_change_often(self, data: st.DataObject) -> None:
        """So that spans lose most of what they have, and are written anew."""
        values = data.draw(st.lists(st.sampled_from(["a", "a", "a", "b"]), min_size=3, max_size=8))
        span = self.newcomer(Keying.STATE, False, [([value], [], "jobs", 3, 0) for value in values])
        write = Write(SINK, put=[span], position=Position(self.lsn, 0, 1))
        future = self.store.write(write)
        self.model.write(write, self.clock.now)
        assert future.result(10).counters == self.model.counters()


@pytest.fixture
def small_steps(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "SPANS_AT_ONCE", 2)
    monkeypatch.setattr(compact, "CHUNK", 2)
    monkeypatch.setattr(compact, "PARKED_AT_ONCE", 3)


@pytest.mark.usefixtures("small_steps")
def test_it_does_what_the_model_does() -> None:
    run_state_machine_as_test(
        CompactMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )

"""Each rule for reads on a story made up to break it, and silence on those that are right."""

from __future__ import annotations

import pytest

from oracle.history import Event, History, Transaction
from oracle.reads import folded, judge_backfilled, whole_rows
from oracle.rules import Delivery
from oracle.test_rules import TABLE, Story, key


class ReadStory(Story):
    """A story with reads: ``read(2)`` shows the row that event 2 has made. ``del a`` is a delete."""

    def __init__(self, *events: str) -> None:
        super().__init__()
        for number, text in enumerate(events):
            action = "delete" if text.startswith("del ") else "update"
            keys = tuple(key(name) for name in text.removeprefix("del ").split(">"))
            event = Event(number, 0, TABLE, action, keys, {"id": keys[-1][1], "v": str(number)})
            self.history.add(Transaction(100 * number + 10, 100 * number + 90, (event,)))
        self._lsn = 100 * len(events)

    def read(self, *numbers: int, ok: bool = True, **other: object) -> None:
        """One request with these; ``other``: what it says instead."""
        self._request += 1
        for number in numbers:
            message = self.message(number)
            metadata = {**message["metadata"], "commit_lsn": other.pop("lsn", self._lsn)}  # type: ignore[dict-item]
            message |= {"action": "read", "metadata": metadata, **other}
            self.deliveries.append(Delivery(self._request, self.life, message, ok, ok))

    def judge(self, excused: tuple[int, ...] = ()) -> list[str]:
        found = judge_backfilled(self.history, [TABLE], self.deliveries, excused, stamp="v")
        return [violation.rule for violation in found]


def test_all_is_well() -> None:
    story = ReadStory("a", "b", "a", "b")
    story.each(0, 1)
    story.read(0, 1)
    story.each(2)
    story.read(2)
    story.read(2, 1)
    story.each(3)
    story.read(3)
    assert story.judge() == []


def test_rows_from_before_the_slot() -> None:
    story = ReadStory("a", "a", "b", "a")
    story.read(1, 2)
    story.each(3)
    story.read(3)
    assert story.judge(excused=(0, 1, 2)) == []


def test_an_older_row_after_a_newer_message() -> None:
    story = ReadStory("a", "a")
    story.each(0, 1)
    story.read(0)
    assert story.judge() == ["went back"]


def test_an_older_row_after_a_newer_read() -> None:
    story = ReadStory("a", "a")
    story.read(1)
    story.read(0)
    assert story.judge(excused=(0, 1)) == ["went back"]


def test_a_row_after_its_delete() -> None:
    story = ReadStory("a", "del a")
    story.each(0, 1)
    story.read(0)
    assert story.judge() == ["went back"]


def test_a_row_after_its_key_has_changed() -> None:
    story = ReadStory("a", "a>b")
    story.each(0, 1)
    story.read(0)
    assert story.judge() == ["went back"]


@pytest.mark.parametrize("sent_after", [0, 1])
def test_a_read_ahead_of_the_stream(sent_after: int) -> None:
    story = ReadStory("a", "a")
    story.each(*range(sent_after))
    story.read(1)
    story.each(*range(sent_after, 2))
    found = story.judge()
    assert found[0] == "ahead"
    assert set(found[1:]) == {"went back"}


def test_a_read_ahead_of_the_change_of_key_that_made_it() -> None:
    story = ReadStory("a", "b", "a>b")
    story.each(0, 1)
    story.read(2)
    story.each(2)
    assert story.judge() == ["ahead", "went back"]


def test_changes_that_the_sink_does_not_take_are_stepped_over() -> None:
    story = ReadStory("a", "a", "a", "del a")
    story.each(0)
    story.read(1)
    story.read(2)
    story.each(3)
    assert story.judge(excused=(1, 2)) == []
    story.read(2)
    assert story.judge(excused=(1, 2)) == ["went back"]


def test_a_read_while_the_head_of_its_key_had_failed() -> None:
    story = ReadStory("a", "a")
    story.each(0)
    story.send(1, ok=False)
    story.read(1)
    assert story.judge()[-1] == "overtaken"


def test_a_change_while_a_read_of_its_key_had_failed() -> None:
    story = ReadStory("a", "a")
    story.each(0)
    story.read(0, ok=False)
    story.each(1)
    assert story.judge() == ["overtaken"]


def test_a_read_that_failed_comes_again() -> None:
    story = ReadStory("a", "a")
    story.each(0)
    story.read(0, ok=False)
    story.read(0)
    story.each(1)
    assert story.judge() == []


def test_a_restart_may_go_back_and_replay() -> None:
    story = ReadStory("a", "a", "a")
    story.each(0, 1)
    story.read(1)
    story.each(2)
    story.restart()
    story.each(1, 2)
    story.read(2)
    assert story.judge() == []


def test_a_replay_is_no_leave_to_read_ahead_or_to_go_back_later() -> None:
    story = ReadStory("a", "a", "a")
    story.each(0, 1, 2)
    story.restart()
    story.each(1)
    story.read(2)
    story.each(2)
    assert story.judge() == ["ahead", "went back"]
    story.read(1)
    assert story.judge()[-1] == "went back"


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        ({"record": {"id": "a", "v": "7"}}, "invented"),
        ({"record": {"id": "a", "v": "0", "w": "x"}}, "content"),
        ({"record": {"v": "0"}}, "content"),
        ({"lsn": 50}, "invented"),
        ({"lsn": None}, "invented"),
        ({"record": None}, "malformed"),
    ],
)
def test_invented(other: dict[str, object], rule: str) -> None:
    story = ReadStory("a", "b")
    story.each(0, 1)
    story.read(0, **other)
    assert story.judge() == [rule]


@pytest.mark.parametrize(("lsn", "found"), [(8192, []), (8191, ["invented"]), (8232, [])])
def test_a_read_at_the_header_of_a_block_that_a_commit_goes_across(lsn: int, found: list[str]) -> None:
    story = ReadStory("a")
    event = story.history.events[0]
    story.history = History([Transaction(8100, 8232, (event,))])
    story.read(0, lsn=lsn)
    assert story.judge(excused=(0,)) == found


def test_the_row_of_another_key_is_invented() -> None:
    story = ReadStory("a", "a>b")
    story.each(0, 1)
    message = story.message(1)
    metadata = {**message["metadata"], "record_pks": ["a"], "commit_lsn": 500}  # type: ignore[dict-item]
    story.deliveries.append(Delivery(9, 0, {**message, "action": "read", "metadata": metadata}))
    assert story.judge() == ["invented"]


def test_what_judge_events_says_of_the_stream_still_holds() -> None:
    story = ReadStory("a", "a", "a")
    story.each(0)
    story.read(0)
    story.each(2)
    assert story.judge() == ["skipped", "lost"]


def test_whole_rows_and_what_messages_come_to() -> None:
    events = [
        Event(0, 0, TABLE, "insert", (key("a"),), {"id": "a", "v": "0", "big": "x"}),
        Event(1, 0, TABLE, "update", (key("a"),), {"id": "a", "v": "1"}),
        Event(2, 0, TABLE, "update", (key("a"), key("b")), {"id": "b", "v": "2"}),
        Event(3, 0, TABLE, "insert", (key("c"),), {"id": "c", "v": "3", "big": None}),
        Event(4, 0, TABLE, "delete", (key("c"),), {"id": "c"}),
    ]
    history = History(Transaction(100 * e.number + 10, 100 * e.number + 90, (e,)) for e in events)
    assert whole_rows(history)[2] == {"id": "b", "v": "2", "big": "x"}
    story = ReadStory()
    story.history = history
    story.each(0, 1, 2, 3, 4)
    assert story.judge() == []
    assert folded(history, story.deliveries) == {key("b"): {"id": "b", "v": "2", "big": "x"}}
    story.deliveries = story.deliveries[1:]
    assert folded(history, story.deliveries) == {key("b"): {"id": "b", "v": "2"}}
    story._lsn = 1000
    story.read(2, record={"id": "b", "v": 2, "big": "x"})
    assert folded(history, story.deliveries) == {key("b"): {"id": "b", "v": "2", "big": "x"}}

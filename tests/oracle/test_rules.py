"""The oracle is shown to fail: each rule on a history made up to break it, and silence on those that are right."""

from __future__ import annotations

import pytest

from oracle.history import Event, History, Reader, Transaction, parse_row
from oracle.rules import Delivery, as_text, judge_events, judge_rows

TABLE = "public.jobs"


def key(name: str) -> tuple[str, str]:
    return (TABLE, name)


class Story:
    """A history and deliveries, written down briefly: ``event("a")``, ``event("a>b")``, ``send(0)``."""

    def __init__(self, *events: str) -> None:
        self.history = History()
        self.deliveries: list[Delivery] = []
        self.life = 0
        self._request = 0
        for number, text in enumerate(events):
            keys = tuple(key(name) for name in text.split(">"))
            event = Event(number, 0, TABLE, "update", keys, {"id": keys[-1][1], "v": str(number)})
            self.history.add(Transaction(100 * number + 10, 100 * number + 90, (event,)))

    def message(self, number: int) -> dict[str, object]:
        event = self.history.events[number]
        return {
            "action": event.action,
            "record": dict(event.row),
            "metadata": {
                "table_schema": "public",
                "table_name": "jobs",
                "record_pks": list(event.keys[-1][1:]),
                "commit_lsn": 100 * number + 50,
                "commit_idx": 0,
            },
        }

    def send(self, *numbers: int, ok: bool = True, cut: bool = False) -> None:
        """One request with these messages; ``cut``: applied, and the answer lost."""
        self._request += 1
        for number in numbers:
            self.deliveries.append(Delivery(self._request, self.life, self.message(number), ok, ok and not cut))

    def each(self, *numbers: int) -> None:
        for number in numbers:
            self.send(number)

    def restart(self) -> None:
        self.life += 1

    def judge(self, excused: tuple[int, ...] = ()) -> list[str]:
        return [v.rule for v in judge_events(self.history, [TABLE], self.deliveries, excused)]


def test_all_is_well() -> None:
    story = Story("a", "b", "a", "a", "b")
    story.send(0, 1)
    story.each(2, 3, 4)
    assert story.judge() == []


def test_repetitions_of_the_head_are_no_violation() -> None:
    story = Story("a", "a")
    story.send(0, ok=False)
    story.send(0, cut=True)
    story.send(0)
    story.send(1)
    assert story.judge() == []


def test_a_restart_may_go_back_and_replay_all() -> None:
    story = Story("a", "a", "a", "a")
    story.each(0, 1, 2)
    story.restart()
    story.each(1)
    story.restart()
    story.each(1, 2, 3)
    assert story.judge() == []


def test_lost() -> None:
    story = Story("a", "b")
    story.each(0)
    assert story.judge() == ["lost"]


def test_lost_although_an_attempt_was_made() -> None:
    story = Story("a")
    story.send(0, ok=False)
    assert story.judge() == ["lost", "stale"]


def test_what_is_reported_is_not_lost_and_does_not_hold_its_key() -> None:
    story = Story("a", "a", "b")
    story.send(0, ok=False)
    story.each(1)
    assert story.judge(excused=(0, 2)) == []


def test_overtaken_while_the_head_had_failed() -> None:
    story = Story("a", "a")
    story.send(0, ok=False)
    story.send(1)
    story.send(0)
    assert "overtaken" in story.judge()


def test_overtaken_after_a_restart_while_the_head_was_parked() -> None:
    story = Story("a", "a")
    story.send(0, ok=False)
    story.restart()
    story.send(1)
    story.send(0)
    assert story.judge() == ["overtaken", "went back", "stale"]


def test_overtaken_when_the_answer_to_the_head_was_lost() -> None:
    story = Story("a", "a")
    story.send(0, cut=True)
    story.send(1)
    assert story.judge() == ["overtaken"]


def test_two_of_a_key_in_one_batch() -> None:
    story = Story("a", "a")
    story.send(0, 1)
    assert story.judge() == ["overtaken"]


def test_went_back_in_one_life() -> None:
    story = Story("a", "a", "a")
    story.each(0, 1, 0, 1, 2)
    assert story.judge() == ["went back"]


def test_replay_that_leaves_out_what_followed() -> None:
    story = Story("a", "a", "a", "a")
    story.each(0, 1, 2)
    story.restart()
    story.each(0, 3)
    assert story.judge() == ["skipped"]


def test_replay_that_ends_before_the_newest() -> None:
    story = Story("a", "a", "a")
    story.each(0, 1, 2)
    story.restart()
    story.each(0, 1)
    assert story.judge() == ["stale"]


def test_first_message_of_a_key_left_out() -> None:
    story = Story("a", "a")
    story.each(1)
    assert story.judge() == ["skipped", "lost"]


@pytest.mark.parametrize(
    ("order", "broken"),
    [
        ((0, 1, 2, 3, 4), []),
        ((1, 0, 2, 4, 3), []),  # the keys are free of each other before and after the change
        ((0, 2, 1, 3, 4), ["skipped", "went back", "skipped"]),  # ahead of what the new key still had to do
        ((1, 2, 0, 3, 4), ["skipped", "went back", "skipped"]),  # ahead of what the old key still had to do
        ((0, 1, 4, 2, 3), ["skipped", "went back"]),  # the new key went on before the key change
    ],
)
def test_a_key_change_is_ordered_under_both_keys(order: tuple[int, ...], broken: list[str]) -> None:
    story = Story("a", "b", "a>b", "a", "b")
    story.each(*order)
    assert [rule for rule in story.judge() if rule != "stale"] == broken


def test_a_key_change_that_failed_holds_both_keys() -> None:
    for later in (1, 2):
        story = Story("a>b", "a", "b")
        story.send(0, ok=False)
        story.send(later)
        story.restart()
        story.each(0, 1, 2)
        assert "overtaken" in story.judge()


@pytest.mark.parametrize("position", [(5, 0), (150, 0), (5_000, 0), (50, 1), (50, -1), (None, 0)])
def test_invented(position: tuple[object, object]) -> None:
    story = Story("a", "b")
    story.each(0, 1)
    message = story.message(0)
    message["metadata"] |= {"commit_lsn": position[0], "commit_idx": position[1]}  # type: ignore[operator]
    story.deliveries.append(Delivery(9, 0, message))
    expected = ["content"] if position == (150, 0) else ["invented"]
    assert expected[0] in story.judge()


def test_wrong_content() -> None:
    for change in ({"action": "insert"}, {"record": {"id": "a", "v": "7"}}, {"record": {"id": "a"}}, {"record": None}):
        story = Story("a")
        story.deliveries.append(Delivery(1, 0, {**story.message(0), **change}))
        assert story.judge() == ["content"]


def test_malformed() -> None:
    story = Story("a")
    story.each(0)
    story.deliveries.append(Delivery(2, 0, {"hello": 1}))
    assert story.judge() == ["malformed"]


def test_final_state() -> None:
    source = {key("1"): {"id": "1", "v": "x"}, key("2"): {"id": "2", "v": None}}
    assert judge_rows(source, dict(source)) == []
    for wrong in (
        {key("1"): source[key("1")]},
        {**source, key("3"): {"id": "3", "v": "x"}},
        {**source, key("2"): {"id": "2", "v": ""}},
        {**source, key("2"): {"id": "2"}},
    ):
        assert [v.rule for v in judge_rows(source, wrong)] == ["state"]


def test_reads_what_test_decoding_says() -> None:
    reader = Reader({TABLE: ("id",), "public.pairs": ("a", "b")})
    lines = [
        (10, "BEGIN 700"),
        (11, "table public.jobs: INSERT: id[integer]:1 v[text]:'it''s [text]:''x'' a\nline' n[numeric]:null"),
        (12, "table public.unpublished: INSERT: id[integer]:1"),
        (13, "table public.jobs: UPDATE: old-key: id[integer]:1"
             " new-tuple: id[integer]:2 v[text]:unchanged-toast-datum"),
        (14, "table public.pairs: UPDATE: old-key: a[integer]:1 b[text]:'x' t[integer[]]:'{1,2}'"
             " new-tuple: a[integer]:1 b[text]:'x' t[integer[]]:unchanged-toast-datum"),
        (15, "table public.jobs: DELETE: id[integer]:2"),
        (20, "COMMIT 700"),
    ]  # fmt: skip
    (transaction,) = [t for lsn, line in lines if (t := reader.take(lsn, line)) is not None]
    insert, moved, pair, delete = transaction.events
    assert (transaction.last_change_lsn, transaction.end_lsn) == (15, 20)
    assert insert.row == {"id": "1", "v": "it's [text]:'x' a\nline", "n": None}
    assert (moved.keys, moved.row, moved.idx) == ((key("1"), key("2")), {"id": "2"}, 1)
    assert pair.keys == (("public.pairs", "1", "x"),)
    assert pair.row == {"a": "1", "b": "x", "t": "{1,2}"}
    assert (delete.action, delete.row, delete.number) == ("delete", {"id": "2"}, 3)
    history = History([transaction])
    assert [history.at(lsn, 0) for lsn in (14, 15, 19, 20)] == [None, insert, insert, None]


def test_a_line_it_does_not_know_is_an_error_and_not_silence() -> None:
    with pytest.raises(ValueError, match="does not know"):
        Reader({}).take(1, "something new")
    with pytest.raises(ValueError, match="not a row"):
        parse_row("what is this")


def test_values_as_postgres_prints_them() -> None:
    assert [as_text(v) for v in (None, True, 7, "x", [1, 2])] == [None, "true", "7", "x", "[1,2]"]

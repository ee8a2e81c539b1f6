"""The window against a model: order per key, the watermark, and what is behind a parked key (I3, I1)."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from spillway.change import Change, Message
from spillway.flow.window import Window


def change(lsn: int, key: str = "k", *, whole: bool = True, action: str = "insert") -> Change:
    return Change(
        commit_lsn=lsn, commit_idx=0, schema="public", table="t", action=action,  # type: ignore[arg-type]
        key=key, pks=(key,), body=b"{}", record_bytes=2, n=1, whole=whole, commit_time=0.0,
    )  # fmt: skip


def message(lsn: int, *keys: str, whole: bool = True) -> Message:
    return Message(change(lsn, keys[0] if keys else "k", whole=whole), keys)


KEYS = st.sampled_from("abcd")
KEY_SETS = st.lists(KEYS, min_size=1, max_size=2, unique=True).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.lists(KEY_SETS, max_size=30), st.data())
def test_messages_of_a_key_leave_in_order_and_never_two_at_once(
    keysets: list[tuple[str, ...]], data: st.DataObject
) -> None:
    window = Window(keyed=True, supersedes=False)
    waiting = [message(lsn, *keys) for lsn, keys in enumerate(keysets, 1)]
    window.track(waiting)
    flying: list[Message] = []
    sent: dict[str, list[int]] = {}
    admitted = 0
    while admitted < len(waiting) or flying or window.ready:
        step = data.draw(st.sampled_from(["admit", "take", "release", "put_back"]))
        if step == "admit" and admitted < len(waiting):
            window.admit(waiting[admitted])
            admitted += 1
        elif step == "take":
            batch = window.take(data.draw(st.integers(1, 5)), 1000, 1 << 30)
            keys_in_flight = [k for m in [*flying, *batch] for k in m.keys]
            assert len(keys_in_flight) == len(set(keys_in_flight))
            flying += batch
        elif step == "release" and flying:
            done = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            done.done = True
            for key in done.keys:
                sent.setdefault(key, []).append(done.change.commit_lsn)
            window.release(done)
        elif step == "put_back" and flying:
            window.put_back(flying)
            flying = []
        open_now = [m for m in waiting if not m.done]
        assert window.first_open() is (open_now[0] if open_now else None)
    for key in "abcd":
        assert sent.get(key, []) == [m.change.commit_lsn for m in waiting if key in m.keys]
    assert window.waiting == 0
    assert not window.busy(("a", "b", "c", "d"))


@settings(max_examples=300, deadline=None)
@given(st.lists(KEY_SETS, min_size=1, max_size=20), st.integers(1, 4), st.booleans())
def test_what_is_behind_a_parked_key_leaves_and_the_rest_flows(
    keysets: list[tuple[str, ...]], taken: int, keyed: bool
) -> None:
    window = Window(keyed=keyed, supersedes=False)
    messages = [message(lsn, *keys) for lsn, keys in enumerate(keysets, 1)]
    for one in messages:
        window.admit(one)
    batch = window.take(taken, 1000, 1 << 30)
    parked = batch[:1]
    blocked = set(parked[0].keys)
    expected = []
    for one in messages:
        if one not in batch and not blocked.isdisjoint(one.keys):
            blocked |= set(one.keys)
            expected.append(one)
    dropped = window.drop_behind(parked)
    assert sorted(m.change.commit_lsn for m in dropped) == [m.change.commit_lsn for m in expected]
    flown = list(batch)
    for one in batch:
        window.release(one)
    while window.ready:
        more = window.take(100, 100000, 1 << 30)
        for one in more:
            window.release(one)
        flown += more
    assert {m.change.commit_lsn for m in flown} == {m.change.commit_lsn for m in messages if m not in expected}
    assert window.waiting == 0
    assert not window.busy(("a", "b", "c", "d"))


def test_a_state_sends_the_newest_whole_image_and_counts_the_earlier_as_superseded() -> None:
    window = Window(keyed=True, supersedes=True)
    first, second, third, partial = (message(n, "k") for n in (1, 2, 3, 4))
    partial.change.whole = False
    for one in (first, second, third, partial):
        window.admit(one)
    assert window.take(10, 1000, 1 << 30) == [third]
    assert third.superseded == [first, second]
    window.put_back([third])
    fifth = message(5, "k")
    window.admit(fifth)
    assert window.take(10, 1000, 1 << 30) == [fifth]
    assert fifth.superseded == [first, second, third, partial]
    window.release(fifth)
    assert not window.busy(("k",))
    assert window.waiting == 0


def test_eviction_keeps_what_is_in_flight_and_its_keys_busy() -> None:
    window = Window(keyed=True, supersedes=False)
    messages = [message(1, "a"), message(2, "a", "b"), message(3, "b"), message(4, "c")]
    for row, one in enumerate(messages, 1):
        one.row = row
        window.admit(one)
    assert window.take(1, 100, 1 << 30) == [messages[0]]
    assert {m.row for m in window.evict()} == {2, 3, 4}
    assert window.flying_rows() == [1]
    assert window.busy(("a",))
    assert not window.busy(("b", "c"))
    window.release(messages[0])
    assert not window.busy(("a",))

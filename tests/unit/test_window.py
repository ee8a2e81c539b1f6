"""The window against a model: order per key, the watermark, and what is behind a parked key (I3, I1).

Messages come in spans of random sizes and leave in batches that cut them. With ``collide`` all keys share very few
hashes: then different keys wait for each other, and nothing else is different.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from spillway import chunk as the_chunk
from spillway.chunk import MOVED, WHOLE, Batch, ChunkBuilder, Keying, Message, Span
from spillway.flow.window import ENCODED_OVERHEAD_BYTES, SUPERSEDED_AT_ONCE, Window, encoded_cost

BODY = b'{"record":{}'
PLENTY = 1 << 40

Keys = tuple[str, ...]


@contextmanager
def hashes_of(few: int | None) -> Iterator[None]:
    """Hashes of so many values at most."""
    with pytest.MonkeyPatch.context() as patch:
        if few is not None:
            patch.setattr(the_chunk, "crc32", lambda key: sum(key) % few)
        yield


def a_span(
    first_lsn: int, *keysets: Keys, keying: int = Keying.EVENTS, whole: Sequence[bool] = (), body: bytes = BODY
) -> Span:
    """Messages ordered by these keys (none, one, or the old and the new one), of transactions of their own."""
    builder = ChunkBuilder()
    for at, keys in enumerate(keysets):
        moved = len(keys) == 2
        texts = [key.encode() for key in ((keys[1], keys[0]) if moved else (*keys, "", "")[:2])]
        flags = (WHOLE if not whole or whole[at] else 0) | (MOVED if moved else 0)
        builder.add(("public", "t"), 1, first_lsn + at, 0, 0, body, 2, texts, flags=flags)
    return Span(builder.take(), keying)


def lsns(messages: Sequence[Message]) -> list[int]:
    return [message.position[0] for message in messages]


def of(span: Span) -> list[Message]:
    return [Message(span, place) for place in range(len(span))]


def admit(window: Window, *spans: Span) -> None:
    for span in spans:
        window.admit(span, 0, len(span))


def take(window: Window, most: int = 100) -> Batch:
    batch = window.take(most, PLENTY, PLENTY)
    assert batch is not None
    return batch


def resolve(window: Window, batch: Batch) -> None:
    for span, start, stop in [*batch.pieces, *((m.span, m.place, m.place + 1) for m in batch.superseded)]:
        assert not any(span.resolved[start:stop]), "resolved twice"
        span.resolved[start:stop] = b"\1" * (stop - start)
        span.left -= stop - start
    window.release(batch)


def consistent(window: Window, waiting: int) -> None:
    """What the window counts is what it holds."""
    assert window.waiting == waiting == sum(stop - start for _, start, stop in window._waiting())
    assert window.ready_count == sum(b - a for pieces in (window._claimed, window._fresh) for _, a, b in pieces)
    assert window.ready == (window.ready_count > 0)


def empty(window: Window) -> None:
    consistent(window, 0)
    assert not window.flying
    assert not window._busy
    assert not window._lines
    assert not window._waits


KEYS = st.sampled_from("abcd")
KEY_SETS = st.lists(KEYS, max_size=2, unique=True).map(tuple)
ONE_KEY = KEYS.map(lambda key: (key,))
SPANS = st.sampled_from([ONE_KEY, KEY_SETS]).flatmap(
    lambda keys: st.lists(st.lists(keys, min_size=1, max_size=8), max_size=8)
)
# A play of one seed is quick; drawing each step is not.
DICE = st.integers(0, 1 << 32).map(random.Random)
COLLIDE = st.sampled_from([None, 1, 2, 3])


def spans_of(keysets: list[list[Keys]]) -> list[Span]:
    made: list[Span] = []
    for part in keysets:
        made.append(a_span(1 + sum(map(len, made)), *part))
    return made


@settings(max_examples=400, deadline=None)
@given(SPANS, COLLIDE, DICE)
def test_messages_of_a_key_leave_in_order_and_never_two_at_once(
    keysets: list[list[Keys]], collide: int | None, dice: random.Random
) -> None:
    with hashes_of(collide):
        window = Window(keyed=True, supersedes=False)
        spans = spans_of(keysets)
        for span in spans:
            window.track(span)
        flying: list[Batch] = []
        sent: list[int] = []
        admitted = held = 0
        while admitted < len(spans) or flying or window.ready:
            step = dice.choice(["admit", "take", "release", "divide", "put_back"])
            if step == "admit" and admitted < len(spans):
                admit(window, spans[admitted])
                held += len(spans[admitted])
                admitted += 1
            elif step == "take" and window.ready:
                batch = window.take(dice.randint(1, 9), dice.choice([1, 30, 1000]), PLENTY)
                assert batch is not None or not window.ready, "something could be taken"
                if batch is not None:
                    held -= len(batch)
                    flying.append(batch)
                    keys = [key for b in flying for m in b for key in m.keys]
                    assert len(keys) == len(set(keys))
            elif step == "release" and flying:
                done = flying.pop(dice.randint(0, len(flying) - 1))
                sent += lsns(done)
                resolve(window, done)
            elif step == "divide" and flying:
                whole = flying.pop(dice.randint(0, len(flying) - 1))
                cut = dice.randint(1, len(whole))
                parts = [part for part in (whole[:cut], whole[cut:]) if part]
                window.divide(whole, parts)
                flying += parts
            elif step == "put_back" and flying:
                back = flying.pop(dice.randint(0, len(flying) - 1))
                held += len(back)
                window.put_back(back)
            consistent(window, held)
            assert window.flying == sum(map(len, flying))
            still_open = [span for span in spans if span.left]
            assert window.first_open() is (still_open[0] if still_open else None)
        messages = [m for span in spans for m in of(span)]
        assert sorted(sent) == lsns(messages)
        for key in "abcd":
            own = set(lsns([m for m in messages if key in m.keys]))
            assert [lsn for lsn in sent if lsn in own] == sorted(own)
        empty(window)


@settings(max_examples=400, deadline=None)
@given(SPANS.filter(bool), COLLIDE, st.booleans(), DICE)
def test_what_is_behind_a_parked_key_leaves_and_the_rest_flows(
    keysets: list[list[Keys]], collide: int | None, keyed: bool, dice: random.Random
) -> None:
    with hashes_of(collide):
        window = Window(keyed=keyed, supersedes=False)
        spans = spans_of(keysets)
        admit(window, *spans)
        batch = take(window, dice.randint(1, 4))
        if not keyed and dice.random() < 0.5:  # the sink was down
            window.put_back(batch)
            batch = take(window, dice.randint(1, 2))
        if dice.random() < 0.5 and window.ready:  # another batch is under way
            other = window.take(dice.randint(1, 4), PLENTY, PLENTY) if keyed else None
        else:
            other = None
        gone = {*lsns(batch), *(lsns(other) if other else ())}
        parked = [message for message in batch if dice.random() < 0.5]
        blocked = {key for message in parked for key in message.keys}
        expected: list[int] = []
        for message in (m for span in spans for m in of(span)):
            (lsn,) = lsns([message])
            if lsn not in gone and not blocked.isdisjoint(message.keys):
                blocked.update(message.keys)
                expected.append(lsn)
        held = window.waiting
        keys, dropped = window.drop_behind(parked)
        assert lsns(dropped) == expected
        assert keys == blocked
        consistent(window, held - len(expected))
        flown = [*gone]
        window.release(batch)
        if other is not None:
            window.release(other)
        while window.ready:
            more = take(window)
            window.release(more)
            flown += lsns(more)
        assert sorted(flown) == [n for n in range(1, 1 + sum(map(len, spans))) if n not in expected]
        empty(window)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(KEYS, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=8), COLLIDE,
       DICE)  # fmt: skip
def test_a_state_ends_with_the_newest_and_supersedes_only_what_a_whole_image_of_the_key_covers(
    rows: list[list[tuple[str, bool]]], collide: int | None, dice: random.Random
) -> None:
    with hashes_of(collide):
        window = Window(keyed=True, supersedes=True)
        spans: list[Span] = []
        for part in rows:
            first = 1 + sum(map(len, spans))
            whole = [whole for _, whole in part]
            spans.append(a_span(first, *((key,) for key, _ in part), keying=Keying.STATE, whole=whole))
        messages = [m for span in spans for m in of(span)]
        resolved: list[int] = []
        flying: list[Batch] = []
        admitted = 0
        while admitted < len(spans) or flying or window.ready:
            step = dice.choice(["admit", "take", "release", "put_back"])
            if step == "admit" and admitted < len(spans):
                admit(window, spans[admitted])
                admitted += 1
            elif step == "take" and window.ready and (batch := window.take(dice.randint(1, 9), 999, PLENTY)):
                flying.append(batch)
                for message in batch:
                    for earlier in message.superseded or ():
                        assert earlier.keys == message.keys
                        assert earlier.position < message.position
                        assert message.change.whole
            elif step == "release" and flying:
                done = flying.pop(dice.randint(0, len(flying) - 1))
                for message in done:
                    resolved += [*lsns(message.superseded or ()), *lsns([message])]
                resolve(window, done)
            elif step == "put_back" and flying:
                window.put_back(flying.pop(dice.randint(0, len(flying) - 1)))
            out = sum(len(b) + len(b.superseded) for b in flying)
            consistent(window, sum(map(len, spans[:admitted])) - len(resolved) - out)
        assert sorted(resolved) == lsns(messages)
        for key in "abcd":
            own = lsns([m for m in messages if m.keys == (key,)])
            assert [lsn for lsn in resolved if lsn in own] == own
        empty(window)


def test_a_state_sends_the_newest_whole_image_and_counts_the_earlier_as_superseded() -> None:
    window = Window(keyed=True, supersedes=True)
    span = a_span(1, ("k",), ("k",), ("k",), ("k",), keying=Keying.STATE, whole=[True, True, True, False])
    admit(window, span)
    batch = take(window)
    assert lsns(batch) == [3]
    assert lsns(batch.superseded) == [1, 2]
    window.put_back(batch)
    consistent(window, 4)
    admit(window, a_span(5, ("k",), keying=Keying.STATE))
    batch = take(window)
    assert lsns(batch) == [5]
    assert lsns(batch.superseded) == [1, 2, 3, 4]
    window.release(batch)
    empty(window)


def test_of_a_long_line_so_much_is_looked_at_for_a_newer_image_as_is_sent_in_its_place() -> None:
    window = Window(keyed=True, supersedes=True)
    admit(window, a_span(1, *[("k",)] * (SUPERSEDED_AT_ONCE + 3), keying=Keying.STATE))
    batch = take(window)
    assert lsns(batch) == [SUPERSEDED_AT_ONCE + 1]
    assert len(batch.superseded) == SUPERSEDED_AT_ONCE
    window.release(batch)
    batch = take(window)
    assert lsns(batch) == [SUPERSEDED_AT_ONCE + 3]
    window.release(batch)
    empty(window)


def test_a_park_looks_at_the_texts_of_what_it_may_block_alone() -> None:
    """However much waits: a message with two keys blocks both, and what stands behind them; the rest is not read."""
    window = Window(keyed=True, supersedes=False)
    admit(window, a_span(1, ("a",), ("a", "b"), ("y", "z")), a_span(4, *((f"k{n}",) for n in range(100)), ("b",)))
    batch = take(window, 1)
    looked_at: list[tuple[str, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        keys_of = Span.keys
        patch.setattr(Span, "keys", lambda span, place: looked_at.append(keys_of(span, place)) or looked_at[-1])
        keys, dropped = window.drop_behind(batch)
    assert keys == {"a", "b"}
    assert lsns(dropped) == [2, 104]
    assert sorted(looked_at) == [("a",), ("a", "b"), ("b",)]
    window.release(batch)
    window.release(take(window, 1000))
    empty(window)


def test_a_key_that_shares_its_hash_is_not_superseded() -> None:
    with hashes_of(1):
        window = Window(keyed=True, supersedes=True)
        admit(window, a_span(1, ("a",), ("b",), ("a",), keying=Keying.STATE))
        flown = []
        while window.ready:
            batch = take(window)
            flown += [*lsns(batch.superseded), *lsns(batch)]
            assert all(m.keys == batch[0].keys for m in batch.superseded)
            window.release(batch)
        assert flown == [1, 2, 3]
        empty(window)


def test_who_waited_for_a_hash_whose_owner_was_dropped_goes_on() -> None:
    with hashes_of(2):  # a and c share theirs
        window = Window(keyed=True, supersedes=False)
        admit(window, a_span(1, ("b",), ("b", "a"), ("c",)))
        batch = take(window, 1)
        assert window.take(9, PLENTY, PLENTY) is None, "the second owns the hash of a, and waits for b"
        keys, dropped = window.drop_behind(batch)
        assert (keys, lsns(dropped)) == ({"a", "b"}, [2])
        last = take(window)
        assert lsns(last) == [3]
        for one in (batch, last):
            window.release(one)
        empty(window)


def test_eviction_keeps_what_is_in_flight_and_its_keys_busy() -> None:
    window = Window(keyed=True, supersedes=False)
    span = a_span(1, ("a",), ("a", "b"), ("b",), ("c",))
    span.base = 7 << 16
    admit(window, span)
    batch = take(window, 1)
    assert lsns(batch) == [1]
    assert {span.row(p) for s, a, b in window.evict() for p in range(a, b)} == {span.base | n for n in (1, 2, 3)}
    consistent(window, 0)
    assert window.flying_rows() == window.rows() == {span.base}
    probe = of(a_span(9, ("a",), ("b",), ("c",)))
    assert window.free(probe) == probe[1:]
    window.release(batch)
    assert window.free(probe) == probe
    empty(window)


@settings(max_examples=200, deadline=None)
@given(SPANS.filter(bool), COLLIDE, DICE)
def test_eviction_at_any_moment_and_reading_again_keeps_the_order(
    keysets: list[list[Keys]], collide: int | None, dice: random.Random
) -> None:
    """As the flow does it: what was evicted comes again in position order, but for what is in flight."""
    with hashes_of(collide):
        window = Window(keyed=True, supersedes=False)
        spans = spans_of(keysets)
        for number, span in enumerate(spans, 1):
            span.base = number << 16
        admit(window, *spans)
        flying: list[Batch] = []
        sent: list[int] = []
        while flying or window.ready:
            step = dice.choice(["take", "take", "release", "release", "put_back", "evict"])
            if step == "take" and window.ready and (batch := window.take(dice.randint(1, 6), 999, PLENTY)):
                flying.append(batch)
            elif step == "release" and flying:
                done = flying.pop(dice.randint(0, len(flying) - 1))
                sent += lsns(done)
                window.release(done)
            elif step == "put_back" and flying:
                window.put_back(flying.pop())
            elif step == "evict":
                dropped = sorted(
                    ((s, p) for s, a, b in window.evict() for p in range(a, b)), key=lambda ref: ref[0].row(ref[1])
                )
                assert not {s.row(p) for s, p in dropped} & window.flying_rows()
                consistent(window, 0)
                for span, place in dropped:
                    window.admit(span, place, place + 1)
                consistent(window, len(dropped))
        messages = [m for span in spans for m in of(span)]
        assert sorted(sent) == lsns(messages)
        for key in "abcd":
            own = set(lsns([m for m in messages if key in m.keys]))
            assert [lsn for lsn in sent if lsn in own] == sorted(own)
        empty(window)


@settings(max_examples=200, deadline=None)
@given(st.lists(KEY_SETS, min_size=1, max_size=8), st.lists(KEY_SETS, max_size=6), COLLIDE, st.booleans(), DICE)
def test_what_is_free_shares_no_key_with_anything_in_memory(
    inside: list[Keys], heads: list[Keys], collide: int | None, keyed: bool, dice: random.Random
) -> None:
    with hashes_of(collide):
        window = Window(keyed=keyed, supersedes=False)
        admit(window, a_span(1, *inside))
        for _ in range(dice.randint(0, 3)):
            batch = window.take(dice.randint(1, 3), PLENTY, PLENTY)
            if batch is not None and dice.random() < 0.5:
                window.put_back(batch)
        taken = {key for keys in inside for key in keys}
        for message in window.free([Message(a_span(90 + n, keys), 0) for n, keys in enumerate(heads)]):
            assert taken.isdisjoint(message.keys)
            taken.update(message.keys)
        if collide is None:
            assert taken == {key for keys in inside for key in keys} | {
                key for n, keys in enumerate(heads) for key in keys if key in taken
            }


# -- what fits a batch -------------------------------------------------------------------------------------------------
def test_a_batch_is_bounded_by_messages_and_by_bytes_but_takes_at_least_one() -> None:
    window = Window(keyed=True, supersedes=False)
    admit(window, a_span(1, *((f"k{n}",) for n in range(10)), body=b"x" * 100))
    batches = [window.take(3, PLENTY, PLENTY), window.take(99, 250, PLENTY), window.take(99, 1, PLENTY)]
    assert [lsns(batch or ()) for batch in batches] == [[1, 2, 3], [4, 5], [6]]
    consistent(window, 4)


def test_what_waits_in_line_does_not_count_for_the_batch_and_never_stops_it() -> None:
    window = Window(keyed=True, supersedes=False)
    admit(window, a_span(1, ("a",), body=b"x" * 100))
    first = take(window)
    admit(window, a_span(2, *[("a",)] * 9, ("b",), ("c",), body=b"x" * 100))
    batch = window.take(2, 200, PLENTY)
    assert lsns(batch or ()) == [11, 12]
    consistent(window, 9)
    assert batch is not None
    for one in (first, batch):
        window.release(one)
    admit(window, a_span(20, ("a",), ("d",), body=b"x" * 100))
    batch = window.take(9, 1, PLENTY)
    assert lsns(batch or ()) == [2]
    batch = window.take(9, 1, PLENTY)
    assert lsns(batch or ()) == [21], "larger than the batch, but the first of it"


@settings(max_examples=200, deadline=None)
@given(SPANS.filter(bool), st.integers(0, 4000), st.booleans())
def test_nothing_is_taken_for_which_there_is_no_credit_to_encode_it(
    keysets: list[list[Keys]], credit: int, keyed: bool
) -> None:
    window = Window(keyed=keyed, supersedes=False)
    admit(window, *spans_of(keysets))
    batch = window.take(1000, PLENTY, credit)
    least = len(BODY) + ENCODED_OVERHEAD_BYTES
    if batch is None:
        assert credit < least
    else:
        assert encoded_cost(batch) == least * len(batch) <= credit

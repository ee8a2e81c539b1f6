"""The small pure pieces: back-off, breaker, throttle; the watermark; pools and shares."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from spillway.chunk import CHANGE_OVERHEAD_BYTES, MESSAGE_OVERHEAD_BYTES, ChunkBuilder, Keying, Span
from spillway.flow.budget import Budget, Pool, Spare
from spillway.flow.parking import HeldBack
from spillway.flow.retry import PROBE_CAP_SECONDS, BatchSize, Breaker, Throttle, backoff_seconds
from spillway.flow.watermark import Watermark


def test_a_probe_comes_at_least_every_thirty_seconds_and_a_retry_every_three_minutes() -> None:
    for attempts in range(200):
        assert backoff_seconds(attempts, rng=lambda: 1.0) < 180
        assert backoff_seconds(attempts, 0.25, PROBE_CAP_SECONDS, lambda: 1.0) < 30
    assert backoff_seconds(100, rng=lambda: 0.0) != backoff_seconds(100, rng=lambda: 0.9), "jitter at the cap too"


def test_breaker_waits_longer_each_time_and_closes_at_the_first_success() -> None:
    breaker = Breaker(lambda: 0.5)
    delays = []
    now = 100.0
    for _ in range(12):
        breaker.failed(now, "timeout", "")
        breaker.failed(now, "timeout", "of the same wave")
        delays.append(breaker.probe_at - now)
        now = breaker.probe_at
    assert breaker.open
    assert delays == sorted(delays)
    assert delays[0] < 1
    assert 20 < delays[-1] < 30
    breaker.succeeded()
    assert not breaker.open


def test_breaker_honours_retry_after_within_its_cap() -> None:
    breaker = Breaker(lambda: 0.5)
    breaker.failed(0.0, "http_429", "", retry_after_seconds=7.0)
    assert breaker.probe_at == 7.0
    breaker.failed(7.0, "http_429", "", retry_after_seconds=3600.0)
    assert breaker.probe_at <= 37.0


def test_a_hundred_thousand_rejections_cost_some_hundred_messages_an_hour() -> None:
    throttle, now, sent = Throttle(rng=lambda: 0.5), 0.0, 0
    for _ in range(10_000):
        if now >= 3600:
            break
        now = max(now, throttle.not_before)
        sent += throttle.allowance(500)
        throttle.failed(now)
    assert now >= 3600
    assert sent < 1300
    for _ in range(4):
        throttle.succeeded()
    assert throttle.allowance(500) == 500


def test_batches_shrink_to_what_a_sink_takes_in_time_and_grow_again() -> None:
    size = BatchSize(1000, timeout_seconds=30.0)
    size.answered(1000, 4.0)  # twice as long as it should
    assert size.messages == 500
    size.refused(500)
    assert size.messages == 250
    size.answered(100, 0.1)  # it was not full: that says nothing
    assert size.messages == 250
    for expected in (500, 1000, 1000):
        size.answered(size.messages, 0.1)
        assert size.messages == expected
    for _ in range(20):
        size.refused(size.messages)
    assert size.messages == 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["commit", "empty", "keepalive", "resolve", "advance"]), st.integers(0, 9))))
def test_watermark_against_a_model(steps: list[tuple[str, int]]) -> None:
    mark = Watermark(0)
    lsn, confirmed = 100, 0
    stream: list[tuple[int, int, bool]] = []  # commit_lsn, end_lsn, open message
    for step, pick in steps:
        lsn += 50
        if step in ("commit", "empty"):
            mark.commit(lsn, lsn + 10, routed=step == "commit")
            stream.append((lsn, lsn + 10, step == "commit"))
        elif step == "keepalive":
            mark.keepalive(lsn)
            stream.append((lsn, lsn, False))
        elif step == "resolve" and stream:
            commit_lsn, end_lsn, _ = stream[pick % len(stream)]
            stream[pick % len(stream)] = (commit_lsn, end_lsn, False)
        open_lsns = [commit_lsn for commit_lsn, _, is_open in stream if is_open]
        got = mark.advance(min(open_lsns) if open_lsns else None)
        safe = 0
        for _, end_lsn, is_open in stream:
            if is_open:
                break
            safe = end_lsn
        assert confirmed <= got <= max(safe, confirmed)
        if step == "advance" and not open_lsns and stream:
            assert got == stream[-1][1], "with nothing open everything received is confirmed"
        confirmed = got


def test_nothing_beyond_a_gap_that_is_not_durable_is_confirmed() -> None:
    """What it is about opens nothing, and would be merged into what was before it."""
    watermark = Watermark(50)
    watermark.commit(100, 110, routed=True)
    watermark.commit(120, 130, routed=False)
    watermark.keepalive(140)
    assert watermark.advance(None, gap_lsn=110) <= 110
    assert watermark.advance(None) == 140
    watermark.commit(150, 160, routed=True)
    watermark.commit(160, 170, routed=True)
    assert watermark.advance(None, gap_lsn=160) == 160, "what is before it is"


async def test_pool_grants_in_order_and_a_large_request_is_not_overtaken() -> None:
    pool = Pool("test", 100)
    await pool.take(60)
    large = asyncio.ensure_future(pool.take(90))
    await asyncio.sleep(0)
    assert not pool.try_take(10), "not past those who wait"
    small = asyncio.ensure_future(pool.take(10))
    await asyncio.sleep(0)
    pool.give(60)
    await large
    await small
    assert pool.held_bytes == 100
    with pytest.raises(ValueError, match="never"):
        await pool.take(101)


async def test_pool_cancelled_waiter_holds_nothing_and_lets_the_next_pass() -> None:
    pool = Pool("test", 100)
    await pool.take(60)
    large = asyncio.ensure_future(pool.take(90))
    await asyncio.sleep(0)
    small = asyncio.ensure_future(pool.take(10))
    await asyncio.sleep(0)
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    await small
    assert pool.held_bytes == 70


def test_every_sink_has_its_guarantee_whatever_the_others_hold() -> None:
    budget = Budget(128 << 20, sinks=25)
    shares = [budget.share(lambda: None) for _ in range(25)]
    while shares[0].try_take(100_000):
        pass
    for share in shares[1:]:
        assert share.try_take(share.guaranteed_bytes)
    assert budget.held_bytes <= budget.limit_bytes
    assert shares[0].most_bytes > 2 * (16 << 20), "a message of 16 MB, and its encoded form"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40_000), st.booleans())))
def test_shares_give_back_exactly_what_they_took(steps: list[tuple[int, int, bool]]) -> None:
    budget = Budget(1 << 20, sinks=4)
    shares = [budget.share(lambda: None) for _ in range(4)]
    held: list[list[int]] = [[] for _ in shares]
    for index, size, take in steps:
        if take and shares[index].try_take(size):
            held[index].append(size)
        elif held[index]:
            shares[index].give(held[index].pop())
        assert budget.held_bytes == sum(map(sum, held)) <= budget.limit_bytes
    for share, sizes in zip(shares, held, strict=True):
        for size in sizes:
            share.give(size)
    assert budget.held_bytes == budget.common.held_bytes == 0


def test_a_shared_chunk_is_charged_once_and_until_its_last_holder_lets_go() -> None:
    budget = Budget(1 << 20, sinks=2)
    builder = ChunkBuilder()
    for n in range(3):
        builder.add(("public", "t"), 0, 1, n, 0, b"x" * 1000, 0, (b"k%d" % n, b""))
    chunk = builder.take()
    whole, part = Span(chunk, Keying.EVENTS), Span(chunk, Keying.STATE, [0, 2])
    assert budget.hold(whole)
    assert budget.held_bytes == chunk.cost + 3 * MESSAGE_OVERHEAD_BYTES
    assert chunk.cost == 3 * (1000 + CHANGE_OVERHEAD_BYTES)
    assert budget.hold(part)
    assert budget.held_bytes == chunk.cost + 5 * MESSAGE_OVERHEAD_BYTES
    budget.drop(whole)
    assert budget.held_bytes == chunk.cost + 2 * MESSAGE_OVERHEAD_BYTES
    budget.drop(part)
    assert budget.held_bytes == 0


def test_a_chunk_for_which_there_is_no_room_is_not_held() -> None:
    budget = Budget(8 << 10, sinks=1)
    builder = ChunkBuilder()
    builder.add(("public", "t"), 0, 1, 0, 0, b"x" * 3000, 0, (b"k", b""))
    span = Span(builder.take(), Keying.EVENTS)
    assert not budget.hold(span)
    assert budget.held_bytes == span.chunk.holders == 0


# -- keys that are being parked ----------------------------------------------------------------------------------------
def test_a_look_up_learns_what_is_done_while_it_is_open_and_nothing_after() -> None:
    held_back = HeldBack()
    held_back.hold(["before"])
    held_back.done(["before"])
    with held_back.looking_up() as parked:
        held_back.hold(["a", "b"])
        held_back.hold(["a"])
        held_back.done(["a", "b"])
        assert held_back.union(parked) == {"a", "b"}
        assert parked.since == {"b"}, "another write of a has not committed"
        held_back.done(["a"])
        assert held_back.union(parked) == {"a", "b"}
    assert not held_back
    held_back.hold(["later"])
    held_back.done(["later"])
    assert held_back.union(parked) == {"a", "b"}, "closed, it does not grow"


async def test_spare_credit_is_taken_only_while_nobody_waits_for_the_pool() -> None:
    pool = Pool("test", 100)
    spare = Spare(pool, 40)
    assert spare.try_take(30)
    await pool.take(60)
    waiting = asyncio.ensure_future(pool.take(20))
    await asyncio.sleep(0)
    assert spare.wanted
    assert not spare.try_take(1)
    spare.give(30)
    await waiting
    assert not spare.wanted
    assert (spare.held_bytes, pool.held_bytes) == (0, 80)


def test_spare_credit_is_a_part_of_the_pool_but_for_one_request_that_is_larger() -> None:
    pool = Pool("test", 100)
    spare = Spare(pool, 40)
    assert spare.most_bytes == 100
    assert spare.try_take(25)
    assert not spare.try_take(16), "beyond its part"
    assert spare.try_take(15)
    spare.give(40)
    assert spare.try_take(90), "alone"
    assert not spare.try_take(1)
    spare.give(90)
    assert not spare.try_take(101)
    assert (spare.held_bytes, pool.held_bytes) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 120), st.booleans())))
def test_spare_credit_never_passes_its_part_or_the_pool(steps: list[tuple[bool, int, bool]]) -> None:
    pool = Pool("test", 100)
    spare = Spare(pool, 40)
    ours: list[int] = []
    others: list[int] = []
    for take, size, is_spare in steps:
        held, source = (ours, spare) if is_spare else (others, pool)
        if take and source.try_take(size):
            held.append(size)
        elif held:
            source.give(held.pop())
        assert spare.held_bytes == sum(ours)
        assert pool.held_bytes == sum(ours) + sum(others) <= 100
        assert sum(ours) <= 40 or len(ours) == 1

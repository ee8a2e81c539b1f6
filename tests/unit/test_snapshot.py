"""What a snapshot sees, and transaction ids of 32 bits made whole again."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from spillway.source.snapshot import Snapshot, widened

WRAP = 1 << 32
COMMIT = 5000  # some LSN


def snapshot(xmin: int, xmax: int, *running: int) -> Snapshot:
    return Snapshot(lsn=9000, xmin=xmin, xmax=xmax, running=frozenset(running), microseconds=0)


def test_seen_is_what_had_ended() -> None:
    one = snapshot(100, 110, 100, 105)
    assert one.sees(99, COMMIT)
    assert one.sees(101, COMMIT)
    assert not one.sees(100, COMMIT)
    assert not one.sees(105, COMMIT)
    assert one.sees(109, COMMIT)
    assert not one.sees(110, COMMIT)
    assert not one.sees(200, COMMIT)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_around_the_end_of_the_32_bits(epoch: int) -> None:
    base = epoch * WRAP + WRAP  # where the count of 32 bits begins anew
    one = snapshot(base - 3, base + 2, base - 3, base + 1)
    seen = {xid: one.sees(xid & 0xFFFFFFFF, COMMIT) for xid in range(base - 5, base + 5)}
    assert [xid - base for xid, sees in seen.items() if sees] == [-5, -4, -2, -1, 0]


@given(st.integers(1 << 31, 1 << 62), st.integers(-(1 << 31) + 1, (1 << 31) - 1))
def test_widened_is_the_nearest_that_ends_so(near: int, away: int) -> None:
    assert widened((near + away) & 0xFFFFFFFF, near) == near + away


@given(st.integers(0, 1 << 62), st.integers(0, WRAP - 1))
def test_widened_keeps_the_32_bits(near: int, xid: int) -> None:
    whole = widened(xid, near)
    assert whole % WRAP == xid
    assert abs(whole - near) <= 1 << 31


def test_a_standby_sees_what_was_replayed_and_relies_on_nothing_else() -> None:
    one = Snapshot(lsn=6000, xmin=100, xmax=100, running=frozenset(), microseconds=0, replayed_lsn=5000)
    assert one.sees(500, 4999)
    assert not one.sees(50, 5000), "its commit record begins where replay has come to"
    assert not one.sees(50, 7000)

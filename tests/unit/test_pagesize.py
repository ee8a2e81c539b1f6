"""The size of the next page: by its credit, and by the time that the source and the sink take."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from spillway.flow.pagesize import (
    FIRST_ROWS,
    LATENCY_FACTOR,
    LEAST_ROWS,
    MOST_ROWS,
    PROBE_PAGES,
    READ_SECONDS,
    TAKE_SECONDS,
    PageSize,
)

FAST = 0.0001


def test_it_doubles_up_to_the_most_while_both_are_fast() -> None:
    size, expected = PageSize(), FIRST_ROWS
    while expected < MOST_ROWS:
        assert size.rows == expected
        size.took(size.rows, size.rows * 500, FAST, FAST)
        expected = min(MOST_ROWS, 2 * expected)
    size.took(size.rows, size.rows * 500, FAST, FAST)
    assert size.rows == MOST_ROWS


def test_it_keeps_its_size_between_half_of_the_time_and_all_of_it() -> None:
    for read, take in ((0.6 * READ_SECONDS, FAST), (FAST, 0.6 * TAKE_SECONDS), (READ_SECONDS, TAKE_SECONDS)):
        size = PageSize()
        for _ in range(20):
            size.took(FIRST_ROWS, FIRST_ROWS * 500, read, take)
            assert size.rows == FIRST_ROWS


def test_a_slow_source_or_a_slow_sink_halves_it_at_most_down_to_the_least() -> None:
    for read, row in ((100.0, 1e-6), (FAST, 2.0)):
        size = PageSize()
        size.took(FIRST_ROWS, FIRST_ROWS * 500, read, FIRST_ROWS * row)
        assert size.rows == max(LEAST_ROWS, FIRST_ROWS // 2)
        for _ in range(20):
            size.took(size.rows, size.rows * 500, read, size.rows * row)
        assert size.rows == LEAST_ROWS


def test_a_sink_with_latency_gets_what_it_can_take_at_once() -> None:
    """400 rows in the 0.2 s that anything takes, four times as long for four times as many."""
    size = PageSize()
    for _ in range(60):
        size.took(size.rows, size.rows * 500, FAST, max(0.2, size.rows * 0.2 / 400))
    assert 200 <= size.rows <= 1600


def test_it_settles_where_rows_take_the_time_that_is_aimed_at() -> None:
    for latency, row in ((0.004, 1e-6), (0.0, 0.0007), (0.05, 0.001)):
        size = PageSize()
        for _ in range(80):
            size.took(size.rows, size.rows * 500, FAST, latency + row * size.rows)
        assert 0.4 <= size.rows * row / max(TAKE_SECONDS, LATENCY_FACTOR * latency) <= 1.1


def test_it_finds_out_of_small_pages_that_are_all_of_one_size() -> None:
    """A cold start was taken for slow rows; a page of ten and one of a thousand take nearly the same."""
    size = PageSize()
    while size.rows > LEAST_ROWS:
        size.took(size.rows, size.rows * 500, FAST, 0.005 * size.rows)
    for _ in range(12 * PROBE_PAGES):
        size.took(size.rows, size.rows * 500, FAST, 0.016 + 0.00001 * size.rows)
    assert size.rows >= 1000


def test_a_page_that_timed_out_is_halved_down_to_one_row_and_never_grows_by_being_slow() -> None:
    size = PageSize()
    for _ in range(20):
        size.timed_out()
    assert size.rows == 1
    size.took(1, 500, 100.0, FAST)
    assert size.rows == 1
    size.took(1, 500, FAST, FAST)
    assert size.rows == 2


def test_pages_that_were_cut_short_do_not_make_it_grow() -> None:
    size = PageSize()
    size.took(FIRST_ROWS // 2, 500 * FIRST_ROWS, FAST, FAST)
    assert size.rows == FIRST_ROWS
    size.took(0, 0, FAST, FAST)
    assert size.rows == FIRST_ROWS


def test_rows_are_asked_for_by_what_they_were_found_to_cost() -> None:
    size = PageSize()
    assert size.fitting(1) == FIRST_ROWS, "nothing is known: the reader ends the page where its credit ends"
    size.took(FIRST_ROWS, FIRST_ROWS * 1000, 0.6 * READ_SECONDS, FAST)
    assert size.fitting(10_000) == 9
    assert size.fitting(1) == 1
    assert size.fitting(1 << 30) == FIRST_ROWS
    size.took(FIRST_ROWS, FIRST_ROWS * 5000, 0.6 * READ_SECONDS, FAST)
    assert size.fitting(50_000) == 9, "larger rows count at once"
    size.took(FIRST_ROWS, FIRST_ROWS * 1000, 0.6 * READ_SECONDS, FAST)
    assert size.fitting(50_000) < 14, "smaller ones slowly"


@given(
    st.lists(st.tuples(st.integers(0, MOST_ROWS), st.integers(100, 100_000), st.floats(0, 5), st.floats(0, 5))),
    st.integers(1 << 20, 1 << 24),
)
def test_whatever_comes_it_stays_in_its_bounds(pages: list[tuple[int, int, float, float]], most_bytes: int) -> None:
    size = PageSize()
    for rows, row_bytes, read, take in pages:
        before = size.rows
        credit = size.credit_bytes(most_bytes)
        assert 0 < credit <= most_bytes
        assert 1 <= size.fitting(credit) <= size.rows
        taken = min(rows, size.rows)
        size.took(taken, taken * row_bytes, read, take)
        assert LEAST_ROWS <= size.rows <= min(MOST_ROWS, 2 * before)

"""Spans and messages as views into a chunk's columns, and what a chunk costs."""

from __future__ import annotations

import pytest

from spillway.change import ACTIONS
from spillway.chunk import (
    ACTION,
    CHANGE_OBJECTS_BYTES,
    CHANGE_OVERHEAD_BYTES,
    FLAGS,
    INDEX,
    LARGE,
    LOW,
    LSN,
    MOVED,
    TIME,
    WHOLE,
    Batch,
    Chunk,
    ChunkBuilder,
    Keying,
    Message,
    Span,
    key_hash,
)
from spillway.flow.inflow import STORED_OVERHEAD_BYTES, stored_cost

COUNT = 10
LAST = 7  # the change that is no plain one


def a_chunk(groups: int = 0, key_bytes: int = 20) -> Chunk:
    builder = ChunkBuilder(groups)
    for n in range(COUNT):
        key = b"k%d" % n
        texts = [key.ljust(key_bytes, b"."), b"was" if n == LAST else b""] + [b"g%d" % n, b""] * groups
        flags = MOVED if n == LAST else WHOLE
        builder.add(("public", "t"), n % len(ACTIONS), 1, n, 100 + n, b"x" * n, 7 * n, texts, flags=flags)
    return builder.take()


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("indices", [None, [0, 2, 3, 7, 9]])
def test_the_columns_of_a_piece_are_those_of_its_messages(groups: int, indices: list[int] | None) -> None:
    span = Span(a_chunk(groups), Keying.EVENTS, indices)
    for start in range(len(span) + 1):
        for stop in range(start, len(span) + 1):
            messages = [Message(span, place) for place in range(start, stop)]
            assert span.column(TIME, start, stop) == [round(m.change.commit_time * 1e6) for m in messages]
            assert [ACTIONS[code] for code in span.byte_column(ACTION, start, stop)] == [m.action for m in messages]
            assert [bool(flags & WHOLE) for flags in span.byte_column(FLAGS, start, stop)] == [
                m.whole for m in messages
            ]
            assert [(m.action, m.whole) for m in messages] == [(m.change.action, m.change.whole) for m in messages]
            assert Batch([(span, start, stop)]).plain == all(m.whole for m in messages)
    assert span.hashes == [key_hash(m.keys[-1].encode()) for m in Batch([(span, 0, len(span))])]
    assert list(span.moved.values()) == [key_hash(b"was")]
    assert not span.plain
    assert Span(span.chunk, Keying.EVENTS, range(LAST)).plain


@pytest.mark.parametrize("groups", [0, 2])
def test_a_chunk_at_another_position(groups: int) -> None:
    chunk = a_chunk(groups)
    placed = chunk.placed(0xFFFF_FFFF_FFFF, 3_000_000_000)
    assert placed.column(LSN) == [0xFFFF_FFFF_FFFF] * COUNT
    assert [word & LOW for word in placed.column(INDEX)] == list(range(3_000_000_000, 3_000_000_000 + COUNT))
    assert placed.data is chunk.data
    assert placed.keys is chunk.keys
    assert (placed.count, placed.tables, placed.groups) == (chunk.count, chunk.tables, chunk.groups)
    for word in {*range(placed.stride)} - {LSN, INDEX}:
        assert placed.column(word) == chunk.column(word)
    assert [word >> 32 for word in placed.column(INDEX)] == [word >> 32 for word in chunk.column(INDEX)]
    assert chunk.column(LSN) == [1] * COUNT
    assert ChunkBuilder().take().placed(7, 0).count == 0


def test_a_record_has_room_for_a_size_and_a_transaction() -> None:
    builder = ChunkBuilder()
    for size_bytes, xid in [(0, LOW), (5_000_000, 731), (1 << 33, 1)]:
        builder.add(("public", "t"), 0, 1, 0, 0, b"", 0, (b"k", b""), too_large_bytes=size_bytes, xid=xid)
    chunk = builder.take()
    assert [word >> 32 for word in chunk.column(LARGE)] == [LOW, 731, 1]
    assert [chunk.change(index).too_large_bytes for index in range(3)] == [0, 5_000_000, LOW]


@pytest.mark.parametrize("groups", [0, 1, 5, 25])
@pytest.mark.parametrize("key_bytes", [10, 60, 1000])
def test_the_credit_of_a_chunk_covers_its_columns_and_is_never_below_the_fixed_cost(
    groups: int, key_bytes: int
) -> None:
    chunk = a_chunk(groups, key_bytes)
    assert chunk.cost >= len(chunk.data) + CHANGE_OVERHEAD_BYTES * COUNT
    assert chunk.cost >= len(chunk.data) + len(chunk.meta) + len(chunk.keys) + CHANGE_OBJECTS_BYTES * COUNT


@pytest.mark.parametrize("groups", [0, 1])
def test_what_is_read_back_is_no_more_than_was_taken_for_it_unless_its_keys_are_very_long(groups: int) -> None:
    def excess(key_bytes: int) -> int:
        span = Span(a_chunk(groups, key_bytes), Keying.EVENTS)
        return stored_cost(span) - 2 * len(span.chunk.data) - STORED_OVERHEAD_BYTES * COUNT

    assert excess(150) == 0
    assert excess(1000) > 0

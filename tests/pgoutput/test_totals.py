"""The number of a transaction's operations in each of its changes, where the chunk has them all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgoutput import frames
from pgoutput.frames import META, Connection, xlog
from pgoutput.twins import TWINS
from spillway.change import ACTIONS
from spillway.chunk import LOW, Chunk
from spillway.columns import gather
from spillway.pgoutput import Committed, Full, Relation, TableInfo
from spillway.pgoutput.decoder import Decoder

ROW = frames.insert(b"1", b"a")


def decoder_of(twin: type[Decoder], *, totals: bool = True) -> Decoder:
    decoder = twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 30, lambda _: None, lambda *_: (), 0, totals)
    stop = decoder.fill(Connection(xlog(frames.relation([("id", 20), ("name", 25)]))), 1 << 30, 1)
    assert isinstance(stop, Relation)
    decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset(ACTIONS))
    decoder.take()
    return decoder


def totals_of(chunk: Chunk) -> list[int]:
    return [chunk.total(index) for index in range(chunk.count)]


@pytest.mark.parametrize("twin", TWINS)
def test_all_operations_are_counted(twin: type[Decoder]) -> None:
    sent = [
        frames.begin(1000), ROW, frames.message("x", b""), frames.truncate(16_400), ROW, frames.commit(1000, 1050),
        frames.begin(2000), ROW, frames.update(b"2", b"a", key=[b"1", None]), frames.commit(2000, 2050),
        frames.begin(3000), ROW,
    ]  # fmt: skip
    decoder = decoder_of(twin)
    assert decoder.fill(Connection(*map(xlog, sent)), 1 << 30, 1000) is None
    chunk = decoder.take()
    assert totals_of(chunk) == [4, 4, 4, 2, 2, 2, 0]
    assert totals_of(gather(chunk, [1, 3], 6)) == [4, 2]
    plain = decoder_of(twin, totals=False)
    assert plain.fill(Connection(*map(xlog, sent)), 1 << 30, 1000) is None
    assert totals_of(plain.take()) == [0] * 7


@pytest.mark.parametrize("twin", TWINS)
def test_a_transaction_in_two_chunks_has_no_total(twin: type[Decoder]) -> None:
    decoder = decoder_of(twin)
    connection = Connection(*map(xlog, [frames.begin(1000), ROW]))
    assert decoder.fill(connection, 1 << 30, 1000) is None
    assert totals_of(decoder.take()) == [0]
    connection.frames.extend(map(xlog, [ROW, frames.commit(1000, 1050), frames.begin(2000)]))
    assert decoder.fill(connection, 1 << 30, 1000) is None
    assert totals_of(decoder.take()) == [0]
    # It had begun before, but nothing of it was there.
    connection.frames.extend(map(xlog, [ROW, ROW, frames.commit(2000, 2050)]))
    assert decoder.fill(connection, 1 << 30, 1000) is None
    assert totals_of(decoder.take()) == [2, 2]


@pytest.mark.parametrize("twin", TWINS)
def test_no_more_than_sixteen_bits(twin: type[Decoder]) -> None:
    for count, total in ((65_535, 65_535), (65_536, 0)):
        decoder = decoder_of(twin)
        skipped = [frames.message("x", b"")] * (count - 1)
        sent = [frames.begin(1000), ROW, *skipped, frames.commit(1000, 1050)]
        assert decoder.fill(Connection(*map(xlog, sent)), 1 << 40, 1 << 20) is None
        assert totals_of(decoder.take()) == [total]


@pytest.mark.parametrize("twin", TWINS)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 40))
def test_a_transaction_of_half_a_chunk_is_always_whole(twin: type[Decoder], sizes: list[int], most: int) -> None:
    sent = []
    for number, size in enumerate(sizes, 1):
        sent += [frames.begin(number * 1000), *[ROW] * size, frames.commit(number * 1000, number * 1000 + 50)]
    decoder = decoder_of(twin)
    connection = Connection(*map(xlog, sent))
    found: dict[int, set[int]] = {}
    while True:
        stop = decoder.fill(connection, 1 << 40, most)
        assert stop is None or isinstance(stop, Full | Committed)
        chunk = decoder.take()
        assert chunk.count <= most
        for index in range(chunk.count):
            found.setdefault(chunk.word(index, 0) & LOW, set()).add(chunk.total(index))
        if stop is None:
            break
    for number, size in enumerate(sizes, 1):
        told = found.get(number * 1000, set())
        assert told <= {0, size}
        if size <= most // 2:
            assert told == ({size} if size else set())

"""Where the compiled decoder looks at many bytes at once, or hands out its memory: every offset, every pair of bytes,
chunks of every size. The reference says what is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from fuzz.guarded import GuardedConnection
from pgoutput import frames
from pgoutput.compare import Setting, assert_same, outcome
from pgoutput.frames import INT8, JSON, TEXT, xlog
from pgoutput.twins import TWINS

NEAR_BLOCKS = [*range(18), *range(30, 34), *range(62, 67), *range(126, 131)]
SPECIAL = [b'"', b"\\", b"\x1f", b"\n", b"\x7f", b"\x80", "é".encode(), "\U0001f600".encode()]


def assert_same_rows(
    values: Iterable[Sequence[bytes]], columns: Sequence[tuple[str, int]], setting: Setting | None = None
) -> None:
    """The values of the columns behind ``id``, row by row."""
    sent = [xlog(frames.relation((("id", INT8), *columns))), xlog(frames.begin())]
    sent += [xlog(frames.insert(b"1", *row)) for row in values]
    setting = setting or Setting(max_changes=1 << 20, max_message_bytes=1 << 24, credit_bytes=1 << 40)
    assert_same([outcome(twin, GuardedConnection(map(bytes, sent), 1 << 23), setting) for twin in TWINS])


def test_a_special_byte_at_every_offset() -> None:
    values = [b"x" * size for size in NEAR_BLOCKS]
    values += [
        b"x" * before + special + b"y" * after
        for special in SPECIAL
        for before in NEAR_BLOCKS
        for after in (0, 1, 7, 64)
    ]
    assert_same_rows([(value, value) for value in values], [("text", TEXT), ("doc", JSON)])


def test_every_pair_of_bytes() -> None:
    pairs = [bytes((first, second)) for first in range(256) for second in range(256)]
    assert_same_rows([(pair,) for pair in pairs], [("text", TEXT)])


@pytest.mark.parametrize("first", [0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5])
def test_longer_sequences_at_their_borders(first: int) -> None:
    borders = [0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0]
    texts = [
        bytes((first, second, third, fourth))
        for second in borders
        for third in borders
        for fourth in (0x41, 0x80, 0xC0)
    ]
    assert_same_rows([(text[:size],) for text in texts for size in (2, 3, 4)], [("text", TEXT)])


@pytest.mark.parametrize("size_bytes", [100, 140_000, 900_000, 3_000_000])
def test_memory_is_handed_out_and_begun_anew(size_bytes: int) -> None:
    """A chunk per row, large ones and small ones in turn; values that grow while they are escaped."""
    rows = [(b"n" * size_bytes,), (b"n",), (b'"' * size_bytes,), (b"\x01" * (size_bytes // 8),), (b"n",), (b"n",)]
    setting = Setting(max_changes=1, max_message_bytes=1 << 24, credit_bytes=1 << 40)
    assert_same_rows(rows, [("text", TEXT)], setting)

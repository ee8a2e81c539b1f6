"""A batch as bytes, part by part: nothing happens per message, and no two copies of a batch are ever in memory.

A batch is cut into *runs*, changes of one chunk that follow each other, of some `RUN_BYTES` each. Whoever writes makes
the bytes of one run at a time, where the total length is known beforehand (lines, the array of a webhook), or of all
(a bulk request, whose length must be said first): a run is what is handed to a socket or a file at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from spillway import impl
from spillway.chunk import HASH, INDEX, LOW, LSN, SUB, Batch, Chunk

RUN_BYTES = 256 * 1024  # smaller ones cost time, larger ones memory, and they hold up the loop

Run = tuple[Chunk, Sequence[int]]


def runs(batch: Batch) -> list[Run]:
    """The batch in its order. They hold their chunks themselves: whoever is cancelled may leave them to a thread."""
    found: list[Run] = []
    for span, start, stop in batch.pieces:
        ends = span.ends
        at = start
        while at < stop:
            before = ends[at - 1] if at else 0
            end = max(at + 1, bisect_right(ends, before + RUN_BYTES, at, stop))
            found.append((span.chunk, span.indices[at:end]))
            at = end
    return found


def nth(chunk: Chunk, index: int) -> int:
    """Which of the documents that its message has become: 0 for the first. They stand one after the other."""
    first = index
    message = _message(chunk, index)
    while first and _message(chunk, first - 1) == message:
        first -= 1
    return index - first


def _message(chunk: Chunk, index: int) -> tuple[int, int, int, int]:
    word = chunk.word
    return word(index, LSN), word(index, INDEX) & LOW, chunk.byte(index, SUB), word(index, HASH)


def lines(batch: Sequence[Run], suffix: bytes) -> Iterator[bytes]:
    """The messages, one a line."""
    line_end = suffix + b"\n"
    for chunk, indices in batch:
        yield impl.join(chunk, indices, b"", line_end)


def lines_bytes(batch: Batch, suffix: bytes) -> int:
    return batch.body_bytes + len(batch) * (len(suffix) + 1)


def array(batch: Sequence[Run], suffix: bytes) -> Iterator[bytes]:
    """``{"data":[...]}``, as Sequin's batches are."""
    before = b'{"data":['
    for chunk, indices in batch:
        yield before
        yield impl.join(chunk, indices[:1], b"", suffix)
        yield impl.join(chunk, indices[1:], b",", suffix)
        before = b","
    yield b"]}"


def array_bytes(batch: Batch, suffix: bytes) -> int:
    """Of a batch that is not empty."""
    return batch.body_bytes + len(batch) * (len(suffix) + 1) - 1 + len(b'{"data":[]}')

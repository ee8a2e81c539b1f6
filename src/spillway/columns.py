"""What is done to the columns of a chunk as a whole: the readable reference of what `spillway.impl` offers compiled.

Nothing here keeps a state or looks at a clock; the twin gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import orjson

from spillway.change import RECORD_START
from spillway.chunk import (
    ACTION,
    ENDS,
    FLAGS,
    GONE,
    HASH,
    INDEX,
    LSN,
    OLD,
    TABLE,
    WORD_BYTES,
    Chunk,
    N,
)
from spillway.position import version


def gather(chunk: Chunk, indices: Sequence[int], hash_word: int) -> Chunk:
    """These changes as a chunk of their own, for the store. Of the keys the primary key stays and, unless ``hash_word``
    is its word, the one group that has it, as the only group. ``indices`` rise."""
    own = hash_word == HASH
    if own and len(indices) == chunk.count and chunk.groups == 0:
        return chunk
    bodies: list[bytes] = []
    records = bytearray()
    keys = bytearray()
    size_bytes = 0
    stride = chunk.stride * WORD_BYTES
    at = hash_word * WORD_BYTES
    for index in indices:
        body = chunk.body(index)
        bodies.append(body)
        size_bytes += len(body)
        texts = chunk.key_texts(index)
        texts = texts[:2] if own else [*texts[:2], *texts[hash_word - HASH : hash_word - HASH + 2]]
        keys += b"\0".join(texts) + b"\0"
        record = bytearray(chunk.meta[index * stride : index * stride + 64])
        memoryview(record).cast("Q")[ENDS] = size_bytes | len(keys) << 32
        records += record
        if not own:
            records += chunk.meta[index * stride + at : index * stride + at + 2 * WORD_BYTES]
    return Chunk(len(indices), b"".join(bodies), bytes(records), bytes(keys), chunk.tables, 0 if own else 1)


def join(chunk: Chunk, indices: Sequence[int], before: bytes, after: bytes) -> bytes:
    """The bodies, each between these two."""
    between = after + before
    return before + between.join([chunk.body(index) for index in indices]) + after if indices else b""


def by_kind(chunk: Chunk) -> dict[tuple[int, int], list[int]]:
    """The indices of the chunk by (table's number, action); deletes of old keys under action + `OLD_DELETE`, of
    rows that have left a filter under action + `GONE_DELETE`."""
    kinds: dict[tuple[int, int], list[int]] = {}
    actions, flags = chunk.byte_column(ACTION), chunk.byte_column(FLAGS)
    low, high = chunk.byte_column(TABLE), chunk.byte_column(TABLE + 1)
    first, second = (low, high) if _LITTLE else (high, low)
    for index in range(chunk.count):
        action = actions[index]
        if flags[index] & OLD:
            action += GONE_DELETE if flags[index] & GONE else OLD_DELETE
        kinds.setdefault((first[index] | second[index] << 8, action), []).append(index)
    return kinds


OLD_DELETE = 16
GONE_DELETE = 32
_LITTLE = memoryview(b"\1\0").cast("H")[0] == 1


def bulk(
    chunk: Chunk,
    indices: Sequence[int],
    epoch: int,
    suffix: bytes | None,
    document_id: Callable[[tuple[str, ...]], str],
) -> bytes:
    """The lines of a ``_bulk`` request (Elasticsearch reference, "Bulk API") with external versions. Every change has a
    primary key and is no TRUNCATE. A document is the row, or with ``suffix`` the message."""
    parts: list[bytes] = []
    for index in indices:
        change = chunk.change(index)
        is_delete = change.action == "delete"
        parts.append(
            b'{"%b":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n'
            % (
                b"delete" if is_delete else b"index",
                orjson.dumps(document_id(change.pks)),
                version(epoch, chunk.word(index, LSN), chunk.byte(index, N)),
            )
        )
        if not is_delete:
            record_bytes = chunk.word(index, INDEX) >> 32
            body = change.body
            parts += (
                (body[RECORD_START : RECORD_START + record_bytes], b"\n") if suffix is None else (body, suffix, b"\n")
            )
    return b"".join(parts)

"""What came of messages, as bytes between the worker and its parent; and what goes to the worker.

Of one message: a kind and a payload. Of many: the kinds, the payloads' lengths, and the payloads back to back, so that
neither side does more than a slice per message. Every frame has its length in front, 32 bits, little-endian as all::

    request   answer_bytes, milliseconds, count, careful   a byte per message: is it a delete   lengths   messages
    answer    count, how it ends                           a byte per message: its kind         lengths   payloads

The parent believes nothing of an answer: what does not add up is a worker that broke (`Broken`).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import orjson

NOTHING, AS_IT_CAME, BODY, SEVERAL, FAILED = range(5)  # kinds
Made = tuple[int, bytes]

# How an answer ends: more of it follow; that was all; that was all of this worker, ask another one for the rest.
MORE, DONE, RENEW = range(3)

# The page of two words that both have mapped: the place in the request of the message that is running, or IDLE; and
# since when, in nanoseconds of the monotonic clock.
IDLE: Final = -1
STATUS_BYTES: Final = 4096

FLUSH_BYTES: Final = 256 << 10  # of results that a worker collects before it sends them
DETAIL_CHARACTERS: Final = 1000  # of a failure, at most
OUTPUT_BYTES: Final = 256  # what each message that comes of one counts besides its bytes
LENGTH: Final = struct.Struct("<I")
_REQUEST: Final = struct.Struct("<QIIB3x")
_ANSWER: Final = struct.Struct("<IB3x")


class Broken(Exception):
    """An answer that is none."""


def several(outputs: Sequence[tuple[bytes | None, Mapping[str, object] | None]]) -> bytes:
    """The payload of SEVERAL: bodies (None: as it came) and routes."""
    head = orjson.dumps(
        [[None if body is None else len(body), route] for body, route in outputs], option=orjson.OPT_NON_STR_KEYS
    )
    return b"".join((LENGTH.pack(len(head)), head, *(body for body, _ in outputs if body is not None)))


def outputs(payload: bytes) -> list[tuple[bytes | None, dict[str, object] | None]]:
    found: list[tuple[bytes | None, dict[str, object] | None]] = []
    try:
        (head_bytes,) = LENGTH.unpack_from(payload)
        at = LENGTH.size + head_bytes
        for size, route in orjson.loads(payload[LENGTH.size : at]):
            body = None if size is None else payload[at : at + size]
            if len(body or b"") != (size or 0) or not (route is None or isinstance(route, dict)):
                raise Broken("an answer is garbled")
            at += size or 0
            found.append((body, route))
    except (struct.error, ValueError, TypeError) as error:
        raise Broken("an answer is garbled") from error
    if at != len(payload):
        raise Broken("an answer is garbled")
    return found


def failed(reason: str, detail: str) -> Made:
    return FAILED, orjson.dumps([reason, detail[:DETAIL_CHARACTERS].encode(errors="replace").decode()])


def reason_and_detail(payload: bytes) -> tuple[str, str]:
    try:
        reason, detail = orjson.loads(payload)
    except (ValueError, TypeError) as error:
        raise Broken("an answer is garbled") from error
    return str(reason), str(detail)


class Ask(NamedTuple):
    """For what comes of the first of these messages: it is enough once the answer has so many bytes (0: no matter), or
    so much time has passed."""

    messages: Sequence[bytes]
    deletes: Sequence[int]
    careful: bool
    answer_bytes: int
    answer_seconds: float


def request(ask: Ask) -> list[bytes]:
    head = _REQUEST.pack(ask.answer_bytes, int(ask.answer_seconds * 1000), len(ask.messages), ask.careful)
    return _framed(head, bytes(ask.deletes), ask.messages)


def read_request(frame: bytes) -> Ask:
    answer_bytes, milliseconds, count, careful = _REQUEST.unpack_from(frame)
    deletes, messages = _columns(frame, _REQUEST.size, count)
    return Ask(messages, deletes, bool(careful), answer_bytes, milliseconds / 1000)


def answer(kinds: bytes | bytearray, payloads: Sequence[bytes], end: int) -> list[bytes]:
    return _framed(_ANSWER.pack(len(kinds), end), bytes(kinds), payloads)


def read_answer(frame: bytes) -> tuple[list[Made], int]:
    """What came of the next messages, and how it ends."""
    try:
        count, end = _ANSWER.unpack_from(frame)
        kinds, payloads = _columns(frame, _ANSWER.size, count)
    except (struct.error, ValueError) as error:
        raise Broken("an answer is garbled") from error
    if end > RENEW or (kinds and max(kinds) > FAILED):
        raise Broken("an answer is garbled")
    return list(zip(kinds, payloads, strict=True)), end


def _framed(head: bytes, column: bytes, texts: Sequence[bytes]) -> list[bytes]:
    lengths = array("I", map(len, texts))
    if _SWAPPED:
        lengths.byteswap()
    body = b"".join(texts)
    total = len(head) + len(column) + len(lengths) * lengths.itemsize + len(body)
    return [b"".join((LENGTH.pack(total), head, column, lengths.tobytes())), body]


def _columns(frame: bytes, at: int, count: int) -> tuple[bytes, list[bytes]]:
    lengths = array("I")
    texts_at = at + count + count * lengths.itemsize
    if texts_at > len(frame):
        raise ValueError("a frame is too short")
    lengths.frombytes(frame[at + count : texts_at])
    if _SWAPPED:
        lengths.byteswap()
    if texts_at + sum(lengths) != len(frame):
        raise ValueError("a frame does not add up")
    texts = []
    start = texts_at
    for length in lengths:
        texts.append(frame[start : start + length])
        start += length
    return frame[at : at + count], texts


_SWAPPED: Final = memoryview(b"\1\0").cast("H")[0] != 1

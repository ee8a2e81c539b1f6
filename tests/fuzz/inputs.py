"""What the fuzzer feeds: a byte that chooses a `Setting`, then frames, each after its length in two bytes.

With the byte's first bit set, the first frame is a relation and the others are lines of COPY of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fuzz.guarded import GuardedConnection
from pgoutput.compare import Outcome, Setting, assert_same, outcome, page_outcome
from pgoutput.twins import TWINS

SETTINGS = (
    Setting(),
    Setting(groups=(("name", "note"), None), max_message_bytes=300),
    Setting(groups=(("gone", "id"),), root=("a.b", "root:"), credit_bytes=2000, frame_overhead_bytes=10),
    Setting(primary_key=("id", "name"), max_changes=2, renew_frame_bytes=60),
    Setting(primary_key=(), wanted=frozenset(("update", "delete"))),
    Setting(max_message_bytes=100),
)

PAGE = b"\x80"


def frames_of(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        yield data[at + 2 : at + 2 + size]
        at += 2 + size


def input_of(setting: int, frames: Sequence[bytes]) -> bytes:
    return bytes([setting]) + b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames)


def run(data: bytes) -> list[Outcome]:
    setting = SETTINGS[data[0] % len(SETTINGS)] if data else SETTINGS[0]
    frames = [frame for frame in frames_of(data[1:]) if frame]  # libpq gives no empty one
    if data[:1] >= PAGE:
        relation, lines = frames[:1], frames[1:]
        outcomes = [
            page_outcome(twin, GuardedConnection(relation, 1 << 16), GuardedConnection(lines, 1 << 16), setting)
            for twin in TWINS
        ]
    else:
        outcomes = [outcome(twin, GuardedConnection(frames, 1 << 16), setting) for twin in TWINS]
    assert_same(outcomes)
    return outcomes

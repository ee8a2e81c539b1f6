"""What a change costs that a sink's column filter leaves out: ``python bench/filters.py [--rows N] [--rounds N]``.

The frames of a transaction of inserts are given to libpq's stand-in, an object whose ``get_copy_data`` hands one out
per call, and taken by

- a bare reader of the same frames, which decodes nothing;
- the decoder, with a filter that leaves all of them out, per kind of condition;
- the decoder without a filter, which renders them.

What is told is nanoseconds per change, and how many that is beyond the bare reader; of every figure the least of the
rounds. Both twins, or the one that SPILLWAY_IMPL names.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

# ruff: noqa: E402 - they are found by what stands above
from pgoutput import frames
from pgoutput.compare import Given, filters_of
from pgoutput.given import If
from pgoutput.twins import TWINS
from spillway.pgoutput import Relation, TableInfo
from spillway.pgoutput.decoder import Decoder

COLUMNS = (("id", 20), ("tenant", 23), ("state", 25), ("active", 16), ("price", 1700), ("data", 3802), ("at", 1184),
           ("title", 25), ("body", 25))  # fmt: skip
CASES: dict[str, tuple[If, ...]] = {
    "is_null": (If("title", "is_null"),),
    "integer": (If("tenant", "eq", 7),),
    "integer in": (If("tenant", "in", (1, 2, 3, 4)),),
    "boolean": (If("active", "eq", False),),
    "text": (If("state", "eq", "closed"),),
    "text like 'x%'": (If("state", "like", "cl%"),),
    "two of them": (If("active", "eq", True), If("tenant", "gt", 1000)),
    "numeric": (If("price", "lt", "1.5"),),
    "timestamptz": (If("at", "lt", "2020-01-01"),),
    "jsonb path": (If("data", "eq", "x", ("kind",)),),
}


class Frames:
    """Hands out the same frames again."""

    def __init__(self, sent: Sequence[memoryview]) -> None:
        self._sent = sent
        self._sizes = [len(frame) for frame in sent]
        self._next = 0

    def get_copy_data(self, async_: int) -> tuple[int, memoryview]:  # noqa: ARG002 - libpq's signature
        at = self._next
        if at == len(self._sent):
            self._next = 0
            return 0, self._sent[0]
        self._next = at + 1
        return self._sizes[at], self._sent[at]


def row(number: int) -> bytes:
    return frames.insert(
        b"%d" % number, b"42", b"open", b"t", b"19.90", b'{"kind": "y", "tags": ["a", "b"]}',
        b"2024-05-06 07:08:09.123456+00", b"A title of some words", b"lorem ipsum " * 20,
    )  # fmt: skip


def bare(source: Frames) -> None:
    while source.get_copy_data(1)[0]:
        pass


def decoder_of(twin: type[Decoder], conditions: tuple[If, ...]) -> Decoder:
    given = [Given(conditions)] if conditions else []
    decoder = twin(
        frames.META, lambda *_: (), 0, 1 << 24, 0, 1 << 40, lambda _: None,
        lambda relation, info: filters_of(given, relation, info), len(given),
    )  # fmt: skip
    stop = decoder.fill(frames.Connection(frames.xlog(frames.relation(COLUMNS))), 1 << 40, 1)
    assert isinstance(stop, Relation)
    wanted = frozenset() if conditions else frozenset({"insert"})
    decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), wanted)  # type: ignore[arg-type]
    return decoder


def nanoseconds(run: Callable[[], object], rows: int, rounds: int) -> float:
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least / rows * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    rows, rounds = options.rows, options.rounds
    sent = [frames.xlog(payload) for payload in (frames.begin(), *map(row, range(rows)), frames.commit())]
    source = Frames(sent)
    floor = nanoseconds(lambda: bare(source), rows, rounds)
    print(f"{'bare reader':32} {floor:8.0f} ns")
    for twin in TWINS:
        name = "python" if twin is Decoder else "native"
        for case, conditions in {"not filtered": (), **CASES}.items():
            decoder = decoder_of(twin, conditions)

            def once(decoder: Decoder = decoder, kept: int = 0 if conditions else rows) -> None:
                assert decoder.fill(source, 1 << 60, 1 << 30) is None
                assert decoder.take().count == kept

            cost = nanoseconds(once, rows, rounds if name == "native" else max(1, rounds // 10))
            print(f"{name + ': ' + case:32} {cost:8.0f} ns  {cost - floor:+8.0f} ns")


if __name__ == "__main__":
    main()

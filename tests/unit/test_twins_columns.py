"""Both make the same of a chunk's columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgoutput.compare import columns_of
from spillway import columns, impl
from spillway.change import make_key
from spillway.chunk import HASH, OLD, WHOLE, WORDS, Chunk, ChunkBuilder

TWINS: tuple[Any, ...] = (columns,) if impl.native is None else (columns, impl.native)

TABLES = [("public", "jobs"), ("a.b", "c:d"), ("public", "ſü")]
PARTS = st.text(max_size=8) | st.sampled_from(["a:b", "x.y", "back\\slash", '"', "", "é" * 100, "k" * 600, "\x01\n"])
EPOCH = 3


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    groups = draw(st.integers(0, 2))
    builder = ChunkBuilder(groups)
    for idx in range(draw(st.integers(0, 12))):
        table = draw(st.sampled_from(TABLES))
        record = draw(st.binary(max_size=40))
        text = make_key(*table, tuple(draw(st.lists(PARTS.filter(lambda p: "\0" not in p), min_size=1, max_size=3))))
        rest = [draw(st.sampled_from([b"", b"public.jobs:7", b"g\\:"])) for _ in range(1 + 2 * groups)]
        builder.add(
            table,
            draw(st.integers(0, 3)),
            draw(st.integers(0, 2**63)),
            idx,
            1_730_151_561_127_470,
            b'{"record":' + record + b',"changes":null,"action":"insert"',
            len(record),
            (text.encode(), *rest),
            n=draw(st.integers(0, 255)),
            flags=draw(st.sampled_from([WHOLE, WHOLE | OLD, 0])),
        )
    return builder.take(7, 8, 1)


@st.composite
def parts(draw: st.DrawFn) -> tuple[Chunk, Sequence[int]]:
    chunk = draw(chunks())
    start, stop = sorted(draw(st.tuples(*[st.integers(0, chunk.count)] * 2)))
    some = draw(st.lists(st.sampled_from(range(chunk.count)), unique=True)) if chunk.count else []
    indices: Sequence[int] = draw(
        st.sampled_from([range(chunk.count), range(start, stop), range(0, chunk.count, 2), sorted(some)])
    )
    return chunk, indices


def identity(pks: tuple[str, ...]) -> str:
    """As the search sink's: a short value is its own id."""
    return pks[0] if len(pks) == 1 and 0 < len(pks[0]) <= 128 else f"{len(pks)}-{'-'.join(pks)[:20]}"


@given(parts(), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_gather(part: tuple[Chunk, Sequence[int]], data: st.DataObject) -> None:
    chunk, indices = part
    hash_word = data.draw(st.sampled_from([HASH, *range(WORDS, WORDS + 2 * chunk.groups, 2)]))
    gathered = [columns_of(twin.gather(chunk, indices, hash_word)) for twin in TWINS]
    assert gathered[1:] == gathered[:-1]


@given(parts())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_join_and_by_kind(part: tuple[Chunk, Sequence[int]]) -> None:
    chunk, indices = part
    for before, after in ((b"", b""), (b"<", b">\n")):
        joined = [twin.join(chunk, indices, before, after) for twin in TWINS]
        assert joined[1:] == joined[:-1]
    kinds = [list(twin.by_kind(chunk).items()) for twin in TWINS]
    assert kinds[1:] == kinds[:-1]


@given(parts(), st.sampled_from([None, b',"enrichment":null}}']))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bulk(part: tuple[Chunk, Sequence[int]], suffix: bytes | None) -> None:
    chunk, indices = part
    lines = [twin.bulk(chunk, indices, EPOCH, suffix, identity) for twin in TWINS]
    assert lines[1:] == lines[:-1]


def damaged() -> list[Chunk]:
    """Chunks as a broken file may give them."""
    builder = ChunkBuilder()
    for idx in range(3):
        builder.add(("s", "t"), 0, 1, idx, 1, b'{"record":{}}', 2, (b"s.t:1", b""))
    whole = builder.take()
    data, meta, keys, tables = whole.data, whole.meta, whole.keys, whole.tables
    return [
        Chunk(3, data[:20], meta, keys, tables),
        Chunk(3, data, meta, keys[:8], tables),
        Chunk(3, data, meta, b"x" * len(keys), tables),
        Chunk(3, data, meta[:64], keys, tables),
        Chunk(3, data, meta[:24] + b"\xff" * 8 + meta[32:], keys, tables),
        Chunk(3, data, meta[:36] + b"\xff\xff" + meta[38:], keys, tables),
    ]


@pytest.mark.parametrize("twin", TWINS[1:])
@pytest.mark.parametrize("chunk", damaged())
def test_the_compiled_one_reads_nothing_beyond_a_damaged_chunk(twin: ModuleType, chunk: Chunk) -> None:
    acts: list[Callable[[], object]] = [
        lambda: twin.gather(chunk, [0, 1, 2], HASH),
        lambda: twin.join(chunk, range(3), b"", b""),
        lambda: twin.by_kind(chunk),
        lambda: twin.bulk(chunk, range(3), EPOCH, None, identity),
    ]
    for act in acts:
        with suppress(ValueError, IndexError):
            act()


@pytest.mark.parametrize("twin", TWINS[1:])
def test_an_index_beyond_the_chunk_is_an_error(twin: ModuleType) -> None:
    chunk = damaged()[0]
    for indices in ([3], [-1], range(2, 5)):
        with pytest.raises(IndexError):
            twin.join(chunk, indices, b"", b"")

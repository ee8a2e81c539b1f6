"""What a decoder makes of frames, in a form that can be compared with what its twin makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pgoutput.frames import META
from spillway.change import ACTIONS, Action
from spillway.chunk import Chunk
from spillway.errors import Finding
from spillway.pgoutput import Copy, Full, ProtocolError, Relation, TableInfo, TypeInfo
from spillway.pgoutput.conditions import Condition, compiled
from spillway.pgoutput.decoder import Decoder
from spillway.pgoutput.filters import Filter

DOMAIN, ENUM, COMPOSITE, COMPOSITES, VECTOR, UNKNOWN = range(20_001, 20_007)
TYPES = {
    info.oid: info
    for info in (
        TypeInfo(DOMAIN, "amount", "domain", base_oid=1700),
        TypeInfo(ENUM, "mood", "enum"),
        TypeInfo(COMPOSITE, "pair", "composite", attributes=(("a%b", 23), ("b", 25))),
        TypeInfo(COMPOSITES, "_pair", "array", element_oid=COMPOSITE),
        TypeInfo(VECTOR, "vector", "base"),
    )
}


@dataclass(frozen=True)
class Given:
    """A filter, before it meets a relation."""

    conditions: tuple[Condition, ...]
    actions: frozenset[Action] = frozenset(ACTIONS)
    leaves: bool = True


@dataclass(frozen=True)
class Setting:
    """Everything that a decoder is told beside its frames."""

    primary_key: tuple[str, ...] = ("id",)
    groups: tuple[tuple[str, ...] | None, ...] = ()
    wanted: frozenset[str] = frozenset(ACTIONS)
    root: tuple[str, str] | None = None
    partial: bool = False  # and partitioned
    max_message_bytes: int = 1 << 20
    frame_overhead_bytes: int = 100
    renew_frame_bytes: int = 1 << 20
    credit_bytes: int = 1 << 30
    max_changes: int = 1000
    filters: tuple[Given, ...] = ()
    totals: bool = False
    prefixes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What happened, one entry after another."""

    steps: list[object] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


def columns_of(chunk: Chunk) -> tuple[object, ...]:
    return (
        chunk.count, chunk.data, chunk.meta, chunk.keys, chunk.tables, chunk.groups, chunk.commit_lsn, chunk.end_lsn,
        chunk.truncates, chunk.matched, chunk.filters,
    )  # fmt: skip


def outcome(decoder_class: type[Decoder], connection: Copy, setting: Setting) -> Outcome:
    """A chunk is taken when it is full and at the end."""
    out = Outcome()
    findings: list[Finding] = []
    decoder = _decoder(decoder_class, setting, findings)
    try:
        while (stop := decoder.fill(connection, setting.credit_bytes, setting.max_changes)) is not None:
            out.steps.append((stop, decoder.in_transaction, decoder.count, decoder.used_bytes, decoder.taken_bytes))
            if isinstance(stop, Relation):
                _learn(decoder, stop, setting)
            elif isinstance(stop, Full):
                if not decoder.used_bytes:
                    break  # more than there is for any chunk
                _take(decoder, out)
        _take(decoder, out)
    except ProtocolError:
        out.steps.append(ProtocolError)
    out.steps += (decoder.largest_frame_bytes, [(finding.code, finding.what) for finding in findings])
    return out


def page_outcome(decoder_class: type[Decoder], relation: Copy, lines: Copy, setting: Setting) -> Outcome:
    """The same of a page: one frame that must be a relation, and lines of COPY of it."""
    out = Outcome()
    decoder = _decoder(decoder_class, setting, [])
    try:
        learned = decoder.fill(relation, setting.credit_bytes, setting.max_changes)
        if not isinstance(learned, Relation):
            return out
        _learn(decoder, learned, setting)
        decoder.begin_page(b"page:1", 1 << 40, 1_735_689_600_000_001)
        while (full := decoder.fill_page(lines, learned.oid, setting.credit_bytes, setting.max_changes)) is not None:
            out.steps.append((full, decoder.count, decoder.used_bytes, decoder.taken_bytes, decoder.page_rows))
            if not decoder.used_bytes:
                break  # more than there is for any chunk
            _take(decoder, out)
        out.steps.append((decoder.page_rows, decoder.last_key))
        _take(decoder, out)
    except ProtocolError:
        out.steps.append(ProtocolError)
    out.steps.append(decoder.largest_frame_bytes)
    return out


def filters_of(given: Sequence[Given], relation: Relation, info: TableInfo) -> list[Filter]:
    """Those that fit the relation."""
    checks = [compiled(relation, info, one.conditions) for one in given]
    return [
        Filter(number, some, one.actions, one.leaves)
        for number, (one, some) in enumerate(zip(given, checks, strict=True))
        if not isinstance(some, Finding) and some
    ]


def _decoder(decoder_class: type[Decoder], setting: Setting, findings: list[Finding]) -> Decoder:
    return decoder_class(
        META,
        lambda *_: setting.groups,
        len(setting.groups),
        setting.max_message_bytes,
        setting.frame_overhead_bytes,
        setting.renew_frame_bytes,
        findings.append,
        lambda relation, info: filters_of(setting.filters, relation, info),
        len(setting.filters),
        setting.totals,
        setting.prefixes,
    )


def _learn(decoder: Decoder, relation: Relation, setting: Setting) -> None:
    info = TableInfo(relation.oid, setting.primary_key, TYPES, setting.root, setting.partial, setting.partial)
    decoder.learn(relation, info, setting.wanted)  # type: ignore[arg-type]


def _take(decoder: Decoder, out: Outcome) -> None:
    chunk = decoder.take()
    out.chunks.append(chunk)
    out.steps.append(columns_of(chunk))


def assert_same(outcomes: Sequence[Outcome]) -> None:
    first = outcomes[0].steps
    for other in outcomes[1:]:
        for one, two in zip(first, other.steps, strict=False):
            assert one == two
        assert len(first) == len(other.steps)

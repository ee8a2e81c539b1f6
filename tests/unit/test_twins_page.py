"""Both decoders make the same of any lines of COPY; of what is no line, both make the same error."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.guarded import GuardedConnection
from pgoutput import frames
from pgoutput.compare import Setting, assert_same, page_outcome
from pgoutput.twins import TWINS
from unit.test_twins_decoder import NAMES, TYPICAL, VALUES

Case = tuple[bytes, list[bytes], Setting]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A relation, lines of it, and how the decoder is set up."""
    oids = draw(st.lists(st.sampled_from(sorted(TYPICAL)), max_size=len(NAMES)))
    columns = list(zip(NAMES, oids, strict=False))
    names = [name for name, _ in columns]
    key = draw(st.lists(st.sampled_from(names), unique=True, max_size=3)) if names else []
    group = st.none() | st.lists(st.sampled_from([*names, "gone"]), min_size=1, max_size=3).map(tuple)
    setting = Setting(
        primary_key=tuple(name for name in names if name in key),
        groups=tuple(draw(st.lists(group, max_size=2))),
        root=draw(st.none() | st.just(("a.b", "root:"))),
        max_message_bytes=draw(st.sampled_from([1 << 20, 5000, 900, 300, 10])),
        credit_bytes=draw(st.sampled_from([1 << 30, 3000])),
        max_changes=draw(st.sampled_from([1000, 3])),
    )
    relation = frames.relation(columns, key, identity=draw(st.sampled_from("dnfi")), table='jo"bs')
    rows = draw(st.lists(st.tuples(*[st.none() | TYPICAL[oid] | VALUES for oid in oids]), max_size=8))
    return bytes(frames.xlog(relation)), [bytes(frames.copy_line(*row)) for row in rows], setting


def check(case: Case) -> None:
    relation, lines, setting = case
    assert_same(
        [page_outcome(twin, GuardedConnection([relation]), GuardedConnection(lines), setting) for twin in TWINS]
    )


@given(cases())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_chunks(case: Case) -> None:
    check(case)


@given(cases(), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_of_garbled_lines(case: Case, data: st.DataObject) -> None:
    _, lines, _ = case
    pieces = st.binary(max_size=3) | st.sampled_from([b"\t", b"\\", b"\n", b"\\N", b"\\.", b"\\t"])
    for number, line in enumerate(lines):
        garbled = bytearray(line)
        at = data.draw(st.integers(0, len(line)))
        garbled[at : at + data.draw(st.integers(0, 3))] = data.draw(pieces)
        lines[number] = bytes(garbled) or b"\n"
    check(case)

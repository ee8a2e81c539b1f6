"""Both decoders make the same of whatever comes, byte for byte; of what is no protocol, both make the same error."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.guarded import GuardedConnection
from pgoutput import frames
from pgoutput.compare import COMPOSITE, COMPOSITES, DOMAIN, ENUM, UNKNOWN, VECTOR, Setting, assert_same, outcome
from pgoutput.frames import UNCHANGED, Value
from pgoutput.twins import TWINS
from spillway.change import ACTIONS

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])).map(str.encode) | st.sampled_from(
    [
        b"",
        b'"',
        b"\\",
        b"a.b:c\\",
        b"\n\r\t\b\f\x01\x1f\x7f",
        "ünïcode \U0001f600 ſ\u2028".encode(),
        b"<unchanged toast>",
    ]
)
BROKEN_TEXT = st.binary(max_size=40) | st.sampled_from(
    [b"\xff", b"abc\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xf0\x80\x80\x80",
     b"x" * 70 + b"\x80"]
)  # fmt: skip
LONG_TEXT = st.builds(
    lambda part, times, end: part * times + end, ANY_TEXT | BROKEN_TEXT, st.integers(1, 90), ANY_TEXT | BROKEN_TEXT
)
NUMBERS = st.sampled_from(
    b"0 -0 1 -1 007 1.5 1. .5 1e5 1E+5 1e 1e- -12.340e-07 NaN -Infinity + - 1.5.5 12a 123456789012345678901".split()
)
MOMENTS = st.sampled_from(
    [
        b"2024-01-02 03:04:05", b"2024-01-02 03:04:05.1", b"2024-01-02 03:04:05.123456", b"2024-01-02 03:04:05.12345",
        b"2024-01-02 03:04:05+00", b"2024-01-02 03:04:05.1+00", b"2024-01-02 03:04:05.123456+00",
        b"2024-01-02 03:04:05.12345+00", b"0044-03-15 12:00:00 BC", b"0001-03-15 12:00:00+00 BC",
        b"10000-01-01 00:00:00", b"294276-12-31 23:59:59.999999+00", b"infinity", b"-infinity",
        b"2024-01-02 03:04:05+01", b"2024-01-02 03:04:05.", b"2024-01-02", b"0044-03-15 BC", b"12024-01-02",
    ]
)  # fmt: skip
ARRAYS = st.sampled_from(
    [b"{}", b"{1,2}", b"{{1,2},{3,NULL}}", b"[2:3]={1,2}", b"{1.5,NaN}", b'{"a\\"b",c,"NULL"}', b"{a;b}", b"{", b"{1,"]
)
JSONS = st.sampled_from(
    [b'{"a": 1}', b'{\n"a":\r\n [1,2]}', b'"\xc3\xa9"', b'"\xe9"', b"null", b'{"n": 1.10}', b'"' + b"x" * 200 + b'\n"']
)
OTHERS = st.sampled_from([b"t", b"f", b"\\x00ff", b"\\x", b"escape\\000", b"(1,x)", b'(,"a ""b""")', b"()", b"[1,2.5]"])

VALUES = ANY_TEXT | BROKEN_TEXT | LONG_TEXT | NUMBERS | MOMENTS | ARRAYS | JSONS | OTHERS
TYPICAL: dict[int, st.SearchStrategy[bytes]] = {
    16: OTHERS, 17: OTHERS | ANY_TEXT, 20: st.integers(-(2**63), 2**63 - 1).map(lambda i: b"%d" % i), 25: ANY_TEXT,
    114: JSONS, 1082: MOMENTS, 1114: MOMENTS, 1184: MOMENTS, 1186: OTHERS, 1700: NUMBERS, 701: NUMBERS, 2950: OTHERS,
    1016: ARRAYS, 1009: ARRAYS, 1231: ARRAYS, 1021: ARRAYS, 3802: JSONS, DOMAIN: NUMBERS, ENUM: ANY_TEXT,
    COMPOSITE: OTHERS, COMPOSITES: OTHERS, VECTOR: OTHERS, UNKNOWN: ANY_TEXT, 869: ANY_TEXT, 1020: ARRAYS,
}  # fmt: skip
NAMES = ("id", "name", '%b"\\', "ſü", "note")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[bytes], Setting]:
    """Frames of a few transactions on one table whose relation is sent once or twice, and how the decoder is set up."""
    oids = draw(st.lists(st.sampled_from(sorted(TYPICAL)), min_size=1, max_size=len(NAMES)))
    columns = list(zip(NAMES, oids, strict=False))
    names = [name for name, _ in columns]
    key = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    group = st.none() | st.lists(st.sampled_from([*names, "gone"]), min_size=1, max_size=3).map(tuple)
    setting = Setting(
        primary_key=tuple(name for name in names if name in key),
        groups=tuple(draw(st.lists(group, max_size=2))),
        wanted=draw(st.just(frozenset(ACTIONS)) | st.frozensets(st.sampled_from(ACTIONS))),
        root=draw(st.none() | st.just(("a.b", "root:"))),
        partial=draw(st.booleans()),
        max_message_bytes=draw(st.sampled_from([1 << 20, 5000, 900, 300])),
        renew_frame_bytes=draw(st.sampled_from([1 << 20, 100])),
        credit_bytes=draw(st.sampled_from([1 << 30, 3000])),
        max_changes=draw(st.sampled_from([1000, 3])),
    )
    relation = frames.relation(columns, key, identity=draw(st.sampled_from("dnfi")), table='jo"bs')
    value = [st.none() | TYPICAL[oid] | TYPICAL[oid] | VALUES if draw(st.booleans()) else TYPICAL[oid] for oid in oids]

    def row(toast: bool = True) -> list[Value]:
        values: list[Value] = [draw(one) for one in value]
        if toast and draw(st.booleans()):
            values[draw(st.integers(0, len(values) - 1))] = UNCHANGED
        return values

    def operation(kind: str) -> bytes:
        match kind:
            case "insert":
                return frames.insert(*row(toast=False))
            case "update":
                return frames.update(*row())
            case "update of key":
                return frames.update(*row(), key=row(toast=False))
            case "update of old":
                before = row(toast=False)
                after = [draw(st.sampled_from([then, UNCHANGED])) for then in before] if draw(st.booleans()) else row()
                return frames.update(*after, old=before)
            case "delete":
                return frames.delete(key=row())
            case "delete of old":
                return frames.delete(old=row())
            case "truncate":
                return frames.truncate(*[16_400] * draw(st.integers(1, 3)))
            case "annotation":
                name = draw(st.sampled_from(["set", "clear", "other"]))
                content = draw(JSONS | BROKEN_TEXT)
                prefix = f"sequin:transaction_annotations.{name}"
                return frames.message(prefix, content, transactional=draw(st.booleans()))
        return relation

    kinds = ["insert", "update", "update of key", "update of old", "delete", "delete of old", "truncate", "annotation",
             "relation"]  # fmt: skip
    sent = [frames.xlog(relation)]
    for lsn in range(1, draw(st.integers(2, 4))):
        sent.append(frames.xlog(frames.begin(lsn * 1000)))
        sent += [frames.xlog(operation(kind)) for kind in draw(st.lists(st.sampled_from(kinds), max_size=8))]
        sent.append(frames.keepalive(77, reply_requested=draw(st.booleans())))
        if draw(st.booleans()):
            sent.append(frames.xlog(frames.commit(lsn * 1000, lsn * 1000 + 50)))
            sent.append(frames.keepalive(78))
    return [bytes(frame) for frame in sent], setting


@given(cases())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_chunks(case: tuple[list[bytes], Setting]) -> None:
    sent, setting = case
    assert_same([outcome(twin, GuardedConnection(sent), setting) for twin in TWINS])


@given(cases(), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_of_garbled_frames(case: tuple[list[bytes], Setting], data: st.DataObject) -> None:
    sent, setting = case
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(sent) - 1))
        frame = bytearray(sent[number])
        at = data.draw(st.integers(0, max(len(frame) - 1, 0)))
        match data.draw(st.sampled_from(["cut", "byte", "insert"])):
            case "cut":
                del frame[at:]
            case "byte":
                frame[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                frame[at:at] = data.draw(st.binary(max_size=5))
        sent[number] = bytes(frame)
    assert_same([outcome(twin, GuardedConnection(sent), setting) for twin in TWINS])

"""Text of scalar types to JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway.pgoutput import TypeInfo, scalars
from spillway.pgoutput.types import renderer_for


@pytest.mark.parametrize(
    ("render", "value", "expected"),
    [
        (scalars.boolean, b"t", b"true"),
        (scalars.boolean, b"f", b"false"),
        (scalars.number, b"1.500", b"1.500"),
        (scalars.number, b"-0", b"-0"),
        (scalars.number, b"1e-05", b"1e-05"),
        (scalars.number, b"12345678901234567890.123456789012345678901", b"12345678901234567890.123456789012345678901"),
        (scalars.number, b"NaN", b'"NaN"'),
        (scalars.number, b"-Infinity", b'"-Infinity"'),
        (scalars.number, b".5", b'".5"'),
        (scalars.number, b"01", b'"01"'),
        (scalars.bytea, b"\\xdeadbeef", b'"\\\\xdeadbeef"'),
        (scalars.bytea, b"\\x", b'"\\\\x"'),
        (scalars.date, b"2024-02-29", b'"2024-02-29"'),
        (scalars.date, b"0044-03-15 BC", b'"-0043-03-15"'),
        (scalars.date, b"0001-01-01 BC", b'"0000-01-01"'),
        (scalars.date, b"4713-01-01 BC", b'"-4712-01-01"'),
        (scalars.date, b"10000-01-01", b'"+10000-01-01"'),
        (scalars.date, b"infinity", b'"infinity"'),
        (scalars.date, b"-infinity", b'"-infinity"'),
        (scalars.timestamp, b"2024-01-02 03:04:05", b'"2024-01-02T03:04:05.000000"'),
        (scalars.timestamp, b"2024-01-02 03:04:05.1", b'"2024-01-02T03:04:05.100000"'),
        (scalars.timestamp, b"2024-01-02 03:04:05.123456", b'"2024-01-02T03:04:05.123456"'),
        (scalars.timestamp, b"0044-03-15 12:00:00.5 BC", b'"-0043-03-15T12:00:00.500000"'),
        (scalars.timestamp, b"0044-03-15 12:00:00 BC", b'"-0043-03-15T12:00:00.000000"'),
        (scalars.timestamp, b"294276-12-31 23:59:59.999999", b'"+294276-12-31T23:59:59.999999"'),
        (scalars.timestamp, b"10000-01-01 00:00:00", b'"+10000-01-01T00:00:00.000000"'),
        (scalars.timestamp, b"infinity", b'"infinity"'),
        (scalars.timestamptz, b"2024-01-02 03:04:05+00", b'"2024-01-02T03:04:05.000000Z"'),
        (scalars.timestamptz, b"2024-01-02 03:04:05.12+00", b'"2024-01-02T03:04:05.120000Z"'),
        (scalars.timestamptz, b"2024-01-02 03:04:05.123456+00", b'"2024-01-02T03:04:05.123456Z"'),
        (scalars.timestamptz, b"0001-12-31 23:59:59+00 BC", b'"0000-12-31T23:59:59.000000Z"'),
        (scalars.timestamptz, b"12024-01-02 03:04:05.12+00", b'"+12024-01-02T03:04:05.120000Z"'),
        (scalars.timestamptz, b"-infinity", b'"-infinity"'),
        (scalars.interval, b"00:00:00", b'{"months":0,"days":0,"microseconds":0}'),
        (scalars.interval, b"1 year 2 mons -3 days", b'{"months":14,"days":-3,"microseconds":0}'),
        (
            scalars.interval,
            b"-1 years -2 mons +3 days -04:05:06.78",
            b'{"months":-14,"days":3,"microseconds":-14706780000}',
        ),
        (scalars.interval, b"1 mon +1234567:00:00.000001", b'{"months":1,"days":0,"microseconds":4444441200000001}'),
        (scalars.interval, b"-00:00:00.5", b'{"months":0,"days":0,"microseconds":-500000}'),
        (scalars.interval, b"1 day", b'{"months":0,"days":1,"microseconds":0}'),
        (scalars.interval, b"infinity", b'"infinity"'),
        (scalars.json, b'{"a":\r\n 1.10,\t"a": 1e400}', b'{"a":   1.10,\t"a": 1e400}'),
        (scalars.json, b'"\\ud800"', b'"\\ud800"'),
        (scalars.json, b'"caf\xe9 \\u0000"', b'"caf\\\\xe9 \\u0000"'),
        (scalars.text, 'line\u2028 "q" \\ \n\t\x01é😀'.encode(), '"line\u2028 \\"q\\" \\\\ \\n\\t\\u0001é😀"'.encode()),
        (scalars.text, b"caf\xe9", b'"caf\\\\xe9"'),
        (scalars.text, b"", b'""'),
        (scalars.vector, b"[1,2.5,-3e-05]", b"[1,2.5,-3e-05]"),
        (scalars.vector, b"[]", b"[]"),
        (scalars.vector, b"{1:1}/3", b'"{1:1}/3"'),
    ],
)
def test_renders(render: scalars.Renderer, value: bytes, expected: bytes) -> None:
    assert render(value) == expected


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_text_comes_back(value: str) -> None:
    rendered = scalars.text(value.encode())
    assert orjson.loads(rendered) == value
    assert b"\n" not in rendered


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.integers(1, 3),
)
def test_long_text_is_the_same_as_short(piece: str, extra: int) -> None:
    value = piece * (70_000 // len(piece) + extra)
    assert scalars.text(value.encode()) == orjson.dumps(value)


def test_long_text_cut_inside_of_a_character_and_not_utf8() -> None:
    value = b"a" * 65_535 + "é".encode() + b"b" * 65_535 + b"\xff" + b"\xc3"
    assert orjson.loads(scalars.text(value)) == value.decode(errors="backslashreplace")


def test_long_json_is_checked_in_pieces() -> None:
    good = b'"' + b"a" * 65_534 + "é".encode() + b'"'
    assert scalars.json(good) is good
    assert orjson.loads(scalars.json(good[:-1] + b'\xff"')) == "a" * 65_534 + "é\\xff"


@given(st.datetimes())
def test_timestamps_always_have_six_digits(moment: datetime) -> None:
    printed = moment.isoformat(sep=" ").rstrip("0") if moment.microsecond else moment.isoformat(sep=" ")
    expected = moment.isoformat(timespec="microseconds")
    assert json.loads(scalars.timestamp(printed.encode())) == expected
    assert json.loads(scalars.timestamptz(printed.encode() + b"+00")) == expected + "Z"
    assert datetime.fromisoformat(expected + "+00:00").tzinfo == UTC


@given(st.decimals(allow_nan=True, allow_infinity=False))
def test_a_number_is_valid_json_or_a_string(value: object) -> None:
    assert str(json.loads(scalars.number(str(value).encode()), parse_float=str, parse_int=str)) == str(value)


def test_a_type_is_resolved_through_domains() -> None:
    types = {
        20_001: TypeInfo(20_001, "money_list", "domain", base_oid=20_002),
        20_002: TypeInfo(20_002, "numbers", "domain", base_oid=1231),
        20_003: TypeInfo(20_003, "_numbers", "array", element_oid=20_002),
        20_004: TypeInfo(20_004, "mood", "enum"),
        20_005: TypeInfo(20_005, "vector", "base"),
        20_006: TypeInfo(20_006, "hstore", "base"),
    }

    def render(oid: int, value: bytes) -> bytes:
        renderer = renderer_for(oid, types)
        return value if renderer is None else renderer(value)

    assert render(20_001, b"{1.0,NaN}") == b'[1.0,"NaN"]'
    assert render(20_003, b'{"{1.0}"}') == b"[[1.0]]"
    assert render(20_004, b'so "so"') == b'"so \\"so\\""'
    assert render(20_005, b"[1,2]") == b"[1,2]"
    assert render(20_006, b'"a"=>"1"') == b'"\\"a\\"=>\\"1\\""'
    assert render(20_999, b"{unknown}") == b'"{unknown}"'
    assert render(20, b"7") == b"7"
    assert render(22, b"1 2") == b'"1 2"'

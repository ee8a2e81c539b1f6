"""Arrays and composites: what PostgreSQL prints comes back as JSON."""

from __future__ import annotations

import re
import tracemalloc

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway.pgoutput import scalars
from spillway.pgoutput.nested import array, composite

Nested = str | None | list["Nested"]

# What the server may print in an element or a field.
texts = st.text(
    st.sampled_from("aN{}(),;\"\\ \n\tUL=[]é😀'") | st.characters(exclude_characters="\0", exclude_categories=["Cs"])
)


def array_out(value: Nested, delimiter: str) -> str:
    """The rules of array_out, as the documentation states them."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "{" + delimiter.join(array_out(item, delimiter) for item in value) + "}"
    if value == "" or value.upper() == "NULL" or re.search(r'[{}"\\\s]|' + re.escape(delimiter), value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value


def record_out(fields: list[str | None]) -> str:
    """The rules of record_out."""

    def field_out(field: str | None) -> str:
        if field is None:
            return ""
        if field == "" or re.search(r'["\\(),\s]', field):
            return '"' + field.replace("\\", "\\\\").replace('"', '""') + '"'
        return field

    return "(" + ",".join(map(field_out, fields)) + ")"


rows_of_one_length = st.integers(1, 3).flatmap(
    lambda size: st.lists(st.lists(st.none() | texts, min_size=size, max_size=size), min_size=1, max_size=3)
)


@given(st.lists(st.none() | texts) | rows_of_one_length, st.sampled_from(",;"))
def test_an_array_comes_back(value: list[Nested], delimiter: str) -> None:
    assert orjson.loads(array(scalars.text, delimiter)(array_out(value, delimiter).encode())) == value


@given(st.lists(st.none() | texts, min_size=1, max_size=6))
def test_a_composite_comes_back(fields: list[str | None]) -> None:
    names = [f"f{index}" for index in range(len(fields))]
    render = composite([(name, scalars.text) for name in names])
    assert orjson.loads(render(record_out(fields).encode())) == dict(zip(names, fields, strict=True))


@given(st.lists(st.none() | st.lists(st.none() | texts, min_size=2, max_size=2)))
def test_an_array_of_composites_that_hold_arrays_comes_back(rows: list[list[str | None] | None]) -> None:
    render = array(composite([("list", array(scalars.text)), ("%b", scalars.text)]))
    printed: list[Nested] = [None if row is None else record_out([array_out([row[0]], ","), row[1]]) for row in rows]
    expected = [None if row is None else {"list": [row[0]], "%b": row[1]} for row in rows]
    assert orjson.loads(render(array_out(printed, ",").encode())) == expected


@pytest.mark.parametrize(
    ("element", "value", "expected"),
    [
        (None, b"{}", b"[]"),
        (scalars.text, b"{}", b"[]"),
        (None, b"{1,-2,3}", b"[1,-2,3]"),
        (None, b"{{1,NULL},{3,4}}", b"[[1,null],[3,4]]"),
        (None, b"[2:4]={1,2,3}", b"[1,2,3]"),
        (None, b"[-1:0][5:5]={{1},{2}}", b"[[1],[2]]"),
        (scalars.text, b"[0:0]={a=b}", b'["a=b"]'),
        (scalars.number, b"{1.50,NaN,1e+20,NULL,-Infinity}", b'[1.50,"NaN",1e+20,null,"-Infinity"]'),
        (scalars.boolean, b"{t,f,NULL}", b"[true,false,null]"),
        (scalars.text, b'{"NULL",NULL,""}', b'["NULL",null,""]'),
        (scalars.json, b'{"{\\"a\\": [1,\\n 1.10]}",null}', b'[{"a": [1,n 1.10]},null]'),
        (scalars.json, b'{"{\\"a\\":\n1}"}', b'[{"a": 1}]'),
        (scalars.bytea, b'{"\\\\xdead","\\\\x"}', b'["\\\\xdead","\\\\x"]'),
        (scalars.timestamp, b'{"2024-01-02 03:04:05"}', b'["2024-01-02T03:04:05.000000"]'),
    ],
)
def test_arrays(element: scalars.Renderer | None, value: bytes, expected: bytes) -> None:
    assert array(element)(value) == expected


def test_boxes_are_separated_by_semicolons() -> None:
    assert array(scalars.quoted, ";")(b"{(1,1),(0,0);(3,3),(2,2)}") == b'["(1,1),(0,0)","(3,3),(2,2)"]'


def test_composites() -> None:
    inner = composite([("x", None), ("y", scalars.text)])
    outer = composite([("id", None), ("inner", inner), ("list", array(None)), ("at", scalars.date)])
    assert outer(b'(1,"(2,""a """"b"""" \\\\\\\\"")","{3,4}",)') == (
        b'{"id":1,"inner":{"x":2,"y":"a \\"b\\" \\\\"},"list":[3,4],"at":null}'
    )
    assert inner(b'(,"")') == b'{"x":null,"y":""}'
    assert composite([("only", None)])(b"()") == b'{"only":null}'
    assert composite([])(b"()") == b"{}"


def test_a_composite_that_was_altered_since_is_given_as_text() -> None:
    assert composite([("x", None)])(b"(1,2)") == b'"(1,2)"'
    assert composite([("x", None)])(b"garbage") == b'"garbage"'


@pytest.mark.parametrize(
    ("render", "value"),
    [
        (array(None), b"{" + b",".join([b"1", b"NULL"] * 100_000) + b"}"),
        (array(scalars.text), b"{" + b",".join([b"ab"] * 200_000) + b"}"),
        (array(scalars.text), b'{"' + b'\\"' * 300_000 + b'"}'),
        (composite([("a", scalars.text)]), b'("' + b'""\\\\' * 200_000 + b'")'),
        (scalars.vector, b"[" + b",".join([b"1"] * 300_000) + b"]"),
        (scalars.text, "😀".encode() + b"a" * 600_000),
        (scalars.text, b"\n" * 600_000),
        (scalars.json, b'{"a":"' + "é".encode() * 300_000 + b'"}'),
    ],
)
def test_a_large_value_costs_a_few_times_its_size(render: scalars.Renderer, value: bytes) -> None:
    tracemalloc.start()
    try:
        rendered = render(value)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * (len(value) + len(rendered)) + 500_000

"""Both take JSON objects apart alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway import impl, members

TWINS: tuple[Any, ...] = (members,) if impl.native is None else (members, impl.native)

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=15,
)


@pytest.mark.parametrize("twin", TWINS)
@given(st.dictionaries(st.text(), values), st.sampled_from([None, 0, 2]), st.booleans())
def test_members(twin: Any, row: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(row, indent=indent, ensure_ascii=ascii_only, allow_nan=True)
    found = twin.members(text.encode())
    assert json.dumps({json.loads(name): json.loads(value) for name, value in found}) == json.dumps(row)
    assert twin.joined(found) == twin.joined(iter(found)) == members.joined(found)
    assert json.dumps(json.loads(twin.joined(found))) == json.dumps(row)


@pytest.mark.parametrize("twin", TWINS)
@given(values, st.text("ab,]} ", max_size=3))
def test_where_a_value_ends(twin: Any, value: object, before: str) -> None:
    text = json.dumps(value).encode()
    for behind in (b"", b",1", b"}", b"]", b" "):
        start = len(before.encode())
        assert twin.end_of_value(before.encode() + text + behind, start) == start + len(text)


@pytest.mark.parametrize("twin", TWINS)
def test_of_any_depth(twin: Any) -> None:
    deep = b"[" * 5000 + b"]" * 5000
    assert twin.members(b'{"a":%b,"b":1}' % deep) == [(b'"a"', deep), (b'"b"', b"1")]
    assert twin.end_of_value(deep + b",", 0) == len(deep)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("text", [b"", b"{", b'{"a', b'{"a":', b'{"a":[1'])
def test_what_is_no_json_does_not_hurt(twin: Any, text: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        twin.members(text)

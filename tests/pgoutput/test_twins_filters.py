"""Both decoders say the same of any filters on whatever comes, and pass over the same rows."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.guarded import GuardedConnection
from pgoutput import frames
from pgoutput.compare import Given, Setting, assert_same, outcome, page_outcome
from pgoutput.given import If
from pgoutput.twins import TWINS
from spillway.change import ACTIONS
from unit import test_twins_decoder, test_twins_page
from unit.test_twins_decoder import NAMES

PREFIXES = tuple(f"sequin:transaction_annotations.{name}" for name in ("set", "other"))
SCALARS = st.sampled_from(
    ["", "a", "a%", "%a", "a_", "%", "a\\%%", '"', "1", "-1", "0", "1.5", "NaN", "Infinity", "t", "f", "true",
     "2024-01-02", "2024-01-02 03:04:05", "0044-03-15 BC", "infinity", "-infinity",
     0, 1, -1, 2**63 - 1, -(2**63), 1.5, True, False, "so so", "{1,2}", "<unchanged toast>"]
)  # fmt: skip


@st.composite
def conditions(draw: st.DrawFn) -> If:
    column = draw(st.sampled_from(NAMES))
    operator = draw(
        st.sampled_from(["eq", "ne", "lt", "lte", "gt", "gte", "in", "not_in", "is_null", "is_not_null", "like"])
    )
    value: object = None
    if operator in ("in", "not_in"):
        value = tuple(draw(st.lists(SCALARS, min_size=1, max_size=3)))
    elif operator not in ("is_null", "is_not_null"):
        value = draw(SCALARS)
    path = draw(st.sampled_from([(), (), ("a",), ("a", "1"), ("n",), ("a", "-1")]))
    return If(column, operator, value, path)  # type: ignore[arg-type]


FILTERS = st.lists(
    st.builds(
        Given,
        st.lists(conditions(), min_size=1, max_size=2).map(tuple),
        st.frozensets(st.sampled_from(ACTIONS), min_size=1),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
SLOW = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(test_twins_decoder.cases(), FILTERS, st.booleans())
@SLOW
def test_the_same_chunks(case: tuple[list[bytes], Setting], filters: tuple[Given, ...], alone: bool) -> None:
    sent, setting = case
    wanted = frozenset() if alone else setting.wanted
    setting = replace(setting, filters=filters, wanted=wanted, totals=alone, prefixes=PREFIXES)
    assert_same([outcome(twin, GuardedConnection(sent), setting) for twin in TWINS])


@given(test_twins_page.cases(), FILTERS)
@SLOW
def test_the_same_pages(case: test_twins_page.Case, filters: tuple[Given, ...]) -> None:
    relation, lines, setting = case
    setting = replace(setting, filters=filters)
    assert_same(
        [page_outcome(twin, GuardedConnection([relation]), GuardedConnection(lines), setting) for twin in TWINS]
    )


class Pairs(list[tuple[str, object]]):
    """An object as it is written: its keys may come twice."""


KEYS = st.sampled_from(["a", "b", "0", "1", "", "é", 'q"', "a b"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", "a", "é", 'q"', "\\", "1"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(st.tuples(KEYS, inner), max_size=3).map(Pairs)),
    max_leaves=12,
)


@st.composite
def json_texts(draw: st.DrawFn) -> bytes:
    ascii_only = draw(st.booleans())
    blank = draw(st.sampled_from(["", " ", "\n\t"]))

    def written(value: object) -> str:
        if isinstance(value, Pairs):
            members = [f"{json.dumps(k, ensure_ascii=ascii_only)}{blank}:{blank}{written(v)}" for k, v in value]
            return "{" + blank + f"{blank},{blank}".join(members) + blank + "}"
        if isinstance(value, list):
            return "[" + blank + f"{blank},".join(map(written, value)) + blank + "]"
        return json.dumps(value, ensure_ascii=ascii_only)

    text = bytearray(blank + written(draw(VALUES)) + blank, "utf-8")
    if draw(st.integers(0, 3)) == 0 and text:  # what no server sends
        place = draw(st.integers(0, len(text) - 1))
        text[place : place + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b"\x00", b"\xff", b"{", b"]", b'"', b"\\u12", b"1e99999999999999999999", b"-", b"01"])
        )
    return bytes(text)


@given(
    st.lists(json_texts(), min_size=1, max_size=6),
    st.lists(st.one_of(KEYS, st.sampled_from(["-1", "+1", "2"])), min_size=0, max_size=3).map(tuple),
    st.sampled_from(["eq", "ne", "lt", "gte", "is_null", "is_not_null", "like"]),
    st.sampled_from([1, 0.5, "a", "é", "1", True]),
)
@SLOW
def test_the_same_at_paths(texts: list[bytes], path: tuple[str, ...], operator: str, value: object) -> None:
    value = str(value) if operator == "like" else value
    conditions = [If("data", operator, None if operator.startswith("is_") else value, path)]  # type: ignore[arg-type]
    if operator in ("lt", "gte") and value is True:
        return
    relation = frames.relation([("id", 20), ("data", 114)])
    rows = [frames.insert(b"1", text) for text in [*texts, *texts]]
    sent = [bytes(frames.xlog(payload)) for payload in (relation, frames.begin(), *rows, frames.commit())]
    setting = Setting(filters=(Given(tuple(conditions)),))
    assert_same([outcome(twin, GuardedConnection(sent), setting) for twin in TWINS])


def test_nesting_of_any_depth() -> None:
    relation = frames.relation([("id", 20), ("data", 114)])
    depths = (1, 499, 500, 501, 502, 900, 5000)
    texts = [b'{"a":7,"b":' + b"[" * depth + b"]" * depth + b"}" for depth in depths]
    rows = [frames.insert(b"1", text) for text in texts]
    sent = [bytes(frames.xlog(payload)) for payload in (relation, frames.begin(), *rows, frames.commit())]
    setting = Setting(filters=(Given((If("data", "eq", 7, ("a",)),)), Given((If("data", "eq", 8, ("a",)),))))
    assert_same([outcome(twin, GuardedConnection(sent), setting) for twin in TWINS])


MOMENT = st.from_regex(
    r"\A[0-9]{4,5}-(0[0-9]|1[0-3])-([0-2][0-9]|3[0-2])"
    r"( ([01][0-9]|2[0-4]):[0-6][0-9]:[0-6][0-9](\.[0-9]{1,7})?(\+00|\+01)?)?( BC)?\Z"
).map(str.encode)


@given(
    st.lists(MOMENT, min_size=1, max_size=8),
    st.one_of(
        st.datetimes().map(lambda moment: moment.isoformat(" ")),
        st.sampled_from(["294246-12-31", "294276-12-31 23:59:59", "4713-01-01 BC", "infinity"]),
    ),
    st.sampled_from(["eq", "ne", "lt", "lte", "gt", "gte"]),
)
@SLOW
def test_the_same_moments(moments: list[bytes], bound: str, operator: str) -> None:
    condition = If("at", operator, bound)  # type: ignore[arg-type]
    same = If("at", "in", tuple(moment.decode() for moment in moments[:1]))
    relation = frames.relation([("id", 20), ("at", 1184)])
    rows = [frames.insert(b"1", moment) for moment in moments]
    sent = [bytes(frames.xlog(payload)) for payload in (relation, frames.begin(), *rows, frames.commit())]
    setting = Setting(filters=(Given((condition,)), Given((same,))))
    assert_same([outcome(twin, GuardedConnection(sent), setting) for twin in TWINS])


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40),
    st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=3), min_size=1, max_size=40),
    st.sampled_from(["in", "not_in"]),
    st.data(),
)
@SLOW
def test_the_same_of_long_lists(numbers: list[int], texts: list[str], operator: str, data: st.DataObject) -> None:
    """They are searched by bisection."""
    filters = tuple(
        Given((If(column, operator, tuple(values)),))  # type: ignore[arg-type]
        for column, values in (("id", numbers), ("name", texts))
    )
    near = st.sampled_from(numbers).flatmap(lambda n: st.sampled_from([n, max(n - 1, -(2**63)), min(n + 1, 2**63 - 1)]))
    sought = data.draw(st.lists(st.tuples(near, st.sampled_from([*texts, texts[0] + "a", ""])), max_size=8))
    relation = frames.relation([("id", 20), ("name", 25)])
    rows = [frames.insert(str(number).encode(), text.encode()) for number, text in sought]
    sent = [bytes(frames.xlog(payload)) for payload in (relation, frames.begin(), *rows, frames.commit())]
    assert_same([outcome(twin, GuardedConnection(sent), Setting(filters=filters)) for twin in TWINS])

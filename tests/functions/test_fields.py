"""Field operations beside a plain model of them, and what JSON keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.messages import bodies, message, outcomes, python, transform
from spillway.functions import jsontext
from spillway.functions.base import Failure
from spillway.functions.fields import apply
from spillway.functions.spec import FieldOperation, FieldOperations, FunctionSpec, PathExpression

NAMES = ("a", "b", "c", "a_b", "a_b_c")
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3), st.just("***"), st.just([{"b": 1}])
)
values = st.recursive(scalars, lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=3), max_leaves=5)
rows = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)
columns = st.lists(st.sampled_from(NAMES), max_size=3).map(tuple)
operations = st.one_of(
    st.builds(FieldOperation, st.sampled_from(["select", "drop", "mask", "hash", "flatten"]), columns),
    st.builds(
        lambda names: FieldOperation("rename", names=names),
        st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES), max_size=3),
    ),
    st.builds(lambda values: FieldOperation("set", values=values), st.dictionaries(st.sampled_from(NAMES), scalars)),
)


def model(row: dict[str, object], record: dict[str, object], one: FieldOperation) -> dict[str, object]:
    """One operation on the record or, beside it, on its changes, column by column, as its documentation says."""
    found: dict[str, object] = {}
    for name, value in row.items():
        at = name in one.columns
        match one.kind:
            case "select":
                if at:
                    found[name] = value
            case "drop":
                if not at:
                    found[name] = value
            case "mask":
                found[name] = "***" if at and value is not None else value
            case "hash" if at and value is not None:
                text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
                found[name] = sha256(text.encode()).hexdigest()
            case "rename":
                replaced = name not in one.names and any(
                    new == name and old in record for old, new in one.names.items()
                )
                if not replaced:
                    found[one.names.get(name, name)] = value
            case "flatten" if at and isinstance(value, dict):
                for path, leaf in paths(value):
                    if "_".join((name, *path)) not in record:
                        found["_".join((name, *path))] = leaf
            case "set" if row is not record and name in one.values:
                pass  # what has a fixed value has no changes
            case _:
                found[name] = value
    if one.kind == "set" and row is record:
        found.update(one.values)
    return found


def paths(value: dict[str, object]) -> Sequence[tuple[tuple[str, ...], object]]:
    found: list[tuple[tuple[str, ...], object]] = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            found += [((name, *path), leaf) for path, leaf in paths(inner)]
        else:
            found.append(((name,), inner))
    return found


@given(rows, st.one_of(st.none(), rows), st.lists(operations, max_size=4))
def test_operations_are_what_the_model_says(
    record: dict[str, object], changes: dict[str, object] | None, steps: list[FieldOperation]
) -> None:
    expected_record, expected_changes = record, changes
    for step in steps:
        if expected_changes is not None:
            expected_changes = model(expected_changes, expected_record, step)
        expected_record = model(expected_record, expected_record, step)
    whole = {"record": record, "changes": changes, "action": "update", "metadata": {"record_pks": ["1"]}}
    found = apply(steps)(orjson.dumps(whole))
    expected = {**whole, "record": expected_record, "changes": expected_changes}
    assert found == orjson.dumps(expected)  # the order of the columns too


@pytest.mark.parametrize(
    ("step", "record", "changes", "expected"),
    [
        (FieldOperation("set", values={"email": None}), {"email": "new@x"}, {"email": "old@x", "v": 1}, {"v": 1}),
        (FieldOperation("rename", names={"a": "b"}), {"a": 1, "b": 2}, {"b": 1}, {}),
        (FieldOperation("rename", names={"a": "b"}), {"a": 1, "b": 2}, {"a": 0, "b": 1}, {"b": 0}),
        (FieldOperation("rename", names={"a": "b", "b": "a"}), {"a": 1, "b": 2}, {"b": 1}, {"a": 1}),
        (FieldOperation("flatten", ("j",)), {"j": {"x": 2, "y": 3}, "j_x": 9}, {"j": {"x": 1, "y": 2}}, {"j_y": 2}),
    ],
    ids=["set", "rename", "rename both", "swap", "flatten"],
)
def test_changes_are_of_the_columns_that_the_record_has(
    step: FieldOperation, record: dict[str, object], changes: dict[str, object], expected: dict[str, object]
) -> None:
    whole = {"record": record, "changes": changes, "action": "update", "metadata": {}}
    assert orjson.loads(apply([step])(orjson.dumps(whole)))["changes"] == expected


async def test_the_message_keeps_its_form() -> None:
    steps = (FieldOperation("drop", ("secret",)), FieldOperation("set", values={"kind": "job"}))
    one = message(1, action="update", changes={"secret": 1}, secret=2)
    (found,) = await bodies(FunctionSpec(transform=FieldOperations(steps)), one)
    assert found == {**orjson.loads(one), "record": {"id": 1, "kind": "job"}, "changes": {}}
    beside = FunctionSpec(filter=python("def filter(*_):\n    return True\n"), transform=FieldOperations(steps))
    assert await bodies(beside, one) == [found]  # in a worker


BIG = 123456789012345678901234567890


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, -(10**19) + 1, BIG, -BIG])
async def test_integers_keep_every_digit(number: int) -> None:
    one = b'{"record":{"n":%d},"changes":null,"action":"insert","metadata":{}}' % number
    for spec in (
        FunctionSpec(transform=PathExpression("record")),
        transform("return {'n': record['n'] + 1 - 1}"),
    ):
        ((output,),) = await outcomes(spec, one)
        assert output.body == b'{"n":%d}' % number


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=10,
))  # fmt: skip
def test_json_comes_back_as_it_was(value: object) -> None:
    text = jsontext.dumps(value)
    assert b"\n" not in text
    assert jsontext.loads(text) == value
    assert json.loads(text) == value
    assert jsontext.loads(json.dumps(value).encode()) == value


def test_json_that_orjson_does_not_take() -> None:
    half = jsontext.loads(b'{"a":"\\ud800"}')
    assert jsontext.dumps(half) == b'{"a":"\\ud800"}'
    assert jsontext.dumps({2: float("nan"), None: 2**70, True: float("inf")}) == (
        b'{"2":null,"null":1180591620717411303424,"true":null}'
    )
    deep = b"[" * 260 + b"]" * 260
    assert jsontext.dumps(jsontext.loads(deep)) == deep
    with pytest.raises(ValueError, match="beyond what a double holds"):
        jsontext.loads(b"[1e400]")


NUMBERS = b'{"n":1e999,"d":1.10,"long":0.12345678901234567890123,"half":"\\ud800","deep":%b}' % (
    b"[" * 800 + b"]" * 800
)


async def test_not_a_digit_changes_without_python() -> None:
    one = b'{"record":{"id":7,"data":%b},"changes":null,"action":"insert","metadata":{}}' % NUMBERS
    (whole,), (inner,), (flat,) = [
        (await outcomes(FunctionSpec(transform=transform), one))[0]
        for transform in (
            PathExpression("record.data"),
            PathExpression("record.data.long"),
            FieldOperations((FieldOperation("drop", ("id",)), FieldOperation("flatten", ("data",)))),
        )
    ]
    assert whole.body == NUMBERS
    assert inner.body == b"0.12345678901234567890123"
    columns = NUMBERS
    for name in (b"n", b"d", b"long", b"half", b"deep"):
        columns = columns.replace(b'"%b":' % name, b'"data_%b":' % name)
    assert flat.body == b'{"record":%b,"changes":null,"action":"insert","metadata":{}}' % columns


async def test_keys_are_the_same_however_they_are_escaped() -> None:
    data = rb'{"\u0061":2,"b\"":3,"\u0062\"":4}'
    one = b'{"record":{"data_a":1,"data":%b},"changes":null,"action":"insert","metadata":{}}' % data
    spec = FunctionSpec(transform=FieldOperations((FieldOperation("flatten", ("data",)),)))
    ((output,),) = await outcomes(spec, one)
    assert output.body == rb'{"record":{"data_a":1,"data_b\"":4},"changes":null,"action":"insert","metadata":{}}'
    ((output,),) = await outcomes(FunctionSpec(transform=PathExpression("record.data.a")), one)
    assert output.body == b"2"


async def test_data_that_cannot_be_read_fails_alone() -> None:
    spec = transform("return record['n']")
    bad = b'{"record":{"n":1e999},"changes":null,"action":"insert","metadata":{}}'
    good = b'{"record":{"n":1},"changes":null,"action":"insert","metadata":{}}'
    first, failed, last = await outcomes(spec, good, bad, good)
    assert first == last
    assert failed == Failure("transform_failed", "ValueError: the number 1e999 is beyond what a double holds")

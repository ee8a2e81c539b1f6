"""An outbox: what is sent of a row or of an emitted message, and what is it routed by."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from spillway.functions.base import Failure, Outcome, Output
from spillway.functions.outbox import OutboxFunctions
from spillway.sinks.routing import checked


def event(functions: OutboxFunctions, record: dict[str, object], action: str = "insert") -> Outcome:
    changes = None if action in ("insert", "read") else {}
    message = orjson.dumps({"record": record, "changes": changes, "action": action, "metadata": {}})
    (outcome,) = asyncio.run(functions([message], [False]))
    return outcome


def of_table(**routing: str) -> OutboxFunctions:
    return OutboxFunctions("payload", routing, {}, emitted=False)


@pytest.mark.parametrize(
    ("payload", "body"),
    [
        ({"id": 1}, b'{"id":1}'),
        ('{"id":  1.0}', b'{"id":  1.0}'),
        ('{"id":\n1}', b'{"id": 1}'),
        ("plain", b'"plain"'),
        ([1, 2], b"[1,2]"),
        (0, b"0"),
    ],
)
def test_the_payload_is_the_body(payload: object, body: bytes) -> None:
    assert event(of_table(), {"payload": payload}) == (Output(body),)


def test_it_is_routed_by_its_columns() -> None:
    functions = OutboxFunctions("payload", {"endpoint_path": "/{kind}/{id}"}, {"x-type": "{kind}"}, emitted=False)
    outcome = event(functions, {"payload": {}, "kind": "order", "id": 7})
    assert outcome == (Output(b"{}", {"endpoint_path": "/order/7", "headers": {"x-type": "order"}}),)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("../../admin", "/e/..%2F..%2Fadmin"),
        ("a?b#c", "/e/a%3Fb%23c"),
        ("ä b%2e", "/e/%C3%A4%20b%252e"),
        ("a-b_c.d~e", "/e/a-b_c.d~e"),
        (True, "/e/true"),
    ],
)
def test_values_are_never_the_structure_of_a_path(value: object, path: str) -> None:
    functions = OutboxFunctions("payload", {"endpoint_path": "/e/{kind}"}, {"x-kind": "{kind}"}, emitted=False)
    outcome = event(functions, {"payload": {}, "kind": value})
    headers = {"x-kind": value if isinstance(value, str) else "true"}
    assert outcome == (Output(b"{}", {"endpoint_path": path, "headers": headers}),)


def test_what_would_lead_out_of_the_path_is_refused_by_the_sink() -> None:
    functions = OutboxFunctions("payload", {"endpoint_path": "/e/{kind}"}, {}, emitted=False)
    for kind in ("..", ".", "../../admin"):
        outcome = event(functions, {"payload": {}, "kind": kind})
        assert not isinstance(outcome, Failure)
        with pytest.raises(ValueError, match="endpoint_path"):
            checked("webhook", outcome[0].route or {})


@pytest.mark.parametrize("record", [{"payload": {}}, {"payload": {}, "owner": None}])
def test_a_message_without_its_key_fails(record: dict[str, object]) -> None:
    outcome = event(OutboxFunctions("payload", {}, {}, emitted=False, key="owner"), record)
    assert isinstance(outcome, Failure)
    assert outcome.detail == "the key owner is null or not there"


@pytest.mark.parametrize("record", [{"payload": None, "kind": "x"}, {"kind": "x"}, {"payload": {}, "kind": None}])
def test_what_is_missing_fails_the_message(record: dict[str, object]) -> None:
    outcome = event(of_table(endpoint_path="/{kind}"), record)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "outbox_failed"


@pytest.mark.parametrize("action", ["update", "delete"])
def test_only_inserts_are_events(action: str) -> None:
    assert event(of_table(), {"payload": {}}, action) == ()


def test_an_emitted_message() -> None:
    whole = OutboxFunctions(None, {"endpoint_path": "/{kind}"}, {}, emitted=True)
    assert event(whole, {"prefix": "p", "content": {"kind": "x", "data": [1]}}) == (
        Output(b'{"kind":"x","data":[1]}', {"endpoint_path": "/x"}),
    )
    part = OutboxFunctions("data", {}, {}, emitted=True)
    assert event(part, {"prefix": "p", "content": {"kind": "x", "data": [1]}}) == (Output(b"[1]"),)
    failed = event(whole, {"prefix": "p", "content": "no JSON"})
    assert isinstance(failed, Failure)
    assert failed.detail == "column kind is not there: the content is no JSON object"
    text = OutboxFunctions(None, {}, {}, emitted=True)
    assert event(text, {"prefix": "p", "content": "hello"}) == (Output(b'"hello"'),)


@pytest.mark.parametrize(
    "value", [b'{"a":"\\ud800"}', b'"\\ud800"', b"[" * 2000 + b"]" * 2000, b"1e400", b"12345678901234567890123.10"]
)
def test_no_digit_and_no_character_of_a_payload_changes(value: bytes) -> None:
    """json may hold what no parser takes."""
    message = b'{"record":{"id":1,"payload":' + value + b'},"changes":null,"action":"insert","metadata":{}}'
    (outcome,) = asyncio.run(of_table()([message], [False]))
    assert outcome == (Output(value),)


def test_half_a_surrogate_pair_costs_its_message_alone() -> None:
    def message(kind: bytes) -> bytes:
        return b'{"record":{"payload":1,"kind":' + kind + b'},"changes":null,"action":"insert","metadata":{}}'

    functions = of_table(endpoint_path="/{kind}")
    failed, made = asyncio.run(functions([message(b'"\\ud800"'), message(b'"x"')], [False, False]))
    assert isinstance(failed, Failure)
    assert failed.detail == "column kind holds half a surrogate pair, which is no text"
    assert made == (Output(b"1", {"endpoint_path": "/x"}),)


def test_a_name_that_is_no_text_is_none_that_anybody_names() -> None:
    functions = OutboxFunctions("data", {}, {}, emitted=True)
    message = (
        b'{"record":{"prefix":"p","content":{"\\ud800":0,"data":1}},"changes":null,"action":"insert","metadata":{}}'
    )
    assert asyncio.run(functions([message], [False])) == [(Output(b"1"),)]


def test_whatever_a_message_is_the_others_go_on() -> None:
    functions = OutboxFunctions(None, {}, {}, emitted=True)
    no_content = b'{"record":{"prefix":"p"},"changes":null,"action":"insert","metadata":{}}'
    failed, made = asyncio.run(functions([no_content, no_content.replace(b'"p"', b'"p","content":2')], [False] * 2))
    assert isinstance(failed, Failure)
    assert failed.reason == "outbox_failed"
    assert made == (Output(b"2"),)

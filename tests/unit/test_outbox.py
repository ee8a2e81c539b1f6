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
    "value", [b'{"a":"\\ud800"}', b"[" * 2000 + b"]" * 2000, b"1e400", b"12345678901234567890123.10"]
)
def test_no_digit_and_no_character_of_a_payload_changes(value: bytes) -> None:
    """json may hold what no parser takes."""
    message = b'{"record":{"id":1,"payload":' + value + b'},"changes":null,"action":"insert","metadata":{}}'
    (outcome,) = asyncio.run(of_table()([message], [False]))
    assert outcome == (Output(value),)

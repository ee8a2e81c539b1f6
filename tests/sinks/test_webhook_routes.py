"""The webhook sink with routes and with messages that functions have made, against a server on a real socket."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sinks.messages import batch_of, change, context, full, shaped
from sinks.recorder import Recorder, Reply, Request
from spillway.chunk import Batch, Keying, Route
from spillway.sinks.base import OK
from spillway.sinks.webhook import WebhookSink

Make = Callable[..., WebhookSink]


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    async with Recorder() as server:
        yield server


@pytest.fixture
async def make(server: Recorder, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[WebhookSink] = []

    def make(**options: Any) -> WebhookSink:
        made.append(WebhookSink(context(tmp_path), **{"url": server.url, "path": "/all", **options}))
        return made[-1]

    yield make
    for sink in made:
        await sink.close()


def routed(*routes: Route | None) -> Batch:
    """A message per route, whose body is its number."""
    documents = [(change({}, pks=(str(i),), idx=i), i, route) for i, route in enumerate(routes)]
    return shaped(documents, Keying.EVENTS)


def key(position: str) -> str:
    return base64.b64encode(position.encode()).decode()


async def test_what_functions_have_made_is_sent_as_it_is(server: Recorder, make: Make) -> None:
    messages = shaped([(change({}, idx=i), {"made": i}, None) for i in range(2)], Keying.EVENTS)
    assert await make(batch=True).send(messages) == OK
    assert await make(batch=False).send(messages[:1]) == OK
    batch, single = server.requests
    assert batch.raw == b'{"data":[{"made":0},{"made":1}]}'
    assert single.raw == b'{"made":0}'
    assert single.headers["idempotency-key"] == key(f"{0x16B3748}:0")


async def test_every_part_of_a_request_can_be_routed(server: Recorder, make: Make) -> None:
    sink = make(batch=False, headers={"X-Token": "t", "X-Tenant": "none"})
    route = {"method": "PUT", "endpoint_path": "/jobs/1?x=%20y", "headers": {"x-tenant": "7", "x-more": "m"}}
    assert await sink.send(routed(route)) == OK
    assert await sink.send(routed({"headers": {"content-type": "text/plain"}})) == OK
    first, second = server.requests
    assert (first.method, first.target, first.raw) == ("PUT", "/jobs/1?x=%20y", b"0")
    assert [first.headers[name] for name in ("x-token", "x-tenant", "x-more")] == ["t", "7", "m"]
    assert first.headers["content-type"] == "application/json"
    assert (second.method, second.target) == ("POST", "/all")
    assert second.headers["content-type"] == "text/plain"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "OPTIONS", "GET", "HEAD", "DELETE"])
async def test_methods_with_a_body_and_without(server: Recorder, make: Make, method: str) -> None:
    for batch in (False, True):
        sink = make(batch=batch, headers={"Content-Encoding": "gzip"})
        assert await sink.send(routed({"method": method})) == OK
    for request, body in zip(server.requests, (b"0", b'{"data":[0]}'), strict=True):
        assert request.method == method
        if method in ("GET", "HEAD", "DELETE"):
            assert request.raw == b""
            assert not [name for name in request.headers if name.startswith("content-")]
        else:
            assert request.body == body
        assert request.headers["idempotency-key"]


async def test_messages_of_one_route_share_a_request(server: Recorder, make: Make) -> None:
    a, b = {"endpoint_path": "/a"}, {"endpoint_path": "/b", "headers": {"x": "1"}}
    again = {"endpoint_path": "/b", "headers": {"x": "1"}}
    assert await make(batch=True).send(routed(a, b, None, a, again, a, {"endpoint_path": "/b"})) == OK
    sent = [(request.target, json.loads(request.raw)["data"]) for request in server.requests]
    assert sent == [("/a", [0, 3, 5]), ("/b", [1, 4]), ("/all", [2]), ("/b", [6])]
    keys = "\n".join(key(f"{0x16B3748}:{i}") for i in (1, 4))
    assert server.requests[1].headers["idempotency-key"] == hashlib.sha256(keys.encode()).hexdigest()


async def test_requests_without_a_body_are_one_per_message(server: Recorder, make: Make) -> None:
    gone = {"method": "DELETE", "endpoint_path": "/cache"}
    assert await make(batch=True).send(routed(gone, gone)) == OK
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 2


async def test_each_request_has_its_own_answer(server: Recorder, make: Make) -> None:
    statuses = {"/a": 200, "/b": 500, "/c": 422, "/d": 503, "/e": 200}
    server.answer = lambda request: Reply(statuses[request.target])
    results = await make(batch=True).send(routed(*({"endpoint_path": f"/{name}"} for name in "abcaded")))
    assert isinstance(results, list)
    assert [r.reason for r in results] == ["", "http_500", "http_422", "", "http_503", "http_503", "http_503"]
    assert [request.target for request in server.requests] == ["/a", "/b", "/c", "/d"]


async def test_of_a_rejected_request_among_others_the_culprit_is_found(server: Recorder, make: Make) -> None:
    def answer(request: Request) -> Reply:
        return Reply(422 if 5 in json.loads(request.raw)["data"] else 200)

    server.answer = answer
    routes = [{"endpoint_path": "/a"}, *([{"endpoint_path": "/b"}] * 8)]
    results = await make(batch=True).send(routed(*routes))
    assert isinstance(results, list)
    assert [r.outcome for r in results] == ["reject" if i == 5 else "ok" for i in range(9)]


async def test_a_rejected_request_of_all_is_for_the_caller_to_halve(server: Recorder, make: Make) -> None:
    server.answer = lambda _request: Reply(422)
    result = await make(batch=True).send(routed({"endpoint_path": "/a"}, {"endpoint_path": "/a"}))
    assert not isinstance(result, list)
    assert result.reason == "http_422"
    assert len(server.requests) == 1


async def test_singles_stop_when_the_endpoint_is_down(server: Recorder, make: Make) -> None:
    replies = iter([Reply(200), Reply(429, headers={"retry-after": "7"})])
    server.answer = lambda _request: next(replies)
    results = await make(batch=False).send(routed(*([{"endpoint_path": "/a"}] * 4)))
    assert isinstance(results, list)
    assert [r.reason for r in results] == ["", "http_429", "http_429", "http_429"]
    assert results[3].retry_after_seconds == 7


async def test_a_routed_secret_is_not_told_on(server: Recorder, make: Make) -> None:
    server.answer = lambda request: Reply(400, request.headers["authorization"].encode())
    result = await make(batch=False).send(routed({"headers": {"authorization": "s3cret"}}))
    assert "***" in str(result)
    assert "s3cret" not in str(result)


async def test_several_messages_of_one_have_keys_of_their_own(server: Recorder, make: Make) -> None:
    sent = change({}, lsn=7, idx=3)
    read = change({}, action="read", lsn=9, pks=("5",))
    documents: list[Any] = [(sent, 0, None), (sent, 1, None), (read, 2, None), (read, 3, None)]
    sink = make(batch=False)
    for message in shaped(documents, Keying.EVENTS):
        assert await sink.send(Batch.of([message])) == OK
    keys = [request.headers["idempotency-key"] for request in server.requests]
    assert keys == [key("7:3"), key("7:3:1"), key("9:0:public.jobs:5"), key("9:0:public.jobs:5:1")]


async def test_plain_messages_are_sent_as_ever(server: Recorder, make: Make) -> None:
    sent = change({"v": 1})
    assert await make(batch=False, content_type="application/cloudevents+json").send(batch_of([sent])) == OK
    assert json.loads(server.requests[0].raw) == full(sent)
    assert server.requests[0].headers["content-type"] == "application/cloudevents+json"

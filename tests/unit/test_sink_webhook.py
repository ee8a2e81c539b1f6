"""The webhook sink: what it sends, and what each answer means."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from sinks.messages import SUFFIX, batch_of, change, context, full
from sinks.recorder import CERTIFICATE, CUT, HANG, Recorder, Reply
from spillway.chunk import Keying, chunk_of
from spillway.errors import SpillwayError
from spillway.sinks.base import OK, Result
from spillway.sinks.webhook import WebhookSink, idempotency_key, join_url

Make = Callable[..., WebhookSink]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


class FixedClock:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return NOW.timestamp()

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a sink never sleeps")


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    async with Recorder() as server:
        yield server


@pytest.fixture
async def make(server: Recorder, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[WebhookSink] = []

    def make(**options: Any) -> WebhookSink:
        arguments = {"url": server.url, "batch": False, "clock": FixedClock(), **options}
        made.append(WebhookSink(context(tmp_path), **arguments))
        return made[-1]

    yield make
    for sink in made:
        await sink.close()


async def one_result(sink: WebhookSink) -> Result:
    answer = await sink.send(batch_of([change({"v": 1})]))
    return answer if isinstance(answer, Result) else answer[0]


async def test_single_sends_the_message_itself(server: Recorder, make: Make) -> None:
    sent = change({"v": 1}, lsn=100, idx=2)
    sink = make(path="/hook?x=1", headers={"X-Token": "abc", "Content-Type": "application/cdc+json"})
    assert sink.single
    assert await sink.send(batch_of([sent])) == OK
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/hook?x=1")
    assert request.raw == sent.body + SUFFIX
    assert request.headers["x-token"] == "abc"
    assert request.headers["content-type"] == "application/cdc+json"
    assert request.headers["idempotency-key"] == full(sent)["metadata"]["idempotency_key"]


async def test_batch_sends_all_in_one_and_gets_one_answer(server: Recorder, make: Make) -> None:
    batch = [change({"v": i}, pks=(str(i),), idx=i) for i in range(3)]
    sink = make(batch=True)
    assert not sink.single
    assert await sink.send(batch_of(batch)) == OK
    assert await sink.send(batch_of(batch[:1])) == OK
    three, one = server.requests
    assert json.loads(three.raw) == {"data": [full(m) for m in batch]}
    assert json.loads(one.raw) == {"data": [full(batch[0])]}
    assert three.headers["content-type"] == "application/json"
    keys = "\n".join(full(m)["metadata"]["idempotency_key"] for m in batch)
    assert three.headers["idempotency-key"] == hashlib.sha256(keys.encode()).hexdigest()
    server.answer = lambda _request: Reply(422)
    assert (await sink.send(batch_of(batch))) == Result("reject", "http_422", "HTTP 422")


async def test_gzip_where_the_header_says_so(server: Recorder, make: Make) -> None:
    sent = change({"v": "x" * 5000})
    assert await make(headers={"Content-Encoding": "gzip"}).send(batch_of([sent])) == OK
    (request,) = server.requests
    assert json.loads(request.body) == full(sent)
    assert len(request.raw) < 1000


@pytest.mark.parametrize(
    ("url", "path", "joined"),
    [
        ("http://h", "", "http://h"),
        ("http://h/", "", "http://h/"),
        ("http://h", "/a", "http://h/a"),
        ("http://h/", "/a", "http://h/a"),
        ("http://h/b", "/a/", "http://h/b/a/"),
        ("http://h/b/", "?x=1", "http://h/b/?x=1"),
        ("http://h/b", "?x=1", "http://h/b/?x=1"),
        ("http://h/b", "#f", "http://h/b/#f"),
        ("http://h/b?y=2", "/a", "http://h/b?y=2/a"),
    ],
)
def test_urls_are_joined_as_in_sequin(url: str, path: str, joined: str) -> None:
    assert join_url(url, path) == joined


def test_idempotency_keys_of_changes_and_of_backfilled_rows() -> None:
    trap = {"metadata": 1, "idempotency_key": "no"}
    changes = [
        change(trap, action="update", lsn=7, idx=3, changes=trap),
        change(trap, action="read", idempotency_key="cGFnZTox"),
    ]
    chunk = chunk_of(changes)
    assert [idempotency_key(chunk, i) for i in range(2)] == [base64.b64encode(b"7:3"), b"cGFnZTox"]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((status, "ok") for status in (200, 201, 202, 204)),
        *((status, "sink_down") for status in (301, 308, 401, 429, 503)),
        *((status, "retry") for status in (408, 500, 501, 502, 504, 507)),
        *((status, "reject") for status in (400, 403, 404, 405, 409, 410, 413, 422)),
    ],
)
async def test_answers(server: Recorder, make: Make, status: int, outcome: str) -> None:
    server.answer = lambda _request: Reply(status)
    result = await one_result(make())
    assert (result.outcome, result.reason) == (outcome, "" if outcome == "ok" else f"http_{status}")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("30", 30.0),
        (format_datetime(NOW.replace(minute=2), usegmt=True), 120.0),
        (format_datetime(NOW.replace(hour=11), usegmt=True), 0.0),
        ("soon", None),
        ("", None),
        ("-5", None),
    ],
)
async def test_retry_after(server: Recorder, make: Make, header: str, seconds: float | None) -> None:
    server.answer = lambda _request: Reply(503, headers={"retry-after": header})
    assert (await one_result(make())).retry_after_seconds == seconds


async def test_a_cut_connection_is_the_messages_failure_and_a_timeout_the_sinks(server: Recorder, make: Make) -> None:
    server.answer = lambda _request: CUT
    result = await one_result(make())
    assert (result.outcome, result.reason) == ("retry", "connection_cut")
    server.answer = lambda _request: HANG
    result = await one_result(make(timeout_seconds=0.2))
    assert (result.outcome, result.reason, result.detail) == ("sink_down", "timeout", "no answer within 0.2 s")


async def test_no_connection_is_the_sinks_failure(server: Recorder, make: Make, unused_port: int) -> None:
    result = await one_result(make(url=f"http://127.0.0.1:{unused_port}"))
    assert (result.outcome, result.reason) == ("sink_down", "connection_refused")
    result = await one_result(make(url="http://nowhere.invalid"))
    assert (result.outcome, result.reason) == ("sink_down", "name_not_resolved")


async def test_certificates_are_verified(make: Make, tmp_path: Path) -> None:
    """The server's is signed by itself: only who was given it as a CA file talks to it."""
    async with Recorder(tls=True) as server:
        result = await one_result(make(url=server.url))
        assert (result.outcome, result.reason) == ("sink_down", "tls_failed")
        assert await one_result(make(url=server.url, ca_file=CERTIFICATE)) == OK
        with pytest.raises(SpillwayError) as raised:
            await make(url=server.url, ca_file=tmp_path / "none.pem").open()
        assert raised.value.code == "ca_file"


async def test_without_batches_of_one_the_first_failure_of_the_sink_ends_it(server: Recorder, make: Make) -> None:
    replies = iter([Reply(200), Reply(422), Reply(503)])
    server.answer = lambda _request: next(replies)
    results = await make().send(batch_of([change({"v": i}, idx=i) for i in range(4)]))
    assert isinstance(results, list)
    assert [r.reason for r in results] == ["", "http_422", "http_503", "http_503"]


async def test_redirects_are_not_followed(server: Recorder, make: Make) -> None:
    server.answer = lambda _request: Reply(302, headers={"location": "/elsewhere"})
    assert "/elsewhere" in (await one_result(make())).detail
    assert len(server.requests) == 1


async def test_an_echo_of_a_header_is_not_told_on(server: Recorder, make: Make) -> None:
    server.answer = lambda _request: Reply(400, b"bad token s3cret for application/json")
    headers = {"Authorization": "s3cret", "Content-Type": "application/json"}
    result = await one_result(make(headers=headers))
    assert result.detail == "HTTP 400 bad token *** for application/json"


async def test_a_long_answer_is_not_read_to_its_end(server: Recorder, make: Make) -> None:
    server.answer = lambda _request: Reply(400, b"x" * (8 << 20))
    result = await one_result(make())
    assert result.outcome == "reject"
    assert len(result.detail) < 400


async def test_a_key_change_is_one_message(server: Recorder, make: Make) -> None:
    moved = change({"id": 2}, action="update", pks=("2",), was=("1",))
    assert await make().send(batch_of([moved], Keying.EVENTS)) == OK
    assert json.loads(server.requests[0].raw)["record"] == {"id": 2}


def test_what_cannot_be_a_request_is_said_before_the_first(tmp_path: Path) -> None:
    for url in ("ftp://h/", "http://", "no url", "http://[::1"):
        with pytest.raises(SpillwayError) as raised:
            WebhookSink(context(tmp_path), url=url)
        assert raised.value.code == "url"
    for value in ("sécret", "s\ncret", "s\0cret"):
        with pytest.raises(SpillwayError, match="header X-A") as raised:
            WebhookSink(context(tmp_path), url="http://h", headers={"X-A": value})
        assert "cret" not in str(raised.value)


async def test_headers_that_say_the_length_are_ours(server: Recorder, make: Make) -> None:
    assert (await one_result(make(headers={"Content-Length": "1", "Transfer-Encoding": "chunked"}))) == OK

"""What the sinks that speak HTTP stand on: connections kept, dropped and made through proxies; on both loops."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sinks.recorder import CERTIFICATE, CUT, Recorder, Reply
from spillway.clock import SystemClock
from spillway.errors import SpillwayError
from spillway.sinks.http import PIECE_BYTES, SMALL_BYTES, Answer, Body, Failure, Http, parse_url

Make = Callable[..., Http]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    async with Recorder() as server:
        yield server


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Http] = []

    def make(url: str, *, ca_file: Path | None = None, timeout_seconds: float = 20) -> Http:
        http = Http(
            parse_url("url", url), connections=4, timeout_seconds=timeout_seconds, ca_file=ca_file, clock=SystemClock()
        )
        made.append(http)
        return http

    yield make
    for http in made:
        await http.close()
        await http.close()


async def post(http: Http, url: str, *parts: bytes, gzip: bool = False) -> Answer | Failure:
    return await http.request("POST", parse_url("url", url), {"x-a": "b"}, Body(iter(parts)), gzip=gzip)


SIZES = [0, 1, SMALL_BYTES - 1, SMALL_BYTES, 1, 1, PIECE_BYTES, 5 * PIECE_BYTES + 1, 3]


@pytest.mark.parametrize("gzip", [False, True])
async def test_parts_of_every_size_arrive_as_one_body(server: Recorder, make: Make, gzip: bool) -> None:
    parts = [bytes([65 + at]) * size for at, size in enumerate(SIZES)]
    http = make(server.url)
    for _ in range(3):
        answer = await post(http, f"{server.url}/a?b=c", *parts, gzip=gzip)
        assert isinstance(answer, Answer)
        assert answer.status == 200
    assert {request.body for request in server.requests} == {b"".join(parts)}
    assert {request.target for request in server.requests} == {"/a?b=c"}
    assert server.requests[0].headers["host"] == f"127.0.0.1:{server.port}"
    assert server.connections == 1


async def test_as_many_connections_as_are_needed_at_once(server: Recorder, make: Make) -> None:
    http = make(server.url)
    for _ in range(5):
        await asyncio.gather(*[post(http, server.url, b"x") for _ in range(20)])
    assert server.connections <= 4


async def test_tls(make: Make) -> None:
    async with Recorder(tls=True) as server:
        http = make(server.url, ca_file=CERTIFICATE)
        for _ in range(3):
            answer = await post(http, server.url, b"x" * 3_000_000)
            assert isinstance(answer, Answer)
            assert answer.status == 200
        assert server.connections == 1
        refused = await post(make(server.url), server.url, b"x")
        assert isinstance(refused, Failure)
        assert (refused.kind, refused.reason) == ("unsent", "tls_failed")
        await http.close()


async def test_a_connection_that_was_closed_meanwhile_is_not_used(server: Recorder, make: Make) -> None:
    http = make(server.url)
    for _ in range(3):
        assert isinstance(await post(http, server.url, b"x"), Answer)
        await server.stop()
        await server.start()
    server.answer = lambda _request: CUT
    cut = await post(http, server.url, b"x")
    assert isinstance(cut, Failure)
    assert (cut.kind, cut.reason) == ("cut", "connection_cut")


class Wire:
    """A server of single bytes: says what it is told to whatever comes."""

    def __init__(self, says: bytes, *, reads: bool = True) -> None:
        self.says = says
        self.reads = reads
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.says)
        if not self.says:
            writer.close()


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("says", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", 200, b"abc"),
        (b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na", 200, b"a"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 500 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", 500, b""),
    ],
)
async def test_answers_of_every_form(make: Make, says: bytes, status: int, body: bytes) -> None:
    async with Wire(says) as url:
        answer = await post(make(url), url, b"x")
        assert isinstance(answer, Answer)
        assert (answer.status, answer.body, answer.whole) == (status, body, True)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n\r\n"])
async def test_what_is_no_answer(make: Make, says: bytes) -> None:
    async with Wire(says) as url:
        failure = await post(make(url), url, b"x")
        assert isinstance(failure, Failure)
        assert failure.kind == "cut"


async def test_an_answer_that_nobody_asked_for_is_nobodys(make: Make) -> None:
    wire = Wire(OK + OK)
    async with wire as url:
        http = make(url)
        for _ in range(3):
            answer = await post(http, url, b"x")
            assert isinstance(answer, Answer)
        assert wire.connections == 3


async def test_an_answer_before_the_body_has_gone_ends_the_sending(make: Make) -> None:
    says = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n"
    wire = Wire(says)  # reads no more than a head: the socket is full long before the end
    async with wire as url:
        http = make(url)
        for count in (1, 2):
            answer = await post(http, url, *[b"x" * PIECE_BYTES] * 64)
            assert isinstance(answer, Answer)
            assert answer.status == 413
            assert wire.connections == count


# -- proxies ----------------------------------------------------------------------------------------------------------


class Tunnel:
    """A proxy that connects, and notes what it was asked."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self.heads: list[str] = []
        self._answer = answer

    async def __aenter__(self) -> Tunnel:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        host, _, port = head.split(" ")[1].rpartition(":")
        writer.write(self._answer)
        if b" 200 " not in self._answer:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


TOKEN = "Basic " + base64.b64encode(b"me:p@ss").decode()


async def test_tls_goes_through_a_proxy_by_connect(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Recorder(tls=True) as server, Tunnel() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@{proxy.address}")
        http = make(server.url, ca_file=CERTIFICATE)
        for _ in range(2):
            answer = await post(http, f"{server.url}/a", b"x" * 2_000_000)
            assert isinstance(answer, Answer)
            assert answer.status == 200
        (head,) = proxy.heads
        assert head.startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n")
        assert f"proxy-authorization: {TOKEN}\r\n" in head
        assert "proxy-authorization" not in server.requests[0].headers
        assert server.requests[0].target == "/a"
        untrusted = await post(make(server.url), server.url, b"x")
        assert isinstance(untrusted, Failure)
        assert untrusted.reason == "tls_failed"
        await http.close()


async def test_a_proxy_that_refuses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Tunnel(b"HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.address)
        failure = await post(make("https://127.0.0.1:1"), "https://127.0.0.1:1", b"x")
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.reason) == ("unsent", "connect_failed")
        assert "407" in failure.detail


async def test_without_tls_a_proxy_is_told_the_whole_url(
    server: Recorder, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://me:p%40ss@127.0.0.1:{server.port}")
    answer = await post(make("http://far.invalid:81"), "http://far.invalid:81/a?b", b"x")
    assert isinstance(answer, Answer)
    (request,) = server.requests
    assert request.target == "http://far.invalid:81/a?b"
    assert (request.headers["host"], request.headers["proxy-authorization"]) == ("far.invalid:81", TOKEN)


async def test_what_needs_no_proxy_has_none(server: Recorder, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    assert isinstance(await post(make(server.url), server.url, b"x"), Answer)


@pytest.mark.parametrize("value", ["socks5://h:1", "https://h:1", "http://h:x", "http://"])
async def test_a_proxy_of_another_kind_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(SpillwayError, match="NO_PROXY") as raised:
        make("http://h").open()
    assert raised.value.code == "proxy"


async def test_json_is_whole_after_a_long_answer(server: Recorder, make: Make) -> None:
    long = json.dumps(["x" * 100] * 10_000).encode()
    server.answer = lambda _request: Reply(200, long)
    url = parse_url("url", server.url)
    http = make(server.url)
    whole = await http.request("GET", url, {}, max_answer_bytes=len(long))
    part = await http.request("GET", url, {}, max_answer_bytes=len(long) - 1)
    assert isinstance(whole, Answer)
    assert isinstance(part, Answer)
    assert (whole.body, whole.whole) == (long, True)
    assert (part.body, part.whole) == (long[:-1], False)
    assert server.connections == 1
    await http.request("GET", url, {})
    assert server.connections == 2

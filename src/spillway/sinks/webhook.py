"""A webhook: each message, or each batch of messages, is one request, a POST unless a route says something else.

**Semantics ``events``.** With ``batch`` off a request carries one message, the JSON object itself, and a caller should
form batches of one (``single``); with ``batch`` on it carries ``{"data": [...]}`` and its answer counts for all of it,
as in Sequin. Bodies are slices of the rendered changes: nothing is rendered again.

**The URL** is made as Sequin makes it: the endpoint's URL and the path of the sink, joined by exactly one slash. The
headers of the endpoint go along; ``content-encoding: gzip`` among them has the body compressed.

**Routes** (`spillway.sinks.routing`) may give a message another method, another path instead of the sink's, and headers
over the endpoint's. Messages of a batch with the same route share a request; the requests follow each other in the
order of their first messages, and each has its own answer: one that is rejected is halved here. ``GET``, ``HEAD`` and
``DELETE`` carry no body, and so one message each.

**Idempotency-Key.** A request that comes again carries the same key. For one message it is the message's own
``metadata.idempotency_key``, with a number behind it for the second and further ones that functions have made of it;
for a batch the SHA-256 of those of its members.

**Answers.** 2xx is ok. What says that the endpoint as a whole does not take requests now is the sink's failure: no
connection, a time-out, 401, 429, 503, and a redirect, which is not followed. 408, the other 5xx and a connection cut
after the request was sent are retried, each counted on its message: a single message that makes its receiver stumble
must not hold up the others. The other 4xx reject; of a batch, as a whole, and the caller halves it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import cast

import httpx

from spillway.change import ACTIONS, RECORD_START
from spillway.chunk import ACTION, INDEX, LOW, LSN, Batch, Chunk, Route
from spillway.clock import Clock, SystemClock
from spillway.errors import SpillwayError
from spillway.sinks.base import OK, Result, Semantics, SinkContext, reject, retry, sink_down
from spillway.sinks.encode import array, array_bytes, nth, runs
from spillway.sinks.http import Body, Failure, Http, Method, parse_url

_ENDPOINT_DOWN = (401, 429, 503)
_DETAIL_CHARACTERS = 300
_KEY_NAME = b'"idempotency_key":"'
_WITHOUT_BODY = ("GET", "HEAD", "DELETE")
_READ = ACTIONS.index("read")


@dataclass(frozen=True, slots=True)
class _Target:
    method: Method
    url: httpx.URL
    headers: dict[str, str]

    @property
    def gzip(self) -> bool:
        return self.headers.get("content-encoding", "").strip().lower() == "gzip"

    def public(self, text: str) -> str:
        """An endpoint may well echo what it was sent."""
        for name, value in self.headers.items():
            if value and not _is_public(name):
                text = text.replace(value, "***")
        return text


class WebhookSink:
    semantics: Semantics = "events"
    max_in_flight = 8

    def __init__(
        self,
        context: SinkContext,
        *,
        url: str,
        path: str = "",
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        batch: bool = True,
        timeout_seconds: float = 30.0,
        ca_file: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.single = not batch
        self._suffix = context.suffix
        self._endpoint = url
        self._target = _Target(
            "POST",
            parse_url("the http_endpoint's url", join_url(url, path)),
            {"content-type": content_type, **_headers(headers or {})},
        )
        self._http = Http(
            self._target.url,
            connections=self.max_in_flight,
            timeout_seconds=timeout_seconds,
            ca_file=ca_file and context.base_dir / ca_file,
            clock=clock or SystemClock(),
        )

    async def open(self) -> None:
        self._http.open()

    async def close(self) -> None:
        await self._http.close()

    async def send(self, batch: Batch) -> Sequence[Result] | Result:
        if any(span.chunk.routes is not None for span, _, _ in batch.pieces):
            return await self._send_routed(batch)
        if not self.single:
            return await self._request(self._target, batch)
        results: list[Result] = []
        for chunk, index in _changes(batch):
            body = Body((chunk.body(index), b"" if chunk.complete else self._suffix))
            result = await self._ask(self._target, body, idempotency_key(chunk, index).decode())
            results.append(result)
            if result.outcome == "sink_down":
                results += [result] * (len(batch) - len(results))
                break
        return results if any(result is not OK for result in results) else OK

    async def _send_routed(self, batch: Batch) -> Sequence[Result] | Result:
        """Each request after the one before; what is left when the endpoint is down is not asked for."""
        results: list[Result] = [OK] * len(batch)
        requests = self._requests(batch, results)
        if len(requests) == 1 and len(requests[0][1]) == len(batch):
            return await self._request(requests[0][0], batch)
        for at, (target, places) in enumerate(requests):
            answers = await self._halved(target, Batch.of([batch[place] for place in places]))
            for place, result in zip(places, answers, strict=True):
                results[place] = result
            if answers[-1].outcome == "sink_down":
                for _, left in requests[at + 1 :]:
                    for place in left:
                        results[place] = answers[-1]
                break
        return results if any(result is not OK for result in results) else OK

    def _requests(self, batch: Batch, results: list[Result]) -> list[tuple[_Target, list[int]]]:
        """Where to, and the places of the messages that go there together. Notes what cannot go anywhere."""
        found: dict[tuple[object, ...], tuple[_Target, list[int]]] = {}
        for place, (chunk, index) in enumerate(_changes(batch)):
            route = chunk.route(index)
            headers = cast("Mapping[str, str]", route.get("headers", {}))
            alone = self.single or route.get("method") in _WITHOUT_BODY
            same = (route.get("method"), route.get("endpoint_path"), *sorted(headers.items()), place if alone else None)
            if same in found:
                found[same][1].append(place)
                continue
            try:
                found[same] = (self._routed(route), [place])
            except SpillwayError as error:
                results[place] = reject("endpoint_path", str(error))
        return list(found.values())

    def _routed(self, route: Route) -> _Target:
        url = self._target.url
        if "endpoint_path" in route:
            url = parse_url(
                "the http_endpoint's url with endpoint_path", join_url(self._endpoint, str(route["endpoint_path"]))
            )
        headers = {**self._target.headers, **cast("Mapping[str, str]", route.get("headers", {}))}
        return _Target(cast(Method, route.get("method", "POST")), url, headers)

    async def _halved(self, target: _Target, batch: Batch) -> list[Result]:
        """One result per message. For whoever asks for one batch in several requests: only he knows what went where."""
        result = await self._request(target, batch)
        if result.outcome != "reject" or len(batch) == 1:
            return [result] * len(batch)
        half = len(batch) // 2
        results = await self._halved(target, batch[:half])
        if results[-1].outcome == "sink_down":
            return results + [results[-1]] * (len(batch) - half)
        return results + await self._halved(target, batch[half:])

    async def _request(self, target: _Target, batch: Batch) -> Result:
        """All of these in one."""
        suffix = b"" if batch.complete else self._suffix
        if self.single or target.method in _WITHOUT_BODY:
            ((chunk, index),) = _changes(batch)
            return await self._ask(target, Body((chunk.body(index), suffix)), idempotency_key(chunk, index).decode())
        return await self._ask(target, Body(array(runs(batch), suffix), array_bytes(batch, suffix)), _batch_key(batch))

    async def _ask(self, target: _Target, body: Body, key: str) -> Result:
        headers = target.headers | {"idempotency-key": key}
        if target.method in _WITHOUT_BODY:
            headers = {name: value for name, value in headers.items() if not name.startswith("content-")}
            answer = await self._http.request(target.method, target.url, headers)
        else:
            answer = await self._http.request(target.method, target.url, headers, body, gzip=target.gzip)
        if isinstance(answer, Failure):
            return (retry if answer.kind == "cut" else sink_down)(answer.reason, answer.detail)
        status = answer.status
        if 200 <= status < 300:
            return OK
        reason = f"http_{status}"
        detail = f"HTTP {status} {target.public(answer.text)[:_DETAIL_CHARACTERS]}".strip()
        if status in _ENDPOINT_DOWN:
            return sink_down(reason, detail, answer.retry_after_seconds)
        if status < 400:
            return sink_down(reason, f"HTTP {status}: redirects are not followed; it leads to {answer.location}")
        if status == 408 or status >= 500:
            return retry(reason, detail)
        return reject(reason, detail)


def join_url(url: str, path: str) -> str:
    """As Sequin (its HTTP client Req) joins them: by exactly one slash, also before ``?`` and ``#``."""
    if not path:
        return url
    return url.removesuffix("/") + "/" + path.removeprefix("/")


def idempotency_key(chunk: Chunk, index: int) -> bytes:
    """``metadata.idempotency_key`` of the message. For changes it follows from the position; that of a backfilled row
    is read from the body, where its ``changes`` are null and the metadata, names and strings first, follows. Where the
    body is what functions have made, it is one of the row's place and key."""
    position = chunk.word(index, INDEX)
    if chunk.complete:
        number = nth(chunk, index)
        more = b":%d" % number if number else b""
        if chunk.byte(index, ACTION) == _READ:
            more = b":" + chunk.key_texts(index)[0] + more
        return base64.b64encode(b"%d:%d%b" % (chunk.word(index, LSN), position & LOW, more))
    if chunk.byte(index, ACTION) != _READ:
        return base64.b64encode(b"%d:%d" % (chunk.word(index, LSN), position & LOW))
    body = chunk.body(index)
    start = body.index(_KEY_NAME, RECORD_START + (position >> 32)) + len(_KEY_NAME)
    return body[start : body.index(b'"', start)]


def _batch_key(batch: Batch) -> str:
    return sha256(b"\n".join([idempotency_key(chunk, index) for chunk, index in _changes(batch)])).hexdigest()


def _changes(batch: Batch) -> Iterator[tuple[Chunk, int]]:
    return ((span.chunk, index) for span, start, stop in batch.pieces for index in span.indices[start:stop])


def _headers(configured: Mapping[str, str]) -> dict[str, str]:
    """The endpoint's headers."""
    headers: dict[str, str] = {}
    for name, value in configured.items():
        if not value.isascii() or not value.replace("\t", " ").isprintable():
            raise SpillwayError("http_header", f"the value of header {name} holds characters that no header may hold")
        headers[name.lower()] = value.strip()
    for name in ("content-length", "transfer-encoding"):
        headers.pop(name, None)  # they are said by the one who sends
    return headers


def _is_public(name: str) -> bool:
    """Headers that say what the body is. Every other may be a token."""
    return name.lower().startswith(("content-", "accept"))

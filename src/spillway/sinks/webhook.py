"""A webhook: each message, or each batch of messages, is one POST.

**Semantics ``events``.** With ``batch`` off a request carries one message, the JSON object itself, and a caller should
form batches of one (``single``); with ``batch`` on it carries ``{"data": [...]}`` and its answer counts for all of it,
as in Sequin. Bodies are slices of the rendered changes: nothing is rendered again.

**The URL** is made as Sequin makes it: the endpoint's URL and the path of the sink, joined by exactly one slash. The
headers of the endpoint go along; ``content-encoding: gzip`` among them has the body compressed.

**Idempotency-Key.** A request that comes again carries the same key. For one message it is the message's own
``metadata.idempotency_key``; for a batch the SHA-256 of those of its members.

**Answers.** 2xx is ok. What says that the endpoint as a whole does not take requests now is the sink's failure: no
connection, a time-out, 401, 429, 503, and a redirect, which is not followed. 408, the other 5xx and a connection cut
after the request was sent are retried, each counted on its message: a single message that makes its receiver stumble
must not hold up the others. The other 4xx reject; of a batch, as a whole, and the caller halves it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from spillway.change import ACTIONS, RECORD_START
from spillway.chunk import ACTION, INDEX, LOW, LSN, Batch, Chunk
from spillway.clock import Clock, SystemClock
from spillway.errors import SpillwayError
from spillway.sinks.base import OK, Result, Semantics, SinkContext, reject, retry, sink_down
from spillway.sinks.encode import array, array_bytes, runs
from spillway.sinks.http import Body, Failure, Http, parse_url

_ENDPOINT_DOWN = (401, 429, 503)
_DETAIL_CHARACTERS = 300
_KEY_NAME = b'"idempotency_key":"'
_READ = ACTIONS.index("read")


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
        batch: bool = True,
        timeout_seconds: float = 30.0,
        ca_file: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.single = not batch
        self._suffix = context.suffix
        self._url = parse_url("the http_endpoint's url", join_url(url, path))
        self._headers = _headers(headers or {})
        self._secrets = [value for name, value in self._headers.items() if value and not _is_public(name)]
        self._gzip = self._headers.get("content-encoding", "").strip().lower() == "gzip"
        self._http = Http(
            self._url,
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
        if not self.single:
            body = Body(array(runs(batch), self._suffix), array_bytes(batch, self._suffix))
            return await self._post(body, _batch_key(batch))
        results: list[Result] = []
        for chunk, index in _changes(batch):
            body = Body((chunk.body(index), self._suffix))
            result = await self._post(body, idempotency_key(chunk, index).decode())
            results.append(result)
            if result.outcome == "sink_down":
                results += [result] * (len(batch) - len(results))
                break
        return results if any(result is not OK for result in results) else OK

    async def _post(self, body: Body, key: str) -> Result:
        headers = self._headers | {"idempotency-key": key}
        answer = await self._http.request("POST", self._url, headers, body, gzip=self._gzip)
        if isinstance(answer, Failure):
            return (retry if answer.kind == "cut" else sink_down)(answer.reason, answer.detail)
        status = answer.status
        if 200 <= status < 300:
            return OK
        reason = f"http_{status}"
        detail = f"HTTP {status} {self._public(answer.text)[:_DETAIL_CHARACTERS]}".strip()
        if status in _ENDPOINT_DOWN:
            return sink_down(reason, detail, answer.retry_after_seconds)
        if status < 400:
            return sink_down(reason, f"HTTP {status}: redirects are not followed; it leads to {answer.location}")
        if status == 408 or status >= 500:
            return retry(reason, detail)
        return reject(reason, detail)

    def _public(self, text: str) -> str:
        """An endpoint may well echo what it was sent."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def join_url(url: str, path: str) -> str:
    """As Sequin (its HTTP client Req) joins them: by exactly one slash, also before ``?`` and ``#``."""
    if not path:
        return url
    return url.removesuffix("/") + "/" + path.removeprefix("/")


def idempotency_key(chunk: Chunk, index: int) -> bytes:
    """``metadata.idempotency_key`` of the message. For changes it follows from the position; that of a backfilled row
    is read from the body, where its ``changes`` are null and the metadata, names and strings first, follows."""
    position = chunk.word(index, INDEX)
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
    """The endpoint's headers, over ours."""
    headers = {"content-type": "application/json"}
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

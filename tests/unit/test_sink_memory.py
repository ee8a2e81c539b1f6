"""What a batch costs in memory beyond its messages: nothing that grows with it, or one copy (bulk requests). So it does
when functions have made the messages, and each is sent by itself."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sinks.messages import batch_of, change, context, shaped
from spillway.chunk import Batch
from spillway.sinks.base import OK, Result, Sink
from spillway.sinks.file import FileSink
from spillway.sinks.search import SearchSink
from spillway.sinks.webhook import WebhookSink

MESSAGES = 16
MESSAGE_BYTES = 2 << 20
BATCH_BYTES = MESSAGES * MESSAGE_BYTES
# Not to be compressed: an upper bound for gzip.
DOCUMENTS = [{"id": i, "text": os.urandom(MESSAGE_BYTES // 2).hex()} for i in range(MESSAGES)]
BATCH = batch_of([change(document, pks=(str(i),)) for i, document in enumerate(DOCUMENTS)])
SLACK_BYTES = 3 * MESSAGE_BYTES + (2 << 20)  # the message that is made, and what is on its way to the socket


@pytest.fixture
async def drain_url() -> AsyncIterator[str]:
    """A server that reads requests away, keeps nothing of them and finds everything well."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.lower().split(b": ") for line in head.split(b"\r\n")[1:-2])
                left = int(fields.get(b"content-length", b"0"))
                while left:
                    left -= len(await reader.read(min(left, 65536)))
                body = b"" if head.startswith(b"HEAD") else b'{"errors":false}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def peak_bytes(sink: Sink, batch: Batch = BATCH) -> int:
    await sink.open()
    await sink.send(batch[:1])  # imports, caches, connections
    tracemalloc.start()
    try:
        answer = await sink.send(batch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        await sink.close()
    assert (answer if isinstance(answer, Result) else set(answer)) in (OK, {OK})
    return peak


@pytest.mark.parametrize("document", ["record", "message"])
@pytest.mark.parametrize("gzip", [False, True])
async def test_a_bulk_request_is_one_copy(drain_url: str, tmp_path: Path, document: str, gzip: bool) -> None:
    sink = SearchSink(context(tmp_path), endpoint_url=drain_url, index_name="jobs", document=document, gzip=gzip)
    assert await peak_bytes(sink) < BATCH_BYTES + SLACK_BYTES


async def test_a_webhooks_request_is_not_a_copy(drain_url: str, tmp_path: Path) -> None:
    assert await peak_bytes(WebhookSink(context(tmp_path), url=drain_url)) < SLACK_BYTES


async def test_nor_are_the_lines_of_a_file(tmp_path: Path) -> None:
    assert await peak_bytes(FileSink(context(tmp_path), path="out")) < SLACK_BYTES


def routed(route: dict[str, object]) -> Batch:
    return shaped([(change({}, pks=(str(i),), idx=i), document, route) for i, document in enumerate(DOCUMENTS)])


async def test_routed_documents_are_one_copy(drain_url: str, tmp_path: Path) -> None:
    sink = SearchSink(context(tmp_path), endpoint_url=drain_url, index_name="jobs", document="record")
    assert await peak_bytes(sink, routed({"index_name": "other"})) < BATCH_BYTES + SLACK_BYTES


async def test_a_routed_request_is_not_a_copy(drain_url: str, tmp_path: Path) -> None:
    sink = WebhookSink(context(tmp_path), url=drain_url)
    assert await peak_bytes(sink, routed({"endpoint_path": "/x"})) < SLACK_BYTES

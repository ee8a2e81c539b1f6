"""What a batch that is sent message by message costs in memory beyond its messages: one copy."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sinks.messages import change, context, shaped
from spillway.sinks.base import OK, Sink
from spillway.sinks.search import SearchSink
from spillway.sinks.webhook import WebhookSink

MESSAGES = 16
MESSAGE_BYTES = 1 << 20
SLACK_BYTES = 3 * MESSAGE_BYTES + (2 << 20)
DOCUMENTS = [
    (change({}, pks=(str(i),), idx=i), {"text": os.urandom(MESSAGE_BYTES // 2).hex()}, {}) for i in range(MESSAGES)
]


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


async def peak_bytes(sink: Sink, route: dict[str, object]) -> int:
    batch = shaped([(one, body, route) for one, body, _ in DOCUMENTS])
    await sink.open()
    await sink.send(batch[:1])  # imports, caches, connections
    tracemalloc.start()
    try:
        assert await sink.send(batch) == OK
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        await sink.close()
    return peak


async def test_routed_documents_are_one_copy(drain_url: str, tmp_path: Path) -> None:
    sink = SearchSink(context(tmp_path), endpoint_url=drain_url, index_name="jobs", document="record")
    assert await peak_bytes(sink, {"index_name": "other"}) < MESSAGES * MESSAGE_BYTES + SLACK_BYTES


async def test_a_routed_request_is_not_a_copy(drain_url: str, tmp_path: Path) -> None:
    assert await peak_bytes(WebhookSink(context(tmp_path), url=drain_url), {"endpoint_path": "/x"}) < SLACK_BYTES

"""Every sink does what `conformance` asks: on a real OpenSearch, real sockets, real files."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from servers.opensearch import OpenSearch
from sinks.conformance import Conformance, Rig
from sinks.messages import context
from sinks.recorder import Recorder
from spillway.sinks.file import FileSink
from spillway.sinks.search import SearchSink
from spillway.sinks.sqlite import SqliteSink
from spillway.sinks.stdout import StdoutSink
from spillway.sinks.webhook import WebhookSink


def by_key(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {one["metadata"]["record_pks"][0]: one["record"] for one in messages}


class SearchRig(Rig):
    def __init__(self, server: OpenSearch, folder: Path, gzip: bool) -> None:
        self._server = server
        self._index = f"conformance-{uuid4().hex}"
        self.sink = SearchSink(
            context(folder),
            endpoint_url=server.url,
            index_name=self._index,
            document="record",
            timeout_seconds=30,
            gzip=gzip,
        )

    async def received(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self._server.url, trust_env=False, timeout=30) as client:
            await client.post(f"/{self._index}/_refresh")
            found = (await client.get(f"/{self._index}/_search?size=2000")).json()
        return {hit["_id"]: hit["_source"] for hit in found["hits"]["hits"]}

    async def break_down(self) -> None:
        self._server.suspend()
        self.sink._http._timeout_seconds = 0.3

    async def mend(self) -> None:
        self._server.resume()
        self.sink._http._timeout_seconds = 30


@pytest.mark.parametrize("gzip", [False, True], ids=["plain", "gzip"])
class TestSearch(Conformance):
    @pytest.fixture
    async def rig(self, opensearch: OpenSearch, tmp_path: Path, gzip: bool) -> AsyncIterator[Rig]:
        rig = SearchRig(opensearch, tmp_path, gzip)
        yield rig
        await rig.sink.close()


class WebhookRig(Rig):
    def __init__(self, server: Recorder, folder: Path, batch: bool) -> None:
        self._server = server
        self._batch = batch
        self.sink = WebhookSink(context(folder), url=server.url, path="/hook", batch=batch, timeout_seconds=20)

    async def received(self) -> dict[str, Any]:
        bodies = [json.loads(request.body) for request in self._server.requests]
        return by_key([one for body in bodies for one in body["data"]] if self._batch else bodies)

    async def break_down(self) -> None:
        await self._server.stop()

    async def mend(self) -> None:
        await self._server.start()


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
class TestWebhook(Conformance):
    @pytest.fixture
    async def rig(self, tmp_path: Path, batch: bool) -> AsyncIterator[Rig]:
        async with Recorder() as server:
            rig = WebhookRig(server, tmp_path, batch)
            yield rig
            await rig.sink.close()


class FileRig(Rig):
    def __init__(self, folder: Path) -> None:
        self._path = folder / "deep" / "out.ndjson"
        self.sink = FileSink(context(folder), path="deep/out.ndjson")

    async def received(self) -> dict[str, Any]:
        return by_key([json.loads(line) for line in self._path.read_bytes().splitlines(keepends=True)])

    async def break_down(self) -> None:
        self._path.unlink()
        self._path.mkdir()

    async def mend(self) -> None:
        self._path.rmdir()


class TestFile(Conformance):
    @pytest.fixture
    async def rig(self, tmp_path: Path) -> AsyncIterator[Rig]:
        rig = FileRig(tmp_path)
        yield rig
        await rig.sink.close()


class StdoutRig(Rig):
    """Its other side is a pipe with a thread that reads it. A pipe cannot break down and come back: see below."""

    def __init__(self, folder: Path) -> None:
        self._read_fd, self._write_fd = os.pipe()
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.sink = StdoutSink(context(folder), fd=self._write_fd)

    def _read(self) -> None:
        while chunk := os.read(self._read_fd, 1 << 20):
            self._chunks.append(chunk)

    def end(self) -> None:
        if self._write_fd is not None:
            os.close(self._write_fd)
            self._reader.join()
            os.close(self._read_fd)
            self._write_fd = None

    async def received(self) -> dict[str, Any]:
        await self.sink.close()
        await asyncio.to_thread(self.end)
        return by_key([json.loads(line) for line in b"".join(self._chunks).split(b"\n") if line])

    async def break_down(self) -> None:
        raise NotImplementedError

    async def mend(self) -> None:
        raise NotImplementedError


class TestStdout(Conformance):
    @pytest.fixture
    async def rig(self, tmp_path: Path) -> AsyncIterator[Rig]:
        rig = StdoutRig(tmp_path)
        yield rig
        await rig.sink.close()
        rig.end()

    async def test_an_outage_is_the_sinks_failure_and_ends(self, rig: Rig) -> None:
        """A broken pipe does not end: test_sink_stdout has what happens then."""


class SqliteRig(Rig):
    def __init__(self, folder: Path) -> None:
        self._path = folder / "deep" / "copy.db"
        self.sink = SqliteSink(context(folder), path="deep/copy.db")

    async def received(self) -> dict[str, Any]:
        connection = sqlite3.connect(self._path)
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM jobs")]
        connection.close()
        return {
            row.pop("_spillway_key").removeprefix("public.jobs:"): {k: v for k, v in row.items() if v is not None}
            for row in rows
        }

    async def break_down(self) -> None:
        self._path.rename(self._path.with_name("away.db"))
        self._path.mkdir()

    async def mend(self) -> None:
        self._path.rmdir()


class TestSqlite(Conformance):
    @pytest.fixture
    async def rig(self, tmp_path: Path) -> AsyncIterator[Rig]:
        rig = SqliteRig(tmp_path)
        yield rig
        await rig.sink.close()

"""A TCP proxy before a real server, a process of its own, that writes down when each request came and what was said.

Run as a script: ``python proxy.py --port P --upstream PORT --log FILE``. It understands just enough HTTP/1.1 to find
where requests and answers begin (Content-Length or chunked) and passes the bytes on unchanged. One JSON object a line:

    {"t": 1763894094.31, "conn": 3, "method": "POST", "path": "/_bulk", "bytes": 912331}      when its head came
    {"t": 1763894094.40, "conn": 3, "status": 200, "after": 0.09}                             when its answer began

Bodies are not kept: what the server holds in the end is asked of the server itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress

_CHUNK_BYTES = 1 << 18
Seen = Callable[[str, int], None]


class Framing:
    """Finds the heads in one direction of an HTTP/1.1 connection."""

    def __init__(self) -> None:
        self._kept = b""  # the beginning of a head or of a chunk's first line
        self._skip = 0  # bytes of a body, or of a chunk and the line end behind it
        self._chunked = False

    def feed(self, data: bytes) -> list[tuple[str, int]]:
        """First line and content length (-1: chunked) of each head that is complete with these bytes."""
        found = []
        while data:
            if self._skip:
                taken = min(self._skip, len(data))
                self._skip -= taken
                data = data[taken:]
                continue
            end = b"\r\n" if self._chunked else b"\r\n\r\n"
            text, separator, rest = (self._kept + data).partition(end)
            if not separator:
                self._kept += data
                break
            self._kept, data = b"", rest
            if self._chunked:
                size = int(text.split(b";")[0], 16)
                self._skip = size + 2
                self._chunked = size > 0
            else:
                found.append(self._head(text.decode("latin-1")))
        return found

    def _head(self, head: str) -> tuple[str, int]:
        first, *lines = head.split("\r\n")
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunked = True
            return first, -1
        self._skip = int(headers.get("content-length", "0"))
        return first, self._skip


class Proxy:
    def __init__(self, upstream_port: int, log_path: str) -> None:
        self._upstream_port = upstream_port
        self._log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.transport.abort()  # the server is down: so are we, for this client
            return
        asked: list[float] = []
        await asyncio.gather(
            self._pump(reader, up_writer, lambda line, size: self._asked(number, line, size, asked)),
            self._pump(up_reader, writer, lambda line, _: self._answered(number, line, asked)),
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: Seen) -> None:
        framing = Framing()
        with suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                for line, size in framing.feed(data):
                    seen(line, size)
                writer.write(data)
                await writer.drain()
        writer.close()

    def _asked(self, number: int, line: str, size: int, asked: list[float]) -> None:
        now = time.time()
        asked.append(now)
        method, path, _ = line.split(" ", 2)
        self._write({"t": now, "conn": number, "method": method, "path": path, "bytes": size})

    def _answered(self, number: int, line: str, asked: list[float]) -> None:
        now = time.time()
        after = now - asked.pop(0) if asked else 0.0
        self._write({"t": now, "conn": number, "status": int(line.split(" ")[1]), "after": round(after, 6)})

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._log, json.dumps(line).encode() + b"\n")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", type=int, required=True)
    parser.add_argument("--log", required=True)
    options = parser.parse_args()
    proxy = Proxy(options.upstream, options.log)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", options.port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

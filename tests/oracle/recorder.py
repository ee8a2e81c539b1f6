"""A recording HTTP endpoint, a process of its own: writes down every request before it answers, misbehaves by script.

Run as a script with the standard library alone: ``python recorder.py --port P --log FILE --seed N``. See `endpoint` for
the side that starts it and reads the log.

The log is append-only, one JSON object a line, written with one ``write`` the moment a request's body is complete:

    {"n": 7, "t": 1763894094.31, "life": 2, "path": "/single", "do": "ok", "status": 200, "body": "..."}

``t`` is wall time; ``do`` what the endpoint will do with the request, ``status`` what it will answer (0: nothing).
A request was applied if ``do`` is ``ok``, ``slow`` or ``apply_cut``, and acknowledged if its status is 2xx. A line
``{"mark": {...}}`` is what the test said through ``/_control/mark``.

The script is a list of rules; the first that matches a request decides, none: 200. A rule:

    {"path": "/single", "pks": ["7", "9"], "probability": 0.1, "times": 3,
     "do": "status" | "stall" | "slow" | "cut" | "apply_cut", "status": 422, "seconds": 0.2, "body": "..."}

``path`` is a prefix; ``pks`` matches if the primary key of any message in the body is among them (parts joined by
``-``); ``times`` wears the rule out. ``stall`` never answers and ends when the client hangs up. Refusing is not
scripted: the process is stopped and started (`endpoint.Recorder.stop`), which really closes the port.

Order. Lines are written in the order in which bodies were complete. A request of a process that was killed cannot
come after those of its successor as long as the test waits for ``connections`` to be 0 between the two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Mapping
from contextlib import suppress

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 422: "Unprocessable", 429: "Too Many", 500: "Error"}
_HEAD_LIMIT_BYTES = 1 << 20


class Recorder:
    def __init__(self, log_path: str, seed: int) -> None:
        self._log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._random = random.Random(seed)
        self._script: list[dict[str, object]] = []
        self._life = 0
        self._connections = 0
        self._requests: dict[str, int] = {}
        self._applied_messages: dict[str, int] = {}
        self._n = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            self._connections -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.split("\r\n")
        method, path, _ = request_line.split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(reader, headers)
        if path.startswith("/_control/"):
            answer = self._control(path.removeprefix("/_control/"), body)
            return await _answer(writer, 200, json.dumps(answer))
        return await self._record(method, path, headers, body.decode(), reader, writer)

    async def _record(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        rule = self._rule(path, body)
        do = str(rule.get("do", "ok"))
        status = {"ok": 200, "slow": 200, "status": rule.get("status", 500)}.get(do, 0)
        assert isinstance(status, int)
        self._n += 1
        line = {"n": self._n, "t": time.time(), "life": self._life, "method": method, "path": path, "do": do}
        line |= {"status": status, "idempotency": headers.get("idempotency-key", ""), "body": body}
        self._write(line)
        self._requests[path] = self._requests.get(path, 0) + 1
        if do in ("ok", "slow", "apply_cut"):
            self._applied_messages[path] = self._applied_messages.get(path, 0) + len(messages_of(body))
        if do in ("cut", "apply_cut"):
            return False
        if do == "stall":
            await reader.read()  # until the client hangs up
            return False
        if do == "slow":
            seconds = rule.get("seconds", 0.1)
            assert isinstance(seconds, int | float)
            await asyncio.sleep(seconds)
        return await _answer(writer, status, str(rule.get("body", "{}")))

    def _rule(self, path: str, body: str) -> Mapping[str, object]:
        pks: set[str] | None = None
        for rule in self._script:
            times = rule.get("times")
            if not path.startswith(str(rule.get("path", "/"))) or times == 0:
                continue
            wanted = rule.get("pks")
            if isinstance(wanted, list):
                pks = {_pk(message) for message in messages_of(body)} if pks is None else pks
                if pks.isdisjoint(wanted):
                    continue
            probability = rule.get("probability", 1.0)
            assert isinstance(probability, int | float)
            if probability < 1.0 and self._random.random() >= probability:
                continue
            if isinstance(times, int):
                rule["times"] = times - 1
            return rule
        return {}

    def _control(self, verb: str, body: bytes) -> object:
        if verb == "script":
            self._script = json.loads(body)
        elif verb == "mark":
            mark = json.loads(body)
            self._life = mark.get("life", self._life)
            self._write({"mark": mark, "t": time.time()})
        # The connection that asks is one of them.
        return {
            "connections": self._connections - 1,
            "requests": self._requests,
            "applied_messages": self._applied_messages,
        }

    def _write(self, line: Mapping[str, object]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if os.write(self._log, data) != len(data):
            raise OSError("the log took a part of a line alone")


def messages_of(body: str) -> list[Mapping[str, object]]:
    """The messages of a webhook's body, single or batch."""
    try:
        value = json.loads(body)
    except ValueError:
        return []
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        return value["data"]
    return [value] if isinstance(value, dict) else []


def _pk(message: Mapping[str, object]) -> str:
    metadata = message.get("metadata")
    pks = metadata.get("record_pks") if isinstance(metadata, dict) else None
    return "-".join(pks) if isinstance(pks, list) else ""


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    parts = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


async def _answer(writer: asyncio.StreamWriter, status: int, body: str) -> bool:
    data = body.encode()
    head = f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return True


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recorder = Recorder(options.log, options.seed)
    server = await asyncio.start_server(recorder.serve, "127.0.0.1", options.port, limit=_HEAD_LIMIT_BYTES)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

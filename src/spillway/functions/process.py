"""A worker seen from its parent: a process that is started, asked, watched and killed.

Nobody waits for it without an end: it has so long to load, and while it works ``status`` says since when the message
that is running does. It leads a process group of its own, which is killed as a whole.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from spillway.errors import SpillwayError
from spillway.functions import made
from spillway.functions.made import FLUSH_BYTES, IDLE, LENGTH, OUTPUT_BYTES, STATUS_BYTES, Broken, Made
from spillway.functions.spec import FunctionSpec

SCRIPT: Final = Path(__file__).with_name("worker.py")
LOAD_SECONDS: Final = 30.0
GRACE_SECONDS: Final = 0.5  # beyond the time limit, before it is killed
HEAD_BYTES: Final = 64 << 10  # what an answer may have besides its results
ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")  # nothing that could be a secret


class Lost(Exception):
    """The worker is gone or useless. ``place``: the message of the request that was running, None if not known."""

    def __init__(self, place: int | None, failure: Made) -> None:
        super().__init__()
        self.place = place
        self.failure = failure


class WorkerProcess:
    """Use `start`."""

    def __init__(self, spec: FunctionSpec, child: subprocess.Popen[bytes], status: mmap.mmap) -> None:
        self._spec = spec
        self._child = child
        self._status = memoryview(status).cast("q")
        self._limit_seconds = spec.timeout_seconds + GRACE_SECONDS
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @property
    def pid(self) -> int:
        return self._child.pid

    @classmethod
    async def start(cls, spec: FunctionSpec) -> WorkerProcess:
        """Raises `SpillwayError`: it cannot be started, or user code cannot be loaded."""
        try:
            ours, theirs = socket.socketpair()
            with tempfile.TemporaryFile() as page:
                page.truncate(STATUS_BYTES)
                status = mmap.mmap(page.fileno(), STATUS_BYTES)
                with theirs:
                    child = _spawn(theirs.fileno(), page.fileno())
        except OSError as error:
            raise SpillwayError(
                "functions_not_started",
                f"no process for the sink's functions can be started: {error}",
                "see that processes, open files and memory of this machine suffice",
            ) from error
        process = cls(spec, child, status)
        try:
            process._reader, process._writer = await asyncio.open_unix_connection(sock=ours)
            await process._load()
        except BaseException:
            await process.end()
            raise
        return process

    async def _load(self) -> None:
        text = pickle.dumps(self._spec)
        self._writer.writelines((LENGTH.pack(len(text)), text))
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                said = await self._reader.readexactly(min(size, HEAD_BYTES))
        except TimeoutError:
            said = f"{self._names()}\0it has not been loaded after {LOAD_SECONDS:.0f} s".encode()
        except (asyncio.IncompleteReadError, ConnectionError):
            said = f"{self._names()}\0its process has ended{await self._ended()}".encode()
        if said:
            name, _, detail = said.decode(errors="replace").partition("\0")
            files = {one.name: one.module or one.file for one in self._spec.python.values()}
            raise SpillwayError(
                "function_not_loaded",
                f"the function {name} cannot be loaded: {detail}",
                f"mend it in {files.get(name, 'the configuration')}",
            )

    def _names(self) -> str:
        return ", ".join(one.name for one in self._spec.python.values())

    async def ask(self, request: list[bytes]) -> None:
        self._status[0] = IDLE
        self._status[1] = time.monotonic_ns()
        try:
            self._writer.writelines(request)
            async with asyncio.timeout(self._limit_seconds):
                await self._writer.drain()
        except (TimeoutError, ConnectionError):
            raise Lost(None, await self._crashed()) from None

    async def answer(self) -> tuple[list[Made], int]:
        """The next part of the answer. Raises `Lost`."""
        (size,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        most = FLUSH_BYTES + 2 * self._spec.result_bytes + HEAD_BYTES + OUTPUT_BYTES * FLUSH_BYTES
        try:
            if size > most:
                raise Broken
            return made.read_answer(await self._exactly(size))
        except Broken:
            raise Lost(None, made.failed("function_crashed", "the function has disturbed its process")) from None

    async def _exactly(self, size: int) -> bytes:
        while True:
            try:
                async with asyncio.timeout(max(0.001, self._left_seconds())):
                    return await self._reader.readexactly(size)
            except TimeoutError:
                if self._left_seconds() <= 0:
                    raise Lost(self._place(), self._late()) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise Lost(self._place(), await self._crashed()) from None

    def _left_seconds(self) -> float:
        return self._limit_seconds - (time.monotonic_ns() - self._status[1]) / 1e9

    def _place(self) -> int | None:
        place = self._status[0]
        return None if place == IDLE else place

    def _late(self) -> Made:
        limit = f"{self._spec.timeout_seconds * 1000:.0f} ms"
        return made.failed(
            "function_timeout", f"the function has run for longer than {limit} and did not let itself be stopped"
        )

    async def _crashed(self) -> Made:
        return made.failed("function_crashed", f"the function has ended its process{await self._ended()}")

    async def _ended(self) -> str:
        """How, for people."""
        await self.end()
        status = self._child.returncode
        if status >= 0:
            return f" with exit status {status}"
        return f" by {signal.Signals(-status).name}" if -status in set(signal.Signals) else f" by signal {-status}"

    async def end(self) -> None:
        """Kill it with all that it has started, and wait for its end; this is not given up when cancelled."""
        self.kill()
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._child.wait))

    def kill(self) -> None:
        if self._child.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        if hasattr(self, "_writer"):
            self._writer.transport.abort()


def _spawn(connection: int, status: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", str(SCRIPT), str(connection), str(status), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        pass_fds=(connection, status),
        start_new_session=True,
    )

"""A worker seen from its parent: a process that is started, asked, watched and killed.

Nobody waits for it without an end: it has so long to load, and while it works ``status`` says since when the message
that is running does. It leads a process group of its own, which is killed as a whole.

Here the time is the wall's, which runs on while a machine, a container or one of the two processes stands still. So a
loss for lateness is no proof against the message, nor is an end by a signal, which anybody may have sent (`Lost`).

It ends with the thread that has started it (so Linux has it), which is that of the loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Final

from spillway.errors import SpillwayError
from spillway.functions import made
from spillway.functions.made import FLUSH_BYTES, IDLE, LENGTH, STATUS_BYTES, Ask, Broken, Made, request
from spillway.functions.spec import FunctionSpec

SCRIPT: Final = Path(__file__).with_name("worker.py")
LOAD_SECONDS: Final = 30.0
IDLE_SECONDS: Final = 10.0  # while no message is running: it reads, or says what it has done
GRACE_SECONDS: Final = 0.5  # beyond the time limit, before it is killed
LAST_LOOK_SECONDS: Final = 0.05
REAP_SECONDS: Final = 5.0  # for a process to be gone that was killed: longer if the kernel holds it, at a dead disk say
END_SECONDS, POLL_SECONDS = 0.2, 0.005  # for a process that has let go of its files to be gone
HEAD_BYTES: Final = 64 << 10  # what an answer may have besides its results
# How orjson ends at the memory limit; also a process that disturbs itself.
FAULTS: Final = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
MAYBE_MEMORY: Final = ", as it may at its memory limit"
ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")  # nothing that could be a secret


class Lost(Exception):
    """The worker is gone or useless. ``place``: the message of the request that was running, None if not known.
    ``certain``: it was the doing of a message, nobody else's."""

    def __init__(self, place: int | None, failure: Made, *, certain: bool = True) -> None:
        super().__init__()
        self.place = place
        self.failure = failure
        self.certain = certain


class WorkerProcess:
    """Use `start`."""

    def __init__(self, spec: FunctionSpec, child: subprocess.Popen[bytes], status: mmap.mmap) -> None:
        self._spec = spec
        self._child = child
        self._status = memoryview(status).cast("q")
        self._status[0] = IDLE
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
            with ExitStack() as on_failure:
                ours, theirs = socket.socketpair()
                on_failure.callback(ours.close)
                with theirs, _page() as page:
                    status = mmap.mmap(page.fileno(), STATUS_BYTES)
                    child = _spawn(theirs.fileno(), page.fileno())
                on_failure.pop_all()
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
            if not hasattr(process, "_writer"):
                ours.close()
            await process.end()
            raise
        return process

    async def _load(self) -> None:
        text = pickle.dumps((self._spec, [folder for folder in sys.path if folder]))
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

    async def ask(self, ask: Ask) -> None:
        self._status[0] = IDLE
        self._status[1] = time.monotonic_ns()
        try:
            self._writer.writelines(request(ask))
            async with asyncio.timeout(IDLE_SECONDS):
                await self._writer.drain()
        except (TimeoutError, ConnectionError):
            raise await self._lost() from None

    async def answer(self) -> tuple[list[Made], int]:
        """The next part of the answer. Raises `Lost`."""
        (size,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        most = FLUSH_BYTES + self._spec.result_bytes + HEAD_BYTES
        try:
            if size > most:
                raise Broken
            return made.read_answer(await self._exactly(size))
        except Broken:
            raise Lost(None, made.failed("function_crashed", "the function has disturbed its process")) from None

    async def _exactly(self, size: int) -> bytes:
        late = False
        while True:
            try:
                wait = min(self._left_seconds(), self._limit_seconds)  # by then another message may be running
                async with asyncio.timeout(max(LAST_LOOK_SECONDS, wait)):
                    return await self._reader.readexactly(size)
            except TimeoutError:
                if late and self._left_seconds() <= 0:
                    raise Lost(self._place(), self._late(), certain=False) from None
                late = self._left_seconds() <= 0  # if it was this process that slept, there is something to be read
            except (asyncio.IncompleteReadError, ConnectionError):
                raise await self._lost() from None

    def _left_seconds(self) -> float:
        limit = IDLE_SECONDS if self._place() is None else self._limit_seconds
        seconds = (time.monotonic_ns() - self._status[1]) / 1e9
        return limit - seconds if seconds >= 0 else 0.0  # whatever has been written there

    def _place(self) -> int | None:
        place = self._status[0]
        return None if place == IDLE else place

    def _late(self) -> Made:
        limit = f"{self._spec.timeout_seconds * 1000:.0f} ms"
        return made.failed(
            "function_timeout", f"the function has run for longer than {limit} and did not let itself be stopped"
        )

    async def _lost(self) -> Lost:
        """The connection is at its end; but if user code has closed it, then some message ago."""
        patience_seconds = END_SECONDS
        while not (has_ended := self._has_ended()) and patience_seconds > 0:
            await asyncio.sleep(POLL_SECONDS)
            patience_seconds -= POLL_SECONDS
        if not has_ended:
            return Lost(None, made.failed("function_crashed", "the function has closed the files of its process"))
        place = self._place()
        failure = made.failed("function_crashed", f"the function has ended its process{await self._ended()}")
        by_signal = (self._child.returncode or 0) < 0
        return Lost(place, failure, certain=not by_signal)

    def _has_ended(self) -> bool:
        """By itself; it is still to be waited for, so that its group is there to be killed."""
        try:
            return os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:  # closed in the meantime
            return True

    async def _ended(self) -> str:
        """How, for people."""
        await self.end()
        status = self._child.returncode
        if status is None:
            return ""
        if status >= 0:
            return f" with exit status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f" by {name}" + (MAYBE_MEMORY if -status in FAULTS else "")

    async def end(self) -> None:
        """Kill it with all that it has started, and wait for its end; somebody does if this is cancelled, too."""
        self.kill()
        await asyncio.wait({asyncio.get_running_loop().run_in_executor(None, self._child.wait)}, timeout=REAP_SECONDS)

    def kill(self) -> None:
        if self._child.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        if hasattr(self, "_writer"):
            self._writer.transport.abort()


def _page() -> BinaryIO:
    """A file without a name. In Linux it is in memory, and user code cannot cut it off under our mapping, which would
    be our end."""
    in_memory = hasattr(os, "memfd_create")
    if in_memory:
        number = os.memfd_create("spillway-status", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        page: BinaryIO = os.fdopen(number, "r+b", buffering=0)
    else:
        page = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller closes it
    page.truncate(STATUS_BYTES)
    if in_memory:
        fcntl.fcntl(page.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return page


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

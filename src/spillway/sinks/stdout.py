"""Standard output: one message a line, in order. For looking at, and for pipes.

**Semantics ``ordered``.** Ok means that the kernel has taken the lines: who reads the pipe may still lose them. A pipe
that nobody reads holds up this sink alone: the writing happens in a thread of its own, in pieces that a pipe takes
whole once it is ready (POSIX: up to PIPE_BUF bytes), so that `close` need not wait for a reader.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable

from spillway.chunk import Batch
from spillway.sinks.base import OK, Result, Semantics, SinkContext, sink_down
from spillway.sinks.disk import disk_failed
from spillway.sinks.encode import lines, runs
from spillway.sinks.thread import OwnThread

_PIECE_BYTES = select.PIPE_BUF
_LOOK_UP_MS = 200  # how often a writer that waits for the reader looks whether the sink was closed


class StdoutSink:
    semantics: Semantics = "ordered"
    max_in_flight = 1
    single = False

    def __init__(self, context: SinkContext, *, fd: int = 1) -> None:
        self._suffix = context.suffix
        self._fd = fd
        self._thread = OwnThread(context.name)
        self._closed = threading.Event()

    async def open(self) -> None:
        """Nothing to do: it is open already."""

    async def send(self, batch: Batch) -> Result:
        suffix = b"" if batch.complete else self._suffix
        return await self._thread.run(self._write, lines(runs(batch), suffix))

    async def close(self) -> None:
        self._closed.set()
        await self._thread.close()

    def _write(self, pieces: Iterable[bytes]) -> Result:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    if self._closed.is_set():
                        return sink_down("closed", "the sink was closed while its reader did not read")
                    if poll.poll(_LOOK_UP_MS):
                        view = view[self._write_piece(view) :]
        except BrokenPipeError:
            return sink_down("broken_pipe", "nobody reads the standard output any more")
        except OSError as error:
            return disk_failed(error)
        return OK

    def _write_piece(self, view: memoryview) -> int:
        try:
            return os.write(self._fd, view[:_PIECE_BYTES])
        except BlockingIOError:
            return 0  # a terminal that somebody else made non-blocking

"""A file of JSON lines: one message a line, in order.

**Semantics ``ordered``.** A batch is appended, and is ok when fsync has returned. One that fails is cut off again, so
the file never ends in a part of a batch that was refused, unless the cut fails too.

**Every line is always JSON.** Opening cuts off a last line without its newline: what a crash tore. The whole lines
before it stay, and come again: readers see each message at least once.

**One writer.** The file is locked (flock) while it is open; a second writer of it is ``sink_down('locked')``.
A file that was moved or deleted under us is noticed before the next write, and a new one begun in its place: rotation
by others works as well as our own. Ours, by ``rotate_bytes``, renames the file to ``NAME.YYYYmmddTHHMMSS.N`` (UTC)
before the write that would make it larger; a batch is never divided, so one that is larger is alone in its file.

All of this happens in a thread of the sink's own: its state is touched there only.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from spillway.chunk import Batch
from spillway.clock import Clock, SystemClock
from spillway.sinks.base import OK, Result, Semantics, SinkContext, sink_down
from spillway.sinks.disk import disk_failed, is_at, sync_folder
from spillway.sinks.encode import lines, lines_bytes, runs
from spillway.sinks.thread import OwnThread

_BLOCK_BYTES = 64 * 1024


class _NotAFile(Exception):
    """A folder, pipe or device has the file's name."""


class FileSink:
    semantics: Semantics = "ordered"
    max_in_flight = 1
    single = False

    def __init__(
        self, context: SinkContext, *, path: str | Path, rotate_bytes: int | None = None, clock: Clock | None = None
    ) -> None:
        self._path = context.base_dir / path
        self._suffix = context.suffix
        self._rotate_bytes = rotate_bytes
        self._clock = clock or SystemClock()
        self._thread = OwnThread(context.name)
        self._fd: int | None = None
        self._good_bytes = 0  # everything up to here is acknowledged

    async def open(self) -> None:
        await self._thread.run(self._try, (), 0)

    async def send(self, batch: Batch) -> Result:
        # A cancelled batch may go on in the thread: it holds its chunks itself.
        suffix = b"" if batch.complete else self._suffix
        return await self._thread.run(self._try, lines(runs(batch), suffix), lines_bytes(batch, suffix))

    async def close(self) -> None:
        with suppress(RuntimeError):  # the thread has ended: closed before
            await self._thread.run(self._close_file)
        await self._thread.close()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _try(self, pieces: Iterable[bytes], size_bytes: int) -> Result:
        try:
            self._append(pieces, size_bytes, self._file(size_bytes))
        except BlockingIOError:
            return sink_down("locked", f"another process or sink has {self._path} open for writing")
        except _NotAFile:
            return sink_down("not_a_file", f"{self._path} is not a regular file")
        except OSError as error:
            return disk_failed(error)
        return OK

    def _file(self, more_bytes: int) -> int:
        """The file to append to: opened, opened again, or begun anew, as it is needed."""
        if self._fd is not None and not is_at(self._path, os.fstat(self._fd)):
            self._close_file()
        if self._fd is None:
            self._open_file()
        if self._rotate_bytes and self._good_bytes and self._good_bytes + more_bytes > self._rotate_bytes:
            self._path.rename(self._rotated_path())
            self._close_file()
            self._open_file()
        assert self._fd is not None
        return self._fd

    def _open_file(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
            # Opening a pipe would wait for its reader.
            raise _NotAFile
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = _whole_lines_bytes(fd)
            if whole < os.fstat(fd).st_size:
                os.ftruncate(fd, whole)
            os.fsync(fd)
            sync_folder(self._path.parent)
        except OSError:
            os.close(fd)
            raise
        self._fd, self._good_bytes = fd, whole

    def _append(self, pieces: Iterable[bytes], size_bytes: int, fd: int) -> None:
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
        except OSError:
            with suppress(OSError):  # then the whole lines of this batch stay, and come twice
                os.ftruncate(fd, self._good_bytes)
            self._close_file()  # after a failed fsync nothing is known of what this descriptor wrote
            raise
        self._good_bytes += size_bytes

    def _rotated_path(self) -> Path:
        second = datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y%m%dT%H%M%S")
        candidates = (self._path.with_name(f"{self._path.name}.{second}.{n}") for n in count(1))
        return next(path for path in candidates if not path.exists())

    def _close_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _whole_lines_bytes(fd: int) -> int:
    """Up to where the file consists of whole lines; read from its end."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0

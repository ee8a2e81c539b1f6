"""Frames that end where readable memory ends: who reads beyond a frame is killed by the kernel, not lucky."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0


class GuardedConnection:
    """A connection in COPY BOTH that has received ``frames``, of at most ``most_bytes`` each."""

    def __init__(self, frames: Iterable[bytes], most_bytes: int = 1 << 20) -> None:
        self._frames = iter(frames)
        self._end = -(-most_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, self._end + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        guard = ctypes.c_void_p(start + self._end)
        if _libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")

    def get_copy_data(self, async_: int) -> tuple[int, memoryview]:
        frame = next(self._frames, None)
        if frame is None:
            return 0, memoryview(b"")
        start = self._end - len(frame)
        self._memory[start : self._end] = frame
        return len(frame), memoryview(self._memory)[start : self._end]

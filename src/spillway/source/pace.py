"""How eagerly the socket is read: at once at low load, in large bites under load.

A walsender makes one send for each row. A reader that waits for it is woken by each, takes a few hundred bytes, and
both pay: the walsender up to twice what it would otherwise. So, while there is plenty:

**Over TCP, near: a closed window, and a beat.** While the window is open each send of the walsender becomes a segment
of its own and goes all the way into our queue; while it is closed a send only appends to what waits, and segments of
64 kB go out when we read. Measured per row of 200 B in the walsender: 3.1 us against 2.1 (bench/peers/bare.py). The
window is closed nearly all the time if it is small and read a little slower than the walsender could fill it: it is
clamped to `WINDOW_FRAMES` frames, and read once in `BEAT_SECONDS`, which allows for 450,000 frames a second.
``TCP_WINDOW_CLAMP`` (tcp(7), Linux) can be set while connected, unlike a receive buffer, which has to be there before.
A small window needs a short way: on connections whose round trip is longer than `NEAR_SECONDS` nothing is clamped.

**Elsewhere: naps.** When the socket runs dry after a large bite it gets a moment to fill again: over TCP a
millisecond, over a Unix socket, which holds some 80 kB, just long enough for the sender to be running again.

Nothing of this delays a change at low load: beat and naps follow a large bite only.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import time

# A bite of this size is load.
LOAD_BYTES = 16 * 1024
BEAT_SECONDS = 0.001
NAP_SECONDS = 0.001  # over TCP; the event loop's timers are no finer
# Over a Unix socket: the thread itself, which takes some 50 us more; nobody else on the loop notices.
UNIX_NAP_SECONDS = 0.00002
NEAR_SECONDS = 0.0005
WINDOW_FRAMES = 450
LEAST_WINDOW_BYTES = 128 * 1024
MOST_WINDOW_BYTES = 8 << 20

_RTT = struct.Struct("=68xI")  # tcpi_rtt of struct tcp_info, in microseconds (linux/tcp.h)
_CLAMP: int | None = getattr(socket, "TCP_WINDOW_CLAMP", None)


class Pace:
    """Of one connection; ``descriptor`` is its socket's."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._local = self._socket.family == socket.AF_UNIX
        near = not self._local and _CLAMP is not None and _round_trip_seconds(self._socket) < NEAR_SECONDS
        self._alarm = Alarm() if near else None
        self._window_bytes = 0  # as clamped
        self._loaded = False
        self._read_at = 0.0  # monotonic seconds

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.close()
        self._socket.close()

    def took(self, frames: int, size_bytes: int) -> None:
        """What the last bite held."""
        self._loaded = size_bytes >= LOAD_BYTES
        if self._alarm is not None and self._loaded and frames:
            wanted = min(max(LEAST_WINDOW_BYTES, WINDOW_FRAMES * size_bytes // frames), MOST_WINDOW_BYTES)
            if not self._window_bytes // 2 <= wanted <= self._window_bytes:
                self._clamp(wanted)

    async def beat(self) -> None:
        """Before a read. Other tasks get a turn in any case."""
        if self._alarm is not None and self._loaded:
            rest_seconds = self._read_at + BEAT_SECONDS - time.monotonic()
            await (self._alarm.ring_after(rest_seconds) if rest_seconds > 0 else asyncio.sleep(0))
            self._read_at = time.monotonic()
        else:
            await asyncio.sleep(0)

    async def nap(self) -> bool:
        """The socket is dry. Whether it was given a moment to fill."""
        if not self._loaded or self._alarm is not None:
            return False
        if self._local:
            time.sleep(UNIX_NAP_SECONDS)  # noqa: ASYNC251 - shorter than anything that the loop can wait for
        else:
            await asyncio.sleep(NAP_SECONDS)
        return True

    def _clamp(self, size_bytes: int) -> None:
        assert _CLAMP is not None
        self._window_bytes = size_bytes
        self._socket.setsockopt(socket.IPPROTO_TCP, _CLAMP, size_bytes)


def _round_trip_seconds(connection: socket.socket) -> float:
    (microseconds,) = _RTT.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT.size))
    return float(microseconds) / 1_000_000


class Alarm:
    """Waits for less than a millisecond, which the event loop's timers round: a timerfd (timerfd_create(2), Linux; the
    os module has it from Python 3.13 on). For one waiter at a time."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._rung)
        self._waiter: asyncio.Future[None] | None = None

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._wake()

    async def ring_after(self, seconds: float) -> None:
        self._waiter = self._loop.create_future()
        once = (ctypes.c_long * 4)(0, 0, 0, max(1, int(seconds * 1_000_000_000)))  # struct itimerspec
        self._libc.timerfd_settime(self._descriptor, 0, once, None)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _rung(self) -> None:
        os.read(self._descriptor, 8)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

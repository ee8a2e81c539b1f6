"""How eagerly the socket is read: at once at low load, in large bites under load.

A walsender makes one send for each row. A reader that waits for it is woken by each, takes a few hundred bytes, and
both pay: the walsender up to twice what it would otherwise. Two things help, and only while there is plenty.

**Naps.** When the socket runs dry after a large bite it gets a moment to fill again: over TCP a millisecond, over a
Unix socket, which holds some 80 kB, just long enough for the sender to be running again.

**A closed window** (TCP). While the window is open each send of the walsender becomes a segment of its own and goes all
the way into our queue; while it is closed a send only appends to what waits, and segments of 64 kB go out when we read.
Measured per row of 200 B in the walsender: 2.7 to 3.3 us against 2.0 (bench/peers/bare.py). So the window is clamped to
what comes in a nap: `WINDOW_FRAMES` of the size that frames have had. ``TCP_WINDOW_CLAMP`` (tcp(7), Linux) can be set
while connected, unlike a receive buffer, which has to be there before. A small window needs a short way: on connections
whose round trip is longer than `NEAR_SECONDS` nothing is clamped.

Nothing of this delays a change at low load: naps follow a large bite only.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time

# A bite of this size is load.
LOAD_BYTES = 16 * 1024
NAP_SECONDS = 0.001  # over TCP; the event loop's timers are no finer
# Over a Unix socket: the thread itself, which takes some 50 us more; nobody else on the loop notices.
UNIX_NAP_SECONDS = 0.00002
NEAR_SECONDS = 0.00025
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
        self._near = not self._local and _CLAMP is not None and _round_trip_seconds(self._socket) < NEAR_SECONDS
        self._window_bytes = 0  # as clamped
        self._loaded = False

    def close(self) -> None:
        self._socket.close()

    def took(self, frames: int, size_bytes: int) -> None:
        """What the last bite held."""
        self._loaded = size_bytes >= LOAD_BYTES
        if self._near and self._loaded and frames:
            wanted = min(max(LEAST_WINDOW_BYTES, WINDOW_FRAMES * size_bytes // frames), MOST_WINDOW_BYTES)
            if not self._window_bytes // 2 <= wanted <= self._window_bytes:
                self._clamp(wanted)

    @property
    def naps(self) -> bool:
        """Whether a dry socket is worth a nap."""
        return self._loaded

    async def nap(self) -> None:
        if self._local:
            time.sleep(UNIX_NAP_SECONDS)  # noqa: ASYNC251 - shorter than anything that the loop can wait for
        else:
            await asyncio.sleep(NAP_SECONDS)

    def _clamp(self, size_bytes: int) -> None:
        assert _CLAMP is not None
        self._window_bytes = size_bytes
        self._socket.setsockopt(socket.IPPROTO_TCP, _CLAMP, size_bytes)


def _round_trip_seconds(connection: socket.socket) -> float:
    (microseconds,) = _RTT.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT.size))
    return float(microseconds) / 1_000_000

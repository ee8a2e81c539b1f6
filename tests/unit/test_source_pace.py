"""How eagerly a socket is read: nothing waits at low load, and what waits under load wakes again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
import uvloop

from spillway.source import pace
from spillway.source.pace import BEAT_SECONDS, LEAST_WINDOW_BYTES, LOAD_BYTES, Alarm, Pace


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            yield client


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_alarm_rings_again_and_again_and_after_a_cancelled_wait(new_loop: object) -> None:
    async def rings() -> None:
        alarm = Alarm()
        waiting = asyncio.create_task(alarm.ring_after(60))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(10):
            for _ in range(3):
                await alarm.ring_after(0.0001)
            waiting = asyncio.create_task(alarm.ring_after(60))
            await asyncio.sleep(0)
            alarm.close()  # rings, too: nobody waits for what is gone
            await waiting

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(rings())


async def test_near_over_tcp_the_window_follows_the_size_of_frames_and_reads_keep_a_beat(
    tcp: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "NEAR_SECONDS", 10.0)
    one = Pace(tcp.fileno())
    try:
        assert not await one.nap()
        clamp = socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP
        one.took(10, LOAD_BYTES - 1)  # no load
        before = tcp.getsockopt(*clamp)
        one.took(60, 60 * 280)
        assert tcp.getsockopt(*clamp) == LEAST_WINDOW_BYTES != before
        one.took(20, 20 * 18_000)
        assert tcp.getsockopt(*clamp) == pace.WINDOW_FRAMES * 18_000
        one.took(20, 20 * 17_000)  # not for every little difference
        assert tcp.getsockopt(*clamp) == pace.WINDOW_FRAMES * 18_000
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(5):
            await one.beat()
        assert loop.time() - began >= 4 * BEAT_SECONDS
        assert not await one.nap()  # the beat was the moment to fill
    finally:
        one.close()


async def test_far_away_nothing_is_clamped_and_a_dry_socket_gets_a_nap(
    tcp: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "NEAR_SECONDS", 0.0)
    before = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
    one = Pace(tcp.fileno())
    try:
        one.took(100, LOAD_BYTES)
        assert await one.nap()
        one.took(1, 300)
        assert not await one.nap()
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP) == before
    finally:
        one.close()


async def test_a_unix_socket_gets_a_nap_under_load() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = Pace(ours.fileno())
        one.took(100, LOAD_BYTES)
        assert await one.nap()
        one.took(1, 300)
        assert not await one.nap()
        one.close()

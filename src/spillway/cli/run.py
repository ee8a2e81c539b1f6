"""``spillway run``: the engine and the HTTP side in one loop, in the foreground.

This is the one place that knows both the engine and the HTTP side. The first SIGTERM or SIGINT asks the engine to
stop cleanly; the second ends the process at once, which is safe: it is the same as a crash. The signal's Python handler
does it itself, so a loop that no longer turns cannot hold it up. SIGHUP reads the file again (spillway.engine.reload).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import structlog
import uvloop

from spillway import logs
from spillway.api.app import create_app
from spillway.api.serve import bind, serve
from spillway.cli.load import load
from spillway.config import Config
from spillway.engine import Engine, reload
from spillway.errors import SpillwayError

_log = structlog.get_logger()

STOPPED_AT_ONCE = 130
SWITCH_SECONDS = 0.0005
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def run(file: Path, json: bool) -> None:
    config = load(file)
    token = config.server.token
    logs.configure(os.environ, json=json, secrets=[token.get_secret_value()] if token else [])
    _bound_the_allocator()
    # SQLite gives up the interpreter at every step of a statement: at the default of 5 ms a busy loop would starve the
    # store's thread.
    sys.setswitchinterval(SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(file, config))


def _bound_the_allocator() -> None:
    """Tell glibc's malloc to give large blocks back at once, and to keep few arenas. By default it takes the freeing of
    one large block as a reason to keep all later ones in its heaps, where they stay resident: rows of megabytes that
    were delivered long ago would count against the process (I4)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 256 << 10), (M_TRIM_THRESHOLD, 1 << 20), (M_ARENA_MAX, 2)):
            mallopt(option, value)


async def _run(file: Path, config: Config) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    server = config.server
    listening = bind(server.host, server.port)
    engine = Engine(config)
    token = server.token.get_secret_value() if server.token else None
    async with serve(create_app(engine, engine.metrics, token), listening):
        _log.info("listening", host=server.host, port=listening.getsockname()[1])
        reloading = asyncio.create_task(_reload_on_signal(file, engine))
        reloading.add_done_callback(lambda _: stop.set())  # it ends by a defect alone
        try:
            await engine.run(stop)
        finally:
            reloading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reloading
    _log.info("stopped")


async def _reload_on_signal(file: Path, engine: Engine) -> None:
    """SIGHUP: read the file again. One that is wrong changes nothing."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGHUP, lambda _number, _frame: loop.call_soon_threadsafe(asked.set) and None)
    while True:
        await asked.wait()
        asked.clear()
        try:
            done = await reload(engine, load(file))
        except SpillwayError as error:
            _log.error("the configuration was not taken", file=str(file), error=str(error), code=error.code)
            continue
        _log.info("configuration taken", joined=done.joined, changed=done.changed)
        if done.waits:
            _log.warning("this waits for a restart", what=done.waits)


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(STOPPED_AT_ONCE)
        asked = True
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

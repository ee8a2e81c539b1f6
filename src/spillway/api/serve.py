"""uvicorn inside the engine's loop, as a context.

`bind` comes before anything else is built: a port in use is an error of the start, with a remedy, before the state file
is opened; and requests that come before the server has taken its first breath wait in the socket's queue instead of
being refused. Signals stay with the command line: uvicorn installs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from spillway.errors import SpillwayError

GRACE_SECONDS = 2  # for requests under way when the process stops; an export is cut off
KEEP_ALIVE_SECONDS = 5

log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, listening: socket.socket) -> AsyncIterator[None]:
    """Answer requests while the context lasts, then close the socket (`bind`)."""
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]), name="http")
    task.add_done_callback(_report_failure)
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([task])
        listening.close()


def _report_failure(task: asyncio.Task[None]) -> None:
    """The stream goes on without its window: said at once, not at the end."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("http server failed", exc_info=error)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 leaves the choice to the system. Raises SpillwayError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "stop what listens there (another spillway?), or set server.listen to another port"
            raise SpillwayError("port_in_use", f"cannot listen on {host}:{port}: it is in use", remedy) from None
        what = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise SpillwayError("listen", what, "correct server.listen") from None

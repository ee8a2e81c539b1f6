"""Who may ask: decided before any route, for every request.

- ``/api``: the bearer token of ``server.token``, compared in constant time; else 401, for paths that do not exist too.
  Without a configured token ``/api`` is open on loopback, to every account of the machine, and closed elsewhere; a
  configuration that listens elsewhere without a token is refused when it is loaded.
- ``/health``, ``/ready`` and ``/metrics`` are open: they hold names and numbers, never a row.
- A connection that arrives on a loopback address must name one in ``Host``: else a web page whose name was rebound to
  127.0.0.1 could read through its visitor's browser.
- What changes state is POST or PATCH and carries no foreign ``Origin``: else a page could post a form to 127.0.0.1.
  There is no CORS answer anywhere, so no page of another origin reads an answer.

The address is that of the accepted connection, not of the configuration: a process that listens on all addresses is
held to the same rules where it is reached through loopback.
"""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from spillway.api.errors import error_response

_READING = ("GET", "HEAD")


class Guard:
    """ASGI middleware. ``token`` None or empty: none is configured."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        server = scope.get("server")
        loopback = server is None or is_loopback(server[0])
        host = headers.get("host")  # absent only in HTTP/1.0, which no browser speaks
        if loopback and host is not None and not is_loopback(_hostname(f"//{host}")):
            return error_response(
                403, "foreign_host", "the Host header names another machine", "ask for 127.0.0.1 or localhost"
            )
        origin = headers.get("origin")
        if scope["method"] not in _READING and origin is not None and urlsplit(origin).netloc != host:
            return error_response(403, "foreign_origin", "a page of another origin sent this", "use the command line")
        if _under_api(scope["path"]) and not self._allowed(headers.get("authorization", ""), loopback):
            return error_response(
                401,
                "unauthorized",
                "the token is missing or wrong",
                "set SPILLWAY_TOKEN to server.token of the running process, or send Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )
        return None

    def _allowed(self, authorization: str, loopback: bool) -> bool:
        if self._token is None:
            return loopback
        scheme, _, given = authorization.partition(" ")
        return hmac.compare_digest(given.strip().encode("latin-1"), self._token) and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether the address or name stands for this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # an unfinished IPv6 address
        return ""


def _under_api(path: str) -> bool:
    return path == "/api" or path.startswith("/api/")

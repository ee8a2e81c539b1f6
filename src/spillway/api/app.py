"""The routes. ``create_app`` gives a Starlette application over one engine; it holds no state of its own.

::

    GET  /health                                    200 while the process lives
    GET  /ready                                     200, or 503 with the reason, by the slot's progress
    GET  /metrics                                   Prometheus
    GET  /api/status                                Engine.status()
    POST /api/sinks/{sink}/pause, .../resume
    GET  /api/sinks/{sink}/PILE?after&limit&reason  {"items": [...], "after": KEY or null}
    GET  /api/sinks/{sink}/PILE/messages?key&limit  NDJSON: the messages of a key, its head first
    POST /api/sinks/{sink}/PILE/retry               body: one of {"key": K}, {"reason": R}, {"all": true}
    POST /api/sinks/{sink}/PILE/discard             -> {"count": n}
    GET  /api/sinks/{sink}/dead-letters/export      NDJSON, streamed; ?key or ?reason, else all

where PILE is ``backlog`` or ``dead-letters``. Lists come in pages, never whole: memory is bounded here too. An export
that fails midway cuts the connection, so that a short file is never taken for a whole one. The routes of backfills are
in `spillway.api.backfills`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

from spillway import __version__
from spillway.api.backfills import BackfillRoutes
from spillway.api.errors import BadRequest, on_defect, on_http_error, on_spillway_error
from spillway.api.exchange import answer, json_body, sink_of
from spillway.api.guard import Guard
from spillway.errors import SpillwayError
from spillway.metrics import CONTENT_TYPE, Metrics
from spillway.store.base import Select, Waiting

if TYPE_CHECKING:
    from spillway.engine import Engine
    from spillway.engine.listing import Page

NDJSON = "application/x-ndjson"
PAGE_DEFAULT = 100
PAGE_MAX = 1000
SHOW_DEFAULT = 1  # the head of the key: what everything behind it waits for
SHOW_MAX = 10  # whole messages in memory at once
BODY_MAX_BYTES = 64 * 1024


def create_app(engine: Engine, metrics: Metrics, token: str | None) -> Starlette:
    """The application; ``token`` None: none is configured (see `spillway.api.guard`)."""
    backlog = _Pile(engine.waiting, engine.show, engine.retry, engine.discard)
    backfills = BackfillRoutes(engine)
    dead = _Pile(engine.dead, engine.show_dead, engine.retry_dead, engine.discard_dead)

    async def health(_request: Request) -> Response:
        return answer({"status": "alive", "version": __version__})

    async def ready(_request: Request) -> Response:
        is_ready, reason = engine.ready()
        return answer({"ready": is_ready, "reason": reason}, 200 if is_ready else 503)

    async def scrape(_request: Request) -> Response:
        return Response(metrics.render(engine.status()), media_type=CONTENT_TYPE)

    async def status(_request: Request) -> Response:
        return answer(engine.status())

    async def pause(request: Request) -> Response:
        sink = sink_of(request)
        await engine.pause(sink)
        return answer({"sink": sink, "paused": True})

    async def resume(request: Request) -> Response:
        sink = sink_of(request)
        await engine.resume(sink)
        return answer({"sink": sink, "paused": False})

    async def export(request: Request) -> Response:
        lines = engine.export_dead(sink_of(request), _select_of_query(request))
        first = await anext(lines, None)  # an unknown sink shows here, while there is a status to send
        return StreamingResponse(_ndjson(first, lines), media_type=NDJSON)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", scrape),
            Route("/api/status", status),
            *backfills.of_all(),
            Mount(
                "/api/sinks/{sink}",
                routes=[
                    Route("/pause", pause, methods=["POST"]),
                    Route("/resume", resume, methods=["POST"]),
                    *backlog.routes("/backlog"),
                    *dead.routes("/dead-letters"),
                    Route("/dead-letters/export", export),
                    *backfills.of_sink(),
                ],
            ),
        ],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={SpillwayError: on_spillway_error, HTTPException: on_http_error, Exception: on_defect},
    )


@dataclass(frozen=True, slots=True)
class _Pile:
    """The backlog or the dead letters: the same four questions."""

    waiting: Callable[[str, str | None, int, str | None], Awaitable[Page]]
    show: Callable[[str, str, int], Awaitable[list[bytes]]]
    retry: Callable[[str, Select], Awaitable[int]]
    discard: Callable[[str, Select], Awaitable[int]]

    def routes(self, prefix: str) -> list[Route]:
        return [
            Route(prefix, self._list),
            Route(f"{prefix}/messages", self._messages),
            Route(f"{prefix}/retry", self._retry, methods=["POST"]),
            Route(f"{prefix}/discard", self._discard, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        sink, limit = sink_of(request), _limit(request, PAGE_DEFAULT, PAGE_MAX)
        query = request.query_params
        page, after = await self.waiting(sink, query.get("after"), limit, query.get("reason"))
        return answer({"items": [_item(sink, waiting) for waiting in page], "after": after})

    async def _messages(self, request: Request) -> Response:
        key = request.query_params.get("key")
        if key is None:
            raise BadRequest("key is missing", "add ?key=KEY")
        messages = await self.show(sink_of(request), key, _limit(request, SHOW_DEFAULT, SHOW_MAX))
        return Response(b"".join(map(_line, messages)), media_type=NDJSON)

    async def _retry(self, request: Request) -> Response:
        return answer({"count": await self.retry(sink_of(request), await _select_of_body(request))})

    async def _discard(self, request: Request) -> Response:
        return answer({"count": await self.discard(sink_of(request), await _select_of_body(request))})


def _item(sink: str, waiting: Waiting) -> dict[str, object]:
    return {
        "sink": sink,
        "key": waiting.key,
        "reason": waiting.reason,
        "detail": waiting.detail,
        "attempts": waiting.attempts,
        "first_seen": datetime.fromtimestamp(waiting.first_seen, UTC).isoformat(timespec="milliseconds"),
        "bytes": waiting.bytes,
        "messages": waiting.messages,
    }


async def _ndjson(first: bytes | None, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first is not None:
        yield _line(first)
    async for line in rest:
        yield _line(line)


def _line(message: bytes) -> bytes:
    return message if message.endswith(b"\n") else message + b"\n"


def _limit(request: Request, default: int, most: int) -> int:
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise BadRequest("limit is not a number that is allowed here", f"give one from 1 to {most}")
    return int(text)


def _select_of_query(request: Request) -> Select:
    query = request.query_params
    if "key" in query or "reason" in query:
        return _select({name: query[name] for name in ("key", "reason") if name in query})
    return Select(all=True)


async def _select_of_body(request: Request) -> Select:
    return _select(await json_body(request, BODY_MAX_BYTES, _SELECT_REMEDY))


_SELECT_REMEDY = 'send exactly one of {"key": KEY}, {"reason": REASON}, {"all": true}'


def _select(given: object) -> Select:
    match given:
        case {"key": str(key), **rest} if not rest:
            return Select(key=key)
        case {"reason": str(reason), **rest} if not rest:
            return Select(reason=reason)
        case {"all": True, **rest} if not rest:
            return Select(all=True)
    raise BadRequest("what is meant is not clear", _SELECT_REMEDY)

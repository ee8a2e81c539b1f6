"""What the routes share: the sink of a path, a body that is JSON and no larger than it may be, an answer."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import Response

from spillway.api.errors import JSON, BadRequest


def answer(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type=JSON)


def sink_of(request: Request) -> str:
    return str(request.path_params["sink"])


async def json_body(request: Request, max_bytes: int, remedy: str = "") -> object:
    """The body's value; None: there is none. Raises BadRequest."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BadRequest(f"the body is above {max_bytes} bytes")
    if not body.strip():
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("the body is not JSON", remedy) from None

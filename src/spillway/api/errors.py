"""Every error of the HTTP side is ``{code, error, remedy}``, with the status that says whose it is."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from spillway.errors import SourceUnavailable, SpillwayError, StoreFailed

JSON = "application/json"


def error_response(
    status: int, code: str, error: str, remedy: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    body = orjson.dumps({"code": code, "error": error, "remedy": remedy})
    return Response(body, status, media_type=JSON, headers=headers)


async def on_spillway_error(_request: Request, error: Exception) -> Response:
    """What the engine refused. 409: the request is well formed, the state does not allow it."""
    assert isinstance(error, SpillwayError)
    if error.code.startswith("unknown_"):
        status = 404
    elif error.code == BadRequest.CODE:
        status = 400
    elif isinstance(error, SourceUnavailable | StoreFailed):
        status = 503
    else:
        status = 409
    return error_response(status, error.code, error.what, error.remedy)


async def on_http_error(_request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, f"http_{error.status_code}", error.detail, headers=error.headers)


async def on_defect(_request: Request, _error: Exception) -> Response:
    """A defect of ours: the traceback goes to the log, not to the client."""
    return error_response(500, "defect", "an internal error", "see the log of the process and report it")


class BadRequest(SpillwayError):
    """The request itself is wrong."""

    CODE = "bad_request"

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(self.CODE, what, remedy)

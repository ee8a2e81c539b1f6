"""Logging: one line per event on standard error, for people (``console``) or for machines (``json``).

``SPILLWAY_LOG_LEVEL`` is debug, info (the default), warning or error; ``SPILLWAY_LOG_FORMAT`` is console or json, by
default console on a terminal and json elsewhere. Libraries that log through the standard library (uvicorn, httpx,
psycopg) come out the same way.

Secrets never: every event, tracebacks included, passes `conceal` last before it is rendered. It blanks the values of
fields that are named like a secret, passwords in URLs and connection strings, Authorization headers, and the exact
secrets that `configure` was told. Tracebacks are rendered without local variables for the same reason.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from spillway.errors import SpillwayError

LEVEL_VARIABLE = "SPILLWAY_LOG_LEVEL"
FORMAT_VARIABLE = "SPILLWAY_LOG_FORMAT"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMATS = ("console", "json")

HIDDEN = "***"

_SECRET_NAME = re.compile(r"passw|secret|token|api[-_]?key|authorization|credential|private[-_]?key", re.IGNORECASE)
_SECRET_TEXT = (
    (re.compile(r"(://[^\s:/@]*):[^\s/]*@"), rf"\1:{HIDDEN}@"),
    (
        re.compile(r"(\b\w*(?:password|secret|token|api[-_]?key)=)('[^']*'|\"[^\"]*\"|[^\s&]+)", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\",]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)

# They report every request at info; what matters of it is logged by us.
_CHATTY = ("httpx", "httpcore", "asyncio", "uvicorn")


def configure(env: Mapping[str, str], *, json: bool = False, secrets: Sequence[str] = ()) -> None:
    """Set up logging for the process. ``json`` decides where the environment does not."""
    level = LEVELS.get(env.get(LEVEL_VARIABLE, "info").lower())
    if level is None:
        raise SpillwayError("log_level", f"{LEVEL_VARIABLE} is none of {', '.join(LEVELS)}", "correct or unset it")
    form = env.get(FORMAT_VARIABLE) or ("json" if json or not sys.stderr.isatty() else "console")
    if form not in FORMATS:
        raise SpillwayError("log_format", f"{FORMAT_VARIABLE} is none of {', '.join(FORMATS)}", "correct or unset it")

    first: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor] = [structlog.processors.format_exc_info, _Concealer(secrets), _renderer(form)]
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    foreign = logging.StreamHandler(sys.stderr)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*first, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[foreign], level=level, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def conceal(text: str, secrets: Sequence[str] = ()) -> str:
    """The text without what looks like a secret, and without ``secrets``."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


class _Concealer:
    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = tuple(secrets)

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {key: self._value(key, value) for key, value in event.items()}

    def _value(self, key: object, value: object) -> object:
        if value and isinstance(key, str) and _SECRET_NAME.search(key):
            return HIDDEN
        if isinstance(value, str):
            return conceal(value, self._secrets)
        if isinstance(value, Mapping):
            return {inner: self._value(inner, of) for inner, of in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._value(None, item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return conceal(str(value), self._secrets)


def _renderer(form: str) -> Processor:
    if form == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)

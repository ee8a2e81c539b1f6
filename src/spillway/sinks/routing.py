"""Where one message goes: what a routing function may say, by the type of the sink's destination.

A route is a mapping of the keys below; what it leaves out, or gives as None, is as the destination says. `checked`
makes what user code gave into what a sink relies on: known keys under their own names, values of the right type, within
the limits of the server. Numbers become text where a text is wanted and a row holds a number (ids, routing values,
headers).

======================  ================  ==========================================================================
search                  ``index_name``    the index, or an alias that takes writes
                        ``id``            the document's ``_id`` (also ``document_id``), at most 512 bytes
                        ``op``            ``index``, ``update`` or ``delete`` (also ``action``)
                        ``doc_as_upsert`` an update of a document that is not there makes it
                        ``routing``       the value that chooses the shard, of parent and children the same
                        ``pipeline``      the ingest pipeline, for ``index``
webhook                 ``method``        ``POST``, ``GET``, ``PUT``, ``PATCH``, ``DELETE``, ``HEAD`` or ``OPTIONS``
                        ``endpoint_path`` behind the endpoint's URL; begins with ``/``, ``?``, ``#``; no dot segments
                        ``headers``       a mapping, over the endpoint's headers
all others              none
======================  ================  ==========================================================================

An ``endpoint_path`` stays below the endpoint's URL, whose headers go with it: a segment ``.`` or ``..`` is refused,
percent-encoded, behind a backslash or before a ``;`` as well, since clients, proxies or servers would act on it.

The names are Sequin's where it has them. The limits are those of `spillway.config.destination`, of the servers (an
``_id`` of 512 bytes, index names) and of RFC 9110 (headers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final
from urllib.parse import unquote

from spillway.chunk import Route

_Check = Callable[[object], object]

METHODS: Final = ("POST", "GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
OPS: Final = ("index", "update", "delete")

_ID_BYTES = 512
_NAME_BYTES = 255
_TEXT_CHARACTERS = 1024
_PATH_CHARACTERS = 2000
_HEADERS = 100
_HEADER_CHARACTERS = 8192

_NOT_IN_INDEX_NAMES = re.compile(r'[\s/\\*?"<>|,#:]')
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OURS = ("content-length", "transfer-encoding", "host", "connection", "idempotency-key")
_NOT_IN_PATHS = re.compile(r"[\s\x00-\x1f\x7f]")


def checked(kind: str, given: Mapping[str, object]) -> Route:
    """The route of one message. ``kind``: the type of the destination. Raises ValueError, with a text for people."""
    checks = _CHECKS.get(kind, {})
    route: dict[str, object] = {}
    for name, value in given.items():
        key = _ALSO.get(name, name) if kind in SEARCH else name
        if key not in checks:
            raise ValueError(_unknown(kind, name))
        if value is None:
            continue
        if key in route:
            raise ValueError(f"{name} and {key} are the same, and both are given")
        try:
            route[key] = checks[key](value)
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds half of a surrogate pair") from error
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    if "pipeline" in route and route.get("op", "index") != "index":
        raise ValueError(f"pipeline goes with op: index; {route['op']} passes none")
    if "doc_as_upsert" in route and route.get("op", "update") != "update":
        raise ValueError(f"doc_as_upsert goes with op: update, not with {route['op']}")
    return route


def _unknown(kind: str, name: object) -> str:
    keys = ROUTING_KEYS.get(kind, ())
    if not keys:
        return f"{name} is unknown: a message for a sink of type {kind} cannot be routed"
    near = get_close_matches(str(name), [*keys, *(_ALSO if kind in SEARCH else ())], 1, 0.4)
    said = f": did you mean {near[0]}?" if near else "."
    return f"{name} is unknown{said} The keys of {kind} are {', '.join(keys)}"


# -- values -----------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {_named(value)}")  # noqa: TRY004 - the one error of this module
    value.encode()
    return value


def _short_text(value: object) -> str:
    text = _text(value)
    if not 1 <= len(text) <= _TEXT_CHARACTERS:
        raise ValueError(f"must have 1 to {_TEXT_CHARACTERS} characters")
    return text


def _id(value: object) -> str:
    text = _text(value)
    if not 1 <= len(text.encode()) <= _ID_BYTES:
        raise ValueError(f"must have 1 to {_ID_BYTES} bytes")
    return text


def _index_name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {_named(value)}")  # noqa: TRY004 - the one error of this module
    fine = 1 <= len(value.encode()) <= _NAME_BYTES and value == value.lower() and value not in (".", "..")
    if not fine or value[0] in "-_+" or _NOT_IN_INDEX_NAMES.search(value):
        raise ValueError(
            f"must be an index name: lower case, at most {_NAME_BYTES} bytes, not beginning with - _ or +, "
            'no blanks and none of /\\*?"<>|,#:'
        )
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {_named(value)}")  # noqa: TRY004 - the one error of this module
    return value


def _one_of(*values: str, fold: Callable[[str], str] = str) -> _Check:
    def check(value: object) -> str:
        if not isinstance(value, str) or fold(value) not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return fold(value)

    return check


def _path(value: object) -> str:
    if not isinstance(value, str) or _NOT_IN_PATHS.search(value) or len(value) > _PATH_CHARACTERS:
        raise ValueError(f"must be text of at most {_PATH_CHARACTERS} characters without blanks")
    value.encode()
    if value and value[0] not in "/?#":
        raise ValueError("must begin with /, ? or #")
    segments = re.split(r"[/\\]", unquote(re.split(r"[?#]", value, maxsplit=1)[0]))
    if any(segment.split(";", 1)[0] in (".", "..") for segment in segments):
        raise ValueError("must not have . or .. as a segment, which would lead out of the endpoint's path")
    return value


def _headers(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > _HEADERS:
        raise ValueError(f"must be a mapping of at most {_HEADERS} names to values")
    headers: dict[str, str] = {}
    for name, content in value.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"has {name!r}, which is no name of a header")
        if name.lower() in _OURS:
            raise ValueError(f"has {name}, which is not for a message to say")
        if content is None:
            continue
        text = _text(content).strip()
        if not text.isascii() or not text.replace("\t", " ").isprintable() or len(text) > _HEADER_CHARACTERS:
            raise ValueError(f"has {name} with a value that no header may hold")
        headers[name.lower()] = text
    return headers


def _named(value: object) -> str:
    names = {bool: "true or false", dict: "an object", list: "a list", tuple: "a list"}
    return names.get(type(value), type(value).__name__)


# -- by type of destination -------------------------------------------------------------------------------------------

SEARCH: Final = ("elasticsearch", "opensearch")
_ALSO: Final = {"document_id": "id", "action": "op"}  # other names that a search sink takes
_SEARCH: Final[Mapping[str, _Check]] = {
    "index_name": _index_name,
    "id": _id,
    "op": _one_of(*OPS),
    "doc_as_upsert": _flag,
    "routing": _short_text,
    "pipeline": _short_text,
}
_CHECKS: Final[Mapping[str, Mapping[str, _Check]]] = {
    **dict.fromkeys(SEARCH, _SEARCH),
    "webhook": {"method": _one_of(*METHODS, fold=str.upper), "endpoint_path": _path, "headers": _headers},
    "file": {},
    "stdout": {},
    "sqlite": {},
    "blackhole": {},
}

# What a route may say, by type of destination.
ROUTING_KEYS: Final[Mapping[str, tuple[str, ...]]] = {kind: tuple(checks) for kind, checks in _CHECKS.items()}

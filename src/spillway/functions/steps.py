"""The functions of a sink at work on one message: filter, routing, transform; here or in the worker.

Each function is given objects of its own, read from the message anew, so that what one does to them no other sees.
Without a Python function there is nothing to be read but for the transform.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from traceback import extract_tb
from typing import Final

import orjson

from spillway.functions import jsontext
from spillway.functions.fields import apply
from spillway.functions.made import (
    AS_IT_CAME,
    BODY,
    DETAIL_CHARACTERS,
    NOTHING,
    OUTPUT_BYTES,
    SEVERAL,
    Made,
    failed,
    several,
)
from spillway.functions.message import RoutedMessage
from spillway.functions.spec import FieldOperations, FunctionSpec, PathExpression
from spillway.impl import members
from spillway.members import named

UserFunction = Callable[[object, object, object, object], object]
Route = Mapping[str, object]

FRAMES: Final = 8  # of a traceback that are shown, the innermost
PATH: Final = re.compile(r"(record|changes|action|metadata)(\.[a-zA-Z0-9_\-.]+)*")
PATH_CHARACTERS: Final = 2000


class Wrong(Exception):
    """A result that is none, said for people."""


class TooLarge(Wrong):
    """A result beyond the limit."""


class Metadata(dict[str, object]):
    """``metadata["table_name"]`` and ``metadata.table_name`` are the same, at any depth, also in lists; where the name
    is one of a dictionary's methods (a column ``items``) as well.

    Code that is not the user's is given the methods nonetheless: `json` asks a dictionary for its ``items``.
    """

    __slots__ = ()

    def __getattribute__(self, name: str) -> object:
        if name not in self or name.startswith("__"):
            try:
                return super().__getattribute__(name)
            except AttributeError:
                raise AttributeError(f"metadata has no {name}") from None
        if name in _METHODS and _is_ours(sys._getframe(1).f_code.co_filename):
            return super().__getattribute__(name)
        value = self[name]
        if type(value) is dict:
            value = self[name] = Metadata(value)
        elif type(value) is list:
            _wrap_objects(value)
        return value


_METHODS: Final = frozenset(name for name in dir(dict) if not name.startswith("__"))


def _wrap_objects(items: list[object]) -> None:
    """In place. What has come with the message is whole: once one of the objects is wrapped, all are."""
    for place, item in enumerate(items):
        if type(item) is dict:
            items[place] = Metadata(item)
        elif type(item) is Metadata:
            return
        elif type(item) is list:
            _wrap_objects(item)


class Steps:
    """``step`` names the function that is running, for failures."""

    def __init__(self, spec: FunctionSpec, functions: Mapping[str, UserFunction]) -> None:
        self.step = "filter"
        self._filter = functions.get("filter")
        self._route = functions.get("routing")
        self._transform = functions.get("transform")
        self._extract = _built_in(spec)
        self._result_bytes = spec.result_bytes

    def __call__(self, message: bytes, is_delete: bool) -> Made:
        """What comes of the message. Raises whatever user code raises, and `Wrong`."""
        if self._filter is not None and not is_delete:
            self.step = "filter"
            verdict = _called(self._filter, message)
            if verdict is False:
                return NOTHING, b""
            if verdict is not True:
                raise Wrong(f"Filter functions must return true or false, not {_shown(verdict)}")
        route: Route | None = None
        if self._route is not None:
            self.step = "routing"
            said = _called(self._route, message)
            if said is not None and not isinstance(said, dict):
                raise Wrong(f"Routing functions must return a dictionary or None, not {_shown(said)}")
            route = said
        if is_delete or (self._transform is None and self._extract is None):
            return (AS_IT_CAME, b"") if route is None else self._several([(None, route)])
        self.step = "transform"
        if self._extract is not None:
            return self._one(self._extract(message), route)
        assert self._transform is not None
        result = _called(self._transform, message)
        if result is None:
            return NOTHING, b""
        if type(result) is not list and type(result) is not RoutedMessage:
            return self._one(jsontext.dumps(result), route)
        return self._several(
            [_output(one, route) for one in (result if type(result) is list else (result,)) if one is not None]
        )

    def _one(self, body: bytes, route: Route | None) -> Made:
        if route is not None:
            return self._several([(body, route)])
        if len(body) + OUTPUT_BYTES > self._result_bytes:
            raise self._too_large(len(body))
        return BODY, body

    def _several(self, outputs: list[tuple[bytes | None, Route | None]]) -> Made:
        if not outputs:
            return NOTHING, b""
        try:
            payload = several(outputs)
        except TypeError as error:
            raise Wrong(f"a value of the routing is no JSON: {error}") from error
        if len(payload) + OUTPUT_BYTES * len(outputs) > self._result_bytes:
            raise self._too_large(len(payload))
        return SEVERAL, payload

    def _too_large(self, size_bytes: int) -> TooLarge:
        return TooLarge(f"the result has {size_bytes} bytes, the limit of the sink is {self._result_bytes}")

    def failure(self, error: BaseException) -> Made:
        """Of the function that was running, or of the built-in one."""
        match error:
            case TooLarge():
                return failed("result_too_large", str(error))
            case Wrong():
                return failed(f"{self.step}_failed", str(error))
            case MemoryError():
                return failed("function_memory", f"{self.step} function: the memory limit is reached\n{_where(error)}")
            case _:
                return failed(f"{self.step}_failed", described(error))


def _output(one: object, route: Route | None) -> tuple[bytes, Route | None]:
    if isinstance(one, RoutedMessage):
        return jsontext.dumps(one.body), {**route, **one.route} if route else one.route or None
    return jsontext.dumps(one), route


def _called(function: UserFunction, message: bytes) -> object:
    value = jsontext.loads(message)
    assert isinstance(value, dict)
    return function(value["action"], value["record"], value["changes"], Metadata(value["metadata"]))


def _built_in(spec: FunctionSpec) -> Callable[[bytes], bytes] | None:
    """A path or field operations: the message to the body."""
    match spec.transform:
        case PathExpression(path):
            names = [orjson.dumps(part) for part in path.split(".")]

            def extract(message: bytes) -> bytes:
                value = message
                for name in names:
                    value = named(members(value)).get(name, b"null") if value.startswith(b"{") else b"null"
                return value

            return extract
        case FieldOperations(operations):
            return apply(operations)
        case _:
            return None


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r}"[:100] if isinstance(value, str | int | float) else type(value).__name__


def described(error: BaseException) -> str:
    """The exception and where user code raised it, cut to size."""
    kind = type(error).__name__
    try:
        text = f"{kind}: {error}" if str(error) else kind
    except Exception as inner:  # noqa: BLE001 - __str__ is user code too
        text = f"{kind} (its text raised {type(inner).__name__})"
    where = _where(error)
    most = DETAIL_CHARACTERS - len(where) - 1 if len(where) < DETAIL_CHARACTERS // 2 else DETAIL_CHARACTERS // 2
    return f"{text[:most]}\n{where}".rstrip()[:DETAIL_CHARACTERS]


def _where(error: BaseException) -> str:
    """The frames of user code, innermost first."""
    frames = [frame for frame in extract_tb(error.__traceback__, limit=-50) if not _is_ours(frame.filename)]
    lines = [
        f"  {frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")
        for frame in reversed(frames[-FRAMES:])
    ]
    return "\n".join(line[:200] for line in lines)


_OURS: Final = __file__.rsplit("/", 1)[0]
_STANDARD: Final = re.__file__.rsplit("/", 2)[0]


def _is_ours(file: str) -> bool:
    return file.startswith((_OURS, "<frozen ")) or (file.startswith(_STANDARD) and "-packages" not in file)


__all__ = ["PATH", "PATH_CHARACTERS", "Metadata", "Steps", "TooLarge", "UserFunction", "Wrong", "described"]

"""User code, loaded: the text or module of a `PythonFunction` to the function in it.

The text may use these modules without importing them: `json`, `re`, `datetime`, `decimal`, `hashlib`, `hmac`, `base64`,
`uuid`, `math`, `urllib` (with `urllib.parse`), and the function `message`. It may import whatever is installed: user
code is kept from harming the stream, not from what the operating system's user may do. It is no sandbox.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from importlib import import_module
from types import CodeType
from typing import Final

from spillway.functions.message import message
from spillway.functions.spec import PythonFunction
from spillway.functions.steps import UserFunction

NAMES: Final = {
    "filter": "filter",
    "routing": "route",
    "transform": "transform",
}  # of the function in the text, by step
ARGUMENTS: Final = "(action, record, changes, metadata)"
MODULES: Final = frozenset(
    ("json", "re", "datetime", "decimal", "hashlib", "hmac", "base64", "uuid", "math", "urllib.parse")
)
_GENERATOR_OR_ASYNC: Final = 0x20 | 0x80 | 0x200  # inspect.CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR


class NotLoaded(Exception):
    """For people: why there is no function."""


def load(step: str, function: PythonFunction) -> UserFunction:
    """Raises `NotLoaded`, or whatever user code raises."""
    found = _from_module(function.module) if function.module is not None else _from_text(step, function)
    code = getattr(found, "__code__", None)
    if isinstance(code, CodeType):
        if code.co_flags & _GENERATOR_OR_ASYNC:
            raise NotLoaded(f"{code.co_name} must be a plain function: no async, no yield")
        takes_any = code.co_flags & 0x04  # *args
        if not takes_any and code.co_argcount != 4:
            raise NotLoaded(f"it must be def {code.co_name}{ARGUMENTS}")
    return found


def _from_module(module: str) -> UserFunction:
    name, _, attribute = module.partition(":")
    found: object = import_module(name)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise NotLoaded(f"there is no function {attribute} in the module {name}")
    return found


def _from_text(step: str, function: PythonFunction) -> UserFunction:
    text = function.text or ""
    code = compile(text, function.file, "exec", dont_inherit=True)
    linecache.cache[function.file] = (len(text), None, text.splitlines(keepends=True), function.file)
    namespace: dict[str, object] = {"__name__": f"spillway_{step}", "__file__": function.file, "message": message}
    used = set(_names(code))
    for module in MODULES:
        top = module.partition(".")[0]
        if top in used:
            import_module(module)
            namespace[top] = import_module(top)
    exec(code, namespace)  # noqa: S102 - that is what it is for
    found = namespace.get(NAMES[step])
    if not callable(found):
        raise NotLoaded(f"it does not define {NAMES[step]}: write def {NAMES[step]}{ARGUMENTS}")
    return found


def _names(code: CodeType) -> Iterator[str]:
    """What the code calls by name, at any depth."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

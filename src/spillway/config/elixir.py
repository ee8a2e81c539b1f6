"""Sequin's functions are written in Elixir. They are refused, with the Python that stands for them.

`in_python` gives a function of the same signature. Its body is translated where it is one expression of maps, lists,
look-ups, comparisons, ``and``/``or``, ``<>`` and text; else it is left to be written. Nothing is guessed: whatever may
mean something else in Python (``||`` and ``!`` know no other false than false and nil, interpolation writes nil as
nothing) leaves the body open.
"""

from __future__ import annotations

import re

PARAMETERS = ("action", "record", "changes", "metadata")

_HEAD = re.compile(r"^\s*def\s+(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)\s*(?:do\b|,\s*do:)", re.MULTILINE)
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>"(?:[^"\\]|\\.)*")
      | (?P<metadata>metadata(?:\.\w+)+)
      | (?P<name>\w+:(?=\s))
      | (?P<number>\d+(?:\.\d+)?\b)
      | (?P<word>[a-z_]\w*)
      | (?P<sign>%\{|=>|===?|!==?|<=|>=|<>|\+\+|[-+*/<>,()\[\]{}])
    )""",
    re.VERBOSE,
)
_WORDS = {
    **{name: name for name in PARAMETERS},
    **{word: word for word in ("and", "or", "in")},
    "nil": "None",
    "true": "True",
    "false": "False",
}
_SIGNS = {
    "%{": "{",
    "=>": ":",
    "===": "==",
    "!==": "!=",
    "<>": "+",
    "++": "+",
}
_INTERPOLATED = re.compile(r"#\{\s*(?:action|metadata\.(table_name|table_schema|database_name|idempotency_key))\s*\}")


def is_elixir(code: str) -> bool:
    return _HEAD.search(code) is not None


def in_python(code: str, name: str) -> str:
    """``def NAME(action, record, changes, metadata):`` with the body, as far as it can be told."""
    body = _body(code)
    found = None if body is None else _expression(body)
    return f"def {name}({', '.join(PARAMETERS)}):\n    " + ("..." if found is None else f"return {found}")


def _body(code: str) -> str | None:
    head = _HEAD.search(code)
    if head is None or [p.strip().lstrip("_") for p in head["parameters"].split(",")] != list(PARAMETERS):
        return None
    lines = [line for line in code[head.end() :].splitlines() if not line.lstrip().startswith("#")]
    rest = "\n".join(lines).strip()
    return rest.removesuffix("end").rstrip() if head[0].endswith("do") else rest


def _expression(source: str) -> str | None:
    """The same in Python, or None if a part of it is not known or the whole is more than one expression."""
    source = source.strip()
    python: list[str] = []
    at = 0
    while at < len(source):
        match = _TOKEN.match(source, at)
        part = None if match is None else _part(match)
        if match is None or part is None:
            return None
        python.append(part)
        at = match.end()
    text = re.sub(r" +", " ", "".join(python)).strip()
    text = re.sub(r" (?=[\])},:])|(?<=[\[({]) ", "", text)
    try:
        compile(text, "function", "eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text


def _part(match: re.Match[str]) -> str | None:
    kind, token = match.lastgroup, match[0].strip()
    if kind == "text":
        return _text(token)
    if kind == "metadata":
        first, *names = token.split(".")
        return first + "".join(f'["{name}"]' for name in names)
    if kind == "name":
        return f'"{token[:-1]}": '
    if kind == "number":
        return token
    if kind == "word":
        word = _WORDS.get(token)
        return f" {word} " if token in ("and", "or", "in") else word
    sign = _SIGNS.get(token, token)
    return f"{sign} " if sign in (",", ":") else sign if sign in "()[]{}" else f" {sign} "


def _text(token: str) -> str | None:
    """Interpolated is only what is text always: the action, and names in the metadata."""
    if "#{" not in token:
        return token
    open_left = _INTERPOLATED.sub("", token)
    if "{" in open_left or "}" in open_left:
        return None
    return "f" + _INTERPOLATED.sub(lambda m: "{action}" if m[1] is None else f"{{metadata['{m[1]}']}}", token)

"""YAML 1.2-like text -> plain values that remember where they were written.

Promises:

- Types are those of YAML 1.2's core schema: `NO`, `on`, `12:30:45`, `2024-01-01` and `1_000` are text; only `true`,
  `false`, `null`, `~` and plain numbers are anything else. PyYAML's own resolvers follow YAML 1.1 and get all of these
  wrong, so none of them is used. A key is always text, as written.
- No digit of a number is lost: one that a double does not keep is an error.
- Anchors, aliases and merge keys (`<<`, one or a list) work. Each alias becomes a value of its own.
- A key written twice in one mapping is an error with the line of the second. PyYAML keeps the last one silently.
- Every mapping and list knows its path (`sinks[0].source`), its line and the lines of what is in it.

Nothing here knows what the keys mean. Values are never part of an error's text: they may be secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from math import isfinite

import yaml

# An alias is copied where it stands, so a few lines can stand for a billion values. No honest file comes near.
MAX_VALUES = 100_000
# Python refuses to read integers of thousands of digits.
MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "merge": re.compile(r"<<\Z"),
    "null": re.compile(r"(?:~|null|Null|NULL)?\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
}


class Block(dict[str, object]):
    """A mapping of the file. ``lines`` keeps the line of each key, also of one that was taken out again."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__()
        self.path, self.line = path, line
        self.lines: dict[str, int] = {}
        self.anchored: set[str] = set()  # of the whole file: keys whose value holds an anchor

    def key_path(self, key: str) -> str:
        shown = key if key and key.isprintable() else repr(key)
        return f"{self.path}.{shown}" if self.path else shown

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)


class Items(list[object]):
    """A list of the file."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__()
        self.path, self.line = path, line
        self.lines: list[int] = []


class DocumentError(Exception):
    """The text is not YAML as we read it, or says a thing twice."""

    def __init__(self, line: int, key: str, what: str) -> None:
        super().__init__(what)
        self.line, self.key, self.what = line, key, what


def read(text: str) -> Block:
    """The mapping that the text holds; an empty text is an empty mapping. Raises DocumentError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Block("", 1)
        if not isinstance(node, yaml.MappingNode):
            raise DocumentError(_line(node), "file", "must be a mapping of keys such as databases and sinks")
        return _Reader(loader.anchored).block(node, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(line, "YAML", what or "cannot be read") from None
    except yaml.reader.ReaderError as error:
        raise DocumentError(text.count("\n", 0, error.position) + 1, "YAML", "holds a control character") from None
    except RecursionError:
        raise DocumentError(1, "YAML", "is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's parser and composer without its resolvers; remembers which nodes carry an anchor."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own, which declares it so

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.anchored: set[yaml.Node] = set()

    def compose_document(self) -> yaml.Node | None:
        # As PyYAML's own, which forgets the anchors before it returns.
        self.get_event()  # type: ignore[no-untyped-call]
        node: yaml.Node | None = self.compose_node(None, None)  # type: ignore[arg-type]
        self.get_event()  # type: ignore[no-untyped-call]
        self.anchored = set(self.anchors.values())
        self.anchors = {}
        return node


for _kind, _first in (
    ("merge", ["<"]),
    ("null", ["~", "n", "N", ""]),
    ("bool", list("tTfF")),
    ("int", list("-+0123456789")),
    ("float", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _SCALARS[_kind], _first)


class _Reader:
    def __init__(self, anchored: set[yaml.Node]) -> None:
        self._anchored = anchored
        self._open: list[yaml.Node] = []
        self._values = 0
        self._seen: set[yaml.Node] = set()  # an anchor is where its node is seen first; later it is an alias

    def block(self, node: yaml.MappingNode, path: str) -> Block:
        block = Block(path, _line(node))
        merged: list[yaml.Node] = []
        self._open.append(node)
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise DocumentError(_line(key_node), path or "file", "a key must be text")
            key = key_node.value
            if key in block.lines:
                was = block.lines[key]
                raise DocumentError(_line(key_node), block.key_path(key), f"is given twice; line {was} has it already")
            block.lines[key] = _line(key_node)
            if key_node.tag == _TAG + "merge":
                merged += self._sources(value_node)
                continue
            block[key] = self.value(value_node, block.key_path(key))
            if not path and not self._anchored.isdisjoint(set(_tree(value_node, self._seen))):
                block.anchored.add(key)
        for source in merged:
            self._merge(block, source)
        self._open.pop()
        return block

    def value(self, node: yaml.Node, path: str) -> object:
        self._values += 1
        if self._values > MAX_VALUES:
            raise DocumentError(_line(node), path, f"its aliases stand for more than {MAX_VALUES:,} values")
        if node in self._open:
            raise DocumentError(_line(node), path, "an alias may not stand inside of what it stands for")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.block(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return self._items(node, path)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, path)
        raise DocumentError(_line(node), path, f"the tag {_short(node.tag)} is not understood")

    def _items(self, node: yaml.SequenceNode, path: str) -> Items:
        items = Items(path, _line(node))
        self._open.append(node)
        for index, item in enumerate(node.value):
            items.append(self.value(item, f"{path}[{index}]"))
            items.lines.append(_line(item))
        self._open.pop()
        return items

    def _sources(self, node: yaml.Node) -> list[yaml.Node]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise DocumentError(_line(source), "<<", "must be an alias of a mapping, or a list of such")
        return list(sources)

    def _merge(self, block: Block, source: yaml.Node) -> None:
        """What is written in the mapping itself wins, then the first of the merged mappings."""
        merged = self.value(source, block.path)
        if isinstance(merged, Block):
            for key, value in merged.items():
                if key not in block:
                    block[key] = value
                    block.lines[key] = merged.lines[key]


def _tree(node: yaml.Node, seen: set[yaml.Node]) -> Iterator[yaml.Node]:
    if node in seen:
        return
    seen.add(node)
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _tree(key, seen)
            yield from _tree(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _tree(item, seen)


def _scalar(node: yaml.ScalarNode, path: str) -> object:
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    if kind in ("str", "merge"):
        return text
    pattern = _SCALARS.get(kind)
    if pattern is None:
        raise DocumentError(_line(node), path, f"the tag {_short(node.tag)} is not understood")
    if not pattern.fullmatch(text) or len(text) > MAX_DIGITS:
        raise DocumentError(_line(node), path, f"is no {_short(node.tag)}")
    if kind == "null":
        return None
    if kind == "bool":
        return text[0] in "tT"
    if kind == "int":
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    number = float(text)
    try:
        kept = isfinite(number) and Decimal(repr(number)) == Decimal(text)
    except InvalidOperation:  # an exponent beyond theirs
        kept = False
    if not kept:
        raise DocumentError(_line(node), path, "has more digits than a number with a fraction keeps: put it in quotes")
    return number


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1

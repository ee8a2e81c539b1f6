"""What the plan of an enrichment says of what it makes of all keys together.

Sequin asks for each message, Spillway for all keys of a batch. A LIMIT, or an aggregate without GROUP BY, is right
there; here it is one for the rows of all keys, and a message gets what belongs to others. The plan is asked for with
empty arrays, so whatever depends on all keys has such an array in it. Two things are looked for:

- the plan's main line, followed from the top as long as a node has one input: that gives a number of rows that does not
  depend on the number of keys, whatever stands below;
- a Limit or a plain Aggregate anywhere (of a subquery in the SELECT list, of one that is joined, of a CTE) above
  something that depends on all keys. It is asked for each key, and right, if something below it refers to a row from
  outside of it, as LATERAL and correlated subqueries do. What cannot be told counts as such a reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

Node = Mapping[str, object]

_MAIN: Final = ("Outer", "Subquery")  # "Parent Relationship" of what a node has its rows from; others are expressions
_ROWS: Final = (*_MAIN, "Inner", "Member")
_LIMIT: Final = "a LIMIT for all keys together"
_PLAIN: Final = "one row of the rows of all keys (an aggregate without GROUP BY)"

_KEYS: Final = re.compile(r"'\{\}'::[^':\[]+\[\]")
# As an argument: in a condition that is how a column of a ProjectSet is written, which may be one from outside.
_OF_FUNCTION: Final = re.compile(r"\w\('\{\}'::[^':\[]+\[\]")
_NO_COLUMNS: Final = re.compile(r"'(?:[^']|'')*'|::[\w.\"]+")  # literals and casts
_COLUMN: Final = re.compile(r'("(?:[^"]|"")*"|[^\W\d][\w$]*)\.(?!\w+\()')  # with whose it is; a function has a schema
_PARAMETER: Final = re.compile(r"\$\d+")  # what another part of the plan gives, which says so in its name
_NAME: Final = "Subplan Name"


def few_rows(plan: object) -> str:
    """What the SQL does for all keys together, as it goes on behind "the enrichment"; "" if nothing was found.
    ``plan``: as EXPLAIN VERBOSE has it in JSON."""
    return _main_line(plan) or _subqueries(plan)


def _main_line(plan: object) -> str:
    node = plan
    while isinstance(node, dict):
        few = _few(node)
        if few:
            return f"{'has' if few is _LIMIT else 'makes'} {few}"
        kind = node.get("Node Type")
        inputs = [one for one in _inputs(node) if one.get("Parent Relationship") in _ROWS]
        if kind == "Result" and not inputs and node.get("One-Time Filter") != "false":
            return "gives one row, however many keys it is asked for"
        if kind == "ProjectSet" or len(inputs) != 1 or inputs[0]["Parent Relationship"] not in _MAIN:
            return ""
        node = inputs[0]
    return ""


def _subqueries(plan: object) -> str:
    nodes = list(_nodes(plan))
    ctes = {str(node[_NAME]): node for node in nodes if str(node.get(_NAME)).startswith("CTE ")}
    for node in nodes:
        few = _few(node)
        if few and _of_all_keys(node, ctes) and not _of_a_row_outside(node):
            return f"has a subquery that {'has' if few is _LIMIT else 'makes'} {few}"
    return ""


def _few(node: Node) -> str:
    if node.get("Node Type") == "Limit":
        return _LIMIT
    return _PLAIN if node.get("Node Type") == "Aggregate" and node.get("Strategy") == "Plain" else ""


def _inputs(node: Node) -> list[Node]:
    inputs = node.get("Plans")
    return inputs if isinstance(inputs, list) else []


def _nodes(node: object) -> Iterator[Node]:
    """It, and all below it."""
    if isinstance(node, dict):
        yield node
        for one in _inputs(node):
            yield from _nodes(one)


def _of_all_keys(node: Node, ctes: Mapping[str, Node]) -> bool:
    below = list(_nodes(node))
    sets = _makes_sets(below)
    for one in below:
        text = _text(one)
        if _KEYS.search(text if sets or "Function Call" in one else _OF_FUNCTION.sub("", text)):
            return True
        # The CTE's plan is elsewhere. (One that reads itself does so by a node of another type.)
        cte = ctes.get(f"CTE {one.get('CTE Name')}") if one.get("Node Type") == "CTE Scan" else None
        if cte is not None and _of_all_keys(cte, ctes):
            return True
    return False


def _of_a_row_outside(node: Node) -> bool:
    below = list(_nodes(node))
    sets = _makes_sets(below)
    aliases = {one.get("Alias") for one in below}
    parameters = {parameter for one in below for parameter in _PARAMETER.findall(str(one.get(_NAME)))}
    for one in below:
        text = _text(one)
        if not sets and "Function Call" not in one and _OF_FUNCTION.search(text):
            return True
        text = _NO_COLUMNS.sub("", text)
        if not parameters.issuperset(_PARAMETER.findall(text)):
            return True
        if not aliases.issuperset(map(_unquoted, _COLUMN.findall(text))):
            return True
    return False


def _makes_sets(nodes: Iterable[Node]) -> bool:
    return any(one.get("Node Type") == "ProjectSet" for one in nodes)


def _text(node: Node) -> str:
    """All that is said of it, its expressions among it."""
    lines: list[str] = []
    for name, value in node.items():
        if isinstance(value, str) and name != _NAME:
            lines.append(value)
        elif isinstance(value, list) and name != "Plans":
            lines += map(str, value)
    return "\n".join(lines)


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name

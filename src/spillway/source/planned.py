"""What the plan of an enrichment says of how many rows it gives.

Sequin asks for each message, Spillway for all keys of a batch. SQL that ends in a LIMIT, or that aggregates without
GROUP BY, is right there, and here it gives one row, made of the rows of all keys, or the rows of some keys alone. The
plan tells that from a LIMIT or an aggregate inside of a LATERAL or another subquery, which is asked for each key: these
are below a join, or beside the plan's main line. That line is followed from the top as long as a node has one input.
"""

from __future__ import annotations

from typing import Final

_KIND: Final = "Node Type"
_MAIN: Final = ("Outer", "Subquery")  # "Parent Relationship" of what a node has its rows from; others are expressions


def few_rows(plan: object) -> str:
    """Why the rows do not depend on how many keys are asked for; "" if they may."""
    node = plan
    while isinstance(node, dict):
        kind = node.get(_KIND)
        if kind == "Limit":
            return "has a LIMIT for all keys together"
        if kind == "Aggregate" and node.get("Strategy") == "Plain":
            return "makes one row of the rows of all keys (an aggregate without GROUP BY)"
        inputs = [one for one in node.get("Plans", ()) if one.get("Parent Relationship") in (*_MAIN, "Inner", "Member")]
        if kind == "Result" and not inputs:
            return "gives one row, however many keys it is asked for"
        if kind == "ProjectSet" or len(inputs) != 1 or inputs[0]["Parent Relationship"] not in _MAIN:
            return ""
        node = inputs[0]
    return ""

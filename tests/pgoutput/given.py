"""Conditions as tests write them."""

from __future__ import annotations

from dataclasses import dataclass

from spillway.pgoutput.conditions import Operator


@dataclass(frozen=True)
class If:
    """`spillway.pgoutput.conditions.Condition`."""

    column: str
    operator: Operator
    value: object = None
    path: tuple[str, ...] = ()
    table: tuple[str, str] = ("public", "jobs")

"""What came of a message, as the rest of Spillway sees it."""

from __future__ import annotations

from typing import Final

from spillway.functions.base import Failure, Outcome, Output
from spillway.functions.made import AS_IT_CAME, BODY, FAILED, NOTHING, Made, outputs, reason_and_detail

_UNCHANGED: Final[Outcome] = (Output(None),)


def outcome(made: Made) -> Outcome:
    kind, payload = made
    if kind == BODY:
        return (Output(payload),)
    if kind == AS_IT_CAME:
        return _UNCHANGED
    if kind == NOTHING:
        return ()
    if kind == FAILED:
        return Failure(*reason_and_detail(payload))
    return tuple(Output(body, route) for body, route in outputs(payload))

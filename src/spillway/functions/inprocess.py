"""Functions without Python in them, a path or field operations: trusted, so they run where the messages are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from spillway.functions.base import Outcome
from spillway.functions.outcome import outcome
from spillway.functions.spec import FunctionSpec
from spillway.functions.steps import Steps

TURN_BYTES: Final = 256 << 10  # of messages, then others have the loop: some milliseconds


class BuiltInFunctions:
    """See `spillway.functions.base.Functions`."""

    def __init__(self, spec: FunctionSpec) -> None:
        self._steps = Steps(spec, {})

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def __call__(
        self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
    ) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        answered_bytes = turn_bytes = 0
        for message, is_delete in zip(messages, deletes, strict=True):
            try:
                made = self._steps(message, is_delete)
            except Exception as error:  # noqa: BLE001 - data of one message: it alone fails
                made = self._steps.failure(error)
            outcomes.append(outcome(made))
            answered_bytes += len(made[1])
            if answer_bytes and answered_bytes >= answer_bytes:
                break
            turn_bytes += len(message)
            if turn_bytes >= TURN_BYTES:
                turn_bytes = 0
                await asyncio.sleep(0)
        return outcomes

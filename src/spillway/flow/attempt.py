"""One attempt of one batch: ask the sink, under a deadline, and get an `Answer` whatever becomes of it.

A rejection of a whole batch is halved until the culprit is alone. For sinks that apply a batch in order, what follows
a culprit under one of its keys is not sent: its result is `BLOCKED`, and it shares the culprit's fate to wait.

Where messages are shaped (spillway.flow.shaping) that comes first, once; what is sent and halved is what came of it.

A TRUNCATE has no key, and everything of its table stands behind it: one that is refused concerns the sink as a whole.
It is never parked, it and all that follows it go back, and it is the probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from spillway.chunk import Batch, Message
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.sinks.base import Result, Sink, sink_down

Answer = Sequence[Result] | Result  # one per message, in the order of the batch, or one that holds for all
Send = Callable[[Batch], Awaitable[Answer]]
Shape = Callable[[Batch, Send], Awaitable[Answer]]  # shapes a batch, sends what comes of it, and answers for it

BLOCKED = Result("retry", "blocked")
UNCHANGED_TOAST = Result(
    "reject", "unchanged_toast", "the update does not carry a large column; ALTER TABLE ... REPLICA IDENTITY FULL"
)

_log = structlog.get_logger()


class Attempt:
    """Asks one sink. Opens it when needed; forgets that it is open after a failure of the sink."""

    def __init__(
        self,
        name: str,
        sink: Sink,
        clock: Clock,
        timeout_seconds: float,
        toast_fails: bool,
        shape: Shape | None,
        answered: Callable[[int, float], None],
    ) -> None:
        """``answered`` hears how many messages of a request were answered, and after how many seconds."""
        self._answered = answered
        self._name = name
        self._sink = sink
        self._shape = shape
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._toast_fails = toast_fails
        self._opened = False
        self._opening = asyncio.Lock()
        self._applies_in_order = sink.semantics in ("ordered", "atomic")

    async def __call__(self, batch: Batch) -> Answer:
        if self._shape is None:
            return await self._send(batch)
        try:
            return await self._shape(batch, self._send)
        except Exception as error:  # noqa: BLE001 - isolation (I6), as for the sink's own code
            return self._defect(error)

    async def _send(self, batch: Batch) -> Answer:
        if self._toast_fails and not batch.plain and any(_lacks_toast(m) for m in batch):
            return await self._around([_lacks_toast(m) for m in batch], batch)
        answer = await self._ask(batch)
        if not isinstance(answer, Result) or answer.outcome not in ("retry", "reject"):
            return answer
        if answer.outcome == "retry" or len(batch) == 1:
            return replace(answer, outcome="sink_down") if any(is_truncate(m) for m in batch) else answer
        half = len(batch) // 2
        results = list(each(await self._send(batch[:half]), batch[:half]))
        rest = batch[half:]
        if results[-1].outcome == "sink_down":
            return results + [results[-1]] * len(rest)
        if not self._applies_in_order:
            return results + list(each(await self._send(rest), rest))
        blocked = {k for m, r in zip(batch, results, strict=False) if r.outcome != "ok" for k in m.keys}
        return results + list(await self._around([_stands_behind(blocked, m) for m in rest], rest, BLOCKED))

    async def _around(self, left_out: Sequence[bool], batch: Batch, answer: Result = UNCHANGED_TOAST) -> list[Result]:
        """Send the batch without those left out, which get the answer."""
        sent = Batch.of([m for m, out in zip(batch, left_out, strict=True) if not out])
        sent_results = iter(each(await self._send(sent), sent) if sent else ())
        results = [answer if out else next(sent_results) for out in left_out]
        if self._applies_in_order:
            down = next((at for at, result in enumerate(results) if result.outcome == "sink_down"), len(results))
            results[down:] = results[down : down + 1] * (len(results) - down)
        return results

    async def _ask(self, batch: Batch) -> Answer:
        asked_at = self._clock.monotonic()
        try:
            async with self._clock.timeout(self._timeout_seconds):
                if not self._opened:
                    async with self._opening:
                        if not self._opened:
                            await self._sink.open()
                            self._opened = True
                answer = await self._sink.send(batch)
        except TimeoutError:
            answer = sink_down("timeout", f"no answer within {self._timeout_seconds:g} s")
        except SpillwayError as error:
            answer = sink_down(error.code, str(error))
        except Exception as error:  # noqa: BLE001 - isolation (I6): a defect in one sink's code must not stop the others
            answer = self._defect(error)
        if not isinstance(answer, Result) or answer.outcome == "ok":
            self._answered(len(batch), self._clock.monotonic() - asked_at)
        if isinstance(answer, Result):
            if answer.outcome == "sink_down":
                self._opened = False
        elif len(answer) != len(batch):
            return sink_down("internal_error", f"{len(answer)} results for {len(batch)} messages")
        return answer

    def _defect(self, error: Exception) -> Result:
        _log.exception("sink failed unexpectedly", sink=self._name)
        return sink_down("internal_error", f"{type(error).__name__}: {error}")


def each(answer: Answer, batch: Batch) -> Sequence[Result]:
    """One result per message."""
    return [answer] * len(batch) if isinstance(answer, Result) else answer


def is_truncate(message: Message) -> bool:
    return message.change.action == "truncate"


def _lacks_toast(message: Message) -> bool:
    return not message.whole and message.action == "update"


def _stands_behind(blocked: set[str], message: Message) -> bool:
    """Asked in order: one that is blocked under one of its keys blocks what follows under the other."""
    if blocked.isdisjoint(message.keys):
        return False
    blocked.update(message.keys)
    return True

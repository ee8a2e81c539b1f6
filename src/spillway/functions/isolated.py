"""Functions with Python in them: all of a sink's run in one worker process, which is started with the first batch.

A call is cut into requests of `REQUEST_BYTES`; results are taken in parts, so that neither side holds much of a batch
twice. When the worker is lost, the message that was running fails, and a new worker goes on with the rest. What the
lost one had done and not yet said is run again, *carefully*: with each result sent at once, the next loss, if it is the
fault of one of these messages, is known to be of the first that has no result.

A worker that ends by a signal, or does not come back in time, may be somebody else's doing: the kernel's where memory
runs out, an operator's, a machine's that stood still, or what messages before have left behind. So the message that was
running is *warned*: it is run again alone, in a worker of its own, and is guilty if that is lost as well. What ends its
process by itself (``os._exit``) or closes its files is guilty at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from spillway.errors import SpillwayError
from spillway.functions.base import Outcome
from spillway.functions.made import DONE, MORE, Ask, Broken, Made, failed
from spillway.functions.outcome import outcome
from spillway.functions.process import Lost, WorkerProcess
from spillway.functions.spec import FunctionSpec

REQUEST_BYTES: Final = 1 << 20  # of messages, unless a single one is larger
REQUEST_MESSAGES: Final = 8192
ANSWER_SECONDS: Final = 5.0  # then what is there is sent first, if the caller takes parts


@dataclass(slots=True)
class _Progress:
    """Of one call. ``suspects``: up to here it is run carefully. ``warned``: a worker was lost over them once.
    ``guilty``: failures that are decided, by place."""

    at: int = 0
    suspects: int = 0
    warned: set[int] = field(default_factory=set)
    guilty: dict[int, Made] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    bytes: int = 0
    began: float = field(default_factory=time.monotonic)

    def is_enough(self, answer_bytes: int) -> bool:
        late = time.monotonic() - self.began >= ANSWER_SECONDS
        return self.bytes >= answer_bytes or (late and self.at > 0)

    def add(self, made: Made) -> None:
        self.outcomes.append(outcome(made))
        self.bytes += len(made[1])
        self.at += 1


class IsolatedFunctions:
    """See `spillway.functions.base.Functions`."""

    def __init__(self, spec: FunctionSpec) -> None:
        self._spec = spec
        self._turn = asyncio.Lock()
        self._worker: WorkerProcess | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the worker, while there is one."""
        return self._worker.pid if self._worker is not None else None

    async def open(self) -> None:
        """Start the worker if there is none. Raises `SpillwayError` if it or user code does not start."""
        async with self._turn:
            await self._started()

    async def close(self) -> None:
        self._closed = True
        await self._renew()

    async def __call__(
        self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
    ) -> Sequence[Outcome]:
        async with self._turn:
            progress = _Progress()
            try:
                while progress.at < len(messages) and not (answer_bytes and progress.is_enough(answer_bytes)):
                    await self._go_on(messages, deletes, answer_bytes, progress)
            except BaseException:
                await self._renew()  # cancelled, or a defect: whatever it still says is nobody's
                raise
            return progress.outcomes

    async def _go_on(
        self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int, progress: _Progress
    ) -> None:
        if progress.at in progress.guilty:
            progress.add(progress.guilty.pop(progress.at))
            return
        first = progress.at
        careful = first < progress.suspects
        if first in progress.warned:
            end = first + 1
            await self._renew()
        else:
            ahead = [place for place in (*progress.guilty, *progress.warned) if place > first]
            end = _request_end(messages, first, min(ahead, default=len(messages)))
        if careful:
            end = min(end, progress.suspects)
        worker = await self._started()
        left_bytes = answer_bytes - progress.bytes if answer_bytes else 0
        try:
            await worker.ask(Ask(messages[first:end], deletes[first:end], careful, left_bytes, ANSWER_SECONDS))
            how = MORE
            while how == MORE:
                parts, how = await worker.answer()
                if len(parts) > end - progress.at or (how == MORE and not parts):
                    raise Broken
                for made in parts:
                    progress.add(made)
            if how != DONE:
                await self._renew()
        except Broken:
            await self._renew()
            disturbed = failed("function_crashed", "the function has disturbed its process")
            self._blame(progress, careful, end, Lost(None, disturbed), None)
        except Lost as lost:
            await self._renew()
            self._must_be_open()
            place = None if lost.place is None else first + lost.place
            self._blame(progress, careful, end, lost, place)

    def _blame(self, progress: _Progress, careful: bool, end: int, lost: Lost, place: int | None) -> None:
        if place is None or not progress.at <= place < end:
            place = progress.at if careful else None
        if place is None:
            progress.suspects = end
        elif not lost.certain and place not in progress.warned:
            progress.warned.add(place)
        else:
            progress.guilty[place] = lost.failure
            progress.suspects = place

    async def _started(self) -> WorkerProcess:
        self._must_be_open()
        if self._worker is None:
            self._worker = await WorkerProcess.start(self._spec)
            try:
                self._must_be_open()
            except SpillwayError:  # closed while it started
                await self._renew()
                raise
        return self._worker

    def _must_be_open(self) -> None:
        if self._closed:
            raise SpillwayError("functions_closed", "the functions of this sink are closed")

    async def _renew(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.end()


def _request_end(messages: Sequence[bytes], first: int, limit: int) -> int:
    size = len(messages[first])
    end = first + 1
    limit = min(limit, first + REQUEST_MESSAGES)
    while end < limit and size + len(messages[end]) <= REQUEST_BYTES:
        size += len(messages[end])
        end += 1
    return end

"""The null sink, which notes when it was called for each message.

Pairs of 64 bits, (when ``send`` was called, when the message was committed) in microseconds since 1970, written to the
file that SPEED_CALLBACKS names when the sink is closed.
"""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path

from spillway.chunk import TIME, Batch
from spillway.sinks.base import Result, SinkContext
from spillway.sinks.blackhole import BlackholeSink


class TimedBlackhole(BlackholeSink):
    def __init__(self, context: SinkContext) -> None:
        super().__init__(context)
        self._pairs = array("q")

    async def send(self, batch: Batch) -> Result:
        now_us = time.time_ns() // 1000
        for span, start, stop in batch.pieces:
            for index in span.indices[start:stop]:
                self._pairs.extend((now_us, span.chunk.word(index, TIME)))
        return await super().send(batch)

    async def close(self) -> None:
        # All is over: nobody waits for the loop any more.
        Path(os.environ["SPEED_CALLBACKS"]).write_bytes(self._pairs)  # noqa: ASYNC240
        await super().close()

"""Nowhere: every message is acknowledged at once and counted. For measuring what comes before a sink.

**Semantics ``ordered``**, since nothing is quicker than to do nothing in order.
"""

from __future__ import annotations

import structlog

from spillway.chunk import Batch
from spillway.sinks.base import OK, Result, Semantics, SinkContext

_log = structlog.get_logger()


class BlackholeSink:
    semantics: Semantics = "ordered"
    max_in_flight = 1
    single = False

    def __init__(self, context: SinkContext) -> None:
        self._name = context.name
        self._suffix_bytes = len(context.suffix)
        self.messages = 0
        self.bytes = 0

    async def open(self) -> None:
        """Nothing to do."""

    async def send(self, batch: Batch) -> Result:
        self.messages += len(batch)
        self.bytes += batch.body_bytes + (0 if batch.complete else len(batch) * self._suffix_bytes)
        return OK

    async def close(self) -> None:
        _log.info("blackhole closed", sink=self._name, messages=self.messages, bytes=self.bytes)

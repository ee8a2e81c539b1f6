"""A thread of one sink: blocking calls, one after the other, off the loop.

A call whose caller is cancelled before it began does not happen; one that has begun goes on to its end, and the next
call waits for it. So what a sink keeps in this thread is never touched by two calls at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OwnThread:
    def __init__(self, sink: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sink-{sink}")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: call(*args, **kwargs))

    async def close(self) -> None:
        """Ends the thread after what it is doing. Idempotent; no call may follow."""
        await asyncio.to_thread(self._executor.shutdown)

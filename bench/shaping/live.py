"""Live changes beside something large: a job is updated at a steady rate, and somebody looks into the index for it.

From the commit's begin to the moment at which a look at the index has the new title, so the time of the commit and half
of the time between two looks are in the figure. The writer does not wait for anybody (open loop).
"""

from __future__ import annotations

import itertools
import threading
import time
from types import TracebackType
from typing import Self

import httpx
import psycopg

A_SECOND = 40
LOOK_SECONDS = 0.01


class Live:
    """``with Live(...) as live``; `seconds` by the moment of the commit."""

    def __init__(self, conninfo: str, search_url: str, index: str, jobs: range) -> None:
        self._conninfo, self._jobs = conninfo, jobs
        self._path = f"/{index}/_mget?_source_includes=title"
        self._search = httpx.Client(base_url=search_url, timeout=60, trust_env=False)
        self._lock = threading.Lock()
        self._outstanding: dict[int, tuple[int, float]] = {}  # job -> number of its title, when
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._write, self._look)]
        self._error: Exception | None = None
        self.seconds: list[tuple[float, float]] = []  # (monotonic time of the commit, seconds to the index)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._search.close()
        if error is None and self._error is not None:
            raise self._error

    def between(self, since: float, until: float) -> list[float]:
        """Those that did not arrive count with what they have waited so far."""
        now = time.monotonic()
        with self._lock:
            late = [now - at for _, at in self._outstanding.values() if since <= at <= until]
        return [took for at, took in self.seconds if since <= at <= until] + late

    def _guarded(self, work) -> None:  # type: ignore[no-untyped-def]
        try:
            work()
        except Exception as error:  # noqa: BLE001 - of a thread: raised by who waits for it
            self._error = error

    def _write(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            began = time.monotonic()
            for number, job in zip(itertools.count(1), itertools.cycle(self._jobs)):
                if self._end.wait(max(0.0, began + number / A_SECOND - time.monotonic())):
                    return
                with self._lock:
                    if job in self._outstanding:
                        continue  # it waits still, and its time runs
                    self._outstanding[job] = number, time.monotonic()
                connection.execute("update public.jobs set title = %s where id = %s", [f"title {number}", job])

    def _look(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            with self._lock:
                waiting = dict(self._outstanding)
            if not waiting:
                continue
            body = {"ids": [str(job) for job in waiting]}
            found = self._search.post(self._path, json=body).raise_for_status().json()["docs"]
            now = time.monotonic()
            for one in found:
                number, at = waiting[int(one["_id"])]
                if one.get("_source", {}).get("title") == f"title {number}":
                    with self._lock:
                        del self._outstanding[int(one["_id"])]
                    self.seconds.append((at, now - at))

"""A bare bulk client of OpenSearch: what an index takes from somebody who has nothing else to do.

Two connections, a thread each, send ready-made bodies (``peers.index.Documents``: the same operations, versions and
rows as Spillway's) and look only whether the answer says ``"errors":false``. Beside it, if a slot is given,
``pg_recvlogical`` drains the same rows, so that PostgreSQL takes its share of the cores as it does with Spillway.

Time is from the first request to the last answer. CPU is that of the two threads. Peak memory is not told (0): the
documents of the whole run lie in memory. ``best_body_bytes`` finds the size of body that does best; the server is
warm after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from peers import Measured, PeerFailed, recvlogical
from peers.index import Documents, Index, connect
from peers.source import Slot

CONNECTIONS = 2
BODY_BYTES = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20)


def drain(
    slot: Slot | None,
    index: Index,
    documents: Documents,
    *,
    body_bytes: int = 1 << 20,
    connections: int = CONNECTIONS,
    limit: int | None = None,
) -> Measured:
    """Writes the documents (the first ``limit`` of them) into an index that is there and empty."""
    bodies = documents.bodies(body_bytes, limit=limit)
    lock = Lock()
    with ThreadPoolExecutor(connections + 1) as threads:
        beside = None if slot is None else threads.submit(recvlogical.drain, slot)
        began = time.monotonic()
        senders = [threads.submit(_send, index, bodies, lock) for _ in range(connections)]
        cpu_seconds = sum(sender.result() for sender in senders)
        seconds = time.monotonic() - began
        drained = None if beside is None else beside.result()
    rows = len(documents) if limit is None else min(limit, len(documents))
    if index.documents() != rows:
        raise PeerFailed(f"{index.documents()} documents in the index, {rows} were sent")
    detail: dict[str, object] = {
        "connections": connections,
        "body_bytes": body_bytes,
        "pg_recvlogical_rows_per_second": drained and drained.rows_per_second,
    }
    return Measured(rows, seconds, cpu_seconds, 0, detail)


def _send(index: Index, bodies: Iterator[memoryview], lock: Lock) -> float:
    path = f"/{index.name}/_bulk?filter_path=errors"
    headers = {"content-type": "application/x-ndjson"}
    connection = connect(index.url)
    try:
        while True:
            with lock:
                body = next(bodies, None)
            if body is None:
                return time.thread_time()
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            told = answer.read()
            if answer.status != 200 or json.loads(told)["errors"]:
                raise PeerFailed(f"bulk: {answer.status} {told[:1000].decode()}")
    finally:
        connection.close()


def best_body_bytes(
    url: str, documents: Documents, *, mapping: Mapping[str, object] | None = None, limit: int = 200_000
) -> tuple[int, dict[int, float]]:
    """The best size of body, and the rate that each reached.

    Each has two runs, of which the faster counts; two more before them warm the server.
    """
    rates = dict.fromkeys(BODY_BYTES, 0.0)
    for place, body_bytes in enumerate((1 << 20, 1 << 20, *BODY_BYTES, *BODY_BYTES)):
        index = Index(url, "body_sizes").create(mapping)
        try:
            measured = drain(None, index, documents, body_bytes=body_bytes, limit=limit)
            if place >= 2:
                rates[body_bytes] = max(rates[body_bytes], measured.rows_per_second)
        finally:
            index.delete()
    return max(rates, key=lambda size: rates[size]), rates

"""pgsync in WAL mode, into OpenSearch.

It reads a slot of the plugin ``test_decoding`` (it can no other), buffers 5,000 changes, reads their rows back from the
table and bulk-indexes them. Everything is its default but what ``ENVIRONMENT`` and ``schema`` below say. In this mode
it needs no Redis, no triggers and no bootstrap: the slot it wants is one of ours under the name it expects, and nothing
is read but the stream. It makes its index itself, with its default mapping, unless one is there.

**Time** is from the first documents in the index (the first look, every 20 ms, that finds any) to the last, and those
first ones are not counted in ``rows``: its start is left out. It never ends by itself, so it is killed then.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from signal import SIGKILL

from peers import Measured, PeerFailed
from peers.index import Index
from peers.source import DATABASE, Slot, Source, Waiting
from peers.watch import Process, Walsender
from servers import pgsync

PLUGIN = "test_decoding"
_LOOK_SECONDS = 0.02

ENVIRONMENT = {
    "OPENSEARCH": "true",
    "ELASTICSEARCH": "false",
    # By default each change makes a record for a log that nobody gets; without, it is somewhat faster.
    "GENERAL_LOGGING_LEVEL": "WARNING",
}


def schema(slot: Slot, index: Index) -> list[dict[str, object]]:
    """pgsync's schema file: one table, all of its columns."""
    (table,) = slot.tables
    return [{"database": slot.database, "index": index.name, "nodes": {"table": table, "schema": "public"}}]


def slot_name(database: str, index: Index) -> str:
    """The name that pgsync gives its slot; it wants no others' and has no setting for it."""
    return f"{database}_{index.name}"


def run(source: Source, waiting: Waiting, index: Index, *, timeout_seconds: float = 900.0) -> Measured:
    """Copies the slot under the name that pgsync expects, with its plugin, and drains that."""
    with source.copy(waiting, name=slot_name(DATABASE, index), plugin=PLUGIN) as slot:
        return drain(slot, index, timeout_seconds=timeout_seconds)


def drain(slot: Slot, index: Index, *, timeout_seconds: float = 900.0) -> Measured:
    """A slot as ``run`` makes it: of ``PLUGIN``, and named ``slot_name``."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C.UTF-8",
        "PG_URL": slot.dsn(),
        "ELASTICSEARCH_URL": index.url,
        **ENVIRONMENT,
    }
    with tempfile.TemporaryDirectory(prefix="spillway-pgsync-") as name:
        folder = Path(name)
        (folder / "schema.json").write_text(json.dumps(schema(slot, index)))
        process = Process([*pgsync.program(), "--wal", "--config", "schema.json"], folder=folder, env=environment)
        walsender = Walsender(slot)
        try:
            first, seconds = _watch(process, walsender, slot, index, timeout_seconds)
        finally:
            walsender.close()
            cpu_seconds = process.finish(SIGKILL)
    there = index.documents()
    return Measured(
        slot.rows - first,
        seconds,
        cpu_seconds,
        process.peak_rss_bytes,
        {
            "version": pgsync.VERSION,
            "environment": ENVIRONMENT,
            "schema": schema(slot, index),
            "documents": there,
            "not_counted": first,
            "walsender_cpu_seconds": walsender.cpu_seconds,
        },
    )


def _watch(
    process: Process, walsender: Walsender, slot: Slot, index: Index, timeout_seconds: float
) -> tuple[int, float]:
    """What was there at the first look that found anything, and the time from then to the last document."""
    first, began = 0, 0.0
    deadline = time.monotonic() + timeout_seconds
    while process.sample(_LOOK_SECONDS):
        walsender.sample()
        done, now = index.operations(), time.monotonic()
        if done and not first:
            first, began = done, now
        if done >= slot.rows:
            return first, now - began
        if now > deadline:
            raise PeerFailed(f"pgsync: {done} of {slot.rows} after {timeout_seconds} s:\n{process.output[-4000:]}")
    raise PeerFailed(f"pgsync ended by itself:\n{process.output[-4000:]}")

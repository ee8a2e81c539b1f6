"""The peers of the speed benchmark: what else drains a logical slot of PostgreSQL, measured as Spillway is.

A backlog is filled once and drained by each tool from a *copy* of the slot, so all of them read the same rows::

    with Source() as source:                                    # peers.source: PostgreSQL 15, fsync off, TCP and socket
        waiting = source.fill([ten_columns(200)], 500_000)      # 10,000 rows a transaction
        with source.copy(waiting) as slot:                      # `slot` says where to connect and where the end is
            measured = recvlogical.drain(slot)                  # -> Measured
        source.drop(waiting)                                    # tables, publication, slot: the WAL can go

``recvlogical.drain(slot, *, unix=False)``
    ``pg_recvlogical`` to /dev/null.
``bare.drain(slot, *, pause_us=0, receive_buffer_bytes=0, unix=False)``
    Our socket reader that decodes nothing; over TCP with ``pause_us=1000`` it is what the issue calls *the limit*.
``debezium.drain(slot, *, schemas=False, settings=None, jvm_options=())``
    Debezium's engine; ``debezium.Callbacks`` for latency. Its configuration is ``debezium/engine.properties``.
``pgsync.run(source, waiting, index)``
    pgsync in WAL mode into OpenSearch; makes its own kind of slot (``pgsync.drain`` takes one that was made so).
``bulk.drain(slot, index, documents, *, body_bytes, limit=None)``
    A bare bulk client with ``pg_recvlogical`` beside it. ``bulk.best_body_bytes(url, documents, mapping=)`` first.

For the last two ``peers.index`` has ``Index(url, name)`` (``create(mapping)``, ``operations()``, ``documents()``,
``delete()``), ``EXPLICIT_MAPPING`` and ``render(source, waiting)``, the documents of a ``ten_columns`` table.
OpenSearch is ``servers.opensearch.OpenSearch``. Debezium and pgsync come with ``scripts/servers install bench``.

Each gives a ``Measured`` and raises ``PeerFailed`` when the tool fails or has not seen every row. A connection
string of Spillway's for the same slot is ``slot.dsn(unix=...)``. ``python bench/peers/run.py PEER --rows N`` runs one
of them alone and prints its ``Measured`` as one line of JSON.

What is timed: from the start of the tool to its end (it ends by itself at the slot's ``end_lsn``), unless its own
module says otherwise. CPU is of the tool's process alone; that of the walsender is in ``detail``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import stage  # noqa: F401  (puts tests/ on the path, where the servers are)


class PeerFailed(Exception):
    """A tool could not be run, failed, or did not see every row."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One drain. ``detail`` is what else the tool tells: its version, its configuration, the walsender's CPU."""

    rows: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    detail: dict[str, object] = field(default_factory=dict)

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds

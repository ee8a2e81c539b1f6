"""One peer alone: ``python bench/peers/run.py PEER ... [--rows N] [--table NAME]`` prints each ``Measured`` as JSON.

``bulk`` and ``pgsync`` start an OpenSearch; the bulk client first finds its best size of body.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers import Measured, bare, bulk, debezium, pgsync, recvlogical
from peers.index import EXPLICIT_MAPPING, Index, render
from peers.source import TABLES, Slot, Source, Waiting
from servers.opensearch import OpenSearch

PEERS: dict[str, Callable[[Slot], Measured]] = {
    "recvlogical": recvlogical.drain,
    "recvlogical-unix": lambda slot: recvlogical.drain(slot, unix=True),
    "bare": bare.drain,
    "bare-unix": lambda slot: bare.drain(slot, unix=True),
    "limit": lambda slot: bare.drain(slot, pause_us=1000),
    "limit-window": lambda slot: bare.drain(
        slot, pause_us=bare.WINDOW_PAUSE_US, receive_buffer_bytes=bare.WINDOW_BYTES
    ),
    "limit-unix": lambda slot: bare.drain(slot, pause_us=1000, unix=True),
    "debezium": debezium.drain,
    "debezium-schemas": lambda slot: debezium.drain(slot, schemas=True),
}


def _bulk(source: Source, waiting: Waiting, server: OpenSearch, mapping: Mapping[str, object] | None) -> Measured:
    documents = render(source, waiting)
    body_bytes, rates = bulk.best_body_bytes(server.url, documents, mapping=mapping)
    index = Index(server.url, "bulk").create(mapping)
    try:
        with source.copy(waiting) as slot:
            measured = bulk.drain(slot, index, documents, body_bytes=body_bytes)
    finally:
        index.delete()
    measured.detail["body_bytes_tried"] = {size: round(rate) for size, rate in rates.items()}
    return measured


def _pgsync(source: Source, waiting: Waiting, server: OpenSearch) -> Measured:
    index = Index(server.url, "pgsync")
    try:
        return pgsync.run(source, waiting, index)
    finally:
        index.delete()


SEARCH_PEERS: dict[str, Callable[[Source, Waiting, OpenSearch], Measured]] = {
    "bulk": lambda source, waiting, server: _bulk(source, waiting, server, None),
    "bulk-mapped": lambda source, waiting, server: _bulk(source, waiting, server, EXPLICIT_MAPPING),
    "pgsync": _pgsync,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "peers", nargs="+", metavar="PEER", choices=[*PEERS, *SEARCH_PEERS], help=", ".join([*PEERS, *SEARCH_PEERS])
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=10_000, help="rows to a transaction")
    parser.add_argument("--table", choices=TABLES, default="rows_200")
    options = parser.parse_args()
    with ExitStack() as stack:
        source = stack.enter_context(Source())
        search = stack.enter_context(OpenSearch()) if any(name in SEARCH_PEERS for name in options.peers) else None
        waiting = source.fill([TABLES[options.table]], options.rows, batch=options.batch)
        for name in options.peers:
            if search is not None and name in SEARCH_PEERS:
                measured = SEARCH_PEERS[name](source, waiting, search)
            else:
                with source.copy(waiting) as slot:
                    measured = PEERS[name](slot)
            rate = round(measured.rows_per_second)
            print(json.dumps({"peer": name, "rows_per_second": rate, **asdict(measured)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

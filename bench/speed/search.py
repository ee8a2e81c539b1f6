"""Drains to OpenSearch, with the mapping that it makes itself and with an explicit one; the bulk client, pgsync.

The index is made before each run, for every tool in the same way (``peers.index``), and counted after it: as many
documents as rows. The bulk client's body size is the best of six (``bulk.best_body_bytes``); Spillway's configuration
has batches of `BATCH` documents. pgsync is slow and has fewer rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from oracle.product import ProductFailed
from peers import bulk, pgsync
from peers.index import EXPLICIT_MAPPING, Documents, Index, render
from peers.source import TABLES, Waiting
from servers.opensearch import VERSION, OpenSearch
from speed.bench import Bench

PART = "opensearch"
DYNAMIC, EXPLICIT = "dynamic mapping", "explicit mapping"
SPILLWAY, BULK, PGSYNC = "Spillway", "bare bulk client, pg_recvlogical beside it", "pgsync, WAL mode"
BATCH = 5_000
PGSYNC_ROWS = 100_000


def run(bench: Bench) -> None:
    bench.versions["OpenSearch"] = VERSION
    mappings: dict[str, Mapping[str, object] | None] = {DYNAMIC: None, EXPLICIT: EXPLICIT_MAPPING}
    with OpenSearch() as server:
        with bench.filled([TABLES["rows_200"]], bench.rows) as waiting:
            documents = render(bench.source, waiting)
            sizes = {}
            for case, mapping in mappings.items():
                sizes[case], rates = bulk.best_body_bytes(server.url, documents, mapping=mapping)
                told = ", ".join(f"{size >> 10} kB {rate:,.0f}/s" for size, rate in rates.items())
                bench.say(f"bare bulk client, {case}: bodies of {sizes[case] >> 10} kB are best ({told})")
            for number in range(bench.rounds):
                for case, mapping in mappings.items():
                    _spillway(bench, server, waiting, case, mapping, number)
                    _bulk(bench, server, waiting, documents, case, mapping, sizes[case], number)
            del documents
        with bench.filled([TABLES["rows_200"]], min(bench.rows, PGSYNC_ROWS)) as waiting:
            for number in range(bench.rounds):
                _pgsync(bench, server, waiting, number)


def _spillway(
    bench: Bench,
    server: OpenSearch,
    waiting: Waiting,
    case: str,
    mapping: Mapping[str, object] | None,
    number: int,
) -> None:
    index = Index(server.url, "spillway").create(mapping)

    def check(_slot: object) -> None:
        there = index.documents()
        if there != waiting.rows:
            raise ProductFailed(f"{there} documents in the index, {waiting.rows} were acknowledged")

    to = {"type": "opensearch", "endpoint_url": server.url, "index_name": index.name}
    try:
        bench.drain(PART, case, SPILLWAY, waiting, number, destination=to, check=check, batch_size=BATCH)
    finally:
        index.delete()


def _bulk(
    bench: Bench,
    server: OpenSearch,
    waiting: Waiting,
    documents: Documents,
    case: str,
    mapping: Mapping[str, object] | None,
    body_bytes: int,
    number: int,
) -> None:
    index = Index(server.url, "bulk").create(mapping)
    try:
        with bench.source.copy(waiting) as slot:
            measured = bulk.drain(slot, index, documents, body_bytes=body_bytes)
    finally:
        index.delete()
    bench.add_measured(PART, case, BULK, number, measured)


def _pgsync(bench: Bench, server: OpenSearch, waiting: Waiting, number: int) -> None:
    index = Index(server.url, "pgsync")
    try:
        measured = pgsync.run(bench.source, waiting, index)
    finally:
        index.delete()
    bench.add_measured(PART, DYNAMIC, PGSYNC, number, measured)

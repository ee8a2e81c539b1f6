"""An index of OpenSearch as the benches make, watch and remove it, and the documents of a table, rendered beforehand.

``Index.create`` makes it as Spillway does (``gc_deletes`` of an hour, everything else the server's default), without a
mapping or with ``EXPLICIT_MAPPING``; who shall be compared gets an index made the same way. ``operations`` counts what
was written, at once and without a refresh; ``documents`` what is there.
"""

from __future__ import annotations

import http.client
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from psycopg import sql

from peers import PeerFailed
from peers.source import Source, Waiting, lsn_number
from spillway.position import version

# Of the ten-column tables. Without it each text is indexed twice, as words and as a keyword.
EXPLICIT_MAPPING: Mapping[str, object] = {
    "dynamic": False,
    "properties": {
        "id": {"type": "long"},
        "account_id": {"type": "long"},
        "region": {"type": "keyword"},
        "status": {"type": "keyword"},
        "quantity": {"type": "integer"},
        "amount": {"type": "double"},
        "active": {"type": "boolean"},
        "created_at": {"type": "date"},
        "name": {"type": "keyword"},
        "payload": {"type": "keyword", "index": False, "doc_values": False},
    },
}


@dataclass(frozen=True, slots=True)
class Index:
    url: str  # of the server
    name: str

    def create(self, mapping: Mapping[str, object] | None = None) -> Self:
        body: dict[str, object] = {"settings": {"index": {"gc_deletes": "3600s"}}}
        if mapping is not None:
            body["mappings"] = mapping
        self._ask("PUT", f"/{self.name}", body)
        return self

    def delete(self) -> None:
        self._ask("DELETE", f"/{self.name}?ignore_unavailable=true")

    def operations(self) -> int:
        """Documents written and deleted so far; 0 while there is no index."""
        path = f"/{self.name}/_stats/indexing?ignore_unavailable=true&filter_path=_all.primaries.indexing"
        counts = json.loads(self._ask("GET", path)).get("_all", {}).get("primaries", {}).get("indexing", {})
        return int(counts.get("index_total", 0)) + int(counts.get("delete_total", 0))

    def documents(self) -> int:
        self._ask("POST", f"/{self.name}/_refresh")
        return int(json.loads(self._ask("GET", f"/{self.name}/_count"))["count"])

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> bytes:
        connection = connect(self.url)
        try:
            headers = {"content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            told = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise PeerFailed(f"{method} {path}: {answer.status} {told.decode()[:1000]}")
        return told


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=120)


class Documents:
    """Bulk items as Spillway's sink makes them with ``document: record``: operation, ``_id``, version, and the row."""

    def __init__(self, items: bytes, ends: array[int]) -> None:
        self._items, self._ends = memoryview(items), ends

    def __len__(self) -> int:
        return len(self._ends)

    def bodies(self, body_bytes: int, *, limit: int | None = None) -> Iterator[memoryview]:
        """Bodies of whole items, each of at least that many bytes but the last."""
        start = 0
        ends = self._ends[:limit]
        for end in ends:
            if end - start >= body_bytes:
                yield self._items[start:end]
                start = end
        if ends and ends[-1] > start:
            yield self._items[start : ends[-1]]


def render(source: Source, waiting: Waiting) -> Documents:
    """The rows of a table of ``ten_columns``, in the order of their ids.

    PostgreSQL's own JSON of such a row is Spillway's but for the offset of its time.
    """
    (table,) = waiting.tables
    # The version has as many digits as those of the stream; no two documents share an id, so it may be one for all.
    after_id = b'","version":%d,"version_type":"external_gte"}}\n' % version(0, lsn_number(waiting.end_lsn), 1)
    items = bytearray()
    ends = array("q")
    query = sql.SQL("COPY (SELECT id, row_to_json(t) FROM {} t ORDER BY id) TO STDOUT").format(
        sql.Identifier(table.name)
    )
    with source.connect() as connection:
        connection.execute("SET TimeZone TO 'UTC'")
        with connection.cursor().copy(query) as copy:
            for row in copy:
                identity, _, record = bytes(row).partition(b"\t")
                items += b'{"index":{"_id":"' + identity + after_id + record.replace(b'+00:00"', b'Z"')
                ends.append(len(items))
    return Documents(bytes(items), ends)

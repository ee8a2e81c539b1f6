"""Elasticsearch and OpenSearch: an index that holds, under one ``_id`` per row, what the row is now.

**Semantics ``state``.** One ``_bulk`` request per batch, made of slices of the rendered changes (`spillway.impl.bulk`);
nothing is parsed or rendered again, and nothing is done per message as long as all goes well. Inserts, updates and
reads index a whole document, deletes delete it. The document is the row (``record``) or Sequin's message
(``message``).

**Versions.** Every operation carries the version of its change (`spillway.position.version`) as ``external_gte``: what
comes again is applied again, what comes late changes nothing. The index answers a late one with a conflict. That is
``ok`` (superseded) only if the version it reports is one that this sink can have written: of this epoch, and not of a
time before the sink began. Any other means that somebody else writes versions into this index, and that our changes
would be dropped without a trace: ``sink_down('foreign_versions')``. An index remembers the version of a deleted
document for ``index.gc_deletes`` only (60 s by default), so an index that we create gets an hour; a smaller value on
one that was there is a finding.

**``_id``** is the primary key's values joined by ``-``, as in Sequin; see `spillway.sinks.document`.

**Routes, updates, shards**: a batch of which something is said of single messages is taken apart into operations
(`spillway.sinks.operations`) and sent in rounds (`spillway.sinks.rounds`); any other never is. An index that a route
names is made with the configured mapping, if there is one, when the first message goes there and it is missing; else it
is as the server does it (``action.auto_create_index``, index templates).

**Results**: see `spillway.sinks.outcomes`.

Sources: "Bulk API" and "Index modules: index.gc_deletes" of the Elasticsearch reference; the wording of conflicts from
``VersionType.explainConflictForWrites``, checked against OpenSearch 2.19.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import orjson

from spillway import impl
from spillway.change import ACTIONS
from spillway.chunk import ACTION, FLAGS, GONE, HASH, MOVED, OLD, WHOLE, WORD_BYTES, Batch, Chunk
from spillway.clock import Clock, SystemClock
from spillway.errors import Finding, SpillwayError
from spillway.sinks.base import OK, Result, Semantics, SinkContext, reject, sink_down
from spillway.sinks.document import document_id, key_of_message, key_of_record
from spillway.sinks.encode import runs
from spillway.sinks.http import Answer, Body, Failure, Http, parse_url
from spillway.sinks.index import ALREADY_THERE, Hit, Indexes, error_of, words
from spillway.sinks.mapping import GC_DELETES_SECONDS, Definition, Document, read_definition
from spillway.sinks.operations import Destination, operations, row_id, why_unfit
from spillway.sinks.outcomes import NO_INDEX, Outcomes
from spillway.sinks.rounds import ANSWER_BYTES, ANSWER_ITEM_BYTES, Rounds

AuthType = Literal["none", "api_key", "basic", "bearer"]
Toast = Literal["omit", "reselect", "fail"]

_SERVER_GC_DELETES_SECONDS = 60.0

_MOST_READY = 10_000  # names of indices that are remembered
# Only what is read here: an item that went well takes some 60 bytes of the answer.
_ANSWER_FIELDS = ",".join(
    ["errors"]
    + [f"items.*.{name}" for name in ("_id", "status", "error.type", "error.reason", "error.caused_by.reason")]
)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(nanos|micros|ms|s|m|h|d)")
_DURATION_SECONDS = {"nanos": 1e-9, "micros": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


_DELETE, _TRUNCATE = ACTIONS.index("delete"), ACTIONS.index("truncate")
_KEY_OF_MESSAGE = ("metadata.table_schema", "metadata.table_name", "metadata.record_pks")


@dataclass(frozen=True, slots=True)
class _Cursor:
    """A place in a walk through an index. The end of a shard is good for the sink that has asked for it: after a
    restart what is delivered again is behind it."""

    index: str
    shards: int
    shard: int
    seq_no: int = -1
    last_seq_no: int | None = None  # of the shard when its first page was read
    life: str = ""

    @classmethod
    def of(cls, text: str, life: str) -> _Cursor:
        index, shards, shard, seq_no, last_seq_no, its_life = text.split("/")
        last = int(last_seq_no) if its_life == life else None
        return cls(index, int(shards), int(shard), int(seq_no), last, life)

    def __str__(self) -> str:
        return f"{self.index}/{self.shards}/{self.shard}/{self.seq_no}/{self.last_seq_no}/{self.life}"


class SearchSink:
    semantics: Semantics = "state"
    max_in_flight = 4
    single = False

    def __init__(
        self,
        context: SinkContext,
        *,
        endpoint_url: str,
        index_name: str,
        document: Document,
        auth_type: AuthType = "none",
        auth_value: str = "",
        timeout_seconds: float = 60.0,
        gzip: bool = False,
        ca_file: Path | None = None,
        mapping: Path | None = None,
        toast: Toast = "fail",
        op: Literal["index", "update"] = "index",
        doc_as_upsert: bool = False,
        pipeline: str = "",
        routing_column: str = "",
        clock: Clock | None = None,
    ) -> None:
        self._context = context
        self._index = index_name
        self._document = document
        self._gzip = gzip
        self._destination = Destination(
            index_name, document, context.suffix, context.epoch, op, doc_as_upsert, pipeline, routing_column,
            takes_partial=toast == "omit",
        )  # fmt: skip
        self._one_by_one = op != "index" or bool(routing_column)
        self._auth_value = auth_value
        root = parse_url("destination.endpoint_url", endpoint_url.rstrip("/") + "/")
        self._headers = {"content-type": "application/json", **_authorization(auth_type, auth_value)}
        self._http = Http(
            root,
            connections=self.max_in_flight,
            timeout_seconds=timeout_seconds,
            ca_file=ca_file and context.base_dir / ca_file,
            clock=clock or SystemClock(),
        )
        self.indexes = Indexes(self._http, root, self._headers, auth_value)
        self._index_url = self.indexes.url(index_name)
        fields = {"filter_path": _ANSWER_FIELDS}
        self._bulk_url = self.indexes.url(index_name, "/_bulk").copy_with(
            params=fields | {"pipeline": pipeline} if pipeline else fields
        )
        self._outcomes = Outcomes(context, auth_value)
        bulk_of_any = root.join("_bulk").copy_with(params=fields)
        self._rounds = Rounds(self._http, root, bulk_of_any, self._headers, self._outcomes, index_name)
        self._mapping = mapping and context.base_dir / mapping
        self._definition: Definition | None = None
        self._prepared = False
        self._life = secrets.token_hex(4)
        self._ready: set[str] = set()  # indices of routes that are there

    async def open(self) -> None:
        self._http.open()
        self._read_definition()  # what is wrong with the file is said now, also where it is not needed yet
        await self._prepare()

    async def close(self) -> None:
        await self._http.close()

    async def send(self, batch: Batch) -> Sequence[Result] | Result:
        if not self._prepared:
            down = await self._prepare()
            if down is not None:
                return down
        if self._one_by_one or self._is_routed(batch):
            return await self._send_one_by_one(batch)
        unfit = self._unfit(batch)
        fit = [place for place in range(len(batch)) if place not in unfit] if unfit else range(len(batch))
        if unfit:
            batch = Batch.of([batch[place] for place in fit])
        failed = await self._index_all(batch) if fit else {}
        if isinstance(failed, Result):
            return failed
        if not unfit and not failed:
            return OK
        results = [OK] * (len(unfit) + len(fit))
        for place, result in unfit.items():
            results[place] = result
        for place, result in failed.items():
            results[fit[place]] = result
        return results

    async def _index_all(self, batch: Batch) -> dict[int, Result] | Result:
        """What became of those that failed, by place in the batch; or of all."""
        suffix = None if self._document == "record" else self._context.suffix
        answer = await self._http.request(
            "POST",
            self._bulk_url,
            self._headers | {"content-type": "application/x-ndjson"},
            Body(
                impl.bulk(chunk, indices, self._context.epoch, b"" if chunk.complete else suffix, document_id)
                for chunk, indices in runs(batch)
            ),
            gzip=self._gzip,
            max_answer_bytes=ANSWER_BYTES + ANSWER_ITEM_BYTES * len(batch),
        )
        whole = self._outcomes.whole(answer)
        if whole is not None:
            return self._noted(whole)
        assert isinstance(answer, Answer)
        return self._failures(answer, batch)

    @staticmethod
    def _is_routed(batch: Batch) -> bool:
        """Whether something is said of single messages."""
        return any(
            span.chunk.routes is not None or (span.chunk.complete and _several(span.chunk))
            for span, _, _ in batch.pieces
        )

    async def _send_one_by_one(self, batch: Batch) -> Sequence[Result] | Result:
        found, failed = operations(batch, self._destination)
        for index in dict.fromkeys([one.index for one in found]):
            missing = await self._make(index)
            if missing is not None and missing.outcome == "sink_down":
                return missing
            if missing is not None:
                failed |= dict.fromkeys([one.message for one in found if one.index == index], missing)
        found = [one for one in found if one.message not in failed]
        outcome = await self._rounds.send(found, gzip=self._gzip)
        if isinstance(outcome, Result):
            return self._noted(outcome)
        failed |= {place: self._noted(result) for place, result in outcome.items()}
        return [failed.get(place, OK) for place in range(len(batch))] if failed else OK

    async def findings(self) -> list[Finding]:
        """What is wrong with the index that is there; for ``spillway check``."""
        url = self.indexes.url(self._index, "/_settings?flat_settings=true")
        answer = await self._http.request("GET", url, self._headers)
        if isinstance(answer, Failure):
            return [
                self._finding("search_unreachable", f"{answer.reason}: {answer.detail}", "start the server", "error")
            ]
        if answer.status == 404:
            return []  # it will be created
        if answer.status != 200:
            remedy = "check destination.auth_type, destination.auth_value and the privileges of that user"
            return [self._finding("search_refused", words(answer, self._auth_value), remedy, "error")]
        short = {name: seconds for name, seconds in _gc_deletes(answer.body) if seconds < GC_DELETES_SECONDS}
        return [
            self._finding(
                "search_gc_deletes",
                f"index {name} forgets the version of a deleted document after {seconds:g} s (index.gc_deletes): "
                "an earlier change that is repeated later than that brings the document back",
                f'PUT /{name}/_settings {{"index.gc_deletes": "1h"}}',
                "warning",
            )
            for name, seconds in short.items()
        ]

    async def keys(
        self, table: tuple[str, str], columns: Sequence[str], after: str | None, limit: int, below_version: int | None
    ) -> tuple[list[tuple[str, ...]], str | None]:
        """See `spillway.sinks.base.Readable`. Of documents that are rows nobody knows the table: all of the index count
        as this one's. ``after`` names index, shard and place: a walk stays in its index when an alias moves, and ends
        whatever is written meanwhile."""
        cursor = await self._beginning() if after is None else _Cursor.of(after, self._life)
        if cursor is None:
            return [], None
        fields = columns if self._document == "record" else _KEY_OF_MESSAGE
        while True:
            index, shard, last = cursor.index, cursor.shard, cursor.last_seq_no
            if last is None:
                await self.indexes.refresh(index)
                last = await self.indexes.last_seq_no(index, shard)
            hits = await self.indexes.hits(index, shard, cursor.seq_no, last, limit, fields)
            if hits:
                break
            if shard + 1 == cursor.shards:
                return [], None
            cursor = _Cursor(index, cursor.shards, shard + 1, life=self._life)
        keys = [
            key
            for hit in hits
            if (below_version is None or hit.version < below_version)
            and (key := self._key(hit, table, columns)) is not None
        ]
        return keys, str(replace(cursor, seq_no=hits[-1].seq_no, last_seq_no=last))

    async def _beginning(self) -> _Cursor | None:
        target = await self.indexes.target(self._index)
        if target is None:
            return None
        if target.write_index is None:
            raise SpillwayError(
                "no_write_index",
                f"the alias {self._index} stands for {', '.join(target.indices)}, and none of them takes its writes",
                'set "is_write_index": true for one of them',
            )
        return _Cursor(target.write_index, await self.indexes.shards(target.write_index), 0, life=self._life)

    def _key(self, hit: Hit, table: tuple[str, str], columns: Sequence[str]) -> tuple[str, ...] | None:
        if self._document == "record":
            return key_of_record(hit.identity, hit.source, columns)
        return key_of_message(hit.identity, hit.source, table)

    # -- the index ----------------------------------------------------------------------------------------------------

    async def _prepare(self) -> Result | None:
        """Create the index if it is missing. None: it is there, or we are not allowed to know (the bulk will tell)."""
        answer = await self._http.request("HEAD", self._index_url, self._headers)
        # 400: the server does not like the name; it says why only to the request that creates.
        if isinstance(answer, Answer) and answer.status in (400, 404):
            answer = await self.indexes.put(self._index, self._read_definition())
            if isinstance(answer, Answer) and answer.status == 400:
                return self._not_created(answer)
        if isinstance(answer, Answer) and (answer.status < 300 or answer.status == 403):
            self._prepared = True
            return None
        return self._outcomes.whole(answer)

    async def _make(self, index: str) -> Result | None:
        """Create an index that a route names, if there is a mapping for it and it is missing. None: go on."""
        if self._mapping is None or index == self._index or index in self._ready:
            return None
        answer = await self._http.request("HEAD", self.indexes.url(index), self._headers)
        if isinstance(answer, Answer) and answer.status == 404:
            answer = await self.indexes.put(index, self._read_definition())
            if isinstance(answer, Answer) and answer.status == 400 and error_of(answer.body)[0] != ALREADY_THERE:
                reason, detail = error_of(answer.body)
                return reject(reason or "index_not_created", detail)
        if not isinstance(answer, Answer) or answer.status == 429 or answer.status >= 500:
            return self._outcomes.whole(answer)
        if len(self._ready) >= _MOST_READY:
            self._ready.clear()
        self._ready.add(index)  # or we are not allowed to know: the bulk will tell
        return None

    def _read_definition(self) -> Definition:
        """Once: like the configuration, it is that of the start."""
        if self._definition is None:
            self._definition = read_definition(self._mapping) if self._mapping is not None else {}
        return self._definition

    def _not_created(self, answer: Answer) -> Result | None:
        reason, detail = error_of(answer.body)
        if reason == ALREADY_THERE:
            self._prepared = True
            return None
        if reason == "invalid_index_name_exception":
            raise SpillwayError("index_name", f"sink {self._context.name}: {detail}", "change destination.index_name")
        return sink_down("index_not_created", f"{detail or reason}; create the index {self._index} yourself")

    def _finding(self, code: str, what: str, remedy: str, severity: Literal["error", "warning"]) -> Finding:
        return Finding(code, what, remedy, severity, sink=self._context.name)

    # -- the request --------------------------------------------------------------------------------------------------

    def _unfit(self, batch: Batch) -> dict[int, Result]:
        """Those that no operation can be made of, by place in the batch."""
        found: dict[int, Result] = {}
        first = 0
        for span, start, stop in batch.pieces:
            indices = span.indices[start:stop]
            if not _all_fit(span.chunk, indices):
                for place, index in enumerate(indices, first):
                    why = why_unfit(span.chunk, index, takes_partial=self._destination.takes_partial)
                    if why is not None:
                        found[place] = why
            first += stop - start
        return found

    def _failures(self, answer: Answer, batch: Batch) -> dict[int, Result] | Result:
        if b'"errors":false' in answer.body[:256]:
            return {}
        items = self._outcomes.items(answer, len(batch))
        if isinstance(items, Result):
            return items
        failures: dict[int, Result] = {}
        for place, (message, item) in enumerate(zip(batch, items, strict=True)):
            chunk, index = message.span.chunk, message.span.indices[message.place]
            is_delete = chunk.byte(index, ACTION) == _DELETE
            result = self._outcomes.of_item(item, row_id(chunk, index), delete=is_delete, routed=False)
            if result is not OK:
                failures[place] = self._noted(result)
        return failures

    def _noted(self, result: Result) -> Result:
        if result.reason in ("http_404", NO_INDEX):
            self._prepared = False
            self._ready.clear()
        return result


def _several(chunk: Chunk) -> bool:
    """Whether a message stands there as several documents."""
    return len(set(chunk.column(HASH))) < chunk.count


def _all_fit(chunk: Chunk, indices: Sequence[int]) -> bool:
    """Every change is of a whole row with a key, by its columns; False: they must be looked at one by one."""
    words = chunk.stride
    stride = words * WORD_BYTES
    if isinstance(indices, range) and indices.step == 1:
        start, stop = indices.start, indices.stop
        actions, flags = (chunk.meta[start * stride + at : stop * stride : stride] for at in (ACTION, FLAGS))
        hashes = chunk.words[start * words + HASH : stop * words : words].tolist()
    else:
        actions, flags = (bytes([chunk.meta[index * stride + at] for index in indices]) for at in (ACTION, FLAGS))
        hashes = [chunk.words[index * words + HASH] for index in indices]
    whole = flags.count(WHOLE) + flags.count(WHOLE | OLD) + flags.count(WHOLE | OLD | GONE) + flags.count(WHOLE | MOVED)
    return whole == len(indices) and _TRUNCATE not in actions and 0 not in hashes


def _authorization(auth_type: AuthType, value: str) -> dict[str, str]:
    if auth_type == "none":
        return {}
    if auth_type != "basic" and not (value.isascii() and value.isprintable() and value == value.strip()):
        raise SpillwayError("auth_value", "destination.auth_value holds characters that no header may hold")
    if auth_type == "basic":
        return {"authorization": "Basic " + base64.b64encode(value.encode()).decode()}
    return {"authorization": ("ApiKey " if auth_type == "api_key" else "Bearer ") + value}


def _gc_deletes(settings: bytes) -> list[tuple[str, float]]:
    """Each index behind the name (it may be an alias) with its ``index.gc_deletes`` in seconds."""
    found = []
    for name, index in orjson.loads(settings).items():
        match = _DURATION.fullmatch(index["settings"].get("index.gc_deletes", ""))
        seconds = float(match[1]) * _DURATION_SECONDS[match[2]] if match else _SERVER_GC_DELETES_SECONDS
        found.append((name, seconds))
    return found

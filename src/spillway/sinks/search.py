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

**Results**, by position and id: 4xx of an item rejects it, with the error's type as the reason; 429 and 5xx retry it.
What concerns the index (missing, closed, read-only) or the whole request (401, 403, 404, 429, 5xx, no connection) is
the sink's failure; 400 and 413 of a whole request reject the batch.

Sources: "Bulk API" and "Index modules: index.gc_deletes" of the Elasticsearch reference; the wording of conflicts from
``VersionType.explainConflictForWrites``, checked against OpenSearch 2.19.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import orjson

from spillway import impl
from spillway.change import ACTIONS, key_values
from spillway.chunk import ACTION, FLAGS, HASH, MOVED, OLD, TOO_LARGE, WHOLE, WORD_BYTES, Batch, Chunk, Message
from spillway.clock import Clock, SystemClock
from spillway.errors import Finding, SpillwayError
from spillway.position import version
from spillway.sinks.base import OK, Result, Semantics, SinkContext, reject, retry, sink_down
from spillway.sinks.document import document_id, key_of_message, key_of_record
from spillway.sinks.encode import runs
from spillway.sinks.http import Answer, Body, Failure, Http, parse_url
from spillway.sinks.index import ALREADY_THERE, Hit, Indexes, describe, error_of, words
from spillway.sinks.mapping import GC_DELETES_SECONDS, Definition, Document, read_definition

AuthType = Literal["none", "api_key", "basic", "bearer"]
Toast = Literal["omit", "reselect", "fail"]

_SERVER_GC_DELETES_SECONDS = 60.0

_ANSWER_BYTES = 64 * 1024
_ANSWER_ITEM_BYTES = 4 * 1024
# Only what is read here: an item that went well takes some 60 bytes of the answer.
_ANSWER_FIELDS = ",".join(
    ["errors"]
    + [f"items.*.{name}" for name in ("_id", "status", "error.type", "error.reason", "error.caused_by.reason")]
)

# Errors of an item that say nothing of the document.
_INDEX_DOWN = frozenset(
    ("index_not_found_exception", "index_closed_exception", "cluster_block_exception", "security_exception")
)
_CURRENT_VERSION = re.compile(r"current version \[(-?\d+)\]")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(nanos|micros|ms|s|m|h|d)")
_DURATION_SECONDS = {"nanos": 1e-9, "micros": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


_DELETE, _TRUNCATE = ACTIONS.index("delete"), ACTIONS.index("truncate")
_KEY_OF_MESSAGE = ("metadata.table_schema", "metadata.table_name", "metadata.record_pks")


@dataclass(frozen=True, slots=True)
class _Cursor:
    index: str
    shards: int
    shard: int
    seq_no: int

    @classmethod
    def of(cls, text: str) -> _Cursor:
        index, *numbers = text.split("/")
        return cls(index, *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.index}/{self.shards}/{self.shard}/{self.seq_no}"


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
        clock: Clock | None = None,
    ) -> None:
        self._context = context
        self._index = index_name
        self._document = document
        self._gzip = gzip
        self._takes_partial = toast == "omit"
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
        self._bulk_url = self.indexes.url(index_name, "/_bulk").copy_with(params={"filter_path": _ANSWER_FIELDS})
        self._mapping = mapping and context.base_dir / mapping
        self._definition: Definition | None = None
        self._prepared = False

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
            Body(impl.bulk(*run, self._context.epoch, suffix, document_id) for run in runs(batch)),
            gzip=self._gzip,
            max_answer_bytes=_ANSWER_BYTES + _ANSWER_ITEM_BYTES * len(batch),
        )
        whole = self._whole(answer)
        if whole is not None:
            return whole
        assert isinstance(answer, Answer)
        return self._failures(answer, batch)

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
        as this one's. ``after`` names index, shard and place: a walk stays in its index when an alias moves."""
        cursor = await self._beginning() if after is None else _Cursor.of(after)
        if cursor is None:
            return [], None
        fields = columns if self._document == "record" else _KEY_OF_MESSAGE
        while True:
            hits = await self.indexes.hits(cursor.index, cursor.shard, cursor.seq_no, limit, fields)
            if hits:
                break
            if cursor.shard + 1 == cursor.shards:
                return [], None
            cursor = replace(cursor, shard=cursor.shard + 1, seq_no=-1)
        keys = [
            key
            for hit in hits
            if (below_version is None or hit.version < below_version)
            and (key := self._key(hit, table, columns)) is not None
        ]
        return keys, str(replace(cursor, seq_no=hits[-1].seq_no))

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
        await self.indexes.refresh(target.write_index)
        return _Cursor(target.write_index, await self.indexes.shards(target.write_index), 0, -1)

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
        return self._whole(answer)

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
                    why = self._why_unfit(span.chunk, index)
                    if why is not None:
                        found[place] = why
            first += stop - start
        return found

    def _why_unfit(self, chunk: Chunk, index: int) -> Result | None:
        if not chunk.word(index, HASH):
            return reject("no_primary_key", f"{'.'.join(chunk.table(index))} has no primary key to make an _id of")
        action, flags = chunk.byte(index, ACTION), chunk.byte(index, FLAGS)
        if action == _TRUNCATE:
            return reject("truncate", "an index does not take a TRUNCATE")
        if action == _DELETE:
            return None
        if flags & TOO_LARGE:
            return reject("too_large", "the row was above max_message_bytes: only its key is known")
        if not flags & WHOLE and not self._takes_partial:
            return reject(
                "unchanged_toast",
                "PostgreSQL did not send the row's unchanged TOAST columns; the document would lose these fields. "
                f"ALTER TABLE {'.'.join(chunk.table(index))} REPLICA IDENTITY FULL, or set toast: omit",
            )
        return None

    # -- the answer ---------------------------------------------------------------------------------------------------

    def _whole(self, answer: Answer | Failure) -> Result | None:
        """The result of the whole batch; None for an answer that has one for each item."""
        if isinstance(answer, Failure):
            return sink_down(answer.reason, answer.detail)
        if answer.status == 200:
            return None if answer.whole else reject("answer_too_large")
        if answer.status in (400, 413):
            reason, detail = error_of(answer.body)
            return reject(reason or f"http_{answer.status}", detail or words(answer, self._auth_value))
        if answer.status == 404:
            self._prepared = False
        return sink_down(f"http_{answer.status}", words(answer, self._auth_value), answer.retry_after_seconds)

    def _failures(self, answer: Answer, batch: Batch) -> dict[int, Result] | Result:
        if b'"errors":false' in answer.body[:256]:
            return {}
        try:
            items = orjson.loads(answer.body)["items"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            items = None
        if not isinstance(items, list) or len(items) != len(batch):
            return sink_down("bad_answer", f"this is no answer to a bulk request: {answer.text[:200]}")
        failures: dict[int, Result] = {}
        for place, (message, item) in enumerate(zip(batch, items, strict=True)):
            (outcome,) = item.values()
            identity, is_delete = _operation(message)
            result = OK
            if outcome.get("_id") != identity:
                result = retry("answer_mismatch", f"the answer for {outcome.get('_id')!r} is in its place")
            elif "error" in outcome or (outcome["status"] >= 300 and not (is_delete and outcome["status"] == 404)):
                result = self._failed(outcome["status"], outcome.get("error"))
            if result is not OK:
                failures[place] = result
        return failures

    def _failed(self, status: int, error: object) -> Result:
        reason, detail = describe(error)
        reason = reason or f"http_{status}"
        if reason in _INDEX_DOWN:
            if reason == "index_not_found_exception":
                self._prepared = False
            return sink_down(reason, detail)
        if status == 409:
            return self._conflict(reason, detail)
        if status == 429 or status >= 500:
            return retry(reason, detail)
        return reject(reason, detail)

    def _conflict(self, reason: str, detail: str) -> Result:
        if reason != "version_conflict_engine_exception":
            return reject(reason, detail)
        found = _CURRENT_VERSION.search(detail)
        # The epoch is on top: a version above ours is of our epoch or of a later one.
        if found and self._lowest <= int(found[1]) <= self._highest:
            return OK
        return sink_down(
            "foreign_versions",
            f"the index holds a version that this sink cannot have written: {detail}. Another program or another "
            "Spillway writes into this index; give this sink an index of its own",
        )

    @property
    def _lowest(self) -> int:
        # A page of existing rows may stand right before the position at which the sink began.
        return version(self._context.epoch, max(self._context.started_lsn - 1, 0), 0)

    @property
    def _highest(self) -> int:
        return version(self._context.epoch, -1, 0xFF)


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
    whole = flags.count(WHOLE) + flags.count(WHOLE | OLD) + flags.count(WHOLE | MOVED)
    return whole == len(indices) and _TRUNCATE not in actions and 0 not in hashes


def _operation(message: Message) -> tuple[str, bool]:
    """The message's ``_id``, and whether it is a delete."""
    chunk, index = message.span.chunk, message.span.indices[message.place]
    pks = key_values(*chunk.table(index), chunk.key_texts(index)[0].decode())
    return document_id(pks), chunk.byte(index, ACTION) == _DELETE


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

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

**``_id``** is the primary key's values joined by ``-``, as in Sequin. With several columns, ``-`` and ``\\`` inside of
a value are escaped with ``\\``, so that no two keys share an id; the value of a single column needs no escape and has
none (a UUID stays as it is). An id above 512 bytes, the limit of the server, and an empty one, become a readable
prefix and a SHA-256.

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
from hashlib import sha256
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import orjson

from spillway import impl
from spillway.change import ACTIONS, key_values
from spillway.chunk import ACTION, FLAGS, HASH, MOVED, OLD, TOO_LARGE, WHOLE, WORD_BYTES, Batch, Chunk, Message
from spillway.clock import Clock, SystemClock
from spillway.errors import Finding, SpillwayError
from spillway.position import version
from spillway.sinks.base import OK, Result, Semantics, SinkContext, reject, retry, sink_down
from spillway.sinks.encode import runs
from spillway.sinks.http import Answer, Body, Failure, Http, parse_url

AuthType = Literal["none", "api_key", "basic", "bearer"]
Document = Literal["record", "message"]
Toast = Literal["omit", "reselect", "fail"]

ID_BYTES = 512
_ID_PREFIX_BYTES = 400
_GC_DELETES_SECONDS = 3600
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
        self._index_url = root.join(quote(index_name, safe=""))
        self._bulk_url = root.join(quote(index_name, safe="") + "/_bulk").copy_with(
            params={"filter_path": _ANSWER_FIELDS}
        )
        self._headers = {"content-type": "application/json", **_authorization(auth_type, auth_value)}
        self._http = Http(
            root,
            connections=self.max_in_flight,
            timeout_seconds=timeout_seconds,
            ca_file=ca_file and context.base_dir / ca_file,
            clock=clock or SystemClock(),
        )
        self._prepared = False

    async def open(self) -> None:
        self._http.open()
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
        url = self._index_url.join(self._index_url.raw_path.decode() + "/_settings?flat_settings=true")
        answer = await self._http.request("GET", url, self._headers)
        if isinstance(answer, Failure):
            return [
                self._finding("search_unreachable", f"{answer.reason}: {answer.detail}", "start the server", "error")
            ]
        if answer.status == 404:
            return []  # it will be created
        if answer.status != 200:
            remedy = "check destination.auth_type, destination.auth_value and the privileges of that user"
            return [self._finding("search_refused", self._words(answer), remedy, "error")]
        short = {name: seconds for name, seconds in _gc_deletes(answer.body) if seconds < _GC_DELETES_SECONDS}
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

    # -- the index ----------------------------------------------------------------------------------------------------

    async def _prepare(self) -> Result | None:
        """Create the index if it is missing. None: it is there, or we are not allowed to know (the bulk will tell)."""
        answer = await self._http.request("HEAD", self._index_url, self._headers)
        # 400: the server does not like the name; it says why only to the request that creates.
        if isinstance(answer, Answer) and answer.status in (400, 404):
            settings = orjson.dumps({"settings": {"index": {"gc_deletes": f"{_GC_DELETES_SECONDS}s"}}})
            answer = await self._http.request("PUT", self._index_url, self._headers, Body((settings,)))
            if isinstance(answer, Answer) and answer.status == 400:
                return self._not_created(answer)
        if isinstance(answer, Answer) and (answer.status < 300 or answer.status == 403):
            self._prepared = True
            return None
        return self._whole(answer)

    def _not_created(self, answer: Answer) -> Result | None:
        reason, detail = _error(answer.body)
        if reason == "resource_already_exists_exception":
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
            reason, detail = _error(answer.body)
            return reject(reason or f"http_{answer.status}", detail or self._words(answer))
        if answer.status == 404:
            self._prepared = False
        return sink_down(f"http_{answer.status}", self._words(answer), answer.retry_after_seconds)

    def _words(self, answer: Answer) -> str:
        words = " ".join(part for part in (f"HTTP {answer.status}", *_error(answer.body)) if part)
        return words.replace(self._auth_value, "***") if self._auth_value else words

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
        reason, detail = _describe(error)
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
        return version(self._context.epoch, self._context.started_lsn, 0)

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


def document_id(pks: Sequence[str]) -> str:
    """See the module's docstring."""
    if len(pks) == 1:
        identity = pks[0]
    else:
        identity = "-".join(
            part.replace("\\", "\\\\").replace("-", "\\-") if "-" in part or "\\" in part else part for part in pks
        )
    if identity and len(identity) * 4 <= ID_BYTES:  # no character takes more than four bytes
        return identity
    encoded = identity.encode()
    if 0 < len(encoded) <= ID_BYTES:
        return identity
    prefix = encoded[:_ID_PREFIX_BYTES].decode("utf-8", "ignore")
    return f"{prefix}-{sha256(encoded).hexdigest()}"


def _authorization(auth_type: AuthType, value: str) -> dict[str, str]:
    if auth_type == "none":
        return {}
    if auth_type != "basic" and not (value.isascii() and value.isprintable() and value == value.strip()):
        raise SpillwayError("auth_value", "destination.auth_value holds characters that no header may hold")
    if auth_type == "basic":
        return {"authorization": "Basic " + base64.b64encode(value.encode()).decode()}
    return {"authorization": ("ApiKey " if auth_type == "api_key" else "Bearer ") + value}


def _error(body: bytes) -> tuple[str, str]:
    """Type and reason of the error that a whole answer holds; the text itself where it is not of that shape."""
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "", body[:500].decode("utf-8", "replace").strip()
    return _describe(error)


def _describe(error: object) -> tuple[str, str]:
    if not isinstance(error, dict):
        return "", "" if error is None else str(error)
    detail = str(error.get("reason") or "")
    cause = error.get("caused_by")
    if isinstance(cause, dict) and cause.get("reason"):
        detail = f"{detail}: {cause['reason']}"
    return str(error.get("type") or ""), detail


def _gc_deletes(settings: bytes) -> list[tuple[str, float]]:
    """Each index behind the name (it may be an alias) with its ``index.gc_deletes`` in seconds."""
    found = []
    for name, index in orjson.loads(settings).items():
        match = _DURATION.fullmatch(index["settings"].get("index.gc_deletes", ""))
        seconds = float(match[1]) * _DURATION_SECONDS[match[2]] if match else _SERVER_GC_DELETES_SECONDS
        found.append((name, seconds))
    return found

"""Indexes and aliases of Elasticsearch and OpenSearch: what is there, creating and deleting one, moving an alias,
reading it all.

Everything here is one request of a few bytes, made by command or at a start, and both servers answer it alike. What
they refuse is a SpillwayError ``sink_refused``; no answer, 429 and 5xx are ``sink_unreachable``.

**An alias moves in one request** (``_aliases`` applies its actions in one step of the cluster state): who reads by the
name sees the old index or the new one, never none and never both. A name that is an index itself can only become an
alias when that index is deleted, in the same request (``remove_index``): done when the caller says so, never else.

**An index is read** shard by shard in the order of ``_seq_no``, the number of a document's last write in its shard:
``preference=_shards:n``, a range query and a sort. No other order serves on both servers, at any size: sorting by
``_id`` loads all ids onto the heap and may be forbidden (``indices.id_field_data.enabled``), points in time differ
between the two, and a scroll holds a context that dies with a pause. Here a cursor is a few numbers, nothing is open
between two pages, and nothing is missed: a document that is written meanwhile moves to the end of its shard. What is
the end is asked for before a shard is read: else a walk under load would follow the writes for ever.

Sources: "Aliases", "Search shard routing", "Optimistic concurrency control", "_id field" of the Elasticsearch
reference; "Change the recommended tie-breaking fields from [_id] to [_seq_no, _shard]" (elastic/elasticsearch#25797).
Checked against OpenSearch 2.19.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict, cast
from urllib.parse import quote

import httpx
import orjson

from spillway.errors import SpillwayError
from spillway.sinks.document import Source, parsed
from spillway.sinks.http import Answer, Body, Failure, Http
from spillway.sinks.mapping import Definition, with_gc_deletes

MAX_HITS = 10_000  # index.max_result_window
_ANSWER_BYTES = 256 * 1024
_HIT_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Target:
    """What a name stands for. ``write_index``: where writes to the name go; None: the server refuses them."""

    name: str
    alias: bool
    indices: tuple[str, ...]
    write_index: str | None
    options: Mapping[str, object] = field(default_factory=dict)  # of the alias there: its filter, its routing


@dataclass(frozen=True, slots=True)
class Hit:
    identity: str
    version: int
    seq_no: int
    source: Source | None


@dataclass(frozen=True, slots=True)
class Found:
    """A document by its id. ``source`` None: the index does not keep it."""

    version: int
    source: Source | None


class _Got(TypedDict):
    """As `parsed` gives it."""

    _id: str
    found: NotRequired[bool]
    _version: NotRequired[str]
    _source: NotRequired[Source]
    error: NotRequired[dict[str, object]]


class _Hit(TypedDict):
    """As `parsed` gives it."""

    _id: str
    _version: str
    _source: NotRequired[Source]
    sort: list[str]


class Indexes:
    """Of one server. ``headers`` authorize; ``secret`` is never repeated in an error."""

    def __init__(self, http: Http, root: httpx.URL, headers: Mapping[str, str], secret: str) -> None:
        self._http = http
        self._root = root
        self._headers = headers
        self._secret = secret

    def url(self, name: str, rest: str = "") -> httpx.URL:
        return self._root.join(quote(name, safe="") + rest)

    async def put(self, name: str, definition: Definition) -> Answer | Failure:
        """The request that creates an index, as it was answered."""
        body = Body((orjson.dumps(with_gc_deletes(definition)),))
        return await self._http.request("PUT", self.url(name), self._headers, body)

    async def create(self, name: str, definition: Definition) -> bool:
        """False: there is an index or alias of that name, and it was left as it is."""
        answer = await self.put(name, definition)
        if isinstance(answer, Answer) and answer.status == 400 and error_of(answer.body)[0] == ALREADY_THERE:
            return False
        self._good(answer, f"create the index {name}")
        return True

    async def delete(self, name: str) -> None:
        """Whether there is one or not. Never an alias: the server refuses that."""
        answer = await self._http.request("DELETE", self.url(name), self._headers)
        if not (isinstance(answer, Answer) and answer.status == 404):
            self._good(answer, f"delete the index {name}")

    async def owner(self, name: str) -> object:
        """What the index says under ``_meta.OWNER`` of its mapping; None: nothing, or there is no such index."""
        url = self.url(name, "/_mapping").copy_with(params={"filter_path": "*.mappings._meta"})
        answer = await self._ask("GET", url, None, f"read the mapping of {name}", missing=True)
        if answer is None:
            return None
        for index in orjson.loads(answer.body).values():
            return index["mappings"]["_meta"].get(OWNER)
        return None

    async def aliases(self, index: str) -> tuple[str, ...]:
        """The names that stand for it; none also where it is not there."""
        answer = await self._ask("GET", self.url(index, "/_alias"), None, f"look up {index}", missing=True)
        if answer is None:
            return ()
        return tuple(sorted(name for found in orjson.loads(answer.body).values() for name in found["aliases"]))

    async def target(self, name: str) -> Target | None:
        """What there is under a name; None: nothing."""
        answer = await self._ask("GET", self.url(name, "/_alias"), None, f"look up {name}", missing=True)
        if answer is None:
            return None
        found = cast("dict[str, dict[str, dict[str, dict[str, object]]]]", orjson.loads(answer.body))
        indices = tuple(sorted(found))
        if name in found:
            return Target(name, False, indices, name)
        says = {index: found[index]["aliases"][name].get("is_write_index") for index in indices}
        chosen = [index for index in indices if says[index] is True]
        if not chosen and len(indices) == 1 and says[indices[0]] is not False:
            chosen = list(indices)
        write_index = chosen[0] if chosen else None
        given = found[write_index]["aliases"][name] if write_index is not None else {}
        options = {option: value for option, value in given.items() if option != "is_write_index"}
        return Target(name, True, indices, write_index, options)

    async def move_alias(self, alias: str, index: str, *, delete_index: bool = False) -> tuple[str, ...]:
        """Let the alias, with the options that it has, stand for this index alone, in one step; returns what it stood
        for before. When this returns no request that comes is answered by another.

        ``delete_index``: if the name is an index itself, that index is deleted in the same step; else this raises
        SpillwayError ``alias_is_index``. Repeatable.
        """
        before = await self.target(alias)
        actions: list[dict[str, dict[str, object]]] = []
        if before is not None and not before.alias:
            if not delete_index:
                raise SpillwayError(
                    "alias_is_index",
                    f"{alias} is an index, which cannot be an alias at the same time",
                    f"say that the index {alias} may be deleted when the alias takes its name",
                )
            actions.append({"remove_index": {"index": alias}})
        elif before is not None:
            actions += [{"remove": {"index": old, "alias": alias}} for old in before.indices if old != index]
        options = {} if before is None else before.options
        actions.append({"add": {**options, "index": index, "alias": alias, "is_write_index": True}})
        body = Body((orjson.dumps({"actions": actions}),))
        what = f"point the alias {alias} to {index}"
        answer = cast(Answer, await self._ask("POST", self._root.join("_aliases"), body, what))
        if not orjson.loads(answer.body)["acknowledged"]:
            raise _unreachable(what, "not all nodes have confirmed it yet")
        return () if before is None else before.indices

    async def refresh(self, name: str) -> None:
        """Let searches and counts see everything that was written so far."""
        await self._whole("POST", self.url(name, "/_refresh"), None, f"refresh {name}")

    async def count(self, name: str) -> int:
        """Documents, by the last refresh."""
        found = await self._whole("GET", self.url(name, "/_count"), None, f"count the documents of {name}")
        return int(str(found["count"]))

    async def shards(self, index: str) -> int:
        """How many primary shards an index (no alias) has."""
        what = f"read the settings of {index}"
        answer = await self._ask("GET", self.url(index, "/_settings?flat_settings=true"), None, what)
        settings = orjson.loads(cast(Answer, answer).body)[index]["settings"]
        return int(settings["index.number_of_shards"])

    async def last_seq_no(self, index: str, shard: int) -> int:
        """Of the documents that searches see in a shard; -1: there are none."""
        query = {"size": 1, "sort": _by_seq_no("desc"), "track_total_hits": False, "_source": False, "version": True}
        hits = _hits_of(self._good(await self._search(index, shard, query, _ANSWER_BYTES), f"read {index}"))
        return hits[0].seq_no if hits else -1

    async def hits(
        self, index: str, shard: int, after_seq_no: int, last_seq_no: int, limit: int, fields: Sequence[str]
    ) -> list[Hit]:
        """Documents of a shard behind the cursor (-1: from the beginning) up to the last, with these fields of their
        source; none: there are no more. At least one, but fewer than the limit where they are large."""
        limit = min(limit, MAX_HITS)
        while True:
            query = {
                "size": limit,
                "query": {"range": {"_seq_no": {"gt": after_seq_no, "lte": last_seq_no}}},
                "sort": _by_seq_no("asc"),
                "version": True,
                "track_total_hits": False,
                "_source": list(fields),
            }
            answer = await self._search(index, shard, query, _ANSWER_BYTES + _HIT_BYTES * limit)
            if isinstance(answer, Answer) and answer.status == 200 and not answer.whole and limit > 1:
                limit //= 2
                continue
            return _hits_of(self._good(answer, f"read {index}"))

    async def _search(
        self, index: str, shard: int, query: Mapping[str, object], max_answer_bytes: int
    ) -> Answer | Failure:
        url = self.url(index, f"/_search?preference=_shards:{shard}&allow_partial_search_results=false")
        body = Body((orjson.dumps(query),))
        return await self._http.request("POST", url, self._headers, body, max_answer_bytes=max_answer_bytes)

    async def documents(self, index: str, ids: Sequence[str], max_answer_bytes: int) -> dict[str, Found] | None:
        """What there is under these ids just now, whether refreshed or not. None: they need more bytes than that."""
        what = f"read {index}"
        body = Body((orjson.dumps({"ids": list(ids)}),))
        answer = await self._http.request(
            "POST", self.url(index, "/_mget"), self._headers, body, max_answer_bytes=max_answer_bytes
        )
        if isinstance(answer, Answer) and answer.status == 200 and not answer.whole:
            return None
        body_bytes = self._good(answer, what).body
        found: dict[str, Found] = {}
        for one in cast("dict[str, list[_Got]]", await asyncio.to_thread(parsed, body_bytes))["docs"]:
            if "error" in one:
                raise _unreachable(what, " ".join(describe(one["error"])))
            if one.get("found"):
                found[one["_id"]] = Found(int(one["_version"]), one.get("_source"))
        return found

    async def _ask(
        self, method: Literal["GET", "POST"], url: httpx.URL, body: Body | None, what: str, *, missing: bool = False
    ) -> Answer | None:
        """``missing``: a 404 is None, and no error."""
        answer = await self._http.request(method, url, self._headers, body, max_answer_bytes=_ANSWER_BYTES)
        if missing and isinstance(answer, Answer) and answer.status == 404:
            return None
        return self._good(answer, what)

    async def _whole(
        self, method: Literal["GET", "POST"], url: httpx.URL, body: Body | None, what: str
    ) -> dict[str, object]:
        """An answer for which all shards were asked; raises if one of them failed."""
        answer = cast(Answer, await self._ask(method, url, body, what))
        found = cast("dict[str, object]", orjson.loads(answer.body))
        shards = cast("dict[str, int]", found["_shards"])
        if shards["failed"]:
            raise SpillwayError(
                "sink_unreachable",
                f"cannot {what}: {shards['failed']} of {shards['total']} shards failed",
                "see the health of the cluster, then repeat the command",
            )
        return found

    def _good(self, answer: Answer | Failure, what: str) -> Answer:
        if isinstance(answer, Failure):
            raise _unreachable(what, f"{answer.reason}: {answer.detail}")
        if answer.status == 429 or answer.status >= 500:
            raise _unreachable(what, words(answer, self._secret))
        if answer.status >= 300 or not answer.whole:
            said = words(answer, self._secret) if answer.whole else "the answer is too large"
            remedy = "check the name, destination.auth_value and the privileges of that user"
            raise SpillwayError("sink_refused", f"cannot {what}: {said}", remedy)
        return answer


OWNER = "spillway_reindex"
ALREADY_THERE = "resource_already_exists_exception"


def _by_seq_no(order: Literal["asc", "desc"]) -> list[dict[str, dict[str, str]]]:
    return [{"_seq_no": {"order": order, "unmapped_type": "long"}}]  # unmapped: no document was ever there


def _hits_of(answer: Answer) -> list[Hit]:
    found = cast("dict[str, dict[str, list[_Hit]]]", parsed(answer.body))["hits"]["hits"]
    return [Hit(hit["_id"], int(hit["_version"]), int(hit["sort"][0]), hit.get("_source")) for hit in found]


def _unreachable(what: str, why: str) -> SpillwayError:
    return SpillwayError(
        "sink_unreachable", f"cannot {what}: {why}", "start the server or mend the way to it, then repeat the command"
    )


def words(answer: Answer, secret: str) -> str:
    """What an answer that is an error says, for people."""
    said = " ".join(part for part in (f"HTTP {answer.status}", *error_of(answer.body)) if part)
    return said.replace(secret, "***") if secret else said


def error_of(body: bytes) -> tuple[str, str]:
    """Type and reason of the error that a whole answer holds; the text itself where it is not of that shape."""
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "", body[:500].decode("utf-8", "replace").strip()
    return describe(error)


def describe(error: object) -> tuple[str, str]:
    if not isinstance(error, dict):
        return "", "" if error is None else str(error)
    detail = str(error.get("reason") or "")
    cause = error.get("caused_by") or next(iter(error.get("root_cause") or ()), None)
    if isinstance(cause, dict) and cause.get("reason") and cause["reason"] != detail:
        detail = f"{detail}: {cause['reason']}"
    return str(error.get("type") or ""), detail

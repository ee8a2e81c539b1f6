"""Operations sent to a search server in rounds: what one request cannot say, because updates have no versions.

**Indexing and deleting** carry the version of their change (`spillway.sinks.search`), and go in one round.

**An update** changes fields of a document that others may write, too, so no version of ours can be the document's: the
server refuses external versions for it. Order per key rests on something else. No two batches with messages of one key
are on their way at once; what remains is a request that has got no answer and that the server carries out later, behind
a newer one. So every update says which write of the document it builds upon (``if_seq_no``, ``if_primary_term``), as it
was read right before (``_mget``): one that comes late finds another and changes nothing. An update of a document that
is not there is rejected (``document_missing``), or with ``doc_as_upsert`` creates it: ``create`` fails on one that is
there by then. (One gap is left: a ``create`` that got no answer, and is carried out after the document was made again
and deleted, brings it back.)

**Conflicts.** Two updates of a document are never in one request: each round takes the first of those that wait. One
that somebody else has come before (another sink, another batch of ours) is tried again on what is there now, as
``retry_on_conflict`` would have the server do it; after `MOST_CONFLICTS` times it is ``retry``.

An update, and the document that it makes, passes no ingest pipeline: servers have none for partial documents.

Sources: "Update API", "Multi get API", "Optimistic concurrency control" of the Elasticsearch reference. Checked against
OpenSearch 2.19.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import httpx
import orjson

from spillway.sinks.base import OK, Result, reject, retry
from spillway.sinks.http import Answer, Body, Http
from spillway.sinks.index import describe
from spillway.sinks.operations import Current, Operation, lines, unchanged_toast
from spillway.sinks.outcomes import CONFLICT, NO_INDEX, Item, Outcomes

MOST_CONFLICTS: Final = 4

ANSWER_BYTES: Final = 64 * 1024
ANSWER_ITEM_BYTES: Final = 4 * 1024
_FOUND_FIELDS: Final = "docs._id,docs.found,docs._seq_no,docs._primary_term,docs.error.type,docs.error.reason"

_Shard = tuple[str, str, str]  # index, _id and routing: where a document is


class Rounds:
    """Of one sink. ``own``: its index; what goes to another was routed there."""

    def __init__(
        self, http: Http, root: httpx.URL, bulk: httpx.URL, headers: Mapping[str, str], outcomes: Outcomes, own: str
    ) -> None:
        self._http = http
        self._bulk = bulk
        self._get = root.join("_mget").copy_with(params={"_source": "false", "filter_path": _FOUND_FIELDS})
        self._headers = dict(headers)
        self._outcomes = outcomes
        self._own = own

    async def send(self, operations: Sequence[Operation], *, gzip: bool) -> dict[int, Result] | Result:
        """What became of those that failed, by the message's place; one result if nothing of it was sent."""
        failed: dict[int, Result] = {}
        waiting = list(operations)
        first = True
        while waiting:
            now, waiting = _round(waiting)
            outcome = await self._one(now, gzip=gzip)
            if isinstance(outcome, Result):
                if first:
                    return outcome
                for operation in (*now, *waiting):
                    failed.setdefault(operation.message, outcome)
                break
            again: list[Operation] = []
            for operation, result in outcome:
                if result is None:
                    again.append(operation)
                elif result is not OK:
                    failed.setdefault(operation.message, result)
            waiting = again + waiting
            first = False
        return failed

    async def _one(
        self, operations: Sequence[Operation], *, gzip: bool
    ) -> list[tuple[Operation, Result | None]] | Result:
        """Results; None: it is to be tried again."""
        found = await self._current([one for one in operations if one.op == "update"])
        if isinstance(found, Result):
            return found
        done: list[tuple[Operation, Result | None]] = []
        sent: list[Operation] = []
        for operation in operations:
            unfit = _unfit(operation, found)
            if unfit is None:
                sent.append(operation)
            else:
                done.append((operation, unfit))
        if not sent:
            return done
        answer = await self._http.request(
            "POST",
            self._bulk,
            self._headers | {"content-type": "application/x-ndjson"},
            Body(_lines(sent, found)),
            gzip=gzip,
            max_answer_bytes=ANSWER_BYTES + ANSWER_ITEM_BYTES * len(sent),
        )
        whole = self._outcomes.whole(answer)
        if whole is not None:
            return whole
        assert isinstance(answer, Answer)
        if b'"errors":false' in answer.body[:256]:
            return [*done, *((operation, OK) for operation in sent)]
        items = self._outcomes.items(answer, len(sent))
        if isinstance(items, Result):
            return items
        return [*done, *((one, self._result(one, item)) for one, item in zip(sent, items, strict=True))]

    def _result(self, operation: Operation, item: Item) -> Result | None:
        if operation.op == "update" and item.get("_id") == operation.identity and item["status"] in (404, 409):
            reason, detail = describe(item.get("error"))
            if reason != NO_INDEX:  # another write was quicker, or has deleted it
                operation.conflicts += 1
                return None if operation.conflicts < MOST_CONFLICTS else retry(reason or CONFLICT, detail)
        routed = operation.index != self._own
        return self._outcomes.of_item(item, operation.identity, delete=operation.op == "delete", routed=routed)

    async def _current(self, updates: Collection[Operation]) -> dict[_Shard, Current | Result | None] | Result:
        """What there is of these documents; None: nothing."""
        if not updates:
            return {}
        asked = [
            {"_index": one.index, "_id": one.identity, **({"routing": one.routing} if one.routing else {})}
            for one in updates
        ]
        answer = await self._http.request(
            "POST",
            self._get,
            self._headers,
            Body((orjson.dumps({"docs": asked}),)),
            max_answer_bytes=ANSWER_BYTES + ANSWER_ITEM_BYTES * len(asked),
        )
        whole = self._outcomes.whole(answer)
        if whole is not None:
            return whole
        assert isinstance(answer, Answer)
        found: dict[_Shard, Current | Result | None] = {}
        for one, document in zip(updates, orjson.loads(answer.body)["docs"], strict=True):
            error = document.get("error")
            if error is not None and describe(error)[0] != NO_INDEX:
                found[_shard(one)] = self._outcomes.failed(500, error, routed=one.index != self._own)
            elif document.get("found"):
                found[_shard(one)] = Current(document["_seq_no"], document["_primary_term"])
            else:
                found[_shard(one)] = None
        return found


def _round(waiting: Sequence[Operation]) -> tuple[list[Operation], list[Operation]]:
    """Those for the next request, and those that wait for another: behind an update of the same document, or an update
    behind anything."""
    now: list[Operation] = []
    later: list[Operation] = []
    seen: dict[tuple[str, str], bool] = {}  # True: nothing may follow in this round
    for operation in waiting:
        is_update = operation.op == "update"
        if operation.place in seen and (is_update or seen[operation.place]):
            seen[operation.place] = True
            later.append(operation)
        else:
            seen[operation.place] = is_update
            now.append(operation)
    return now, later


def _unfit(operation: Operation, found: Mapping[_Shard, Current | Result | None]) -> Result | None:
    if operation.op != "update":
        return None
    current = found[_shard(operation)]
    if isinstance(current, Result):
        return current
    if current is None and not operation.upsert:
        return reject("document_missing", f"there is no document {operation.identity} in {operation.index} to update")
    if current is None and operation.partial_of:
        return unchanged_toast(operation.partial_of)
    return None


def _lines(operations: Sequence[Operation], found: Mapping[_Shard, Current | Result | None]) -> Iterator[bytes]:
    for operation in operations:
        current = found.get(_shard(operation))
        yield from lines(operation, current if isinstance(current, Current) else None)


def _shard(operation: Operation) -> _Shard:
    return operation.index, operation.identity, operation.routing

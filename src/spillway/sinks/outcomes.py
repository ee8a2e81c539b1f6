"""What a search server says of a bulk request, and what that means for the messages.

By position and id: 4xx of an item rejects it, with the error's type as the reason; 429 and 5xx retry it. What concerns
the sink's index (missing, closed, read-only) or the whole request (401, 403, 404, 429, 5xx, no connection) is the
sink's failure; of an index that a route has named it is the failure of those messages alone. 400 and 413 of a whole
request reject the batch.

A conflict of versions is ``ok``, superseded, only if the index holds a version that this sink can have written: of this
epoch, and not of a time before the sink began. Any other means that somebody else writes versions into this index, and
that our changes would be dropped without a trace: ``foreign_versions``.
"""

from __future__ import annotations

import re
from typing import Final, TypedDict

import orjson

from spillway.position import version
from spillway.sinks.base import OK, Result, SinkContext, reject, retry, sink_down
from spillway.sinks.http import Answer, Failure
from spillway.sinks.index import describe, error_of, words

CONFLICT: Final = "version_conflict_engine_exception"
NO_INDEX: Final = "index_not_found_exception"

# Errors of an item that say nothing of the document.
_INDEX_AWAY: Final = frozenset(("index_closed_exception", "cluster_block_exception"))
_INDEX_DOWN: Final = frozenset((NO_INDEX, "security_exception")) | _INDEX_AWAY
_CURRENT_VERSION: Final = re.compile(r"current version \[(-?\d+)\]")


class _ItemRest(TypedDict, total=False):
    _id: str
    error: object


class Item(_ItemRest):
    status: int


class Outcomes:
    def __init__(self, context: SinkContext, secret: str) -> None:
        """``secret`` is never repeated."""
        self._secret = secret
        # A page of existing rows may stand right before the position at which the sink began.
        self._lowest = version(context.epoch, max(context.started_lsn - 1, 0), 0)
        self._highest = version(context.epoch, -1, 0xFF)

    def whole(self, answer: Answer | Failure) -> Result | None:
        """The result of the whole batch; None for an answer that has one for each item."""
        if isinstance(answer, Failure):
            return sink_down(answer.reason, answer.detail)
        if answer.status == 200:
            return None if answer.whole else reject("answer_too_large")
        if answer.status in (400, 413):
            reason, detail = error_of(answer.body)
            return reject(reason or f"http_{answer.status}", detail or words(answer, self._secret))
        return sink_down(f"http_{answer.status}", words(answer, self._secret), answer.retry_after_seconds)

    def items(self, answer: Answer, count: int) -> list[Item] | Result:
        """One per operation, or why the answer is none."""
        try:
            items = orjson.loads(answer.body)["items"]
            if len(items) == count:
                return [next(iter(item.values())) for item in items]
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            pass
        return sink_down("bad_answer", f"this is no answer to a bulk request: {answer.text[:200]}")

    def of_item(self, item: Item, identity: str, *, delete: bool, routed: bool) -> Result:
        """``routed``: into an index that is not the sink's own."""
        if item.get("_id") != identity:
            return retry("answer_mismatch", f"the answer for {item.get('_id')!r} is in its place")
        status = item["status"]
        if "error" not in item and (status < 300 or (delete and status == 404)):
            return OK
        return self.failed(status, item.get("error"), routed=routed)

    def failed(self, status: int, error: object, *, routed: bool) -> Result:
        reason, detail = describe(error)
        reason = reason or f"http_{status}"
        if reason in _INDEX_DOWN:
            if not routed:
                return sink_down(reason, detail)
            return (retry if reason in _INDEX_AWAY else reject)(reason, detail)
        if status == 409:
            return self._conflict(reason, detail, routed=routed)
        if status == 429 or status >= 500:
            return retry(reason, detail)
        return reject(reason, detail)

    def _conflict(self, reason: str, detail: str, *, routed: bool) -> Result:
        if reason != CONFLICT:
            return reject(reason, detail)
        found = _CURRENT_VERSION.search(detail)
        # The epoch is on top: a version above ours is of our epoch or of a later one.
        if found and self._lowest <= int(found[1]) <= self._highest:
            return OK
        return (reject if routed else sink_down)(
            "foreign_versions",
            f"the index holds a version that this sink cannot have written: {detail}. Another program or another "
            "Spillway writes into this index; give this sink an index of its own",
        )

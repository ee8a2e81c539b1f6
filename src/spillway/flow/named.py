"""Rows that are named by their keys, for a backfill of these alone: where the keys are, and how far it is with them.

Keys are kept once, in the store, in blocks: documents of a few kilobytes beside that of the backfill, durable before it
is. In memory there is one block, while its rows are read; of what a sink's backfills are given by keys `MOST_BYTES` may
be under way. How far it is is small: the number of the block, and which of its keys are done
(`spillway.flow.progress`), so that a crash repeats a page, no more, and a restart goes on in this block.

A block is taken away as soon as it is known to be done, the last ones with the end of the backfill. What a crash leaves
behind has no backfill that is under way (`without_backfill`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence

import orjson

from spillway.flow.delivery import Delivery
from spillway.flow.progress import Named
from spillway.source.page import Cursor
from spillway.store.base import BackfillDocument, Store

BLOCK_KEYS = 500
BLOCK_BYTES = 16 << 10
MOST_BYTES = 1 << 20  # of one sink, whatever its backfills are
_BLOCK = "keys:"  # what the ids of blocks begin with; then the backfill's and the number
_VALUE_BYTES = 4  # what a value costs beside its text


def key_bytes(key: Cursor) -> int:
    return sum(_VALUE_BYTES + len(value.encode()) for value in key)


def is_block(document_id: str) -> bool:
    return document_id.startswith(_BLOCK)


def without_backfill(document_ids: Iterable[str], under_way: Iterable[str]) -> list[str]:
    """The blocks among these of which the backfill is not one of those."""
    known = {f"{_BLOCK}{backfill_id}" for backfill_id in under_way}
    return [one for one in document_ids if is_block(one) and one.rpartition(":")[0] not in known]


class NamedKeys:
    """Of one backfill."""

    def __init__(self, store: Store, delivery: Delivery, backfill_id: str) -> None:
        self._store = store
        self._delivery = delivery
        self._id = backfill_id

    async def keep(self, keys: Iterable[Cursor]) -> Named:
        """Durable when this returns."""
        rows = blocks = size_bytes = 0
        for blocks, block in enumerate(_blocks(dict.fromkeys(keys)), 1):
            rows += len(block)
            size_bytes += sum(map(key_bytes, block))
            await self._delivery.note(BackfillDocument(self._name(blocks - 1), orjson.dumps(block), ended=False))
        return Named(rows, blocks, size_bytes)

    async def block(self, number: int) -> list[Cursor]:
        """Reads what the sink's backfills under way have, `MOST_BYTES` of keys at most."""
        documents = dict(await asyncio.to_thread(self._store.backfills, self._delivery.name, ended=False))
        return [tuple(key) for key in orjson.loads(documents[self._name(number)])]

    async def drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            await drop_block(self._delivery, self._name(number))

    def _name(self, number: int) -> str:
        return f"{_BLOCK}{self._id}:{number}"


async def drop_block(delivery: Delivery, document_id: str) -> None:
    await delivery.note(BackfillDocument(document_id, b"", ended=False, forgotten=True))


def _blocks(keys: Iterable[Cursor]) -> Iterator[Sequence[Cursor]]:
    block: list[Cursor] = []
    size_bytes = 0
    for key in keys:
        cost = key_bytes(key)
        if block and (len(block) == BLOCK_KEYS or size_bytes + cost > BLOCK_BYTES):
            yield block
            block, size_bytes = [], 0
        block.append(key)
        size_bytes += cost
    if block:
        yield block

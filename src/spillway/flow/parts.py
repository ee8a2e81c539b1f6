"""Over which relations a backfill is laid out, as parts.

They are those that the table's rows are in, and these change: a part whose relation was dropped, detached or taken out
of the publication is dropped, as long as the table has others; when all parts are read, the relations that have come
meanwhile are laid out, too. A relation whose cursors mean nothing any more (it was rewritten, or has another key) is
read from its beginning, once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from spillway.errors import SourceUnavailable, SpillwayError
from spillway.flow.progress import BackfillState, Part
from spillway.source.page import PageReader, Selection

GONE = ("no_table", "not_published", "bad_condition")  # codes of what is said of a relation that has gone

_log = structlog.get_logger()


class Parts:
    """Those of ``state``. ``needs_key``: rows without a key are of no use."""

    def __init__(self, state: BackfillState, needs_key: bool, save: Callable[[], Awaitable[None]]) -> None:
        self._state = state
        self._needs_key = needs_key
        self._save = save
        self._begun_anew: set[tuple[str, str]] = set()  # relations whose order has changed

    async def lay_out(self, reader: PageReader, received_lsn: int) -> bool:
        """Relations of the table that are not known yet become parts. Whether there are any, and nothing is saved."""
        state = self._state
        known = {(part.schema, part.table) for part in state.parts or ()}
        parts: list[Part] = []
        estimate = 0
        for relation in await reader.relations(*state.request.name):
            if relation in known:
                continue
            try:
                found, rows = await self._parts_of(reader, Part(*relation))
            except SpillwayError as error:
                await self.check_gone(reader, relation, error)
                continue
            parts += found
            estimate += rows
        if state.parts is None:
            state.started_lsn = max(state.started_lsn, received_lsn)
        elif not parts:
            return False
        state.parts = [*(state.parts or ()), *parts]
        state.estimate_rows = (state.estimate_rows or 0) + estimate
        return True

    async def _parts_of(self, reader: PageReader, whole: Part) -> tuple[list[Part], int]:
        """And about how many rows they have."""
        request = self._state.request
        selection = whole.selection(request)
        if request.least_key is not None or request.most_key is not None:
            ranges = [await reader.bounded(selection)]
            rows = await reader.estimate(selection, ranges[0])
        else:
            ranges = await reader.split(selection, request.parallel)
            rows = await reader.estimate(selection)
        return [Part(whole.schema, whole.table, one.low, one.high) for one in ranges], rows

    async def instead(self, reader: PageReader, part: Part, error: SpillwayError) -> list[Part]:
        """What is to be read in place of the parts of this relation. Raises the error if nobody can say."""
        state, relation = self._state, (part.schema, part.table)
        if not any(part is known for known in state.parts or ()):
            return []  # another reader has met the same
        instead: list[Part] = []
        if error.code == "order_changed":
            request = state.request
            bounded = (request.least_key, request.most_key) != (None, None)
            if bounded or relation in self._begun_anew:
                raise error
            if self._needs_key and not await reader.key_columns(Selection(*relation)):
                raise error
            self._begun_anew.add(relation)
            instead.append(Part(*relation))
        else:
            await self.check_gone(reader, relation, error)
        state.parts = [known for known in state.parts or () if (known.schema, known.table) != relation] + instead
        _log.info(
            "backfill goes on",
            sink=state.sink,
            relation=".".join(relation),
            now="from its beginning" if instead else "without it",
            error=str(error),
        )
        await self._save()
        return instead

    async def check_gone(self, reader: PageReader, relation: tuple[str, str], error: SpillwayError) -> None:
        """Raises unless the relation has gone and the table has others: the error, or `SourceUnavailable` if it is
        there again."""
        if error.code not in GONE:
            raise error
        try:
            relations = await reader.relations(*self._state.request.name)
        except SpillwayError as now:
            raise error if now.code == "not_published" else now from None
        if relation in relations:
            raise error if error.code == "bad_condition" else SourceUnavailable(error.code, str(error))

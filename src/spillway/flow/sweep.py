"""What a backfill deletes when all rows are read: what the sink has, or will have, and the source has not, or the
sink's filters leave out.

The sink is asked for its keys, page by page; those of which the source has no row become deletes, placed in the stream
as a page of rows is (`spillway.flow.paging`). What the backfill has just written is known to be there, where the sink
knows versions. A row from before that the sink has not taken yet is not among its keys; taken after all, it must not
stay: so what is older than the backfill is tried first, and the keys of what has failed are swept as if the sink had
them. How far it is is kept with the backfill, and a restart goes on from there.

A backfill of rows that are named by their keys needs not ask the sink: it deletes those of them that the source has
not (`spillway.flow.backfill`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from spillway.change import key_values, table_prefix
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.flow.budget import Spare
from spillway.flow.capture import Capture
from spillway.flow.paging import ROOM_SECONDS, Manners, OpenReader, Paging
from spillway.flow.progress import BackfillState
from spillway.flow.route import Subscription
from spillway.position import version
from spillway.source.page import Cursor, LockTimeout, NeedsCredit, Page, PageReader, PageTimeout, Selection
from spillway.store.base import BackfillDocument

MOST_KEYS = 500  # that are looked up in one page
NAMED = 5  # so many rows that cannot be read are named, each with so much of its key
NAME_LENGTH = 200


class Sweeping(Paging):
    """The pages of one backfill, and what is kept of it."""

    def __init__(
        self,
        state: BackfillState,
        subscription: Subscription,
        keying: int,
        capture: Capture,
        spare: Spare,
        open_reader: OpenReader,
        manners: Manners,
        epoch: Callable[[], int],
        clock: Clock,
    ) -> None:
        readers = state.request.parallel
        super().__init__(state.id, subscription, keying, capture, spare, open_reader, manners, clock, readers)
        self.state = state
        self._epoch = epoch
        self._numbers: dict[Cursor, int] = {}  # of rows that are named by their keys: the block that is being read

    @property
    def active(self) -> bool:
        return self.state.state == "active"

    async def _save(self) -> None:
        state = self.state
        state.changed = self._clock.wall()
        await self._delivery.note(
            BackfillDocument(state.id, state.as_json(), state.has_ended and not state.is_owed), covering=True
        )

    @property
    def _most_keys(self) -> int:
        """In one page."""
        return min(MOST_KEYS, self._delivery.page_messages)

    async def _sweep(self) -> bool:
        """See the module. False: it is not active any more."""
        sink, state = self._delivery.readable, self.state
        if sink is None:
            return True
        below = version(self._epoch(), state.started_lsn, 0)
        table = state.request.name
        reader = await self._open_reader(state.id)
        try:
            columns = await reader.key_columns(Selection(*(await reader.relations(*table))[0]))
            if not await self._sweep_held(reader):  # after a restart, too: what was tried may come again
                return False
            while await self._room():
                try:
                    keys, after = await sink.keys(table, columns, state.sweep_after, self._most_keys, below)
                except SpillwayError as error:
                    if error.code != "sink_unreachable":
                        raise
                    self.waiting = f"the sink cannot be read: {error}"
                    await self._sleep(ROOM_SECONDS)
                    continue
                if keys and await self._delete_absent(reader, keys) is None:
                    continue
                state.sweep_after = after
                await self._save()
                if after is None:
                    return True
        finally:
            await reader.close()
        return False

    async def _sweep_held(self, reader: PageReader) -> bool:
        """What is older than this backfill and waits for the sink. Of what has failed the delete goes behind it."""
        table = self.state.request.name
        while await self._room():
            lsn = await self._delivery.untried_from()
            if lsn is None or lsn > self.state.started_lsn:
                break
            self.waiting = "what waited for the sink before comes first"
            await self._sleep(ROOM_SECONDS)
        prefix = after = table_prefix(*table)
        while await self._room():
            held = [key for key in await self._delivery.held_keys(after, self._most_keys) if key.startswith(prefix)]
            if not held:
                return True
            if await self._delete_absent(reader, [key_values(*table, key) for key in held]) is not None:
                after = held[-1]
        return False

    async def _delete_absent(self, reader: PageReader, keys: Sequence[Cursor]) -> list[Cursor] | None:
        """Deletes of those that the source has not, or whose rows the sink's filters leave out, placed as a page is.
        Returns which these are, but for those of which the sink has something newer that is not whole; None: to be done
        again."""
        try:
            return await self._delete_absent_of(reader, keys, 0)
        except NeedsCredit as error:
            if len(keys) > 1:
                half = len(keys) // 2
                first = await self._delete_absent(reader, keys[:half])
                rest = None if first is None else await self._delete_absent(reader, keys[half:])
                return None if first is None or rest is None else first + rest
            if error.needed_bytes > self._spare.most_bytes:
                self._pass_over(keys[0], error)
                return []
            return await self._delete_absent_of(reader, keys, error.needed_bytes)

    def _pass_over(self, key: Cursor, error: SpillwayError) -> None:
        """The row with this key cannot be read, however often it is tried: the others go on, and it ends as failed."""
        state = self.state
        state.unreadable += 1
        why = error.what
        if isinstance(error, NeedsCredit):
            why = f"{why}, more than the {self._spare.most_bytes} that there can be; raise memory.limit_mb"
        if len(state.unreadable_named) < NAMED:
            state.unreadable_named.append(f"{':'.join(key)[:NAME_LENGTH]}: {why}")
        if key in self._numbers:
            state.placed.append(self._numbers[key])

    async def _delete_absent_of(
        self, reader: PageReader, keys: Sequence[Cursor], needed_bytes: int
    ) -> list[Cursor] | None:
        began = await self._quiet(reader)
        if not began:
            return None
        credit = await self._credit(needed_bytes)
        if not credit:
            return None
        view = self._carried.open()
        try:
            page = await self._absent(reader, keys, credit)
            self._carried.saw(view, page.snapshot.sees)
            placing = await self._place(reader, page, began)
            if placing is None:
                return None
            await self._settled(placing)
            self.state.swept += page.chunk.count - placing.dropped - len(placing.again)
            return [key for key in page.missing if key not in placing.again]
        except (LockTimeout, PageTimeout) as error:
            self.waiting = str(error)
            await self._sleep(ROOM_SECONDS)
            return None
        finally:
            self._carried.close(view)
            self._spare.give(credit)

    async def _absent(self, reader: PageReader, keys: Sequence[Cursor], credit_bytes: int) -> Page:
        """Deletes of those that are in none of the table's relations. What moved from one to another while they were
        looked at is told by the snapshot of the first, which does not see that. Partitions may come while a sweep goes
        on: the relations are those of before and after."""
        table = self.state.request.name
        seconds = self._manners.timeout_seconds
        checked = {condition.column for condition in self._subscription.filters if condition.table == table}
        while True:
            relations = await reader.relations(*table)
            page = await reader.read_absent(Selection(*relations[0]), keys, seconds, checked, credit_bytes)
            snapshot = page.snapshot
            for relation in relations[1:]:
                page = await reader.read_absent(Selection(*relation), page.missing, seconds, checked, credit_bytes)
            if relations == [table] or await reader.relations(*table) == relations:
                page.snapshot = replace(snapshot, lsn=page.snapshot.lsn)
                return page

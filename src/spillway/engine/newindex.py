"""The index that a re-index fills, and the alias that is to stand for it, as the server has them.

An index that we have created says in its mapping by which re-index that was: nothing else is ever deleted as ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spillway.clock import Clock
from spillway.engine.shadow import ReindexState
from spillway.errors import SpillwayError
from spillway.sinks.index import OWNER

if TYPE_CHECKING:
    from spillway.sinks.search import SearchSink

REFRESH_SECONDS = 1.0  # a refresh that took longer is repeated: much has come meanwhile
REFRESHES = 5


class NewIndex:
    """Every method may raise SpillwayError ``sink_unreachable``."""

    def __init__(self, sink: SearchSink, state: ReindexState, clock: Clock) -> None:
        """``sink``: for the new index; nothing is ever sent to it, and it is closed with this."""
        self.sink = sink
        self._indexes = sink.indexes
        self._state = state
        self._clock = clock

    async def close(self) -> None:
        """Repeatable; what is asked afterwards connects anew."""
        await self.sink.close()

    async def check(self, last: ReindexState | None) -> None:
        """Raises SpillwayError for what forbids the re-index. ``last``: the one before it."""
        state = self._state
        target = await self._indexes.target(state.alias)
        if target is None:
            raise SpillwayError(
                "no_index", f"there is no index {state.alias} yet", f"the sink {state.sink} creates it when it starts"
            )
        if not target.alias and not state.replace_index:
            raise SpillwayError(
                "alias_is_index",
                f"{state.alias} is an index and no alias: it would have to be deleted for the alias to take its name",
                "allow that: --replace-index",
            )
        if len(target.indices) > 1:
            raise SpillwayError(
                "alias_of_several",
                f"the alias {state.alias} stands for {', '.join(target.indices)}; after the switch it would stand for "
                f"{state.into} alone",
                "take the others off the alias",
            )
        if await self._indexes.target(state.into) is not None:
            ours = last is not None and last.state == "failed" and await self._indexes.owner(state.into) == last.id
            if not ours or await self._indexes.aliases(state.into):
                raise self._exists()
            await self._indexes.delete(state.into)

    async def create(self, definition: dict[str, object]) -> None:
        """Repeatable. Raises SpillwayError ``index_exists`` for one that is not ours."""
        state = self._state
        if not await self._indexes.create(state.into, definition) and not await self._is_ours():
            raise self._exists()

    async def delete(self) -> None:
        """If it is ours. Raises SpillwayError ``index_in_use`` if an alias stands for it."""
        if await self._is_ours():
            await self._delete(self._state.into)

    async def delete_old(self, index: str) -> None:
        """The same of one that the alias stood for before."""
        await self._delete(index)

    async def refresh(self) -> None:
        """Searches see what has been written, but for what has come in the last second."""
        for _ in range(REFRESHES):
            began = self._clock.monotonic()
            await self._indexes.refresh(self._state.into)
            if self._clock.monotonic() - began < REFRESH_SECONDS:
                break

    async def in_its_place(self) -> tuple[str, ...]:
        """What the alias stands for; nothing while the name is that of an index."""
        target = await self._indexes.target(self._state.alias)
        return target.indices if target is not None and target.alias else ()

    async def has_alias(self) -> bool:
        return await self.in_its_place() == (self._state.into,)

    async def take_alias(self) -> None:
        state = self._state
        await self._indexes.move_alias(state.alias, state.into, delete_index=state.replace_index)

    async def _is_ours(self) -> bool:
        return await self._indexes.owner(self._state.into) == self._state.id

    async def _delete(self, index: str) -> None:
        aliases = await self._indexes.aliases(index)
        if aliases:
            raise SpillwayError(
                "index_in_use",
                f"{index} is not deleted: the alias {', '.join(aliases)} stands for it",
                "move the alias, or delete the index yourself",
            )
        await self._indexes.delete(index)

    def _exists(self) -> SpillwayError:
        return SpillwayError(
            "index_exists",
            f"there is an index or alias {self._state.into} already",
            "give --into another name, or delete it",
        )


def owned(definition: dict[str, object], number: str) -> dict[str, object]:
    """The same, with a note of whose the index is."""
    mappings = definition.get("mappings") or {}
    assert isinstance(mappings, dict)
    return {**definition, "mappings": {**mappings, "_meta": {**mappings.get("_meta", {}), OWNER: number}}}

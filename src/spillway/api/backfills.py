"""The routes of backfills, replays and re-indexes. Sequin's paths, fields and shapes, where it has them.

::

    GET   /api/backfills?ended                      {"data": [BACKFILL, ...]} of all sinks
    GET   /api/sinks/{sink}/backfills?ended         the same; ended=false: those that have not ended
    POST  /api/sinks/{sink}/backfills               body: `BackfillOrder`; 201
    GET   /api/sinks/{sink}/backfills/{id}          BACKFILL; the table in place of the id: the latest of it
    PATCH /api/sinks/{sink}/backfills/{id}          {"state": "active" | "paused" | "cancelled"} -> BACKFILL
    POST  /api/sinks/{sink}/replay                  body: `BackfillOrder` that says which rows; 201
    GET   /api/reindexes, /api/sinks/{sink}/reindex {"data": [REINDEX, ...]}
    POST  /api/sinks/{sink}/reindex                 body: `ReindexOrder` -> REINDEX; 201
    POST  /api/sinks/{sink}/reindex/cancel          -> REINDEX
    POST  /api/sinks/{sink}/reindex/drop-old        -> REINDEX, and "deleted": [names of indexes]

What is started for one ``table`` is answered as Sequin does, by the backfill itself; what is started for ``tables``, or
for every table of a sink that has several, by ``{"data": [...]}``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from spillway.api.errors import BadRequest
from spillway.api.exchange import answer, json_body, sink_of
from spillway.config import BackfillOrder, ReindexOrder, parse_table, read_order
from spillway.errors import SpillwayError

if TYPE_CHECKING:
    from spillway.engine import Engine

ORDER_MAX_BYTES = 1024 * 1024  # ten thousand keys, or the mapping of an index

Verb = Literal["pause", "resume", "cancel"]
VERBS: dict[str, Verb] = {"active": "resume", "paused": "pause", "cancelled": "cancel"}

Item = dict[str, object]


class BackfillRoutes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def of_all(self) -> list[Route]:
        """Under /api."""
        return [Route("/api/backfills", self._all), Route("/api/reindexes", self._reindexes)]

    def of_sink(self) -> list[Route]:
        """Under /api/sinks/{sink}."""
        return [
            Route("/backfills", self._list),
            Route("/backfills", self._start, methods=["POST"]),
            Route("/backfills/{id:path}", self._show),
            Route("/backfills/{id:path}", self._change, methods=["PATCH"]),
            Route("/replay", self._replay, methods=["POST"]),
            Route("/reindex", self._reindexes_of_sink),
            Route("/reindex", self._reindex, methods=["POST"]),
            Route("/reindex/cancel", self._cancel_reindex, methods=["POST"]),
            Route("/reindex/drop-old", self._drop_old, methods=["POST"]),
        ]

    async def _all(self, request: Request) -> Response:
        return answer(_data(await self._engine.backfills(None, ended=_ended(request))))

    async def _list(self, request: Request) -> Response:
        return answer(_data(await self._engine.backfills(sink_of(request), ended=_ended(request))))

    async def _start(self, request: Request) -> Response:
        return await self._started(request, {})

    async def _replay(self, request: Request) -> Response:
        return await self._started(request, {"replay": True})

    async def _started(self, request: Request, more: Item) -> Response:
        given = await json_body(request, ORDER_MAX_BYTES)
        given = {} if given is None else given
        order = read_order(BackfillOrder, given | more if isinstance(given, dict) else given)
        items = await self._engine.start_backfill(sink_of(request), order)
        several = len(items) != 1 or (isinstance(given, dict) and "tables" in given)
        return answer(_data(items) if several else _item(items[0]), 201)

    async def _show(self, request: Request) -> Response:
        sink, wanted = sink_of(request), str(request.path_params["id"])
        found = await self._find(sink, wanted, ended=True)
        if found is None:
            remedy = f"see `spillway backfill list {sink} --all`"
            raise SpillwayError("unknown_backfill", f"{sink} has no backfill {wanted}", remedy)
        return answer(_item(found))

    async def _change(self, request: Request) -> Response:
        match await json_body(request, ORDER_MAX_BYTES):
            case {"state": str(state), **rest} if state in VERBS and not rest:
                verb = VERBS[state]
            case _:
                raise BadRequest("what is to become of it is not clear", f'send {{"state": one of {", ".join(VERBS)}}}')
        sink, wanted = sink_of(request), str(request.path_params["id"])
        found = await self._find(sink, wanted, ended=False)
        id_or_table = wanted if found is None else str(found["id"])
        return answer(_item(await self._engine.change_backfill(sink, id_or_table, verb)))

    async def _find(self, sink: str, wanted: str, *, ended: bool) -> Item | None:
        """By id, else the latest of the table, as people write tables: the schema public goes without saying."""
        items = await self._engine.backfills(sink, ended=ended)
        try:
            table = str(parse_table(wanted))
        except ValueError:
            table = wanted
        found = [item for item in items if item["id"] == wanted] or [item for item in items if item["table"] == table]
        return found[-1] if found else None

    async def _reindexes(self, _request: Request) -> Response:
        return answer({"data": await self._engine.reindexes()})

    async def _reindexes_of_sink(self, request: Request) -> Response:
        sink = sink_of(request)
        await self._engine.backfills(sink, ended=False)  # refuses a sink that there is not
        return answer({"data": [item for item in await self._engine.reindexes() if item["sink"] == sink]})

    async def _reindex(self, request: Request) -> Response:
        order = read_order(ReindexOrder, await json_body(request, ORDER_MAX_BYTES))
        return answer(await self._engine.reindex(sink_of(request), order), 201)

    async def _cancel_reindex(self, request: Request) -> Response:
        return answer(await self._engine.change_reindex(sink_of(request), "cancel"))

    async def _drop_old(self, request: Request) -> Response:
        return answer(await self._engine.change_reindex(sink_of(request), "drop_old"))


def _data(items: list[Item]) -> Item:
    return {"data": list(map(_item, items))}


def _item(item: Item) -> Item:
    """With the name that Sequin has for the sink."""
    return {**item, "sink_consumer": item["sink"]}


def _ended(request: Request) -> bool:
    given = request.query_params.get("ended", "true")
    if given not in ("true", "false"):
        raise BadRequest("ended is neither true nor false", "leave it out, or give ended=false")
    return given == "true"

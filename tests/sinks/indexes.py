"""An index of its own for a test on a real OpenSearch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from servers.opensearch import OpenSearch
from sinks.messages import context
from spillway.sinks.search import SearchSink


class Index:
    """An index of its own for a test, and a sink for it."""

    def __init__(self, server: OpenSearch, client: httpx.AsyncClient, folder: Path) -> None:
        self.client = client
        self.name = f"search-{uuid4().hex}"
        self._url = server.url
        self._folder = folder
        self._sinks: list[SearchSink] = []

    def sink(self, *, started_lsn: int = 0, epoch: int = 1, **options: Any) -> SearchSink:
        arguments = {"endpoint_url": self._url, "index_name": self.name, "document": "record", **options}
        sink = SearchSink(context(self._folder, epoch=epoch, started_lsn=started_lsn), **arguments)
        self._sinks.append(sink)
        return sink

    async def create(self, **body: Any) -> None:
        (await self.client.put(f"/{self.name}", json=body)).raise_for_status()

    async def document(self, identity: str, *, index: str = "", routing: str = "") -> dict[str, Any] | None:
        params = {"routing": routing} if routing else {}
        found = (await self.client.get(f"/{index or self.name}/_doc/{identity}", params=params)).json()
        return found["_source"] if found["found"] else None

    async def documents(self) -> list[tuple[str, str, str]]:
        """All that are in it and in the indices whose names begin like its own: index, _id and routing."""
        await self.client.post(f"/{self.name}*/_refresh")
        found = (await self.client.get(f"/{self.name}*/_search?size=1000")).json()
        return sorted((hit["_index"], hit["_id"], hit.get("_routing", "")) for hit in found["hits"]["hits"])

    async def setting(self, name: str) -> str:
        found = (await self.client.get(f"/{self.name}/_settings?flat_settings=true")).json()
        setting: str = found[self.name]["settings"][name]
        return setting

    async def put_settings(self, **settings: Any) -> None:
        (await self.client.put(f"/{self.name}/_settings", json=settings)).raise_for_status()

    async def stands_for(self, alias: str) -> dict[str, Any]:
        found = (await self.client.get(f"/_alias/{alias}")).json()
        return {index: of["aliases"][alias] for index, of in found.items()}

    async def close(self) -> None:
        for sink in self._sinks:
            await sink.close()
        await self.client.delete(f"/{self.name}*")

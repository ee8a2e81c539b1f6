from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from servers.opensearch import OpenSearch
from sinks.indexes import Index


@pytest.fixture
async def index(opensearch: OpenSearch, tmp_path: Path) -> AsyncIterator[Index]:
    async with httpx.AsyncClient(base_url=opensearch.url, trust_env=False, timeout=30) as client:
        index = Index(opensearch, client, tmp_path)
        yield index
        await index.close()

"""A place with its process running, or not yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reindex.place import Place
from servers.opensearch import OpenSearch


@pytest.fixture
def place(database: str, tmp_path: Path, opensearch: OpenSearch) -> Iterator[Place]:
    with Place(database, tmp_path, opensearch.url) as place:
        place.begin()
        yield place

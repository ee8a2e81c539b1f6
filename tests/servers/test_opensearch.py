"""The OpenSearch of the tests does what the other tests take for granted."""

from __future__ import annotations

import httpx
import pytest

from servers.opensearch import OpenSearch


def test_a_document_survives_a_kill_and_the_node_comes_back_where_it_was() -> None:
    with OpenSearch(heap_mb=512) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/").json()["version"]["number"] == "2.19.1"
        assert client.put("/jobs/_doc/1", json={"title": "cook"}).status_code == 201
        strict = {"mappings": {"dynamic": "strict", "properties": {"a": {"type": "integer"}}}}
        client.put("/strict", json=strict).raise_for_status()
        rejected = client.put("/strict/_doc/1", json={"b": 1})
        assert rejected.json()["error"]["type"] == "strict_dynamic_mapping_exception"

        server.kill()
        with pytest.raises(httpx.TransportError):
            client.get("/jobs/_doc/1")

        server.start()
        assert client.get("/jobs/_doc/1").json()["_source"] == {"title": "cook"}

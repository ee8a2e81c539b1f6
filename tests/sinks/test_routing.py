"""What a routing function may say, and what is made of it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from spillway.config import destination
from spillway.sinks import CLASSES
from spillway.sinks.routing import ROUTING_KEYS, checked


def test_every_type_of_destination_has_its_keys() -> None:
    assert set(ROUTING_KEYS) == set(CLASSES)
    for model in (destination.OpenSearch, destination.Elasticsearch, destination.Webhook, destination.File):
        (kind,) = get_args(model.model_fields["type"].annotation)
        assert ROUTING_KEYS[kind] == model.routing_keys
    assert ROUTING_KEYS["opensearch"] == ("index_name", "id", "op", "doc_as_upsert", "routing", "pipeline")
    assert ROUTING_KEYS["webhook"] == ("method", "endpoint_path", "headers")


@pytest.mark.parametrize(
    ("kind", "given", "route"),
    [
        ("opensearch", {}, {}),
        ("opensearch", {"index_name": "jobs-2024", "id": "a b"}, {"index_name": "jobs-2024", "id": "a b"}),
        ("elasticsearch", {"document_id": 42, "action": "delete"}, {"id": "42", "op": "delete"}),
        ("opensearch", {"id": 1.5, "routing": 7}, {"id": "1.5", "routing": "7"}),
        ("opensearch", {"op": "update", "doc_as_upsert": True}, {"op": "update", "doc_as_upsert": True}),
        ("opensearch", {"doc_as_upsert": True}, {"doc_as_upsert": True}),
        ("opensearch", {"pipeline": "geo", "routing": None}, {"pipeline": "geo"}),
        ("webhook", {"method": "put", "endpoint_path": "/a?b"}, {"method": "PUT", "endpoint_path": "/a?b"}),
        ("webhook", {"headers": {"X-Tenant": 7, "X-None": None}}, {"headers": {"x-tenant": "7"}}),
        ("webhook", {"endpoint_path": ""}, {"endpoint_path": ""}),
        ("webhook", {"endpoint_path": "/v1.2/...?up=../x"}, {"endpoint_path": "/v1.2/...?up=../x"}),
        ("file", {}, {}),
        ("stdout", {}, {}),
    ],
)
def test_what_is_said_is_made_fit(kind: str, given: dict[str, Any], route: dict[str, Any]) -> None:
    assert checked(kind, given) == route


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("opensearch", {"index": "jobs"}, "index is unknown: did you mean index_name?"),
        ("opensearch", {"xyz": "jobs"}, "xyz is unknown\\. The keys of opensearch are index_name, id, op"),
        ("webhook", {"path": "/x"}, "path is unknown: did you mean endpoint_path"),
        ("webhook", {"document_id": "1"}, "document_id is unknown"),
        ("file", {"path": "/x"}, "a sink of type file cannot be routed"),
        ("opensearch", {"index_name": "Jobs"}, "index_name must be an index name"),
        ("opensearch", {"index_name": "_jobs"}, "index_name must be an index name"),
        ("opensearch", {"index_name": "j" * 256}, "index_name must be an index name"),
        ("opensearch", {"index_name": "a/b"}, "index_name must be an index name"),
        ("opensearch", {"index_name": ""}, "index_name must be an index name"),
        ("opensearch", {"index_name": 5}, "index_name must be text, not int"),
        ("opensearch", {"id": ""}, "id must have 1 to 512 bytes"),
        ("opensearch", {"id": "ü" * 257}, "id must have 1 to 512 bytes"),
        ("opensearch", {"id": True}, "id must be text, not true or false"),
        ("opensearch", {"id": "\ud800"}, "id holds half of a surrogate pair"),
        ("opensearch", {"id": 1, "document_id": 2}, "the same"),
        ("opensearch", {"op": "create"}, "op must be one of index, update, delete"),
        ("opensearch", {"doc_as_upsert": "true"}, "doc_as_upsert must be true or false"),
        ("opensearch", {"op": "update", "pipeline": "p"}, "pipeline goes with op: index"),
        ("opensearch", {"op": "delete", "doc_as_upsert": True}, "doc_as_upsert goes with op: update"),
        ("opensearch", {"routing": ["a"]}, "routing must be text, not a list"),
        ("webhook", {"method": "BREW"}, "method must be one of POST, GET"),
        ("webhook", {"endpoint_path": "x"}, "endpoint_path must begin with"),
        ("webhook", {"endpoint_path": "/a b"}, "without blanks"),
        ("webhook", {"endpoint_path": "/.."}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/../b"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/./b?c"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/%2e%2E/b"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/.%2e#c"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/..%2F..%2Fadmin"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/..\\b"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/a/..;x/b"}, "endpoint_path must not have"),
        ("webhook", {"endpoint_path": "/" + "a" * 2000}, "at most 2000"),
        ("webhook", {"headers": [("a", "b")]}, "headers must be a mapping"),
        ("webhook", {"headers": {"a b": "c"}}, "no name of a header"),
        ("webhook", {"headers": {"a": "b\nc"}}, "no header may hold"),
        ("webhook", {"headers": {"a": "ü"}}, "no header may hold"),
        ("webhook", {"headers": {"Content-Length": 5}}, "not for a message to say"),
    ],
)
def test_what_cannot_be_is_said(kind: str, given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked(kind, given)

"""Definitions of indexes: read from files, and derived from columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spillway.errors import SpillwayError
from spillway.sinks.mapping import derived, read_definition, with_gc_deletes

KINDS = {
    "boolean": ["bool", "boolean", "_bool"],
    "short": ["int2", "smallint"],
    "integer": ["int4", "integer", "integer[]", "_int4"],
    "long": ["int8", "bigint", "oid"],
    "float": ["float4", "real"],
    "double": ["float8", "double precision", "numeric", "numeric(12,2)", "double precision[]"],
    "text": ["text", "character varying(20)", "varchar", "character(3)", "bpchar", "citext", "text[]", '"char"'],
    "keyword": ["uuid", "inet", "enum", "bytea", "bit(3)", "bit varying(3)", "time(3) with time zone", "tstzrange"],
    "date": ["date", "timestamp(3) without time zone", "timestamp with time zone", "timestamptz", "_timestamptz"],
    "object": ["json", "jsonb", "jsonb[]"],
}


@pytest.mark.parametrize(("field", "names"), KINDS.items())
def test_fields_of_types(field: str, names: list[str]) -> None:
    found = derived([(name, name) for name in names], "record")
    assert {one: how["type"] for one, how in found["mappings"]["properties"].items()} == dict.fromkeys(names, field)


def test_intervals_have_three_numbers() -> None:
    for name in ("interval", "interval day to second(3)", "interval(3)", "_interval"):
        field = derived([("a", name)], "record")["mappings"]["properties"]["a"]
        assert sorted(field["properties"]) == ["days", "microseconds", "months"]


def test_what_is_not_known_is_left_to_the_server() -> None:
    assert derived([("a", "hstore"), ("b", "my_type[]"), ("c", "_mine")], "record") == {"mappings": {"properties": {}}}


def test_messages_hold_the_row_twice() -> None:
    properties = derived([("id", "int8")], "message")["mappings"]["properties"]
    assert properties["record"] == properties["changes"] == {"properties": {"id": {"type": "long"}}}


@pytest.mark.parametrize(
    "settings", [{"index.gc_deletes": "2h"}, {"gc_deletes": "2h"}, {"index": {"gc_deletes": "2h"}}]
)
def test_what_a_definition_says_of_deletes_stays(settings: dict[str, object]) -> None:
    assert with_gc_deletes({"settings": settings}) == {"settings": settings}


def test_deletes_are_remembered_for_an_hour_else() -> None:
    assert with_gc_deletes({}) == {"settings": {"index.gc_deletes": "3600s"}}
    given = {"settings": {"number_of_shards": 3, "index": {"x": 1}}, "mappings": {"a": {}}}
    assert with_gc_deletes(given) == {
        "mappings": {"a": {}},
        "settings": {"number_of_shards": 3, "index": {"x": 1}, "index.gc_deletes": "3600s"},
    }
    assert "index.gc_deletes" not in given["settings"]


def test_a_definition_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"mappings": {"dynamic": False}}))
    assert read_definition(path) == {"mappings": {"dynamic": False}}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mappings":1}', '{"mapping":{}}', None])
def test_a_file_that_is_no_definition(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "m.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpillwayError, match=r"destination\.mapping names a JSON file") as raised:
        read_definition(path)
    assert raised.value.code == "mapping_file"

"""Rows of 18 MB that are read on behalf of small changes: they get through, within the memory that a limit of 256 MB
allows for; and rows of 16 MB, the most that a limit of 128 MB lets be configured."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from oracle.product import MIB, memory_bytes
from servers.opensearch import OpenSearch
from shape.place import Shaped, file_sink, sink

T = "public.t"
ALLOWED_MB = 100  # beside the limit: the interpreter, and what nobody counts
SIZES = [pytest.param(256, 18_000_000, id="256"), pytest.param(128, 15_500_000, id="128")]
TEXT = "many words in a row \u00e9\u20ac\U0001f600 "  # pieces end within its characters


def body(size_bytes: int) -> tuple[str, str]:
    """SQL, and what it gives."""
    many = size_bytes // len(TEXT.encode())
    return f"repeat('{TEXT}', {many})", TEXT * many


def sections(limit_mb: int) -> dict[str, object]:
    return {"memory": {"limit_mb": limit_mb}}


def search(url: str, name: str, **more: object) -> dict[str, object]:
    destination = {"type": "opensearch", "endpoint_url": url, "index_name": name, "document": "record"}
    return sink(name, [T], destination, **more)


def document(opensearch: OpenSearch, name: str, key: int) -> dict[str, object]:
    return dict(httpx.get(f"{opensearch.url}/{name}/_doc/{key}", timeout=60).json()["_source"])


def assert_bounded(place: Shaped, limit_mb: int) -> None:
    most = memory_bytes(place.product.pid)
    assert most <= (limit_mb + ALLOWED_MB) * MIB, f"{most / MIB:.0f} MB"


@pytest.mark.parametrize(("limit_mb", "size_bytes"), SIZES)
def test_an_enrichment_into_a_file(database: str, tmp_path: Path, limit_mb: int, size_bytes: int) -> None:
    sql, text = body(size_bytes)
    code = f"select id, v || {sql} as body from public.t where id = any($1)"
    more = [{"name": "more", "type": "enrichment", "code": code}]
    sinks = [file_sink("out", [T], enrichment="more", max_message_bytes=limit_mb << 17)]
    schema = "create table t (id int primary key, v text)"
    with Shaped(database, tmp_path, sinks, more, schema=schema, **sections(limit_mb)) as place:
        place.begin()
        place.sql("insert into t select n, '' from generate_series(1, 3) n")
        lines = place.came("out", 3)
        assert_bounded(place, limit_mb)
    assert {line["metadata"]["enrichment"]["body"] == text for line in lines} == {True}


@pytest.mark.parametrize(("limit_mb", "size_bytes"), SIZES)
def test_an_enrichment_into_an_index(
    database: str, tmp_path: Path, opensearch: OpenSearch, limit_mb: int, size_bytes: int
) -> None:
    sql, text = body(size_bytes)
    name = f"large-{uuid4().hex}"
    code = f"select id, {sql} as body from public.t where id = any($1)"
    more = [{"name": "more", "type": "enrichment", "code": code}]
    sinks = [search(opensearch.url, name, enrichment="more", max_message_bytes=limit_mb << 17)]
    schema = "create table t (id int primary key, v text)"
    with Shaped(database, tmp_path, sinks, more, schema=schema, **sections(limit_mb)) as place:
        place.begin()
        place.sql("insert into t select n, '' from generate_series(1, 3) n")
        place.drained(name)
        assert_bounded(place, limit_mb)
    assert {document(opensearch, name, key)["body"] == text for key in (1, 2, 3)} == {True}


@pytest.mark.parametrize(("limit_mb", "size_bytes"), SIZES)
def test_a_row_that_is_read_anew(
    database: str, tmp_path: Path, opensearch: OpenSearch, limit_mb: int, size_bytes: int
) -> None:
    sql, text = body(size_bytes)
    name = f"anew-{uuid4().hex}"
    sinks = [search(opensearch.url, name, toast="reselect", max_message_bytes=limit_mb << 17)]
    schema = f"""
create table t (id int primary key, v text, body text);
alter table t alter body set storage external;
insert into t select n, '', {sql} from generate_series(1, 2) n
"""
    with Shaped(database, tmp_path, sinks, schema=schema, **sections(limit_mb)) as place:
        place.begin()
        place.sql("update t set v = 'changed'")
        place.drained(name)
        assert_bounded(place, limit_mb)
    for key in (1, 2):
        found = document(opensearch, name, key)
        assert (found["v"], found["body"] == text) == ("changed", True)

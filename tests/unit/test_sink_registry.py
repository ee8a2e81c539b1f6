"""Sinks are built from the configuration, and only what is configured is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinks.messages import SUFFIX
from spillway.config import Config, load
from spillway.sinks import CLASSES, Checked, build
from spillway.sinks.base import Readable, SinkContext

HEAD = """
databases: [{name: app, url: "postgresql://u:p@h/db", slot: {name: s}, publication: {name: p}}]
http_endpoints: [{name: hook, url: "http://127.0.0.1:1/", headers: {X-Token: t}, encrypted_headers: {X-Secret: s}}]
sinks:
"""
DESTINATIONS = {
    "opensearch": "{type: opensearch, endpoint_url: 'http://h:9200', index_name: jobs}",
    "elasticsearch": "{type: elasticsearch, endpoint_url: 'http://h:9200', index_name: jobs, "
    "auth_type: basic, auth_value: 'u:p', gzip: true}",
    "webhook": "{type: webhook, http_endpoint: hook, http_endpoint_path: /x, batch: false}",
    "file": "{type: file, path: out.ndjson, rotate_bytes: 1MB}",
    "stdout": "{type: stdout}",
    "sqlite": "{type: sqlite, path: copy.db, table: jobs}",
    "blackhole": "{type: blackhole}",
}


def loaded(folder: Path) -> Config:
    sinks = [f"  - {{name: {kind}, database: app, destination: {text}}}" for kind, text in DESTINATIONS.items()]
    path = folder / "spillway.yml"
    path.write_text(HEAD + "\n".join(sinks))
    return load(path, {})


def test_every_kind_of_destination_has_a_class() -> None:
    assert set(DESTINATIONS) == set(CLASSES)


@pytest.mark.parametrize("kind", DESTINATIONS)
async def test_built_from_a_file(tmp_path: Path, kind: str) -> None:
    config = loaded(tmp_path)
    sink = build(config, config.sink(kind), SinkContext(kind, SUFFIX, config.base_dir, 1, 0))
    assert f"{type(sink).__module__}:{type(sink).__name__}" == CLASSES[kind]
    assert sink.single == (kind == "webhook")
    assert sink.max_in_flight == 1 or sink.semantics in ("state", "events")
    assert isinstance(sink, Checked) == (kind in ("opensearch", "elasticsearch"))
    assert isinstance(sink, Readable) == (kind in ("opensearch", "elasticsearch", "sqlite"))
    assert os.listdir(tmp_path) == ["spillway.yml"], "nothing is opened yet"
    await sink.close()


def test_a_client_library_is_imported_with_its_sink_only() -> None:
    code = "import spillway.sinks, sys; print([m for m in ('httpx', 'sqlite3') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

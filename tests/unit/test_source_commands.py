"""The texts that are sent: START_REPLICATION, SET, CREATE PUBLICATION, and the named queries."""

from __future__ import annotations

import re
from pathlib import Path

import spillway.source
from spillway.source.connect import SESSION, session_sql
from spillway.source.preflight import _size_bytes
from spillway.source.queries import QUERIES
from spillway.source.slot import create_publication_sql
from spillway.source.stream import start_command


def test_start_replication() -> None:
    assert start_command("s", ["p"], 0x16_B374D848, 120022) == (
        b'START_REPLICATION SLOT "s" LOGICAL 16/B374D848 ("proto_version" \'1\', "publication_names" \'"p"\')'
    )
    assert start_command("s", ["p", 'it\'s "q"'], 0, 140000).endswith(
        b'("proto_version" \'1\', "publication_names" \'"p","it\'\'s ""q"""\', "messages" \'true\')'
    )


def test_the_session_is_one_statement_of_literals() -> None:
    text = session_sql("spillway:s'x", 120000, 0).as_string()
    for name, value in SESSION.items():
        assert f"SET \"{name}\" = '{value}'" in text
    assert "SET \"application_name\" = 'spillway:s''x'" in text
    assert "SET \"statement_timeout\" = '0s'" in text
    assert '"transaction_timeout"' not in text
    assert '"idle_session_timeout"' not in text
    newest = session_sql("x", 180000, 60).as_string()
    assert '"transaction_timeout"' in newest
    assert '"idle_session_timeout"' in newest


def test_create_publication() -> None:
    assert create_publication_sql("p", (), 120000) == 'CREATE PUBLICATION "p" FOR ALL TABLES;'
    assert create_publication_sql('p"', [("b", "t"), ("a", "T t"), ("b", "t")], 130000) == (
        'CREATE PUBLICATION "p""" FOR TABLE "a"."T t", "b"."t" WITH (publish_via_partition_root = true);'
    )


def test_every_named_query_is_used_and_every_used_one_exists() -> None:
    folder = Path(spillway.source.__file__).parent.parent
    source = "".join(path.read_text() for path in folder.rglob("*.py"))
    used = set(re.findall(r"\b(?:fetch(?:_one)?|one)\(\s*\w+(?:\.\w+)*,\s*\"(\w+)\"", source))
    assert used == set(QUERIES)
    assert all(not query.endswith(";") for query in QUERIES.values())


def test_sizes_as_postgres_shows_them() -> None:
    assert [_size_bytes(text) for text in (None, "-1", "0", "64MB", "1GB", "16kB")] == [
        None, None, 0, 64 << 20, 1 << 30, 16 << 10,
    ]  # fmt: skip

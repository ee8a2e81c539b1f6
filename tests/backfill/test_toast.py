"""Updates that do not carry a column kept out of line, of rows that the sink has never had.

Under the default replica identity the stream leaves such a column out. A sink of rows cannot take the update before it
has the row, and the row comes with the backfill, behind the update.
"""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from backfill.rows import fill
from backfill.stage import Stage, file_sink, shown, sqlite_sink

DOCS = ("public.docs",)
CHANGES = (
    "update docs set seq = 1 where kind = 'a' and id = 0",
    "update docs set id = 9000, seq = 2 where kind = 'a' and id = 1",
    "update docs set seq = 3 where kind = 'B' and id = 2",
    "delete from docs where kind = 'B' and id = 2",
    "update docs set seq = 4 where kind = 'B' and id = 3",
    "update docs set seq = 5, body = 'short' where kind = 'B' and id = 3",
    "update docs set seq = 6 where kind = 'ß' and id = 4",
)


def existing(connection: psycopg.Connection) -> None:
    fill(connection, items=range(0), docs=range(100))


@pytest.mark.parametrize("postgres", ["12", "18"], indirect=True)
def test_the_backfill_mends_what_waits_for_its_row(database: str, tmp_path: Path) -> None:
    sinks = [file_sink("file", DOCS), sqlite_sink("mirror", DOCS)]
    with Stage(database, tmp_path, sinks, existing=existing) as stage:
        stage.begin()
        stage.sql(*CHANGES)
        stage.drained("file")
        started = {sink: stage.backfill(sink, table="public.docs") for sink in ("file", "mirror")}
        stage.wait_completed(started)
        stage.drained("file", "mirror")
        found = stage.judge_file("file", DOCS) + stage.judge_sqlite("mirror", DOCS)
        assert found == [], shown(found)
        stage.sql("update docs set seq = 7 where kind = 'a' and id = 0")
        stage.drained("file", "mirror")
        assert stage.judge_sqlite("mirror", DOCS) == []

"""Due refreshes: rows of a sink's tables whose documents are to be made anew, since something they are joined with has
changed.

Of a sink, a table and a key there is at most one: who asks for it again while it is due changes nothing but its
``number``, which rises with every asking. Who has seen to it takes it away under the number that it had when it was
read: one that was asked for again meanwhile stays. Its ``place`` is that of the first asking, so that a key that is
asked for again and again is not put off for ever.

The key `spillway.store.base.EVERYTHING` means all rows of the table. It is one like any other here.

What is asked for in one write is a page of the caller's: nothing here grows with what is due.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import groupby

import orjson

from spillway.store.base import AskedRefreshes, DueRefresh
from spillway.store.rows import SinkRow, as_json

SELECT_KNOWN = """
    SELECT count(*) FROM json_each(?3) j CROSS JOIN refresh r ON r.sink = ?1 AND r.tbl = ?2 AND r.key = j.value"""
INSERT_REFRESHES = """
    INSERT INTO refresh (sink, tbl, place, key, number, since)
    SELECT ?1, ?2, ?4 + j.key, j.value, ?4 + j.key, ?5 FROM json_each(?3) j WHERE true
    ON CONFLICT (sink, tbl, key) DO UPDATE SET number = excluded.number"""
DELETE_REFRESHES = """
    DELETE FROM refresh WHERE sink = ?1 AND tbl = ?2 AND place IN (
        SELECT r.place FROM json_each(?3) j CROSS JOIN refresh r
        ON r.sink = ?1 AND r.tbl = ?2 AND r.place = json_extract(j.value, '$[0]')
        WHERE r.number = json_extract(j.value, '$[1]'))"""
SELECT_REFRESHES = """
    SELECT json_group_array(json_array(place, key, number, since)) FROM (
        SELECT place, key, number, since FROM refresh WHERE sink = ?1 AND tbl = ?2 AND place > ?3
        ORDER BY place LIMIT ?4)"""
# Table by table, by the index: what is due of each is not looked at.
SELECT_DUE_TABLES = """
    WITH RECURSIVE t(tbl) AS (
        SELECT (SELECT min(tbl) FROM refresh WHERE sink = ?1)
        UNION ALL SELECT (SELECT min(r.tbl) FROM refresh r WHERE r.sink = ?1 AND r.tbl > t.tbl) FROM t
        WHERE t.tbl IS NOT NULL)
    SELECT json_group_array(json(tbl)) FROM t WHERE tbl IS NOT NULL"""


def ask_refreshes(db: sqlite3.Connection, sink: SinkRow, asked: AskedRefreshes, now: float) -> None:
    keys = list(dict.fromkeys(asked.keys))
    table, listed = table_text(asked.table), as_json(keys)
    known = db.execute(SELECT_KNOWN, (sink.id, table, listed)).fetchone()[0]
    db.execute(INSERT_REFRESHES, (sink.id, table, listed, sink.asked + 1, now))
    sink.asked += len(keys)
    sink.counters.refreshes += len(keys) - known


def drop_refreshes(db: sqlite3.Connection, sink: SinkRow, done: Sequence[DueRefresh]) -> None:
    for table, some in groupby(done, key=lambda one: one.table):
        pairs = as_json((one.place, one.number) for one in some)
        sink.counters.refreshes -= db.execute(DELETE_REFRESHES, (sink.id, table_text(table), pairs)).rowcount


def table_text(table: tuple[str, str]) -> str:
    return orjson.dumps(table).decode()

"""What is to be known of backfills: documents that the store does not look into, by sink and id.

The row of a document that is written again stays the same, so its number is the order in which it was first written.
``ended`` numbers those of a sink that have ended, in the order in which they did: the last `ENDED_KEPT` of them stay,
however long ago they were begun.
"""

from __future__ import annotations

import sqlite3

from spillway.store.base import BackfillDocument

ENDED_KEPT = 100

UPSERT_BACKFILL = """
    INSERT INTO backfill (sink, id, document, ended) VALUES (?1, ?2, ?3,
        CASE WHEN ?4 THEN (SELECT coalesce(max(ended), 0) + 1 FROM backfill WHERE sink = ?1 AND ended IS NOT NULL) END)
    ON CONFLICT (sink, id) DO UPDATE SET document = excluded.document,
        ended = CASE WHEN excluded.ended IS NOT NULL THEN coalesce(ended, excluded.ended) END"""
DELETE_BACKFILL = "DELETE FROM backfill WHERE sink = ? AND id = ?"
DELETE_ENDED = """
    DELETE FROM backfill WHERE number IN (
        SELECT number FROM backfill WHERE sink = ?1 AND ended IS NOT NULL ORDER BY ended DESC LIMIT -1 OFFSET ?2)"""
SELECT_BACKFILLS = "SELECT id, document FROM backfill WHERE sink = ? ORDER BY number"
SELECT_RUNNING = "SELECT id, document FROM backfill WHERE sink = ? AND ended IS NULL ORDER BY number"


def write_backfill(db: sqlite3.Connection, sink: int, written: BackfillDocument) -> None:
    if written.forgotten:
        db.execute(DELETE_BACKFILL, (sink, written.id))
        return
    db.execute(UPSERT_BACKFILL, (sink, written.id, written.document, written.ended))
    if written.ended:
        db.execute(DELETE_ENDED, (sink, ENDED_KEPT))

-- The state file of Spillway. PRAGMA user_version is the version of this schema, PRAGMA application_id names the file.
-- Which statement may touch which rows is said in queue.py, lanes.py and reads.py; every one goes by a key or an index.

-- A slot's history: what all positions below belong to (invariant I9).
CREATE TABLE slot (
    name TEXT PRIMARY KEY,
    system_id TEXT NOT NULL,
    timeline INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    mark INTEGER NOT NULL
) WITHOUT ROWID;

-- The tables that the stream has named and a sink takes, under the name by which it took them last; ``partition``: that
-- is the name of its root.
CREATE TABLE taken (
    slot TEXT NOT NULL, oid INTEGER NOT NULL,
    schema TEXT NOT NULL, tbl TEXT NOT NULL, partition INTEGER NOT NULL,
    PRIMARY KEY (slot, oid)
) WITHOUT ROWID;

-- One row per sink: all that a start reads. ``run`` rises at every opening of the file, see table parked.
CREATE TABLE sink (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    slot TEXT NOT NULL,
    run INTEGER NOT NULL DEFAULT 1,
    lsn INTEGER, idx INTEGER, sub INTEGER,  -- the position; null: never seen in this epoch
    paused INTEGER,
    gap_first INTEGER, gap_last INTEGER, gap_since REAL, gap_reason TEXT,
    gap_tables TEXT,  -- JSON array of [schema, table]; null: not known
    messages INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    queued INTEGER NOT NULL DEFAULT 0,
    parked_keys INTEGER NOT NULL DEFAULT 0,
    dead_letters INTEGER NOT NULL DEFAULT 0,
    refreshes INTEGER NOT NULL DEFAULT 0,
    asked INTEGER NOT NULL DEFAULT 0  -- the last number of table refresh
);

-- The queue: a row per span, what is small and may change of it here, its columns below. The row of a message is
-- ``id << 16 | its number in the span``. Numbers are never used again.
CREATE TABLE span (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    sink INTEGER NOT NULL,
    keying INTEGER NOT NULL,
    key_groups INTEGER NOT NULL,
    messages INTEGER NOT NULL,        -- what is in its columns, and the bytes: what a reader gets
    bytes INTEGER NOT NULL,
    messages_left INTEGER NOT NULL,
    bytes_left INTEGER NOT NULL,
    first_lsn INTEGER NOT NULL,       -- of all of them
    commit_time REAL NOT NULL,        -- of the first that is left
    stored REAL NOT NULL,             -- wall seconds at which it came here
    tables TEXT NOT NULL,             -- JSON array of [schema, table]
    truncates INTEGER NOT NULL,       -- whether there was a TRUNCATE in it
    done TEXT NOT NULL,               -- what is gone: a bit per number, as one hexadecimal integer
    kept TEXT                         -- the numbers of what is in its columns, likewise; null: 0, 1, 2, ...
);
CREATE INDEX span_sink ON span (sink);
CREATE INDEX span_truncates ON span (sink, tables) WHERE truncates;

-- Written once. The keys come first and the bodies last: what is before is read without touching what is behind.
CREATE TABLE span_data (
    id INTEGER PRIMARY KEY,
    keys BLOB NOT NULL,
    meta BLOB NOT NULL,
    data BLOB NOT NULL
);

-- The messages in lanes, one by one: chunks of one change.
CREATE TABLE message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    sink INTEGER NOT NULL,
    lsn INTEGER NOT NULL, idx INTEGER NOT NULL, sub INTEGER NOT NULL,
    keying INTEGER NOT NULL,
    key_groups INTEGER NOT NULL,
    tables TEXT NOT NULL,             -- JSON array of one [schema, table]
    key1 TEXT NOT NULL, key2 TEXT,    -- its lanes; a message without keys has one of its own, see rows.py
    commit_time REAL NOT NULL,
    stored REAL NOT NULL,
    size INTEGER NOT NULL,            -- of what people are told: of the body, or of the row that was too large for it
    keys BLOB NOT NULL,
    meta BLOB NOT NULL,
    data BLOB NOT NULL
);

-- Every message of table message under each of its keys. ``other``: its other key, if it has two. ``waits``: there may
-- be earlier rows of its keys in the queue.
CREATE TABLE lane (
    sink INTEGER NOT NULL, key TEXT NOT NULL, id INTEGER NOT NULL, other TEXT, waits INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (sink, key, id)
) WITHOUT ROWID;

-- The parked keys: those that have a lane. ``head``: its first row.
-- ``due``: monotonic seconds of the run that wrote it, at which the head may be sent; null: not before another row
-- has gone. Due times of older runs have passed. ``waits_for``: nor before the queue has been read up to here.
CREATE TABLE parked (
    sink INTEGER NOT NULL, key TEXT NOT NULL,
    head INTEGER NOT NULL,
    run INTEGER NOT NULL, due REAL, waits_for INTEGER NOT NULL,
    attempts INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (sink, key)
) WITHOUT ROWID;
CREATE INDEX parked_due ON parked (sink, run, due) WHERE due IS NOT NULL AND waits_for = 0;
CREATE INDEX parked_waits ON parked (sink, waits_for) WHERE due IS NOT NULL AND waits_for > 0;
CREATE INDEX parked_head ON parked (sink, head);
CREATE UNIQUE INDEX parked_reason ON parked (sink, reason, key);  -- unique: so that key order needs no sort

-- Dead letters keep the number that they had as messages.
CREATE TABLE dead (
    id INTEGER PRIMARY KEY,
    sink INTEGER NOT NULL,
    keying INTEGER NOT NULL, key_groups INTEGER NOT NULL, tables TEXT NOT NULL,
    key1 TEXT NOT NULL, stored REAL NOT NULL, size INTEGER NOT NULL,
    attempts INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    keys BLOB NOT NULL, meta BLOB NOT NULL, data BLOB NOT NULL
);
CREATE INDEX dead_sink ON dead (sink);
CREATE INDEX dead_key ON dead (sink, key1);
CREATE INDEX dead_reason ON dead (sink, reason);
CREATE INDEX dead_reason_key ON dead (sink, reason, key1);

-- What is to be known of backfills, see backfills.py. ``number``: the order in which they were first written.
-- ``ended``: the order in which those of a sink have ended; null: not yet.
CREATE TABLE backfill (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    sink INTEGER NOT NULL, id TEXT NOT NULL,
    document BLOB NOT NULL,
    ended INTEGER,
    UNIQUE (sink, id)
);
CREATE INDEX backfill_sink ON backfill (sink);
CREATE INDEX backfill_running ON backfill (sink) WHERE ended IS NULL;
CREATE INDEX backfill_ended ON backfill (sink, ended) WHERE ended IS NOT NULL;

-- Rows whose documents are to be made anew, see refreshes.py. ``tbl``: JSON array of schema and table. ``number``: of the
-- last asking; ``since``: wall seconds of the first, whose number is its ``place``.
CREATE TABLE refresh (
    sink INTEGER NOT NULL, tbl TEXT NOT NULL, place INTEGER NOT NULL,
    key TEXT NOT NULL, number INTEGER NOT NULL, since REAL NOT NULL,
    PRIMARY KEY (sink, tbl, place)
) WITHOUT ROWID;
CREATE UNIQUE INDEX refresh_key ON refresh (sink, tbl, key);

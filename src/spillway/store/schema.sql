-- The state file of Spillway. PRAGMA user_version is the version of this schema, PRAGMA application_id names the file.
-- Which statement may touch which rows is said in lanes.py and reads.py; every one of them goes by a key or an index.

-- A slot's history: what all positions below belong to (invariant I9).
CREATE TABLE slot (
    name TEXT PRIMARY KEY,
    system_id TEXT NOT NULL,
    timeline INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    mark INTEGER NOT NULL
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
    messages INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    queued INTEGER NOT NULL DEFAULT 0,
    parked_keys INTEGER NOT NULL DEFAULT 0,
    dead_letters INTEGER NOT NULL DEFAULT 0
);

-- Every waiting message, written once and never changed. Numbers are never used again. The body comes last: what is
-- before it is read without touching the body's pages.
CREATE TABLE message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    sink INTEGER NOT NULL,
    lsn INTEGER NOT NULL, idx INTEGER NOT NULL, sub INTEGER NOT NULL,
    action TEXT NOT NULL, schema_name TEXT NOT NULL, table_name TEXT NOT NULL,
    change_key TEXT,                  -- Change.key, which may differ from what the sink orders by
    key1 TEXT NOT NULL, key2 TEXT,    -- its lanes; a message without keys has one of its own, see rows.py
    pks TEXT NOT NULL,                -- JSON array
    n INTEGER NOT NULL,
    flags INTEGER NOT NULL,           -- see rows.py
    too_large_bytes INTEGER NOT NULL,
    commit_time REAL NOT NULL,
    stored REAL NOT NULL,             -- wall seconds at which it came here
    record_bytes INTEGER NOT NULL,
    body BLOB NOT NULL
);

-- The waiting messages that are not held back, in position order.
CREATE TABLE queue (
    sink INTEGER NOT NULL, id INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (sink, id)
) WITHOUT ROWID;

-- Every waiting message under each of its keys, held or not. ``other``: its other key, if it has two.
CREATE TABLE lane (
    sink INTEGER NOT NULL, key TEXT NOT NULL, id INTEGER NOT NULL, other TEXT, bytes INTEGER NOT NULL,
    PRIMARY KEY (sink, key, id)
) WITHOUT ROWID;

-- The parked keys. Of a key's rows those from ``head`` on are held, those before it are in the queue.
-- ``due``: monotonic seconds of the run that wrote it, at which the head may be sent; null: not before another row
-- has gone. Due times of older runs have passed.
CREATE TABLE parked (
    sink INTEGER NOT NULL, key TEXT NOT NULL,
    head INTEGER NOT NULL,
    run INTEGER NOT NULL, due REAL,
    attempts INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (sink, key)
) WITHOUT ROWID;
CREATE INDEX parked_due ON parked (sink, run, due) WHERE due IS NOT NULL;
CREATE INDEX parked_head ON parked (sink, head);
CREATE UNIQUE INDEX parked_reason ON parked (sink, reason, key);  -- unique: so that key order needs no sort

-- Dead letters keep the number that they had as messages.
CREATE TABLE dead (
    id INTEGER PRIMARY KEY,
    sink INTEGER NOT NULL,
    lsn INTEGER NOT NULL, idx INTEGER NOT NULL, sub INTEGER NOT NULL,
    action TEXT NOT NULL, schema_name TEXT NOT NULL, table_name TEXT NOT NULL,
    change_key TEXT, key1 TEXT NOT NULL, key2 TEXT, pks TEXT NOT NULL,
    n INTEGER NOT NULL, flags INTEGER NOT NULL, too_large_bytes INTEGER NOT NULL,
    commit_time REAL NOT NULL, stored REAL NOT NULL, record_bytes INTEGER NOT NULL,
    attempts INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX dead_sink ON dead (sink);
CREATE INDEX dead_key ON dead (sink, key1);
CREATE INDEX dead_reason ON dead (sink, reason);
CREATE INDEX dead_reason_key ON dead (sink, reason, key1);

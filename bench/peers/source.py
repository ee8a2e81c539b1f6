"""The database that every drain of the benches reads: PostgreSQL 15, filled once, one copy of the slot for each run.

**Settings.** ``fsync=off`` (filling is not what is measured; a walsender never syncs), ``autovacuum=off`` and no
checkpoint by time or by WAL (neither shall fall into some runs and not into others), ``shared_buffers`` of 512 MB. What
decides the speed of decoding, ``logical_decoding_work_mem`` above all, is PostgreSQL's default. It listens on
127.0.0.1 and on a Unix socket, with trust.

**Slots.** ``fill`` makes a slot before the first row and never reads it. ``copy`` gives a run a slot of its own at the
same position (``pg_copy_logical_replication_slot``), and drops it. The WAL stays as long as the first slot does.

**Rows.** The size of a row is the sum of its columns' texts as pgoutput sends them; frames and lengths come on top of
it (88 B for ten columns). Payloads above 2 kB are stored out of line and uncompressed, as what does not compress would
be: decompression is PostgreSQL's cost, not that of who reads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql

from servers.postgres import SUPERUSER, Postgres

DATABASE = "bench"
SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "64GB",
    "checkpoint_timeout": "1d",
    "autovacuum": "off",
}
_DROP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Table:
    """``batch`` makes the changes number %(first)s to %(last)s, exactly so many, in one transaction."""

    name: str
    create: str
    batch: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Changes that wait in a slot: made by ``Source.fill``, read through ``Source.copy``."""

    tables: tuple[Table, ...]
    rows: int
    slot: str
    publication: str
    start_lsn: str
    end_lsn: str  # the end of the last commit


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot to drain, once."""

    name: str
    publication: str
    tables: tuple[str, ...]
    rows: int
    start_lsn: str
    end_lsn: str
    port: int
    socket_dir: Path
    host: str = "127.0.0.1"
    database: str = DATABASE
    user: str = SUPERUSER

    def dsn(self, *, unix: bool = False) -> str:
        if unix:
            return f"postgresql://{self.user}@/{self.database}?host={self.socket_dir}&port={self.port}"
        return f"postgresql://{self.user}@{self.host}:{self.port}/{self.database}"


def lsn_number(lsn: str) -> int:
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


# -- tables ------------------------------------------------------------------------------------------------------------

_COLUMNS = """\
  id bigint PRIMARY KEY, account_id bigint NOT NULL, region text NOT NULL, status text NOT NULL,
  quantity integer NOT NULL, amount numeric(12,2) NOT NULL, active boolean NOT NULL,
  created_at timestamptz NOT NULL, name text NOT NULL, payload text NOT NULL"""
# Their texts, payload aside, take 78 bytes: 7 + 6 + 2 + 7 + 3 + 7 + 1 + 29 + 16.
_OTHER_COLUMNS_BYTES = 78
_TEN_VALUES = """1000000 + i, 100000 + i %% 900000, (ARRAY['eu', 'us', 'ap'])[1 + i %% 3],
  (ARRAY['pending', 'shipped', 'refused'])[1 + i %% 3], (100 + i %% 900)::int, 1000 + (i %% 900000) / 100.0, i %% 2 = 0,
  timestamptz '2026-01-01 00:00:00.123457+00' + i %% 1000000 * interval '10 seconds',
  'customer ' || lpad((i %% 10000000)::text, 7, '0'), """


def _payload(size_bytes: int) -> str:
    return f"substr(repeat(md5(i::text), {size_bytes // 32 + 1}), 1, {size_bytes})"


def ten_columns(row_bytes: int, *, name: str | None = None) -> Table:
    """Inserts of ten-column rows of that many bytes."""
    name = name or f"rows_{row_bytes}"
    return Table(
        name,
        f"CREATE TABLE {name} ({_COLUMNS}); ALTER TABLE {name} ALTER payload SET STORAGE EXTERNAL",
        f"INSERT INTO {name} SELECT {_TEN_VALUES} {_payload(row_bytes - _OTHER_COLUMNS_BYTES)} "
        "FROM generate_series(%(first)s::bigint, %(last)s::bigint) i",
    )


def many_columns(columns: int, *, name: str | None = None) -> Table:
    """Inserts of rows of an id and otherwise texts of 10 bytes, ``columns`` in all."""
    name = name or f"columns_{columns}"
    rest = [f"c{n} text NOT NULL" for n in range(2, columns + 1)]
    values = ["lpad(i::text, 10, '0')"] * (columns - 1)
    return Table(
        name,
        f"CREATE TABLE {name} ({', '.join(['id bigint PRIMARY KEY', *rest])})",
        f"INSERT INTO {name} SELECT {', '.join(['i', *values])} "
        "FROM generate_series(%(first)s::bigint, %(last)s::bigint) i",
    )


def mixed(row_bytes: int = 200, *, name: str = "mixed") -> Table:
    """Ten-column rows: six inserts, three updates and a delete of ten changes, one by one and interleaved.

    An update changes the amount of a row that is among the last thousand; a delete takes the oldest row.
    """
    values = _TEN_VALUES.replace("%%", "%")
    batch = f"SELECT {name}_batch(%(first)s, %(last)s)"
    return Table(
        name,
        f"""\
CREATE TABLE {name} ({_COLUMNS});
CREATE FUNCTION {name}_batch(first bigint, last bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE i bigint; tens bigint; inserted bigint; oldest bigint;
BEGIN
  FOR change IN first .. last LOOP
    tens := (change - 1) / 10;
    inserted := tens * 6 + (ARRAY[1, 2, 2, 3, 4, 4, 5, 5, 6, 6])[1 + (change - 1) % 10];
    oldest := tens + 1;
    CASE substr('IIUIIUIDIU', ((change - 1) % 10 + 1)::int, 1)
    WHEN 'I' THEN i := inserted; INSERT INTO {name} VALUES ({values} {_payload(row_bytes - _OTHER_COLUMNS_BYTES)});
    WHEN 'U' THEN UPDATE {name} SET amount = 1000 + change % 9000 WHERE id =
      1000000 + inserted - (change::bigint * 7919) % greatest(1, least(1000, inserted - oldest));
    WHEN 'D' THEN DELETE FROM {name} WHERE id = 1000000 + oldest;
    END CASE;
  END LOOP;
END $$""",
        batch,
    )


_SEQUIN_WAITING_ROWS = 40_000


def benchmark_records(row_bytes: int = 200) -> Table:
    """Sequin's benchmark: the seven columns of its loader, and its generator's workload.

    From ``data_loader.py`` and ``workload_generator.py`` of sequinstream/sequin-vs-debezium-benchmark. Each transaction
    inserts, then updates, then deletes a third of its changes; a row is inserted, some transactions later updated,
    some later deleted. The generator counts 93 bytes for a row and pads the JSON up to the size that is asked for. (It
    can add more columns; its published table has these seven.)
    """
    name, ahead = "benchmark_records", _SEQUIN_WAITING_ROWS
    columns = "string_field, numeric_field, timestamp_field, json_field"
    values = f"""'test-' || 1 + i %% 1000, 1 + (i %% 99900) / 100.0, clock_timestamp(),
  jsonb_build_object('hello', 'world-' || 1 + i %% 100, 'padding', {_payload(max(0, row_bytes - 93))})"""
    # The rows that the first transactions update and delete are there before the slot is.
    return Table(
        name,
        f"""\
CREATE TABLE {name} (id serial PRIMARY KEY, string_field text, numeric_field decimal,
  timestamp_field timestamp with time zone, json_field jsonb, inserted_at timestamp DEFAULT now(),
  updated_at timestamp DEFAULT now());
INSERT INTO {name} ({columns}) SELECT {values.replace("%%", "%")} FROM generate_series(1, {ahead}) i;
ANALYZE {name}""",
        f"""\
WITH n AS (SELECT (g + 2) / 3 AS i FROM generate_series(%(first)s::bigint, %(last)s::bigint) g WHERE g %% 3 = 1)
  INSERT INTO {name} ({columns}) SELECT {values} FROM n;
UPDATE {name} SET string_field = 'updated-' || id %% 1000, updated_at = now() WHERE id IN
  (SELECT {ahead // 2} + (g + 1) / 3 FROM generate_series(%(first)s::bigint, %(last)s::bigint) g WHERE g %% 3 = 2);
DELETE FROM {name} WHERE id IN
  (SELECT g / 3 FROM generate_series(%(first)s::bigint, %(last)s::bigint) g WHERE g %% 3 = 0)""",
    )


TABLES = {
    table.name: table
    for table in (*(ten_columns(n) for n in (100, 200, 400, 1600, 18_000)), benchmark_records(), mixed())
}


# -- the server --------------------------------------------------------------------------------------------------------


class Source:
    """PostgreSQL 15 with the database ``bench``. ``with Source() as source`` starts it and removes it."""

    def __init__(self, version: str = "15", *, settings: Mapping[str, str] | None = None) -> None:
        self.server = Postgres(version, settings={**SETTINGS, **(settings or {})})
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self.server.__enter__()
        self.server.create_database(DATABASE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.__exit__(kind, error, trace)

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return self.server.connect(DATABASE)

    def fill(self, tables: Sequence[Table], rows: int, *, batch: int = 10_000) -> Waiting:
        """Creates tables, publication and slot, then makes ``rows`` changes, ``batch`` to a transaction.

        Of several tables each has a transaction in turn.
        """
        slot = f"waiting_{next(self._numbers)}"
        publication = f"{slot}_publication"
        with self.connect() as connection:
            for table in tables:
                connection.execute(table.create.encode())
            names = sql.SQL(", ").join(sql.Identifier(table.name) for table in tables)
            connection.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE {}").format(sql.Identifier(publication), names))
            created = connection.execute(
                "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput')", [slot]
            ).fetchone()
            self._make(connection, tables, rows, batch)
            end = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
            connection.execute("CHECKPOINT")
        assert created and end
        return Waiting(tuple(tables), rows, slot, publication, str(created[0]), str(end[0]))

    @staticmethod
    def _make(
        connection: psycopg.Connection[tuple[object, ...]], tables: Sequence[Table], rows: int, batch: int
    ) -> None:
        made = dict.fromkeys((table.name for table in tables), 0)
        # Parameters are bound by the client: a batch may be several statements.
        cursor = psycopg.ClientCursor(connection)
        turns = itertools.cycle(tables)
        left = rows
        while left:
            table = next(turns)
            first, size = made[table.name] + 1, min(batch, left)
            with connection.transaction():
                cursor.execute(table.batch.encode(), {"first": first, "last": first + size - 1})
            made[table.name] += size
            left -= size

    @contextmanager
    def copy(self, waiting: Waiting, *, name: str = "run", plugin: str = "pgoutput") -> Iterator[Slot]:
        """A slot of that name at the start of what waits; dropped in the end, whatever still holds it is ended."""
        with self.connect() as connection:
            connection.execute(
                "SELECT pg_copy_logical_replication_slot(%s, %s, false, %s)", [waiting.slot, name, plugin]
            )
            try:
                yield Slot(
                    name,
                    waiting.publication,
                    tuple(table.name for table in waiting.tables),
                    waiting.rows,
                    waiting.start_lsn,
                    waiting.end_lsn,
                    self.server.port,
                    self.server.unix_socket_dir,
                )
            finally:
                _drop_slot(connection, name)

    def drop(self, waiting: Waiting) -> None:
        """Removes tables, publication and slot, and the WAL that the slot held."""
        with self.connect() as connection:
            _drop_slot(connection, waiting.slot)
            connection.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(waiting.publication)))
            for table in waiting.tables:
                connection.execute(sql.SQL("DROP TABLE {} CASCADE").format(sql.Identifier(table.name)))
                connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}").format(sql.Identifier(f"{table.name}_batch")))
            connection.execute("CHECKPOINT")


def _drop_slot(connection: psycopg.Connection[tuple[object, ...]], name: str) -> None:
    deadline = time.monotonic() + _DROP_SECONDS
    while True:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name = %s AND active_pid IS NOT NULL",
            [name],
        )
        try:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [name]
            )
            return
        except psycopg.errors.ObjectInUse:  # a walsender that was told to end has not yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)

"""A real installation to lose, move and copy: the process, its state file, a file it delivers to, and a database."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psycopg

from invariants.disk import messages_on_disk
from oracle.product import Product, spillway_command
from spillway.change import key_values

SEGMENTS_BEYOND_THE_MARK = 6  # of 16 MB: farther than the mark is reserved ahead


class Installation:
    """One configuration in one folder; ``url`` may be changed between two runs, as an operator would."""

    def __init__(self, folder: Path, url: str, slot: str, destination: dict[str, object] | None = None) -> None:
        self.folder, self.url, self.slot = folder, url, slot
        self.lines = folder / "out.ndjson"
        self._destination = destination or {"type": "file", "path": self.lines.name}
        self.extra: dict[str, object] = {}
        self.product = Product(folder, self._config())
        self.sql(
            "CREATE TABLE IF NOT EXISTS public.t (id int PRIMARY KEY, body text)",
        )

    def _config(self) -> dict[str, object]:
        return {
            "memory": {"limit_mb": 64},
            "state": {"url": "sqlite:///state.db"},
            "databases": [
                {
                    "name": "app",
                    "url": self.url,
                    "slot": {"name": self.slot, "create_if_not_exists": True},
                    "publication": {"name": "spillway", "create_if_not_exists": True},
                }
            ],
            **self.extra,
            "sinks": [{
                "name": "out", "database": "app", "source": {"include_tables": ["public.t"]},
                "destination": self._destination,
            }],
        }  # fmt: skip

    def move_to(self, url: str) -> None:
        self.url = url
        self.product.configure(self._config())
        self.sql("CREATE TABLE IF NOT EXISTS public.t (id int PRIMARY KEY, body text)")

    # -- the database -----------------------------------------------------------------------------------------------
    def sql(self, *statements: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []

    def insert(self, *ids: int) -> None:
        self.sql(*(f"INSERT INTO public.t VALUES ({number}, 'row {number}')" for number in ids))

    def lsn(self) -> int:
        return int(self.sql("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])  # type: ignore[call-overload]

    def confirmed(self) -> int:
        query = f"SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = '{self.slot}'"
        rows = self.sql(query)
        return int(rows[0][0]) if rows and rows[0][0] is not None else 0  # type: ignore[call-overload]

    def go_far_in_the_log(self) -> None:
        """Farther than any mark: nearly empty segments, one after another."""
        for _ in range(SEGMENTS_BEYOND_THE_MARK):
            self.sql("SELECT pg_logical_emit_message(false, 'test', 'x')", "SELECT pg_switch_wal()")

    def drop_slot(self) -> None:
        self.sql(f"SELECT pg_drop_replication_slot('{self.slot}')")

    def create_slot(self) -> None:
        self.sql(f"SELECT pg_create_logical_replication_slot('{self.slot}', 'pgoutput')")

    # -- the process ------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self.product.start()
        self.product.wait_streaming(self.url, self.slot)

    def stop(self) -> None:
        assert self.product.terminate() == 0

    def run_for(self, *ids: int) -> None:
        """A life: start, deliver these rows, stop cleanly."""
        self.start()
        self.insert(*ids)
        self.delivered(*ids)
        self.stop()

    def delivered(self, *ids: int) -> None:
        self.product.wait(lambda: set(ids) <= set(self.received()), f"delivery of {ids}", seconds=30, every=0.02)

    def received(self) -> list[int]:
        if not self.lines.exists():
            return []
        lines = self.lines.read_text().splitlines(keepends=True)
        return [int(json.loads(line)["record"]["id"]) for line in lines if line.endswith("\n")]

    def refused(self, file: Path | None = None) -> str:
        """A start that must fail by itself; returns what it says."""
        return self._spillway(["run", str(file or self.product.file)], expect=1)

    def adopt(self) -> str:
        return self._spillway(["state", "adopt", "-c", str(self.product.file), "--yes"], expect=0)

    def _spillway(self, arguments: Sequence[str], expect: int) -> str:
        command = [*spillway_command(), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == expect, f"exit {done.returncode}: {said}"
        return said

    # -- the state file ---------------------------------------------------------------------------------------------
    @property
    def state(self) -> Path:
        return self.folder / "state.db"

    def copy_state(self, to: Path) -> None:
        to.mkdir()
        for file in self.folder.glob("state.db*"):
            shutil.copyfile(file, to / file.name)

    def bring_back_state(self, copy: Path) -> None:
        self.lose_state()
        for file in copy.iterdir():
            shutil.copyfile(file, self.folder / file.name)

    def lose_state(self) -> None:
        for file in self.folder.glob("state.db*"):
            file.unlink()

    def stored(self) -> set[int]:
        """The rows that wait on disk or are dead, as the disk has it."""
        return {int(key_values("public", "t", m.keys[-1])[0]) for m in messages_on_disk(self.state)}

    def identity(self) -> tuple[int, int]:
        """Epoch and mark."""
        with sqlite3.connect(f"file:{self.state}?mode=ro", uri=True) as db:
            found = db.execute("SELECT epoch, mark FROM slot").fetchone()
        db.close()
        return found[0], found[1]

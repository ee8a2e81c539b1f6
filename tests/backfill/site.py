"""A process, a database and some sinks, to break and mend by hand: what people do, and whether sink and source agree.

Tables are described by what the server says of them, so a test takes whatever tables it likes. Values are compared as
text, which the sinks keep (see `oracle.rules.as_text`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import httpx
import psycopg

from oracle.history import parse_lsn
from oracle.product import TOKEN, Product
from oracle.rules import Key, Row
from oracle.tables import source_rows, sqlite_rows

ENDED = ("completed", "failed", "cancelled")
WAIT_SECONDS = 40.0
POLL_SECONDS = 0.02


def sink(name: str, tables: Sequence[str], destination: Mapping[str, object], **more: object) -> dict[str, object]:
    source = {"include_tables": list(tables)}
    return {"name": name, "database": "app", "source": source, "destination": dict(destination), **more}


def sqlite_sink(name: str, tables: Sequence[str], **more: object) -> dict[str, object]:
    return sink(name, tables, {"type": "sqlite", "path": f"{name}.db"}, **more)


def file_sink(name: str, tables: Sequence[str], **more: object) -> dict[str, object]:
    return sink(name, tables, {"type": "file", "path": f"{name}.ndjson"}, **more)


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, answer: httpx.Response) -> None:
        said = answer.json()
        super().__init__(f"{answer.status_code} {said['error']}; {said['remedy']}")
        self.code = str(said["code"])


class Site:
    """``with Site(...) as site``: `begin` starts the process. ``url``: as whom it connects, the superuser without."""

    def __init__(
        self, conninfo: str, folder: Path, sinks: Sequence[Mapping[str, object]], url: str | None = None
    ) -> None:
        self.conninfo, self.folder, self._url = conninfo, folder, url or conninfo
        self.product = Product(folder, self._config(sinks))
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.product.port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=20,
            trust_env=False,
        )

    def _config(self, sinks: Sequence[Mapping[str, object]]) -> dict[str, object]:
        database = {
            "name": "app", "url": self._url, "slot": {"name": "spillway", "create_if_not_exists": True},
            "publication": {"name": "spillway"},
        }  # fmt: skip
        return {
            "memory": {"limit_mb": 128},
            "state": {"url": "sqlite:///state.db"},
            "databases": [database],
            "sinks": list(sinks),
        }

    def configure(self, *sinks: Mapping[str, object]) -> None:
        """For the next start."""
        self.product.configure(self._config(sinks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.product.close()
        self._http.close()

    # -- the process ------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        self.product.start()
        self.product.wait_streaming(self.conninfo)

    def stop(self) -> None:
        assert self.product.terminate() == 0

    def again(self) -> None:
        self.product.kill()
        self.begin()

    def wait(self, done: Callable[[], bool], what: str, every: float = POLL_SECONDS) -> None:
        self.product.wait(done, what, seconds=WAIT_SECONDS, every=every)

    # -- the source -------------------------------------------------------------------------------------------------
    def sql(self, *statements: str) -> list[tuple]:
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def transaction(self, *statements: str) -> Iterator[psycopg.Connection]:
        """One that is open as long as this is; committed at the end."""
        with psycopg.connect(self.conninfo) as connection:
            for statement in statements:
                connection.execute(statement.encode())
            yield connection

    def source_rows(self, table: str) -> dict[Key, Row]:
        return source_rows(self.conninfo, table)

    # -- HTTP -------------------------------------------------------------------------------------------------------
    def post(self, path: str, **body: object) -> dict:
        return self._answer(self._http.post(f"/api/sinks/{path}", json=body))

    def change(self, name: str, id_or_table: str, state: str) -> dict:
        return self._answer(self._http.patch(f"/api/sinks/{name}/backfills/{id_or_table}", json={"state": state}))

    @staticmethod
    def _answer(answer: httpx.Response) -> dict:
        if not answer.is_success:
            raise Refused(answer)
        return dict(answer.json())

    def status(self, name: str) -> dict:
        return self.product.sink(name)

    def start(self, name: str, path: str = "backfills", **order: object) -> list[str]:
        """The ids of what was begun."""
        answer = self.post(f"{name}/{path}", **order)
        return [item["id"] for item in answer.get("data", [answer])]

    def item(self, name: str, backfill_id: str) -> dict:
        return next(item for item in self.product.backfills(name) if item["id"] == backfill_id)

    def tables_of(self, name: str, ids: Sequence[str]) -> list[str]:
        return sorted(self.item(name, backfill_id)["table"] for backfill_id in ids)

    def ended(self, name: str, ids: Sequence[str], state: str = "completed") -> list[dict]:
        """When all of these have ended, in this state."""
        found: list[dict] = []

        def done() -> bool:
            found[:] = [item for item in self.product.backfills(name) if item["id"] in ids]
            return all(item["state"] in ENDED for item in found)

        self.wait(done, f"the end of backfills of {name}")
        assert len(found) == len(ids)
        assert [item["state"] for item in found] == [state] * len(ids), found
        return found

    def run(self, name: str, path: str = "backfills", **order: object) -> list[dict]:
        return self.ended(name, self.start(name, path, **order))

    def of_table(self, name: str, table: str) -> list[dict]:
        return [item for item in self.product.backfills(name) if item["table"] == table]

    def wait_state(self, name: str, *states: str) -> None:
        self.wait(lambda: self.status(name)["state"] in states, f"{name} to be {states}")

    # -- gaps -------------------------------------------------------------------------------------------------------
    def wait_gap_grows(self, name: str) -> None:
        def grows() -> bool:
            gap = self.status(name)["gap"]
            return gap is not None and gap["last_lsn"] is None

        self.wait(grows, f"a gap of {name}")

    def end_gap(self, name: str) -> None:
        """The sink is well again: it has to make room before it can take part."""
        self.wait(lambda: self.status(name)["backlog_messages"] <= 1, f"the backlog of {name}")
        self.post(f"{name}/resume")

    def read_by_the_stream(self) -> None:
        """Everything that is committed by now has come, as the slot says."""
        lsn = parse_lsn(self.sql("select pg_current_wal_insert_lsn()::text")[0][0])
        self.sql("select txid_current()")  # something to confirm, behind it
        query = "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = 'spillway'"
        self.wait(lambda: parse_lsn(self.sql(query)[0][0]) >= lsn, "the slot to be read")

    def drained(self, *names: str) -> None:
        self.read_by_the_stream()
        for name in names:
            self.wait(lambda name=name: self.status(name)["backlog_messages"] == 0, f"the backlog of {name}")

    # -- the sinks --------------------------------------------------------------------------------------------------
    def block(self, file: str) -> None:
        """A folder takes the place of a sink's file: the sink is down."""
        path = self.folder / file
        path.rename(path.with_suffix(".away"))
        path.mkdir()

    def unblock(self, file: str) -> None:
        path = self.folder / file
        path.rmdir()
        path.with_suffix(".away").rename(path)

    def sqlite_rows(self, name: str, table: str) -> dict[Key, Row]:
        return sqlite_rows(self.folder / f"{name}.db", self.conninfo, table)

    def lines(self, name: str) -> list[dict]:
        """The whole lines of a file sink."""
        path = self.folder / f"{name}.ndjson"
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def reads(self, name: str, table: str, column: str = "id") -> list[object]:
        """The values of one column of the existing rows that a file sink got, in their order."""
        plain = table.removeprefix("public.")
        return [
            line["record"][column]
            for line in self.lines(name)
            if line["action"] == "read" and line["metadata"]["table_name"] == plain
        ]

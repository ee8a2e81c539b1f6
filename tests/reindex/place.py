"""A table, a search sink that writes through an alias, and those who write and read meanwhile."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx
import psycopg
import pytest

from backfill.site import Refused, Site, sink

SINK = "jobs"
FRESH_SECONDS = 5.0


def mapping(extra: str) -> dict[str, Any]:
    fields = {"id": "integer", "seq": "long", "title": "text", "extra": extra}
    return {"mappings": {"dynamic": "strict", "properties": {name: {"type": of} for name, of in fields.items()}}}


NARROW, WIDE = mapping("integer"), mapping("keyword")  # a row with a word in ``extra`` is rejected; is taken
ENDED = ("done", "failed", "cancelled")
COLUMNS = ("id", "seq", "title", "extra")


class Place(Site):
    """``v1`` is the index that ``alias`` stands for at the beginning, with the mapping `NARROW`."""

    def __init__(
        self,
        conninfo: str,
        folder: Path,
        search_url: str,
        *,
        through: str | None = None,
        document: str = "record",
        more: Sequence[Mapping[str, object]] = (),
        **options: object,
    ) -> None:
        """``through``: the address that the process has of the server. ``more``: sinks. ``options`` of the first."""
        self.alias = f"jobs-{uuid4().hex}"
        self.v1, self.v2 = f"{self.alias}-v1", f"{self.alias}-v2"
        self.search = httpx.Client(base_url=search_url, timeout=30, trust_env=False)
        destination = {"type": "opensearch", "endpoint_url": through or search_url, "index_name": self.alias}
        self.jobs = sink(SINK, ["public.jobs"], {**destination, "document": document}, **options)
        super().__init__(conninfo, folder, [self.jobs, *more])
        self.sql(
            "create table public.jobs (id int primary key, seq bigint not null, title text, extra text)",
            "create publication spillway for table public.jobs",
        )
        self.create(self.v1, {**NARROW, "aliases": {self.alias: {}}})

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.search.delete(f"/{self.alias}*")
        self.search.close()

    # -- the index --------------------------------------------------------------------------------------------------
    def create(self, index: str, body: Mapping[str, object]) -> None:
        self.search.put(f"/{index}", json=body).raise_for_status()

    def exists(self, index: str) -> bool:
        return self.search.head(f"/{index}").status_code == 200

    def behind(self, alias: str | None = None) -> list[str]:
        """What the alias stands for."""
        answer = self.search.get(f"/_alias/{alias or self.alias}")
        return sorted(answer.json()) if answer.status_code == 200 else []

    def version(self, identity: str) -> int:
        """Of a document of the new index."""
        return int(self.search.get(f"/{self.v2}/_doc/{identity}").raise_for_status().json()["_version"])

    def write(self, identity: str, document: Mapping[str, object], version: int) -> None:
        """Into the new index, behind everybody's back."""
        url = f"/{self.v2}/_doc/{identity}?version={version}&version_type=external_gte"
        self.search.put(url, json=document).raise_for_status()

    def documents(self, index: str | None = None) -> dict[int | str, dict[str, Any]]:
        """By id; those of rows by the number that it is."""
        index = index or self.alias
        self.search.post(f"/{index}/_refresh").raise_for_status()
        found = self.search.post(f"/{index}/_search", json={"size": 10_000}).raise_for_status().json()
        hits = found["hits"]["hits"]
        return {int(hit["_id"]) if hit["_id"].isdigit() else hit["_id"]: hit["_source"] for hit in hits}

    def rows(self) -> dict[int, dict[str, Any]]:
        found = self.sql("select id, seq, title, extra from public.jobs")
        return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found}

    def fill(self, rows: int, first: int = 1, extra: str | None = None) -> None:
        value = "null" if extra is None else f"'{extra}'"
        self.sql(
            f"insert into public.jobs select i, 0, 'title ' || i, {value} "
            f"from generate_series({first}, {first + rows - 1}) i"
        )

    # -- the re-index -----------------------------------------------------------------------------------------------
    @property
    def shadow(self) -> str:
        return f"{SINK}@{self.v2}"

    def reindex(self, into: str | None = None, **order: object) -> dict[str, Any]:
        given = {"into": into or self.v2, "mapping": WIDE} | order
        return self.post(f"{SINK}/reindex", **{name: value for name, value in given.items() if value is not None})

    def refused(self, path: str, **body: object) -> str:
        with pytest.raises(Refused) as caught:
            self.post(f"{SINK}/{path}", **body)
        return caught.value.code

    def progress(self) -> dict[str, Any]:
        (item,) = self.get(f"sinks/{SINK}/reindex")["data"]
        return item

    def progress_on_disk(self) -> dict[str, Any]:
        with closing(sqlite3.connect(f"file:{self.folder / 'state.db'}?mode=ro", uri=True)) as state:
            ((document,),) = state.execute("select document from backfill where id = 'reindex'")
        return dict(json.loads(document))

    def get(self, path: str) -> dict[str, Any]:
        return self._answer(self._http.get(f"/api/{path}"))

    def reaches(self, *states: str) -> dict[str, Any]:
        """The re-index, once it is in one of these states; where it has ended in it, all of that is done."""

        def there() -> bool:
            item = self.progress()
            assert item["state"] in states or item["state"] not in ENDED, item
            return item["state"] in states and (item["state"] not in ENDED or item["ended_at"] is not None)

        self.wait(there, f"the re-index to be {states}")
        return self.progress()

    def says(self, text: str) -> None:
        self.wait(lambda: text in self.progress()["reason"], f"the re-index to say {text!r}")

    def wait_equal(self) -> None:
        self.read_by_the_stream()
        self.wait(lambda: self.documents() == self.rows(), "the alias to hold what the table holds")

    def sinks(self) -> list[str]:
        return [one["name"] for one in self.product.status()["sinks"]]


class Traffic:
    """Writes random changes, and asks the alias for what was committed `FRESH_SECONDS` ago; ``with Traffic(place)``
    ends both. `violations` is what was not there, or older than it was by then."""

    def __init__(self, place: Place, seed: int, ids: int) -> None:
        self._place = place
        self._random = random.Random(seed)
        self._ids = ids
        self._lock = threading.Lock()
        self._rows = {row: (time.monotonic(), 0) for row in range(1, ids + 1)}  # when committed, and seq
        self._end = threading.Event()
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._guarded, args=(f,)) for f in (self._write, self._read)]
        self.violations: list[str] = []
        self.failed: list[str] = []  # searches that had no answer
        self.written = 0
        self.checked_until = 0.0  # everything committed before this (monotonic) has been asked for

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        if error is None and self._errors:
            raise self._errors[0]

    def settle(self) -> None:
        """Returns when everything that is committed by now has been asked for."""
        now = time.monotonic()
        self._place.wait(lambda: bool(self._errors) or self.checked_until >= now, "the reader")
        assert not self._errors, self._errors

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - of a thread: raised by who waits for it
            self._errors.append(error)

    def _write(self) -> None:
        with psycopg.connect(self._place.conninfo, autocommit=True) as connection:
            while not self._end.wait(0.005):
                self.written += 1
                row = self._random.randint(1, self._ids)
                action = self._random.choices(("upsert", "delete", "move"), (8, 1, 1))[0]
                other = self._random.randint(self._ids + 1, 2 * self._ids)
                with self._lock:
                    there = self._rows.pop(row, None) is not None
                    self._rows.pop(other, None) if action == "move" else None
                sql = [f"delete from public.jobs where id = {other if action == 'move' else row}"]
                left: int | None = row
                if action == "upsert" and there:
                    sql = [f"update public.jobs set seq = {self.written} where id = {row}"]
                elif action == "upsert":
                    sql = [f"insert into public.jobs values ({row}, {self.written}, 'new')"]
                elif action == "move" and there:
                    sql.append(f"update public.jobs set id = {other}, seq = {self.written} where id = {row}")
                    left = other
                else:
                    left = None
                with connection.transaction():
                    for statement in sql:
                        connection.execute(statement.encode())
                if left is not None:
                    with self._lock:
                        self._rows[left] = (time.monotonic(), self.written)

    def _old(self, now: float) -> dict[int, tuple[float, int]]:
        with self._lock:
            return {row: known for row, known in self._rows.items() if known[0] <= now - FRESH_SECONDS}

    def _read(self) -> None:
        place = self._place
        with httpx.Client(base_url=place.search.base_url, timeout=30, trust_env=False) as search:
            while not self._end.wait(0.05):
                now = time.monotonic()
                expected = self._old(now)
                body = {"size": 10_000, "_source": ["seq"], "track_total_hits": True}
                answer = search.post(f"/{place.alias}/_search", json=body)
                if not answer.is_success:
                    self.failed.append(f"{answer.status_code} {answer.text}")
                    continue
                found = answer.json()
                held = {int(hit["_id"]): hit["_source"]["seq"] for hit in found["hits"]["hits"]}
                for row, known in self._old(now).items():
                    if expected.get(row) == known and held.get(row, -1) < known[1]:
                        index = found["hits"]["hits"][0]["_index"] if held else "nothing"
                        self.violations.append(
                            f"row {row} of {now - known[0]:.1f} s ago: {held.get(row)} instead of {known[1]} in {index}"
                        )
                self.checked_until = now - FRESH_SECONDS

"""A load that is hard on order: few keys, all operations, keys that change places, two writers at once.

``public.jobs`` has the default replica identity, ``public.pairs`` identity full and a key of two columns, one of which
holds the characters that join keys. Every row carries ``seq``, which no two operations share. Writers roll back and
fall into deadlocks as they will: the history has what was committed.

The writers work off an allowance (`Load.allow`), so that a test decides how much there is to do.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import psycopg

KEY_COLUMNS: Mapping[str, tuple[str, ...]] = {"public.jobs": ("id",), "public.pairs": ("a", "b")}
SCHEMA = """
create table public.jobs (id int primary key, seq bigint not null, v text);
create table public.pairs (a int, b text, seq bigint not null, v text, primary key (a, b));
alter table public.pairs replica identity full;
create publication spillway for table public.jobs, public.pairs;
"""
HOT_JOBS = range(1, 7)
JOBS = range(1, 61)
PAIRS = [(a, b) for a in (1, 2, 3) for b in ("x", "x-1", "it's", "a:b", "ü\n.\\")]
TEXTS = ["", "plain", "it's", 'quoted "text"', "line\nbreak", "ünïcödé \U0001f600", "x" * 900, None]


class Load:
    """Writers in threads; ``with Load(conninfo, seed)`` ends them. `finish` raises what a writer died of."""

    def __init__(self, conninfo: str, seed: int, writers: int = 2) -> None:
        self._conninfo = conninfo
        self._allowance: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: one transaction; False: end
        self._seq = itertools.count(1)
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{n}"),), daemon=True)
            for n in range(writers)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def allow(self, transactions: int) -> None:
        for _ in range(transactions):
            self._allowance.put(True)

    def keep(self, transactions: int) -> None:
        """At least so many are allowed: whoever says so again and again keeps the writers at work."""
        self.allow(max(0, transactions - self._allowance.qsize()))

    def finish(self) -> None:
        """Lets the writers use up their allowance and waits for them."""
        self._end()
        if self._errors:
            raise self._errors[0]

    def _end(self) -> None:
        for _ in self._threads:
            self._allowance.put(False)
        for thread in self._threads:
            thread.join()

    def _run(self, rng: random.Random) -> None:
        try:
            with psycopg.connect(self._conninfo) as connection:
                connection.execute("set deadlock_timeout = '20ms'; set lock_timeout = '5s'")
                connection.commit()
                while self._allowance.get():
                    self._transaction(connection, rng)
        except psycopg.Error as error:
            self._errors.append(error)

    def _transaction(self, connection: psycopg.Connection, rng: random.Random) -> None:
        try:
            for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
                self._operation(connection, rng)
        except (psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation, psycopg.errors.LockNotAvailable):
            connection.rollback()
            return
        if rng.random() < 0.05:
            connection.rollback()
        else:
            connection.commit()

    def _operation(self, connection: psycopg.Connection, rng: random.Random) -> None:
        if rng.random() < 0.7:
            self._job(connection, rng)
        else:
            self._pair(connection, rng)

    def _job(self, connection: psycopg.Connection, rng: random.Random) -> None:
        keys = HOT_JOBS if rng.random() < 0.6 else JOBS
        one, other = rng.choice(keys), rng.choice(keys)
        values = {"one": one, "other": other, "seq": next(self._seq), "v": rng.choice(TEXTS)}
        match rng.choices(("upsert", "update", "delete", "move", "swap"), (30, 35, 12, 15, 8))[0]:
            case "upsert":
                query = (
                    "insert into jobs values (%(one)s, %(seq)s, %(v)s)"
                    " on conflict (id) do update set seq = excluded.seq, v = excluded.v"
                )
            case "update":
                query = "update jobs set seq = %(seq)s, v = %(v)s where id = %(one)s"
            case "delete":
                query = "delete from jobs where id = %(one)s"
            case "move":
                query = (
                    "update jobs set id = %(other)s, seq = %(seq)s where id = %(one)s"
                    " and not exists (select from jobs where id = %(other)s)"
                )
            case _:
                for before, after in ((one, -one), (other, one), (-one, other)) if one != other else ():
                    moved = "update jobs set id = %s, seq = %s where id = %s"
                    connection.execute(moved, [after, next(self._seq), before])
                return
        connection.execute(query, values)

    def _pair(self, connection: psycopg.Connection, rng: random.Random) -> None:
        (a, b), (c, d) = rng.choice(PAIRS), rng.choice(PAIRS)
        values = {"a": a, "b": b, "c": c, "d": d, "seq": next(self._seq), "v": rng.choice(TEXTS)}
        match rng.choices(("upsert", "update", "delete", "move"), (40, 30, 12, 18))[0]:
            case "upsert":
                query = (
                    "insert into pairs values (%(a)s, %(b)s, %(seq)s, %(v)s)"
                    " on conflict (a, b) do update set seq = excluded.seq, v = excluded.v"
                )
            case "update":
                query = "update pairs set seq = %(seq)s, v = %(v)s where a = %(a)s and b = %(b)s"
            case "delete":
                query = "delete from pairs where a = %(a)s and b = %(b)s"
            case _:
                query = (
                    "update pairs set a = %(c)s, b = %(d)s, seq = %(seq)s where a = %(a)s and b = %(b)s"
                    " and not exists (select from pairs where a = %(c)s and b = %(d)s)"
                )
        connection.execute(query, values)

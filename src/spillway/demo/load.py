"""What an application would do to its table: small transactions that insert, update and delete, on a steady beat."""

from __future__ import annotations

import threading
import time

import psycopg

TABLE = "orders"
BEATS_PER_SECOND = 25
INSERTS, UPDATES, DELETES = 60, 50, 10  # per transaction; updates and deletes of rows that are gone do not count

_CREATE = f"""
CREATE TABLE {TABLE} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer int NOT NULL,
    status text NOT NULL,
    amount numeric(12, 2) NOT NULL,
    note text,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
_INSERT = f"""
INSERT INTO {TABLE} (customer, status, amount, note)
SELECT random() * 1e6, 'new', (random() * 1000)::numeric(12, 2), repeat(md5(random()::text), 24)
FROM generate_series(1, %s)
"""
_SOME = f"""
SELECT (random() * (SELECT max(id) FROM {TABLE}))::bigint FROM generate_series(1, %s)
"""
_UPDATE = f"""
UPDATE {TABLE} SET status = (ARRAY['paid', 'packed', 'sent'])[1 + floor(random() * 3)::int], amount = amount + 0.01,
    changed_at = clock_timestamp()
WHERE id IN ({_SOME})
"""
_DELETE = f"DELETE FROM {TABLE} WHERE id IN ({_SOME})"


def create_table(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(_CREATE)


class Load:
    """A thread with a connection of its own. ``changes`` counts the rows of committed transactions."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="load")
        self.changes = 0

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Returns when the last transaction is committed; raises what ended the thread before its time."""
        self.__exit__()
        self.check()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with psycopg.connect(self._url, autocommit=True) as connection:
                self._beat(connection)
        except Exception as failure:  # noqa: BLE001 - raised again where the load is asked for
            self._failure = failure

    def _beat(self, connection: psycopg.Connection) -> None:
        at = time.monotonic()
        while not self._stop.is_set():
            with connection.transaction():
                changed = sum(
                    connection.execute(statement, [count]).rowcount
                    for statement, count in ((_INSERT, INSERTS), (_UPDATE, UPDATES), (_DELETE, DELETES))
                )
            self.changes += changed
            # After a delay it goes on from now: a demo on a busy machine is slower, not bursty.
            at = max(at + 1 / BEATS_PER_SECOND, time.monotonic())
            self._stop.wait(at - time.monotonic())

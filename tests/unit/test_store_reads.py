"""I5 for the store: what a start reads, and what every statement visits, does not depend on how much waits."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from store_support import SINK, SLOT, at, fast_folder, opened, park, plain, put, span

from spillway.store import apply, backfills, commands, compact, lanes, people, queue, reads, refreshes, sqlite
from spillway.store.base import Write
from spillway.store.file import open_writer

STATEMENTS = {
    f"{module.__name__.rsplit('.', 1)[-1]}.{name}": text
    for module in (queue, lanes, apply, backfills, refreshes, commands, compact, reads, people, sqlite)
    for name, text in vars(module).items()
    if name.isupper() and isinstance(text, str) and text.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")
}


@pytest.mark.parametrize("name", sorted(STATEMENTS))
def test_every_statement_goes_by_an_index(name: str) -> None:
    """No table is scanned and nothing is sorted; only the rows that a statement was given, or has selected, are."""
    text = STATEMENTS[name]
    numbered = [int(n) for n in re.findall(r"\?(\d+)", text)]
    with fast_folder() as folder:
        db = open_writer(folder / "state.db")
        given = (1,) * (max(numbered) if numbered else text.count("?"))
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}", given)]
        db.close()
    small = re.compile(r"SCAN (CONSTANT ROW|\w+ VIRTUAL TABLE INDEX|\(subquery-\d+\)$|[qg]$)")
    assert [step for step in plan if "SCAN" in step and not small.match(step)] == []
    assert [step for step in plan if "TEMP B-TREE" in step] == []


COPIES = {
    "span": "id + copy * 1000000, sink, keying, key_groups, messages, bytes, messages_left, bytes_left, first_lsn,"
    " commit_time, stored, tables, truncates, done, kept",
    "span_data": "id + copy * 1000000, keys, meta, data",
    "message": "id + copy * 100000000000, sink, lsn, idx, sub, keying, key_groups, tables, key1 || '/' || copy, key2,"
    " commit_time, stored, size, keys, meta, data",
    "lane": "sink, key || '/' || copy, id + copy * 100000000000, other, waits, bytes",
    "parked": "sink, key || '/' || copy, head + copy * 100000000000, run, due, waits_for, attempts, reason, detail",
}


def multiply(path: Path, times: int) -> None:
    """Let everything that waits wait so often, held under keys of its own; faster than to put it all."""
    db = sqlite3.connect(path)
    for table, columns in COPIES.items():
        db.execute(
            f"WITH RECURSIVE copies (copy) AS (SELECT 1 UNION ALL SELECT copy + 1 FROM copies WHERE copy < {times - 1})"
            f" INSERT INTO {table} SELECT {columns} FROM {table}, copies"
        )
    counters = ", ".join(f"{name} = {name} * {times}" for name in ("messages", "bytes", "queued", "parked_keys"))
    db.execute(f"UPDATE sink SET {counters}")
    db.commit()
    db.close()


class Start:
    """What a start reads, in statements and in steps of SQLite's machine."""

    def __init__(self, path: Path) -> None:
        with opened(path) as store:
            self.steps = 0
            before = store.reads
            for db in (store._reader, store._db):
                db.set_progress_handler(self._step, 10)
            state = store.open_sink(SINK, SLOT)
            assert store.bytes_at_head(SINK, 0)
            self.page = sum(span.left for span in store.page(SINK, 0, 100, 1 << 20))
            assert store.next_due_seconds(SINK, 0) == 0.0
            assert store.bytes_due(SINK, 0)
            self.due = len(store.due(SINK, 100, 1 << 20, 0))
            assert store.oldest(SINK)
            self.reads = store.reads - before
            for db in (store._reader, store._db):
                db.set_progress_handler(None, 0)
            self.messages = state.counters.messages

    def _step(self) -> int:
        self.steps += 1
        return 0


def test_a_start_costs_the_same_with_1000_and_200000_waiting() -> None:
    with fast_folder() as folder:
        path = folder / "state.db"
        with opened(path) as store:
            spans = [plain(lsn, lsn + 3) for lsn in range(1, 1001, 4)]
            store.write(put(*spans)).result()
            store.write(park(*[m for s in spans for m in at(s, 0, 2)])).result()
        few = Start(path)
        multiply(path, 200)
        many = Start(path)
    assert (few.messages, many.messages) == (1_000, 200_000)
    assert (few.page, few.due) == (many.page, many.due) == (50, 100)
    assert few.reads == many.reads == 13
    assert many.steps <= few.steps * 1.05


def test_advancing_and_retrying_cost_the_same_however_many_wait() -> None:
    """A write visits what it touches: a lane of 20,000 rows advances like one of two."""
    steps = {}
    for waiting in (2, 20_000):
        with fast_folder() as folder, opened(folder / "state.db") as store:
            hot = span(*[(lsn, "hot") for lsn in range(1, waiting + 3)])
            messages = at(hot)
            store.write(put(hot)).result()
            store.write(Write(SINK, park=park(messages[0]).park, hold=messages[1:])).result()
            count = 0

            def step() -> int:
                nonlocal count
                count += 1
                return 0

            store._db.set_progress_handler(step, 10)
            store.write(park(messages[0])).result()
            store.write(Write(SINK, resolved_held=[messages[0]])).result()
            newcomer = span((waiting + 3, "hot"))
            store.write(put(newcomer)).result()
            store.write(Write(SINK, hold=at(newcomer))).result()
            steps[waiting] = count
    assert steps[20_000] <= steps[2] + 10


def test_the_queue_costs_the_same_however_much_waits() -> None:
    steps = {}
    for waiting in (4, 4_000):
        with fast_folder() as folder, opened(folder / "state.db") as store:
            spans = [plain(lsn, lsn) for lsn in range(1, waiting + 1)]
            store.write(put(*spans)).result()
            count = 0

            def step() -> int:
                nonlocal count
                count += 1
                return 0

            for db in (store._db, store._reader):
                db.set_progress_handler(step, 10)
            store.write(Write(SINK, resolved=[(spans[0], 0, 1)])).result()
            store.write(put(plain(waiting + 1, waiting + 1))).result()
            assert len(store.page(SINK, spans[1].row(0), 2, 1000)) == 2
            steps[waiting] = count
    assert steps[4_000] <= steps[4] + 10

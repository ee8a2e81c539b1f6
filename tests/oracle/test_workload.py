"""The oracle on a real PostgreSQL: its history of the workload, replayed, is the table."""

from __future__ import annotations

import psycopg
import pytest

from oracle.history import SlotHistory
from oracle.rules import Delivery, Row, judge_events, judge_rows
from oracle.tables import source_rows
from oracle.workload import KEY_COLUMNS, SCHEMA, Load
from servers.postgres import VERSIONS, Postgres


@pytest.mark.parametrize("version", VERSIONS)
def test_the_history_replayed_is_the_table(version: str) -> None:
    with Postgres(version) as server:
        conninfo = server.create_database("app")
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(SCHEMA)
        source = SlotHistory(conninfo, "oracle", KEY_COLUMNS)
        source.create()
        with Load(conninfo, seed=1) as load:
            load.allow(300)
            load.finish()
        history = source.read()
        expected = {key: row for table in KEY_COLUMNS for key, row in source_rows(conninfo, table).items()}
    state: dict[tuple[str, ...], Row] = {}
    for event in history.events:
        before: Row = {}
        if event.action != "insert":
            before = state.pop(event.keys[0])
        if event.action != "delete":
            state[event.keys[-1]] = {**before, **event.row}
    assert {event.action for event in history.events} == {"insert", "update", "delete"}
    assert any(len(event.keys) == 2 for event in history.events)
    assert judge_rows(expected, state) == []
    perfect = [
        Delivery(number, 0, _message(event.table, event, transaction.end_lsn - 1))
        for number, (transaction, event) in enumerate((t, e) for t in history.transactions for e in t.events)
    ]
    assert judge_events(history, KEY_COLUMNS, perfect) == []
    assert {v.rule for v in judge_events(history, KEY_COLUMNS, perfect[1:])} >= {"lost"}


def _message(table: str, event, commit_lsn: int) -> dict[str, object]:
    schema, _, name = table.partition(".")
    metadata = {"table_schema": schema, "table_name": name, "record_pks": list(event.keys[-1][1:])}
    metadata |= {"commit_lsn": commit_lsn, "commit_idx": event.idx}
    return {"action": event.action, "record": event.row, "metadata": metadata}

"""Column filters and logical messages in a process: what is in the sinks is what the conditions let through."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shape.place import Shaped, file_sink, sqlite_sink

T = "public.t"
SCHEMA = "create table t (id int primary key, tenant int, name text, at timestamptz, data jsonb)"
FILTERS = [
    {"column": "tenant", "operator": ">=", "value": 2},
    {"column": "data", "path": "kind", "operator": "in", "value": ["a", "b"]},
]
MATCHES = "tenant >= 2 and data ->> 'kind' in ('a', 'b')"


def insert(dice: random.Random, first: int, last: int) -> str:
    rows = [
        f"({number}, {dice.randrange(5)}, 'n{dice.randrange(9)}', now(), '{{\"kind\": \"{dice.choice('abcd')}\"}}')"
        for number in range(first, last)
    ]
    return f"insert into t values {', '.join(rows)}"


def change(dice: random.Random) -> str:
    key = dice.randrange(60)
    return dice.choice(
        [
            f"update t set tenant = {dice.randrange(5)} where id = {key}",
            f'update t set data = \'{{"kind": "{dice.choice("abcd")}"}}\' where id = {key}',
            f"update t set id = {1000 + dice.randrange(10**9)} where id = {key}",
            f"delete from t where id = {key}",
            insert(dice, key, key + 1)
            + " on conflict (id) do update set tenant = excluded.tenant, data = excluded.data",
        ]
    )


@pytest.mark.parametrize("identity", ["default", "full"])
def test_a_sink_holds_what_matches(database: str, tmp_path: Path, identity: str) -> None:
    dice = random.Random(identity)
    sinks = [
        sqlite_sink("kept", [T], filters=FILTERS),
        sqlite_sink("whole", [T]),
        file_sink("told", [T], filters=FILTERS),
    ]
    with Shaped(database, tmp_path, sinks, schema=SCHEMA) as place:
        place.sql(f"alter table t replica identity {identity}", insert(dice, 0, 40))
        place.begin()
        begun = place.start("kept", table=T)
        place.sql(*[change(dice) for _ in range(150)])
        place.ended("kept", begun)
        place.run("whole", table=T)
        reads = place.run("told", table=T)
        place.sql(*[change(dice) for _ in range(100)])
        place.drained("kept", "whole", "told")
        wanted = [key for (key,) in place.sql(f"select id::text from t where {MATCHES}")]
        rows = place.source_rows(T)
        assert place.sqlite_rows("whole", T).keys() == rows.keys()
        assert place.sqlite_rows("kept", T).keys() == {(T, key) for key in wanted}
        lines = place.lines("told")
    assert reads[0]["state"] == "completed"
    for line in lines:
        record = line["record"]
        if line["action"] != "delete" or identity == "full":
            assert record["tenant"] >= 2
            assert record["data"]["kind"] in ("a", "b")
    assert {line["action"] for line in lines} == {"insert", "update", "delete", "read"}


def test_messages_under_a_prefix(database: str, tmp_path: Path) -> None:
    sinks = [file_sink("orders", [T], outbox={"prefix": "orders"}), file_sink("rows", [T])]
    with Shaped(database, tmp_path, sinks, schema=SCHEMA) as place:
        place.begin()
        with place.transaction("insert into t values (1)") as session:
            session.execute("select pg_logical_emit_message(true, 'orders', '{\"id\": 1}')")
            session.execute("select pg_logical_emit_message(false, 'orders', 'at once')")
            session.execute("select pg_logical_emit_message(true, 'others', 'x')")
        place.sql("insert into t values (2)")
        told = place.came("orders", 2)
        place.came("rows", 2)
    assert told == ["at once", {"id": 1}]

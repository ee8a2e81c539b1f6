"""Filter, transform and routing functions: what they make of messages, and what they cannot do to their neighbours."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from oracle.documents import Index
from oracle.endpoint import Recorder
from servers.opensearch import OpenSearch
from shape.place import Json, Shaped, bodies, file_sink, python, sink, sqlite_sink

T = "public.t"
SCHEMA = "create table public.t (id int primary key, kind text, n int, secret text, data jsonb)"


def rows(first: int, last: int, kind: str = "plain") -> str:
    return (
        f"insert into t select i, '{kind}', i * 10, 'secret ' || i, jsonb_build_object('a', jsonb_build_object('b', i))"
        f" from generate_series({first}, {last}) i"
    )


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


# -- filters ----------------------------------------------------------------------------------------------------------
def test_a_filter_function_decides_message_by_message(database: str, tmp_path: Path) -> None:
    even = python("even", "filter", "return action == 'delete' or record['id'] % 2 == 0")
    with Shaped(database, tmp_path, [file_sink("out", [T], filter="even")], [even], schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 10), "update t set n = 0 where id in (3, 4)", "delete from t where id = 5")
        lines = place.came("out", 7)
    assert [(line["action"], line["record"]["id"]) for line in lines] == [
        *(("insert", n) for n in (2, 4, 6, 8, 10)), ("update", 4), ("delete", 5),
    ]  # fmt: skip


def test_conditions_by_column_and_json_path_must_all_hold(database: str, tmp_path: Path) -> None:
    conditions = [
        {"column": "kind", "operator": "in", "value": ["plain", "fine"]},
        {"column": "n", "operator": "gte", "value": 50},
        {"column": "data", "path": "a.b", "operator": "ne", "value": 8},
        {"column": "secret", "operator": "like", "value": "secret %"},
    ]
    with Shaped(database, tmp_path, [file_sink("out", [T], filters=conditions)], schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 10), rows(11, 20, "other"), "insert into t values (21, 'fine', 999, 'open', '{}')")
        lines = place.came("out", 5)
    assert [line["record"]["id"] for line in lines] == [5, 6, 7, 9, 10]


@pytest.mark.parametrize("identity", ["default", "full"])
def test_a_row_that_no_longer_matches_leaves_a_mirror(database: str, tmp_path: Path, identity: str) -> None:
    conditions = [{"column": "kind", "operator": "eq", "value": "plain"}]
    with Shaped(database, tmp_path, [sqlite_sink("mirror", [T], filters=conditions)], schema=SCHEMA) as place:
        place.sql(f"alter table t replica identity {identity}")
        place.begin()
        place.sql(rows(1, 6), rows(7, 9, "other"))
        place.sql("update t set kind = 'other' where id in (2, 3)", "update t set kind = 'plain' where id = 8")
        place.sql("update t set n = 1 where id in (1, 3, 8)", "delete from t where id = 4")
        place.drained("mirror")
        expected = {key: row for key, row in place.source_rows(T).items() if row["kind"] == "plain"}
        assert place.sqlite_rows("mirror", T) == expected
    assert sorted(int(key[1]) for key in expected) == [1, 5, 6, 8]


# -- transforms -------------------------------------------------------------------------------------------------------
def test_a_transform_makes_one_message_none_or_several(database: str, tmp_path: Path) -> None:
    code = """
if record["n"] == 10:
    return {"id": record["id"], "was": metadata["table_name"]}
if record["n"] == 20:
    return None
return [{"id": record["id"], "part": part} for part in range(record["id"])]
"""
    many = python("many", "transform", code)
    with Shaped(database, tmp_path, [file_sink("out", [T], transform="many")], [many], schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 4))
        lines = place.came("out", 8)
    assert lines == [
        {"id": 1, "was": "t"},
        *({"id": 3, "part": part} for part in range(3)),
        *({"id": 4, "part": part} for part in range(4)),
    ]


def test_what_a_transform_sees_is_the_message(database: str, tmp_path: Path) -> None:
    seen = python("seen", "transform", "return {'a': action, 'r': record, 'c': changes, 'm': metadata}")
    plain, shaped = file_sink("plain", [T]), file_sink("shaped", [T], transform="seen")
    with Shaped(database, tmp_path, [plain, shaped], [seen], schema=SCHEMA) as place:
        place.sql("alter table t replica identity full")
        place.begin()
        place.sql(rows(1, 3), "update t set n = 7 where id = 2", "delete from t where id = 1")
        expected, lines = place.came("plain", 5), place.came("shaped", 5)
    for message in [*expected, *lines]:
        message.get("metadata", message.get("m")).pop("consumer")  # each sink has its own
    assert lines == [
        {"a": m["action"], "r": m["record"], "c": m["changes"], "m": m["metadata"]} for m in expected
    ]  # fmt: skip


def test_functions_come_from_files_and_modules(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "one.py").write_text(
        "def transform(action, record, changes, metadata):\n    return {'file': record['id']}\n"
    )
    (tmp_path / "shapes" / "packaged.py").write_text(
        "def up(action, record, changes, metadata):\n    return {'m': 1}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shapes"))
    functions: list[Json] = [
        {"name": "of_file", "type": "transform", "file": "shapes/one.py"},
        {"name": "of_module", "type": "transform", "module": "packaged:up"},
    ]
    sinks = [file_sink("a", [T], transform="of_file"), file_sink("b", [T], transform="of_module")]
    with Shaped(database, tmp_path, sinks, functions, schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 1))
        assert place.came("a", 1) == [{"file": 1}]
        assert place.came("b", 1) == [{"m": 1}]


def test_path_and_fields_need_no_code(database: str, tmp_path: Path) -> None:
    functions: list[Json] = [
        {"name": "deep", "type": "path", "path": "record.data.a"},
        {
            "name": "fields", "type": "fields",
            "fields": [{"drop": ["data"]}, {"mask": ["secret"]}, {"rename": {"n": "number"}}, {"set": {"from": "t"}}],
        },
    ]  # fmt: skip
    sinks = [file_sink("deep", [T], transform="deep"), file_sink("fields", [T], transform="fields")]
    with Shaped(database, tmp_path, sinks, functions, schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 2))
        assert place.came("deep", 2) == [{"b": 1}, {"b": 2}]
        lines = place.came("fields", 2)
    for number, line in enumerate(lines, 1):
        record = line.get("record", line)
        assert "secret" not in str(record["secret"])
        assert {**record, "secret": None} == {
            "id": number, "kind": "plain", "number": number * 10, "secret": None, "from": "t",
        }  # fmt: skip


def test_a_column_that_a_function_leaves_out_is_null_also_without_another_large_one(
    database: str, tmp_path: Path
) -> None:
    functions: list[Json] = [{"name": "flat", "type": "fields", "fields": [{"flatten": ["address"]}]}]
    schema = """
        create table t (id int primary key, address jsonb, bio text);
        alter table t alter bio set storage external"""
    with Shaped(database, tmp_path, [sqlite_sink("copy", [T], transform="flat")], functions, schema=schema) as place:
        place.begin()
        place.sql("""insert into t values (1, '{"city": "x", "zip": "1"}', repeat('b', 5000))""")
        place.drained("copy")
        place.sql("""update t set address = '{"city": "y"}'""")
        place.drained("copy")
        with closing(sqlite3.connect(place.folder / "copy.db")) as copy:
            assert copy.execute("select address_city, address_zip, length(bio) from t").fetchall() == [
                ("y", None, 5000)
            ]


# -- routing ----------------------------------------------------------------------------------------------------------
def test_a_webhook_is_routed_by_path_and_method(database: str, tmp_path: Path, recorder: Recorder) -> None:
    code = """
if record["id"] == 3:
    return {}
return {"method": "PUT" if action == "insert" else "DELETE", "endpoint_path": f"/rows/{record['id']}"}
"""
    route = python("route", "routing", code, sink_type="webhook")
    hook = {"type": "webhook", "http_endpoint": "recorder", "http_endpoint_path": "/else", "batch": False}
    sinks = [sink("hook", [T], hook, routing="route", batch_size=10)]
    with Shaped(database, tmp_path, sinks, [route], schema=SCHEMA, endpoint_url=recorder.url) as place:
        place.begin()
        place.sql(rows(1, 3), "delete from t where id = 2")
        place.wait(lambda: len(bodies(recorder.requests_log, "/")) >= 4, "four requests")
        place.drained("hook")
        came = bodies(recorder.requests_log, "/")
    assert sorted((one["method"], one["path"], one["body"] and one["body"]["action"]) for one in came) == [
        ("DELETE", "/rows/2", None), ("POST", "/else", "insert"), ("PUT", "/rows/1", "insert"),
        ("PUT", "/rows/2", "insert"),
    ]  # fmt: skip


def test_documents_go_to_indexes_and_ids_of_their_own(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    base = f"routed-{uuid4().hex}"
    code = f"return {{'index_name': '{base}-' + record['kind'], 'id': 'job-' + str(record['id'])}}"
    route = python("route", "routing", code)
    destination = {"type": "opensearch", "endpoint_url": opensearch.url, "index_name": base}
    with (
        Shaped(database, tmp_path, [sink("s", [T], destination, routing="route")], [route], schema=SCHEMA) as place,
        Index(opensearch.url, f"{base}-plain") as plain,
        Index(opensearch.url, f"{base}-other") as other,
    ):
        place.sql("alter table t replica identity full")
        place.begin()
        place.sql(rows(1, 3), rows(4, 5, "other"), "update t set n = -1 where id = 5", "delete from t where id = 2")
        place.drained("s")
        assert {identity: source["n"] for identity, source in plain.documents()} == {"job-1": 10, "job-3": 30}
        assert {identity: source["n"] for identity, source in other.documents()} == {"job-4": 40, "job-5": -1}
        for index in (plain, other):
            index.delete()


# -- what fails -------------------------------------------------------------------------------------------------------
def test_an_exception_parks_its_message_with_the_traceback(database: str, tmp_path: Path) -> None:
    code = """
def half(value):
    return 1 // (value - 30)
record["half"] = half(record["n"])
return record
"""
    bad = python("bad", "transform", code)
    with Shaped(database, tmp_path, [file_sink("out", [T], transform="bad")], [bad], schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 20), "update t set n = 5 where id in (2, 3)")
        (parked,) = place.parked("out", 1)
        assert parked["reason"] == "transform_failed"
        assert parked["key"].endswith("3")
        assert "ZeroDivisionError" in parked["detail"]
        assert "bad:3 in half: return 1 // (value - 30)" in parked["detail"]
        assert parked["messages"] == 2, "the update waits behind its insert"
        place.wait(lambda: len(place.lines("out")) == 20, "all others to flow")
        came = [(line["id"], line["n"]) for line in place.lines("out")]
    assert sorted(came) == sorted([*((n, n * 10) for n in range(1, 21) if n != 3), (2, 5)])


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("loop", "while True:\n    pass"),
        ("asleep", "import time\ntime.sleep(3600)"),
        ("huge", "return 'x' * (1 << 30)"),
        ("large result", "return ['x' * 1000] * 100_000"),
        ("recursion", "def deeper(n):\n    return deeper(n + 1) + 1\nreturn deeper(0)"),
        ("exit", "import os\nos._exit(3)"),
        ("sysexit", "raise SystemExit(4)"),
        ("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
        ("no json", "return object()"),
        ("prints", "import sys\nprint('{}' * 100)\nsys.stdout.flush()\nraise ValueError('after printing')"),
    ],
)
def test_poison_costs_its_message_alone(database: str, tmp_path: Path, name: str, code: str) -> None:
    poison = python("poison", "transform", f"if record['id'] != 5:\n    return record\n{code}")
    limits = {"timeout_ms": 300, "memory_mb": 64}
    sinks = [file_sink("out", [T], transform="poison", max_message_bytes="1MB")]
    with Shaped(database, tmp_path, sinks, [poison], schema=SCHEMA, function_limits=limits) as place:
        place.begin()
        place.sql(rows(1, 30))
        (parked,) = place.parked("out", 1)
        assert parked["key"].endswith("5"), name
        place.wait(lambda: len(place.lines("out")) == 29, "all others to flow")
        assert [line["id"] for line in place.lines("out")] == [n for n in range(1, 31) if n != 5]
        place.sql(rows(31, 40))
        place.wait(lambda: len(place.lines("out")) == 39, "what comes later to flow")
        assert place.status("out")["parked_keys"] == 1


def test_a_worker_that_is_killed_is_replaced(database: str, tmp_path: Path) -> None:
    same = python("same", "transform", "return record")
    with Shaped(database, tmp_path, [file_sink("out", [T], transform="same")], [same], schema=SCHEMA) as place:
        place.begin()
        place.sql(rows(1, 10))
        place.came("out", 10)
        workers = place.workers()
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        place.sql(rows(11, 20))
        lines = place.came("out", 20)
        assert set(place.workers()).isdisjoint(workers)
        assert place.status("out")["parked_keys"] == 0
    assert [line["id"] for line in lines] == list(range(1, 21))

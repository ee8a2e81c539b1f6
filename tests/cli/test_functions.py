"""`spillway functions` without a database: what is listed, what goes in and what comes out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from spillway.cli import UsageError, main
from spillway.cli.messages import from_file, laid_out

CONFIG = """\
databases:
- {name: app, url: 'postgresql://u:p@127.0.0.1:1/d', slot: {name: s}, publication: {name: p}}
http_endpoints: [{name: hook, url: 'http://h'}]
memory: {limit_mb: 512}
function_limits: {timeout_ms: 300}
functions:
- name: wanted
  description: not the closed ones
  type: filter
  code: |
    def filter(action, record, changes, metadata):
        return action != "delete"
- name: where
  type: routing
  code: |
    def route(action, record, changes, metadata):
        if action == "insert":
            return None
        return {"endpoint_path": f"/{metadata.table_name}", "method": "PUT" if action == "update" else "BREW"}
- {name: slim, type: fields, fields: [{mask: email}, {drop: inserted_at}]}
- {name: row, type: path, path: record.name}
- {name: shape, type: transform, file: shape.py}
- {name: alone, type: transform, file: shape.py}
- {name: installed, type: filter, module: 'rules:open_ones'}
- {name: joined, type: enrichment, code: 'SELECT id FROM t WHERE id = ANY($1)'}
sinks:
- name: hooked
  database: app
  source: {include_tables: [shop.orders]}
  filter: wanted
  routing: where
  transform: shape
  destination: {type: webhook, http_endpoint: hook}
- {name: lines, database: app, transform: slim, filter: installed, destination: {type: stdout}}
- {name: more, database: app, transform: slim, destination: {type: file, path: x}}
- {name: mirror, database: app, transform: row, filter: wanted, destination: {type: sqlite, path: y}}
"""
SHAPE = """\
def transform(action, record, changes, metadata):
    if action == "insert":
        return [{"n": 1}, {"n": metadata["consumer"]["name"]}]
    if action == "update":
        return None
    return record["price"]
"""
MESSAGE = {"record": {"id": 7, "open": True}, "changes": None, "action": "insert", "metadata": {"table_name": "t"}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "shape.py").write_text(SHAPE)
    (tmp_path / "rules.py").write_text("def open_ones(a, record, c, m):\n    return record['open']\n")
    file = tmp_path / "spillway.yml"
    file.write_text(CONFIG)
    return file


def tried(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    with pytest.raises(SystemExit) as ended:
        main(["functions", "test", *arguments, "-c", str(config), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == (1 if any("failed" in one for one in found) else 0)
    return list(found)


def outs(found: list[dict[str, object]]) -> list[object]:
    return [one.get("out", one.get("failed")) for one in found]


PASSES = [{"body": None, "route": None}]


def test_a_filter_says_what_passes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tried(config, capsys, "wanted", "--sink", "hooked")
    assert outs(found) == [PASSES, PASSES, []]
    messages = [one["in"] for one in found]
    assert [m["action"] for m in messages] == ["insert", "update", "delete"]  # type: ignore[index]
    assert {(m["metadata"]["table_schema"], m["metadata"]["table_name"]) for m in messages} == {("shop", "orders")}  # type: ignore[index]
    assert {m["metadata"]["consumer"]["name"] for m in messages} == {"hooked"}  # type: ignore[index]


def test_of_a_sink_that_keeps_rows_deletes_pass_whatever_a_filter_says(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outs(tried(config, capsys, "wanted", "--sink", "mirror")) == [PASSES, PASSES, PASSES]


def test_routes_are_checked_for_the_type_of_the_sink(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = outs(tried(config, capsys, "where"))
    assert first == PASSES
    assert second == [{"body": None, "route": {"endpoint_path": "/orders", "method": "PUT"}}]
    assert third["reason"] == "routing_failed"  # type: ignore[index, call-overload]
    assert "method" in third["detail"]  # type: ignore[index, call-overload]


def test_a_transform_gives_several_none_or_fails(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = outs(tried(config, capsys, "shape"))
    assert first == [{"body": {"n": 1}, "route": None}, {"body": {"n": "hooked"}, "route": None}]
    assert second == []
    assert third["reason"] == "transform_failed"  # type: ignore[index, call-overload]
    assert "KeyError: 'price'" in third["detail"]  # type: ignore[index, call-overload]
    assert "shape.py:6" in third["detail"]  # type: ignore[index, call-overload]


def test_a_function_that_no_sink_uses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outs(tried(config, capsys, "alone"))[0] == [
        {"body": {"n": 1}, "route": None},
        {"body": {"n": "none"}, "route": None},
    ]


def test_operations_and_paths(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = outs(tried(config, capsys, "slim", "--sink", "more"))[0][0]["body"]  # type: ignore[index]
    assert body["record"] == {"id": 1, "name": "Example", "email": "***"}
    assert outs(tried(config, capsys, "row"))[:2] == [[{"body": "Example", "route": None}]] * 2


@pytest.mark.parametrize("form", ["one", "list", "lines", "webhook"])
def test_messages_of_a_file(config: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    closed = {**MESSAGE, "record": {"id": 8, "open": False}}
    file = config.with_name("messages.json")
    text = {
        "one": json.dumps(MESSAGE, indent=2),
        "list": json.dumps([MESSAGE, closed], indent=1),
        "lines": f"{json.dumps(MESSAGE)}\n\n{json.dumps(closed)}\n",
        "webhook": json.dumps({"data": [MESSAGE, closed]}),
    }[form]
    file.write_text(text)
    found = tried(config, capsys, "installed", "--message", str(file))
    assert [one["in"] for one in found] == ([MESSAGE] if form == "one" else [MESSAGE, closed])
    assert outs(found) == ([PASSES] if form == "one" else [PASSES, []])


def test_messages_of_standard_input_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"action":"read","record":{"n":1.10,"big":123456789012345678901234567890}}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert from_file(Path("-")) == [
        b'{"record":{"n":1.10,"big":123456789012345678901234567890},"changes":null,"action":"read","metadata":{}}'
    ]


@pytest.mark.parametrize("lacks", [(), ("changes", "metadata")])
def test_keys_of_a_message_may_be_in_any_order(
    config: Path, capsys: pytest.CaptureFixture[str], lacks: tuple[str, ...]
) -> None:
    row = {"email": "a@b.c", "inserted_at": "2026-01-02", "name": "x"}
    whole = {**MESSAGE, "record": row, "changes": {"email": "b@b.c"}}
    reordered = {key: whole[key] for key in reversed(whole) if key not in lacks}
    file = config.with_name("messages.json")
    file.write_text(json.dumps(reordered))
    slim = {"email": "***", "name": "x"}
    changed = None if lacks else {"email": "***"}
    for name, expected in (("slim", {"record": slim, "changes": changed}), ("row", "x")):
        sink = ["--sink", "lines"] if name == "slim" else []
        ((one,),) = outs(tried(config, capsys, name, *sink, "--message", str(file)))
        body = one["body"]
        assert body == expected if name == "row" else body.items() >= expected.items()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds no message"),
        ("[]", "holds no message"),
        ("{", ":1: is no JSON"),
        ('{"record":{},"action":"insert"}\n{', ":2: is no JSON"),
        ("5", "message 1 has no record"),
        ('{"record":5,"action":"insert"}', "message 1 has no record"),
        ('[{"record":{},"action":"insert"},{"record":{},"action":"upsert"}]', "message 2: its action must be one of"),
        ('{"record":{},"action":"insert","metadata":5}', "changes and metadata must be objects"),
    ],
)
def test_files_that_hold_no_messages(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "m"
    file.write_text(text)
    with pytest.raises(UsageError, match=what):
        from_file(file)
    with pytest.raises(UsageError, match="cannot be read"):
        from_file(tmp_path / "absent")
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        from_file(file)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["wantd"], "there is no function wantd; did you mean wanted?"),
        (["wanted"], "wanted is used by several sinks; name one with --sink: hooked, mirror"),
        (["where", "--sink", "lines"], "sink lines does not use where; those that do: hooked"),
        (["where", "--from-table", "a.b.c"], "--from-table must be a table"),
        (["where", "--from-table", "a", "--message", "b"], "--from-table and --message do not go together"),
        (["joined"], "no sink uses joined; say whose rows it is for with --from-table"),
    ],
)
def test_what_it_cannot_work_with(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    assert main(["functions", "test", *arguments, "-c", str(config)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {what}")


def test_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("where", "shape"):
        with pytest.raises(SystemExit) as ended:
            main(["functions", "test", name, "-c", str(config)])
        assert ended.value.code == 1
    with pytest.raises(SystemExit) as ended:
        main(["functions", "test", "wanted", "--sink", "hooked", "-c", str(config)])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for line in (
        "   route: as the destination says",
        '   route {"endpoint_path":"/orders","method":"PUT"}',
        "   failed: routing_failed: ",
        '   {"n":"hooked"}',
        "   out: nothing is sent",
        "   failed: transform_failed: KeyError: 'price'",
        "   out: passes",
        "   out: left out",
    ):
        assert f"\n{line}" in text


def test_what_is_shown_cannot_drive_a_terminal() -> None:
    assert laid_out(json.dumps({"a": "\x1b[2J\u202e"}, ensure_ascii=False).encode()) == '{"a":"\\u001b[2J\\u202e"}'
    long = json.dumps({"a": ["x" * 60, "y" * 60], "b": {}}).encode()
    assert laid_out(long).splitlines() == [
        "{",
        '  "a": [',
        f'    "{"x" * 60}",',
        f'    "{"y" * 60}"',
        "  ],",
        '  "b": {}',
        "}",
    ]


def test_that_messages_are_made_up_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["functions", "test", "wanted", "--sink", "hooked", "-c", str(config)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the messages are made up, with columns of no table, since ")
    assert line.endswith("try it with rows: --from-table TABLE")


def test_the_list(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["functions", "list", "-c", str(config), "--json"])
    assert ended.value.code == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["wanted"] == {
        "name": "wanted",
        "type": "filter",
        "from": "configuration",
        "sinks": ["hooked", "mirror"],
        "description": "not the closed ones",
    }
    assert [found[name]["from"] for name in ("slim", "row", "shape", "installed")] == [
        *("fields", "record.name", "shape.py", "rules:open_ones"),
    ]
    with pytest.raises(SystemExit):
        main(["functions", "list", "-c", str(config)])
    assert "wanted" in capsys.readouterr().out

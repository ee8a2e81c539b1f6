"""What filter, routing and transform of users mean, with Sequin's signatures."""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import pytest

from functions.messages import bodies, failure, message, outcomes, python, running, transform
from spillway.errors import SpillwayError
from spillway.functions import isolated
from spillway.functions.base import Failure, Output
from spillway.functions.build import build
from spillway.functions.spec import FunctionSpec, PathExpression, PythonFunction

KEEP_EVEN = python("def filter(action, record, changes, metadata):\n    return record['id'] % 2 == 0\n")
BY_TABLE = python("def route(action, record, changes, metadata):\n    return {'index_name': metadata.table_name}\n")


async def test_a_filter_keeps_or_drops() -> None:
    assert await outcomes(FunctionSpec(filter=KEEP_EVEN), message(1), message(2)) == [(), (Output(None),)]


@pytest.mark.parametrize("verdict", ["1", "None", "'true'", "[]"])
async def test_a_filter_must_say_true_or_false(verdict: str) -> None:
    text = f"def filter(action, record, changes, metadata):\n    return {verdict}\n"
    found = await failure(FunctionSpec(filter=python(text)))
    assert found.reason == "filter_failed"
    assert found.detail.startswith("Filter functions must return true or false")


async def test_neither_filter_nor_transform_is_asked_of_a_delete_of_state_but_routing_is() -> None:
    never = python("def transform(action, record, changes, metadata):\n    return 1\n")
    spec = FunctionSpec(filter=KEEP_EVEN, routing=BY_TABLE, transform=never)
    assert await outcomes(spec, message(1), delete=True) == [(Output(None, {"index_name": "jobs"}),)]
    assert await outcomes(FunctionSpec(filter=KEEP_EVEN), message(1), delete=True) == [(Output(None),)]
    path = FunctionSpec(transform=PathExpression("record"))
    assert await outcomes(path, message(1), delete=True) == [(Output(None),)]


async def test_routing_says_where_or_nothing() -> None:
    text = (
        "def route(action, record, changes, metadata):\n    return {'id': record['id']} if record['id'] > 1 else None\n"
    )
    spec = FunctionSpec(routing=python(text))
    assert await outcomes(spec, message(1), message(2)) == [(Output(None),), (Output(None, {"id": 2}),)]


@pytest.mark.parametrize("route", ["['a']", "'a'", "{'a': object()}"])
async def test_a_route_must_be_a_dictionary_of_json(route: str) -> None:
    text = f"def route(action, record, changes, metadata):\n    return {route}\n"
    assert (await failure(FunctionSpec(routing=python(text)))).reason == "routing_failed"


async def test_a_transform_gives_none_one_or_several() -> None:
    spec = transform(
        "return {1: None, 2: {'a': 1}, 3: [1, None, 'x'], 4: [], 5: [[1, 2]], 6: 'text', 7: False}[record['id']]"
    )
    found = await outcomes(spec, *map(message, range(1, 8)))
    assert found == [
        (), (Output(b'{"a":1}'),), (Output(b"1"), Output(b'"x"')), (), (Output(b"[1,2]"),), (Output(b'"text"'),),
        (Output(b"false"),),
    ]  # fmt: skip


async def test_a_transform_routes_messages_of_its_own() -> None:
    spec = transform("return [record, message({'a': 1}, index_name='other', op='update'), message(None)]")
    assert await outcomes(spec, message(1)) == [
        (Output(b'{"id":1}'), Output(b'{"a":1}', {"index_name": "other", "op": "update"}), Output(b"null")),
    ]
    routed = FunctionSpec(routing=BY_TABLE, transform=transform("return [1, message(2, id='x')]").transform)
    assert await outcomes(routed, message(1)) == [
        (Output(b"1", {"index_name": "jobs"}), Output(b"2", {"index_name": "jobs", "id": "x"})),
    ]


async def test_what_functions_see() -> None:
    spec = transform(
        "return [action, record, changes, metadata, metadata.consumer.annotations.team, metadata['commit_lsn']]"
    )
    action, record, changes, metadata, team, lsn = await bodies(spec, message(3, action="update", changes={"a": 1}))
    assert (action, record, changes, team, lsn) == ("update", {"id": 3}, {"a": 1}, "x", 5)
    assert isinstance(metadata, dict)
    assert metadata["table_name"] == "jobs"
    assert (await failure(transform("return metadata.nothing"))).detail.startswith("AttributeError: metadata has no")


async def test_names_of_methods_and_lists_in_metadata() -> None:
    enrichment = {"items": [{"name": 1, "keys": {"get": 4}}, [{"a": 1}], 5], "keys": 1, "values": None, "get": "g"}
    given = orjson.loads(message(1))
    given["metadata"]["enrichment"] = enrichment
    spec = transform(
        """
import copy, pprint
found = metadata.enrichment
assert found.items[0].name == 1 and found.items[0].keys.get == 4 and found.items[1][0].a == 1 and found.items[2] == 5
assert (found.keys, found.values, found.get, found.pop("nothing", 7)) == (1, None, "g", 7)
assert found.items is metadata.enrichment.items is metadata["enrichment"]["items"]
assert metadata.get("nothing", 5) == 5 and "table_name" in metadata.keys() and isinstance(found, dict)
def named(**names): return names
for one in (found, metadata):
    assert dict(one) == {**one} == named(**one) == one | {} == json.loads(json.dumps(one)) == one
    assert json.loads(json.dumps([one], indent=1, sort_keys=True)) == [one] == [copy.deepcopy(one)] == [copy.copy(one)]
    assert pprint.pformat(one)
return [[found, metadata.enrichment, {1: found}]]
"""
    )
    assert await bodies(spec, orjson.dumps(given)) == [[enrichment, enrichment, {"1": enrichment}]]


async def test_each_function_sees_the_message_as_it_came() -> None:
    text = "def filter(action, record, changes, metadata):\n    record.clear()\n    return True\n"
    spec = FunctionSpec(filter=python(text), transform=transform("return record").transform)
    assert await bodies(spec, message(4)) == [{"id": 4}]


async def test_modules_are_there_without_an_import() -> None:
    spec = transform(
        """
digest = hmac.new(b"k", b"v", hashlib.sha256).hexdigest()
return {
    "json": json.dumps(1), "re": bool(re.match("a", "ab")), "day": datetime.date(2024, 1, 2),
    "decimal": decimal.Decimal("1.10"), "digest": len(digest), "base64": base64.b64encode(b"a").decode(),
    "uuid": uuid.UUID(int=1), "math": math.floor(1.5), "url": urllib.parse.quote("a b"), 7: [*map(str, [1])],
    "now": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
}
"""
    )
    assert await bodies(spec, message()) == [
        {
            "json": "1", "re": True, "day": "2024-01-02", "decimal": "1.10", "digest": 64, "base64": "YQ==",
            "uuid": "00000000-0000-0000-0000-000000000001", "math": 1, "url": "a%20b", "7": ["1"],
            "now": "2024-01-02T00:00:00Z",
        }
    ]  # fmt: skip


async def test_a_module_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "my_shapes.py").write_text(
        "from spillway.functions.message import message\n"
        "class Shapes:\n"
        "    @staticmethod\n"
        "    def job(action, record, changes, metadata):\n"
        "        return message({'id': record['id']}, id='7')\n"
    )
    function = PythonFunction("job", "spillway.yaml", module="my_shapes:Shapes.job")
    spec = FunctionSpec(transform=function, search_path=(str(tmp_path),))
    assert await outcomes(spec, message(1)) == [(Output(b'{"id":1}', {"id": "7"}),)]


async def test_modules_are_found_where_this_process_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found_there.py").write_text("def job(action, record, changes, metadata):\n    return 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert await bodies(FunctionSpec(transform=PythonFunction("job", "f", module="found_there:job")), message()) == [1]


async def test_an_exception_is_shown_with_the_users_lines_alone() -> None:
    text = (
        "def inner(x):\n    return 1 // x\n\ndef transform(action, record, changes, metadata):\n    return inner(0)\n"
    )
    found = await failure(FunctionSpec(transform=python(text, "shapes")))
    assert found == Failure(
        "transform_failed",
        "ZeroDivisionError: integer division or modulo by zero\n"
        "  shapes.py:2 in inner: return 1 // x\n"
        "  shapes.py:5 in transform: return inner(0)",
    )


async def test_a_failure_is_short() -> None:
    for body in ("raise ValueError('x' * 100_000)", "transform(action, record, changes, metadata)"):
        found = await failure(transform(body))
        assert found.reason == "transform_failed"
        assert "mine.py:2 in transform" in found.detail
        assert len(found.detail) <= 1000


async def test_an_exception_whose_text_fails() -> None:
    found = await failure(transform("class E(Exception):\n    def __str__(self):\n        return 1 // 0\nraise E"))
    assert found.detail.startswith("E (its text raised ZeroDivisionError)")


async def test_what_is_printed_is_shown_with_the_failure() -> None:
    found = await failure(transform("print('seen', record)\nraise ValueError"))
    assert found.detail.endswith("printed: seen {'id': 1}\n")


@pytest.mark.parametrize("value", ["object()", "{1, 2}", "b'x'", "(x for x in [])", "[{'a': message(1)}]"])
async def test_a_result_that_is_no_json(value: str) -> None:
    found = await failure(transform(f"return {value}"))
    assert found.reason == "transform_failed"
    assert "is no JSON" in found.detail


async def test_the_limit_of_a_result() -> None:
    spec = transform("return 'x' * record['id']", result_bytes=1000)
    fits, large = await outcomes(spec, message(700), message(800))
    assert isinstance(fits, tuple)
    assert large == Failure("result_too_large", "the result has 802 bytes, the limit of the sink is 1000")
    many = await failure(transform("return [1] * 1000", result_bytes=100_000))
    assert many.reason == "result_too_large"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def transform(action, record)\n", "SyntaxError"),
        (
            "def transform(action, record):\n    return 1\n",
            "it must be def transform(action, record, changes, metadata)",
        ),
        ("def route(action, record, changes, metadata):\n    return 1\n", "does not define transform"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("import os\nos._exit(3)\n", "its process has ended with exit status 3"),
        ("async def transform(action, record, changes, metadata):\n    return 1\n", "no async, no yield"),
        ("def transform(action, record, changes, metadata):\n    yield 1\n", "no async, no yield"),
    ],
)
async def test_code_that_cannot_be_loaded(text: str, what: str) -> None:
    async with running(FunctionSpec(transform=python(text))) as functions:
        with pytest.raises(SpillwayError) as caught:
            await functions.open()
        assert caught.value.code == "function_not_loaded"
        assert "the function mine cannot be loaded" in caught.value.what
        assert what in caught.value.what
        assert caught.value.remedy == "mend it in mine.py"
        with pytest.raises(SpillwayError):  # the sink is down, call by call
            await functions([message()], [False])


@pytest.mark.parametrize("module", ["no_such_module:f", "json:no_such_function"])
async def test_a_module_that_cannot_be_loaded(module: str) -> None:
    async with running(FunctionSpec(filter=PythonFunction("mine", "f", module=module))) as functions:
        with pytest.raises(SpillwayError, match="no_such"):
            await functions.open()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("record", {"id": 1, "a": {"b": {"c": 2}}, "list": [1]}), ("record.a.b", {"c": 2}), ("record.a.b.c", 2),
        ("record.list.0", None), ("record.nothing.x", None), ("action", "update"), ("changes.id", 0),
        ("metadata.consumer.name", "search"), ("record.a.", None),
    ],
)  # fmt: skip
async def test_a_path(path: str, expected: object) -> None:
    one = message(1, action="update", changes={"id": 0}, a={"b": {"c": 2}}, list=[1])
    spec = FunctionSpec(transform=PathExpression(path))
    (outcome,) = await outcomes(spec, one)
    assert not isinstance(outcome, Failure)
    assert outcome[0].body is not None
    assert await bodies(spec, one) == [expected]
    # the same in a worker, beside a Python function
    beside = FunctionSpec(filter=python("def filter(*_):\n    return True\n"), transform=PathExpression(path))
    assert await outcomes(beside, one) == [outcome]


@pytest.mark.parametrize("path", ["", "body", "record[0]", "record.a b", "recordx", "record." + "a" * 2000])
def test_what_is_no_path(path: str) -> None:
    with pytest.raises(SpillwayError, match="is no path"):
        build(FunctionSpec(transform=PathExpression(path)))


@pytest.mark.parametrize("text", ["def filter(*_):\n    return True\n", None])
async def test_answers_stop_when_their_bytes_are_reached(text: str | None) -> None:
    spec = FunctionSpec(filter=python(text) if text else None, transform=PathExpression("record"))
    messages = [message(n, text="x" * 1000) for n in range(3000)]
    async with running(spec) as functions:
        some = await functions(messages, [False] * 3000, 50_000)
        assert 50 <= len(some) <= 52
        assert len(await functions(messages, [False] * 3000, 1)) == 1
        assert len(await functions(messages[50:], [False] * 2950)) == 2950
        large = await functions(messages, [False] * 3000, 2_000_000)
        assert 1900 < len(large) < 2000


async def test_slow_functions_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "ANSWER_SECONDS", 0.3)
    spec = transform("import time\ntime.sleep(0.1)\nreturn 1")
    messages = [message(n) for n in range(10)]
    async with running(spec) as functions:
        some = await functions(messages, [False] * 10, 1 << 20)
        assert 2 <= len(some) <= 4
        assert len(await functions(messages, [False] * 10)) == 10  # for who takes no parts


async def test_no_messages() -> None:
    assert await outcomes(transform("return 1")) == []
    assert await outcomes(FunctionSpec()) == []

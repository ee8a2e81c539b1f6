"""The search sink: its requests byte for byte, and answers that a healthy server does not give."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from sinks.messages import SUFFIX, batch_of, change, context, scattered
from sinks.recorder import CUT, HANG, Recorder, Reply, Request
from spillway.change import ACTIONS
from spillway.chunk import MOVED, OLD, WHOLE, Batch, ChunkBuilder, Keying, Span
from spillway.errors import SpillwayError
from spillway.position import version
from spillway.sinks.base import OK, Result
from spillway.sinks.search import SearchSink

ALL_OK = b'{"errors":false,"items":[]}'


class Server:
    """Has the index; answers bulk requests as told."""

    def __init__(self) -> None:
        self.bulk = Reply(200, ALL_OK)
        self.head = Reply(200)
        self.put = Reply(200)
        self.recorder = Recorder(self._answer)

    def _answer(self, request: Request) -> Reply:
        return {"HEAD": self.head, "PUT": self.put}.get(request.method, self.bulk)

    @property
    def bulks(self) -> list[Request]:
        return [one for one in self.recorder.requests if one.method == "POST"]


Make = Callable[..., SearchSink]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    async with server.recorder:
        yield server


@pytest.fixture
async def make(server: Server, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[SearchSink] = []

    def make(**options: Any) -> SearchSink:
        arguments = {"endpoint_url": server.recorder.url, "index_name": "jobs", "document": "record", **options}
        made.append(SearchSink(context(tmp_path, epoch=arguments.pop("epoch", 1)), **arguments))
        return made[-1]

    yield make
    for sink in made:
        await sink.close()


def answer(*items: dict[str, Any]) -> Reply:
    return Reply(200, orjson.dumps({"errors": True, "items": items}))


def error(kind: str, status: int, identity: str = "1", reason: str = "because", **more: Any) -> dict[str, Any]:
    return {"index": {"_id": identity, "status": status, "error": {"type": kind, "reason": reason, **more}}}


async def results_of(sink: SearchSink, count: int = 1) -> Sequence[Result] | Result:
    return await sink.send(batch_of([change({"v": i}, pks=(str(i),)) for i in range(1, count + 1)]))


async def test_a_bulk_request_byte_for_byte(server: Server, make: Make) -> None:
    batch = [
        change('{"a": 1.50}', lsn=0x2000, n=3),
        change("{}", action="delete", pks=('a"b',), lsn=0x4000),
        change({"a": "é"}, action="read", pks=("3",), n=0),
    ]
    assert await make(epoch=2).send(batch_of(batch)) == OK
    (request,) = server.bulks
    versions = [version(2, m.commit_lsn, m.n) for m in batch]
    assert request.target.startswith("/jobs/_bulk?filter_path=errors")
    assert request.headers["content-type"] == "application/x-ndjson"
    assert request.body.decode() == (
        f'{{"index":{{"_id":"1","version":{versions[0]},"version_type":"external_gte"}}}}\n'
        '{"a": 1.50}\n'
        f'{{"delete":{{"_id":"a\\"b","version":{versions[1]},"version_type":"external_gte"}}}}\n'
        f'{{"index":{{"_id":"3","version":{versions[2]},"version_type":"external_gte"}}}}\n'
        '{"a":"é"}\n'
    )


async def test_the_document_may_be_the_message(server: Server, make: Make) -> None:
    sent = change({"v": 1})
    await make(document="message").send(batch_of([sent]))
    assert server.bulks[0].body.split(b"\n")[1] == sent.body + SUFFIX


@pytest.mark.parametrize(
    ("auth_type", "value", "header"),
    [
        ("api_key", "abc=", "ApiKey abc="),
        ("basic", "elastic:pässword", "Basic ZWxhc3RpYzpww6Rzc3dvcmQ="),
        ("bearer", "t0k", "Bearer t0k"),
    ],
)
async def test_authorization(server: Server, make: Make, auth_type: str, value: str, header: str) -> None:
    await make(auth_type=auth_type, auth_value=value).send(batch_of([change({})]))
    assert {one.headers["authorization"] for one in server.recorder.requests} == {header}


@pytest.mark.parametrize("value", ["t0k\n", " t0k", "t\0k", "tök"])
def test_a_token_that_no_header_may_hold_is_refused_and_not_told(make: Make, value: str) -> None:
    with pytest.raises(SpillwayError) as raised:
        make(auth_type="bearer", auth_value=value)
    assert raised.value.code == "auth_value"
    assert "t0k" not in str(raised.value)


async def test_a_path_before_the_index_is_kept_and_names_are_escaped(server: Server, make: Make) -> None:
    await make(endpoint_url=f"{server.recorder.url}/es/", index_name="a+b é").send(batch_of([change({})]))
    assert [one.target.split("?")[0] for one in server.recorder.requests] == [
        "/es/a%2Bb%20%C3%A9",
        "/es/a%2Bb%20%C3%A9/_bulk",
    ]


async def test_results_are_matched_by_position_and_id(server: Server, make: Make) -> None:
    ok = {"index": {"_id": "2", "status": 201}}
    server.bulk = answer(error("mapper_parsing_exception", 400), ok, error("x", 400, "somebody else"))
    results = await results_of(make(), 3)
    assert isinstance(results, list)
    assert [(r.outcome, r.reason) for r in results] == [
        ("reject", "mapper_parsing_exception"),
        ("ok", ""),
        ("retry", "answer_mismatch"),
    ]


@pytest.mark.parametrize(
    ("item", "outcome", "reason"),
    [
        (error("strict_dynamic_mapping_exception", 400), "reject", "strict_dynamic_mapping_exception"),
        (error("document_parsing_exception", 400), "reject", "document_parsing_exception"),
        (error("document_missing_exception", 404), "reject", "document_missing_exception"),
        (error("es_rejected_execution_exception", 429), "retry", "es_rejected_execution_exception"),
        (error("unavailable_shards_exception", 503), "retry", "unavailable_shards_exception"),
        (error("some_exception", 500), "retry", "some_exception"),
        (error("cluster_block_exception", 429), "sink_down", "cluster_block_exception"),
        (error("security_exception", 403), "sink_down", "security_exception"),
        (error("version_conflict_engine_exception", 409), "sink_down", "foreign_versions"),
        ({"index": {"_id": "1", "status": 400, "error": "in words"}}, "reject", "http_400"),
        ({"index": {"_id": "1", "status": 404}}, "reject", "http_404"),
        ({"delete": {"_id": "1", "status": 200}}, "ok", ""),
    ],
)
async def test_failures_of_an_item(server: Server, make: Make, item: dict[str, Any], outcome: str, reason: str) -> None:
    server.bulk = answer(item)
    result = await results_of(make())
    if not isinstance(result, Result):
        (result,) = result
    assert (result.outcome, result.reason) == (outcome, reason)


async def test_delete_of_what_is_missing_beside_a_failure(server: Server, make: Make) -> None:
    server.bulk = answer({"delete": {"_id": "1", "status": 404}}, error("x", 400, "2"))
    results = await make().send(batch_of([change({}, action="delete"), change({}, pks=("2",))]))
    assert [r.outcome for r in results] == ["ok", "reject"]


async def test_the_cause_of_a_mapping_error_is_told(server: Server, make: Make) -> None:
    server.bulk = answer(error("mapper_parsing_exception", 400, caused_by={"reason": "not a number"}))
    (result,) = await make().send(batch_of([change({})]))
    assert result.detail == "because: not a number"


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (400, "reject", "http_400"),
        (413, "reject", "http_413"),
        (401, "sink_down", "http_401"),
        (403, "sink_down", "http_403"),
        (404, "sink_down", "http_404"),
        (429, "sink_down", "http_429"),
        (500, "sink_down", "http_500"),
        (503, "sink_down", "http_503"),
        (302, "sink_down", "http_302"),
    ],
)
async def test_answers_that_concern_the_whole(
    server: Server, make: Make, status: int, outcome: str, reason: str
) -> None:
    server.bulk = Reply(status, b"", {"retry-after": "7"})
    result = await results_of(make(), 3)
    assert isinstance(result, Result)
    assert (result.outcome, result.reason) == (outcome, reason)
    assert result.retry_after_seconds == (7.0 if outcome == "sink_down" else None)


async def test_the_reason_of_a_whole_rejection_is_the_servers(server: Server, make: Make) -> None:
    server.bulk = Reply(400, b'{"error":{"type":"illegal_argument_exception","reason":"no"},"status":400}')
    result = await results_of(make())
    assert isinstance(result, Result)
    assert (result.reason, result.detail) == ("illegal_argument_exception", "no")


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b"[]", b'{"errors":true,"items":[]}', b'{"errors":true,"items":7}']
)
async def test_a_200_that_is_no_answer_to_a_bulk_request(server: Server, make: Make, body: bytes) -> None:
    server.bulk = Reply(200, body)
    result = await results_of(make())
    assert isinstance(result, Result)
    assert (result.outcome, result.reason) == ("sink_down", "bad_answer")


async def test_an_answer_without_end_is_not_read_to_its_end(server: Server, make: Make) -> None:
    server.bulk = Reply(200, b'{"errors":true,' + b" " * (1 << 20))
    result = await results_of(make())
    assert isinstance(result, Result)
    assert (result.outcome, result.reason) == ("reject", "answer_too_large")


async def test_no_answer(server: Server, make: Make) -> None:
    sink = make(timeout_seconds=0.2)
    await sink.open()
    for reply, reason in ((CUT, "connection_cut"), (HANG, "timeout")):
        server.bulk = reply
        result = await results_of(sink)
        assert isinstance(result, Result)
        assert (result.outcome, result.reason) == ("sink_down", reason)
    await server.recorder.stop()
    result = await results_of(sink)
    assert isinstance(result, Result)
    assert (result.outcome, result.reason) == ("sink_down", "connection_refused")
    await server.recorder.start()


@pytest.mark.parametrize("put", [200, 403])
async def test_an_index_is_created_before_the_first_message(server: Server, make: Make, put: int) -> None:
    """Also if the server was down at `open`; without the right to create one the bulk request shall tell."""
    sink = make()
    await server.recorder.stop()
    await sink.open()
    await server.recorder.start()
    server.head, server.put = Reply(404), Reply(put)
    assert await results_of(sink) == OK
    assert await results_of(sink) == OK
    assert [one.method for one in server.recorder.requests] == ["HEAD", "PUT", "POST", "POST"]
    assert json.loads(server.recorder.requests[1].body) == {"settings": {"index.gc_deletes": "3600s"}}


async def test_an_index_is_created_as_the_file_says(server: Server, make: Make, tmp_path: Path) -> None:
    definition = {"mappings": {"dynamic": "strict"}, "settings": {"index": {"number_of_shards": 2}}}
    (tmp_path / "jobs.json").write_text(json.dumps(definition))
    server.head = Reply(404)
    assert await results_of(make(mapping=Path("jobs.json"))) == OK
    (created,) = [json.loads(one.body) for one in server.recorder.requests if one.method == "PUT"]
    settings = {"index": {"number_of_shards": 2}, "index.gc_deletes": "3600s"}
    assert created == {"mappings": {"dynamic": "strict"}, "settings": settings}


async def test_a_definition_that_is_none_is_known_at_the_start(make: Make, tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text('{"aliases": {}}')
    with pytest.raises(SpillwayError, match="it has aliases") as raised:
        await make(mapping=Path("jobs.json")).open()
    assert raised.value.code == "mapping_file"


@pytest.mark.parametrize("started_lsn", [0, 0x2000, 0x2001])
async def test_no_version_of_a_page_is_foreign(server: Server, tmp_path: Path, started_lsn: int) -> None:
    """Not even of one that stands right before the position at which the sink began."""
    own = version(3, max(started_lsn - 1, 0), 0)
    server.bulk = answer(error("version_conflict_engine_exception", 409, reason=f"current version [{own}] is higher"))
    given = replace(context(tmp_path, epoch=3), started_lsn=started_lsn)
    sink = SearchSink(given, endpoint_url=server.recorder.url, index_name="jobs", document="record")
    assert await results_of(sink) in (OK, [OK])
    server.bulk = answer(
        error("version_conflict_engine_exception", 409, reason=f"current version [{own - 1}] is higher")
    )
    assert (await results_of(sink))[0].reason == "foreign_versions"
    await sink.close()


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply(403, b'{"error":{"type":"security_exception","reason":"no permissions for s3cret"}}'), "sink_refused"),
        (Reply(503), "sink_unreachable"),
        (Reply(429), "sink_unreachable"),
        (CUT, "sink_unreachable"),
    ],
)
async def test_keys_that_cannot_be_read(server: Server, make: Make, reply: Reply, code: str) -> None:
    server.bulk = reply
    sink = make(auth_type="bearer", auth_value="s3cret")
    for after in (None, "jobs/1/0/7/9/other"):
        with pytest.raises(SpillwayError) as raised:
            await sink.keys(("public", "jobs"), ["id"], after, 10, None)
        assert raised.value.code == code
        assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("put", "outcome", "reason"),
    [
        (Reply(400, b'{"error":{"type":"resource_already_exists_exception"}}'), "ok", ""),
        (Reply(400, b'{"error":{"type":"other","reason":"no such setting"}}'), "sink_down", "index_not_created"),
        (Reply(503), "sink_down", "http_503"),
    ],
)
async def test_when_the_index_cannot_be_created(
    server: Server, make: Make, put: Reply, outcome: str, reason: str
) -> None:
    server.head, server.put = Reply(404), put
    result = await results_of(make())
    first = result if isinstance(result, Result) else result[0]
    assert (first.outcome, first.reason) == (outcome, reason)


async def test_what_cannot_be_a_document_is_rejected_without_a_request(server: Server, make: Make) -> None:
    batch = [
        change({}, pks=()),
        change({}, whole=False, action="update"),
        change({}, action="truncate"),
        change({"id": 1}, too_large_bytes=1 << 30),
        change({"v": 1}),
        change({}, whole=False, action="delete", pks=("2",)),
    ]
    sink = make()
    results = await sink.send(batch_of(batch))
    assert [r.reason for r in results] == ["no_primary_key", "unchanged_toast", "truncate", "too_large", "", ""]
    assert "REPLICA IDENTITY FULL" in results[1].detail
    assert server.bulks[0].body.count(b"\n") == 3
    assert [r.outcome for r in await sink.send(batch_of(batch[:1]))] == ["reject"]
    assert len(server.bulks) == 1


async def test_a_change_of_the_key_is_a_delete_and_an_index(server: Server, make: Make) -> None:
    builder = ChunkBuilder()
    old, new = change({"id": 1}, action="delete"), change({"id": 2}, action="update", pks=("2",))
    key, was = (b"public.jobs:%d" % number for number in (2, 1))
    table = ("public", "jobs")
    delete, update = ACTIONS.index("delete"), ACTIONS.index("update")
    builder.add(table, delete, 64, 0, 0, old.body, old.record_bytes, (was, b""), flags=WHOLE | OLD)
    builder.add(table, update, 64, 0, 0, new.body, new.record_bytes, (key, was), flags=WHOLE | MOVED)
    assert await make().send(Batch([(Span(builder.take(), Keying.STATE), 0, 2)])) == OK
    lines = [json.loads(line) for line in server.bulks[0].body.splitlines()]
    assert [list(line) for line in lines] == [["delete"], ["index"], ["id"]]
    assert [line[kind]["_id"] for line, kind in zip(lines, ("delete", "index"), strict=False)] == ["1", "2"]


async def test_failures_of_pieces_are_matched_to_their_messages(server: Server, make: Make) -> None:
    changes = [change({"v": i}, pks=(str(i),)) for i in range(9)]
    changes[4] = change({}, pks=())
    sent = [i for i in range(9) if i != 4]
    failed = {0: "a", 3: "b", 8: "c"}
    server.bulk = answer(
        *[error(failed[i], 400, str(i)) if i in failed else {"index": {"_id": str(i), "status": 200}} for i in sent]
    )
    results = await make().send(scattered(changes))
    assert isinstance(results, list)
    assert {place: r.reason for place, r in enumerate(results) if r != OK} == failed | {4: "no_primary_key"}
    assert [json.loads(line)["v"] for line in server.bulks[0].body.splitlines()[1::2]] == sent


@pytest.mark.parametrize("bad", [{"pks": ()}, {"action": "truncate"}, {"whole": False, "action": "update"}])
async def test_one_that_is_unfit_is_found_wherever_it_is(server: Server, make: Make, bad: dict[str, Any]) -> None:
    for place in range(6):
        changes = [change({"v": i}, pks=(str(i),)) for i in range(6)]
        changes[place] = change({}, **bad)
        for batch in (batch_of(changes), scattered(changes)):
            results = await make().send(batch)
            assert isinstance(results, list)
            assert [r.outcome for r in results] == ["reject" if i == place else "ok" for i in range(6)]


async def test_a_partial_document_where_that_is_wanted(server: Server, make: Make) -> None:
    assert await make(toast="omit").send(batch_of([change({"v": 1}, whole=False, action="update")])) == OK


async def test_secrets_are_not_repeated(server: Server, make: Make) -> None:
    server.bulk = Reply(401, b"who is s3cret?")
    result = await results_of(make(auth_type="bearer", auth_value="s3cret"))
    assert isinstance(result, Result)
    assert result.detail == "HTTP 401 who is ***?"


async def test_several_requests_at_once_share_the_connections(server: Server, make: Make) -> None:
    sink = make()
    await sink.open()
    for _ in range(3):
        await asyncio.gather(*(results_of(sink) for _ in range(sink.max_in_flight)))
    assert server.recorder.connections <= sink.max_in_flight

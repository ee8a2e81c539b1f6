"""The routes, through the whole application, and one real uvicorn."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from fake_engine import EMPTY, SINK, FakeEngine

from spillway.api.app import create_app
from spillway.api.serve import bind, serve
from spillway.config import BackfillOrder, ReindexOrder, TableName
from spillway.errors import SpillwayError
from spillway.store.base import Select

TOKEN = "wagon-of-salt"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
LOOPBACK = "http://127.0.0.1:7376"


def client_of(engine: FakeEngine, token: str | None = TOKEN, base: str = LOOPBACK, **more: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(engine, engine.metrics, token), raise_app_exceptions=False)
    headers = AUTHORIZED if token else {}
    return httpx.AsyncClient(transport=transport, base_url=base, headers={**headers, **more})


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine) as client:
        yield client


# -- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_health_ready_and_metrics_need_no_token(engine: FakeEngine, path: str) -> None:
    async with client_of(engine) as client:
        assert (await client.get(path, headers={"Authorization": ""})).status_code == 200


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/status", "/api/sinks/x/backlog", "/api/no/such/path"])
@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer \xe4"])
async def test_everything_under_api_answers_401_without_the_token(engine: FakeEngine, path: str, given: str) -> None:
    async with client_of(engine) as client:
        answer = await client.get(path, headers={"Authorization": given.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.json()["code"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("token", [None, ""])
async def test_without_a_configured_token_api_is_open_on_loopback_only(engine: FakeEngine, token: str | None) -> None:
    async with client_of(engine, token) as client:
        assert (await client.get("/api/status")).status_code == 200
    async with client_of(engine, token, base="http://10.0.0.7:7376") as client:
        for given in ("", "Bearer", "Bearer "):
            assert (await client.get("/api/status", headers={"Authorization": given})).status_code == 401
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7376", "10.0.0.7", "127.0.0.1.evil.example", "[::", ""])
async def test_a_foreign_host_is_refused_on_loopback(client: httpx.AsyncClient, host: str) -> None:
    for path in ("/api/status", "/metrics"):
        answer = await client.get(path, headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host")


@pytest.mark.parametrize("host", ["127.0.0.1:7376", "localhost:7376", "LOCALHOST", "[::1]:7376", "127.8.9.10"])
async def test_loopback_names_are_accepted(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/api/status", headers={"Host": host})).status_code == 200


async def test_elsewhere_any_host_will_do(engine: FakeEngine) -> None:
    async with client_of(engine, base="http://10.0.0.7:7376") as client:
        assert (await client.get("/api/status", headers={"Host": "spillway.internal"})).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999"])
async def test_a_page_of_another_origin_changes_nothing(engine: FakeEngine, origin: str) -> None:
    async with client_of(engine, token=None) as client:
        answer = await client.post(f"/api/sinks/{SINK}/pause", headers={"Origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
        assert not engine.paused
        own = await client.post(f"/api/sinks/{SINK}/pause", headers={"Origin": LOOPBACK})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize("path", ["pause", "resume", "backlog/retry", "backlog/discard", "dead-letters/discard"])
async def test_what_changes_state_is_post_only(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    answer = await client.get(f"/api/sinks/{SINK}/{path}")
    assert answer.status_code == 405
    assert answer.json()["code"] == "http_405"
    assert not engine.calls


# -- what is answered ----------------------------------------------------------------------------------------------


async def test_ready_follows_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}
    engine.is_ready = (False, "jobs_sink holds the slot")
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "reason": "jobs_sink holds the slot"})
    assert (await client.get("/health")).status_code == 200


async def test_status_and_metrics(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/api/status")).json() == engine.status()
    engine.metrics.delivered(SINK, 7)
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'spillway_messages_delivered_total{sink="jobs_sink"} 7.0' in answer.text
    assert 'spillway_sink_state{sink="jobs_sink",state="parked"} 1.0' in answer.text


async def test_pause_and_resume(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.post(f"/api/sinks/{SINK}/pause")).json() == {"sink": SINK, "paused": True}
    assert engine.paused == {SINK: True}
    assert (await client.post(f"/api/sinks/{SINK}/resume")).json() == {"sink": SINK, "paused": False}
    assert engine.paused == {SINK: False}


@pytest.mark.parametrize("pile", ["backlog", "dead-letters"])
async def test_lists_come_in_pages(pile: str) -> None:
    engine = FakeEngine(keys=7)
    seen: list[str] = []
    async with client_of(engine) as client:
        after: str | None = None
        while True:
            params = {"limit": "3"} if after is None else {"limit": "3", "after": after}
            answer = (await client.get(f"/api/sinks/{SINK}/{pile}", params=params)).json()
            seen += [item["key"] for item in answer["items"]]
            after = answer["after"]
            if after is None:
                break
    assert seen == [f"public.jobs:{n:05d}" for n in range(7)]
    assert engine.pages == 3


async def test_an_item_of_a_list(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/api/sinks/{SINK}/backlog", params={"reason": "http_422"})
    assert answer.json()["items"] == [
        {
            "sink": SINK,
            "key": "public.jobs:00001",
            "reason": "http_422",
            "detail": "backlog [detail]",
            "attempts": 1,
            "first_seen": "2025-10-09T08:53:20.250+00:00",
            "bytes": 101,
            "messages": 2,
        }
    ]
    assert (await client.get(f"/api/sinks/{EMPTY}/backlog")).json() == {"items": [], "after": None}


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "", "²", "9" * 5000])
async def test_a_wrong_limit_is_refused(client: httpx.AsyncClient, limit: str) -> None:
    answer = await client.get(f"/api/sinks/{SINK}/backlog", params={"limit": limit})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


async def test_show(client: httpx.AsyncClient) -> None:
    path = f"/api/sinks/{SINK}/dead-letters/messages"
    one = await client.get(path, params={"key": "public.jobs:00001"})
    assert one.text == '{"record":{"id":"public.jobs:00001","n":0},"action":"insert"}\n'
    both = await client.get(path, params={"key": "public.jobs:00001", "limit": "10"})
    assert len(both.text.splitlines()) == 2
    assert (await client.get(path, params={"key": "nothing"})).content == b""
    assert (await client.get(path)).status_code == 400


@pytest.mark.parametrize(
    ("body", "select", "count"),
    [
        ({"all": True}, Select(all=True), 3),
        ({"key": "public.jobs:00001"}, Select(key="public.jobs:00001"), 1),
        ({"reason": "mapping"}, Select(reason="mapping"), 2),
    ],
)
@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("backlog/retry", "retry"),
        ("backlog/discard", "discard"),
        ("dead-letters/retry", "retry_dead"),
        ("dead-letters/discard", "discard_dead"),
    ],
)
async def test_retry_and_discard(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, call: str, body: object, select: Select, count: int
) -> None:
    answer = await client.post(f"/api/sinks/{SINK}/{path}", json=body)
    assert answer.json() == {"count": count}
    assert engine.calls == [(call, SINK, select)]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"{}", b"[]", b'{"all":false}', b'{"all":1}', b'{"key":1}', b'{"x":"y"}'),
        b'{"key":"a","all":true}',
        b'{"key":"' + b"k" * 70_000 + b'"}',
    ],
)
async def test_an_unclear_selection_does_nothing(client: httpx.AsyncClient, engine: FakeEngine, body: bytes) -> None:
    answer = await client.post(f"/api/sinks/{SINK}/backlog/discard", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert not engine.calls


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "pause"),
        ("GET", "backlog"),
        ("GET", "backlog/messages?key=k"),
        ("GET", "dead-letters"),
        ("GET", "dead-letters/export"),
    ],
)
async def test_an_unknown_sink_is_404(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, f"/api/sinks/nobody/{path}")
    assert answer.status_code == 404
    assert answer.json() == {
        "code": "unknown_sink",
        "error": "there is no sink nobody",
        "remedy": "choose jobs_sink or empty_sink",
    }


async def test_unknown_paths_and_defects_are_json_too(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_of(engine) as client:
        assert (await client.get("/nothing")).json()["code"] == "http_404"

        def fail() -> None:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(engine, "status", fail)
        answer = await client.get("/api/status")
    assert (answer.status_code, answer.json()["code"]) == (500, "defect")
    assert "secret detail" not in answer.text


async def test_export_streams_lines(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.get(f"/api/sinks/{SINK}/dead-letters/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert len(answer.text.splitlines()) == 3
    assert answer.text.endswith("}\n")
    one = await client.get(f"/api/sinks/{SINK}/dead-letters/export", params={"key": "public.jobs:00002"})
    assert len(one.text.splitlines()) == 1
    assert (await client.get(f"/api/sinks/{EMPTY}/dead-letters/export")).content == b""
    assert [call[2] for call in engine.calls] == [Select(all=True), Select(key="public.jobs:00002"), Select(all=True)]


# -- backfills -----------------------------------------------------------------------------------------------------

BACKFILLS = f"/api/sinks/{SINK}/backfills"


@pytest.mark.parametrize(
    ("body", "tables"), [(b"", ()), (b"{}", ()), (b'{"table": "jobs"}', (TableName("public", "jobs"),))]
)
async def test_a_backfill_of_one_table_is_answered_as_sequin_does(
    client: httpx.AsyncClient, engine: FakeEngine, body: bytes, tables: tuple[TableName, ...]
) -> None:
    answer = await client.post(BACKFILLS, content=body)
    assert answer.status_code == 201
    assert answer.json() == {**engine.started[-1], "sink_consumer": SINK}
    assert {
        *("id", "state", "table", "sink_consumer", "rows_initial_count", "rows_processed_count", "rows_ingested_count"),
        *("sort_column", "inserted_at", "updated_at", "canceled_at", "completed_at"),
    } <= answer.json().keys(), "the fields of Sequin"
    assert engine.orders == [(SINK, BackfillOrder(tables=tables))]


async def test_a_backfill_of_several_tables(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.post(BACKFILLS, json={"tables": ["jobs", "users"], "parallel": 4})
    assert [item["table"] for item in answer.json()["data"]] == ["public.jobs", "public.users"]
    assert (await client.post(BACKFILLS, json={"tables": ["jobs"]})).json()["data"][0]["table"] == "public.jobs"
    jobs, users = TableName("public", "jobs"), TableName("public", "users")
    assert engine.orders[0] == (SINK, BackfillOrder(tables=(jobs, users), parallel=4))


async def test_replay(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    path = f"/api/sinks/{SINK}/replay"
    answer = await client.post(path, json={"table": "jobs", "keys": ["public.jobs:1", 2]})
    assert (answer.status_code, answer.json()["origin"]) == (201, "replay")
    ((_, order),) = engine.orders
    assert order == BackfillOrder(tables=(TableName("public", "jobs"),), keys=(("1",), ("2",)), replay=True)
    refused = await client.post(path, json={"table": "jobs"})
    assert (refused.status_code, refused.json()["code"]) == (400, "bad_request")
    assert refused.json()["error"].startswith("replay: say which rows")


@pytest.mark.parametrize("body", [b"[]", b"5", b"{", b'{"tabel": "jobs"}', b'{"table": "a.b.c"}', b" " * 1_100_000])
@pytest.mark.parametrize("path", ["backfills", "replay", "reindex"])
async def test_a_wrong_order_starts_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: bytes
) -> None:
    answer = await client.post(f"/api/sinks/{SINK}/{path}", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert not engine.orders


async def test_what_the_engine_refuses(client: httpx.AsyncClient) -> None:
    answer = await client.post(BACKFILLS, json={"table": "nothing"})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_table")


async def test_lists_of_backfills(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(BACKFILLS)
    for path in (BACKFILLS, "/api/backfills"):
        assert [item["id"] for item in (await client.get(path)).json()["data"]] == ["b1", "b2"]
        assert [item["id"] for item in (await client.get(path, params={"ended": "false"})).json()["data"]] == ["b2"]
        assert (await client.get(path, params={"ended": "no"})).status_code == 400
    assert (await client.get(f"/api/sinks/{EMPTY}/backfills")).json() == {"data": []}
    assert (await client.get("/api/sinks/nobody/backfills")).status_code == 404


async def test_one_backfill(client: httpx.AsyncClient) -> None:
    await client.post(BACKFILLS)
    assert (await client.get(f"{BACKFILLS}/b1")).json()["state"] == "completed"
    for table in ("public.jobs", "jobs"):
        assert (await client.get(f"{BACKFILLS}/{table}")).json()["id"] == "b2", "the latest of the table"
    answer = await client.get(f"{BACKFILLS}/b9")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_backfill")


@pytest.mark.parametrize(("state", "verb"), [("paused", "pause"), ("active", "resume"), ("cancelled", "cancel")])
async def test_a_backfill_is_changed_by_its_state(
    client: httpx.AsyncClient, engine: FakeEngine, state: str, verb: str
) -> None:
    await client.post(BACKFILLS)
    for name in ("b2", "public.jobs", "jobs"):
        answer = await client.patch(f"{BACKFILLS}/{name}", json={"state": state})
        assert (answer.status_code, answer.json()["state"]) == (200, state)
    assert engine.changes == [(SINK, "b2", verb)] * 3
    assert (await client.patch(f"{BACKFILLS}/users", json={"state": state})).status_code == 404


@pytest.mark.parametrize("body", [b"", b"{}", b'{"state":"done"}', b'{"state":1}', b'{"state":"paused","x":1}'])
async def test_an_unclear_state_changes_nothing(client: httpx.AsyncClient, engine: FakeEngine, body: bytes) -> None:
    answer = await client.patch(f"{BACKFILLS}/b1", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert not engine.changes


async def test_a_page_of_another_origin_patches_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    headers = {"Origin": "https://evil.example"}
    answer = await client.patch(f"{BACKFILLS}/b1", json={"state": "cancelled"}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
    assert not engine.changes


async def test_reindex(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    path = f"/api/sinks/{SINK}/reindex"
    mapping = {"mappings": {"properties": {}}}
    started = await client.post(path, json={"into": "jobs_v2", "mapping": mapping})
    assert (started.status_code, started.json()["into"]) == (201, "jobs_v2")
    assert engine.orders[0] == (SINK, ReindexOrder(into="jobs_v2", mapping=mapping))
    for listing in (path, "/api/reindexes"):
        assert [item["into"] for item in (await client.get(listing)).json()["data"]] == ["jobs_v2"]
    assert (await client.get(f"/api/sinks/{EMPTY}/reindex")).json() == {"data": []}
    assert (await client.get("/api/sinks/nobody/reindex")).status_code == 404
    assert (await client.post(f"{path}/cancel")).json()["state"] == "cancelled"
    assert (await client.post(f"{path}/drop-old")).json()["old"] == []
    assert engine.changes == [(SINK, "reindex", "cancel"), (SINK, "reindex", "drop_old")]


# -- uvicorn -------------------------------------------------------------------------------------------------------


async def test_a_real_server(engine: FakeEngine) -> None:
    app = create_app(engine, engine.metrics, TOKEN)
    listening = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    async with serve(app, listening), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/api/status")).status_code == 401
        assert (await client.get("/api/status", headers=AUTHORIZED)).status_code == 200
        assert (await client.get("/health", headers={"Host": "evil.example"})).status_code == 403

        with pytest.raises(SpillwayError, match="in use; stop what listens there") as raised:
            bind("127.0.0.1", port)
        assert raised.value.code == "port_in_use"

        engine.export_fails = True
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"/api/sinks/{SINK}/dead-letters/export", headers=AUTHORIZED)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(SpillwayError, match=r"correct server\.listen"):
        bind("203.0.113.1", 0)

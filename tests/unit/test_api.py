"""The routes, through the whole application, and one real uvicorn."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from fake_engine import EMPTY, SINK, FakeEngine

from spillway.api.app import create_app
from spillway.api.serve import bind, serve
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

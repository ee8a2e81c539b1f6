"""The recorder and the proxy do what the judgement relies on."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from oracle.endpoint import Proxy, Recorder
from oracle.proxy import Framing


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder(seed=1) as recorder:
        yield recorder


def message(pk: str) -> dict[str, object]:
    return {"record": {"id": pk}, "metadata": {"record_pks": [pk]}}


def test_writes_down_and_misbehaves_by_script(recorder: Recorder) -> None:
    with httpx.Client(base_url=recorder.url, timeout=0.3, trust_env=False) as client:
        assert client.post("/hook", json=message("1")).status_code == 200
        recorder.script([{"path": "/hook", "pks": ["2"], "do": "status", "status": 422}])
        assert client.post("/hook", json={"data": [message("1"), message("2")]}).status_code == 422
        assert client.post("/hook", json=message("1")).status_code == 200
        recorder.mark(life=5)
        for do in ("cut", "apply_cut", "stall"):
            recorder.script([{"do": do, "times": 1}])
            with pytest.raises(httpx.TransportError):
                client.post("/hook", json=message("3"))
            assert client.post("/hook", json=message("4")).status_code == 200
    recorder.wait_no_connections()
    seen = [(r.life, r.do, r.applied, r.acknowledged, len(r.messages)) for r in recorder.requests("/hook")]
    assert seen == [
        (0, "ok", True, True, 1),
        (0, "status", False, False, 2),
        (0, "ok", True, True, 1),
        (5, "cut", False, False, 1),
        (5, "ok", True, True, 1),
        (5, "apply_cut", True, False, 1),
        (5, "ok", True, True, 1),
        (5, "stall", False, False, 1),
        (5, "ok", True, True, 1),
    ]
    assert recorder.applied_messages() == {"/hook": 6}


def test_refuses_while_stopped_and_keeps_its_log(recorder: Recorder) -> None:
    httpx.post(f"{recorder.url}/a", json={}, trust_env=False)
    recorder.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{recorder.url}/a", json={}, trust_env=False)
    recorder.start()
    httpx.post(f"{recorder.url}/a", content=iter([b"{", b"}"]), trust_env=False)
    assert [request.path for request in recorder.requests()] == ["/a", "/a"]


def test_the_proxy_sees_every_request(recorder: Recorder) -> None:
    with Proxy(recorder.port) as proxy, httpx.Client(base_url=proxy.url, trust_env=False) as client:
        start = proxy.size
        client.post("/_bulk", content=b"x" * 300_000)
        client.get("/_control/state")
        client.post("/_bulk", content=iter([b"{}", b"\r\n0\r\n"]))
        seen = [(p.method, p.path, p.bytes) for p in proxy.passed(start)]
        assert seen == [("POST", "/_bulk", 300_000), ("GET", "/_control/state", 0), ("POST", "/_bulk", -1)]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_framing_finds_heads_wherever_the_bytes_are_cut(size: int) -> None:
    stream = (
        b"POST /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nGET /"
        b"POST /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        b"GET /c HTTP/1.1\r\n\r\n"
    )
    framing = Framing()
    found = [f for at in range(0, len(stream), size) for f in framing.feed(stream[at : at + size])]
    assert found == [("POST /a HTTP/1.1", 5), ("POST /b HTTP/1.1", -1), ("GET /c HTTP/1.1", 0)]

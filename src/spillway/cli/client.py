"""Talking to the running process: one HTTP client, with errors that say what to do.

Where it listens: ``--url``, else ``server.listen`` of the file given with ``-c``, else ``SPILLWAY_URL``, else the
default. The token: ``server.token`` of that file, else ``SPILLWAY_TOKEN``. A token is sent nowhere but to that address
(redirects are not followed) and appears in no message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx

from spillway.api.guard import is_loopback
from spillway.cli import UsageError
from spillway.cli.output import Row, rows
from spillway.errors import SpillwayError

DEFAULT_URL = "http://127.0.0.1:7376"
URL_VARIABLE = "SPILLWAY_URL"
TOKEN_VARIABLE = "SPILLWAY_TOKEN"  # noqa: S105 - a variable's name

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
WORK_SECONDS = 3600.0  # retrying or discarding millions of rows takes its time
PAGE = 500


class Client:
    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._http = httpx.Client(
            base_url=url,
            headers={b"Authorization": b"Bearer " + token.encode()} if token else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            # A proxy of the environment is not asked for what runs on this machine.
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )

    def close(self) -> None:
        self._http.close()

    def get(self, *path: str, **params: str | int) -> Row:
        with self._explained():
            return _answer(self._http.get(_path(path), params=params), self.url)

    def post(self, *path: str, body: Row | None = None) -> Row:
        timeout = httpx.Timeout(WORK_SECONDS, connect=CONNECT_SECONDS)
        with self._explained():
            return _answer(self._http.post(_path(path), json=body, timeout=timeout), self.url)

    def patch(self, *path: str, body: Row) -> Row:
        with self._explained():
            return _answer(self._http.patch(_path(path), json=body), self.url)

    def pages(self, *path: str, **params: str) -> Iterator[list[Row]]:
        """The pages of a list, each when it is wanted. The first comes even when it is empty."""
        after: dict[str, str] = {}
        while True:
            page = self.get(*path, limit=PAGE, **params, **after)
            yield rows(page, "items")
            if not isinstance(page.get("after"), str):
                return
            after = {"after": str(page["after"])}

    def stream(self, *path: str, **params: str | int) -> Iterator[bytes]:
        """The bytes of an answer as they come."""
        with self._explained(), self._http.stream("GET", _path(path), params=params) as response:
            if not response.is_success:
                response.read()
                _answer(response, self.url)
            yield from response.iter_bytes()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """httpx's errors as ours. Their texts may hold headers, and are left out."""
        try:
            yield
        except httpx.ConnectError:
            remedy = "start it with `spillway run FILE`, or say where it listens with --url or -c FILE"
            raise SpillwayError("unreachable", f"nothing answers at {self.url}", remedy) from None
        except httpx.TimeoutException:
            raise SpillwayError("no_answer", f"no answer in time from {self.url}", "look at its log") from None
        except httpx.TransportError:
            remedy = "the answer is not whole; look at its log"
            raise SpillwayError("cut_off", f"the connection to {self.url} was cut", remedy) from None


@contextmanager
def connect(url: str | None, config: Path | None) -> Iterator[Client]:
    """The client for the options of a command, closed at its end."""
    token = os.environ.get(TOKEN_VARIABLE)
    listening: str | None = None
    if config is not None:
        from spillway.cli.load import load  # noqa: PLC0415 - only with -c

        server = load(config).server
        listening = _reachable(server.host, server.port)
        token = server.token.get_secret_value() if server.token else token
    client = Client(_checked(url or listening or os.environ.get(URL_VARIABLE) or DEFAULT_URL), token)
    try:
        yield client
    finally:
        client.close()


def _checked(url: str) -> str:
    """The URL, whole. Raises UsageError for what is none."""
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return whole.rstrip("/")
    except ValueError:  # an unfinished IPv6 address, or a port that is none
        pass
    raise UsageError(f"{url} is no address of a spillway", "give --url http://HOST:PORT")


def _reachable(host: str, port: int) -> str:
    """The URL of an address to listen on: the unspecified address is asked through loopback."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _path(parts: tuple[str, ...]) -> str:
    return "/api/" + "/".join(quote(part, safe="") for part in parts)


def _answer(response: httpx.Response, url: str) -> Row:
    """The JSON of a good answer; the error that a bad one describes."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        if response.is_success:
            return answer
        if isinstance(answer.get("code"), str):
            raise SpillwayError(answer["code"], str(answer.get("error", "")), str(answer.get("remedy", "")))
    raise SpillwayError("not_spillway", f"what answers at {url} is not spillway", "correct --url")

"""`memory`, `state` and `server`: what concerns the whole process. Spillway's own; Sequin's file has none of it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from spillway.config.memory import MB, default_limit_mb
from spillway.config.section import Section
from spillway.config.values import Whole, Wrong


class Memory(Section):
    """The whole process; see I4."""

    limit_mb: Annotated[Whole, Field(ge=16)] = Field(default_factory=default_limit_mb)

    @property
    def limit_bytes(self) -> int:
        return self.limit_mb * MB


def _state_url(url: str) -> str:
    scheme, separator, path = url.partition(":///")
    if scheme in ("postgres", "postgresql") or url.startswith(("postgres:", "postgresql:")):
        raise ValueError("a 'postgresql' store is not there yet in this version; use sqlite:///FILE")
    if scheme != "sqlite" or not separator or not path.strip("/") or path.startswith(":memory:") or "?" in path:
        raise ValueError("must be sqlite:///FILE (relative to this file's folder) or sqlite:////FILE (absolute)")
    return url


class State(Section):
    """Where positions, backlog and dead letters are kept."""

    url: Annotated[str, AfterValidator(_state_url)] = "sqlite:///spillway.db"

    def path(self, base_dir: Path) -> Path:
        return base_dir / self.url.removeprefix("sqlite:///")


def _listen(value: str) -> str:
    split_listen(value)
    return value


class Server(Section):
    """Where the HTTP interface listens. Elsewhere than on loopback only with a token."""

    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:7376"
    token: SecretStr | None = None

    @field_validator("token")
    @classmethod
    def _empty_is_none(cls, token: SecretStr | None) -> SecretStr | None:
        return token if token is not None and token.get_secret_value() else None

    @property
    def host(self) -> str:
        return split_listen(self.listen)[0]

    @property
    def port(self) -> int:
        return split_listen(self.listen)[1]

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _guarded(self) -> Server:
        if not self.loopback and self.token is None:
            raise Wrong("listen", "is reachable from other machines, so server.token must be set; or use 127.0.0.1")
        return self


def split_listen(listen: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPv6]:PORT`` or ``:PORT`` (all addresses)."""
    host, separator, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets: [::1]:7376")
    if not separator or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:7376")
    return host or "0.0.0.0", int(port)  # noqa: S104 - what an empty host means; refused above without a token

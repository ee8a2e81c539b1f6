"""`http_endpoints[]`: where webhooks go. Values of headers are secrets, encrypted or not: tokens live there."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from spillway.config.destination import http_url
from spillway.config.section import Section
from spillway.config.values import Name, Wrong


def _pairs(value: object) -> object:
    """Sequin's two forms, a mapping or a list of {key, value}, become one mapping."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a mapping, or a list of {key, value}")  # noqa: TRY004 - pydantic collects ValueErrors
    headers: dict[str, object] = {}
    for item in value:
        if not isinstance(item, dict) or set(item) != {"key", "value"} or not isinstance(item["key"], str):
            raise ValueError("each header must be {key: NAME, value: TEXT}")
        if item["key"] in headers:
            raise ValueError("a header is given twice")
        headers[item["key"]] = item["value"]
    return headers


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("is no name of a header")
    return name


def _header_value(value: SecretStr) -> SecretStr:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value.get_secret_value()):
        raise ValueError("a header's value may not hold line breaks or control characters")
    return value


Headers = Annotated[
    dict[Annotated[str, AfterValidator(_header_name)], Annotated[SecretStr, AfterValidator(_header_value)]],
    BeforeValidator(_pairs),
]


class HttpEndpoint(Section):
    not_yet: ClassVar = {"local": (False, "false"), "webhook.site": (False, "false"), "path": ()}

    name: Name
    url: Annotated[str, AfterValidator(http_url)] = Field(repr=False)  # its path may hold a token
    headers: Headers = Field(default_factory=dict)
    encrypted_headers: Headers = Field(default_factory=dict)

    @model_validator(mode="after")
    def _once(self) -> HttpEndpoint:
        names = {name.lower() for name in self.headers}
        for name in self.encrypted_headers:
            if name.lower() in names:
                raise Wrong("encrypted_headers", "holds a header that is in headers too")
        return self

    def all_headers(self) -> dict[str, str]:
        """Both kinds of headers as they are sent: never print them."""
        return {name: value.get_secret_value() for name, value in (self.headers | self.encrypted_headers).items()}

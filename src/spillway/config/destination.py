"""`sinks[].destination`: one model per type. What a sink's type decides for the rest of the sink stands here, as class
attributes: how many messages make a batch, whether the last write of a key wins (``state``), what becomes of a missing
TOAST value and of a TRUNCATE, and what a message may say about where it goes (``routing_keys``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator

from spillway.config.database import FilePath
from spillway.config.section import Reading, Section
from spillway.config.values import Flag, Name, Number, Secret, SizeBytes, Whole

Toast = Literal["omit", "reselect", "fail"]
OnTruncate = Literal["apply", "ignore"]

# Sequin's types that do not exist here yet; they are refused by name.
NOT_YET = (
    *("kafka", "sqs", "sns", "kinesis", "redis_stream", "redis_string", "nats", "rabbitmq", "gcp_pubsub"),
    *("azure_event_hub", "meilisearch", "typesense", "s2", "sequin_stream"),
)
OLD_SPELLINGS = {"http_push": "webhook", "redis": "redis_stream"}


class _Destination(Section):
    default_batch_size: ClassVar[int] = 1
    max_batch_size: ClassVar[int] = 10_000
    state: ClassVar[bool] = False
    default_toast: ClassVar[Toast] = "omit"
    default_on_truncate: ClassVar[OnTruncate] = "ignore"
    routing_keys: ClassVar[tuple[str, ...]] = ()


def http_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine or re.search(r"\s", url):
        raise ValueError("must be a URL: http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.password is not None:
        raise ValueError("may not hold a user or password")
    return url


def _endpoint_url(url: str) -> str:
    http_url(url)
    if urlsplit(url).query or urlsplit(url).fragment:
        raise ValueError("may not have a ?query or #fragment")
    return url.rstrip("/")


def _index_name(name: str) -> str:
    if not 1 <= len(name.encode()) <= 255 or name != name.lower() or re.search(r'[\s/\\*?"<>|,#:]', name):
        raise ValueError('must be an index name: lower case, at most 255 bytes, no blanks and none of /\\*?"<>|,#:')
    return name


IndexName = Annotated[str, AfterValidator(_index_name)]


class Search(_Destination):
    default_batch_size: ClassVar[int] = 100
    state: ClassVar[bool] = True
    default_toast: ClassVar[Toast] = "reselect"
    routing_keys: ClassVar[tuple[str, ...]] = ("index_name", "id", "op", "doc_as_upsert", "routing", "pipeline")

    endpoint_url: Annotated[str, AfterValidator(_endpoint_url)]
    index_name: IndexName
    auth_type: Literal["none", "api_key", "basic", "bearer"] = "none"
    auth_value: Annotated[Secret | None, Field(validate_default=True)] = None  # basic: user:password
    batch_size: Annotated[Whole, Field(ge=1, le=10_000)] | None = None
    mapping: FilePath | None = None  # what a missing index is created with
    tls_ca_file: FilePath | None = None
    timeout_seconds: Annotated[Number, Field(gt=0, le=3600)] | None = None
    gzip: Flag = False
    op: Literal["index", "update"] = "index"
    doc_as_upsert: Flag = False  # with op: update
    pipeline: Name | None = None  # of ingest
    routing_column: Name | None = None  # whose value is the document's _routing

    @field_validator("doc_as_upsert")
    @classmethod
    def _upsert(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("op") == "index":
            raise ValueError("has no meaning without op: update")
        return value

    @field_validator("pipeline")
    @classmethod
    def _pipeline(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("op") == "update":
            raise ValueError("has no meaning with op: update: the server runs pipelines for whole documents alone")
        return value

    @field_validator("auth_value")
    @classmethod
    def _auth(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        auth_type = info.data.get("auth_type", "none")
        if auth_type != "none" and value is None:
            raise ValueError(f"is required with auth_type: {auth_type}")
        if auth_type == "none" and value is not None and "auth_type" in info.data:
            raise ValueError("has no meaning without auth_type: api_key, basic or bearer")
        if auth_type == "basic" and value is not None and ":" not in value.get_secret_value():
            raise ValueError("must be USER:PASSWORD with auth_type: basic")
        return value


class Elasticsearch(Search):
    type: Literal["elasticsearch"]
    document: Literal["record", "message"] = "message"


class OpenSearch(Search):
    default_batch_size: ClassVar[int] = 500

    type: Literal["opensearch"]
    document: Literal["record", "message"] = "record"


def _endpoint_path(path: str) -> str:
    if path and (not path.startswith(("/", "?", "#")) or len(path) > 2000 or re.search(r"\s", path)):
        raise ValueError("must begin with /, ? or # and have at most 2000 characters, no blanks")
    return path


class Webhook(_Destination):
    routing_keys: ClassVar[tuple[str, ...]] = ("method", "endpoint_path", "headers")

    type: Literal["webhook"]
    http_endpoint: Name
    http_endpoint_path: Annotated[str, AfterValidator(_endpoint_path)] = ""
    batch: Flag = True  # as Sequin's loader does it; its documentation says false
    timeout_seconds: Annotated[Number, Field(gt=0, le=3600)] | None = None


def relative(path: Path, info: ValidationInfo) -> Path:
    if path.name in ("", ".."):
        raise ValueError("must be the path of a file")
    return info.context.base_dir / path.expanduser() if isinstance(info.context, Reading) else path


class File(_Destination):
    default_batch_size: ClassVar[int] = 10_000  # each batch is one fsync

    type: Literal["file"]
    path: Annotated[Path, AfterValidator(relative)]
    rotate_bytes: Annotated[SizeBytes, Field(ge=1024)] | None = None


class Stdout(_Destination):
    default_batch_size: ClassVar[int] = 10_000

    type: Literal["stdout"]


class Sqlite(_Destination):
    default_batch_size: ClassVar[int] = 1000
    state: ClassVar[bool] = True
    # default_toast is omit: an UPDATE leaves the column as it is, which is right and costs no query
    default_on_truncate: ClassVar[OnTruncate] = "apply"

    type: Literal["sqlite"]
    path: Annotated[Path, AfterValidator(relative)]
    table: Name | None = None  # None: the source table's name


class Blackhole(_Destination):
    default_batch_size: ClassVar[int] = 10_000

    type: Literal["blackhole"]


Destination = Annotated[
    Elasticsearch | OpenSearch | Webhook | File | Stdout | Sqlite | Blackhole, Field(discriminator="type")
]
TYPES = ("elasticsearch", "opensearch", "webhook", "file", "stdout", "sqlite", "blackhole")

"""Sinks: where changes go. `base` is the contract, one file is one kind, `build` makes one from its configuration.

A kind is named here as ``module:Class`` and imported when a sink of it is built, so that a client library is loaded
only where it is used. ``encode``, ``http``, ``disk`` and ``thread`` are what several kinds share.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, runtime_checkable

from spillway.config import Blackhole, Config, File, Search, Sqlite, Stdout, Webhook
from spillway.config import Sink as SinkConfig
from spillway.errors import Finding
from spillway.sinks.base import Sink, SinkContext

CLASSES = {
    "elasticsearch": "spillway.sinks.search:SearchSink",
    "opensearch": "spillway.sinks.search:SearchSink",
    "webhook": "spillway.sinks.webhook:WebhookSink",
    "file": "spillway.sinks.file:FileSink",
    "stdout": "spillway.sinks.stdout:StdoutSink",
    "sqlite": "spillway.sinks.sqlite:SqliteSink",
    "blackhole": "spillway.sinks.blackhole:BlackholeSink",
}


@runtime_checkable
class Checked(Protocol):
    """A sink that can tell, without sending anything, what is wrong with where it would send."""

    async def findings(self) -> list[Finding]: ...


def build(config: Config, sink: SinkConfig, context: SinkContext) -> Sink:
    """One sink of the configuration; nothing is connected or opened."""
    arguments: dict[str, object]
    match destination := sink.destination:
        case Search():
            arguments = {
                "endpoint_url": destination.endpoint_url,
                "index_name": destination.index_name,
                "document": destination.document,
                "auth_type": destination.auth_type,
                "auth_value": destination.auth_value.get_secret_value() if destination.auth_value else "",
                "timeout_seconds": sink.request_timeout_seconds,
                "gzip": destination.gzip,
                "ca_file": destination.tls_ca_file,
                "mapping": destination.mapping,
                "toast": sink.toast,
                "op": destination.op,
                "doc_as_upsert": destination.doc_as_upsert,
                "pipeline": destination.pipeline or "",
                "routing_column": destination.routing_column or "",
            }
        case Webhook():
            # CloudEvents over HTTP, "structured content mode". A batch is in Sequin's envelope.
            events = sink.format == "cloudevents" and not destination.batch
            (endpoint,) = [one for one in config.http_endpoints if one.name == destination.http_endpoint]
            arguments = {
                "url": endpoint.url,
                "path": destination.http_endpoint_path,
                "headers": endpoint.all_headers(),
                "content_type": "application/cloudevents+json" if events else "application/json",
                "batch": destination.batch,
                "timeout_seconds": sink.request_timeout_seconds,
            }
        case File():
            arguments = {"path": destination.path, "rotate_bytes": destination.rotate_bytes}
        case Sqlite():
            arguments = {"path": destination.path, "table": destination.table}
        case Stdout() | Blackhole():
            arguments = {}
    return _class(destination.type)(context, **arguments)


def _class(kind: str) -> Callable[..., Sink]:
    module, _, name = CLASSES[kind].partition(":")
    found: Callable[..., Sink] = getattr(import_module(module), name)
    return found

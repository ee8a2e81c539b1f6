"""The options that commands share, once, and the client that two of them mean."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spillway.cli.client import Client

Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The configuration, spillway.yml.")]
RequiredConfig = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="The configuration.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Take address and token from this configuration."),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Where the running process listens. Else that of -c, else SPILLWAY_URL, else 127.0.0.1:7376.",
    ),
]
Sink = Annotated[str, typer.Argument(metavar="SINK", help="The name of a sink.")]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="This key, as `list` shows it.")]
Reason = Annotated[str | None, typer.Option("--reason", metavar="REASON", help="All with this reason.")]
All = Annotated[bool, typer.Option("--all", help="All of the sink.")]


def client(url: str | None, config: Path | None) -> AbstractContextManager[Client]:
    """The running process that ``--url`` and ``-c`` mean."""
    from spillway.cli.client import connect  # noqa: PLC0415 - httpx only where it is used

    return connect(url, config)

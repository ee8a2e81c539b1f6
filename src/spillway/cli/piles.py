"""``backlog`` and ``dead-letters``: the same four commands over two piles, and ``export`` of the second."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from spillway.cli import UsageError, options, output
from spillway.errors import SpillwayError

COLUMNS = ("KEY", "REASON", "ATTEMPTS", "FIRST SEEN", "MESSAGES", "BYTES", "DETAIL")
DETAIL_CHARACTERS = 120  # of a list: a traceback would make every line as wide as it is long; --json has all of it


def pile_app(pile: str, what: str, order: str) -> typer.Typer:
    """The commands of one pile; ``pile`` is its path in the API and its name on the command line."""
    app = typer.Typer(no_args_is_help=True, help=f"{what[0].upper()}{what[1:]}.")

    @app.command("list", help=f"List {what}{order}.")
    def list_(
        sink: options.Sink,
        reason: options.Reason = None,
        json: options.Json = False,
        url: options.Url = None,
        config: options.Config = None,
    ) -> None:
        with options.client(url, config) as client:
            pages = client.pages("sinks", sink, pile, **({} if reason is None else {"reason": reason}))
            if json:
                output.emit_array(item for page in pages for item in page)
            else:
                _show_pages(pages)

    @app.command("show", help="Show the message at the head of a key, or some, one line of JSON each.")
    def show(
        sink: options.Sink,
        key: Annotated[str, typer.Option("--key", metavar="KEY", help="The key, as `list` shows it.")],
        limit: Annotated[int, typer.Option("--limit", min=1, max=10, help="How many messages.")] = 1,
        json: options.Json = False,  # noqa: ARG001 - a message is JSON in any case
        url: options.Url = None,
        config: options.Config = None,
    ) -> None:
        with options.client(url, config) as client:
            copied = _copy(client.stream("sinks", sink, pile, "messages", key=key, limit=limit))
        if not copied:
            raise SpillwayError(
                "unknown_key", f"nothing of key {output.printable(key)}", f"see `spillway {pile} list {sink}`"
            )

    @app.command("retry", help=f"Try {what} again now.")
    def retry(
        sink: options.Sink,
        key: options.Key = None,
        reason: options.Reason = None,
        all_: options.All = False,
        json: options.Json = False,
        url: options.Url = None,
        config: options.Config = None,
    ) -> None:
        body = _select(key, reason, all_)
        with options.client(url, config) as client:
            answer = client.post("sinks", sink, pile, "retry", body=body)
        _report(answer, "to be tried again", sink, json)

    @app.command("discard", help=f"Remove {what} for good.")
    def discard(
        sink: options.Sink,
        key: options.Key = None,
        reason: options.Reason = None,
        all_: options.All = False,
        yes: options.Yes = False,
        json: options.Json = False,
        url: options.Url = None,
        config: options.Config = None,
    ) -> None:
        body = _select(key, reason, all_)
        name, value = next(iter(body.items()))
        of = "all" if name == "all" else f"{name} {output.printable(str(value))}"
        confirm(f"Discard for good, from the {pile} of {sink}: {of}?", yes)
        with options.client(url, config) as client:
            answer = client.post("sinks", sink, pile, "discard", body=body)
        _report(answer, "discarded", sink, json)

    return app


def export(
    sink: options.Sink,
    key: options.Key = None,
    reason: options.Reason = None,
    all_: options.All = False,
    json: options.Json = False,  # noqa: ARG001 - an export is JSON in any case
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Write dead letters to standard output, one line of JSON each; all of the sink unless told otherwise."""
    given = _select(key, reason, all_ or (key is None and reason is None))
    params = {name: str(value) for name, value in given.items() if name != "all"}
    with options.client(url, config) as client:
        _copy(client.stream("sinks", sink, "dead-letters", "export", **params))


def _copy(pieces: Iterator[bytes]) -> int:
    """To standard output as they come, untouched: numbers keep every digit. Returns how many bytes."""
    copied = 0
    for piece in pieces:
        copied += sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
    return copied


def confirm(question: str, yes: bool) -> None:
    """Go on only when somebody said yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this cannot be undone, and nobody is there to ask", "add --yes")
    typer.confirm(question, abort=True, err=True)


def _select(key: str | None, reason: str | None, all_: bool) -> output.Row:
    given: output.Row = {}
    if key is not None:
        given["key"] = key
    if reason is not None:
        given["reason"] = reason
    if all_:
        given["all"] = True
    if len(given) != 1:
        raise UsageError("what is meant is not clear", "give exactly one of --key KEY, --reason REASON, --all")
    return given


def _show_pages(pages: Iterator[list[output.Row]]) -> None:
    for number, page in enumerate(pages):
        if page:
            output.table(COLUMNS, map(_cells, page))
        elif number == 0:
            output.emit("nothing")


def _cells(item: output.Row) -> list[str]:
    return [
        output.text(item.get("key")),
        output.text(item.get("reason")),
        output.text(item.get("attempts")),
        output.ago(item.get("first_seen")),
        output.text(item.get("messages")),
        output.size(item.get("bytes")),
        output.line(item.get("detail"), DETAIL_CHARACTERS),
    ]


def _report(answer: output.Row, done: str, sink: str, json: bool) -> None:
    if json:
        output.emit_json({"sink": sink, **answer})
    else:
        output.emit(f"{sink}: {answer.get('count')} {done}")

"""Where in a user's SQL the server has found a mistake: the line and the column, as the user has written it.

The server gives a place among the characters of what it was sent. `locate` is called by whoever knows what that was,
`told` by whoever makes the message; between them the error carries the place as its note.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg

_SYNTAX_ERROR = "42601"


def locate(error: psycopg.Error, sql: str, before: int = 0) -> None:
    """``before``: so many characters were sent ahead of the user's SQL."""
    if notes := "; ".join(_notes(error, sql, before)):
        error.add_note(notes)


def told(error: psycopg.Error) -> str:
    """On one line."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    said = " ".join((error.diag.message_primary or str(error)).split())
    return f"{said} ({notes})" if notes else said


def _notes(error: psycopg.Error, sql: str, before: int) -> Iterator[str]:
    place = int(error.diag.statement_position or 0) - 1 - before
    if 0 <= place <= len(sql):
        lines = sql[:place].split("\n")
        yield f"line {len(lines)}, column {len(lines[-1]) + 1} of the SQL"
    if error.sqlstate == _SYNTAX_ERROR:
        yield "it must be one SELECT"

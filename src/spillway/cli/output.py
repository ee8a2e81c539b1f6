"""What people and scripts read: tables with relative times, or JSON.

A table is never cut: on a terminal long cells fold, into a pipe the lines are as long as they must be. Only what may be
a page by itself (a traceback) is given as its beginning (`line`). Keys, reasons and details come from other people's
data: characters that a terminal would obey are shown as escapes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

Row = dict[str, object]

PIPE_WIDTH = 100_000


def emit(text: str) -> None:
    """One line of the answer."""
    print(text)


def note(text: str) -> None:
    """Beside what is asked for."""
    print(printable(text), file=sys.stderr)


def emit_json(value: object) -> None:
    emit(json.dumps(value, indent=2, ensure_ascii=False))


def emit_array(items: Iterable[object]) -> None:
    """A JSON array, written as its items come: never whole in memory. Cut short it is no JSON, on purpose."""
    opening = "["
    for item in items:
        emit(opening + json.dumps(item, ensure_ascii=False))
        opening = ","
    emit("[]" if opening == "[" else "]")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for people
    from rich.table import Table  # noqa: PLC0415

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*map(printable, row))
    console.print(grid)


def printable(text: str) -> str:
    """The text with what is not printable as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def line(value: object, characters: int) -> str:
    """The text on one line, and no more of it than this."""
    whole = " ".join(text(value).split())
    return whole if len(whole) <= characters else f"{whole[: characters - 1]}…"


def ago(when: object, now: float | None = None) -> str:
    """How long since an ISO timestamp: ``3 min ago``."""
    if not isinstance(when, str) or not when:
        return "-"
    now = time.time() if now is None else now
    return f"{seconds(now - datetime.fromisoformat(when).timestamp())} ago"


def seconds(value: object) -> str:
    """A duration in the largest unit that leaves a whole number above one."""
    if not isinstance(value, int | float):
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return f"{int(value // length)} {unit}"
    return f"{max(int(value), 0)} s"


def size(value: object) -> str:
    """Bytes, for people: ``18.3 kB``."""
    if not isinstance(value, int | float):
        return "-"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{int(value)} B"


def rows(answer: Row, key: str) -> list[Row]:
    found = answer.get(key)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def finding_lines(finding: dict[str, str | None]) -> Iterator[str]:
    """A finding over some lines, the SQL on lines of its own."""
    where = " ".join(f"{name} {finding[name]}" for name in ("database", "sink") if finding.get(name))
    yield f"{finding['severity']}: {finding['code']}" + (f" ({where})" if where else "")
    yield f"  {finding['what']}"
    for line in (finding["remedy"] or "").splitlines():
        yield f"    {line}"

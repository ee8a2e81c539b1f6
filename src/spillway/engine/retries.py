"""Dead letters of a sink that keeps rows, tried again: which of them become backfills of their rows.

One for each table (`Backfills.retry`), all letters of which are read first. Letters of a table that cannot be read now
stay, and are told; they do not keep those of other tables from being tried, nor take of the room that there is for
them: so many letters, and so many bytes of keys (`spillway.flow.named`), may be under way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from spillway.change import key_values
from spillway.chunk import FLAGS, MOVED, Message
from spillway.engine.backfills import Backfills, Table
from spillway.errors import SpillwayError
from spillway.flow.named import key_bytes
from spillway.source.page import Cursor

MOST_RETRIED = 10_000  # rows of a sink whose retry has not ended


async def retry_rows(backfills: Backfills, sink: str, pages: AsyncIterator[Sequence[Message]]) -> int:
    """Returns how many letters are being tried, perhaps not all. Raises SpillwayError when some cannot be."""
    room, room_bytes = MOST_RETRIED - backfills.retrying(sink), backfills.key_bytes_left(sink)
    if room <= 0 or room_bytes <= 0:
        raise SpillwayError(
            "retries_active",
            f"{backfills.retrying(sink)} rows of dead letters of {sink} are being retried already",
            f"wait for them: spillway backfill list {sink}",
        )
    published = await backfills.published()
    taken: dict[Table, tuple[dict[Cursor, None], list[int]]] = {}
    refused: dict[Table, SpillwayError] = {}
    staying = 0
    async for letters in pages:
        for letter in letters:
            table = (letter.change.schema, letter.change.table)
            if table not in taken and table not in refused:
                try:
                    backfills.check_table(sink, table, published)
                    taken[table] = ({}, [])
                except SpillwayError as error:
                    refused[table] = error
            if table in refused:
                staying += 1
            elif room > 0 and room_bytes > 0:
                keys, rows = taken[table]
                new = [key for key in _keys(letter) if key not in keys]
                keys.update(dict.fromkeys(new))
                rows.append(letter.row)
                room -= 1
                room_bytes -= sum(map(key_bytes, new))
        if room <= 0 or room_bytes <= 0:
            break
    for table, (wanted, buried) in taken.items():
        if buried:
            await backfills.retry(sink, table, wanted, buried)
    count = sum(len(buried) for _, buried in taken.values())
    if refused:
        raise _in_part(count, staying, refused)
    return count


def _in_part(count: int, staying: int, refused: dict[Table, SpillwayError]) -> SpillwayError:
    errors = list(refused.values())
    if not count and len(errors) == 1:
        return errors[0]
    said = "; ".join(dict.fromkeys(error.what for error in errors))
    remedies = "; ".join(dict.fromkeys(error.remedy for error in errors))
    what = f"{count} dead letters are being retried, {staying} stay: {said}"
    return SpillwayError(errors[0].code, what, remedies)


def _keys(letter: Message) -> list[Cursor]:
    """Of its row; of one that has got another key the one of before, too."""
    chunk, index = letter.span.chunk, letter.span.indices[letter.place]
    keys = chunk.key_texts(index)[: 2 if chunk.byte(index, FLAGS) & MOVED else 1]
    return [key_values(*chunk.table(index), key.decode()) for key in keys if key]

"""Logical messages as changes: what ``pg_logical_emit_message`` writes under a prefix that somebody wants.

Each is an insert into a table that there is not: schema `SCHEMA`, named as the prefix, with the columns ``prefix`` and
``content``. The content is JSON as it stands, if it is JSON; else text; and in hex, as bytea has it, if it is not
UTF-8. Such a row has no key.

A transactional message counts among the operations of its transaction. Another one is sent as soon as the server reads
it, between two transactions and in the order of the WAL, also if the transaction that wrote it is rolled back. It is
taken as a transaction of its own. That ends where the message's record does, which is what the server says of it: with
this position confirmed it does not come again, with one before the record it does. Its commit has the byte
before: where it ends the commit record of another transaction may begin, and two of one LSN would be taken for one. The
time of such a commit is that of sending, which is another one when it is sent again; its idempotency key is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import orjson

from spillway.pgoutput.relation import Column, Relation, TableInfo

SCHEMA: Final = "pg_logical_message"
NO_INFO: Final = TableInfo(0, (), {})
_TEXT, _JSON = 25, 114

# What a message adds to the metadata of its change, twice: the names of its columns, and the prefix.
OVERHEAD_BYTES: Final = 1024


def relations(prefixes: Iterable[str]) -> dict[bytes, tuple[Relation, Relation]]:
    """By prefix: the relation of contents that are text, and of those that are JSON."""
    return {prefix.encode(): (_relation(prefix, _TEXT), _relation(prefix, _JSON)) for prefix in prefixes}


def _relation(prefix: str, content_oid: int) -> Relation:
    columns = (Column("prefix", _TEXT, -1, False), Column("content", content_oid, -1, False))
    return Relation(0, SCHEMA, prefix, "n", columns)


def content_value(content: bytes) -> tuple[bytes, bool]:
    """The value of the column, and whether it is JSON."""
    try:
        orjson.loads(content)
    except orjson.JSONDecodeError:
        try:
            content.decode()
        except UnicodeDecodeError:
            return b"\\x" + content.hex().encode(), False
        return content, False
    return content, True

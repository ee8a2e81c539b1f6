"""Documents of rows: the ``_id`` that a row's primary key makes, and the key that an ``_id`` was made of.

**``_id``** is the primary key's values joined by ``-``, as in Sequin. With several columns, ``-`` and ``\\`` inside of
a value are escaped with ``\\``, so that no two keys share an id; the value of a single column needs no escape and has
none (a UUID stays as it is). An id above 512 bytes, the limit of the server, and an empty one, become a readable
prefix and a SHA-256.

**Back again.** The ``_id`` holds the values as PostgreSQL prints them; the document does not: it has a timestamp in ISO
8601, and of a number what is left after the server has filtered the ``_source`` (1.50 comes back as 1.5). So a key is
read off its ``_id``. Only a hashed one is taken from the document, where it is text, and only if it makes the very
same ``_id``; so the key of a hashed document may be unknown, and never a wrong one.

A document that no row can have made has no key: its ``_id`` does not have as many parts as the key has columns, or its
``_source`` lacks one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256

ID_BYTES = 512
_ID_PREFIX_BYTES = 400
_HASHED = re.compile(r"(.*)-[0-9a-f]{64}", re.DOTALL)
_PART = re.compile(r"((?:[^\\-]|\\.)*)-", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)

Source = Mapping[str, object]


def document_id(pks: Sequence[str]) -> str:
    """See the module's docstring."""
    if len(pks) == 1:
        identity = pks[0]
    else:
        identity = "-".join(
            part.replace("\\", "\\\\").replace("-", "\\-") if "-" in part or "\\" in part else part for part in pks
        )
    if identity and len(identity) * 4 <= ID_BYTES:  # no character takes more than four bytes
        return identity
    encoded = identity.encode()
    if 0 < len(encoded) <= ID_BYTES:
        return identity
    prefix = encoded[:_ID_PREFIX_BYTES].decode("utf-8", "ignore")
    return f"{prefix}-{sha256(encoded).hexdigest()}"


def key_of_record(identity: str, source: Source | None, columns: Sequence[str]) -> tuple[str, ...] | None:
    """The key of a document that is the row. ``source`` holds the key's columns at least; None: it is not stored."""
    held: list[str] = []
    if source is not None:
        if any(source.get(column) is None for column in columns):
            return None
        held = [_text(source[column]) for column in columns]
    if _may_be_hashed(identity):
        return tuple(held) if held and document_id(held) == identity else None
    values = (identity,) if len(columns) == 1 else _parts(identity)
    return values if len(values) == len(columns) and document_id(values) == identity else None


def key_of_message(identity: str, source: Source | None, table: tuple[str, str]) -> tuple[str, ...] | None:
    """The key of a document that is Sequin's message, if it is one of this table."""
    metadata = source.get("metadata") if source is not None else None
    if not isinstance(metadata, dict) or (metadata.get("table_schema"), metadata.get("table_name")) != table:
        return None
    values = metadata.get("record_pks")
    if not isinstance(values, list):
        return None
    texts = tuple([_text(value) for value in values])
    return texts if texts and document_id(texts) == identity else None


def parsed(answer: bytes) -> object:
    """JSON whose numbers stay the text that they were."""
    return json.loads(answer, parse_float=str, parse_int=str)


def _may_be_hashed(identity: str) -> bool:
    match = _HASHED.fullmatch(identity)
    if match is None:
        return False
    prefix_bytes = len(match[1].encode())
    return prefix_bytes == 0 or _ID_PREFIX_BYTES - 3 <= prefix_bytes <= _ID_PREFIX_BYTES  # cut before a character


def _parts(identity: str) -> tuple[str, ...]:
    """What was joined; what was never joined so has other parts or makes another id."""
    return tuple(_ESCAPED.sub(r"\1", part) for part in _PART.findall(identity + "-"))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value)

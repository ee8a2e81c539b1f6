"""``tx: true``: what a message says of its transaction, ``metadata.tx``: ``{"id": 742, "total": 3, "index": 0}``.

``id`` is the transaction's id in its 32 bits, as ``pg_current_xact_id()`` shows it modulo 2**32; null for an existing
row, which comes of no transaction. ``index`` is ``commit_idx``: the place of the operation in the transaction, which
counts the operations on all published tables. ``total`` is how many operations there are; null where that is not known:
a transaction is streamed before its end is read, so only one that fits in one go at the socket has it.
"""

from __future__ import annotations

from spillway.change import ACTIONS
from spillway.chunk import ACTION, INDEX, LARGE, LOW, Message

_READ = ACTIONS.index("read")


def tx(message: Message, total: int = 0) -> bytes:
    """To stand behind the other metadata in a body. ``total``: 0 is unknown."""
    chunk, index = message.span.chunk, message.span.indices[message.place]
    xid = chunk.word(index, LARGE) >> 32
    if chunk.byte(index, ACTION) == _READ:
        return b',"tx":{"id":null,"total":null,"index":null}'
    return b',"tx":{"id":%b,"total":%b,"index":%d}' % (
        _or_null(xid),
        _or_null(total),
        chunk.word(index, INDEX) & LOW,
    )


def _or_null(number: int) -> bytes:
    return b"%d" % number if number else b"null"

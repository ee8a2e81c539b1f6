"""pgoutput: bytes of logical replication to chunks of changes rendered as JSON. The contract is in `frames` and
`decoder`; `Decoder` here is the twin that runs (`spillway.impl`).

Read in this order: relation (what is known of a table), frames, messages, scalars, nested, types, lines, filters,
literals, like, paths, conditions, plan, transaction, emitted, decoder, identity.
"""

from typing import TYPE_CHECKING

from spillway import impl
from spillway.pgoutput.frames import Committed, Copy, Ended, Full, Keepalive, Renew, Stop
from spillway.pgoutput.identity import concerns_inserts, unkeyable, unroutable
from spillway.pgoutput.messages import ProtocolError
from spillway.pgoutput.plan import DatabaseMeta, primary_key
from spillway.pgoutput.relation import Column, Relation, TableInfo, TypeInfo

if TYPE_CHECKING or impl.native is None:
    from spillway.pgoutput.decoder import Decoder
else:
    Decoder = impl.native.Decoder

__all__ = [
    "Column",
    "Committed",
    "Copy",
    "DatabaseMeta",
    "Decoder",
    "Ended",
    "Full",
    "Keepalive",
    "ProtocolError",
    "Relation",
    "Renew",
    "Stop",
    "TableInfo",
    "TypeInfo",
    "concerns_inserts",
    "primary_key",
    "unkeyable",
    "unroutable",
]

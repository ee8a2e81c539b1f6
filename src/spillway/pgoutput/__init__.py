"""pgoutput: bytes of logical replication to changes rendered as JSON. The contract is in `decoder`.

Read in this order: relation (what is known of a table), messages, scalars, nested, types, plan, decoder, identity.
"""

from spillway.pgoutput.decoder import Decoder, Event
from spillway.pgoutput.identity import unkeyable
from spillway.pgoutput.messages import Begin, Commit, ProtocolError, Truncation
from spillway.pgoutput.plan import DatabaseMeta, primary_key
from spillway.pgoutput.relation import Column, Relation, TableInfo, TypeInfo

__all__ = [
    "Begin",
    "Column",
    "Commit",
    "DatabaseMeta",
    "Decoder",
    "Event",
    "ProtocolError",
    "Relation",
    "TableInfo",
    "Truncation",
    "TypeInfo",
    "primary_key",
    "unkeyable",
]

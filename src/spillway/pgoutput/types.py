"""Which renderer a type has.

Built-in types are known here by OID (they are fixed for ever: PostgreSQL's ``pg_type.dat``), everything else comes
with the table from the catalogue as `TypeInfo`. ``None`` as a renderer means that the text is JSON as it stands.

A type that neither knows (dropped since the row was written) is given as text. ``int2vector`` and ``oidvector`` stay
strings, as do money, ranges, the geometric and the text search types.
"""

from __future__ import annotations

from collections.abc import Mapping

from spillway.pgoutput import scalars
from spillway.pgoutput.nested import array, composite
from spillway.pgoutput.relation import TypeInfo
from spillway.pgoutput.scalars import Renderer

# OID: (OID of its array, renderer)
_BUILT_IN: dict[int, tuple[int, Renderer | None]] = {
    16: (1000, scalars.boolean),
    17: (1001, scalars.bytea),
    18: (1002, scalars.text),  # "char"
    19: (1003, scalars.text),  # name
    20: (1016, None),  # int8
    21: (1005, None),  # int2
    22: (1006, scalars.quoted),  # int2vector
    23: (1007, None),  # int4
    25: (1009, scalars.text),
    26: (1028, None),  # oid
    27: (1010, scalars.quoted),  # tid
    28: (1011, scalars.quoted),  # xid
    29: (1012, scalars.quoted),  # cid
    30: (1013, scalars.quoted),  # oidvector
    114: (199, scalars.json),
    142: (143, scalars.text),  # xml
    600: (1017, scalars.quoted),  # point
    601: (1018, scalars.quoted),  # lseg
    602: (1019, scalars.quoted),  # path
    603: (1020, scalars.quoted),  # box
    604: (1027, scalars.quoted),  # polygon
    628: (629, scalars.quoted),  # line
    650: (651, scalars.quoted),  # cidr
    700: (1021, scalars.number),  # float4
    701: (1022, scalars.number),  # float8
    718: (719, scalars.quoted),  # circle
    774: (775, scalars.quoted),  # macaddr8
    790: (791, scalars.text),  # money
    829: (1040, scalars.quoted),  # macaddr
    869: (1041, scalars.quoted),  # inet
    1033: (1034, scalars.text),  # aclitem
    1042: (1014, scalars.text),  # bpchar
    1043: (1015, scalars.text),  # varchar
    1082: (1182, scalars.date),
    1083: (1183, scalars.quoted),  # time
    1114: (1115, scalars.timestamp),
    1184: (1185, scalars.timestamptz),
    1186: (1187, scalars.interval),
    1266: (1270, scalars.quoted),  # timetz
    1560: (1561, scalars.quoted),  # bit
    1562: (1563, scalars.quoted),  # varbit
    1700: (1231, scalars.number),  # numeric
    2950: (2951, scalars.quoted),  # uuid
    2970: (2949, scalars.quoted),  # txid_snapshot
    3220: (3221, scalars.quoted),  # pg_lsn
    3614: (3643, scalars.text),  # tsvector
    3615: (3645, scalars.text),  # tsquery
    3802: (3807, scalars.json),  # jsonb
    4072: (4073, scalars.text),  # jsonpath
    5038: (5039, scalars.quoted),  # pg_snapshot
    5069: (271, scalars.quoted),  # xid8
    # Ranges and multiranges: their text holds quotes.
    3904: (3905, scalars.text),
    3906: (3907, scalars.text),
    3908: (3909, scalars.text),
    3910: (3911, scalars.text),
    3912: (3913, scalars.text),
    3926: (3927, scalars.text),
    4451: (6150, scalars.text),
    4532: (6151, scalars.text),
    4533: (6152, scalars.text),
    4534: (6153, scalars.text),
    4535: (6155, scalars.text),
    4536: (6157, scalars.text),
    # regproc, regprocedure, regoper, regoperator, regclass, regtype, regconfig, regdictionary, regnamespace, regrole,
    # regcollation, refcursor: names.
    24: (1008, scalars.text),
    2202: (2207, scalars.text),
    2203: (2208, scalars.text),
    2204: (2209, scalars.text),
    2205: (2210, scalars.text),
    2206: (2211, scalars.text),
    3734: (3735, scalars.text),
    3769: (3770, scalars.text),
    4089: (4090, scalars.text),
    4096: (4097, scalars.text),
    4191: (4192, scalars.text),
    1790: (2201, scalars.text),
}
_BOX = 603
_RENDERERS: dict[int, Renderer | None] = {oid: renderer for oid, (_, renderer) in _BUILT_IN.items()}
_RENDERERS |= {
    array_oid: array(renderer, ";" if oid == _BOX else ",") for oid, (array_oid, renderer) in _BUILT_IN.items()
}

# Types of extensions that are more than text; an extension's types have no fixed OID.
_BY_NAME: dict[str, Renderer] = {"vector": scalars.vector, "halfvec": scalars.vector}

# Text of these built-in types never holds a character that a key or a JSON string has to escape.
PLAIN_OIDS = frozenset({20, 21, 23, 26, 2950})


def renderer_for(oid: int, types: Mapping[int, TypeInfo]) -> Renderer | None:
    if oid in _RENDERERS:
        return _RENDERERS[oid]
    info = types.get(oid)
    if info is None:
        return scalars.text
    match info.kind:
        case "domain":
            return renderer_for(info.base_oid, types)
        case "array":
            return array(renderer_for(info.element_oid, types), info.delimiter)
        case "composite":
            return composite([(name, renderer_for(attribute, types)) for name, attribute in info.attributes])
        case "base":
            return _BY_NAME.get(info.name, scalars.text)
        case "enum" | "range" | "multirange":
            return scalars.text

"""Every type, with random values, rendered by the decoder and by PostgreSQL itself, under hostile settings.

The expectation is SQL: ``to_json`` where PostgreSQL's JSON is what we promise, its text where we promise a string,
and a few functions for timestamps, intervals and dates, whose form is ours. Numbers are compared digit by digit.
"""

from __future__ import annotations

import json
import random
import struct
import uuid
from collections.abc import Callable

import pytest

from pgoutput.capture import Capture, connect, set_hostile, slot
from pgoutput.frames import changes_of
from spillway.change import Change

ROWS = 40

Make = Callable[[random.Random], str]

_FUNCTIONS = (
    """CREATE FUNCTION iso_year(y int) RETURNS text IMMUTABLE LANGUAGE sql AS $$
       SELECT CASE WHEN y > 9999 THEN '+' || y WHEN y > 0 THEN lpad(y::text, 4, '0')
                   WHEN y = -1 THEN '0000' ELSE '-' || lpad((-y - 1)::text, 4, '0') END $$""",
    """CREATE FUNCTION iso(t timestamp) RETURNS text IMMUTABLE LANGUAGE sql AS $$
       SELECT CASE WHEN isfinite(t)
                   THEN public.iso_year(extract(year FROM t)::int) || to_char(t, '-MM-DD"T"HH24:MI:SS.US')
                   ELSE t::text END $$""",
    """CREATE FUNCTION iso(t timestamptz) RETURNS text IMMUTABLE LANGUAGE sql AS $$
       SELECT CASE WHEN isfinite(t) THEN public.iso(t AT TIME ZONE 'UTC') || 'Z' ELSE t::text END $$""",
    """CREATE FUNCTION iso(d date) RETURNS text IMMUTABLE LANGUAGE sql AS $$
       SELECT CASE WHEN isfinite(d) THEN split_part(public.iso(d::timestamp), 'T', 1) ELSE d::text END $$""",
    """CREATE FUNCTION parts(i interval) RETURNS json IMMUTABLE LANGUAGE sql AS $$
       SELECT CASE WHEN i IS NULL THEN NULL ELSE json_build_object(
           'months', (extract(year FROM i) * 12 + extract(month FROM i))::bigint, 'days', extract(day FROM i)::bigint,
           'microseconds', ((extract(hour FROM i) * 60 + extract(minute FROM i)) * 60000000
                            + extract(microseconds FROM i))::bigint) END $$""",
    "CREATE TYPE mood AS ENUM ('so so', 'very \"good\"', '', 'NULL', 'a,b')",
    "CREATE TYPE inside AS (n numeric, t text, l text[])",
    'CREATE TYPE outside AS (id int, i inside, many inside[], j json, "odd %b name" bool)',
    "CREATE DOMAIN price AS numeric(12, 3)",
    "CREATE DOMAIN names AS text[]",
    "CREATE DOMAIN nicer_names AS names",
    "CREATE DOMAIN shaped AS inside",
    "CREATE EXTENSION hstore",
    "CREATE EXTENSION citext",
)


def _word(r: random.Random) -> str:
    alphabet = "aN{}(),;\"\\ \n\r\t\x01UL=[]:'é😀\u2028%"
    return "".join(r.choice(alphabet) for _ in range(r.randrange(8)))


def _pick(*values: str) -> Make:
    return lambda r: r.choice(values)


def _integer(bits: int) -> Make:
    return lambda r: str(r.randrange(-(1 << bits - 1), 1 << bits - 1))


def _numeric(r: random.Random) -> str:
    if r.random() < 0.1:
        return "NaN"
    digits = "".join(r.choice("0123456789") for _ in range(r.randrange(1, 40)))
    return r.choice(["", "-"]) + digits + r.choice(["", ".", ".000", f".{digits}"])


def _float8(r: random.Random) -> str:
    return r.choice(["NaN", "Infinity", "-Infinity", "-0", "1e20", "1e-5", repr(r.random()), repr(_any_double(r))])


def _any_double(r: random.Random) -> float:
    return struct.unpack(">d", r.randbytes(8))[0] if r.random() < 0.5 else r.uniform(-1e300, 1e300)


def _float4(r: random.Random) -> str:
    return r.choice(["NaN", "Infinity", "-Infinity", "0.1", repr(r.uniform(-1e10, 1e10)), "1e-20"])


def _json(r: random.Random, depth: int = 2) -> str:
    kind = r.randrange(7 if depth else 4)
    gap = r.choice(["", " ", "\n", "\r\n\t"])
    if kind == 0:
        return json.dumps(_word(r), ensure_ascii=r.random() < 0.5)
    if kind == 1:
        return r.choice(["null", "true", "false"])
    if kind in {2, 3}:
        return r.choice(["0.10", "-1e5", "123456789012345678901234567890.1234567890", "7"])
    if kind == 4:
        return "[" + f",{gap}".join(_json(r, depth - 1) for _ in range(r.randrange(4))) + gap + "]"
    members = (f"{json.dumps(_word(r))}{gap}:{gap}{_json(r, depth - 1)}" for _ in range(r.randrange(4)))
    return "{" + gap + ",".join(members) + "}"


def _date(r: random.Random) -> str:
    if r.random() < 0.15:
        return r.choice(["infinity", "-infinity"])
    year = r.choice([1, 2024, 9999, 10000, 200000, r.randrange(1, 4000)])
    era = " BC" if year < 4000 and r.random() < 0.3 else ""
    return f"{year:04d}-{r.randrange(1, 13):02d}-{r.randrange(1, 29):02d}{era}"


def _clock(r: random.Random) -> str:
    fraction = r.choice(["", ".5", ".120000", f".{r.randrange(1_000_000):06d}"])
    return f"{r.randrange(24):02d}:{r.randrange(60):02d}:{r.randrange(60):02d}{fraction}"


def _timestamp(r: random.Random, zone: str = "") -> str:
    date = _date(r)
    if "infinity" in date:
        return date
    day, _, era = date.partition(" ")
    return f"{day} {_clock(r)}{zone} {era}".rstrip()


def _timestamptz(r: random.Random) -> str:
    return _timestamp(r, r.choice(["+00", "+05:45", "-11"]))


def _interval(r: random.Random) -> str:
    parts = [
        f"{r.randrange(-20, 20)} years",
        f"{r.randrange(-20, 20)} mons",
        f"{r.randrange(-40, 40)} days",
        f"{r.choice(['', '-'])}{r.choice([0, 7, 99, 100, 1234567])}:{_clock(r)[3:]}",
    ]
    chosen = r.sample(parts, r.randrange(1, 5))
    return " ".join(chosen)


def _array(make: Make, *, null: str = "NULL", delimiter: str = ",") -> Make:
    def quote(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def literal(r: random.Random) -> str:
        def item() -> str:
            return null if r.random() < 0.2 else quote(make(r))

        size = r.randrange(4)
        if r.random() < 0.3 and size:
            return "{" + delimiter.join("{" + delimiter.join(item() for _ in range(size)) + "}" for _ in range(2)) + "}"
        items = "{" + delimiter.join(item() for _ in range(size)) + "}"
        lower = r.randrange(-3, 4)
        return f"[{lower}:{lower + size - 1}]={items}" if size and r.random() < 0.3 else items

    return literal


def _row_text(*makes: Make) -> Make:
    def literal(r: random.Random) -> str:
        fields = []
        for make in makes:
            value = make(r)
            escaped = value.replace("\\", "\\\\").replace('"', '""')
            fields.append("" if r.random() < 0.2 else f'"{escaped}"')
        return "(" + ",".join(fields) + ")"

    return literal


def _range(make: Make) -> Make:
    def literal(r: random.Random) -> str:
        return r.choice(["empty", f'["{make(r)}",)', f'(,"{make(r)}"]', "(,)"])

    return literal


_INSIDE = _row_text(_numeric, _word, _array(_word))
_OUTSIDE = _row_text(_integer(32), _INSIDE, _array(_INSIDE), _json, _pick("t", "f"))

_AS_JSON, _AS_TEXT, _AS_ISO = "to_json({0})", "to_json({0}::text)", "to_json(public.iso({0}))"
_ONE_DIMENSION_ISO = """(SELECT CASE WHEN {0} IS NOT NULL
    THEN coalesce(json_agg(public.iso(e) ORDER BY n), '[]') END FROM unnest({0}) WITH ORDINALITY u (e, n))"""

# SQL type: (random literal, the expectation)
TYPES: dict[str, tuple[Make, str]] = {
    "int2": (_integer(16), _AS_JSON),
    "int4": (_integer(32), _AS_JSON),
    "int8": (_integer(64), _AS_JSON),
    "oid": (_pick("0", "4294967295"), "to_json({0}::text::bigint)"),
    "numeric": (_numeric, _AS_JSON),
    "float4": (_float4, _AS_JSON),
    "float8": (_float8, _AS_JSON),
    "bool": (_pick("t", "f"), _AS_JSON),
    "text": (_word, _AS_JSON),
    "varchar(20)": (_word, _AS_JSON),
    "char(9)": (_word, "to_json(left({0}::text || repeat(' ', 9), 9))"),
    "name": (_word, _AS_JSON),
    '"char"': (_pick("a", '"', "\\"), _AS_JSON),
    "public.citext": (_word, _AS_TEXT),
    "json": (_json, _AS_JSON),
    "jsonb": (_json, _AS_JSON),
    "bytea": (lambda r: "\\x" + r.randbytes(r.randrange(20)).hex(), _AS_TEXT),
    "uuid": (lambda r: str(uuid.UUID(bytes=r.randbytes(16))), _AS_TEXT),
    "date": (_date, _AS_ISO),
    "timestamp": (_timestamp, _AS_ISO),
    "timestamptz": (_timestamptz, _AS_ISO),
    "timestamp(2)": (_timestamp, _AS_ISO),
    "time": (_clock, _AS_TEXT),
    "timetz": (lambda r: _clock(r) + r.choice(["+00", "-03:30"]), _AS_TEXT),
    "interval": (_interval, "public.parts({0})"),
    "inet": (_pick("10.0.0.1", "10.1.2.3/8", "::1", "fe80::1/64"), _AS_JSON),
    "cidr": (_pick("10.0.0.0/8", "fe80::/64"), _AS_JSON),
    "macaddr": (_pick("08:00:2b:01:02:03"), _AS_TEXT),
    "macaddr8": (_pick("08:00:2b:01:02:03:04:05"), _AS_TEXT),
    "bit(5)": (_pick("00000", "10101"), _AS_TEXT),
    "varbit": (_pick("", "1", "0010"), _AS_TEXT),
    "money": (_pick("1234.50", "-0.01", "999999999"), _AS_TEXT),
    "xml": (_pick('<a b="1">\n x</a>', "<é/>"), _AS_TEXT),
    "pg_lsn": (_pick("0/0", "16/B374D848"), _AS_TEXT),
    "point": (_pick("(1,2)", "(0.1,-1e-20)", "(NaN,Infinity)"), _AS_TEXT),
    "line": (_pick("{1,2,3}"), _AS_TEXT),
    "lseg": (_pick("[(1,2),(3,4)]"), _AS_TEXT),
    "box": (_pick("(3,4),(1,2)"), _AS_TEXT),
    "path": (_pick("((1,2),(3,4))", "[(1,2),(3,4)]"), _AS_TEXT),
    "polygon": (_pick("((1,2),(3,4),(0,0))"), _AS_TEXT),
    "circle": (_pick("<(1,2),3>"), _AS_TEXT),
    "tsvector": (_pick("'a b':1A,2 '''q''':3", ""), _AS_TEXT),
    "tsquery": (_pick("a & !b | 'c d'", ""), _AS_TEXT),
    "int2vector": (_pick("", "1 2 3"), _AS_TEXT),
    "oidvector": (_pick("", "1 2 3"), _AS_TEXT),
    "regclass": (_pick("pg_class", "pg_type"), _AS_TEXT),
    "jsonpath": (_pick('$.a[*] ? (@ > 1)."b"'), _AS_TEXT),
    "txid_snapshot": (_pick("10:20:10,14,15"), _AS_TEXT),
    "int4range": (_range(_integer(16)), _AS_TEXT),
    "numrange": (_range(_pick("1.50", "-3")), _AS_TEXT),
    "tsrange": (_range(_pick("2024-01-02 03:04:05.6")), _AS_TEXT),
    "tstzrange": (_range(_pick("2024-01-02 03:04:05.6+05:45")), _AS_TEXT),
    "daterange": (_range(_pick("2024-01-02")), _AS_TEXT),
    "public.hstore": (_pick('"a"=>"1", "b c"=>NULL', '"q\\"q"=>"x\\\\y"'), _AS_TEXT),
    "public.mood": (_pick("so so", 'very "good"', "", "NULL", "a,b"), _AS_TEXT),
    "public.price": (_pick("1.5", "NaN", "-123456789.125"), _AS_JSON),
    "public.nicer_names": (_array(_word), _AS_JSON),
    "public.shaped": (_INSIDE, _AS_JSON),
    "public.inside": (_INSIDE, _AS_JSON),
    "public.outside": (_OUTSIDE, _AS_JSON),
    "int4[]": (_array(_integer(32)), _AS_JSON),
    "int8[]": (_array(_integer(64)), _AS_JSON),
    "numeric[]": (_array(_numeric), _AS_JSON),
    "float8[]": (_array(_float8), _AS_JSON),
    "bool[]": (_array(_pick("t", "f")), _AS_JSON),
    "text[]": (_array(_word), _AS_JSON),
    "bytea[]": (_array(lambda r: "\\x" + r.randbytes(3).hex()), _AS_JSON),
    "uuid[]": (_array(lambda r: str(uuid.UUID(bytes=r.randbytes(16)))), _AS_JSON),
    "json[]": (_array(_json), _AS_JSON),
    "jsonb[]": (_array(_json), _AS_JSON),
    "box[]": (_array(_pick("(3,4),(1,2)", "(0,0),(0,0)"), delimiter=";"), _AS_JSON),
    "tsrange[]": (_array(_range(_pick("2024-01-02 03:04:05.6"))), _AS_JSON),
    "timestamptz[]": (
        lambda r: "{" + ",".join(f'"{_timestamptz(r)}"' for _ in range(r.randrange(4))) + "}",
        _ONE_DIMENSION_ISO,
    ),
    "date[]": (lambda r: "{" + ",".join(f'"{_date(r)}"' for _ in range(r.randrange(4))) + "}", _ONE_DIMENSION_ISO),
    "public.mood[]": (_array(_pick("so so", 'very "good"', "", "NULL", "a,b")), _AS_JSON),
    "public.inside[]": (_array(_INSIDE), _AS_JSON),
    "public.outside[]": (_array(_OUTSIDE), _AS_JSON),
    "public.price[]": (_array(_pick("1.5", "NaN")), _AS_JSON),
    "public.nicer_names[]": (_array(_array(_word)), _AS_JSON),
}
# Since PostgreSQL 14.
NEWER_TYPES: dict[str, tuple[Make, str]] = {
    "int4multirange": (_pick("{}", "{[1,3),[5,)}"), _AS_TEXT),
    "tstzmultirange": (_pick("{}", '{["2024-01-02 03:04:05.6+05:45",)}'), _AS_TEXT),
    "datemultirange[]": (_array(_pick("{}", "{[2024-01-01,2024-02-01)}")), _AS_JSON),
    "xid8": (_pick("0", "18446744073709551615"), _AS_TEXT),
    "pg_snapshot": (_pick("10:20:10,14,15"), _AS_TEXT),
    "numeric": (_pick("Infinity", "-Infinity"), _AS_JSON),
}
# Since PostgreSQL 17.
NEWEST_TYPES: dict[str, tuple[Make, str]] = {"interval": (_pick("infinity", "-infinity"), _AS_TEXT)}


def _exact(text: bytes | str) -> object:
    """JSON with its numbers as printed."""
    return json.loads(text, parse_float=lambda s: ("number", s), parse_int=lambda s: ("number", s))


def _types(server_version: int) -> list[tuple[str, Make, str]]:
    lists = [TYPES]
    if server_version >= 140000:
        lists.append(NEWER_TYPES)
    if server_version >= 170000:
        lists.append(NEWEST_TYPES)
    return [(name, make, expected) for types in lists for name, (make, expected) in types.items()]


@pytest.mark.parametrize("seed", [1, 2])
def test_every_type_is_what_postgres_means(any_database: str, seed: int) -> None:
    r = random.Random(seed)
    set_hostile(any_database)
    with connect(any_database, search_path="public") as session:
        for statement in _FUNCTIONS:
            session.execute(statement)
        types = _types(session.info.server_version)
        columns = ", ".join(f"c{index} {name}" for index, (name, _, _) in enumerate(types))
        session.execute(f"CREATE TABLE public.t (id int PRIMARY KEY, {columns})")
    with slot(any_database) as (session, capture):
        places = ", ".join(f"%s::text::{name}" for name, _, _ in types)
        with session.transaction():
            for number in range(ROWS):
                values = [None if r.random() < 0.1 else make(r) for _, make, _ in types]
                session.execute(f"INSERT INTO public.t VALUES ({number}, {places})", values)
        changes = capture.changes()
        page = capture.page("SELECT * FROM public.t ORDER BY id", capture.relations[-1].oid)
        expressions = ", ".join(
            f"({expected.format(f'c{index}')})::text" for index, (_, _, expected) in enumerate(types)
        )
        expected_rows = session.execute(f"SELECT {expressions} FROM public.t ORDER BY id").fetchall()
    assert len(changes) == ROWS
    assert [change.record for change in changes_of(page)] == [change.record for change in changes]
    for number, (change, expected_row) in enumerate(zip(changes, expected_rows, strict=True)):
        assert b"\n" not in change.body
        assert b"\r" not in change.body
        record = _exact(change.record)
        assert isinstance(record, dict)
        assert list(record) == ["id", *(f"c{index}" for index in range(len(types)))]
        for index, (name, _, _) in enumerate(types):
            text = expected_row[index]
            expected = None if text is None else _exact(str(text))
            assert record[f"c{index}"] == expected, f"row {number}: {name}"


def test_json_is_verbatim_but_for_line_breaks(any_database: str) -> None:
    with slot(any_database, "CREATE TABLE t (id int PRIMARY KEY, j json, l json[])") as (session, capture):
        text = '{"b":\n1.10, "a":\r\n"\\ud800\\u0000", "b" : 1e400}'
        session.execute("INSERT INTO t VALUES (1, %s, ARRAY[%s]::json[])", [text, text])
        (change,) = capture.changes()
    line = text.replace("\n", " ").replace("\r", " ").encode()
    assert change.record == b'{"id":1,"j":' + line + b',"l":[' + line + b"]}"


KEY_TYPES = ("timestamptz", "bool", "numeric", "bytea", "interval", "date", "float8", "int4[]")


def test_primary_keys_are_postgres_text_whatever_the_settings(any_database: str) -> None:
    set_hostile(any_database)
    columns = ", ".join(f"c{index} {name}" for index, name in enumerate(KEY_TYPES))
    table = f"CREATE TABLE public.t ({columns}, PRIMARY KEY (c3, c1, c0, c2, c4, c5, c6, c7))"
    with slot(any_database, table) as (session, capture):
        session.execute(
            "INSERT INTO public.t VALUES ('2024-01-02 03:04:05.5+05:45', true, 1.50, '\\x00ff', '1 year -2 days',"
            " '2024-02-29', 0.1, '{1,2}')"
        )
        session.execute("DELETE FROM public.t")
        inserted, deleted = capture.changes()
    assert inserted.pks == (
        "2024-01-01 21:19:05.5+00", "t", "1.50", "\\x00ff", "1 year -2 days", "2024-02-29", "0.1", "{1,2}",
    )  # fmt: skip
    assert deleted.pks == inserted.pks
    assert deleted.key == inserted.key


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP"])
def test_other_encodings_come_as_utf8(any_pg: object, encoding: str) -> None:
    text = {"LATIN1": "café", "EUC_JP": "日本"}[encoding]
    change = _in_encoding(any_pg, encoding, f"'{text}'")
    assert change.record.decode() == f'{{"id":1,"t":"{text}","j":{{"a":"{text}"}}}}'


def test_bytes_of_sql_ascii_that_are_not_utf8_are_shown(any_pg: object) -> None:
    change = _in_encoding(any_pg, "SQL_ASCII", "convert_from('\\x636166e9', 'SQL_ASCII')", client_encoding="SQL_ASCII")
    assert json.loads(change.record) == {"id": 1, "t": "caf\\xe9", "j": {"a": "caf\\xe9"}}


def _in_encoding(server: object, encoding: str, value: str, **settings: str) -> Change:
    from servers.postgres import Postgres

    assert isinstance(server, Postgres)
    name = f"encoded_{encoding.lower()}"
    dsn = server.create_database(name, encoding=encoding)
    try:
        with slot(dsn, "CREATE TABLE t (id int PRIMARY KEY, t text, j json)", settings=settings) as (session, capture):
            assert isinstance(capture, Capture)
            session.execute(f"INSERT INTO t VALUES (1, {value}, ('{{\"a\":\"' || {value} || '\"}}')::json)")
            (change,) = capture.changes()
            return change
    finally:
        server.drop_database(name)

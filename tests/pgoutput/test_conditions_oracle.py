"""Every operator on every type, told by the decoders and by PostgreSQL: ``SELECT ... WHERE column op literal``."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg
import pytest
from psycopg import sql

from pgoutput import frames
from pgoutput.capture import connect
from pgoutput.compare import Given, filters_of
from pgoutput.frames import Connection, xlog
from pgoutput.given import If
from pgoutput.twins import TWINS
from spillway.chunk import YES
from spillway.errors import Finding
from spillway.pgoutput import Column, Relation, TableInfo, TypeInfo
from spillway.pgoutput.conditions import Operator, compiled

Session = psycopg.Connection[tuple[object, ...]]

SIGNS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
ALPHABET = "aàAbB ~é😀%_\\\t0"
NUMBERS = ["0", "-0", "1", "-1", "1.0", "1.10", "0.1", "-0.1", "9.99", "1e3", "123456789.123456789", "0.30000001192",
           "NaN", "Infinity", "-Infinity", "1e-7", "3.4e38", "-2.5", "16777217", "0.1000000014901161"]  # fmt: skip
MOMENTS = ["2024-01-02", "2024-02-29", "0044-03-15 BC", "0001-01-01", "0001-12-31 BC", "infinity", "-infinity",
           "10000-01-01", "1969-12-31", "1970-01-01", "4713-01-01 BC", "294276-12-31"]  # fmt: skip
CLOCKS = ["", " 00:00:00", " 23:59:59.999999", "T12:34:56", " 12:34:56.5", " 12:34"]
JSONS = ['{"a": 1}', '{"a": 1.0}', '{"a": "1"}', '{"a": null}', "{}", '{"a": [10, "x", null, {"b": true}]}', "7", '"a"',
         '{"a": true}', '{"a": 12345678901234567890.5}', '{"a": "aé"}', "[1, 2]", "null", '{"0": 5}',
         '{"a": {"b": "~"}}']  # fmt: skip


def _words(r: random.Random, longest: int) -> list[str]:
    return ["", " ", *("".join(r.choice(ALPHABET) for _ in range(r.randrange(longest + 1))) for _ in range(25))]


def _integers(r: random.Random, bits: int) -> list[str]:
    edge = 1 << (bits - 1)
    return [str(n) for n in (0, 1, -1, edge - 1, -edge, *(r.randrange(-edge, edge) for _ in range(8)), 7, 42)]


def _uuids(r: random.Random) -> list[str]:
    return [str(uuid.UUID(int=r.getrandbits(128))) for _ in range(8)]


@dataclass(frozen=True)
class Kind:
    type: str
    values: Sequence[str]
    ordered: bool = True
    like: bool = False


def _kinds() -> Iterator[Kind]:
    r = random.Random(6)
    yield Kind("int2", _integers(r, 16))
    yield Kind("int4", _integers(r, 32))
    yield Kind("int8", _integers(r, 64))
    yield Kind("oid", ["0", "1", "4294967295", "16384"])
    yield Kind("numeric", NUMBERS)
    yield Kind("numeric(12,2)", NUMBERS[:12])
    yield Kind("price", NUMBERS[:12])
    yield Kind("float4", NUMBERS)
    yield Kind("float8", NUMBERS)
    yield Kind("bool", ["true", "f", "on", "no"])
    yield Kind("text", _words(r, 5), like=True)
    yield Kind("varchar", _words(r, 3), like=True)
    yield Kind("char(5)", _words(r, 5), like=True)
    yield Kind("name", _words(r, 3), like=True)
    yield Kind("uuid", [*_uuids(r), _uuids(r)[0].upper(), "{" + _uuids(r)[1].replace("-", "") + "}"])
    yield Kind("date", [*MOMENTS, "5874897-12-31"])
    yield Kind("timestamp", [day.replace(" BC", "") + time + (" BC" if "BC" in day else "")
                             for day in MOMENTS if "inf" not in day for time in CLOCKS] + ["infinity"])  # fmt: skip
    yield Kind("timestamptz", ["2024-01-02T03:04:05Z", "2024-01-02 03:04:05+00", "2024-01-02 03:04:05-0130",
                               "2024-01-02 05:04:05+02:00", "infinity", "-infinity", "0044-03-15 12:00:00+01 BC",
                               "2024-01-02"])  # fmt: skip
    yield Kind("mood", ["sad", "happy", "so so"], ordered=False)
    yield Kind("inet", ["10.0.0.1", "::1", "10.0.0.0/8"], ordered=False)
    yield Kind("int4[]", ["{1,2}", "{}", "{1,NULL}"], ordered=False)


KINDS = list(_kinds())


@pytest.fixture
def session(database: str) -> Iterator[Session]:
    with connect(database) as session:
        session.execute("CREATE TYPE mood AS ENUM ('sad', 'so so', 'happy')")
        session.execute("CREATE DOMAIN price AS numeric(12, 3)")
        yield session


def _relation(session: Session, type_name: str) -> tuple[Relation, TableInfo]:
    session.execute(f"DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, v {type_name})")  # type: ignore[arg-type]
    row = session.execute("SELECT atttypid::int, atttypmod FROM pg_attribute WHERE attrelid = 't'::regclass "
                          "AND attname = 'v'").fetchone()  # fmt: skip
    assert row is not None
    oid, modifier = int(str(row[0])), int(str(row[1]))
    types = {}
    if type_name == "price":
        types[oid] = TypeInfo(oid, "price", "domain", base_oid=1700)
    if type_name == "mood":
        types[oid] = TypeInfo(oid, "mood", "enum")
    columns = (Column("id", 23, -1, True), Column("v", oid, modifier, False))
    return Relation(16_400, "public", "jobs", "d", columns), TableInfo(16_400, ("id",), types)


def _conditions(kind: Kind) -> Iterator[If]:
    r = random.Random(kind.type)
    operators: list[Operator] = ["eq", "ne", *(["lt", "lte", "gt", "gte"] if kind.ordered else [])]  # type: ignore[list-item]
    for value in kind.values:
        yield from (If("v", operator, value) for operator in operators)
    for _ in range(6):
        some = tuple(r.sample(list(kind.values), min(3, len(kind.values))))
        yield If("v", "in", some)
        yield If("v", "not_in", some)
    yield If("v", "is_null")
    yield If("v", "is_not_null")
    if kind.like:
        for _ in range(60):
            pattern = "".join(r.choice("%_%aàéb😀 \\") for _ in range(r.randrange(6)))
            yield If("v", "like", pattern)
        yield from (If("v", "like", text + "%") for text in kind.values if "\\" not in text)


def _where(condition: If, type_name: str) -> sql.Composed:
    column: sql.Composable = sql.SQL("v" + (' COLLATE "C"' if type_name in ("text", "varchar", "char(5)") else ""))
    cast = sql.SQL("::" + ("numeric" if type_name == "numeric(12,2)" else "numeric" if type_name == "price" else
                           "bpchar" if type_name == "char(5)" else type_name))  # fmt: skip
    match condition.operator:
        case "is_null":
            return sql.SQL("{} IS NULL").format(column)
        case "is_not_null":
            return sql.SQL("{} IS NOT NULL").format(column)
        case "in" | "not_in":
            assert isinstance(condition.value, tuple)
            values = sql.SQL(", ").join(sql.Literal(value) + cast for value in condition.value)
            return sql.SQL("{} {} ({})").format(column, sql.SQL(condition.operator.replace("_", " ").upper()), values)
        case "like":
            return sql.SQL("{} LIKE {}").format(column, sql.Literal(condition.value))
    return sql.SQL("{} {} {}{}").format(column, sql.SQL(SIGNS[condition.operator]), sql.Literal(condition.value), cast)


def _told(relation: Relation, info: TableInfo, rows: Sequence[bytes | None], condition: If) -> set[int]:
    """The places of those rows that match, as all decoders say."""
    sent = [frames.begin(), *(frames.insert(b"%d" % place, value) for place, value in enumerate(rows)), frames.commit()]
    answers = []
    for twin in TWINS:
        decoder = twin(
            frames.META, lambda *_: (), 0, 1 << 20, 0, 1 << 30, lambda _: None,
            lambda relation, info: filters_of([Given((condition,))], relation, info), 1,
        )  # fmt: skip
        decoder.learn(relation, info, frozenset({"insert"}))
        assert decoder.fill(Connection(*map(xlog, sent)), 1 << 40, 1 << 20) is None
        chunk = decoder.take()
        assert (chunk.count, chunk.filters) == (len(rows), 1)
        answers.append(chunk.matched)
    assert answers.count(answers[0]) == len(answers)
    return {place for place, said in enumerate(answers[0]) if said == YES}


def _stored(session: Session) -> list[bytes | None]:
    """The values as the server prints them."""
    result = session.execute("SELECT v FROM t ORDER BY id").pgresult
    assert result is not None
    return [result.get_value(place, 0) for place in range(result.ntuples)]


def _ends_with_escape(pattern: str) -> bool:
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type)
def test_every_operator(session: Session, kind: Kind) -> None:
    relation, info = _relation(session, kind.type)
    for place, value in enumerate([*kind.values, None]):
        try:
            session.execute("INSERT INTO t VALUES (%s, %s)", (place, value))
        except psycopg.errors.StringDataRightTruncation:
            session.execute("INSERT INTO t VALUES (%s, NULL)", (place,))
    rows = _stored(session)
    unfit = 0
    for condition in _conditions(kind):
        checks = compiled(relation, info, [condition])
        if condition.operator == "like" and _ends_with_escape(str(condition.value)):
            assert isinstance(checks, Finding)  # PostgreSQL says so only if a row comes so far
            continue
        try:
            found = session.execute(
                sql.SQL("SELECT id FROM t WHERE {}").format(_where(condition, kind.type))
            ).fetchall()
        except psycopg.DataError:
            assert isinstance(checks, Finding), condition
            unfit += 1
            continue
        assert not isinstance(checks, Finding), (condition, checks)
        assert _told(relation, info, rows, condition) == {int(str(row[0])) for row in found}, condition
    assert unfit < 30


@pytest.mark.parametrize("type_name", ["json", "jsonb"])
def test_paths(session: Session, type_name: str) -> None:
    relation, info = _relation(session, type_name)
    for place, value in enumerate([*JSONS, None]):
        session.execute("INSERT INTO t VALUES (%s, %s)", (place, value))
    rows = _stored(session)
    paths = [(), ("a",), ("a", "0"), ("a", "-1"), ("a", "3", "b"), ("a", "b"), ("0",), ("a", "9"), ("x",)]
    for path in paths:
        there = sql.SQL("v::jsonb #> {}::text[]").format(sql.Literal(list(path)))
        one = sql.SQL("coalesce(jsonb_typeof({0}), 'null') <> 'null'").format(there)
        for value in (1, 1.0, "1", "a", "aé", "~", True, 12345678901234567890, 10, "x"):
            literal = sql.SQL("{}::jsonb").format(sql.Literal(json.dumps(value)))
            same_type = sql.SQL("jsonb_typeof({}) = jsonb_typeof({})").format(there, literal)
            for operator, sign in SIGNS.items():
                if operator in ("eq", "ne"):
                    where = sql.SQL("{} AND {} {} {}").format(one, there, sql.SQL(sign), literal)
                elif isinstance(value, bool):
                    continue
                elif isinstance(value, str):
                    text = sql.SQL("v::jsonb #>> {}::text[]").format(sql.Literal(list(path)))
                    where = sql.SQL('{} AND ({}) COLLATE "C" {} {}').format(
                        same_type, text, sql.SQL(sign), sql.Literal(value)
                    )
                else:
                    where = sql.SQL("CASE WHEN {} THEN {} {} {} END").format(same_type, there, sql.SQL(sign), literal)
                found = session.execute(sql.SQL("SELECT id FROM t WHERE {}").format(where)).fetchall()
                condition = If("v", operator, value, path)  # type: ignore[arg-type]
                assert _told(relation, info, rows, condition) == {int(str(row[0])) for row in found}, condition
        if path:
            nothing = session.execute(sql.SQL("SELECT id FROM t WHERE NOT {}").format(one)).fetchall()
            assert _told(relation, info, rows, If("v", "is_null", None, path)) == {int(str(i)) for (i,) in nothing}
            rest = set(range(len(rows))) - {int(str(i)) for (i,) in nothing}
            assert _told(relation, info, rows, If("v", "is_not_null", None, path)) == rest

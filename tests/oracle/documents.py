"""Documents against the source: each is built anew from the twelve tables and compared with what the index holds.

The SQL here shares nothing with what the product is given (`shape.board.ENRICHMENT`): that asks table by table for the
keys of a batch; this joins what was grouped beforehand, a range of jobs at a time, and builds the whole document, the
job's own columns in the form of a message included. Both sides are parsed, numbers as decimals, and compared as values:
order of keys, spaces and trailing zeros of numbers within ``json`` do not count, everything else does.

Only digests are held, so 140,000 documents of 18 KB can be compared; of those that differ the first are fetched again
and told in words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal

import httpx
import psycopg

from oracle.rules import Violation

Document = Mapping[str, object]
PAGE = 2_000  # jobs
SCROLL = 500  # documents
TOLD = 20

_TIME = """to_char({} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
BUILD = f"""
with chosen as materialized (
    select * from public.jobs where id between %(first)s and %(last)s
), skilled as (
    select js.job_id, count(*) as number,
           jsonb_agg(to_jsonb(s) || jsonb_build_object('level', js.level) order by s.id) as whole,
           jsonb_agg(to_jsonb(s.name) order by s.name collate "C", s.id) as names
      from public.skills s join public.job_skills js on s.id = js.skill_id
     where js.job_id between %(first)s and %(last)s group by js.job_id
), endowed as (
    select jb.job_id, jsonb_agg(to_jsonb(b) || jsonb_build_object('note', jb.note) order by jb.id) as whole
      from public.benefits b join public.job_benefits jb on b.code = jb.benefit_code
     where jb.job_id between %(first)s and %(last)s group by jb.job_id
), paid as (
    select p.job_id, max(p.amount) as top,
           jsonb_agg(jsonb_build_object('amount', p.amount, 'bonus', p.bonus)
                     || case when sb.id is null
                        then '{{"grade":null,"lowest":null,"highest":null,"currency":null}}'::jsonb
                        else to_jsonb(sb) - 'id' end order by p.id) as whole
      from public.salaries p left join public.salary_bands sb on sb.id = p.band_id
     where p.job_id between %(first)s and %(last)s group by p.job_id
), described as (
    select job_id, jsonb_object_agg(language, body) as whole, max(edited_at) as edited_at
      from public.descriptions where job_id between %(first)s and %(last)s group by job_id
)
select j.id::text, (to_jsonb(j) || jsonb_build_object(
    'posted_at', {_TIME.format("j.posted_at")},
    'company', case when c.id is not null then to_jsonb(c) - 'changed_at' end,
    'location', case when l.code is not null then to_jsonb(l) - 'company_id' end,
    'recruiter', case when r.email is not null
                 then (to_jsonb(r) - 'company_id') || jsonb_build_object('company', rc.name) end,
    'category', case when k.slug is not null
                then (to_jsonb(k) - 'parent') || jsonb_build_object('above', ka.name) end,
    'skills', skilled.whole,
    'skill_names', skilled.names,
    'benefits', endowed.whole,
    'salaries', paid.whole,
    'top_salary', paid.top,
    'descriptions', described.whole,
    'edited_at', {_TIME.format("described.edited_at")}
))::text
  from chosen j
  left join public.companies c on c.id = j.company_id
  left join public.company_locations l on (l.company_id, l.code) = (j.company_id, j.location_code)
  left join public.recruiters r on r.email = j.recruiter_email
  left join public.companies rc on rc.id = r.company_id
  left join public.categories k on k.slug = j.category_slug
  left join public.categories ka on ka.slug = k.parent
  left join skilled on skilled.job_id = j.id
  left join endowed on endowed.job_id = j.id
  left join paid on paid.job_id = j.id
  left join described on described.job_id = j.id
"""


def built(conninfo: str) -> Iterator[tuple[str, Document]]:
    """Every document as it must be, by its ``_id``, of one snapshot."""
    with psycopg.connect(conninfo) as connection:
        connection.execute("set transaction isolation level repeatable read, read only")
        connection.execute("set local datestyle = 'ISO'; set local timezone = 'UTC'; set local work_mem = '64MB'")
        row = connection.execute("select coalesce(min(id), 0), coalesce(max(id), -1) from public.jobs").fetchone()
        assert row is not None
        for first in range(row[0], row[1] + 1, PAGE):
            for identity, text in connection.execute(BUILD.encode(), {"first": first, "last": first + PAGE - 1}):
                yield identity, parsed(text)


class Index:
    """An index of documents; ``with Index(...)``."""

    def __init__(self, url: str, name: str) -> None:
        self._name = name
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def create(self, body: Mapping[str, object]) -> None:
        self._client.put(f"/{self._name}", json=body).raise_for_status()

    def delete(self) -> None:
        self._client.delete(f"/{self._name}")

    def change_mapping(self, mapping: Mapping[str, object]) -> None:
        self._client.put(f"/{self._name}/_mapping", json=mapping).raise_for_status()

    def count(self) -> int:
        self._client.post(f"/{self._name}/_refresh").raise_for_status()
        return int(self._client.get(f"/{self._name}/_count").raise_for_status().json()["count"])

    def get(self, identity: str) -> Document | None:
        answer = self._client.get(f"/{self._name}/_source/{identity}")
        return parsed(answer.text) if answer.is_success else None

    def documents(self) -> Iterator[tuple[str, Document]]:
        self._client.post(f"/{self._name}/_refresh").raise_for_status()
        path, body = f"/{self._name}/_search?scroll=5m", {"size": SCROLL, "sort": ["_doc"]}
        while True:
            answer = self._client.post(path, json=body).raise_for_status()
            found = json.loads(answer.text, parse_float=Decimal)
            hits = found["hits"]["hits"]
            if not hits:
                return
            yield from ((hit["_id"], hit["_source"]) for hit in hits)
            path, body = "/_search/scroll", {"scroll": "5m", "scroll_id": found["_scroll_id"]}


def parsed(text: str) -> Document:
    return dict(json.loads(text, parse_float=Decimal))


def differences(conninfo: str, index: Index) -> list[Violation]:
    """Index against source, document by document."""
    expected = {identity: _digest(document) for identity, document in built(conninfo)}
    found = {identity: _digest(document) for identity, document in index.documents()}
    differing = [one for one in expected if one not in found or found[one] != expected[one]]
    foreign = [one for one in found if one not in expected]
    violations = [Violation("state", f"{one} is in the index, and there is no such job") for one in foreign]
    told = _built_of(conninfo, differing[:TOLD])
    violations += [Violation("state", f"{one}: {_difference(told[one], index.get(one))}") for one in told]
    violations += [Violation("state", f"{one} differs") for one in differing[TOLD:]]
    return violations


def _built_of(conninfo: str, identities: list[str]) -> dict[str, Document]:
    found: dict[str, Document] = {}
    with psycopg.connect(conninfo) as connection:
        connection.execute("set datestyle = 'ISO'; set timezone = 'UTC'")
        for one in identities:
            for identity, text in connection.execute(BUILD.encode(), {"first": int(one), "last": int(one)}):
                found[identity] = parsed(text)
    return found


def _digest(document: Document) -> bytes:
    return hashlib.md5(json.dumps(_plain(document), sort_keys=True).encode()).digest()


def _plain(value: object) -> object:
    """Numbers of one value are one text."""
    match value:
        case bool() | None | str():
            return value
        case int() | Decimal():
            return ["number", str(Decimal(value).normalize())]
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case _:
            raise TypeError(f"{type(value)} is nothing that JSON holds")


def _difference(expected: Document, found: Document | None) -> str:
    if found is None:
        return "is not in the index"
    lines = []
    for name in sorted({*expected, *found}):
        left, right = expected.get(name, "absent"), found.get(name, "absent")
        if _plain(left) != _plain(right):
            lines.append(f"{name} must be {repr(left)[:300]} and is {repr(right)[:300]}")
    return "; ".join(lines) or "equal by now"

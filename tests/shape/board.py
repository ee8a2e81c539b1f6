"""A job board: ``jobs`` with eleven tables around it, the document that is made of a job, and what a change of any of
the tables means for whose documents.

Keys are integers, UUIDs, texts and pairs. Nothing refers by constraint: a job may name a company that is not there, and
children outlive their job, so documents with holes are tried as well. ``salaries`` and ``job_benefits`` have keys of
their own and *move* from job to job (replica identity full, `RELATED` by their foreign key); ``job_skills`` and
``descriptions`` move by their primary key. A company appears in the documents of its jobs and in those that its
recruiters look after; a category in those of its children.

`around` and `jobs` make rows in the server, the same ones for the same numbers. With `FULL` a document has 18 KB, of
which 12 KB is a description that lies out of line (TOAST) and does not compress there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg

JOBS = "public.jobs"
TABLES = (
    *("jobs", "companies", "company_locations", "recruiters", "categories", "skills", "benefits", "salary_bands"),
    *("job_skills", "job_benefits", "salaries", "descriptions"),
)
SCHEMA = """
create table public.companies (
    id uuid primary key, name text, domain text, about text, founded date, rating numeric(3,2), changed_at timestamptz
);
create table public.company_locations (
    company_id uuid, code text, city text, country text, latitude float8, remote boolean, primary key (company_id, code)
);
create table public.recruiters (email text primary key, company_id uuid, name text, phone text);
create table public.categories (slug text primary key, parent text, name text);
create table public.skills (id int primary key, name text, kind text, summary text);
create table public.benefits (code text primary key, name text, summary text);
create table public.salary_bands (id uuid primary key, grade text, lowest numeric, highest numeric, currency char(3));
create table public.jobs (
    id bigint primary key, company_id uuid, location_code text, recruiter_email text, category_slug text,
    title text, status text, hours smallint, posted_at timestamptz, reward numeric
);
create table public.job_skills (job_id bigint, skill_id int, level smallint, primary key (job_id, skill_id));
create table public.job_benefits (id bigserial primary key, job_id bigint, benefit_code text, note text);
create table public.salaries (id uuid primary key, job_id bigint, band_id uuid, amount numeric(12,2), bonus numeric);
create table public.descriptions (
    job_id bigint, language text, body text, edited_at timestamptz, primary key (job_id, language)
);
alter table public.descriptions alter body set storage external;
alter table public.job_benefits replica identity full;
alter table public.salaries replica identity full;
create index on public.jobs (company_id, location_code);
create index on public.jobs (recruiter_email);
create index on public.jobs (category_slug);
create index on public.recruiters (company_id);
create index on public.categories (parent);
create index on public.job_skills (skill_id);
create index on public.job_benefits (job_id);
create index on public.job_benefits (benefit_code);
create index on public.salaries (job_id);
create index on public.salaries (band_id);
create publication spillway for table
""" + ", ".join(f"public.{table}" for table in TABLES)

# MARK is how a query is told from others in pg_stat_statements: the name of a subquery.
MARK = "twelve_tables"
ENRICHMENT = f"""
select {MARK}.id,
  (select json_build_object('id', c.id, 'name', c.name, 'domain', c.domain, 'about', c.about, 'founded', c.founded,
          'rating', c.rating)
     from public.companies c where c.id = {MARK}.company_id) as company,
  (select json_build_object('code', l.code, 'city', l.city, 'country', l.country, 'latitude', l.latitude,
          'remote', l.remote)
     from public.company_locations l
    where l.company_id = {MARK}.company_id and l.code = {MARK}.location_code) as location,
  (select json_build_object('email', r.email, 'name', r.name, 'phone', r.phone, 'company', of.name)
     from public.recruiters r left join public.companies of on of.id = r.company_id
    where r.email = {MARK}.recruiter_email) as recruiter,
  (select json_build_object('slug', k.slug, 'name', k.name, 'above', above.name)
     from public.categories k left join public.categories above on above.slug = k.parent
    where k.slug = {MARK}.category_slug) as category,
  (select json_agg(json_build_object('id', s.id, 'name', s.name, 'kind', s.kind, 'summary', s.summary,
          'level', js.level) order by s.id)
     from public.job_skills js join public.skills s on s.id = js.skill_id where js.job_id = {MARK}.id) as skills,
  (select array_agg(s.name order by s.name collate "C", s.id)
     from public.job_skills js join public.skills s on s.id = js.skill_id
    where js.job_id = {MARK}.id) as skill_names,
  (select json_agg(json_build_object('code', b.code, 'name', b.name, 'summary', b.summary, 'note', jb.note)
          order by jb.id)
     from public.job_benefits jb join public.benefits b on b.code = jb.benefit_code
    where jb.job_id = {MARK}.id) as benefits,
  (select json_agg(json_build_object('amount', p.amount, 'bonus', p.bonus, 'grade', sb.grade, 'lowest', sb.lowest,
          'highest', sb.highest, 'currency', sb.currency) order by p.id)
     from public.salaries p left join public.salary_bands sb on sb.id = p.band_id
    where p.job_id = {MARK}.id) as salaries,
  (select max(p.amount) from public.salaries p where p.job_id = {MARK}.id) as top_salary,
  (select json_object_agg(d.language, d.body order by d.language)
     from public.descriptions d where d.job_id = {MARK}.id) as descriptions,
  (select max(d.edited_at) from public.descriptions d where d.job_id = {MARK}.id) as edited_at
from public.jobs {MARK} where {MARK}.id = any($1)
"""

_OF_COMPANIES = """
select id from public.jobs where company_id = any($1)
union select j.id from public.recruiters r join public.jobs j on j.recruiter_email = r.email
       where r.company_id = any($1)
"""
_OF_CATEGORIES = """
select id from public.jobs where category_slug = any($1)
union select j.id from public.categories k join public.jobs j on j.category_slug = k.slug where k.parent = any($1)
"""
# $1 is the array of codes: columns come in alphabetical order.
_OF_LOCATIONS = """
select j.id from unnest($1, $2) as changed (code, company_id)
  join public.jobs j on j.company_id = changed.company_id and j.location_code = changed.code
"""
_OF_SKILLS = "select job_id as id from public.job_skills where skill_id = any($1)"
_OF_BENEFITS = "select job_id as id from public.job_benefits where benefit_code = any($1)"
_OF_BANDS = "select job_id as id from public.salaries where band_id = any($1)"
_OWN = "select distinct job_id as id from unnest($1) as changed (job_id) where job_id is not null"
_PAIRS = "select distinct job_id as id from unnest($1, $2) as changed (job_id, other)"

RELATED: Sequence[Mapping[str, object]] = (
    {"table": "public.companies", "sql": _OF_COMPANIES},
    {"table": "public.company_locations", "sql": _OF_LOCATIONS},
    {"table": "public.recruiters", "sql": "select id from public.jobs where recruiter_email = any($1)"},
    {"table": "public.categories", "sql": _OF_CATEGORIES},
    {"table": "public.skills", "sql": _OF_SKILLS},
    {"table": "public.benefits", "sql": _OF_BENEFITS},
    {"table": "public.salary_bands", "sql": _OF_BANDS},
    {"table": "public.job_skills", "sql": _PAIRS},
    {"table": "public.descriptions", "sql": _PAIRS},
    {"table": "public.job_benefits", "columns": ["job_id"], "sql": _OWN},
    {"table": "public.salaries", "columns": ["job_id"], "sql": _OWN},
)
FUNCTION: Mapping[str, object] = {"name": "document", "type": "enrichment", "code": ENRICHMENT}

# What stores a document as it is and looks into nothing: the judge compares it whole.
INDEX: Mapping[str, object] = {
    "settings": {"number_of_shards": 1, "number_of_replicas": 0, "index.gc_deletes": "1h"},
    "mappings": {"dynamic": False, "properties": {"id": {"type": "long"}}},
}


@dataclass(frozen=True, slots=True)
class Size:
    """How many of what there is around the jobs, and how large its texts are."""

    companies: int = 200
    skills: int = 60  # ten of them in each job
    benefits: int = 40  # eight of them in each job
    body_bytes: int = 12_000
    about_bytes: int = 1_500


FULL = Size()
SMALL = Size(companies=5, skills=20, benefits=10, body_bytes=2_500, about_bytes=100)

_PLACES = """
insert into public.companies
select md5('company ' || n)::uuid, 'Company ' || n, 'company' || n || '.example',
       substr(repeat(md5(n::text) || ' ', %(about)s::int / 33 + 1), 1, %(about)s::int), date '1950-01-01' + n::int,
       (n %% 500) / 100.0, timestamptz '2026-01-01 00:00:00.5+00' + n * interval '1 hour'
  from generate_series(0, %(companies)s::int - 1) n;
insert into public.company_locations
select md5('company ' || n)::uuid, code, 'City ' || n %% 90, 'Country ' || n %% 9, n / 7.0::float8, n %% 3 = 0
  from generate_series(0, %(companies)s::int - 1) n, unnest('{HQ,North,South}'::text[]) code;
insert into public.recruiters
select 'recruiter' || n || '@company.example', md5('company ' || n %% %(companies)s::int)::uuid, 'Recruiter ' || n,
       '+49 30 ' || 100000 + n
  from generate_series(0, 2 * %(companies)s::int - 1) n;
insert into public.categories
select 'category-' || n, case when n > 4 then 'category-' || n %% 5 end, 'Category ' || n from generate_series(0, 29) n;
insert into public.skills
select n, 'Skill ' || n, (array['tool', 'language', 'craft'])[n %% 3 + 1], repeat('what skill ' || n || ' is; ', 6)
  from generate_series(0, %(skills)s::int - 1) n;
insert into public.benefits
select 'B-' || n, 'Benefit ' || n, repeat('what benefit ' || n || ' brings; ', 4)
  from generate_series(0, %(benefits)s::int - 1) n;
insert into public.salary_bands
select md5('band ' || n)::uuid, 'Grade ' || n, 20000 + n * 1000.5, 30000 + n * 1500.25, 'EUR'
  from generate_series(0, 19) n
"""
_CHILDREN = """
insert into public.job_skills
select n, s, (n + s) %% 5 from generate_series(%(first)s::bigint, %(last)s::bigint) n, generate_series(0, 9) k,
       lateral (select ((n * 7 + k * (%(skills)s::int / 10)) %% %(skills)s::int)::int) as x (s)
on conflict do nothing;
insert into public.job_benefits (job_id, benefit_code, note)
select n, 'B-' || (n + k) %% %(benefits)s::int, 'from day ' || k
  from generate_series(%(first)s::bigint, %(last)s::bigint) n, generate_series(0, 7) k;
insert into public.salaries
select md5('salary ' || n || '/' || k)::uuid, n, md5('band ' || (n + k) %% 20)::uuid, 30000 + (n %% 4000) * 10.25, k
  from generate_series(%(first)s::bigint, %(last)s::bigint) n, generate_series(0, 1) k;
insert into public.descriptions
select n, language, repeat(md5(language || n), %(body)s::int / 32 / part + 1), timestamptz '2026-02-01 12:00:00.25+00'
  from generate_series(%(first)s::bigint, %(last)s::bigint) n, (values ('en', 1), ('de', 12)) as x (language, part)
"""
_JOBS = """
insert into public.jobs
select n, coalesce(%(company)s::uuid, md5('company ' || n %% %(companies)s::int)::uuid),
       (array['HQ', 'North', 'South'])[n %% 3 + 1], 'recruiter' || n %% (2 * %(companies)s::int) || '@company.example',
       'category-' || n %% 30, 'Job ' || n, 'open', 20 + n %% 20,
       timestamptz '2026-03-01 08:00:00.123456+00' + n * interval '1 second', n / 8.0
  from generate_series(%(first)s::bigint, %(last)s::bigint) n
"""


def _run(connection: psycopg.Connection, script: str, values: Mapping[str, object]) -> None:
    for statement in script.split(";\n"):
        connection.execute(statement.encode(), values)


def places(connection: psycopg.Connection, size: Size = FULL) -> None:
    """What jobs refer to."""
    values = {
        "companies": size.companies, "skills": size.skills, "benefits": size.benefits, "about": size.about_bytes,
    }  # fmt: skip
    _run(connection, _PLACES, values)


def children(connection: psycopg.Connection, jobs: range, size: Size = FULL) -> None:
    """What refers to these jobs, whether they are there or not."""
    bounds = {"first": jobs.start, "last": jobs.stop - 1}
    _run(connection, _CHILDREN, {**bounds, "skills": size.skills, "benefits": size.benefits, "body": size.body_bytes})


def insert_jobs(connection: psycopg.Connection, jobs: range, size: Size = FULL, company: str | None = None) -> None:
    """``company``: the id of the one that all of them belong to."""
    values = {"first": jobs.start, "last": jobs.stop - 1, "companies": size.companies, "company": company}
    _run(connection, _JOBS, values)


def prepare(conninfo: str, jobs: range, size: Size = FULL, *, with_jobs: bool = True) -> None:
    """Schema and rows. Texts come in pieces, so that no transaction is larger than it must be."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        places(connection, size)
        for first in range(jobs.start, jobs.stop, 5_000):
            piece = range(first, min(first + 5_000, jobs.stop))
            children(connection, piece, size)
            if with_jobs:
                insert_jobs(connection, piece, size)
        connection.execute("vacuum analyze")


def documents_sink(name: str, destination: Mapping[str, object], **more: object) -> dict[str, object]:
    """A sink that holds a document of each job, and keeps it right."""
    return {
        "name": name, "database": "app", "source": {"include_tables": [JOBS]}, "enrichment": FUNCTION["name"],
        "related": [dict(related) for related in RELATED], "destination": dict(destination), **more,
    }  # fmt: skip

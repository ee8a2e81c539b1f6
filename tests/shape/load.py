"""Clients that change all twelve tables at random, a process that keeps the documents, and the judge.

The job board is small (`board.SMALL`, 120 jobs), so that clients meet: rows are inserted, updated, deleted, and come
back; foreign keys move; primary keys change; big texts change or stay out of line; transactions roll back or run into
each other. At the end the load stops, everything is delivered, and the index is compared with a fresh build.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psycopg

from backfill.load import commit_late
from backfill.site import Site
from oracle import documents
from oracle.documents import Index
from oracle.product import Product
from oracle.rules import Violation
from oracle.workload import TEXTS, Load
from shape import board

JOBS = range(1, 121)
HOT_JOBS = range(1, 13)
WRITERS = 8
SIZE = board.SMALL
DRAIN_SECONDS = 120


@dataclass(slots=True)
class Verdict:
    seed: int
    transactions: int = 0
    documents: int = 0
    seconds_to_quiet: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.transactions} transactions, {self.documents} documents at the end, quiet after"
            f" {self.seconds_to_quiet:.1f} s, {len(self.violations)} violations"
        ]
        return "\n".join([*lines, *(f"  {violation}" for violation in self.violations[:20])])


class BoardLoad(Load):
    """Writers on the job board. ``committed`` counts transactions. ``mixed``: a third of them do not wait for a
    standby, so they are seen before others that were committed before them."""

    def __init__(self, conninfo: str, seed: int, writers: int = WRITERS, *, mixed: bool = False) -> None:
        super().__init__(conninfo, seed, writers)
        self.committed = 0
        self._mixed = mixed

    def _transaction(self, connection: psycopg.Connection, rng: random.Random) -> None:
        if self._mixed and rng.random() < 1 / 3:
            connection.execute("set local synchronous_commit = local")
        super()._transaction(connection, rng)
        self.committed += 1

    def _operation(self, connection: psycopg.Connection, rng: random.Random) -> None:
        table, operations = rng.choices(_OPERATIONS, [weight for weight, _, _ in _WEIGHTED])[0]
        query = rng.choices([q for _, q in operations], [weight for weight, _ in operations])[0]
        connection.execute(query.encode(), _values(rng, table))


def _values(rng: random.Random, table: str) -> Mapping[str, object]:
    """One draw of everything that a query may name."""

    def job() -> int:
        return rng.choice(HOT_JOBS if rng.random() < 0.5 else JOBS)

    def company() -> str:
        return f"company {rng.randrange(SIZE.companies)}"

    return {
        "table": table, "job": job(), "other_job": job(), "company": company(), "other_company": company(),
        "code": rng.choice(("HQ", "North", "South")), "other_code": rng.choice(("HQ", "North", "South", "West")),
        "recruiter": f"recruiter{rng.randrange(2 * SIZE.companies)}@company.example",
        "category": f"category-{rng.randrange(30)}", "other_category": f"category-{rng.randrange(30)}",
        "skill": rng.randrange(SIZE.skills), "other_skill": rng.randrange(SIZE.skills),
        "benefit": f"B-{rng.randrange(SIZE.benefits)}", "band": f"band {rng.randrange(20)}",
        "other_band": f"band {rng.randrange(20)}", "text": rng.choice(TEXTS), "number": rng.randrange(100_000) / 100,
        "language": rng.choice(("en", "de")), "body": f"{rng.random()}" * 150, "salary": f"{job()}/{rng.randrange(2)}",
    }  # fmt: skip


_C, _OC = "md5(%(company)s)::uuid", "md5(%(other_company)s)::uuid"
_B, _OB = "md5(%(band)s)::uuid", "md5(%(other_band)s)::uuid"
_WEIGHTED: tuple[tuple[int, str, tuple[tuple[int, str], ...]], ...] = (
    (30, "jobs", (
        (8, f"insert into jobs values (%(job)s, {_C}, %(code)s, %(recruiter)s, %(category)s, %(text)s, 'open', 40,"
            " now(), %(number)s) on conflict (id) do update set title = excluded.title, reward = excluded.reward"),
        (8, "update jobs set title = %(text)s where id = %(job)s"),
        (4, "update jobs set status = case status when 'open' then 'closed' else 'open' end where id = %(job)s"),
        (5, f"update jobs set company_id = {_C}, location_code = %(code)s where id = %(job)s"),
        (3, "update jobs set recruiter_email = %(recruiter)s, category_slug = %(category)s where id = %(job)s"),
        (5, "delete from jobs where id = %(job)s"),
        (3, "update jobs set id = %(other_job)s where id = %(job)s"
            " and not exists (select from jobs where id = %(other_job)s)"),
    )),
    (8, "companies", (
        (4, f"insert into companies (id, name, about) values ({_C}, %(text)s, %(text)s)"
            " on conflict (id) do update set name = excluded.name"),
        (5, f"update companies set rating = %(number)s::numeric %% 9, changed_at = now() where id = {_C}"),
        (1, f"delete from companies where id = {_C}"),
        (1, f"update companies set id = {_OC} where id = {_C} and not exists (select from companies where id = {_OC})"),
    )),
    (7, "company_locations", (
        (4, f"insert into company_locations (company_id, code, city) values ({_C}, %(code)s, %(text)s)"
            " on conflict (company_id, code) do update set city = excluded.city"),
        (2, f"delete from company_locations where company_id = {_C} and code = %(code)s"),
        (2, f"update company_locations set company_id = {_OC}, code = %(other_code)s where company_id = {_C}"
            f" and code = %(code)s and not exists (select from company_locations where company_id = {_OC}"
            " and code = %(other_code)s)"),
    )),
    (7, "recruiters", (
        (3, f"insert into recruiters values (%(recruiter)s, {_C}, %(text)s, '1')"
            " on conflict (email) do update set name = excluded.name"),
        (3, f"update recruiters set company_id = {_C} where email = %(recruiter)s"),
        (1, "delete from recruiters where email = %(recruiter)s"),
    )),
    (6, "categories", (
        (3, "insert into categories values (%(category)s, %(other_category)s, %(text)s)"
            " on conflict (slug) do update set name = excluded.name"),
        (3, "update categories set parent = %(other_category)s where slug = %(category)s"),
        (1, "delete from categories where slug = %(category)s"),
    )),
    (6, "skills", (
        (4, "insert into skills values (%(skill)s, %(text)s, 'kind', 'summary')"
            " on conflict (id) do update set name = excluded.name"),
        (1, "delete from skills where id = %(skill)s"),
        (1, "update skills set id = %(other_skill)s where id = %(skill)s"
            " and not exists (select from skills where id = %(other_skill)s)"),
    )),
    (5, "benefits", (
        (3, "insert into benefits values (%(benefit)s, %(text)s, %(text)s)"
            " on conflict (code) do update set name = excluded.name"),
        (1, "delete from benefits where code = %(benefit)s"),
    )),
    (5, "salary_bands", (
        (3, f"insert into salary_bands values ({_B}, %(text)s, %(number)s, 2 * %(number)s::numeric, 'EUR')"
            " on conflict (id) do update set lowest = excluded.lowest, grade = excluded.grade"),
        (1, f"delete from salary_bands where id = {_B}"),
        (1, f"update salary_bands set id = {_OB} where id = {_B}"
            f" and not exists (select from salary_bands where id = {_OB})"),
    )),
    (8, "job_skills", (
        (4, "insert into job_skills values (%(job)s, %(skill)s, 3)"
            " on conflict (job_id, skill_id) do update set level = job_skills.level %% 5 + 1"),
        (3, "delete from job_skills where job_id = %(job)s and skill_id = %(skill)s"),
        (1, "delete from job_skills where job_id = %(job)s and level = 4"),
        (4, "update job_skills set job_id = %(other_job)s where job_id = %(job)s and skill_id = %(skill)s"
            " and not exists (select from job_skills where job_id = %(other_job)s and skill_id = %(skill)s)"),
    )),
    (8, "job_benefits", (
        (4, "insert into job_benefits (job_id, benefit_code, note) values (%(job)s, %(benefit)s, %(text)s)"),
        (3, "delete from job_benefits where job_id = %(job)s and benefit_code = %(benefit)s"),
        (4, "update job_benefits set job_id = %(other_job)s where job_id = %(job)s and benefit_code = %(benefit)s"),
        (2, "update job_benefits set note = %(text)s where job_id = %(job)s"),
    )),
    (8, "salaries", (
        (3, f"insert into salaries values (md5('salary ' || %(salary)s)::uuid, %(job)s, {_B}, %(number)s, 1.50)"
            " on conflict (id) do update set amount = excluded.amount"),
        (4, "update salaries set job_id = %(other_job)s where id = md5('salary ' || %(salary)s)::uuid"),
        (2, f"update salaries set band_id = {_OB} where job_id = %(job)s"),
        (2, "delete from salaries where id = md5('salary ' || %(salary)s)::uuid"),
    )),
    (8, "descriptions", (
        (4, "insert into descriptions values (%(job)s, %(language)s, %(body)s, now())"
            " on conflict (job_id, language) do update set edited_at = excluded.edited_at"),
        (3, "update descriptions set body = %(body)s where job_id = %(job)s and language = %(language)s"),
        (1, "delete from descriptions where job_id = %(job)s and language = %(language)s"),
        (2, "update descriptions set job_id = %(other_job)s where job_id = %(job)s and language = %(language)s"
            " and not exists (select from descriptions where job_id = %(other_job)s and language = %(language)s)"),
    )),
)  # fmt: skip
_OPERATIONS = [(table, operations) for _, table, operations in _WEIGHTED]


def run(
    conninfo: str,
    folder: Path,
    search_url: str,
    *,
    seed: int,
    seconds: float,
    late: bool = False,
    kills: int = 0,
    replica_url: str | None = None,
    say: Callable[[str], None] = print,
    **options: object,
) -> Verdict:
    """``late``: see `backfill.load.run`. ``kills``: so often the process is killed on the way and started again.
    ``replica_url``: where documents are enriched. ``options`` of the sink."""
    verdict = Verdict(seed)
    name = f"board-{uuid4().hex}"
    destination = {"type": "opensearch", "endpoint_url": search_url, "index_name": name}
    if replica_url is not None:
        options["enrichment_from"] = "replica"
    sink = board.documents_sink("documents", destination, initial_backfill=True, **options)
    board.prepare(conninfo, JOBS, SIZE)
    if late:
        commit_late(conninfo)
    with Index(search_url, name) as index, BoardSite(conninfo, folder, [sink], replica_url) as site:
        index.create(board.INDEX)
        try:
            site.begin()
            with BoardLoad(conninfo, seed, mixed=late) as load:
                for life in range(kills + 1):
                    ends = time.monotonic() + seconds / (kills + 1)
                    while time.monotonic() < ends:
                        load.keep(4 * WRITERS)
                        site.product.check_alive()
                        time.sleep(0.02)  # the load goes on meanwhile
                    if life < kills:
                        site.again()
                load.finish()
            verdict.transactions = load.committed
            began = time.monotonic()
            site.quiet()
            verdict.seconds_to_quiet = time.monotonic() - began
            verdict.violations = documents.differences(conninfo, index)
            verdict.documents = index.count()
            code = site.product.terminate()
            if code != 0:
                verdict.violations.append(Violation("state", f"SIGTERM ended it with {code}"))
        finally:
            index.delete()
    say(str(verdict))
    return verdict


class BoardSite(Site):
    """A process with the enrichment of the job board."""

    def __init__(
        self, conninfo: str, folder: Path, sinks: list[dict[str, object]], replica_url: str | None = None
    ) -> None:
        self._replica_url = replica_url
        super().__init__(conninfo, folder, sinks)

    def _config(self, sinks: Sequence[Mapping[str, object]]) -> dict[str, object]:
        config = {**super()._config(sinks), "functions": [dict(board.FUNCTION)]}
        if self._replica_url is not None:
            (database,) = config["databases"]  # type: ignore[misc]
            config["databases"] = [{**database, "replica_url": self._replica_url}]
        return config

    def quiet(self, seconds: float = DRAIN_SECONDS) -> None:
        """Everything that is committed by now is in the documents: read, delivered, and no refresh is due."""
        self.read_by_the_stream()
        self.product.wait(lambda: at_rest(self.product), "nothing to wait", seconds=seconds)


def at_rest(product: Product) -> bool:
    """Nothing waits in any sink, and no refresh is due or about to be."""
    return all(
        one["backlog_messages"] == 0
        and one["due_refreshes"] == 0
        and one["state"] in ("idle", "caught_up")
        and (one["related"] is None or one["related"]["backlog_messages"] == 0)
        for one in product.status()["sinks"]
    )

"""Enrichment SQL that is right for one key and wrong for the rows of a batch is known by its plan."""

from __future__ import annotations

from source.conftest import SourceDatabase
from source.enriching import T, enriching
from spillway.source.planned import few_rows

ITEMS = "json_agg(o.item ORDER BY o.item) AS items"
FEW = {
    "SELECT t.id, r.name FROM t JOIN r ON r.id = t.ref WHERE t.id = ANY($1) LIMIT 1": "LIMIT",
    "SELECT o.t AS id, o.item FROM o WHERE o.t = ANY($1) ORDER BY o.item DESC LIMIT 1;": "LIMIT",
    "WITH last AS (SELECT o.t AS id FROM o WHERE o.t = ANY($1) ORDER BY item LIMIT 1) SELECT id FROM last": "LIMIT",
    f"SELECT ($1)[1] AS id, {ITEMS} FROM o WHERE o.t = ANY($1)": "GROUP BY",
    "SELECT max(o.t) AS id, count(*) FROM o WHERE o.t = ANY($1)": "GROUP BY",
    f"SELECT ($1)[1] AS id, (SELECT {ITEMS} FROM o WHERE o.t = ANY($1)) AS items": "one row",
    # Beside the main line: each message would have the items of all.
    f"SELECT t.id, (SELECT {ITEMS} FROM o WHERE o.t = ANY($1)) AS items FROM t WHERE t.id = ANY($1)": "GROUP BY",
    "SELECT t.id, (SELECT o.item FROM o WHERE o.t = ANY($1) ORDER BY 1 LIMIT 1) FROM t WHERE t.id = ANY($1)": "LIMIT",
    f"SELECT t.id, s.items FROM t CROSS JOIN (SELECT {ITEMS} FROM o WHERE o.t = ANY($1)) AS s WHERE t.id = ANY($1)": (
        "GROUP BY"
    ),
    f"SELECT t.id, s.items FROM t JOIN (SELECT ($1)[1] AS id, {ITEMS} FROM o WHERE o.t = ANY($1)) AS s USING (id)": (
        "GROUP BY"
    ),
    f"WITH s AS MATERIALIZED (SELECT ($1)[1] AS id, {ITEMS} FROM o WHERE o.t = ANY($1)) SELECT * FROM s": "GROUP BY",
    "SELECT t.id, s.item FROM t JOIN (SELECT t, item FROM o WHERE t = ANY($1) LIMIT 1) AS s ON s.t = t.id": "LIMIT",
    f"WITH k AS (SELECT unnest($1) AS id) SELECT id, (SELECT {ITEMS} FROM o WHERE t IN (SELECT id FROM k)) FROM k": (
        "GROUP BY"
    ),
    f"SELECT t.id, (SELECT {ITEMS} FROM o JOIN t AS a ON a.id = o.t WHERE a.id = ANY($1)) FROM t WHERE id = ANY($1)": (
        "GROUP BY"
    ),
}
ALL = (
    "SELECT t.id, r.name FROM t JOIN r ON r.id = t.ref WHERE t.id = ANY($1)",
    f"SELECT o.t AS id, {ITEMS} FROM o WHERE o.t = ANY($1) GROUP BY o.t",
    f"SELECT o.t AS id, {ITEMS} FROM o WHERE o.t = ANY($1) GROUP BY 1 ORDER BY 1",
    "SELECT DISTINCT ON (o.t) o.t AS id, o.item FROM o WHERE o.t = ANY($1) ORDER BY o.t, o.item DESC",
    "SELECT k.id, l.item FROM unnest($1) AS k(id) CROSS JOIN LATERAL"
    " (SELECT item FROM o WHERE o.t = k.id ORDER BY item DESC LIMIT 1) AS l",
    f"SELECT k.id, l.items FROM unnest($1) AS k(id), LATERAL (SELECT {ITEMS} FROM o WHERE o.t = k.id) AS l",
    f"SELECT k AS id, (SELECT {ITEMS} FROM o WHERE o.t = k) AS items FROM unnest($1) AS k",
    "SELECT unnest($1) AS id, (SELECT name FROM r LIMIT 1) AS name",
    "SELECT t.id, c.all_of_them FROM t, (SELECT count(*) AS all_of_them FROM r) AS c WHERE t.id = ANY($1)",
    "SELECT id, 't' AS which FROM t WHERE id = ANY($1) UNION ALL SELECT t, item FROM o WHERE t = ANY($1)",
    # Of each key, however it is referred to.
    f"SELECT t.id, (SELECT {ITEMS} FROM o WHERE o.t = t.id AND o.t = ANY($1)) FROM t WHERE t.id = ANY($1)",
    f"SELECT k.id, (SELECT {ITEMS} FROM o WHERE o.t = k.id) FROM (SELECT unnest($1) AS id) AS k",
    "SELECT k.id, l.item FROM (SELECT unnest($1) AS id) AS k, LATERAL (SELECT item FROM o WHERE t = k.id LIMIT 1) AS l",
    "SELECT k.id, l.first FROM unnest($1) AS k(id), LATERAL (SELECT min(item) AS first FROM o WHERE t = k.id) AS l",
    'SELECT "K.k"."I d" AS id, (SELECT count(*) FROM o WHERE t = "K.k"."I d" AND t = ANY($1))'
    ' FROM unnest($1) AS "K.k"("I d")',
    f"WITH k AS (SELECT unnest($1) AS id) SELECT k.id, (SELECT {ITEMS} FROM o JOIN k AS a ON a.id = o.t"
    " WHERE a.id = k.id) FROM k",
    "SELECT k.id, l.items FROM unnest($1) AS k(id), LATERAL (SELECT json_agg(item) FILTER (WHERE t = k.id) AS items"
    " FROM o WHERE t = ANY($1)) AS l",
    "SELECT k.id, (SELECT json_agg(x) FROM unnest(ARRAY['a', 'b']) AS x) FROM unnest($1) AS k(id)",
    "SELECT t.id, p.n FROM t JOIN p ON p.n = t.id WHERE t.id = ANY($1)",  # p has no partitions yet
)


async def test_what_does_not_depend_on_the_number_of_keys(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, ref int)",
        "CREATE TABLE public.r (id int PRIMARY KEY, name text)",
        "CREATE TABLE public.o (t int, item text)",
        "CREATE TABLE public.p (n int) PARTITION BY RANGE (n)",
        "INSERT INTO public.t SELECT n, n FROM generate_series(1, 1000) n",
        "INSERT INTO public.o SELECT n, n::text FROM generate_series(1, 1000) n",
        "CREATE INDEX ON public.o (t, item)",
        "ANALYZE",
    )
    for sql in (*FEW, *ALL):
        async with enriching(source, sql) as enricher:
            assert "id" in await enricher.columns(T)
            why = few_rows(await enricher.plan(T))
        assert FEW[sql] in why if sql in FEW else not why, (sql, why)

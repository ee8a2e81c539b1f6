"""Replay: exactly the rows that were named arrive again, as ``read``, with idempotency keys of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backfill.site import Refused, Site, file_sink
from servers.postgres import Postgres

ORDERS, LINES = "public.orders", "public.lines"
SCHEMA = """
create table public.orders (id int primary key, v text, changed timestamptz, changed_local timestamp);
create table public.lines ("order" int, pos text, v text, primary key (pos, "order"));
create publication spillway for all tables;
"""
ROWS = """
insert into orders select n, 'o' || n, '2026-01-01 00:00+00'::timestamptz + n * interval '1 hour',
    '2026-01-01 00:00'::timestamp + n * interval '1 hour' from generate_series(1, 50) n;
insert into lines select o, p, 'l' from generate_series(1, 9) o, unnest(array['a', 'b', 'it''s', 'x:y']) p;
"""

Keys = set[tuple[object, ...]]


@pytest.fixture
def site(database: str, tmp_path: Path) -> Site:
    return Site(database, tmp_path, [file_sink("out", [ORDERS, LINES])])


def replayed(site: Site, **order: object) -> Keys:
    """The primary keys of what this replay sent; nothing of it twice, and none of its idempotency keys seen before."""
    before = site.lines("out")
    ended = site.run("out", "replay", **order)
    assert {item["origin"] for item in ended} == {"replay"}
    site.drained("out")
    lines = site.lines("out")[len(before) :]
    assert {line["action"] for line in lines} <= {"read"}
    seen = {line["metadata"]["idempotency_key"] for line in before}
    new = {line["metadata"]["idempotency_key"] for line in lines}
    assert len(new) == len(lines)
    assert not seen & new
    keys = {tuple(line["metadata"]["record_pks"]) for line in lines}
    assert len(keys) == len(lines) == sum(item["rows_processed_count"] for item in ended)
    return keys


def orders(start: int, stop: int) -> Keys:
    return {(str(n),) for n in range(start, stop + 1)}


def test_which_rows_are_replayed(site: Site) -> None:
    with site:
        site.sql(SCHEMA)
        site.begin()
        site.sql(ROWS)
        site.drained("out")
        at: Callable[[str], str] = lambda hour: f"2026-01-02T{hour}:00:00Z"  # noqa: E731 - of row 24 + hour

        # By keys, as they are shown anywhere; what is not there is nothing.
        assert replayed(site, table=ORDERS, keys=["3", 7, "public.orders:50", "99"]) == {("3",), ("7",), ("50",)}
        some = [["3", "a"], ["4", "x:y"], "public.lines:5:it's", "6:x\\:y"]
        found = {("3", "a"), ("4", "x:y"), ("5", "it's"), ("6", "x:y")}
        assert replayed(site, table=LINES, keys=some) == found
        # The same again: other idempotency keys.
        assert replayed(site, table=LINES, keys=some) == found

        # By bounds, which belong to it.
        assert replayed(site, table=ORDERS, from_key="10", to_key="12") == orders(10, 12)
        assert replayed(site, table=ORDERS, from_key=49) == orders(49, 50)
        assert replayed(site, table=LINES, from_key="9:b", to_key=["9", "x:y"]) == {
            ("9", "b"), ("9", "it's"), ("9", "x:y")
        }  # fmt: skip
        assert replayed(site, table=LINES, to_key="1:a") == {("1", "a")}

        # By conditions, which all hold.
        assert replayed(site, table=ORDERS, where="id % 10 = 0 -- every tenth") == {(f"{n}0",) for n in range(1, 6)}
        assert replayed(site, table=ORDERS, where="v in ('o1', 'o2') or v = 'o30'", to_key="2") == orders(1, 2)
        assert replayed(site, tables=[ORDERS, LINES], where="v = 'l'") == {
            (str(o), p) for o in range(1, 10) for p in ("a", "b", "it's", "x:y")
        }
        assert replayed(site, table=ORDERS, where="v = '100%' or v like 'o4_'") == orders(40, 49)

        # Since, by a column, whatever the zone in which it is said.
        assert replayed(site, table=ORDERS, sort_column="changed", since=at("20")) == orders(44, 50)
        assert replayed(site, table=ORDERS, sort_column="changed_local", since="2026-01-03T03:00:00+05:00") == (
            orders(46, 50)
        )
        assert replayed(site, table=ORDERS, sort_column="changed", since=at("10"), where="id < 36") == orders(34, 35)

        # Since, by when it was committed.
        ((now,),) = site.sql("select now()::text")
        site.sql("update orders set v = 'late' where id in (5, 6)", "insert into orders values (60, 'late')")
        site.drained("out")
        assert replayed(site, table=ORDERS, since=now.replace(" ", "T") + ":00") == {("5",), ("6",), ("60",)}
        assert replayed(site, since=now.replace(" ", "T") + ":00", where="v = 'late'", table=ORDERS, from_key="6") == {
            ("6",), ("60",)
        }  # fmt: skip

        # A condition is one expression by itself, whatever it is joined with.
        (failed,) = site.start("out", "replay", table=ORDERS, where="true) OR (true", to_key="2")
        site.wait(lambda: site.item("out", failed)["state"] == "failed", "the condition to be refused")
        assert "[bad_condition]" in site.item("out", failed)["error"]

        # What does not say which rows, or says it wrongly.
        for refusal, order in (
            ("bad_request", {"table": ORDERS}),
            ("bad_key", {"table": LINES, "from_key": "5"}),
            ("bad_key", {"table": LINES, "keys": [["5", "a"], ["5"]]}),
            ("bad_key", {"table": ORDERS, "keys": ["5", "five"]}),
            ("bad_key", {"table": LINES, "to_key": "x:a"}),
            ("table_not_taken", {"table": "public.others", "where": "true"}),
        ):
            with pytest.raises(Refused) as refused:
                site.start("out", "replay", **order)
            assert refused.value.code == refusal


def test_without_commit_timestamps_it_says_what_to_do(tmp_path: Path) -> None:
    with (
        Postgres("18", settings={"track_commit_timestamp": "off"}) as server,
        Site(server.create_database("app"), tmp_path, [file_sink("out", [ORDERS])]) as site,
    ):
        site.sql(SCHEMA)
        site.begin()
        with pytest.raises(Refused, match="--column") as refused:
            site.start("out", "replay", table=ORDERS, since="2026-01-01T00:00:00Z")
        assert refused.value.code == "no_commit_timestamps"
        assert "track_commit_timestamp" in str(refused.value)

"""Tables for backfills, and a load that is hard on them.

``public.items`` has some pages of rows and a hot set of keys spread over all of them, so that every page holds rows
that change while it is read. ``public.docs`` has a key of two columns and the default replica identity, and a ``body``
that is kept out of line (TOAST): most updates and changes of its key do not touch it, and the stream does not carry it.

Every row carries ``seq``, which no two operations share.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import psycopg

from oracle.workload import TEXTS, Load

KEY_COLUMNS: Mapping[str, tuple[str, ...]] = {"public.items": ("id",), "public.docs": ("kind", "id")}
TABLES = tuple(KEY_COLUMNS)
SCHEMA = """
create table public.items (id int primary key, seq bigint not null, v text);
create table public.docs (
    kind text, id int, seq bigint not null, v text, body text not null, primary key (kind, id)
);
alter table public.docs alter body set storage external;
create publication spillway for table public.items, public.docs;
"""
BODY_CHARACTERS = 2_500  # beyond what a row keeps in line
ITEMS = range(-600, 600)
HOT_ITEMS = range(-580, 600, 60)
KINDS = ("a", "B", "ß")
DOCS = range(200)  # of each kind
HOT_DOCS = range(0, 200, 40)
FIRST_SEQ = -1_000_000  # of the rows that exist before the load


def fill(connection: psycopg.Connection, items: range = ITEMS, docs: range = DOCS) -> None:
    """Rows that exist. Their stamps are negative, those of the load positive."""
    connection.execute(
        "insert into public.items select id, %s::int + row_number() over (), 'row ' || id"
        " from generate_series(%s::int, %s) id",
        [FIRST_SEQ, items.start, items.stop - 1],
    )
    connection.execute(
        "insert into public.docs"
        " select kind, id, 2 * %s::int + row_number() over (), null, repeat(md5(id::text), %s::int)"
        " from unnest(%s::text[]) kind, generate_series(%s::int, %s) id",
        [FIRST_SEQ, BODY_CHARACTERS // 32 + 1, list(KINDS), docs.start, docs.stop - 1],
    )


class RowsLoad(Load):
    """Writers on both tables. ``moves``: changes of primary keys, too."""

    def __init__(self, conninfo: str, seed: int, writers: int = 8, *, moves: bool = True) -> None:
        super().__init__(conninfo, seed, writers)
        self._moves = moves

    def _operation(self, connection: psycopg.Connection, rng: random.Random) -> None:
        if rng.random() < 0.65:
            self._item(connection, rng)
        else:
            self._doc(connection, rng)

    def _item(self, connection: psycopg.Connection, rng: random.Random) -> None:
        keys = HOT_ITEMS if rng.random() < 0.7 else ITEMS
        one, other = rng.choice(keys), rng.choice(keys)
        values = {"one": one, "other": other, "seq": next(self._seq), "v": rng.choice(TEXTS)}
        weights = (30, 30, 12, 18, 10) if self._moves else (40, 40, 20, 0, 0)
        match rng.choices(("upsert", "update", "delete", "move", "swap"), weights)[0]:
            case "upsert":
                query = (
                    "insert into items values (%(one)s, %(seq)s, %(v)s)"
                    " on conflict (id) do update set seq = excluded.seq, v = excluded.v"
                )
            case "update":
                query = "update items set seq = %(seq)s, v = %(v)s where id = %(one)s"
            case "delete":
                query = "delete from items where id = %(one)s"
            case "move":
                query = (
                    "update items set id = %(other)s, seq = %(seq)s where id = %(one)s"
                    " and not exists (select from items where id = %(other)s)"
                )
            case _:
                away = 10_000 + one
                for before, after in ((one, away), (other, one), (away, other)) if one != other else ():
                    moved = "update items set id = %s, seq = %s where id = %s"
                    connection.execute(moved, [after, next(self._seq), before])
                return
        connection.execute(query, values)

    def _doc(self, connection: psycopg.Connection, rng: random.Random) -> None:
        keys = HOT_DOCS if rng.random() < 0.7 else DOCS
        values = {
            "kind": rng.choice(KINDS), "id": rng.choice(keys), "to": rng.choice(keys), "to_kind": rng.choice(KINDS),
            "seq": next(self._seq), "v": rng.choice(TEXTS), "body": f"{rng.random()}" * (BODY_CHARACTERS // 15),
        }  # fmt: skip
        weights = (25, 40, 8, 12, 15) if self._moves else (30, 45, 10, 15, 0)
        match rng.choices(("upsert", "update", "rewrite", "delete", "move"), weights)[0]:
            case "upsert":
                query = (
                    "insert into docs values (%(kind)s, %(id)s, %(seq)s, %(v)s, %(body)s)"
                    " on conflict (kind, id) do update set seq = excluded.seq, v = excluded.v"
                )
            case "update":
                query = "update docs set seq = %(seq)s, v = %(v)s where kind = %(kind)s and id = %(id)s"
            case "rewrite":
                query = "update docs set seq = %(seq)s, body = %(body)s where kind = %(kind)s and id = %(id)s"
            case "delete":
                query = "delete from docs where kind = %(kind)s and id = %(id)s"
            case _:
                query = (
                    "update docs set kind = %(to_kind)s, id = %(to)s, seq = %(seq)s"
                    " where kind = %(kind)s and id = %(id)s"
                    " and not exists (select from docs where kind = %(to_kind)s and id = %(to)s)"
                )
        connection.execute(query, values)

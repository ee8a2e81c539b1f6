"""What the catalogue says of tables and types, on every version."""

from __future__ import annotations

from source.conftest import SourceDatabase
from spillway.pgoutput.relation import Column, Relation, ReplicaIdentity
from spillway.source import catalog
from spillway.source.queries import fetch


async def _relation(source: SourceDatabase, table: str, identity: ReplicaIdentity = "f", *keys: str) -> Relation:
    """The Relation message that the table would have now."""
    oid = await source.value(f"SELECT '{table}'::regclass::oid::int")
    assert isinstance(oid, int)
    rows = await fetch(source.query, "columns", oid=oid)
    columns = tuple(Column(row["name"], row["type_oid"], -1, row["name"] in keys) for row in rows)
    return Relation(oid, *table.split(".", 1), identity, columns)


async def test_the_primary_key_is_in_column_order_without_included_columns(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (note text, b int, a int, c int, PRIMARY KEY (a, b) INCLUDE (c))",
    )
    info = await catalog.describe(source.query, await _relation(source, "public.t"))
    assert info.primary_key == ("b", "a")
    assert info.root is None


async def test_the_message_is_believed_where_the_catalogue_has_moved_on(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY, other int NOT NULL, body text)")
    default = await _relation(source, "public.t", "d", "id")
    full = await _relation(source, "public.t", "f")
    await source.execute("ALTER TABLE public.t RENAME id TO key")
    assert (await catalog.describe(source.query, default)).primary_key == ("id",)
    assert (await catalog.describe(source.query, full)).primary_key == ("id",)
    await source.execute("ALTER TABLE public.t DROP CONSTRAINT t_pkey", "ALTER TABLE public.t ADD PRIMARY KEY (other)")
    assert (await catalog.describe(source.query, default)).primary_key == ("id",)
    assert (await catalog.describe(source.query, full)).primary_key == ("other",)
    await source.execute("DROP TABLE public.t")
    assert (await catalog.describe(source.query, default)).primary_key == ("id",)
    assert (await catalog.describe(source.query, full)).primary_key == ()


async def test_a_key_of_which_a_part_is_not_streamed_is_no_key(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (a int, b int, c text, PRIMARY KEY (a, b))")
    relation = await _relation(source, "public.t", "d", "a", "b")
    part = Relation(relation.oid, "public", "t", "d", tuple(c for c in relation.columns if c.name != "b"))
    assert (await catalog.describe(source.query, part)).primary_key == ()


async def test_types_are_followed_to_their_end(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE SCHEMA own",
        "CREATE TYPE own.mood AS ENUM ('sad', 'ok')",
        "CREATE DOMAIN own.inner_mood AS own.mood",
        "CREATE DOMAIN own.outer_mood AS own.inner_mood",
        "CREATE TYPE own._underscored AS (boxes box[], moods own.outer_mood[])",
        "CREATE TYPE own.span AS RANGE (subtype = float8)",
        "CREATE TABLE own.t (id int PRIMARY KEY, d own.outer_mood, c own._underscored[], r own.span,"
        " v int2vector, p point)",
    )
    info = await catalog.describe(source.query, await _relation(source, "own.t"))
    by_name = {kind.name: kind for kind in info.types.values()}
    outer, inner, mood = by_name["outer_mood"], by_name["inner_mood"], by_name["mood"]
    assert (outer.kind, outer.base_oid, inner.kind, inner.base_oid) == ("domain", inner.oid, "domain", mood.oid)
    assert mood.kind == "enum"
    composite = by_name["_underscored"]
    assert composite.kind == "composite"
    assert [name for name, _ in composite.attributes] == ["boxes", "moods"]
    boxes, moods = (info.types[oid] for _, oid in composite.attributes)
    assert (boxes.kind, boxes.delimiter) == ("array", ";")
    assert info.types[boxes.element_oid].name == "box"
    assert (moods.kind, moods.element_oid, moods.delimiter) == ("array", outer.oid, ",")
    assert by_name["span"].kind == "range"
    assert [by_name[name].kind for name in ("int2vector", "point")] == ["base", "base"]
    arrays = [kind for kind in info.types.values() if kind.kind == "array"]
    assert composite.oid in {kind.element_oid for kind in arrays}


async def test_a_partition_knows_its_topmost_root(source: SourceDatabase) -> None:
    await _partitions(source)
    for table in ("public.low_a", "public.low"):
        info = await catalog.describe(source.query, await _relation(source, table))
        assert info.root == ("public", "top")
    assert (await catalog.describe(source.query, await _relation(source, "public.top"))).root is None


async def _partitions(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.top (id int, part int, body text, PRIMARY KEY (id, part)) PARTITION BY RANGE (id)",
        "CREATE TABLE public.low PARTITION OF public.top FOR VALUES FROM (0) TO (10) PARTITION BY LIST (part)",
        "CREATE TABLE public.low_a PARTITION OF public.low FOR VALUES IN (1)",
        "ALTER TABLE public.low_a REPLICA IDENTITY FULL",
    )


async def test_tables_of_a_publication(source: SourceDatabase) -> None:
    await _partitions(source)
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, code text NOT NULL, n int)",
        "CREATE UNIQUE INDEX t_code ON public.t (code)",
        "ALTER TABLE public.t REPLICA IDENTITY USING INDEX t_code",
        "CREATE PUBLICATION everything FOR ALL TABLES"
        + (" WITH (publish_via_partition_root = true)" if source.version >= 130000 else ""),
    )
    tables = {(t.schema, t.table): t for t in await catalog.tables(source.query, "everything")}
    t = tables["public", "t"]
    assert (t.replica_identity, t.identity_columns, t.primary_key) == ("i", ("code",), ("id",))
    assert (t.toastable, t.published_columns, t.readable) == ((), ("id", "code", "n"), True)
    if source.version >= 130000:
        top = tables["public", "top"]
        assert (top.kind, [leaf.table for leaf in top.leaves]) == ("p", ["low_a"])
        assert (top.replica_identity, top.leaves[0].replica_identity) == ("d", "f")
        assert set(tables) == {("public", "t"), ("public", "top")}
    else:
        assert tables["public", "low_a"].name == ("public", "top")


async def test_column_lists_and_row_filters(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY, a text, b int)")
    listed = source.version >= 150000
    await source.execute(
        "CREATE PUBLICATION list FOR TABLE public.t" + (" (id, b)" if listed else ""),
        "CREATE PUBLICATION filter FOR TABLE public.t" + (" WHERE (b > 3)" if listed else ""),
    )
    (by_list,) = await catalog.tables(source.query, "list")
    (by_filter,) = await catalog.tables(source.query, "filter")
    assert by_list.published_columns == (("id", "b") if listed else ("id", "a", "b"))
    assert by_list.row_filter is None
    assert by_filter.row_filter == ("(b > 3)" if listed else None)
    assert by_filter.filter_columns == (("b",) if listed else ())
    assert by_list.filter_columns == ()

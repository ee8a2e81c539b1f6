"""`check` against real servers: clean is clean, and the SQL of each finding mends it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from servers.postgres import Postgres
from source.conftest import SourceDatabase
from spillway.config import Config, load
from spillway.errors import Finding
from spillway.source.connect import connect_query, connect_replication
from spillway.source.preflight import check
from spillway.source.slot import ensure_publication, ensure_slot
from spillway.source.stream import start_command

SEARCH = {"type": "opensearch", "endpoint_url": "http://127.0.0.1:1", "index_name": "i"}
FILE = {"type": "file", "path": "out.ndjson"}


def _config(
    folder: Path, url: str, slot: str, /, *, create: bool = False, replica_url: str = "", **sink: object
) -> Config:
    sink = {"name": "sink", "database": "app", "destination": SEARCH, **sink}
    file = folder / "spillway.yml"
    publication = {"name": "p", "create_if_not_exists": create}
    database: dict[str, object] = {"name": "app", "url": url, "slot": {"name": slot, "create_if_not_exists": create}}
    if replica_url:
        database["replica_url"] = replica_url
    file.write_text(yaml.safe_dump({"databases": [{**database, "publication": publication}], "sinks": [sink]}))
    return load(file, {})


async def _findings(folder: Path, of: SourceDatabase, /, *, create: bool = False, **sink: object) -> list[Finding]:
    return await check(_config(folder, of.dsn, of.slot, create=create, **sink))


def _codes(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.code, finding.severity) for finding in findings}


async def _mend(source: SourceDatabase, findings: list[Finding]) -> None:
    """Do what the remedies say: their first statement."""
    for finding in findings:
        statement = re.match(r"[^;]+;", finding.remedy)
        assert statement is not None, finding
        await source.execute(statement[0])


async def test_what_will_be_created_is_no_finding(source: SourceDatabase, tmp_path: Path) -> None:
    await source.execute("CREATE TABLE public.jobs (id int PRIMARY KEY, n int)")
    assert await _findings(tmp_path, source, create=True) == []
    assert await _findings(tmp_path, source, create=True, source={"include_tables": ["jobs"]}) == []


async def test_a_missing_slot_and_publication_are_mended_by_their_sql(source: SourceDatabase, tmp_path: Path) -> None:
    await source.execute("CREATE TABLE public.jobs (id int PRIMARY KEY, n int)")
    findings = await _findings(tmp_path, source, source={"include_tables": ["jobs"]})
    assert _codes(findings) == {("publication_missing", "error"), ("slot_missing", "error")}
    assert {finding.database for finding in findings} == {"app"}
    await _mend(source, sorted(findings, key=lambda finding: finding.code))  # the publication first
    assert await _findings(tmp_path, source, source={"include_tables": ["jobs"]}) == []


async def test_tables_are_judged_and_mended(source: SourceDatabase, tmp_path: Path) -> None:
    await source.make_slot()
    await source.execute(
        "ALTER TABLE public.t ALTER body SET STORAGE plain",
        "CREATE TABLE public.keyless (a int, big text)",
        "CREATE TABLE public.large (id int PRIMARY KEY, big text)",
        "CREATE TABLE public.grouped (id int PRIMARY KEY, owner int)",
        "CREATE TABLE public.outside (id int PRIMARY KEY)",
        *(
            f"INSERT INTO public.{table} SELECT 1, string_agg(md5(g::text), '') FROM generate_series(1, 500) g"
            for table in ("keyless", "large")
        ),
        "ALTER PUBLICATION p ADD TABLE public.keyless, public.large, public.grouped",
    )
    named = {"include_tables": ["t", "keyless", "large", "outside", "absent"]}
    assert "toast" not in {code for code, _ in _codes(await _findings(tmp_path, source, source=named))}  # reselect
    findings = await _findings(tmp_path, source, source=named, toast="fail")
    assert {(f.code, f.severity, f.sink) for f in findings} == {
        ("update_refused", "error", None),
        ("no_primary_key", "error", "sink"),
        ("table_not_published", "error", "sink"),
        ("table_missing", "error", "sink"),
        ("toast", "warning", "sink"),
    }
    toast = [f for f in findings if f.code == "toast"]
    # keyless has no identity at all yet: nothing of its old rows comes
    assert sorted(f.remedy.split('"')[3] for f in toast) == ["keyless", "large"]
    await _mend(source, [f for f in findings if f.code in ("update_refused", "table_not_published", "toast")])
    findings = await _findings(tmp_path, source, source={"include_tables": ["t", "keyless", "large", "outside"]})
    assert _codes(findings) == {("no_primary_key", "error")}
    # Of an events sink
    findings = await _findings(tmp_path, source, destination=FILE, source={"include_tables": ["t", "keyless"]})
    assert _codes(findings) == {("no_primary_key", "warning")}
    grouped = [{"name": "grouped", "group_column_names": ["owner"]}]
    findings = await _findings(
        tmp_path, source, destination=FILE, source={"include_tables": ["grouped"]}, tables=grouped
    )
    assert [(f.code, f.remedy) for f in findings] == [
        ("key_not_in_replica_identity", 'ALTER TABLE "public"."grouped" REPLICA IDENTITY FULL;')
    ]
    await _mend(source, findings)
    assert (
        await _findings(tmp_path, source, destination=FILE, source={"include_tables": ["grouped"]}, tables=grouped)
        == []
    )


async def test_the_refusal_that_is_foretold_is_real(source: SourceDatabase, tmp_path: Path) -> None:
    await source.make_slot()
    await source.execute("CREATE TABLE public.keyless (a int)", "ALTER PUBLICATION p ADD TABLE public.keyless")
    (finding,) = await _findings(tmp_path, source, destination=FILE, source={"include_tables": ["t"]})
    assert finding.code == "update_refused"
    await source.execute("INSERT INTO public.keyless VALUES (1)")
    with pytest.raises(Exception, match="replica identity"):
        await source.execute("UPDATE public.keyless SET a = 2")
    await _mend(source, [finding])
    await source.execute("UPDATE public.keyless SET a = 2")


async def test_partitions(source: SourceDatabase, tmp_path: Path) -> None:
    await source.execute(
        "CREATE TABLE public.top (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
        "CREATE TABLE public.low PARTITION OF public.top FOR VALUES FROM (0) TO (10)",
        "ALTER TABLE public.low REPLICA IDENTITY NOTHING",
        "CREATE PUBLICATION p FOR ALL TABLES",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
    )
    findings = await _findings(tmp_path, source, source={"include_tables": ["top"]})
    expected = {("update_refused", "error")} | ({("pubviaroot", "warning")} if source.version >= 130000 else set())
    assert _codes(findings) == expected
    assert next(f for f in findings if f.code == "update_refused").remedy == (
        'ALTER TABLE "public"."low" REPLICA IDENTITY DEFAULT;'
    )
    await _mend(source, findings)
    assert await _findings(tmp_path, source, source={"include_tables": ["top"]}) == []


async def test_column_lists_and_filters(source: SourceDatabase, tmp_path: Path) -> None:
    if source.version < 150000:
        return  # neither exists there
    await source.execute(
        "CREATE TABLE public.listed (id int PRIMARY KEY, owner int, n int)",
        "ALTER TABLE public.listed REPLICA IDENTITY DEFAULT",
        "CREATE TABLE public.filtered (id int PRIMARY KEY, n int)",
        "CREATE PUBLICATION p FOR TABLE public.listed (id, n), public.filtered WHERE (n > 1)",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
    )
    findings = await _findings(
        tmp_path, source, destination=FILE, tables=[{"name": "listed", "group_column_names": ["owner"]}]
    )
    assert _codes(findings) == {("key_column_missing", "error"), ("update_refused", "error")}
    await source.execute("INSERT INTO public.filtered VALUES (1, 5)")
    with pytest.raises(Exception, match="replica identity"):
        await source.execute("UPDATE public.filtered SET n = 6")


async def test_deletes_that_are_told_from_nothing(source: SourceDatabase, tmp_path: Path) -> None:
    await source.make_slot()
    rows = {"destination": FILE, "format": "record"}
    (finding,) = await _findings(tmp_path, source, **rows)
    assert (finding.code, finding.severity, finding.sink) == ("deletes_not_told", "warning", "sink")
    assert await _findings(tmp_path, source, **rows, actions=["insert", "update"]) == []
    assert await _findings(tmp_path, source, destination=FILE) == []


@pytest.mark.parametrize(
    ("body", "looks"),
    [("return 'n' in changes", True), ("return record['id'] > 1", False), ("return action != 'changes'", False)],
)
async def test_a_filter_that_looks_at_changes(
    source: SourceDatabase, tmp_path: Path, body: str, *, looks: bool
) -> None:
    await source.make_slot()
    _config(tmp_path, source.dsn, source.slot, destination=FILE)
    code = f"def filter(action, record, changes, metadata):\n    {body}\n"
    file = tmp_path / "spillway.yml"
    whole = yaml.safe_load(file.read_text())
    whole["functions"] = [{"name": "f", "type": "filter", "code": code}]
    whole["sinks"][0]["filter"] = "f"
    file.write_text(yaml.safe_dump(whole))
    config = load(file, {})
    findings = await check(config)
    assert _codes(findings) == ({("changes_not_told", "warning")} if looks else set())
    await _mend(source, findings)
    assert await check(config) == []


async def test_the_slot_of_somebody_else(source: SourceDatabase, tmp_path: Path) -> None:
    await source.execute(
        "CREATE PUBLICATION p FOR ALL TABLES",
        "CREATE TABLE public.t (id int PRIMARY KEY)",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'test_decoding')",
    )
    findings = await _findings(tmp_path, source)
    assert "slot_plugin" in {f.code for f in findings}


async def test_a_slot_that_is_being_read(source: SourceDatabase, tmp_path: Path) -> None:
    await source.make_slot()
    await source.stream()
    assert await _findings(tmp_path, source, destination=FILE) == [], "by the Spillway that is being checked"


async def test_a_slot_that_somebody_else_reads(source: SourceDatabase, tmp_path: Path) -> None:
    await source.make_slot()
    stranger = await connect_replication(source.dsn, "stranger")
    active = f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{source.slot}'"
    try:
        stranger.pgconn.send_query(start_command(source.slot, ["p"], 0, source.version))

        async def taken() -> bool:
            return await source.value(active) == stranger.info.backend_pid

        await source.until(taken)
        (finding,) = await _findings(tmp_path, source, destination=FILE)
        assert (finding.code, finding.severity) == ("slot_active", "error")
        assert "spillway:stranger" in finding.what
    finally:
        stranger.pgconn.finish()


async def test_roles(source: SourceDatabase, tmp_path: Path) -> None:
    role = f"plain_{source.database}"
    await source.make_slot()
    await source.execute(f"CREATE ROLE {role} LOGIN", f"REVOKE ALL ON public.t FROM {role}")
    try:
        config = _config(tmp_path, source.dsn.replace("postgres@", f"{role}@"), source.slot)
        findings = await check(config)
        assert {("no_replication_attribute", "error"), ("select_missing", "warning")} <= _codes(findings)
        await source.execute(f"ALTER ROLE {role} REPLICATION")
        for finding in findings:
            if finding.code == "select_missing":
                await source.execute(finding.remedy)
        assert await check(config) == []
        await source.execute("DROP PUBLICATION p")
        url = source.dsn.replace("postgres@", f"{role}@")
        findings = await check(_config(tmp_path, url, source.slot, create=True, source={"include_tables": ["t"]}))
        assert ("publication_create", "error") in _codes(findings)
        both = f"{role} lacks CREATE on the database and does not own public.t"
        assert both in next(f.what for f in findings if f.code == "publication_create")
        findings = await check(_config(tmp_path, url, source.slot, create=True))
        assert "only a superuser" in next(f.what for f in findings if f.code == "publication_create")
    finally:
        await source.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_unreachable_and_no_database(source: SourceDatabase, tmp_path: Path, unused_port: int) -> None:
    (finding,) = await check(_config(tmp_path, f"postgresql://postgres:secret@127.0.0.1:{unused_port}/x", "s"))
    assert (finding.code, finding.database) == ("unreachable", "app")
    assert "secret" not in str(finding.as_json())
    (finding,) = await check(_config(tmp_path, source.dsn.replace(source.database, "nowhere"), "s"))
    assert finding.code == "no_database"


async def test_a_wrong_password(tmp_path: Path) -> None:
    with Postgres("15", auth="password") as server:
        (finding,) = await check(_config(tmp_path, server.dsn(password="wrong"), "s"))
    assert finding.code == "authentication"
    assert "wrong" not in str(finding.as_json())


async def test_a_server_that_is_not_set_up(tmp_path: Path) -> None:
    settings = {"wal_level": "replica", "max_replication_slots": "0", "max_wal_senders": "1"}
    with Postgres("18", settings=settings) as server:
        findings = await check(_config(tmp_path, server.dsn(), "s", create=True, destination=FILE))
        assert {("wal_level", "error"), ("max_replication_slots", "error")} <= _codes(findings)
    with Postgres("18", settings={"max_wal_senders": "1", "max_slot_wal_keep_size": "64MB"}) as server:
        dsn = server.dsn()
        query, replication = await connect_query(dsn), await connect_replication(dsn)
        try:
            await query.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
            config = _config(tmp_path, dsn, "s", create=True, destination=FILE)
            assert _codes(await check(config)) == {("max_wal_senders", "error")}
            await ensure_publication(query, "p", create_if_not_exists=True, init_sql=None, tables=[])
            await ensure_slot(query, replication, "s", "p", create_if_not_exists=True)
            await replication.close()
            for _ in range(3):  # each switch leaves a segment of 16 MB behind
                await query.execute("INSERT INTO public.t SELECT coalesce(max(id), 0) + 1 FROM public.t")
                await query.execute("SELECT pg_switch_wal()")
            assert _codes(await check(config)) == {("max_slot_wal_keep_size", "warning")}
        finally:
            await replication.close()
            await query.close()


async def test_a_replica_url_that_is_no_replica(source18: SourceDatabase, tmp_path: Path) -> None:
    await source18.make_slot()

    async def codes(url: str) -> set[tuple[str, str]]:
        return _codes(await check(_config(tmp_path, source18.dsn, source18.slot, replica_url=url, destination=FILE)))

    assert await codes(source18.dsn) == {("replica_promoted", "error")}
    assert await codes(re.sub(r":\d+/", ":1/", source18.dsn)) == {("unreachable", "error")}
    with Postgres("15") as foreign:  # clusters of one version are copies of one
        assert await codes(foreign.create_database(source18.database)) == {("replica_foreign", "error")}

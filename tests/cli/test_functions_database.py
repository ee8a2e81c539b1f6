"""`spillway functions test` with rows of a table, and what `spillway check` says about functions and their SQL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from servers.postgres import Postgres
from spillway.cli import main

Json = dict[str, Any]
SEARCH = {"type": "opensearch", "endpoint_url": "http://127.0.0.1:1", "index_name": "i"}
ENRICHMENT = "SELECT j.id, c.name AS company FROM jobs j JOIN companies c ON c.id = j.company_id WHERE j.id = ANY($1)"
OF_COMPANIES = "SELECT id FROM jobs WHERE company_id = ANY($1)"
SCHEMA = """
CREATE TABLE companies (id int PRIMARY KEY, name text);
CREATE TABLE jobs (id int PRIMARY KEY, company_id int, title text, pay numeric, at timestamptz);
CREATE TABLE notes (id int PRIMARY KEY, job_id int, body text);
INSERT INTO companies VALUES (1, 'one'), (2, 'two');
INSERT INTO jobs SELECT i, i % 3, 'job ' || i, i + 0.10, '2026-01-02 03:04:05Z' FROM generate_series(1, 5) i;
CREATE PUBLICATION p FOR TABLE jobs, companies;
"""

Write = Callable[..., Path]


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture
def write(database: str, tmp_path: Path) -> Write:
    """A configuration with one sink."""
    slot = f"s_{psycopg.conninfo.conninfo_to_dict(database)['dbname']}"
    execute(database, SCHEMA)

    def write(*functions: Json, **sink: object) -> Path:
        source = {"include_tables": ["jobs"]}
        whole = {
            "databases": [
                {
                    "name": "app",
                    "url": database,
                    "slot": {"name": slot, "create_if_not_exists": True},
                    "publication": {"name": "p"},
                }
            ],
            "functions": list(functions),
            "sinks": [{"name": "sink", "database": "app", "source": source, "destination": SEARCH, **sink}],
        }
        file = tmp_path / "spillway.yml"
        file.write_text(yaml.safe_dump(whole))
        return file

    return write


def function(name: str, kind: str, body: str) -> Json:
    if kind == "enrichment":
        return {"name": name, "type": kind, "code": body}
    return {"name": name, "type": kind, "code": f"def {kind}(action, record, changes, metadata):\n    {body}\n"}


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[Json]]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert isinstance(ended.value.code, int)
    return ended.value.code, json.loads(capsys.readouterr().out)


def findings(capsys: pytest.CaptureFixture[str], file: Path) -> list[Json]:
    status, found = answer(capsys, "check", str(file))
    assert status == (1 if found else 0)
    return found


JOINED = function("joined", "enrichment", ENRICHMENT)


def test_rows_as_the_stream_would_send_them(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(function("shape", "transform", "return record"), transform="shape")
    status, found = answer(
        capsys, "functions", "test", "shape", "-c", str(file), "--from-table", "jobs", "--limit", "2"
    )
    assert status == 0
    assert [one["in"]["record"]["id"] for one in found] == [5, 4]
    message = found[0]["in"]
    assert message["record"] == {
        "id": 5, "company_id": 2, "title": "job 5", "pay": 5.10, "at": "2026-01-02T03:04:05.000000Z",
    }  # fmt: skip
    assert (message["action"], message["metadata"]["record_pks"]) == ("insert", ["5"])
    assert message["metadata"]["consumer"]["name"] == "sink"
    assert found[0]["out"][0]["body"] == message["record"]


def test_by_default_it_is_tried_with_what_is_in_its_sinks_table(
    write: Write, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = function("titles", "transform", "return record['title']")
    arguments = ("functions", "test", "titles", "-c", str(write(titles, transform="titles")))
    status, found = answer(capsys, *arguments, "--limit", "2")
    assert (status, [one["out"][0]["body"] for one in found]) == (0, ["job 5", "job 4"])
    execute(database, "DELETE FROM jobs")
    status, found = answer(capsys, *arguments)
    assert [one["in"]["action"] for one in found] == ["insert", "update", "delete"]
    assert found[0]["in"]["record"] == {
        "id": 1, "company_id": 1, "title": "example", "pay": 1.5, "at": "2026-01-02T03:04:05.000000Z",
    }  # fmt: skip
    assert (status, found[0]["out"][0]["body"]) == (0, "example")


def test_an_enrichment_is_asked_about_rows(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(JOINED, enrichment="joined")
    status, found = answer(capsys, "functions", "test", "joined", "-c", str(file), "--limit", "3")
    assert status == 0
    assert [one["out"][0]["body"] for one in found] == [{"id": 5, "company": "two"}, {"id": 4, "company": "one"}, None]


def test_an_enrichment_is_asked_about_messages(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"table_schema": "public", "table_name": "jobs", "record_pks": ["4"]}
    message = {"action": "update", "record": {"id": 4}, "changes": {}, "metadata": metadata}
    (tmp_path / "m.json").write_text(json.dumps([message, {**message, "metadata": {}}]))
    file = write(JOINED, enrichment="joined")
    status, found = answer(
        capsys, "functions", "test", "joined", "-c", str(file), "--message", str(tmp_path / "m.json")
    )
    assert (status, [one["out"][0]["body"] for one in found]) == (0, [{"id": 4, "company": "one"}, None])


def test_other_functions_see_rows_that_are_enriched(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    shape = function("shape", "transform", "return metadata.enrichment")
    file = write(JOINED, shape, enrichment="joined", transform="shape")
    _, found = answer(capsys, "functions", "test", "shape", "-c", str(file), "--from-table", "jobs", "--limit", "1")
    assert found[0]["in"]["metadata"]["enrichment"] == {"id": 5, "company": "two"}
    assert found[0]["out"][0]["body"] == {"id": 5, "company": "two"}


def test_an_enrichment_fails_for_the_row_whose_data_it_is(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT id, 1 / (id - 4) AS x FROM jobs WHERE id = ANY($1) UNION ALL SELECT 3, 0 WHERE 3 = ANY($1)"
    file = write(function("joined", "enrichment", sql), enrichment="joined")
    status, found = answer(capsys, "functions", "test", "joined", "-c", str(file), "--limit", "3")
    assert (status, [one["failed"]["reason"] if "failed" in one else "" for one in found]) == (
        1,
        ["", "enrichment_failed", "enrichment_rows"],
    )


def test_a_table_that_is_not_there(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(function("shape", "transform", "return record"), transform="shape")
    assert main(["functions", "test", "shape", "-c", str(file), "--from-table", "absent"]) == 1
    assert "table public.absent does not exist" in capsys.readouterr().err


def test_what_is_right_is_no_finding(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(
        JOINED,
        function("wanted", "filter", "return True"),
        enrichment="joined",
        filter="wanted",
        filters=[{"column": "title", "operator": "like", "value": "job%"}],
        related=[{"table": "companies", "sql": OF_COMPANIES}],
    )
    assert findings(capsys, file) == []


def test_python_that_cannot_be_loaded(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = function("wanted", "filter", "return True")
    wanted["code"] = "import nowhere_to_be_found\n" + wanted["code"]
    (found,) = findings(capsys, write(wanted, filter="wanted"))
    assert (found["code"], found["sink"]) == ("function_not_loaded", "sink")
    assert "nowhere_to_be_found" in found["what"]


def test_workers_that_take_too_much_of_the_limit(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(function("wanted", "filter", "return True"), filter="wanted")
    whole = {**yaml.safe_load(file.read_text()), "memory": {"limit_mb": 64}, "function_limits": {"memory_mb": 48}}
    file.write_text(yaml.safe_dump(whole))
    assert [found["code"] for found in findings(capsys, file)] == ["functions_memory"]


def test_rows_that_there_is_no_room_for(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit that is named would do."""
    shape = function("shape", "transform", "return record")
    file = write(JOINED, shape, enrichment="joined", transform="shape")
    limit_mb = 128
    for expected in (["large_rows"], []):
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "memory": {"limit_mb": limit_mb}}))
        _, found = answer(capsys, "check", str(file))
        assert [one["code"] for one in found] == expected
        if found:
            assert found[0]["severity"] == "warning"
            limit_mb = int(found[0]["remedy"].split(",")[0].removeprefix("memory.limit_mb: "))
            assert 128 < limit_mb < 256
            sink = yaml.safe_load(file.read_text())["sinks"][0]
            whole = yaml.safe_load(file.read_text())
            whole["sinks"] = [{**sink, "max_message_bytes": "16MB"}]
            file.write_text(yaml.safe_dump(whole))


@pytest.mark.parametrize(
    ("sql", "code", "what"),
    [
        ("SELECT id FROM job WHERE id = ANY($1)", "enrichment_failed", 'relation "job" does not exist'),
        ("SELECT title FROM jobs WHERE id = ANY($1)", "enrichment_key", "does not select id"),
        ("SELECT id FROM jobs WHERE id = ANY($1) LIMIT 1", "enrichment_few_rows", "has a LIMIT for all keys"),
        ("SELECT id FROM jobs WHERE id = ANY($1) AND company_id = ANY($2)", "enrichment_parameters", "uses $2"),
        ("SELECT id FROM jobs WHERE title = ANY($1)", "enrichment_failed", "operator does not exist"),
    ],
)
def test_enrichments_that_are_wrong(
    write: Write, capsys: pytest.CaptureFixture[str], sql: str, code: str, what: str
) -> None:
    (found,) = findings(capsys, write(function("joined", "enrichment", sql), enrichment="joined"))
    assert (found["code"], found["sink"], found["database"]) == (code, "sink", "app")
    assert what in found["what"]
    assert found["remedy"]


def test_related_tables_that_are_not_seen(write: Write, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    related = [{"table": "notes", "columns": ["job_id"], "sql": "SELECT unnest($1) AS id"}]
    file = write(related=related)
    (found,) = findings(capsys, file)
    assert (found["code"], found["remedy"]) == (
        "table_not_published",
        'ALTER PUBLICATION "p" ADD TABLE "public"."notes";',
    )
    execute(database, found["remedy"])
    (found,) = findings(capsys, file)
    assert (found["code"], found["remedy"]) == (
        "related_not_in_replica_identity",
        'ALTER TABLE "public"."notes" REPLICA IDENTITY FULL;',
    )
    execute(database, found["remedy"])
    assert findings(capsys, file) == []


@pytest.mark.parametrize(
    ("related", "code", "what"),
    [
        ({"table": "absent", "sql": OF_COMPANIES}, "table_missing", "table public.absent does not exist"),
        ({"table": "companies", "columns": ["nme"], "sql": OF_COMPANIES}, "related_columns", "have no nme"),
        ({"table": "companies", "sql": "SELECT id FROM job WHERE $1 IS NULL"}, "related_sql", '"job" does not exist'),
        ({"table": "companies", "sql": "SELECT id, title FROM jobs WHERE title = ANY($1)"}, "related_sql", "operator"),
    ],
)
def test_related_tables_that_are_wrong(
    write: Write, capsys: pytest.CaptureFixture[str], related: Json, code: str, what: str
) -> None:
    (found,) = findings(capsys, write(related=[related]))
    assert (found["code"], found["sink"]) == (code, "sink")
    assert what in found["what"]


@pytest.mark.parametrize(
    ("sql", "what"),
    [
        ("SELECT unnest($1) AS id, 1 AS x", "gives 2 columns, and the key of public.jobs has 1"),
        (
            "SELECT title AS id FROM jobs WHERE company_id = ANY($1)",
            "id as text, and the key of public.jobs has it as integer",
        ),
    ],
)
def test_related_sql_gives_keys(write: Write, capsys: pytest.CaptureFixture[str], sql: str, what: str) -> None:
    (found,) = findings(capsys, write(related=[{"table": "companies", "sql": sql}]))
    assert found["code"] == "related_sql"
    assert what in found["what"]


def test_related_tables_before_there_is_a_publication(
    write: Write, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(database, "DROP PUBLICATION p")
    file = write(related=[{"table": "notes", "columns": ["job_id"], "sql": "SELECT unnest($1) AS id"}])
    whole = yaml.safe_load(file.read_text())
    for publication in (
        {"name": "p", "create_if_not_exists": True},
        {"name": "p", "create_if_not_exists": True, "init_sql": "CREATE PUBLICATION p FOR TABLE jobs, notes"},
    ):
        whole["databases"][0]["publication"] = publication
        file.write_text(yaml.safe_dump(whole))
        assert [found["code"] for found in findings(capsys, file)] == ["related_not_in_replica_identity"]


def test_all_missing_grants_at_once(write: Write, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    role = f"reader_{psycopg.conninfo.conninfo_to_dict(database)['dbname']}"
    execute(database, f"CREATE ROLE {role} LOGIN REPLICATION")
    try:
        file = write(JOINED, enrichment="joined", related=[{"table": "companies", "sql": OF_COMPANIES}])
        file.write_text(file.read_text().replace("postgres@", f"{role}@"))
        by_code = {found["code"]: found for found in findings(capsys, file)}
        assert "toast: reselect" in by_code["select_missing"]["what"]
        assert "related" in by_code["select_missing"]["what"]
        remedy = by_code["enrichment_failed"]["remedy"]
        assert f'GRANT SELECT ON "public"."companies" TO "{role}"; GRANT SELECT ON "public"."jobs"' in remedy
        execute(database, remedy)
        assert findings(capsys, file) == []
    finally:
        execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_publication_that_this_role_cannot_create(
    write: Write, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    role = f"maker_{name}"
    execute(database, "DROP PUBLICATION p", f"CREATE ROLE {role} LOGIN REPLICATION", f"GRANT SELECT ON jobs TO {role}")
    try:
        file = write()
        whole = yaml.safe_load(file.read_text().replace("postgres@", f"{role}@"))
        sql = "CREATE PUBLICATION p FOR TABLE jobs"
        whole["databases"][0]["publication"] = {"name": "p", "create_if_not_exists": True, "init_sql": sql}
        file.write_text(yaml.safe_dump(whole))
        (found,) = findings(capsys, file)
        assert (found["code"], found["severity"]) == ("publication_create", "error")
        assert "lacks CREATE on the database and does not own public.jobs" in found["what"]
        assert found["remedy"] == f"as owner: {sql}"
        execute(database, f'GRANT CREATE ON DATABASE "{name}" TO "{role}"')
        (found,) = findings(capsys, file)
        assert "does not own public.jobs" in found["what"]
        execute(database, sql)
        assert findings(capsys, file) == []
    finally:
        execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_field_operations_on_columns_that_are_not_there(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [
        {"rename": {"title": "name"}},
        {"mask": ["name", "titel"]},
        {"flatten": ["at"]},
        {"drop": ["at_x", "pya"]},
        {"set": {"new": 1}},
        {"select": ["id", "new"]},
        {"hash": ["company_id"]},
    ]
    slim: Json = {"name": "slim", "type": "fields", "fields": fields}
    file = write(slim, transform="slim")
    with pytest.raises(SystemExit):
        main(["check", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {(one["code"], one["severity"], one["sink"]) for one in found} == {
        ("field_column_missing", "warning", "sink")
    }
    assert ['"titel"' in found[0]["what"], '"pya"' in found[1]["what"], '"company_id"' in found[2]["what"]] == [
        True
    ] * 3


def test_field_operations_that_write_over_the_key(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [{"rename": {"company_id": "id"}}, {"set": {"id": 1}}, {"rename": {"title": "name"}}]
    slim: Json = {"name": "slim", "type": "fields", "fields": fields}
    found = findings(capsys, write(slim, transform="slim"))
    assert [(one["code"], one["severity"]) for one in found] == [("key_written_over", "warning")] * 2
    assert ["rename in function slim" in found[0]["what"], "set in function slim" in found[1]["what"]] == [True] * 2


def test_a_filter_on_a_large_value(write: Write, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    execute(database, "ALTER TABLE jobs ALTER title SET STORAGE EXTERNAL")
    filters = [{"column": "title", "operator": "like", "value": "j%"}]
    file = write(filters=filters, toast="omit")
    assert findings(capsys, file) == []
    execute(database, "UPDATE jobs SET title = 'job ' || repeat('x', 9000)")
    assert findings(capsys, write(filters=filters, toast="reselect")) == []
    told = [one for one in findings(capsys, write(filters=filters, toast="omit")) if one["code"] != "toast"]
    assert [(one["code"], one["severity"]) for one in told] == [("filter_not_told", "warning")]
    alter, _, other = told[0]["remedy"].partition(" or ")
    assert other == "toast: reselect for this sink"
    execute(database, alter)
    assert findings(capsys, write(filters=filters, toast="omit")) == []


def test_filters_and_columns_that_do_not_fit(write: Write, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = findings(capsys, write(filters=[{"column": "titel", "operator": "eq", "value": "x"}]))
    assert found["code"] == "filter_column_missing"
    assert found["what"].endswith("did you mean title?")
    (found,) = findings(capsys, write(filters=[{"column": "company_id", "operator": "eq", "value": "many"}]))
    assert found["code"] == "filter_does_not_fit"
    (found,) = findings(capsys, write(destination={**SEARCH, "routing_column": "tenant"}))
    assert found["code"] == "column_missing"
    file = write(destination={**SEARCH, "routing_column": "company_id"})
    (found,) = findings(capsys, file)
    assert found["code"] == "column_not_in_replica_identity"
    alter = "ALTER TABLE jobs"
    execute(
        database, f"{alter} ALTER company_id SET NOT NULL", "CREATE UNIQUE INDEX by_company ON jobs (id, company_id)"
    )
    execute(database, f"{alter} REPLICA IDENTITY USING INDEX by_company")  # of an update this tells no old value
    (found,) = findings(capsys, file)
    assert (found["code"], "UPDATE" in found["what"]) == ("column_not_in_replica_identity", True)
    execute(database, found["remedy"])
    assert findings(capsys, file) == []


def test_an_outbox_names_columns_of_its_table(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    hook = {"type": "stdout"}
    outbox = {"table": "jobs", "payload": "title", "key": "company"}
    source = {"include_tables": ["jobs", "companies"]}
    (found,) = findings(capsys, write(source=source, outbox=outbox, destination=hook))
    assert found["code"] == "key_column_missing"
    assert '"company", by which it is keyed' in found["what"]
    assert findings(capsys, write(source=source, outbox={**outbox, "key": "company_id"}, destination=hook)) == []


def test_the_example(database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "examples" / "functions.yml"
    publication = yaml.safe_load(file.read_text())["databases"][0]["publication"]
    execute(
        database,
        "CREATE TABLE customers (id int PRIMARY KEY, name text, email text)",
        "CREATE TABLE orders (id int PRIMARY KEY, customer_id int, status text, total numeric, deleted_at timestamptz)",
        "CREATE TABLE order_lines (id int PRIMARY KEY, order_id int, sku text, quantity int)",
        "INSERT INTO customers VALUES (1, 'one', 'x')",
        "INSERT INTO orders VALUES (7, 1, 'open', 1.50, NULL)",
        "INSERT INTO order_lines VALUES (1, 7, 'a', 2), (2, 7, 'b', 1)",
        publication["init_sql"],
    )
    monkeypatch.setenv("DATABASE_URL", database)
    changes, lines = findings(capsys, file)
    assert changes["code"] == "changes_not_told"
    assert changes["remedy"] == 'ALTER TABLE "public"."orders" REPLICA IDENTITY FULL;'
    assert lines["remedy"] == 'ALTER TABLE "public"."order_lines" REPLICA IDENTITY FULL;'
    execute(database, changes["remedy"], lines["remedy"])
    assert findings(capsys, file) == []
    rows = ["-c", str(file), "--from-table", "orders"]
    _, found = answer(capsys, "functions", "test", "public_columns", *rows)
    assert found[0]["in"]["metadata"]["enrichment"] == {
        "id": 7, "customer_name": "one", "lines": [{"sku": "a", "quantity": 2}, {"sku": "b", "quantity": 1}],
    }  # fmt: skip
    assert found[0]["out"][0]["body"]["record"] == {
        "id": 7, "customer": 1, "status": "open", "total": 1.5, "source": "shop",
    }  # fmt: skip
    _, found = answer(capsys, "functions", "test", "order_event", *rows)
    assert found[0]["out"][0]["body"]["event"] == "order.open"
    _, found = answer(capsys, "functions", "test", "by_order", *rows)
    assert found[0]["out"][0]["route"] == {"method": "PUT", "endpoint_path": "/orders/7"}


@pytest.mark.parametrize("postgres", ["12"], indirect=True)
def test_on_the_oldest_version(postgres: Postgres, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(JOINED, enrichment="joined", related=[{"table": "companies", "sql": OF_COMPANIES}])
    assert findings(capsys, file) == []
    status, found = answer(capsys, "functions", "test", "joined", "-c", str(file), "--limit", "1")
    assert (status, len(found)) == (0, 1)

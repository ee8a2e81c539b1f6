"""Good files: what they mean, Sequin's shapes, defaults, warnings, secrets, the examples and the reference."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import BaseModel, ValidationError

from spillway.config import (
    BackfillLimits,
    Config,
    InitialBackfill,
    TableName,
    default_limit_mb,
    load,
    parse_table,
)
from spillway.config.load import _Whole
from spillway.config.section import Section

ROOT = Path(__file__).parents[2]

DATABASES = """\
databases:
- name: app
  url: postgresql://u:p@h/d
  slot: {name: s}
  publication: {name: p}
"""
SECRET = "hunter2-do-not-print"


def read(tmp_path: Path, text: str, **env: str) -> Config:
    file = tmp_path / "spillway.yml"
    file.write_text(text)
    return load(file, env)


def sink(tmp_path: Path, extra: str = "", destination: str = "{type: stdout}", **env: str):
    text = DATABASES + "http_endpoints: [{name: hook, url: 'http://h'}]\nmemory: {limit_mb: 512}\n"
    text += f"sinks:\n- name: x\n  database: app\n  destination: {destination}\n  {extra}\n"
    config = read(tmp_path, text, **env)
    assert config.warnings == ()
    return config.sinks[0]


OPENSEARCH = "{type: opensearch, endpoint_url: 'http://h:9200/', index_name: i}"
ELASTICSEARCH = "{type: elasticsearch, endpoint_url: 'https://h', index_name: i}"


def test_the_block_of_the_documentation(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """\
memory: {limit_mb: 512}
state:  {url: "sqlite:///spillway.db"}
server: {listen: "127.0.0.1:7376", token: "${SPILLWAY_TOKEN}"}
databases:
  - name: app
    url: "${DATABASE_URL}"
    slot: {name: spillway, create_if_not_exists: true}
    publication: {name: spillway, create_if_not_exists: true}
sinks:
  - name: jobs_sink
    database: app
    source: {include_tables: [public.jobs]}
    batch_size: 500
    max_memory_mb: 128
    max_messages: 50000
    max_retry_count: null
    on_reject: block
    backlog: {warn_messages: 100000, max_messages: null, max_bytes: 50GB, max_age: null, on_full: block}
    destination: {type: opensearch, endpoint_url: "http://127.0.0.1:9200", index_name: jobs}
""",
        SPILLWAY_TOKEN="t",
        DATABASE_URL="postgresql://u:p@h:5433/d",
    )
    assert config.warnings == ()
    assert config.memory.limit_bytes == 512 * 1024 * 1024
    assert config.state_path == tmp_path / "spillway.db"
    assert (config.server.host, config.server.port) == ("127.0.0.1", 7376)
    assert config.server.token is not None
    assert config.server.token.get_secret_value() == "t"
    (database,) = config.databases
    assert (database.hostname, database.port, database.database, database.username) == ("h", 5433, "d", "u")
    assert database.slot.create_if_not_exists
    (jobs,) = config.sinks
    assert (jobs.batch_size, jobs.max_memory_mb, jobs.max_messages, jobs.max_retry_count) == (500, 128, 50000, None)
    assert jobs.backlog.max_bytes == 50 * 1024**3
    assert jobs.backlog.max_age_seconds is None
    assert jobs.source.include_tables == (TableName("public", "jobs"),)


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, DATABASES)
    assert config.memory.limit_mb == default_limit_mb()
    assert config.state_path == tmp_path / "spillway.db"
    assert config.server.listen == "127.0.0.1:7376"
    assert config.server.token is None
    assert config.sinks == config.http_endpoints == config.warnings == ()
    database = config.database("app")
    assert database.ssl is None
    assert database.pool_size == 3
    assert (database.await_database.timeout_ms, database.await_database.interval_ms) == (30_000, 3_000)
    assert not database.slot.create_if_not_exists
    assert database.annotations == {}
    stdout = sink(tmp_path)
    assert stdout.actions == ("insert", "update", "delete")
    assert (stdout.status, stdout.message_grouping, stdout.tables) == ("active", True, ())
    assert (stdout.batch_timeout_ms, stdout.ack_wait_ms, stdout.request_timeout_seconds) == (5, 30_000, 30)
    assert (stdout.max_memory_mb, stdout.max_messages, stdout.max_retry_count) == (128, 50_000, None)
    assert (stdout.on_reject, stdout.timestamp_format, stdout.annotations) == ("block", "iso8601", {})
    assert stdout.backlog.warn_messages == 100_000
    assert stdout.backlog.max_bytes is stdout.backlog.max_messages is stdout.backlog.max_age_seconds is None
    assert stdout.backlog.on_full == "block"


@pytest.mark.parametrize(
    ("destination", "batch_size", "toast", "on_truncate"),
    [
        (ELASTICSEARCH, 100, "reselect", "ignore"),
        (OPENSEARCH, 500, "reselect", "ignore"),
        ("{type: webhook, http_endpoint: hook}", 1, "omit", "ignore"),
        ("{type: file, path: x}", 10_000, "omit", "ignore"),
        ("{type: stdout}", 10_000, "omit", "ignore"),
        ("{type: sqlite, path: x}", 1000, "omit", "apply"),
        ("{type: blackhole}", 10_000, "omit", "ignore"),
    ],
)
def test_what_the_type_decides(tmp_path: Path, destination: str, batch_size: int, toast: str, on_truncate: str) -> None:
    one = sink(tmp_path, "", destination)
    assert (one.batch_size, one.toast, one.on_truncate) == (batch_size, toast, on_truncate)
    told = sink(tmp_path, "batch_size: 7\n  toast: omit\n  on_truncate: ignore", destination)
    assert (told.batch_size, told.toast, told.on_truncate) == (7, "omit", "ignore")


def test_the_destination_overrides_the_sink(tmp_path: Path) -> None:
    own = OPENSEARCH.replace("}", ", batch_size: 33, timeout_seconds: 2.5}")
    one = sink(tmp_path, "batch_size: 7\n  ack_wait_ms: 9000", own)
    assert (one.batch_size, one.request_timeout_seconds) == (33, 2.5)
    assert sink(tmp_path, "", own).batch_size == 33
    assert sink(tmp_path, "ack_wait_ms: 9000", OPENSEARCH).request_timeout_seconds == 9
    hook = "{type: webhook, http_endpoint: hook, timeout_seconds: 3}"
    assert sink(tmp_path, "ack_wait_ms: 9000", hook).request_timeout_seconds == 3


@pytest.mark.parametrize(("limit_mb", "expected_mb"), [(32, 4), (128, 16), (512, 16)])
def test_the_largest_message_follows_from_the_memory(tmp_path: Path, limit_mb: int, expected_mb: int) -> None:
    text = DATABASES + f"memory: {{limit_mb: {limit_mb}}}\nsinks:\n"
    text += "- {name: a, database: app, destination: {type: stdout}}\n"
    text += "- {name: b, database: app, destination: {type: stdout}, max_message_bytes: 1MB}\n"
    config = read(tmp_path, text)
    assert config.sink("a").max_message_bytes == expected_mb << 20
    assert config.sink("b").max_message_bytes == 1 << 20


EVERY_TABLE = (InitialBackfill(table=None),)
JOBS = TableName("public", "jobs")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("false", ()),
        ("[]", ()),
        ("true", EVERY_TABLE),
        ("${YES}", EVERY_TABLE),
        ("[{table: public.jobs}]", (InitialBackfill(table=JOBS, type="full"),)),
        (
            "[{table: jobs, type: partial, sort_column: updated_at, start_position: 2024-01-01}, {table: users}]",
            (
                InitialBackfill(table=JOBS, type="partial", sort_column="updated_at", start_position="2024-01-01"),
                InitialBackfill(table=TableName("public", "users"), type="full"),
            ),
        ),
        (
            "[{table: jobs, sort_column: id, start_position: -5}]",
            (InitialBackfill(table=JOBS, type="partial", sort_column="id", start_position="-5"),),
        ),
    ],
)
def test_initial_backfill(tmp_path: Path, text: str, expected: tuple[InitialBackfill, ...]) -> None:
    assert sink(tmp_path, f"initial_backfill: {text}", YES="true").initial_backfill == expected
    assert sink(tmp_path).initial_backfill == ()


def test_a_time_limit_of_sequin_in_a_backfill_loads(tmp_path: Path) -> None:
    text = DATABASES + "sinks:\n- name: x\n  database: app\n  destination: {type: stdout}\n"
    config = read(tmp_path, text + "  initial_backfill: [{table: jobs, max_timeout_ms: 5000}]\n")
    assert config.sinks[0].initial_backfill == (InitialBackfill(table=JOBS),)
    assert [warning.partition("sinks")[2] for warning in config.warnings] == [
        "[0].initial_backfill[0].max_timeout_ms: has no effect here; see backfill.timeout_ms of the sink"
    ]


def test_how_rows_are_read(tmp_path: Path) -> None:
    assert sink(tmp_path).backfill == BackfillLimits(
        parallel=1, max_rows_per_second=None, run_ahead=10_000, timeout_ms=5_000
    )
    told = "backfill: {parallel: 16, max_rows_per_second: 5000, run_ahead: 100, timeout_ms: '${T}'}"
    assert sink(tmp_path, told, T="600000").backfill == BackfillLimits(
        parallel=16, max_rows_per_second=5000, run_ahead=100, timeout_ms=600_000
    )


def test_search_destinations(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    (tmp_path / "jobs.json").write_text("{}")
    one = sink(
        tmp_path,
        "",
        "{type: elasticsearch, endpoint_url: 'https://h:9200/es/', index_name: i, auth_type: basic, "
        "auth_value: 'u:${PW}', tls_ca_file: ca.pem, gzip: '${GZIP:-true}', document: record, "
        "mapping: jobs.json}",
        PW="s3cret",
    ).destination
    assert one.endpoint_url == "https://h:9200/es"
    assert one.auth_value.get_secret_value() == "u:s3cret"
    assert (one.tls_ca_file, one.mapping) == (tmp_path / "ca.pem", tmp_path / "jobs.json")
    assert one.gzip is True
    assert one.document == "record"
    assert sink(tmp_path, "", ELASTICSEARCH).destination.document == "message"
    opensearch = sink(tmp_path, "", OPENSEARCH).destination
    assert (opensearch.document, opensearch.auth_type, opensearch.auth_value) == ("record", "none", None)
    assert (opensearch.endpoint_url, opensearch.tls_ca_file, opensearch.gzip) == ("http://h:9200", None, False)
    assert opensearch.mapping is None


def test_local_destinations(tmp_path: Path) -> None:
    one = sink(tmp_path, "", "{type: file, path: out/x.ndjson, rotate_bytes: 1GB}").destination
    assert (one.path, one.rotate_bytes) == (tmp_path / "out/x.ndjson", 1 << 30)
    assert sink(tmp_path, "", "{type: file, path: /tmp/x}").destination.path == Path("/tmp/x")
    table = sink(tmp_path, "", "{type: sqlite, path: x.db, table: jobs}").destination
    assert (table.path, table.table) == (tmp_path / "x.db", "jobs")
    assert sink(tmp_path, "", "{type: sqlite, path: x.db}").destination.table is None


def test_state_sinks_may_let_the_latest_win(tmp_path: Path) -> None:
    for destination in (OPENSEARCH, ELASTICSEARCH, "{type: sqlite, path: x}"):
        assert sink(tmp_path, "on_reject: latest_wins", destination).on_reject == "latest_wins"
    assert sink(tmp_path, "on_reject: dead_letter\n  max_retry_count: 0").max_retry_count == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 5 << 20),
        ("1MB", 1 << 20),
        ("1.5 GiB", 3 << 29),
        ("2gb", 2 << 30),
        ("1TB", 1 << 40),
        ("1048576", 1 << 20),
        ("4096kB", 4 << 20),
        ("'2097152B'", 2 << 20),
    ],
)
def test_sizes(tmp_path: Path, text: str, expected: int) -> None:
    extra = f"backlog: {{max_bytes: {text if text != '5' else 5 << 20}}}"
    assert sink(tmp_path, extra).backlog.max_bytes == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("7d", 604800), ("12h", 43200), ("30m", 1800), ("90s", 90), ("500ms", 0.5), ("1w", 604800)]
)
def test_times(tmp_path: Path, text: str, expected: float) -> None:
    assert sink(tmp_path, f"backlog: {{max_age: {text}}}").backlog.max_age_seconds == expected


def test_source(tmp_path: Path) -> None:
    everything = sink(tmp_path).source
    assert everything.selects("public", "a")
    included = sink(tmp_path, "source: {include_tables: [a, shop.b]}").source
    assert [included.selects(*name) for name in (("public", "a"), ("shop", "b"), ("shop", "a"))] == [True, True, False]
    mixed = sink(tmp_path, "source: {include_schemas: [shop], exclude_tables: [shop.b]}").source
    assert [mixed.selects(*name) for name in (("shop", "a"), ("shop", "b"), ("public", "a"))] == [True, False, False]
    excluded = sink(tmp_path, "source: {exclude_schemas: [audit]}").source
    assert [excluded.selects(*name) for name in (("shop", "a"), ("audit", "a"))] == [True, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jobs", ("public", "jobs")),
        ("shop.Jobs", ("shop", "Jobs")),
        ('"a.b"."c""d"', ("a.b", 'c"d')),
        ('shop."x y"', ("shop", "x y")),
        ("a b.c", ("a b", "c")),
    ],
)
def test_table_names(text: str, expected: tuple[str, str]) -> None:
    assert parse_table(text) == expected


def test_grouping(tmp_path: Path) -> None:
    one = sink(tmp_path, "tables: [{name: jobs, group_column_names: [tenant, kind]}, {name: shop.x}]")
    assert one.group_columns == {("public", "jobs"): ("tenant", "kind")}
    assert sink(tmp_path, "message_grouping: false\n  tables: [{name: jobs}]").message_grouping is False


# -- databases ----------------------------------------------------------------------------------------------------


def database(tmp_path: Path, body: str, **env: str):
    text = f"databases:\n- name: app\n  slot: {{name: s}}\n  publication: {{name: p}}\n  {body}\n"
    return read(tmp_path, text, **env).databases[0]


def test_discrete_keys_and_their_defaults(tmp_path: Path) -> None:
    one = database(tmp_path, "hostname: h\n  database: d")
    assert conninfo_to_dict(one.conninfo()) == {
        "host": "h",
        "port": "5432",
        "dbname": "d",
        "user": "postgres",
        "password": "postgres",
    }
    two = database(
        tmp_path, "hostname: NO\n  port: ${P:-5433}\n  database: d\n  username: u\n  password: ${PW}", PW="007"
    )
    assert conninfo_to_dict(two.conninfo()) == {
        "host": "NO",
        "port": "5433",
        "dbname": "d",
        "user": "u",
        "password": "007",
    }


@pytest.mark.parametrize(
    "password", ["it's", "back\\slash", "a b", "\\'", "${X}", "x=y", "ünï", 'dou"ble', "#:", "p%q"]
)
def test_odd_passwords_survive(tmp_path: Path, password: str) -> None:
    one = database(tmp_path, "hostname: h\n  database: my db\n  password: '${PW}'", PW=password)
    parameters = conninfo_to_dict(one.conninfo())
    assert (parameters["password"], parameters["dbname"]) == (password, "my db")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://u:p%40%3A@h:5433/d",
            {"host": "h", "port": "5433", "dbname": "d", "user": "u", "password": "p@:"},
        ),
        (
            "postgres://u@h/d?sslmode=require&application_name=x",
            {"host": "h", "dbname": "d", "user": "u", "sslmode": "require", "application_name": "x"},
        ),
        ("postgresql://u@h", {"host": "h", "dbname": "u", "user": "u"}),
        ("postgresql://h", {"host": "h"}),
        ("postgresql:///d?host=/run/pg", {"host": "/run/pg", "dbname": "d"}),
        ("postgresql://u@a:1,b:2/d", {"host": "a,b", "port": "1,2", "dbname": "d", "user": "u"}),
        ("postgresql://[::1]:5433/d", {"host": "::1", "port": "5433", "dbname": "d"}),
    ],
)
def test_urls(tmp_path: Path, url: str, expected: dict[str, str]) -> None:
    one = database(tmp_path, "url: ${DATABASE_URL}", DATABASE_URL=url)
    assert conninfo_to_dict(one.conninfo()) == expected
    assert one.database == expected.get("dbname", "")
    assert one.hostname == expected["host"]


@pytest.mark.parametrize(
    ("replica", "expected"),
    [
        ("postgresql://r:5433", {"host": "r", "port": "5433", "dbname": "d", "user": "u", "password": "p"}),
        ("postgresql://v@r/d", {"host": "r", "dbname": "d", "user": "v"}),
        ("postgresql://u:q@r", {"host": "r", "dbname": "d", "user": "u", "password": "q"}),
        (
            "postgresql://r?sslmode=require",
            {"host": "r", "dbname": "d", "user": "u", "password": "p", "sslmode": "require"},
        ),
    ],
)
def test_pages_are_read_from_the_replica(tmp_path: Path, replica: str, expected: dict[str, str]) -> None:
    one = database(tmp_path, "url: 'postgresql://u:p@h:1/d?application_name=x'\n  replica_url: ${R}", R=replica)
    assert conninfo_to_dict(one.page_conninfo()) == expected
    assert conninfo_to_dict(one.conninfo())["host"] == "h"


def test_pages_are_read_from_the_database_itself(tmp_path: Path) -> None:
    one = database(tmp_path, "url: postgresql://u:p@h/d")
    assert one.page_conninfo() == one.conninfo()


def test_the_replica_is_verified_like_the_database(tmp_path: Path) -> None:
    body = "url: postgresql://u@h/d\n  ssl: {mode: require}\n  replica_url: "
    assert conninfo_to_dict(database(tmp_path, body + "postgresql://r").page_conninfo())["sslmode"] == "require"
    own = database(tmp_path, body + "postgresql://r?sslmode=verify-ca")
    assert conninfo_to_dict(own.page_conninfo())["sslmode"] == "verify-ca"


@pytest.mark.parametrize("body", ["url: postgresql://u@h/d\n  ssl: ", "hostname: h\n  database: d\n  ssl: "])
def test_ssl(tmp_path: Path, body: str) -> None:
    def parameters(ssl: str) -> dict[str, object]:
        found = conninfo_to_dict(database(tmp_path, body + ssl).conninfo())
        return {key: value for key, value in found.items() if key.startswith("ssl")}

    for name in ("ca.pem", "c.pem", "k.pem"):
        (tmp_path / name).write_text("")
    verified = parameters("true")
    assert verified["sslmode"] == "verify-full"
    assert verified["sslrootcert"] == "system" or Path(str(verified["sslrootcert"])).is_file()
    assert parameters('"true"') == parameters("{}") == parameters("{mode: verify-full}") == verified
    assert parameters("false") == {"sslmode": "disable"}
    assert parameters("null") == {}
    assert parameters("{mode: require}") == {"sslmode": "require"}
    assert parameters("{root_cert: ca.pem, cert: c.pem, key: k.pem}") == {
        "sslmode": "verify-full",
        "sslrootcert": str(tmp_path / "ca.pem"),
        "sslcert": str(tmp_path / "c.pem"),
        "sslkey": str(tmp_path / "k.pem"),
    }


@pytest.mark.parametrize(
    ("name", "sql"),
    [
        ("p", "create publication p for all tables"),
        ("p", "\n CREATE  PUBLICATION\n P FOR TABLE a"),
        ("p", 'create publication "p" for table a;'),
        ("My-Pub", 'create publication "My-Pub" for table a'),
    ],
)
def test_init_sql(tmp_path: Path, name: str, sql: str) -> None:
    text = "databases:\n- name: app\n  url: postgresql://h/d\n  slot: {name: s}\n  publication:\n"
    text += f"    name: {name}\n    create_if_not_exists: true\n    init_sql: ${{SQL}}\n"
    assert read(tmp_path, text, SQL=sql).databases[0].publication.init_sql == sql


def test_ids_follow_from_names(tmp_path: Path) -> None:
    one, x = database(tmp_path, "url: postgresql://h/d"), sink(tmp_path)
    assert one.id == "26180121-3d9c-532c-a0d3-0eede09f665e"
    assert uuid.UUID(one.id).version == uuid.UUID(x.id).version == 5
    assert one.id != x.id


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost:80", "localhost", 80),
        ("[::1]:7376", "::1", 7376),
        ("127.9.9.9:1", "127.9.9.9", 1),
    ],
)
def test_loopback_needs_no_token(tmp_path: Path, listen: str, host: str, port: int) -> None:
    server = read(tmp_path, DATABASES + f'server: {{listen: "{listen}"}}\n').server
    assert (server.host, server.port, server.loopback) == (host, port, True)


def test_elsewhere_with_a_token(tmp_path: Path) -> None:
    server = read(tmp_path, DATABASES + 'server: {listen: ":7376", token: x}\n').server
    assert (server.host, server.port, server.loopback) == ("0.0.0.0", 7376, False)


def test_state_paths(tmp_path: Path) -> None:
    assert read(tmp_path, DATABASES + "state: {url: 'sqlite:///a/b.db'}\n").state_path == tmp_path / "a/b.db"
    assert read(tmp_path, DATABASES + "state: {url: 'sqlite:////a/b.db'}\n").state_path == Path("/a/b.db")


# -- Sequin's file ------------------------------------------------------------------------------------------------

SEQUIN = """\
account: {name: Default}
users: [{email: a@example.com, password: "${PW:-x}"}]
api_tokens: [{name: t, token: x}]
functions: []
change_retentions: []

base_sink: &base_sink
  database: app
  status: active
  transform: none
  filter: none
  routing: none
  enrichment: null
  initial_backfill: false

x-anything: {b: "${NOPE}"}

databases:
  - name: app
    username: postgres
    password: ${PW:-postgres}
    hostname: localhost
    database: app
    port: ${PGPORT:-5432}
    pool_size: 10
    ssl: false
    ipv6: true
    queue_interval: 1000
    queue_target: 50
    use_local_tunnel: false
    tables: [{table_name: jobs}]
    slot_name: sequin_slot
    publication: {name: sequin_pub, create_if_not_exists: true, schemas: [public]}
    await_database: {timeout_ms: 1000, interval_ms: 100}
    annotations: {team: {name: core, ids: [1, 2]}, "on": true}

http_endpoints:
  - name: listed
    url: https://example.com/a
    headers:
      - {key: X-Key, value: "${KEY}"}
    encrypted_headers:
      - {key: Authorization, value: Bearer x}
  - name: mapped
    url: https://example.com/b
    headers: {X-Key: "1"}

sinks:
  - <<: *base_sink
    name: hook
    table: jobs
    message_kind: event
    load_shedding_policy: pause_on_full
    partition_count: 1
    max_ack_pending: 100
    destination:
      type: http_push
      http_endpoint: listed
      http_endpoint_path: /x
  - <<: *base_sink
    name: single
    schema: shop
    status: paused
    actions: [insert, delete]
    annotations: {env: "${ENVIRONMENT:-dev}"}
    destination: {type: webhook, http_endpoint: mapped, batch: "false"}
  - <<: *base_sink
    name: search
    schema: shop
    table: orders
    status: disabled
    timestamp_format: iso8601
    max_retry_count: "5"
    destination:
      type: elasticsearch
      endpoint_url: https://es.example.com
      index_name: orders
      auth_type: api_key
      auth_value: ${KEY}
      batch_size: 200
"""


def test_a_file_of_sequin(tmp_path: Path) -> None:
    config = read(tmp_path, SEQUIN, KEY=SECRET)
    app = config.database("app")
    assert (app.port, app.pool_size, app.slot.name, app.publication.name) == (5432, 10, "sequin_slot", "sequin_pub")
    assert app.annotations == {"team": {"name": "core", "ids": [1, 2]}, "on": True}
    assert type(app.annotations["team"]) is dict
    assert app.ssl is not None
    assert app.ssl.mode == "disable"
    listed, mapped = config.http_endpoints
    assert listed.all_headers() == {"X-Key": SECRET, "Authorization": "Bearer x"}
    assert mapped.all_headers() == {"X-Key": "1"}
    hook, single, search = config.sinks
    assert hook.destination.type == "webhook"
    assert hook.destination.batch is True
    assert hook.source.include_tables == (TableName("public", "jobs"),)
    assert (single.destination.batch, single.status, single.annotations) == (False, "paused", {"env": "dev"})
    assert single.source.include_schemas == ("shop",)
    assert single.actions == ("insert", "delete")
    assert (search.batch_size, search.max_retry_count, search.status) == (200, 5, "disabled")
    assert search.source.include_tables == (TableName("shop", "orders"),)


def test_what_has_no_effect_loads_with_a_warning_that_says_so(tmp_path: Path) -> None:
    warnings = [
        warning.removeprefix(f"{tmp_path}/spillway.yml:") for warning in read(tmp_path, SEQUIN, KEY="k").warnings
    ]
    assert warnings == [
        "1: account: has no effect: there are no accounts here",
        "2: users: has no effect: there are no users here",
        "3: api_tokens: has no effect here; see server.token",
        "27: databases[0].ipv6: has no effect: both kinds of addresses are tried",
        "28: databases[0].queue_interval: has no effect here",
        "29: databases[0].queue_target: has no effect here",
        "31: databases[0].tables: has no effect, as in Sequin; say it in the publication or in a sink's source",
        "33: databases[0].publication.schemas: has no effect, as in Sequin; say it in init_sql",
        "52: sinks[0].message_kind: has no effect, as in Sequin",
        "53: sinks[0].load_shedding_policy: has no effect (nor has it in Sequin); see backlog.on_full",
        "54: sinks[0].partition_count: has no effect here",
        "55: sinks[0].max_ack_pending: has no effect, as in Sequin; see max_messages and max_memory_mb",
    ]


def test_secrets_do_not_print(tmp_path: Path) -> None:
    text = (
        DATABASES.replace("u:p@", "u:${S}@")
        + """\
server: {token: "${S}"}
http_endpoints:
- {name: e, url: "https://h/${S}", headers: {A: "${S}"}, encrypted_headers: {B: "${S}"}}
sinks:
- {name: x, database: app, destination: {type: webhook, http_endpoint: e}}
- name: y
  database: app
  destination: {type: opensearch, endpoint_url: "http://h", index_name: i, auth_type: bearer, auth_value: "${S}"}
"""
    )
    config = read(tmp_path, text, S=SECRET)
    for shown in (repr(config), str(config), *map(str, (*config.databases, *config.sinks, *config.http_endpoints))):
        assert SECRET not in shown
    assert SECRET in config.databases[0].conninfo()
    replica = database(tmp_path, "url: postgresql://h/d\n  replica_url: postgresql://u:${S}@r/d", S=SECRET)
    assert SECRET not in repr(replica) + str(replica)
    assert SECRET in replica.page_conninfo()
    assert config.http_endpoints[0].all_headers() == {"A": SECRET, "B": SECRET}
    key_of_tls = "postgresql://u@h/d?sslpassword=" + SECRET
    assert SECRET not in repr(database(tmp_path, "url: ${U}", U=key_of_tls))


def test_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        sink(tmp_path).name = "y"


def test_the_file_as_an_editor_of_windows_saves_it(tmp_path: Path) -> None:
    file = tmp_path / "spillway.yml"
    file.write_bytes(b"\xef\xbb\xbf" + DATABASES.replace("\n", "\r\n").encode())
    assert load(file, {}).databases[0].name == "app"


# -- what is written beside the code --------------------------------------------------------------------------------


def test_every_example_loads_without_a_warning() -> None:
    examples = sorted((ROOT / "examples").glob("*.yml"))
    kinds = set()
    for example in examples:
        config = load(example, {"DATABASE_URL": "postgresql://u:p@h/d"})
        assert config.warnings == (), example
        assert config.databases[0].hostname == "h"
        kinds |= {one.destination.type for one in config.sinks}
    assert kinds == {"elasticsearch", "opensearch", "webhook", "file", "stdout", "sqlite"}
    assert "own-database.yml" in [example.name for example in examples]


def keys_of(model: type[Section], prefix: str) -> Iterator[str]:
    names = {info.alias or name: info for name, info in model.model_fields.items()}
    for key in model.known_keys():
        yield prefix + key
        for inner in models_in(names[key].annotation if key in names else str):
            yield from keys_of(inner, f"{prefix}{key}.")


def models_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        assert issubclass(annotation, Section)
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        for argument in get_args(annotation):
            yield from models_in(argument)


def test_the_reference_names_every_key() -> None:
    documented = set(re.findall(r"`\.?([a-z_.]+)`", (ROOT / "docs/configuration.md").read_text().replace("[]", "")))
    words = {word for name in documented for word in name.split(".")}
    keys = {key for key in keys_of(_Whole, "") if not key.endswith(".options")}
    assert len(keys) > 80
    assert {key for key in keys if key.rsplit(".", 1)[-1] not in words} == set()

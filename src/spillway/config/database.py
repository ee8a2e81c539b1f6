"""`databases[]`: how a source database is reached, and its slot and publication.

`url` and the discrete keys (`hostname`, `port`, ...) are two spellings of one thing: a URL is taken apart by libpq's
own parser, so a `Database` looks the same whichever was written, and only the password and `options` hold secrets.
Whatever else libpq understands (`?sslmode=require&application_name=x`) stays in `options`.

`replica_url` is a standby of the same system, on which the pages of backfills are read instead. Role, password and TLS
are the same on both unless it says otherwise; the database always is.

TLS. Without `ssl` libpq decides (`prefer`, or what the URL says). `ssl: false` is no TLS. `ssl: true` verifies the
server's certificate and name against the system's roots: Sequin does not verify, but who asks for TLS means it.
"""

from __future__ import annotations

import re
import ssl
import uuid
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, model_validator

from spillway.config.document import Block
from spillway.config.section import Reading, Section
from spillway.config.values import Annotations, Flag, Name, Whole, Wrong

_IDS = uuid.UUID("6e1f4a52-8a55-5d6c-9f0e-6f1a3c1b7d20")  # any constant: ids must be the same at every start

_DISCRETE = {"hostname": "host", "port": "port", "database": "dbname", "username": "user", "password": "password"}

_UNSAID = {"hostname": "", "username": ""}  # by a URL: libpq has defaults of its own

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

# Where distributions keep the roots. libpq's `system` asks the OpenSSL it was built with, and the one in psycopg's
# wheels looks in the folder of the machine that built it.
_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def stable_id(kind: str, name: str) -> str:
    """The id of a database or sink, as messages carry it: the same name has the same id on every machine."""
    return str(uuid.uuid5(_IDS, f"{kind}:{name}"))


def existing_file(path: Path, info: ValidationInfo) -> Path:
    """A path is relative to the configuration file's folder."""
    if isinstance(info.context, Reading):
        path = info.context.base_dir / path.expanduser()
    if not path.is_file():
        raise ValueError("there is no such file")
    return path


FilePath = Annotated[Path, AfterValidator(existing_file)]


class Ssl(Section):
    mode: SslMode = "verify-full"
    root_cert: FilePath | None = None
    cert: FilePath | None = None
    key: FilePath | None = None

    @model_validator(mode="after")
    def _pair(self) -> Ssl:
        if (self.cert is None) != (self.key is None):
            raise Wrong("key" if self.key is None else "cert", "cert and key go together")
        return self

    def parameters(self) -> dict[str, str]:
        parameters: dict[str, str] = {"sslmode": self.mode}
        if self.root_cert is not None:
            parameters["sslrootcert"] = str(self.root_cert)
        elif self.mode in ("verify-ca", "verify-full"):
            parameters["sslrootcert"] = _system_roots()
        if self.cert is not None and self.key is not None:
            parameters |= {"sslcert": str(self.cert), "sslkey": str(self.key)}
        return parameters


def _system_roots() -> str:
    for path in (ssl.get_default_verify_paths().cafile, *_ROOTS):
        if path is not None and Path(path).is_file():
            return path
    return "system"


def _ssl(value: object) -> object:
    if isinstance(value, (dict, Ssl)):
        return value
    if isinstance(value, bool | str) and str(value).lower() in ("true", "false"):
        return Ssl(mode="verify-full" if str(value).lower() == "true" else "disable")
    raise ValueError("must be true, false or a mapping of mode, root_cert, cert and key")


def _slot_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]{1,63}", value):
        raise ValueError("must be 1 to 63 of a-z, 0-9 and _, as PostgreSQL wants slot names")
    return value


def _publication_name(value: str) -> str:
    if not 1 <= len(value.encode()) <= 63 or not value.isprintable():
        raise ValueError("must be a name of 1 to 63 bytes")
    return value


class Slot(Section):
    name: Annotated[str, AfterValidator(_slot_name)]
    create_if_not_exists: Flag = False


class Publication(Section):
    inert: ClassVar = {"schemas": "has no effect, as in Sequin; say it in init_sql"}

    name: Annotated[str, AfterValidator(_publication_name)]
    create_if_not_exists: Flag = False
    init_sql: str | None = None

    @model_validator(mode="after")
    def _creates_itself(self) -> Publication:
        if self.init_sql is not None:
            quoted = re.escape('"' + self.name.replace('"', '""') + '"')
            plain = "|" + re.escape(self.name) if re.fullmatch(r"[a-z_][a-z0-9_$]*", self.name) else ""
            name = f"(?:{quoted}{plain})"
            if not re.match(rf"\s*create\s+publication\s+{name}(?![\w$])", self.init_sql, re.IGNORECASE):
                raise Wrong("init_sql", "must begin with: create publication NAME, with the NAME of this publication")
        return self


def _replica_url(value: SecretStr) -> SecretStr:
    parameters = _parse_url(value.get_secret_value())
    if "host" not in parameters and "hostaddr" not in parameters:
        raise ValueError("must name the host of the replica")
    _no_part_of_a_password(parameters)
    return value


class AwaitDatabase(Section):
    """How long the start waits for a database that cannot be reached, and how often it looks."""

    timeout_ms: Annotated[Whole, Field(ge=0)] = 30_000
    interval_ms: Annotated[Whole, Field(ge=1)] = 3_000


def _port(value: int) -> int:
    if not 1 <= value <= 65535:
        raise ValueError("must be a port, 1 to 65535")
    return value


class Database(Section):
    inert: ClassVar = {
        "tables": "has no effect, as in Sequin; say it in the publication or in a sink's source",
        "ipv6": "has no effect: both kinds of addresses are tried",
        "queue_interval": "has no effect here",
        "queue_target": "has no effect here",
    }
    not_yet: ClassVar = {"primary": (), "use_local_tunnel": (False, "false")}

    name: Name
    hostname: str  # may be a folder with a Unix socket, or libpq's list of hosts; "": libpq's default
    port: Annotated[Whole, AfterValidator(_port)] | None = None  # None: libpq's default, or a list in options
    database: str
    username: str  # "": libpq's default
    password: SecretStr | None = None
    replica_url: Annotated[SecretStr, AfterValidator(_replica_url)] | None = None
    options: dict[str, str] = Field(default_factory=dict, repr=False)  # other parameters for libpq, from the URL
    ssl: Annotated[Ssl | None, BeforeValidator(_ssl)] = None
    slot: Slot
    publication: Publication
    pool_size: Annotated[Whole, Field(ge=1, le=100)] = 3
    await_database: AwaitDatabase = Field(default_factory=AwaitDatabase)
    annotations: Annotations = Field(default_factory=dict)

    @classmethod
    def known_keys(cls) -> list[str]:
        return ["url", *super().known_keys()]

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:
        if "options" in block:
            reading.problem(block.line_of("options"), block.key_path("options"), "unknown key; give url a ?query")
            del block["options"]
        for kind in ("slot", "publication"):
            _nest(block, kind, reading)
        _one_spelling(block, reading)

    @property
    def id(self) -> str:
        return stable_id("database", self.name)

    def conninfo(self) -> str:
        """The connection string for libpq, with the password: never print it."""
        parameters = {"host": self.hostname} | self._who()
        if self.port is not None:
            parameters["port"] = str(self.port)
        parameters |= self.options
        if self.ssl is not None:
            parameters |= self.ssl.parameters()
        return _conninfo(parameters)

    def page_conninfo(self) -> str:
        """Where the pages of backfills are read: the replica, if there is one. Never print it."""
        if self.replica_url is None:
            return self.conninfo()
        said = _parse_url(self.replica_url.get_secret_value())
        parameters = self._who()
        if said.get("user", self.username) != self.username:
            parameters.pop("password", None)  # another role's
        if self.ssl is not None and "sslmode" not in said:
            parameters |= self.ssl.parameters()
        return _conninfo(parameters | said)

    def _who(self) -> dict[str, str]:
        who = {"dbname": self.database, "user": self.username}
        return who if self.password is None else who | {"password": self.password.get_secret_value()}

    @model_validator(mode="after")
    def _same_database(self) -> Database:
        if self.replica_url is not None:
            name = _parse_url(self.replica_url.get_secret_value()).get("dbname", self.database)
            if self.database and name != self.database:
                raise Wrong(
                    "replica_url", "must be a replica of the same database: leave its name out, or give the same"
                )
        return self


def _nest(block: Block, kind: str, reading: Reading) -> None:
    """``slot_name: x`` -> ``slot: {name: x}``."""
    old = f"{kind}_name"
    if old not in block:
        return
    line, path, name = block.line_of(old), block.key_path(old), block.pop(old)
    if block.get(kind) is not None:
        reading.problem(line, path, f"is the old spelling of {kind}.name; give one of the two")
        return
    renamed = Block(block.key_path(kind), line)
    renamed["name"], renamed.lines["name"] = name, line
    block[kind], block.lines[kind] = renamed, line


def _one_spelling(block: Block, reading: Reading) -> None:
    """Whatever spelling the file has, the block has the discrete keys afterwards."""
    url = block.pop("url", None)
    if url is None:
        for key, default in (("port", 5432), ("username", "postgres"), ("password", "postgres")):
            if block.get(key) is None:
                block[key] = default
        return
    line, path = block.line_of("url"), block.key_path("url")
    for key in _DISCRETE:
        if block.get(key) is not None:
            reading.problem(block.line_of(key), block.key_path(key), "url says it already; give one of the two")
    try:
        parameters = _parse_url(url)
    except ValueError as error:
        reading.problem(line, path, str(error))
        parameters = {"dbname": "-"}  # the rest is checked all the same
    if "sslmode" in parameters and block.get("ssl") is not None:
        reading.problem(block.line_of("ssl"), block.key_path("ssl"), "url has an sslmode already; give one of the two")
    ports = {"port": parameters.pop("port")} if "," in parameters.get("port", "") else {}  # of a list of hosts
    parameters.setdefault("dbname", parameters.get("user", ""))  # libpq's rule
    try:
        _no_part_of_a_password(parameters)
    except ValueError as error:
        reading.problem(line, path, str(error))
        parameters["host"] = ""
    for key, parameter in _DISCRETE.items():
        block[key], block.lines[key] = parameters.pop(parameter, _UNSAID.get(key)), line
    block["options"] = parameters | ports


def _parse_url(url: object) -> dict[str, str]:
    """By libpq's own parser. Its complaints quote the URL, password and all, so they are not passed on."""
    if not isinstance(url, str) or not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("must be a URL: postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    try:
        parameters = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise ValueError("PostgreSQL cannot read this URL; write special characters in a password as %XX") from None
    return {key: str(value) for key, value in parameters.items() if value is not None}


def _no_part_of_a_password(parameters: dict[str, str]) -> None:
    """The host is shown, and what is left of an unescaped password often ends up in it."""
    if "@" in parameters.get("host", ""):
        raise ValueError("has an @ in its host; write special characters in a password as %XX, @ as %40")


def _conninfo(parameters: dict[str, str]) -> str:
    return " ".join(f"{key}={_quoted(value)}" for key, value in parameters.items() if value != "")


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"

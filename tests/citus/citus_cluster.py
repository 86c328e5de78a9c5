"""A Citus cluster for the tests: a coordinator and workers on loopback, from an installed Citus."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

_SETTINGS = {
    "shared_preload_libraries": "citus",
    "listen_addresses": "127.0.0.1",
    "wal_level": "logical",  # shards move while they are written
    "max_prepared_transactions": 100,
    "max_connections": 200,
    "shared_buffers": "64MB",
    "citus.node_conninfo": "sslmode=disable",
    "citus.shard_count": 8,
    "citus.recover_2pc_interval": "1s",
    "citus.enable_statistics_collection": "off",
    "citus.defer_shard_delete_interval": "1s",
}


def bin_folder() -> Path | None:
    """Return the folder of a PostgreSQL whose packages include Citus; ``None`` without one."""
    programs = [shutil.which("pg_config"), *glob.glob("/usr/lib/postgresql/*/bin/pg_config")]
    for program in filter(None, programs):
        asked = [program, "--pkglibdir", "--bindir"]
        libraries, folder = subprocess.check_output(asked, text=True).splitlines()
        if Path(libraries, "citus.so").exists() and Path(folder, "initdb").exists():
            return Path(folder)
    return None


class Node:
    """A server of the cluster.

    Attributes:
        port: where it listens.
        url: its database.
    """

    def __init__(self, bins: Path, folder: Path, settings: dict[str, object]) -> None:
        self._bins, self._folder = bins, folder
        self.port = _free_port()
        self.url = make_conninfo(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", sslmode="disable"
        )
        self._run("initdb", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8")
        lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
        with open(folder / "postgresql.conf", "a", encoding="utf-8") as file:
            file.writelines(
                [*lines, f"port = {self.port}\n", f"unix_socket_directories = '{folder}'"]
            )
        self.start()

    def start(self) -> None:
        """Start it, and return when it accepts connections."""
        self._run("pg_ctl", "start", "-w", "-s", "-l", str(self._folder / "log"))

    def stop(self, mode: str = "immediate") -> None:
        """Stop it in a mode of ``pg_ctl``: ``fast``, or (like a crash) ``immediate``."""
        self._run("pg_ctl", "stop", "-w", "-s", "-m", mode)

    def log(self) -> str:
        """Return what it has logged."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bins / program), "-D", str(self._folder), *arguments]
        user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
        environment = {**os.environ, "HOME": str(self._folder)}  # where libpq looks for keys
        subprocess.run(
            command, user=user, env=environment, check=True, stdout=subprocess.DEVNULL, cwd="/"
        )


class Cluster:
    """A coordinator and some workers; the data is in a temporary folder.

    Args:
        workers: how many.
        settings: of all servers, beside those that it needs here.

    Attributes:
        coordinator: the server that the storages connect to.
        workers: the servers that have the shards.
    """

    def __init__(self, workers: int = 2, **settings: object) -> None:
        self._settings = _SETTINGS | settings
        self._folder = Path(tempfile.mkdtemp(prefix="citus-"))
        self._folder.chmod(0o755)
        self._nodes: list[Node] = []
        self.workers: list[Node] = []
        try:
            self.coordinator = self._new_node()
            host = "SELECT citus_set_coordinator_host('127.0.0.1', %s)"
            self.execute(host, self.coordinator.port)
            for _ in range(workers):
                self.workers.append(self.add_worker())
        except BaseException:
            self.stop()
            raise

    def add_worker(self) -> Node:
        """Start a server, and make it a worker."""
        node = self._new_node()
        self.execute("SELECT citus_add_node('127.0.0.1', %s)", node.port)
        return node

    def remove_worker(self, node: Node) -> None:
        """Move the shards of a worker away, and stop it."""
        self.execute("SELECT citus_drain_node('127.0.0.1', %s)", node.port)
        self.execute("SELECT citus_remove_node('127.0.0.1', %s)", node.port)
        self._nodes.remove(node)
        node.stop()

    def log(self) -> str:
        """Return what the coordinator has logged."""
        return self.coordinator.log()

    def prepared_transactions(self) -> int:
        """Return how many transactions of the workers wait for the second phase of their commit."""
        number = 0
        for node in self.workers:
            with psycopg.connect(node.url) as connection:
                query = "SELECT count(*) FROM pg_prepared_xacts"
                number += (connection.execute(query).fetchone() or (0,))[0]
        return number

    def _new_node(self) -> Node:
        bins = bin_folder()
        assert bins is not None
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
        node = Node(bins, folder, self._settings)
        self._nodes.append(node)
        with psycopg.connect(node.url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION citus")
        return node

    def execute(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        """Execute a statement on the coordinator, and return its rows."""
        with psycopg.connect(self.coordinator.url, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def stop(self) -> None:
        """Stop, and remove the data."""
        for node in self._nodes:
            node.stop()
        shutil.rmtree(self._folder)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

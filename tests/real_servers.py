"""Redis and MariaDB servers of the tests' own, each in a temporary folder and on a free port."""

from __future__ import annotations

import getpass
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pymysql
from real_poolers import find, free_ports


class Server:
    """A server's process.

    Args:
        command: starts it in the foreground.
        folder: where its files are.
        port: where it listens once it has started.

    Attributes:
        port: the same.
    """

    def __init__(self, command: list[str], folder: Path, port: str) -> None:
        self._command, self._folder, self.port = command, folder, int(port)
        self.start()

    def start(self) -> None:
        """Start, and return as soon as it accepts connections."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline, (self._folder / "log").read_text()
                time.sleep(0.01)

    def pause(self) -> None:
        """Let it answer nothing until ``resume``."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """End it, which breaks all connections; the data stays."""
        self._process.terminate()
        self._process.wait(timeout=60)

    def stop(self) -> None:
        """Kill it, and remove the data."""
        self._process.kill()
        self._process.wait(timeout=60)
        shutil.rmtree(self._folder)


class RedisServer(Server):
    """A Redis server; it forgets all when it ends.

    Attributes:
        url: where it listens.
    """

    def __init__(self) -> None:
        program = find("redis-server", "redis-server")
        folder = Path(tempfile.mkdtemp())
        [port] = free_ports(1)
        self.url = f"redis://127.0.0.1:{port}"
        options = {"bind": "127.0.0.1", "port": port, "save": "", "dir": str(folder)}
        command = [program, *(part for name in options for part in (f"--{name}", options[name]))]
        super().__init__(command, folder, port)


class MariaDBServer(Server):
    """A MariaDB server.

    Attributes:
        url: its database ``users``.
        arguments: what PyMySQL needs to connect to the server.
    """

    def __init__(self) -> None:
        program = find("mariadbd", "mariadb-server")
        folder = Path(tempfile.mkdtemp())
        (folder / "data").mkdir()
        [port] = free_ports(1)
        self.url = f"mysql://root@127.0.0.1:{port}/users"
        # Without ssl_disabled PyMySQL reads all root certificates for each connection.
        self.arguments: dict[str, Any] = {"host": "127.0.0.1", "port": int(port), "user": "root"}
        self.arguments["ssl_disabled"] = True
        command = [
            *(program, "--no-defaults", f"--user={getpass.getuser()}", "--bind-address=127.0.0.1"),
            *(f"--port={port}", f"--socket={folder}/socket"),
            f"--datadir={folder}/data",
            "--skip-grant-tables",  # installing the tables of users takes three times as long
            *("--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M"),
            "--innodb-flush-log-at-trx-commit=2",  # a write survives a kill of the process
        ]
        super().__init__(command, folder, port)
        self.execute("CREATE DATABASE users")

    def execute(self, statement: str) -> tuple[tuple[object, ...], ...]:
        """Execute a statement on a separate connection; return the rows."""
        with (
            pymysql.connect(autocommit=True, **self.arguments) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)
            return tuple(cursor.fetchall())

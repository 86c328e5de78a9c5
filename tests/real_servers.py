"""Redis and MariaDB servers of the tests' own, each in a temporary folder, without a port."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pymysql
from real_poolers import find


class Server:
    """A server's process.

    Args:
        command: starts it in the foreground.
        log: the file for what it writes.
        address: the socket on which it listens once it has started.
    """

    def __init__(self, command: list[str], log: Path, address: str) -> None:
        self._command, self._log, self._address = command, log, address
        self.start()

    def start(self) -> None:
        """Start, and return as soon as it accepts connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(self._address)
                    return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.01)

    def kill(self) -> None:
        """Kill it, like a crash; the data stays."""
        self._process.kill()
        self._process.wait(timeout=60)


class RedisServer(Server):
    """A Redis server; it forgets all when it ends.

    Attributes:
        url: where it listens.
    """

    def __init__(self) -> None:
        program = find("redis-server", "redis-server")
        self._folder = Path(tempfile.mkdtemp())
        address = f"{self._folder}/socket"
        self.url = f"unix://{address}"
        options = {"port": "0", "unixsocket": address, "save": "", "dir": str(self._folder)}
        command = [program, *(part for name in options for part in (f"--{name}", options[name]))]
        super().__init__(command, self._folder / "log", address)

    def stop(self) -> None:
        """Stop, and remove the folder."""
        self.kill()
        shutil.rmtree(self._folder)


class MariaDBServer(Server):
    """A MariaDB server.

    Attributes:
        arguments: what PyMySQL needs to connect.
    """

    def __init__(self) -> None:
        program = find("mariadbd", "mariadb-server")
        self._folder = Path(tempfile.mkdtemp())
        (self._folder / "data").mkdir()
        address = f"{self._folder}/socket"
        # Without the latter PyMySQL reads all root certificates for each connection.
        self.arguments: dict[str, Any] = {
            "unix_socket": address,
            "user": "root",
            "ssl_disabled": True,
        }
        command = [
            *(program, "--no-defaults", f"--user={getpass.getuser()}", "--skip-networking"),
            *(f"--datadir={self._folder}/data", f"--socket={address}"),
            "--skip-grant-tables",  # installing the tables of users takes three times as long
            *("--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M"),
            "--innodb-flush-log-at-trx-commit=2",  # a write survives a kill of the process
        ]
        super().__init__(command, self._folder / "log", address)
        self.execute("CREATE DATABASE users")

    def execute(self, statement: str) -> tuple[tuple[object, ...], ...]:
        """Execute a statement on a separate connection; return the rows."""
        with (
            pymysql.connect(autocommit=True, **self.arguments) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)
            return tuple(cursor.fetchall())

    def stop(self) -> None:
        """Stop, and remove the data."""
        self.kill()
        shutil.rmtree(self._folder)

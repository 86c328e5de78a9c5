"""The real poolers, pgpool-II and pgbouncer, in front of a server that a test has started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from pathlib import Path

    from postgres_server import OwnServer


class RealPooler:
    """A pooler's process; it listens on a free port.

    Args:
        server: the server.
        settings: of the pooler, beside those that it needs here.

    Attributes:
        url: where to connect instead of the server.
    """

    program, package = "", ""

    def __init__(self, server: OwnServer, **settings: object) -> None:
        folder, user = server.folder_for_a_program()
        self._user = user
        self._log = folder / "log"
        self._configuration = folder / "configuration"
        ports = free_ports(2)
        self._configuration.write_text(self.configuration(server, folder, ports, settings))
        self.url = make_conninfo(
            server.url, host="127.0.0.1", port=ports[0], sslmode="disable", gssencmode="disable"
        )
        self._program = find(self.program, self.package)
        self.start()

    def configuration(
        self, server: OwnServer, folder: Path, ports: list[str], settings: dict[str, object]
    ) -> str:
        """Return the content of the configuration file."""
        raise NotImplementedError

    def command(self, program: str, configuration: Path) -> list[str]:
        """Return the command that starts it in the foreground."""
        raise NotImplementedError

    def start(self) -> None:
        """Start, and return as soon as it accepts connections."""
        with open(self._log, "ab") as log:
            # A new group: a kill ends its children as well.
            self._process = subprocess.Popen(
                self.command(self._program, self._configuration),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self._user,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.01)

    def kill(self) -> None:
        """Kill it, so that clients and server lose their connections without a word."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def close(self) -> None:
        """Stop it without waiting for its clients."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.kill()


class Pgpool(RealPooler):
    """pgpool-II; in raw mode, with its defaults, unless set otherwise."""

    program, package = "pgpool", "pgpool2"

    def configuration(
        self, server: OwnServer, folder: Path, ports: list[str], settings: dict[str, object]
    ) -> str:
        first = conninfo_to_dict(server.url)
        values = {
            "backend_clustering_mode": "raw",
            "backend_hostname0": first["host"],
            "backend_port0": first.get("port", 5432),
            "listen_addresses": "127.0.0.1",
            "port": ports[0],
            "pcp_listen_addresses": "127.0.0.1",
            "pcp_port": ports[1],
            **dict.fromkeys(["socket_dir", "pcp_socket_dir", "logdir"], folder),
            "pid_file_name": folder / "pgpool.pid",
            **settings,
        }
        return "".join(f"{name} = '{value}'\n" for name, value in values.items())

    def command(self, program: str, configuration: Path) -> list[str]:
        # -D: without the state of a process that was killed.
        return [program, "-n", "-D", "-f", str(configuration)]


class Pgbouncer(RealPooler):
    """pgbouncer; in session mode unless set otherwise."""

    program, package = "pgbouncer", "pgbouncer"

    def configuration(
        self, server: OwnServer, folder: Path, ports: list[str], settings: dict[str, object]
    ) -> str:
        first = conninfo_to_dict(server.url)
        values = {
            "listen_addr": "127.0.0.1",
            "listen_port": ports[0],
            "unix_socket_dir": "",
            "auth_type": "any",
            **settings,
        }
        return (
            f"[databases]\npostgres = host={first['host']} user=postgres\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in values.items())
        )

    def command(self, program: str, configuration: Path) -> list[str]:
        return [program, str(configuration)]


def find(program: str, package: str) -> str:
    """Return the path of a program; without it, skip the test, or fail if it runs in CI."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if path is None:
        reason = f"{program} is not installed: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_ports(number: int) -> list[str]:
    """Return ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [str(listener.getsockname()[1]) for listener in listeners]

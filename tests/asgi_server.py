"""Real servers: for the ASGI applications of the tests, and the command ``serve``."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Generator


@contextlib.contextmanager
def serve(app: Any, lifespan: Literal["auto", "on", "off"] = "auto") -> Generator[int, None, None]:
    """Serve an application with uvicorn in a thread; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, lifespan=lifespan, log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Command:
    """``python -m usermetadata serve``, in a process.

    Attributes:
        port: where it listens.
        log: the lines on its standard error, so far.
        process: the process.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        ports: queue.Queue[int] = queue.Queue()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                self.log.append(line)
                if "running on" in line:
                    ports.put(int(line.split("127.0.0.1:")[1].split()[0]))

        self.reader = threading.Thread(target=read)
        self.reader.start()
        self.port = ports.get(timeout=30)

    def memory(self) -> int:
        """Return the most bytes that it has used so far."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def serve_command(*options: str, before: str = "") -> Generator[Command, None, None]:
    """Run the command on an in-memory store; ``before`` is Python that the process runs first."""
    program = f"{before}\nfrom usermetadata.cli import main\nmain()"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--storage", "memory://"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            served = Command(process)
            yield served
        finally:
            process.kill()
    served.reader.join()

"""The server, in one process, and the facade."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import Measuring
from peers import AsyncUsermetadata
from report import OURS
from workloads import fill, gets, updates

if TYPE_CHECKING:
    from collections.abc import Generator

    from measuring import Times

PATH = "/recipe/user/metadata"
# The layer of a sample is that of the innermost frame that has one.
LAYERS = {
    "/usermetadata/_core/http": "HTTP (httptools)",
    "/asyncio/": "event loop and sockets (asyncio)",
    "/selectors.py": "event loop and sockets (asyncio)",
    "/starlette/": "requests, routes and responses (Starlette)",
    "/json/": "JSON",
    "/usermetadata/codec": "JSON",
    "/usermetadata/server": "this library's server",
    "/usermetadata/storage/": "the storage",
    "/usermetadata/_core/sqlite/": "the storage",
    "/usermetadata/": "checks and batches",
}


class Connections:
    """Connections of a client that does little work, so that the server is the limit.

    Like other peers it has the facade's functions; a call is a request over a free connection.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, user_id: str) -> dict[str, Any]:
        return await self.request("GET", f"{PATH}?userId={user_id.replace(' ', '%20')}", b"")

    async def update(self, user_id: str, metadata_update: dict[str, Any]) -> dict[str, Any]:
        body = {"userId": user_id, "metadataUpdate": metadata_update}
        return await self.request("PUT", PATH, json.dumps(body).encode())

    async def request(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        if not self.free:
            self.free.append(await asyncio.open_connection("127.0.0.1", self.port))
        reader, writer = self.free.pop()
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        answer: dict[str, Any] = json.loads(await reader.readexactly(length))
        self.free.append((reader, writer))
        return answer

    async def close(self) -> None:
        for _, writer in self.free:
            writer.close()
            await writer.wait_closed()


@contextlib.contextmanager
def serving(folder: str, *profiler: str) -> Generator[Connections, None, None]:
    """Serve a file in that folder; optionally a profiler starts the server."""
    command = [*profiler, sys.executable, "-m", "usermetadata", "serve", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--storage", "served.db"], stderr=subprocess.PIPE, text=True, cwd=folder
    )
    with server:
        assert server.stderr
        said = ""
        while "running on" not in said:
            said += server.stderr.readline()
        yield Connections(int(said.split("127.0.0.1:")[1].split()[0]))
        os.kill(int(said.split("process ")[1].split(";")[0]), signal.SIGTERM)
        server.communicate()


def profile(samples: Path) -> list[list[str]]:
    """Return each layer's share of py-spy's samples, the largest first."""
    shares: Counter[str] = Counter()
    for line in samples.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        layers = (
            layer
            for frame in reversed(stack.split(";"))
            for part, layer in LAYERS.items()
            if part in frame
        )
        shares[next(layers, "start and end")] += int(count)
    total = sum(shares.values())
    return [[layer, f"{count / total:.0%}"] for layer, count in shares.most_common()]


def measure(benchmarks: Any) -> None:
    """Add the section on the server."""
    benchmarks.progress("server, 64 connections")
    loop = asyncio.new_event_loop()
    in_tasks, run = benchmarks.measuring.in_tasks, loop.run_until_complete
    with tempfile.TemporaryDirectory() as folder:
        facade = AsyncUsermetadata()
        run(facade.open(Path(folder)))
        with serving(folder) as served:
            names: dict[str, Any] = {OURS: facade, "the same over HTTP": served}
            for peer in names.values():
                run(fill(peer))
            workloads: dict[str, Times] = {
                name: in_tasks(loop, {label: make(peer) for label, peer in names.items()}, 64)
                for name, make in (("get", gets), ("update", updates))
            }
            for peer in names.values():
                run(peer.close())
        samples = Path(folder, "samples.txt")
        py_spy = f"{sysconfig.get_path('scripts')}/py-spy record --gil --full-filenames -f raw -o"
        with serving(folder, *py_spy.split(), str(samples), "--") as served:
            longer = Measuring(100 * benchmarks.measuring.seconds, 1)
            longer.in_tasks(loop, {"update": updates(served)}, 64)
            run(served.close())
        layers = profile(samples)
    loop.close()
    benchmarks.report.say("## The server")
    benchmarks.report.say(
        "64 connections to one process, SQLite, calls per second; the client shares the two"
        " processors:"
    )
    benchmarks.report.compare(workloads, rate=True)
    benchmarks.report.say(
        "Where the server's Python code spends its time while it answers updates, by py-spy's"
        " samples of the running thread:"
    )
    benchmarks.report.table(["", "samples"], layers)

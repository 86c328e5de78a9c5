"""The server, one process, beside the facade that it is built on."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers import AsyncUsermetadata
from report import OURS
from workloads import fill, gets, updates

if TYPE_CHECKING:
    from measuring import Times

PATH = "/recipe/user/metadata"


class Connections:
    """Connections of a client that does as little as is possible, so that the server is the limit.

    As a peer it has the functions of the facade: each call is a request over a free connection.
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


def measure(benchmarks: Any) -> None:
    """Add the section on the server."""
    benchmarks.progress("server, 64 connections")
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "usermetadata", "serve", "--port", "0"]
        server = subprocess.Popen(
            [*command, "--storage", f"{folder}/served.db"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        assert server.stderr
        line = next(line for line in server.stderr if "running on" in line)
        served = Connections(int(line.split("127.0.0.1:")[1].split()[0]))
        facade = AsyncUsermetadata()
        loop.run_until_complete(facade.open(Path(folder)))
        names: dict[str, Any] = {OURS: facade, "the same over HTTP": served}
        for peer in names.values():
            loop.run_until_complete(fill(peer))
        workloads: dict[str, Times] = {
            name: benchmarks.measuring.in_tasks(
                loop, {label: make(peer) for label, peer in names.items()}, 64
            )
            for name, make in (("get", gets), ("update", updates))
        }
        for peer in names.values():
            loop.run_until_complete(peer.close())
        server.send_signal(signal.SIGTERM)
        server.wait()
        server.stderr.close()
    loop.close()
    benchmarks.report.say("## The server")
    benchmarks.report.say(
        "64 connections to one process, SQLite, calls per second; the client shares the two"
        " processors:"
    )
    benchmarks.report.compare(workloads, rate=True)

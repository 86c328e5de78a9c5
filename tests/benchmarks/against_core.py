"""Compare this library with a SuperTokens core that is running.

``python tests/benchmarks/against_core.py --core http://127.0.0.1:3567`` prints one table: calls a
second, 1 and 64 at a time. The rows take turns, and the last round counts. Errors are counted
apart. The core gets metadata for a hundred users whose ids begin with ``usermetadata-benchmark-``;
it is removed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from workloads import document, update

import usermetadata
from usermetadata import UserMetadataRecipe
from usermetadata import asyncio as aio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    Measure = Callable[[str, int, float], Awaitable["Counts"]]

USERS = [f"usermetadata-benchmark-{number}" for number in range(100)]
PATH = "/recipe/user/metadata"
OURS = "our server"
TIMEOUT = 60  # seconds for an answer


@dataclass
class Counts:
    """What happened in some seconds.

    Attributes:
        rate: the calls per second that succeeded.
        errors: how many calls failed, by the kind of error.
    """

    rate: float
    errors: Counter[str]

    def __str__(self) -> str:
        shown = f"{self.rate:,.0f}"
        return f"{shown}, {self.errors.total():,} errors" if self.errors else shown


async def repeat(call: Callable[[str], Awaitable[object]], count: int, seconds: float) -> Counts:
    """Call with one user after the other, so many at a time."""
    errors: Counter[str] = Counter()
    users = itertools.cycle(USERS)
    begin = time.perf_counter()
    done = 0

    async def work() -> None:
        nonlocal done
        is_over = False
        while not is_over:
            try:
                await call(next(users))
                done += 1
            except Exception as error:  # noqa: BLE001 - every error is counted
                errors[f"{type(error).__name__} {error}"[:60].strip()] += 1
            is_over = time.perf_counter() >= begin + seconds

    await asyncio.gather(*(work() for _ in range(count)))
    return Counts(done / (time.perf_counter() - begin), errors)


class StatusError(Exception):
    """The answer is not 200."""


class RawHTTP:
    """A client that does little work, so that the server is the limit."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = urlsplit(url)
        self.headers = f"host: {self.url.netloc}\r\n"
        if api_key:
            self.headers += f"api-key: {api_key}\r\n"
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, user_id: str) -> None:
        await self.request("GET", f"?userId={user_id}")

    async def update(self, user_id: str) -> None:
        await self.put(user_id, update())

    async def put(self, user_id: str, metadata_update: dict[str, Any]) -> None:
        body = {"userId": user_id, "metadataUpdate": metadata_update}
        await self.request("PUT", "", json.dumps(body).encode())

    async def remove(self, user_id: str) -> None:
        await self.request("POST", "/remove", json.dumps({"userId": user_id}).encode())

    async def request(self, method: str, path: str, body: bytes = b"") -> None:
        """Send a request over a free connection; an error closes it."""
        reader, writer = self.free.pop() if self.free else await self.connect()
        head = f"{method} {self.url.path.rstrip('/')}{PATH}{path} HTTP/1.1\r\n{self.headers}"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(TIMEOUT):
                writer.write(head.encode() + body)
                status, text = await self.receive(reader)
        except BaseException:
            writer.close()
            raise
        self.free.append((reader, writer))
        if status != "200":
            raise StatusError(f"{status} {text.decode(errors='replace')}")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context() if self.url.scheme == "https" else None
        port = self.url.port or (443 if context else 80)
        return await asyncio.open_connection(self.url.hostname, port, ssl=context)

    async def receive(self, reader: asyncio.StreamReader) -> tuple[str, bytes]:
        """Receive a response, whether its length or its chunks tell its end."""
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if "content-length" in headers:
            text = await reader.readexactly(int(headers["content-length"]))
        else:
            text = b""
            while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                text += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        return status.split()[1], text

    async def close(self) -> None:
        while self.free:
            _, writer = self.free.pop()
            writer.close()


@contextlib.asynccontextmanager
async def filled(url: str, api_key: str | None) -> AsyncGenerator[RawHTTP, None]:
    """Store the users over HTTP, and remove them at the end."""
    client = RawHTTP(url, api_key)
    try:
        with contextlib.suppress(StatusError, EOFError):  # they are counted later
            for user_id in USERS:
                await client.put(user_id, document(150))
        await client.close()
        yield client
    except OSError as error:
        raise SystemExit(f"{url}: {error.strerror or error}; start it, or name another") from error
    finally:
        with contextlib.suppress(StatusError, EOFError, OSError):
            for user_id in USERS:
                await client.remove(user_id)
        await client.close()


class Embedded:
    """The library in this process."""

    async def get(self, user_id: str) -> None:
        await aio.get_user_metadata(user_id)

    async def update(self, user_id: str) -> None:
        await aio.update_user_metadata(user_id, update())


class SDK:
    """SuperTokens' SDK, in a process of its own, because it keeps its first URL."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def measure(self, call: str, count: int, seconds: float) -> Counts:
        """Let the process measure."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{json.dumps([call, count, seconds])}\n".encode())
        rate, errors = json.loads(await self.process.stdout.readline())
        return Counts(rate, Counter(errors))


@contextlib.asynccontextmanager
async def sdk(url: str, api_key: str | None) -> AsyncGenerator[SDK, None]:
    """Start a process with the SDK."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--sdk", url),
        env={**os.environ, "SUPERTOKENS_API_KEY": api_key or ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin
    try:
        yield SDK(process)
    finally:
        process.stdin.close()
        await process.wait()


def serve_sdk(url: str) -> None:
    """Measure with the SDK what standard input asks for."""
    import supertokens_python
    from supertokens_python.recipe import usermetadata as recipe
    from supertokens_python.recipe.usermetadata import asyncio as functions

    supertokens_python.init(
        app_info=supertokens_python.InputAppInfo(
            app_name="benchmarks", api_domain="http://localhost", website_domain="http://localhost"
        ),
        supertokens_config=supertokens_python.SupertokensConfig(
            connection_uri=url, api_key=os.environ["SUPERTOKENS_API_KEY"] or None
        ),
        framework="fastapi",
        recipe_list=[recipe.init()],
        mode="asgi",
        telemetry=False,
    )
    calls: dict[str, Callable[[str], Awaitable[object]]] = {
        "get": functions.get_user_metadata,
        "update": lambda user_id: functions.update_user_metadata(user_id, update()),
    }
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            call, count, seconds = json.loads(line)
            counts = runner.run(repeat(calls[call], count, seconds))
            print(json.dumps([counts.rate, counts.errors]), flush=True)


@contextlib.contextmanager
def serving(storage: str) -> Generator[tuple[str, int], None, None]:
    """Run ``python -m usermetadata serve``; yield its URL and its process number."""
    command = [sys.executable, "-m", "usermetadata", "serve", "--port", "0"]
    environment = {**os.environ, "USERMETADATA_URL": storage}
    environment.pop("USERMETADATA_API_KEYS", None)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        line = server.stderr.readline()
        if "running on " not in line:
            raise SystemExit(f"serve: {line}{server.stderr.read()}")
        try:
            yield line.split("running on ")[1].split()[0], server.pid
        finally:
            server.terminate()


def resident(pid: int) -> str:
    """Return the memory of a process, in MB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return f"{int(line.split()[1]) / 1024:.0f} MB"
    return "unknown on this system"


async def measure(options: argparse.Namespace, storage: str) -> None:
    """Measure all rows and print the table."""
    name = f"supertokens_python {version('supertokens-python')}"
    rows: dict[str, Measure] = {}
    async with contextlib.AsyncExitStack() as stack:
        over_http: dict[str, Measure] = {}
        if options.core:
            core = await stack.enter_async_context(filled(options.core, options.api_key))
            by_sdk = await stack.enter_async_context(sdk(options.core, options.api_key))
            rows[f"{name} + core"] = by_sdk.measure
            over_http["raw HTTP: core"] = repeating(core)
        url, process = stack.enter_context(serving(storage))
        by_sdk = await stack.enter_async_context(sdk(url, None))
        rows[f"{name} + {OURS}"] = by_sdk.measure
        served = await stack.enter_async_context(filled(url, None))
        over_http[f"raw HTTP: {OURS}"] = repeating(served)
        usermetadata.init(storage)
        stack.callback(UserMetadataRecipe.reset)
        rows["the library embedded, asyncio"] = repeating(Embedded())
        rows |= over_http
        most, seconds, rounds = (4, 0.05, 1) if options.quick else (64, 2, 2)
        columns = [(call, count) for call in ("update", "get") for count in (1, most)]
        cells = [
            [await measure_row(*column, seconds) for measure_row in rows.values()]
            for _ in range(rounds)
            for column in columns
        ]
        memory = resident(process)
    last = zip(*cells[-len(columns) :], strict=True)
    show(columns, dict(zip(rows, last, strict=True)))
    print(f"resident memory of {OURS} afterwards: {memory}")


def repeating(client: RawHTTP | Embedded) -> Measure:
    """Return what measures a client in this process."""

    async def measure(call: str, count: int, seconds: float) -> Counts:
        counts = await repeat(getattr(client, call), count, seconds)
        if isinstance(client, RawHTTP):
            await client.close()  # a server may close them before the next turn
        return counts

    return measure


def show(columns: list[tuple[str, int]], found: dict[str, tuple[Counts, ...]]) -> None:
    """Print the table, and what the errors were."""
    heads = [f"{count} {call}{'s' * (count > 1)}" for call, count in columns]
    print(f"| a second | {' | '.join(heads)} |\n|---|{'---|' * len(columns)}")
    for row, cells in found.items():
        print(f"| {row} | {' | '.join(map(str, cells))} |")
    for row, cells in found.items():
        for head, cell in zip(heads, cells, strict=True):
            for kind, number in cell.errors.most_common(3):
                print(f"errors of {row}, {head}: {number:,} × {kind}")


def main() -> None:
    """Read the options, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--core", metavar="URL", help="the address of a SuperTokens core")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("SUPERTOKENS_API_KEY"),
        help="the core's key; better in the variable SUPERTOKENS_API_KEY",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="what our server and the library use; without it a new SQLite file",
    )
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    parser.add_argument("--sdk", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sdk:
        serve_sdk(options.sdk)
        return
    if not options.core:
        print("no --core: a core is not measured, only this library")
    with tempfile.TemporaryDirectory() as folder:
        storage = options.storage or f"sqlite:///{folder}/users.db"
        asyncio.run(measure(options, storage))


if __name__ == "__main__":
    main()

"""SuperTokens' Python SDK, whose core answers at once: an upper bound of the SDK with any core."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import supertokens_python
from report import OURS
from serving import Connections
from supertokens_python.recipe import usermetadata as recipe
from supertokens_python.recipe.usermetadata import asyncio as sdk_aio
from supertokens_python.recipe.usermetadata import syncio as sdk_syncio
from workloads import fill, gets, updates

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from measuring import Times
    from peers import Metadata

NAME = "supertokens_python"
ATTEMPTS = 10


class Counts:
    """The SDK's calls and errors; a failed call is repeated."""

    def __init__(self) -> None:
        self.calls = 0
        self.errors: Counter[str] = Counter()

    def failed(self, error: Exception) -> None:
        """Count an error; give up when most calls are errors."""
        self.errors[type(error).__name__] += 1
        if self.errors.total() > max(self.calls, ATTEMPTS):
            raise error


class Blocking:
    """The SDK's functions for code without ``async``."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def get(self, user_id: str) -> Metadata:
        return self.call(lambda: sdk_syncio.get_user_metadata(user_id))

    def update(self, user_id: str, update: Metadata) -> Metadata:
        return self.call(lambda: sdk_syncio.update_user_metadata(user_id, update))

    def call(self, function: Callable[[], Any]) -> Metadata:
        self.counts.calls += 1
        while True:
            try:
                metadata: Metadata = function().metadata
                return metadata
            except Exception as error:  # noqa: BLE001 - every exception of the SDK is counted
                self.counts.failed(error)


class Concurrent:
    """The SDK's ``async`` functions."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    async def get(self, user_id: str) -> Metadata:
        return await self.call(lambda: sdk_aio.get_user_metadata(user_id))

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        return await self.call(lambda: sdk_aio.update_user_metadata(user_id, update))

    async def call(self, function: Callable[[], Awaitable[Any]]) -> Metadata:
        self.counts.calls += 1
        while True:
            try:
                metadata: Metadata = (await function()).metadata
                return metadata
            except Exception as error:  # noqa: BLE001 - likewise
                self.counts.failed(error)


@contextlib.contextmanager
def core() -> Generator[int, None, None]:
    """Run the server in a separate process, and initialise the SDK with it."""
    command = [sys.executable, str(Path(__file__).with_name("core.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        supertokens_python.init(
            app_info=supertokens_python.InputAppInfo(
                app_name="benchmarks",
                api_domain="http://localhost",
                website_domain="http://localhost",
            ),
            supertokens_config=supertokens_python.SupertokensConfig(
                connection_uri=f"http://127.0.0.1:{port}"
            ),
            framework="fastapi",
            recipe_list=[recipe.init()],
            mode="asgi",
            telemetry=False,
        )
        yield port
        server.terminate()


def measure(benchmarks: Any) -> None:
    """Add the section on the SDK."""
    counts = Counts()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # the SDK's blocking functions use this event loop
    most = 8 if benchmarks.quick else 64
    workloads: dict[str, Times] = {}
    with tempfile.TemporaryDirectory() as folder, core() as port:
        ours = peers.Usermetadata(Path(folder))  # and the async functions, with the same storage
        directly = Connections(port)
        for peer in (peers.AsyncUsermetadata(), directly):
            loop.run_until_complete(fill(peer))
        loop.run_until_complete(directly.close())
        both: dict[str, Any] = {OURS: ours, NAME: Blocking(counts)}
        both_async: dict[str, Any] = {OURS: peers.AsyncUsermetadata(), NAME: Concurrent(counts)}
        for name, make in (("get", gets), ("update", updates)):
            benchmarks.progress(f"SuperTokens' SDK, {name}")
            workloads[f"{name}, blocking"] = benchmarks.measuring.alone(
                {label: make(peer) for label, peer in both.items()}
            )
            for count in (1, most):
                workloads[f"{name}, tasks: {count}"] = benchmarks.measuring.in_tasks(
                    loop, {peer: make(functions) for peer, functions in both_async.items()}, count
                )
        ours.close()
    asyncio.set_event_loop(None)
    loop.close()
    benchmarks.report.say("## SuperTokens' SDK")
    benchmarks.report.say(
        "`supertokens_python`, and this library on an SQLite file. The SDK's core is a server on"
        " the same machine that keeps metadata in memory and does no other work. So this is an"
        " upper bound of the SDK's speed with any core. Microseconds for each call, documents of"
        " 150 B:"
    )
    benchmarks.report.compare(workloads)
    kinds = ", ".join(f"{kind}: {count}" for kind, count in counts.errors.items())
    benchmarks.report.say(
        f"Errors of the SDK: {counts.errors.total()} in {counts.calls:,} calls"
        f"{f' ({kinds})' if kinds else ''}. A failed call was repeated; only its success counts"
        " as a call."
    )
    benchmarks.charted("one task", workloads["update, tasks: 1"], NAME)
    benchmarks.charted("64 tasks", workloads[f"update, tasks: {most}"], NAME)

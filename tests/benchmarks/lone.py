"""Lone calls, without waiting for the disk, and the fastest hand-written code.

The files are at ``synchronous=NORMAL``: an update writes to SQLite's log, and does not wait for the
disk. Python's calls and the frames on the stack are also counted.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
from measuring import Measuring
from peers import APP, CREATE, SELECT, UPSERT, Metadata, merge
from report import OURS, relative
from workloads import USERS, document, gets, update, updates, user

from usermetadata import InMemoryStorage, SQLiteStorage, UserMetadataRecipe, init, syncio

if TYPE_CHECKING:
    from collections.abc import Callable

    from measuring import Times


class HandTuned:
    """sqlite3 with one connection, its statement cache, and one lock around all calls.

    Args:
        folder: where its file is.
        loads: decodes an object.
        dumps: encodes one.
    """

    name = "hand-tuned sqlite3"

    def __init__(
        self,
        folder: Path,
        loads: Callable[[str], Metadata] = json.loads,
        dumps: Callable[[Metadata], str] = json.dumps,
    ) -> None:
        self.loads = loads
        self.dumps = dumps
        self.connection = sqlite3.connect(
            folder / "hand_tuned.db", isolation_level=None, check_same_thread=False
        )
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.execute(CREATE)
        self.lock = threading.Lock()

    def get(self, user_id: str) -> Metadata:
        with self.lock:
            row = self.connection.execute(SELECT, (APP, user_id)).fetchone()
        return self.loads(row[0]) if row else {}

    def update(self, user_id: str, update: Metadata) -> Metadata:
        execute = self.connection.execute
        with self.lock:
            execute("BEGIN IMMEDIATE")
            try:
                row = execute(SELECT, (APP, user_id)).fetchone()
                merged = merge(self.loads(row[0]) if row else {}, update)
                execute(UPSERT, (APP, user_id, self.dumps(merged)))
                execute("COMMIT")
            except BaseException:
                execute("ROLLBACK")
                raise
        return merged


class BareHop:
    """The same, in an executor with one thread."""

    name = "a bare thread hop to it"

    def __init__(self, blocking: HandTuned) -> None:
        self.blocking = blocking
        self.executor = ThreadPoolExecutor(1)

    async def get(self, user_id: str) -> Metadata:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, self.blocking.get, user_id)

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, self.blocking.update, user_id, update)


def measure(benchmarks: Any) -> None:
    """Add the section on lone calls."""
    # The differences are small.
    measuring = Measuring(benchmarks.measuring.seconds, 3 * benchmarks.measuring.rounds)
    loop = asyncio.new_event_loop()
    blocking: dict[str, Times] = {}
    hops: dict[str, Times] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Its blocking and its async functions use the same storage.
        ours = peers.Usermetadata(Path(folder), "NORMAL")
        by_hand = HandTuned(Path(folder))
        hop = BareHop(by_hand)
        for peer in (ours, by_hand):
            for number in range(USERS):
                peer.update(user(number), document(150))
            benchmarks.warm_up(updates(peer))
        for name, make in (("get", gets), ("update", updates)):
            benchmarks.progress(f"lone calls, {name}")
            blocking[name] = measuring.alone({peer.name: make(peer) for peer in (ours, by_hand)})
            hops[name] = measuring.in_tasks(
                loop, {OURS: make(peers.AsyncUsermetadata()), hop.name: make(hop)}, 1
            )
        hop.executor.shutdown()
        by_hand.connection.close()
        ours.close()
    loop.close()
    benchmarks.report.say("## Lone calls")
    benchmarks.report.say(
        "One call at a time, documents of 150 B, `synchronous=NORMAL`, so an update does not wait"
        " for the disk. `syncio` and the fastest hand-written code, microseconds:"
    )
    benchmarks.report.compare(blocking, digits=2)
    benchmarks.report.say(
        "One `asyncio` task, and the same code in an executor with one thread, microseconds:"
    )
    benchmarks.report.compare(hops, digits=2)
    for name, aim in (("update", 1.35), ("get", 1.2)):
        ratio = 1 / relative(blocking[name], HandTuned.name)
        benchmarks.figures[f"lone {name}"] = ratio
        benchmarks.aim(
            f"blocking {name}, `synchronous=NORMAL`: time against hand-tuned sqlite3",
            aim,
            ratio,
            at_most=True,
        )
    for name in ("update", "get"):
        benchmarks.aim(
            f"one lone asyncio {name}, `synchronous=NORMAL`: time against a bare thread hop",
            1.05,
            1 / relative(hops[name], BareHop.name),
            at_most=True,
        )
    frames(benchmarks)


def frames(benchmarks: Any) -> None:
    """Count the Python calls and frames of each call."""
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = SQLiteStorage(Path(folder) / "users.db")
        for where, storage in (("an SQLite file", file), ("memory", InMemoryStorage())):
            init(storage)
            functions: list[tuple[str, Callable[..., object], list[Any]]] = [
                ("update", syncio.update_user_metadata, ["alice", update()]),
                ("get", syncio.get_user_metadata, ["alice"]),
            ]
            for name, function, arguments in functions:
                function(*arguments)
                calls, deepest = counted(function, *arguments)
                rows.append([f"{name}, {where}", str(calls), str(deepest)])
                if (name, storage) == ("update", file):
                    for figure, aim, value in (("calls", 26, calls), ("frames", 12, deepest)):
                        benchmarks.aim(
                            f"blocking update, SQLite file: Python {figure}",
                            aim,
                            value,
                            at_most=True,
                        )
            UserMetadataRecipe.reset()
        file.close()
    benchmarks.report.say(
        "The number of Python functions that a blocking call executes, including the facade's, and"
        " the most frames that it adds to the stack, counted by `sys.setprofile`:"
    )
    benchmarks.report.table(["", "Python calls", "frames"], rows)


def counted(function: Callable[..., object], *arguments: Any) -> tuple[int, int]:
    """Call a function; return its number of Python calls and its deepest stack."""
    calls = depth = deepest = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal calls, depth, deepest
        if event == "call":
            calls += 1
            depth += 1
            deepest = max(deepest, depth)
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return calls, deepest

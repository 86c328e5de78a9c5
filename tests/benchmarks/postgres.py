"""The PostgreSQL storage, its drivers used directly, and the other storages."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import postgres_peers
from psycopg.conninfo import make_conninfo
from report import OURS, relative
from workloads import USERS, awaited, by_storage, document, fill, gets, update, updates, user

from usermetadata import InMemoryStorage, PostgresStorage, SQLiteStorage, syncio
from usermetadata import asyncio as aio
from usermetadata.changes import Clear, Merge, Modify

# The tests' server.
sys.path.append(str(Path(__file__).parent.parent))
from postgres_proxy import Proxy
from postgres_server import empty_schema, server_url, server_version, stop_servers

if TYPE_CHECKING:
    from collections.abc import Callable

    from measuring import Measuring, Times

    from usermetadata import Storage

__all__ = ["measure", "server_version", "stop_servers"]


def measure(benchmarks: Any) -> None:
    """Add the sections on PostgreSQL."""
    benchmarks.report.say("## PostgreSQL")
    with empty_schema() as schema:
        url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
        one_connection(benchmarks, url)
        tasks(benchmarks, url)
        round_trips(benchmarks, url)
    storages(benchmarks)


def one_connection(benchmarks: Any, url: str) -> None:
    """One thread, and the statements of a SuperTokens core."""
    benchmarks.progress("PostgreSQL, one connection")
    ours, core = postgres_peers.PostgresUsermetadata(url), postgres_peers.Core(url)
    for peer in (ours, core):
        peer.fill({user(number): document(150) for number in range(USERS)})
    workloads: dict[str, Times] = {
        name: benchmarks.measuring.alone({peer.name: make(peer) for peer in (ours, core)})
        for name, make in (("get", gets), ("update", updates))
    }
    ids = [user(number) for number in range(500)]

    def one_by_one(_: int) -> None:
        for user_id in ids:
            ours.get(user_id)

    bulk = benchmarks.measuring.alone({OURS: lambda _: ours.get_many(ids), "500 gets": one_by_one})
    ours.close()
    core.close()
    benchmarks.report.say("One thread and one connection, microseconds:")
    benchmarks.report.compare(workloads)
    benchmarks.report.say("`get` of 500 users at once, microseconds:")
    benchmarks.report.compare({"500 users": bulk})
    benchmarks.aim(
        "PostgreSQL, update, one connection: time of lock, select, upsert, commit against ours",
        2,
        relative(workloads["update"], core.name),
        at_most=False,
    )
    benchmarks.aim(
        "PostgreSQL, get of 500 users: time of 500 gets against one",
        50,
        relative(bulk, "500 gets"),
        at_most=False,
    )


def tasks(benchmarks: Any, url: str) -> None:
    """Tasks of an event loop, and other drivers."""
    loop = asyncio.new_event_loop()
    counts = [1, 8, 64]
    results: dict[str, dict[int, Times]] = {"get": {}, "update": {}}
    opened = [peer() for peer in postgres_peers.CONCURRENT]
    for peer in opened:
        loop.run_until_complete(peer.open(url))
        loop.run_until_complete(fill(peer))
        benchmarks.warm_up(awaited(loop, updates(peer)))
    for name, make in (("get", gets), ("update", updates)):
        for count in counts:
            benchmarks.progress(f"PostgreSQL, {count} tasks, {name}")
            results[name][count] = benchmarks.measuring.in_tasks(
                loop, {peer.name: make(peer) for peer in opened}, count
            )
    benchmarks.progress("PostgreSQL, 64 tasks, one user")
    hot: Times = benchmarks.measuring.in_tasks(
        loop, {peer.name: updates(peer, lambda _: "hot") for peer in opened}, 64
    )
    for peer in opened:
        loop.run_until_complete(peer.close())
    loop.close()
    benchmarks.report.by_tasks(
        "postgres.svg",
        results,
        ["get", "update"],
        "Calls per second on PostgreSQL over the number of concurrent tasks.",
    )
    benchmarks.report.say("`update` of one hot user by 64 tasks, calls per second:")
    benchmarks.report.compare({"64 tasks": hot}, rate=True)
    figures: list[tuple[str, Times, dict[Any, int]]] = [
        ("get", results["get"][64], {postgres_peers.AsyncPG: 2}),
        (
            "update",
            results["update"][64],
            {
                postgres_peers.AsyncPsycopg: 8,
                postgres_peers.AsyncSQLAlchemy: 15,
                postgres_peers.AsyncPG: 2,
            },
        ),
        (
            "update of one user",
            hot,
            {
                postgres_peers.AsyncPsycopg: 3,
                postgres_peers.AsyncSQLAlchemy: 3,
                postgres_peers.AsyncPG: 2,
            },
        ),
    ]
    for figure, times, aims in figures:
        for peer, aim in aims.items():
            benchmarks.aim(
                f"PostgreSQL, 64 tasks, {figure}: throughput against {peer.name}",
                aim,
                relative(times, peer.name),
                at_most=False,
            )


def round_trips(benchmarks: Any, url: str) -> None:
    """How often a call waits for the server, counted by a proxy."""
    benchmarks.progress("PostgreSQL, round trips")
    users = [f"user {number}" for number in range(64)]
    calls: dict[str, Callable[[Storage], object]] = {
        "`get`, also of 64 users": lambda storage: storage.read(users),
        "`update`": lambda storage: storage.write([("alice", Merge(update()))]),
        "64 updates of as many users": lambda storage: storage.write(
            [(user_id, Merge(update())) for user_id in users]
        ),
        "updates and clears of 64 users": lambda storage: storage.write(
            [(user_id, Clear() if user_id > "user 4" else Merge(update())) for user_id in users]
        ),
        "64 updates of one user": lambda storage: storage.write(
            [("alice", Merge(update())) for _ in users]
        ),
        "`modify`, also of 64 users": lambda storage: storage.write(
            [(user_id, Modify(dict)) for user_id in users]
        ),
    }
    rows: list[list[str]] = []
    with (
        contextlib.closing(Proxy(url)) as proxy,
        contextlib.closing(PostgresStorage(proxy.url)) as storage,
    ):
        storage.read(users)
        for name, call in calls.items():
            before = proxy.round_trips
            call(storage)
            rows.append([name, str(proxy.round_trips - before)])
    benchmarks.report.say("Round trips to the server, counted:")
    benchmarks.report.table(["", "round trips"], rows)
    for row, figure in ((1, "per update"), (2, "per batch")):
        benchmarks.aim(f"PostgreSQL: round trips {figure}", 1, int(rows[row][1]), at_most=True)


def storages(benchmarks: Any) -> None:
    """The three storages side by side."""
    benchmarks.progress("three storages")
    loop = asyncio.new_event_loop()
    with empty_schema() as schema, tempfile.TemporaryDirectory() as folder:
        opened: dict[str, Storage] = {
            "in memory": InMemoryStorage(),
            "SQLite": SQLiteStorage(Path(folder) / "users.db"),
            "PostgreSQL": PostgresStorage(server_url(), schema=schema),
        }
        for storage in opened.values():
            storage.write([(user(number), Merge(document(150))) for number in range(USERS)])
        blocking = {
            "get, one thread": lambda n: syncio.get_user_metadata(user(n)),
            "update, one thread": lambda n: syncio.update_user_metadata(user(n), update()),
        }
        waiting = {
            "get, 64 tasks": lambda n: aio.get_user_metadata(user(n)),
            "update, 64 tasks": lambda n: aio.update_user_metadata(user(n), update()),
        }

        def measure(_: str, measuring: Measuring) -> Times:
            return measuring.alone(blocking) | measuring.in_tasks(loop, waiting, 64)

        found = by_storage(benchmarks.measuring, opened, measure)
        for storage in opened.values():
            storage.close()
    loop.close()
    benchmarks.report.say("## The three storages")
    benchmarks.report.say("Microseconds for each call, documents of 150 B:")
    benchmarks.report.table(
        ["", *blocking, *waiting],
        [
            [name, *(f"{median(times) * 1e6:.1f}" for times in by_call.values())]
            for name, by_call in found.items()
        ],
    )

"""Measure a cluster with one, two and three workers beside one PostgreSQL server, and print it.

Run ``python tests/citus/figures.py [seconds]``. All servers and the client share the machine. The
rounds of all of them alternate, so that what else the machine does is shared, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from citus_cluster import Cluster  # noqa: E402 - after the path above

from usermetadata import PostgresStorage, UserMetadata  # noqa: E402 - likewise
from usermetadata.changes import Merge  # noqa: E402 - likewise

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue

USERS = [f"user {n}" for n in range(10_000)]
ROUNDS = 7
CLUSTERS = ((1, 32), (2, 32), (3, 32), (2, 8))  # workers and shards; 32 is the default of Citus
SPAWN = multiprocessing.get_context("spawn")


class Measured:
    """One database, with 10,000 users in it.

    Args:
        name: for the table.
        url: of the server.
        distributed: whether Citus distributes the table.
    """

    def __init__(self, name: str, url: str, *, distributed: bool) -> None:
        self.name, self.url = name, url
        self.storage = PostgresStorage(url)
        if distributed:
            self.storage.distribute()
        profile = {"theme": "dark", "language": "en", "visits": 0, "text": "x" * 80}
        for start in range(0, len(USERS), 500):
            users = USERS[start : start + 500]
            self.storage.write([(user, Merge(profile)) for user in users])
        self.users = UserMetadata(self.storage)
        self.times: dict[str, list[float]] = {}

    def round(self) -> None:
        """Measure each kind of call once more."""
        syncio = self.users.syncio
        self._each("get", lambda: syncio.get_user_metadata(random.choice(USERS)))
        self._each(
            "update", lambda: syncio.update_user_metadata(random.choice(USERS), {"visits": 1})
        )
        self._each(
            "update of 64",
            lambda: syncio.update_bulk_user_metadata(
                {user: {"visits": 2} for user in random.sample(USERS, 64)}
            ),
            number=8,
        )
        began = time.perf_counter()
        asyncio.run(self._tasks(1280))
        self._note("64 tasks", 1280 / (time.perf_counter() - began))

    async def _tasks(self, number: int) -> None:
        left = iter(range(number))

        async def task() -> None:
            for n in left:
                await self.users.asyncio.update_user_metadata(random.choice(USERS), {"visits": n})

        await asyncio.gather(*(task() for _ in range(64)))

    def _each(self, kind: str, call: Callable[[], object], number: int = 60) -> None:
        for _ in range(number):
            began = time.perf_counter()
            call()
            self._note(kind, 1000 * (time.perf_counter() - began))

    def _note(self, kind: str, value: float) -> None:
        self.times.setdefault(kind, []).append(value)


def write_batches(url: str, seed: int, seconds: float, results: Queue[Any]) -> None:
    """Write 1, 4 or 8 of 12 users at random; put the names of what was acknowledged."""
    choice = random.Random(seed)
    with contextlib.closing(PostgresStorage(url)) as storage:
        acknowledged: list[tuple[str, str]] = []
        slowest, number = 0.0, 0
        end = time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            users = choice.sample(USERS[:12], choice.choice([1, 4, 8]))
            key = f"{seed} {number}"
            storage.write([(user, Merge({key: 1})) for user in users])
            slowest = max(slowest, time.monotonic() - began)
            acknowledged += [(user, key) for user in users]
            number += 1
    results.put((number, acknowledged, slowest))


def processes(database: Measured, seconds: float) -> tuple[int, float, int]:
    """Let eight processes write; return the writes, the slowest of them, and what was lost."""
    results: Queue[Any] = SPAWN.Queue()
    started = [
        SPAWN.Process(target=write_batches, args=(database.url, seed, seconds, results))
        for seed in range(8)
    ]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    stored = database.storage.read(USERS[:12])
    lost = sum(key not in stored[user] for _, pairs, _ in found for user, key in pairs)
    return sum(number for number, *_ in found), max(slowest for *_, slowest in found), lost


def main(seconds: float) -> None:
    """Print a table."""
    plain = Cluster(0)
    clusters = [Cluster(workers, **{"citus.shard_count": shards}) for workers, shards in CLUSTERS]
    try:
        databases = [
            Measured("PostgreSQL", plain.coordinator.url, distributed=False),
            *(
                Measured(
                    f"{workers} workers, {shards} shards", each.coordinator.url, distributed=True
                )
                for each, (workers, shards) in zip(clusters, CLUSTERS, strict=True)
            ),
        ]
        for number in range(ROUNDS):
            for database in databases:
                database.round()
            print(f"round {number + 1}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        for database in databases:
            line = [f"{statistics.median(times):8.2f}" for times in database.times.values()]
            best = [
                f"{(max if kind == '64 tasks' else min)(times):8.2f}"
                for kind, times in database.times.items()
            ]
            print(f"{database.name:20} median", *line, "  best", *best)
        print(", ".join(databases[0].times), "(ms, and updates a second)")
        for database, cluster in ((databases[0], plain), (databases[2], clusters[1])):
            number, slowest, lost = processes(database, seconds)
            deadlocks = cluster.log().count("deadlock")
            print(
                f"{database.name}: 8 processes, {seconds:g} s: {number} writes, {lost} lost,"
                f" {deadlocks} deadlocks, slowest {slowest:.2f} s"
            )
    finally:
        for each in (plain, *clusters):
            each.stop()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)

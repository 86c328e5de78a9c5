"""Concurrent updates and flushes to the disk: how many, and the effect of slow flushes.

``python flushes.py FOLDER PEER AT_ONCE SECONDS`` updates in a separate process, and prints one
JSON object. Threads call a blocking peer, tasks a concurrent one. ``slow_fsync.c`` is preloaded: it
counts flushes, and slows them down.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import peers
from measuring import slow_fsync
from report import OURS, relative

SLOW = 1000  # microseconds
SHOWN: list[tuple[int, str, list[Any]]] = [
    (8, "threads", [peers.Usermetadata, peers.Sqlite3, peers.DiskCache]),
    (64, "tasks", [peers.AsyncUsermetadata, peers.ThreadHop, peers.AioSqlite]),
]


def measure(benchmarks: Any) -> None:
    """Add the sections on quick and slow flushes."""
    seconds, rounds = (0.1, 1) if benchmarks.quick else (1, 5)
    with tempfile.TemporaryDirectory() as folder:
        library = slow_fsync(Path(folder))
        for speed, heading, delay in (
            ("quick", "as quick as this disk's", 0),
            ("slow", f"that take {SLOW / 1000:g} ms longer", SLOW),
        ):
            benchmarks.report.say(f"## Flushes {heading}")
            for at_once, what, shown in SHOWN:
                benchmarks.progress(f"{speed} flushes, {at_once} {what}")
                found: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in shown}
                for _ in range(rounds):
                    for peer in shown:
                        found[peer.name].append(
                            child(library, peer.__name__, at_once, seconds, delay)
                        )
                times = {name: [one["seconds"] for one in found[name]] for name in found}
                flushes = {name: median(one["flushes"] for one in found[name]) for name in found}
                benchmarks.report.say(f"{at_once} {what} that update:")
                benchmarks.report.table(
                    ["", "updates per second", "our throughput against it", "flushes per update"],
                    [
                        [
                            name,
                            f"{1 / median(times[name]):,.0f}",
                            f"{relative(times, name):.1f} ×",
                            f"{flushes[name]:.3f}",
                        ]
                        for name in found
                    ],
                )
                if (speed, what) == ("quick", "tasks"):
                    benchmarks.aim(
                        "flushes per update, 64 concurrent tasks", 0.05, flushes[OURS], at_most=True
                    )


def child(library: Path, peer: str, at_once: int, seconds: float, delay: int) -> dict[str, float]:
    """Run this file."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, folder, peer, str(at_once), str(seconds)],
            env={**os.environ, "LD_PRELOAD": str(library), "FSYNC_DELAY_US": str(delay)},
            stdout=subprocess.PIPE,
            check=True,
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def in_threads(peer: Any, threads: int, seconds: float) -> int:
    """Update from threads; return the number of updates."""
    numbers = itertools.count()
    end = time.perf_counter() + seconds

    def work(thread: int) -> None:
        while time.perf_counter() < end:
            peer.update(f"user {thread}", {"visits": next(numbers)})

    workers = [threading.Thread(target=work, args=[thread]) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return next(numbers)


async def in_tasks(peer: Any, folder: Path, tasks: int, seconds: float) -> int:
    """Update from tasks; return the number of updates."""
    numbers = itertools.count()
    await peer.open(folder)
    end = time.perf_counter() + seconds

    async def work(task: int) -> None:
        while time.perf_counter() < end:
            await peer.update(f"user {task}", {"visits": next(numbers)})

    await asyncio.gather(*(work(task) for task in range(tasks)))
    await peer.close()
    return next(numbers)


def main() -> None:
    """Measure the workload that the command line names."""
    folder, name, at_once, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    peer_class = getattr(peers, name)
    begin = time.perf_counter()
    if peer_class in peers.CONCURRENT:
        updates = asyncio.run(in_tasks(peer_class(), folder, at_once, float(seconds)))
    else:
        peer = peer_class(folder)
        updates = in_threads(peer, at_once, float(seconds))
        peer.close()
    took = time.perf_counter() - begin
    flushes = ctypes.CDLL(None).count_flushes()
    print(json.dumps({"seconds": took / updates, "flushes": flushes / updates}))


if __name__ == "__main__":
    main()

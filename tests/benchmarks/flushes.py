"""One peer, updating for a while in a process of its own: what it commits and flushes.

``python flushes.py FOLDER PEER AT_ONCE SECONDS`` prints one JSON object. Threads call a blocking
peer, tasks a concurrent one. With ``slow_fsync.c`` preloaded flushes are counted, and slowed down.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import peers

commits = 0
connect = sqlite3.connect


def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
    """Connect, and count the commits from now on."""

    def trace(statement: str) -> None:
        global commits  # noqa: PLW0603 - what counts is a callback
        commits += statement == "COMMIT"

    connection: sqlite3.Connection = connect(*args, **kwargs)
    connection.set_trace_callback(trace)
    return connection


def in_threads(peer: Any, threads: int, seconds: float) -> int:
    """Update from threads; return how often."""
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
    """Update from tasks; return how often."""
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
    """Measure what the command line says."""
    folder, name, at_once, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    sqlite3.connect = traced  # type: ignore[assignment]
    count_flushes = ctypes.CDLL(None).count_flushes
    peer_class = getattr(peers, name)
    begin = time.perf_counter()
    if peer_class in peers.CONCURRENT:
        updates = asyncio.run(in_tasks(peer_class(), folder, at_once, float(seconds)))
    else:
        peer = peer_class(folder)
        updates = in_threads(peer, at_once, float(seconds))
        peer.close()
    took = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "updates": updates,
                "commits": commits / updates,
                "flushes": count_flushes() / updates,
                "per second": updates / took,
            }
        )
    )


main()

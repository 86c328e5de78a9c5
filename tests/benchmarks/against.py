"""Compare this checkout with one of an earlier commit, through their public functions.

``python tests/benchmarks --against PATH`` starts this file again and again, in turns with one
checkout and the other on its path. ``python against.py FOLDER FACADE FUNCTION AT_ONCE SYNCHRONOUS
SECONDS`` prints the seconds per call.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from measuring import slow_fsync
from workloads import USERS, document, update, user

import usermetadata
from usermetadata import SQLiteStorage, syncio
from usermetadata import asyncio as aio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Facade, function, calls at once, synchronous, additional microseconds per flush.
WORKLOADS: dict[str, tuple[str, str, int, str, int]] = {
    "8 threads, update, FULL, quick flush": ("syncio", "update", 8, "FULL", 0),
    "8 threads, update, FULL, slow flush": ("syncio", "update", 8, "FULL", 1000),
    "64 tasks, update, FULL": ("asyncio", "update", 64, "FULL", 0),
    "64 tasks, get, FULL": ("asyncio", "get", 64, "FULL", 0),
    "blocking update, NORMAL": ("syncio", "update", 1, "NORMAL", 0),
    "blocking get, NORMAL": ("syncio", "get", 1, "NORMAL", 0),
    "lone asyncio update, NORMAL": ("asyncio", "update", 1, "NORMAL", 0),
    "lone asyncio get, NORMAL": ("asyncio", "get", 1, "NORMAL", 0),
}


def compare(other: Path, *, quick: bool) -> None:
    """Print the speed of both checkouts."""
    checkouts = {"that": other.resolve(), "this": Path(__file__).parent.parent.parent}
    seconds, turns = ("0.1", 1) if quick else ("1", 9)
    print(f"{'microseconds per call':38}  that     this     time of that / time of this")
    with tempfile.TemporaryDirectory() as folder:
        library = slow_fsync(Path(folder))
        for name, (facade, function, at_once, synchronous, delay) in WORKLOADS.items():
            arguments = [facade, function, str(at_once), synchronous, seconds]
            times: dict[str, list[float]] = {checkout: [] for checkout in checkouts}
            for turn in range(turns):
                for checkout in sorted(checkouts, reverse=turn % 2 == 0):
                    times[checkout].append(
                        child(checkouts[checkout], arguments, str(library), str(delay))
                    )
            ratios = [that / this for that, this in zip(times["that"], times["this"], strict=True)]
            that, this = (median(times[checkout]) * 1e6 for checkout in ("that", "this"))
            print(
                f"{name:38}  {that:7.1f}  {this:7.1f}  {median(ratios):5.2f}"
                f"  ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def child(checkout: Path, arguments: list[str], library: str, delay: str) -> float:
    """Run this file with a checkout."""
    environment = {"PYTHONPATH": str(checkout), "LD_PRELOAD": library, "FSYNC_DELAY_US": delay}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, folder, *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
        )
    return float(done.stdout)


def in_threads(call: Callable[[int], object], threads: int, seconds: float) -> float:
    """Call from threads; return the seconds per call."""
    numbers = itertools.count()
    begin = time.perf_counter()

    def work() -> None:
        while time.perf_counter() < begin + seconds:
            call(next(numbers))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - begin) / next(numbers)


async def in_tasks(call: Callable[[int], Awaitable[object]], tasks: int, seconds: float) -> float:
    """Call from tasks; return the seconds per call."""
    numbers = itertools.count()
    begin = time.perf_counter()

    async def work() -> None:
        while time.perf_counter() < begin + seconds:
            await call(next(numbers))

    await asyncio.gather(*(work() for _ in range(tasks)))
    return (time.perf_counter() - begin) / next(numbers)


def main() -> None:
    """Measure the workload that the command line names."""
    folder, facade, function, at_once, synchronous, seconds = sys.argv[1:]
    assert usermetadata.__file__.startswith(os.environ["PYTHONPATH"]), usermetadata.__file__
    storage = SQLiteStorage(
        Path(folder) / "users.db", synchronous="FULL" if synchronous == "FULL" else "NORMAL"
    )
    usermetadata.init(storage)
    syncio.update_bulk_user_metadata({user(number): document(150) for number in range(USERS)})
    blocking: dict[str, Callable[[int], object]] = {
        "get": lambda number: syncio.get_user_metadata(user(number)),
        "update": lambda number: syncio.update_user_metadata(user(number), update()),
    }
    waiting: dict[str, Callable[[int], Awaitable[object]]] = {
        "get": lambda number: aio.get_user_metadata(user(number)),
        "update": lambda number: aio.update_user_metadata(user(number), update()),
    }
    for measured in (float(seconds) / 2, float(seconds)):  # the first half warms up
        if facade == "syncio":
            took = in_threads(blocking[function], int(at_once), measured)
        else:
            took = asyncio.run(in_tasks(waiting[function], int(at_once), measured))
    print(took)
    storage.close()


if __name__ == "__main__":
    main()

"""Timing side by side: the peers take turns, so a slow moment of the machine affects all."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

Times = dict[str, list[float]]
"""Seconds per operation, by peer, one entry a round."""


class Measuring:
    """How long and how often to measure.

    Args:
        seconds: the approximate duration of one peer's round.
        rounds: the number of rounds.
    """

    def __init__(self, seconds: float, rounds: int) -> None:
        self.seconds = seconds
        self.rounds = rounds

    def alone(self, operations: Mapping[str, Callable[[int], object]]) -> Times:
        """Time operations, each called with the number of the call."""

        def run(operation: Callable[[int], object], calls: int) -> float:
            begin = time.perf_counter()
            for number in range(calls):
                operation(number)
            return time.perf_counter() - begin

        return self._in_turns(operations, run, 1)

    def in_threads(self, operations: Mapping[str, Callable[[int], object]], threads: int) -> Times:
        """Time operations that so many threads call at once."""

        def run(operation: Callable[[int], object], calls: int) -> float:
            def work(first: int) -> None:
                for number in range(first, calls * threads, threads):
                    operation(number)

            workers = [threading.Thread(target=work, args=[first]) for first in range(threads)]
            begin = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return time.perf_counter() - begin

        return self._in_turns(operations, run, threads)

    def in_tasks(
        self,
        loop: asyncio.AbstractEventLoop,
        operations: Mapping[str, Callable[[int], Awaitable[object]]],
        tasks: int,
    ) -> Times:
        """Time operations that so many tasks await at once."""

        def run(operation: Callable[[int], Awaitable[object]], calls: int) -> float:
            async def work(first: int) -> None:
                for number in range(first, calls * tasks, tasks):
                    await operation(number)

            async def main() -> None:
                await asyncio.gather(*map(work, range(tasks)))

            begin = time.perf_counter()
            loop.run_until_complete(main())
            return time.perf_counter() - begin

        return self._in_turns(operations, run, tasks)

    def _in_turns(
        self,
        operations: Mapping[str, Callable[[int], Any]],
        run: Callable[[Callable[[int], Any], int], float],
        at_once: int,
    ) -> Times:
        calls: dict[str, int] = {}
        for name, operation in operations.items():
            run(operation, 1)
            calls[name] = max(1, int(self.seconds / run(operation, 1)))
            if calls[name] > 1:  # the first call may be a slow one
                calls[name] = max(1, int(self.seconds / run(operation, calls[name]) * calls[name]))
        times: Times = {name: [] for name in operations}
        for _ in range(self.rounds):
            for name, operation in operations.items():
                times[name].append(run(operation, calls[name]) / calls[name] / at_once)
        return times


def slow_fsync(folder: Path) -> Path:
    """Compile ``slow_fsync.c`` in that folder; return the library to preload."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler (cc), which counting flushes needs")
    library, source = folder / "slow_fsync.so", Path(__file__).with_name("slow_fsync.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library

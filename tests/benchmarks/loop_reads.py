"""Measure the slowest reads of a local SQLite file: could they run on an event loop's thread?

``python tests/benchmarks/loop_reads.py`` reads users in random order with ``usermetadata.syncio``,
while another process updates continuously. Before, the pages of the file are dropped from memory.
Each read is timed: on an event loop's thread all other tasks would wait that long.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workloads import document, update, user

from usermetadata import SQLiteStorage, UserMetadataRecipe, init, syncio

CHUNK = 1000


def fill(storage: SQLiteStorage, users: int) -> None:
    """Store users."""
    init(storage)
    for first in range(0, users, CHUNK):
        syncio.update_bulk_user_metadata(
            {f"user {number}": document(150) for number in range(first, first + CHUNK)}
        )
    UserMetadataRecipe.reset()
    storage.close()


def drop_pages(file: Path) -> str:
    """Drop a file's pages from memory; return the method."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        return "posix_fadvise(POSIX_FADV_DONTNEED)"
    return "/proc/sys/vm/drop_caches"


def write(file: Path, users: int) -> None:
    """Update until the process is ended."""
    init(SQLiteStorage(file))
    number = 0
    while True:
        syncio.update_user_metadata(user(number, users), update())
        number += 1
        if number == 1:
            print("writing", flush=True)


def read(file: Path, users: int, reads: int) -> list[float]:
    """Read; return the sorted durations of the reads in seconds."""
    init(SQLiteStorage(file))
    times: list[float] = []
    for number in range(reads):
        user_id = user(number, users)
        begin = time.perf_counter()
        syncio.get_user_metadata(user_id)
        times.append(time.perf_counter() - begin)
    return sorted(times)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few users, few reads")
    parser.add_argument("--write", type=Path, metavar="FILE", help="be the process that updates")
    arguments = parser.parse_args()
    users, reads = (10_000, 1000) if arguments.quick else (1_000_000, 100_000)
    if arguments.write:
        write(arguments.write, users)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "users.db"
        fill(SQLiteStorage(file), users)
        how = drop_pages(file)
        command = [sys.executable, __file__, *sys.argv[1:], "--write", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout
            writer.stdout.readline()
            times = read(file, users, reads)
            writer.terminate()
    median, thousandth = times[len(times) // 2], times[len(times) * 999 // 1000]
    print(
        f"{reads:,} reads of {users:,} users, pages dropped by {how}: median {median * 1e6:.0f} µs,"
        f" 99.9th percentile {thousandth * 1e3:.2f} ms, slowest {times[-1] * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()

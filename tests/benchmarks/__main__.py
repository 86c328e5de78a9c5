"""Measure usermetadata and its alternatives, and write the page of results.

``python tests/benchmarks`` takes a quarter of an hour or more; ``--quick`` only checks that
everything runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import functools
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import against
import finding
import flushes
import lone
import parts
import peers
import postgres
import serving
import sizes
import supertokens_sdk
from measuring import Measuring, Times
from report import OURS, Report, relative, tasks
from workloads import (
    USERS,
    WORKLOADS,
    awaited,
    by_storage,
    document,
    fill,
    gets,
    gets_many,
    update,
    updates,
    user,
)

import usermetadata
from usermetadata import InMemoryStorage, SQLiteStorage, UserMetadataRecipe, syncio
from usermetadata.changes import Merge

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata import Storage

HERE = Path(__file__).parent
SIZES = {"150 B": 150, "2 KB": 2_000, "50 KB": 50_000}


class Benchmarks:
    """All measurements, section by section."""

    def __init__(self, report: Report, measuring: Measuring, *, quick: bool) -> None:
        self.report = report
        self.measuring = measuring
        self.quick = quick
        self.begin = time.perf_counter()
        self.aims: list[tuple[str, str, str, bool]] = []
        self.workloads: dict[str, Times] = {}
        self.chart: dict[str, dict[str, float]] = {"64 tasks": {}, "one task": {}}
        self.ratios: dict[str, dict[str, float]] = {"64 tasks": {}, "one task": {}}
        self.figures: dict[str, float] = {}

    def run(self) -> None:
        """Measure everything."""
        lone.measure(self)
        self.by_size()
        self.blocking()
        self.threads()
        self.tasks()
        self.faster_peers()
        self.where_the_time_goes()
        flushes.measure(self)
        supertokens_sdk.measure(self)
        self.stored_users()
        self.in_memory()
        postgres.measure(self)
        self.finding()
        serving.measure(self)
        self.importing()

    def progress(self, text: str) -> None:
        """Print what is being measured."""
        print(f"{time.perf_counter() - self.begin:6.0f} s  {text}", flush=True)

    def aim(self, figure: str, aim: float, measured: float, *, at_most: bool) -> None:
        """Record a figure, its aim, and whether it is reached."""
        sign, reached = ("≤", measured <= aim) if at_most else ("≥", measured >= aim)
        digits = 3 if aim < 0.1 else 2
        self.aims.append((figure, f"{sign} {aim:g}", f"{measured:.{digits}f}", reached))

    def charted(self, label: str, times: Times, *names: str) -> None:
        """Record updates for the chart and the sentences at the head of the page."""
        for name in names:
            self.chart[label][name] = 1 / median(times[name])
            self.ratios[label][name] = relative(times, name)

    @contextlib.contextmanager
    def opened(self, size: int) -> Generator[list[Any], None, None]:
        """Open every blocking peer on a separate file, with users in it."""
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            # TinyDB reads and writes the whole file each time: not 50 MB.
            opened = [
                peer(Path(folder))
                for peer in peers.BLOCKING
                if peer is not peers.TinyDB or size < 10_000
            ]
            for peer in opened:
                stack.callback(peer.close)
                peer.fill({user(number): document(size) for number in range(USERS)})
                self.warm_up(updates(peer))
            yield opened

    def warm_up(self, operation: Callable[[int], object]) -> None:
        """Repeat an operation until SQLite's log has grown to its full size and is reused."""
        end = time.perf_counter() + (0.01 if self.quick else 1)
        number = 0
        while time.perf_counter() < end:
            operation(number)
            number += 1

    def by_size(self) -> None:
        """Objects of several sizes, with and without msgspec."""
        measuring = sizes.QUICK if self.quick else sizes.THOROUGH
        measured = sizes.Sizes(measuring, self.report.folder, self.progress)
        measured.run()
        for figure, aim, value in measured.aims:
            self.aim(figure, aim, value, at_most=True)

    def finding(self) -> None:
        """Users found by their metadata, with a page of its own."""
        measured = finding.of(self.report.folder, self.progress, quick=self.quick)
        measured.run()
        for figure, aim, value in measured.aims:
            self.aim(figure, aim, value, at_most=True)

    def blocking(self) -> None:
        """One thread."""
        results: dict[str, dict[str, Times]] = {"get": {}, "update": {}, "90 % get": {}}
        bulk: dict[str, Times] = {}
        sizes = dict(list(SIZES.items())[:1]) if self.quick else SIZES
        for label, size in sizes.items():
            self.progress(f"one thread, {label}")
            with self.opened(size) as opened:
                for name, make in WORKLOADS.items():
                    results[name][label] = self.measuring.alone(
                        {peer.name: make(peer) for peer in opened}
                    )
                ids = [user(number) for number in range(500)]
                bulk[label] = self.measuring.alone(
                    {peer.name: gets_many(peer, ids) for peer in opened}
                )
        self.report.say("## One thread")
        self.report.ratios(
            "blocking.svg",
            {
                f"{name}, 150 B": {
                    peer: relative(results[name]["150 B"], peer) for peer in results[name]["150 B"]
                }
                for name in ("get", "update")
            },
            "How many times as long as usermetadata each library takes for get and update.",
        )
        for name, by_size in results.items():
            self.report.say(f"`{name}`, microseconds for documents of three sizes:")
            self.report.compare(by_size)
        self.report.say("`get` of 500 users at once, microseconds:")
        self.report.compare(bulk)
        for name, by_size in [*results.items(), ("bulk get", bulk)]:
            self.workloads |= {f"{name} {label}": times for label, times in by_size.items()}

    def faster_peers(self) -> None:
        """List the peers that were faster, except sqlite3 by hand, which has separate aims."""
        ratios = sorted(
            (relative(times, name), workload, name)
            for workload, times in self.workloads.items()
            for name in times
            if name not in (OURS, peers.Sqlite3.name)
        )
        self.aim(
            f"every peer but sqlite3 by hand, {len(ratios)} comparisons: the shortest time against"
            " ours",
            1,
            ratios[0][0],
            at_most=False,
        )
        self.report.say("## Peers that are faster")
        self.report.say(f"Of {len(ratios)} comparisons on this page, these have a ratio below 1 ×:")
        self.report.table(
            ["workload", "library", "its time against ours"],
            [[workload, name, f"{ratio:.2f} ×"] for ratio, workload, name in ratios if ratio < 1],
        )

    def threads(self) -> None:
        """Eight threads."""
        workloads: dict[str, Times] = {}
        with self.opened(150) as opened:
            for name, make in WORKLOADS.items():
                self.progress(f"eight threads, {name}")
                workloads[name] = self.measuring.in_threads(
                    {peer.name: make(peer) for peer in opened}, 8
                )
            self.progress("eight threads, one user")
            workloads["update of one user"] = self.measuring.in_threads(
                {peer.name: updates(peer, lambda _: "hot") for peer in opened}, 8
            )
        self.report.say("## Eight threads")
        self.report.say("Calls per second in all, documents of 150 B:")
        self.report.compare(workloads, rate=True)
        self.workloads |= {f"eight threads, {name}": times for name, times in workloads.items()}

    def tasks(self) -> None:
        """Tasks of an event loop."""
        loop = asyncio.new_event_loop()
        counts = [1, 8, 64] if self.quick else [1, 8, 64, 512]
        results: dict[str, dict[int, Times]] = {"get": {}, "update": {}, "90 % get": {}}
        with tempfile.TemporaryDirectory() as folder:
            opened = [peer() for peer in peers.CONCURRENT]
            for peer in opened:
                loop.run_until_complete(peer.open(Path(folder)))
                loop.run_until_complete(fill(peer))
                self.warm_up(awaited(loop, updates(peer)))
            for name, make in WORKLOADS.items():
                for count in counts:
                    self.progress(f"{count} tasks, {name}")
                    results[name][count] = self.measuring.in_tasks(
                        loop, {peer.name: make(peer) for peer in opened}, count
                    )
            self.progress("64 tasks, one user")
            hot = self.measuring.in_tasks(
                loop, {peer.name: updates(peer, lambda _: "hot") for peer in opened}, 64
            )
            for peer in opened:
                loop.run_until_complete(peer.close())
        loop.close()
        self.report.say("## asyncio")
        self.report.by_tasks(
            "tasks.svg",
            results,
            ["get", "update"],
            "Calls per second over the number of concurrent tasks.",
        )
        self.report.say("`update` of one hot user by 64 tasks, calls per second:")
        self.report.compare({"64 tasks": hot}, rate=True)
        hop, aiosqlite = peers.ThreadHop.name, peers.AioSqlite.name
        self.aim(
            "64 concurrent updates: throughput against a thread hop per call",
            6,
            relative(results["update"][64], hop),
            at_most=False,
        )
        self.aim(
            "64 concurrent updates: throughput against aiosqlite",
            20,
            relative(results["update"][64], aiosqlite),
            at_most=False,
        )
        self.aim(
            "64 concurrent gets: throughput against a thread hop per call",
            5,
            relative(results["get"][64], hop),
            at_most=False,
        )
        for count, label in ((1, "one task"), (64, "64 tasks")):
            times = results["update"][count]
            self.charted(label, times, *times)
        for name, by_count in results.items():
            self.workloads |= {f"{tasks(n)}, {name}": times for n, times in by_count.items()}
        self.workloads["64 tasks, one user"] = hot

    def where_the_time_goes(self) -> None:
        """The parts of 64 concurrent updates."""
        self.progress("parts of 64 concurrent updates")
        users = {user(number): document(150) for number in range(USERS)}
        loop = asyncio.new_event_loop()
        ours, aiosqlite = peers.AsyncUsermetadata(), peers.AioSqlite()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            for peer in (ours, aiosqlite):
                loop.run_until_complete(peer.open(Path(folder)))
                loop.run_until_complete(fill(peer))
            off = parts.OneTransaction(Path(folder), "OFF", users)
            full = parts.OneTransaction(Path(other), "FULL", users)
            by_hand = {
                "the event loop, and a thread to wait for": parts.Gathering(parts.nothing),
                "JSON: decode, merge, encode": parts.Gathering(parts.OnlyJSON(document(150)).work),
                "SQLite: read, write, commit": parts.Gathering(off.work),
                "the flush": parts.Gathering(full.work),
            }
            stages: dict[str, Any] = {
                **by_hand,
                "what this library adds": ours,
                peers.AioSqlite.name: aiosqlite,
            }
            for stage in stages.values():
                self.warm_up(awaited(loop, updates(stage)))
            times = self.measuring.in_tasks(
                loop, {name: updates(stage) for name, stage in stages.items()}, 64
            )
            for peer in (ours, aiosqlite):
                loop.run_until_complete(peer.close())
            for gathering in by_hand.values():
                gathering.close()
            off.close()
            full.close()
        loop.close()
        self.report.say("## Where the time goes")
        self.report.say(
            "64 concurrent updates written by hand, with one more part in each row, microseconds"
            " for each update:"
        )
        its = median(times.pop(peers.AioSqlite.name))
        total = median(times["what this library adds"])
        rows: list[list[str]] = []
        before = 0.0
        for name in times:
            after = median(times[name])
            rows.append(
                [
                    name,
                    f"{after * 1e6:.1f}",
                    f"{(after - before) * 1e6:.1f}",
                    f"{(after - before) / total:.0%}",
                ]
            )
            before = after
        self.report.table(["", "up to here", "this part", "share"], rows)
        self.report.say(
            f"aiosqlite took {its * 1e6:.0f} µs in the same run,"
            f" {its / median(times['the flush']):.0f} × as long as the hand-written code."
        )

    def stored_users(self) -> None:
        """The time of a get in tables of several sizes, measured in turns."""
        counts = [10**3, 10**4] if self.quick else [10**3, 10**4, 10**5, 10**6]
        storages: dict[str, Storage] = {}
        by_hand: dict[str, peers.Sqlite3] = {}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for count in counts:
                self.progress(f"{count:,} stored users")
                path = Path(folder) / str(count)
                path.mkdir()
                storage = storages[f"{count:,}"] = SQLiteStorage(path / "usermetadata.db")
                stack.callback(storage.close)
                peer = by_hand[f"{count:,}"] = peers.Sqlite3(path)
                stack.callback(peer.close)
                for first in range(0, count, 1000):
                    chunk = {f"user {n}": document(150) for n in range(first, first + 1000)}
                    storage.write([(user_id, Merge(chunk[user_id])) for user_id in chunk])
                    peer.fill(chunk)
            self.progress("one of many users")

            def measure(count: str, measuring: Measuring) -> Times:
                any_user = functools.partial(user, users=int(count.replace(",", "")))
                return measuring.alone(
                    {
                        OURS: lambda number: syncio.get_user_metadata(any_user(number)),
                        peers.Sqlite3.name: gets(by_hand[count], any_user),
                    }
                )

            workloads = by_storage(self.measuring, storages, measure)
            last = Path(folder) / str(counts[-1]) / "usermetadata.db"
            size = last.stat().st_size / counts[-1]
        lines = {
            name: [median(by_name[name]) * 1e6 for by_name in workloads.values()]
            for name in (OURS, peers.Sqlite3.name)
        }
        self.report.say("## Many users")
        self.report.lines(
            "users.svg",
            {"get": lines},
            counts,
            ("stored users", "microseconds"),
            "The time of a get over the number of stored users.",
            scale="linear",
        )
        self.report.say("`get` of any user, microseconds, by the number of stored users:")
        self.report.compare(workloads)
        self.report.say(f"On disk, a user with 150 B takes {size:,.0f} B, including the keys.")
        self.aim(
            f"get latency, {counts[0]:,} to {counts[-1]:,} users",
            1.5,
            relative(
                {count: times[OURS] for count, times in workloads.items()},
                f"{counts[-1]:,}",
                f"{counts[0]:,}",
            ),
            at_most=True,
        )

    def in_memory(self) -> None:
        """The in-memory storage, against JSON and against a dictionary that is copied."""
        self.progress("in memory")
        text = json.dumps(document(150))
        copied = CopiedDict()
        workloads: dict[str, Times] = {}
        syncio_calls = {
            "get": lambda _: syncio.get_user_metadata("user"),
            "update": lambda n: syncio.update_user_metadata("user", update()),
        }
        json_calls = {
            "get": lambda _: json.loads(text),
            "update": lambda n: json.dumps({**json.loads(text), **update()}),
        }
        copied_calls = {
            "get": lambda _: copied.get("user"),
            "update": lambda n: copied.update("user", update()),
        }
        usermetadata.init("memory://")
        syncio.update_user_metadata("user", document(150))
        copied.update("user", document(150))
        for name in ("get", "update"):
            workloads[name] = times = self.measuring.alone(
                {
                    OURS: syncio_calls[name],
                    "json alone": json_calls[name],
                    "copy.deepcopy under a lock": copied_calls[name],
                }
            )
            self.aim(
                f"in-memory {name}: time against the JSON it cannot avoid",
                1.5,
                1 / relative(times, "json alone"),
                at_most=True,
            )
        UserMetadataRecipe.reset()
        self.report.say("## In memory")
        self.report.say(
            "A document of 150 B, microseconds. `json alone` decodes and, for an update, encodes."
            " A store of JSON texts cannot avoid that:"
        )
        self.report.compare(workloads)
        users = 10_000 if self.quick else 100_000
        sizes = {
            OURS: allocated(lambda: filled_storage(users)),
            "a dictionary of dictionaries": allocated(
                lambda: {f"user {n}": document(150) for n in range(users)}
            ),
        }
        self.report.say("Memory per stored user:")
        self.report.table(
            ["", "bytes"], [[name, f"{size / users:,.0f}"] for name, size in sizes.items()]
        )

    def importing(self) -> None:
        """The time until a program has imported a facade."""
        self.progress("import")
        modules = ["usermetadata.syncio", "usermetadata.asyncio", "asyncio", "json"]
        programs = ["pass", *(f"import {module}" for module in modules)]
        # Modules are compiled once, as when installed.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

        def start(program: str) -> Callable[[int], object]:
            command = [sys.executable, "-c", program]
            return lambda _: subprocess.run(command, env=environment, check=True)

        rounds = Measuring(0, 5 if self.quick else 25)
        times = rounds.alone({program: start(program) for program in programs})
        over = {
            program: median(
                [mine - bare for mine, bare in zip(times[program], times["pass"], strict=True)]
            )
            for program in programs[1:]
        }
        self.report.say("## Importing")
        self.report.say(
            "Milliseconds more than a bare interpreter, which takes"
            f" {median(times['pass']) * 1000:.0f} ms here:"
        )
        self.report.table(
            ["", "ms"],
            [[f"`{program}`", f"{ms * 1000:.1f}"] for program, ms in over.items()],
        )
        self.aim(
            "import usermetadata.syncio over a bare interpreter, ms",
            15,
            over["import usermetadata.syncio"] * 1000,
            at_most=True,
        )


class CopiedDict:
    """A dictionary, deep copies and a lock: the usual fake in a test."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()

    def get(self, user_id: str) -> dict[str, Any]:
        with self.lock:
            return copy.deepcopy(self.users.get(user_id, {}))

    def update(self, user_id: str, update: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            merged = peers.merge(self.users.get(user_id, {}), copy.deepcopy(update))
            self.users[user_id] = merged
            return copy.deepcopy(merged)


def filled_storage(users: int) -> InMemoryStorage:
    """Fill an in-memory storage."""
    storage = InMemoryStorage()
    usermetadata.init(storage)
    syncio.update_bulk_user_metadata({f"user {n}": document(150) for n in range(users)})
    UserMetadataRecipe.reset()
    return storage


def allocated(make: Callable[[], object]) -> int:
    """Return the size of an object in bytes."""
    tracemalloc.start()
    made = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return size


def opening(benchmarks: Benchmarks) -> None:
    """Summarise the results in one chart and three sentences."""
    report, figures = benchmarks.report, benchmarks.figures
    report.rates(
        "updates.svg",
        {
            "64 tasks update at once": benchmarks.chart["64 tasks"],
            "one task updates": benchmarks.chart["one task"],
        },
        "updates per second",
    )
    alone, many = benchmarks.ratios["one task"], benchmarks.ratios["64 tasks"]
    report.say(
        "64 `asyncio` tasks that update an SQLite file at once, with every update durable,"
        f" reach {many[peers.ThreadHop.name]:.1f} times the throughput of a thread hop per call,"
        f" and {many[peers.AioSqlite.name]:.1f} times that of aiosqlite."
        " SuperTokens' Python SDK takes"
        f" {alone[supertokens_sdk.NAME]:.0f} times as long for a lone update,"
        f" and {many[supertokens_sdk.NAME]:.0f} times for each update of 64 tasks, although its"
        " core here only keeps metadata in memory."
        " If writes do not wait for the disk, a lone blocking update takes"
        f" {figures['lone update']:.2f} times as long as with hand-tuned `sqlite3`, and a get"
        f" {figures['lone get']:.2f} times."
    )


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    default = HERE.parent.parent / "docs" / "_static" / "benchmarks"
    parser.add_argument("--output", type=Path, default=default, help="folder of the results")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="compare with a checkout of another commit instead, and only print the ratios",
    )
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    if arguments.against:
        against.compare(arguments.against, quick=quick)
        return
    report = Report(arguments.output)
    benchmarks = Benchmarks(
        report, Measuring(0.01, 3) if quick else Measuring(0.05, 15), quick=quick
    )
    benchmarks.run()
    results = report.parts
    report.parts = []
    opening(benchmarks)
    report.say(
        f"Measured with CPython {platform.python_version()}, SQLite {sqlite3.sqlite_version} and"
        f" PostgreSQL {postgres.server_version()} on {os.cpu_count()} processors."
    )
    report.parts += results
    report.write("results.md")
    rows = [
        [figure, aim, value, "yes" if reached else "**no**"]
        for figure, aim, value, reached in benchmarks.aims
    ]
    report.table(["figure", "aim", "measured", "reached"], rows)
    report.write("aims.md")
    postgres.stop_servers()
    for row in rows:
        print("  ".join(row))


if __name__ == "__main__":
    main()

"""Lone calls by the size of the object, with and without msgspec, and the same by hand.

``python tests/benchmarks/sizes.py`` measures only this and writes ``sizes.md``. The files are at
``synchronous=NORMAL``. The objects are flat: half strings, half numbers.
"""

# pyright: reportPrivateUsage=false
# The library is switched between both ways of decoding and encoding between two rounds.

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import platform
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import peers
from lone import HandTuned
from measuring import Measuring
from report import OURS, Report, relative
from workloads import gets, update, updates, user

from usermetadata import InMemoryStorage, UserMetadataRecipe, codec, init
from usermetadata.validation import copy_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from measuring import Times

SIZES = {"150 B": 150, "1 KB": 1_000, "10 KB": 10_000, "125 KB": 125_000, "1 MB": 1_000_000}
USERS = 20
QUICK, THOROUGH = Measuring(0.005, 3), Measuring(0.02, 41)
STANDARD = f"{OURS} without msgspec"
BY_HAND = "sqlite3 by hand, json"
BY_HAND_FAST = "sqlite3 by hand, msgspec"
# The aims of update and get, as times against sqlite3 by hand with json.
AIMS = {
    "150 B": (1.15, 1.1),
    "1 KB": (0.72, 0.78),
    "10 KB": (0.4, 0.6),
    "125 KB": (0.4, 0.65),
    "1 MB": (0.45, 0.85),
}
_fast = codec._fast


@functools.cache
def profile(size: int) -> dict[str, Any]:
    """Make a flat object of strings and numbers whose JSON has about that many bytes."""
    made: dict[str, Any] = {"visits": 0}
    length = len('{"visits":0}')
    for number in itertools.count():
        name = f"property {number}"
        made[name] = [f"the value of {name}", number * 37, "dark", number / 8][number % 4]
        length += len(json.dumps({name: made[name]}))
        if length >= size:
            return made
    raise AssertionError


def hand_tuned(folder: Path, *, fast: bool) -> HandTuned:
    """Return sqlite3 by hand with one of the two."""
    if not fast:
        return HandTuned(folder, json.loads, json.dumps)
    encode = msgspec.json.encode
    return HandTuned(folder, msgspec.json.decode, lambda value: encode(value).decode())


def in_turns(measuring: Measuring, operations: Mapping[str, Callable[[Measuring], Times]]) -> Times:
    """Measure one after the other in each round; one of them without msgspec."""
    one_round = Measuring(measuring.seconds, 1)
    times: Times = {name: [] for name in operations}
    for _ in range(measuring.rounds):
        for name, measure in operations.items():
            codec._fast = (lambda: None) if name == STANDARD else _fast  # type: ignore[assignment]
            times[name].extend(measure(one_round)[name])
    codec._fast = _fast
    return times


def alone(operations: Mapping[str, Callable[[int], object]]) -> Any:
    """Return what ``in_turns`` takes, for blocking calls."""
    return {
        name: functools.partial(_alone, name, operation) for name, operation in operations.items()
    }


def _alone(name: str, operation: Callable[[int], object], measuring: Measuring) -> Times:
    return measuring.alone({name: operation})


class Sizes:
    """The measurements.

    Args:
        measuring: how long and how often.
        folder: where ``sizes.md`` is written.
        progress: called with what is being measured.
    """

    def __init__(self, measuring: Measuring, folder: Path, progress: Callable[[str], None]) -> None:
        self.measuring = measuring
        self.report = Report(folder)
        self.progress = progress
        self.aims: list[tuple[str, float, float]] = []

    def run(self) -> None:
        """Measure everything and write the page."""
        of_sizes = {label: self.of_size(label) for label in SIZES}
        self.report.say(
            f"Measured with CPython {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
            f" and msgspec {msgspec.__version__} on {os.cpu_count()} processors."
        )
        for name, what in (
            ("get", "`get`"),
            ("update", "`update` of two properties of a stored object"),
            ("whole", "`update` with a whole object of that size"),
        ):
            self.report.say(f"{what}, microseconds:")
            self.report.compare({label: each[name] for label, each in of_sizes.items()}, digits=2)
        for place, name in enumerate(("update", "get")):
            for label, aims in AIMS.items():
                times = of_sizes[label][name]
                ratio = 1 / relative(times, BY_HAND)
                self.aims.append((f"{name}, {label}: time against {BY_HAND}", aims[place], ratio))
        self.tasks()
        self.in_memory()
        self.copying()
        self.report.table(
            ["figure", "aim", "measured", "reached"],
            [
                [figure, f"≤ {aim:g}", f"{value:.2f}", "yes" if value <= aim else "**no**"]
                for figure, aim, value in self.aims
            ],
        )
        self.report.write("sizes.md")

    def of_size(self, label: str) -> dict[str, Times]:
        """Blocking calls."""
        stored = profile(SIZES[label])
        times: dict[str, Times] = {}
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            ours = peers.Usermetadata(Path(folder), "NORMAL")
            by_hand = hand_tuned(Path(folder), fast=False)
            fast = hand_tuned(Path(other), fast=True)
            everyone = {OURS: ours, STANDARD: ours, BY_HAND: by_hand, BY_HAND_FAST: fast}
            for peer in (ours, by_hand, fast):
                for number in range(USERS):
                    peer.update(user(number, USERS), stored)
                # Until SQLite's log has grown to its full size.
                end = time.perf_counter() + 25 * self.measuring.seconds
                while time.perf_counter() < end:
                    peer.update(user(0, USERS), update())
            some_user = functools.partial(user, users=USERS)
            workloads: dict[str, Callable[[Any], Callable[[int], object]]] = {
                "get": lambda peer: gets(peer, some_user),
                "update": lambda peer: updates(peer, some_user),
                "whole": lambda peer: (
                    lambda number: peer.update(some_user(number), {**stored, **update()})
                ),
            }
            for name, make in workloads.items():
                self.progress(f"{label}, {name}")
                times[name] = in_turns(
                    self.measuring, alone({each: make(peer) for each, peer in everyone.items()})
                )
            by_hand.connection.close()
            fast.connection.close()
            ours.close()
        return times

    def tasks(self) -> None:
        """64 tasks, with and without msgspec."""
        times: dict[str, Times] = {}
        loop = asyncio.new_event_loop()
        with tempfile.TemporaryDirectory() as folder:
            ours = peers.Usermetadata(Path(folder), "NORMAL")
            ours.fill({user(number, USERS): profile(1_000) for number in range(USERS)})
            some_user = functools.partial(user, users=USERS)
            waiting = peers.AsyncUsermetadata()
            for name, make in (("get", gets), ("update", updates)):
                self.progress(f"64 tasks, {name}")
                operation = make(waiting, some_user)

                def measure(
                    name: str, operation: Callable[[int], Any], measuring: Measuring
                ) -> Times:
                    return measuring.in_tasks(loop, {name: operation}, 64)

                times[name] = in_turns(
                    self.measuring,
                    {
                        each: functools.partial(measure, each, operation)
                        for each in (OURS, STANDARD)
                    },
                )
                self.aims.append(
                    (
                        f"64 tasks, {name}, 1 KB: time against that without msgspec",
                        0.85,
                        1 / relative(times[name], STANDARD),
                    )
                )
            ours.close()
        loop.close()
        self.report.say("64 `asyncio` tasks, objects of 1 KB, calls per second in all:")
        self.report.compare(times, rate=True, digits=2)

    def in_memory(self) -> None:
        """The in-memory storage from asyncio, which needs no thread."""
        self.progress("in memory")
        loop = asyncio.new_event_loop()
        init(InMemoryStorage())
        waiting = peers.AsyncUsermetadata()
        loop.run_until_complete(waiting.update("alice", profile(150)))
        for name, aim, operation in (
            ("update", 40, lambda _: waiting.update("alice", update())),
            ("get", 25, lambda _: waiting.get("alice")),
        ):
            times = self.measuring.in_tasks(loop, {name: operation}, 1)[name]
            figure = f"`InMemoryStorage` from asyncio, {name}, 150 B: microseconds"
            self.aims.append((figure, aim, sorted(times)[len(times) // 2] * 1e6))
        UserMetadataRecipe.reset()
        loop.close()

    def copying(self) -> None:
        """The check and copy of input."""
        self.progress("check and copy")
        times = {
            label: self.measuring.alone(
                {
                    OURS: functools.partial(_copy, profile(size)),
                    "json.loads(json.dumps(...))": functools.partial(_by_json, profile(size)),
                }
            )
            for label, size in SIZES.items()
        }
        self.report.say("The check and copy of input, which no code by hand has, microseconds:")
        self.report.compare(times, digits=2)


def _copy(value: dict[str, Any], _: int) -> object:
    return copy_metadata(value, "metadata_update")


def _by_json(value: dict[str, Any], _: int) -> object:
    return json.loads(json.dumps(value))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    default = Path(__file__).parent.parent.parent / "docs" / "_static" / "benchmarks"
    parser.add_argument("--output", type=Path, default=default, help="folder of the results")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    sizes = Sizes(
        QUICK if arguments.quick else THOROUGH,
        arguments.output,
        lambda text: print(f"{time.perf_counter() - begin:6.0f} s  {text}", flush=True),
    )
    sizes.run()
    for figure, aim, value in sizes.aims:
        print(f"{figure}  ≤ {aim:g}  {value:.2f}")


if __name__ == "__main__":
    main()

"""The operations on a peer, and their metadata."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from typing import TYPE_CHECKING, Any

from measuring import Measuring

from usermetadata import UserMetadataRecipe, init

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from measuring import Times

    from usermetadata import Storage

USERS = 1000


@functools.cache
def document(size: int) -> dict[str, Any]:
    """Make metadata whose JSON has about that many bytes."""
    made: dict[str, Any] = {
        "preferences": {"theme": "dark", "language": "en"},
        "notifications": {"email": True},
        "visits": 0,
        "stripe": "cus_NffrFeUfNV2Hib",
        "todos": [],
    }
    while len(json.dumps(made)) < size - 20:
        made["todos"].append(f"use-text-notifs-{len(made['todos'])}")
    return made


visits = itertools.count()


def update() -> dict[str, Any]:
    """Make an update that changes something each time."""
    return {"notifications": {"email": True}, "visits": next(visits)}


def user(number: int, users: int = USERS) -> str:
    """Return the id of a stored user, in random order."""
    return f"user {number * 7919 % users}"


def awaited(
    loop: asyncio.AbstractEventLoop, operation: Callable[[int], Any]
) -> Callable[[int], object]:
    """Return an operation that waits for another to end."""
    return lambda number: loop.run_until_complete(operation(number))


def gets(peer: Any, user: Callable[[int], str] = user) -> Callable[[int], Any]:
    """Return an operation that gets one user after the other."""
    return lambda number: peer.get(user(number))


def updates(peer: Any, user: Callable[[int], str] = user) -> Callable[[int], Any]:
    """Return an operation that updates one user after the other."""
    return lambda number: peer.update(user(number), update())


def mixed(peer: Any) -> Callable[[int], Any]:
    """Return an operation that updates every tenth time, and otherwise gets."""
    return lambda number: (
        peer.update(user(number), update()) if number % 10 == 0 else peer.get(user(number))
    )


WORKLOADS: dict[str, Callable[[Any], Callable[[int], Any]]] = {
    "get": gets,
    "update": updates,
    "90 % get": mixed,
}


def gets_many(peer: Any, ids: list[str]) -> Callable[[int], Any]:
    """Return an operation that gets many users at once."""
    return lambda _: peer.get_many(ids)


async def fill(peer: Any) -> None:
    """Store all users, some at a time."""
    for first in range(0, USERS, 100):
        await asyncio.gather(
            *(peer.update(user(number), document(150)) for number in range(first, first + 100))
        )


def by_storage(
    measuring: Measuring,
    storages: Mapping[str, Storage],
    measure: Callable[[str, Measuring], Times],
) -> dict[str, Times]:
    """Measure the storages in turn in each round, because ``init`` takes one at a time."""
    one_round = Measuring(measuring.seconds, 1)
    found: dict[str, Times] = {name: {} for name in storages}
    for _ in range(measuring.rounds):
        for name, storage in storages.items():
            init(storage)
            for what, times in measure(name, one_round).items():
                found[name].setdefault(what, []).extend(times)
            UserMetadataRecipe.reset()
    return found

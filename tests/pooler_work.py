"""Every function that writes, called by threads and by tasks; also run as a separate process."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import usermetadata
from usermetadata import PostgresStorage, UserMetadataRecipe
from usermetadata import asyncio as asynchronous
from usermetadata.syncio import (
    clear_user_metadata,
    modify_user_metadata,
    set_user_metadata,
    update_bulk_user_metadata,
    update_user_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata.codec import Metadata

Acknowledged = dict[str, "Metadata | None"]


def work(url: str, schema: str, name: str) -> Acknowledged:
    """Write with eight threads and 50 tasks; return what was acknowledged, by user.

    The users with numbers are shared by all that work: other properties of theirs are other calls'.
    A user that was cleared has ``None``.
    """
    acknowledged: Acknowledged = collections.defaultdict(dict)
    with contextlib.closing(PostgresStorage(url, schema=schema, max_connections=5)) as storage:
        usermetadata.init(storage)
        with ThreadPoolExecutor(8) as executor:
            threads = executor.map(
                lambda number: _block(f"{name} thread {number}", acknowledged), range(8)
            )
            asyncio.run(_gather(name, acknowledged))
            list(threads)
        UserMetadataRecipe.reset()
    return acknowledged


def _keep(key: str) -> Callable[[Metadata], Metadata]:
    return lambda metadata: {**metadata, key: 1}


def _block(name: str, acknowledged: Any) -> None:
    for n in range(5):
        user, other = f"user {n}", f"user {n + 1}"
        update_user_metadata(user, {f"{name} update": n})
        acknowledged[user][f"{name} update"] = n
        modify_user_metadata(user, _keep(f"{name} modify"))
        acknowledged[user][f"{name} modify"] = 1
        update_bulk_user_metadata({user: {f"{name} {n}": n}, other: {f"{name} {n}": n}})
        acknowledged[user][f"{name} {n}"] = acknowledged[other][f"{name} {n}"] = n
        set_user_metadata(f"{name} set", {"n": n})
        acknowledged[f"{name} set"] = {"n": n}
        clear_user_metadata(f"{name} set and cleared")
        set_user_metadata(f"{name} set and cleared", {"n": n})
    clear_user_metadata(f"{name} set and cleared")
    acknowledged[f"{name} set and cleared"] = None


async def _gather(name: str, acknowledged: Any) -> None:
    async def use(number: int) -> None:
        task = f"{name} task {number}"
        user, other = f"user {number % 5}", f"user {number % 5 + 1}"
        await asynchronous.update_user_metadata(user, {f"{task} update": 1})
        await asynchronous.modify_user_metadata(user, _keep(f"{task} modify"))
        await asynchronous.update_bulk_user_metadata({user: {task: 1}, other: {task: 1}})
        acknowledged[user] |= {f"{task} update": 1, f"{task} modify": 1, task: 1}
        acknowledged[other][task] = 1
        await asynchronous.set_user_metadata(f"{task} set", {"n": 1})
        await asynchronous.clear_user_metadata(f"{task} set")
        acknowledged[f"{task} set"] = None

    await asyncio.gather(*map(use, range(50)))


if __name__ == "__main__":
    json.dump(work(*sys.argv[1:]), sys.stdout)

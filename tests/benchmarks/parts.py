"""Concurrent updates written by hand, with one more part each time, to show each part's cost.

Each calls a function in a thread, with all calls that have gathered. It checks nothing, and a
failing call fails all calls.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from typing import TYPE_CHECKING, Any

import peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Update = tuple[str, dict[str, Any]]


class Gathering:
    """Tasks that wait for futures that a thread sets: the minimum that ``asyncio`` needs."""

    def __init__(self, work: Callable[[list[Update]], list[dict[str, Any]]]) -> None:
        self.work = work
        self.waiting: list[tuple[Update, asyncio.Future[dict[str, Any]]]] = []
        self.batches: queue.SimpleQueue[asyncio.AbstractEventLoop | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    async def update(self, user_id: str, update: dict[str, Any]) -> dict[str, Any]:
        """Join the next batch."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append(((user_id, update), future))
        if len(self.waiting) == 1:
            self.batches.put(loop)
        merged: dict[str, Any] = await future
        return merged

    def run(self) -> None:
        """Execute the batches."""
        while (loop := self.batches.get()) is not None:
            calls, self.waiting = self.waiting, []
            results = self.work([update for update, _ in calls])
            loop.call_soon_threadsafe(self.answer, calls, results)

    def answer(self, calls: list[Any], results: list[dict[str, Any]]) -> None:
        """Wake the tasks."""
        for (_, future), result in zip(calls, results, strict=True):
            future.set_result(result)

    def close(self) -> None:
        """End the thread."""
        self.batches.put(None)
        self.thread.join()


def nothing(updates: list[Update]) -> list[dict[str, Any]]:
    """Return the updates."""
    return [update for _, update in updates]


class OnlyJSON:
    """Decodes, merges and encodes texts, and stores nothing."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.text = json.dumps(document)

    def work(self, updates: list[Update]) -> list[dict[str, Any]]:
        """Decode, merge and encode for each update."""
        results: list[dict[str, Any]] = []
        for _, update in updates:
            merged = peers.merge(json.loads(self.text), update)
            json.dumps(merged)
            results.append(merged)
        return results


class OneTransaction:
    """All updates in one transaction: one statement to read, one to write."""

    def __init__(self, folder: Path, synchronous: str, users: dict[str, Any]) -> None:
        self.peer = peers.Sqlite3(folder, synchronous)
        self.peer.fill(users)
        self.connection = self.peer.connection()

    def work(self, updates: list[Update]) -> list[dict[str, Any]]:
        """Read, merge and write."""
        users = json.dumps([user_id for user_id, _ in updates])
        self.connection.execute("BEGIN IMMEDIATE")
        texts = dict(self.connection.execute(peers.SELECT_MANY, (peers.APP, users)))
        results: list[dict[str, Any]] = []
        for user_id, update in updates:
            merged = peers.merge(json.loads(texts[user_id]), update)
            texts[user_id] = json.dumps(merged)
            results.append(merged)
        self.connection.executemany(
            peers.UPSERT, [(peers.APP, user_id, text) for user_id, text in texts.items()]
        )
        self.connection.execute("COMMIT")
        return results

    def close(self) -> None:
        """Close the connection."""
        self.peer.close()

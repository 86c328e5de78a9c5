"""The in-memory storage: what the suite of every storage cannot see."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import pytest

from usermetadata import InMemoryStorage, UsageError
from usermetadata.changes import Merge, Modify

if TYPE_CHECKING:
    from collections.abc import Generator

    from usermetadata.codec import Metadata


@pytest.fixture
def eager_threads() -> Generator[None, None, None]:
    """Let Python switch from thread to thread wherever it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_a_read_of_many_users_is_of_one_moment() -> None:
    """However the threads are switched, no write comes between the users of one read."""
    storage = InMemoryStorage()
    users = [f"user {n}" for n in range(200)]
    stop = threading.Event()

    def write(number: int = 0) -> None:
        while not stop.is_set():
            storage.write([(user, Merge({"n": number})) for user in users])
            number += 1

    storage.write([(user, Merge({"n": 0})) for user in users])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            found = storage.read(users).values()
            assert len({metadata["n"] for metadata in found}) == 1
    finally:
        stop.set()
        writer.join()


@pytest.mark.usefixtures("eager_threads")
def test_no_update_is_lost_however_the_threads_are_switched() -> None:
    """A write is one step, also if Python switches threads after each step."""
    storage = InMemoryStorage()

    def count(metadata: Metadata) -> Metadata:
        return {"n": metadata.get("n", 0) + 1}

    def work() -> None:
        for _ in range(200):
            storage.write([("alice", Modify(count))])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read(["alice"]) == {"alice": {"n": 800}}


def test_a_write_inside_a_write_is_refused() -> None:
    """A change that writes would lose its own write or the inner one; it may read."""
    storage = InMemoryStorage()
    storage.write([("alice", Merge({"n": 1}))])

    def change(metadata: Metadata) -> Metadata:
        with pytest.raises(UsageError, match="a write inside a write"):
            storage.write([("alice", Merge({"inner": True}))])
        assert storage.read(["alice"]) == {"alice": {"n": 1}}
        return {"n": 2}

    assert storage.write([("alice", Modify(change))]) == [{"n": 2}]
    assert storage.write([("alice", Merge({"after": True}))]) == [{"n": 2, "after": True}]

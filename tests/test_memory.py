"""The in-memory storage: what the suite of every storage cannot see."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from usermetadata import Index, InMemoryStorage, NotUniqueError, UsageError
from usermetadata.changes import Clear, Merge, Modify

if TYPE_CHECKING:
    from collections.abc import Generator

    from usermetadata.changes import Change
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


@pytest.mark.parametrize(
    "change", [Merge({"customer": 2, "plan": "free"}), Clear()], ids=["merge", "clear"]
)
def test_an_interrupted_write_leaves_every_user_findable(change: Change) -> None:
    """Wherever a write is interrupted, users are found by the values that are stored.

    Another user can have each unique value but the one that is stored.
    """
    left = 0

    def interrupt(_frame: object, event: str, _argument: object) -> None:
        nonlocal left
        left -= event == "c_return"
        if not left:
            sys.setprofile(None)
            raise KeyboardInterrupt

    for calls in range(1, 1000):
        storage = InMemoryStorage(indexes=[Index("customer", unique=True), Index("plan")])
        storage.write([("alice", Merge({"customer": 1, "plan": "pro"}))])
        storage.write([("bob", Merge({"plan": "pro"}))])
        left = calls
        before = sys.getprofile()
        sys.setprofile(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            storage.write([("alice", change)])
        sys.setprofile(before)
        rows = storage.read_after("", 9)
        assert storage.count(None) == len(rows)
        for plan in ("pro", "free"):
            having = {user: row for user, row in rows.items() if row.get("plan") == plan}
            assert storage.find({"plan": plan}, "", 9) == having
        value = rows.get("alice", {}).get("customer")
        for other in (1, 2):
            assert storage.count({"customer": other}) == (value == other)
            with pytest.raises(NotUniqueError) if value == other else contextlib.nullcontext():
                storage.write([("bob", Merge({"customer": other}))])
            storage.write([("bob", Clear())])
        if left > 0:
            return
    pytest.fail("the write did not end")

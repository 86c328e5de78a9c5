"""Threads that write to an SQLite file at once share a transaction, and nothing else."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from usermetadata import DamagedMetadataError, SQLiteStorage, StorageBusyError
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.storage.sqlite_sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from usermetadata.changes import Change
    from usermetadata.json import Metadata

THREADS = 8


def wait_for(sharing: Any, number: int) -> None:
    """Wait until so many calls have come: one that is being executed, and others behind it."""
    deadline = time.monotonic() + 60
    while not (sharing._leading_thread and len(sharing._waiting) == number - 1):
        assert time.monotonic() < deadline
        time.sleep(0)


class Contended:
    """A storage whose writers all wait for another connection, until that is told to go on."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.storage = SQLiteStorage(path, timeout=timeout)
        self.storage.write([("alice", Replace({})), ("zoe", Replace({"n": 1}))])
        self.other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.other.execute("BEGIN IMMEDIATE")
        self.commits = 0
        connections: Any = self.storage._connections  # pyright: ignore[reportPrivateUsage]
        self.sharing = connections._sharing
        connections._writers[0]._driver.set_trace_callback(self.trace)

    def trace(self, statement: str) -> None:
        """Count the commits of the storage's writer."""
        self.commits += statement == "COMMIT"

    def write_at_once(self, changes: list[tuple[str, Change]]) -> list[Future[Any]]:
        """Write each in a thread of its own; return when all wait, one of them for the file."""
        executor = ThreadPoolExecutor(len(changes))
        futures: list[Future[Any]] = []
        for change in changes:
            futures.append(executor.submit(self.storage.write, [change]))
            wait_for(self.sharing, len(futures))
        executor.shutdown(wait=False)
        return futures

    def go_on(self) -> None:
        """Let the writers write."""
        self.other.execute("COMMIT")


@pytest.fixture
def contended(database: Path) -> Generator[Contended, None, None]:
    """Give a storage that another connection keeps waiting."""
    contended = Contended(database, timeout=30)
    yield contended
    contended.other.close()
    contended.storage.close()


def test_what_gathers_is_one_transaction(contended: Contended) -> None:
    """The first writes its own; all that have come meanwhile share the next commit."""
    futures = contended.write_at_once([("alice", Merge({str(n): n})) for n in range(THREADS)])
    contended.go_on()
    for number, future in enumerate(futures):
        [metadata] = future.result(60)
        assert metadata[str(number)] == number
    assert contended.commits == 2
    assert len(contended.storage.read(["alice"])["alice"]) == THREADS


def test_a_failing_write_fails_alone(contended: Contended) -> None:
    """The others of its transaction are stored, and it gets its own error in its own thread."""
    contended.other.execute("UPDATE user_metadata SET user_metadata = '[' WHERE user_id = 'zoe'")
    changes: list[tuple[str, Change]] = [("alice", Merge({str(n): n})) for n in range(THREADS)]
    changes[5:5] = [("zoe", Merge({"n": 2}))]
    futures = contended.write_at_once(changes)
    contended.go_on()
    with pytest.raises(DamagedMetadataError, match="zoe"):
        futures.pop(5).result(60)
    for future in futures:
        future.result(60)
    assert len(contended.storage.read(["alice"])["alice"]) == THREADS


def test_clear_and_replace_take_part(contended: Contended) -> None:
    """Their results are those they have alone."""
    futures = contended.write_at_once(
        [("alice", Merge({"a": 1})), ("zoe", Clear()), ("bob", Replace({"b": 1, "c": None}))]
    )
    contended.go_on()
    assert [future.result(60) for future in futures] == [[{"a": 1}], [None], [{"b": 1}]]
    assert contended.commits == 2


def test_a_function_is_called_in_its_callers_thread(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``modify`` was given may use what is bound to its thread: it is not shared."""

    def refuse(self: object, argument: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Sharing, "call", refuse)
    storage = SQLiteStorage(database)
    threads: list[int] = []

    def function(metadata: Metadata) -> Metadata:
        threads.append(threading.get_ident())
        return metadata

    with contextlib.closing(storage):
        storage.write([("alice", Modify(function))])
    assert threads == [threading.get_ident()]


def test_who_waits_too_long_has_written_nothing(database: Path) -> None:
    """All that wait for a file that stays locked learn of it, and may repeat the call later."""
    contended = Contended(database, timeout=0.2)
    with contextlib.closing(contended.other), contextlib.closing(contended.storage):
        executor = ThreadPoolExecutor(THREADS)
        futures = [
            executor.submit(contended.storage.write, [("alice", Merge({str(n): n}))])
            for n in range(THREADS)
        ]
        for future in futures:
            with pytest.raises(StorageBusyError):
                future.result(60)
        executor.shutdown()
        contended.go_on()
        assert contended.storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]


class Gated:
    """Executes batches of calls when permitted, and notes them; a batch with odd numbers fails."""

    def __init__(self, error: type[Exception], timeout: float) -> None:
        self.error = error
        self.sharing: Any = Sharing(self.execute, timeout, StorageBusyError)
        self.batches: list[list[int]] = []
        self.permits = threading.Semaphore(0)
        self.executor = ThreadPoolExecutor(THREADS)

    def execute(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers."""
        self.batches.append(list(numbers))
        assert self.permits.acquire(timeout=60)
        if any(number % 2 for number in numbers):
            raise self.error
        return list(numbers)

    def call(self, *numbers: int) -> list[Future[int]]:
        """Call in threads of their own; return when all wait, the first one for its permit."""
        futures: list[Future[int]] = []
        for number in numbers:
            futures.append(self.executor.submit(self.sharing.call, number))
            wait_for(self.sharing, len(futures))
        return futures


def test_each_gets_its_own_error() -> None:
    """What fails together is executed by each thread by itself."""
    gated = Gated(LookupError, timeout=60)
    futures = gated.call(0, 1, 2, 3)
    gated.permits.release(9)
    errors = [future.exception(60) for future in futures]
    assert [type(error) for error in errors] == [type(None), LookupError, type(None), LookupError]
    assert gated.batches[:2] == [[0], [1, 2, 3]]
    assert sorted(gated.batches[2:]) == [[1], [2], [3]]


def test_a_busy_storage_is_waited_for_once() -> None:
    """All calls of a batch learn of it at once, instead of each waiting for the timeout again."""
    gated = Gated(StorageBusyError, timeout=60)
    futures = gated.call(0, 1, 2, 3)
    gated.permits.release(9)
    errors = [future.exception(60) for future in futures]
    assert [type(error) for error in errors[1:]] == [StorageBusyError] * 3
    assert gated.batches == [[0], [1, 2, 3]]


class Yielding:
    """A lock that gives other threads every chance to take it when it is released."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.acquire = self.lock.acquire

    def release(self) -> None:
        """Release the lock, and let other threads run."""
        self.lock.release()
        for _ in range(1000):
            time.sleep(0)


def test_what_is_being_executed_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has waited for too long while it is being executed gets that result."""
    waited_too_long = threading.Semaphore(0)

    class Clock:
        def monotonic(self) -> float:
            if len(gated.batches) < 2:
                return 0
            waited_too_long.release()
            return 61

    gated = Gated(LookupError, timeout=60)
    gated.sharing._leadership = Yielding()
    monkeypatch.setattr("usermetadata.storage.sqlite_sharing.time", Clock())
    futures = gated.call(0, 2, 4)
    gated.permits.release()
    for _ in range(3):
        assert waited_too_long.acquire(timeout=60)
    gated.permits.release(9)
    assert [future.result(60) for future in futures] == [0, 2, 4]
    assert gated.batches == [[0], [2, 4]]

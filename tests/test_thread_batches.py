"""Threads that write to an SQLite file at once share a transaction."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from conftest import small_files

from usermetadata import (
    DamagedMetadataError,
    OutcomeUnknownError,
    SQLiteStorage,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from usermetadata._core.batching import ThreadBatches
from usermetadata.changes import Clear, Merge, Modify, Replace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

THREADS = 8


class Threads:
    """Calls that wait in a queue, each in a separate thread."""

    def __init__(self, is_executing: Callable[[str], bool]) -> None:
        self._is_executing = is_executing
        self.executor = ThreadPoolExecutor(THREADS + 1)
        self.futures: list[Future[Any]] = []

    def start(self, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Call the function in a thread; return when the call is executed or waits."""
        started: list[int] = []

        def work() -> Any:
            started.append(threading.get_ident())
            return function(*arguments)

        self.futures.append(self.executor.submit(work))
        deadline = time.monotonic() + 60
        while not started:
            assert time.monotonic() < deadline
            time.sleep(0)
        self.wait_for(started[0])
        return self.futures[-1]

    def wait_for(self, thread: int) -> None:
        """Return when the call of that thread is executed or waits."""
        deadline = time.monotonic() + 60
        while not self._has_stopped(thread):
            assert time.monotonic() < deadline
            time.sleep(0)

    def _has_stopped(self, thread: int) -> bool:
        """Tell whether the thread sleeps until another wakes it, or executes a batch."""
        frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
        name = "" if frame is None else frame.f_code.co_name
        return name == "sleep" or self._is_executing(name)


class Contended:
    """A storage whose writers wait for another connection until ``go_on``."""

    def __init__(self, path: Path, timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
        connect = sqlite3.connect
        self.commits = 0

        def connect_traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, **options)
            connection.set_trace_callback(self.trace)
            return connection

        self.storage = SQLiteStorage(path, timeout=timeout)
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", connect_traced)
            self.storage.write([("alice", Replace({})), ("zoe", Replace({"n": 1}))])
        self.other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.other.execute("BEGIN IMMEDIATE")
        self.commits = 0
        self.threads = Threads(lambda name: name == "write_together")

    def trace(self, statement: str) -> None:
        """Count the commits of the storage's writer."""
        self.commits += statement == "COMMIT"

    def write_at_once(self, changes: list[tuple[str, Change]]) -> list[Future[Any]]:
        """Write each in a thread; return when all wait, one of them for the file."""
        return [self.threads.start(self.storage.write, [change]) for change in changes]

    def go_on(self) -> None:
        """Let the writers write."""
        self.other.execute("COMMIT")


@pytest.fixture
def contended(database: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Contended, None, None]:
    """Yield a storage that waits for another connection."""
    contended = Contended(database, 30, monkeypatch)
    yield contended
    contended.other.close()
    contended.storage.close()


def test_calls_that_wait_share_a_transaction(contended: Contended) -> None:
    """The first call writes alone; all that arrive meanwhile share the next commit."""
    futures = contended.write_at_once([("alice", Merge({str(n): n})) for n in range(THREADS)])
    contended.go_on()
    for number, future in enumerate(futures):
        [metadata] = future.result(60)
        assert metadata[str(number)] == number
    assert contended.commits == 2
    assert len(contended.storage.read(["alice"])["alice"]) == THREADS


def test_apps_share_a_transaction(contended: Contended) -> None:
    """Calls for several apps are written together, each to its own app's rows."""
    shop = contended.storage.for_app("shop")
    futures = contended.write_at_once([("alice", Merge({"n": 0})), ("alice", Merge({"n": 1}))])
    futures.append(contended.threads.start(shop.write, [("alice", Merge({"shop": 1}))]))
    contended.go_on()
    results = [{"n": 0}], [{"n": 1}], [{"shop": 1}]
    assert tuple(future.result(60) for future in futures) == results
    assert contended.commits == 2
    assert contended.storage.read(["alice"]) == {"alice": {"n": 1}}
    assert shop.read(["alice"]) == {"alice": {"shop": 1}}


def test_a_failing_write_fails_alone(contended: Contended) -> None:
    """The other writes of its transaction are stored; it raises in its own thread."""
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
    """Clear and replace have the same results in a batch as alone."""
    futures = contended.write_at_once(
        [("alice", Merge({"a": 1})), ("zoe", Clear()), ("bob", Replace({"b": 1, "c": None}))]
    )
    contended.go_on()
    assert [future.result(60) for future in futures] == [[{"a": 1}], [None], [{"b": 1}]]
    assert contended.commits == 2


def test_a_function_is_called_in_its_callers_thread(contended: Contended) -> None:
    """A function given to ``modify`` runs in its caller's thread, also beside batches."""
    called_in: dict[int, int] = {}

    def modify(number: int) -> None:
        def function(metadata: Metadata) -> Metadata:
            called_in[number] = threading.get_ident()
            return {**metadata, str(number): threading.get_ident()}

        caller[number] = threading.get_ident()
        contended.storage.write([("alice", Modify(function))])

    caller: dict[int, int] = {}
    contended.write_at_once([("alice", Merge({"n": 1}))])
    with ThreadPoolExecutor(THREADS) as executor:
        futures = [executor.submit(modify, number) for number in range(THREADS)]
        contended.go_on()
        for future in futures:
            future.result(60)
    assert called_in == caller
    assert len(contended.storage.read(["alice"])["alice"]) == THREADS + 1


def test_a_call_that_waits_too_long_has_written_nothing(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls that wait for a locked file raise an error, and can be repeated later."""
    contended = Contended(database, 0.2, monkeypatch)
    with contextlib.closing(contended.other), contextlib.closing(contended.storage):
        with ThreadPoolExecutor(THREADS) as executor:
            futures = [
                executor.submit(contended.storage.write, [("alice", Merge({str(n): n}))])
                for n in range(THREADS)
            ]
            for future in futures:
                with pytest.raises(StorageBusyError):
                    future.result(60)
        contended.go_on()
        assert contended.storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]


def test_a_commit_that_the_disk_refuses_is_taken_apart(contended: Contended) -> None:
    """Nothing of a shared commit that is refused was written, so only the call at fault fails."""
    first = contended.threads.start(contended.storage.write, [("first", Merge({"n": 1}))])
    sizes = (1, 1, 300_000, 1)
    shared = contended.write_at_once(
        [(f"user {n}", Merge({"x": "x" * size})) for n, size in enumerate(sizes)]
    )
    with small_files(150_000):
        contended.go_on()
        assert first.result(60) == [{"n": 1}]
        errors = [future.exception(60) for future in shared]
    assert [type(error) for error in errors] == [type(None), type(None), StorageError, type(None)]
    stored = contended.storage.read([f"user {n}" for n in range(4)])
    assert stored == {f"user {n}": {"x": "x"} for n in (0, 1, 3)}


class Gated:
    """Executes and records batches when permitted; a batch with odd numbers fails."""

    def __init__(self, error: BaseException | None, timeout: float) -> None:
        self.error = error
        self.batches: list[list[int]] = []
        self.permits = threading.Semaphore(0)
        self.calls = ThreadBatches(self.execute, timeout, "the test")
        self.threads = Threads(lambda name: name in {"acquire", "wait"})

    def execute(self, numbers: list[int]) -> list[int]:
        """Return the numbers."""
        self.batches.append(list(numbers))
        assert self.permits.acquire(timeout=60)
        if self.error is not None and any(number % 2 for number in numbers):
            raise self.error
        return numbers

    def call(self, *numbers: int) -> list[Future[int]]:
        """Call in threads; return when all wait, the first one for its permit."""
        return [self.threads.start(self.calls.call, number) for number in numbers]


def test_a_batch_that_fails_is_taken_apart() -> None:
    """After a batch fails, each call is executed alone, and gets its own result or error."""
    gated = Gated(LookupError(), timeout=60)
    futures = gated.call(0, 1, 2, 3)
    gated.permits.release(9)
    errors = [future.exception(60) for future in futures]
    assert [type(error) for error in errors] == [type(None), LookupError, type(None), LookupError]
    assert gated.batches == [[0], [1, 2, 3], [1], [2], [3]]


@pytest.mark.parametrize(
    "error",
    [
        StorageBusyError("busy"),
        StorageUnavailableError("gone"),
        OutcomeUnknownError("in doubt"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_some_errors_are_shared(error: Exception) -> None:
    """After these errors no call is repeated: it would wait again, or be done twice."""
    gated = Gated(error, timeout=60)
    futures = gated.call(0, 1, 2, 3)
    gated.permits.release(9)
    assert [future.exception(60) for future in futures[1:]] == [error] * 3
    assert gated.batches == [[0], [1, 2, 3]]


def test_an_interrupt_is_for_the_thread_that_executes() -> None:
    """The other calls of its batch are executed by their own threads."""
    gated = Gated(KeyboardInterrupt(), timeout=60)
    futures = gated.call(0, 1, 2, 4)
    gated.permits.release(9)
    assert isinstance(futures[1].exception(60), KeyboardInterrupt)
    assert [future.result(60) for future in (futures[0], *futures[2:])] == [0, 2, 4]
    assert gated.batches[:2] == [[0], [1, 2, 4]]


class Interrupted(BaseException):
    """What a signal handler raises."""


def test_a_call_that_was_interrupted_is_not_executed_later() -> None:
    """A call that an interrupt takes from its queue is undone for good, and the others continue."""
    gated = Gated(None, timeout=60)
    first = gated.call(0)
    main = threading.get_ident()

    def interrupt() -> None:
        Threads(lambda _: False).wait_for(main)
        signal.pthread_kill(main, signal.SIGUSR1)

    def handler(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(Interrupted):
            gated.calls.call(2)
        interrupter.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    later = gated.call(4)
    gated.permits.release(9)
    assert [future.result(60) for future in first + later] == [0, 4]
    assert gated.batches == [[0], [4]]


def test_who_waits_is_woken_and_does_not_look_now_and_then() -> None:
    """When a batch is done its calls return at once, and one of those that wait begins."""
    begin = time.monotonic()
    for _ in range(20):
        gated = Gated(None, timeout=60)
        futures = gated.call(0, 2, 4)
        gated.permits.release(9)
        assert [future.result(60) for future in futures] == [0, 2, 4]
        gated.threads.executor.shutdown()
    assert time.monotonic() - begin < 5


def test_a_call_that_must_be_alone_is_in_no_batch() -> None:
    """Neither with calls that wait, nor executed by another thread; it takes its turn with them."""
    for _ in range(10):
        gated = Gated(None, timeout=60)
        futures = gated.call(0, 2, 4)
        futures.append(gated.threads.start(partial(gated.calls.call, 6, alone=True)))
        gated.permits.release(9)
        assert [future.result(60) for future in futures] == [0, 2, 4, 6]
        assert [0] in gated.batches
        assert [6] in gated.batches
        gated.threads.executor.shutdown()


def test_a_call_that_must_be_alone_waits_no_longer_than_the_timeout() -> None:
    """A function that had no turn in time is not called, not even by another thread."""
    gated = Gated(None, timeout=0.1)
    first = gated.call(0)
    with pytest.raises(StorageBusyError):
        gated.calls.call(2, alone=True)
    gated.permits.release(9)
    assert first[0].result(60) == 0
    assert gated.calls.call(4) == 4
    assert gated.batches == [[0], [4]]


def test_a_call_inside_a_batch_is_refused() -> None:
    """A call from the thread that is executing a batch is refused."""

    def execute(numbers: list[int]) -> list[int]:
        with pytest.raises(UsageError, match="a write inside a write"):
            calls.call(1)
        return numbers

    calls = ThreadBatches(execute, 60, "the test")
    assert calls.call(0) == 0


def test_a_call_that_is_being_executed_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose timeout ends during its execution gets its result, and is done once."""
    waited_too_long = threading.Semaphore(0)

    class Clock:
        def monotonic(self) -> float:
            if len(gated.batches) < 2:
                return 0
            waited_too_long.release()
            return 61

    gated = Gated(None, timeout=60)
    monkeypatch.setattr("usermetadata._core.batching.time", Clock())
    futures = gated.call(0, 2, 4)
    gated.permits.release()
    for _ in range(3):
        assert waited_too_long.acquire(timeout=60)
    gated.permits.release(9)
    assert [future.result(60) for future in futures] == [0, 2, 4]
    assert gated.batches == [[0], [2, 4]]

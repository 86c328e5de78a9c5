"""Concurrent ``asyncio`` calls share calls of the storage."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import usermetadata
from usermetadata import (
    InMemoryStorage,
    InvalidInputError,
    OutcomeUnknownError,
    SQLiteStorage,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UserMetadataRecipe,
    syncio,
)
from usermetadata.asyncio import (
    get_bulk_user_metadata,
    get_user_metadata,
    modify_user_metadata,
    update_bulk_user_metadata,
    update_user_metadata,
)
from usermetadata.changes import Merge

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from pathlib import Path

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


class Gated(InMemoryStorage):
    """Records the size of each batch, and blocks batches until it is opened."""

    reads_in_flight = writes_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []
        self.writes: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        self.reads.append(len(user_ids))
        self._pass()
        return super().read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self.writes.append(len(changes))
        self._pass()
        return super().write(changes)

    def _pass(self) -> None:
        self.entered.set()
        assert self.open.wait(60)


@pytest.fixture
def storage() -> Gated:
    """Initialise with a storage that can be blocked."""
    storage = Gated()
    usermetadata.init(storage)
    return storage


async def behind_another(storage: Gated, *calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """Let the calls gather while a first write and a first read are blocked."""
    storage.open.clear()
    storage.entered.clear()
    first = [asyncio.create_task(update_user_metadata("first", {}))]
    await entered(storage)
    storage.entered.clear()
    first.append(asyncio.create_task(get_user_metadata("first")))
    await entered(storage)
    tasks = [asyncio.create_task(call) for call in calls]
    for _ in range(3):
        await asyncio.sleep(0)
    storage.open.set()
    await asyncio.gather(*first, return_exceptions=True)
    return await asyncio.gather(*tasks, return_exceptions=True)


async def entered(storage: Gated) -> None:
    """Wait until a batch has reached the storage."""
    while not storage.entered.is_set():
        await asyncio.sleep(0)


def fail(metadata: Metadata) -> Metadata:
    """Refuse every change."""
    raise LookupError


def test_a_lone_call_goes_at_once(storage: Gated) -> None:
    """A lone call is a batch of one."""

    async def main() -> None:
        await update_user_metadata("alice", {"n": 1})
        assert (await get_user_metadata("alice")).metadata == {"n": 1}

    asyncio.run(main())
    assert (storage.writes, storage.reads) == ([1], [1])


def test_what_gathers_behind_a_batch_is_one_batch(storage: Gated) -> None:
    """All updates that arrive while one is running share the next write, and so do reads."""

    async def main() -> None:
        updates = (update_user_metadata(f"user {n % 40}", {str(n): n}) for n in range(64))
        reads = (get_user_metadata("first") for _ in range(64))
        results = await behind_another(storage, *updates, *reads)
        assert [result.metadata[str(n)] for n, result in enumerate(results[:64])] == [*range(64)]
        assert [result.metadata for result in results[64:]] == [{}] * 64

    asyncio.run(main())
    assert (storage.writes, storage.reads) == ([1, 64], [1, 1])


def test_who_reads_the_same_user_gets_an_object_of_its_own(storage: Gated) -> None:
    """Each caller of a batch gets its own copy."""
    storage.write([("alice", Merge({"list": [1]}))])

    async def main() -> None:
        results = await behind_another(
            storage,
            get_user_metadata("alice"),
            get_user_metadata("alice"),
            get_bulk_user_metadata(["bob", "alice"]),
        )
        results[0].metadata["list"].append(2)
        assert results[1].metadata == {"list": [1]}
        results[1].metadata["list"].append(3)
        assert results[2]["alice"].metadata == {"list": [1]}
        assert results[2]["bob"].metadata == {}

    asyncio.run(main())


def test_order_is_kept(storage: Gated) -> None:
    """Updates of one user take effect in the order of the calls."""

    async def main() -> None:
        results = await behind_another(
            storage, *(update_user_metadata("alice", {"n": n}) for n in range(20))
        )
        assert [result.metadata["n"] for result in results] == [*range(20)]

    asyncio.run(main())
    assert storage.read(["alice"]) == {"alice": {"n": 19}}


def test_a_failing_call_fails_alone(storage: Gated) -> None:
    """The other calls of its batch succeed, each once."""

    async def main() -> None:
        count = [
            modify_user_metadata("alice", lambda old: {"n": old.get("n", 0) + 1}) for _ in range(5)
        ]
        results = await behind_another(
            storage, *count[:2], modify_user_metadata("alice", fail), *count[2:]
        )
        assert isinstance(results.pop(2), LookupError)
        assert [result.metadata["n"] for result in results] == [1, 2, 3, 4, 5]

    asyncio.run(main())


@pytest.mark.parametrize("kind", [StorageBusyError, StorageUnavailableError, OutcomeUnknownError])
def test_a_function_fails_alone_whatever_it_raises(
    storage: Gated, kind: type[StorageError]
) -> None:
    """An error of another storage, raised by a function, is that call's alone; it is unchanged."""
    error = kind("of another storage")

    def use_another_storage(metadata: Metadata) -> Metadata:
        raise error

    async def main() -> None:
        updates = [update_user_metadata("alice", {str(n): n}) for n in range(10)]
        results = await behind_another(
            storage, *updates[:5], modify_user_metadata("bob", use_another_storage), *updates[5:]
        )
        assert results.pop(5) is error
        assert [result.metadata[str(n)] for n, result in enumerate(results)] == [*range(10)]

    asyncio.run(main())
    assert storage.writes == [1, 11] + [1] * 11


class Interrupted(BaseException):
    """What is no ``Exception``, as the time limits of some task queues."""


def test_an_interrupted_call_fails_alone(storage: Gated) -> None:
    """What interrupts one function is raised by its own call; the others of its batch succeed."""

    def interrupt(metadata: Metadata) -> Metadata:
        raise Interrupted

    async def main() -> None:
        async with asyncio.timeout(60):
            results = await behind_another(
                storage,
                update_user_metadata("alice", {"a": 1}),
                modify_user_metadata("alice", interrupt),
                update_user_metadata("alice", {"b": 1}),
            )
            assert isinstance(results.pop(1), Interrupted)
            assert [result.metadata for result in results] == [{"a": 1}, {"a": 1, "b": 1}]
            assert (await get_user_metadata("alice")).metadata == {"a": 1, "b": 1}

    asyncio.run(main())


def test_bad_input_never_joins_a_batch(storage: Gated) -> None:
    """It raises before the storage is called."""

    async def main() -> None:
        with pytest.raises(InvalidInputError):
            await update_user_metadata("alice", {"a": float("nan")})

    asyncio.run(main())
    assert storage.writes == []


def test_a_busy_storage_is_waited_for_once(storage: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls of a batch get the error at once; none waits for the timeout again."""
    cause = OSError("locked")

    def busy(self: object, changes: object) -> list[Metadata | None]:
        raise StorageBusyError("busy") from cause

    async def main() -> None:
        monkeypatch.setattr(InMemoryStorage, "write", busy)
        updates = (update_user_metadata("alice", {"n": n}) for n in range(5))
        errors = await behind_another(storage, *updates)
        assert [type(error) for error in errors] == [StorageBusyError] * 5
        assert all(error.__cause__ is cause for error in errors)

    asyncio.run(main())
    assert storage.writes == [1, 5]


def test_a_storage_may_have_errors_of_its_own(
    storage: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls of a batch get an error of any class, and later calls work."""

    class TooBusyError(StorageBusyError):
        def __init__(self, table: str, seconds: float) -> None:
            super().__init__(f"{table}: busy for {seconds} s")

    def busy(self: object, changes: object) -> list[Metadata | None]:
        raise TooBusyError("users", 1.5)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(InMemoryStorage, "write", busy)
            updates = (update_user_metadata("alice", {"n": n}) for n in range(5))
            errors = await behind_another(storage, *updates)
        assert [str(error) for error in errors] == ["users: busy for 1.5 s"] * 5
        assert (await update_user_metadata("alice", {"n": 1})).metadata == {"n": 1}

    asyncio.run(main())


def test_cancelling_one_caller_leaves_the_rest(storage: Gated) -> None:
    """A call that is cancelled while it waits is not executed; the others of its batch are."""

    async def main() -> None:
        storage.open.clear()
        running = asyncio.create_task(update_user_metadata("running", {"n": 1}))
        await entered(storage)
        waiting = [asyncio.create_task(update_user_metadata(f"u{n}", {"n": n})) for n in range(4)]
        await asyncio.sleep(0)
        running.cancel()
        waiting[1].cancel()
        await asyncio.sleep(0)
        storage.open.set()
        results: list[Any] = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results.pop(1), asyncio.CancelledError)
        assert [result.metadata["n"] for result in results] == [0, 2, 3]

    asyncio.run(main())
    assert storage.writes == [1, 3]
    assert "u1" not in storage.read(["u1"])


def test_loops_in_threads_share_batches(storage: Gated) -> None:
    """Calls from several event loops join the same batch, and each loop gets its own results."""
    storage.open.clear()
    called = threading.Barrier(5)
    results: list[int] = []

    def work(number: int) -> None:
        async def main() -> None:
            task = asyncio.create_task(update_user_metadata("alice", {str(number): number}))
            await asyncio.sleep(0)
            called.wait(60)
            results.append((await task).metadata[str(number)])

        asyncio.run(main())

    async def first() -> None:
        task = asyncio.create_task(update_user_metadata("alice", {}))
        await entered(storage)
        threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(called.wait, 60)
        storage.open.set()
        await task
        for thread in threads:
            thread.join()

    asyncio.run(first())
    assert sorted(results) == [0, 1, 2, 3]
    assert storage.writes == [1, 4]


def test_a_loop_that_is_closed_is_not_missed(storage: Gated) -> None:
    """A batch whose callers' loop is closed ends without a warning; the next call works."""

    async def leave() -> None:
        asyncio.get_running_loop().create_task(update_user_metadata("alice", {"n": 1}))
        await entered(storage)

    storage.open.clear()
    asyncio.run(leave())
    storage.open.set()

    async def later() -> None:
        async with asyncio.timeout(60):
            assert (await update_user_metadata("alice", {"m": 1})).metadata["m"] == 1

    asyncio.run(later())


def test_reset_leaves_no_thread(storage: Gated) -> None:
    """``reset`` completes the calls under way and ends the worker threads."""
    before = set(threading.enumerate())

    async def main() -> None:
        await get_user_metadata("a")
        updates = [asyncio.create_task(update_user_metadata("a", {str(n): n})) for n in range(9)]
        await asyncio.sleep(0)
        recipe = UserMetadataRecipe.get_instance()
        UserMetadataRecipe.reset()
        assert set(threading.enumerate()) <= before
        assert recipe.storage is storage  # which the program may keep
        for task in updates:
            await task

    asyncio.run(main())
    assert len(storage.read(["a"])["a"]) == 9


def test_the_storage_says_how_many_batches_run_at_a_time() -> None:
    """With ``reads_in_flight = 2`` two batches of reads run at a time, and a third waits."""
    arrived = threading.Semaphore(0)
    go_on = threading.Event()

    class TwoReads(InMemoryStorage):
        reads_in_flight = 2

        def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
            arrived.release()
            assert go_on.wait(60)
            return super().read(user_ids)

    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []
        for _ in range(2):
            tasks.append(asyncio.create_task(get_user_metadata("alice")))
            assert await asyncio.to_thread(arrived.acquire, timeout=60)
        tasks += [asyncio.create_task(get_user_metadata("alice")) for _ in range(5)]
        await asyncio.sleep(0)
        assert not await asyncio.to_thread(arrived.acquire, timeout=0.1)
        go_on.set()
        await asyncio.gather(*tasks)

    usermetadata.init(TwoReads())
    asyncio.run(main())


def test_a_dropped_recipe_leaves_no_thread(database: Path) -> None:
    """Without ``reset``, the worker threads end when the recipe is dropped."""
    before = set(threading.enumerate())
    with contextlib.closing(SQLiteStorage(database)) as storage:
        recipe = UserMetadataRecipe(storage)
        asyncio.run(write_once(recipe))
        threads = set(threading.enumerate()) - before
        assert threads
        del recipe
        gc.collect()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


async def write_once(recipe: UserMetadataRecipe) -> None:
    """Update one user."""
    await recipe.recipe_implementation.update_user_metadata("alice", {"n": 1}, {})


def test_an_unknown_outcome_is_not_repeated(storage: Gated) -> None:
    """After ``OutcomeUnknownError`` no call of the batch is executed again."""

    def lost(self: object, changes: object) -> list[Metadata | None]:
        raise OutcomeUnknownError("the connection was lost")

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InMemoryStorage, "write", lost)
            updates = (update_user_metadata("alice", {"n": n}) for n in range(5))
            errors = await behind_another(storage, *updates)
        assert [type(error) for error in errors] == [OutcomeUnknownError] * 5

    asyncio.run(main())
    assert storage.writes == [1, 5]


def test_memory_needs_no_thread() -> None:
    """A storage that never waits is called on the event loop's thread."""
    usermetadata.init("memory://")
    before = set(threading.enumerate())

    async def main() -> None:
        await asyncio.gather(*(update_user_metadata("alice", {str(n): n}) for n in range(64)))
        assert set(threading.enumerate()) == before

    asyncio.run(main())


def test_stop_iteration_does_not_hang(storage: Gated) -> None:
    """``asyncio`` raises ``RuntimeError`` for it; ``syncio`` raises it unchanged."""

    def stop(metadata: Metadata) -> Metadata:
        raise StopIteration

    async def main() -> None:
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await modify_user_metadata("alice", stop)
        assert isinstance(caught.value.__cause__, StopIteration)

    asyncio.run(main())
    with pytest.raises(StopIteration):
        syncio.modify_user_metadata("alice", stop)


def test_stop_iteration_of_a_storage_does_not_hang(
    storage: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds if the storage raises it, for example from a bare ``next``."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await get_user_metadata("alice")
        assert isinstance(caught.value.__cause__, StopIteration)

    monkeypatch.setattr(InMemoryStorage, "read", lambda self, user_ids: next(iter(())))
    asyncio.run(main())


def test_concurrent_updates_share_commits(database: Path) -> None:
    """64 tasks on an SQLite file take at most 0.05 commits per update."""
    commits: list[int] = []

    class Counting(SQLiteStorage):
        def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
            commits.append(len(changes))
            return super().write(changes)

    async def work(task: int) -> None:
        for number in range(20):
            await update_user_metadata(f"user {task}", {"n": number})

    async def main() -> None:
        await asyncio.gather(*map(work, range(64)))

    with contextlib.closing(Counting(database)) as storage:
        usermetadata.init(storage)
        asyncio.run(main())
        assert sum(commits) == 64 * 20
        assert len(commits) <= 0.05 * 64 * 20
        UserMetadataRecipe.reset()


@pytest.mark.parametrize("ending", ["return", "os.fork", "close"])
def test_the_interpreter_ends_quietly(database: Path, ending: str) -> None:
    """Exit during calls, a forked child and a closed storage cause no warning."""
    program = """
import asyncio, os, sys
import usermetadata
from usermetadata.asyncio import update_user_metadata

async def main(name):
    asyncio.get_running_loop().slow_callback_duration = 60  # -X dev reports 0.1 s
    updates = [update_user_metadata("alice", {f"{name} {n}": n}) for n in range(9)]
    tasks = [asyncio.create_task(update) for update in updates]
    await tasks[0]
    if sys.argv[2] == "close":
        await asyncio.gather(*tasks)
        usermetadata.UserMetadataRecipe.get_instance().storage.close()

usermetadata.init(sys.argv[1])
asyncio.run(main("parent"))
if sys.argv[2] == "os.fork":
    child = os.fork()
    asyncio.run(main("both"))
    if child:
        assert os.waitpid(child, 0)[1] == 0
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, str(database), ending]
    if ending == "os.fork":
        command[4] = "ignore::DeprecationWarning"
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")


class ForgetsResults(Gated):
    """Returns one result, whatever it was given."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write(changes)[:1]


def test_a_storage_that_returns_too_few_results_is_reported() -> None:
    """Nothing is acknowledged if the storage did not answer it."""
    usermetadata.init(ForgetsResults())
    updates = {"alice": {"n": 1}, "bob": {"n": 2}}
    with pytest.raises(StorageError, match=r"ForgetsResults\.write: 1 results for 2 changes"):
        asyncio.run(update_bulk_user_metadata(updates))

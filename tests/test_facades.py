"""The functions, through both facades."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
import re
import subprocess
import sys
import threading
from textwrap import indent
from typing import TYPE_CHECKING, Any

import pytest
import trio
from conftest import FUNCTIONS, PATCH_ALL, STORAGES
from postgres_server import server_url, with_parameters

import usermetadata
import usermetadata.asyncio
from usermetadata import InvalidInputError, StorageBusyError, UsageError, syncio
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult

if TYPE_CHECKING:
    from pathlib import Path

    from usermetadata import Storage
    from usermetadata.codec import Metadata

aio = usermetadata.asyncio


@pytest.fixture(autouse=True)
def initialised(storage: Storage) -> None:
    """Run every test on every storage."""
    usermetadata.init(storage)


# The SDK's behaviour


def test_the_sdks_own_test(facade: Any) -> None:
    """The SDK's first test: unknown user, non-ASCII text, root and nested null, clear."""
    metadata: dict[str, Any] = {
        "role": "ädmin äÆ \ufdfd",
        "name": {"first": "John", "last": "Doe"},
    }
    assert facade.get_user_metadata("userId").metadata == {}
    assert facade.update_user_metadata("userId", metadata).metadata == metadata
    assert facade.get_user_metadata("userId").metadata == metadata

    metadata["role"] = None
    metadata["name"]["first"] = None
    updated = facade.update_user_metadata("userId", metadata).metadata
    metadata.pop("role")
    assert updated == metadata
    assert facade.get_user_metadata("userId").metadata == metadata

    assert isinstance(facade.clear_user_metadata("userId"), ClearUserMetadataResult)
    assert facade.get_user_metadata("userId").metadata == {}


def test_the_sdks_shallow_merge(facade: Any) -> None:
    """The SDK's second test: nested objects are replaced, their nulls kept."""
    original = {"updated": {"a": "becomes null", "b": "is removed"}, "cleared": "is not there"}
    update = {"updated": {"a": None, "c": 123}, "cleared": None, "new": "appears"}
    expected = {"updated": {"a": None, "c": 123}, "new": "appears"}
    facade.update_user_metadata("userId", original)
    assert facade.update_user_metadata("userId", update).metadata == expected
    assert facade.get_user_metadata("userId").metadata == expected


def test_an_empty_update_wipes_nothing(facade: Any) -> None:
    """``update({})`` creates a row if there is none, and leaves an existing row unchanged."""
    assert facade.update_user_metadata("alice", {}).metadata == {}
    facade.update_user_metadata("alice", {"n": 1})
    assert facade.update_user_metadata("alice", {}).metadata == {"n": 1}


def test_the_parameters_have_the_sdks_names(facade: Any) -> None:
    """Programs may pass every argument by name."""
    facade.update_user_metadata(user_id="alice", metadata_update={"n": 1}, user_context={})
    result = facade.get_user_metadata(user_id="alice", user_context=None)
    assert isinstance(result, MetadataResult)
    assert result.metadata == {"n": 1}
    facade.clear_user_metadata(user_id="alice", user_context={"any": "thing"})


# Beyond the SDK


def test_set_replaces_everything(facade: Any) -> None:
    """``set`` replaces the old metadata, and leaves out root-level nulls."""
    facade.update_user_metadata("alice", {"a": 1, "b": 2})
    assert facade.set_user_metadata("alice", {"b": 3, "c": None}).metadata == {"b": 3}
    assert facade.get_user_metadata("alice").metadata == {"b": 3}


def test_bulk_get_returns_what_get_returns(facade: Any) -> None:
    """Any number of users, in the order asked for, ``{}`` for those without a row."""
    user_ids = [f"user {number}" for number in range(1200)]
    facade.update_bulk_user_metadata({user_id: {"id": user_id} for user_id in user_ids[:600]})
    found = facade.get_bulk_user_metadata(reversed(user_ids))
    assert list(found) == user_ids[::-1]
    assert found["user 0"].metadata == {"id": "user 0"}
    assert found["user 1199"].metadata == {}
    assert facade.get_bulk_user_metadata([]) == {}
    assert list(facade.get_bulk_user_metadata(["a", "b", "a"])) == ["a", "b"]


def test_bulk_update_is_many_updates(facade: Any) -> None:
    """Each user's update is merged, and each result is the whole object."""
    facade.update_user_metadata("alice", {"a": 1, "b": 2})
    updated = facade.update_bulk_user_metadata({"alice": {"a": None}, "bob": {"c": 3}})
    assert {user_id: result.metadata for user_id, result in updated.items()} == {
        "alice": {"b": 2},
        "bob": {"c": 3},
    }
    assert facade.get_user_metadata("alice").metadata == {"b": 2}
    assert facade.update_bulk_user_metadata({}) == {}


def test_bulk_update_is_all_or_nothing(facade: Any) -> None:
    """One bad update leaves all users unchanged; the message names it."""
    with pytest.raises(InvalidInputError, match=r"metadata_updates\['bob'\]\[\"a\"\]\[1\]: nan"):
        facade.update_bulk_user_metadata({"alice": {"a": 1}, "bob": {"a": [1, float("nan")]}})
    assert facade.get_user_metadata("alice").metadata == {}


def test_modify_reads_and_writes_in_one_step(facade: Any) -> None:
    """The function gets the metadata, ``{}`` at first, and its result is stored."""

    def visit(metadata: Metadata) -> Metadata:
        metadata["visits"] = metadata.get("visits", 0) + 1
        metadata["gone"] = None
        return metadata

    assert facade.modify_user_metadata("alice", visit).metadata == {"visits": 1}
    assert facade.modify_user_metadata("alice", visit).metadata == {"visits": 2}
    assert facade.get_user_metadata("alice").metadata == {"visits": 2}


def test_what_the_function_raises_is_raised(facade: Any) -> None:
    """The exception propagates unchanged, and nothing is written."""
    facade.update_user_metadata("alice", {"coins": 1})
    error = ValueError("not enough coins")

    def pay(metadata: Metadata) -> Metadata:
        metadata["coins"] -= 5
        raise error

    with pytest.raises(ValueError, match="not enough coins") as caught:
        facade.modify_user_metadata("alice", pay)
    assert caught.value is error
    assert facade.get_user_metadata("alice").metadata == {"coins": 1}


def test_a_function_that_fails_hurts_no_other_call() -> None:
    """On every storage, calls of the same batch succeed, whatever a function raises."""
    error = StorageBusyError("of another storage")

    def use_another_storage(metadata: Metadata) -> Metadata:
        raise error

    async def main() -> list[Any]:
        updates = [aio.update_user_metadata(f"user {n}", {"n": n}) for n in range(10)]
        failing = aio.modify_user_metadata("alice", use_another_storage)
        return await asyncio.gather(*updates[:5], failing, *updates[5:], return_exceptions=True)

    results = asyncio.run(main())
    assert results.pop(5) is error
    assert [result.metadata for result in results] == [{"n": n} for n in range(10)]


def nothing(metadata: Metadata) -> Any:
    """Forget to return the metadata."""
    metadata["n"] = 2


async def awaiting(metadata: Metadata) -> Any:
    """Return the metadata to an ``await``."""
    return metadata


class Awaiting:
    """A callable whose call must be awaited."""

    async def __call__(self, metadata: Metadata) -> Metadata:
        return metadata


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nothing, "the function's result: None is not a mapping; .*`return metadata`"),
        (awaiting, "the function's result: nothing can be awaited .*without `async`"),
        (Awaiting(), "the function's result: nothing can be awaited"),
        (functools.partial(awaiting), "the function's result: nothing can be awaited"),
        (lambda metadata: {"at": {1}}, 'the function\'s result\\["at"\\]: set is not JSON'),
        ("n += 1", "function: str cannot be called"),
    ],
)
def test_what_the_function_returns_is_checked(facade: Any, function: Any, message: str) -> None:
    """If a function returns ``None``, a coroutine or what is not JSON, nothing is written.

    The message says what was forgotten. Python does not warn of a coroutine that nothing awaits.
    """
    facade.update_user_metadata("alice", {"n": 1})
    with pytest.raises(InvalidInputError, match=message):
        facade.modify_user_metadata("alice", function)
    assert facade.get_user_metadata("alice").metadata == {"n": 1}


def test_the_function_cannot_call_the_library(facade: Any) -> None:
    """A call inside the storage's lock is refused; it would deadlock or lose an update."""
    errors: list[UsageError] = []

    def call(metadata: Metadata) -> Metadata:
        with pytest.raises(UsageError, match="read what the function needs before") as reading:
            syncio.get_user_metadata("alice")
        with pytest.raises(UsageError, match="and write the rest after") as writing:
            syncio.update_user_metadata("alice", {"inner": 1})
        errors.extend([reading.value, writing.value])
        for coroutine in (
            aio.get_user_metadata("alice"),
            aio.update_user_metadata("alice", {"inner": 1}),
        ):
            with pytest.raises(UsageError, match="read what the function needs before") as awaiting:
                coroutine.send(None)
            errors.append(awaiting.value)
        return {"outer": 1}

    assert facade.modify_user_metadata("alice", call).metadata == {"outer": 1}
    assert len(errors) == 4
    assert facade.update_user_metadata("alice", {"n": 1}).metadata == {"outer": 1, "n": 1}


def test_what_the_function_started_may_call_the_library_later(facade: Any) -> None:
    """A thread that has the function's context variables is refused only while it runs."""
    returned = threading.Event()
    found: list[Metadata] = []
    threads: list[threading.Thread] = []

    def call(metadata: Metadata) -> Metadata:
        in_context = contextvars.copy_context().run

        def later() -> None:
            assert returned.wait(30)
            found.append(in_context(syncio.get_user_metadata, "alice").metadata)

        threads.append(threading.Thread(target=later))
        threads[0].start()
        return {"n": 1}

    facade.modify_user_metadata("alice", call)
    returned.set()
    threads[0].join()
    assert found == [{"n": 1}]


# Bad input: refused before anything is written, the same on every storage


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("get_user_metadata", [""], "user_id: is empty"),
        ("get_user_metadata", [7], "user_id: int is not str"),
        ("clear_user_metadata", ["a" * 256], "user_id: has 256 characters"),
        ("update_user_metadata", ["a\0", {}], "user_id: holds U"),
        ("update_user_metadata", ["alice", None], "metadata_update: NoneType is not a mapping"),
        ("update_user_metadata", ["alice", {"a": {2}}], 'metadata_update\\["a"\\]: set is not'),
        ("set_user_metadata", ["alice", []], "metadata: list is not a mapping"),
        ("set_user_metadata", ["alice", {"a": 1e999}], 'metadata\\["a"\\]: inf is not JSON'),
        ("modify_user_metadata", [None, dict], "user_id: NoneType is not str"),
        ("get_bulk_user_metadata", ["alice"], "user_ids: str is not a list of user ids"),
        ("get_bulk_user_metadata", [7], "user_ids: int is not a list of user ids"),
        ("get_bulk_user_metadata", [["alice", ""]], "user_ids\\[1\\]: is empty"),
        ("update_bulk_user_metadata", [["alice"]], "metadata_updates: list is not a mapping"),
        ("update_bulk_user_metadata", [{"": {}}], "metadata_updates: the key '': is empty"),
    ],
)
def test_bad_input_is_refused(
    facade: Any, function: str, arguments: list[Any], message: str
) -> None:
    """The message names the argument and the fault; stored metadata stays unchanged."""
    facade.update_user_metadata("alice", {"n": 1})
    with pytest.raises(InvalidInputError, match=message):
        getattr(facade, function)(*arguments)
    assert facade.get_user_metadata("alice").metadata == {"n": 1}


# Ownership


def test_results_and_arguments_are_the_callers(facade: Any) -> None:
    """Changing arguments or results after the call changes nothing stored."""
    update: Metadata = {"list": [1], "object": {"n": 1}}
    expected = copy.deepcopy(update)
    updated = facade.update_user_metadata("alice", update).metadata
    stored = facade.set_user_metadata("bob", update).metadata
    assert updated == stored == expected
    for metadata in (update, updated, stored, facade.get_user_metadata("alice").metadata):
        metadata["list"].append(2)
        metadata["object"]["n"] = 2
    assert facade.get_user_metadata("alice").metadata == expected
    assert facade.get_user_metadata("bob").metadata == expected


@pytest.mark.parametrize("storage", ["memory"], indirect=True)
def test_frameworks_see_what_is_to_be_awaited() -> None:
    """The ``asyncio`` functions are coroutine functions, the ``syncio`` functions are not."""
    for name in FUNCTIONS:
        assert inspect.iscoroutinefunction(getattr(aio, name))
        assert not inspect.iscoroutinefunction(getattr(syncio, name))


def test_an_update_is_read_when_the_coroutine_starts() -> None:
    """Changing the dict while the call is under way changes nothing stored."""

    async def main() -> None:
        metadata = [{"n": [0]} for _ in range(3)]
        calls: list[asyncio.Task[Any]] = [
            asyncio.create_task(aio.update_user_metadata("alice", metadata[0])),
            asyncio.create_task(aio.set_user_metadata("bob", metadata[1])),
            asyncio.create_task(aio.update_bulk_user_metadata({"carol": metadata[2]})),
        ]
        await asyncio.sleep(0)  # the first step of the tasks
        for each in metadata:
            each["n"][0] = 99
        await asyncio.gather(*calls)

    asyncio.run(main())
    found = syncio.get_bulk_user_metadata(["alice", "bob", "carol"])
    assert [result.metadata for result in found.values()] == [{"n": [0]}] * 3


# Threads and event loops


def test_syncio_works_inside_a_running_loop() -> None:
    """A blocking call from a coroutine blocks, and works."""

    async def main() -> Metadata:
        await aio.update_user_metadata("alice", {"a": 1})
        syncio.update_user_metadata("alice", {"b": 2})
        return (await aio.get_user_metadata("alice")).metadata

    assert asyncio.run(main()) == {"a": 1, "b": 2}


@pytest.mark.parametrize("storage", STORAGES[1:], indirect=True)
def test_asyncio_does_not_block_the_loop() -> None:
    """While a storage is busy, the event loop keeps running."""

    async def main() -> None:
        entered, leave = threading.Event(), threading.Event()

        def wait(metadata: Metadata) -> Metadata:
            entered.set()
            assert leave.wait(30)
            return {"n": 1}

        call = asyncio.create_task(aio.modify_user_metadata("alice", wait))
        while not entered.is_set():
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not call.done()
        leave.set()
        assert (await call).metadata == {"n": 1}

    asyncio.run(main())


def test_asyncio_works_in_every_loop() -> None:
    """Event loops in turn, and several at once in threads, use one store."""

    async def update(name: str) -> None:
        await asyncio.gather(
            *(aio.update_user_metadata("alice", {f"{name} {n}": n}) for n in range(9))
        )

    for number in range(3):
        asyncio.run(update(f"loop {number}"))
    threads = [threading.Thread(target=asyncio.run, args=[update(f"thread {n}")]) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(syncio.get_user_metadata("alice").metadata) == 54


@pytest.mark.parametrize("storage", STORAGES[1:], indirect=True)
def test_a_cancelled_caller_does_not_disturb_others() -> None:
    """Cancelling one call does not affect the others or the storage."""

    async def main() -> None:
        entered, leave = threading.Event(), threading.Event()

        def wait(metadata: Metadata) -> Metadata:
            entered.set()
            assert leave.wait(30)
            return metadata

        cancelled = asyncio.create_task(aio.modify_user_metadata("alice", wait))
        while not entered.is_set():
            await asyncio.sleep(0)
        other = asyncio.create_task(aio.update_user_metadata("alice", {"other": 1}))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        leave.set()
        assert (await other).metadata == {"other": 1}

    asyncio.run(main())


def test_trio_is_refused_on_every_storage() -> None:
    """The error names what works under trio: the blocking functions in a thread."""

    async def main() -> Metadata:
        for name, arguments in (("get_user_metadata", []), ("update_user_metadata", [{"n": 1}])):
            with pytest.raises(UsageError, match=r"trio\.to_thread\.run_sync"):
                await getattr(aio, name)("alice", *arguments)
        update = functools.partial(syncio.update_user_metadata, "alice", {"n": 2})
        return (await trio.to_thread.run_sync(update)).metadata

    assert trio.run(main) == {"n": 2}


# No lost update


@pytest.mark.parametrize("storage", ["sqlite file"], indirect=True)
def test_threads_lose_no_update() -> None:
    """8 threads update one user 500 times each; a lost update would be found."""

    def work(thread: int) -> None:
        for number in range(500):
            update = {f"{thread}:{number}": number, f"{thread}:{number - 1}": None}
            syncio.update_user_metadata("alice", update)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"{thread}:499": 499 for thread in range(8)}
    assert syncio.get_user_metadata("alice").metadata == expected


@pytest.mark.parametrize("storage", ["sqlite file"], indirect=True)
def test_tasks_lose_no_update() -> None:
    """8 tasks update one user 500 times each; a lost update would be found."""

    async def work(task: int) -> None:
        for number in range(500):
            update = {f"{task}:{number}": number, f"{task}:{number - 1}": None}
            await aio.update_user_metadata("alice", update)

    async def main() -> None:
        await asyncio.gather(*map(work, range(8)))

    asyncio.run(main())
    expected = {f"{task}:499": 499 for task in range(8)}
    assert syncio.get_user_metadata("alice").metadata == expected


# The two facades agree


@pytest.mark.parametrize("storage", ["memory"], indirect=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_facades_are_the_same(name: str) -> None:
    """Both have the same functions, parameters and documentation."""
    blocking, awaited = getattr(syncio, name), getattr(aio, name)
    assert inspect.signature(blocking) == inspect.signature(awaited)
    without_await = re.sub(r"\((await .*)\)\.(metadata|by_app)", r"\1.\2", awaited.__doc__)
    assert without_await.replace("await ", "").replace(".asyncio.", ".syncio.") == blocking.__doc__


GEVENT = (
    PATCH_ALL
    + """
import asyncio, sys
import gevent
import usermetadata
from usermetadata import UserMetadataOverrideConfig, UserMetadataRecipe
from usermetadata.interfaces import RecipeInterface
from usermetadata.syncio import get_user_metadata, modify_user_metadata, update_user_metadata

class Waiting(RecipeInterface):
    def __init__(self, original):
        self.original = original
    async def get_user_metadata(self, user_id, user_context):
        return await self.original.get_user_metadata(user_id, user_context)
    async def update_user_metadata(self, user_id, metadata_update, user_context):
        await asyncio.sleep(0.001)
        return await self.original.update_user_metadata(user_id, metadata_update, user_context)
    async def clear_user_metadata(self, user_id, user_context):
        return await self.original.clear_user_metadata(user_id, user_context)

def pause(metadata):
    gevent.sleep(0)  # another greenlet may run inside the lock
    return {**metadata, "paused": metadata.get("paused", 0) + 1}

for override in (None, UserMetadataOverrideConfig(functions=Waiting)):
    usermetadata.init(sys.argv[1], override)
    def work(number):
        for n in range(5):
            update_user_metadata("alice", {f"{override}{number}:{n}": n})
            modify_user_metadata("alice", pause)
            get_user_metadata("alice")
    greenlets = [gevent.spawn(work, number) for number in range(8)]
    gevent.joinall(greenlets, raise_error=True, timeout=60)
    UserMetadataRecipe.reset()

usermetadata.init(sys.argv[1])
metadata = get_user_metadata("alice").metadata
assert metadata.pop("paused") == 80, metadata
assert len(metadata) == 80, metadata
"""
)


@pytest.mark.parametrize("kind", ["sqlite file", "postgres"])
@pytest.mark.parametrize("storage", ["memory"], indirect=True)
def test_syncio_works_under_gevent(kind: str, database: Path, schema: str) -> None:
    """Greenlets in a process that gevent has patched lose nothing, with and without an override."""
    postgres = with_parameters(server_url(), schema=schema)
    finished = subprocess.run(
        [sys.executable, "-c", GEVENT, postgres if kind == "postgres" else str(database)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("storage", ["memory"], indirect=True)
def test_an_override_is_refused_under_eventlet(database: Path) -> None:
    """Greenlets share an event loop there; without an override they lose nothing."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVENTLET, str(database)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")


EVENTLET = """
import eventlet
eventlet.monkey_patch()
import sys
import usermetadata
from usermetadata import UsageError, UserMetadataOverrideConfig, UserMetadataRecipe
from usermetadata.syncio import get_user_metadata, modify_user_metadata

def pause(metadata):
    eventlet.sleep(0)  # another greenlet may run inside the lock
    return {"n": metadata.get("n", 0) + 1}

def work(number):
    for _ in range(10):
        modify_user_metadata("alice", pause)

usermetadata.init(sys.argv[1])
for greenlet in [eventlet.spawn(work, number) for number in range(8)]:
    greenlet.wait()
assert get_user_metadata("alice").metadata == {"n": 80}
UserMetadataRecipe.reset()

usermetadata.init(sys.argv[1], UserMetadataOverrideConfig(functions=lambda original: original))
try:
    get_user_metadata("alice")
except UsageError as error:
    assert "an override cannot be used under eventlet" in str(error)
else:
    raise AssertionError
"""


PATCHED_AFTER_INIT = (
    f"def patch():{indent(PATCH_ALL, '    ')}"
    """
import os, sys
_, url, patched = sys.argv

if patched == "first":
    patch()
import usermetadata
from usermetadata import syncio
usermetadata.init(url)
syncio.update_user_metadata("alice", {"before": True})
child = os.fork()
if child == 0:
    if patched == "in the worker":
        patch()
    import gevent

    def pause(metadata):
        gevent.sleep(0.001)  # another greenlet may run inside the lock
        return {**metadata, "paused": metadata.get("paused", 0) + 1}

    def work(number):
        for n in range(5):
            syncio.modify_user_metadata("bob", pause)
            syncio.update_user_metadata("bob", {f"{number}:{n}": n})

    workers = [gevent.spawn(work, number) for number in range(8)]
    gevent.joinall(workers, timeout=60)
    errors = {f"{type(worker.exception).__name__}: {worker.exception}" for worker in workers}
    if errors == {"NoneType: None"}:
        print(len(syncio.get_user_metadata("bob").metadata), flush=True)
    else:
        print(*errors, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
)


@pytest.mark.parametrize("patched", ["first", "in the worker"])
@pytest.mark.parametrize("kind", ["memory", "sqlite file", "postgres"])
@pytest.mark.parametrize("storage", ["memory"], indirect=True)
def test_gevent_may_patch_a_worker_after_init(
    kind: str, patched: str, tmp_path: Path, schema: str
) -> None:
    """As with ``gunicorn --preload -k gevent``: greenlets lose nothing, also inside ``modify``.

    psycopg must be imported after gevent has patched the process. Otherwise PostgreSQL is refused
    at once, with what to do; nothing hangs.
    """
    url = {
        "memory": "memory://",
        "sqlite file": f"sqlite:///{tmp_path}/users.db",
        "postgres": with_parameters(server_url(), schema=schema),
    }[kind]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PATCHED_AFTER_INIT, url, patched],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    if (kind, patched) == ("postgres", "in the worker"):
        assert finished.stdout.startswith(
            "UsageError: PostgresStorage: psycopg was imported before"
        )
        assert "gunicorn.conf.py" in finished.stdout
    else:
        assert (finished.stdout, finished.stderr) == ("41\n", "")

"""``init``, ``UserMetadataRecipe`` and overrides."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import sqlite3
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from postgres_server import server_url, with_parameters

import usermetadata
import usermetadata.asyncio
from usermetadata import (
    InMemoryStorage,
    InputOverrideConfig,
    InvalidInputError,
    PostgresStorage,
    SQLiteStorage,
    UsageError,
    UserMetadataOverrideConfig,
    UserMetadataRecipe,
    syncio,
)
from usermetadata.changes import Merge
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult, RecipeInterface
from usermetadata.server import create_app


def keeps_metadata_in(database: Path) -> bool:
    """Tell whether an update through the recipe is stored in the file."""
    syncio.update_user_metadata("alice", {"n": 1})
    UserMetadataRecipe.reset()
    with contextlib.closing(SQLiteStorage(database)) as storage:
        return storage.read(["alice"]) == {"alice": {"n": 1}}


# init


@pytest.mark.parametrize("kind", ["URL", "absolute URL", "path", "Path"])
def test_init_takes_urls_and_paths(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be named as a URL, relative or absolute, or as a path."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, str | Path] = {
        "URL": "sqlite:///users.db",
        "absolute URL": f"sqlite:///{tmp_path}/users.db",
        "path": "users.db",
        "Path": Path("users.db"),
    }
    usermetadata.init(names[kind])
    assert keeps_metadata_in(tmp_path / "users.db")


def test_init_takes_a_storage() -> None:
    """A storage that the caller made is used, and stays open after ``reset``."""
    storage = InMemoryStorage()
    usermetadata.init(storage)
    syncio.update_user_metadata("alice", {"n": 1})
    UserMetadataRecipe.reset()
    assert storage.read(["alice"]) == {"alice": {"n": 1}}


@pytest.mark.parametrize("url", ["memory://", "sqlite://", "sqlite:///:memory:", ":memory:"])
def test_init_takes_memory(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``memory://`` writes nothing to disk."""
    monkeypatch.chdir(tmp_path)
    usermetadata.init(url)
    assert syncio.update_user_metadata("alice", {"n": 1}).metadata == {"n": 1}
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument ``USERMETADATA_URL`` names the storage."""
    monkeypatch.setenv("USERMETADATA_URL", f"sqlite:///{tmp_path}/other.db")
    usermetadata.init()
    assert keeps_metadata_in(tmp_path / "other.db")


@pytest.mark.parametrize("is_set", [False, True], ids=["unset", "empty"])
def test_the_last_default_is_a_file_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_set: bool
) -> None:
    """Without argument and variable it is ``users.db`` in the working directory."""
    monkeypatch.setenv("USERMETADATA_URL", "")
    if not is_set:
        monkeypatch.delenv("USERMETADATA_URL")
    monkeypatch.chdir(tmp_path)
    usermetadata.init()
    assert keeps_metadata_in(tmp_path / "users.db")


@pytest.mark.parametrize(
    "storage",
    [
        "mongodb://localhost",
        "sqlite://users.db",
        "memory://x",
        "",
        7,
        object(),
        {"url": "x"},
        InMemoryStorage,
    ],
)
def test_init_refuses_what_it_does_not_know(storage: Any) -> None:
    """The error says what may be passed; nothing is initialised."""
    with pytest.raises(InvalidInputError):
        usermetadata.init(storage)
    with pytest.raises(UsageError):
        UserMetadataRecipe.get_instance()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///users.db?mode=ro", 'a URL of sqlite:// has no parameter "mode"; known are'),
        ("sqlite:///users.db?immutable=1", 'no parameter "immutable"'),
        ("sqlite:///users.db?timeout=5&table=t", 'no parameter "table"'),
        ("sqlite:///users.db?timeout=soon", "parameter timeout is not a number"),
        ("sqlite:///users.db?timeout=-1", "timeout: -1.0 is not a number of seconds"),
        ("sqlite:///users.db?synchronous=off", "synchronous: 'OFF' is neither"),
        ("sqlite:///users.db?app_id=", "app_id: is empty"),
        ("sqlite:///file:users.db", "the text is neither a URL nor plainly a path"),
        ("sqlite:///users.db\n", "the text is neither a URL nor plainly a path"),
        ("memory://?timeout=5", 'a URL of memory:// has no parameter "timeout"'),
        ("memory:", "the text is neither a URL nor plainly a path"),
        ("sqlite:users.db", "the text is neither a URL nor plainly a path"),
        ("file:users.db?mode=ro", "the text is neither a URL nor plainly a path"),
        ("users.db?mode=ro", "the text is neither a URL nor plainly a path"),
        ("host=localhost dbname=shop", "the text is neither a URL nor plainly a path"),
        ("users.db\n", "the text is neither a URL nor plainly a path"),
        ("postgresql://u:secret@h/db?pgbouncer=true", 'libpq knows no parameter "pgbouncer"'),
        ("postgresql://u:secret@h/db?sslmode=require&x=1", 'libpq knows no parameter "x"'),
        ("postgresql://u:secret@h/db?max_connections=x", "max_connections is not a number"),
        ("postgresql://u:x?secret=1@h:secret/db?y=%secret", 'parameter "y"'),
        ("host=h password=secret secret", "the text is neither a URL nor plainly a path"),
    ],
)
def test_what_is_no_url_makes_no_file(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spelling that is not supported is refused by name, without the password."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=message) as caught:
        usermetadata.init(url)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["sqlite:///users.db", "file:users.db?mode=ro", "memory:"])
def test_the_storages_class_takes_no_urls(text: str) -> None:
    """``SQLiteStorage`` takes a path; a text that looks like a URL is refused there as well."""
    with pytest.raises(InvalidInputError, match="the text is neither a URL nor plainly a path"):
        SQLiteStorage(text)


def test_a_path_may_have_any_name(tmp_path: Path) -> None:
    """``Path`` names exactly that file, also if the text looks like something else."""
    for name in ("a=b?c.db", "memory:", "host=localhost dbname=shop"):
        usermetadata.init(tmp_path / name)
        assert keeps_metadata_in(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///users.db?timeout=5&synchronous=normal&app_id=shop%20%C3%A9",
        "sqlite+pysqlite:///users.db?app_id=shop%20%C3%A9",
        "SQLite:///users.db?app_id=shop%20%C3%A9",
    ],
)
def test_a_url_may_have_arguments_of_the_storage(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``app_id``, ``timeout`` and ``synchronous`` are those of ``SQLiteStorage``."""
    monkeypatch.chdir(tmp_path)
    usermetadata.init(url)
    syncio.update_user_metadata("alice", {"n": 1})
    UserMetadataRecipe.reset()
    with contextlib.closing(SQLiteStorage("users.db", app_id="shop é")) as storage:
        assert storage.read(["alice"]) == {"alice": {"n": 1}}


def test_sqlalchemys_urls_are_known(schema: str) -> None:
    """A driver's name is ignored; ``schema``, ``table`` and ``app_id`` are the storage's.

    The others are libpq's. ``PostgresStorage`` takes the same URLs, without its own arguments.
    """
    url = server_url().replace("postgresql://", "postgresql+psycopg://")
    joined = with_parameters(url, sslmode="prefer")
    usermetadata.init(
        with_parameters(joined, schema=schema, table="people", app_id="shop", max_connections="2")
    )
    syncio.update_user_metadata("alice", {"n": 1})
    UserMetadataRecipe.reset()
    storage = PostgresStorage(joined, schema=schema, table="people", app_id="shop")
    with contextlib.closing(storage):
        assert storage.read(["alice"]) == {"alice": {"n": 1}}
    with pytest.raises(InvalidInputError, match='libpq knows no parameter "schema"'):
        PostgresStorage(with_parameters(joined, schema=schema))


class Lacking:
    """A storage that was not completed."""

    def read(self, user_ids: Any) -> dict[str, Any]:
        return {}

    def write(self, changes: Any) -> list[Any]:
        return []

    def close(self) -> None: ...


async def awaited(*_: object) -> list[Any]:
    """Write for ``await``."""
    return []


class Backwards(InMemoryStorage):
    """A storage that runs a negative number of batches."""

    writes_in_flight = -1


Awaited = type("Awaited", (InMemoryStorage,), {"write": awaited})


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (Lacking(), "Lacking has no method for_app; define it"),
        (
            Awaited(),
            "Awaited.write is `async def`; make it a plain method",
        ),
        (Backwards(), "Backwards.writes_in_flight is not a number; make it 0 or more"),
        (InMemoryStorage, "InMemoryStorage is a class; pass an instance"),
        (sqlite3.Connection, "Connection is a class"),
        ({}, "dict is not a storage; pass for example SQLiteStorage"),
    ],
)
@pytest.mark.parametrize("use", [usermetadata.init, create_app])
def test_a_wrong_storage_is_refused_at_once(use: Any, storage: Any, message: str) -> None:
    """``init`` and ``create_app`` say which method is missing or wrong."""
    with pytest.raises(InvalidInputError, match=f"storage: {message}"):
        use(storage)


def test_another_init_is_an_error() -> None:
    """The error of an ``init`` that would change something says what to do; the first stays."""
    usermetadata.init("memory://")
    syncio.update_user_metadata("alice", {"n": 1})
    others: list[tuple[Any, ...]] = [
        ("memory://?app_id=shop",),
        ("memory://", UserMetadataOverrideConfig(functions=Shouting)),
        (InMemoryStorage(),),
    ]
    for arguments in others:
        with pytest.raises(UsageError, match=r"usermetadata.close\(\)"):
            usermetadata.init(*arguments)
    assert syncio.get_user_metadata("alice").metadata == {"n": 1}


def test_init_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second ``init`` that changes nothing does nothing, as in a notebook; the data stays."""
    monkeypatch.chdir(tmp_path)
    storage = InMemoryStorage()
    override = UserMetadataOverrideConfig(functions=lambda original: original)
    every: list[tuple[Any, ...]] = [
        (),
        ("memory://",),
        (Path("users.db"),),
        (storage,),
        ("memory://", override),
    ]
    for arguments in every:
        usermetadata.init(*arguments)
        syncio.update_user_metadata("alice", {"n": 1})
        usermetadata.init(*arguments)
        assert syncio.get_user_metadata("alice").metadata == {"n": 1}
        usermetadata.close()


def test_a_relative_path_in_another_directory_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``init`` is not repeated silently where the same text names another file."""
    monkeypatch.chdir(tmp_path)
    usermetadata.init("users.db")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UsageError, match="with other arguments"):
        usermetadata.init("users.db")


def test_threads_that_initialise_at_once_share_one_storage() -> None:
    """Several threads may call ``init``: no acknowledged write vanishes in a second storage."""
    for _ in range(50):
        together = threading.Barrier(4)

        def update(number: int, together: threading.Barrier = together) -> None:
            together.wait(30)
            usermetadata.init("memory://")
            syncio.update_user_metadata("alice", {str(number): True})

        threads = [threading.Thread(target=update, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(syncio.get_user_metadata("alice").metadata) == 4
        usermetadata.close()


def test_a_call_before_init_names_the_line_to_write(facade: Any) -> None:
    """The error of every function says how to initialise."""
    for name, arguments in FUNCTIONS.items():
        with pytest.raises(UsageError, match=r'usermetadata.init\("sqlite:///users.db"\)'):
            getattr(facade, name)(*arguments)


def test_reset_closes_what_init_opened(tmp_path: Path) -> None:
    """After ``reset`` the file is closed and ``init`` may be called again."""
    usermetadata.init(tmp_path / "users.db")
    storage = UserMetadataRecipe.get_instance().storage
    syncio.update_user_metadata("alice", {"n": 1})
    UserMetadataRecipe.reset()
    with pytest.raises(UsageError, match="closed"):
        storage.read(["alice"])
    assert [path.name for path in tmp_path.iterdir()] == ["users.db"]
    usermetadata.init(tmp_path / "users.db")
    assert syncio.get_user_metadata("alice").metadata == {"n": 1}
    UserMetadataRecipe.reset()
    UserMetadataRecipe.reset()


# Overrides


def test_the_sdks_own_override_test(facade: Any) -> None:
    """An attribute set on the original implementation is used, as in the SDK's test."""
    override_used = False

    def override_functions(original: RecipeInterface) -> RecipeInterface:
        original_get = original.get_user_metadata

        async def get_user_metadata(user_id: str, user_context: dict[str, Any]) -> MetadataResult:
            nonlocal override_used
            override_used = True
            return await original_get(user_id, user_context)

        original.get_user_metadata = get_user_metadata  # type: ignore[method-assign]
        return original

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=override_functions))
    assert facade.get_user_metadata("userId").metadata == {}
    assert override_used


class Shouting(RecipeInterface):
    """An override as written for the SDK: its three methods, the context passed on."""

    def __init__(self, original: RecipeInterface) -> None:
        self.original = original
        self.contexts: list[dict[str, Any]] = []

    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        self.contexts.append(user_context)
        return await self.original.get_user_metadata(user_id.upper(), user_context)

    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        self.contexts.append(user_context)
        await asyncio.sleep(0)
        shouted = {name: str(value).upper() for name, value in metadata_update.items()}
        return await self.original.update_user_metadata(user_id.upper(), shouted, user_context)

    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        self.contexts.append(user_context)
        return await self.original.clear_user_metadata(user_id.upper(), user_context)


def test_an_override_class_of_the_sdk_serves_both_facades(facade: Any) -> None:
    """Its three methods are used, get the raw arguments and may await anything."""
    storage = InMemoryStorage()
    usermetadata.init(storage, InputOverrideConfig(functions=Shouting))
    assert facade.update_user_metadata("alice", {"a": {1, 2}, "b": "b"}).metadata == {
        "a": "{1, 2}",
        "b": "B",
    }
    assert storage.read(["ALICE"]) == {"ALICE": {"a": "{1, 2}", "b": "B"}}
    assert facade.get_user_metadata("alice").metadata["b"] == "B"
    assert isinstance(facade.clear_user_metadata("alice"), ClearUserMetadataResult)
    assert storage.read(["ALICE"]) == {}


def test_functions_that_an_override_lacks_are_the_originals(facade: Any) -> None:
    """An override class with the SDK's three methods keeps working beside the newer functions."""
    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Shouting))
    assert facade.set_user_metadata("alice", {"a": "a"}).metadata == {"a": "a"}
    assert facade.modify_user_metadata("alice", lambda old: {**old, "n": 1}).metadata == {
        "a": "a",
        "n": 1,
    }
    facade.update_bulk_user_metadata({"alice": {"a": None}})
    assert facade.get_bulk_user_metadata(["alice"])["alice"].metadata == {"n": 1}


def test_an_override_class_may_have_the_newer_functions(facade: Any) -> None:
    """Those that a class has are used, beside the originals of those that it lacks."""
    called: list[str] = []

    class Noting(Shouting):
        async def set_user_metadata(
            self, user_id: str, metadata: Any, user_context: dict[str, Any]
        ) -> MetadataResult:
            called.append("set")
            return await self.original.set_user_metadata(user_id, metadata, user_context)

        async def get_bulk_user_metadata(
            self, user_ids: Any, user_context: dict[str, Any]
        ) -> dict[str, MetadataResult]:
            called.append("get bulk")
            return await self.original.get_bulk_user_metadata(user_ids, user_context)

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Noting))
    assert facade.set_user_metadata("alice", {"n": 1}).metadata == {"n": 1}
    facade.update_bulk_user_metadata({"alice": {"m": 1}})
    assert facade.get_bulk_user_metadata(["alice"])["alice"].metadata == {"n": 1, "m": 1}
    assert called == ["set", "get bulk"]


def test_every_function_passes_through_overrides(facade: Any) -> None:
    """The newer functions can be overridden like the first three, ``user_context`` last."""
    called: list[str] = []

    async def spy(name: str, real: Any, *args: Any) -> Any:
        assert args[-1] == {"request": 7}
        called.append(name)
        return await real(*args)

    def functions(original: RecipeInterface) -> RecipeInterface:
        for name in FUNCTIONS:
            setattr(original, name, partial(spy, name, getattr(original, name)))
        return original

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=functions))
    for name, arguments in FUNCTIONS.items():
        getattr(facade, name)(*arguments, {"request": 7})
        getattr(facade, name)(*arguments, user_context={"request": 7})
    assert called == [name for name in FUNCTIONS for _ in range(2)]


FUNCTIONS: dict[str, list[Any]] = {
    "get_user_metadata": ["alice"],
    "update_user_metadata": ["alice", {"n": 1}],
    "set_user_metadata": ["alice", {"n": 1}],
    "modify_user_metadata": ["alice", dict],
    "get_bulk_user_metadata": [["alice"]],
    "update_bulk_user_metadata": [{"alice": {}}],
    "clear_user_metadata": ["alice"],
    "erase_user": ["alice"],
}


def test_the_user_context_is_the_callers(facade: Any) -> None:
    """An override gets the dict that was passed, even an empty one, or a new ``{}``."""
    overrides: list[Shouting] = []

    def functions(original: RecipeInterface) -> RecipeInterface:
        overrides.append(Shouting(original))
        return overrides[0]

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=functions))
    context: dict[str, Any] = {}
    facade.get_user_metadata("alice", context)
    facade.get_user_metadata("alice")
    assert overrides[0].contexts[0] is context
    assert overrides[0].contexts[1] == {}
    assert overrides[0].contexts[1] is not context
    assert len(overrides) == 1


def test_what_an_override_raises_is_raised(facade: Any) -> None:
    """An override's exception propagates unchanged."""
    error = PermissionError("not yours")

    class Forbidding(Shouting):
        async def get_user_metadata(
            self, user_id: str, user_context: dict[str, Any]
        ) -> MetadataResult:
            raise error

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Forbidding))
    with pytest.raises(PermissionError) as caught:
        facade.get_user_metadata("alice")
    assert caught.value is error


def test_an_override_may_return_any_awaitable(facade: Any) -> None:
    """An override may return a task instead of a coroutine; a loop is running when it is called."""

    class Hurrying(Shouting):
        def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
            return asyncio.ensure_future(self.original.get_user_metadata(user_id, user_context))

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Hurrying))

    assert syncio.get_user_metadata("alice").metadata == {}


def test_an_override_may_use_syncio() -> None:
    """A blocking call inside an override, of either facade, does not deadlock."""

    class Counting(Shouting):
        async def get_user_metadata(
            self, user_id: str, user_context: dict[str, Any]
        ) -> MetadataResult:
            if user_id != "calls":
                syncio.modify_user_metadata("calls", lambda old: {"n": old.get("n", 0) + 1})
                syncio.get_user_metadata("calls")
            return await self.original.get_user_metadata(user_id, user_context)

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Counting))
    syncio.get_user_metadata("alice")
    asyncio.run(usermetadata.asyncio.get_user_metadata("alice"))
    assert syncio.get_user_metadata("calls").metadata == {"n": 2}


def test_a_function_is_called_in_the_thread_of_its_override(database: Path) -> None:
    """What an override binds to its thread is there in a function given to ``syncio``'s modify.

    It is the caller's thread, or another one if an event loop is running there.
    """
    threads: list[int] = []

    class Binding(Shouting):
        async def modify_user_metadata(
            self, user_id: str, function: Any, user_context: dict[str, Any]
        ) -> MetadataResult:
            threads.append(threading.get_ident())
            return await self.original.modify_user_metadata(user_id, function, user_context)

    def function(metadata: dict[str, Any]) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return metadata

    usermetadata.init(database, UserMetadataOverrideConfig(functions=Binding))
    syncio.modify_user_metadata("alice", function)
    assert threads == [threading.get_ident()] * 2

    async def main() -> None:
        syncio.modify_user_metadata("alice", function)

    asyncio.run(main())
    assert threads[2] == threads[3] != threading.get_ident()


def test_an_override_leaves_the_threads_event_loop() -> None:
    """The current event loop and the handler of SIGINT stay as the application has set them."""
    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Shouting))
    handler = signal.getsignal(signal.SIGINT)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        syncio.get_user_metadata("alice")
        assert asyncio.get_event_loop() is loop
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class Held(InMemoryStorage):
    """Lets a write wait until it may go on."""

    reads_in_flight = writes_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def write(self, changes: Any) -> Any:
        self.entered.set()
        assert self.go_on.wait(30)
        return super().write(changes)


def test_an_override_of_syncio_may_run_a_loop_of_its_own() -> None:
    """The functions of ``asyncio`` do not block that loop either, in whichever thread it is."""
    storage = Held()

    async def update() -> None:
        task = asyncio.create_task(usermetadata.asyncio.set_user_metadata("bob", {"n": 1}))
        while not storage.entered.is_set():
            await asyncio.sleep(0)
        storage.go_on.set()
        await task

    class Running(Shouting):
        async def get_user_metadata(
            self, user_id: str, user_context: dict[str, Any]
        ) -> MetadataResult:
            await asyncio.to_thread(asyncio.run, update())
            return await self.original.get_user_metadata(user_id, user_context)

    usermetadata.init(storage, UserMetadataOverrideConfig(functions=Running))
    assert syncio.get_user_metadata("alice").metadata == {}
    assert storage.read(["bob"]) == {"bob": {"n": 1}}


def test_reset_lets_an_override_finish_its_call(database: Path) -> None:
    """A call that its override holds up is completed after ``reset``, on a storage left open."""

    async def main() -> None:
        go_on = asyncio.Event()

        class Waiting(Shouting):
            async def clear_user_metadata(
                self, user_id: str, user_context: dict[str, Any]
            ) -> ClearUserMetadataResult:
                await go_on.wait()
                return await self.original.clear_user_metadata(user_id, user_context)

        usermetadata.init(storage, UserMetadataOverrideConfig(functions=Waiting))
        await usermetadata.asyncio.set_user_metadata("alice", {"n": 1})
        call = asyncio.create_task(usermetadata.asyncio.clear_user_metadata("alice"))
        await asyncio.sleep(0)
        UserMetadataRecipe.reset()
        go_on.set()
        async with asyncio.timeout(60):
            await call

    with contextlib.closing(SQLiteStorage(database)) as storage:
        asyncio.run(main())
        assert storage.read(["alice"]) == {}


def test_an_override_sees_the_callers_context_variables(facade: Any) -> None:
    """An override has the caller's context variables, for example a web framework's."""
    request = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    class Looking(Shouting):
        async def get_user_metadata(
            self, user_id: str, user_context: dict[str, Any]
        ) -> MetadataResult:
            seen.append(request.get())
            return await self.original.get_user_metadata(user_id, user_context)

    usermetadata.init("memory://", UserMetadataOverrideConfig(functions=Looking))
    request.set("mine")
    facade.get_user_metadata("alice")
    assert seen == ["mine"]


@pytest.mark.parametrize("url", ["memory://", "sqlite://"])
def test_a_function_sees_the_callers_context_variables(facade: Any, url: str) -> None:
    """A function given to ``modify`` runs in its caller's context, in any thread."""
    request = contextvars.ContextVar("request", default="none")
    usermetadata.init(url)
    request.set("mine")
    written = facade.modify_user_metadata("alice", lambda _: {"by": request.get()})
    assert written.metadata == {"by": "mine"}


def test_reset_inside_a_function_is_refused(facade: Any) -> None:
    """``reset`` would close the storage that is in use; it is refused, and the change is done."""
    usermetadata.init("sqlite://")

    def function(metadata: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(UsageError, match="which runs inside the storage's lock"):
            UserMetadataRecipe.reset()
        return {"n": 1}

    facade.modify_user_metadata("alice", function)
    assert facade.get_user_metadata("alice").metadata == {"n": 1}


@pytest.mark.parametrize("override", [None, UserMetadataOverrideConfig()], ids=["None", "empty"])
def test_without_an_override_syncio_stays_in_its_thread(
    override: UserMetadataOverrideConfig | None,
) -> None:
    """Without an override a blocking call uses the storage in the calling thread."""
    threads: list[int] = []

    class Watched(InMemoryStorage):
        def read(self, user_ids: Any) -> dict[str, Any]:
            threads.append(threading.get_ident())
            return super().read(user_ids)

    usermetadata.init(Watched(), override)
    syncio.get_user_metadata("alice")
    assert threads == [threading.get_ident()]


def test_a_wrong_override_is_refused() -> None:
    """The error says what to pass or to return; nothing is initialised."""
    with pytest.raises(InvalidInputError, match=r"UserMetadataOverrideConfig\(functions=\.\.\.\)"):
        usermetadata.init("memory://", cast("Any", Shouting))

    async def functions(original: RecipeInterface) -> RecipeInterface:
        return original

    wrong: dict[Any, str] = {
        (lambda original: None): "functions returned NoneType, not a RecipeInterface",
        functions: "functions returned coroutine, .* make it a plain function",
        Shouting(cast("Any", None)): "functions: Shouting cannot be called",
    }
    for each, message in wrong.items():
        with pytest.raises(InvalidInputError, match=f"override: {message}"):
            usermetadata.init("memory://", UserMetadataOverrideConfig(functions=each))
    usermetadata.init("memory://")


def test_the_recipe_may_be_used_without_init() -> None:
    """The recipe's implementation works without ``init``, as in the SDK."""
    storage = InMemoryStorage()
    storage.write([("alice", Merge({"n": 1}))])
    recipe = UserMetadataRecipe(storage)
    assert recipe.recipe_id == "usermetadata"
    result = asyncio.run(_get(recipe.recipe_implementation))
    assert result.metadata == {"n": 1}


def test_threads_that_begin_together_share_the_implementation() -> None:
    """So their calls keep one order, and ``reset`` completes all of them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            recipe = UserMetadataRecipe(InMemoryStorage())
            together = threading.Barrier(8)
            found: list[RecipeInterface] = []

            def look(
                recipe: UserMetadataRecipe = recipe,
                together: threading.Barrier = together,
                found: list[RecipeInterface] = found,
            ) -> None:
                together.wait(30)
                found.append(recipe.recipe_implementation)

            threads = [threading.Thread(target=look) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == [recipe.recipe_implementation] * 8
    finally:
        sys.setswitchinterval(interval)


async def _get(functions: RecipeInterface) -> MetadataResult:
    return await functions.get_user_metadata("alice", {})

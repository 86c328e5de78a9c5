"""``UserMetadata``: many stores in a process, apps of one store, models, and ``within``."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sqlite3
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from postgres_server import server_url
from psycopg.types.string import StrDumper, TextLoader
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from typing_extensions import TypedDict

import usermetadata
from usermetadata import (
    InMemoryStorage,
    InvalidInputError,
    PostgresStorage,
    SQLiteStorage,
    UsageError,
    UserMetadata,
    UserMetadataOverrideConfig,
    UserMetadataRecipe,
    syncio,
)
from usermetadata.interfaces import RecipeInterface

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from usermetadata.interfaces import MetadataResult


# Many stores


def test_stores_are_independent(tmp_path: Path) -> None:
    """Each has its own users; closing one leaves the others, and that of ``init``, at work."""
    usermetadata.init("memory://")
    one, two = UserMetadata(tmp_path / "one.db"), UserMetadata(f"sqlite:///{tmp_path}/two.db")
    one.syncio.update_user_metadata("alice", {"n": 0})
    two.syncio.update_user_metadata("alice", {"n": 1})
    syncio.update_user_metadata("alice", {"n": 2})
    one.close()
    assert two.syncio.get_user_metadata("alice").metadata == {"n": 1}
    assert syncio.get_user_metadata("alice").metadata == {"n": 2}
    two.close()


def test_one_is_closed_while_another_works(tmp_path: Path) -> None:
    """Closing a store does not disturb the calls of another that are under way."""
    working = UserMetadata(tmp_path / "users.db")

    async def main() -> None:
        updates = [working.asyncio.update_user_metadata("alice", {str(n): n}) for n in range(64)]
        tasks = [asyncio.create_task(update) for update in updates]
        for number in range(20):
            async with UserMetadata(tmp_path / f"{number}.db") as other:
                await other.asyncio.update_user_metadata("alice", {"n": 1})
        await asyncio.gather(*tasks)
        await working.aclose()

    asyncio.run(main())
    with UserMetadata(tmp_path / "users.db") as users:
        assert users.syncio.get_user_metadata("alice").metadata == {str(n): n for n in range(64)}


@pytest.mark.parametrize("url", ["memory://", "sqlite://"])
def test_a_function_may_use_another_store(facade: Any, url: str) -> None:
    """Inside ``modify`` only the store that is locked is refused, with all its apps."""
    usermetadata.init(url)
    with UserMetadata("memory://") as other:
        shop = other.for_app("shop")

        def count_and_look(metadata: dict[str, Any]) -> dict[str, Any]:
            def nested(found: dict[str, Any]) -> dict[str, Any]:
                for locked in (syncio, other.syncio, shop.syncio):
                    with pytest.raises(UsageError, match="runs inside the storage's lock"):
                        locked.get_user_metadata("alice")
                return {"n": found.get("n", 0) + 1}

            n = other.syncio.modify_user_metadata("alice", nested).metadata["n"]
            with pytest.raises(UsageError, match="runs inside the storage's lock"):
                syncio.get_user_metadata("alice")
            return {**metadata, "n": n}

        assert facade.modify_user_metadata("alice", count_and_look).metadata == {"n": 1}
        assert other.syncio.get_user_metadata("alice").metadata == {"n": 1}


def test_close_closes_what_was_opened(tmp_path: Path) -> None:
    """A file is closed, a storage of the caller's stays open; later calls say what happened."""
    storage = InMemoryStorage()
    for users in (UserMetadata(storage), UserMetadata(tmp_path / "users.db")):
        with users:
            users.syncio.update_user_metadata("alice", {"n": 1})
        users.close()
        with pytest.raises(UsageError, match="this store is closed; make a new"):
            users.syncio.get_user_metadata("alice")
        with pytest.raises(UsageError, match="this store is closed; make a new"):
            asyncio.run(users.asyncio.update_user_metadata("alice", {"n": 2}))
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    assert [path.name for path in tmp_path.iterdir()] == ["users.db"]


def test_a_store_is_not_closed_inside_its_own_lock(facade: Any) -> None:
    """``close`` inside ``modify`` is refused, and the change is done."""
    usermetadata.init("sqlite://")

    def function(metadata: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(UsageError, match="inside the storage's lock"):
            usermetadata.close()
        return {"n": 1}

    assert facade.modify_user_metadata("alice", function).metadata == {"n": 1}


def test_closing_a_store_closes_its_apps_and_blocks(database: Path) -> None:
    """Nothing of the store works afterwards, also on a storage that stays open."""
    with (
        contextlib.closing(SQLiteStorage(database)) as storage,
        contextlib.closing(sqlite3.connect(database)) as connection,
    ):
        users = UserMetadata(storage)
        shop = users.for_app("shop")
        shop.syncio.update_user_metadata("alice", {"n": 1})

        def read_in_new_block() -> None:
            with users.within(connection) as other:
                other.get_user_metadata("alice")

        with users.within(connection) as metadata:
            users.close()
            for call in (
                lambda: metadata.get_user_metadata("alice"),
                lambda: shop.syncio.get_user_metadata("alice"),
                lambda: asyncio.run(shop.asyncio.get_user_metadata("alice")),
                lambda: users.for_app("other").syncio.get_user_metadata("alice"),
                read_in_new_block,
            ):
                with pytest.raises(UsageError, match="this store is closed; make a new"):
                    call()
        assert storage.for_app("shop").read(["alice"]) == {"alice": {"n": 1}}


def test_the_store_of_init_may_be_closed_by_itself() -> None:
    """Then ``init`` makes a new one."""
    usermetadata.init("memory://")
    UserMetadataRecipe.get_instance().close()
    with pytest.raises(UsageError, match="not initialised"):
        syncio.get_user_metadata("alice")
    usermetadata.init("memory://")
    assert syncio.update_user_metadata("alice", {"n": 1}).metadata == {"n": 1}


def test_two_stores_on_one_storage_have_one_lock(storage: Any) -> None:
    """A function in ``modify`` is refused at once if it uses the same storage in another way."""
    one, two = UserMetadata(storage), UserMetadata(storage)

    def function(metadata: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(UsageError, match="runs inside the storage's lock"):
            two.syncio.update_user_metadata("alice", {"n": 2})
        return {"n": 1}

    assert one.syncio.modify_user_metadata("alice", function).metadata == {"n": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "mongodb://x"}, "unsupported storage URL"),
        ({"storage": "memory://", "app_id": ""}, "app_id: is empty"),
        ({"storage": "memory://", "override": 7}, "override: int is not an override"),
        ({"storage": "memory://", "model": 7}, "model: int cannot validate metadata"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: Any, message: str) -> None:
    """The error names the argument."""
    with pytest.raises(InvalidInputError, match=message):
        UserMetadata(**arguments)


def read_elsewhere(function: Callable[[str], MetadataResult], url: str) -> dict[str, Any]:
    """Call a function that was sent to another process."""
    usermetadata.init(url)
    return function("alice").metadata


def test_the_functions_of_a_module_can_be_sent_to_a_process(database: Path) -> None:
    """There they use the storage of that process's ``init``."""
    usermetadata.init(database)
    syncio.update_user_metadata("alice", {"n": 1})
    assert pickle.loads(pickle.dumps(syncio.get_user_metadata))("alice").metadata == {"n": 1}
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        found = pool.submit(read_elsewhere, syncio.get_user_metadata, f"sqlite:///{database}")
        assert found.result(60) == {"n": 1}


# Apps


def test_apps_are_separate(tmp_path: Path, facade: Any) -> None:
    """An app of a store sees only its own users; closing it leaves the store open."""
    usermetadata.init("memory://")
    with UserMetadata(tmp_path / "users.db", app_id="one") as one, one.for_app("two") as two:
        one.syncio.update_user_metadata("alice", {"app": 1})
        asyncio.run(two.asyncio.update_user_metadata("alice", {"app": 2}))
        two.close()
        assert one.syncio.get_user_metadata("alice").metadata == {"app": 1}
        with one.for_app("two") as again:
            assert again.syncio.get_user_metadata("alice").metadata == {"app": 2}


def test_a_storage_keeps_its_app() -> None:
    """Without ``app_id`` the app is that of the URL or of the storage."""
    storage = InMemoryStorage(app_id="shop")
    UserMetadata(storage).syncio.update_user_metadata("alice", {"n": 1})
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    shop = UserMetadata("memory://?app_id=shop")
    assert shop.syncio.erase_user("alice").by_app == {}
    shop.syncio.update_user_metadata("alice", {"n": 1})
    assert shop.syncio.erase_user("alice").by_app == {"shop": {"n": 1}}


def test_a_thousand_tenants_need_no_more_than_one(database: Path) -> None:
    """Tenants share the store's connections and threads, from blocking code and ``asyncio``."""
    with UserMetadata(database) as users:

        def open_files() -> int:
            import os

            return len(os.listdir("/proc/self/fd"))

        async def update(tenant: UserMetadata[Any, Any], number: int) -> None:
            await tenant.asyncio.update_user_metadata("alice", {"n": number})

        asyncio.run(update(users.for_app("first"), 0))
        users.syncio.get_user_metadata("alice")
        files, threads = open_files(), threading.active_count()
        tenants = [users.for_app(f"tenant {number}") for number in range(1000)]
        for number, tenant in enumerate(tenants[::10]):
            tenant.syncio.update_user_metadata("alice", {"n": number})
        for number, tenant in enumerate(tenants[::10]):
            asyncio.run(update(tenant, number))
            assert tenant.syncio.get_user_metadata("alice").metadata == {"n": number}
        assert (open_files(), threading.active_count()) == (files, threads)


def test_tenants_in_threads_lose_nothing(database: Path) -> None:
    """132 tenants, from 8 threads at once: each has all its updates, and no other's."""
    with UserMetadata(database) as users:
        tenants = [users.for_app(f"tenant {number}") for number in range(132)]

        def update(thread: int) -> None:
            for number, tenant in enumerate(tenants):
                tenant.syncio.update_user_metadata("alice", {f"by {thread}": number})

        threads = [threading.Thread(target=update, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, tenant in enumerate(tenants):
            expected = {f"by {thread}": number for thread in range(8)}
            assert tenant.syncio.get_user_metadata("alice").metadata == expected


# Erasing


def test_erasing_returns_what_was_there(facade: Any, storage: Any) -> None:
    """One step exports and removes; the second time there is nothing; other users stay."""
    usermetadata.init(storage)
    for app in ("public", "shop"):
        with UserMetadata(storage, app_id=app) as users:
            users.syncio.update_bulk_user_metadata({"alice": {"app": app}, "bob": {"n": 1}})
    erased = facade.erase_user("alice")
    assert (erased.metadata, erased.by_app) == ({"app": "public"}, {"public": {"app": "public"}})
    assert facade.erase_user("alice").by_app == {}
    erased = facade.erase_user("alice", all_apps=True)
    assert (erased.metadata, erased.by_app) == ({}, {"shop": {"app": "shop"}})
    facade.update_user_metadata("alice", {"n": 2})
    storage.for_app("shop").write([("alice", lambda _: {"n": 3})])
    erased = facade.erase_user("alice", None, all_apps=True)
    assert (erased.metadata, erased.by_app) == ({"n": 2}, {"public": {"n": 2}, "shop": {"n": 3}})
    assert storage.read(["alice", "bob"]) == {"bob": {"n": 1}}
    with pytest.raises(InvalidInputError, match="user_id: is empty"):
        facade.erase_user("", all_apps=True)


@pytest.mark.parametrize("all_apps", ["false", "", 1, 0, None])
def test_only_a_bool_says_where_to_erase(facade: Any, all_apps: object) -> None:
    """A user is never erased from other apps than meant, for example because of ``"false"``."""
    usermetadata.init("memory://")
    facade.update_user_metadata("alice", {"n": 1})
    with pytest.raises(InvalidInputError, match=r"all_apps: \w+ is not a bool"):
        facade.erase_user("alice", all_apps=all_apps)
    assert facade.get_user_metadata("alice").metadata == {"n": 1}


def test_erasing_keeps_the_order_of_the_calls(database: Path) -> None:
    """With ``asyncio``, an erasure takes effect after the updates that were begun before it."""

    async def main() -> None:
        async with UserMetadata(database) as users:
            for _ in range(50):
                begun = asyncio.create_task(users.asyncio.update_user_metadata("alice", {"n": 1}))
                erasing = asyncio.create_task(users.asyncio.erase_user("alice", all_apps=True))
                after = asyncio.create_task(users.asyncio.update_user_metadata("alice", {"m": 2}))
                assert (await begun).metadata["n"] == 1
                assert (await erasing).metadata["n"] == 1
                assert (await after).metadata == {"m": 2}

    asyncio.run(main())


class Plain:
    """A storage without optional methods."""

    def __init__(self) -> None:
        self.inner = InMemoryStorage()

    def read(self, user_ids: Any) -> dict[str, Any]:
        return self.inner.read(user_ids)

    def write(self, changes: Any) -> list[Any]:
        return self.inner.write(changes)

    def for_app(self, app_id: str) -> Plain:
        other = Plain()
        other.inner = self.inner.for_app(app_id)
        return other

    def close(self) -> None: ...


def test_a_storage_without_the_optional_methods_erases_in_its_app(facade: Any) -> None:
    """What it cannot do is refused by name."""
    usermetadata.init(Plain())
    facade.update_user_metadata("alice", {"n": 1})
    with pytest.raises(UsageError, match="Plain cannot find a user's apps; erase the user in each"):
        facade.erase_user("alice", all_apps=True)
    assert facade.erase_user("alice").by_app == {"public": {"n": 1}}
    with pytest.raises(UsageError, match="Plain cannot be part of a transaction"):
        usermetadata.within(object()).__enter__()


# Models


class Prefs(TypedDict, total=False):
    """What the models below accept."""

    theme: str
    n: int


class PrefsModel(BaseModel):
    """The same, for pydantic."""

    model_config = ConfigDict(extra="allow")
    theme: str = ""
    n: int = 0


def check_prefs(metadata: dict[str, Any]) -> None:
    """Do the same by hand; and change the argument, which is a copy."""
    if not isinstance(metadata.get("n", 0), int):
        raise TypeError("n is not a number")
    metadata.clear()


@pytest.mark.parametrize("model", [TypeAdapter(Prefs), PrefsModel, check_prefs])
def test_a_model_validates_what_would_be_stored(model: Any, storage: Any) -> None:
    """Every function that writes is checked; the validator's error is the cause.

    What is stored is what was passed: keys that the model does not know stay.
    """
    with UserMetadata[Prefs](storage, model=model) as users:
        users.syncio.set_user_metadata("alice", {"n": 1, "extra": [1]})  # type: ignore[typeddict-unknown-key]
        wrong: Any = {"n": "many"}
        for refused in (
            lambda: users.syncio.update_user_metadata("alice", wrong),
            lambda: users.syncio.set_user_metadata("alice", wrong),
            lambda: users.syncio.modify_user_metadata("alice", lambda _: wrong),
            lambda: users.syncio.update_bulk_user_metadata({"bob": {"n": 1}, "alice": wrong}),
            lambda: asyncio.run(users.asyncio.update_user_metadata("alice", wrong)),
            lambda: users.for_app("shop").syncio.update_user_metadata("alice", wrong),
        ):
            with pytest.raises(InvalidInputError, match=r"user 'alice': the model refused it") as e:
                refused()
            assert isinstance(e.value.__cause__, (ValidationError, TypeError))
            assert "many" not in str(e.value)
        users.syncio.update_user_metadata("alice", {"theme": "dark"})
        expected = {"n": 1, "extra": [1], "theme": "dark"}
        assert users.syncio.get_bulk_user_metadata(["alice", "bob"])["bob"].metadata == {}
        assert users.syncio.get_user_metadata("alice").metadata == expected


async def awaited(metadata: dict[str, Any]) -> None:
    """Validate for ``await``."""
    raise AssertionError


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda metadata: "theme" in metadata, "the model refused it with ValueError"),
        (awaited, "model: it returned something to await"),
    ],
)
def test_a_model_that_says_no_otherwise_refuses_as_well(model: Any, message: str) -> None:
    """``False`` is a refusal; an ``async`` function cannot be waited for."""
    with (
        UserMetadata("memory://", model=model) as users,
        pytest.raises(InvalidInputError, match=message),
    ):
        users.syncio.update_user_metadata("alice", {"n": 1})


@pytest.mark.parametrize("model", [Prefs, dict, 7])
def test_what_validates_nothing_is_no_model(model: Any) -> None:
    """A ``TypedDict``, for example, accepts anything at run time."""
    with pytest.raises(InvalidInputError, match="cannot validate metadata; pass a function"):
        UserMetadata("memory://", model=model)


def test_with_a_model_a_damaged_row_can_be_repaired(database: Path) -> None:
    """Setting and clearing do not read the row."""
    with UserMetadata(database, model=check_prefs) as users:
        users.syncio.update_user_metadata("alice", {})
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE user_metadata SET user_metadata = '{'")
        assert users.syncio.set_user_metadata("alice", {"n": 1}).metadata == {"n": 1}


# The caller's transaction


def test_init_has_a_block_as_well(database: Path) -> None:
    """``usermetadata.within`` is that of the storage of ``init``."""
    usermetadata.init(database)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        with usermetadata.within(connection) as metadata:
            metadata.update_user_metadata("alice", {"n": 1})
            assert metadata.get_user_metadata("alice").metadata == {"n": 1}
        connection.rollback()
        with usermetadata.within(connection) as metadata:
            metadata.update_user_metadata("bob", {"n": 1})
        connection.commit()
        with pytest.raises(UsageError, match="the block of within"):
            metadata.get_user_metadata("bob")
    assert syncio.get_user_metadata("alice").metadata == {}
    assert syncio.get_user_metadata("bob").metadata == {"n": 1}


def test_memory_cannot_be_part_of_a_transaction() -> None:
    """The error names the storages that can."""
    with (
        UserMetadata("memory://") as users,
        pytest.raises(UsageError, match="InMemoryStorage cannot be part of a transaction; use"),
        users.within(object()),
    ):
        pass


class Shouting(RecipeInterface):
    """Stores ids in capitals, and waits for nothing but the original."""

    def __init__(self, original: RecipeInterface) -> None:
        self.original = original
        self.pause: Callable[[], Any] | None = None

    async def get_user_metadata(self, user_id: str, user_context: Any) -> MetadataResult:
        return await self.original.get_user_metadata(user_id.upper(), user_context)

    async def update_user_metadata(
        self, user_id: str, metadata_update: Any, user_context: Any
    ) -> MetadataResult:
        if "pause" in user_context:
            await asyncio.sleep(0)
        return await self.original.update_user_metadata(
            user_id.upper(), metadata_update, user_context
        )

    async def clear_user_metadata(self, user_id: str, user_context: Any) -> Any:
        return await self.original.clear_user_metadata(user_id.upper(), user_context)


def test_a_block_passes_through_the_override(database: Path) -> None:
    """The override's functions use the caller's connection, also where a loop is running.

    There they cannot wait for anything else: the connection may be bound to the thread.
    """
    override = UserMetadataOverrideConfig(functions=Shouting)
    users = UserMetadata(database, override=override)
    users.syncio.clear_user_metadata("alice")  # creates the table
    with contextlib.closing(sqlite3.connect(database)) as connection, users:

        def update(context: dict[str, Any]) -> None:
            with users.within(connection) as metadata:
                metadata.update_user_metadata("alice", {"n": 1}, context)
                assert metadata.get_user_metadata("alice").metadata == {"n": 1}
                assert users.syncio.get_user_metadata("bob").metadata == {}

        async def update_in_loop(context: dict[str, Any]) -> None:
            update(context)

        update({"pause": True})
        connection.rollback()
        asyncio.run(update_in_loop({}))
        connection.rollback()
        with pytest.raises(UsageError, match="the override waits for something else"):
            asyncio.run(update_in_loop({"pause": True}))
        assert users.syncio.get_user_metadata("alice").metadata == {}
        connection.execute("CREATE TABLE orders (id INTEGER)")
        update({})
        connection.commit()
        with UserMetadata(database) as plain:
            assert plain.syncio.get_user_metadata("ALICE").metadata == {"n": 1}


def test_a_block_in_an_async_session_passes_through_the_override(database: Path) -> None:
    """SQLAlchemy's ``run_sync`` calls blocking code while the event loop is running."""
    override = UserMetadataOverrideConfig(functions=Shouting)

    async def main() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{database}")
        async with UserMetadata(database, override=override) as users:

            def update(session: Any) -> None:
                with users.within(session) as metadata:
                    metadata.update_user_metadata("alice", {"n": 1})

            async with AsyncSession(engine) as session:
                await session.run_sync(update)
                await session.rollback()
                assert (await users.asyncio.get_user_metadata("alice")).metadata == {}
                await session.run_sync(update)
                await session.commit()
            assert (await users.asyncio.get_user_metadata("alice")).metadata == {"n": 1}
        await engine.dispose()

    asyncio.run(main())


def test_an_override_may_use_other_stores_in_a_block(database: Path, tmp_path: Path) -> None:
    """Only the functions that it wraps use the caller's connection."""
    log = UserMetadata(tmp_path / "log.db")

    class Logging(Shouting):
        async def update_user_metadata(
            self, user_id: str, metadata_update: Any, user_context: Any
        ) -> MetadataResult:
            await log.asyncio.update_user_metadata(user_id, {"seen": True})
            await shop.asyncio.update_user_metadata(user_id, {"seen": True})
            return await self.original.update_user_metadata(user_id, metadata_update, user_context)

    override = UserMetadataOverrideConfig(functions=Logging)
    with UserMetadata(database, override=override) as users, log:
        shop = UserMetadata(tmp_path / "shop.db")
        users.syncio.clear_user_metadata("alice")  # creates the table
        with contextlib.closing(sqlite3.connect(database)) as connection:
            with users.within(connection) as metadata:
                metadata.update_user_metadata("alice", {"n": 1})
            connection.rollback()
        assert users.syncio.get_user_metadata("alice").metadata == {}
        assert log.syncio.get_user_metadata("alice").metadata == {"seen": True}
        assert shop.syncio.get_user_metadata("alice").metadata == {"seen": True}
        shop.close()


def test_a_model_and_a_function_in_a_block_on_postgres(schema: str) -> None:
    """A refusal in a block leaves the caller's transaction usable."""
    storage = PostgresStorage(server_url(), schema=schema)
    with (
        contextlib.closing(storage),
        UserMetadata(storage, model=check_prefs) as users,
        psycopg.connect(server_url()) as connection,
    ):
        with users.within(connection) as metadata:
            metadata.update_user_metadata("alice", {"n": 1})
            with pytest.raises(InvalidInputError, match="the model refused it with TypeError"):
                metadata.update_user_metadata("alice", {"n": "many"})
            metadata.modify_user_metadata("alice", lambda found: {"n": found["n"] + 1})
            assert metadata.erase_user("bob", all_apps=True).by_app == {}
        connection.commit()
        assert users.syncio.get_user_metadata("alice").metadata == {"n": 2}


def test_a_block_is_safe_from_the_connections_adapters(schema: str) -> None:
    """How the application's connection converts texts has no effect on metadata."""

    class Upper(TextLoader):
        def load(self, data: Any) -> str:
            return str(super().load(data)).upper()

    class UpperDumper(StrDumper):
        def dump(self, obj: str) -> Any:
            return super().dump(obj.upper())

    storage = PostgresStorage(server_url(), schema=schema)
    with (
        UserMetadata(storage) as users,
        contextlib.closing(storage),
        psycopg.connect(server_url()) as connection,
    ):
        connection.adapters.register_loader("text", Upper)
        connection.adapters.register_loader("varchar", Upper)
        connection.adapters.register_dumper(str, UpperDumper)
        with users.within(connection) as metadata:
            metadata.update_user_metadata("alice", {"theme": "dark"})
            metadata.modify_user_metadata("alice", lambda found: {**found, "n": 1})
            assert metadata.get_user_metadata("alice").metadata == {"theme": "dark", "n": 1}

"""``check_change`` of an override: every write passes through it, and it may refuse."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psycopg
import pytest
from conftest import PATCH_ALL
from postgres_server import server_url
from protected_roles import protect_roles

import usermetadata
from usermetadata import (
    DamagedMetadataError,
    InMemoryStorage,
    InvalidInputError,
    PostgresStorage,
    SQLiteStorage,
    UsageError,
    UserMetadata,
    UserMetadataOverrideConfig,
    syncio,
)
from usermetadata import asyncio as aio
from usermetadata.changes import Merge
from usermetadata.interfaces import MetadataResult, RecipeInterface

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata import Storage

ROLES = UserMetadataOverrideConfig(functions=protect_roles)
WRITES: dict[str, Callable[[Any, dict[str, Any]], object]] = {
    "update": lambda f, context: f.update_user_metadata("alice", {"role": "admin"}, context),
    "update to None": lambda f, context: f.update_user_metadata("alice", {"role": None}, context),
    "set": lambda f, context: f.set_user_metadata("alice", {"role": "admin"}, context),
    "set without": lambda f, context: f.set_user_metadata("alice", {}, context),
    "modify": lambda f, context: f.modify_user_metadata(
        "alice", lambda old: {**old, "role": "admin"}, context
    ),
    "modify in place": lambda f, context: f.modify_user_metadata(
        "alice", lambda old: old.update(role="admin") or old, context
    ),
    "bulk": lambda f, context: f.update_bulk_user_metadata(
        {"bob": {"n": 2}, "alice": {"role": "admin"}}, context
    ),
    "clear": lambda f, context: f.clear_user_metadata("alice", context),
    "erase": lambda f, context: f.erase_user("alice", context),
    "erase everywhere": lambda f, context: f.erase_user("alice", context, all_apps=True),
}
STORED: dict[str, dict[str, Any]] = {"alice": {"role": "user", "n": 1}, "bob": {"n": 1}}


def test_every_function_that_writes_is_tried() -> None:
    """A function that is added must be added to the table above."""
    names = {name for name in dir(syncio) if name.endswith(("_metadata", "erase_user"))}
    writing = {name for name in names if not name.startswith(("get_", "list_", "count_"))}
    tried: set[str] = set()

    class Names:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: tried.add(name)

    for write in WRITES.values():
        write(Names(), {})
    assert tried == writing


def fill(storage: Storage) -> None:
    """Store what the tests below start with."""
    storage.write([(user_id, Merge(metadata)) for user_id, metadata in STORED.items()])


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_the_documented_override_cannot_be_bypassed(
    facade: Any, storage: Storage, write: Callable[[Any, dict[str, Any]], object]
) -> None:
    """Each function is refused as a whole, and works for an administrator."""
    fill(storage)
    usermetadata.init(storage, ROLES)
    with pytest.raises(PermissionError, match="only administrators may change a role"):
        write(facade, {})
    assert storage.read(["alice", "bob"]) == STORED
    write(facade, {"is_admin": True})
    assert storage.read(["alice"]).get("alice") != STORED["alice"]
    assert facade.update_user_metadata("bob", {"n": 3}).metadata == {"n": 3}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_nor_in_a_block(
    kind: str, database: Path, schema: str, write: Callable[[Any, dict[str, Any]], object]
) -> None:
    """Functions in the caller's transaction are refused as well; the transaction goes on."""
    storage: SQLiteStorage | PostgresStorage
    with contextlib.ExitStack() as stack:
        connection: Any
        if kind == "sqlite":
            storage = SQLiteStorage(database)
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(database)))
        else:
            storage = PostgresStorage(server_url(), schema=schema)
            connection = stack.enter_context(psycopg.connect(server_url()))
        stack.enter_context(contextlib.closing(storage))
        fill(storage)
        users = UserMetadata(storage, override=ROLES)
        with users.within(connection) as metadata:
            metadata.update_user_metadata("bob", {"m": 1})
            with pytest.raises(PermissionError, match="only administrators may change a role"):
                write(metadata, {})
            assert metadata.get_user_metadata("alice").metadata == STORED["alice"]
        connection.commit()
        assert storage.read(["alice", "bob"]) == {**STORED, "bob": {"n": 1, "m": 1}}
        with users.within(connection) as metadata:
            write(metadata, {"is_admin": True})
        connection.commit()
        assert storage.read(["alice"]).get("alice") != STORED["alice"]


def test_nor_in_another_app(storage: Storage, facade: Any) -> None:
    """Erasing in all apps is refused if one of them is, and ``for_app`` has the same override."""
    fill(storage.for_app("shop"))
    usermetadata.init(storage, ROLES)
    facade.set_user_metadata("alice", {"n": 2})
    with pytest.raises(PermissionError):
        facade.erase_user("alice", all_apps=True)
    assert storage.read(["alice"]) == {"alice": {"n": 2}}
    shop = UserMetadata(storage, override=ROLES).for_app("shop")
    with pytest.raises(PermissionError):
        shop.syncio.set_user_metadata("alice", {})
    assert storage.for_app("shop").read(["alice"]) == {"alice": STORED["alice"]}


def override(check: Callable[..., object]) -> UserMetadataOverrideConfig:
    """Return an override that checks changes and nothing else."""

    def functions(original: RecipeInterface) -> RecipeInterface:
        original.check_change = check  # type: ignore[method-assign, assignment]
        return original

    return UserMetadataOverrideConfig(functions=functions)


def test_the_check_sees_each_change(facade: Any, storage: Storage) -> None:
    """It gets what is stored and what would be, ``None`` for no row, and the caller's context."""
    seen: list[tuple[Any, ...]] = []
    usermetadata.init(storage, override(lambda *arguments: seen.append(arguments)))
    context = {"by": "me"}
    facade.update_user_metadata("alice", {"n": 1}, context)
    facade.modify_user_metadata("alice", lambda old: old.clear() or {"m": 1})
    facade.update_bulk_user_metadata({"alice": {"m": 2}, "bob": {}}, context)
    facade.clear_user_metadata("alice", context)
    facade.erase_user("bob", context)
    facade.get_user_metadata("alice", context)
    assert seen == [
        ("alice", None, {"n": 1}, context),
        ("alice", {"n": 1}, {"m": 1}, {}),
        ("alice", {"m": 1}, {"m": 2}, context),
        ("bob", None, {}, context),
        ("alice", {"m": 2}, None, context),
        ("bob", {}, None, context),
    ]
    assert all(arguments[3] is context for arguments in (seen[0], *seen[2:]))


def test_the_check_cannot_change_what_is_stored(facade: Any, storage: Storage) -> None:
    """It gets copies."""

    def spoil(user_id: str, old: Any, new: Any, user_context: Any) -> None:
        (old or {}).clear()
        new["list"].append(1)

    usermetadata.init(storage, override(spoil))
    assert facade.set_user_metadata("alice", {"list": []}).metadata == {"list": []}
    assert facade.update_user_metadata("alice", {"n": 1}).metadata == {"list": [], "n": 1}
    assert storage.read(["alice"]) == {"alice": {"list": [], "n": 1}}


def test_the_check_sees_what_the_change_replaces(facade: Any, storage: Storage) -> None:
    """Of several threads that claim something, one gets it: no write comes in between."""

    def claimed(user_id: str, old: Any, new: Any, user_context: Any) -> None:
        if old is not None:
            raise KeyError("claimed")

    usermetadata.init(storage, override(claimed))
    for number in range(5):
        outcomes: list[bool] = []

        def claim(thread: int, number: int = number, outcomes: list[bool] = outcomes) -> None:
            try:
                facade.update_user_metadata(f"item {number}", {"owner": thread})
                outcomes.append(True)
            except KeyError:
                outcomes.append(False)

        threads = [threading.Thread(target=claim, args=[thread]) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [False, False, False, True]


def test_a_refused_call_fails_alone(storage: Storage) -> None:
    """Concurrent calls that share a batch with it are written."""
    usermetadata.init(storage, ROLES)

    async def main() -> None:
        updates: list[dict[str, Any]] = [{"n": 1}, {"role": "admin"}, {"n": 2}]
        calls = [aio.update_user_metadata(f"user {n}", each) for n, each in enumerate(updates)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        kinds = ["MetadataResult", "PermissionError", "MetadataResult"]
        assert [type(outcome).__name__ for outcome in outcomes] == kinds

    asyncio.run(main())
    assert storage.read([f"user {n}" for n in range(3)]) == {"user 0": {"n": 1}, "user 2": {"n": 2}}


def test_the_check_runs_in_the_callers_context_and_not_the_library(
    facade: Any, storage: Storage
) -> None:
    """Context variables are the caller's; a call of the library is refused, as in ``modify``."""
    request = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def look(*_: object) -> None:
        seen.append(request.get())
        with pytest.raises(UsageError, match="by check_change, which runs inside the storage's"):
            syncio.get_user_metadata("alice")

    usermetadata.init(storage, override(look))
    request.set("mine")
    facade.update_user_metadata("alice", {"n": 1})
    facade.erase_user("alice", all_apps=True)
    assert seen == ["mine", "mine"]


def test_a_damaged_row_is_not_checked_blindly(database: Path, facade: Any) -> None:
    """With a check, setting and clearing read the row, and raise what reading it raises."""
    usermetadata.init(database, ROLES)
    facade.update_user_metadata("alice", {})
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE user_metadata SET user_metadata = '{'")
    for write in (facade.clear_user_metadata, facade.erase_user):
        with pytest.raises(DamagedMetadataError):
            write("alice")


def test_an_async_check_is_refused() -> None:
    """It would never be awaited."""

    async def check(*_: object) -> None: ...

    for wrong in (check, 7):
        with pytest.raises(InvalidInputError, match="check_change is not a plain function; make"):
            usermetadata.init("memory://", override(cast("Any", wrong)))


def test_a_check_that_returns_something_to_await_is_refused(facade: Any) -> None:
    """Nothing is written: the check was not made."""

    async def check(*_: object) -> None: ...

    usermetadata.init("memory://", override(lambda *arguments: check(*arguments)))  # noqa: PLW0108 - not an async function
    with pytest.raises(InvalidInputError, match="check_change: it returned something to await"):
        facade.update_user_metadata("alice", {"n": 1})
    assert facade.get_user_metadata("alice").metadata == {}


class Wrapped(RecipeInterface):
    """An override class as written for the SDK."""

    def __init__(self, original: RecipeInterface) -> None:
        self.original = original

    async def get_user_metadata(self, user_id: str, user_context: Any) -> MetadataResult:
        return await self.original.get_user_metadata(user_id, user_context)

    async def update_user_metadata(
        self, user_id: str, metadata_update: Any, user_context: Any
    ) -> MetadataResult:
        return await self.original.update_user_metadata(user_id, metadata_update, user_context)

    async def clear_user_metadata(self, user_id: str, user_context: Any) -> Any:
        return await self.original.clear_user_metadata(user_id, user_context)


@pytest.mark.parametrize(
    "functions",
    [
        lambda original: Wrapped(protect_roles(original)),
        lambda original: protect_roles(Wrapped(original)),
    ],
    ids=["inside", "outside"],
)
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_overrides_may_be_composed(
    facade: Any, functions: Any, write: Callable[[Any, dict[str, Any]], object]
) -> None:
    """A class that wraps what has a check, or is given one, keeps it."""
    storage = InMemoryStorage()
    fill(storage)
    usermetadata.init(storage, UserMetadataOverrideConfig(functions=functions))
    with pytest.raises(PermissionError):
        write(facade, {})
    assert storage.read(["alice", "bob"]) == STORED


def test_one_object_may_serve_several_stores() -> None:
    """What the override's object lacks is the store's own, and the object is not changed."""
    mine = Wrapped(cast("Any", None))

    def functions(original: RecipeInterface) -> RecipeInterface:
        mine.original = original
        return mine

    config = UserMetadataOverrideConfig(functions=functions)
    one = UserMetadata("memory://", override=config)
    two = UserMetadata("memory://", override=config)
    one.syncio.set_user_metadata("alice", {"n": 1})
    two.syncio.set_user_metadata("alice", {"n": 2})
    assert one.storage.read(["alice"]) == {"alice": {"n": 1}}
    assert two.storage.read(["alice"]) == {"alice": {"n": 2}}
    assert set(vars(mine)) == {"original"}


def test_a_repeated_init_calls_no_override() -> None:
    """The override of the first one stays as it is."""
    calls: list[RecipeInterface] = []

    def functions(original: RecipeInterface) -> RecipeInterface:
        calls.append(original)
        return original

    config = UserMetadataOverrideConfig(functions=functions)
    for _ in range(3):
        usermetadata.init("memory://", config)
    assert len(calls) == 1


GEVENT = (
    PATCH_ALL
    + """
import sys
sys.path.insert(0, sys.argv[1])
from protected_roles import protect_roles
from usermetadata import UserMetadata, UserMetadataOverrideConfig
users = UserMetadata("memory://", override=UserMetadataOverrideConfig(functions=protect_roles))
try:
    users.syncio.update_user_metadata("alice", {"role": "admin"})
except PermissionError as error:
    print(error)
"""
)


def test_a_refusal_prints_nothing_under_gevent() -> None:
    """The caller gets the exception, and no traceback with metadata goes to standard error."""
    examples = Path(__file__).parent.parent / "docs/examples"
    finished = subprocess.run(
        [sys.executable, "-c", GEVENT, str(examples)], capture_output=True, text=True, check=False
    )
    assert finished.stdout == "only administrators may change a role\n"
    assert finished.stderr == ""

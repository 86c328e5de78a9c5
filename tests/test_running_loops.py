"""Storages are called where no event loop is running, unless they ask for the loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest
from asgi_server import serve
from click.testing import CliRunner
from conftest import FACADES

import usermetadata
import usermetadata.asyncio
from usermetadata import InMemoryStorage, UserMetadata, UserMetadataOverrideConfig, syncio
from usermetadata.cli import main
from usermetadata.interfaces import RecipeInterface
from usermetadata.server import create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


def is_loop_running() -> bool:
    """Tell it as Django's ORM and ``asyncio.run`` find it out."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Strict(InMemoryStorage):
    """Refuses each call in a thread whose event loop is running, and can run a loop itself."""

    reads_in_flight = writes_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def check(self) -> None:
        assert not is_loop_running()
        asyncio.run(asyncio.sleep(0))
        self.threads.append(threading.get_ident())

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        self.check()
        return super().read(user_ids)

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        self.check()
        return super().read_after(user_id, limit)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self.check()
        return super().write(changes)

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        self.check()
        return super().erase(user_id, check)

    def count(self, where: Any) -> int:
        self.check()
        return super().count(where)

    def for_app(self, app_id: str) -> Strict:
        self.check()
        return super().for_app(app_id)

    def close(self) -> None:
        self.check()
        super().close()


class Plain(RecipeInterface):
    """An override that changes nothing."""

    def __init__(self, original: RecipeInterface) -> None:
        self.original = original

    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return await self.original.get_user_metadata(user_id, user_context)

    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> Any:
        return await self.original.update_user_metadata(user_id, metadata_update, user_context)

    async def clear_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
        return await self.original.clear_user_metadata(user_id, user_context)


OVERRIDES = {"no override": None, "override": UserMetadataOverrideConfig(functions=Plain)}


@pytest.fixture(params=OVERRIDES)
def override(request: pytest.FixtureRequest) -> UserMetadataOverrideConfig | None:
    """With and without one."""
    return OVERRIDES[request.param]


def call_all(functions: Any) -> None:
    """Call each function once."""
    functions.update_user_metadata("alice", {"n": 1})
    functions.set_user_metadata("alice", {"n": 2})
    functions.modify_user_metadata("alice", lambda old: {"n": old["n"] + 1})
    functions.update_bulk_user_metadata({"alice": {"m": 1}, "bob": {}})
    assert functions.get_user_metadata("alice").metadata == {"n": 3, "m": 1}
    assert functions.get_bulk_user_metadata(["alice", "bob"])["bob"].metadata == {}
    assert [*functions.list_user_metadata()] == ["alice", "bob"]
    assert functions.count_user_metadata() == 2
    functions.clear_user_metadata("alice")
    functions.erase_user("bob")
    functions.erase_user("bob", all_apps=True)


def test_no_loop_runs_in_a_storages_thread(
    facade: Any, override: UserMetadataOverrideConfig | None
) -> None:
    """Each function of both facades, with and without an override."""
    storage = Strict()
    usermetadata.init(storage, override)
    call_all(facade)
    usermetadata.close()
    assert len(storage.threads) == 12  # read_after reads


def test_no_loop_runs_where_blocking_functions_are_called_on_it(
    override: UserMetadataOverrideConfig | None,
) -> None:
    """A blocking call in a coroutine, as in a notebook; afterwards the loop is as it was."""
    storage = Strict()

    async def main() -> None:
        task = asyncio.current_task()
        usermetadata.init(storage, override)
        call_all(syncio)
        assert asyncio.current_task() is task
        await asyncio.sleep(0)
        with UserMetadata(storage, override=override) as users:
            call_all(users.for_app("other").syncio)
        await asyncio.wait_for(asyncio.sleep(0), 60)
        usermetadata.UserMetadata(storage).close()
        storage.reads_in_flight = storage.writes_in_flight = 0
        asyncio.get_running_loop().call_soon(call_in_callback)
        await asyncio.sleep(0)

    def call_in_callback() -> None:
        # Here the loop has no current task.
        with UserMetadata(storage, override=override) as users:
            storage.reads_in_flight = 1
            users.syncio.get_user_metadata("alice")

    asyncio.run(main(), debug=True)


@pytest.mark.parametrize("name", FACADES)
def test_no_loop_runs_in_nested_calls(name: str) -> None:
    """An override may call blocking functions: of the same store, of another one, in ``modify``."""
    other = UserMetadata(Strict())
    overridden = UserMetadata(Strict(), override=OVERRIDES["override"])

    class Nesting(Plain):
        async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
            call_all(other.syncio)
            call_all(overridden.syncio)
            syncio.update_user_metadata("bob", {"n": 1})
            syncio.modify_user_metadata("bob", in_the_lock)
            return await super().get_user_metadata(user_id, user_context)

    def in_the_lock(metadata: dict[str, Any]) -> dict[str, Any]:
        call_all(other.syncio)
        call_all(overridden.syncio)
        return metadata

    usermetadata.init(Strict(), UserMetadataOverrideConfig(functions=Nesting))
    assert FACADES[name].get_user_metadata("alice").metadata == {}
    assert FACADES[name].modify_user_metadata("alice", in_the_lock).metadata == {}


def test_an_override_keeps_the_thread(override: UserMetadataOverrideConfig | None) -> None:
    """What a storage binds to its caller's thread, as Django does, it finds again."""
    storage = Strict()
    usermetadata.init(storage, override)
    call_all(syncio)
    assert {*storage.threads} == {threading.get_ident()}


def test_an_error_of_the_storage_leaves_the_loop_running(
    override: UserMetadataOverrideConfig | None,
) -> None:
    """After an exception, and after an interrupt of the storage, tasks go on."""

    async def main() -> None:
        usermetadata.init(Strict(), override)
        for error in (LookupError, KeyboardInterrupt):

            def fail(_: object, error: type[BaseException] = error) -> Any:
                raise error

            with pytest.raises(error):
                syncio.modify_user_metadata("alice", fail)
            await asyncio.wait_for(asyncio.sleep(0), 60)

    asyncio.run(main())


def test_a_call_when_no_thread_can_start_has_no_running_loop() -> None:
    """At the interpreter's end the ``asyncio`` functions call the storage in the loop's thread."""
    usermetadata.init(storage := Strict())
    made = usermetadata.UserMetadataRecipe.get_instance().recipe_implementation

    async def main() -> None:
        await made.update_user_metadata("alice", {"n": 1}, {})
        usermetadata.close()  # the threads have ended; the storage is the caller's and still open
        assert (await made.get_user_metadata("alice", {})).metadata == {"n": 1}

    asyncio.run(main())
    assert storage.threads[-1] == threading.get_ident()


def test_a_storage_that_asks_for_the_loop_is_called_on_it() -> None:
    """``reads_in_flight`` and ``writes_in_flight`` of 0 ask for it."""
    seen: list[bool] = []

    class Asking(InMemoryStorage):
        def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
            seen.append(is_loop_running())
            return super().read(user_ids)

    async def main() -> None:
        usermetadata.init(Asking())
        await usermetadata.asyncio.get_user_metadata("alice")
        syncio.get_user_metadata("alice")

    asyncio.run(main())
    assert seen == [True, True]


def test_the_server_calls_it_without_a_loop() -> None:
    """Requests for the storage's own app and for another one, which the path names."""
    storage = Strict()
    with serve(create_app(storage)) as port:
        for path in ("", "/appid-other"):
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            with contextlib.closing(connection):
                body = json.dumps({"userId": "alice", "metadataUpdate": {"n": 1}})
                connection.request("PUT", f"{path}/recipe/user/metadata", body)
                assert json.load(connection.getresponse())["metadata"] == {"n": 1}
    assert len(storage.threads) == 3


def test_the_command_line_calls_it_without_a_loop() -> None:
    """Commands on the storage that a factory makes."""
    for arguments in (["update", "alice", '{"n": 1}'], ["get", "alice"], ["export"]):
        command = [*arguments, "--storage", f"{__name__}:Strict", "--app-id", "other"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output

"""SuperTokens' ``delete_user`` erases here what the core erases in its own table."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import pytest
from asgi_server import serve
from conftest import CLIENTS
from supertokens_core import Core

from usermetadata import SQLiteStorage
from usermetadata.changes import Merge
from usermetadata.server import create_app

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from sdk_programs import SDKPrograms

END = "-----END CERTIFICATE-----"
INIT = """
import asyncio, json, sys
import usermetadata
from supertokens_python import InputAppInfo, SupertokensConfig, init
from supertokens_python import asyncio as asynchronous
from supertokens_python import syncio as blocking
from supertokens_python.recipe import accountlinking, dashboard
from supertokens_python.recipe import usermetadata as recipe
from usermetadata.supertokens import erase_deleted_users, use_storage

core, database = sys.argv[1:3]
usermetadata.init(database)
init(
    app_info=InputAppInfo(
        app_name="shop", api_domain="http://localhost", website_domain="http://localhost"
    ),
    supertokens_config=SupertokensConfig(connection_uri=core),
    framework="fastapi",
    recipe_list=[
        recipe.init(override=recipe.UserMetadataOverrideConfig(functions=use_storage)),
        accountlinking.init(
            override=accountlinking.AccountLinkingOverrideConfig(functions=erase_deleted_users)
        ),
        dashboard.init(api_key="a dashboard's key"),
    ],
    mode="asgi",
)
"""
DELETE = """
async def delete_all(deletions):
    for user_id, with_linked in deletions:
        await asynchronous.delete_user(user_id, with_linked)

asyncio.run(delete_all(json.loads(sys.argv[3])))
usermetadata.UserMetadataRecipe.reset()
"""


class World:
    """A core with users, and our storage with metadata for the same ids as the core's table."""

    def __init__(self, core: Core, uri: str, database: Path, programs: SDKPrograms) -> None:
        self.core = core
        self.uri = uri
        self.database = database
        self.programs = programs

    def add(self, *accounts: str, external: tuple[str, ...] = ()) -> None:
        """Add a user whose accounts are linked to the first; map some to ``{id}-external``."""
        self.core.add(*accounts)
        self.core.external.update({account: f"{account}-external" for account in external})

    def store_metadata(self) -> None:
        """Give every id metadata, in the core and here."""
        core = self.core
        core.metadata = {*core.ids, *core.external.values()}
        with contextlib.closing(SQLiteStorage(self.database)) as storage:
            storage.write([(user_id, Merge({"of": user_id})) for user_id in core.metadata])

    def run(self, program: str, *arguments: object) -> str:
        """Run a program that uses the SDK with both overrides."""
        return self.programs.run(INIT + program, self.uri, self.database, *arguments)

    def left(self) -> set[str]:
        """Return the ids that have metadata here."""
        with contextlib.closing(SQLiteStorage(self.database)) as storage:
            return set(storage.read_after("", 10_000))


@pytest.fixture
def world(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sdk_programs: SDKPrograms
) -> Generator[World, None, None]:
    """An empty core, which is running, and an empty storage."""
    # The SDK makes an HTTP client for each request. Loading all public certificates takes 45 ms.
    first = Path(certifi.where()).read_text(encoding="utf-8").partition(END)
    certificate = tmp_path / "certificate.pem"
    certificate.write_text(first[0] + END, encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    core = Core()
    with serve(core.app()) as port:
        yield World(core, f"http://127.0.0.1:{port}", database, sdk_programs)


ONLY, ALL = False, True  # whether the linked accounts are deleted as well
DELETIONS = [
    # accounts, those with an external id, the deleted one, how, and whose metadata is erased
    ("a", "", "a", ALL, {"a"}),
    ("a", "", "a", ONLY, {"a"}),
    ("a", "a", "a", ALL, {"a-external"}),
    ("a", "a", "a-external", ONLY, {"a-external"}),
    ("abc", "", "a", ALL, {"a", "b", "c"}),
    ("abc", "", "b", ALL, {"a", "b", "c"}),
    ("abc", "", "a", ONLY, set()),
    ("abc", "", "b", ONLY, {"b"}),
    ("abc", "b", "a", ALL, {"a", "b-external", "c"}),
    ("abc", "ab", "b", ALL, {"a-external", "b-external", "c"}),
    ("abc", "ab", "a-external", ONLY, set()),
    ("abc", "ab", "b", ONLY, {"b-external"}),
    ("abc", "ab", "b-external", ONLY, {"b-external"}),
]


def add_users(world: World) -> tuple[list[tuple[str, bool]], set[str]]:
    """Add the users of ``DELETIONS``; return the deletions, and the ids that they erase."""
    world.add("bystander")
    deletions: list[tuple[str, bool]] = []
    all_erased: set[str] = set()
    for number, (accounts, external, deleted, how, erased) in enumerate(DELETIONS):
        names = [f"{number}-{account}" for account in accounts]
        world.add(*names, external=tuple(f"{number}-{account}" for account in external))
        deletions.append((f"{number}-{deleted}", how))
        all_erased |= {f"{number}-{user_id}" for user_id in erased}
    return deletions, all_erased


def test_deleting_a_user(world: World) -> None:
    """The metadata of the deleted accounts is erased, under the external ids of the mapping.

    The metadata of a primary user stays as long as an account is linked to it.
    """
    deletions, erased = add_users(world)
    world.store_metadata()
    before = world.left()
    world.run(DELETE, json.dumps(deletions))
    assert before - world.left() == erased
    assert world.left() == world.core.metadata


def all_deletions(world: World) -> Iterator[tuple[str, bool]]:
    """Make users of one and two accounts, mapped or not; yield every way to delete an account."""
    numbers = itertools.count()
    for accounts, is_gone in [(1, False), (2, False), (2, True)]:
        for mapped in itertools.product([False, True], repeat=accounts):
            for deleted, by_external in itertools.product(range(accounts), [False, True]):
                if by_external and not mapped[deleted]:
                    continue
                for with_linked in (False, True):
                    number = next(numbers)
                    names = [f"{number}-{name}" for name in ["primary", "linked"][:accounts]]
                    external = [name for name, is_in in zip(names, mapped, strict=True) if is_in]
                    world.add(*names, external=tuple(external))
                    if is_gone:
                        del world.core.primary[names[0]]
                    name = names[deleted]
                    yield f"{name}-external" if by_external else name, with_linked


def test_what_is_left_is_what_the_core_leaves(world: World) -> None:
    """However a user is deleted, the same ids have metadata afterwards as in the core's table.

    This includes a primary user whose own account was deleted before.
    """
    deletions = list(all_deletions(world))
    assert len(deletions) > 50
    world.store_metadata()
    before = world.left()
    world.run(DELETE, json.dumps(deletions))
    assert world.left() == world.core.metadata
    assert world.left() < before


def test_an_external_id_of_another_user(world: World) -> None:
    """A user who took over the id of another one, with ``force``, keeps the metadata."""
    deletions = [("1-old", ALL), ("2-old", ONLY), ("3-new", ALL), ("4-new", ONLY)]
    for number in (1, 2, 3, 4):
        world.add(f"{number}-old")
        world.add(f"{number}-new")
        world.core.external[f"{number}-new"] = f"{number}-old"
    world.store_metadata()
    before = world.left()
    world.run(DELETE, json.dumps(deletions))
    assert world.left() == world.core.metadata == before


def test_the_blocking_facade_and_the_dashboard(world: World) -> None:
    """``supertokens_python.syncio`` and the SDK's dashboard delete with the same override."""
    program = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from supertokens_python.framework.fastapi import get_middleware
blocking.delete_user("alice")
app = FastAPI()
app.add_middleware(get_middleware())
client = TestClient(app, headers={"authorization": "Bearer a dashboard's key"})
print(client.delete("/auth/dashboard/api/user", params={"userId": "bob"}).json())
usermetadata.UserMetadataRecipe.reset()
"""
    for user in ("alice", "bob", "carol"):
        world.add(user)
    world.store_metadata()
    assert world.run(program) == "{'status': 'OK'}\n"
    assert world.left() == world.core.metadata == {"carol"}


def test_the_core_fails(world: World) -> None:
    """If the core does not delete the user, the error is the SDK's, and nothing is erased."""
    program = """
try:
    blocking.delete_user("alice")
except Exception as error:
    print(error)
"""
    world.add("alice", "linked")
    world.core.refused.add("alice")
    world.store_metadata()
    assert "status code: 500" in world.run(program)
    assert world.left() == {"alice", "linked"}


def test_a_user_whom_the_core_does_not_know(world: World) -> None:
    """The core ignores such an id; its metadata, which another system may need, stays."""
    world.store_metadata()
    with contextlib.closing(SQLiteStorage(world.database)) as storage:
        storage.write([("of another system", Merge({}))])
    world.run(DELETE, json.dumps([["of another system", True]]))
    assert world.left() == {"of another system"}


def test_an_id_that_cannot_be_erased(world: World) -> None:
    """The other ids are erased, and the error names the one that is left."""
    program = """
try:
    blocking.delete_user("alice")
except usermetadata.UserMetadataError as error:
    print(error)
    print(type(error.__cause__).__name__)
"""
    world.add("alice", "linked 1", "linked 2")
    world.store_metadata()
    with contextlib.closing(sqlite3.connect(world.database)) as direct:
        direct.execute(
            "CREATE TRIGGER keep BEFORE DELETE ON user_metadata WHEN old.user_id = 'linked 1'"
            " BEGIN SELECT raise(ABORT, 'kept'); END"
        )
    message, cause = world.run(program).splitlines()
    assert message.startswith("delete_user: the core has deleted the user, but the metadata of")
    assert message.endswith("of 'linked 1' was not erased; clear it")
    assert cause == "StorageError"
    assert world.core.metadata == set()
    assert world.left() == {"linked 1"}


def test_a_damaged_row(world: World) -> None:
    """A row that is not a JSON object is erased as well."""
    world.add("alice")
    world.store_metadata()
    with contextlib.closing(sqlite3.connect(world.database)) as direct, direct:
        direct.execute("UPDATE user_metadata SET user_metadata = 'damaged'")
    world.run(DELETE, json.dumps([["alice", True]]))
    assert world.left() == set()


def test_an_account_that_another_process_linked(world: World) -> None:
    """The accounts are those of the core, not those that the SDK remembers in ``user_context``."""
    program = """
import httpx
context = {}
assert len(blocking.get_user("alice", context).login_methods) == 1
body = {"recipeUserId": "linked", "primaryUserId": "alice"}
httpx.post(f"{core}/recipe/accountlinking/user/link", json=body).raise_for_status()
assert len(blocking.get_user("alice", context).login_methods) == 1
blocking.delete_user("alice", user_context=context)
"""
    world.add("alice")
    world.add("linked")
    world.store_metadata()
    world.run(program)
    assert world.left() == world.core.metadata == set()


def test_a_mapping_does_not_see_our_rows(world: World) -> None:
    """The core refuses to map a user that has metadata in its own table, not one that has it here.

    Then the metadata stays under the SuperTokens id, also when the user is deleted.
    """
    program = """
try:
    blocking.create_user_id_mapping("alice", "alice-external")
except Exception as error:
    print(error)
blocking.create_user_id_mapping("bob", "bob-external")
blocking.delete_user("bob-external")
"""
    world.add("alice")
    world.add("bob")
    world.store_metadata()
    world.core.metadata.remove("bob")
    assert "UserId is already in use in UserMetadata recipe" in world.run(program)
    assert world.left() == {"alice", "bob"}


def test_the_metadata_of_users_who_are_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of the page finds the metadata that a deletion without the override left."""
    world.add("alice", external=("alice",))
    world.add("bob", "linked")
    world.add("carol")
    world.store_metadata()
    with contextlib.closing(SQLiteStorage(world.database)) as storage:
        storage.write([("carol", Merge({"text": "é"}))])
    for deleted in ("carol", "linked"):
        world.core.delete(deleted, None, with_linked=False)
    monkeypatch.setenv("SUPERTOKENS_URI", world.uri)
    export = [sys.executable, "-m", "usermetadata", "export", "--storage", str(world.database)]
    exported = subprocess.run(export, capture_output=True, check=True, timeout=60).stdout
    program = Path(__file__).parent.parent / "docs" / "examples" / "users_without_account.py"
    found = subprocess.run(
        [sys.executable, str(program)], input=exported, capture_output=True, check=True, timeout=60
    )
    assert found.stdout.decode().split() == ["carol", "linked"]


@pytest.mark.usefixtures("packages")
def test_the_sdk_for_node_beside_a_core(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the override of the page, ``supertokens-node`` erases the same ids."""
    program = """
require("./beside_a_core");
const { deleteUser } = require("supertokens-node");
async function main() {
  for (const [userId, withLinked] of JSON.parse(process.argv[1])) {
    await deleteUser(userId, withLinked);
  }
}
main();
"""
    deletions, erased = add_users(world)
    world.store_metadata()
    before = world.left()
    core = world.core.app()
    with contextlib.closing(SQLiteStorage(world.database)) as storage:
        server = create_app(storage, api_keys=["a key"])

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            is_ours = scope["path"].startswith("/recipe/user/metadata")
            await (server if is_ours else core)(scope, receive, send)

        with serve(proxy, lifespan="off") as port:
            monkeypatch.setenv("SUPERTOKENS_URI", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("SUPERTOKENS_API_KEY", "a key")
            command = ["node", "-e", program, json.dumps(deletions)]
            subprocess.run(command, cwd=CLIENTS, check=True, timeout=60)
    assert before - world.left() == erased
    assert world.left() == world.core.metadata

"""SuperTokens' own Python SDK: with this library's storage in it, and with its server behind it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from usermetadata import SQLiteStorage
from usermetadata.changes import Merge

if TYPE_CHECKING:
    from pathlib import Path

    from usermetadata import InMemoryStorage

INIT = """
import asyncio, json, sys
import usermetadata
from supertokens_python import InputAppInfo, SupertokensConfig, init
from supertokens_python.recipe import dashboard
from supertokens_python.recipe import usermetadata as recipe
from supertokens_python.recipe.usermetadata import asyncio as asynchronous
from supertokens_python.recipe.usermetadata import syncio as blocking

def init_sdk(connection_uri, override=None):
    init(
        app_info=InputAppInfo(
            app_name="shop", api_domain="http://localhost", website_domain="http://localhost"
        ),
        supertokens_config=SupertokensConfig(connection_uri=connection_uri),
        framework="fastapi",
        recipe_list=[recipe.init(override=override), dashboard.init(api_key="a dashboard's key")],
        mode="asgi",
    )
"""
CALLS = """
async def calls():
    updated = await asynchronous.update_user_metadata("alice", {"theme": "dark", "todos": ["a"]})
    assert updated.metadata == {"theme": "dark", "todos": ["a"]}
    updated = await asynchronous.update_user_metadata("alice", {"todos": None}, {"tenant": "x"})
    assert updated.metadata == {"theme": "dark"}
    assert (await asynchronous.get_user_metadata("alice")).metadata == {"theme": "dark"}
    assert (await asynchronous.get_user_metadata("nobody")).metadata == {}
    await asynchronous.clear_user_metadata("nobody")

asyncio.run(calls())
assert blocking.update_user_metadata("bob", {"n": 1}).metadata == {"n": 1}
assert blocking.get_user_metadata("bob").metadata == {"n": 1}
blocking.clear_user_metadata("bob")
assert blocking.get_user_metadata("bob").metadata == {}
"""


def run(program: str, *arguments: object) -> str:
    """Run a program in a process of its own, as the SDK is initialised once for all."""
    command = [sys.executable, "-c", INIT + program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_sdk_keeps_its_calls_and_moves_the_data(database: Path) -> None:
    """With the override, the SDK's functions, both facades, use the storage; no core is asked."""
    program = """
from usermetadata.supertokens import use_storage
usermetadata.init(sys.argv[1])
init_sdk("http://localhost:1", recipe.UserMetadataOverrideConfig(functions=use_storage))
"""
    run(program + CALLS + "usermetadata.UserMetadataRecipe.reset()", database)
    storage = SQLiteStorage(database)
    assert storage.read(["alice", "bob"]) == {"alice": {"theme": "dark"}}
    storage.close()


def test_the_dashboard_edits_the_storage(database: Path) -> None:
    """The metadata editor of the SDK's dashboard shows and changes what is in the storage."""
    program = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from supertokens_python.framework.fastapi import get_middleware
from usermetadata.supertokens import use_storage
usermetadata.init(sys.argv[1])
init_sdk("http://localhost:1", recipe.UserMetadataOverrideConfig(functions=use_storage))
app = FastAPI()
app.add_middleware(get_middleware())
client = TestClient(app, headers={"authorization": "Bearer a dashboard's key"})
path = "/auth/dashboard/api/user/metadata"
print(client.get(path, params={"userId": "alice"}).json())
body = {"userId": "alice", "data": json.dumps({"theme": "light", "new": [1]})}
print(client.put(path, json=body).json())
print(client.get(path, params={"userId": "alice"}).json())
usermetadata.UserMetadataRecipe.reset()
"""
    storage = SQLiteStorage(database)
    storage.write([("alice", Merge({"theme": "dark", "old": True}))])
    shown = run(program, database).splitlines()
    assert shown == [
        "{'status': 'OK', 'data': {'theme': 'dark', 'old': True}}",
        "{'status': 'OK'}",
        "{'status': 'OK', 'data': {'theme': 'light', 'new': [1]}}",
    ]
    assert storage.read(["alice"]) == {"alice": {"theme": "light", "new": [1]}}
    storage.close()


def test_the_sdk_as_it_is_uses_the_server(
    usermetadata_server: str, usermetadata_storage: InMemoryStorage
) -> None:
    """Without any override: the server is the SDK's ``connection_uri``, in place of a core."""
    run("init_sdk(sys.argv[1])" + CALLS, usermetadata_server)
    assert usermetadata_storage.read(["alice", "bob"]) == {"alice": {"theme": "dark"}}

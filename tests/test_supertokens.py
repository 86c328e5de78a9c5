"""SuperTokens' Python SDK, with this library's storage or with its server."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
from asgi_server import serve
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from usermetadata import SQLiteStorage
from usermetadata.changes import Merge

if TYPE_CHECKING:
    import pytest
    from sdk_programs import SDKPrograms
    from starlette.requests import Request

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


def test_the_sdk_keeps_its_calls_and_moves_the_data(
    database: Path, sdk_programs: SDKPrograms
) -> None:
    """With the override, both facades of the SDK use the storage, not a core."""
    program = """
from usermetadata.supertokens import use_storage
usermetadata.init(sys.argv[1])
init_sdk("http://localhost:1", recipe.UserMetadataOverrideConfig(functions=use_storage))
"""
    sdk_programs.run(INIT + program + CALLS + "usermetadata.UserMetadataRecipe.reset()", database)
    storage = SQLiteStorage(database)
    assert storage.read(["alice", "bob"]) == {"alice": {"theme": "dark"}}
    storage.close()


def test_the_dashboard_edits_the_storage(database: Path, sdk_programs: SDKPrograms) -> None:
    """The metadata editor of the SDK's dashboard shows and changes the stored metadata."""
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
    shown = sdk_programs.run(INIT + program, database).splitlines()
    assert shown == [
        "{'status': 'OK', 'data': {'theme': 'dark', 'old': True}}",
        "{'status': 'OK'}",
        "{'status': 'OK', 'data': {'theme': 'light', 'new': [1]}}",
    ]
    assert storage.read(["alice"]) == {"alice": {"theme": "light", "new": [1]}}
    storage.close()


def test_the_sdk_as_it_is_uses_the_server(
    usermetadata_server: str, usermetadata_storage: InMemoryStorage, sdk_programs: SDKPrograms
) -> None:
    """Without any override: the server is the SDK's ``connection_uri``, in place of a core."""
    sdk_programs.run(INIT + "init_sdk(sys.argv[1])" + CALLS, usermetadata_server)
    assert usermetadata_storage.read(["alice", "bob"]) == {"alice": {"theme": "dark"}}


def test_the_user_of_a_session(
    database: Path, monkeypatch: pytest.MonkeyPatch, sdk_programs: SDKPrograms
) -> None:
    """In the guide's program with ``verify_session()`` the session's user reads and writes."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "d-1", "alg": "RS256"}

    async def keys(_: Request) -> JSONResponse:
        return JSONResponse({"keys": [public]})

    now = int(time.time())
    hashed = {"refreshTokenHash1": "hash", "parentRefreshTokenHash1": None, "antiCsrfToken": None}
    who = {"sub": "alice", "rsub": "alice", "tId": "public", "sessionHandle": "handle"}
    session = {"iat": now, "exp": now + 3600, **hashed, **who}
    token = jwt.encode(session, key, "RS256", {"kid": "d-1", "version": "5"})
    program = """
import sys, usermetadata
sys.path.insert(0, sys.argv[1])
from fastapi.testclient import TestClient
from fastapi_sessions import app
with TestClient(app) as client:
    print(client.get("/userinfo").status_code)
    client.headers["authorization"] = f"Bearer {sys.argv[2]}"
    print(client.post("/updateinfo", json={"theme": "dark"}).json())
    print(client.get("/userinfo").json())
    as_json = {"content-type": "application/json"}
    print(client.post("/updateinfo", content='{"a": NaN}', headers=as_json).json())
    print(client.delete("/userinfo").json())
    print(client.post("/updateinfo", json={"after": True}).json())
"""
    examples = Path(__file__).parent.parent / "docs" / "examples"
    monkeypatch.setenv("USERMETADATA_URL", f"sqlite:///{database}")
    with serve(Starlette(routes=[Route("/.well-known/jwks.json", keys)])) as port:
        monkeypatch.setenv("SUPERTOKENS_URI", f"http://127.0.0.1:{port}")
        shown = sdk_programs.run(program, examples, token)
    assert shown.splitlines() == [
        "401",
        "{'message': 'successfully updated user metadata'}",
        "{'theme': 'dark'}",
        "{'message': 'metadata_update[\"a\"]: nan is not JSON'}",
        "{'message': 'successfully cleared user metadata'}",
        "{'message': 'successfully updated user metadata'}",
    ]
    with contextlib.closing(SQLiteStorage(database)) as storage:
        assert storage.read(["alice"]) == {"alice": {"after": True}}

"""The SDKs of other languages, unmodified, with this library's server in place of a core."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CLIENTS
from test_server import served

from usermetadata import InMemoryStorage
from usermetadata.server import create_app

if TYPE_CHECKING:
    from collections.abc import Generator

KEY = "a key that the server wants to see"


@pytest.fixture
def storage() -> Generator[InMemoryStorage, None, None]:
    """The storage that the server serves."""
    with contextlib.closing(InMemoryStorage()) as storage:
        yield storage


@pytest.fixture
def environment(storage: InMemoryStorage) -> Generator[dict[str, str], None, None]:
    """The environment variables with the server's address and key."""
    with served(create_app(storage, api_keys=[KEY])) as client:
        uri = f"http://{client.connection.host}:{client.connection.port}"
        yield {
            **os.environ,
            "SUPERTOKENS_URI": uri,
            "SUPERTOKENS_API_KEY": KEY,
            "PORT": "0",
            "NEXT_TELEMETRY_DISABLED": "1",
        }


@pytest.mark.usefixtures("packages")
def test_a_script_in_node(environment: dict[str, str], storage: InMemoryStorage) -> None:
    """``supertokens-node`` updates, reads and clears as it does with a core."""
    program = ["node", "script.js"]
    output = subprocess.check_output(program, cwd=CLIENTS, env=environment, text=True, timeout=60)
    expected = {"theme": "dark", "notifications": {"sms": True}}
    assert json.loads(output) == expected
    assert storage.read(["alice", "bob"]) == {"alice": expected}


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "command",
    [
        "node express.js",
        "node fastify.js",
        "node hapi.js",
        "node koa.js",
        "node --import tsx loopback.ts",
        "node --import tsx nestjs.ts",
        "node node_modules/next/dist/bin/next dev nextjs",
    ],
)
def test_a_web_framework_in_node(
    environment: dict[str, str], storage: InMemoryStorage, command: str
) -> None:
    """The ``/updateinfo`` endpoint of SuperTokens' guide, with the SDK's middleware around it."""
    program = subprocess.Popen(
        command.split(), cwd=CLIENTS, env=environment, stdout=subprocess.PIPE, text=True
    )
    with program, contextlib.ExitStack() as stack:
        stack.callback(program.terminate)
        assert program.stdout is not None
        ports = (re.search(r"http://.*:(\d+)", line) for line in program.stdout)
        port = next(int(port[1]) for port in ports if port)
        connection = stack.enter_context(
            contextlib.closing(HTTPConnection("localhost", port, timeout=60))
        )

        def request(method: str, path: str, body: Any = None) -> Any:
            headers = {"x-user-id": "alice", "content-type": "application/json"}
            text = None if body is None else json.dumps(body)
            if text is None:
                del headers["content-type"]
            connection.request(method, path, text, headers)
            response = connection.getresponse()
            assert response.status == 200
            return json.loads(response.read())

        for method, path in [
            ("GET", "/userinfo"),
            ("DELETE", "/userinfo"),
            ("POST", "/updateinfo"),
        ]:
            connection.request(method, path, "{}", {"content-type": "application/json"})
            with connection.getresponse() as response:
                assert response.status == 401
                response.read()

        updated = {"message": "successfully updated user metadata"}
        assert request("POST", "/updateinfo", {"theme": "dark", "text": "é\U0001f600"}) == updated
        assert request("POST", "/updateinfo", {"text": None, "n": {"m": None}}) == updated
        assert request("GET", "/userinfo") == {"theme": "dark", "n": {"m": None}}
        assert storage.read(["alice"]) == {"alice": {"theme": "dark", "n": {"m": None}}}
        request("DELETE", "/userinfo")
        assert storage.read(["alice"]) == {}
        assert request("GET", "/userinfo") == {}


@pytest.mark.usefixtures("packages")
def test_a_lambda_in_node(environment: dict[str, str], storage: InMemoryStorage) -> None:
    """AWS Lambda, and Netlify, call a handler with the SDK's middleware around it."""
    program = """
const { handler } = require("./aws_lambda");
async function main() {
  for (const event of JSON.parse(process.argv[1])) {
    const { statusCode, body } = await handler(event, {}, () => {});
    console.log(JSON.stringify([statusCode, body && JSON.parse(body)]));
  }
}
main();
"""
    request = {"headers": {"x-user-id": "alice"}, "path": "/updateinfo", "requestContext": {}}
    # Events of an HTTP API differ from those of a REST API and of Netlify.
    newer = {"version": "2.0", "headers": {"x-user-id": "alice"}}

    def http(method: str) -> dict[str, Any]:
        return {"http": {"method": method, "path": "/updateinfo"}}

    encoded = {"isBase64Encoded": True, "body": base64.b64encode(b'{"n":1}').decode()}
    events = [
        {**request, "httpMethod": "POST", "body": '{"theme": "dark"}'},
        {**request, "httpMethod": "GET", "body": None},
        {**newer, "requestContext": http("POST"), **encoded},
        {**newer, "requestContext": http("GET")},
        {**newer, "requestContext": http("DELETE")},
        {**newer, "requestContext": http("DELETE"), "headers": {}},
        {**request, "httpMethod": "POST", "body": '{"after": true}'},
    ]
    command = ["node", "-e", program, json.dumps(events)]
    output = subprocess.check_output(command, cwd=CLIENTS, env=environment, text=True, timeout=60)
    assert [json.loads(line) for line in output.splitlines()] == [
        [200, {"message": "successfully updated user metadata"}],
        [200, {"theme": "dark"}],
        [200, {"message": "successfully updated user metadata"}],
        [200, {"theme": "dark", "n": 1}],
        [200, {"message": "successfully cleared user metadata"}],
        [401, ""],
        [200, {"message": "successfully updated user metadata"}],
    ]
    assert storage.read(["alice"]) == {"alice": {"after": True}}


def test_what_the_sdk_of_go_sends(environment: dict[str, str], storage: InMemoryStorage) -> None:
    """The requests of ``supertokens-golang`` 0.25, which speaks version 3.1, are answered."""
    host = environment["SUPERTOKENS_URI"].removeprefix("http://")
    sent = {"User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip", "Api-Key": KEY}
    asked = {**sent, "Cdi-Version": "3.1", "Rid": "usermetadata"}
    written = {**asked, "Content-Type": "application/json; charset=utf-8"}
    with contextlib.closing(HTTPConnection(host, timeout=30)) as connection:

        def request(method: str, path: str, headers: dict[str, str], body: str = "") -> Any:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            assert response.status == 200
            return json.loads(response.read())

        assert "3.1" in request("GET", "/apiversion", sent)["versions"]
        # Go escapes these characters.
        body = r'{"metadataUpdate":{"a":"\u003cb\u003e","gone":null},"userId":"al ice"}'
        updated = request("PUT", "/recipe/user/metadata", written, body)
        assert updated == {"metadata": {"a": "<b>"}, "status": "OK"}
        assert request("GET", "/recipe/user/metadata?userId=al+ice", asked) == updated
        removed = request("POST", "/recipe/user/metadata/remove", written, '{"userId":"al ice"}')
        assert removed == {"status": "OK"}
    assert storage.read(["al ice"]) == {}

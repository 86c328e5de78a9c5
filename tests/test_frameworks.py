"""The programs of the guide to web frameworks and workers, with real requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import pytest
from asgi_server import serve
from django.test import AsyncClient, Client

import usermetadata
from usermetadata import UsageError
from usermetadata.syncio import get_user_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


class Answer(NamedTuple):
    """A response: status and body."""

    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Send(Protocol):
    """Sends a request, for example ``"POST /updateinfo"``, with or without a user."""

    def __call__(self, request: str, user_id: str | None, body: bytes = b"") -> Answer: ...


def headers(user_id: str | None) -> dict[str, str]:
    """Return the headers of a request with a JSON body."""
    content_type = {"content-type": "application/json"}
    return content_type if user_id is None else {**content_type, "x-user-id": user_id}


def imported(name: str) -> Any:
    """Import a program that calls ``init`` at module level, which Python runs once."""
    if name in sys.modules:
        usermetadata.init()
    return importlib.import_module(name)


@contextlib.contextmanager
def served(name: str, lifespan: Literal["on", "off"] = "on") -> Generator[Send, None, None]:
    """Serve a program with uvicorn."""
    app = importlib.import_module(name).app

    def send(request: str, user_id: str | None, body: bytes = b"") -> Answer:
        method, path = request.split()
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers(user_id))
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())

    with serve(app, lifespan) as port:
        yield send


@contextlib.contextmanager
def flask() -> Generator[Send, None, None]:
    """Call the Flask program through Flask's test client."""
    app = imported("flask_app").app

    def send(request: str, user_id: str | None, body: bytes = b"") -> Answer:
        method, path = request.split()
        client = app.test_client()
        response = client.open(path, method=method, data=body, headers=headers(user_id))
        return Answer(response.status_code, response.text)

    yield send


@contextlib.contextmanager
def django(*, by_async_client: bool) -> Generator[Send, None, None]:
    """Call the Django program through one of Django's test clients."""
    imported("django_app")

    def send(request: str, user_id: str | None, body: bytes = b"") -> Answer:
        method, path = request.split()
        arguments = (method, path, body, "application/json")

        async def answer() -> Any:
            return await AsyncClient().generic(*arguments, headers=headers(user_id))

        if by_async_client:
            response = asyncio.run(answer())
        else:
            response = Client().generic(*arguments, headers=headers(user_id))
        return Answer(response.status_code, response.content.decode())

    yield send


def http_api_event(
    request: str, user_id: str | None, body: bytes, *, is_base64: bool
) -> dict[str, Any]:
    """Make an event as API Gateway's HTTP APIs do, in version 2.0 of their payload format."""
    method, path = request.split()
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": request,
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "host": "api.example.com"},
        "requestContext": {
            "accountId": "123456789012",
            "apiId": "api-id",
            "authorizer": {"jwt": {"claims": {"sub": user_id}, "scopes": None}},
            "domainName": "api.example.com",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "192.0.2.1",
                "userAgent": "test",
            },
            "requestId": "id",
            "routeKey": request,
            "stage": "$default",
            "time": "12/Mar/2026:19:03:58 +0000",
            "timeEpoch": 1773342238000,
        },
        "isBase64Encoded": is_base64,
    }
    if body:
        event["body"] = (base64.b64encode(body) if is_base64 else body).decode()
    return event


@contextlib.contextmanager
def aws_lambda(*, is_base64: bool) -> Generator[Send, None, None]:
    """Call the handler of the Lambda program; API Gateway sends binary bodies as base64."""
    handler = imported("aws_lambda").handler

    def send(request: str, user_id: str | None, body: bytes = b"") -> Answer:
        answer = handler(http_api_event(request, user_id, body, is_base64=is_base64), None)
        assert answer["headers"] == {"content-type": "application/json"}
        return Answer(answer["statusCode"], answer["body"])

    yield send


FRAMEWORKS: dict[str, Callable[[], contextlib.AbstractContextManager[Send]]] = {
    "fastapi": lambda: served("fastapi_app"),
    "starlette": lambda: served("starlette_app"),
    "flask": flask,
    "django": lambda: django(by_async_client=False),
    "django async": lambda: django(by_async_client=True),
    "lambda": lambda: aws_lambda(is_base64=False),
    "lambda base64": lambda: aws_lambda(is_base64=True),
}
LIFESPANS = ["fastapi", "starlette"]


@pytest.fixture(autouse=True)
def environment(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs, in this process and in others, keep metadata in a new file."""
    monkeypatch.setenv("USERMETADATA_URL", f"sqlite:///{database}")


@pytest.fixture(params=FRAMEWORKS)
def send(request: pytest.FixtureRequest) -> Generator[Send, None, None]:
    """Each program in turn, ready for requests."""
    with FRAMEWORKS[request.param]() as send:
        yield send


def rows(database: Path) -> dict[str, Any]:
    """Return the rows of the file."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT user_id, user_metadata FROM user_metadata").fetchall()
    return {user_id: json.loads(text) for user_id, text in found}


# All programs.


def test_updating_reading_and_clearing(send: Send) -> None:
    """``/updateinfo`` merges and answers as in SuperTokens' guide; ``/userinfo`` shows or clears.

    Users do not see each other's metadata; that of an unknown user is ``{}``.
    """
    for body in (b'{"newKey": "data", "theme": "dark"}', b'{"theme": null, "\xc3\xa9": [1.5]}'):
        answer = send("POST /updateinfo", "alice", body)
        assert (answer.status, answer.json) == (
            200,
            {"message": "successfully updated user metadata"},
        )
    assert send("GET /userinfo", "alice").json == {"newKey": "data", "é": [1.5]}
    assert send("GET /userinfo", "bob").json == {}
    assert send("DELETE /userinfo", "alice").status == 200
    assert send("GET /userinfo", "alice").json == {}


def test_what_cannot_be_stored_is_answered_400(send: Send) -> None:
    """Bad input gets a 400 response that gives its place; nothing is written."""
    for user_id, body, message in (
        ("alice", b'{"size": [1, NaN]}', 'metadata_update["size"][1]: nan is not JSON'),
        ("a" * 256, b"{}", "user_id: has 256 characters; 255 are allowed"),
    ):
        answer = send("POST /updateinfo", user_id, body)
        assert (answer.status, answer.json) == (400, {"message": message})
    assert send("GET /userinfo", "alice").json == {}


NO_JSON_OBJECTS = {
    "cut": b"{",
    "list": b'["dark"]',
    "cut text": b'"\xc3\xa9',
    "empty": b"",
    "deep": b"[" * 100_000,
    "long number": b'{"n": %s}' % (b"1" * 5000),
}


def test_a_body_that_is_no_json_object_is_refused(send: Send) -> None:
    """Broken JSON, or JSON that is not an object, gets a 400 response; with FastAPI a 422."""
    for name, body in NO_JSON_OBJECTS.items():
        answer = send("POST /updateinfo", "alice", body)
        assert answer.status in (400, 422), name
        assert answer.text
    assert send("GET /userinfo", "alice").json == {}


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if name != "lambda"])
def test_a_body_that_is_no_text_is_refused(name: str) -> None:
    """Bytes that are not UTF-8 are also refused; they reach Lambda only as base64."""
    with FRAMEWORKS[name]() as send:
        answer = send("POST /updateinfo", "alice", b'{"theme": "\xff"}')
        assert answer.status in (400, 422)
        assert send("GET /userinfo", "alice").json == {}


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if "lambda" not in name])
def test_who_is_not_logged_in_is_refused(name: str) -> None:
    """Requests without a user are refused; for Lambda the API's authorizer does that."""
    with FRAMEWORKS[name]() as send:
        for request in ("POST /updateinfo", "GET /userinfo", "DELETE /userinfo"):
            answer = send(request, None, b"{}")
            assert answer.status == (403 if name.startswith("django") else 401), request


def test_requests_at_the_same_time_lose_nothing(send: Send) -> None:
    """Forty updates of one user, eight at a time, are all stored."""

    def update(number: int) -> int:
        body = json.dumps({str(number): number}).encode()
        return send("POST /updateinfo", "alice", body).status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(update, range(40))) == [200] * 40
    assert send("GET /userinfo", "alice").json == {str(number): number for number in range(40)}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_metadata_is_in_the_storage_that_the_environment_names(name: str, database: Path) -> None:
    """It is in the file of ``USERMETADATA_URL``, which the programs with a lifespan close.

    Afterwards no thread runs, and there is no other file beside the database.
    """
    threads = threading.active_count()
    with FRAMEWORKS[name]() as send:
        send("POST /updateinfo", "alice", b'{"theme": "dark"}')
        assert rows(database) == {"alice": {"theme": "dark"}}
    if name in LIFESPANS:
        with pytest.raises(UsageError, match="not initialised"):
            get_user_metadata("alice")
        assert threading.active_count() == threads
        assert os.listdir(database.parent) == [database.name]


# Separate processes.


@pytest.mark.parametrize("app", ["fastapi_app:app", "starlette_app:app", "django_app:application"])
def test_uvicorns_command_line_serves_and_stops(app: str, database: Path) -> None:
    """``uvicorn fastapi_app:app`` answers, and ends without a warning at SIGTERM."""
    command = [sys.executable, "-W", "error", "-m", "uvicorn", "--port", "0", app]
    process = subprocess.Popen(command, cwd=EXAMPLES, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if "Uvicorn running on " in line:
                break
        address = log.partition("running on http://")[2].split()[0]
        with contextlib.closing(HTTPConnection(address, timeout=30)) as connection:
            user = {**headers("alice"), "host": "localhost"}
            connection.request("POST", "/updateinfo", b'{"theme": "dark"}', user)
            assert connection.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
        log += process.stderr.read()
    assert "Finished server process" in log
    assert not [word for word in ("Warning", "Traceback", "ERROR", "Exception") if word in log]
    assert rows(database) == {"alice": {"theme": "dark"}}
    if "django" not in app:  # it has no lifespan: the interpreter's exit closes the file
        assert "Application shutdown complete" in log


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder of the programs; warnings are errors."""
    line = [sys.executable, "-W", "error", *command]
    return subprocess.run(
        line, cwd=EXAMPLES, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_flask_may_be_forked_after_it_was_used(database: Path) -> None:
    """As with ``gunicorn --preload``: ``init`` and the first call, then the fork, then workers.

    Without ``reset()``: the interpreter's exit closes the file without a warning.
    """
    program = """
import os
from flask_app import app

def update(name):
    user = {"x-user-id": "alice"}
    answer = app.test_client().post("/updateinfo", json={name: True}, headers=user)
    assert answer.status_code == 200

update("master before")
workers = []
for number in range(3):
    workers.append(os.fork())
    if workers[-1] == 0:
        for request in range(10):
            update(f"worker {number}: {request}")
        raise SystemExit
update("master after")
for worker in workers:
    assert os.waitpid(worker, 0)[1] == 0
"""
    finished = run("-c", program)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert len(rows(database)["alice"]) == 2 + 3 * 10
    assert os.listdir(database.parent) == [database.name]


def test_workers_count_every_visit(database: Path, tmp_path: Path) -> None:
    """Two workers that count the same users' visits at once lose none."""
    user_ids = tmp_path / "user_ids.txt"
    user_ids.write_text("alice\nbob\nalice\n" * 50)

    def work(_: int) -> subprocess.CompletedProcess[str]:
        with user_ids.open() as lines:
            return run("worker.py", stdin=lines)

    with ThreadPoolExecutor(2) as pool:
        finished = list(pool.map(work, range(2)))
    assert [(each.returncode, each.stderr) for each in finished] == [(0, "")] * 2
    assert rows(database) == {"alice": {"visits": 200}, "bob": {"visits": 100}}
    seen = Counter(line for each in finished for line in each.stdout.splitlines())
    assert seen == {f"alice {n}": 1 for n in range(1, 201)} | {f"bob {n}": 1 for n in range(1, 101)}


def test_a_worker_goes_on_after_a_bad_user_id(database: Path) -> None:
    """The error is printed, the other users are counted, and the exit status is 1."""
    finished = run("worker.py", input="alice\n\nbob\n")
    assert finished.returncode == 1
    assert finished.stdout == "alice 1\nbob 1\n"
    assert finished.stderr.startswith("user_id: ")
    assert rows(database) == {"alice": {"visits": 1}, "bob": {"visits": 1}}


# In a user's tests.


@pytest.mark.parametrize("name", LIFESPANS)
@pytest.mark.usefixtures("usermetadata_storage")
def test_without_its_lifespan_a_program_uses_the_fixtures_storage(
    name: str, database: Path
) -> None:
    """As with ``TestClient(app)`` without ``with``: the program uses the test's store."""
    with served(f"{name}_app", lifespan="off") as send:
        send("POST /updateinfo", "alice", b'{"theme": "dark"}')
    assert get_user_metadata("alice").metadata == {"theme": "dark"}
    assert not database.exists()


def test_the_fixture_takes_the_place_of_an_init_at_the_top(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database: Path
) -> None:
    """A user's tests of the Flask program each begin with an empty store, and touch no file."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    pytester.makepyfile(
        """
        import pytest
        from flask_app import app

        @pytest.mark.parametrize("theme", ["dark", "light"])
        def test_theme(usermetadata_storage, theme):
            client, user = app.test_client(), {"x-user-id": "alice"}
            assert client.get("/userinfo", headers=user).json == {}
            client.post("/updateinfo", json={"theme": theme}, headers=user)
            assert client.get("/userinfo", headers=user).json == {"theme": theme}
        """
    )
    # Hypothesis would be imported at the end, which takes as long as all the rest.
    ran = pytester.runpytest_subprocess("-W", "error", "-p", "no:hypothesispytest")
    ran.assert_outcomes(passed=2)
    assert not database.exists()

"""The programs of the guide to web frameworks and workers, with real requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

import psycopg
import pytest
from asgi_server import serve
from django.test import AsyncClient, Client
from postgres_server import server_url, with_parameters

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


def over_http(address: str) -> Send:
    """Return a function that sends requests to a server."""

    def send(request: str, user_id: str | None, body: bytes = b"") -> Answer:
        method, path = request.split()
        with contextlib.closing(HTTPConnection(address, timeout=30)) as connection:
            connection.request(method, path, body, headers(user_id) | {"host": "localhost"})
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())

    return send


@contextlib.contextmanager
def served(app: Any, lifespan: Literal["on", "off"] = "on") -> Generator[Send, None, None]:
    """Serve an application with uvicorn."""
    with serve(app, lifespan) as port:
        yield over_http(f"127.0.0.1:{port}")


@contextlib.contextmanager
def called(app: Any) -> Generator[Send, None, None]:
    """Call a Flask application through Flask's test client."""

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
    "fastapi": lambda: served(importlib.import_module("fastapi_app").app),
    "starlette": lambda: served(importlib.import_module("starlette_app").app),
    "flask": lambda: called(imported("flask_app").app),
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


@contextlib.contextmanager
def uvicorn(app: str) -> Generator[tuple[Send, list[str]], None, None]:
    """Serve a program with ``uvicorn`` in a process; yield its log as well, complete at the end."""
    command = [sys.executable, "-W", "error", "-m", "uvicorn", "--port", "0", app]
    log: list[str] = []
    process = subprocess.Popen(command, cwd=EXAMPLES, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if "Uvicorn running on " in line:
                try:
                    yield over_http(line.partition("running on http://")[2].split()[0]), log
                finally:
                    process.send_signal(signal.SIGTERM)
    assert "Finished server process" in log[-1]
    words = ("Warning", "Traceback", "ERROR", "Exception")
    assert not [line for line in log if any(word in line for word in words)]


@pytest.mark.parametrize("app", ["fastapi_app:app", "starlette_app:app", "django_app:application"])
def test_uvicorns_command_line_serves_and_stops(app: str, database: Path) -> None:
    """``uvicorn fastapi_app:app`` answers, and ends without a warning at SIGTERM."""
    with uvicorn(app) as (send, log):
        assert send("POST /updateinfo", "alice", b'{"theme": "dark"}').status == 200
    assert rows(database) == {"alice": {"theme": "dark"}}
    if "django" not in app:  # it has no lifespan: the interpreter's exit closes the file
        assert "Application shutdown complete" in "".join(log)


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
    app = importlib.import_module(f"{name}_app").app
    with served(app, lifespan="off") as send:
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


# In the application's own transaction.


class Shop(NamedTuple):
    """A program that stores an order and metadata in one transaction.

    Attributes:
        send: sends it a request.
        paths: those of its views that store an order.
        table: the table of orders.
    """

    send: Send
    paths: tuple[str, ...] = ("/buy",)
    table: str = "orders"


@contextlib.contextmanager
def django_shop(url: str) -> Generator[Shop, None, None]:
    """Make the table with the command that the program names, and serve it with uvicorn."""
    assert run("django_orders.py", "migrate", "--run-syncdb").returncode == 0
    with uvicorn("django_orders:application") as (send, _):
        yield Shop(send, ("/buy", "/async/buy"), "shop_order")


def fastapi_shop(url: str) -> Any:
    """Make the application whose sessions block."""
    return importlib.import_module("fastapi_sqlalchemy").create_app(with_driver(url, "pysqlite"))


def async_fastapi_shop(url: str) -> Any:
    """Make the application with an ``AsyncSession``."""
    program = importlib.import_module("fastapi_sqlalchemy_async")
    return program.create_app(with_driver(url, "aiosqlite"))


def with_driver(url: str, for_sqlite: str) -> str:
    """Return the URL as SQLAlchemy needs it."""
    kind, _, rest = url.partition("://")
    return f"{kind}+{for_sqlite if kind == 'sqlite' else 'psycopg'}://{rest}"


FASTAPI_SHOPS = {"fastapi": fastapi_shop, "fastapi async": async_fastapi_shop}


@contextlib.contextmanager
def flask_shop(url: str) -> Generator[Shop, None, None]:
    """Import the Flask program anew, because it reads the URL when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", with_driver(url, "pysqlite"))
        patch.delitem(sys.modules, "flask_sqlalchemy_app", raising=False)
        program = importlib.import_module("flask_sqlalchemy_app")
    with called(program.app) as send:
        yield Shop(send)
    program.users.close()
    with program.app.app_context():
        program.db.engine.dispose()


@contextlib.contextmanager
def open_shop(name: str, url: str) -> Generator[Shop, None, None]:
    """Open one of ``SHOPS`` on a database."""
    if name in FASTAPI_SHOPS:
        with served(FASTAPI_SHOPS[name](url)) as send:
            yield Shop(send)
    else:
        with {"django": django_shop, "flask": flask_shop}[name](url) as shop:
            yield shop


SHOPS = ["django", *FASTAPI_SHOPS, "flask"]


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of each database in turn, empty, which ``DATABASE_URL`` also names."""
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    if request.param == "postgres":
        schema = request.getfixturevalue("schema")
        url = with_parameters(server_url(), options=f"-csearch_path={schema}")
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def committed(url: str, statement: str) -> list[Any]:
    """Return the rows that another connection sees; none if there is no table."""
    connection: Any = (
        sqlite3.connect(url.removeprefix("sqlite:///"))
        if url.startswith("sqlite")
        else psycopg.connect(url)
    )
    with contextlib.closing(connection):
        try:
            return list(connection.execute(statement).fetchall())
        except psycopg.errors.UndefinedTable:
            return []
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise


def metadata_in(url: str) -> dict[str, Any]:
    """Return the metadata of all users that is committed."""
    found = committed(url, "SELECT user_id, user_metadata FROM user_metadata")
    return {user_id: json.loads(text) for user_id, text in found}


@pytest.mark.parametrize("name", SHOPS)
def test_an_order_and_its_metadata_are_stored_together(name: str, url: str) -> None:
    """Committed: another connection sees both. Rolled back after both: it sees neither."""
    with open_shop(name, url) as shop:
        orders = f"SELECT id, user_id, product FROM {shop.table} ORDER BY id"
        stored: list[Any] = []
        metadata: dict[str, Any] = {}
        for path in shop.paths:
            assert shop.send(f"POST {path}/yacht", "alice").status == 402
            assert (committed(url, orders), metadata_in(url)) == (stored, metadata)

            answer = shop.send(f"POST {path}/tea", "alice")
            assert answer.status == 201
            order = answer.json["order"]
            stored, metadata = [*stored, (order, "alice", "tea")], {"alice": {"last_order": order}}
            assert (committed(url, orders), metadata_in(url)) == (stored, metadata)
            assert shop.send("GET /userinfo", "alice").json == {"last_order": order}

            assert shop.send(f"POST {path}/yacht", "alice").status == 402
            assert (committed(url, orders), metadata_in(url)) == (stored, metadata)


@pytest.mark.parametrize("name", SHOPS)
def test_orders_at_the_same_time_are_stored_with_their_metadata(name: str, url: str) -> None:
    """Eight users who buy at the same time each have the metadata of their own order."""
    users = [f"user {number}" for number in range(8)]
    with open_shop(name, url) as shop, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda user: shop.send("POST /buy/tea", user), users))
        assert [answer.status for answer in answers] == [201] * 8
        orders = {user: answer.json["order"] for user, answer in zip(users, answers, strict=True)}
        assert dict(committed(url, f"SELECT user_id, id FROM {shop.table}")) == orders
    assert metadata_in(url) == {user: {"last_order": order} for user, order in orders.items()}


def test_django_rolls_a_request_back_with_atomic_requests(url: str) -> None:
    """With ``ATOMIC_REQUESTS``, metadata is part of the request's transaction.

    A view that fails leaves neither rows nor metadata, with ``atomic()`` inside or without it. A
    view that does not fail leaves both, and async views work as well. A plain call, which is not
    part of the transaction, stays stored.
    """
    program = """
import django_orders
import usermetadata
from django.core.management import call_command
from django.db import connection, connections
from django.http import HttpResponse
from django.test import Client
from django.urls import path
from django_orders import Order, buy
from usermetadata.syncio import get_user_metadata, update_user_metadata

connections.settings["default"]["ATOMIC_REQUESTS"] = True
call_command("migrate", "--run-syncdb", verbosity=0)

def buy_without_atomic(request, product):
    order = Order.objects.create(user_id="alice", product=product)
    with usermetadata.within(connection) as metadata:
        metadata.update_user_metadata("alice", {"last_order": order.pk})
    return HttpResponse(status=201)

def fails_after(view):
    def failing(request, product):
        update_user_metadata("bob", {product: True})
        assert view(request, product).status_code == 201
        raise RuntimeError
    return failing

django_orders.urlpatterns += [
    path("fails/<product>", fails_after(buy)),
    path("fails/without/atomic/<product>", fails_after(buy_without_atomic)),
    path("without/atomic/<product>", buy_without_atomic),
]
client = Client(raise_request_exception=False, headers={"x-user-id": "alice", "host": "localhost"})

def stored():
    connection.close()
    return Order.objects.count(), get_user_metadata("alice").metadata.keys()

for failing in ("fails/tea", "fails/without/atomic/cup", "buy/yacht", "async/buy/yacht"):
    assert client.post(f"/{failing}").status_code == (500 if "fails" in failing else 402)
    assert stored() == (0, set()), failing
assert get_user_metadata("bob").metadata == {"tea": True, "cup": True}
for number, working in enumerate(("buy/tea", "without/atomic/tea", "async/buy/tea"), 1):
    assert client.post(f"/{working}").status_code == 201
    assert stored() == (number, {"last_order"})
connection.close()
"""
    # Django logs the exceptions of the views that fail.
    finished = run("-c", program)
    assert finished.returncode == 0, finished.stderr
    [(last,)] = committed(url, "SELECT max(id) FROM shop_order")
    assert metadata_in(url)["alice"] == {"last_order": last}


def test_djangos_testcase_rolls_metadata_back(url: str) -> None:
    """Tests with ``TestCase`` find no metadata of another test, and leave the database alone.

    They read and write in Django's test database.
    """
    if not url.startswith("sqlite"):
        # Django names the test database after one that need not exist.
        parts = urlsplit(server_url())
        url = parts._replace(path=f"/shop_{uuid.uuid4().hex}").geturl()
    program = """
import django_orders
from django.core.management import call_command

call_command("test", "django_orders_tests")
"""
    finished = run("-c", program, env={**os.environ, "DATABASE_URL": url})
    assert finished.returncode == 0, finished.stderr
    assert "Ran 3 tests" in finished.stderr
    if url.startswith("sqlite"):
        assert not os.path.exists(url.removeprefix("sqlite:///"))


def test_flask_sqlalchemys_relative_path_is_that_of_the_store(tmp_path: Path) -> None:
    """Flask-SQLAlchemy puts it into the instance folder; metadata is in the same file."""
    shutil.copy(EXAMPLES / "flask_sqlalchemy_app.py", tmp_path)
    program = """
import os, sys
sys.path.insert(0, os.getcwd())
os.mkdir("elsewhere")
os.chdir("elsewhere")
from flask_sqlalchemy_app import app

user = {"x-user-id": "alice"}
assert app.test_client().post("/buy/tea", headers=user).status_code == 201
assert app.test_client().get("/userinfo", headers=user).json == {"last_order": 1}
"""
    url = "sqlite:///shop.db"
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "DATABASE_URL": url}, check=True)
    in_instance = f"sqlite:///{tmp_path}/instance/shop.db"
    assert metadata_in(in_instance) == {"alice": {"last_order": 1}}
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", FASTAPI_SHOPS)
def test_two_fastapi_applications_in_a_process_are_independent(
    name: str, url: str, database: Path
) -> None:
    """Each has a lifespan with a store and a database; one works on while and after one ends.

    An application that has ended may be started again.
    """
    other_url = f"sqlite:///{database}"
    app, other_app = FASTAPI_SHOPS[name](url), FASTAPI_SHOPS[name](other_url)
    with served(other_app) as send_other:
        for product in ("tea", "cup"):
            with served(app) as send:
                assert send(f"POST /buy/{product}", "alice").status == 201
                assert send_other(f"POST /buy/{product}", "bob").status == 201
                assert send("GET /userinfo", "bob").json == {}
                assert send_other("GET /userinfo", "alice").json == {}
            assert send_other("POST /buy/yacht", "bob").status == 402
            assert send_other("GET /userinfo", "bob").json["last_order"]
    for each, user_id in ((url, "alice"), (other_url, "bob")):
        [(last,)] = committed(each, "SELECT max(id) FROM orders")
        assert metadata_in(each) == {user_id: {"last_order": last}}
        assert committed(each, "SELECT user_id, product FROM orders ORDER BY id") == [
            (user_id, "tea"),
            (user_id, "cup"),
        ]
    assert not [name for name in os.listdir(database.parent) if name.endswith(("-wal", "-shm"))]

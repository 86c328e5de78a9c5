"""Each message that ``docs/trouble.md`` shows is provoked, and is the one that the page shows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
import trio
from asgi_server import serve
from conftest import small_files
from postgres_proxy import Proxy
from postgres_server import OwnServer, server_url, with_parameters
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool
from sqlite_utils import Database
from test_sqlite import FLUSHES_FAIL

import usermetadata
import usermetadata.asyncio
from usermetadata import Index, PostgresStorage, SQLiteStorage, UserMetadata, syncio
from usermetadata.changes import Clear, Modify
from usermetadata.server import create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata.codec import Metadata

DOCS = Path(__file__).parent.parent / "docs"
PAGE, SYMPTOMS = DOCS / "trouble.md", DOCS / "slow-or-hanging.md"
FILE, DATABASE = "/srv/app/users.db", "db.internal/shop"
"""The names on the page."""


def messages() -> list[str]:
    """Return the messages on the page: each is a quoted paragraph of code."""
    shown: list[str] = []
    for paragraph in PAGE.read_text(encoding="utf-8").split("\n\n"):
        if paragraph.startswith("> "):
            text = " ".join(line.removeprefix("> ") for line in paragraph.splitlines())
            shown.append(text.strip("`").strip())
    return shown


class Place:
    """Where a message is provoked: an empty folder, an empty schema, and what has to be closed."""

    def __init__(
        self, folder: Path, schema: str, direct: psycopg.Connection[Any], stack: Any
    ) -> None:
        self.folder = folder
        self.file = folder / "users.db"
        self.schema = schema
        self.direct = direct
        self.stack: contextlib.ExitStack = stack

    def sqlite(self, **arguments: Any) -> UserMetadata[Any, Any]:
        """Return a store in a file; alice has metadata."""
        storage = SQLiteStorage(self.file, **arguments)
        self.stack.callback(storage.close)
        users = UserMetadata[Any, Any](storage)
        users.syncio.update_user_metadata("alice", {"plan": "pro"})
        return users

    def execute(self, statement: str) -> None:
        """Execute a statement on the file, as another program."""
        with contextlib.closing(sqlite3.connect(self.file)) as connection, connection:
            connection.execute(statement)

    def postgres(self, database: Any = None, **arguments: Any) -> UserMetadata[Any, Any]:
        """Return a store in PostgreSQL."""
        arguments = {"schema": self.schema, **arguments}
        storage = PostgresStorage(database or server_url(), **arguments)
        self.stack.callback(storage.close)
        return UserMetadata(storage)

    def with_alice(self, database: Any = None, **arguments: Any) -> UserMetadata[Any, Any]:
        """Return a store in PostgreSQL in which alice has metadata."""
        users = self.postgres(database, **arguments)
        users.syncio.update_user_metadata("alice", {"plan": "pro"})
        return users

    def role(self, name: str, settings: str) -> str:
        """Create a role of the server, and return the URL for it."""
        name = f"{self.schema}_{name}"
        for command in (f"CREATE ROLE {name} LOGIN", settings.format(role=name)):
            self.direct.execute(command.encode())
        self.stack.callback(self.direct.execute, f"DROP ROLE {name}".encode())
        self.stack.callback(self.direct.execute, f"DROP OWNED BY {name}".encode())
        return make_conninfo(server_url(), user=name)

    def shown(self, text: str) -> str:
        """Return a message with the page's names in place of this machine's."""
        for name, on_page in {
            str(self.file): FILE,
            str(self.file.parent): str(Path(FILE).parent),
            f'"{self.schema}"': '"public"',
            f"{self.schema}_": "",
            self.schema: "public",
        }.items():
            text = text.replace(name, on_page)
        options = conninfo_to_dict(server_url())
        text = re.sub(
            rf"(?:{re.escape(str(options.get('host')))}|127\.0\.0\.1|/tmp/\w+)/\w+:",
            f"{DATABASE}:",
            text,
        )
        text = re.sub(r'server on socket "\S+"', 'server at "10.0.0.5", port 5432', text)
        text = re.sub(r'server at "[\d.]+", port \d+', 'server at "10.0.0.5", port 5432', text)
        return " ".join(text.split())


@pytest.fixture
def place(
    tmp_path: Path, schema: str, direct: psycopg.Connection[Any]
) -> Generator[Place, None, None]:
    with contextlib.ExitStack() as stack:
        yield Place(tmp_path, schema, direct, stack)


PROVOCATIONS: list[Callable[[Place], object]] = []


def provokes(function: Any) -> Any:
    """Add a function that raises an error, or returns the text of one."""
    PROVOCATIONS.append(function)
    return function


def run(program: str, *arguments: object) -> str:
    """Run a program that prints an error, in another process."""
    program = f"""
import os, sys, usermetadata
from usermetadata import syncio
def show(function, *arguments):
    try:
        function(*arguments)
    except (usermetadata.UserMetadataError, ImportError) as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
{program}"""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return finished.stdout.strip()


# Configuration


@provokes
def no_init(_: Place) -> None:
    syncio.get_user_metadata("alice")


@provokes
def init_twice(_: Place) -> None:
    usermetadata.init("memory://")
    usermetadata.init("memory://?app_id=shop")


@provokes
def unknown_scheme(_: Place) -> None:
    usermetadata.init("mysql://db.internal/shop")


@provokes
def unknown_parameter_of_sqlite(_: Place) -> None:
    usermetadata.init("sqlite:///users.db?mode=ro")


@provokes
def unknown_parameter_of_postgresql(_: Place) -> None:
    usermetadata.init("postgresql://db.internal/shop?max_connection=20")


@provokes
def no_path(_: Place) -> None:
    usermetadata.init("host=db.internal dbname=shop")


@provokes
def no_psycopg(_: Place) -> str:
    return run(
        "sys.modules['psycopg'] = None; show(usermetadata.init, 'postgresql://db.internal/shop')"
    )


@provokes
def no_starlette(_: Place) -> str:
    return run("sys.modules['starlette'] = None; show(__import__, 'usermetadata.server')")


@provokes
def closed_storage(place: Place) -> None:
    users = place.sqlite()
    users.storage.close()
    users.syncio.get_user_metadata("alice")


@provokes
def closed_store(_: Place) -> None:
    users = UserMetadata[Any, Any]("memory://")
    users.close()
    users.syncio.get_user_metadata("alice")


# Calls in the wrong place


@provokes
def inside_modify(place: Place) -> None:
    users = place.sqlite().syncio
    users.modify_user_metadata("alice", lambda _: users.get_user_metadata("bob").metadata)


@provokes
def in_a_signal_handler(place: Place) -> None:
    storage = place.sqlite().storage
    before = signal.signal(signal.SIGUSR1, lambda *_: storage.write([("alice", Clear())]))
    place.stack.callback(signal.signal, signal.SIGUSR1, before)

    def interrupted(metadata: Metadata) -> Metadata:
        signal.raise_signal(signal.SIGUSR1)
        return metadata

    storage.write([("alice", Modify(interrupted))])


@provokes
def under_trio(_: Place) -> None:
    usermetadata.init("memory://")
    trio.run(usermetadata.asyncio.get_user_metadata, "alice")


@provokes
def after_the_block(place: Place) -> None:
    users = place.sqlite()
    with contextlib.closing(sqlite3.connect(place.file)) as connection:
        with users.within(connection) as metadata:
            pass
        metadata.get_user_metadata("alice")


@provokes
def connection_to_another_file(place: Place) -> None:
    users = place.sqlite()
    other = sqlite3.connect(place.folder / "shop.db")
    with contextlib.closing(other), users.within(other) as metadata:
        metadata.get_user_metadata("alice")


FORK = """
usermetadata.init(sys.argv[1])
def fork(metadata):
    global child
    child = os.fork()
    return metadata
import logging
logging.disable()
show(syncio.modify_user_metadata, "alice", fork)
if child == 0:
    os._exit(0)
os.wait()
"""


@provokes
def fork_in_a_call_on_sqlite(place: Place) -> str:
    place.sqlite()
    return run(FORK, place.file)


@provokes
def fork_in_a_call_on_postgresql(place: Place) -> str:
    place.with_alice()
    return run(FORK, with_parameters(server_url(), schema=place.schema))


@provokes
def pool_of_the_parent(place: Place) -> str:
    program = """
from psycopg_pool import ConnectionPool
with ConnectionPool(sys.argv[1], min_size=1, max_size=2) as pool:
    usermetadata.init(usermetadata.PostgresStorage(pool))
    if os.fork() == 0:
        show(syncio.get_user_metadata, "alice")
        os._exit(0)
    os.wait()
"""
    return run(program, server_url())


@provokes
def gevent_too_late(_: Place) -> str:
    program = """
import psycopg
from gevent import monkey
monkey.patch_all()
usermetadata.init("postgresql://db.internal/shop")
show(syncio.get_user_metadata, "alice")
"""
    return run(program)


@provokes
def override_under_eventlet(place: Place) -> str:
    program = """
import eventlet
eventlet.monkey_patch()
from usermetadata import UserMetadataOverrideConfig
usermetadata.init(sys.argv[1], UserMetadataOverrideConfig(functions=lambda original: original))
show(syncio.get_user_metadata, "alice")
"""
    return run(program, place.file)


# SQLite


@provokes
def locked_by_another_program(place: Place) -> None:
    users = place.sqlite(timeout=0.1)
    with contextlib.closing(sqlite3.connect(place.file)) as other:
        other.execute("BEGIN IMMEDIATE")
        users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def too_many_readers(place: Place) -> str:
    users = place.sqlite(timeout=0)
    users.syncio.update_user_metadata("alice", {"text": "x" * 1_000_000})
    shown: list[str] = []

    def read() -> None:
        while not shown:
            try:
                users.syncio.get_user_metadata("alice")
            except usermetadata.StorageBusyError as error:
                shown.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return shown[0]


@provokes
def no_directory(place: Place) -> None:
    place.file = place.folder / "app/users.db"
    place.sqlite()


@provokes
def directory_in_place_of_the_file(place: Place) -> None:
    place.file.mkdir()
    place.sqlite()


@provokes
def read_only_file(place: Place) -> None:
    # The folders around tmp_path belong to the user that runs the tests.
    place.folder = Path(place.stack.enter_context(tempfile.TemporaryDirectory()))
    place.file = place.folder / "users.db"
    place.sqlite().storage.close()
    place.file.chmod(0o444)
    place.folder.chmod(0o555)
    place.stack.callback(place.folder.chmod, 0o755)
    if os.geteuid() == 0:  # nothing is read-only for root
        os.seteuid(65534)
        place.stack.callback(os.seteuid, 0)
    UserMetadata[Any, Any](place.file).syncio.update_user_metadata("alice", {"plan": None})


@provokes
def full_database(place: Place) -> str:
    connection = place.stack.enter_context(contextlib.closing(sqlite3.connect(place.file)))
    users = UserMetadata[Any, Any](SQLiteStorage(Database(connection)))
    users.syncio.update_user_metadata("alice", {})
    connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(usermetadata.StorageError) as caught:
        users.syncio.update_user_metadata("alice", {"text": "x" * 100_000})
    return f"StorageError: {caught.value}".replace("the borrowed database", str(place.file))


@provokes
def refused_commit(place: Place) -> None:
    users = place.sqlite()
    with small_files(4096):
        users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def failed_flush(place: Place) -> str:
    if sys.platform != "linux":
        pytest.skip("needs Linux: the kernel refuses to flush")
    command = [sys.executable, "-c", FLUSHES_FAIL, str(place.file)]
    _, text = subprocess.check_output(command, text=True).splitlines()[0].split(" ", 1)
    return f"OutcomeUnknownError: {text}"


@provokes
def no_sqlite_file(place: Place) -> None:
    place.file.write_text("alice likes dark themes\n" * 100, encoding="utf-8")
    place.sqlite()


@provokes
def damaged_file(place: Place) -> None:
    users = place.sqlite()
    users.syncio.update_bulk_user_metadata({f"user {n}": {"n": "x" * 100} for n in range(1000)})
    users.storage.close()
    size = place.file.stat().st_size
    with place.file.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    place.sqlite()


@provokes
def moved_file(place: Place) -> None:
    users = place.sqlite()
    place.file.rename(place.folder / "moved.db")
    time.sleep(0.2)  # the path is compared every 0.1 seconds
    users.syncio.get_user_metadata("alice")


@provokes
def too_many_open_files(place: Place) -> str:
    place.sqlite()
    program = """
import resource
usermetadata.init(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
files = []
try:
    while True:
        files.append(open(os.devnull))
except OSError:
    show(syncio.get_user_metadata, "alice")
"""
    return run(program, place.file)


@provokes
def trigger_in_sqlite(place: Place) -> None:
    users = place.sqlite()
    place.execute(
        "CREATE TRIGGER keep BEFORE UPDATE ON user_metadata BEGIN SELECT RAISE(IGNORE); END"
    )
    users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def table_of_another_program(place: Place) -> None:
    place.execute(
        "CREATE TABLE user_metadata (app_id TEXT, user_id INTEGER, user_metadata TEXT,"
        " PRIMARY KEY (app_id, user_id))"
    )
    place.sqlite()


@provokes
def damaged_row(place: Place) -> None:
    users = place.sqlite()
    place.execute("UPDATE user_metadata SET user_metadata = '[]'")
    users.syncio.get_user_metadata("alice")


# PostgreSQL


@provokes
def refused_connection(place: Place) -> None:
    with contextlib.closing(Proxy(server_url())) as proxy:
        url = proxy.url
    place.postgres(url).syncio.get_user_metadata("alice")


@provokes
def wrong_database(place: Place) -> None:
    url = make_conninfo(server_url(), dbname="shopp")
    place.postgres(url).syncio.get_user_metadata("alice")


@provokes
def wrong_password(place: Place) -> None:
    server = OwnServer()
    place.stack.callback(server.stop)
    rules = server.folder / "pg_hba.conf"
    rules.write_text(f"local all app scram-sha-256\n{rules.read_text()}")
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CREATE ROLE app LOGIN PASSWORD 'right'")
        connection.execute("SELECT pg_reload_conf()")
    url = make_conninfo(server.url, user="app", password="wrong")
    place.postgres(url).syncio.get_user_metadata("alice")


@provokes
def too_many_connections(place: Place) -> None:
    url = place.role("app", "ALTER ROLE {role} CONNECTION LIMIT 1")
    with psycopg.connect(url):
        place.postgres(url).syncio.get_user_metadata("alice")


@provokes
def full_pool(place: Place) -> None:
    users = place.with_alice(max_connections=1, timeout=1).syncio
    begun, ended = threading.Event(), threading.Event()

    def wait(metadata: Metadata) -> Metadata:
        begun.set()
        ended.wait()
        return metadata

    thread = threading.Thread(target=users.modify_user_metadata, args=("alice", wait))
    thread.start()
    place.stack.callback(thread.join)
    place.stack.callback(ended.set)
    begun.wait()
    users.get_user_metadata("bob")


@provokes
def locked_row(place: Place) -> None:
    users = place.with_alice(timeout=1)
    with place.direct.transaction():
        place.direct.execute("SELECT FROM user_metadata FOR UPDATE")
        users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def servers_own_limit(place: Place) -> None:
    users = place.with_alice(make_conninfo(server_url(), options="-c statement_timeout=1000"))
    with place.direct.transaction():
        place.direct.execute("LOCK TABLE user_metadata")
        users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def no_answer(place: Place) -> None:
    users = place.with_alice(with_parameters(server_url(), application_name="shop"), timeout=1)
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'shop'"
    for (session,) in place.direct.execute(query).fetchall():
        os.kill(session, signal.SIGSTOP)
        place.stack.callback(os.kill, session, signal.SIGCONT)
    users.syncio.get_user_metadata("alice")


@provokes
def lost_answer(place: Place) -> None:
    proxy = place.stack.enter_context(contextlib.closing(Proxy(server_url())))
    users = place.with_alice(proxy.url)
    proxy.replies_to_lose = 1
    users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def read_only_server(place: Place) -> None:
    place.with_alice()
    url = make_conninfo(server_url(), options="-c default_transaction_read_only=on")
    place.postgres(url).syncio.update_user_metadata("alice", {"plan": None})


@provokes
def no_right_on_the_table(place: Place) -> None:
    place.with_alice()
    url = place.role("app", f"GRANT USAGE ON SCHEMA {place.schema} TO {{role}}")
    place.postgres(url).syncio.get_user_metadata("alice")


@provokes
def no_right_to_create_the_table(place: Place) -> None:
    url = place.role("app", f"GRANT USAGE ON SCHEMA {place.schema} TO {{role}}")
    place.postgres(url).syncio.update_user_metadata("alice", {})


@provokes
def no_schema(place: Place) -> None:
    place.postgres(schema="shop").syncio.update_user_metadata("alice", {})


@provokes
def column_of_another_type(place: Place) -> None:
    place.direct.execute(
        "CREATE TABLE user_metadata (app_id text, user_id text, user_metadata jsonb,"
        " PRIMARY KEY (app_id, user_id))"
    )
    place.postgres().syncio.get_user_metadata("alice")


@provokes
def trigger_in_postgresql(place: Place) -> None:
    users = place.with_alice()
    place.direct.execute(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    place.direct.execute(
        "CREATE TRIGGER keep BEFORE INSERT OR UPDATE ON user_metadata"
        " FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    users.syncio.update_user_metadata("alice", {"plan": None})


@provokes
def closed_pool(place: Place) -> None:
    with ConnectionPool(server_url(), min_size=1) as pool:
        users = place.postgres(pool)
    users.syncio.get_user_metadata("alice")


@provokes
def failed_transaction(place: Place) -> None:
    users = place.with_alice()
    with psycopg.connect(server_url()) as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT 1 / 0")
        with users.within(connection) as metadata:
            metadata.get_user_metadata("alice")


# Finding


@provokes
def no_index(place: Place) -> None:
    place.sqlite().syncio.list_user_metadata({"plan": "pro"})


@provokes
def no_unique_index(place: Place) -> None:
    place.sqlite(indexes=[Index("plan")]).syncio.find_user_id({"plan": "pro"})


@provokes
def taken_value(place: Place) -> None:
    users = place.sqlite(indexes=[Index("email", unique=True)]).syncio
    users.update_user_metadata("alice", {"email": "a@example.org"})
    users.update_user_metadata("bob", {"email": "a@example.org"})


@provokes
def value_without_index(place: Place) -> None:
    users = place.sqlite(indexes=[Index("plan")]).syncio
    users.update_user_metadata("alice", {"plan": ["pro", "beta"]})


@provokes
def large_table_without_index(place: Place) -> None:
    users = place.sqlite()
    users.syncio.update_bulk_user_metadata({f"user {n}": {"plan": "pro"} for n in range(10_001)})
    users.storage.close()
    place.sqlite(indexes=[Index("plan")]).syncio.list_user_metadata({"plan": "pro"})


@provokes
def row_in_the_way(place: Place) -> None:
    users = place.sqlite()
    users.syncio.update_user_metadata("bob", {"plan": "pro"})
    users.storage.close()
    place.sqlite(indexes=[Index("plan", unique=True)]).syncio.find_user_id({"plan": "pro"})


# Input


@provokes
def no_json(_: Place) -> None:
    usermetadata.init("memory://")
    syncio.update_user_metadata("alice", {"seen": [datetime.now(UTC)]})


@provokes
def no_user_id(_: Place) -> None:
    usermetadata.init("memory://")
    syncio.get_user_metadata("")


@provokes
def no_result(_: Place) -> None:
    usermetadata.init("memory://")
    function: Any = lambda metadata: metadata.update(plan="pro")  # noqa: E731
    syncio.modify_user_metadata("alice", function)


# The server


def answer(place: Place, method: str, path: str = "", **arguments: Any) -> str:
    """Return the status and the body of the server's answer."""
    api_keys = arguments.pop("api_keys", [])
    storage = arguments.pop("storage", None) or place.sqlite().storage
    with serve(create_app(storage, api_keys=api_keys, max_metadata_size=100)) as port:
        url = f"http://127.0.0.1:{port}/recipe/user/metadata{path}"
        # verify: reading all root certificates takes 60 ms.
        response = httpx.request(method, url, verify=False, **arguments)
    return f"{response.status_code}: {response.text}"


@provokes
def no_key(place: Place) -> str:
    return answer(place, "GET", "?userId=alice", api_keys=["a-key-that-is-hard-to-guess"])


@provokes
def another_name_as_host(place: Place) -> str:
    return answer(place, "GET", "?userId=alice", headers={"host": "metadata.internal"})


@provokes
def page_of_another_site(place: Place) -> str:
    return answer(place, "GET", "?userId=alice", headers={"origin": "https://shop.example"})


@provokes
def no_field(place: Place) -> str:
    return answer(place, "PUT", json={"userId": "alice"})


@provokes
def too_large(place: Place) -> str:
    body = {"userId": "alice", "metadataUpdate": {"text": "x" * 200}}
    return answer(place, "PUT", json=body)


@provokes
def damaged_row_behind_the_server(place: Place) -> str:
    storage = place.sqlite().storage
    place.execute("UPDATE user_metadata SET user_metadata = '[]'")
    return answer(place, "GET", "?userId=alice", storage=storage)


@provokes
def busy_storage_behind_the_server(place: Place) -> str:
    storage = place.sqlite(timeout=0.1).storage
    with contextlib.closing(sqlite3.connect(place.file)) as other:
        other.execute("BEGIN IMMEDIATE")
        body = {"userId": "alice", "metadataUpdate": {}}
        return answer(place, "PUT", json=body, storage=storage)


@pytest.mark.parametrize("provoke", PROVOCATIONS, ids=lambda function: function.__name__)
def test_the_page_shows_the_message(provoke: Any, place: Place) -> None:
    """An error, or an answer of the server, has the text that the page shows."""
    try:
        text = provoke(place)
    except (usermetadata.UserMetadataError, ImportError) as error:
        text = f"{type(error).__name__}: {error}"
    assert place.shown(str(text)) in messages()


def test_each_message_is_provoked() -> None:
    """The page shows each message once, and no other."""
    shown = messages()
    assert len(shown) == len({*shown}) == len(PROVOCATIONS) > 50


# Symptoms


@contextlib.contextmanager
def hung_callback(
    users: UserMetadata[Any, Any], *, of_asyncio: bool
) -> Generator[None, None, None]:
    """Have a function given to ``modify`` for alice not return during a block."""
    begun, ended = threading.Event(), threading.Event()

    def hang(metadata: Metadata) -> Metadata:
        begun.set()
        ended.wait()
        return metadata

    async def modify() -> None:
        await users.asyncio.modify_user_metadata("alice", hang)

    def call() -> None:
        if of_asyncio:
            asyncio.run(modify())
        else:
            users.syncio.modify_user_metadata("alice", hang)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        assert begun.wait(30)
        yield
    finally:
        ended.set()
        thread.join()


def outcome(call: Callable[[], object]) -> str:
    """Tell how a call ends."""
    try:
        call()
    except usermetadata.StorageBusyError:
        return "busy"
    return "works"


@pytest.mark.parametrize(("kind", "others"), [("sqlite", "busy"), ("with_alice", "works")])
def test_a_hung_callback_looks_as_the_page_says(place: Place, kind: str, others: str) -> None:
    """Reads work, writes end with the timeout; those behind it in ``asyncio`` never end."""
    users = getattr(place, kind)(timeout=0.5)
    update = users.syncio.update_user_metadata

    async def call(user_id: str, patience: float) -> None:
        async with asyncio.timeout(patience):
            await users.asyncio.update_user_metadata(user_id, {})

    with hung_callback(users, of_asyncio=False):
        assert outcome(lambda: users.syncio.get_user_metadata("alice")) == "works"
        assert outcome(lambda: update("alice", {})) == "busy"
        assert outcome(lambda: update("bob", {})) == others
        assert outcome(lambda: asyncio.run(call("bob", 60))) == others
    with hung_callback(users, of_asyncio=True):
        assert outcome(lambda: update("alice", {})) == "busy"
        assert outcome(lambda: update("bob", {})) == others
        for user_id in ("alice", "bob"):
            with pytest.raises(TimeoutError) as caught:
                asyncio.run(call(user_id, 2))
            assert not isinstance(caught.value, usermetadata.StorageBusyError)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux has /proc/locks")
def test_the_command_of_the_page_finds_the_writer(place: Place) -> None:
    """It prints one line with the process that has SQLite's lock for writing."""
    [command] = re.findall(
        r"```console\n(grep .*?)```", SYMPTOMS.read_text(encoding="utf-8"), re.DOTALL
    )
    users = place.sqlite()
    with hung_callback(users, of_asyncio=False):
        output = subprocess.check_output(["sh", "-c", command], text=True, cwd=place.folder)
    assert re.findall(r"WRITE (\d+) ", output) == [str(os.getpid())]


def test_the_query_of_the_page_finds_the_writer(place: Place) -> None:
    """It returns the session that waits for a row, and the session whose transaction has it."""
    [query] = re.findall(r"```sql\n(.*?)```", SYMPTOMS.read_text(encoding="utf-8"), re.DOTALL)
    users = place.with_alice(timeout=20)
    waiting = threading.Thread(target=users.syncio.update_user_metadata, args=("alice", {}))
    with hung_callback(users, of_asyncio=False):
        waiting.start()
        while not (rows := place.direct.execute(query.encode()).fetchall()):
            assert waiting.is_alive()
    waiting.join()
    [(_, waits, _, blocks, state, *_)] = rows
    assert (waits, blocks, state) == ("usermetadata", "usermetadata", "idle in transaction")


def test_a_lock_of_the_table_is_waited_for_without_the_timeout(place: Place) -> None:
    """The role's own ``lock_timeout`` limits it."""
    users = place.with_alice(timeout=1)
    update = users.syncio.update_user_metadata
    limited = place.postgres(make_conninfo(server_url(), options="-c lock_timeout=100"))
    limited.syncio.update_user_metadata("alice", {})
    waiting = threading.Thread(target=update, args=("alice", {}))
    with place.direct.transaction():
        place.direct.execute("LOCK TABLE user_metadata")
        waiting.start()
        assert outcome(lambda: limited.syncio.update_user_metadata("alice", {})) == "busy"
        waiting.join(2)
        assert waiting.is_alive()
    waiting.join()

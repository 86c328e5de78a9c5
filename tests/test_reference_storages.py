"""The storages of ``docs/examples``, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import django
import django.db
import pymysql
import pytest
import redis
import sqlalchemy as sa
from django.apps import apps
from django.db import transaction
from json_file_storage import JSONFileStorage
from mariadb_storage import MariaDBStorage
from postgres_proxy import address_of
from postgres_server import server_url, with_parameters
from psycopg.conninfo import conninfo_to_dict
from real_servers import MariaDBServer, RedisServer
from redis_storage import RedisStorage
from sqlalchemy_storage import SQLAlchemyStorage

import usermetadata
from usermetadata import (
    DamagedMetadataError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageUnavailableError,
    UserMetadataOverrideConfig,
    syncio,
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.interfaces import RecipeInterface
from usermetadata.testing import BreakingProxy, StorageConformance
from usermetadata.testing.conformance.connections import ConnectionConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata import Storage
    from usermetadata.storage import ListingStorage

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@dataclass
class Database:
    """An empty database.

    Attributes:
        make: makes a storage over it.
        program: an expression that does so in another process.
        damage: stores text, whatever it is, as alice's row.
        address: that of the server, as ``BreakingProxy`` takes it.
        connect_to: makes a storage that connects to a port of this machine instead.
    """

    make: Callable[..., ListingStorage]
    program: str
    damage: Callable[[str], object]
    address: tuple[str, int] | str = ""
    connect_to: Callable[[int], Storage] | None = None


@pytest.fixture(scope="module")
def redis_server() -> Generator[RedisServer, None, None]:
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mariadb_server() -> Generator[MariaDBServer, None, None]:
    server = MariaDBServer()
    yield server
    server.stop()


@pytest.fixture
def on_redis(redis_server: RedisServer) -> Generator[Database, None, None]:
    url = redis_server.url
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushall()
        damage = partial(client.hset, "usermetadata:rows:public", "alice")
        program = f"redis_storage.RedisStorage({url!r})"
        yield Database(
            partial(RedisStorage, url),
            program,
            damage,
            ("127.0.0.1", redis_server.port),
            lambda port: RedisStorage(f"redis://127.0.0.1:{port}"),
        )


@pytest.fixture
def on_mariadb(mariadb_server: MariaDBServer) -> Database:
    arguments: dict[str, Any] = {**mariadb_server.arguments, "database": "users"}
    with contextlib.suppress(pymysql.ProgrammingError):  # the table was not created yet
        mariadb_server.execute("DELETE FROM users.user_metadata")

    def damage(text: str) -> None:
        mariadb_server.execute(f"REPLACE users.user_metadata VALUES ('public', 'alice', '{text}')")

    def open_at(port: int) -> MariaDBStorage:
        elsewhere: dict[str, Any] = {**arguments, "port": port}
        return MariaDBStorage(**elsewhere)

    program = f"mariadb_storage.MariaDBStorage(**{arguments!r})"
    return Database(
        partial(MariaDBStorage, **arguments),
        program,
        damage,
        ("127.0.0.1", mariadb_server.port),
        open_at,
    )


def by_sqlalchemy(
    url: str,
    address: tuple[str, int] | str = "",
    url_with_port: Callable[[int], str] | None = None,
) -> Database:
    def damage(text: str) -> None:
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM user_metadata WHERE user_id = 'alice'"))
            insert = f"INSERT INTO user_metadata VALUES ('public', 'alice', '{text}')"
            connection.execute(sa.text(insert))
        engine.dispose()

    program = f"sqlalchemy_storage.SQLAlchemyStorage({url!r})"
    database = Database(partial(SQLAlchemyStorage, url), program, damage, address)
    if url_with_port is not None:
        database.connect_to = lambda port: SQLAlchemyStorage(url_with_port(port))
    return database


@pytest.fixture
def sqlalchemy_on_sqlite(tmp_path: Path) -> Database:
    return by_sqlalchemy(f"sqlite:///{tmp_path}/users.db")


@pytest.fixture
def sqlalchemy_on_postgres(schema: str) -> Database:
    options = f"-csearch_path={schema}"
    url = with_parameters(server_url(), options=options).replace("sql:", "sql+psycopg:")
    conninfo = conninfo_to_dict(server_url())

    def url_with_port(port: int) -> str:
        here = f"postgresql+psycopg://{conninfo['user']}@127.0.0.1:{port}/{conninfo['dbname']}"
        return with_parameters(here, options=options, **WITHOUT_ENCRYPTION)

    return by_sqlalchemy(url, address_of(server_url()), url_with_port)


@pytest.fixture
def sqlalchemy_on_mariadb(on_mariadb: Database, mariadb_server: MariaDBServer) -> Database:
    def url_with_port(port: int) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{port}/users?ssl_disabled=true"

    port = mariadb_server.port
    return by_sqlalchemy(url_with_port(port), ("127.0.0.1", port), url_with_port)


WITHOUT_ENCRYPTION = {"sslmode": "disable", "gssencmode": "disable"}


@contextlib.contextmanager
def by_django(**settings: Any) -> Generator[Database, None, None]:
    import_module("django_app")  # configures Django, once in a process
    if not apps.ready:
        django.setup()
    example: Any = import_module("django_storage")
    handler: Any = django.db.connections
    alias = f"reference_{uuid.uuid4().hex}"
    handler.settings[alias] = handler.configure_settings({"default": settings})["default"]
    with handler[alias].schema_editor() as editor:
        editor.create_model(example.UserMetadata)

    def damage(text: str) -> None:
        rows = example.UserMetadata.objects.using(alias)
        rows.filter(user_id="alice").delete()
        rows.create(app_id="public", user_id="alice", metadata=text)

    aliases = [alias]

    def connect_to(port: int) -> Storage:
        aliases.append(f"{alias}_{port}")
        options = {**settings["OPTIONS"], **WITHOUT_ENCRYPTION, "host": "127.0.0.1", "port": port}
        proxied = {"default": {**settings, "OPTIONS": options}}
        handler.settings[aliases[-1]] = handler.configure_settings(proxied)["default"]
        storage: Storage = example.DjangoStorage(using=aliases[-1])
        return storage

    make = partial(example.DjangoStorage, using=alias)
    yield Database(make, "", damage, address_of(server_url()), connect_to)
    for each in aliases:
        handler[each].close()
        del handler.settings[each]


@pytest.fixture
def django_on_sqlite(tmp_path: Path) -> Generator[Database, None, None]:
    with by_django(
        ENGINE="django.db.backends.sqlite3", NAME=tmp_path / "users.db", OPTIONS={"timeout": 30}
    ) as database:
        yield database


@pytest.fixture
def django_on_postgres(schema: str) -> Generator[Database, None, None]:
    options = conninfo_to_dict(server_url(), options=f"-csearch_path={schema}")
    name = options.pop("dbname")
    with by_django(ENGINE="django.db.backends.postgresql", NAME=name, OPTIONS=options) as database:
        yield database


@pytest.fixture
def json_file(tmp_path: Path) -> Database:
    path = tmp_path / "users.json"

    def damage(text: str) -> None:
        path.write_text(json.dumps({"public": {"alice": text}}))

    return Database(partial(JSONFileStorage, path), "", damage)


ON_DJANGO = ["django_on_sqlite", "django_on_postgres"]
ON_MARIADB = ["on_mariadb", "sqlalchemy_on_mariadb"]
SLOW = ["sqlalchemy_on_mariadb", "sqlalchemy_on_postgres", "django_on_postgres"]
ALL = ["on_redis", "on_mariadb", "sqlalchemy_on_sqlite", "django_on_sqlite", "json_file", *SLOW]
SUITE = ["on_redis", "on_mariadb", *SLOW]


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Database:
    """That of the parameter."""
    found: Database = request.getfixturevalue(request.param)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the suite over each of its databases, or skip each of its tests once."""
    if metafunc.cls is not None and "database" in metafunc.fixturenames:
        skip = pytest.mark.skip(reason="the suite takes a minute: --reference-storages runs it")
        is_wanted = metafunc.config.getoption("reference_storages")
        databases: Any = metafunc.cls.databases if is_wanted else [pytest.param("none", marks=skip)]
        metafunc.parametrize("database", databases, indirect=True)


class TestConformance(StorageConformance):
    databases: ClassVar = [*SUITE, "sqlalchemy_on_sqlite"]

    @pytest.fixture
    def storage(self, database: Database) -> Generator[Storage, None, None]:
        with contextlib.closing(database.make()) as storage:
            yield storage

    @pytest.fixture
    def second_storage(self, database: Database) -> Generator[Storage, None, None]:
        with contextlib.closing(database.make()) as storage:
            yield storage


class TestBrokenConnections(ConnectionConformance):
    databases: ClassVar = SUITE

    @pytest.fixture
    def proxy(self, database: Database) -> Generator[BreakingProxy, None, None]:
        with contextlib.closing(BreakingProxy(database.address)) as proxy:
            yield proxy

    @pytest.fixture
    def storage(self, database: Database, proxy: BreakingProxy) -> Generator[Storage, None, None]:
        assert database.connect_to is not None
        with contextlib.closing(database.connect_to(proxy.port)) as storage:
            yield storage

    @pytest.fixture
    def second_storage(self, database: Database) -> Generator[Storage, None, None]:
        with contextlib.closing(database.make()) as storage:
            yield storage

    @pytest.fixture
    def break_connection(self, proxy: BreakingProxy) -> Any:
        return proxy.break_connection


def count(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"n": metadata.get("n", 0) + 1}


@pytest.mark.parametrize("database", ALL, indirect=True)
def test_set_and_clear_repair_a_damaged_row(database: Database) -> None:
    """Changes that need what is stored name the user; those that do not are done."""
    with contextlib.closing(database.make()) as storage:
        storage.write([("alice", Merge({}))])  # creates the table
        for repair, stored in ((Replace({"n": 1}), {"alice": {"n": 1}}), (Clear(), {})):
            database.damage("[1")
            calls: list[Callable[[], object]] = [
                lambda: storage.read(["alice"]),
                lambda: storage.write([("bob", Merge({})), ("alice", Merge({"n": 1}))]),
            ]
            for call in calls:
                with pytest.raises(DamagedMetadataError) as caught:
                    call()
                assert caught.value.user_id == "alice"
            storage.write([("alice", repair)])
            assert storage.read(["alice", "bob"]) == stored


def test_a_file_that_another_program_locks_is_waited_for(tmp_path: Path) -> None:
    """A storage that begins the write-ahead log of an SQLite file waits for its lock."""
    path = tmp_path / "users.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE orders (id)")
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.rollback)
    with contextlib.closing(SQLAlchemyStorage(f"sqlite:///{path}")) as storage:
        release.start()
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
    release.join()
    other.close()


@pytest.mark.parametrize("database", ALL, indirect=True)
def test_users_are_listed(database: Database) -> None:
    """``read_after`` returns each user once, page by page, of one app."""
    with contextlib.closing(database.make()) as storage:
        users = [f"user {number}" for number in range(5)]
        storage.write([(user, Merge({"id": user})) for user in reversed(users)])
        storage.for_app("other").write([("user 7", Merge({}))])
        storage.write([("user 3", Clear())])
        pages = [storage.read_after("", 3), storage.read_after("user 2", 3)]
        assert [[*page] for page in pages] == [users[:3], ["user 4"]]
        assert pages[1] == {"user 4": {"id": "user 4"}}
        assert storage.read_after("user 4", 3) == {}


PROGRAM = """
import contextlib, os, sys
sys.path.insert(0, {examples!r})
import mariadb_storage, redis_storage, sqlalchemy_storage
from usermetadata.changes import Modify

def count(metadata):
    return {{"n": metadata.get("n", 0) + 1}}

for program in {programs!r}:
    storage = eval(program)
    assert storage.read(["alice"]) == {{}}  # the parent has an open connection
    child = os.fork()
    for _ in range(50):
        storage.write([("alice", Modify(count))])
    if child == 0:
        storage.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.read(["alice"]) == {{"alice": {{"n": 100}}}}, storage.read(["alice"])
    storage.close()
"""


def test_a_fork_is_two_processes(
    on_redis: Database,
    on_mariadb: Database,
    sqlalchemy_on_sqlite: Database,
    sqlalchemy_on_postgres: Database,
) -> None:
    """Parent and child write the same user, at first without a row, and lose nothing."""
    databases = (on_redis, on_mariadb, sqlalchemy_on_sqlite, sqlalchemy_on_postgres)
    programs = [database.program for database in databases]
    program = PROGRAM.format(examples=str(EXAMPLES), programs=programs)
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", ["on_redis", *ON_MARIADB])
def test_a_server_that_ends_during_a_write_has_done_nothing(
    request: pytest.FixtureRequest, name: str
) -> None:
    """The error says that the server cannot be reached; the storage works once it is back."""
    database = request.getfixturevalue(name)
    server = request.getfixturevalue("redis_server" if name == "on_redis" else "mariadb_server")
    with contextlib.closing(database.make()) as storage:
        storage.write([("alice", Merge({"n": 1}))])

        def end(metadata: dict[str, Any]) -> dict[str, Any]:
            server.end()
            return count(metadata)

        try:
            with pytest.raises(StorageUnavailableError) as caught:
                storage.write([("alice", Modify(end))])
            with pytest.raises(StorageUnavailableError):
                storage.read(["alice"])
        finally:
            server.start()
        assert caught.value.__cause__ is not None
        expected = {} if name == "on_redis" else {"alice": {"n": 1}}  # it keeps nothing on disk
        assert storage.read(["alice"]) == expected
        assert storage.write([("alice", Replace({"n": 5}))]) == [{"n": 5}]


def test_redis_without_an_answer_leaves_the_outcome_unknown(
    on_redis: Database, redis_server: RedisServer
) -> None:
    """The write was sent. It is not repeated, although it may have been done."""
    with contextlib.closing(on_redis.make(timeout=1)) as storage:
        storage.write([("alice", Merge({"n": 1}))])

        def pause(metadata: dict[str, Any]) -> dict[str, Any]:
            redis_server.pause()
            return count(metadata)

        with pytest.raises(OutcomeUnknownError):
            storage.write([("alice", Modify(pause))])
        redis_server.resume()
        assert storage.write([("alice", Modify(count))]) in ([{"n": 2}], [{"n": 3}])


@pytest.mark.parametrize("name", ON_MARIADB)
def test_mariadb_without_an_answer_to_commit_leaves_the_outcome_unknown(
    request: pytest.FixtureRequest, mariadb_server: MariaDBServer, name: str
) -> None:
    """COMMIT was sent, so the write is not repeated."""
    database: Database = request.getfixturevalue(name)
    with contextlib.ExitStack() as stack:
        if name == "on_mariadb":
            storage = stack.enter_context(contextlib.closing(database.make(timeout=1)))
        else:
            url = f"{mariadb_server.url}?ssl_disabled=true&read_timeout=1"
            made = SQLAlchemyStorage(url.replace("mysql", "mysql+pymysql"))
            storage = stack.enter_context(contextlib.closing(made))
        storage.write([("alice", Merge({"n": 1}))])
        blocking = stack.enter_context(pymysql.connect(**mariadb_server.arguments))
        calls: list[int] = []

        def block(metadata: dict[str, Any]) -> dict[str, Any]:
            calls.append(1)
            with blocking.cursor() as cursor:
                cursor.execute("BACKUP STAGE START")
                cursor.execute("BACKUP STAGE BLOCK_COMMIT")
            return count(metadata)

        with pytest.raises(OutcomeUnknownError):
            storage.write([("alice", Modify(block))])
        with blocking.cursor() as cursor:
            cursor.execute("BACKUP STAGE END")
        assert calls == [1]
        assert storage.write([("alice", Modify(count))]) in ([{"n": 2}], [{"n": 3}])


def test_a_held_user_is_waited_for_no_longer_than_the_timeout(on_mariadb: Database) -> None:
    """The error says that another writer was in the way; nothing is stored."""
    with contextlib.closing(on_mariadb.make(timeout=1)) as storage:
        errors: list[BaseException] = []

        def write() -> None:
            try:
                storage.write([("alice", Merge({"n": 2}))])
            except StorageBusyError as error:
                errors.append(error)

        def hold(metadata: dict[str, Any]) -> dict[str, Any]:
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
            return count(metadata)

        assert storage.write([("alice", Modify(hold))]) == [{"n": 1}]
        assert len(errors) == 1


@pytest.mark.usefixtures("on_redis", "on_mariadb")
def test_a_url_names_them(
    redis_server: RedisServer,
    mariadb_server: MariaDBServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package that has the examples as modules registers their schemes."""
    info = tmp_path / "storages-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: storages\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[usermetadata.storages]\n"
        "redis = redis_storage:RedisStorage\nmysql = mariadb_storage:open_url\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for url in (redis_server.url, mariadb_server.url):
        usermetadata.init(url)
        usermetadata.init(url)  # the same again
        assert syncio.update_user_metadata("alice", {"n": 1}).metadata == {"n": 1}
        usermetadata.close()


class Counting(RecipeInterface):
    """Counts the reads in another user's metadata."""

    def __init__(self, original: RecipeInterface) -> None:
        self.original = original

    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
        syncio.modify_user_metadata("reads", count)
        return await self.original.get_user_metadata(user_id, user_context)

    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> Any:
        return await self.original.update_user_metadata(user_id, metadata_update, user_context)

    async def clear_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
        return await self.original.clear_user_metadata(user_id, user_context)


@pytest.mark.parametrize("name", ON_DJANGO)
def test_djangos_orm_works_under_an_override(
    request: pytest.FixtureRequest, facade: Any, name: str
) -> None:
    """It refuses to be used where an event loop is running, and is not called there."""
    database: Database = request.getfixturevalue(name)
    usermetadata.init(database.make(), UserMetadataOverrideConfig(functions=Counting))
    facade.update_user_metadata("alice", {"n": 1})
    facade.update_bulk_user_metadata({"alice": {"m": 1}, "bob": {}})
    assert facade.get_user_metadata("alice").metadata == {"n": 1, "m": 1}
    assert [*facade.list_user_metadata()] == ["alice", "bob", "reads"]
    facade.clear_user_metadata("bob")

    async def main() -> None:
        assert syncio.get_user_metadata("bob").metadata == {}
        assert syncio.get_bulk_user_metadata(["reads"])["reads"].metadata == {"n": 2}

    asyncio.run(main())


@pytest.mark.parametrize("name", ON_DJANGO)
def test_a_call_of_djangos_storage_is_part_of_the_transaction(
    request: pytest.FixtureRequest, name: str
) -> None:
    """In ``transaction.atomic`` it is rolled back with the application's own rows.

    A change that raises an error leaves the transaction usable.
    """
    storage: Any = request.getfixturevalue(name).make()
    storage.write([("alice", Merge({"n": 1}))])

    def fail(_: object) -> Any:
        raise LookupError

    with transaction.atomic(using=storage._using):
        storage.write([("alice", Merge({"n": 2}))])
        with pytest.raises(LookupError):
            storage.write([("alice", Merge({"n": 3})), ("bob", fail)])
        assert storage.read(["alice"]) == {"alice": {"n": 2}}
        transaction.set_rollback(True, using=storage._using)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}

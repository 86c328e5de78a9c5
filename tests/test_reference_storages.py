"""The storages of ``docs/examples``, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from importlib import import_module
from typing import TYPE_CHECKING, Any

import django
import django.db
import pymysql
import pytest
import redis
from django.db import transaction
from mariadb_storage import MariaDBStorage
from postgres_server import server_url, with_parameters
from psycopg.conninfo import conninfo_to_dict
from real_servers import MariaDBServer, RedisServer
from redis_storage import RedisStorage
from sqlalchemy_storage import SQLAlchemyStorage

import usermetadata
from usermetadata import UserMetadataOverrideConfig, syncio
from usermetadata.changes import Merge
from usermetadata.interfaces import RecipeInterface
from usermetadata.testing import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata import Storage


@pytest.fixture(scope="module")
def redis_server() -> Generator[RedisServer, None, None]:
    """A Redis server."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mariadb_server() -> Generator[MariaDBServer, None, None]:
    """A MariaDB server."""
    server = MariaDBServer()
    yield server
    server.stop()


class Conformance(StorageConformance):
    """The suite, with a function ``make`` that makes a storage over the same empty database."""

    @pytest.fixture
    def storage(self, make: Callable[[], Storage]) -> Generator[Storage, None, None]:
        with contextlib.closing(make()) as storage:
            yield storage

    @pytest.fixture
    def second_storage(self, make: Callable[[], Storage]) -> Generator[Storage, None, None]:
        with contextlib.closing(make()) as storage:
            yield storage


class TestRedis(Conformance):
    @pytest.fixture
    def make(self, redis_server: RedisServer) -> Callable[[], Storage]:
        with contextlib.closing(redis.Redis.from_url(redis_server.url)) as client:
            client.flushall()
        return lambda: RedisStorage(redis_server.url)


def empty(server: MariaDBServer) -> None:
    """Remove all rows."""
    with contextlib.suppress(pymysql.ProgrammingError):  # the table was not created yet
        server.execute("DELETE FROM users.user_metadata")


class TestMariaDB(Conformance):
    @pytest.fixture
    def make(self, mariadb_server: MariaDBServer) -> Callable[[], Storage]:
        empty(mariadb_server)
        return lambda: MariaDBStorage(**mariadb_server.arguments, database="users")


class TestSQLAlchemyOnSQLite(Conformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[], Storage]:
        return lambda: SQLAlchemyStorage(f"sqlite:///{tmp_path}/users.db")


class TestSQLAlchemyOnPostgreSQL(Conformance):
    @pytest.fixture
    def make(self, schema: str) -> Callable[[], Storage]:
        url = with_parameters(server_url(), options=f"-csearch_path={schema}")
        return lambda: SQLAlchemyStorage(url.replace("postgresql://", "postgresql+psycopg://"))


class TestSQLAlchemyOnMariaDB(Conformance):
    @pytest.fixture
    def make(self, mariadb_server: MariaDBServer) -> Callable[[], Storage]:
        empty(mariadb_server)
        url = mariadb_server.url.replace("mysql", "mysql+pymysql")
        return lambda: SQLAlchemyStorage(f"{url}?ssl_disabled=true")


@contextlib.contextmanager
def django_database(**settings: object) -> Generator[str, None, None]:
    """Give Django a database with the model's table; yield its alias."""
    import_module("django_app")  # configures Django, once in a process
    if not django.apps.apps.ready:
        django.setup()
    handler: Any = django.db.connections
    alias = f"reference_{uuid.uuid4().hex}"
    handler.settings[alias] = handler.configure_settings({"default": settings})["default"]
    with handler[alias].schema_editor() as editor:
        editor.create_model(import_module("django_storage").UserMetadata)
    handler[alias].close()
    yield alias
    handler[alias].close()
    del handler.settings[alias]


@pytest.fixture
def django_on_sqlite(tmp_path: Path) -> Generator[str, None, None]:
    with django_database(
        ENGINE="django.db.backends.sqlite3", NAME=tmp_path / "users.db", OPTIONS={"timeout": 30}
    ) as alias:
        yield alias


@pytest.fixture
def django_on_postgres(schema: str) -> Generator[str, None, None]:
    options = conninfo_to_dict(server_url(), options=f"-csearch_path={schema}")
    name = options.pop("dbname")
    with django_database(
        ENGINE="django.db.backends.postgresql", NAME=name, OPTIONS=options
    ) as alias:
        yield alias


class TestDjangoOnSQLite(Conformance):
    @pytest.fixture
    def make(self, django_on_sqlite: str) -> Callable[[], Storage]:
        return lambda: import_module("django_storage").DjangoStorage(using=django_on_sqlite)


class TestDjangoOnPostgreSQL(Conformance):
    @pytest.fixture
    def make(self, django_on_postgres: str) -> Callable[[], Storage]:
        return lambda: import_module("django_storage").DjangoStorage(using=django_on_postgres)


@pytest.mark.parametrize("database", ["django_on_sqlite", "django_on_postgres"])
def test_djangos_orm_works_under_an_override(
    request: pytest.FixtureRequest, facade: Any, database: str
) -> None:
    """It refuses to be used where an event loop is running, and is not called there."""

    class Counting(RecipeInterface):
        def __init__(self, original: RecipeInterface) -> None:
            self.original = original

        async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
            syncio.modify_user_metadata("reads", lambda old: {"n": old.get("n", 0) + 1})
            return await self.original.get_user_metadata(user_id, user_context)

        async def update_user_metadata(
            self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
        ) -> Any:
            return await self.original.update_user_metadata(user_id, metadata_update, user_context)

        async def clear_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> Any:
            return await self.original.clear_user_metadata(user_id, user_context)

    alias = request.getfixturevalue(database)
    storage = import_module("django_storage").DjangoStorage(using=alias)
    usermetadata.init(storage, UserMetadataOverrideConfig(functions=Counting))
    facade.update_user_metadata("alice", {"n": 1})
    facade.update_bulk_user_metadata({"alice": {"m": 1}, "bob": {}})
    assert facade.get_user_metadata("alice").metadata == {"n": 1, "m": 1}
    assert [*facade.list_user_metadata()] == ["alice", "bob", "reads"]
    facade.clear_user_metadata("bob")

    async def main() -> None:
        assert syncio.get_user_metadata("bob").metadata == {}
        assert syncio.get_bulk_user_metadata(["reads"])["reads"].metadata == {"n": 2}

    asyncio.run(main())


def test_a_call_of_djangos_storage_is_part_of_the_transaction(django_on_sqlite: str) -> None:
    """In ``transaction.atomic`` it is rolled back with the application's own rows.

    A change that raises an error leaves the transaction usable.
    """
    storage = import_module("django_storage").DjangoStorage(using=django_on_sqlite)
    storage.write([("alice", Merge({"n": 1}))])

    def fail(_: object) -> Any:
        raise LookupError

    with transaction.atomic(using=django_on_sqlite):
        storage.write([("alice", Merge({"n": 2}))])
        with pytest.raises(LookupError):
            storage.write([("alice", Merge({"n": 3})), ("bob", fail)])
        assert storage.read(["alice"]) == {"alice": {"n": 2}}
        transaction.set_rollback(True, using=django_on_sqlite)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}

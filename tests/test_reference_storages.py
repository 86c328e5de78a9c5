"""The storages of ``docs/examples``, on real servers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pymysql
import pytest
import redis
from mariadb_storage import MariaDBStorage
from postgres_server import empty_schema, server_url, with_parameters
from real_servers import MariaDBServer, RedisServer
from redis_storage import RedisStorage
from sqlalchemy_storage import SQLAlchemyStorage

from usermetadata.testing import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata import Storage

MakeStorage = "Callable[[], Storage]"


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
        socket = mariadb_server.arguments["unix_socket"]
        url = f"mysql+pymysql://root@localhost/users?unix_socket={socket}"
        return lambda: SQLAlchemyStorage(url)

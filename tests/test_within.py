"""``within``: metadata is part of the transaction of the application's own connection."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import django.db
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm
from django.core.cache import cache
from django.db import transaction
from django.utils.connection import ConnectionProxy
from postgres_proxy import Proxy
from postgres_server import server_url
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlite_utils import Database

from usermetadata import (
    DamagedMetadataError,
    InMemoryStorage,
    InvalidInputError,
    OutcomeUnknownError,
    PostgresStorage,
    SQLiteStorage,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
    UserMetadata,
    UserMetadataOverrideConfig,
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.storage import JoiningStorage
from usermetadata.testing import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata import Storage
    from usermetadata.codec import Metadata
    from usermetadata.interfaces import MetadataResult, RecipeInterface
    from usermetadata.testing import OtherProcess

SINCE_3_12 = ["sqlite3, autocommit=False", "sqlite3, autocommit=True"]
TRANSACTIONAL = [
    "sqlite3",
    "sqlite3, autocommit=False",
    "sqlite-utils",
    "sqlite: Session",
    "sqlite: Connection",
    "sqlite: scoped_session",
    "sqlite: AsyncSession, aiosqlite",
    "sqlite: Django, atomic",
    "psycopg",
    "psycopg, pipeline",
    "postgres: Session",
    "postgres: Connection",
    "postgres: scoped_session",
    "postgres: AsyncSession, psycopg",
    "postgres: AsyncSession, asyncpg",
    "postgres: Django, atomic",
]
AUTOCOMMIT = [
    "sqlite3, isolation_level=None",
    "sqlite3, autocommit=True",
    "sqlite: Session, AUTOCOMMIT",
    "sqlite: AsyncSession, aiosqlite, AUTOCOMMIT",
    "sqlite: Django",
    "psycopg, autocommit",
    "postgres: Session, AUTOCOMMIT",
    "postgres: AsyncSession, psycopg, AUTOCOMMIT",
    "postgres: AsyncSession, asyncpg, AUTOCOMMIT",
    "postgres: Django",
]


class Databases:
    """The two databases of an application of one kind, and the storages on them.

    Attributes:
        kind: which connection the application has, one of those above.
        path: an SQLite file.
        url: the URL of a PostgreSQL database.
        storage: the storage that the application has beside its connection.
    """

    def __init__(self, kind: str, path: Path, url: str) -> None:
        self.kind, self.path, self.url = kind, path, url
        self.is_sqlite = kind.startswith("sqlite")
        self.storage = SQLiteStorage(path) if self.is_sqlite else PostgresStorage(url)

    def others(self, statement: str) -> list[Any]:
        """Execute a statement on another connection, and return its rows."""
        if self.is_sqlite:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as file:
                return file.execute(statement).fetchall()
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def orders(self) -> int:
        """Return how many orders are committed."""
        [(number,)] = self.others("SELECT count(*) FROM orders")
        return int(number)

    def connect_through(self, proxy: Proxy) -> None:
        """Connect the application through a proxy."""
        parts = conninfo_to_dict(proxy.url)
        names = ("host", "port", "sslmode", "gssencmode")
        self.url = make_conninfo(self.url, **{name: parts[name] for name in names})

    def run(self, body: Callable[[Application], object]) -> None:
        """Call a function with an application that is connected."""
        if "AsyncSession" in self.kind:
            asyncio.run(_in_async_session(self, body))
            return
        with _OPENERS[self.kind.partition(",")[0]](self) as application:
            body(application)


@dataclass
class Application:
    """An application with a table ``orders`` and a connection.

    Attributes:
        connection: the connection that it passes to ``within``.
        execute: executes a statement on that connection and returns its rows.
        commit: commits its transaction.
        rollback: rolls it back.
    """

    connection: Any
    execute: Callable[[str], list[Any]]
    commit: Callable[[], object]
    rollback: Callable[[], object]

    def order(self) -> None:
        """Store an order."""
        self.execute("INSERT INTO orders VALUES (1)")


@contextlib.contextmanager
def _sqlite3(databases: Databases) -> Generator[Application, None, None]:
    kind = databases.kind
    options: dict[str, Any] = {}
    if "autocommit=" in kind:
        options["autocommit"] = kind.endswith("True")
    elif "isolation_level" in kind:
        options["isolation_level"] = None
    with contextlib.closing(sqlite3.connect(databases.path, **options)) as connection:
        connection.row_factory, connection.text_factory = sqlite3.Row, bytes
        yield Application(
            Database(connection, execute_plugins=False) if kind == "sqlite-utils" else connection,
            lambda statement: [tuple(row) for row in connection.execute(statement)],
            connection.commit,
            connection.rollback,
        )


@contextlib.contextmanager
def _psycopg(databases: Databases) -> Generator[Application, None, None]:
    def execute(statement: str) -> list[Any]:
        cursor = connection.execute(statement.encode())
        return [tuple(row.values()) for row in cursor] if statement.startswith("SELECT") else []

    kind = databases.kind
    connection: psycopg.Connection[Any] = psycopg.Connection[dict[str, Any]].connect(
        databases.url, autocommit="autocommit" in kind, row_factory=dict_row
    )
    with connection, connection.pipeline() if "pipeline" in kind else contextlib.nullcontext():
        yield Application(connection, execute, connection.commit, connection.rollback)
        if not connection.closed:
            connection.rollback()


def _of_sqlalchemy(connection: Any) -> Application:
    def execute(statement: str) -> list[Any]:
        result = connection.execute(sqlalchemy.text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []

    return Application(connection, execute, connection.commit, connection.rollback)


def _engine_arguments(databases: Databases) -> dict[str, Any]:
    kind = databases.kind
    url = f"sqlite+pysqlite:///{databases.path}"
    connect_args: dict[str, Any] = {}
    if "aiosqlite" in kind:
        url = f"sqlite+aiosqlite:///{databases.path}"
    elif "asyncpg" in kind:
        url = "postgresql+asyncpg://"
        options = conninfo_to_dict(databases.url)
        search_path = str(options["options"]).partition("=")[2]
        connect_args = {
            "host": options["host"],
            "port": options.get("port"),
            "user": options["user"],
            "password": options.get("password"),
            "database": options["dbname"],
            "server_settings": {"search_path": search_path},
            "ssl": False,
        }
    elif not databases.is_sqlite:
        url, connect_args = "postgresql+psycopg://", {**conninfo_to_dict(databases.url)}
    arguments = {"url": url, "connect_args": connect_args, "poolclass": sqlalchemy.NullPool}
    return arguments | ({"isolation_level": "AUTOCOMMIT"} if "AUTOCOMMIT" in kind else {})


@contextlib.contextmanager
def _sqlalchemy(databases: Databases) -> Generator[Application, None, None]:
    engine = sqlalchemy.create_engine(**_engine_arguments(databases))
    if "scoped_session" in databases.kind:
        session = sqlalchemy.orm.scoped_session(sqlalchemy.orm.sessionmaker(engine))
        yield _of_sqlalchemy(session)
        session.remove()
        return
    is_session = "Session" in databases.kind
    with sqlalchemy.orm.Session(engine) if is_session else engine.connect() as connection:
        yield _of_sqlalchemy(connection)


async def _in_async_session(databases: Databases, body: Callable[[Application], object]) -> None:
    engine = create_async_engine(**_engine_arguments(databases))
    async with AsyncSession(engine) as session:
        await session.run_sync(lambda session: body(_of_sqlalchemy(session)))


@contextlib.contextmanager
def _django(databases: Databases) -> Generator[Application, None, None]:
    import_module("django_app")  # configures Django, once in a process
    alias = f"within_{uuid.uuid4().hex}"
    database: dict[str, Any] = {"ENGINE": "django.db.backends.sqlite3", "NAME": databases.path}
    if not databases.is_sqlite:
        options = conninfo_to_dict(databases.url)
        name = options.pop("dbname")
        database = {"ENGINE": "django.db.backends.postgresql", "NAME": name, "OPTIONS": options}
    handler: Any = django.db.connections
    handler.settings[alias] = handler.configure_settings({"default": database})["default"]
    connection: Any = ConnectionProxy(handler, alias)
    atomics: list[Any] = []

    def begin() -> None:
        atomics.append(transaction.atomic(using=alias))
        atomics[-1].__enter__()

    def end(*, is_last: bool = False, is_rolled_back: bool) -> None:
        if atomics:
            transaction.set_rollback(is_rolled_back, using=alias)
            atomics.pop().__exit__(None, None, None)
            if not is_last:
                begin()

    def execute(statement: str) -> list[Any]:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    if "atomic" in databases.kind:
        begin()
    try:
        yield Application(
            connection if "atomic" in databases.kind else handler[alias],
            execute,
            partial(end, is_rolled_back=False),
            partial(end, is_rolled_back=True),
        )
    finally:
        end(is_last=True, is_rolled_back=True)
        connection.close()
        del handler.settings[alias]


_OPENERS = {
    "sqlite3": _sqlite3,
    "sqlite-utils": _sqlite3,
    "psycopg": _psycopg,
    "sqlite: Session": _sqlalchemy,
    "sqlite: Connection": _sqlalchemy,
    "sqlite: scoped_session": _sqlalchemy,
    "postgres: Session": _sqlalchemy,
    "postgres: Connection": _sqlalchemy,
    "postgres: scoped_session": _sqlalchemy,
    "sqlite: Django": _django,
    "postgres: Django": _django,
}


@contextlib.contextmanager
def open_databases(
    kind: str, request: pytest.FixtureRequest, path: Path
) -> Generator[Databases, None, None]:
    """Make the application's table in an empty database, without that of the storage."""
    if "autocommit=" in kind and sys.version_info < (3, 12):
        pytest.skip("needs Python 3.12")
    url = ""
    if not kind.startswith("sqlite"):
        schema = request.getfixturevalue("schema")
        url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
    databases = Databases(kind, path, url)
    databases.others("CREATE TABLE orders (id int)")
    with contextlib.closing(databases.storage):
        yield databases


@pytest.fixture(params=TRANSACTIONAL)
def databases(request: pytest.FixtureRequest, database: Path) -> Generator[Databases, None, None]:
    """Each kind of connection in turn, in which a transaction is open or begins by itself."""
    with open_databases(request.param, request, database) as databases:
        databases.storage.write([("bob", Merge({}))])
        yield databases


@pytest.fixture(params=AUTOCOMMIT)
def autocommitting(
    request: pytest.FixtureRequest, database: Path
) -> Generator[Databases, None, None]:
    """Each kind of connection in autocommit mode in turn."""
    with open_databases(request.param, request, database) as databases:
        databases.storage.write([("bob", Merge({}))])
        yield databases


@pytest.fixture
def on_sqlite3(request: pytest.FixtureRequest, database: Path) -> Generator[Databases, None, None]:
    """An application with a connection of the standard library."""
    with open_databases("sqlite3", request, database) as databases:
        yield databases


@pytest.fixture
def on_psycopg(request: pytest.FixtureRequest, database: Path) -> Generator[Databases, None, None]:
    """An application with a connection of psycopg."""
    with open_databases("psycopg", request, database) as databases:
        yield databases


def fail(metadata: Metadata) -> Metadata:
    """Fail, as an application's function may."""
    raise LookupError


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {"n": metadata.get("n", 0) + 1}


# Every kind of connection.


@pytest.mark.parametrize("order_first", [True, False], ids=["order first", "metadata first"])
def test_both_are_committed_or_neither(databases: Databases, *, order_first: bool) -> None:
    """The application's row and the metadata are committed, or rolled back, together."""
    storage = databases.storage

    def body(application: Application) -> None:
        def change(number: int) -> None:
            if order_first:
                application.order()
            with storage.within(application.connection) as joined:
                assert joined.write([("alice", Merge({"n": number}))]) == [{"n": number}]
                assert joined.write([("alice", Merge({"m": 1}))]) == [{"n": number, "m": 1}]
                assert joined.read(["alice"]) == {"alice": {"n": number, "m": 1}}
                assert joined.read(["alice", "bob"]).keys() == {"alice", "bob"}
                assert joined.for_app("shop").read(["alice"]) == {}
            if not order_first:
                application.order()
            assert databases.orders() == 0
            assert storage.read(["alice"]) == {}

        change(1)
        application.rollback()
        assert databases.orders() == 0
        assert storage.read(["alice"]) == {}
        change(2)
        application.commit()
        assert databases.orders() == 1
        assert storage.read(["alice"]) == {"alice": {"n": 2, "m": 1}}

    databases.run(body)


def test_an_override_joins_each_kind_of_connection(databases: Databases) -> None:
    """Also Django's, which refuses a thread whose event loop is running."""

    def functions(original: RecipeInterface) -> RecipeInterface:
        update = original.update_user_metadata

        async def update_user_metadata(
            user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
        ) -> MetadataResult[Any]:
            return await update(user_id, {**metadata_update, "by": "override"}, user_context)

        original.update_user_metadata = update_user_metadata  # type: ignore[method-assign]
        return original

    override = UserMetadataOverrideConfig(functions=functions)
    with UserMetadata(databases.storage, override=override) as users:

        def body(application: Application) -> None:
            with users.within(application.connection) as metadata:
                metadata.update_user_metadata("alice", {"n": 1})
                assert metadata.get_user_metadata("alice").metadata == {"n": 1, "by": "override"}
            application.rollback()

        databases.run(body)
    assert databases.storage.read(["alice"]) == {}


def test_metadata_alone_is_a_transaction(databases: Databases) -> None:
    """The application commits it, or rolls it back, without a statement of its own."""
    storage = databases.storage

    def body(application: Application) -> None:
        for n, end in ((1, application.rollback), (2, application.commit)):
            with storage.within(application.connection) as joined:
                joined.write([("alice", Merge({"n": n}))])
            assert storage.read(["alice"]) == {}
            end()

    databases.run(body)
    assert storage.read(["alice"]) == {"alice": {"n": 2}}


def test_a_failed_write_leaves_the_transaction_usable(databases: Databases) -> None:
    """What came before and what comes after it is committed; nothing of it is."""
    check = "INSERT INTO user_metadata VALUES ('public', 'damaged', '[')"
    databases.others(check)
    if databases.is_sqlite:
        refuse = "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        refuse = f"BEFORE INSERT ON user_metadata WHEN new.user_id = 'mallory' {refuse}"
        databases.others(f"CREATE TRIGGER refuse {refuse}")
    else:
        databases.others("ALTER TABLE user_metadata ADD CHECK (user_id <> 'mallory')")

    def body(application: Application) -> None:
        application.order()
        with databases.storage.within(application.connection) as joined:
            joined.write([("alice", Merge({"n": 1}))])
            for change in (Modify(fail), lambda _: fail({})):
                with pytest.raises(LookupError):
                    joined.write([("alice", Merge({"n": 2})), ("alice", change)])
                assert joined.read(["alice"]) == {"alice": {"n": 1}}
            for damaged in (Merge({"n": 2}), Modify(count)):
                with pytest.raises(DamagedMetadataError, match="'damaged'") as caught:
                    joined.write([("alice", Clear()), ("damaged", damaged)])
                assert caught.value.user_id == "damaged"
            with pytest.raises(DamagedMetadataError):
                joined.read(["damaged"])
            for refused in (Merge({"n": 2}), Replace({"n": 2}), Modify(count)):
                with pytest.raises(StorageError):
                    joined.write([("alice", Clear()), ("mallory", refused)])
                with pytest.raises(StorageError):
                    joined.write([("mallory", refused)])
            application.order()
            joined.write([("alice", Modify(count))])
        application.commit()

    databases.run(body)
    assert databases.orders() == 2
    assert databases.storage.read(["alice"]) == {"alice": {"n": 2}}


def test_a_read_sees_uncommitted_rows(databases: Databases) -> None:
    """Also rows that the application itself has written."""

    def body(application: Application) -> None:
        application.execute("INSERT INTO user_metadata VALUES ('public', 'alice', '{\"n\": 7}')")
        with databases.storage.within(application.connection) as joined:
            assert joined.read(["alice"]) == {"alice": {"n": 7}}
            assert joined.write([("alice", Modify(count))]) == [{"n": 8}]
            assert joined.write([("alice", Clear()), ("carol", Clear())]) == [None, None]
            assert joined.read(["alice"]) == {}
            assert joined.read_after("", 10) == {"bob": {}}
        application.rollback()

    databases.run(body)
    assert databases.storage.read(["alice", "bob"]) == {"bob": {}}


def test_the_transaction_may_end_inside_the_block(databases: Databases) -> None:
    """What is written afterwards belongs to the next transaction of the application."""
    storage = databases.storage

    def body(application: Application) -> None:
        with storage.within(application.connection) as joined:
            joined.write([("alice", Merge({"n": 1}))])
            application.commit()
            joined.write([("alice", Merge({"n": 2}))])
            assert joined.read(["alice"]) == {"alice": {"n": 2}}
            application.rollback()
            assert joined.read(["alice"]) == {"alice": {"n": 1}}

    databases.run(body)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}


def test_after_the_block_the_storage_says_so(databases: Databases) -> None:
    """So does the storage of another app; the connection stays open and usable."""

    def body(application: Application) -> None:
        with databases.storage.within(application.connection) as joined:
            other = joined.for_app("shop")
        for ended in (joined, other):
            with pytest.raises(UsageError, match=r"the block of within\(\) has ended"):
                ended.read(["alice"])
            with pytest.raises(UsageError, match=r"the block of within\(\) has ended"):
                ended.write([("alice", Merge({}))])
            with pytest.raises(UsageError, match=r"the block of within\(\) has ended"):
                ended.write([])  # as an empty update of many users
        application.order()
        application.commit()

    databases.run(body)
    assert databases.orders() == 1


def test_a_missing_table_is_created_in_the_transaction(
    request: pytest.FixtureRequest, database: Path, kind: str
) -> None:
    """A read creates nothing; what a write has created is rolled back, and created again."""
    with open_databases(kind, request, database) as databases:
        name = "sqlite_master WHERE name" if databases.is_sqlite else "pg_tables WHERE tablename"
        schema = "" if databases.is_sqlite else " AND schemaname = current_schema()"
        query = f"SELECT count(*) FROM {name} = 'user_metadata'{schema}"

        def body(application: Application) -> None:
            application.order()
            with databases.storage.within(application.connection) as joined:
                for _ in range(2):
                    assert joined.read(["alice"]) == {}
                    assert application.execute(query) == [(0,)]
                    for n in range(8):
                        assert joined.write([("alice", Merge({"n": n}))]) == [{"n": n}]
                    application.rollback()
                    assert databases.others(query) == [(0,)]
                joined.write([("alice", Merge({"n": 1}))])
                application.commit()

        databases.run(body)
        assert databases.storage.read(["alice"]) == {"alice": {"n": 1}}


@pytest.fixture(params=TRANSACTIONAL)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of connection in turn."""
    return str(request.param)


def test_in_autocommit_mode_each_write_is_a_transaction(autocommitting: Databases) -> None:
    """It is committed when it returns; one that failed has done nothing and leaves no lock."""
    storage = autocommitting.storage

    def body(application: Application) -> None:
        with storage.within(application.connection) as joined:
            assert joined.read(["alice"]) == {}
            assert joined.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
            assert storage.read(["alice"]) == {"alice": {"n": 1}}
            with pytest.raises(LookupError):
                joined.write([("alice", Clear()), ("alice", Modify(fail))])
            assert storage.write([("alice", Modify(count))]) == [{"n": 2}]
            assert joined.write([("alice", Modify(count)), ("bob", Clear())]) == [{"n": 3}, None]
            assert storage.write([("alice", Modify(count))]) == [{"n": 4}]
            application.order()
        assert autocommitting.orders() == 1

    autocommitting.run(body)
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 4}}


# The application's own statements also meet other writers of an SQLite file.
_IN_THE_WAY = (
    StorageBusyError,
    sqlite3.OperationalError,
    exc.OperationalError,
    django.db.OperationalError,
)


@pytest.mark.parametrize("kind", [*TRANSACTIONAL, *AUTOCOMMIT])
def test_no_concurrent_update_is_lost(
    request: pytest.FixtureRequest, database: Path, usermetadata_process: OtherProcess, kind: str
) -> None:
    """Two threads count through connections, and a process without; each repeats what failed."""
    with open_databases(kind, request, database) as databases:
        databases.storage.write([("alice", Replace({"n": 0}))])

        def body(application: Application) -> None:
            for _ in range(15):
                while True:
                    try:
                        application.order()
                        with databases.storage.within(application.connection) as joined:
                            joined.write([("alice", Modify(count))])
                        application.commit()
                    except _IN_THE_WAY:
                        application.rollback()
                    else:
                        break

        target = (
            (SQLiteStorage, database) if databases.is_sqlite else (PostgresStorage, databases.url)
        )
        with (
            contextlib.closing(usermetadata_process.open(*target)) as elsewhere,
            ThreadPoolExecutor(3) as executor,
        ):

            def count_elsewhere() -> None:
                for _ in range(15):
                    elsewhere.write([("alice", Modify(count))])

            counting = [executor.submit(databases.run, body) for _ in range(2)]
            for done in [executor.submit(count_elsewhere), *counting]:
                done.result()
        assert databases.storage.read(["alice"]) == {"alice": {"n": 45}}


# What cannot be joined.


@pytest.mark.parametrize("storage", ["sqlite file", "postgres"], indirect=True)
def test_a_connection_of_another_kind_is_refused(storage: Storage, tmp_path: Path) -> None:
    """The error says what was passed, and what can be."""
    assert isinstance(storage, JoiningStorage)
    engine = sqlalchemy.create_engine("sqlite://")
    asynchronous = create_async_engine("sqlite+aiosqlite://")
    other: Any = psycopg.connect(server_url())
    if isinstance(storage, PostgresStorage):
        other.close()
        other = sqlite3.connect(":memory:")
    pool = ConnectionPool(server_url(), open=False)
    refused: list[tuple[object, str]] = [
        (other, type(other).__module__ + r".Connection is not supported; pass a connection of"),
        (None, "NoneType is not supported; pass a connection of sqlite3 or psycopg 3"),
        (tmp_path, "Path is not supported"),
        (engine, "Engine is not supported; pass a Session or Connection of the engine"),
        (AsyncSession(asynchronous), r"AsyncSession is not supported; .*run_sync\(lambda session"),
        (pool, "ConnectionPool is not supported; pass a connection of the pool"),
        (cache, "ConnectionProxy is not supported; pass Django's connection to"),
        (sqlalchemy.orm.Session(), "the session has no engine"),
    ]
    import_module("django_app")
    with contextlib.closing(other):
        for connection, message in refused:
            with (
                pytest.raises(InvalidInputError, match=f"connection: .*{message}"),
                storage.within(connection),
            ):
                pass


def test_memory_has_no_transaction_to_join() -> None:
    """The protocol tells storages apart that can join one."""
    assert not isinstance(InMemoryStorage(), JoiningStorage)


def test_psycopg2_is_refused_by_name() -> None:
    """The error says how to get a connection that works."""
    Psycopg2 = type("connection", (), {"__module__": "psycopg2.extensions"})  # noqa: N806
    storage = PostgresStorage("postgresql://")
    with (
        pytest.raises(InvalidInputError, match=r"psycopg2.*postgresql\+psycopg://"),
        storage.within(Psycopg2()),
    ):
        pass
    storage.close()


@pytest.mark.parametrize("storage", ["sqlite file", "postgres"], indirect=True)
def test_a_closed_storage_joins_nothing(storage: Storage) -> None:
    """It says that it is closed."""
    assert isinstance(storage, JoiningStorage)
    storage.close()
    connection = sqlite3.connect(":memory:")
    refused = pytest.raises(UsageError, match="is closed")
    with contextlib.closing(connection), refused, storage.within(connection):
        pass


def test_nothing_is_imported_that_is_not_used(database: Path) -> None:
    """Joining a connection of the standard library imports no framework and no other driver."""
    script = """if True:
        import sqlite3, sys
        from usermetadata import SQLiteStorage
        from usermetadata.changes import Merge
        connection = sqlite3.connect(sys.argv[1])
        with SQLiteStorage(sys.argv[1]).within(connection) as joined:
            joined.write([("alice", Merge({}))])
        connection.commit()
        others = {"sqlalchemy", "django", "psycopg", "asyncpg", "aiosqlite"}
        print(sorted(others & sys.modules.keys()))
    """
    command = [sys.executable, "-c", script, str(database)]
    assert subprocess.check_output(command, text=True) == "[]\n"


# SQLite.


def test_a_connection_to_another_file_is_refused(on_sqlite3: Databases, tmp_path: Path) -> None:
    """The storage's own reads would not see the rows; a link to the file is the same file."""
    storage = on_sqlite3.storage
    storage.read(["alice"])
    link = tmp_path / "link.db"
    link.symlink_to(on_sqlite3.path)
    connection = sqlite3.connect(link)
    with contextlib.closing(connection), storage.within(connection) as joined:
        assert joined.read(["alice"]) == {}
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        for each in (storage, SQLiteStorage(":memory:")):
            refused = pytest.raises(InvalidInputError, match=r"its database is '.*other.db'")
            with refused, each.within(connection):
                pass


def test_a_database_in_memory_is_joined(on_sqlite3: Databases) -> None:
    """So an application's tests may replace the file, as Django's do."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for storage in (on_sqlite3.storage, SQLiteStorage(":memory:")):
            with storage.within(connection) as joined:
                joined.write([("alice", Merge({"n": 1}))])
                assert joined.read(["alice"]) == {"alice": {"n": 1}}
            connection.rollback()
            assert storage.read(["alice"]) == {}
    storage.close()


def test_the_connection_is_left_as_it_was(on_sqlite3: Databases) -> None:
    """Its row factory, its text factory, its settings and its functions are the application's."""

    def body(application: Application) -> None:
        connection = application.connection
        names = ["recursive_triggers", "foreign_keys", "journal_mode", "synchronous"]
        settings = [application.execute(f"PRAGMA {name}") for name in names]
        application.order()
        with on_sqlite3.storage.within(connection) as joined:
            joined.write([("alice", Merge({"n": 1}))])
            with pytest.raises(LookupError):
                joined.write([("alice", Modify(fail))])
            joined.read(["alice"])
        assert connection.row_factory is sqlite3.Row
        assert connection.text_factory is bytes
        assert [application.execute(f"PRAGMA {name}") for name in names] == settings
        connection.rollback()

    on_sqlite3.run(body)


def test_a_first_write_that_fails_leaves_no_lock(on_sqlite3: Databases) -> None:
    """The transaction that it began is undone, so that other writers need not wait for its end."""

    def body(application: Application) -> None:
        with on_sqlite3.storage.within(application.connection) as joined:
            with pytest.raises(LookupError):
                joined.write([("alice", Modify(fail))])
            joined.write([])
        assert not application.connection.in_transaction
        on_sqlite3.others("INSERT INTO orders VALUES (1)")

    on_sqlite3.storage.write([("bob", Merge({}))])
    on_sqlite3.run(body)


@pytest.mark.parametrize("first", ["nothing", "a write", "a read"])
def test_a_locked_file_is_busy(on_sqlite3: Databases, first: str) -> None:
    """The connection's own timeout applies; a transaction that has read is not repeated."""
    on_sqlite3.storage.write([("alice", Merge({"n": 1}))])

    def body(application: Application) -> None:
        connection = application.connection
        connection.execute("PRAGMA busy_timeout = 10")
        other = sqlite3.connect(on_sqlite3.path, isolation_level=None)
        with contextlib.closing(other):
            connection.execute("BEGIN") if first != "nothing" else None
            connection.execute("SELECT * FROM orders") if first == "a read" else None
            other.execute("BEGIN IMMEDIATE")
            with on_sqlite3.storage.within(connection) as joined:
                with pytest.raises(StorageBusyError, match="timed out waiting for another writer"):
                    joined.write([("alice", Modify(count))])
                other.execute("INSERT INTO orders VALUES (1)")
                other.execute("COMMIT")
                if first == "a read":
                    with pytest.raises(StorageBusyError):
                        joined.write([("alice", Modify(count))])
                    connection.rollback()
                assert joined.write([("alice", Modify(count))]) == [{"n": 2}]
            connection.commit()

    on_sqlite3.run(body)
    assert on_sqlite3.orders() == 1
    assert on_sqlite3.storage.read(["alice"]) == {"alice": {"n": 2}}


def test_a_transaction_that_has_read_nothing_waits_for_its_turn(on_sqlite3: Databases) -> None:
    """``BEGIN`` alone, as Django sends it, does not make a metadata update fail under load."""
    on_sqlite3.storage.write([("alice", Replace({"n": 0}))])

    def body(application: Application) -> None:
        for _ in range(50):
            application.execute("BEGIN")
            with on_sqlite3.storage.within(application.connection) as joined:
                joined.write([("alice", Modify(count))])
            application.commit()

    with ThreadPoolExecutor(2) as executor:
        for done in [executor.submit(on_sqlite3.run, body) for _ in range(2)]:
            done.result()
    assert on_sqlite3.storage.read(["alice"]) == {"alice": {"n": 100}}


def test_a_trigger_may_end_the_whole_transaction(on_sqlite3: Databases) -> None:
    """Then the error says that SQLite has rolled it back."""
    on_sqlite3.storage.write([("alice", Merge({"n": 1}))])
    end = "BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
    on_sqlite3.others(f"CREATE TRIGGER refuse BEFORE UPDATE ON user_metadata {end}")

    def body(application: Application) -> None:
        application.order()
        says_so = pytest.raises(StorageError, match="has rolled back the whole transaction")
        with on_sqlite3.storage.within(application.connection) as joined, says_so:
            joined.write([("alice", Merge({"n": 2}))])
        application.commit()

    on_sqlite3.run(body)
    assert on_sqlite3.orders() == 0


def test_another_thread_and_a_closed_connection_are_named(on_sqlite3: Databases) -> None:
    """SQLite's own rules hold for the connection, and its reasons are in the error."""

    def body(application: Application) -> None:
        with on_sqlite3.storage.within(application.connection) as joined:
            with ThreadPoolExecutor(1) as executor:
                reading = executor.submit(joined.read, ["alice"])
                with pytest.raises(StorageError, match="same thread"):
                    reading.result()
            application.connection.close()
            with pytest.raises(StorageError, match="closed database"):
                joined.write([("alice", Merge({}))])

    on_sqlite3.run(body)


def test_a_change_that_writes_is_refused(on_sqlite3: Databases) -> None:
    """Its write would be overwritten by the outer one."""

    def body(application: Application) -> None:
        with on_sqlite3.storage.within(application.connection) as joined:

            def change(old: Metadata | None) -> Metadata:
                joined.write([("alice", Merge({"n": 1}))])
                return {}

            with pytest.raises(UsageError, match="a write inside a write"):
                joined.write([("alice", change)])
        application.rollback()

    on_sqlite3.run(body)


def test_a_table_of_another_program_is_checked(on_sqlite3: Databases) -> None:
    """As it is outside the block: before anything is written."""
    on_sqlite3.others("CREATE TABLE user_metadata (id int)")

    def body(application: Application) -> None:
        application.order()
        with on_sqlite3.storage.within(application.connection) as joined:
            for _ in range(2):
                with pytest.raises(StorageError, match="it has no column app_id"):
                    joined.write([("alice", Merge({}))])
                with pytest.raises(StorageError, match="it has no column app_id"):
                    joined.read(["alice"])
        application.commit()

    on_sqlite3.run(body)
    assert on_sqlite3.orders() == 1


# PostgreSQL.


@pytest.fixture
def proxy() -> Generator[Proxy, None, None]:
    """A network between the application and the server, which counts round trips."""
    with contextlib.closing(Proxy(server_url())) as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("kind", "trips"),
    [
        ("psycopg", (1, 2)),
        ("postgres: Session", (1, 2)),
        ("postgres: Django, atomic", (1, 2)),
        ("postgres: AsyncSession, psycopg", (1, 2)),
        ("postgres: AsyncSession, asyncpg", (3, 4)),
        ("psycopg, autocommit", (1, 2)),
        ("postgres: AsyncSession, asyncpg, AUTOCOMMIT", (3, 4)),
    ],
)
def test_an_update_takes_one_round_trip(
    request: pytest.FixtureRequest,
    database: Path,
    proxy: Proxy,
    kind: str,
    trips: tuple[int, int],
) -> None:
    """The savepoint and the check of the table are sent with it; asyncpg sends one at a time."""
    with open_databases(kind, request, database) as databases:
        databases.connect_through(proxy)

        def body(application: Application) -> None:
            application.order()
            with databases.storage.within(application.connection) as joined:
                joined.write([("alice", Merge({"n": 0})), ("bob", Clear())])

                def count_trips(work: Callable[[], object]) -> int:
                    before = proxy.round_trips
                    work()
                    return proxy.round_trips - before

                # asyncpg prepares each statement before it is executed for the first time.
                for work in (
                    lambda: joined.write([("alice", Merge({"n": 1}))]),
                    lambda: joined.read(["alice"]),
                    lambda: joined.write([("alice", Modify(count))]),
                ):
                    work()
                for _ in range(8):  # psycopg prepares statements after the fifth
                    assert (
                        count_trips(lambda: joined.write([("alice", Merge({"n": 1}))])),
                        count_trips(lambda: joined.write([("alice", Modify(count))])),
                    ) == trips
                    assert count_trips(lambda: joined.read(["alice"])) == trips[0]

        databases.run(body)


def test_a_deadlock_is_reported(on_psycopg: Databases) -> None:
    """One of two transactions gets ``StorageBusyError``, and may continue or be repeated."""
    storage = on_psycopg.storage
    storage.write([("alice", Merge({"n": 0})), ("bob", Merge({"n": 0}))])
    barrier = threading.Barrier(2, timeout=30)

    def write(first: str, second: str) -> bool:
        done = False

        def body(application: Application) -> None:
            nonlocal done
            with storage.within(application.connection) as joined:
                joined.write([(first, Modify(count))])
                barrier.wait()
                try:
                    joined.write([(second, Modify(count))])
                    done = True
                except StorageBusyError:
                    application.execute("SELECT 1")
            application.commit()

        on_psycopg.run(body)
        return done

    with ThreadPoolExecutor(2) as executor:
        done = list(executor.map(write, ["alice", "bob"], ["bob", "alice"]))
    assert sorted(done) == [False, True]
    found = storage.read(["alice", "bob"])
    assert sorted(metadata["n"] for metadata in found.values()) == [1, 2]


@pytest.mark.parametrize("kind", ["psycopg", "postgres: AsyncSession, asyncpg"])
def test_the_callers_lock_timeout_applies_and_stays(
    request: pytest.FixtureRequest, database: Path, kind: str
) -> None:
    """A row that another transaction has locked is ``StorageBusyError`` after that time."""
    with open_databases(kind, request, database) as databases:
        databases.storage.write([("alice", Merge({"n": 0}))])

        def body(application: Application) -> None:
            with databases.storage.within(application.connection) as joined:
                joined.write([("bob", Merge({"n": 1}))])
                assert application.execute("SELECT current_setting('lock_timeout')") == [("0",)]
                application.execute("SET LOCAL lock_timeout = '20ms'")
                with psycopg.connect(databases.url) as other:
                    other.execute("SELECT FROM user_metadata WHERE user_id = 'alice' FOR UPDATE")
                    for change in (Merge({"n": 1}), Modify(count), Clear()):
                        with pytest.raises(StorageBusyError, match="lock timeout"):
                            joined.write([("alice", change)])
                assert application.execute("SELECT current_setting('lock_timeout')") == [("20ms",)]
                joined.write([("alice", Merge({"n": 1}))])
            application.commit()
            assert application.execute("SELECT current_setting('lock_timeout')") == [("0",)]

        databases.run(body)
        found = databases.storage.read(["alice", "bob"])
        assert found == {"alice": {"n": 1}, "bob": {"n": 1}}


@pytest.mark.parametrize(
    "kind", ["psycopg", "postgres: AsyncSession, psycopg", "postgres: AsyncSession, asyncpg"]
)
def test_the_table_is_the_one_that_the_name_means_now(
    request: pytest.FixtureRequest, database: Path, kind: str
) -> None:
    """A connection may set its search_path, and a table may be dropped or changed meanwhile."""
    with open_databases(kind, request, database) as databases:
        [(first,)] = databases.others("SELECT current_schema()")
        second = f"{first}_second"
        databases.others(f"CREATE SCHEMA {second}")
        request.addfinalizer(lambda: databases.others(f"DROP SCHEMA {second} CASCADE"))

        def body(application: Application) -> None:
            with databases.storage.within(application.connection) as joined:
                for n in range(8):
                    for schema in (first, second):
                        application.execute(f"SET LOCAL search_path = {schema}")
                        written = joined.write([("alice", Merge({f"{schema} {n}": n}))])
                        assert joined.read(["alice"]) == {"alice": written[0]}
                        assert written[0] == {f"{schema} {each}": each for each in range(n + 1)}
                application.commit()
                databases.others(f"DROP TABLE {first}.user_metadata")
                assert joined.read(["alice"]) == {}
                assert joined.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
                application.commit()
                for type_ in ("varchar(128)", "text"):
                    databases.others(f"ALTER TABLE user_metadata ALTER COLUMN user_id TYPE {type_}")
                    assert joined.read(["alice"]) == {"alice": {"n": 1}}
                    assert joined.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
                    application.commit()

        databases.run(body)


def test_a_user_id_that_the_column_cannot_hold_is_refused(on_psycopg: Databases) -> None:
    """The transaction goes on."""
    on_psycopg.storage.write([("alice", Merge({}))])
    on_psycopg.others("ALTER TABLE user_metadata ALTER COLUMN user_id TYPE varchar(10)")

    def body(application: Application) -> None:
        application.order()
        refused = pytest.raises(InvalidInputError, match="takes 10")
        with on_psycopg.storage.within(application.connection) as joined, refused:
            joined.write([("a" * 11, Merge({}))])
        application.commit()

    on_psycopg.run(body)
    assert on_psycopg.orders() == 1


@pytest.mark.parametrize(
    "kind",
    ["psycopg", "psycopg, pipeline", "postgres: AsyncSession, psycopg", "postgres: Session"],
)
def test_a_failed_transaction_says_so(
    request: pytest.FixtureRequest, database: Path, kind: str
) -> None:
    """An earlier statement of the application has failed: only its rollback helps."""
    with open_databases(kind, request, database) as databases:

        def body(application: Application) -> None:
            with databases.storage.within(application.connection) as joined:
                with contextlib.suppress(psycopg.Error, exc.DBAPIError):
                    application.execute("SELECT 1 / 0")
                for call in (
                    lambda: joined.read(["alice"]),
                    lambda: joined.write([("alice", Merge({}))]),
                ):
                    with pytest.raises(StorageError, match="has failed; roll the transaction back"):
                        call()
                application.rollback()
                joined.write([("alice", Merge({}))])

        databases.run(body)


def test_an_earlier_error_of_a_pipeline_is_the_applications(
    request: pytest.FixtureRequest, database: Path
) -> None:
    """Its statements are executed first; their error is the cause of the storage's."""
    with open_databases("psycopg, pipeline", request, database) as databases:

        def body(application: Application) -> None:
            with databases.storage.within(application.connection) as joined:
                application.execute("INSERT INTO orders SELECT 1 / 0")
                with pytest.raises(StorageError, match="in its pipeline has failed") as caught:
                    joined.write([("alice", Merge({}))])
                assert isinstance(caught.value.__cause__, psycopg.errors.DivisionByZero)
                application.rollback()
                joined.write([("alice", Merge({}))])
                application.commit()

        databases.run(body)
        assert databases.storage.read(["alice"]) == {"alice": {}}


LOST = ["psycopg", "postgres: AsyncSession, psycopg", "postgres: AsyncSession, asyncpg"]


@pytest.mark.parametrize("kind", [*LOST, "psycopg, autocommit"])
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_a_lost_connection_has_stored_nothing_of_a_transaction(
    request: pytest.FixtureRequest, database: Path, proxy: Proxy, kind: str
) -> None:
    """So the error is ``StorageUnavailableError``; a transaction of its own may be committed."""
    with open_databases(kind, request, database) as databases:
        databases.storage.write([("bob", Merge({}))])
        databases.connect_through(proxy)
        is_own = kind.endswith("autocommit")
        error = OutcomeUnknownError if is_own else StorageUnavailableError

        def body(application: Application) -> None:
            application.order()
            with databases.storage.within(application.connection) as joined:
                joined.write([("alice", Merge({"n": 1}))])
                proxy.replies_to_lose = 1
                with pytest.raises(error, match="read to find out" if is_own else "nothing of the"):
                    joined.write([("alice", Merge({"n": 2}))])
                with pytest.raises(StorageUnavailableError):
                    joined.read(["alice"])
            with contextlib.suppress(psycopg.Error, exc.DBAPIError):
                application.rollback()

        with contextlib.suppress(exc.DBAPIError, psycopg.Error):
            databases.run(body)
        expected = {"alice": {"n": 2}} if is_own else {}
        assert databases.storage.read(["alice"]) == expected


@pytest.mark.parametrize("kind", [kind for kind in TRANSACTIONAL if "postgres: " in kind])
def test_a_transaction_on_a_lost_connection_can_be_repeated(
    request: pytest.FixtureRequest, database: Path, proxy: Proxy, kind: str
) -> None:
    """The application's rollback raises no error, which would hide that of the lost connection."""
    with open_databases(kind, request, database) as databases:
        databases.storage.write([("bob", Merge({}))])
        databases.connect_through(proxy)

        def body(application: Application) -> None:
            application.order()
            with databases.storage.within(application.connection) as joined:
                proxy.replies_to_lose = 1
                with pytest.raises(StorageUnavailableError):
                    joined.write([("alice", Merge({"n": 1}))])
            application.rollback()
            application.order()
            with databases.storage.within(application.connection) as joined:
                joined.write([("alice", Merge({"n": 2}))])
            application.commit()

        databases.run(body)
        assert databases.storage.read(["alice"]) == {"alice": {"n": 2}}
        assert databases.orders() == 1


@pytest.mark.parametrize("health_checks", [True, False])
def test_django_replaces_a_lost_connection_between_requests(
    request: pytest.FixtureRequest, database: Path, *, health_checks: bool
) -> None:
    """A persistent one is replaced before the request if Django checks it, otherwise after it."""
    with open_databases("postgres: Django", request, database) as databases:
        databases.storage.write([("alice", Merge({"n": 1}))])

        def body(application: Application) -> None:
            connection = application.connection
            connection.settings_dict["CONN_MAX_AGE"] = None
            connection.settings_dict["CONN_HEALTH_CHECKS"] = health_checks
            [(process,)] = application.execute("SELECT pg_backend_pid()")
            databases.others(f"SELECT pg_terminate_backend({process}, 10000)")
            connection.close_if_unusable_or_obsolete()  # as Django does around each request
            with databases.storage.within(connection) as joined:
                if not health_checks:
                    with pytest.raises(StorageUnavailableError):
                        joined.read(["alice"])
                    connection.close_if_unusable_or_obsolete()
                assert joined.read(["alice"]) == {"alice": {"n": 1}}

        databases.run(body)


@pytest.mark.parametrize("kind", LOST)
def test_no_value_is_in_an_error(request: pytest.FixtureRequest, database: Path, kind: str) -> None:
    """Not in its text, nor in the traceback with its causes."""
    with open_databases(kind, request, database) as databases:
        databases.storage.write([("alice", Merge({}))])
        databases.others("ALTER TABLE user_metadata ADD CHECK (user_metadata NOT LIKE '%secret%')")

        def body(application: Application) -> None:
            with databases.storage.within(application.connection) as joined:
                for change in (Merge({"key": "secret"}), Modify(lambda _: {"key": "secret"})):
                    with pytest.raises(StorageError, match="violates check") as caught:
                        joined.write([("alice", change)])
                    assert "secret" not in "".join(
                        line
                        for line in traceback.format_exception(caught.value)
                        if not line.startswith("  File")
                    )

        databases.run(body)


@pytest.mark.parametrize("kind", ["sqlite: Session", "postgres: Session"])
def test_a_failed_session_says_so(
    request: pytest.FixtureRequest, database: Path, kind: str
) -> None:
    """The application must roll it back; the error does not quote what it has tried to store."""
    with open_databases(kind, request, database) as databases:
        databases.others("CREATE TABLE names (name text PRIMARY KEY CHECK (name <> 'secret'))")

        class Name:
            """A row of the table above."""

        registry = sqlalchemy.orm.registry()
        column = sqlalchemy.Column("name", sqlalchemy.Text, primary_key=True)
        registry.map_imperatively(Name, sqlalchemy.Table("names", registry.metadata, column))

        def body(application: Application) -> None:
            session = application.connection
            name: Any = Name()
            name.name = "secret"
            session.add(name)
            with databases.storage.within(session) as joined:
                with pytest.raises(exc.IntegrityError):
                    session.flush()
                with pytest.raises(StorageError, match="has been rolled back") as caught:
                    joined.write([("alice", Merge({"n": 1}))])
                assert "secret" not in str(caught.value)
                session.rollback()
                joined.write([("alice", Merge({"n": 1}))])
            session.commit()

        databases.run(body)
        assert databases.storage.read(["alice"]) == {"alice": {"n": 1}}


def test_u_0000_is_stored(on_psycopg: Databases) -> None:
    """PostgreSQL's JSON functions refuse it, so the merge is done again in Python."""

    def body(application: Application) -> None:
        application.order()
        with on_psycopg.storage.within(application.connection) as joined:
            for n in range(3):
                joined.write([("alice", Merge({"key\0": "value\0", "n": n}))])
            assert joined.read(["alice"]) == {"alice": {"key\0": "value\0", "n": 2}}
        application.commit()

    on_psycopg.run(body)
    assert on_psycopg.orders() == 1


# Django.


@pytest.mark.parametrize("kind", ["sqlite: Django, atomic", "postgres: Django, atomic"])
def test_a_broken_atomic_block_is_respected(
    request: pytest.FixtureRequest, database: Path, kind: str
) -> None:
    """Django will roll it back, and refuses queries until then; so does the storage."""
    with open_databases(kind, request, database) as databases:

        def body(application: Application) -> None:
            with databases.storage.within(application.connection) as joined:
                transaction.set_rollback(True, using=application.connection.alias)
                with pytest.raises(StorageError, match="until the end of the 'atomic' block"):
                    joined.write([("alice", Merge({}))])
                application.rollback()
                joined.write([("alice", Merge({}))])

        databases.run(body)


# The promises of every storage.


class TestJoinedStorage(StorageConformance):
    """Inside a block all promises are kept, as far as one connection can keep them."""

    @pytest.fixture(params=["sqlite3", "psycopg", "sqlite3 in autocommit mode"])
    def storage(
        self, request: pytest.FixtureRequest, database: Path
    ) -> Generator[Storage, None, None]:
        if request.param == "psycopg":
            schema = request.getfixturevalue("schema")
            url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
            storage: SQLiteStorage | PostgresStorage = PostgresStorage(url)
            connection: Any = psycopg.connect(url)
        else:
            storage = SQLiteStorage(database)
            connection = sqlite3.connect(database, check_same_thread=False)
            if "autocommit" in request.param:
                connection.isolation_level = None
        closing = contextlib.closing
        with closing(storage), closing(connection), storage.within(connection) as joined:
            yield joined

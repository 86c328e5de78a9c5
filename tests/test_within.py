"""``within``: metadata is part of the transaction of the application's own connection."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import django.db
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm
from django.core.cache import cache
from django.db import transaction
from django.utils.connection import ConnectionProxy
from postgres_proxy import Proxy
from postgres_server import server_url, waiting_for_locks
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
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
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.storage import JoiningStorage
from usermetadata.testing import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata import Storage
    from usermetadata.codec import Metadata

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
            Database(connection) if kind == "sqlite-utils" else connection,
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
    connection = psycopg.connect(
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
    url, connect_args = f"sqlite+pysqlite:///{databases.path}", {}
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
        url, connect_args = "postgresql+psycopg://", conninfo_to_dict(databases.url)
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


@pytest.mark.parametrize("kind", [*TRANSACTIONAL, *AUTOCOMMIT])
def test_no_concurrent_update_is_lost(
    request: pytest.FixtureRequest, database: Path, kind: str
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
                    except (StorageBusyError, sqlite3.OperationalError, django.db.Error) as error:
                        assert "locked" in str(error) or isinstance(error, StorageBusyError)
                        application.rollback()
                    except sqlalchemy.exc.OperationalError:
                        application.rollback()
                    else:
                        break

        script = """if True:
            import sys, usermetadata
            from usermetadata.syncio import modify_user_metadata
            usermetadata.init(sys.argv[1])
            for _ in range(15):
                modify_user_metadata("alice", lambda metadata: {"n": metadata["n"] + 1})
        """
        target = f"sqlite:///{databases.path}" if databases.is_sqlite else databases.url
        if not databases.is_sqlite:
            target = _as_url(databases.url)
        with ThreadPoolExecutor(2) as executor:
            process = subprocess.Popen([sys.executable, "-c", script, target])
            for done in [executor.submit(databases.run, body) for _ in range(2)]:
                done.result()
            assert process.wait(60) == 0
        assert databases.storage.read(["alice"]) == {"alice": {"n": 45}}


def _as_url(dsn: str) -> str:
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    return "postgresql://?" + urlencode(parts, quote_via=quote)


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
            with pytest.raises(InvalidInputError, match=f"connection: .*{message}"):
                with storage.within(connection):
                    pass


def test_memory_has_no_transaction_to_join() -> None:
    """The protocol tells storages apart that can join one."""
    assert not isinstance(InMemoryStorage(), JoiningStorage)


def test_psycopg2_is_refused_by_name() -> None:
    """The error says how to get a connection that works."""
    Psycopg2 = type("connection", (), {"__module__": "psycopg2.extensions"})  # noqa: N806
    storage = PostgresStorage("postgresql://")
    with pytest.raises(InvalidInputError, match=r"psycopg2.*postgresql\+psycopg://"):
        with storage.within(Psycopg2()):
            pass
    storage.close()


@pytest.mark.parametrize("storage", ["sqlite file", "postgres"], indirect=True)
def test_a_closed_storage_joins_nothing(storage: Storage) -> None:
    """It says that it is closed."""
    assert isinstance(storage, JoiningStorage)
    storage.close()
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        with pytest.raises(UsageError, match="is closed"), storage.within(connection):
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

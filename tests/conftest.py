"""Fixtures that several test files use: every storage, and both facades with one interface."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from postgres_server import RUN_FOLDER, empty_schema, server_url, server_version, stop_servers
from psycopg.sql import SQL, Identifier
from sdk_programs import SDKPrograms
from sqlite_utils import Database

import usermetadata
import usermetadata.asyncio
import usermetadata.syncio
from usermetadata import InMemoryStorage, PostgresStorage, SQLiteStorage, UserMetadataRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from usermetadata import Storage

pytest_plugins = ["pytester"]

# How long an example takes depends on what else the machine does.
settings.register_profile(
    "any load", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any load")


# For their time they have few tests, so pytest-xdist would begin them last and wait for one worker.
LONG_FILES = {
    "test_against_core.py",
    "test_backup.py",
    "test_other_languages.py",
    "test_postgres_connections.py",
    "test_processes.py",
    "test_stateful.py",
    "test_supertokens_deletion.py",
    "test_testing.py",
    "test_tutorial.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option with which the tests of JSON run a second time."""
    parser.addoption("--without-msgspec", action="store_true", help="as if it were not installed")
    parser.addoption(
        "--reference-storages", action="store_true", help="run the suite over each of docs/examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the import of msgspec fail; the library imports it with the first object."""
    # Otherwise each worker and each program of a test compiles the same modules anew: 40 s in all.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        os.environ[RUN_FOLDER] = tempfile.mkdtemp()
        (Path(os.environ[RUN_FOLDER]) / "numpy.py").write_text("raise ImportError")
    if is_worker or config.getoption("dist", "no") == "no":
        # sqlite-utils imports numpy if it is there: 0.1 s for each program that a test starts.
        path = [os.environ[RUN_FOLDER], *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False  # the order is that of pytest_collection_modifyitems
    if config.getoption("without_msgspec"):
        sys.modules["msgspec"] = None  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long; the others follow by their number of tests."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG_FILES, -sizes[item.path], item.path))


def pytest_report_header(config: pytest.Config) -> str:
    """Report which databases the tests use, and what encodes and decodes JSON."""
    msgspec = "not used" if config.getoption("without_msgspec") else version("msgspec")
    return f"sqlite: {sqlite3.sqlite_version}, postgresql: {server_version()}, msgspec: {msgspec}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the database server."""
    stop_servers()
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(RUN_FOLDER))


@contextlib.contextmanager
def small_files(size: int) -> Generator[None, None, None]:
    """Let no file of this process grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


STORAGES = [
    "memory",
    "sqlite file",
    "sqlite memory",
    "sqlite borrowed",
    "postgres",
]


@contextlib.contextmanager
def open_storage(kind: str, folder: Path) -> Generator[Storage, None, None]:
    """Open one of ``STORAGES``, or "postgres portable", empty, and close it afterwards."""
    with contextlib.ExitStack() as stack:
        storage: Storage
        if kind == "memory":
            storage = InMemoryStorage()
        elif kind == "sqlite borrowed":
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            storage = SQLiteStorage(Database(stack.enter_context(contextlib.closing(connection))))
        elif kind.startswith("postgres"):
            schema = stack.enter_context(empty_schema())
            statements: Any = kind.partition(" ")[2] or None
            storage = PostgresStorage(server_url(), schema=schema, statements=statements)
        else:
            storage = SQLiteStorage(folder / "users.db" if kind == "sqlite file" else ":memory:")
        yield stack.enter_context(contextlib.closing(storage))


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Storage, None, None]:
    """Every storage in turn, empty."""
    with open_storage(request.param, tmp_path) as storage:
        yield storage


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """The path of an SQLite file that a test may create."""
    return tmp_path / "users.db"


@pytest.fixture
def schema() -> Generator[str, None, None]:
    """An empty schema of a PostgreSQL database."""
    with empty_schema() as schema:
        yield schema


@pytest.fixture
def direct(schema: str) -> Generator[psycopg.Connection[Any], None, None]:
    """A separate connection that reads that schema."""
    with psycopg.connect(server_url(), autocommit=True) as connection:
        connection.execute(SQL("SET search_path = {}").format(Identifier(schema)))
        yield connection


@pytest.fixture(autouse=True)
def reset() -> Generator[None, None, None]:
    """Reset the recipe after each test."""
    yield
    UserMetadataRecipe.reset()


def _without_await(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        async def main() -> Any:
            return await function(*args, **kwargs)

        return asyncio.run(main())

    return call


FUNCTIONS = [
    name
    for name in dir(usermetadata.syncio)
    if name.endswith("_user_metadata") or name in {"erase_user", "find_user_id"}
]
FACADES: dict[str, Any] = {
    "syncio": usermetadata.syncio,
    "asyncio": SimpleNamespace(
        **{name: _without_await(getattr(usermetadata.asyncio, name)) for name in FUNCTIONS}
    ),
}


@pytest.fixture(params=FACADES)
def facade(request: pytest.FixtureRequest) -> Any:
    """Both facades in turn, called without ``await``."""
    return FACADES[request.param]


@pytest.fixture(scope="session")
def sdk_programs() -> Generator[SDKPrograms, None, None]:
    """What runs programs that use SuperTokens' SDK."""
    programs = SDKPrograms()
    yield programs
    programs.close()


# The beginning of a program. For 25 events gevent looks through all installed packages for those
# that handle it, which takes 0.6 s.
PATCH_ALL = """
from importlib import metadata
from gevent import monkey
entry_points, metadata.entry_points = metadata.entry_points, lambda **_: ()
monkey.patch_all()
metadata.entry_points = entry_points
"""

CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture
def packages() -> None:
    """The programs' packages, which ``package.json`` names, are installed."""
    if not (CLIENTS / "node_modules").exists():
        assert "CI" not in os.environ, "npm install has to come first"
        pytest.skip("half a gigabyte of packages is missing: (cd tests/clients && npm install)")

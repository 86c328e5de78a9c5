"""pytest fixtures: in-memory stores, a server over one, and another process."""

# pyright: reportPrivateUsage=false
# The fixture replaces the recipe's only instance, which no other code should do.

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from usermetadata._core.default import Made, default
from usermetadata.client import UserMetadataRecipe
from usermetadata.exceptions import UsageError
from usermetadata.storage.memory import InMemoryStorage
from usermetadata.testing.process import OtherProcess

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


@pytest.fixture
def usermetadata_storage() -> Generator[InMemoryStorage, None, None]:
    """Replace the store of ``init`` with an empty in-memory store during the test.

    The application's override, if there is one, still applies. The new store has the application's
    indexes. After the test, the former store is back.

    Example:
        A test that uses it::

            def test_theme(usermetadata_storage):
                update_user_metadata("alice", {"theme": "dark"})
                assert get_user_metadata("alice").metadata == {"theme": "dark"}
    """
    with _stores.fresh("function") as storage:
        yield storage


@pytest.fixture(scope="module")
def usermetadata_module_storage() -> Generator[InMemoryStorage, None, None]:
    """Give a module's tests, and its fixtures with scope ``"module"``, one in-memory store.

    A test of the module that uses ``usermetadata_storage`` still gets an empty store. The next test
    has the module's store again.

    Example:
        Metadata that several tests read::

            @pytest.fixture(scope="module", autouse=True)
            def users(usermetadata_module_storage):
                update_user_metadata("alice", {"plan": "pro"})
    """
    with _stores.fresh("module") as storage:
        yield storage


@pytest.fixture(scope="session")
def usermetadata_session_storage() -> Generator[InMemoryStorage, None, None]:
    """Give all tests, and fixtures with scope ``"session"``, one in-memory store.

    With pytest-xdist each worker has a separate store. A module or a test that uses one of the
    other fixtures has the store of that fixture.
    """
    with _stores.fresh("session") as storage:
        yield storage


@pytest.fixture
def usermetadata_server(
    usermetadata_storage: InMemoryStorage, _usermetadata_served: _Served
) -> Generator[str, None, None]:
    """Serve the test's empty in-memory store to SuperTokens' SDKs; give the test the URL.

    It needs the extra ``server``. Pass the URL to the application's SDK as its ``connection_uri``;
    no key is needed. All tests get the same URL, because an SDK keeps the first one.

    Example:
        A test of an application that uses the SDK::

            def test_theme(usermetadata_server):
                init(supertokens_config=SupertokensConfig(connection_uri=usermetadata_server), ...)
    """
    _usermetadata_served.storage = usermetadata_storage
    yield _usermetadata_served.url
    _usermetadata_served.storage = None


@pytest.fixture(scope="session")
def usermetadata_process() -> Generator[OtherProcess, None, None]:
    """A second process, in which the conformance suite opens a second storage.

    Its method ``open`` takes a module-level class or function, and its arguments. It returns a
    storage that is used like one in this process. The storage has the methods of all protocols
    except ``within``.

    Example:
        The fixture of a test class::

            @pytest.fixture
            def second_storage(self, usermetadata_process, tmp_path):
                with closing(usermetadata_process.open(MyStorage, tmp_path / "users")) as storage:
                    yield storage
    """
    process = OtherProcess()
    yield process
    process.close()


_SCOPES = ["session", "module", "function"]


class _Stores:
    """The stores of the active fixtures; the functions use the one with the narrowest scope.

    A session's store may be set up after a module's, and outlive it.
    """

    def __init__(self) -> None:
        self._made: dict[int, Made] = {}
        self._before: Made | None = None

    @contextmanager
    def fresh(self, scope: str) -> Generator[InMemoryStorage, None, None]:
        """Add a store for the duration of a block."""
        current = default.get()
        if not self._made:
            self._before = current
        override = None if current is None else current.recipe.override
        indexes = () if current is None else getattr(current.recipe.storage, "indexes", ())
        storage = InMemoryStorage(indexes=indexes)
        recipe = UserMetadataRecipe(storage, override=override)
        level = _SCOPES.index(scope)
        self._made[level] = Made(recipe, recipe._functions, None)
        self._use_narrowest()
        yield storage
        if level == max(self._made):
            # A test may have called close() and init().
            UserMetadataRecipe.reset()
        recipe.close()
        storage.close()
        del self._made[level]
        self._use_narrowest()

    def _use_narrowest(self) -> None:
        if self._made:
            default.replace(self._made[max(self._made)])
        else:
            default.replace(self._before)
            self._before = None


_stores = _Stores()


class _Served:
    """The storage of the current test, which the tests' server serves."""

    reads_in_flight = writes_in_flight = 0

    def __init__(self, url: str) -> None:
        self.url = url
        self.storage: InMemoryStorage | None = None

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return self._current().read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return self._current().write(changes)

    def for_app(self, app_id: str) -> InMemoryStorage:
        return self._current().for_app(app_id)

    def close(self) -> None:
        """Do nothing: the test's fixture closes the storage."""

    def _current(self) -> InMemoryStorage:
        if self.storage is None:
            raise UsageError(
                "usermetadata_server: the test has ended; use the fixture in each test"
            )
        return self.storage


@pytest.fixture(scope="session")
def _usermetadata_served() -> Generator[_Served, None, None]:
    import socket

    from usermetadata._core.http import Server
    from usermetadata.server import create_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        served: Any = _Served(f"http://127.0.0.1:{listener.getsockname()[1]}")
        server = Server(create_app(served))
        is_running = threading.Event()
        thread = threading.Thread(
            target=server.run, args=[lambda _: is_running.set()], kwargs={"sock": listener}
        )
        thread.start()
        is_running.wait()
        yield served
        server.stop()
        thread.join()

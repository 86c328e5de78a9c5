"""pytest fixtures: a fresh in-memory store per test, and a server over it."""

# pyright: reportPrivateUsage=false
# The fixture puts the recipe's one instance aside, which no other code should do.

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from usermetadata.client import UserMetadataRecipe
from usermetadata.exceptions import UsageError
from usermetadata.storage.memory import InMemoryStorage

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.testing.process import OtherProcess


@pytest.fixture
def usermetadata_storage() -> Generator[InMemoryStorage, None, None]:
    """Give the test a fresh in-memory store, in place of the one that ``init`` was given.

    The application's override, if there is one, stays in force. Afterwards the former store is
    back.

    Example:
        A test that uses it::

            def test_theme(usermetadata_storage):
                update_user_metadata("alice", {"theme": "dark"})
                assert get_user_metadata("alice").metadata == {"theme": "dark"}
    """
    storage = InMemoryStorage()
    with UserMetadataRecipe._replaced(storage):
        yield storage
    storage.close()


@pytest.fixture
def usermetadata_server(
    usermetadata_storage: InMemoryStorage, _usermetadata_served: _Served
) -> Generator[str, None, None]:
    """Serve the test's fresh in-memory store to SuperTokens' SDKs; give the test the URL.

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

    Its method ``open`` takes a class or a function of a module, and the arguments of it. It returns
    a storage that works like one of this process. It has ``read``, ``write``, ``for_app``,
    ``close``, ``read_after``, ``erase``, ``indexes``, ``find`` and ``count``.

    Example:
        The fixture of a test class::

            @pytest.fixture
            def second_storage(self, usermetadata_process, tmp_path):
                with closing(usermetadata_process.open(MyStorage, tmp_path / "users")) as storage:
                    yield storage
    """
    from usermetadata.testing.process import OtherProcess

    process = OtherProcess()
    yield process
    process.close()


class _Served:
    """The storage of the test that runs; the tests' server serves it."""

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
        """The test's fixture closes the storage."""

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

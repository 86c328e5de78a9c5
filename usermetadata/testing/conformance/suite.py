"""What all parts of the suite use: its settings, its optional fixtures, and its threads."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest

from usermetadata.changes import Modify
from usermetadata.indexes import Index
from usermetadata.testing.running import Running, limited, run_in_rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractContextManager

    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage
    from usermetadata.testing.proxy import Phase

T = TypeVar("T")
C = TypeVar("C", bound="Callable[..., object]")

COUNT = Modify(lambda metadata: {**metadata, "n": metadata.get("n", 0) + 1})

_PATIENCE = 5
_WITH_MANY_USERS: set[str] = set()


def with_many_users(test: C) -> C:
    """Give a test more time: on a busy machine a large write to a server takes a minute."""
    _WITH_MANY_USERS.add(test.__name__)
    return test


class Suite:
    """The base of all parts.

    Attributes:
        timeout: seconds after which a test, including its fixtures, counts as hanging and fails
            with the stacks of all threads; five times as many for a test with thousands of users.
        moment: seconds within which a concurrent call ends unless the storage makes it wait.
        indexes: the indexes that an ``IndexedStorage`` has to declare in the fixtures.
    """

    timeout: ClassVar[float] = 60.0
    moment: ClassVar[float] = 0.1
    indexes: ClassVar[Sequence[Index]] = (Index("plan"), Index("customer", unique=True))

    @pytest.fixture
    def second_storage(self) -> Storage:
        """A second storage with the same rows as ``storage``, as another process would open it."""
        pytest.skip("define the fixture second_storage: a second storage over the same data")

    @pytest.fixture
    def break_connection(
        self,
    ) -> Callable[[Phase, int, Callable[[], object]], AbstractContextManager[object]]:
        """A function that breaks the connection of ``storage``, as ``BreakingProxy`` has one."""
        pytest.skip("define the fixture break_connection, if the storage uses a connection")

    @pytest.fixture(autouse=True)
    def _ends(self, request: pytest.FixtureRequest) -> Generator[None, None, None]:
        is_long = request.function.__name__ in _WITH_MANY_USERS
        with limited(self.timeout * (_PATIENCE if is_long else 1)):
            yield

    def start(self, function: Callable[[], T]) -> Running[T]:
        """Run the function in a thread."""
        return Running(function, self.timeout)

    def in_thread(self, function: Callable[[], T]) -> T:
        """Run the function in a thread until it ends; return its result or raise its exception."""
        return self.start(function).result()

    def meanwhile(self, function: Callable[[], object]) -> Meanwhile:
        """Return a callable for a change; it calls the function in another thread."""
        return Meanwhile(self, function)

    def in_rounds(self, functions: Sequence[Callable[[int], object]], rounds: int) -> None:
        """Call each function in a separate thread with 0, 1, ...; rounds start together."""
        run_in_rounds(functions, rounds, self.timeout)


class Meanwhile:
    """Calls a function in another thread, and only once if the change is called again."""

    def __init__(self, suite: Suite, function: Callable[[], object]) -> None:
        self._suite = suite
        self._function = function
        self._running: Running[object] | None = None

    def __call__(self) -> None:
        """Call the function and wait briefly for its end: it may have to wait for the change."""
        if self._running is None:
            self._running = self._suite.start(self._function)
            self._running.give_time(self._suite.moment)

    def finish(self) -> None:
        """Wait until the function has ended; raise its exception."""
        assert self._running is not None, "the change was never called"
        self._running.result()


@contextmanager
def explained(text: str) -> Generator[None, None, None]:
    """Add a note to an exception that is raised in the block."""
    try:
        yield
    except BaseException as error:
        error.add_note(text)
        raise


def exactly(value: Any) -> str:
    """Return an ASCII text that also differs for values that ``==`` or a reader takes as equal."""
    return json.dumps(value, sort_keys=True)


def spoil(metadata: Metadata) -> None:
    """Change everything in metadata that has ``list`` and ``object``."""
    metadata["list"].append("spoilt")
    metadata["object"]["n"] = "spoilt"
    metadata["spoilt"] = True

"""Opening and closing SQLite connections; the base class of both kinds of owners."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import finalize

from usermetadata._core.batching import ThreadBatches, acquire
from usermetadata._core.forking import ForkHooks, watch

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from usermetadata._core.sqlite.statements import Call, Results, Row, Sift
    from usermetadata.indexes import Index


T = TypeVar("T")

_EXIT_TIMEOUT = 1.0  # seconds


class Connections(ForkHooks, ABC):
    """The connections to one database; may be used from any thread.

    Args:
        name: the name of the database.
        timeout: seconds that a write waits for other threads.
        indexes: the declared indexes.

    Attributes:
        batches: the calls that write, one batch at a time.
        shares_batches: whether several calls may share a transaction.
    """

    shares_batches: ClassVar[bool]

    def __init__(self, name: str, timeout: float, indexes: tuple[Index, ...]) -> None:
        self.name = name
        self.timeout = timeout
        self.indexes = indexes
        self.is_closed = False
        self._start()
        watch(self)

    @abstractmethod
    def fetch(self, query: str, parameters: Sequence[object], sift: Sift = list) -> list[Row]:
        """Return those rows of a query that ``sift`` selects."""

    @abstractmethod
    def administer(self, work: Callable[[Any], T]) -> T:
        """Call a function with a connection to the database; declared indexes may be missing."""

    @abstractmethod
    def file(self) -> str:
        """Return the path of the database's file; empty if it is in memory."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections that are not the caller's; running calls are completed."""

    @abstractmethod
    def _write_together(self, calls: Sequence[Call]) -> list[Results]:
        """Execute the changes of some calls in one transaction."""

    def _start(self, *opened: list[sqlite3.Connection]) -> None:
        """Start without waiting calls: in a new object or a new process."""
        self.batches: ThreadBatches[Call, Results] = ThreadBatches(
            self._write_together, self.timeout, self.name
        )
        self._has_turn_for_fork = False
        self._at_end = close_at_end(self, self.batches.turn, *opened)

    def before_fork(self) -> None:
        """Wait for the running write, up to the timeout."""
        # A fork inside a change, or during a change longer than the timeout, still happens.
        if not self.batches.is_executing_here():
            self._has_turn_for_fork = acquire(self.batches.turn, self.timeout)

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        if self._has_turn_for_fork:
            self._has_turn_for_fork = False
            self.batches.turn.release()

    def after_fork_in_child(self) -> None:
        """Start anew: a thread of the parent may have been writing."""
        self._at_end.detach()
        self._start()


class Connection(sqlite3.Connection):
    """A connection that a weak set can hold.

    Attributes:
        indexed_schema: the version of the schema in which the declared indexes were found.
    """

    indexed_schema: int | None = None

    def __del__(self) -> None:
        """Close a connection that was opened while the interpreter ended."""
        with suppress(sqlite3.Error):  # it could not be opened
            self.close()


def connect(uri: str, timeout: float) -> sqlite3.Connection:
    """Open a connection for one thread at a time, without implicit transactions."""
    return sqlite3.connect(
        uri,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
        factory=Connection,
        uri=True,
    )


def close_all(*groups: list[sqlite3.Connection]) -> None:
    """Close the connections and empty the lists."""
    for group in groups:
        with suppress(IndexError):  # other threads may take connections in between
            while True:
                group.pop().close()


def close_at_end(
    owner: object, turn: threading.RLock, *groups: list[sqlite3.Connection]
) -> finalize[..., Any]:
    """Close what is open when ``owner`` is dropped, and at the interpreter's exit."""

    def close() -> None:
        # At the exit a daemon thread may be using a connection. If it does not finish in time, the
        # operating system closes the file. Later calls, by exit handlers, open the file again.
        if any(groups) and acquire(turn, _EXIT_TIMEOUT):
            close_all(*groups)
            turn.release()

    return finalize(owner, close)

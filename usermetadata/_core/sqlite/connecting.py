"""Opening and closing SQLite connections."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import finalize

from usermetadata._core.batching import acquire

if TYPE_CHECKING:
    import threading

_PATIENCE_AT_EXIT = 1.0  # seconds


class Connection(sqlite3.Connection):
    """A connection that a weak set can hold."""


def connect(path: str, timeout: float) -> sqlite3.Connection:
    """Open a connection for one thread at a time, with transactions only where they are begun."""
    return sqlite3.connect(
        path, timeout=timeout, isolation_level=None, check_same_thread=False, factory=Connection
    )


def close_all(*groups: list[sqlite3.Connection]) -> None:
    """Close the connections and empty the lists."""
    for group in groups:
        with suppress(IndexError):  # other threads may take some meanwhile
            while True:
                group.pop().close()


def close_at_end(
    owner: object, turn: threading.RLock, *groups: list[sqlite3.Connection]
) -> finalize[..., Any]:
    """Close what is open when ``owner`` is dropped, and at the interpreter's exit."""

    def close() -> None:
        # At the exit a daemon thread may be using a connection. If it does so for longer, the
        # operating system closes the file; if not, it does not get the lock any more.
        if any(groups) and acquire(turn, _PATIENCE_AT_EXIT):
            close_all(*groups)

    return finalize(owner, close)

"""The in-memory storage: for tests, and for state that may die with the process."""

from __future__ import annotations

import copy
import marshal
import threading
from heapq import nsmallest
from typing import TYPE_CHECKING, Any

from usermetadata.exceptions import UsageError
from usermetadata.forking import watch
from usermetadata.identifiers import check_app_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from usermetadata.changes import Change
    from usermetadata.json import Metadata


class InMemoryStorage:
    """Keeps metadata in this process's memory.

    Rows are bytes, as in a database, so that nothing stored can be changed by accident. Every
    ``InMemoryStorage()`` is a store of its own; after ``fork`` each process has its own copy.

    Args:
        app_id: the app whose rows these are.

    Raises:
        InvalidInputError: the app id is not valid.

    Example:
        >>> from usermetadata.changes import Merge
        >>> storage = InMemoryStorage()
        >>> storage.write([("alice", Merge({"theme": "dark"}))])
        [{'theme': 'dark'}]
        >>> storage.read(["alice", "bob"])
        {'alice': {'theme': 'dark'}}
    """

    reads_in_flight = writes_in_flight = 0

    def __init__(self, *, app_id: str = "public") -> None:
        self._app_id = check_app_id(app_id)
        self._store = _Store()

    def __repr__(self) -> str:
        return f"InMemoryStorage(app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row."""
        store = self._store
        found: dict[str, Any] = {}
        with store.lock:
            rows = store.rows()
            for user_id in user_ids:
                row = rows.get((self._app_id, user_id))
                if row is not None:
                    found[user_id] = row
        for user_id, row in found.items():
            found[user_id] = _decode(row)
        return found

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return the metadata of the next users, in the order of their code points."""
        with self._store.lock:
            rows = self._store.rows()
            later = (key for key in rows if key[0] == self._app_id and key[1] > user_id)
            found = {key[1]: rows[key] for key in nsmallest(limit, later)}
        return {user_id: _decode(row) for user_id, row in found.items() if row is not None}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order, all or none."""
        store = self._store
        with store.lock:
            rows = store.rows()
            if store.is_writing:
                raise UsageError("a write inside a write of the same thread: it would be lost")
            try:
                store.is_writing = True
                staged: dict[tuple[str, str], bytes | None] = {}
                results: list[Metadata | None] = []
                for user_id, change in changes:
                    key = (self._app_id, user_id)
                    old = staged[key] if key in staged else rows.get(key)
                    new = change(None if old is None else _decode(old))
                    staged[key] = None if new is None else _encode(new)
                    results.append(new)
                # One step that no interrupt can halve; None is no row already.
                rows.update(staged)
                for key, row in staged.items():
                    if row is None:
                        del rows[key]
                return results
            finally:
                store.is_writing = False

    def for_app(self, app_id: str) -> Self:
        """Return the same storage, seen from another app."""
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        """Forget every row."""
        self._store.close()


def _encode(metadata: Metadata) -> bytes:
    # The quickest deep copy of plain values there is. From version 3 on it would keep what is
    # shared inside an object shared, which JSON does not.
    return marshal.dumps(metadata, 2)


def _decode(row: bytes) -> Any:
    return marshal.loads(row)  # noqa: S302 - nobody else has had it


class _Store:
    """The rows of all apps, for one thread at a time: the one that has ``lock``."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], bytes | None] | None = {}
        self._start()
        watch(self)

    def _start(self) -> None:
        self.lock = threading.RLock()
        self.is_writing = False
        self._held_for_fork = False

    def rows(self) -> dict[tuple[str, str], bytes | None]:
        if self._rows is None:
            raise UsageError("this InMemoryStorage is closed: make a new one")
        return self._rows

    def close(self) -> None:
        with self.lock:
            self._rows = None

    def before_fork(self) -> None:
        self._held_for_fork = self.lock.acquire(timeout=_LONGEST_WAIT_OF_A_FORK)

    def after_fork_in_parent(self) -> None:
        if self._held_for_fork:
            self._held_for_fork = False
            self.lock.release()

    def after_fork_in_child(self) -> None:
        self._start()


_LONGEST_WAIT_OF_A_FORK = 30.0  # seconds

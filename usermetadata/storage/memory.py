"""The in-memory storage: for tests, and for data that need not outlive the process."""

from __future__ import annotations

import marshal
import threading
from heapq import nsmallest
from itertools import islice
from typing import TYPE_CHECKING, Any

from usermetadata._core.apps import OfOneApp
from usermetadata._core.erasing import Erasure
from usermetadata._core.forking import ForkHooks, notice, watch
from usermetadata._core.lookup import Lookup
from usermetadata.changes import apply_in_order
from usermetadata.exceptions import UsageError
from usermetadata.indexes import check_indexes, matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from usermetadata._core.lookup import Values
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value

    Key = tuple[str, str]


class InMemoryStorage(OfOneApp):
    """Keeps metadata in this process's memory.

    Rows are stored as bytes, so stored metadata cannot be changed by accident. Each
    ``InMemoryStorage()`` has separate rows. After ``fork`` each process has a copy.

    Args:
        app_id: the app that the storage reads and writes.
        indexes: the properties by which users can be found.

    Raises:
        InvalidInputError: the app id or an index is not valid.

    Example:
        >>> from usermetadata.changes import Merge
        >>> storage = InMemoryStorage()
        >>> storage.write([("alice", Merge({"theme": "dark"}))])
        [{'theme': 'dark'}]
        >>> storage.read(["alice", "bob"])
        {'alice': {'theme': 'dark'}}
    """

    reads_in_flight = writes_in_flight = 0

    def __init__(self, *, app_id: str = "public", indexes: Iterable[Index] = ()) -> None:
        super().__init__(app_id)
        self._store = _Store(Lookup(check_indexes(indexes)))

    def __repr__(self) -> str:
        return f"InMemoryStorage(app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of the users that have a row."""
        app_id = self._app_id
        with self._store.lock:
            rows = self._store.rows()
            found = {
                user_id: row
                for user_id in user_ids
                if (row := rows.get((app_id, user_id))) is not None
            }
        return {user_id: _decode(row) for user_id, row in found.items()}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return one page of users and their metadata, sorted by the ids' code points."""
        with self._store.lock:
            later = (
                key[1]
                for key, row in self._store.rows().items()
                if key[0] == self._app_id and key[1] > user_id and row is not None
            )
            return self.read(nsmallest(limit, later))

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order, all or none."""
        notice()
        return self._write([((self._app_id, user_id), change) for user_id, change in changes])

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """Remove a user's rows from all apps, all or none."""
        notice()
        erasure = Erasure(user_id, check)
        with self._store.lock:
            rows = self._store.rows()
            keys = [key for key, row in rows.items() if key[1] == user_id and row is not None]
            self._write(erasure.changes(sorted(app_id for app_id, _ in keys)))
        return erasure.removed

    def _write(self, keyed: Sequence[tuple[Key, Change]]) -> list[Metadata | None]:
        store = self._store
        with store.lock:
            rows = store.rows()
            if store.is_writing:
                raise UsageError(
                    "InMemoryStorage: a write inside a write of the same thread would be lost;"
                    " write before or after it"
                )
            try:
                store.is_writing = True
                staged = {key: row for key, _ in keyed if (row := rows.get(key)) is not None}
                results = apply_in_order(
                    keyed, staged, decode=lambda _, row: _decode(row), encode=_encode
                )
                lookup = store.lookup
                old: Values = {}
                new: Values = {}
                if lookup.indexes:
                    keys = [key for key, _ in keyed]
                    new = lookup.values(dict(zip(keys, results, strict=True)))
                    lookup.check_unique(
                        new,
                        keys,
                        lambda key, where: (
                            (row := rows.get(key)) is not None and matches(_decode(row), where)
                        ),
                    )
                    before = {key: row for key in keys if (row := rows.get(key)) is not None}
                    old = lookup.values({key: _decode(row) for key, row in before.items()})
                    lookup.add(new)
                # One step: an interrupt cannot split it. None already counts as no row.
                rows.update({key: staged.get(key) for key, _ in keyed})
                for key, _ in keyed:
                    if rows.get(key, b"") is None:
                        del rows[key]
                if old:
                    lookup.remove(old, new)
                return results
            finally:
                store.is_writing = False

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The declared indexes."""
        return self._store.lookup.indexes

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        """Return one page of the users that have these values, in order."""
        with self._store.lock:
            return dict(islice(self._found(where, after), limit))

    def count(self, where: Mapping[str, Value] | None) -> int:
        """Return the number of users with these values, or of all users."""
        with self._store.lock:
            if where is not None:
                return sum(1 for _ in self._found(where, ""))
            rows = self._store.rows().items()
            return sum(1 for (app_id, _), row in rows if app_id == self._app_id and row is not None)

    def stored_indexes(self) -> tuple[Index, ...]:
        """Return the declared indexes: they exist from the first write on."""
        return self.indexes

    def build_indexes(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Do nothing: no index is missing."""
        return []

    def drop_index(self, name: str) -> None:
        """Do nothing: declared indexes exist until the storage is closed."""

    def _found(self, where: Mapping[str, Value], after: str) -> Iterator[tuple[str, Metadata]]:
        rows = self._store.rows()
        for user_id in sorted(self._store.lookup.users(self._app_id, where)):
            row = rows.get((self._app_id, user_id))
            if user_id > after and row is not None and matches(metadata := _decode(row), where):
                yield user_id, metadata

    def close(self) -> None:
        """Discard all rows."""
        self._store.close()


def _encode(metadata: Metadata) -> bytes:
    # The quickest deep copy of plain values. From version 3 on it would keep shared
    # references, which JSON does not. Only this process reads it.
    return marshal.dumps(metadata, 2)


def _decode(row: bytes) -> Any:
    return marshal.loads(row)  # noqa: S302 - only this process has written it


class _Store(ForkHooks):
    """The rows of all apps; only the thread that holds ``lock`` may use them."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self._rows: dict[Key, bytes | None] | None = {}
        self.after_fork_in_child()
        watch(self)

    def rows(self) -> dict[Key, bytes | None]:
        if self._rows is None:
            raise UsageError("memory: this InMemoryStorage is closed; make a new one")
        return self._rows

    def close(self) -> None:
        with self.lock:
            self._rows = None

    def after_fork_in_child(self) -> None:
        """Another thread of the parent may have held the lock."""
        self.lock = threading.RLock()
        self.is_writing = False

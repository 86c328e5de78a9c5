"""The SQLite storage: one file, through sqlite-utils."""

from __future__ import annotations

import copy
import json
import os
import re
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from sqlite_utils import Database

from usermetadata._core.apps import OfOneApp
from usermetadata._core.erasing import Erasure
from usermetadata._core.forking import notice
from usermetadata._core.joining import recognise
from usermetadata._core.reentry import ChangeError
from usermetadata._core.rows import decode_row
from usermetadata._core.sqlite.file import FileConnections
from usermetadata._core.sqlite.indexes import (
    build_indexes,
    drop_index,
    search_by,
    stored_indexes,
)
from usermetadata._core.sqlite.joined import JoinedConnection
from usermetadata._core.sqlite.single import SingleConnection
from usermetadata._core.sqlite.statements import READ_AFTER, READ_MANY, READ_ONE, write_together
from usermetadata.changes import Clear, Merge, Replace
from usermetadata.exceptions import InvalidInputError
from usermetadata.indexes import check_indexes, matches

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from typing import Self

    from usermetadata._core.sqlite.connecting import Connections
    from usermetadata._core.sqlite.statements import Row, Sift
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value

_SHAREABLE = {Merge, Replace, Clear}  # any other change may be bound to its thread
_MAX_TIMEOUT = 1_000_000  # seconds; SQLite counts milliseconds in 31 bits


class SQLiteStorage(OfOneApp):
    """Keeps metadata in the table ``user_metadata`` of an SQLite database.

    Given a path, the storage opens its own connections at the first call and creates the file and
    the table if they are missing. Any number of threads and processes may use it, also after
    ``fork``. The file is in WAL mode: readers never wait for a writer.

    Given a ``sqlite_utils.Database``, the storage borrows its connection. While the caller has a
    transaction open, writes are part of it and become durable when it is committed. The caller
    opens the connection (with ``check_same_thread=False`` if other threads or asyncio use the
    storage), closes it, and does not share it across a ``fork``.

    Args:
        database: the path of the file, ``":memory:"``, or a ``sqlite_utils.Database``.
        app_id: the app that the storage reads and writes.
        synchronous: ``"FULL"``: an acknowledged write survives a power cut. ``"NORMAL"``: faster; a
            power cut may undo the last writes, but never damages the file. Only for a path.
        timeout: seconds that a write waits for earlier threads, and then for other processes,
            before it raises ``StorageBusyError``. With a ``Database`` it applies to threads only.
        indexes: the properties by which users can be found. A missing index is built at the first
            call if the table has at most 10,000 rows. With a larger table, calls raise
            ``UsageError`` until ``python -m usermetadata index`` has built it.

    Raises:
        InvalidInputError: an argument is not valid. Nothing is opened before the first call.

    Example:
        >>> from usermetadata.changes import Merge
        >>> storage = SQLiteStorage(":memory:")
        >>> storage.write([("alice", Merge({"theme": "dark"}))])
        [{'theme': 'dark'}]
        >>> storage.read(["alice", "bob"])
        {'alice': {'theme': 'dark'}}
        >>> storage.close()

    SQLite's documentation explains the settings: `WAL <https://sqlite.org/wal.html>`_, `synchronous
    <https://sqlite.org/pragma.html#pragma_synchronous>`_.
    """

    reads_in_flight, writes_in_flight = 2, 1

    def __init__(
        self,
        database: str | os.PathLike[str] | Database,
        *,
        app_id: str = "public",
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        timeout: float = 30.0,
        indexes: Iterable[Index] = (),
    ) -> None:
        super().__init__(app_id)
        if synchronous not in ("FULL", "NORMAL"):
            raise InvalidInputError(
                f'synchronous: {synchronous!r} is neither "FULL" nor "NORMAL"; pass one of them'
            )
        if not isinstance(timeout, (int, float)) or not 0 <= timeout <= _MAX_TIMEOUT:
            raise InvalidInputError(
                f"timeout: {timeout!r} is not a number of seconds, 0 or more; pass for example 30"
            )
        declared = check_indexes(indexes)
        self._connections: Connections
        if isinstance(database, Database):
            self._connections = SingleConnection(database, timeout, declared)
        elif database == ":memory:":
            self._connections = SingleConnection(None, timeout, declared)
        elif isinstance(database, (str, os.PathLike)):
            path = _check_path(database)
            self._connections = FileConnections(path, synchronous, timeout, declared)
        else:
            raise InvalidInputError(
                f"database: {type(database).__name__} is neither a path nor a"
                ' sqlite_utils.Database; pass for example "users.db"'
            )

    def __repr__(self) -> str:
        return f"SQLiteStorage({self._connections.name!r}, app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of the users that have a row, in one query."""
        if len(user_ids) == 1:
            return self._read(READ_ONE, (self._app_id, user_ids[0]))
        return self._read(READ_MANY, (self._app_id, json.dumps(user_ids)))

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return one page of users and their metadata, sorted by the ids' code points."""
        return self._read(READ_AFTER, (self._app_id, user_id, limit))

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The declared indexes."""
        return self._connections.indexes

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        """Return one page of the users whose properties have these values, in one query.

        If another program's row names a property twice, the first value is used. If it escapes a
        character of the property's name, SQLite 3.40 does not find the row.
        """
        search = search_by(tuple(where), self.indexes)
        texts = search.texts(self._app_id, where)
        if search.is_complete:
            return self._read(search.find, [*texts, after, limit])
        sift = partial(self._matching, where, limit)
        return self._read(search.find, [*texts, after, -1], sift)

    def count(self, where: Mapping[str, Value] | None) -> int:
        """Return the number of users with these values; without ``where``, of all users."""
        where = where or {}
        search = search_by(tuple(where), self.indexes)
        texts = search.texts(self._app_id, where)
        if search.is_complete:
            counted: list[Any] = self._connections.fetch(search.count, texts)
            return sum(number for _, number in counted)
        sift = partial(self._matching, where, None)
        return len(self._connections.fetch(search.find, [*texts, "", -1], sift))

    def stored_indexes(self) -> tuple[Index, ...]:
        """Return the indexes that exist in the database, declared or not."""
        return self._connections.administer(stored_indexes)

    def build_indexes(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Build the missing declared indexes, all or none.

        Rows are read before the write lock is taken, and once more if another process has written
        since. Writers wait while SQLite builds the indexes.
        """
        name = self._connections.name

        def build(connection: sqlite3.Connection) -> list[str]:
            return build_indexes(
                connection,
                name,
                self.indexes,
                progress=progress,
                transact=lambda create: write_together(connection, [()], name, prepare=create),
            )

        return self._connections.administer(build)

    def drop_index(self, name: str) -> None:
        """Remove an index from the database; no error if none has this name."""
        self._connections.administer(lambda connection: drop_index(connection, name))

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order in one transaction, opened by ``BEGIN IMMEDIATE``."""
        notice()
        connections = self._connections
        is_shareable = {type(change) for _, change in changes} <= _SHAREABLE
        app_id = self._app_id
        keyed = [((app_id, user_id), change) for user_id, change in changes]
        alone = not (is_shareable and connections.shares_batches)
        try:
            return connections.batches.call(keyed, alone=alone)
        except ChangeError as failed:
            error = failed.error
        raise error

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """Remove a user's rows from all apps, in one transaction.

        The apps are found in the index of the key, one after the other, or in an index of
        ``user_id`` if the table has one.
        """
        notice()
        erasure = Erasure(user_id, check)
        try:
            self._connections.batches.call(erasure, alone=True)
        except ChangeError as failed:
            error = failed.error
        else:
            return erasure.removed
        raise error

    @contextmanager
    def within(self, connection: object) -> Generator[Self, None, None]:
        """Yield a storage that is part of the transaction of the caller's connection.

        Args:
            connection: a ``sqlite3.Connection``, a ``sqlite_utils.Database``, a ``Session`` or
                ``Connection`` of SQLAlchemy, or Django's ``connection``. It must be connected to
                this storage's file, or to a database in memory, as in tests.
        """
        joined = copy.copy(self)
        joined._connections = JoinedConnection(recognise(connection), self._connections)
        try:
            yield joined
        finally:
            joined.close()

    def close(self) -> None:
        """Close the connections that the storage opened itself."""
        self._connections.close()

    def _matching(
        self, where: Mapping[str, Value], limit: int | None, rows: sqlite3.Cursor
    ) -> list[Row]:
        name, app_id = self._connections.name, self._app_id
        found = (
            (user_id, text)
            for user_id, text in rows
            if matches(decode_row(name, (app_id, user_id), text), where)
        )
        # Some rows may be left. The traceback of an error would keep the cursor, and with it the
        # state of the file that the connection sees: later reads would miss later writes.
        with closing(rows):
            return list(islice(found, limit))

    def _read(
        self, query: str, parameters: Sequence[object], sift: Sift = list
    ) -> dict[str, Metadata]:
        name, app_id = self._connections.name, self._app_id
        return {
            user_id: decode_row(name, (app_id, user_id), text)
            for user_id, text in self._connections.fetch(query, parameters, sift)
        }


# A URL, SQLite's "file:...", libpq's "host=...", or a parameter.
_NO_PATH = re.compile(r"\w[\w+.-]+:|\s*\w+\s*=|.*\?|\s|.*\s\Z", re.DOTALL)


def _check_path(path: str | os.PathLike[str]) -> str:
    if isinstance(path, str) and _NO_PATH.match(path):
        raise InvalidInputError(
            "database: the text is neither a URL nor plainly a path; pass for example"
            ' "users.db", to init also "sqlite:///users.db" or "postgresql://...", or'
            " pathlib.Path(...) for a file of this name"
        )
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise InvalidInputError(f'database: {text!r} cannot be a path; name a file, or ":memory:"')
    return os.path.abspath(text)

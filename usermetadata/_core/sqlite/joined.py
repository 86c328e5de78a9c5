"""The caller's SQLite connection, during a block of ``within``."""

from __future__ import annotations

import os
import sqlite3
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sqlite_utils import Database
from sqlite_utils.db import NoTable

from usermetadata._core.joining import ended, unsupported
from usermetadata._core.sqlite.connecting import Connections
from usermetadata._core.sqlite.errors import closed, translate
from usermetadata._core.sqlite.indexes import check_few_rows, missing_indexes, without_hint
from usermetadata._core.sqlite.schema import check_table, create_table, has_table
from usermetadata._core.sqlite.statements import fetch, main_file, plain_rows, write_together
from usermetadata.exceptions import InvalidInputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata._core.joining import DriversConnection
    from usermetadata._core.sqlite.connecting import T
    from usermetadata._core.sqlite.statements import Call, Results, Row, Sift

_LEGACY = getattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", -1)  # since Python 3.12
_LOCK = "DELETE FROM user_metadata WHERE 0"
_WHAT_WORKS = (
    "a connection of sqlite3, a sqlite_utils.Database, a Session or Connection of SQLAlchemy with"
    " sqlite3 or aiosqlite, or Django's connection to SQLite"
)


class JoinedConnection(Connections):
    """Writes in savepoints of the caller's transaction.

    If no transaction is open, a write begins one, as the driver would for an ``INSERT``. The caller
    commits it; on a connection in autocommit mode, the write does.

    Args:
        find: returns the caller's connection.
        storages: the connections of the storage that joins.

    Raises:
        InvalidInputError: the connection is not to the storage's database.
        UsageError: the storage is closed.
    """

    shares_batches = False

    def __init__(self, find: Callable[[], DriversConnection], storages: Connections) -> None:
        if storages.is_closed:
            raise closed(storages.name)
        self._find = find
        self._storages = storages
        # The last connection whose file, and whose table, were checked.
        self._seen: object = None
        self._checked: object = None
        super().__init__("the caller's connection", storages.timeout, storages.indexes)
        self._run(lambda _: None)

    def file(self) -> str:
        """Return the path of the connection's file; empty if the database is in memory."""
        return self._run(main_file)

    def fetch(self, query: str, parameters: Sequence[object], sift: Sift = list) -> list[Row]:
        """Return those rows of a query that ``sift`` selects; none if there is no table."""

        def fetch_if_table(connection: Any) -> list[Row]:
            if not self._has_table(connection):
                return []
            slow_query = without_hint(query)
            missing = slow_query != query and missing_indexes(connection, self.indexes)
            if missing:
                # A read does not build indexes: it must not take the write lock for the caller.
                check_few_rows(connection, missing)
            return fetch(connection, slow_query if missing else query, parameters, sift)

        with self.batches.turn:
            return self._run(fetch_if_table)

    def _write_together(self, calls: Sequence[Call]) -> list[Results]:
        def write(connection: Any) -> list[Results]:
            if not any(calls):
                return [[] for _ in calls]
            joins = connection.in_transaction
            try:
                return write_together(
                    connection,
                    calls,
                    self.name,
                    indexes=self.indexes,
                    prepare=partial(self._prepare, connection, joins=joins),
                    leave_open=_leaves_open(connection),
                )
            except connection.Error as error:
                if joins and not connection.in_transaction:
                    raise StorageError(
                        f"{self.name}: {error}; SQLite has rolled back the whole transaction"
                    ) from error
                raise

        return self._run(write)

    def administer(self, work: Callable[[Any], T]) -> T:
        """Call a function with the caller's connection."""
        with self.batches.exclusive():
            return self._run(work)

    def _prepare(self, connection: Any, *, joins: bool) -> None:
        """Lock the database for this writer, and create the table if it is missing."""
        if joins:
            # This waits for other writers, as BEGIN IMMEDIATE does. If the transaction read first,
            # it could no longer write after another process had written.
            try:
                connection.execute(_LOCK)
            except connection.OperationalError as error:
                if "no such table" not in str(error):
                    raise
        if not self._has_table(connection):
            create_table(_wrapped(connection))

    def _has_table(self, connection: Any) -> bool:
        if not has_table(connection):
            return False
        if connection is not self._checked:
            check_table(connection, self.name)
            self._checked = connection
        return True

    def close(self) -> None:
        """End the block."""
        self.is_closed = True

    def _run(self, work: Callable[[Any], T]) -> T:
        """Call a function with the caller's connection, in the thread of the connection."""
        if self.is_closed:
            raise ended(self.name)
        kind, connection, adapter, _ = self._find()
        if kind == "sqlite3.Connection":
            return self._work(connection, work)
        if kind != "aiosqlite.core.Connection":
            raise unsupported(connection, _WHAT_WORKS)
        # All statements run together in the connection's thread. Separately, each would change
        # threads, and statements of other tasks could run in between.
        context = copy_context()
        done: T = adapter.run_async(
            lambda own: own._execute(context.run, self._work, own._conn, work)
        )
        return done

    def _work(self, connection: Any, work: Callable[[Any], T]) -> T:
        try:
            with plain_rows(connection):
                if connection is not self._seen:
                    self._check_file(connection)
                    self._seen = connection
                return work(connection)
        except (connection.Error, NoTable) as error:
            raise translate(error, self.name) from error

    def _check_file(self, connection: Any) -> None:
        theirs = main_file(connection)
        ours = theirs and self._storages.file()
        if theirs and not (ours and _is_same(theirs, ours)):
            raise InvalidInputError(
                f"connection: its database is {theirs!r}, but the storage's is"
                f" {ours or self._storages.name!r}; pass a connection to the storage's file, or"
                " make a storage with the connection's file"
            )


class _InTransaction:
    """A connection for sqlite-utils, which refuses one with ``autocommit`` of Python 3.12.

    Inside a transaction that mode makes no difference.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        if name == "autocommit":
            raise AttributeError(name)
        return getattr(self._connection, name)


def _wrapped(connection: Any) -> Database:
    """Return a connection for sqlite-utils, with all its settings as they are."""
    inside = cast("sqlite3.Connection", _InTransaction(connection))
    return Database(inside, execute_plugins=False, recursive_triggers=False)


def _leaves_open(connection: Any) -> bool:
    """Tell whether the driver would begin a transaction, and leave its end to the caller."""
    mode = getattr(connection, "autocommit", _LEGACY)
    return connection.isolation_level is not None if mode == _LEGACY else not mode


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one does not exist yet
        return os.path.realpath(path) == os.path.realpath(other)

"""One SQLite connection for reads and writes: borrowed from the caller, or in memory."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sqlite_utils import Database
from sqlite_utils.db import NoTable

from usermetadata._core.sqlite.connecting import Connections, connect
from usermetadata._core.sqlite.errors import closed, is_read_only, translate
from usermetadata._core.sqlite.indexes import missing_indexes
from usermetadata._core.sqlite.schema import check_table, create_table, has_table
from usermetadata._core.sqlite.statements import (
    fetch,
    fetch_if_table,
    main_file,
    plain_rows,
    write_together,
)
from usermetadata.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from typing import Any

    from usermetadata._core.sqlite.connecting import T
    from usermetadata._core.sqlite.statements import Call, Results, Row, Sift
    from usermetadata.indexes import Index


class SingleConnection(Connections):
    """Uses one connection, one thread at a time; writes join the caller's transaction, if any.

    Args:
        borrowed: the caller's database; without it, one in memory is opened.
        timeout: seconds that a write waits for other threads.
        indexes: the declared indexes.
    """

    shares_batches = False

    def __init__(
        self, borrowed: Database | None, timeout: float, indexes: tuple[Index, ...]
    ) -> None:
        self._is_borrowed = borrowed is not None
        self._database = borrowed or Database(connect(":memory:", timeout), execute_plugins=False)
        self._connection = self._database.conn
        # The caller's driver need not be the standard library's.
        self._errors = (self._connection.Error, NoTable)
        self._is_prepared = self._is_checked = False
        super().__init__("the borrowed database" if borrowed else ":memory:", timeout, indexes)

    def fetch(self, query: str, parameters: Sequence[object], sift: Sift = list) -> list[Row]:
        """Return those rows of a query that ``sift`` selects."""
        with self.batches.turn:
            is_writable = True
            try:
                if not self._is_prepared:
                    self._write_together([()])
            except StorageError as error:
                if not is_read_only(error.__cause__):
                    raise
                is_writable = False
            if self.is_closed:
                raise closed(self.name)
            with self._in_use():
                if is_writable:
                    return fetch(self._connection, query, parameters, sift)
                return fetch_if_table(self._connection, query, parameters, sift)

    def administer(self, work: Callable[[Any], T]) -> T:
        """Call a function with the connection, in this thread's turn."""
        with self.batches.exclusive():
            if self.is_closed:
                raise closed(self.name)
            with self._in_use():
                return work(self._connection)

    def _write_together(self, calls: Sequence[Call]) -> list[Results]:
        if self.is_closed:
            raise closed(self.name)
        with self._in_use():
            missing = not self._is_prepared and not has_table(self._connection)
            if not missing and not self._is_checked:
                check_table(self._connection, self.name)
            self._is_checked = True
            results: list[Results] = [[]]
            # `fetch` only prepares.
            if missing or calls != [()] or missing_indexes(self._connection, self.indexes):
                prepare = partial(create_table, self._database) if missing else None
                results = write_together(
                    self._connection, calls, self.name, indexes=self.indexes, prepare=prepare
                )
            # The caller may still roll back the transaction in which the table was created.
            self._is_prepared = not self._connection.in_transaction
            return results

    @contextmanager
    def _in_use(self) -> Generator[None, None, None]:
        """Get plain rows, and translate errors."""
        try:
            with plain_rows(self._connection):
                yield
        except self._errors as error:
            self._is_prepared = self._is_checked = False
            raise translate(error, self.name) from error

    def file(self) -> str:
        """Return the path of the connection's file; empty if the database is in memory."""
        with self.batches.turn, self._in_use():
            return main_file(self._connection)

    def close(self) -> None:
        """Close the connection, unless it is the caller's."""
        with self.batches.exclusive():
            self.is_closed = True
            if not self._is_borrowed:
                self._connection.close()

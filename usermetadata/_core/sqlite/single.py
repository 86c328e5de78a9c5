"""One SQLite connection for reads and writes: borrowed from the caller, or in memory."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sqlite_utils import Database
from sqlite_utils.db import NoTable

from usermetadata._core.sqlite.connecting import Connections, connect
from usermetadata._core.sqlite.errors import closed, translate
from usermetadata._core.sqlite.schema import check_table, create_table, has_table
from usermetadata._core.sqlite.statements import fetch, main_file, plain_rows, write_together

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from usermetadata._core.sqlite.statements import Call, Results


class SingleConnection(Connections):
    """Uses one connection, one thread at a time; writes join the caller's transaction, if any.

    Args:
        borrowed: the caller's database; without it, one in memory is opened.
        timeout: seconds that a write waits for other threads.
    """

    shares_batches = False

    def __init__(self, borrowed: Database | None, timeout: float) -> None:
        self._is_borrowed = borrowed is not None
        self._database = borrowed or Database(connect(":memory:", timeout), execute_plugins=False)
        self._connection = self._database.conn
        # The caller's driver need not be the standard library's.
        self._errors = (self._connection.Error, NoTable)
        self._is_prepared = self._is_checked = False
        super().__init__("the borrowed database" if borrowed else ":memory:", timeout)

    def fetch(self, query: str, parameters: Sequence[object]) -> list[tuple[str, object]]:
        """Return the rows of a query."""
        with self.batches.turn:
            if not self._is_prepared:
                self._write_together([()])
            if self.is_closed:
                raise closed(self.name)
            with self._in_use():
                return fetch(self._connection, query, parameters)

    def _write_together(self, calls: Sequence[Call]) -> list[Results]:
        if self.is_closed:
            raise closed(self.name)
        with self._in_use():
            missing = not self._is_prepared and not has_table(self._connection)
            if not missing and not self._is_checked:
                check_table(self._connection, self.name)
            self._is_checked = True
            results: list[Results] = [[]]
            if missing or calls != [()]:  # `fetch` only prepares
                prepare = partial(create_table, self._database) if missing else None
                results = write_together(self._connection, calls, self.name, prepare=prepare)
            # The caller may yet roll back a transaction in which the table was created.
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

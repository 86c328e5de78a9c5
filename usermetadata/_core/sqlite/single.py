"""One SQLite connection for reads and writes: borrowed from the caller, or in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlite_utils import Database
from sqlite_utils.db import NoTable

from usermetadata._core.batching import ThreadBatches, acquire
from usermetadata._core.forking import ForkHooks, watch
from usermetadata._core.sqlite.connecting import close_at_end, connect
from usermetadata._core.sqlite.errors import closed, still_open, translate
from usermetadata._core.sqlite.schema import create_table, has_table
from usermetadata._core.sqlite.statements import write

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from usermetadata._core.sqlite.statements import Changes, Results


class SingleConnection(ForkHooks):
    """Uses one connection, one thread at a time.

    Args:
        borrowed: the caller's database; without it, one in memory is opened.
        timeout: seconds that a write waits for other threads.

    Attributes:
        batches: the calls that write; each is the id of an app and its users' changes. They are
            part of the caller's transaction, if there is one.
        shares_batches: whether several calls may share a transaction.
    """

    shares_batches = False

    def __init__(self, borrowed: Database | None, timeout: float) -> None:
        self.name = ":memory:" if borrowed is None else "the borrowed database"
        self._is_borrowed = borrowed is not None
        self._database = borrowed or Database(connect(":memory:", timeout), execute_plugins=False)
        self._connection = self._database.conn
        # The caller's driver need not be the standard library's.
        self._errors = (self._connection.Error, NoTable)
        self._timeout = timeout
        self._is_prepared = False
        self._closed = False
        self._start()
        watch(self)

    def _start(self) -> None:
        self.batches: ThreadBatches[Changes, Results] = ThreadBatches(
            self._write_together, self._timeout, self.name
        )
        self._has_turn_for_fork = False
        own = [] if self._is_borrowed else [self._connection]
        self._at_end = close_at_end(self, self.batches.turn, own)

    def fetch(self, query: str, parameters: Sequence[object]) -> list[tuple[str, object]]:
        """Return the rows of a query."""
        with self.batches.turn:
            if self._closed:
                raise closed(self.name)
            try:
                if not self._is_prepared:
                    self._prepare()
                return self._cursor().execute(query, parameters).fetchall()
            except self._errors as error:
                self._is_prepared = False
                raise translate(error, self.name) from error

    def _write_together(self, calls: Sequence[Changes]) -> list[Results]:
        if self._closed:
            raise closed(self.name)
        committing = False
        try:
            needs_table = not self._is_prepared and not has_table(self._database)
            joins = self._connection.in_transaction
            begin, commit, undo = "BEGIN IMMEDIATE", "COMMIT", ["ROLLBACK"]
            if joins:
                begin, commit = "SAVEPOINT usermetadata", "RELEASE usermetadata"
                undo = ["ROLLBACK TO usermetadata", commit]
            begun = False
            cursor = self._cursor()
            try:
                cursor.execute(begin)
                begun = True
                if needs_table:
                    create_table(self._database)
                results = write(cursor, calls, self.name)
                committing = not joins
                cursor.execute(commit)
            except BaseException:
                # SQLite has undone some transactions itself, for example on a full disk.
                if self._connection.in_transaction and (begun or not joins):
                    for statement in undo:
                        cursor.execute(statement)
                raise
            if not joins and self._connection.in_transaction:
                raise still_open(self.name)
            # The caller may yet roll back a transaction in which the table was created.
            self._is_prepared = not self._connection.in_transaction
            return results
        except self._errors as error:
            self._is_prepared = False
            raise translate(error, self.name, committing=committing) from error

    def close(self) -> None:
        """Close the connection, unless it is the caller's."""
        with self.batches.exclusive():
            self._closed = True
            if not self._is_borrowed:
                self._connection.close()

    def before_fork(self) -> None:
        """Wait for the call under way, for as long as the timeout."""
        self._has_turn_for_fork = acquire(self.batches.turn, self._timeout)

    def after_fork_in_parent(self) -> None:
        """Let the other threads go on."""
        if self._has_turn_for_fork:
            self._has_turn_for_fork = False
            self.batches.turn.release()

    def after_fork_in_child(self) -> None:
        """A thread of the parent may have had its turn."""
        self._at_end.detach()
        self._start()

    def _prepare(self) -> None:
        if not has_table(self._database):
            self._write_together([("", ())])
        # The caller may yet roll back a transaction in which the table was created.
        self._is_prepared = not self._connection.in_transaction

    def _cursor(self) -> sqlite3.Cursor:
        cursor = self._connection.cursor()
        cursor.row_factory = None  # the caller may have set one
        return cursor

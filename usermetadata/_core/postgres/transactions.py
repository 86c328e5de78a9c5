"""The transaction of one read or write: a separate one in the pool, or the caller's."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import AsyncCursor, Cursor
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from usermetadata._core.postgres.outcomes import (
    UncommittedError,
    at_commit_of_citus,
    before_commit,
    check_committed,
    is_gone,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from psycopg import Connection

    from usermetadata._core.postgres.statements import Table


_ADAPTERS = AdaptersMap(psycopg.adapters)


class PlainCursor(Cursor[Any]):
    """A cursor with psycopg's default conversions, regardless of the application's."""

    @property
    def adapters(self) -> AdaptersMap:
        """How values are converted."""
        return _ADAPTERS


class PlainAsyncCursor(AsyncCursor[Any]):
    """The same, on a connection for asyncio."""

    @property
    def adapters(self) -> AdaptersMap:
        """How values are converted."""
        return _ADAPTERS


@contextmanager
def pipeline(connection: Connection[Any]) -> Generator[None, None, None]:
    """Send what is executed in a block together; raise the first error."""
    failed: psycopg.Error | None = None
    try:
        with connection.pipeline():
            try:
                yield
            except psycopg.Error as error:
                failed = error  # psycopg would log the error of the pipeline's end
    except psycopg.Error:
        if failed is None:
            raise
    except IndexError as error:  # psycopg may miss an error of the end, as of a deferred constraint
        if failed is None:
            raise psycopg.OperationalError("the end of the pipeline failed") from error
    if failed is not None:
        raise failed


class Statement(NamedTuple):
    """A statement and its parameters, by name; one without any cannot be prepared."""

    text: bytes
    parameters: Mapping[str, object] | None = None


_BEGIN, _COMMIT = Statement(b"BEGIN"), Statement(b"COMMIT")


def as_json(value: object) -> str:
    """Return a parameter as JSON text."""
    return json.dumps(value, ensure_ascii=False)


class Answer(NamedTuple):
    """The answer to a statement: its rows, the number of stored rows, and the command tag."""

    rows: list[tuple[Any, ...]]
    affected: int
    status: str | None


class Transaction(ABC):
    """The transaction of one read or write; each method is one round trip.

    Args:
        table: the table that the statements are for.

    Attributes:
        table: the table, as passed.
        timeout: milliseconds that a statement waits for a lock; ``None`` means the session's
            setting.
        user_id_length: the largest length of a user id in the table.
    """

    timeout: str | None = None

    def __init__(self, table: Table) -> None:
        self.table = table
        self.user_id_length = table.user_id_length

    @abstractmethod
    def at_once(self, statements: Sequence[Statement]) -> list[Answer]:
        """Begin, execute the statements and commit."""

    def write_at_once(self, statements: Sequence[Statement]) -> list[Answer]:
        """Do the same, and limit the waits for locks of portable statements."""
        return self.at_once(statements)

    @abstractmethod
    def begin(self, statements: Sequence[Statement]) -> list[Answer]:
        """Begin and execute the statements."""

    @abstractmethod
    def go_on(self, statements: Sequence[Statement]) -> list[Answer]:
        """Execute the statements in what was begun."""

    @abstractmethod
    def end(self, statements: Sequence[Statement]) -> list[Answer]:
        """Execute the statements and commit what was begun."""

    @abstractmethod
    def undo(self) -> None:
        """Undo the failed transaction, so that the work can be done in another way."""


class PooledTransaction(Transaction):
    """A transaction on a connection of the storage's pool."""

    def __init__(
        self, table: Table, connection: Connection[Any], timeout: str, user_id_length: int
    ) -> None:
        super().__init__(table)
        self.timeout = timeout
        self.user_id_length = user_id_length  # another thread may forget the table's
        self._connection = connection

    def at_once(self, statements: Sequence[Statement]) -> list[Answer]:
        """Execute the statements: a pipeline is one transaction, without BEGIN and COMMIT."""
        with pipeline(self._connection) if len(statements) > 1 else nullcontext():
            cursors = self._execute(statements)
        return [answer(cursor) for cursor in cursors]

    def write_at_once(self, statements: Sequence[Statement]) -> list[Answer]:
        """Execute the statements between BEGIN and COMMIT, in one pipeline."""
        first = [_BEGIN, *self.table.limits(self.timeout)]
        return self._commit([*first, *statements])[len(first) :]

    def begin(self, statements: Sequence[Statement]) -> list[Answer]:
        """Begin; an error before ``end`` leaves a transaction, which ``Connections`` rolls back."""
        first = [_BEGIN, *self.table.limits(self.timeout)]
        return self.go_on([*first, *statements])[len(first) :]

    def go_on(self, statements: Sequence[Statement]) -> list[Answer]:
        """Execute the statements."""
        with before_commit(), pipeline(self._connection):
            cursors = self._execute(statements)
        if self._connection.pgconn.transaction_status != TransactionStatus.INTRANS:
            raise UncommittedError("the transaction has ended before its COMMIT")
        return [answer(cursor) for cursor in cursors]

    def end(self, statements: Sequence[Statement]) -> list[Answer]:
        """Commit, if the connection is still there."""
        if is_gone(self._connection):
            with before_commit():
                self._connection.execute("SELECT 1")  # its error is the server's reason
            raise UncommittedError
        return self._commit(statements)

    def undo(self) -> None:
        """Roll back a transaction that a pooler has left open."""
        with before_commit():
            self._connection.rollback()

    def _commit(self, statements: Sequence[Statement]) -> list[Answer]:
        try:
            with pipeline(self._connection):
                *cursors, committed = self._execute([*statements, _COMMIT])
        except psycopg.Error as error:
            if self.table.engine == "Citus":
                status = self._connection.pgconn.transaction_status
                raise at_commit_of_citus(error, status) from error
            raise
        check_committed(committed.statusmessage)
        return [answer(cursor) for cursor in cursors]

    def _execute(self, statements: Sequence[Statement]) -> list[Cursor[tuple[Any, ...]]]:
        # Ignore a borrowed pool's cursor and row factories.
        return [
            PlainCursor(self._connection, row_factory=tuple_row).execute(*statement)
            for statement in statements
        ]


def answer(cursor: Cursor[tuple[Any, ...]]) -> Answer:
    """Return what a cursor has received."""
    rows = cursor.fetchall() if cursor.description else []
    return Answer(rows, cursor.rowcount, cursor.statusmessage)

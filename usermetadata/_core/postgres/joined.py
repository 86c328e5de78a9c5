"""The caller's PostgreSQL connection, during a block of ``within``."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg import errors

from usermetadata._core.joining import ended
from usermetadata._core.postgres.channels import open_channel
from usermetadata._core.postgres.outcomes import (
    before_commit,
    check_committed,
    is_of_an_old_statement,
    translate,
    translate_joined,
)
from usermetadata._core.postgres.statements import OF_THE_TABLE, Table
from usermetadata._core.postgres.transactions import Statement, Transaction
from usermetadata.exceptions import StorageUnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from usermetadata._core.joining import DriversConnection
    from usermetadata._core.postgres.channels import Channel
    from usermetadata._core.postgres.transactions import Answer

T = TypeVar("T")

Tables = WeakKeyDictionary[Any, Table]
"""The table as each driver's connection sees it; its search_path is the caller's."""


class JoinedTransaction(Transaction):
    """A savepoint of the caller's transaction; in autocommit mode, a transaction.

    Each begins with a check that the table is still the described one. The check needs no extra
    round trip.
    """

    def __init__(self, table: Table, channel: Channel, *, is_own: bool) -> None:
        super().__init__(table)
        self._channel = channel
        self._is_own = is_own
        self._begin, self._commit = _OWN if is_own else _SAVEPOINT
        self._is_open = False

    def at_once(self, statements: Sequence[Statement]) -> list[Answer]:
        """Send a savepoint, the statements and its release together."""
        self._is_open = True
        first = [self._begin, *self._check()]
        answers = self._channel.exchange([*first, *statements, self._commit])
        self._committed(answers.pop())
        return answers[len(first) :]

    def begin(self, statements: Sequence[Statement]) -> list[Answer]:
        """Send a savepoint and the statements together."""
        self._is_open = True
        first = [self._begin, *self._check()]
        return self.go_on([*first, *statements])[len(first) :]

    def go_on(self, statements: Sequence[Statement]) -> list[Answer]:
        """Send the statements."""
        with before_commit():
            return self._channel.exchange(statements)

    def end(self, statements: Sequence[Statement]) -> list[Answer]:
        """Send the statements and the savepoint's release together."""
        answers = self._channel.exchange([*statements, self._commit])
        self._committed(answers.pop())
        return answers

    def undo(self) -> None:
        """Roll back to the savepoint, which leaves the caller's transaction usable."""
        if self._is_open and not self._channel.is_closed:
            self._is_open = False
            # After an error in a pipeline, psycopg may take statements as prepared that are not. It
            # forgets all prepared statements after a ROLLBACK whose text is new to it.
            number = next(_numbers)
            statements = [Statement(b"ROLLBACK /* %d */" % number)]
            if not self._is_own:
                statements = [
                    Statement(b"ROLLBACK TO usermetadata /* %d */" % number),
                    self._commit,
                ]
            # The first error matters more.
            with suppress(psycopg.Error):
                self._channel.exchange(statements)

    def _check(self) -> list[Statement]:
        table = self.table
        return [Statement(table.check), *table.index_checks] if table.check else []

    def _committed(self, answer: Answer) -> None:
        self._is_open = False
        if self._is_own:
            check_committed(answer.status)


_OWN = (Statement(b"BEGIN"), Statement(b"COMMIT"))
_SAVEPOINT = (Statement(b"SAVEPOINT usermetadata"), Statement(b"RELEASE usermetadata"))
_numbers = itertools.count()


class JoinedConnection:
    """Reads and writes through the caller's connection.

    Args:
        find: returns the caller's connection.
        tables: the tables that were described before.
        name: the table's name, as passed to the storage.
        is_portable: whether portable statements were asked for.

    Raises:
        InvalidInputError: the connection is of another kind.
    """

    name = "the caller's connection"

    def __init__(
        self,
        find: Callable[[], DriversConnection],
        tables: Tables,
        name: tuple[str, ...],
        *,
        is_portable: bool,
    ) -> None:
        self._find = find
        self._tables = tables
        self._name = name
        self._is_portable = is_portable
        self._is_closed = False
        self._turn = threading.Lock()
        self._thread: int | None = None
        open_channel(find())

    def run(
        self, work: Callable[[Transaction], T], absent: T | None = None, *, is_write: bool = False
    ) -> T:
        """Return the result of ``work``, called once; undo its changes if it fails.

        Args:
            work: the work.
            absent: what to return if there is no table; without it, the table is created.
            is_write: whether the work writes.
        """
        with self._exclusive(), self._channel() as channel:
            if channel.is_closed:
                raise StorageUnavailableError(
                    f"{self.name}: it is closed, or was lost; repeat the transaction on another one"
                )
            is_own = False
            table = self._tables.setdefault(
                channel.connection,
                Table(*self._name, is_session_ours=True, is_portable=self._is_portable),
            )
            try:
                is_own = channel.enter()
                transaction = JoinedTransaction(table, channel, is_own=is_own)
                try:
                    return _attempt(transaction, channel, work, absent)
                except psycopg.Error as error:
                    if not _is_stale(error, table):
                        raise
                # The table, or the search_path, has changed since it was described.
                table.forget()
                return _attempt(transaction, channel, work, absent)
            except psycopg.Error as error:
                if isinstance(error, OF_THE_TABLE):
                    table.forget()
                if is_own:
                    raise translate(error, self.name, is_write=is_write) from error
                raise translate_joined(error, self.name) from error

    def check_open(self) -> None:
        """Raise ``UsageError`` if the block has ended."""
        if self._is_closed:
            raise ended(self.name)

    def close(self) -> None:
        """End the block; the connection stays open."""
        self._is_closed = True

    @contextmanager
    def _channel(self) -> Generator[Channel, None, None]:
        found = self._find()
        channel = open_channel(found)
        try:
            yield channel
        finally:
            if channel.is_closed:
                found.invalidate()

    @contextmanager
    def _exclusive(self) -> Generator[None, None, None]:
        if self._thread == threading.get_ident():
            raise UsageError(
                f"{self.name}: a call inside a write of the same thread, by a change or another"
                " task, is not possible; make it before or after"
            )
        with self._turn:
            self.check_open()
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


def _attempt(
    transaction: JoinedTransaction,
    channel: Channel,
    work: Callable[[Transaction], T],
    absent: T | None,
) -> T:
    table = transaction.table
    try:
        if not table.user_id_length:
            table.learn(transaction.at_once([table.description])[0].rows, channel.encoding)
        if not table.user_id_length and absent is not None:
            return absent
        if not table.user_id_length:
            _create(transaction, channel)
        transaction.user_id_length = table.user_id_length
        return work(transaction)
    except BaseException:
        transaction.undo()
        raise


def _create(transaction: JoinedTransaction, channel: Channel) -> None:
    table = transaction.table
    try:
        *_, described = transaction.at_once([*table.creation, table.description])
    except errors.UniqueViolation:  # another program has created it under another lock
        transaction.undo()
        [described] = transaction.at_once([table.description])
    table.learn(described.rows, channel.encoding)


def _is_stale(error: psycopg.Error, table: Table) -> bool:
    """Tell whether an error may come from an outdated description of the table."""
    if isinstance(error, errors.FeatureNotSupported):
        # A statement was prepared before the table was changed, or Citus has refused PostgreSQL's.
        return (
            not table.is_portable
            or is_of_an_old_statement(error)
            or "cached statement" in str(error)
        )
    return isinstance(error, errors.DivisionByZero)

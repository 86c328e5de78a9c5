"""What PostgreSQL's answers and errors mean: committed, undone, or unknown."""

from __future__ import annotations

import json
import selectors
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import Cursor, errors
from psycopg.pq import TransactionStatus

from usermetadata.exceptions import (
    InvalidInputError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Generator

    from psycopg import Connection


class UncommittedError(psycopg.OperationalError):
    """The connection was lost before COMMIT was sent, or COMMIT was answered with ROLLBACK."""


NOT_STORED = "usermetadata: not stored: "
"""Begins the text of an error that a statement raises; the user's id follows, as JSON."""


class NoAnswerError(psycopg.OperationalError):
    """The server has not answered for as long as a read may take."""


class UnsettledError(psycopg.OperationalError):
    """The answer had no error, but the work may not have been committed."""


# These answers to a statement mean that the server has undone the transaction and that another
# attempt may succeed. So the work can be repeated without losing anything or doing it twice.
UNDONE = (
    UncommittedError,
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.AdminShutdown,  # a restart, a failover, pg_terminate_backend
    errors.ReadOnlySqlTransaction,  # a failover: another connection may find the primary
    errors.InvalidSqlStatementName,  # its pipeline failed before it was prepared
)
_ADVICE: list[tuple[tuple[type[psycopg.Error], ...], str]] = [
    (
        (errors.IdleInTransactionSessionTimeout, errors.TransactionTimeout),
        (
            ": the function took longer than the server allows a transaction; nothing was written;"
            " make it quicker, or raise the server's limit"
        ),
    ),
    (
        (errors.ReadOnlySqlTransaction,),
        "; connect to a server that accepts writes, and begin the transaction READ WRITE",
    ),
    (
        (errors.InsufficientPrivilege,),
        "; grant the right to this role, or connect as another role",
    ),
    ((errors.InvalidSchemaName,), "; create it, or pass another schema"),
    ((errors.DiskFull,), "; free some space on the server and repeat the call"),
    (
        (errors.FeatureNotSupported,),
        (
            ": a rule on the table, or a view in its place, is the likely cause; nothing was"
            " written; drop the rule, or name another table"
        ),
    ),
]
_IN_THE_WAY = (
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.LockNotAvailable,
    errors.QueryCanceled,
)


@contextmanager
def before_commit() -> Generator[None, None, None]:
    """Mark a block before COMMIT: if the connection is lost there, the work can be repeated."""
    try:
        yield
    except psycopg.Error as error:
        if is_lost(error):
            raise UncommittedError(*error.args) from error
        raise


_REPEATED = (errors.SerializationFailure, errors.DeadlockDetected)


def at_commit_of_citus(error: psycopg.Error, status: int) -> psycopg.Error:
    """Return the error of a pipeline that ended with COMMIT; Citus passes its workers' errors on.

    Args:
        error: the error.
        status: that of the transaction after it.
    """
    if status == TransactionStatus.INERROR and is_lost(error):
        # A worker was lost before COMMIT, and the coordinator is still there to roll back.
        return UncommittedError(*error.args)
    if status == TransactionStatus.IDLE and not isinstance(error, _REPEATED):
        # COMMIT has failed on one worker, and others may have executed it.
        return UnsettledError(*error.args)
    return error


def check_committed(status: str | None) -> None:
    """Check the answer to the COMMIT of a transaction that was begun with BEGIN."""
    # A server answers the COMMIT of an aborted transaction with ROLLBACK, which is no error.
    if status != "COMMIT":
        raise UncommittedError(f"COMMIT was answered with {status}")


def settle(connection: Connection[Any]) -> None:
    """Return when no transaction is open, and so the changes are committed.

    A statement or a pipeline without BEGIN is a transaction by itself. A pooler may send a BEGIN
    that the client did not ask for: pgpool-II does so to look up a table, and leaves the end of the
    transaction to the client.
    """
    # The status is that of the last answer: no round trip.
    if connection.pgconn.transaction_status == TransactionStatus.IDLE:
        return
    # psycopg's commit() does not say what the answer was.
    answer = Cursor(connection).execute("COMMIT", prepare=False).statusmessage
    if answer != "COMMIT":
        raise UnsettledError(f"the COMMIT of an open transaction was answered with {answer}")
    if connection.pgconn.transaction_status != TransactionStatus.IDLE:
        raise UnsettledError("a transaction is still open after COMMIT")


def check_replicated(notices: Collection[str | None]) -> None:
    """Check that the wait of a commit for its synchronous standby was not cancelled.

    Args:
        notices: the names of the server's functions that sent notices, whose texts may be
            translated.
    """
    if "SyncRepWaitForLSN" in notices:
        raise UnsettledError(
            "the wait for a synchronous standby was cancelled; it may miss the write"
        )


_LOST = {errors.CrashShutdown.sqlstate, errors.StatementCompletionUnknown.sqlstate}


def is_lost(error: psycopg.Error) -> bool:
    """Tell whether the connection may have been lost before the server's last answer."""
    if not isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return False
    # None: libpq noticed it. Class 08: a pooler did. A crash undoes what is not committed.
    state = error.sqlstate
    return state is None or state.startswith("08") or state in _LOST


def translate(error: psycopg.Error, name: str, *, is_write: bool) -> Exception:
    """Return the library's error for the driver's, after an attempt that is not repeated.

    Args:
        error: the driver's error.
        name: the name of the database.
        is_write: whether the work may have written.
    """
    _, is_not_stored, rest = (error.diag.message_primary or str(error)).partition(NOT_STORED)
    # The further lines quote rows, also in a traceback.
    error.args = (first_line(error),)
    text = f"{name}: {error}"
    if is_not_stored:
        user_id, _ = json.JSONDecoder().raw_decode(rest)
        return StorageError(
            f"{name}: the database did not store, or remove, the metadata of user {user_id!r},"
            " without an error: a trigger or a row-level policy on the table is the likely cause;"
            " nothing was written; except this table from it, or name another"
        )
    if isinstance(error, errors.ForeignKeyViolation):
        return InvalidInputError(
            f"{text}; pass the app_id of an app of the SuperTokens core whose table this is"
        )
    if isinstance(error, _IN_THE_WAY):
        return StorageBusyError(f"{text}; nothing was done; repeat the call")
    if is_write and is_lost(error) and not isinstance(error, UNDONE):
        if not isinstance(error, UnsettledError):
            text += ": the connection was lost during a write"
        return OutcomeUnknownError(
            f"{text}; the write was done whole or not at all; read to find out"
        )
    if isinstance(error, errors.AdminShutdown) or is_lost(error):
        # Citus reports which worker cannot be reached.
        is_worker = isinstance(error.__cause__, errors.ConnectionFailure)
        if (isinstance(error, UncommittedError) and not is_worker) or (
            "statement pooling mode" in text
        ):
            text += (
                ": behind a pooler, its statement mode is the likely cause: set pool_mode to"
                " transaction"
            )
        return StorageUnavailableError(
            f"{text}; nothing was done; check the server and repeat the call"
        )
    text += next((advice for kinds, advice in _ADVICE if isinstance(error, kinds)), "")
    return StorageError(text)


def translate_joined(error: psycopg.Error, name: str) -> Exception:
    """Return the library's error for the driver's, from inside a transaction of the caller's."""
    translated = translate(error, name, is_write=False)
    if isinstance(translated, StorageBusyError):
        return StorageBusyError(f"{name}: {error}; roll the whole transaction back and repeat it")
    if isinstance(translated, StorageUnavailableError):
        return StorageUnavailableError(
            f"{name}: {error}: it was lost before the transaction was committed, so nothing of the"
            " transaction is stored; repeat it on another connection"
        )
    return translated


# For a single socket, poll is faster than epoll.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


def is_gone(connection: Connection[Any]) -> bool:
    """Tell whether the server has closed a connection, without a round trip."""
    if connection.closed:
        return True
    with _Selector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        # No statement was sent. So data to read means that the server is closing the connection.
        return bool(selector.select(0))


def first_line(error: psycopg.Error) -> str:
    """Return the first line of the driver's text, without the value that it may quote."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition('"')[0].rstrip(": ") if isinstance(error, psycopg.DataError) else line


def is_of_an_old_statement(error: BaseException) -> bool:
    """Tell whether a statement was prepared before the table was changed."""
    return (
        isinstance(error, errors.FeatureNotSupported)
        and error.diag.source_function == "RevalidateCachedQuery"
    )

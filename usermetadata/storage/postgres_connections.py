"""The PostgreSQL storage's connections: a pool of its own, or one that is borrowed."""

from __future__ import annotations

import os
import random
import selectors
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import Cursor, conninfo, errors
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from usermetadata.exceptions import (
    InvalidInputError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from usermetadata.forking import notice, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from psycopg import Connection

T = TypeVar("T")

_ATTEMPTS = 10
_LONGEST_PAUSE = 0.5  # seconds between two of them
# A pool that has found no server tries less and less often, unless it gives up and is asked again.
_RECONNECT_TIMEOUT, _ASK_AGAIN = 1.0, 2.0  # seconds


class UncommittedError(psycopg.OperationalError):
    """The connection was lost before COMMIT was sent, or COMMIT was answered with ROLLBACK."""


class UnsettledError(psycopg.OperationalError):
    """The work was answered without an error, and yet it may not have been committed."""


# With one of these as its answer to a statement, a server says that it has undone the transaction,
# and that the next attempt may do better: so to repeat it loses nothing and does nothing twice.
_UNDONE = (
    UncommittedError,
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.AdminShutdown,  # a restart, a failover, pg_terminate_backend
    errors.ReadOnlySqlTransaction,  # it was the primary once; another connection may find the new
    errors.InvalidSqlStatementName,  # a pipeline failed before it was prepared, as psycopg thinks
)
_IN_THE_WAY = (
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.LockNotAvailable,
    errors.QueryCanceled,
)

# What libpq does if the database's URL says nothing of it: it notices a peer that is gone.
_DEFAULTS = {
    "connect_timeout": "10",
    "tcp_user_timeout": "30000",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "fallback_application_name": "usermetadata",
}
_ENCODING = {"client_encoding": "utf8"}  # whatever the environment says


@contextmanager
def before_commit() -> Generator[None, None, None]:
    """Whatever is lost in this block has been undone, and can be repeated."""
    try:
        yield
    except psycopg.Error as error:
        if _is_lost(error):
            raise UncommittedError(*error.args) from error
        raise


def check_committed(cursor: Cursor[Any]) -> None:
    """Check the answer to the COMMIT of a transaction that has begun with BEGIN."""
    # A server answers the COMMIT of an aborted transaction with ROLLBACK, which is no error.
    if cursor.statusmessage != "COMMIT":
        raise UncommittedError(f"COMMIT was answered with {cursor.statusmessage}")


def settle(connection: Connection[Any]) -> None:
    """Return when no transaction is open: only then is what was done also committed.

    A statement or a pipeline without BEGIN is a transaction of its own, and ends by itself. A
    pooler may have sent a BEGIN in between that the client did not ask for: pgpool-II does so to
    look up a table, and leaves the end of the transaction to the client.
    """
    # As of the last answer: to look costs no round trip.
    if connection.pgconn.transaction_status == TransactionStatus.IDLE:
        return
    # psycopg's commit() does not say what the answer was.
    answer = Cursor(connection).execute("COMMIT", prepare=False).statusmessage
    if answer != "COMMIT":
        raise UnsettledError(f"the COMMIT of an open transaction was answered with {answer}")
    if connection.pgconn.transaction_status != TransactionStatus.IDLE:
        raise UnsettledError("a transaction is still open after COMMIT")


class Connections:
    """Lends connections in autocommit mode, opened when they are needed."""

    def __init__(
        self, database: str | ConnectionPool[Any], max_connections: int, timeout: float
    ) -> None:
        self._borrowed: ConnectionPool[Any] | None = None
        self._arguments: dict[str, Any] = {}
        self.name = "the borrowed pool"
        if isinstance(database, str):
            self._arguments = _parse(database)
            self.name = _name(self._arguments)
        elif isinstance(database, ConnectionPool):
            self._borrowed = database
        else:
            raise InvalidInputError(
                f"database: {type(database).__name__} is neither a URL nor a ConnectionPool:"
                ' pass "postgresql://..."'
            )
        self._max_connections = max_connections
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pool: ConnectionPool[Any] | None = None
        self._close_pool: weakref.finalize[[], Connections] | None = None
        self._lent: set[Connection[Any]] = set()
        self._closed = False
        self._has_connected = False
        watch(self)

    def run_first(self, work: Callable[[Connection[Any]], object]) -> None:
        """Do what comes before all else, on a connection that says why it cannot be opened."""
        if self._opened() is self._borrowed or self._has_connected:
            self.run(work, is_write=False)
            return
        # The pool would try again and again, and not tell.
        with self._connect() as connection:
            try:
                work(connection)
                settle(connection)
            except psycopg.Error as error:
                raise self._translated(error, is_write=False) from error
        self._has_connected = True

    def run(self, work: Callable[[Connection[Any]], T], *, is_write: bool = False) -> T:
        """Let ``work`` have a connection, and another one where it is safe to do it again.

        What it has done is committed when this returns.
        """
        process = os.getpid()
        attempt = 1
        while True:
            try:
                with self._lend() as connection:
                    result = work(connection)
                    settle(connection)
                    return result
            except psycopg.Error as error:
                if os.getpid() != process:
                    raise StorageError(
                        f"{self.name}: this process was forked inside a write, which is its"
                        " parent's to end"
                    ) from error
                can_repeat = isinstance(error, _UNDONE) or (_is_lost(error) and not is_write)
                if not can_repeat or attempt == _ATTEMPTS:
                    raise self._translated(error, is_write=is_write) from error
            # So that those who have met do not meet again; nothing secret.
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.01 * 2**attempt)))  # noqa: S311
            attempt += 1

    def close(self) -> None:
        """Close the pool, unless it is the caller's."""
        with self._lock:
            self._closed = True
        if self._close_pool is not None:
            self._close_pool()

    def before_fork(self) -> None:
        """Nothing to wait for: the server's side of a connection does not fork."""

    def after_fork_in_parent(self) -> None:
        """Nothing has changed."""

    def after_fork_in_child(self) -> None:
        """Leave the parent its connections, and open others when they are needed."""
        pool = self._borrowed or self._pool
        if pool is not None:
            # Not even closed, which would say goodbye to the server in the parent's name.
            _of_the_parent_process.append(pool)
        if self._close_pool is not None:
            self._close_pool.detach()
        with open(os.devnull, "rb") as nothing:
            for connection in self._lent:
                # Whoever uses it goes on here, too, and must not interfere.
                if not connection.closed:
                    os.dup2(nothing.fileno(), connection.fileno())
        self._lent = set()
        self._lock = threading.Lock()
        self._pool = None

    @contextmanager
    def _lend(self) -> Generator[Connection[Any], None, None]:
        pool = self._opened()
        connection = self._take(pool)
        was_autocommit = connection.autocommit
        self._lent.add(connection)
        try:
            if connection.pgconn.transaction_status != TransactionStatus.IDLE:
                # The check of a borrowed pool, say, has left open what is no part of the work.
                with before_commit():
                    connection.rollback()
            if not was_autocommit:
                connection.autocommit = True
            yield connection
        except (errors.ReadOnlySqlTransaction, errors.InvalidSqlStatementName):
            connection.close()
            raise
        except BaseException:
            # Where that fails, what has failed before matters more.
            with suppress(psycopg.Error):
                connection.rollback()
            raise
        finally:
            self._lent.discard(connection)
            try:
                if not was_autocommit and not connection.closed:
                    connection.autocommit = False
            except psycopg.Error:  # an exception from elsewhere has left it in mid-statement
                connection.close()
            pool.putconn(connection)

    def _take(self, pool: ConnectionPool[Any]) -> Connection[Any]:
        """Take a connection that is still open; the pool opens others for those that are not."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection: Connection[Any] = pool.getconn(
                    min(_ASK_AGAIN, deadline - time.monotonic())
                )
            except (PoolTimeout, TooManyRequests) as error:
                if isinstance(error, PoolTimeout) and time.monotonic() < deadline:
                    continue
                if self._borrowed is None:
                    self._connect().close()
                raise StorageBusyError(
                    f"{self.name}: no connection was free in time: let the pool open more"
                    " (max_connections), repeat the call, or see whether the server is up"
                ) from error
            except PoolClosed as error:
                raise UsageError(
                    f"{self.name}: the pool is closed: pass one that is open"
                ) from error
            if not is_gone(connection):
                return connection
            connection.close()
            pool.putconn(connection)

    def _opened(self) -> ConnectionPool[Any]:
        notice()
        with self._lock:
            if self._closed:
                raise UsageError(f"this PostgresStorage of {self.name} is closed: make a new one")
            if self._borrowed is not None:
                if self._borrowed in _of_the_parent_process:
                    raise UsageError(
                        f"{self.name} is the parent process's: make one in each process"
                    )
                return self._borrowed
            if self._pool is None:
                self._pool = ConnectionPool(
                    min_size=0,
                    max_size=self._max_connections,
                    kwargs={**self._arguments, "autocommit": True},
                    configure=_configure,
                    reconnect_timeout=_RECONNECT_TIMEOUT,
                    name="usermetadata",
                    open=True,
                )
                # Also for who forgets it: the pool's threads would hold up the end of the process.
                self._close_pool = weakref.finalize(self, self._pool.close)
            return self._pool

    def _connect(self) -> Connection[Any]:
        """Open a connection beside the pool's, which only knows that it has none, and not why."""
        try:
            return psycopg.connect(**self._arguments, autocommit=True)
        except psycopg.Error as error:
            raise StorageUnavailableError(f"{self.name}: {_first_line(error)}") from error

    def _translated(self, error: psycopg.Error, *, is_write: bool) -> Exception:
        text = f"{self.name}: {_first_line(error)}"
        if isinstance(error, errors.ForeignKeyViolation):
            return InvalidInputError(
                f"{text}: is app_id an app of the SuperTokens core whose table this is?"
            )
        if isinstance(error, errors.UndefinedColumn):
            return StorageError(
                f"{text}: its table is another program's, or that of a SuperTokens core before 6.0:"
                " name another"
            )
        if isinstance(error, _IN_THE_WAY):
            return StorageBusyError(f"{text}: nothing was done, so the call may be repeated")
        if is_write and _is_lost(error) and not isinstance(error, _UNDONE):
            if not isinstance(error, UnsettledError):
                text += ": the connection was lost during a write"
            return OutcomeUnknownError(
                f"{text}; the write was done whole or not at all: read to find out"
            )
        if isinstance(error, errors.AdminShutdown) or _is_lost(error):
            return StorageUnavailableError(f"{text}: nothing was done")
        return StorageError(text)


_of_the_parent_process: list[ConnectionPool[Any]] = []


def _is_lost(error: psycopg.Error) -> bool:
    """Tell whether the server may not have had the last word."""
    if not isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return False
    # None: libpq itself noticed. Class 08: a pooler did. A crash undoes what has not been done.
    state = error.sqlstate
    return state is None or state.startswith("08") or state == errors.CrashShutdown.sqlstate


def _configure(connection: Connection[Any]) -> None:
    """Prepare no statements behind a pooler, where the next one's session is somebody else's."""
    [served_by] = connection.execute("SELECT pg_backend_pid()").fetchone() or [None]
    # A pooler has told us a number of its own.
    if served_by != connection.info.backend_pid:
        connection.prepare_threshold = None
    settle(connection)


# Where there is poll, it is faster than what is best for many sockets.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


def is_gone(connection: Connection[Any]) -> bool:
    """Tell whether the server has closed a connection; it costs no round trip."""
    if connection.closed:
        return True
    with _Selector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        # Nobody has asked anything: whatever there is to read can only be a farewell.
        return bool(selector.select(0))


def _first_line(error: psycopg.Error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parse(database: str) -> dict[str, Any]:
    try:
        database.encode()
        return _DEFAULTS | conninfo.conninfo_to_dict(database) | _ENCODING
    except (psycopg.ProgrammingError, UnicodeEncodeError):
        # Without its text, which may quote the password.
        raise InvalidInputError(
            'database: it cannot be read: pass "postgresql://user@host/name"'
        ) from None


def _name(arguments: dict[str, Any]) -> str:
    host = arguments.get("host") or "localhost"
    return f"{host}/{arguments.get('dbname') or arguments.get('user') or 'postgres'}"

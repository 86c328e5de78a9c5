"""The PostgreSQL storage's connections: a pool that it opens, or a borrowed one."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import conninfo, errors
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from usermetadata._core.forking import ForkHooks, notice, watch
from usermetadata._core.postgres.outcomes import (
    UNDONE,
    before_commit,
    check_replicated,
    first_line,
    is_gone,
    is_lost,
    settle,
    translate,
)
from usermetadata.exceptions import (
    InvalidInputError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from psycopg import Connection

T = TypeVar("T")

_ATTEMPTS = 10
_LONGEST_PAUSE = 0.5  # seconds between two of them
# A pool without a server retries ever more rarely, unless it gives up and is asked again.
_RECONNECT_TIMEOUT, _ASK_AGAIN = 1.0, 2.0  # seconds
_POOL = "usermetadata"  # its threads have names that begin with it
_TIME_TO_STOP = 5.0  # seconds


# Defaults for libpq, so that it notices a server that is gone; the URL overrides them.
_DEFAULTS = {
    "connect_timeout": "10",
    "tcp_user_timeout": "30000",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "fallback_application_name": "usermetadata",
}
_ENCODING = {"client_encoding": "utf8"}  # overrides the environment


class Connections(ForkHooks):
    """A pool of connections in autocommit mode, opened when they are needed."""

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
                f"database: {type(database).__name__} is neither a URL nor a ConnectionPool;"
                ' pass "postgresql://..."'
            )
        self._max_connections = max_connections
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pool: ConnectionPool[Any] | None = None
        self._close_pool: weakref.finalize[[ConnectionPool[Any]], Connections] | None = None
        self._in_use: set[Connection[Any]] = set()
        self._closed = False
        self._has_connected = False
        watch(self)

    def run_first(self, work: Callable[[Connection[Any]], object]) -> None:
        """Run the first work of all on a connection beside the pool; its error has a cause."""
        if self._opened() is self._borrowed or self._has_connected:
            self.run(work, is_write=False)
            return
        # The pool would retry until the timeout, and not say why.
        with self._connect() as connection:
            try:
                work(connection)
                settle(connection)
            except psycopg.Error as error:
                raise translate(error, self.name, is_write=False) from error
        self._has_connected = True

    def run(self, work: Callable[[Connection[Any]], T], *, is_write: bool = False) -> T:
        """Run ``work`` with a connection, and again with another one where that is safe.

        Its changes are committed when this returns.
        """
        process = os.getpid()
        attempt = 1
        notices: list[str | None] = []

        def note(notice: errors.Diagnostic) -> None:
            notices.append(notice.source_function)  # it cannot be read later

        while True:
            try:
                with self._connection() as connection:
                    notices.clear()
                    connection.add_notice_handler(note)
                    try:
                        result = work(connection)
                        settle(connection)
                    finally:
                        connection.remove_notice_handler(note)
                    check_replicated(notices)
                    return result
            except psycopg.Error as error:
                if os.getpid() != process:
                    raise StorageError(
                        f"{self.name}: this process was forked inside a write, which only its"
                        " parent process can end; repeat the call there"
                    ) from error
                can_repeat = isinstance(error, UNDONE) or (is_lost(error) and not is_write)
                if not can_repeat or attempt == _ATTEMPTS:
                    raise translate(error, self.name, is_write=is_write) from error
            # A random pause, so that the same writers do not collide again.
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.01 * 2**attempt)))  # noqa: S311
            attempt += 1

    def close(self) -> None:
        """Close the pool, unless it is the caller's."""
        with self._lock:
            self._closed = True
        if self._close_pool is not None:
            self._close_pool()

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent; others are opened when they are needed."""
        pool = self._borrowed or self._pool
        if pool is not None:
            # Closing them would end the parent's sessions on the server.
            _of_the_parent_process.append(pool)
        if self._close_pool is not None:
            self._close_pool.detach()
        with open(os.devnull, "rb") as nothing:
            for connection in self._in_use:
                # The code that uses it goes on in the child, and must not reach the server.
                if not connection.closed:
                    os.dup2(nothing.fileno(), connection.fileno())
        self._in_use = set()
        self._lock = threading.Lock()
        self._pool = None

    @contextmanager
    def _connection(self) -> Generator[Connection[Any], None, None]:
        pool = self._opened()
        connection = self._take(pool)
        was_autocommit = connection.autocommit
        self._in_use.add(connection)
        try:
            if connection.pgconn.transaction_status != TransactionStatus.IDLE:
                # A borrowed pool's check may have left a transaction open.
                with before_commit():
                    connection.rollback()
            if not was_autocommit:
                connection.autocommit = True
            yield connection
        except (errors.ReadOnlySqlTransaction, errors.InvalidSqlStatementName):
            connection.close()
            raise
        except BaseException:
            # If the rollback fails, the first error matters more.
            with suppress(psycopg.Error):
                connection.rollback()
            raise
        finally:
            self._in_use.discard(connection)
            try:
                if not was_autocommit and not connection.closed:
                    connection.autocommit = False
            except psycopg.Error:  # an interrupt has left it in the middle of a statement
                connection.close()
            pool.putconn(connection)

    def _take(self, pool: ConnectionPool[Any]) -> Connection[Any]:
        """Take a connection that is still open; the pool replaces those that are not."""
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
                    f"{self.name}: no connection was free in time; let the pool open more"
                    " (max_connections), repeat the call, or check whether the server is up"
                ) from error
            except PoolClosed as error:
                raise UsageError(
                    f"{self.name}: the pool is closed; pass one that is open"
                ) from error
            if not is_gone(connection):
                return connection
            connection.close()
            pool.putconn(connection)

    def _opened(self) -> ConnectionPool[Any]:
        notice()
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.name}: this PostgresStorage is closed; make a new one")
            if self._borrowed is not None:
                if self._borrowed in _of_the_parent_process:
                    raise UsageError(
                        f"{self.name}: it belongs to the parent process; make one in each process"
                    )
                return self._borrowed
            if self._pool is None:
                self._pool = ConnectionPool(
                    min_size=0,
                    max_size=self._max_connections,
                    kwargs={**self._arguments, "autocommit": True},
                    configure=_configure,
                    reconnect_timeout=_RECONNECT_TIMEOUT,
                    name=_POOL,
                    open=True,
                )
                # Without close() the pool's threads would delay the end of the process.
                self._close_pool = weakref.finalize(self, _close, self._pool)
            return self._pool

    def _connect(self) -> Connection[Any]:
        """Open a connection beside the pool, which does not say why it has none."""
        try:
            return psycopg.connect(**self._arguments, autocommit=True)
        except psycopg.Error as error:
            raise StorageUnavailableError(f"{self.name}: {first_line(error)}") from error


def _close(pool: ConnectionPool[Any]) -> None:
    """Close a pool, without waiting for connections that a pooler does not let through."""
    stats = pool.get_stats()
    is_connecting = stats["pool_size"] > stats["pool_available"]
    pool.close(timeout=0 if is_connecting else _TIME_TO_STOP)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # A thread that was not waited for ends by itself.
    return not (record.msg.startswith("couldn't stop thread") and _POOL in str(record.args))


logging.getLogger("psycopg.pool").addFilter(_is_worth_logging)

_of_the_parent_process: list[ConnectionPool[Any]] = []


def _configure(connection: Connection[Any]) -> None:
    """Prepare no statements behind a pooler: the next transaction may have another session."""
    [served_by] = connection.execute("SELECT pg_backend_pid()").fetchone() or [None]
    # A pooler reports a process number that it has made up.
    if served_by != connection.info.backend_pid:
        connection.prepare_threshold = None
    settle(connection)


def _parse(database: str) -> dict[str, Any]:
    try:
        database.encode()
        return _DEFAULTS | conninfo.conninfo_to_dict(database) | _ENCODING
    except (psycopg.ProgrammingError, UnicodeEncodeError):
        # The driver's text may quote the password.
        raise InvalidInputError(
            'database: it cannot be parsed; pass "postgresql://user@host/name"'
        ) from None


def _name(arguments: dict[str, Any]) -> str:
    host = arguments.get("host") or "localhost"
    return f"{host}/{arguments.get('dbname') or arguments.get('user') or 'postgres'}"

"""The PostgreSQL storage's connections: a pool that it opens, or a borrowed one."""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import conninfo, errors, waiting
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from usermetadata._core.forking import ForkHooks, notice, watch
from usermetadata._core.greenlets import patched_by
from usermetadata._core.postgres.outcomes import (
    UNDONE,
    NoAnswerError,
    UncommittedError,
    before_commit,
    check_replicated,
    first_line,
    is_gone,
    is_lost,
    is_of_an_old_statement,
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
    from psycopg.abc import PQGen

T = TypeVar("T")

_ATTEMPTS = 10
_LONGEST_PAUSE = 0.5  # seconds between two of them
# A pool without a server retries less and less often, unless it gives up and is asked again.
_RECONNECT_TIMEOUT, _ASK_AGAIN = 1.0, 2.0  # seconds
_POOL = "usermetadata"  # a prefix of its threads' names
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


class _Connection(psycopg.Connection[Any]):
    """A connection with a limit for the time to wait for an answer.

    Attributes:
        patience: the limit in seconds; ``None`` for no limit. The server's own limits do not help
            if the server hangs.
    """

    patience: float | None = None

    def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:
        """Wait for the end of an exchange with the server."""
        if self.patience is not None:
            gen = _limited(gen, self.patience)
        return super().wait(gen, *arguments, **options)


def _limited(gen: PQGen[T], patience: float) -> PQGen[T]:
    deadline = time.monotonic() + patience
    try:
        state = next(gen)
        while True:
            ready = yield state
            # psycopg wakes up several times a second.
            if not ready and time.monotonic() > deadline:
                raise NoAnswerError(f"no answer within {patience} seconds")
            state = gen.send(ready)
    except StopIteration as ended:
        result: T = ended.value
        return result


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
        self._closed = False
        self._has_connected = False
        self._start()
        watch(self)

    def _start(self) -> None:
        """Start without a pool: in a new object or a new process."""
        self._lock = threading.Lock()
        self._in_use: set[Connection[Any]] = set()
        self._pools: list[ConnectionPool[Any]] = []  # none or one
        # Without close() the pool's threads would delay the end of the process.
        self._at_end = weakref.finalize(self, _close, self._pools)

    def run_first(self, work: Callable[[Connection[Any]], object]) -> None:
        """Run the very first work on a connection outside the pool, so its error has a cause."""
        if self._opened() is self._borrowed or self._has_connected:
            self.run(work, is_write=False)
            return
        # The pool would retry until the timeout, and not report the reason.
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
            notices.append(notice.source_function)  # the attribute cannot be read later

        while True:
            try:
                with self._connection() as connection:
                    notices.clear()
                    if isinstance(connection, _Connection):
                        # A write may wait for locks that long before it does anything.
                        connection.patience = None if is_write else self._timeout
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
                is_safe = is_lost(error) and not is_write and not isinstance(error, NoAnswerError)
                can_repeat = isinstance(error, UNDONE) or is_safe
                if not can_repeat or attempt == _ATTEMPTS:
                    raise translate(error, self.name, is_write=is_write) from error
            # A random pause, so that the same writers do not collide again.
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.01 * 2**attempt)))  # noqa: S311
            attempt += 1

    def check_open(self) -> None:
        """Raise ``UsageError`` after ``close``."""
        if self._closed:
            raise UsageError(f"{self.name}: this PostgresStorage is closed; make a new one")

    def close(self) -> None:
        """Close the pool, unless it is the caller's."""
        with self._lock:
            self._closed = True
        self._at_end()

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent; new ones are opened when they are needed."""
        # Closing them would end the parent's sessions on the server.
        _of_the_parent_process.extend([self._borrowed] if self._borrowed else self._pools)
        self._at_end.detach()
        with open(os.devnull, "rb") as nothing:
            for connection in self._in_use:
                # The code that uses such a connection continues in the child, and must not reach
                # the server.
                if not connection.closed:
                    os.dup2(nothing.fileno(), connection.fileno())
        self._start()

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
        except (errors.ReadOnlySqlTransaction, errors.InvalidSqlStatementName, NoAnswerError):
            connection.close()
            raise
        except BaseException as error:
            if is_of_an_old_statement(error):
                connection.close()
                raise UncommittedError(*error.args) from error
            # If the rollback fails, the first error matters more.
            with suppress(psycopg.Error):
                connection.rollback()
            raise
        finally:
            self._in_use.discard(connection)
            try:
                if not was_autocommit and not connection.closed:
                    connection.autocommit = False
            except psycopg.Error:  # after an interrupt, a statement may still be running
                connection.close()
            if pool.closed:
                connection.close()
            else:
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
                if self._borrowed is None:  # the interpreter is ending
                    return self._connect()
                raise UsageError(
                    f"{self.name}: the pool is closed; pass one that is open"
                ) from error
            if not is_gone(connection):
                return connection
            connection.close()
            pool.putconn(connection)

    def _opened(self) -> ConnectionPool[Any]:
        notice()
        _check_greenlets()
        with self._lock:
            self.check_open()
            if self._borrowed is not None:
                if self._borrowed in _of_the_parent_process:
                    raise UsageError(
                        f"{self.name}: it belongs to the parent process; make one in each process"
                    )
                return self._borrowed
            if not self._pools:
                pool = ConnectionPool[Any](
                    connection_class=_Connection,
                    min_size=0,
                    max_size=self._max_connections,
                    kwargs={**self._arguments, "autocommit": True},
                    configure=_configure,
                    reconnect_timeout=_RECONNECT_TIMEOUT,
                    name=_POOL,
                    open=False,
                )
                try:
                    if self._at_end.alive:  # else the interpreter is ending
                        pool.open()
                except RuntimeError:  # then no thread can start
                    pool.close()
                self._pools.append(pool)
            return self._pools[0]

    def _connect(self) -> Connection[Any]:
        """Open a connection outside the pool, which does not report why connecting fails."""
        try:
            return psycopg.connect(**self._arguments, autocommit=True)
        except psycopg.Error as error:
            raise StorageUnavailableError(
                f"{self.name}: {first_line(error)}; check the URL, the server and the role's rights"
            ) from error


def _close(pools: list[ConnectionPool[Any]]) -> None:
    """Close pools; do not wait for connections that a pooler does not accept."""
    for pool in pools:
        stats = pool.get_stats()
        is_connecting = stats["pool_size"] > stats["pool_available"]
        pool.close(timeout=0 if is_connecting else _TIME_TO_STOP)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # A thread that was not waited for ends by itself.
    return not (record.msg.startswith("couldn't stop thread") and _POOL in str(record.args))


logging.getLogger("psycopg.pool").addFilter(_is_worth_logging)

_of_the_parent_process: list[ConnectionPool[Any]] = []


def _check_greenlets() -> None:
    """Refuse to block all greenlets of the process in each query."""
    library = patched_by()
    # psycopg chooses how to wait when it is imported. gevent cannot patch its C code later.
    if library == "eventlet" or (library and waiting.wait is getattr(waiting, "wait_c", None)):
        raise UsageError(
            "PostgresStorage: psycopg was imported before gevent.monkey.patch_all(), or eventlet is"
            " used, so each query would block all greenlets; call patch_all() before all imports,"
            " with gunicorn in gunicorn.conf.py"
        )


def _configure(connection: Connection[Any]) -> None:
    """Prepare no statements behind a pooler: the next transaction may have another session."""
    [served_by] = connection.execute("SELECT pg_backend_pid()").fetchone() or [None]
    # A pooler reports an invented process id.
    if served_by != connection.info.backend_pid:
        connection.prepare_threshold = None
    settle(connection)


def _parse(database: str) -> dict[str, Any]:
    try:
        database.encode()
        # SQLAlchemy's URLs name the driver.
        url = re.sub(r"\A(postgres(?:ql)?)\+\w+://", r"\1://", database)
        return _DEFAULTS | conninfo.conninfo_to_dict(url) | _ENCODING
    except (psycopg.ProgrammingError, UnicodeEncodeError):
        # The driver's text may quote the password, so the parameters are compared here.
        known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
        query = database.rpartition("@")[2].partition("?")[2] if "://" in database else ""
        for name in (parameter.partition("=")[0] for parameter in query.split("&")):
            if name.isidentifier() and name not in known:
                raise InvalidInputError(
                    f'database: libpq knows no parameter "{name}"; remove it from the URL, or pass'
                    " it to PostgresStorage if it is one of its arguments"
                ) from None
        raise InvalidInputError(
            'database: it cannot be parsed; pass "postgresql://user@host/name"'
        ) from None


def _name(arguments: dict[str, Any]) -> str:
    host = arguments.get("host") or "localhost"
    return f"{host}/{arguments.get('dbname') or arguments.get('user') or 'postgres'}"

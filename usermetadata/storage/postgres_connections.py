"""The PostgreSQL storage's connections: a pool of its own, or one that is borrowed."""

from __future__ import annotations

import random
import select
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import psycopg
from psycopg import conninfo, errors
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from usermetadata.exceptions import (
    InvalidInputError,
    StorageBusyError,
    StorageError,
    UsageError,
)
from usermetadata.forking import watch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from psycopg import Connection

T = TypeVar("T")

_ATTEMPTS = 10  # at a transaction that the server has undone
_LONGEST_PAUSE = 0.5  # seconds between two of them


class Connections:
    """Lends connections in autocommit mode, opened when they are needed."""

    def __init__(
        self, database: str | ConnectionPool, max_connections: int, timeout: float
    ) -> None:
        self._borrowed: ConnectionPool | None = None
        self._conninfo = ""
        self.name = "the borrowed pool"
        if isinstance(database, str):
            self._conninfo = database
            self.name = _name(database)
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
        self._pool: ConnectionPool | None = None
        self._closed = False
        watch(self)

    def run(self, work: Callable[[Connection], T]) -> T:
        """Let ``work`` have a connection; again where the server has undone what it did."""
        attempt = 0
        while True:
            try:
                with self._lend() as connection:
                    return work(connection)
            except (errors.SerializationFailure, errors.DeadlockDetected) as error:
                # It has been undone, so doing it again loses nothing and repeats nothing.
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise StorageBusyError(
                        f"{self.name}: other writers were in the way {attempt} times:"
                        " repeat the call"
                    ) from error
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.01 * 2**attempt)))  # noqa: S311

    def close(self) -> None:
        """Close the pool, unless it is the caller's."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def before_fork(self) -> None:
        """Nothing to wait for: the server's side of a connection does not fork."""

    def after_fork_in_parent(self) -> None:
        """Nothing has changed."""

    def after_fork_in_child(self) -> None:
        """Leave the parent its connections, and open others when they are needed."""
        if self._pool is not None:
            # Not even closed: that would say goodbye to the server in the parent's name.
            _of_the_parent_process.append(self._pool)
        self._lock = threading.Lock()
        self._pool = None

    @contextmanager
    def _lend(self) -> Generator[Connection, None, None]:
        try:
            with self._opened().connection() as connection:
                autocommit = connection.autocommit
                connection.autocommit = True
                try:
                    yield connection
                finally:
                    if not connection.closed:
                        connection.autocommit = autocommit
        except PoolTimeout as error:
            raise StorageBusyError(
                f"{self.name}: no connection was free or could be opened within the pool's timeout:"
                " is the server up, and are there enough connections for all callers?"
            ) from error
        except PoolClosed as error:
            raise UsageError(f"{self.name}: the pool is closed: pass one that is open") from error
        except (errors.SerializationFailure, errors.DeadlockDetected):
            raise
        except (errors.LockNotAvailable, errors.QueryCanceled) as error:
            raise StorageBusyError(f"{self.name}: {_first_line(error)}: repeat the call") from error
        except psycopg.Error as error:
            advice = (
                ": whether it has stored anything is not known"
                if isinstance(error, psycopg.OperationalError)
                and error.sqlstate in _CONNECTION_LOST
                else ""
            )
            raise StorageError(f"{self.name}: {_first_line(error)}{advice}") from error

    def _opened(self) -> ConnectionPool:
        if self._borrowed is not None and not self._closed:
            return self._borrowed
        with self._lock:
            if self._closed:
                raise UsageError(f"this PostgresStorage of {self.name} is closed: make a new one")
            if self._pool is None:
                self._pool = ConnectionPool(
                    self._conninfo,
                    min_size=0,
                    max_size=self._max_connections,
                    timeout=self._timeout,
                    kwargs={"autocommit": True},
                    check=_check,
                    name="usermetadata",
                    open=True,
                )
            return self._pool


# SQLSTATEs of a server that goes away, and none where libpq itself noticed.
_CONNECTION_LOST = {None, "57P01", "57P02", "57P03", "08000", "08003", "08006"}
_of_the_parent_process: list[ConnectionPool] = []


def _check(connection: Connection) -> None:
    """Refuse a connection that the server has closed; it costs no round trip."""
    readable, _, _ = select.select([connection.fileno()], [], [], 0)
    # Nobody has asked anything: it can only be the server's farewell.
    if readable:
        connection.close()
        raise psycopg.OperationalError("the server has closed the connection")


def _first_line(error: psycopg.Error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _name(database: str) -> str:
    try:
        parts = conninfo.conninfo_to_dict(database)
    except psycopg.ProgrammingError:
        # Without its text, which may quote the password.
        raise InvalidInputError(
            'database: it cannot be read: pass "postgresql://user@host/name"'
        ) from None
    host = parts.get("host") or "localhost"
    return f"{host}/{parts.get('dbname') or parts.get('user') or 'postgres'}"

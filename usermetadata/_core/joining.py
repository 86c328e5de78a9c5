"""The caller's connections: finding the driver's connection, and errors of unsupported ones.

Connections are recognised by the names of their classes, so no driver or framework is imported that
the application does not use.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from usermetadata.exceptions import (
    InvalidInputError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


_WHAT_WORKS = (
    "a connection of sqlite3 or psycopg 3, a sqlite_utils.Database, a Session or Connection of"
    " SQLAlchemy, or Django's connection"
)


class DriversConnection(NamedTuple):
    """A connection of a driver.

    Attributes:
        kind: the name of its class.
        connection: the connection.
        adapter: SQLAlchemy's adapter of a connection for asyncio; its ``run_async`` runs a
            coroutine function with the connection and waits for the end. Otherwise ``None``.
        invalidate: tells SQLAlchemy or Django that the connection was lost. Without this call,
            SQLAlchemy's ``rollback`` would raise an error, and hide that of the lost connection;
            Django would keep a persistent connection for the next request.
    """

    kind: str
    connection: Any
    adapter: Any = None
    invalidate: Callable[[], object] = lambda: None


def recognise(connection: object) -> Callable[[], DriversConnection]:
    """Return a function that finds the driver's connection in one of the caller's.

    The result may differ between calls: a session of SQLAlchemy takes one from a pool for each
    transaction. The function begins a transaction where SQLAlchemy's own ``execute`` would.

    Args:
        connection: a connection of a driver, sqlite-utils, SQLAlchemy or Django.

    Raises:
        InvalidInputError: it is none of those.
    """
    names = _names(connection)
    for name, unwrap in _UNWRAPPERS.items():
        if name in names:
            return lambda: unwrap(connection)
    raise unsupported(connection)


def unsupported(connection: object, advice: str = _WHAT_WORKS) -> InvalidInputError:
    """Return the error of a connection that cannot be used.

    Args:
        connection: the connection.
        advice: what to pass instead, unless this module has more specific advice.
    """
    kind, names = type(connection), _names(connection)
    advice = next((known for name, known in _ADVICE.items() if name in names), advice)
    return InvalidInputError(
        f"connection: {kind.__module__}.{kind.__qualname__} is not supported; pass {advice}"
    )


def ended(name: str) -> UsageError:
    """Return the error of a call after the block of ``within``."""
    return UsageError(
        f"{name}: the block of within() has ended; use the storage itself, or a new block"
    )


def _names(value: object) -> set[str]:
    return {f"{each.__module__}.{each.__qualname__}" for each in type(value).__mro__}


def _from_driver(connection: Any, adapter: Any = None) -> DriversConnection:
    names = _names(connection)
    for kind in _ASYNCHRONOUS if adapter is not None else _BLOCKING:
        if kind in names:
            return DriversConnection(kind, connection, adapter)
    raise unsupported(connection)


def _from_sqlite_utils(database: Any) -> DriversConnection:
    # sqlite-utils also accepts similar connections of other SQLite drivers.
    return DriversConnection("sqlite3.Connection", database.conn)


def _from_session(session: Any) -> DriversConnection:
    with _sqlalchemys_errors():
        connection = session.connection()
    return _from_sqlalchemy(connection)


def _from_sqlalchemy(connection: Any) -> DriversConnection:
    with _sqlalchemys_errors():
        if not connection.in_transaction():
            connection.begin()
        elif connection.invalidated:
            raise StorageUnavailableError(
                "connection: it was lost; roll the transaction back and repeat it"
            )
        pooled = connection.connection
        adapter = pooled.dbapi_connection if connection.dialect.is_async else None
        found = _from_driver(pooled.driver_connection, adapter)
        return found._replace(invalidate=connection.invalidate)


@contextmanager
def _sqlalchemys_errors() -> Generator[None, None, None]:
    from sqlalchemy import exc

    try:
        yield
    except exc.UnboundExecutionError as error:
        raise InvalidInputError(
            "connection: the session has no engine for all tables; pass"
            " session.connection(bind_arguments=...)"
        ) from error
    except exc.TimeoutError as error:
        raise StorageBusyError(
            f"connection: {error.args[0]}; close sessions sooner, or let the pool open more"
        ) from error
    except exc.ResourceClosedError as error:
        raise StorageError(f"connection: {error.args[0]}; pass one that is open") from error
    except exc.DBAPIError as error:
        line = (str(error.orig).splitlines() or [type(error).__name__])[0]
        if isinstance(error, (exc.OperationalError, exc.InterfaceError)):
            raise StorageUnavailableError(
                f"connection: {line}; check the database and repeat the transaction"
            ) from error
        raise StorageError(
            f"connection: {line}; roll the transaction back, and check its settings"
        ) from error
    except exc.SQLAlchemyError as error:
        # The rest of the text quotes the failed statement and its parameters.
        text, _, _ = str(error.args[0] if error.args else error).partition(" Original exception")
        raise StorageError(
            f"connection: {text.rstrip('.')}; roll the transaction back and repeat it"
        ) from error


def _from_django(connection: Any) -> DriversConnection:
    # django.core.cache.cache is a proxy of the same class.
    if getattr(connection, "vendor", None) not in ("sqlite", "postgresql"):
        raise unsupported(connection, "Django's connection to SQLite or PostgreSQL")
    from django.db.utils import Error

    try:
        connection.validate_thread_sharing()
        connection.close_if_health_check_failed()
        connection.ensure_connection()
        connection.validate_no_broken_transaction()
    except Error as error:
        what = StorageError if connection.connection else StorageUnavailableError
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise what(
            f"connection: {line.rstrip('.')}; check the database, and repeat the transaction"
        ) from error
    # At the end of a request, Django closes a lost connection only if it knows of an error.
    note = partial(setattr, connection, "errors_occurred", True)  # noqa: FBT003 - the value
    return _from_driver(connection.connection)._replace(invalidate=note)


_BLOCKING = ("sqlite3.Connection", "psycopg.Connection")
_ASYNCHRONOUS = (
    "aiosqlite.core.Connection",
    "psycopg.AsyncConnection",
    "asyncpg.connection.Connection",
)
_UNWRAPPERS: dict[str, Callable[[Any], DriversConnection]] = {
    **dict.fromkeys(_BLOCKING, _from_driver),
    "sqlite_utils.db.Database": _from_sqlite_utils,
    "sqlalchemy.orm.session.Session": _from_session,
    "sqlalchemy.orm.scoping.scoped_session": _from_session,
    "sqlalchemy.engine.base.Connection": _from_sqlalchemy,
    "django.db.backends.base.base.BaseDatabaseWrapper": _from_django,
    "django.utils.connection.ConnectionProxy": _from_django,
}
_RUN_SYNC = "what AsyncSession.run_sync gives to its function: run_sync(lambda session: ...)"
_ADVICE = {
    "sqlalchemy.ext.asyncio.session.AsyncSession": _RUN_SYNC,
    "sqlalchemy.ext.asyncio.scoping.async_scoped_session": _RUN_SYNC,
    "sqlalchemy.ext.asyncio.engine.AsyncConnection": _RUN_SYNC,
    "aiosqlite.core.Connection": _RUN_SYNC,
    "asyncpg.connection.Connection": _RUN_SYNC,
    "psycopg.AsyncConnection": _RUN_SYNC,
    "sqlalchemy.engine.base.Engine": "a Session or Connection of the engine",
    "psycopg_pool.base.BasePool": "a connection of the pool",
    "psycopg2.extensions.connection": (
        "a connection of psycopg 3, which Django prefers once it is installed, and SQLAlchemy uses"
        " for postgresql+psycopg://"
    ),
}

"""A complete storage: a table of SQLite, PostgreSQL or MariaDB, through SQLAlchemy Core."""

import copy
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from usermetadata import (
    DamagedMetadataError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from usermetadata.changes import Change, apply_in_order
from usermetadata.codec import Metadata, decode_metadata, encode_metadata
from usermetadata.validation import check_app_id

R = TypeVar("R")
ATTEMPTS, CHUNK, READ, WRITE = 8, 1000, "REPEATABLE READ", "READ COMMITTED"
BUSY = {5, "55P03", 1205}  # the codes of SQLite, PostgreSQL and MariaDB for a lock that was held
NEW = "new"  # the text of a user who has no row yet and is locked
CREATING = {"23505", "42710", "42P07"}  # PostgreSQL: another process creates the table
UNDONE = {"40001", "40P01", 1213, *CREATING}  # the others: a deadlock
SETTINGS = {
    "sqlite": ["PRAGMA busy_timeout = 30000"],
    "postgresql": ["SET lock_timeout = '30s'"],
    "mysql": ["SET SESSION innodb_lock_wait_timeout = 30, sql_mode = 'STRICT_ALL_TABLES'"],
}


def id_column(name: str, length: int) -> sa.Column[str]:
    # The default collation of MariaDB ignores case, accents and blanks at the end. Those of
    # PostgreSQL do not, and "C" sorts quickly. For MySQL, name utf8mb4_0900_bin.
    in_mariadb = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin")
    kind = sa.String(length).with_variant(in_mariadb, "mysql", "mariadb")
    return sa.Column(
        name, kind.with_variant(sa.Text(collation="C"), "postgresql"), primary_key=True
    )


LONG = sa.Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")
TABLE = sa.Table(
    "user_metadata",
    sa.MetaData(),
    *(id_column("app_id", 64), id_column("user_id", 255)),
    sa.Column("metadata", LONG, nullable=False),
)
ROWS = sa.select(TABLE.c.user_id, TABLE.c.metadata)


class UndoneError(StorageBusyError):
    """The database has undone the transaction; another attempt may succeed."""


@contextmanager
def our_errors(otherwise: type[StorageError] = StorageError) -> Generator[None]:
    try:
        yield
    except exc.TimeoutError as error:
        raise StorageBusyError("timed out waiting for a connection; repeat it") from error
    except exc.DBAPIError as error:
        driver: Any = error.orig
        codes = {getattr(driver, name, None) for name in ("sqlite_errorcode", "sqlstate")}
        codes |= {*driver.args[:1]}
        text = f"{type(driver).__name__}, which is the cause of this error"
        if codes & BUSY:
            raise StorageBusyError(f"{text}: timed out waiting for a lock; repeat it") from error
        # A connection that was lost before COMMIT has undone the transaction as well.
        if codes & UNDONE or (error.connection_invalidated and otherwise is StorageError):
            raise UndoneError(f"{text}: nothing was stored; repeat it") from error
        raise otherwise(f"{text}; check the database") from error


def decode(user_id: str, text: str) -> Metadata:
    try:
        return decode_metadata(text)
    except ValueError as error:
        raise DamagedMetadataError(f"row of user {user_id!r}: {error}", user_id) from error


def chunks(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (user_ids[start : start + CHUNK] for start in range(0, len(user_ids), CHUNK))


class SQLAlchemyStorage:
    """Keeps metadata in the table that ``TABLE`` describes, which it creates.

    Args:
        url: as SQLAlchemy has it; for SQLite that of a file.
        app_id: the app whose rows these are.
    """

    reads_in_flight = writes_in_flight = 4

    def __init__(self, url: str, *, app_id: str = "public") -> None:
        self._url, self._app_id = sa.make_url(url), check_app_id(app_id)
        backend = self._url.get_backend_name()
        self._backend = "mysql" if backend == "mariadb" else backend
        # By process: a child must neither use nor close the connections of its parent.
        self._engines: dict[int, sa.Engine] = {}
        self._created: set[int] = set()
        self._closed = threading.Event()

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        texts = self._in_transaction(READ, lambda connection: self._texts(connection, user_ids))
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        query = ROWS.where(TABLE.c.app_id == self._app_id, TABLE.c.user_id > user_id)
        query = query.order_by(TABLE.c.user_id).limit(limit)
        texts = self._in_transaction(READ, lambda connection: rows(connection, query))
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        user_ids = sorted({user_id for user_id, _ in changes})  # one order, so no deadlocks

        def work(connection: sa.Connection) -> list[Metadata | None]:
            # Locks the users. One without a row gets one, which no other transaction sees.
            self._upsert(connection, "user_id", dict.fromkeys(user_ids, NEW))
            found = self._texts(connection, user_ids)
            texts = {user_id: text for user_id, text in found.items() if text != NEW}
            results = apply_in_order(changes, texts, decode=decode, encode=encode_metadata)
            self._upsert(connection, "metadata", texts)
            for chunk in chunks([user_id for user_id in user_ids if user_id not in texts]):
                with our_errors():
                    connection.execute(
                        sa.delete(TABLE).where(
                            TABLE.c.app_id == self._app_id, TABLE.c.user_id.in_(chunk)
                        )
                    )
            return results

        return self._in_transaction(WRITE, work)

    def for_app(self, app_id: str) -> "SQLAlchemyStorage":
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        self._closed.set()
        if engine := self._engines.get(os.getpid()):
            engine.pool.dispose()  # it closes those that no call uses

    def _texts(self, connection: sa.Connection, user_ids: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for chunk in chunks(user_ids):
            query = ROWS.where(TABLE.c.app_id == self._app_id, TABLE.c.user_id.in_(chunk))
            found.update(rows(connection, query))
        return found

    def _upsert(self, connection: sa.Connection, column: str, texts: dict[str, str]) -> None:
        statement: Any
        if self._backend == "mysql":
            inserting = mysql.insert(TABLE)
            statement = inserting.on_duplicate_key_update({column: inserting.inserted[column]})
        else:
            insert = postgresql.insert(TABLE)  # that of SQLite is the same
            statement = insert.on_conflict_do_update(
                index_elements=TABLE.primary_key, set_={column: insert.excluded[column]}
            )
        new = [{"app_id": self._app_id, "user_id": each, "metadata": texts[each]} for each in texts]
        with our_errors():
            if new:
                connection.execute(statement, new)

    def _in_transaction(self, level: str, work: Callable[[sa.Connection], R]) -> R:
        for attempt in range(1, ATTEMPTS):
            try:
                return self._try(level, work)
            except UndoneError:
                time.sleep(random.uniform(0, 0.02 * attempt))
        return self._try(level, work)

    def _try(self, level: str, work: Callable[[sa.Connection], R]) -> R:
        if self._closed.is_set():
            raise UsageError("this SQLAlchemyStorage is closed")
        try:
            with our_errors(StorageUnavailableError):
                connection = self._engine().connect()
            with connection:
                with our_errors():
                    self._begin(connection, level)
                result = work(connection)  # what a change raises is no error of the database
                with our_errors(OutcomeUnknownError):
                    connection.commit()
                return result
        finally:
            if self._closed.is_set():
                self.close()

    def _begin(self, connection: sa.Connection, level: str) -> None:
        begin = f"SET TRANSACTION ISOLATION LEVEL {level}"
        if self._backend == "sqlite":
            begin = "BEGIN IMMEDIATE" if level == WRITE else "BEGIN"
        connection.exec_driver_sql(begin)

    def _engine(self) -> sa.Engine:
        process = os.getpid()
        if process not in self._engines:
            engine = sa.create_engine(self._url, hide_parameters=True)
            event.listen(engine, "connect", self._prepare)
            self._engines.setdefault(process, engine)
        engine = self._engines[process]
        if process not in self._created:
            with engine.connect() as connection:
                self._begin(connection, WRITE)
                connection.execute(CreateTable(TABLE, if_not_exists=True))
                connection.commit()
            self._created.add(process)
        return engine

    def _prepare(self, connection: Any, _: object) -> None:
        if self._backend == "sqlite":
            connection.isolation_level = None  # the transactions are begun in _begin
        with closing(connection.cursor()) as cursor:
            for setting in SETTINGS[self._backend]:
                cursor.execute(setting)
        connection.commit()
        if self._backend == "sqlite":
            use_wal(connection)


def use_wal(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
            return
        except sqlite3.OperationalError as error:
            # Here SQLite does not wait for other connections, regardless of busy_timeout.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def rows(connection: sa.Connection, query: sa.Select[Any, Any]) -> dict[str, str]:
    with our_errors():
        return {row.user_id: row.metadata for row in connection.execute(query)}

"""A complete storage: a table of MariaDB, through PyMySQL.

For MySQL, name the collation ``utf8mb4_0900_bin`` in place of ``utf8mb4_nopad_bin``.
"""

import copy
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pymysql
from pymysql.connections import Connection
from pymysql.cursors import Cursor

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
ATTEMPTS, CHUNK = 8, 1000
# The default collation ignores case and accents. This one also compares blanks at the end.
TABLE = """CREATE TABLE IF NOT EXISTS user_metadata (
    app_id VARCHAR(64), user_id VARCHAR(255), metadata LONGTEXT NOT NULL,
    PRIMARY KEY (app_id, user_id)) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"""
SETTINGS = "SET SESSION sql_mode = 'STRICT_ALL_TABLES', innodb_lock_wait_timeout = %s"
WRITE = ("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "START TRANSACTION")
READ = (  # one moment for all chunks
    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    "START TRANSACTION WITH CONSISTENT SNAPSHOT",
)
# Locks a user; one without a row gets "new", which other transactions do not see before COMMIT.
# PyMySQL sends many rows in one statement if all values are parameters; others one by one.
HOLD = """INSERT INTO user_metadata VALUES (%s, %s, %s)
    ON DUPLICATE KEY UPDATE user_id = VALUES(user_id)"""
STORE = """INSERT INTO user_metadata VALUES (%s, %s, %s)
    ON DUPLICATE KEY UPDATE metadata = VALUES(metadata)"""
REMOVE = "DELETE FROM user_metadata WHERE app_id = %s AND user_id IN %s"
SELECT = "SELECT user_id, metadata FROM user_metadata WHERE app_id = %s AND user_id IN %s"
AFTER = """SELECT user_id, metadata FROM user_metadata WHERE app_id = %s AND user_id > %s
    ORDER BY user_id LIMIT %s"""


class DeadlockError(StorageBusyError):
    """The transaction was undone; another attempt may succeed."""


class LostError(StorageUnavailableError):
    """The connection was lost before COMMIT was sent; another attempt may succeed."""


@contextmanager
def our_errors(*, is_commit: bool = False) -> Generator[None]:
    try:
        yield
    except pymysql.MySQLError as error:
        code = error.args[0] if error.args else 0
        text = f"MariaDB: error {code}, which is the cause of this error"
        if is_commit:
            raise OutcomeUnknownError(f"{text}; read what was stored") from error
        if code == 1205:
            text += ": timed out waiting for another writer; repeat it"
            raise StorageBusyError(text) from error
        if code == 1213:
            raise DeadlockError(f"{text}: a deadlock; repeat it") from error
        if code in {0, 1053, 1927} or 2000 <= code < 3000:
            raise LostError(f"{text}; check that the server runs") from error
        raise StorageError(f"{text}; check the database") from error


def decode(user_id: str, text: str) -> Metadata:
    try:
        return decode_metadata(text)
    except ValueError as error:
        message = f"row of user {user_id!r}: {error}"
        raise DamagedMetadataError(message, user_id) from error


def chunks(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (user_ids[start : start + CHUNK] for start in range(0, len(user_ids), CHUNK))


class MariaDBStorage:
    """Keeps metadata in the table ``user_metadata``, which it creates.

    Args:
        timeout: seconds to wait for a lock.
        app_id: the app whose rows these are.
        connect: arguments of ``pymysql.connect``.
    """

    reads_in_flight = writes_in_flight = 4

    def __init__(self, *, timeout: int = 30, app_id: str = "public", **connect: Any) -> None:
        self._app_id, self._timeout, self._connect = check_app_id(app_id), timeout, connect
        # By process: a child must neither use nor close the connections of its parent.
        self._idle: dict[int, list[Connection]] = {}
        self._closed = threading.Event()

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        texts = self._in_transaction(READ, lambda cursor: self._texts(cursor, user_ids))
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        arguments = (self._app_id, user_id, limit)
        texts = self._in_transaction(READ, lambda cursor: rows(cursor, AFTER, arguments))
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        app_id = self._app_id
        user_ids = sorted({user_id for user_id, _ in changes})  # one order, so no deadlocks

        def work(cursor: Cursor) -> list[Metadata | None]:
            with our_errors():
                cursor.executemany(HOLD, [(app_id, user_id, "new") for user_id in user_ids])
            found = self._texts(cursor, user_ids)
            texts = {user_id: text for user_id, text in found.items() if text != "new"}
            results = apply_in_order(changes, texts, decode=decode, encode=encode_metadata)
            with our_errors():
                cursor.executemany(STORE, [(app_id, *row) for row in texts.items()])
                for chunk in chunks([user_id for user_id in user_ids if user_id not in texts]):
                    cursor.execute(REMOVE, (app_id, chunk))
            return results

        return self._in_transaction(WRITE, work)

    def for_app(self, app_id: str) -> "MariaDBStorage":
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        self._closed.set()
        idle = self._idle.get(os.getpid(), [])
        with suppress(IndexError):  # a call that ends closes its own
            while True:
                idle.pop().close()

    def _texts(self, cursor: Cursor, user_ids: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for chunk in chunks(user_ids):
            found.update(rows(cursor, SELECT, (self._app_id, chunk)))
        return found

    def _in_transaction(self, begin: Sequence[str], work: Callable[[Cursor], R]) -> R:
        for attempt in range(1, ATTEMPTS):
            try:
                return self._try(begin, work)
            except (DeadlockError, LostError):  # nothing was done
                time.sleep(random.uniform(0, 0.02 * attempt))
        return self._try(begin, work)

    def _try(self, begin: Sequence[str], work: Callable[[Cursor], R]) -> R:
        with self._connection() as connection, connection.cursor() as cursor:
            with our_errors():
                for statement in begin:
                    cursor.execute(statement)
            result = work(cursor)  # what a change raises is no error of the database
            with our_errors(is_commit=True):
                connection.commit()
            return result

    @contextmanager
    def _connection(self) -> Generator[Connection]:
        if self._closed.is_set():
            raise UsageError("this MariaDBStorage is closed; make a new one")
        idle = self._idle.setdefault(os.getpid(), [])
        try:
            connection = idle.pop()
        except IndexError:
            connection = self._open()
        try:
            yield connection
        except BaseException as error:
            connection.close()  # which undoes the transaction
            if isinstance(error, LostError):
                idle.clear()  # after a restart all are lost
            raise
        idle.append(connection)
        if self._closed.is_set():
            self.close()

    def _open(self) -> Connection:
        timeout = 2 * self._timeout
        with our_errors():
            connection: Connection = pymysql.connect(
                charset="utf8mb4",
                autocommit=True,
                read_timeout=timeout,
                write_timeout=timeout,
                **self._connect,
            )
            with connection.cursor() as cursor:
                cursor.execute(SETTINGS, (self._timeout,))
                cursor.execute(TABLE)
        return connection


def rows(cursor: Cursor, query: str, arguments: tuple[object, ...]) -> dict[str, str]:
    with our_errors():
        cursor.execute(query, arguments)
        return dict(cursor.fetchall())


def open_url(url: str) -> MariaDBStorage:
    """Open ``mysql://user:password@host:3306/database``."""
    parts = urlsplit(url)
    return MariaDBStorage(
        host=parts.hostname or "localhost",
        port=parts.port or 3306,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        database=unquote(parts.path[1:]),
    )

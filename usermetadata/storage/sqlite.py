"""The SQLite storage: one file, through sqlite-utils."""

from __future__ import annotations

import copy
import json
import os
import sqlite3
import threading
import time
import weakref
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from sqlite_utils import Database, Migrations

from usermetadata.changes import Clear, Replace
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    StorageBusyError,
    StorageError,
    UsageError,
)
from usermetadata.forking import watch
from usermetadata.identifiers import check_app_id
from usermetadata.json import decode_metadata, encode_metadata

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from typing_extensions import Self

    from usermetadata.changes import Change
    from usermetadata.json import Metadata

_READ_ONE = "SELECT user_id, user_metadata FROM user_metadata WHERE app_id = ? AND user_id = ?"
_READ_MANY = (
    "SELECT user_id, user_metadata FROM user_metadata"
    " WHERE app_id = ? AND user_id IN (SELECT value FROM json_each(?))"
)
_STORE = (
    "INSERT INTO user_metadata (app_id, user_id, user_metadata) VALUES (?, ?, ?)"
    " ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = excluded.user_metadata"
)
_REMOVE = "DELETE FROM user_metadata WHERE app_id = ? AND user_id = ?"

_MAX_TIMEOUT = 1_000_000  # seconds; SQLite counts milliseconds in 31 bits

_migrations = Migrations("usermetadata")


@_migrations()
def create_user_metadata(database: Database) -> None:
    """Create the table, with the names of SuperTokens' own."""
    database.table("user_metadata").create(
        {"app_id": str, "user_id": str, "user_metadata": str},
        pk=("app_id", "user_id"),
        not_null={"app_id", "user_id", "user_metadata"},
        if_not_exists=True,
    )


class SQLiteStorage:
    """Keeps metadata in the table ``user_metadata`` of an SQLite database.

    Given a path, the storage opens connections of its own at the first call, creates file and table
    where they are missing, and may be used from any number of threads and processes, also across
    ``fork``. The file is in WAL mode: readers never wait for a writer.

    Given a ``sqlite_utils.Database``, the storage borrows its connection: while the caller has a
    transaction open, writes are part of it and become durable with its commit. The caller opens the
    connection (with ``check_same_thread=False`` if other threads or asyncio use the storage),
    closes it, and does not share it across a ``fork``.

    Args:
        database: the path of the file, ``":memory:"``, or a ``sqlite_utils.Database``.
        app_id: the app whose rows these are.
        synchronous: ``"FULL"``: what a call has written survives a power cut. ``"NORMAL"``: faster;
            a power cut may take the last writes, but never damages the file. For a path.
        timeout: seconds that a write waits for other writers before it raises
            ``StorageBusyError``. For a path.

    Raises:
        InvalidInputError: an argument is not valid. Nothing is opened before the first call.

    Example:
        >>> from usermetadata.changes import Merge
        >>> storage = SQLiteStorage(":memory:")
        >>> storage.write([("alice", Merge({"theme": "dark"}))])
        [{'theme': 'dark'}]
        >>> storage.read(["alice", "bob"])
        {'alice': {'theme': 'dark'}}
        >>> storage.close()

    What the settings mean is SQLite's: `WAL <https://sqlite.org/wal.html>`_, `synchronous
    <https://sqlite.org/pragma.html#pragma_synchronous>`_.
    """

    reads_in_flight, writes_in_flight = 2, 1

    def __init__(
        self,
        database: str | os.PathLike[str] | Database,
        *,
        app_id: str = "public",
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        timeout: float = 30.0,
    ) -> None:
        self._app_id = check_app_id(app_id)
        if synchronous not in ("FULL", "NORMAL"):
            raise InvalidInputError(f'synchronous: {synchronous!r} is neither "FULL" nor "NORMAL"')
        if not isinstance(timeout, (int, float)) or not 0 <= timeout <= _MAX_TIMEOUT:
            raise InvalidInputError(f"timeout: {timeout!r} is not a number of seconds from 0 on")
        self._connections: _OneConnection | _OwnConnections
        if isinstance(database, Database):
            self._connections = _OneConnection(
                database, "the borrowed database", timeout, borrowed=True
            )
        elif database == ":memory:":
            memory = Database(_connect(":memory:", timeout), execute_plugins=False)
            self._connections = _OneConnection(memory, ":memory:", timeout, borrowed=False)
        elif isinstance(database, (str, os.PathLike)):
            self._connections = _OwnConnections(_check_path(database), synchronous, timeout)
        else:
            raise InvalidInputError(
                f"database: {type(database).__name__} is neither a path nor a sqlite_utils.Database"
            )

    def __repr__(self) -> str:
        return f"SQLiteStorage({self._connections.name!r}, app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row, in one query."""
        with self._connections.reading() as connection:
            if len(user_ids) == 1:
                rows = connection.run(_READ_ONE, (self._app_id, user_ids[0]))
            else:
                rows = connection.run(_READ_MANY, (self._app_id, json.dumps(list(user_ids))))
        return {user_id: self._decode(user_id, text) for user_id, text in rows}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order in one transaction, opened by ``BEGIN IMMEDIATE``."""
        with self._connections.writing() as connection:
            return [self._apply(connection, user_id, change) for user_id, change in changes]

    def for_app(self, app_id: str) -> Self:
        """Return the same storage, seen from another app."""
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        """Close the connections that the storage opened itself."""
        self._connections.close()

    def _apply(self, connection: _Connection, user_id: str, change: Change) -> Metadata | None:
        old = None
        # The two that ignore what is stored also mend a damaged row.
        if not isinstance(change, (Clear, Replace)):
            for _, text in connection.run(_READ_ONE, (self._app_id, user_id)):
                old = self._decode(user_id, text)
        new = change(old)
        if new is None:
            connection.run(_REMOVE, (self._app_id, user_id))
        else:
            connection.run(_STORE, (self._app_id, user_id, encode_metadata(new)))
        return new

    def _decode(self, user_id: str, text: object) -> Metadata:
        try:
            if not isinstance(text, str):
                raise ValueError(f"it is a {type(text).__name__}, not text")
            return decode_metadata(text)
        except ValueError as error:
            raise DamagedMetadataError(
                f"{self._connections.name}: the metadata of user {user_id!r} in app"
                f" {self._app_id!r} is damaged: {error}; set or clear it to mend it"
            ) from error


class _Connection:
    """A connection whose errors are ours, used by one thread at a time."""

    def __init__(self, database: Database, name: str, *, borrowed: bool = False) -> None:
        self._database = database
        self._driver = database.conn
        self._name = name
        self._borrowed = borrowed
        self._inherited = False

    def run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute one statement and return all its rows."""
        try:
            # Closed at once: a statement that an interrupt leaves half-read would keep its lock.
            with closing(self._driver.cursor()) as cursor:
                cursor.row_factory = None  # a lender may have set one
                return cursor.execute(statement, parameters).fetchall()
        except self._driver.Error as error:
            raise _translate(error, self._name) from error

    @contextmanager
    def transaction(self) -> Generator[None]:
        """Commit what the block does or undo it all; join a transaction of the lender's."""
        joins = self._borrowed and self._driver.in_transaction
        begin, commit, undo = "BEGIN IMMEDIATE", "COMMIT", ["ROLLBACK"]
        if joins:
            begin, commit = "SAVEPOINT usermetadata", "RELEASE usermetadata"
            undo = ["ROLLBACK TO usermetadata", commit]
        begun = False
        try:
            self.run(begin)
            begun = True
            yield
            if self._inherited:
                raise _orphaned(self._name)
            self.run(commit)
        except BaseException:
            # Nothing is left to undo where SQLite has done so itself, on a full disk say.
            if self.in_transaction and not self._inherited and (begun or not joins):
                for statement in undo:
                    self.run(statement)
            raise

    @property
    def in_transaction(self) -> bool:
        try:
            return self._driver.in_transaction
        except self._driver.Error as error:  # it is closed
            raise _translate(error, self._name) from error

    def prepare(self) -> None:
        """Create the table where it is missing; where it is there, wait for nobody."""
        try:
            if not self._database.table("user_metadata").exists():
                with self.transaction():
                    _migrations.apply(self._database)
                    create_user_metadata(self._database)  # again, if it has been dropped since
        except self._driver.Error as error:
            raise _translate(error, self._name) from error

    def abandon(self) -> None:
        """Leave alone, for ever, what belongs to the parent process: not even close it."""
        self._inherited = True
        _of_the_parent_process[self._name] = self

    def close(self) -> None:
        self._driver.close()


_of_the_parent_process: dict[str, _Connection] = {}


class _WriteLock:
    """Admits one thread at a time, and refuses it to a thread that has it already."""

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout
        self._lock = threading.Lock()
        self._holder: int | None = None

    def acquire(self) -> None:
        if self._holder == threading.get_ident():
            raise UsageError(
                f"{self._name}: a write inside a write of the same thread, by a change or a signal"
                " handler: it would be lost"
            )
        if not self._lock.acquire(timeout=self._timeout):
            raise _busy(self._name)
        self._holder = threading.get_ident()

    def release(self) -> None:
        self._holder = None
        self._lock.release()


class _OwnConnections:
    """The connections of one process to one file: a writer, and readers as needed."""

    def __init__(self, path: str, synchronous: str, timeout: float) -> None:
        self.name = path
        self._synchronous = synchronous
        self._timeout = timeout
        self._closed = False
        self._start()
        watch(self)

    def _start(self) -> None:
        self._write_lock = _WriteLock(self.name, self._timeout)
        self._writers: list[_Connection] = []
        self._is_suspect = False
        self._read_lock = threading.Condition()
        self._idle_readers: list[_Connection] = []
        self._busy_readers: set[object] = set()
        self._is_forking = False
        self._holds_write_lock = False
        # Also at the interpreter's exit, and when the storage is dropped without close().
        weakref.finalize(self, _close_all, self._writers, self._idle_readers)

    @contextmanager
    def reading(self) -> Generator[_Connection]:
        """Lend a connection for one query, whatever the writer is doing."""
        if self._is_suspect or not self._writers:
            with self._lend_writer():
                pass  # It has created what the reader needs.
        ticket, reader = object(), None
        try:
            with self._read_lock:
                self._read_lock.wait_for(lambda: not self._is_forking)
                self._check_open()
                self._busy_readers.add(ticket)
                if self._idle_readers:
                    reader = self._idle_readers.pop()
            if reader is None:
                reader = self._open()
            yield reader
        except StorageError:
            # Whatever is wrong with the file, the next call looks at it afresh.
            self._is_suspect = True
            if reader is not None:
                reader.close()
                reader = None
            raise
        finally:
            with self._read_lock:
                self._busy_readers.discard(ticket)
                self._read_lock.notify_all()
                if reader is not None:
                    self._idle_readers.append(reader)
                if self._closed:
                    _close_all(self._idle_readers)

    @contextmanager
    def writing(self) -> Generator[_Connection]:
        """Lend the writer, inside a transaction."""
        with self._lend_writer() as writer, writer.transaction():
            yield writer

    def close(self) -> None:
        with self._read_lock:
            self._closed = True
            _close_all(self._idle_readers)
        self._write_lock.acquire()
        try:
            _close_all(self._writers)
        finally:
            self._write_lock.release()

    def before_fork(self) -> None:
        deadline = time.monotonic() + self._timeout
        # A fork inside a change, or while a change outlasts the timeout, takes place all the same.
        with suppress(UsageError, StorageBusyError):
            self._write_lock.acquire()
            self._holds_write_lock = True
            _close_all(self._writers)
        with self._read_lock:
            self._is_forking = True
            self._read_lock.wait_for(
                lambda: not self._busy_readers, timeout=max(0, deadline - time.monotonic())
            )
            _close_all(self._idle_readers)

    def after_fork_in_parent(self) -> None:
        with self._read_lock:
            self._is_forking = False
            self._read_lock.notify_all()
        if self._holds_write_lock:
            self._holds_write_lock = False
            self._write_lock.release()

    def after_fork_in_child(self) -> None:
        while self._writers:
            self._writers.pop().abandon()
        self._start()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"this SQLiteStorage of {self.name} is closed: make a new one")

    @contextmanager
    def _lend_writer(self) -> Generator[_Connection]:
        lock = self._write_lock
        lock.acquire()
        try:
            self._check_open()
            if self._is_suspect:
                _close_all(self._writers)
                self._is_suspect = False
            if not self._writers:
                self._writers.append(self._open_writer())
            yield self._writers[0]
        except StorageBusyError:
            raise
        except StorageError:
            self._is_suspect = True
            raise
        finally:
            lock.release()

    def _open_writer(self) -> _Connection:
        if self.name in _of_the_parent_process:
            raise _orphaned(self.name)
        writer = self._open()
        try:
            self._use_wal(writer)
            writer.run(f"PRAGMA synchronous = {self._synchronous}")
            if self._synchronous == "FULL":
                # Without it macOS leaves the data in the drive's cache; elsewhere it means nothing.
                writer.run("PRAGMA fullfsync = ON")
            writer.prepare()
        except BaseException:
            writer.close()
            raise
        return writer

    def _use_wal(self, writer: _Connection) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                writer.run("PRAGMA journal_mode = WAL")
                return
            except StorageBusyError:
                # SQLite itself does not wait for others here, whatever its busy timeout.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _open(self) -> _Connection:
        try:
            database = Database(_connect(self.name, self._timeout), execute_plugins=False)
        except sqlite3.Error as error:
            raise _translate(error, self.name) from error
        return _Connection(database, self.name)


class _OneConnection:
    """One connection for everything, one thread at a time: borrowed, or in memory."""

    def __init__(self, database: Database, name: str, timeout: float, *, borrowed: bool) -> None:
        self.name = name
        self._connection = _Connection(database, name, borrowed=borrowed)
        self._timeout = timeout
        self._borrowed = borrowed
        self._is_prepared = False
        self._closed = False
        self._start()
        if not borrowed:
            weakref.finalize(self, self._connection.close)
        watch(self)

    def _start(self) -> None:
        self._write_lock = _WriteLock(self.name, self._timeout)
        self._lock = threading.RLock()
        self._held_for_fork = False

    @contextmanager
    def reading(self) -> Generator[_Connection]:
        with self._lock:
            if self._closed:
                raise UsageError(f"this SQLiteStorage of {self.name} is closed: make a new one")
            if not self._is_prepared:
                self._connection.prepare()
            try:
                yield self._connection
                # The lender may yet roll back a transaction that the table was created in.
                self._is_prepared = not self._connection.in_transaction
            except StorageError:
                self._is_prepared = False
                raise

    @contextmanager
    def writing(self) -> Generator[_Connection]:
        lock = self._write_lock
        lock.acquire()
        try:
            with self.reading() as connection, connection.transaction():
                yield connection
        finally:
            lock.release()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if not self._borrowed:
                self._connection.close()

    def before_fork(self) -> None:
        self._held_for_fork = self._lock.acquire(timeout=self._timeout)

    def after_fork_in_parent(self) -> None:
        if self._held_for_fork:
            self._lock.release()

    def after_fork_in_child(self) -> None:
        self._start()


def _check_path(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise InvalidInputError(f'database: {text!r} cannot be a path: name a file, or ":memory:"')
    return os.path.abspath(text)


def _connect(path: str, timeout: float) -> sqlite3.Connection:
    # Each connection is lent to one thread at a time, though not always to the same.
    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)


def _close_all(*groups: list[_Connection]) -> None:
    for group in groups:
        while group:
            group.pop().close()


def _translate(error: Exception, name: str) -> StorageError:
    message = str(error)
    if message.startswith("database ") and message.endswith("is locked"):
        return _busy(name)
    if message.startswith("Could not decode to UTF-8"):
        return DamagedMetadataError(f"{name}: a row is damaged: {message}")
    directory = os.path.dirname(name)
    if "unable to open" in message and not os.path.isdir(directory):
        return StorageError(f"{name}: the directory {directory} does not exist: create it")
    advice = next((advice for sign, advice in _ADVICE if sign in message), "")
    return StorageError(f"{name}: {message}{advice}")


def _orphaned(name: str) -> StorageError:
    return StorageError(
        f"{name}: this process was forked inside a write to this file, and cannot write to it"
    )


def _busy(name: str) -> StorageBusyError:
    return StorageBusyError(
        f"{name}: other writers did not let go of the database within the timeout;"
        " repeat the call, or give SQLiteStorage a longer timeout"
    )


_ADVICE = [
    ("unable to open", ": is it a file, and may this process open it?"),
    ("readonly", ": let this process write the file and its directory"),
    ("full", ": free some space and repeat the call"),
    ("not a database", ": name an SQLite file, or one that does not exist yet"),
    ("malformed", ": restore it from a backup; `sqlite3 FILE .recover` may save rows"),
    ("no such column", ": its table user_metadata is another program's; use another file"),
    ("same thread", ": open the borrowed connection with check_same_thread=False"),
]

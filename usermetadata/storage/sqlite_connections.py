"""The SQLite storage's connections: to a file of its own, or the one that is borrowed or in memory.

Both kinds run one query, or the work of one write inside a transaction; errors are ours.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet, finalize

from sqlite_utils import Database, Migrations
from sqlite_utils.db import NoTable

from usermetadata.exceptions import (
    DamagedMetadataError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    UsageError,
)
from usermetadata.forking import notice, watch
from usermetadata.storage.sqlite_errors import busy, orphaned, translate
from usermetadata.storage.sqlite_sharing import Sharing, acquire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata.json import Metadata

    Decode = Callable[[str, object], Metadata]

T = TypeVar("T")

_PATIENCE_AT_EXIT = 1.0  # seconds

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


class Connection:
    """A connection whose errors are ours, used by one thread at a time."""

    def __init__(self, database: Database, name: str, *, borrowed: bool = False) -> None:
        self._database = database
        self._driver = database.conn
        self._name = name
        self._borrowed = borrowed
        self._execute = self._execute_for_lender if borrowed else self._driver.execute
        self._inherited = False

    def run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute one statement and return all its rows."""
        try:
            # The cursor has no name, so that it goes, and with it a half-read statement's lock on
            # the file, with whatever error or interrupt comes.
            return self._execute(statement, parameters).fetchall()
        except self._driver.Error as error:
            raise translate(error, self._name) from error

    def read(self, query: str, parameters: Sequence[Any], decode: Decode) -> dict[str, Metadata]:
        """Run a query for ids and texts, and decode each text as it comes."""
        try:
            rows = self._execute(query, parameters)
            try:
                return {user_id: decode(user_id, text) for user_id, text in rows}
            except BaseException:
                rows.close()  # The error knows it, and may be kept; the file's lock must go.
                raise
        except self._driver.Error as error:
            raise translate(error, self._name) from error

    def run_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute one statement for each row of parameters."""
        try:
            self._plain_cursor().executemany(statement, rows)
        except self._driver.Error as error:
            raise translate(error, self._name) from error

    def transact(self, work: Callable[[Connection], T]) -> T:
        """Commit what ``work`` does or undo it all; join a transaction of the lender's."""
        joins = self._borrowed and self.in_transaction
        begin, commit, undo = "BEGIN IMMEDIATE", "COMMIT", ["ROLLBACK"]
        if joins:
            begin, commit = "SAVEPOINT usermetadata", "RELEASE usermetadata"
            undo = ["ROLLBACK TO usermetadata", commit]
        begun = False
        try:
            self.run(begin)
            begun = True
            result = work(self)
            if self._inherited:
                raise orphaned(self._name)
            try:
                self.run(commit)
            except StorageError as error:
                if "disk I/O error" in str(error):
                    # It may be in the log already, for whoever opens the file after a crash.
                    raise OutcomeUnknownError(f"{error}: nobody knows whether it was stored") from (
                        error.__cause__
                    )
                raise
        except BaseException:
            # Nothing is left to undo where SQLite has done so itself, on a full disk say.
            if self.in_transaction and not self._inherited and (begun or not joins):
                for statement in undo:
                    self.run(statement)
            raise
        if not joins and self.in_transaction:  # an authorizer can make COMMIT do nothing
            raise OutcomeUnknownError(
                f"{self._name}: a transaction is still open after COMMIT; end it and read to find"
                " out"
            )
        return result

    @property
    def in_transaction(self) -> bool:
        try:
            return self._driver.in_transaction
        except self._driver.Error as error:  # it is closed
            raise translate(error, self._name) from error

    def prepare(self) -> None:
        """Create the table where it is missing; where it is there, wait for nobody."""
        try:
            if not self._database.table("user_metadata").exists():
                self.transact(Connection._create_table)
        except (self._driver.Error, NoTable) as error:
            raise translate(error, self._name) from error

    def _create_table(self) -> None:
        _migrations.apply(self._database)
        create_user_metadata(self._database)  # again, if it has been dropped since

    def abandon(self) -> None:
        """Leave alone, for ever, what belongs to the parent process: not even close it."""
        import ctypes

        self._inherited = True
        _of_the_parent_process.add(self._name)
        # Python would close it at its exit, at the latest: it must never see the last reference.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._driver))

    def close(self) -> None:
        self._driver.close()

    def _execute_for_lender(self, statement: str, parameters: Sequence[Any]) -> sqlite3.Cursor:
        return self._plain_cursor().execute(statement, parameters)

    def _plain_cursor(self) -> sqlite3.Cursor:
        cursor = self._driver.cursor()
        cursor.row_factory = None  # the lender may have set one
        return cursor


_of_the_parent_process: set[str] = set()  # files that this process must not open


class _WriteLock:
    """Admits one thread at a time, and refuses the one that is in already."""

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout
        self.lock = threading.RLock()
        self._holder: int | None = None

    def call(self, work: Callable[[], T]) -> T:
        """Call ``work`` while no other thread can."""
        self._refuse_holder()
        me = threading.get_ident()
        try:
            self._acquire()
            return work()
        finally:
            if self._holder == me:
                self._holder = None
            # An interrupt may have come between any two calls, those above too. The lock itself
            # knows whose it is, and no interrupt comes before it is asked.
            try:  # noqa: SIM105 - suppress() would be a call before
                self.lock.release()
            except RuntimeError:
                pass

    def hold(self) -> None:
        """Keep other threads out until ``release``."""
        self._refuse_holder()
        self._acquire()

    def release(self) -> None:
        self._holder = None
        self.lock.release()

    def _refuse_holder(self) -> None:
        if self._holder == threading.get_ident():
            raise UsageError(
                f"{self._name}: a write inside a write of the same thread, by a change or a signal"
                " handler: it would be lost"
            )

    def _acquire(self) -> None:
        if not acquire(self.lock, self._timeout):
            raise busy(self._name)
        self._holder = threading.get_ident()


class OwnConnections:
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
        self._sharing: Sharing[Callable[[Connection], Any], Any] = Sharing(
            self._write_together, self._timeout, lambda: busy(self.name)
        )
        self._writers: list[Connection] = []
        self._is_suspect = False
        self._generation = 0  # of the readers: they are as old as the writer
        self._idle_readers: list[Connection] = []
        self._readers: WeakSet[Connection] = WeakSet()  # idle or in use
        # A signal handler that reads may come upon its own thread opening a reader.
        self._open_lock = threading.RLock()
        self._is_forking = False  # and holds the open lock
        self._holds_write_lock = False
        self._at_end = _close_at_end(self, self._write_lock.lock, self._writers, self._idle_readers)

    def read(self, query: str, parameters: Sequence[Any], decode: Decode) -> dict[str, Metadata]:
        """Run a query for ids and texts, whatever the writer is doing; decode the texts."""
        notice()
        if self._is_suspect or not self._writers:
            self._lend_writer(lambda _: None)  # It has created what the reader needs.
        reader = None
        generation = self._generation
        try:
            # Appending to a list and popping from it need no lock.
            try:
                reader = self._idle_readers.pop()
            except IndexError:
                reader = self._open_reader()
            return reader.read(query, parameters, decode)
        except DamagedMetadataError:
            raise
        except StorageError:
            # Whatever is wrong with the file, the next call looks at it afresh.
            self._is_suspect = True
            if reader is not None:
                self._close_reader(reader)
                reader = None
            raise
        finally:
            if reader is not None and reader in self._readers:  # else it is the parent process's
                self._idle_readers.append(reader)
            if self._closed or self._is_forking or self._generation != generation:
                self._close_idle_readers()

    def write(self, work: Callable[[Connection], T], *, shareable: bool) -> T:
        """Let ``work`` have the writer, inside a transaction.

        If it is shareable another thread may do it, together with its own.
        """
        notice()
        result: T
        if shareable:
            result = self._sharing.call(work)
        else:
            [result] = self._write_together([work])
        return result

    def _write_together(self, works: Sequence[Callable[[Connection], Any]]) -> list[Any]:
        return self._lend_writer(
            lambda writer: writer.transact(lambda connection: [work(connection) for work in works])
        )

    def close(self) -> None:
        with self._open_lock:
            self._closed = True
        self._close_idle_readers()
        self._write_lock.call(lambda: _close_all(self._writers))

    def before_fork(self) -> None:
        deadline = time.monotonic() + self._timeout
        # A fork inside a change, or while a change outlasts the timeout, takes place all the same.
        with suppress(UsageError, StorageBusyError):
            self._write_lock.hold()
            self._holds_write_lock = True
            _close_all(self._writers)
        # From now on a reader that is given back is closed, and who finds none waits for the fork.
        self._is_forking = self._open_lock.acquire(timeout=max(0, deadline - time.monotonic()))
        self._close_idle_readers()
        while self._readers and time.monotonic() < deadline:
            time.sleep(0.001)

    def after_fork_in_parent(self) -> None:
        if self._is_forking:
            self._is_forking = False
            self._open_lock.release()
        if self._holds_write_lock:
            self._holds_write_lock = False
            self._write_lock.release()

    def after_fork_in_child(self) -> None:
        for connection in (*self._writers, *self._readers):
            connection.abandon()
        self._at_end.detach()
        self._start()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"this SQLiteStorage of {self.name} is closed: make a new one")

    def _lend_writer(self, work: Callable[[Connection], T]) -> T:
        return self._write_lock.call(lambda: self._with_writer(work))

    def _with_writer(self, work: Callable[[Connection], T]) -> T:
        try:
            self._check_open()
            if self._is_suspect:
                _close_all(self._writers)
                self._generation += 1
                self._close_idle_readers()
                self._is_suspect = False
            if not self._writers:
                self._writers.append(self._open_writer())
            return work(self._writers[0])
        except StorageBusyError:
            raise
        except StorageError:
            self._is_suspect = True
            raise

    def _open_writer(self) -> Connection:
        if self.name in _of_the_parent_process:
            raise orphaned(self.name)
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

    def _use_wal(self, writer: Connection) -> None:
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

    def _open_reader(self) -> Connection:
        with self._open_lock:
            self._check_open()
            reader = self._open()
            self._readers.add(reader)
            return reader

    def _close_reader(self, reader: Connection) -> None:
        reader.close()
        # Now, and not when the last one lets go of an error that knows it: a fork waits for these.
        self._readers.discard(reader)

    def _close_idle_readers(self) -> None:
        with suppress(IndexError):  # other threads may take some meanwhile
            while True:
                self._close_reader(self._idle_readers.pop())

    def _open(self) -> Connection:
        try:
            database = Database(_connect(self.name, self._timeout), execute_plugins=False)
        except sqlite3.Error as error:
            raise translate(error, self.name) from error
        return Connection(database, self.name)


class OneConnection:
    """One connection for everything, one thread at a time: borrowed, or in memory."""

    def __init__(self, borrowed: Database | None, timeout: float) -> None:
        self.name = ":memory:" if borrowed is None else "the borrowed database"
        database = borrowed or Database(_connect(":memory:", timeout), execute_plugins=False)
        self._connection = Connection(database, self.name, borrowed=borrowed is not None)
        self._timeout = timeout
        self._borrowed = borrowed is not None
        self._is_prepared = False
        self._closed = False
        self._start()
        watch(self)

    def _start(self) -> None:
        self._write_lock = _WriteLock(self.name, self._timeout)
        self._lock = threading.RLock()
        self._held_for_fork = False
        self._at_end = _close_at_end(self, self._lock, [] if self._borrowed else [self._connection])

    def read(self, query: str, parameters: Sequence[Any], decode: Decode) -> dict[str, Metadata]:
        rows = self._lend(lambda connection: connection.run(query, parameters))
        return {user_id: decode(user_id, text) for user_id, text in rows}

    def write(self, work: Callable[[Connection], T], *, shareable: bool) -> T:
        return self._write_lock.call(
            lambda: self._lend(lambda connection: connection.transact(work))
        )

    def _lend(self, work: Callable[[Connection], T]) -> T:
        with self._lock:
            if self._closed:
                raise UsageError(f"this SQLiteStorage of {self.name} is closed: make a new one")
            if not self._is_prepared:
                self._connection.prepare()
            try:
                result = work(self._connection)
                # The lender may yet roll back a transaction that the table was created in.
                self._is_prepared = not self._connection.in_transaction
                return result
            except StorageError:
                self._is_prepared = False
                raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if not self._borrowed:
                self._connection.close()

    def before_fork(self) -> None:
        self._held_for_fork = self._lock.acquire(timeout=self._timeout)

    def after_fork_in_parent(self) -> None:
        if self._held_for_fork:
            self._held_for_fork = False
            self._lock.release()

    def after_fork_in_child(self) -> None:
        self._at_end.detach()
        self._start()


def _connect(path: str, timeout: float) -> sqlite3.Connection:
    # Each connection is lent to one thread at a time, though not always to the same.
    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)


def _close_all(*groups: list[Connection]) -> None:
    for group in groups:
        with suppress(IndexError):  # other threads may take some meanwhile
            while True:
                group.pop().close()


def _close_at_end(
    owner: object, lock: threading.RLock, *groups: list[Connection]
) -> finalize[..., Any]:
    """Close what is open when the owner is dropped, and at the interpreter's exit."""

    def close() -> None:
        # At the exit a daemon thread may be using a connection. If it goes on doing so the
        # operating system closes the file; if not, it does not get the lock any more.
        if any(groups) and lock.acquire(timeout=_PATIENCE_AT_EXIT):
            _close_all(*groups)

    return finalize(owner, close)

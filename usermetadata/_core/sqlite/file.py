"""The connections of one process to one SQLite file: a writer, and readers as needed."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from sqlite_utils import Database
from sqlite_utils.db import NoTable

from usermetadata._core.forking import notice
from usermetadata._core.sqlite.connecting import Connections, close_all, connect
from usermetadata._core.sqlite.errors import closed, inherited, is_read_only, moved, translate
from usermetadata._core.sqlite.indexes import missing_indexes
from usermetadata._core.sqlite.schema import check_table, create_table, has_table
from usermetadata._core.sqlite.statements import fetch, fetch_if_table, write_together
from usermetadata.exceptions import OutcomeUnknownError, StorageBusyError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from typing import Any

    from usermetadata._core.sqlite.connecting import T
    from usermetadata._core.sqlite.statements import Call, Results, Row, Sift
    from usermetadata.indexes import Index

_LOOK_EVERY = 0.1  # seconds
_MOST_READERS = 8  # each takes two or three file descriptors


class FileConnections(Connections):
    """Opens connections to a file when they are needed.

    There is one writer, used by the thread whose turn it is in ``ThreadBatches``. A reader is used
    by one thread at a time. Readers are opened after the writer, which creates file and table, and
    are closed with it: after an error the next call opens the file anew.
    """

    shares_batches = True

    def __init__(
        self, path: str, synchronous: str, timeout: float, indexes: tuple[Index, ...]
    ) -> None:
        self._synchronous = synchronous
        self._file: tuple[int, int] | None = None  # device and inode, once it was opened
        self._look_again = 0.0
        self._is_checked = False  # the table, where the file may not be written
        self._inherited: list[sqlite3.Connection] = []  # from the parent process
        super().__init__(path, timeout, indexes)

    def _start(self, *opened: list[sqlite3.Connection]) -> None:
        self._writers: list[sqlite3.Connection] = []  # none or one
        self._reopen = False
        self._generation = 0  # of the readers, which are opened and closed with the writer
        self._idle_readers: list[sqlite3.Connection] = []
        self._readers: WeakSet[sqlite3.Connection] = WeakSet()  # idle or in use
        # Reentrant: a signal handler that reads may interrupt a thread that has the lock.
        self._opening = threading.RLock()
        self._is_forking = False  # a fork is running, and has the lock above
        super()._start(self._writers, self._idle_readers)

    def file(self) -> str:
        """Return the path of the file."""
        return self.name

    def fetch(self, query: str, parameters: Sequence[object], sift: Sift = list) -> list[Row]:
        """Return those rows of a query that ``sift`` selects, without waiting for the writer."""
        notice()
        if (self._reopen or not self._writers) and not self._open_for_reading():
            with self._reading_only() as only_reader:
                if not self._is_checked and has_table(only_reader):
                    check_table(only_reader, self.name)
                    self._is_checked = True
                return fetch_if_table(only_reader, query, parameters, sift)
        if time.monotonic() > self._look_again:
            self._check_file()
        reader = None
        generation = self._generation
        try:
            # Appending to a list and popping from it need no lock.
            try:
                reader = self._idle_readers.pop()
            except IndexError:
                reader = self._open_reader()
            return fetch(reader, query, parameters, sift)
        except sqlite3.Error as error:
            self._reopen = True
            if reader is not None:
                self._close_reader(reader)
                reader = None
            raise translate(error, self.name) from error
        finally:
            if reader is not None and reader not in self._inherited:
                self._idle_readers.append(reader)
            if self.is_closed or self._is_forking or self._generation != generation:
                self._close_idle_readers()

    def administer(self, work: Callable[[Any], T]) -> T:
        """Call a function with a separate connection; it waits for writers as other programs do."""
        notice()
        if not os.path.exists(self.name):
            self._open_for_reading()
        try:
            connection = self._open_reader()
            try:
                return work(connection)
            finally:
                self._close_reader(connection)
        except sqlite3.Error as error:
            if not is_read_only(error):
                raise translate(error, self.name) from error
        with self._reading_only() as reader:
            return work(reader)

    def _open_for_reading(self) -> bool:
        """Open the writer, which creates the file; ``False`` if the file may not be written."""
        try:
            self.batches.call(())
        except StorageError as error:
            if is_read_only(error.__cause__) and os.path.isfile(self.name):
                return False
            raise
        return True

    @contextmanager
    def _reading_only(self) -> Generator[sqlite3.Connection, None, None]:
        """Open a file that this process may not write, or whose directory is not writable.

        The connection is closed after one query, because another process may begin to write.
        """
        with ExitStack() as opened:
            try:
                reader = opened.enter_context(closing(self._connect("ro")))
                try:
                    reader.execute("PRAGMA schema_version")
                except sqlite3.OperationalError as error:
                    # SQLite needs to create a log, or to undo an interrupted transaction.
                    cut_off = error.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK
                    if cut_off or not is_read_only(error) or os.path.exists(f"{self.name}-wal"):
                        raise
                    # Without a log no process is writing.
                    reader = opened.enter_context(closing(self._connect("ro&immutable=1")))
                yield reader
            except sqlite3.Error as error:
                raise translate(error, self.name) from error

    def _write_together(self, calls: Sequence[Call]) -> list[Results]:
        if self.is_closed:
            raise closed(self.name)
        try:
            if self._reopen or not self._writers:
                self._open_writer()
            if time.monotonic() > self._look_again:
                self._check_file()
            if calls == [()]:  # `fetch` only opens
                return [[]]
            return write_together(self._writers[0], calls, self.name, indexes=self.indexes)
        except OutcomeUnknownError:
            self._reopen = True
            raise
        except StorageError:
            # The file may have been replaced. A refused COMMIT leaves connections that can read.
            self._look_again = 0.0
            raise
        except (sqlite3.Error, NoTable) as error:
            failure = translate(error, self.name)
            if not isinstance(failure, StorageBusyError):
                self._reopen = True
            raise failure from error

    def close(self) -> None:
        """Close all connections; a running write or read is completed."""
        with self.batches.exclusive():
            with self._opening:
                self.is_closed = True
            self._close_idle_readers()
            close_all(self._writers)

    def before_fork(self) -> None:
        """Close all connections; wait for those in use, up to the timeout."""
        deadline = time.monotonic() + self.timeout
        super().before_fork()
        if self._has_turn_for_fork:
            close_all(self._writers)
        # From now on a returned reader is closed, and opening one waits for the fork.
        self._is_forking = self._opening.acquire(timeout=max(0, deadline - time.monotonic()))
        self._close_idle_readers()
        while self._readers and time.monotonic() < deadline:
            time.sleep(0.001)

    def after_fork_in_parent(self) -> None:
        """Release the locks."""
        if self._is_forking:
            self._is_forking = False
            self._opening.release()
        super().after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Never touch a connection that could not be closed; it belongs to the parent."""
        if self._writers or self._readers:
            _of_the_parent_process.add(self.name)
            self._inherited = [*self._writers, *self._readers]
            # Closing them would release the parent's locks. Python would close a connection with
            # its last reference, at its exit at the latest. So a reference is leaked.
            import ctypes

            for connection in self._inherited:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        super().after_fork_in_child()

    def _open_writer(self) -> None:
        close_all(self._writers)
        self._generation += 1
        self._close_idle_readers()
        self._reopen = False
        if self.name in _of_the_parent_process:
            raise inherited(self.name)
        writer = self._connect()
        try:
            self._use_wal(writer)
            writer.execute(f"PRAGMA synchronous = {self._synchronous}")
            if self._synchronous == "FULL":
                # Without this, macOS leaves the data in the drive's cache. Other systems ignore it.
                writer.execute("PRAGMA fullfsync = ON")
            database = Database(writer, execute_plugins=False)
            prepare = None
            if has_table(writer):
                check_table(writer, self.name)
            else:
                prepare = partial(create_table, database)
            if prepare is not None or missing_indexes(writer, self.indexes):
                write_together(writer, [()], self.name, indexes=self.indexes, prepare=prepare)
            self._writers.append(writer)
        except BaseException:
            writer.close()
            raise

    def _connect(self, mode: str = "rwc") -> sqlite3.Connection:
        """Open the file, which is created only once."""
        if self._file is not None:
            mode = mode.replace("rwc", "rw")
            self._check_file()
        path = self.name.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        return connect(f"file:{path}?mode={mode}", self.timeout)

    def _check_file(self) -> None:
        """Check that the path still names the file that is open.

        With a write-ahead log SQLite does not check this, and would continue in a file without a
        name.
        """
        self._look_again = 0.0
        with suppress(PermissionError):
            try:
                found = os.stat(self.name)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise moved(self.name) from error
            file = found.st_dev, found.st_ino
            self._file = self._file or file
            if self._file != file:
                raise moved(self.name)
        self._look_again = time.monotonic() + _LOOK_EVERY

    def _use_wal(self, writer: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                writer.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # Here SQLite itself does not wait for other connections, regardless of its timeout.
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _open_reader(self) -> sqlite3.Connection:
        deadline = time.monotonic() + self.timeout
        while True:
            with self._opening:
                if self.is_closed:
                    raise closed(self.name)
                if len(self._readers) < _MOST_READERS:
                    reader = self._connect()
                    self._readers.add(reader)
                    return reader
            if time.monotonic() > deadline:
                raise StorageBusyError(
                    f"{self.name}: timed out waiting for one of {_MOST_READERS} connections that"
                    " read; repeat the call, or allow a longer timeout"
                )
            time.sleep(0.001)
            with suppress(IndexError):
                return self._idle_readers.pop()

    def _close_reader(self, reader: sqlite3.Connection) -> None:
        reader.close()
        # A fork waits for the readers in this set; a kept traceback may refer to one.
        self._readers.discard(reader)

    def _close_idle_readers(self) -> None:
        with suppress(IndexError):  # other threads may take connections in between
            while True:
                self._close_reader(self._idle_readers.pop())


_of_the_parent_process: set[str] = set()  # files that this process must not open

"""The connections of one process to one SQLite file: a writer, and readers as needed."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakSet

from sqlite_utils import Database
from sqlite_utils.db import NoTable

from usermetadata._core.batching import ThreadBatches, acquire
from usermetadata._core.forking import ForkHooks, notice, watch
from usermetadata._core.sqlite.connecting import close_all, close_at_end, connect
from usermetadata._core.sqlite.errors import closed, inherited, still_open, translate
from usermetadata._core.sqlite.schema import create_table, has_table
from usermetadata._core.sqlite.statements import write
from usermetadata.exceptions import DamagedMetadataError, StorageBusyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from usermetadata._core.sqlite.statements import Changes, Results


class FileConnections(ForkHooks):
    """Opens connections to a file when they are needed; may be used from any thread.

    There is one writer, used by the thread whose turn it is in ``ThreadBatches``. A reader is used
    by one thread at a time. Readers are opened after the writer, which creates file and table, and
    are closed with it: after an error the next call opens the file anew.

    Attributes:
        batches: the calls that write; each is the id of an app and its users' changes.
        shares_batches: whether several calls may share a transaction.
    """

    shares_batches = True

    def __init__(self, path: str, synchronous: str, timeout: float) -> None:
        self.name = path
        self._synchronous = synchronous
        self._timeout = timeout
        self._closed = False
        self._inherited: list[sqlite3.Connection] = []  # from the parent process
        self._start()
        watch(self)

    def _start(self) -> None:
        self.batches: ThreadBatches[Changes, Results] = ThreadBatches(
            self._write_together, self._timeout, self.name
        )
        self._writers: list[sqlite3.Connection] = []  # none or one
        self._reopen = False
        self._generation = 0  # of the readers: they are as old as the writer
        self._idle_readers: list[sqlite3.Connection] = []
        self._readers: WeakSet[sqlite3.Connection] = WeakSet()  # idle or in use
        # Reentrant: a signal handler that reads may interrupt its own thread in there.
        self._opening = threading.RLock()
        self._is_forking = False  # and has the lock above
        self._has_turn_for_fork = False
        self._at_end = close_at_end(self, self.batches.turn, self._writers, self._idle_readers)

    def fetch(self, query: str, parameters: Sequence[object]) -> list[tuple[str, object]]:
        """Return the rows of a query, whatever the writer is doing."""
        notice()
        if self._reopen or not self._writers:
            self.batches.call(("", ()))  # it opens the writer
        reader = None
        generation = self._generation
        try:
            # Appending to a list and popping from it need no lock.
            try:
                reader = self._idle_readers.pop()
            except IndexError:
                reader = self._open_reader()
            return reader.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            failure = translate(error, self.name)
            if not isinstance(failure, DamagedMetadataError):
                self._reopen = True
                if reader is not None:
                    self._close_reader(reader)
                    reader = None
            raise failure from error
        finally:
            if reader is not None and reader not in self._inherited:
                self._idle_readers.append(reader)
            if self._closed or self._is_forking or self._generation != generation:
                self._close_idle_readers()

    def _write_together(self, calls: Sequence[Changes]) -> list[Results]:
        committing = False
        try:
            if self._closed:
                raise closed(self.name)
            if self._reopen or not self._writers:
                self._open_writer()
            writer = self._writers[0]
            if not calls[0][1] and len(calls) == 1:  # from `fetch`
                return [[]]
            cursor = writer.cursor()
            try:
                cursor.execute("BEGIN IMMEDIATE")
                results = write(cursor, calls, self.name)
                if writer in self._inherited:
                    raise inherited(self.name)
                committing = True
                cursor.execute("COMMIT")
                if writer.in_transaction:
                    raise still_open(self.name)
            except BaseException:
                # SQLite has undone some transactions itself, for example on a full disk.
                if writer not in self._inherited and writer.in_transaction:
                    cursor.execute("ROLLBACK")
                raise
            return results
        except (sqlite3.Error, NoTable) as error:
            failure = translate(error, self.name, committing=committing)
            if not isinstance(failure, StorageBusyError):
                self._reopen = True
            raise failure from error

    def close(self) -> None:
        """Close all connections; a write or read under way is completed."""
        with self._opening:
            self._closed = True
        self._close_idle_readers()
        with self.batches.exclusive():
            close_all(self._writers)

    def before_fork(self) -> None:
        """Close all connections, after waiting for those in use for as long as the timeout."""
        deadline = time.monotonic() + self._timeout
        # A fork inside a change, or while a change outlasts the timeout, takes place all the same.
        if not self.batches.is_executing_here():
            self._has_turn_for_fork = acquire(self.batches.turn, self._timeout)
            if self._has_turn_for_fork:
                close_all(self._writers)
        # From now on a reader that is given back is closed, and opening one waits for the fork.
        self._is_forking = self._opening.acquire(timeout=max(0, deadline - time.monotonic()))
        self._close_idle_readers()
        while self._readers and time.monotonic() < deadline:
            time.sleep(0.001)

    def after_fork_in_parent(self) -> None:
        """Let the other threads go on."""
        if self._is_forking:
            self._is_forking = False
            self._opening.release()
        if self._has_turn_for_fork:
            self._has_turn_for_fork = False
            self.batches.turn.release()

    def after_fork_in_child(self) -> None:
        """Never touch a connection that could not be closed; it belongs to the parent."""
        if self._writers or self._readers:
            _of_the_parent_process.add(self.name)
            self._inherited = [*self._writers, *self._readers]
            # Closing them would release the parent's locks. Python closes a connection with the
            # last reference to it, at its exit at the latest: so one is added for ever.
            import ctypes

            for connection in self._inherited:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self._at_end.detach()
        self._start()

    def _open_writer(self) -> None:
        close_all(self._writers)
        self._generation += 1
        self._close_idle_readers()
        self._reopen = False
        if self.name in _of_the_parent_process:
            raise inherited(self.name)
        writer = connect(self.name, self._timeout)
        try:
            self._use_wal(writer)
            writer.execute(f"PRAGMA synchronous = {self._synchronous}")
            if self._synchronous == "FULL":
                # Without it macOS leaves the data in the drive's cache; elsewhere it has no effect.
                writer.execute("PRAGMA fullfsync = ON")
            database = Database(writer, execute_plugins=False)
            if not has_table(database):
                with writer:
                    writer.execute("BEGIN IMMEDIATE")
                    create_table(database)
            self._writers.append(writer)
        except BaseException:
            writer.close()
            raise

    def _use_wal(self, writer: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                writer.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # Here SQLite itself does not wait for other connections, whatever its timeout.
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _open_reader(self) -> sqlite3.Connection:
        with self._opening:
            if self._closed:
                raise closed(self.name)
            reader = connect(self.name, self._timeout)
            self._readers.add(reader)
            return reader

    def _close_reader(self, reader: sqlite3.Connection) -> None:
        reader.close()
        # A fork waits for the readers in this set; an error that somebody keeps may refer to one.
        self._readers.discard(reader)

    def _close_idle_readers(self) -> None:
        with suppress(IndexError):  # other threads may take some meanwhile
            while True:
                self._close_reader(self._idle_readers.pop())


_of_the_parent_process: set[str] = set()  # files that this process must not open

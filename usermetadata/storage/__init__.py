"""The storage protocol: two methods that read and write.

Each backend is one file of this package and imports no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Self

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value


@runtime_checkable
class Storage(Protocol):
    """Keeps one JSON object per user of an app.

    Any class with these four methods is a storage, and both facades work on it. It need not check
    input: user ids are valid, and the result of a change is made of ``dict`` with ``str`` keys,
    ``list``, ``str``, ``int``, ``float``, ``bool`` and ``None``.

    Every storage promises the following. :class:`usermetadata.testing.StorageConformance` tests all
    of it but some errors, which only the author of a storage can provoke.

    **Absence.** A user has a row or none. A row that is ``{}`` is a row.

    **Exactness.** Metadata comes back equal, in type and to the last bit; only the order of
    properties may differ. User ids and app ids are compared character by character (case, blanks
    and Unicode normalisation count).

    **Atomicity.** One ``write`` happens whole or not at all; a reader sees all of it or nothing.
    No other write of that user, from any thread or process, can interleave between the moment a
    change gets the old metadata and the moment its result is stored. Writes of the same users in
    different orders all end.

    **Threads.** All methods may be called from any thread, several at a time.

    Concurrent ``asyncio`` calls share one ``read`` or one ``write`` in a worker thread. The
    attributes ``reads_in_flight`` and ``writes_in_flight`` say how many of each may run at a time;
    the default is 1. 0 means that the storage needs no thread and is called on the event loop,
    because none of its calls waits: not for a disk, a network or another process, and for another
    thread only as long as that one executes a call of the same storage. In all other cases no event
    loop is running in the thread that calls the storage, also under an override.

    **Ownership.** Results of ``read`` and ``write``, and the argument of a change, share nothing
    mutable with the stored rows or with another result. After ``write`` the same holds for the
    result of a change. A list or object that appears in it twice is stored as two.

    **Errors.** When the database fails, the method raises ``StorageError`` with the driver's error
    as its cause, and later calls work again once the cause is removed. A write that may have been
    done is never repeated: it raises ``OutcomeUnknownError``.
    """

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row; the others are missing.

        Args:
            user_ids: any number of ids, one round trip; an id may appear twice.

        Returns:
            The metadata by user id, all as of one moment.

        Raises:
            StorageError: the database failed.
            StorageBusyError: timed out waiting for another writer or a connection.
            StorageUnavailableError: the server cannot be reached.
            DamagedMetadataError: a row does not hold a JSON object.
            UsageError: the storage is closed.
        """
        ...

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order, all or none, and return when they are durable.

        A change is called with the user's metadata, or ``None`` where there is no row, and returns
        what to store, or ``None`` to remove the row. A user may appear twice: the second change
        sees the result of the first. An exception of a change propagates unchanged, and nothing of
        the whole ``write`` is stored. A storage that retries may call a change again. A change must
        not use the storage.

        Args:
            changes: pairs of a user id and the change to that user's row, any number of them.

        Returns:
            One entry per change, in order: the metadata as stored, or ``None`` if the row is gone.

        Raises:
            StorageError: the database failed; nothing is stored.
            StorageBusyError: timed out waiting for another writer or a connection; nothing is
                stored.
            StorageUnavailableError: the server cannot be reached; nothing is stored.
            OutcomeUnknownError: the connection or the disk failed during the write; all is
                stored or nothing.
            DamagedMetadataError: a row that a change needs does not hold a JSON object.
            UsageError: the storage is closed.
        """
        ...

    def for_app(self, app_id: str) -> Self:
        """Return the same storage for another app; neither sees the other's rows.

        Both share the connections, so closing one closes both. It is called on event loops, and so
        does no I/O.

        Args:
            app_id: any valid app id; a storage starts with ``"public"``.

        Raises:
            InvalidInputError: the app id is not valid.
        """
        ...

    def close(self) -> None:
        """Close what the storage holds open; it may be called twice.

        Every later ``read`` and ``write`` raises ``UsageError``. Those that are under way end, or
        raise an error of this library.
        """
        ...


@runtime_checkable
class ListingStorage(Storage, Protocol):
    """A storage that can also list its users, as the storages here can."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return the metadata of the next users, in the storage's order.

        Args:
            user_id: the last user of the page before; ``""`` to begin.
            limit: how many users to return at most.

        Returns:
            The metadata by user id, in order; empty after the last user.

        Raises:
            StorageError: as ``read`` does.
            DamagedMetadataError: a row of the page is damaged. Its ``user_id`` names the user, so
                a caller can go on after that row.
        """
        ...


@runtime_checkable
class ErasingStorage(Storage, Protocol):
    """A storage that can remove a user from all its apps, as the storages here can."""

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """Remove the rows that a user has in any app, in one transaction.

        Args:
            user_id: the user.
            check: called with each row's metadata before any is removed. If it raises, the
                exception propagates unchanged and nothing is removed. A storage that retries may
                call it again.

        Returns:
            What was removed, by app id; empty if there was nothing.

        Raises:
            StorageError: as ``write`` does.
            DamagedMetadataError: a row does not hold a JSON object; nothing is removed.
        """
        ...


@runtime_checkable
class JoiningStorage(Storage, Protocol):
    """A storage that can use a connection of the caller's, as SQLite and PostgreSQL here can."""

    def within(self, connection: object) -> AbstractContextManager[Storage]:
        """Return a block in which the storage it yields is part of the caller's transaction.

        The storage that is yielded reads and writes the rows of the same app. It never begins,
        commits, rolls back or closes the caller's transaction. Each ``write`` runs in a savepoint,
        so that the transaction stays usable after one that failed. Nothing is repeated. On a
        connection in autocommit mode each ``write`` is a transaction of its own. After the block,
        its methods raise ``UsageError``.

        Args:
            connection: the caller's connection.

        Raises:
            InvalidInputError: the connection is of no supported kind, or is one to another
                database.
        """
        ...


@runtime_checkable
class IndexedStorage(ListingStorage, Protocol):
    """A storage that finds users by properties that have an index, as the storages here can.

    ``write`` refuses values that cannot be indexed, with ``InvalidInputError``, and a value of a
    unique index that another user of the app has, with ``NotUniqueError``. Nothing of the whole
    ``write`` is stored then. What counts is the state after all changes of the ``write``, so two
    users can swap their values. This holds for all writers, from any thread or process.
    """

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The indexes that were declared."""
        ...

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        """Return the metadata of the next users whose properties have these values.

        Args:
            where: properties and their values, at least one of them indexed. Equality is of JSON
                type and value: ``1``, ``1.0``, ``True`` and ``"1"`` differ.
            after: the last user of the page before; ``""`` to begin.
            limit: how many users to return at most.

        Returns:
            The metadata by user id, in the order of ``read_after``, all as of one moment.

        Raises:
            StorageError: as ``read`` does.
        """
        ...

    def count(self, where: Mapping[str, Value] | None) -> int:
        """Return how many users have these values; without ``where``, how many users there are.

        Raises:
            StorageError: as ``read`` does.
        """
        ...

    def stored_indexes(self) -> tuple[Index, ...]:
        """Return the indexes that exist in the database, declared or not."""
        ...

    def build_indexes(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Build the declared indexes that are missing, all or none; other writers may go on.

        Args:
            progress: called from time to time with how many rows are done, and of how many.

        Returns:
            One line for each row that is in the way: whose value cannot be indexed, or is not
            unique. If there are any, nothing is changed.
        """
        ...

    def drop_index(self, name: str) -> None:
        """Remove an index from the database; without one of this name, nothing happens."""
        ...

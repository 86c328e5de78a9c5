"""The storage protocol: two methods that read and write.

Each backend is one file of this package and imports no other backend.
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

    Every storage keeps these promises. :class:`usermetadata.testing.StorageConformance` tests all
    of them, except some errors that only the author of a storage can provoke.

    **Absence.** A user has a row or none. A row that is ``{}`` is a row.

    **Exactness.** Metadata comes back equal, in type and to the last bit; only the order of
    properties may differ. User ids and app ids are compared character by character (case, blanks
    and Unicode normalisation count).

    **Atomicity.** Each ``write`` is all or nothing; a reader sees all of it or nothing. From the
    moment a change gets the old metadata until its result is stored, no other thread or process can
    write that user. Writes of the same users in different orders do not deadlock.

    **Threads.** All methods may be called from any thread, and from several at the same time.

    Concurrent ``asyncio`` calls share one ``read`` or one ``write`` in a worker thread. The
    attributes ``reads_in_flight`` and ``writes_in_flight`` are the largest numbers of each that may
    run at the same time; the default is 1. 0 means that the storage is called on the event loop,
    without a thread. Use 0 only if no call waits for a disk, a network or another process. Such a
    call may wait for another thread only while that thread executes a call of the same storage.
    With any other number, no event loop is running in the thread that calls the storage, even under
    an override.

    **Ownership.** Results of ``read`` and ``write``, and the argument of a change, share nothing
    mutable with the stored rows or with another result. After ``write`` the same applies to the
    result of a change. A list or object that appears twice in it is stored twice.

    **Errors.** If the database fails, the method raises ``StorageError`` with the driver's error as
    its cause. Later calls work once the database works again. A write that may have been done is
    never repeated: it raises ``OutcomeUnknownError``.
    """

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of the users that have a row; users without one are left out.

        Args:
            user_ids: any number of ids, read in one round trip; an id may appear twice.

        Returns:
            The metadata by user id, all from one consistent snapshot.

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

        A change is called with the user's metadata, or with ``None`` if there is no row. It returns
        the metadata to store, or ``None`` to remove the row. A user may appear twice: the second
        change sees the result of the first. An exception of a change propagates unchanged, and the
        whole ``write`` stores nothing. A storage that retries may call a change again. A change
        must not use the storage.

        Args:
            changes: pairs of a user id and the change to that user's row, any number of them.

        Returns:
            One entry per change, in order: the metadata as stored, or ``None`` if the row is gone.

        Raises:
            StorageError: the database failed; nothing is stored.
            StorageBusyError: timed out waiting for another writer or a connection; nothing is
                stored.
            StorageUnavailableError: the server cannot be reached; nothing is stored.
            OutcomeUnknownError: the connection or the disk failed during the write; all of it was
                stored, or nothing.
            DamagedMetadataError: a row that a change needs does not hold a JSON object.
            UsageError: the storage is closed.
        """
        ...

    def for_app(self, app_id: str) -> Self:
        """Return this storage for another app; neither sees the other's rows.

        Both share the connections, so closing one closes both. The method is called on event loops,
        so it must not do I/O.

        Args:
            app_id: 1 to 64 characters, without U+0000; a storage starts with ``"public"``.

        Returns:
            The storage for the app.

        Raises:
            InvalidInputError: the app id is not valid.
        """
        ...

    def close(self) -> None:
        """Close what the storage has opened; a second call does nothing.

        Every later ``read`` and ``write`` raises ``UsageError``. Calls that are still running
        complete, or raise an error of this library.
        """
        ...


@runtime_checkable
class ListingStorage(Storage, Protocol):
    """A storage that can also list its users; all storages of this library can."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return one page of users and their metadata, in the storage's order.

        Args:
            user_id: the last user of the previous page; ``""`` for the first page.
            limit: the largest number of users to return.

        Returns:
            The metadata by user id, in order; empty after the last user.

        Raises:
            StorageError: as for ``read``.
            DamagedMetadataError: a row of the page is damaged. The error's ``user_id`` names the
                user, so the caller can continue after that row.
        """
        ...


@runtime_checkable
class ErasingStorage(Storage, Protocol):
    """A storage that can remove a user from all its apps; all storages of this library can."""

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """Remove a user's rows from all apps, in one transaction.

        Args:
            user_id: the user.
            check: called with each row's metadata before any row is removed. If it raises, the
                exception propagates unchanged and nothing is removed. A storage that retries may
                call it again.

        Returns:
            The removed metadata by app id; empty if there was nothing.

        Raises:
            StorageError: as for ``write``.
            DamagedMetadataError: a row does not hold a JSON object; nothing is removed.
        """
        ...


@runtime_checkable
class JoiningStorage(Storage, Protocol):
    """A storage that can use the caller's connection; those for SQLite and PostgreSQL can."""

    def within(self, connection: object) -> AbstractContextManager[Storage]:
        """Return a context manager that yields a storage in the caller's transaction.

        The yielded storage reads and writes the rows of the same app. It never begins, commits,
        rolls back or closes the caller's transaction. Each ``write`` runs in a savepoint, so the
        transaction stays usable after a failed ``write``. No call is retried. On a connection in
        autocommit mode each ``write`` is a separate transaction. After the block, the storage's
        methods raise ``UsageError``.

        Args:
            connection: the caller's connection; which kinds are supported is up to the storage.

        Returns:
            The context manager. It does not close the connection.

        Raises:
            InvalidInputError: the connection is not supported, or is connected to another database.
        """
        ...


@runtime_checkable
class IndexedStorage(ListingStorage, Protocol):
    """A storage that can find users by indexed properties; all storages of this library can.

    ``write`` raises ``InvalidInputError`` for a value that cannot be indexed, and
    ``NotUniqueError`` for a value of a unique index that another user of the app has. The whole
    ``write`` then stores nothing. Uniqueness is checked after all changes of the ``write``, so two
    users can swap their values. These rules apply to all writers, from any thread or process.
    """

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The declared indexes."""
        ...

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        """Return one page of the users whose properties have these values.

        Args:
            where: properties and their values, at least one of them indexed. JSON type and value
                must be equal: ``1``, ``1.0``, ``True`` and ``"1"`` differ.
            after: the last user of the previous page; ``""`` for the first page.
            limit: the largest number of users to return.

        Returns:
            The metadata by user id, in the order of ``read_after``, all from one consistent
            snapshot.

        Raises:
            StorageError: as for ``read``.
        """
        ...

    def count(self, where: Mapping[str, Value] | None) -> int:
        """Return the number of users with these values, or of all users.

        Args:
            where: as for ``find``; ``None`` means all users.

        Returns:
            The number of users. A user whose metadata is ``{}`` counts.

        Raises:
            StorageError: as for ``read``.
        """
        ...

    def stored_indexes(self) -> tuple[Index, ...]:
        """Return the indexes that exist in the database, declared or not.

        Raises:
            StorageError: as for ``read``.
        """
        ...

    def build_indexes(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Build the missing declared indexes, all or none; other writers can continue.

        Args:
            progress: called from time to time with the number of rows that are done, and of all
                rows.

        Returns:
            One line for each row whose value cannot be indexed or is not unique. If there are such
            rows, nothing is changed.

        Raises:
            StorageError: as for ``write``.
        """
        ...

    def drop_index(self, name: str) -> None:
        """Remove an index from the database; no error if none has this name.

        Args:
            name: the property of the index.

        Raises:
            StorageError: as for ``write``.
        """
        ...

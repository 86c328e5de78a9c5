"""The storage protocol: where metadata is kept, in two verbs.

Each backend is one file of this package and knows nothing of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


@runtime_checkable
class Storage(Protocol):
    """Keeps one JSON object per user of an app.

    Any class with these four methods is a storage. Both facades work on it; it never checks input,
    for that has been done when it is called: user ids are valid, and what a change returns is
    made of ``dict`` with ``str`` keys, ``list``, ``str``, ``int``, ``float``, ``bool``, ``None``.

    What every storage promises, and :class:`usermetadata.testing.StorageConformance` holds it to
    (errors apart, which only the author of a storage can provoke):

    **Absence.** A user has a row or none. A row that is ``{}`` is a row.

    **Exactness.** Metadata comes back equal, in type and to the last bit; only the order of
    properties is left open. User ids and app ids are told apart character by character (case,
    blanks and Unicode normalisation count).

    **Atomicity.** One ``write`` happens whole or not at all; a reader sees all of it or nothing.
    No other write of that user, from any thread or process, comes between the moment a change is
    given the old metadata and the moment its result is stored.

    **Threads.** All methods may be called from any thread, several at a time.

    Where ``asyncio`` calls a storage, concurrent calls share one ``read`` or one ``write`` in a
    worker thread. Attributes ``reads_in_flight`` and ``writes_in_flight`` say how many of each may
    run at a time; without them it is one. 0 says that the storage never waits for anything and
    needs no thread.

    **Ownership.** What ``read`` and ``write`` return, and what a change is given, shares nothing
    mutable with what is stored, nor with another result; nor does what a change returned once
    ``write`` is over. A list or object that it returned in two places is read as two.

    **Errors.** When the database fails, the method raises ``StorageError`` with the driver's error
    as its cause, and later calls work again once the trouble is over.
    """

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row; the others are absent.

        Args:
            user_ids: any number of ids, one round trip; an id may appear twice.

        Returns:
            The metadata by user id, all as of one moment.

        Raises:
            StorageError: the database failed.
            StorageBusyError: others did not let go in time.
            StorageUnavailableError: the server cannot be reached.
            DamagedMetadataError: a row does not hold a JSON object.
            UsageError: the storage is closed.
        """
        ...

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order, all or none, and return when they are durable.

        A change is called with the user's metadata, or ``None`` where there is no row, and returns
        what to store, or ``None`` to remove the row. A user may appear twice: the second change
        sees the result of the first. An exception that a change raises is passed on as it is, and
        nothing of the whole ``write`` is stored. A storage that retries may call a change again. A
        change must not use the storage.

        Args:
            changes: pairs of a user id and the change to that user's row.

        Returns:
            One entry per change, in order: the metadata as stored, or ``None`` if the row is gone.

        Raises:
            StorageError: the database failed; nothing is stored.
            StorageBusyError: others did not let go in time; nothing is stored.
            StorageUnavailableError: the server cannot be reached; nothing is stored.
            OutcomeUnknownError: connection or disk failed in between; all is stored or nothing.
            DamagedMetadataError: a row that a change needs does not hold a JSON object.
            UsageError: the storage is closed.
        """
        ...

    def for_app(self, app_id: str) -> Self:
        """Return the same storage, seen from another app: neither ever sees the other's rows.

        Both share the connections, so closing one closes both.

        Args:
            app_id: any valid app id; ``"public"`` is the one that a storage starts with.

        Raises:
            InvalidInputError: the app id is not valid.
        """
        ...

    def close(self) -> None:
        """Give back what the storage holds open; it may be called twice.

        Every later ``read`` and ``write`` raises ``UsageError``.
        """
        ...


@runtime_checkable
class ListingStorage(Storage, Protocol):
    """A storage that can also go through all its users, to export them; those here can."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return the metadata of the next users, in an order of the storage's own.

        Args:
            user_id: the last one that is known already; ``""`` to begin.
            limit: how many users to return at most.

        Returns:
            The metadata by user id, in order; empty if there is nobody any more.

        Raises:
            StorageError: as ``read`` does.
        """
        ...

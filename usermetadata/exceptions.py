"""The errors that this library raises; all are subclasses of ``UserMetadataError``."""

from __future__ import annotations


class UserMetadataError(Exception):
    """Base class of every error that the library itself raises."""


class InvalidInputError(UserMetadataError, ValueError):
    """An argument cannot be stored; nothing was written. The message says where the fault is."""


class UsageError(UserMetadataError, RuntimeError):
    """The configuration, or the place or time of the call, does not allow the call.

    For example, ``init`` was not called, a function given to ``modify_user_metadata`` makes the
    call, or no property of a search is indexed. The message says what to change.
    """


class StorageError(UserMetadataError):
    """The storage failed and nothing was written; ``__cause__`` is the driver's error."""


class StorageUnavailableError(StorageError, ConnectionError):
    """The database server cannot be reached; nothing was written."""


class OutcomeUnknownError(StorageError):
    """The connection, disk or COMMIT failed during a write; all of it was stored, or nothing.

    Repeating an update is safe if no other writer changes the same properties in between.
    """


class StorageBusyError(StorageError, TimeoutError):
    """Timed out waiting for another writer, a row lock or a connection; nothing was written."""


class NotUniqueError(UserMetadataError, ValueError):
    """Another user of the app has the same value of a property whose index is unique.

    Nothing was written.

    Args:
        name: the property.
        user_id: the user who has the value; ``None`` if that is not known.

    Attributes:
        name: the property.
        user_id: the user who has the value; ``None`` if that is not known.
    """

    def __init__(self, name: str, user_id: str | None = None) -> None:
        who = "another user" if user_id is None else f"user {user_id!r}"
        super().__init__(
            f"property {name!r}: {who} has this value, and its index is unique; nothing was"
            " written; choose another value"
        )
        self.name = name
        self.user_id = user_id


class DamagedMetadataError(StorageError, ValueError):
    """A stored row is not a JSON object; setting or clearing the user's metadata repairs it.

    Args:
        message: what is damaged.
        user_id: the user whose row it is; ``None`` if the storage does not say.

    Attributes:
        user_id: the user whose row it is; ``None`` if the storage does not say.
    """

    def __init__(self, message: str, user_id: str | None = None) -> None:
        super().__init__(message)
        self.user_id = user_id

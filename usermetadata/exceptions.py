"""The errors this library raises: all are ``UserMetadataError``."""

from __future__ import annotations


class UserMetadataError(Exception):
    """Base of every error that the library itself raises."""


class InvalidInputError(UserMetadataError, ValueError):
    """An argument cannot be stored; nothing was written. The message says where the fault is."""


class UsageError(UserMetadataError, RuntimeError):
    """The library was called at the wrong time: before ``init``, after ``close``, twice."""


class StorageError(UserMetadataError):
    """The storage failed and nothing was written; ``__cause__`` is the driver's own error."""


class StorageUnavailableError(StorageError, ConnectionError):
    """The database server cannot be reached; nothing was written."""


class OutcomeUnknownError(StorageError):
    """Connection, disk or COMMIT failed during a write, which was done whole or not at all.

    To repeat an update is safe if nobody else writes the same properties meanwhile.
    """


class StorageBusyError(StorageError, TimeoutError):
    """Others held the storage for longer than its timeout; nothing was written: repeat the call."""


class DamagedMetadataError(StorageError, ValueError):
    """A stored row is not a JSON object; ``set_user_metadata`` and ``clear_user_metadata`` help."""

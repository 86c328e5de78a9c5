"""One JSON object per user, with atomic merges: in memory, SQLite, PostgreSQL or your own storage.

``init`` chooses the storage. The functions are in ``usermetadata.syncio`` and
``usermetadata.asyncio``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from usermetadata.client import UserMetadata, UserMetadataRecipe, close, init, within
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    NotUniqueError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
    UserMetadataError,
)
from usermetadata.interfaces import InputOverrideConfig, UserMetadataOverrideConfig
from usermetadata.merge import merge_metadata

if TYPE_CHECKING:
    from usermetadata.indexes import Index
    from usermetadata.storage import Storage
    from usermetadata.storage.memory import InMemoryStorage
    from usermetadata.storage.postgres import PostgresStorage as PostgresStorage
    from usermetadata.storage.sqlite import SQLiteStorage

_LAZY = {
    "InMemoryStorage": "usermetadata.storage.memory",
    "Index": "usermetadata.indexes",
    "PostgresStorage": "usermetadata.storage.postgres",
    "SQLiteStorage": "usermetadata.storage.sqlite",
    "Storage": "usermetadata.storage",
}


def __getattr__(name: str) -> object:
    # Imported on first use: sqlite-utils and psycopg are slow to import.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Without PostgresStorage: `import *` would fail if psycopg is not installed.
__all__ = [
    "DamagedMetadataError",
    "InMemoryStorage",
    "Index",
    "InputOverrideConfig",
    "InvalidInputError",
    "NotUniqueError",
    "OutcomeUnknownError",
    "SQLiteStorage",
    "Storage",
    "StorageBusyError",
    "StorageError",
    "StorageUnavailableError",
    "UsageError",
    "UserMetadata",
    "UserMetadataError",
    "UserMetadataOverrideConfig",
    "UserMetadataRecipe",
    "close",
    "init",
    "merge_metadata",
    "within",
]

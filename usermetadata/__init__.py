"""Keep a JSON object about each user, in memory, in SQLite or in a storage of your own.

``init`` says where; the functions are in ``usermetadata.syncio`` and ``usermetadata.asyncio``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    StorageBusyError,
    StorageError,
    UsageError,
    UserMetadataError,
)
from usermetadata.merge import merge_metadata
from usermetadata.recipe import (
    InputOverrideConfig,
    UserMetadataOverrideConfig,
    UserMetadataRecipe,
    init,
)
from usermetadata.storage import Storage
from usermetadata.storage.memory import InMemoryStorage

if TYPE_CHECKING:
    from usermetadata.storage.sqlite import SQLiteStorage
else:

    def __getattr__(name: str) -> object:
        # sqlite-utils takes a while to import, and only those who use it should wait for it.
        if name == "SQLiteStorage":
            from usermetadata.storage.sqlite import SQLiteStorage

            return SQLiteStorage
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DamagedMetadataError",
    "InMemoryStorage",
    "InputOverrideConfig",
    "InvalidInputError",
    "SQLiteStorage",
    "Storage",
    "StorageBusyError",
    "StorageError",
    "UsageError",
    "UserMetadataError",
    "UserMetadataOverrideConfig",
    "UserMetadataRecipe",
    "init",
    "merge_metadata",
]

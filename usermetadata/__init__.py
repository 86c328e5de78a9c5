"""Keep a JSON object about each user, in memory, SQLite, PostgreSQL or a storage of your own.

``init`` says where; the functions are in ``usermetadata.syncio`` and ``usermetadata.asyncio``.
"""

from __future__ import annotations

from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
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

TYPE_CHECKING = False  # typing's own would import typing, which takes longer than all the rest
if TYPE_CHECKING:
    from usermetadata.storage import Storage
    from usermetadata.storage.memory import InMemoryStorage
    from usermetadata.storage.postgres import PostgresStorage as PostgresStorage
    from usermetadata.storage.sqlite import SQLiteStorage
else:

    def __getattr__(name: str) -> object:
        # On first use: sqlite-utils takes a while, and memory is not for everybody either.
        if name == "InMemoryStorage":
            from usermetadata.storage.memory import InMemoryStorage

            return InMemoryStorage
        if name == "PostgresStorage":
            from usermetadata.storage.postgres import PostgresStorage

            return PostgresStorage
        if name == "SQLiteStorage":
            from usermetadata.storage.sqlite import SQLiteStorage

            return SQLiteStorage
        if name == "Storage":
            from usermetadata.storage import Storage

            return Storage
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Without PostgresStorage, which an import of everything could not find if psycopg is missing.
__all__ = [
    "DamagedMetadataError",
    "InMemoryStorage",
    "InputOverrideConfig",
    "InvalidInputError",
    "OutcomeUnknownError",
    "SQLiteStorage",
    "Storage",
    "StorageBusyError",
    "StorageError",
    "StorageUnavailableError",
    "UsageError",
    "UserMetadataError",
    "UserMetadataOverrideConfig",
    "UserMetadataRecipe",
    "init",
    "merge_metadata",
]

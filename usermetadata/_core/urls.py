"""Storages by URL or by path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from usermetadata.exceptions import InvalidInputError

if TYPE_CHECKING:
    from usermetadata.storage import Storage

DEFAULT_URL = "sqlite:///users.db"


def open_storage(storage: Storage | str | os.PathLike[str]) -> Storage:
    """Return the storage that a URL or a path names, or the storage itself.

    Raises:
        InvalidInputError: it is none of these.
    """
    if isinstance(storage, str):
        scheme, separator, rest = storage.partition("://")
        if not separator:
            return _open_sqlite(storage)
        if storage == "memory://":
            from usermetadata.storage.memory import InMemoryStorage

            return InMemoryStorage()
        if scheme == "sqlite" and rest[:1] in ("", "/"):
            return _open_sqlite(rest[1:] or ":memory:")
        if scheme in ("postgresql", "postgres"):
            from usermetadata.storage.postgres import PostgresStorage

            return PostgresStorage(storage)
        raise InvalidInputError(
            f'storage: unsupported storage URL: {scheme}://; pass "memory://",'
            ' "sqlite:///users.db", "sqlite:////absolute/path/users.db" or "postgresql://..."'
        )
    if isinstance(storage, os.PathLike):
        return _open_sqlite(storage)
    from usermetadata.storage import Storage

    if isinstance(storage, Storage) and not isinstance(storage, type):
        return storage
    raise InvalidInputError(
        f"storage: {type(storage).__name__} is not a storage, a URL or a path;"
        ' pass "sqlite:///users.db"'
    )


def _open_sqlite(path: str | os.PathLike[str]) -> Storage:
    from usermetadata.storage.sqlite import SQLiteStorage

    return SQLiteStorage(path)

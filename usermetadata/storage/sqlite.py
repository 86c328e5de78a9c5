"""The SQLite storage: one file, through sqlite-utils."""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Literal

from sqlite_utils import Database

from usermetadata.changes import Clear, Merge, Replace
from usermetadata.exceptions import DamagedMetadataError, InvalidInputError
from usermetadata.identifiers import check_app_id
from usermetadata.json import decode_metadata, encode_metadata
from usermetadata.storage.sqlite_connections import OneConnection, OwnConnections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from usermetadata.changes import Change
    from usermetadata.json import Metadata
    from usermetadata.storage.sqlite_connections import Connection

_READ_ONE = "SELECT user_id, user_metadata FROM user_metadata WHERE app_id = ? AND user_id = ?"
_READ_MANY = (
    "SELECT user_id, user_metadata FROM user_metadata"
    " WHERE app_id = ? AND user_id IN (SELECT value FROM json_each(?))"
)
_READ_AFTER = (
    "SELECT user_id, user_metadata FROM user_metadata"
    " WHERE app_id = ? AND user_id > ? ORDER BY user_id LIMIT ?"
)
_STORE = (
    "INSERT INTO user_metadata (app_id, user_id, user_metadata) VALUES (?, ?, ?)"
    " ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = excluded.user_metadata"
)
_REMOVE = "DELETE FROM user_metadata WHERE app_id = ? AND user_id = ?"

_SHAREABLE = {Merge, Replace, Clear}  # any other change may be bound to its thread
_BLIND = (Clear, Replace)  # they do not look at what is stored, and so mend a damaged row, too

_MAX_TIMEOUT = 1_000_000  # seconds; SQLite counts milliseconds in 31 bits


class SQLiteStorage:
    """Keeps metadata in the table ``user_metadata`` of an SQLite database.

    Given a path, the storage opens connections of its own at the first call, creates file and table
    where they are missing, and may be used from any number of threads and processes, also across
    ``fork``. The file is in WAL mode: readers never wait for a writer.

    Given a ``sqlite_utils.Database``, the storage borrows its connection: while the caller has a
    transaction open, writes are part of it and become durable with its commit. The caller opens the
    connection (with ``check_same_thread=False`` if other threads or asyncio use the storage),
    closes it, and does not share it across a ``fork``.

    Args:
        database: the path of the file, ``":memory:"``, or a ``sqlite_utils.Database``.
        app_id: the app whose rows these are.
        synchronous: ``"FULL"``: what a call has written survives a power cut. ``"NORMAL"``: faster;
            a power cut may take the last writes, but never damages the file. For a path.
        timeout: seconds that a write waits for the threads before it, and then for other processes,
            before it raises ``StorageBusyError``. For a path.

    Raises:
        InvalidInputError: an argument is not valid. Nothing is opened before the first call.

    Example:
        >>> from usermetadata.changes import Merge
        >>> storage = SQLiteStorage(":memory:")
        >>> storage.write([("alice", Merge({"theme": "dark"}))])
        [{'theme': 'dark'}]
        >>> storage.read(["alice", "bob"])
        {'alice': {'theme': 'dark'}}
        >>> storage.close()

    What the settings mean is SQLite's: `WAL <https://sqlite.org/wal.html>`_, `synchronous
    <https://sqlite.org/pragma.html#pragma_synchronous>`_.
    """

    reads_in_flight, writes_in_flight = 2, 1

    def __init__(
        self,
        database: str | os.PathLike[str] | Database,
        *,
        app_id: str = "public",
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        timeout: float = 30.0,
    ) -> None:
        self._app_id = check_app_id(app_id)
        if synchronous not in ("FULL", "NORMAL"):
            raise InvalidInputError(f'synchronous: {synchronous!r} is neither "FULL" nor "NORMAL"')
        if not isinstance(timeout, (int, float)) or not 0 <= timeout <= _MAX_TIMEOUT:
            raise InvalidInputError(f"timeout: {timeout!r} is not a number of seconds from 0 on")
        self._connections: OneConnection | OwnConnections
        if isinstance(database, Database):
            self._connections = OneConnection(database, timeout)
        elif database == ":memory:":
            self._connections = OneConnection(None, timeout)
        elif isinstance(database, (str, os.PathLike)):
            self._connections = OwnConnections(_check_path(database), synchronous, timeout)
        else:
            raise InvalidInputError(
                f"database: {type(database).__name__} is neither a path nor a sqlite_utils.Database"
            )

    def __repr__(self) -> str:
        return f"SQLiteStorage({self._connections.name!r}, app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row, in one query."""
        query, parameters = self._query(user_ids)
        return self._connections.read(query, parameters, self._decode)

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return the metadata of the next users, in the order of their code points."""
        return self._connections.read(_READ_AFTER, (self._app_id, user_id, limit), self._decode)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order in one transaction, opened by ``BEGIN IMMEDIATE``."""
        return self._connections.write(
            lambda connection: self._apply(connection, changes),
            shareable={type(change) for _, change in changes} <= _SHAREABLE,
        )

    def for_app(self, app_id: str) -> Self:
        """Return the same storage, seen from another app."""
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        """Close the connections that the storage opened itself."""
        self._connections.close()

    def _apply(
        self, connection: Connection, changes: Sequence[tuple[str, Change]]
    ) -> list[Metadata | None]:
        to_read = [user_id for user_id, change in changes if not isinstance(change, _BLIND)]
        texts: dict[str, str] = dict(connection.run(*self._query(to_read)))
        results: list[Metadata | None] = []
        for user_id, change in changes:
            old = None
            if user_id in texts and not isinstance(change, _BLIND):
                old = self._decode(user_id, texts[user_id])
            new = change(old)
            results.append(new)
            if new is None:
                texts.pop(user_id, None)
            else:
                texts[user_id] = encode_metadata(new)
        to_store, to_remove = [], []
        for user_id in dict(changes):
            if user_id in texts:
                to_store.append((self._app_id, user_id, texts[user_id]))
            else:
                to_remove.append((self._app_id, user_id))
        connection.run_many(_STORE, to_store)
        connection.run_many(_REMOVE, to_remove)
        return results

    def _query(self, user_ids: Sequence[str]) -> tuple[str, tuple[str, str]]:
        if len(user_ids) == 1:
            return _READ_ONE, (self._app_id, user_ids[0])
        return _READ_MANY, (self._app_id, json.dumps(user_ids))

    def _decode(self, user_id: str, text: object) -> Metadata:
        try:
            if not isinstance(text, str):
                raise ValueError(f"it is a {type(text).__name__}, not text")
            return decode_metadata(text)
        except ValueError as error:
            raise DamagedMetadataError(
                f"{self._connections.name}: the metadata of user {user_id!r} in app"
                f" {self._app_id!r} is damaged: {error}; set or clear it to mend it"
            ) from error


def _check_path(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise InvalidInputError(f'database: {text!r} cannot be a path: name a file, or ":memory:"')
    return os.path.abspath(text)

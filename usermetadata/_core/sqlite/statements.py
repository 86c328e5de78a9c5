"""The SQLite storage's statements, and a batch of writes as one transaction."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from usermetadata._core import forking
from usermetadata._core.erasing import Erasure
from usermetadata._core.reentry import ChangeError
from usermetadata._core.rows import decode_row, text_or_bytes
from usermetadata._core.sqlite.errors import (
    after_commit,
    inherited,
    not_stored,
    still_open,
)
from usermetadata._core.sqlite.indexes import ensure_indexes, not_unique, refused_by
from usermetadata.changes import BLIND, Merge, apply_in_order
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import DamagedMetadataError
from usermetadata.indexes import values_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Generator, Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index

    Row = tuple[str, object]
    Sift = Callable[[sqlite3.Cursor], list[Row]]
    """Selects some of a query's rows; it closes the cursor if it may leave some."""
    Key = tuple[str, str]
    """The ids of an app and of a user."""
    Changes = Sequence[tuple[Key, Change]]
    Call = Changes | Erasure
    Results = list[Metadata | None]

READ_ONE = "SELECT user_id, user_metadata FROM user_metadata WHERE app_id = ? AND user_id = ?"
READ_MANY = (
    "SELECT user_id, user_metadata FROM user_metadata"
    " WHERE app_id = ? AND user_id IN (SELECT value FROM json_each(?))"
)
READ_AFTER = (
    "SELECT user_id, user_metadata FROM user_metadata"
    " WHERE app_id = ? AND user_id > ? ORDER BY user_id LIMIT ?"
)
_STORE = (
    "INSERT INTO user_metadata (app_id, user_id, user_metadata) VALUES (?, ?, ?)"
    " ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = excluded.user_metadata"
)
_REMOVE = "DELETE FROM user_metadata WHERE app_id = ? AND user_id = ?"
_EMPTY = "UPDATE user_metadata SET user_metadata = '{}' WHERE app_id = ? AND user_id = ?"
_HAS_INDEX_OF_USERS = """
SELECT idx.name, NULL
FROM pragma_index_list('user_metadata') AS idx, pragma_index_info(idx.name) AS col
WHERE NOT partial AND seqno = 0 AND col.name = 'user_id'
"""
_APPS = "SELECT app_id, NULL FROM user_metadata WHERE user_id = ?"
# The key begins with the app, so `_APPS` would read every row. This jumps in the key's index from
# each app to the next.
_APPS_WITHOUT_INDEX = """
WITH RECURSIVE app (id) AS (
    SELECT min(app_id) FROM user_metadata
    UNION ALL
    SELECT (SELECT min(app_id) FROM user_metadata WHERE app_id > id) FROM app WHERE id IS NOT NULL)
SELECT app_id, NULL FROM app CROSS JOIN user_metadata ON app_id = id AND user_id = ?
"""


def fetch(
    source: sqlite3.Connection | sqlite3.Cursor,
    query: str,
    parameters: Sequence[object],
    sift: Sift = list,
) -> list[Row]:
    """Return the rows of a query, with bytes in place of text that is not UTF-8.

    The driver's error quotes that text, and does not say whose it is.
    """
    try:
        return sift(source.execute(query, parameters))
    except Exception as error:  # the driver may not be the standard library's
        if not str(error).startswith("Could not decode to UTF-8"):
            raise
    connection: Any = getattr(source, "connection", source)
    before, connection.text_factory = connection.text_factory, text_or_bytes
    try:
        return sift(source.execute(query, parameters))
    finally:
        connection.text_factory = before


def fetch_if_table(
    connection: sqlite3.Connection, query: str, parameters: Sequence[object], sift: Sift
) -> list[Row]:
    """Return the rows of a query on a connection that cannot create the table.

    There are no rows until another process's first write has created the table.
    """
    try:
        return fetch(connection, query, parameters, sift)
    except connection.Error as error:
        if str(error) != "no such table: user_metadata":
            raise
        return []


@contextmanager
def plain_rows(connection: sqlite3.Connection) -> Generator[None, None, None]:
    """Get rows as tuples of ``str`` in a block, whatever the caller has set."""
    row_factory, text_factory = connection.row_factory, connection.text_factory
    try:
        connection.row_factory, connection.text_factory = None, str
        yield
    finally:
        connection.row_factory, connection.text_factory = row_factory, text_factory


def main_file(connection: sqlite3.Connection) -> str:
    """Return the path of the connection's file; empty if the database is in memory."""
    rows = connection.execute("PRAGMA database_list").fetchall()
    files: dict[str, str] = {name: file for _, name, file in rows}
    return files["main"]


def write_together(  # noqa: C901, PLR0913 - one transaction, step by step
    connection: sqlite3.Connection,
    calls: Sequence[Call],
    name: str,
    *,
    indexes: Sequence[Index] = (),
    prepare: Callable[[], object] | None = None,
    leave_open: bool = False,
) -> list[Results]:
    """Apply the changes of some calls in one transaction, or in the one that is open.

    Args:
        connection: a connection without another user, whose rows are tuples of ``str``.
        calls: the changes of each call, in order, or an erasure.
        name: the name of the database, for error messages.
        indexes: the declared indexes; missing ones are built.
        prepare: called first in the transaction; it creates the table if that is missing.
        leave_open: whether the caller commits a transaction that is begun here.

    Returns:
        The results of each call.

    Raises:
        ChangeError: a change has raised an exception, or a row that it reads is damaged.
        StorageError: the database did not store what it was given, or it was not committed.
        UsageError: a missing index cannot be built automatically.
        sqlite3.Error: a statement failed.
    """
    process = forking.process
    joins = connection.in_transaction
    begin, commit, undo = _JOINED if joins else _LEFT_OPEN if leave_open else _OWN
    begun = False
    cursor = connection.cursor()
    try:
        cursor.execute(begin)
        begun = True
        if prepare is not None:
            prepare()
        if indexes:
            ensure_indexes(connection, name, indexes)
        changes = [
            _changes_of(cursor, call, name) if isinstance(call, Erasure) else call for call in calls
        ]
        if len(changes) == 1 or any(index.unique for index in indexes):
            # Each call leaves unique values behind, not only all of them together.
            results = [_write(cursor, each, name, indexes) for each in changes]
        else:
            in_order = [change for each in changes for change in each]
            together = iter(_write(cursor, in_order, name, indexes))
            results = [[next(together) for _ in each] for each in changes]
        if forking.process != process:  # a change has forked: the parent has the transaction
            raise inherited(name)
        try:
            cursor.execute(commit)
        except connection.Error as error:
            if not joins:
                after_commit(error, name)
            raise
        if commit == "COMMIT" and connection.in_transaction:
            raise still_open(name)
    except BaseException:
        # SQLite has undone some transactions itself, for example on a full disk.
        if forking.process == process and connection.in_transaction and (begun or not joins):
            for statement in undo:
                cursor.execute(statement)
        raise
    return results


_OWN = ("BEGIN IMMEDIATE", "COMMIT", ["ROLLBACK"])
_LEFT_OPEN = ("BEGIN IMMEDIATE", "", ["ROLLBACK"])
_JOINED = (
    "SAVEPOINT usermetadata",
    "RELEASE usermetadata",
    ["ROLLBACK TO usermetadata", "RELEASE usermetadata"],
)


def _changes_of(cursor: sqlite3.Cursor, erasure: Erasure, name: str) -> Changes:
    query = _APPS if fetch(cursor, _HAS_INDEX_OF_USERS, ()) else _APPS_WITHOUT_INDEX
    app_ids = [app_id for app_id, _ in fetch(cursor, query, (erasure.user_id,))]
    for app_id in app_ids:
        if not isinstance(app_id, str):  # of a row that another program wrote
            raise DamagedMetadataError(
                f"{name}: an app id of user {erasure.user_id!r} is not text: {app_id!r}; remove the"
                " row"
            )
    return erasure.changes(sorted(app_ids))


def _write(
    cursor: sqlite3.Cursor, changes: Changes, name: str, indexes: Sequence[Index]
) -> Results:
    texts = _read(cursor, [key for key, change in changes if not isinstance(change, BLIND)])
    try:
        results = apply_in_order(
            changes, texts, decode=partial(decode_row, name), encode=encode_metadata
        )
        for ((_, user_id), change), new in zip(changes, results, strict=True) if indexes else ():
            # A merge may leave a value as it is that a program without the index has stored.
            values_of(change.update if isinstance(change, Merge) else new or {}, indexes, user_id)
    except Exception as error:
        raise ChangeError(error) from error
    gone = {key for key, _ in changes} - texts.keys() if None in results else None
    # A trigger can drop a row without an error, so the rows are counted. Rows are removed first,
    # because others may get their values.
    if gone:
        cursor.executemany(_REMOVE, gone)
        if cursor.rowcount != len(gone):
            for key in _read(cursor, list(gone)):
                raise not_stored(name, key)
    if texts and _store(cursor, texts) != len(texts):
        stored = _read(cursor, list(texts))
        for key, text in texts.items():
            if stored.get(key) != text:
                raise not_stored(name, key)
    return results


def _store(cursor: sqlite3.Cursor, texts: dict[Key, object]) -> int:
    """Store the rows and return how many SQLite has counted."""
    try:
        cursor.executemany(_STORE, [(*key, text) for key, text in texts.items()])
    except cursor.connection.IntegrityError as error:
        if refused_by(error) is None:
            raise
    else:
        return cursor.rowcount
    # SQLite compares each row with those that are there. Two users may exchange their values, so
    # the old values of all are removed first.
    cursor.executemany(_EMPTY, texts)
    count = 0
    for key, text in texts.items():
        try:
            cursor.execute(_STORE, (*key, text))
        except cursor.connection.IntegrityError as error:
            index = refused_by(error)
            if index is None:
                raise
            raise ChangeError(not_unique(cursor, index, key, text)) from error
        count += cursor.rowcount
    return count


def _read(cursor: sqlite3.Cursor, keys: list[Key]) -> dict[Key, object]:
    if len(keys) == 1:
        rows = fetch(cursor, READ_ONE, keys[0])
        return {keys[0]: rows[0][1]} if rows else {}
    by_app: dict[str, list[str]] = {}
    for app_id, user_id in keys:
        by_app.setdefault(app_id, []).append(user_id)
    return {
        (app_id, user_id): text
        for app_id, user_ids in by_app.items()
        for user_id, text in fetch(cursor, READ_MANY, (app_id, json.dumps(user_ids)))
    }

"""The SQLite storage's statements, and a batch of writes as two of them."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from usermetadata._core.rows import decode_row
from usermetadata.changes import BLIND, apply_in_order
from usermetadata.codec import encode_metadata

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

    Changes = tuple[str, Sequence[tuple[str, Change]]]
    """The id of an app and the changes to its users."""
    Results = list[Metadata | None]

_READ_ONE = "SELECT user_id, user_metadata FROM user_metadata WHERE app_id = ? AND user_id = ?"
_READ_MANY = (
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


def reading(app_id: str, user_ids: Sequence[str]) -> tuple[str, tuple[str, str]]:
    """Return the query for the rows of some users, and its parameters."""
    if len(user_ids) == 1:
        return _READ_ONE, (app_id, user_ids[0])
    return _READ_MANY, (app_id, json.dumps(user_ids))


def write(cursor: sqlite3.Cursor, calls: Sequence[Changes], name: str) -> list[Results]:
    """Apply the changes of some calls, inside the transaction that ``cursor`` is in.

    Args:
        cursor: a cursor whose rows are tuples.
        calls: the changes of each call, in order.
        name: the name of the database, for error messages.

    Returns:
        The results of each call.

    Raises:
        ChangeError: a change has raised an exception, or a row that it reads is damaged.
        sqlite3.Error: a statement failed.
    """
    changes = [
        ((app_id, user_id), change) for app_id, of_app in calls for user_id, change in of_app
    ]
    to_read: dict[str, list[str]] = {}
    for (app_id, user_id), change in changes:
        if not isinstance(change, BLIND):
            to_read.setdefault(app_id, []).append(user_id)
    texts: dict[tuple[str, str], str] = {}
    for app_id, user_ids in to_read.items():
        for user_id, text in cursor.execute(*reading(app_id, user_ids)).fetchall():
            texts[app_id, user_id] = text
    try:
        results = apply_in_order(
            changes, texts, decode=partial(decode_row, name), encode=encode_metadata
        )
    except Exception as error:
        raise ChangeError(error) from error
    to_store, to_remove = [], []
    for key in dict(changes):
        text = texts.get(key)
        if text is None:
            to_remove.append(key)
        else:
            to_store.append((*key, text))
    if to_store:
        cursor.executemany(_STORE, to_store)
    if to_remove:
        cursor.executemany(_REMOVE, to_remove)
    remaining = iter(results)
    return [list(islice(remaining, len(of_app))) for _, of_app in calls]


class ChangeError(Exception):
    """Holds an exception of a change, which may look like one of the database.

    Attributes:
        error: the exception, to be raised unchanged.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

"""Rows of JSON text: decoding one, and the error that names the user if it is damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usermetadata.codec import decode_metadata
from usermetadata.exceptions import DamagedMetadataError

if TYPE_CHECKING:
    from usermetadata.codec import Metadata


def text_or_bytes(value: bytes) -> str | bytes:
    """Return text, or the bytes that are not UTF-8; for the driver of SQLite."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def decode_row(database: str, key: tuple[str, str], text: object) -> Metadata:
    """Return the metadata in ``text``.

    Args:
        database: the name of the database, for the error message.
        key: the app id and the user id of the row.
        text: the content of the column ``user_metadata``.

    Raises:
        DamagedMetadataError: it is not a JSON object.
    """
    app_id, user_id = key
    if not isinstance(user_id, str):  # of a row that another program wrote
        raise DamagedMetadataError(
            f"{database}: a user id in app {app_id!r} is not text: {user_id!r}; remove the row"
        )
    try:
        if not isinstance(text, str):
            raise ValueError("it is not UTF-8 text")
        return decode_metadata(text)
    except ValueError as error:
        raise DamagedMetadataError(
            f"{database}: the metadata of user {user_id!r} in app {app_id!r} is damaged: {error};"
            " set or clear it to repair it",
            user_id,
        ) from error

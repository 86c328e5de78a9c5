"""What is said of an index that is missing, and of the rows that are in its way."""

from __future__ import annotations

from usermetadata.exceptions import StorageError, UsageError

MOST_ROWS = 10_000
"""A table with more rows is not indexed by the way."""

_COMMAND = "python -m usermetadata index"


def too_many_rows(name: str) -> UsageError:
    """Return the error of a call that needs an index of a large table."""
    return UsageError(
        f"index {name!r}: it does not exist, and more than {MOST_ROWS} rows have to be read to"
        f" build it; run `{_COMMAND}` once"
    )


def cannot_be_built(name: str, line: str) -> StorageError:
    """Return the error of a call that would build an index, with the first row in the way."""
    return StorageError(
        f"index {name!r}: it cannot be built: {line}; `{_COMMAND}` shows all rows in the way"
    )


def unfindable(app_id: str, user_id: str, name: str) -> str:
    """Return the line of a row whose value cannot be indexed."""
    return (
        f"app {app_id!r}: user {user_id!r}: property {name!r} is neither a short text, nor an"
        " integer, nor a boolean; set or remove it"
    )


def repeated(app_id: str, user_id: str, name: str, owner: str) -> str:
    """Return the line of a row that has the same value as another, and whose index is unique."""
    return (
        f"app {app_id!r}: user {user_id!r}: property {name!r} has the same value as that of user"
        f" {owner!r}; change one of them"
    )

"""Errors of missing indexes, and of rows that prevent building one."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from usermetadata.exceptions import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from usermetadata.indexes import Index

MOST_ROWS = 10_000
"""Indexes of a table with more rows are only built on request."""


def too_many_rows(missing: Sequence[Index]) -> UsageError:
    """Return the error of a call that needs indexes of a large table."""
    return UsageError(
        f"index {missing[0].name!r}: it does not exist, and more than {MOST_ROWS} rows have to be"
        f" read to build it; run `{_command(missing)}` once"
    )


def cannot_be_built(missing: Sequence[Index], line: str) -> StorageError:
    """Return the error of a call that cannot build indexes, with the first row that prevents it."""
    return StorageError(
        f"index {missing[0].name!r}: it cannot be built: {line}; `{_command(missing)}` shows all"
        " rows in the way"
    )


def _command(missing: Sequence[Index]) -> str:
    options = [
        f"--{'unique' if index.unique else 'index'} {shlex.quote(index.name)}" for index in missing
    ]
    return " ".join(["python -m usermetadata index", *options])


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

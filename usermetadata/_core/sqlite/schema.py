"""The SQLite storage's table, created through sqlite-utils."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlite_utils import Migrations

if TYPE_CHECKING:
    from sqlite_utils import Database

_migrations = Migrations("usermetadata")


@_migrations()
def create_user_metadata(database: Database) -> None:
    """Create the table, with SuperTokens' names."""
    database.table("user_metadata").create(
        {"app_id": str, "user_id": str, "user_metadata": str},
        pk=("app_id", "user_id"),
        not_null={"app_id", "user_id", "user_metadata"},
        if_not_exists=True,
    )


def has_table(database: Database) -> bool:
    """Tell whether the table is there; this waits for no writer."""
    return database.table("user_metadata").exists()


def create_table(database: Database) -> None:
    """Create the table, and note that in the table of sqlite-utils' migrations."""
    _migrations.apply(database)
    create_user_metadata(database)  # again, if the table was dropped since

"""The SQLite storage's table, created and described through sqlite-utils."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlite_utils import Migrations

from usermetadata.exceptions import StorageError

if TYPE_CHECKING:
    import sqlite3

    from sqlite_utils import Database

_migrations = Migrations("usermetadata")
_KEY = ["app_id", "user_id"]
_COLUMNS = [*_KEY, "user_metadata"]
_CHANGE = "sqlite-utils transform FILE user_metadata"
_FIND = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'user_metadata'"
_DESCRIBE = """
SELECT name, upper(type), "notnull" AND dflt_value IS NULL, pk
FROM pragma_table_info('user_metadata')
"""
_UNIQUE_INDEXES = """
SELECT seq, col.name, col.coll
FROM pragma_index_list('user_metadata') AS idx, pragma_index_xinfo(idx.name) AS col
WHERE "unique" AND NOT partial AND key
"""
# A column's collation decides which of these texts are equal.
_COUNT_DISTINCT = """
SELECT count(*) FROM (
    SELECT {column} FROM user_metadata WHERE 0
    UNION SELECT 'a' UNION SELECT 'A' UNION SELECT 'a ')
"""


@_migrations()
def create_user_metadata(database: Database) -> None:
    """Create the table, with SuperTokens' names."""
    database.table("user_metadata").create(
        dict.fromkeys(_COLUMNS, str), pk=_KEY, not_null=_COLUMNS, if_not_exists=True
    )


def create_table(database: Database) -> None:
    """Create the table, and note that in the table of sqlite-utils' migrations."""
    _migrations.apply(database)
    create_user_metadata(database)  # again, if the table was dropped since


def has_table(connection: sqlite3.Connection) -> bool:
    """Tell whether the table is there; this waits for no writer."""
    return connection.execute(_FIND).fetchone() is not None


def check_table(connection: sqlite3.Connection, name: str) -> None:
    """Check that the table can hold metadata.

    Raises:
        StorageError: it cannot; the message says what to change.
    """
    cursor = connection.cursor()
    columns = {column[0]: column[1:] for column in cursor.execute(_DESCRIBE)}
    fault = _fault_of_columns(columns) or _fault_of_key(cursor, columns)
    if fault:
        raise StorageError(f"{name}: table user_metadata: {fault}")


def _fault_of_columns(columns: dict[str, tuple[str, bool, int]]) -> str | None:
    for name in _COLUMNS:
        if name not in columns:
            return f"it has no column {name}, so it is another program's; use another file"
        kind, *_ = columns[name]
        if not _keeps_text(kind):
            return f"column {name} is {kind}, not TEXT; run: {_CHANGE} --type {name} text"
    for name, (kind, is_needed, is_key) in columns.items():
        # SQLite itself numbers the rows of an integer key.
        if name not in _COLUMNS and is_needed and not (is_key and kind == "INTEGER"):
            return (
                f"column {name} is NOT NULL and has no default; run: {_CHANGE} --default {name} ''"
            )
    return None


def _fault_of_key(cursor: sqlite3.Cursor, columns: dict[str, tuple[str, bool, int]]) -> str | None:
    for name in _KEY:
        [(distinct,)] = cursor.execute(_COUNT_DISTINCT.format(column=name))
        if distinct != 3:  # noqa: PLR2004 - the texts of the query
            return f"column {name} takes different ids for the same (COLLATE); run: {_CHANGE}"
    keys: dict[int, set[tuple[str, str]]] = {}
    for index, name, collation in cursor.execute(_UNIQUE_INDEXES):
        keys.setdefault(index, set()).add((name, collation))
    if {(name, "BINARY") for name in _KEY} in keys.values():
        return None
    key = "sqlite-utils create-index FILE user_metadata app_id user_id --unique"
    if columns["user_id"][2]:  # part of another primary key
        key = f"{_CHANGE} --pk app_id --pk user_id"
    return f"it has no key (app_id, user_id) that compares ids exactly; run: {key}"


def _keeps_text(kind: str) -> bool:
    """Tell whether a column of this type stores text unchanged: https://sqlite.org/datatype3.html."""
    is_text = any(sign in kind for sign in ("CHAR", "CLOB", "TEXT", "BLOB")) or not kind
    return is_text and "INT" not in kind

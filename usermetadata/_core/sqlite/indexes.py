"""Indexes of metadata in SQLite: expression indexes, which SQLite maintains for all writers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from usermetadata._core.building import (
    MOST_ROWS,
    cannot_be_built,
    repeated,
    too_many_rows,
    unfindable,
)
from usermetadata._core.rows import decode_row, text_or_bytes
from usermetadata._core.sqlite.connecting import Connection
from usermetadata._core.sqlite.schema import has_table
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    NotUniqueError,
)
from usermetadata.indexes import Index, values_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from usermetadata.interfaces import Value

_PROGRESS_EVERY = 10_000  # rows
_encode = json.JSONEncoder(ensure_ascii=False).encode
_PREFIX = "user_metadata_by_"
_STORED = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'user_metadata'"
_ALL = "SELECT app_id, user_id, user_metadata FROM user_metadata"
_HAS_MORE_ROWS = "SELECT 1 FROM user_metadata LIMIT 1 OFFSET ?"
_REPEATS = """
WITH row AS (
    SELECT app_id, user_id,
        first_value(user_id) OVER (PARTITION BY app_id, value ORDER BY user_id) AS first
    FROM (SELECT app_id, user_id, {value} AS value FROM user_metadata)
    WHERE value IS NOT NULL)
SELECT app_id, user_id, first FROM row WHERE user_id <> first ORDER BY app_id, user_id
"""
_HINT = re.compile(r' INDEXED BY "[^"]*"')
_CONFLICT = re.compile(rf"UNIQUE constraint failed: index '{_PREFIX}(.+)'", re.DOTALL)

# The JSON text of a value that can be indexed, as `json.dumps` writes it; NULL for all else. `->`
# keeps the spelling of other programs, such as `\u00e9`, so text with a backslash is decoded and
# encoded again. `->>` ends at U+0000, so such text is left out. `json_extract` alone is not exact:
# it makes 1 of true, and a float of a long integer.
_VALUE = r"""CASE WHEN typeof(user_metadata) = 'text' AND json_valid(user_metadata) THEN
CASE json_type(user_metadata, {path})
WHEN 'text' THEN CASE
WHEN NOT instr(user_metadata -> {path}, '\') THEN user_metadata -> {path}
WHEN NOT instr(replace(user_metadata -> {path}, '\\', ''), '\u0000')
THEN json_quote(user_metadata ->> {path}) END
WHEN 'integer' THEN replace(user_metadata -> {path}, '-0', '0')
WHEN 'true' THEN 'true'
WHEN 'false' THEN 'false'
END END"""


class _RowsInTheWay(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines)
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Search:
    """The queries for users by some properties, at least one of them indexed.

    Attributes:
        names: the properties that have an index.
        is_complete: whether all properties have one; otherwise the caller checks the rest.
        find: the query for a page of users; its parameters are ``texts``, the last user of the
            previous page, and the largest number of users.
        count: the query that counts them.
    """

    names: tuple[str, ...]
    is_complete: bool
    find: str
    count: str

    def texts(self, app_id: str, where: Mapping[str, Value]) -> list[str | int]:
        """Return the first parameters of both queries."""
        return [app_id, *(_encode(where[name]) for name in self.names)]


@lru_cache
def search_by(properties: tuple[str, ...], indexes: tuple[Index, ...]) -> Search:
    """Return the queries; without properties, for all users.

    They are made once, since composing and hashing them takes longer than a search.
    """
    chosen = [index for index in indexes if index.name in properties]
    chosen.sort(key=lambda index: not index.unique)
    names = tuple(index.name for index in chosen)
    # Without the index this is an error, not a scan. The path is a literal: SQLite takes an index
    # only for its own expression, to the letter.
    hint = f" INDEXED BY {_sqls_name(names[0])}" if names else ""
    values = [f"{_value(name)} = ?" for name in names]
    # SQLite would prepare to sort the only user of a unique value.
    order = "" if chosen and chosen[0].unique else "ORDER BY user_id "
    rows = " AND ".join([f"FROM user_metadata{hint} WHERE app_id = ?", *values])
    return Search(
        names,
        len(names) == len(properties),
        f"SELECT user_id, user_metadata {rows} AND user_id > ? {order}LIMIT ?",
        f"SELECT '', count(*) {rows}",
    )


def without_hint(query: str) -> str:
    """Return a query that works without its index, slowly; the same query if it needs none."""
    return _HINT.sub("", query)


def stored_indexes(connection: sqlite3.Connection) -> tuple[Index, ...]:
    """Return the indexes that exist, in the order of their names."""
    stored = dict(connection.execute(_STORED).fetchall())
    found: list[Index] = []
    for sqls_name in sorted(stored):
        if sqls_name.startswith(_PREFIX):
            name = _unmarked(sqls_name.removeprefix(_PREFIX))
            try:
                both = Index(name), Index(name, unique=True)
            except InvalidInputError:  # another program's
                continue
            found += [index for index in both if _create(index) == stored[sqls_name]]
    return tuple(found)


def missing_indexes(connection: sqlite3.Connection, indexes: Sequence[Index]) -> list[Index]:
    """Return the missing declared indexes; a unique index also serves as one that is not.

    An index with the same name but another definition, for example not unique, is missing.
    """
    if not indexes:
        return []
    stored = {sql for _, sql in connection.execute(_STORED).fetchall()}
    return [
        index
        for index in indexes
        if stored.isdisjoint({_create(index), _create(Index(index.name, unique=True))})
    ]


def ensure_indexes(connection: sqlite3.Connection, name: str, indexes: Sequence[Index]) -> None:
    """Build the declared indexes that are missing, in the transaction that is open.

    Raises:
        UsageError: there are too many rows to build them automatically.
        StorageError: a row cannot be indexed.
    """
    # On a connection of the storage's, the caller cannot undo changes of the schema.
    ours = connection if isinstance(connection, Connection) else None
    version = _schema_version(connection) if ours else 0
    if ours and ours.indexed_schema == version:
        return
    missing = missing_indexes(connection, indexes)
    if not missing:
        if ours:
            ours.indexed_schema = version
        return
    check_few_rows(connection, missing)
    try:
        _check_rows(connection, name, missing)
        _create_all(connection, missing)
    except _RowsInTheWay as found:
        raise cannot_be_built(missing, found.lines[0]) from None


def check_few_rows(connection: sqlite3.Connection, missing: Sequence[Index]) -> None:
    """Check that the table is small enough to build its indexes automatically.

    Raises:
        UsageError: it is not.
    """
    if connection.execute(_HAS_MORE_ROWS, (MOST_ROWS,)).fetchall():
        raise too_many_rows(missing)


def build_indexes(
    connection: sqlite3.Connection,
    name: str,
    indexes: Sequence[Index],
    *,
    progress: Callable[[int, int], None] | None,
    transact: Callable[[Callable[[], None]], object],
) -> list[str]:
    """Build the missing declared indexes, all or none; return the rows that prevent it.

    Args:
        connection: a connection without another user.
        name: the name of the database.
        indexes: the declared indexes.
        progress: called with the number of rows that were read, and of all rows.
        transact: calls a function in a transaction that has the write lock.
    """
    missing = missing_indexes(connection, indexes)
    if not missing or not has_table(connection):
        return []
    # Other processes may write while the rows are read. If one did, the rows are read again under
    # the lock.
    version = _data_version(connection)

    def create() -> None:
        if _data_version(connection) != version:
            _check_rows(connection, name, missing)
        _create_all(connection, missing)

    try:
        _check_rows(connection, name, missing, progress)
        transact(create)
    except _RowsInTheWay as found:
        return found.lines
    return []


def drop_index(connection: sqlite3.Connection, name: str) -> None:
    """Remove an index, if it exists.

    Raises:
        InvalidInputError: no index can have this name.
    """
    connection.execute(f"DROP INDEX IF EXISTS {_sqls_name(Index(name).name)}")


def refused_by(error: Exception) -> str | None:
    """Return the name of the unique index that has refused a row; ``None`` if no index has."""
    found = _CONFLICT.search(str(error))
    return found and _unmarked(found[1].replace("''", "'"))  # SQLite quotes it


def not_unique(
    cursor: sqlite3.Cursor, index: str, key: tuple[str, str], text: object
) -> NotUniqueError:
    """Return the error of a user whose new metadata has the value of another.

    Args:
        cursor: in the transaction.
        index: the name of the unique index that has refused the row.
        key: the app and the user.
        text: the user's new metadata.
    """
    app_id, user_id = key
    value = _value(index)
    found = cursor.execute(
        f"SELECT user_id FROM user_metadata WHERE app_id = ? AND {value} = (SELECT {value} FROM"  # noqa: S608 - of constants and a quoted name
        " (SELECT ? AS user_metadata)) AND user_id <> ?",
        (app_id, text, user_id),
    ).fetchone()
    return NotUniqueError(index, found[0] if found else None)


@lru_cache
def _value(name: str) -> str:
    return _VALUE.format(path=_path(name))


def _path(name: str) -> str:
    text = name.replace("'", "''")
    return f"""'$."{text}"'"""


def _sqls_name(name: str) -> str:
    # SQLite compares names without regard to case.
    marked = re.sub(r"[A-Z^]", r"^\g<0>", name)
    return f'"{_PREFIX}{marked}"'


def _unmarked(marked: str) -> str:
    return re.sub(r"\^(.)", r"\1", marked)


@lru_cache
def _create(index: Index) -> str:
    kind, page = ("UNIQUE INDEX", "") if index.unique else ("INDEX", ", user_id")
    value = _value(index.name)
    return (
        f"CREATE {kind} {_sqls_name(index.name)} ON user_metadata (app_id, {value}{page})"
        f" WHERE {value} IS NOT NULL"
    )


def _create_all(connection: sqlite3.Connection, missing: Sequence[Index]) -> None:
    for index in missing:
        drop_index(connection, index.name)
        try:
            connection.execute(_create(index))
        except connection.IntegrityError as error:
            raise _RowsInTheWay(_repeats(connection, missing)) from error


def _data_version(connection: sqlite3.Connection) -> int:
    [(version,)] = connection.execute("PRAGMA data_version").fetchall()
    return int(version)


def _schema_version(connection: sqlite3.Connection) -> int:
    """Return the number by which SQLite detects that another connection changed the schema."""
    [(version,)] = connection.execute("PRAGMA schema_version").fetchall()
    return int(version)


def _check_rows(
    connection: sqlite3.Connection,
    name: str,
    missing: Sequence[Index],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Check that all values can be indexed; SQLite itself finds repeated values.

    Raises:
        _RowsInTheWay: some cannot; it also has the rows with repeated values.
    """
    [(total,)] = connection.execute("SELECT count(*) FROM user_metadata").fetchall()
    lines: list[str] = []
    done = 0
    before, connection.text_factory = connection.text_factory, text_or_bytes
    try:
        for done, (*key, text) in enumerate(connection.execute(_ALL), 1):
            lines += _faults(name, key, text, missing)
            if progress is not None and done % _PROGRESS_EVERY == 0:
                progress(done, total)
    finally:
        connection.text_factory = before
    if progress is not None and done % _PROGRESS_EVERY:
        progress(done, total)
    if lines:
        raise _RowsInTheWay(lines + _repeats(connection, missing))


def _faults(name: str, key: Sequence[Any], text: object, indexes: Sequence[Index]) -> list[str]:
    app_id, user_id = key
    try:
        metadata = decode_row(name, (app_id, user_id), text)
    except DamagedMetadataError:  # reading the user reports it
        return []
    lines: list[str] = []
    for index in indexes:
        try:
            values_of(metadata, [index], user_id)
        except InvalidInputError:
            lines.append(unfindable(app_id, user_id, index.name))
    return lines


def _repeats(connection: sqlite3.Connection, indexes: Sequence[Index]) -> list[str]:
    """Return a line for each row that repeats the unique value of an earlier row."""
    lines: list[str] = []
    for index in indexes:
        if index.unique:
            query = _REPEATS.format(value=_value(index.name))
            lines += [
                repeated(app_id, user_id, index.name, first)
                for app_id, user_id, first in connection.execute(query).fetchall()
            ]
    return lines

"""The PostgreSQL storage's table and its statements: each is one, for any number of users.

A list is one parameter, a JSON text. The driver converts that faster than an array, and one
statement text, which the server prepares once, serves every length.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from psycopg import Cursor, errors
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier

from usermetadata.exceptions import InvalidInputError
from usermetadata.validation import USER_ID_MAX_LENGTH

if TYPE_CHECKING:
    from typing import LiteralString

    from psycopg import Connection

_CREATE = """
CREATE TABLE IF NOT EXISTS {table} (
    app_id varchar(64) NOT NULL DEFAULT 'public',
    user_id varchar(255) NOT NULL,
    user_metadata text NOT NULL,
    PRIMARY KEY (app_id, user_id))
"""
# The longest user id, and whether the table is that of a SuperTokens core: there app_id refers to
# the core's apps.
_DESCRIBE = """
SELECT
    (SELECT atttypmod - 4 FROM pg_attribute
     WHERE attrelid = to_regclass(%(table)s) AND attname = 'user_id' AND atttypmod > 0),
    EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass(%(table)s) AND contype = 'f')
WHERE to_regclass(%(table)s) IS NOT NULL
"""
# Two sessions that create a table at once fail, even with IF NOT EXISTS.
_LOCK_CREATION = "SELECT pg_advisory_xact_lock(hashtext('usermetadata'))"

READ_ONE = """
SELECT user_id, user_metadata FROM {table} WHERE app_id = %(app_id)s AND user_id = %(user_id)s
"""
READ_MANY = """
SELECT user_id, user_metadata FROM {table}
WHERE app_id = %(app_id)s AND user_id IN (SELECT json_array_elements_text(%(user_ids)s::json))
"""
READ_AFTER = """
SELECT user_id, user_metadata FROM {table}
WHERE app_id = %(app_id)s AND user_id > %(user_id)s ORDER BY user_id LIMIT %(limit)s
"""

# All writers lock users in one order, so that no two of them wait for each other. The timeout is
# set in the statement itself, because behind a pooler sessions are shared.
_ROWS = "json_to_recordset(%(rows)s::json) AS row (user_id text, user_metadata text)"
_UPSERT = (
    """
INSERT INTO {table} AS stored (app_id, user_id, user_metadata)
SELECT %(app_id)s, user_id, user_metadata
FROM (
    SELECT user_id, user_metadata{lock}
    FROM """
    + _ROWS
    + """,
        set_config('lock_timeout', %(timeout)s, true)
    ORDER BY user_id) AS rows
ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = """
)
_RETURNING = " RETURNING user_id, user_metadata"
STORE = _UPSERT + "excluded.user_metadata" + _RETURNING
# Replaces each row by itself, which locks it; inserts a placeholder where there is none.
HOLD = _UPSERT + "stored.user_metadata" + _RETURNING
# The stored properties without the keys of the update, then those that the update sets. The type
# json keeps the text of each value, to the last digit.
MERGE = (
    _UPSERT
    + """(
    SELECT '{{' || concat_ws(',',
        string_agg(to_json(key)::text || ':' || value::text, ','),
        nullif(substr(excluded.user_metadata, 2, length(excluded.user_metadata) - 2), '')
    ) || '}}'
    FROM json_each(stored.user_metadata::json) AS old (key, value)
    WHERE NOT %(keys)s::jsonb -> excluded.user_id::text ? key)"""
    + _RETURNING
)
# A single row is passed without JSON around it, which saves a tenth of the time.
_ROW = "(VALUES (%(user_id)s, %(user_metadata)s)) AS row (user_id, user_metadata)"
STORE_ONE = STORE.replace(_ROWS, _ROW)
MERGE_ONE = MERGE.replace(_ROWS, _ROW)
REMOVE = """
DELETE FROM {table} AS stored
USING (
    SELECT user_id{lock}
    FROM json_array_elements_text(%(user_ids)s::json) AS user_id,
        set_config('lock_timeout', %(timeout)s, true)
    ORDER BY user_id) AS gone
WHERE stored.app_id = %(app_id)s AND stored.user_id = gone.user_id
"""

# A SuperTokens core reads, merges and writes under this lock and no other.
_CORES_LOCK = ", pg_advisory_xact_lock(hashtext(%(app_id)s || '~' || user_id))"


class Table:
    """A table of metadata: its description, and the statements on it.

    Args:
        name: its name, with a schema or without.

    Attributes:
        user_id_length: how many characters a user id may have; 0 while that is unknown.
    """

    def __init__(self, *name: str) -> None:
        self._name = Identifier(*name)
        # Else it would be a parameter.
        self._in_statements = Identifier(*(part.replace("%", "%%") for part in name))
        self._lock = SQL("")
        self._statements: dict[str, bytes] = {}
        self.user_id_length = 0

    def describe(self, connection: Connection) -> None:
        """Describe the table, if it exists."""
        if connection.info.encoding != "utf-8":
            raise InvalidInputError(
                f"database: its client_encoding is {connection.info.encoding}, which cannot express"
                " all characters; pass client_encoding=utf8"
            )
        cursor = Cursor(connection, row_factory=tuple_row)
        cursor.execute(_DESCRIBE, {"table": self._name.as_string(connection)})
        for length, is_shared in cursor:
            if is_shared:
                self._lock = SQL(_CORES_LOCK)
            self.user_id_length = length or USER_ID_MAX_LENGTH

    def create(self, connection: Connection) -> None:
        """Create the table if it is missing."""
        # Another program, for example a core, may create it at once under another lock.
        with suppress(errors.UniqueViolation), connection.transaction():
            connection.execute(_LOCK_CREATION)
            connection.execute(self[_CREATE], ())

    def __getitem__(self, template: LiteralString) -> bytes:
        """Return the statement for this table, from a template of this module."""
        statement = self._statements.get(template)
        if statement is None:
            composed = SQL(template).format(table=self._in_statements, lock=self._lock)
            statement = self._statements[template] = composed.as_bytes(None)
        return statement

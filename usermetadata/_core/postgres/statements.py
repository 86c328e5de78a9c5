"""The PostgreSQL storage's table and its statements: each is one, for any number of users.

A list is one parameter, a JSON text. The driver converts that faster than an array. The same
prepared statement works for every length.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from psycopg import Cursor, DataError, NotSupportedError, ProgrammingError, errors
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier, Literal

from usermetadata._core.postgres.entries import Names
from usermetadata._core.postgres.outcomes import NOT_STORED
from usermetadata._core.postgres.transactions import Statement
from usermetadata.exceptions import InvalidInputError, StorageError, UsageError
from usermetadata.validation import APP_ID_MAX_LENGTH, USER_ID_MAX_LENGTH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, LiteralString

    from psycopg import Connection

    from usermetadata.indexes import Index

OF_THE_TABLE = (ProgrammingError, NotSupportedError, DataError)
"""Errors of a table that may have changed since it was described."""

_COLUMNS_OF_CREATE = """
CREATE TABLE IF NOT EXISTS {table} (
    app_id varchar(64) NOT NULL DEFAULT 'public',
    user_id varchar(255) NOT NULL,
    user_metadata text NOT NULL,
    PRIMARY KEY """
_CREATE = _COLUMNS_OF_CREATE + "(app_id, user_id))"
# YugabyteDB distributes rows by the key's first column; on a Citus server, an erasure looks the
# user up in one index.
CREATE_BY_USER = _COLUMNS_OF_CREATE + "(user_id, app_id))"
# Where the table is, or would be created, and its properties. It belongs to a core if app_id refers
# to the core's apps. The search_path of a session that several clients share may be another
# client's. Citus has a trigger on each table that it distributes or manages.
_DESCRIBE = """/*NO LOAD BALANCE*/
SELECT
    coalesce((SELECT nspname FROM pg_namespace WHERE oid = relnamespace), current_schema()),
    (SELECT setting = reset_val FROM pg_settings WHERE name = 'search_path'),
    coalesce(relkind::text, ''),
    found.oid::oid::text,
    EXISTS (SELECT FROM pg_constraint WHERE conrelid = found.oid AND contype = 'f'),
    EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = found.oid AND indisunique AND indisvalid AND indimmediate
            AND indpred IS NULL AND indnkeyatts = 2
            AND 2 = (
                SELECT count(*) FROM pg_attribute
                WHERE attrelid = indrelid AND attname IN ('app_id', 'user_id')
                    AND attnum IN (indkey[0], indkey[1]))
            AND NOT EXISTS (
                SELECT FROM pg_collation
                WHERE pg_collation.oid = ANY (indcollation) AND NOT collisdeterministic)),
    (SELECT json_object_agg(attname, json_build_array(
            format_type(atttypid, atttypmod)
                || CASE WHEN collisdeterministic THEN '' ELSE coalesce(' COLLATE ' || collname, '')
                   END,
            atttypid IN ('text'::regtype, 'varchar'::regtype) AND collisdeterministic,
            greatest(atttypmod - 4, 0),
            attnotnull AND NOT atthasdef AND attidentity = ''))::text
        FROM pg_attribute LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attrelid = found.oid AND attnum > 0 AND NOT attisdropped),
    CASE
        WHEN EXISTS (
            SELECT FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
            WHERE tgrelid = found.oid AND proname = 'citus_truncate_trigger')
        THEN 'Citus'
        WHEN version() LIKE 'CockroachDB%%' THEN 'CockroachDB'
        WHEN version() LIKE '%%-YB-%%' THEN 'YugabyteDB'
    END
FROM to_regclass(%(table)s) AS found (oid) LEFT JOIN pg_class ON pg_class.oid = found.oid
"""
# Divides by zero if the name does not mean that table.
_CHECK = "SELECT 1 / coalesce(to_regclass({name}) = {oid}::regclass, false)::integer"
_TABLES = ("r", "p")  # partitioned or not; a view has the key of the table behind it
# Type, whether it distinguishes all texts, length, whether a value is required.
_Column = tuple[str, bool, int, bool]

# Concurrent CREATE TABLE IF NOT EXISTS statements can fail.
_LOCK_CREATION = "SELECT pg_advisory_xact_lock(hashtext('usermetadata'))"

# The comment keeps pgpool-II from sending a query to a standby, which may not have the last update.
READ_ONE = """/*NO LOAD BALANCE*/
SELECT user_id, user_metadata FROM {table} WHERE app_id = %(app_id)s AND user_id = %(user_id)s
"""
# OFFSET 0 makes the server look each user up in the index. A join is planned by the statistics of
# the table, and takes minutes for many users as long as a new table has none.
READ_MANY = """/*NO LOAD BALANCE*/
SELECT found.user_id, found.user_metadata
FROM (SELECT DISTINCT json_array_elements_text(%(user_ids)s::json) AS user_id) AS asked,
    LATERAL (
        SELECT user_id, user_metadata FROM {table}
        WHERE app_id = %(app_id)s AND user_id = asked.user_id OFFSET 0) AS found
"""
READ_AFTER = """/*NO LOAD BALANCE*/
SELECT user_id, user_metadata FROM {table}
WHERE app_id = %(app_id)s AND user_id > %(user_id)s ORDER BY user_id LIMIT %(limit)s
"""

# A trigger or a row-level policy may drop a row without an error. Then the statement raises one,
# which undoes the whole transaction.
_RAISE = f"('{NOT_STORED}' || to_json({{user_id}}::text))::integer::text"

# The timeout is set in the statement itself, because behind a pooler sessions are shared. NULL
# leaves it as it is.
_TIMEOUT = SQL(
    "set_config('lock_timeout', coalesce(%(timeout)s, current_setting('lock_timeout')), true)"
)
# All writers lock users in one order, so they do not deadlock.
_UPSERT = """
INSERT INTO {table} AS stored (app_id, user_id, user_metadata)
SELECT %(app_id)s, user_id, user_metadata
FROM (
    SELECT user_id, user_metadata{lock}
    FROM sent, {timeout}
    ORDER BY user_id) AS rows
ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = """
# Citus refuses current_user there. So a program that has described the table before it was
# distributed describes it anew, and does not use statements that lock users in no order there.
_STORE = _UPSERT + "coalesce(excluded.user_metadata, current_user)"
# The stored properties without the keys of the update, then those that the update sets. The type
# json keeps the text of each value, to the last digit.
_MERGE = (
    _UPSERT
    + """(
    SELECT '{{' || concat_ws(',',
        string_agg(to_json(key)::text || ':' || value::text, ','),
        nullif(substr(excluded.user_metadata, 2, length(excluded.user_metadata) - 2), '')
    ) || '}}'
    FROM json_each(stored.user_metadata::json) AS old (key, value)
    WHERE NOT %(keys)s::jsonb -> excluded.user_id::text ? key)"""
)


def _each(upsert: LiteralString) -> LiteralString:
    return (
        """
WITH sent AS (
    SELECT user_id, user_metadata
    FROM json_to_recordset(%(rows)s::json) AS row (user_id text, user_metadata text)
), stored AS ("""
        + upsert
        + """
    RETURNING user_id::text, user_metadata
)
SELECT user_id, user_metadata FROM stored
UNION ALL
SELECT """
        + _RAISE.replace("{user_id}", "user_id")
        + """, NULL FROM sent WHERE user_id COLLATE "C" NOT IN (SELECT user_id FROM stored)
"""
    )


def _one(upsert: LiteralString) -> LiteralString:
    # Without JSON around the row, which saves a tenth of the time. No row comes back if none was
    # stored: there is nothing to undo.
    return (
        "WITH sent (user_id, user_metadata) AS (VALUES (%(user_id)s, %(user_metadata)s))"
        + upsert
        + """
RETURNING
    CASE user_id::text COLLATE "C" WHEN %(user_id)s THEN %(user_id)s ELSE """
        + _RAISE.replace("{user_id}", "%(user_id)s")
        + """ END,
    user_metadata
"""
    )


MERGE, MERGE_ONE = _each(_MERGE), _one(_MERGE)
STORE, STORE_ONE = _each(_STORE), _one(_STORE)
# Replaces each row with itself, which locks it. Inserts a placeholder where there is no row.
HOLD = _each(_UPSERT + "coalesce(stored.user_metadata, current_user)")
# The rows are locked one by one in the order of the ids, because DELETE locks them in the order of
# the plan.
# A join with the ids may read the whole table; an array of ids is looked up in the key. The last
# query sees the rows as they were before. One that another transaction has removed in between
# counts as not removed; with the rows held, that cannot happen. A row-level policy may hide a row.
REMOVE = (
    """
WITH sent AS (
    SELECT user_id FROM json_array_elements_text(%(user_ids)s::json) AS user_id
), gone AS (
    DELETE FROM {table} WHERE app_id = %(app_id)s AND user_id = ANY (ARRAY(
        SELECT held.user_id
        FROM (
            SELECT user_id{lock}
            FROM sent, {timeout}
            ORDER BY user_id) AS rows,
            LATERAL (
                SELECT user_id FROM {table}
                WHERE app_id = %(app_id)s AND user_id = rows.user_id FOR UPDATE) AS held))
    RETURNING user_id
)
SELECT """
    + _RAISE.replace("{user_id}", "user_id")
    + """, NULL FROM sent
WHERE user_id NOT IN (SELECT user_id FROM gone) AND (
    row_security_active({name})
    OR (SELECT true FROM {table} AS still
        WHERE still.app_id = %(app_id)s AND still.user_id = sent.user_id))
"""
)

# Finds the apps as `_APPS_WITHOUT_INDEX` of SQLite does. If a row is in `found` and was not
# removed, another transaction has removed it meanwhile, or a trigger has kept it. A role to which a
# row-level policy applies may not see all rows.
ERASE = (
    """
WITH RECURSIVE users (have_index) AS (
    SELECT EXISTS (
        SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE indrelid = {name}::regclass AND indpred IS NULL AND attname = 'user_id')
), app (id) AS (
    (SELECT app_id FROM {table} WHERE NOT (SELECT have_index FROM users) ORDER BY app_id LIMIT 1)
    UNION ALL
    SELECT (SELECT app_id FROM {table} WHERE app_id > id ORDER BY app_id LIMIT 1)
    FROM app WHERE id IS NOT NULL
), found AS (
    SELECT app_id FROM app JOIN {table} ON app_id = id AND user_id = %(user_id)s
    UNION ALL
    SELECT app_id FROM {table} WHERE (SELECT have_index FROM users) AND user_id = %(user_id)s
), gone AS (
    DELETE FROM {table} AS stored
    USING (
        SELECT app_id{lock_of_app}
        FROM found, {timeout}
        ORDER BY app_id) AS rows
    WHERE stored.app_id = rows.app_id AND stored.user_id = %(user_id)s
    RETURNING stored.app_id, stored.user_metadata
)
SELECT app_id::text, user_metadata FROM found LEFT JOIN gone USING (app_id)
UNION ALL
SELECT """
    + _RAISE.replace("{user_id}", "%(user_id)s")
    + """, NULL WHERE row_security_active({name})
"""
)

# A SuperTokens core reads, merges and writes under this lock only.
_CORES_LOCK = ", pg_advisory_xact_lock(hashtext(%(app_id)s || '~' || user_id))"
_CORES_LOCK_OF_APP = ", pg_advisory_xact_lock(hashtext(app_id || '~' || %(user_id)s))"


_COLUMNS = {
    "app_id": f"varchar({APP_ID_MAX_LENGTH})",
    "user_id": f"varchar({USER_ID_MAX_LENGTH})",
    "user_metadata": "text",
}


class Table:
    """A table of metadata: its description, and the statements on it.

    Args:
        name: the table's name, with a schema or without.
        is_session_ours: whether only the caller may have set the search_path of a session.
        is_portable: whether only statements are used that all engines execute.

    Attributes:
        user_id_length: the largest length of a user id; 0 while it is unknown.
        check: a statement that fails if the table's name now means another table, or none.
        is_shared: whether it belongs to a SuperTokens core.
        is_plain: whether it is a table, partitioned or not.
        may_drop: whether it is known that it may drop a row without an error.
        engine: the engine that executes only portable statements on it; ``None`` if it is
            PostgreSQL.
        is_portable: whether only portable statements are used.
        indexes: the indexes that are known to exist.
        index_checks: statements that fail if one of these no longer exists.
    """

    def __init__(self, *name: str, is_session_ours: bool, is_portable: bool) -> None:
        self._given = self._name = name
        self._is_session_ours = is_session_ours
        self._is_asked_for = self.is_portable = is_portable
        self.engine: str | None = None
        self._lock = self._lock_of_app = SQL("")
        self._statements: dict[str, bytes] = {}
        self.is_shared = False
        self.is_plain = True
        self.forget()

    def describe(self, connection: Connection) -> None:
        """Find the table, if it exists, and check that metadata can be stored in it.

        From then on it is named with its schema.
        """
        cursor = Cursor(connection, row_factory=tuple_row)
        cursor.execute(*self.description)
        self.learn(cursor.fetchall(), connection.info.encoding)

    @property
    def description(self) -> Statement:
        """The query that describes the table."""
        return Statement(_DESCRIBE.encode(), {"table": Identifier(*self._given).as_string()})

    def learn(self, rows: Iterable[tuple[Any, ...]], encoding: str) -> None:
        """Use what the description has returned to a client with that encoding."""
        if encoding != "utf-8":
            raise InvalidInputError(
                f"database: its client_encoding is {encoding}, which cannot express all characters;"
                " pass client_encoding=utf8"
            )
        for schema, is_path_unchanged, kind, oid, is_shared, has_key, columns, engine in rows:
            if len(self._given) == 1:
                if not (is_path_unchanged or self._is_session_ours):
                    raise StorageError(
                        f"table {self._given[0]}: the search_path of this session was changed, by"
                        " another client of a pooler or by the pooler, and may name another table;"
                        " pass schema="
                    )
                if schema is not None:
                    self._name = (schema, *self._given)
            self.engine = engine
            self.is_portable = self._is_asked_for or engine is not None
            if kind:
                described: dict[str, _Column] = json.loads(columns)
                self._check(kind, described, has_key=has_key)
                if is_shared and self.is_portable:
                    raise UsageError(
                        f"table {Identifier(*self._name).as_string()}: it is a SuperTokens core's,"
                        f" whose locks {engine or 'portable statements'} cannot take; use a table"
                        " of your own"
                    )
                self.is_shared, self.is_plain = is_shared, kind in _TABLES
                self._lock = SQL(_CORES_LOCK if is_shared else "")
                self._lock_of_app = SQL(_CORES_LOCK_OF_APP if is_shared else "")
                self._statements = {}
                name = Literal(Identifier(*self._given).as_string())
                self.check = SQL(_CHECK).format(name=name, oid=Literal(int(oid))).as_bytes()
                self.user_id_length = described["user_id"][2] or USER_ID_MAX_LENGTH

    def forget(self) -> None:
        """Let the next call describe the table anew, because it may have been changed."""
        self.user_id_length = 0
        self.may_drop = False
        self.check = b""
        self.indexes: frozenset[Index] = frozenset()
        self.index_checks: list[Statement] = []

    @property
    def creation(self) -> list[Statement]:
        """The statements that create the table if it is missing."""
        if self.engine:  # it may have no such locks
            return [Statement(self[CREATE_BY_USER], {})]
        return [Statement(_LOCK_CREATION.encode()), Statement(self[_CREATE], {})]

    def limits(self, timeout: str | None) -> list[Statement]:
        """Return the statements that limit the waits of a transaction, if others do not."""
        if timeout is None or not self.is_portable:
            return []
        # On Citus the rows, and so the locks, are on other servers.
        texts = ["SET LOCAL citus.propagate_set_commands = 'local'"] * (self.engine == "Citus")
        texts.append(f"SET LOCAL lock_timeout = '{timeout}ms'")
        return [Statement(text.encode()) for text in texts]

    @property
    def full_name(self) -> tuple[str, ...]:
        """Its name, with its schema once it was described."""
        return self._name

    @property
    def names(self) -> Names:
        """The names of what belongs to its indexes."""
        return Names(tuple(part.replace("%", "%%") for part in self._name))

    def create(self, connection: Connection) -> None:
        """Create the table if it is missing."""
        # Another program, for example a core, may create it at the same time, under another lock.
        with suppress(errors.UniqueViolation), connection.transaction():
            for statement in self.creation:
                connection.execute(*statement)

    def __getitem__(self, template: LiteralString) -> bytes:
        """Return the statement for this table, from a template."""
        statements = self._statements  # another thread may describe the table anew
        statement = statements.get(template)
        if statement is None:
            # A single percent sign would begin a parameter.
            table = Identifier(*(part.replace("%", "%%") for part in self._name))
            composed = SQL(template).format(
                table=table,
                name=Literal(table.as_string()),
                lock=self._lock,
                lock_of_app=self._lock_of_app,
                timeout=_TIMEOUT,
                **self.names.parts,
            )
            statement = statements[template] = composed.as_bytes(None)
        return statement

    def _check(self, kind: str, columns: dict[str, _Column], *, has_key: bool) -> None:
        name = Identifier(*self._name).as_string()
        missing = [column for column in _COLUMNS if column not in columns]
        if missing:
            raise StorageError(
                f"table {name}: it has no column {missing[0]}: it is another program's, or that of"
                " a SuperTokens core before 6.0; name another table"
            )
        faults = [*_faults(columns)]
        if kind in _TABLES and not has_key:
            fault = "it has no key (app_id, user_id) that ON CONFLICT can use"
            faults.append((fault, "ADD UNIQUE (app_id, user_id)"))
        if faults:
            what = ", ".join(fault for fault, _ in faults)
            repair = f"ALTER TABLE {name} " + ", ".join(action for _, action in faults)
            raise StorageError(
                f"table {name}: {what}; "
                + (repair if kind in _TABLES else "cast it in the view's query")
            )


def _faults(columns: dict[str, _Column]) -> Iterator[tuple[str, str]]:
    """Yield each fault of the columns, and the action of ALTER TABLE that repairs it."""
    for column, (type_, is_exact, length, is_required) in columns.items():
        wanted = _COLUMNS.get(column)
        if wanted is None and is_required:
            fault = f"column {column} is NOT NULL without a default, and must have one or be NULL"
            yield fault, f"ALTER COLUMN {Identifier(column).as_string()} DROP NOT NULL"
        is_short = column == "app_id" and 0 < length < APP_ID_MAX_LENGTH
        if wanted is not None and (is_short or not is_exact):
            fault = f"column {column} is {type_} and must be {wanted}"
            yield fault, f"ALTER COLUMN {column} TYPE {wanted}"

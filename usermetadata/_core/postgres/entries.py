"""The entries of the PostgreSQL storage's indexes: a table that triggers maintain.

Triggers work for every writer, including programs that know no indexes, and processes that were
started before the index was built. They run once for each statement, after all its rows are stored.
So users can swap the values of a unique index, and an update that changes no entry writes none.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from psycopg.sql import SQL, Composed, Identifier, Literal

from usermetadata._core.postgres.transactions import Statement
from usermetadata.indexes import Index

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import LiteralString

_NAME_MAX_BYTES = 63

# The names of the columns stay as they are: `taken_in` reads them in the server's errors.
CREATION: tuple[LiteralString, ...] = (
    """
CREATE TABLE {entries} AS
SELECT app_id, ''::text COLLATE "C" AS name, ''::text COLLATE "C" AS value, user_id,
    false AS is_unique
FROM {table} WITH NO DATA
""",
    """
ALTER TABLE {entries}
    ALTER is_unique SET NOT NULL,
    ADD PRIMARY KEY (app_id, name, value, user_id)
""",
    "CREATE UNIQUE INDEX ON {entries} (app_id, name, value) WHERE is_unique",
    """
CREATE TABLE {indexes} (
    name text COLLATE "C" PRIMARY KEY,
    is_unique boolean NOT NULL,
    is_ready boolean NOT NULL,
    build text NOT NULL)
""",
)

# The value of a property in an entry: its JSON text, normalised. NULL: the property is absent, or
# the row is not JSON. '': the value cannot be indexed. The functions of the type json refuse U+0000
# and surrogates without a partner anywhere in the text, which become U+FFFF. Before that, the
# second of two backslashes must not look like the beginning of an escape.
VALUE = r"""
CREATE OR REPLACE FUNCTION {value}(metadata text, name text) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $body$
DECLARE
    found text;
    is_patched boolean := false;
BEGIN
    BEGIN
        found := metadata::json -> name;
    EXCEPTION WHEN data_exception OR statement_too_complex THEN
        BEGIN
            is_patched := true;
            found := regexp_replace(
                replace(metadata, '\\', '\u005c'),
                '\\u0000'
                    '|\\u[dD][89abAB][0-9a-fA-F][0-9a-fA-F](?!\\u[dD][c-fC-F])'
                    '|(?<!\\u[dD][89abAB][0-9a-fA-F][0-9a-fA-F])\\u[dD][c-fC-F][0-9a-fA-F][0-9a-fA-F]',
                '\uffff', 'g')::json -> name;
        EXCEPTION WHEN data_exception OR statement_too_complex THEN
            RETURN NULL;
        END;
    END;
    IF left(found, 1) = '"' THEN
        IF strpos(found, '\') > 0 THEN
            IF is_patched AND strpos(found, '\uffff') > 0 THEN
                RETURN '';
            END IF;
            found := found::json #>> '{{}}';
            RETURN CASE WHEN length(found) > 255 THEN '' ELSE to_json(found)::text END;
        END IF;
        RETURN CASE WHEN length(found) > 257 THEN '' ELSE found END;
    END IF;
    RETURN CASE
        WHEN found = 'null' THEN NULL
        WHEN found IN ('true', 'false') THEN found
        WHEN found = '-0' THEN '0'
        WHEN found !~ '^-?[0-9]+$' THEN ''
        WHEN length(found) > 255 THEN 'sha256:' || encode(sha256(found::bytea), 'hex')
        ELSE found
    END;
END $body$
"""

_INSERT = """
BEGIN
    IF NOT EXISTS (SELECT FROM new_rows) THEN
        RETURN NULL;  -- of an upsert that only updates
    END IF;
    INSERT INTO {entries} (app_id, name, value, user_id, is_unique)
    SELECT app_id, name, value, user_id, is_unique
    FROM (
        SELECT app_id, name, {value}(user_metadata, name) AS value, user_id, is_unique
        FROM new_rows, (VALUES {names}) AS index (name, is_unique)) AS entries
    WHERE value <> ''
    ORDER BY app_id, name COLLATE "C", value COLLATE "C"
    ON CONFLICT (app_id, name, value, user_id) DO NOTHING;
    RETURN NULL;
END
"""
# Most updates end with the first query. Other updates process entries in the order of the values,
# and remove a value before adding it. So two writers do not deadlock, and a value can move from one
# user to another. A transaction with an old snapshot may not see entries that were made while an
# index was built, and could not remove them.
_CHANGE = """
DECLARE
    entry record;
    is_checked boolean := left(current_setting('transaction_isolation'), 4) = 'read';
BEGIN
    {unless_changed}
    FOR entry IN
        SELECT app_id, name, is_unique, value, user_id, sum(sign) AS sign
        FROM (
            SELECT app_id, name, is_unique, {value}(user_metadata, name) AS value, user_id, sign
            FROM ({source}) AS changed, (VALUES {names}) AS index (name, is_unique)) AS entries
        WHERE value <> ''
        GROUP BY app_id, name, is_unique, value, user_id
        HAVING sum(sign) <> 0
        ORDER BY app_id, name COLLATE "C", value COLLATE "C", sign
    LOOP
        IF entry.sign > 0 THEN
            INSERT INTO {entries} (app_id, name, value, user_id, is_unique)
            VALUES (entry.app_id, entry.name, entry.value, entry.user_id, entry.is_unique)
            ON CONFLICT (app_id, name, value, user_id) DO NOTHING;
        ELSE
            IF NOT is_checked THEN
                IF (SELECT count(*) FROM {indexes} WHERE is_ready AND build IN ({builds}))
                    < {number}
                THEN
                    RAISE serialization_failure USING MESSAGE =
                        'usermetadata: an index was built since this transaction began; repeat it';
                END IF;
                is_checked := true;
            END IF;
            DELETE FROM {entries} AS lost
            WHERE lost.app_id = entry.app_id AND lost.name = entry.name
                AND lost.value = entry.value AND lost.user_id = entry.user_id;
        END IF;
    END LOOP;
    RETURN NULL;
END
"""
# An update has as many old rows as new ones.
_UNLESS_CHANGED = """
    IF NOT EXISTS (
        SELECT app_id, user_id, {columns} FROM old_rows
        EXCEPT SELECT app_id, user_id, {columns} FROM new_rows)
    THEN
        RETURN NULL;
    END IF;
"""
# The function takes twice as long. It is needed for texts that the type json refuses.
_COLUMN = """CASE
    WHEN user_metadata IS JSON AND strpos(user_metadata, '\\u') = 0
    THEN (user_metadata::json -> {name})::text
    ELSE {value}(user_metadata, {name}) END"""
_COLUMN_BEFORE_16 = "{value}(user_metadata, {name})"
_TRUNCATE = "BEGIN TRUNCATE {entries}; RETURN NULL; END"
_OLD = "SELECT app_id, user_id, user_metadata, -1 AS sign FROM old_rows"
_NEW = "SELECT app_id, user_id, user_metadata, 1 AS sign FROM new_rows"
_OLD_ROWS, _NEW_ROWS = "OLD TABLE AS old_rows", "NEW TABLE AS new_rows"


class _Event(NamedTuple):
    """What a trigger does for one kind of statement."""

    body: LiteralString
    source: LiteralString
    referencing: LiteralString


_EVENTS: dict[LiteralString, _Event] = {
    "INSERT": _Event(_INSERT, "", f"REFERENCING {_NEW_ROWS}"),
    "UPDATE": _Event(_CHANGE, f"{_OLD} UNION ALL {_NEW}", f"REFERENCING {_OLD_ROWS} {_NEW_ROWS}"),
    "DELETE": _Event(_CHANGE, _OLD, f"REFERENCING {_OLD_ROWS}"),
    "TRUNCATE": _Event(_TRUNCATE, "", ""),
}
# It runs with the rights of the table's owner, so that a role that may write to the table needs no
# rights on the entries. No other role may create a trigger with it.
_FUNCTION = """
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {body}
"""
_REVOKE = "REVOKE ALL ON FUNCTION {function}() FROM PUBLIC"
_TRIGGER = """
CREATE OR REPLACE TRIGGER {trigger} AFTER {event} ON {table} {referencing}
FOR EACH STATEMENT EXECUTE FUNCTION {function}()
"""


class Stored(NamedTuple):
    """An index in the database, finished or not.

    Attributes:
        name: the property.
        is_unique: whether a value may belong to only one user of an app.
        is_ready: whether all rows have their entries.
        build: the id of the run that built it.
    """

    name: str
    is_unique: bool
    is_ready: bool
    build: str

    @property
    def declaration(self) -> Index:
        return Index(self.name, unique=self.is_unique)


class Names:
    """The names of the objects for the indexes of a table, in its schema.

    Args:
        table: the table's name, with a schema or without; percent signs are doubled.
    """

    def __init__(self, table: tuple[str, ...]) -> None:
        *self._schema, self._table = table

    def __call__(self, suffix: str) -> Identifier:
        """Return the name that ends with the suffix."""
        table = self._table.replace("%%", "%")
        name = f"{table}_{suffix}"
        if len(name.encode()) > _NAME_MAX_BYTES:
            digest = sha256(table.encode()).hexdigest()[:8]
            room = _NAME_MAX_BYTES - len(f"_{digest}_{suffix}")
            name = f"{table.encode()[:room].decode(errors='ignore')}_{digest}_{suffix}"
        return Identifier(*self._schema, name.replace("%", "%%"))

    @property
    def parts(self) -> dict[str, Identifier | Literal | Composed]:
        """The names for the templates of this module."""
        indexes = self("indexes")
        return {
            "entries": self("index_entries"),
            "indexes": indexes,
            "indexes_name": Literal(indexes.as_string()),
            "value": self("index_value"),
            "triggers": SQL(", ").join(map(Literal, map(_trigger, _EVENTS))),
        }

    def maintenance(self, stored: Sequence[Stored], *, has_is_json: bool) -> list[Statement]:
        """The statements that make the triggers for these indexes.

        Args:
            stored: the indexes.
            has_is_json: whether the server has ``IS JSON``.
        """
        table = Identifier(*self._schema, self._table)
        literals = [Literal(each.name.replace("%", "%%")) for each in stored]
        column = _COLUMN if has_is_json else _COLUMN_BEFORE_16
        parts = self.parts | {
            "names": SQL(", ").join(
                SQL("({}, {})").format(name, each.is_unique)
                for name, each in zip(literals, stored, strict=True)
            ),
            "columns": SQL(", ").join(
                SQL(column).format(name=name, value=self.parts["value"]) for name in literals
            ),
            "builds": SQL(", ").join(Literal(each.build) for each in stored),
            "number": Literal(len({each.build for each in stored})),
        }
        statements: list[Composed] = []
        for event, (template, source, referencing) in _EVENTS.items():
            is_update = event == "UPDATE"
            body = SQL(template).format(
                **parts,
                source=SQL(source),
                unless_changed=SQL(_UNLESS_CHANGED if is_update else "").format(**parts),
            )
            of_event = {
                "function": self(f"index_{event.lower()}"),
                "trigger": Identifier(_trigger(event)),
                "event": SQL(event),
                "referencing": SQL(referencing),
                "table": table,
                "body": Literal(body.as_string()),
            }
            statements += [SQL(each).format(**of_event) for each in (_FUNCTION, _REVOKE, _TRIGGER)]
        return [Statement(each.as_bytes(), {}) for each in statements]

    def removal(self) -> list[Statement]:
        """The statements that remove the triggers."""
        table = Identifier(*self._schema, self._table)
        statements = [
            SQL("DROP TRIGGER IF EXISTS {} ON {}").format(Identifier(_trigger(event)), table)
            for event in _EVENTS
        ]
        functions = [self(f"index_{event.lower()}") for event in _EVENTS]
        statements += [SQL("DROP FUNCTION IF EXISTS {}()").format(each) for each in functions]
        return [Statement(each.as_bytes(), {}) for each in statements]


def _trigger(event: str) -> str:
    return f"usermetadata_{event.lower()}"

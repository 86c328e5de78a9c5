"""Indexes of the PostgreSQL storage: a table of entries, which triggers of the table maintain.

Triggers serve every writer: also programs that know nothing of an index, and processes that were
started before it was built. They run once for each statement, when all its rows are stored. So
users can swap the values of a unique index, and an update that changes no entry writes none.
"""

from __future__ import annotations

import uuid
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg.sql import SQL, Composed, Identifier, Literal

from usermetadata._core.postgres.transactions import Statement, as_json
from usermetadata.exceptions import StorageError, UsageError
from usermetadata.indexes import Index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import LiteralString

    from psycopg import errors

    from usermetadata._core.postgres.pooled import PooledConnections
    from usermetadata._core.postgres.statements import Table
    from usermetadata._core.postgres.transactions import Answer, Transaction
    from usermetadata.interfaces import Value

    Execute = Callable[[Sequence[Statement]], list[Answer]]
    Position = tuple[str, str]

_COMMAND = "python -m usermetadata index"
_MOST_ROWS = 10_000  # a table with more is not indexed by the way
_PAGE = 1000
_BEGINNING = ("", "")  # before the first app id and user id
_LONGEST_DIGITS = 255
_NAME_MAX_BYTES = 63

# The names of the columns stay as they are: `taken_in` reads them in the server's errors.
_CREATE_ENTRIES = """
CREATE TABLE {entries} AS
SELECT app_id, ''::text COLLATE "C" AS name, ''::text COLLATE "C" AS value, user_id,
    false AS is_unique
FROM {table} WITH NO DATA
"""
_CREATE_KEY = """
ALTER TABLE {entries}
    ALTER is_unique SET NOT NULL,
    ADD PRIMARY KEY (app_id, name, value, user_id)
"""
_CREATE_UNIQUE = "CREATE UNIQUE INDEX ON {entries} (app_id, name, value) WHERE is_unique"
_CREATE_INDEXES = """
CREATE TABLE {indexes} (
    name text COLLATE "C" PRIMARY KEY,
    is_unique boolean NOT NULL,
    is_ready boolean NOT NULL,
    build text NOT NULL)
"""

# The value of a property as an entry has it: its JSON text, in one spelling. NULL: the property is
# absent, or the row is no JSON. '': it cannot be indexed. The functions of the type json refuse
# U+0000 and surrogates without a partner anywhere in the text, which become U+FFFF. Before that,
# the second of two backslashes must not look like the beginning of an escape.
_VALUE = r"""
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
# Most updates end with the first query. The others go in the order of the values, for each value
# first who loses it: so two writers do not wait for each other, and a value can go from one user to
# another. A transaction with an old snapshot may not see entries that were made while an index was
# built, and could not remove them.
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
# The function takes twice as long. It is needed for what the type json refuses.
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
    """What a trigger does, from what it sees of a statement."""

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
# rights on the entries. No other role may make a trigger of it.
_FUNCTION = """
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {body}
"""
_REVOKE = "REVOKE ALL ON FUNCTION {function}() FROM PUBLIC"
_TRIGGER = """
CREATE OR REPLACE TRIGGER {trigger} AFTER {event} ON {table} {referencing}
FOR EACH STATEMENT EXECUTE FUNCTION {function}()
"""

_LOCK = "LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"
_SET_TIMEOUT = "SELECT {timeout}"
_EXISTS = """
SELECT to_regclass({indexes_name})::oid::text, row_security_active({name}),
    current_setting('server_version_num')::integer >= 160000
"""
# Without its triggers an index is not maintained, for example if the table was made again.
_STORED = """
SELECT name, is_unique, is_ready, build FROM {indexes}
WHERE (
    SELECT count(*) FROM pg_trigger
    WHERE tgrelid = {name}::regclass AND tgname IN ({triggers}) AND tgenabled IN ('O', 'A')
) = 4
ORDER BY name
"""
_REMOVE_ENTRIES = """
DELETE FROM {entries} WHERE name IN (SELECT json_array_elements_text(%(names)s::json))
"""
_REMOVE_INDEXES = """
DELETE FROM {indexes} WHERE name IN (SELECT json_array_elements_text(%(names)s::json))
"""
_ADD_INDEXES = """
INSERT INTO {indexes} (name, is_unique, is_ready, build)
SELECT name, is_unique, false, %(build)s
FROM json_to_recordset(%(indexes)s::json) AS index (name text, is_unique boolean)
"""
_FINISH = """
UPDATE {indexes} SET is_ready = true WHERE build = %(build)s RETURNING name
"""
_EMPTY = "WITH emptied AS (DELETE FROM {indexes}) DELETE FROM {entries}"
# Each divides by zero if what is remembered is not true any more.
_CHECKS: tuple[LiteralString, ...] = (
    "SELECT 1 / coalesce(to_regclass({indexes_name}) = {oid}::regclass, false)::integer",
    """SELECT 1 / (count(*) = {number})::integer FROM {indexes}
    WHERE is_ready AND build IN ({builds})""",
)
_ANALYZE = "ANALYZE {entries}"
_HAS_MANY_ROWS = (
    "SELECT count(*) > %(most)s FROM (SELECT FROM {table} LIMIT %(most)s::bigint + 1) AS rows"
)
_COUNT_ROWS = "SELECT count(*) FROM {table}"

# The rows stay locked until their entries are committed. It returns the values that were not added,
# and in the last row where the page ends.
_FILL = """
WITH page AS MATERIALIZED (
    SELECT app_id, user_id, user_metadata FROM {table}
    WHERE (app_id, user_id) > (%(app_id)s, %(user_id)s)
    ORDER BY app_id, user_id LIMIT %(limit)s
    FOR SHARE
), found AS MATERIALIZED (
    SELECT app_id, name, {value}(user_metadata, name) AS value, user_id, is_unique
    FROM page, json_to_recordset(%(indexes)s::json) AS index (name text, is_unique boolean)
), added AS (
    INSERT INTO {entries} (app_id, name, value, user_id, is_unique)
    SELECT app_id, name, value, user_id, is_unique FROM found WHERE value <> ''
    ORDER BY app_id, name COLLATE "C", value COLLATE "C", user_id
    ON CONFLICT DO NOTHING
    RETURNING app_id, name, user_id
)
SELECT app_id, user_id, name, value FROM found
WHERE value IS NOT NULL AND (app_id, name, user_id) NOT IN (SELECT * FROM added)
UNION ALL (
    SELECT app_id, user_id, NULL, (SELECT count(*) FROM page)::text FROM page
    ORDER BY app_id DESC, user_id DESC LIMIT 1)
"""
_OWNERS = """
SELECT wanted.app_id, wanted.user_id, wanted.name, entry.user_id
FROM json_to_recordset(%(wanted)s::json)
    AS wanted (app_id text, user_id text, name text, value text)
LEFT JOIN {entries} AS entry
    ON entry.app_id = wanted.app_id AND entry.name = wanted.name AND entry.value = wanted.value
    AND (entry.is_unique OR entry.user_id = wanted.user_id)
"""

# The index may have been dropped since this process found it.
_IS_READY = "EXISTS (SELECT FROM {indexes} WHERE name = %(name)s AND is_ready)"
_HAS_VALUE = """
    entry.app_id = %(app_id)s AND entry.name = %(name)s AND entry.value = %(value)s"""
_JOINED = """{entries} AS entry
    JOIN {table} AS stored ON stored.app_id = entry.app_id AND stored.user_id = entry.user_id"""
_HAS_OTHERS = """
    AND NOT EXISTS (
        SELECT FROM json_each_text(%(others)s::json) AS other (name, value)
        WHERE {value}(stored.user_metadata, other.name) IS DISTINCT FROM other.value)"""


def _find(others: LiteralString) -> LiteralString:
    return f"""/*NO LOAD BALANCE*/
SELECT is_ready, found.user_id, found.user_metadata
FROM (SELECT {_IS_READY}) AS state (is_ready) LEFT JOIN LATERAL (
    SELECT stored.user_id, stored.user_metadata
    FROM {_JOINED}
    WHERE {_HAS_VALUE} AND entry.user_id > %(after)s {others}
    ORDER BY entry.user_id LIMIT %(limit)s) AS found ON is_ready
"""


def _count(table: LiteralString, others: LiteralString) -> LiteralString:
    return f"""/*NO LOAD BALANCE*/
SELECT {_IS_READY}, (SELECT count(*) FROM {table} WHERE {_HAS_VALUE} {others})
"""


_FIND, _FIND_AMONG = _find(""), _find(_HAS_OTHERS)
_COUNT, _COUNT_AMONG = _count("{entries} AS entry", ""), _count(_JOINED, _HAS_OTHERS)
COUNT_ALL = """/*NO LOAD BALANCE*/
SELECT count(*) FROM {table} WHERE app_id = %(app_id)s
"""


class _Stored(NamedTuple):
    name: str
    is_unique: bool
    is_ready: bool
    build: str

    @property
    def declaration(self) -> Index:
        return Index(self.name, unique=self.is_unique)


class _State(NamedTuple):
    """What the database has: the table that lists the indexes, and those that are maintained."""

    oid: str | None
    has_policies: bool
    has_is_json: bool
    stored: Sequence[_Stored]

    @property
    def ready(self) -> list[_Stored]:
        return [each for each in self.stored if each.is_ready]


class Taken(NamedTuple):
    """A value of a unique index that another user has.

    Attributes:
        app_id: of which app.
        name: the index.
        value: the value, as an entry has it.
    """

    app_id: str
    name: str
    value: str


class Page(NamedTuple):
    """Some rows whose entries were made.

    Attributes:
        faults: a line for each row that is in the way.
        number: how many rows it has.
        end: where the next one begins; ``None`` after the last.
    """

    faults: list[str]
    number: int
    end: Position | None


class Names:
    """The names of what belongs to the indexes of a table, in its schema.

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
        """What the templates of this module name."""
        indexes = self("indexes")
        return {
            "entries": self("index_entries"),
            "indexes": indexes,
            "indexes_name": Literal(indexes.as_string()),
            "value": self("index_value"),
            "triggers": SQL(", ").join(map(Literal, map(_trigger, _EVENTS))),
        }

    def maintenance(self, state: _State, stored: Sequence[_Stored]) -> list[Statement]:
        """The statements that make the triggers for these indexes."""
        table = Identifier(*self._schema, self._table)
        literals = [Literal(each.name.replace("%", "%%")) for each in stored]
        column = _COLUMN if state.has_is_json else _COLUMN_BEFORE_16
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


def ready(transaction: Transaction, declared: Sequence[Index]) -> None:
    """Return when the declared indexes exist; build them if the table is small.

    Raises:
        UsageError: the table is large, or cannot have indexes.
        StorageError: a row is in the way.
    """
    table = transaction.table
    if table.indexes.issuperset(declared):
        return
    _refuse(table)
    missing = _missing(_learn(transaction), declared)
    if not missing:
        return
    [answer] = transaction.at_once([Statement(table[_HAS_MANY_ROWS], {"most": _MOST_ROWS})])
    if answer.rows[0][0]:
        raise UsageError(
            f"index {missing[0].name!r}: it is declared, and not in the database yet; run"
            f" `{_COMMAND}`"
        )
    faults = build_at_once(transaction, declared)
    if faults:
        raise StorageError(
            f"index {missing[0].name!r}: it cannot be built: {faults[0]}; `{_COMMAND}` shows all"
            " rows that are in the way"
        )
    _learn(transaction)


def build_at_once(transaction: Transaction, declared: Sequence[Index]) -> list[str]:
    """Build the indexes that are missing in one transaction, for which all writers wait.

    Returns:
        A line for each row that is in the way.
    """
    build = uuid.uuid4().hex
    missing = _register(transaction, declared, build)
    faults: list[str] = []
    position: Position | None = _BEGINNING if missing else None
    while position is not None:
        page = _fill(transaction, missing, position)
        faults += page.faults
        position = page.end
    if faults:
        transaction.undo()
    else:
        transaction.end(_finish(transaction.table, build))
    return faults


def build_in_pages(
    connections: PooledConnections,
    declared: Sequence[Index],
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Build the indexes that are missing while others write.

    Args:
        connections: each page is a transaction.
        declared: the indexes.
        progress: called with how many rows are done, and of how many.

    Returns:
        A line for each row that is in the way; then nothing is built.
    """
    build = uuid.uuid4().hex

    def register(transaction: Transaction) -> list[Index]:
        missing = _register(transaction, declared, build)
        transaction.end([])
        return missing

    # Every write from now on runs the triggers.
    missing = connections.run(register, is_write=True)
    if not missing:
        return []
    # Another process may have begun to build the same.
    undo = partial(_drop, lambda each: each.build == build)
    faults: list[str] = []
    done = 0
    position: Position | None = _BEGINNING
    try:
        total = connections.run(_count_rows)
        while position is not None:
            page = connections.run(partial(_fill_page, missing, position), is_write=True)
            faults += page.faults
            done += page.number
            position = page.end
            total = done if position is None else max(done, total)
            if progress is not None:
                progress(done, total)
        if not faults:
            connections.run(partial(_finish_build, build), is_write=True)
    except BaseException:
        connections.run(undo, is_write=True)
        raise
    if faults:
        connections.run(undo, is_write=True)
    return faults


def _fill_page(missing: Sequence[Index], position: Position, transaction: Transaction) -> Page:
    transaction.begin([])
    page = _fill(transaction, missing, position)
    transaction.end([])
    return page


def _finish_build(build: str, transaction: Transaction) -> None:
    finished, _ = transaction.at_once(_finish(transaction.table, build))
    if not finished.rows:
        raise StorageError(
            "build_indexes: another process has built or dropped the index meanwhile; repeat it"
        )


def drop(transaction: Transaction, name: str) -> tuple[()]:
    """Remove an index, finished or not."""
    return _drop(lambda each: each.name == name, transaction)


def _drop(is_meant: Callable[[_Stored], bool], transaction: Transaction) -> tuple[()]:
    table = transaction.table
    state = _begin(transaction)
    kept = [each for each in state.stored if not is_meant(each)]
    of_these = {"names": as_json([each.name for each in state.stored if is_meant(each)])}
    if kept:
        remove = Statement(table[_REMOVE_INDEXES], of_these)
        transaction.end([remove, *table.names.maintenance(state, kept)])
        # Writers need not wait for this: they make no such entries any more.
        transaction.at_once([Statement(table[_REMOVE_ENTRIES], of_these)])
    else:
        # The empty tables stay: other processes may be about to look there.
        last = [*table.names.removal(), Statement(table[_EMPTY], {})]
        transaction.end(last if state.oid else [])
    table.forget()
    return ()


def _count_rows(transaction: Transaction) -> int:
    """Return how many rows the table has, of all apps."""
    [answer] = transaction.at_once([Statement(transaction.table[_COUNT_ROWS], {})])
    number: int = answer.rows[0][0]
    return number


def stored_indexes(transaction: Transaction) -> tuple[Index, ...]:
    """Return the indexes that can be used."""
    state = _read(transaction.at_once, transaction.table)
    return tuple(each.declaration for each in state.ready)


class Search:
    """Finds and counts the users of an app who have some values.

    Args:
        app_id: the app.
        declared: the storage's indexes.
        where: properties and their values; one has an index.
    """

    def __init__(self, app_id: str, declared: Sequence[Index], where: Mapping[str, Value]) -> None:
        self._declared = declared
        texts = {name: _text_of(value) for name, value in where.items()}
        # At most one user has the value of a unique index.
        usable = sorted((not index.unique, index.name) for index in declared if index.name in texts)
        name = usable[0][1]
        self._parameters: dict[str, object] = {
            "app_id": app_id,
            "name": name,
            "value": texts.pop(name),
        }
        self._has_others = bool(texts)
        if texts:
            self._parameters["others"] = as_json(texts)

    def rows(self, transaction: Transaction, after: str, limit: int) -> list[tuple[str, str]]:
        """Return the user ids and texts of a page."""
        template = _FIND_AMONG if self._has_others else _FIND
        found = self._ask(transaction, template, {"after": after, "limit": limit})
        return [(user_id, text) for _, user_id, text in found if user_id is not None]

    def number(self, transaction: Transaction) -> int:
        """Return how many there are."""
        template = _COUNT_AMONG if self._has_others else _COUNT
        [(_, number)] = self._ask(transaction, template, {})
        return int(number)

    def _ask(
        self, transaction: Transaction, template: LiteralString, parameters: dict[str, object]
    ) -> list[tuple[Any, ...]]:
        table = transaction.table
        for _ in range(2):
            ready(transaction, self._declared)
            statement = Statement(table[template], self._parameters | parameters)
            [answer] = transaction.at_once([statement])
            is_ready, *_ = answer.rows[0]
            if is_ready:
                return answer.rows
            table.forget()
        raise StorageError(f"index {self._parameters['name']!r}: it is being dropped; build it")


def taken_in(error: errors.UniqueViolation, app_id: str) -> Taken:
    """Return the value that a write was refused for; raise the error if it is about another key."""
    detail = getattr(error, "detail", None) or error.diag.message_detail or ""
    # The server does not translate this part of its text.
    _, is_ours, found = detail.partition(f"(app_id, name, value)=({app_id}, ")
    if not is_ours:
        raise error
    found = found.rpartition(")")[0]
    # Only a text has quotation marks, a name has none.
    name, is_text, value = found.partition(', "')
    if is_text:
        return Taken(app_id, name, f'"{value}')
    name, _, value = found.rpartition(", ")
    return Taken(app_id, name, value)


def owner_of(transaction: Transaction, taken: Taken) -> str | None:
    """Return the user who has a value, if this role can see that."""
    parameters = {"wanted": as_json([taken._asdict()])}
    [answer] = transaction.at_once([Statement(transaction.table[_OWNERS], parameters)])
    owner: str | None = answer.rows[0][-1]
    return owner


def _refuse(table: Table) -> None:
    if table.is_shared:
        raise UsageError(
            "indexes: the table is a SuperTokens core's, whose writes no index may refuse; use a"
            " table of your own, or declare no indexes"
        )
    if not table.is_plain:
        raise UsageError(
            "indexes: the table is a view or a foreign table, which cannot be indexed; name the"
            " table behind it, or declare no indexes"
        )


def _learn(transaction: Transaction) -> _State:
    """Read which indexes can be used, and remember them."""
    table = transaction.table
    state = _read(transaction.at_once, table)
    checks = (
        [
            SQL(template)
            .format(
                **table.names.parts,
                oid=Literal(int(state.oid)),
                builds=SQL(", ").join(Literal(each.build) for each in state.ready),
                number=Literal(len(state.ready)),
            )
            .as_bytes()
            for template in _CHECKS
        ]
        if state.oid and state.ready
        else []
    )
    table.index_checks = [Statement(each.replace(b"%%", b"%")) for each in checks]
    table.indexes = frozenset(each.declaration for each in state.ready)
    return state


def _missing(state: _State, declared: Sequence[Index]) -> list[Index]:
    existing = {each.declaration for each in state.ready}
    return [index for index in declared if index not in existing]


def _begin(transaction: Transaction) -> _State:
    """Begin, and keep other writers of the table out until the end."""
    table = transaction.table
    timeout = Statement(table[_SET_TIMEOUT], {"timeout": transaction.timeout})
    transaction.begin([timeout, Statement(table[_LOCK], {})])
    return _read(transaction.go_on, table)


def _read(execute: Execute, table: Table) -> _State:
    [found] = execute([Statement(table[_EXISTS], {})])
    oid, has_policies, has_is_json = found.rows[0]
    stored: list[_Stored] = []
    if oid is not None:
        [answer] = execute([Statement(table[_STORED], {})])
        stored = [_Stored(*row) for row in answer.rows]
    return _State(oid, has_policies, has_is_json, stored)


def _register(transaction: Transaction, declared: Sequence[Index], build: str) -> list[Index]:
    table = transaction.table
    _refuse(table)
    state = _begin(transaction)
    if state.has_policies:
        raise StorageError(
            "build_indexes: a row-level policy may hide rows from this role; build them as the"
            " table's owner, or as a role with BYPASSRLS"
        )
    missing = _missing(state, declared)
    if not missing:
        return []
    statements: list[Statement] = []
    if state.oid is None:
        creation = (_CREATE_ENTRIES, _CREATE_KEY, _CREATE_UNIQUE, _CREATE_INDEXES)
        statements += [Statement(table[template], {}) for template in creation]
    elif not state.stored:
        # Nothing has maintained what may be left there.
        statements.append(Statement(table[_EMPTY], {}))
    names = [index.name for index in missing]
    of_these = {"names": as_json(names), "indexes": _rows(missing), "build": build}
    kept = [each for each in state.stored if each.name not in names]
    new = [_Stored(index.name, index.unique, is_ready=False, build=build) for index in missing]
    statements += [
        Statement(table[_VALUE], {}),
        *(Statement(table[each], of_these) for each in (_REMOVE_ENTRIES, _REMOVE_INDEXES)),
        Statement(table[_ADD_INDEXES], of_these),
        *table.names.maintenance(state, [*kept, *new]),
    ]
    transaction.go_on(statements)
    return missing


def _finish(table: Table, build: str) -> list[Statement]:
    return [Statement(table[_FINISH], {"build": build}), Statement(table[_ANALYZE], {})]


def _fill(transaction: Transaction, missing: Sequence[Index], position: Position) -> Page:
    table = transaction.table
    app_id, user_id = position
    parameters = {"app_id": app_id, "user_id": user_id, "limit": _PAGE, "indexes": _rows(missing)}
    while True:
        [answer] = transaction.go_on([Statement(table[_FILL], parameters)])
        if not answer.rows:
            return Page([], 0, None)
        *rows, (*_, number) = answer.rows
        faults: list[str] = []
        wanted: list[dict[str, str]] = []
        for app_id, user_id, name, value in rows:
            if value:
                entry = {"app_id": app_id, "user_id": user_id, "name": name, "value": value}
                wanted.append(entry)
            else:
                reason = (
                    "it is neither a short text, nor an integer, nor a boolean; set or remove it"
                )
                faults.append(_fault(app_id, user_id, name, reason))
        owners: list[tuple[Any, ...]] = []
        if wanted:
            statement = Statement(table[_OWNERS], {"wanted": as_json(wanted)})
            owners = transaction.go_on([statement])[0].rows
        # A value that its owner has lost meanwhile is free: the page is filled again.
        if all(owner is not None for *_, owner in owners):
            break
    for app_id, user_id, name, owner in owners:
        if owner != user_id:
            reason = f"user {owner!r} has the same value; change one of them"
            faults.append(_fault(app_id, user_id, name, reason))
    faults.sort()
    last_app, last_user, _, _ = answer.rows[-1]
    return Page(faults, int(number), (last_app, last_user))


def _fault(app_id: str, user_id: str, name: str, reason: str) -> str:
    return f"user {user_id!r} in app {app_id!r}: property {name!r}: {reason}"


def _text_of(value: Value) -> str:
    """Return the value as an entry has it."""
    text = as_json(value)
    if isinstance(value, int) and len(text) > _LONGEST_DIGITS:
        return f"sha256:{sha256(text.encode()).hexdigest()}"
    return text


def _rows(indexes: Iterable[Index]) -> str:
    return as_json([{"name": index.name, "is_unique": index.unique} for index in indexes])

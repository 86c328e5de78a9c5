"""Finding, building and dropping the PostgreSQL storage's indexes."""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg.sql import SQL, Literal

from usermetadata._core.building import (
    MOST_ROWS,
    cannot_be_built,
    repeated,
    too_many_rows,
    unfindable,
)
from usermetadata._core.postgres.entries import CREATION, VALUE, Stored
from usermetadata._core.postgres.transactions import Statement, as_json
from usermetadata.exceptions import StorageError, UsageError
from usermetadata.indexes import Index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import LiteralString, Never

    from usermetadata._core.postgres.pooled import PooledConnections
    from usermetadata._core.postgres.statements import Table
    from usermetadata._core.postgres.transactions import Answer, Transaction

    Execute = Callable[[Sequence[Statement]], list[Answer]]
    Position = tuple[str, str]

_PAGE = 1000
_BEGINNING = ("", "")  # before the first app id and user id

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
# Each divides by zero if the remembered state is out of date.
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
_FAULTS = """
SELECT app_id, user_id, name, value, owner
FROM (
    SELECT app_id, user_id, name, value, is_unique,
        first_value(user_id) OVER (PARTITION BY app_id, name, value ORDER BY user_id) AS owner
    FROM (
        SELECT app_id, user_id, name, {value}(user_metadata, name) AS value, is_unique
        FROM {table}, json_to_recordset(%(indexes)s::json) AS index (name text, is_unique boolean)
    ) AS found
    WHERE value IS NOT NULL) AS owned
WHERE value = '' OR (is_unique AND user_id <> owner)
ORDER BY app_id, user_id
"""
OWNERS = """
SELECT wanted.app_id, wanted.user_id, wanted.name, entry.user_id
FROM json_to_recordset(%(wanted)s::json)
    AS wanted (app_id text, user_id text, name text, value text)
LEFT JOIN {entries} AS entry
    ON entry.app_id = wanted.app_id AND entry.name = wanted.name AND entry.value = wanted.value
    AND (entry.is_unique OR entry.user_id = wanted.user_id)
"""


class _State(NamedTuple):
    """The state of the database: the table that lists the indexes, and the maintained indexes."""

    oid: str | None
    has_policies: bool
    has_is_json: bool
    stored: Sequence[Stored]

    @property
    def ready(self) -> list[Stored]:
        return [each for each in self.stored if each.is_ready]

    @property
    def declarable(self) -> frozenset[Index]:
        """The indexes that need not be built; a unique index also serves as one that is not."""
        return frozenset(
            index for each in self.ready for index in (Index(each.name), each.declaration)
        )


class _Page(NamedTuple):
    """A page of rows whose entries were made.

    Attributes:
        faults: a line for each row that cannot be indexed.
        number: the number of its rows.
        end: where the next page begins; ``None`` after the last.
    """

    faults: list[str]
    number: int
    end: Position | None


def ready(transaction: Transaction, declared: Sequence[Index]) -> None:
    """Return when the declared indexes exist; build them if the table is small.

    Raises:
        UsageError: the table is large, or cannot have indexes.
        StorageError: a row cannot be indexed.
    """
    table = transaction.table
    if table.indexes.issuperset(declared):
        return
    _refuse(table)
    missing = _missing(_learn(transaction), declared)
    if not missing:
        return
    [answer] = transaction.at_once([Statement(table[_HAS_MANY_ROWS], {"most": MOST_ROWS})])
    if answer.rows[0][0]:
        raise too_many_rows(missing)
    faults = build_at_once(transaction, declared)
    if faults:
        raise cannot_be_built(missing, faults[0])
    _learn(transaction)


def build_at_once(transaction: Transaction, declared: Sequence[Index]) -> list[str]:
    """Build the missing indexes in one transaction, for which all writers wait.

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
    """Build the missing indexes while others write.

    Args:
        connections: the connections; each page is a transaction.
        declared: the indexes.
        progress: called with the number of rows that are done, and of all rows.

    Returns:
        A line for each row that cannot be indexed. If there are any, nothing is built.
    """
    faults: list[str] = connections.run(partial(_faults_of_a_change, declared), absent=[])
    if faults:
        return faults
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


def _faults_of_a_change(declared: Sequence[Index], transaction: Transaction) -> list[str]:
    """Return a line for each row in the way of the missing indexes, if one would replace an index.

    Building removes the index that is replaced, so this is found out before.
    """
    table = transaction.table
    _refuse(table)
    state = _read(transaction.at_once, table)
    missing = _missing(state, declared)
    if not {index.name for index in missing} & {each.name for each in state.ready}:
        return []
    [answer] = transaction.at_once([Statement(table[_FAULTS], {"indexes": _rows(missing)})])
    return [
        repeated(app_id, user_id, name, owner) if value else unfindable(app_id, user_id, name)
        for app_id, user_id, name, value, owner in answer.rows
    ]


def _fill_page(missing: Sequence[Index], position: Position, transaction: Transaction) -> _Page:
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


def _drop(is_meant: Callable[[Stored], bool], transaction: Transaction) -> tuple[()]:
    table = transaction.table
    state = _begin(transaction)
    kept = [each for each in state.stored if not is_meant(each)]
    of_these = {"names": as_json([each.name for each in state.stored if is_meant(each)])}
    if kept:
        remove = Statement(table[_REMOVE_INDEXES], of_these)
        transaction.end([remove, *table.names.maintenance(kept, has_is_json=state.has_is_json)])
        # Writers need not wait for this, because they no longer make such entries.
        transaction.at_once([Statement(table[_REMOVE_ENTRIES], of_these)])
    else:
        # The empty tables stay: other processes may be about to look there.
        last = [*table.names.removal(), Statement(table[_EMPTY], {})]
        transaction.end(last if state.oid else [])
    table.forget()
    return ()


def _count_rows(transaction: Transaction) -> int:
    """Return the number of rows in the table, of all apps."""
    [answer] = transaction.at_once([Statement(transaction.table[_COUNT_ROWS], {})])
    number: int = answer.rows[0][0]
    return number


def stored_indexes(transaction: Transaction) -> tuple[Index, ...]:
    """Return the indexes that can be used."""
    if transaction.table.is_portable:
        return ()
    state = _read(transaction.at_once, transaction.table)
    return tuple(each.declaration for each in state.ready)


def refuse_portable(what: str) -> Never:
    """Raise the error of indexes where ``what`` does not maintain them."""
    raise UsageError(
        f"indexes: {what} cannot maintain them, unique or not: no trigger of the table may write"
        " to another one; declare no indexes, or use one PostgreSQL server"
    )


def _refuse(table: Table) -> None:
    if table.is_portable:
        refuse_portable(table.engine or "portable statements")
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
    table.indexes = state.declarable
    return state


def _missing(state: _State, declared: Sequence[Index]) -> list[Index]:
    return [index for index in declared if index not in state.declarable]


def _begin(transaction: Transaction) -> _State:
    """Begin, and keep other writers of the table out until the end."""
    table = transaction.table
    timeout = Statement(table[_SET_TIMEOUT], {"timeout": transaction.timeout})
    transaction.begin([timeout, Statement(table[_LOCK], {})])
    return _read(transaction.go_on, table)


def _read(execute: Execute, table: Table) -> _State:
    [found] = execute([Statement(table[_EXISTS], {})])
    oid, has_policies, has_is_json = found.rows[0]
    stored: list[Stored] = []
    if oid is not None:
        [answer] = execute([Statement(table[_STORED], {})])
        stored = [Stored(*row) for row in answer.rows]
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
        statements += [Statement(table[template], {}) for template in CREATION]
    elif not state.stored:
        # Entries that may be left there were not maintained.
        statements.append(Statement(table[_EMPTY], {}))
    names = [index.name for index in missing]
    of_these = {"names": as_json(names), "indexes": _rows(missing), "build": build}
    kept = [each for each in state.stored if each.name not in names]
    new = [Stored(index.name, index.unique, is_ready=False, build=build) for index in missing]
    statements += [
        Statement(table[VALUE], {}),
        *(Statement(table[each], of_these) for each in (_REMOVE_ENTRIES, _REMOVE_INDEXES)),
        Statement(table[_ADD_INDEXES], of_these),
        *table.names.maintenance([*kept, *new], has_is_json=state.has_is_json),
    ]
    transaction.go_on(statements)
    return missing


def _finish(table: Table, build: str) -> list[Statement]:
    return [Statement(table[_FINISH], {"build": build}), Statement(table[_ANALYZE], {})]


def _fill(transaction: Transaction, missing: Sequence[Index], position: Position) -> _Page:
    table = transaction.table
    app_id, user_id = position
    parameters = {"app_id": app_id, "user_id": user_id, "limit": _PAGE, "indexes": _rows(missing)}
    while True:
        [answer] = transaction.go_on([Statement(table[_FILL], parameters)])
        if not answer.rows:
            return _Page([], 0, None)
        *rows, (*_, number) = answer.rows
        faults: list[str] = []
        wanted: list[dict[str, str]] = []
        for app_id, user_id, name, value in rows:
            if value:
                entry = {"app_id": app_id, "user_id": user_id, "name": name, "value": value}
                wanted.append(entry)
            else:
                faults.append(unfindable(app_id, user_id, name))
        owners: list[tuple[Any, ...]] = []
        if wanted:
            statement = Statement(table[OWNERS], {"wanted": as_json(wanted)})
            owners = transaction.go_on([statement])[0].rows
        # A value may have become free meanwhile, so the page is filled again.
        if all(owner is not None for *_, owner in owners):
            break
    faults += [
        repeated(app_id, user_id, name, owner)
        for app_id, user_id, name, owner in owners
        if owner != user_id
    ]
    faults.sort()
    last_app, last_user, _, _ = answer.rows[-1]
    return _Page(faults, int(number), (last_app, last_user))


def _rows(indexes: Iterable[Index]) -> str:
    return as_json([{"name": index.name, "is_unique": index.unique} for index in indexes])

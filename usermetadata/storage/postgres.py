"""The PostgreSQL storage: one table, through psycopg 3 and its pool."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from psycopg import DataError, sql
from psycopg.types.json import Json, Jsonb

from usermetadata.changes import Clear, Merge, Replace
from usermetadata.exceptions import DamagedMetadataError, InvalidInputError
from usermetadata.identifiers import USER_ID_MAX_LENGTH, check_app_id
from usermetadata.json import decode_metadata, encode_metadata
from usermetadata.storage.postgres_connections import Connections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from psycopg import Connection, Cursor
    from psycopg_pool import ConnectionPool
    from typing_extensions import LiteralString, Self

    from usermetadata.changes import Change
    from usermetadata.json import Metadata

T = TypeVar("T")

_MAX_TIMEOUT = 1_000_000  # seconds
_NATIVE = {Merge, Replace, Clear}
_BLIND = (Clear, Replace)  # they do not look at what is stored, and so mend a damaged row, too
_NO_ROW = "no row"  # stands in a row that is locked before it is written; no JSON

_CREATE = """
CREATE TABLE IF NOT EXISTS {table} (
    app_id varchar(64) NOT NULL DEFAULT 'public',
    user_id varchar(255) NOT NULL,
    user_metadata text NOT NULL,
    PRIMARY KEY (app_id, user_id))
"""
_WIDTH = """
SELECT atttypmod - 4 FROM pg_attribute
WHERE attrelid = %(table)s::regclass AND attname = 'user_id' AND atttypmod > 0
"""
_READ_ONE = """
SELECT user_id, user_metadata FROM {table} WHERE app_id = %(app_id)s AND user_id = %(user_id)s
"""
_READ_MANY = """
SELECT user_id, user_metadata FROM {table}
WHERE app_id = %(app_id)s AND user_id IN (SELECT json_array_elements_text(%(user_ids)s))
"""
# In an order that all writers keep to, so that two of them never wait for each other.
_UPSERT = """
INSERT INTO {table} AS stored (app_id, user_id, user_metadata)
SELECT %(app_id)s, user_id, user_metadata
FROM json_to_recordset(%(rows)s) AS row (user_id text, user_metadata text) ORDER BY user_id
ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = """
_STORE = _UPSERT + "excluded.user_metadata RETURNING user_id, user_metadata"
# Replaces a row by itself, which locks it.
_LOCK = _UPSERT + "stored.user_metadata RETURNING user_id, user_metadata"
# The type json keeps each value's text as it is, to the last digit, and the order of properties.
_MERGED = """(
    SELECT '{{' || coalesce(
        string_agg(
            to_json(key)::text || ':' || coalesce(new.value, old.value)::text,
            ',' ORDER BY old.place, new.place
        ), ''
    ) || '}}'
    FROM json_each(stored.user_metadata::json) WITH ORDINALITY AS old (key, value, place)
    FULL JOIN json_each(excluded.user_metadata::json) WITH ORDINALITY AS new (key, value, place)
        USING (key)
    WHERE new.place IS NOT NULL OR NOT coalesce(%(removed)s -> excluded.user_id::text ? key, false))
RETURNING user_id, user_metadata"""
_MERGE = _UPSERT + _MERGED
_REMOVE = """
DELETE FROM {table}
WHERE app_id = %(app_id)s AND user_id IN (SELECT json_array_elements_text(%(user_ids)s))
"""


class PostgresStorage:
    """Keeps metadata in a table of a PostgreSQL database, which many machines may share.

    ``Merge``, ``Replace`` and ``Clear`` of any number of users are one statement. Other changes
    hold their users' rows, also those that are not there yet, until they are written.

    The table is that of SuperTokens' core, ``user_metadata (app_id, user_id, user_metadata)``. It
    is created if it is not there, and used as it is if a core has created it.

    Args:
        database: what libpq takes, ``"postgresql://..."`` or ``"host=... dbname=..."``; or a
            ``psycopg_pool.ConnectionPool``, which the caller opens and closes.
        app_id: the app whose rows these are.
        table: the name of the table.
        schema: the schema it is in; without it, the first of the ``search_path``.
        max_connections: how many connections a storage opens at most, when it needs them. Not for a
            pool.
        timeout: seconds that a call waits for a connection before it raises
            ``StorageBusyError``. Not for a pool.

    Raises:
        InvalidInputError: an argument is not valid. Nothing is opened before the first call.

    Example:
        >>> PostgresStorage("postgresql://app@db.internal/users", app_id="shop")
        PostgresStorage('db.internal/users', app_id='shop')
    """

    reads_in_flight, writes_in_flight = 2, 1

    def __init__(  # noqa: PLR0913 - the table's name has two parts
        self,
        database: str | ConnectionPool,
        *,
        app_id: str = "public",
        table: str = "user_metadata",
        schema: str | None = None,
        max_connections: int = 10,
        timeout: float = 30.0,
    ) -> None:
        self._app_id = check_app_id(app_id)
        if not isinstance(timeout, (int, float)) or not 0 <= timeout <= _MAX_TIMEOUT:
            raise InvalidInputError(f"timeout: {timeout!r} is not a number of seconds from 0 on")
        if not isinstance(max_connections, int) or max_connections < 1:
            raise InvalidInputError(f"max_connections: {max_connections!r} is not 1 or more")
        self._table = sql.Identifier(*([schema] if schema else []), table)
        self._connections = Connections(database, max_connections, timeout)
        self._statements: dict[str, sql.Composed] = {}
        self._width: list[int] = []  # of user_id, once it is known; shared by the apps

    def __repr__(self) -> str:
        return f"PostgresStorage({self._connections.name!r}, app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row, in one query."""
        rows = self._run(lambda connection: self._select(connection, user_ids).fetchall())
        return {user_id: self._decode(user_id, text) for user_id, text in rows}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order in one transaction: one round trip, if none is a function."""
        is_native = {type(change) for _, change in changes} <= _NATIVE
        apply = self._apply_natively if is_native else self._apply_holding
        return self._run(lambda connection: apply(connection, changes), changes)

    def for_app(self, app_id: str) -> Self:
        """Return the same storage, seen from another app."""
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        """Close the connections that the storage opened itself."""
        self._connections.close()

    def _run(
        self,
        work: Callable[[Connection], T],
        changes: Sequence[tuple[str, Change]] = (),
    ) -> T:
        if not self._width:
            self._width[:] = [self._connections.run(self._prepare)]
        [width] = self._width
        for user_id, _ in changes:
            if len(user_id) > width:
                raise InvalidInputError(
                    f"user_id: has {len(user_id)} characters; the column user_id of this"
                    f" database allows {width}"
                )
        return self._connections.run(work)

    def _prepare(self, connection: Connection) -> int:
        """Create the table where it is missing; return how long a user id may be."""
        name = self._table.as_string(connection)
        found = connection.execute("SELECT to_regclass(%s)", [name]).fetchone()
        if found is None or found[0] is None:
            with connection.transaction():
                # Two who create a table at once fail, IF NOT EXISTS or not.
                connection.execute("SELECT pg_advisory_xact_lock(hashtext('usermetadata'))")
                connection.execute(self._statement(_CREATE))
        width = connection.execute(_WIDTH, {"table": name}).fetchone()
        return width[0] if width else USER_ID_MAX_LENGTH

    def _statement(self, template: LiteralString) -> sql.Composed:
        statement = self._statements.get(template)
        if statement is None:
            statement = self._statements[template] = sql.SQL(template).format(table=self._table)
        return statement

    def _execute(
        self, connection: Connection, template: LiteralString, **parameters: object
    ) -> Cursor[tuple[Any, ...]]:
        return connection.execute(self._statement(template), {"app_id": self._app_id, **parameters})

    def _select(self, connection: Connection, user_ids: Sequence[str]) -> Cursor[tuple[Any, ...]]:
        if len(user_ids) == 1:
            return self._execute(connection, _READ_ONE, user_id=user_ids[0])
        return self._execute(connection, _READ_MANY, user_ids=Json(user_ids))

    def _apply_natively(
        self, connection: Connection, changes: Sequence[tuple[str, Change]]
    ) -> list[Metadata | None]:
        texts: list[str | None] = [None] * len(changes)
        statements = list(_statements(changes))
        try:
            if len(statements) == 1:
                cursors = [self._send(connection, *statements[0])]
            else:
                with connection.pipeline(), connection.transaction():
                    cursors = [self._send(connection, *each) for each in statements]
            for (_, by_user), cursor in zip(statements, cursors, strict=True):
                if cursor is not None:
                    for user_id, text in cursor.fetchall():
                        texts[by_user[user_id][0]] = text
        except DataError:
            # What the server's JSON cannot take (U+0000 in a value, a damaged row), ours may.
            return self._apply_holding(connection, changes)
        return [
            None if text is None else self._decode(user_id, text)
            for (user_id, _), text in zip(changes, texts, strict=True)
        ]

    def _send(
        self, connection: Connection, kind: type, by_user: dict[str, tuple[int, Any]]
    ) -> Cursor[tuple[Any, ...]] | None:
        if kind is Clear:
            self._execute(connection, _REMOVE, user_ids=Json(list(by_user)))
            return None
        rows = [
            {"user_id": user_id, "user_metadata": encode_metadata(change(None) or {})}
            for user_id, (_, change) in by_user.items()
        ]
        if kind is Replace:
            return self._execute(connection, _STORE, rows=Json(rows))
        removed = {
            user_id: [key for key, value in change.update.items() if value is None]
            for user_id, (_, change) in by_user.items()
        }
        return self._execute(connection, _MERGE, rows=Json(rows), removed=Jsonb(removed))

    def _apply_holding(
        self, connection: Connection, changes: Sequence[tuple[str, Change]]
    ) -> list[Metadata | None]:
        users = dict.fromkeys(user_id for user_id, _ in changes)
        with connection.transaction():
            placeholders = [{"user_id": user, "user_metadata": _NO_ROW} for user in users]
            held = self._execute(connection, _LOCK, rows=Json(placeholders)).fetchall()
            texts = {user_id: text for user_id, text in held if text != _NO_ROW}
            results: list[Metadata | None] = []
            for user_id, change in changes:
                old = None
                if user_id in texts and not isinstance(change, _BLIND):
                    old = self._decode(user_id, texts[user_id])
                new = change(old)
                results.append(new)
                if new is None:
                    texts.pop(user_id, None)
                else:
                    texts[user_id] = encode_metadata(new)
            rows = [{"user_id": user, "user_metadata": text} for user, text in texts.items()]
            gone = [user_id for user_id in users if user_id not in texts]
            with connection.pipeline():
                self._execute(connection, _STORE, rows=Json(rows))
                self._execute(connection, _REMOVE, user_ids=Json(gone))
        return results

    def _decode(self, user_id: str, text: str) -> Metadata:
        try:
            return decode_metadata(text)
        except ValueError as error:
            raise DamagedMetadataError(
                f"{self._connections.name}: the metadata of user {user_id!r} in app"
                f" {self._app_id!r} is damaged: {error}; set or clear it to mend it"
            ) from error


def _statements(
    changes: Sequence[tuple[str, Change]],
) -> Iterable[tuple[type, dict[str, tuple[int, Any]]]]:
    """Put changes that one statement can apply together, and a user's own one after the other."""
    rounds: list[dict[type, dict[str, tuple[int, Any]]]] = []
    counts: dict[str, int] = {}
    for position, (user_id, change) in enumerate(changes):
        number = counts[user_id] = counts.get(user_id, -1) + 1
        if number == len(rounds):
            rounds.append({})
        rounds[number].setdefault(type(change), {})[user_id] = (position, change)
    for by_kind in rounds:
        yield from by_kind.items()

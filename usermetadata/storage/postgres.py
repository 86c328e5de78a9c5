"""The PostgreSQL storage: one table, through psycopg 3 and its pool."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

try:
    from psycopg import Cursor, DataError, NotSupportedError, ProgrammingError
    from psycopg.pq import TransactionStatus
    from psycopg.rows import tuple_row

    from usermetadata._core.postgres.connections import Connections
    from usermetadata._core.postgres.outcomes import (
        NOT_STORED,
        UncommittedError,
        before_commit,
        check_committed,
        is_gone,
    )
    from usermetadata._core.postgres.statements import (
        ERASE,
        HOLD,
        MERGE,
        MERGE_ONE,
        READ_AFTER,
        READ_MANY,
        READ_ONE,
        REMOVE,
        STORE,
        STORE_ONE,
        Table,
    )
except ImportError as error:
    raise ImportError(
        "PostgresStorage needs psycopg; pip install 'psycopg[binary,pool]>=3.2'"
    ) from error

from usermetadata._core.apps import OfOneApp
from usermetadata._core.reentry import ChangeError
from usermetadata._core.rows import decode_row
from usermetadata.changes import Clear, Merge, Replace, apply_in_order
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    OutcomeUnknownError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from typing import LiteralString

    from psycopg import Connection
    from psycopg_pool import ConnectionPool

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

_MIN_TIMEOUT, _MAX_TIMEOUT = 0.001, 1_000_000  # seconds
_OF_THE_TABLE = (ProgrammingError, NotSupportedError, DataError)
_NATIVE = {Merge, Replace, Clear}
_MOST_STATEMENTS = 3  # with more of them, one round trip takes longer than two without
_NAME = re.compile("[^\0\ud800-\udfff]+\\Z")
# Of a row that is locked before it is written: JSON, as a constraint or a trigger of the table may
# require, and yet unlike what is stored.
_NO_ROW = "{ \t }"


class PostgresStorage(OfOneApp):
    """Keeps metadata in a table of a PostgreSQL database, which many machines may share.

    ``Merge``, ``Replace`` and ``Clear`` of any number of users are one statement. Other changes
    lock their users' rows, also those that do not exist yet, until they are written.

    The table is that of SuperTokens' core, ``user_metadata (app_id, user_id, user_metadata)``. It
    is created if it is missing. A table that a core has created is used under the locks that the
    core takes, so that both may write to it.

    Args:
        database: what libpq takes, ``"postgresql://..."`` or ``"host=... dbname=..."``; or a
            ``psycopg_pool.ConnectionPool``, which the caller opens and closes.
        app_id: the app whose rows these are.
        table: the name of the table.
        schema: the schema it is in; without it, the first of the ``search_path``.
        max_connections: how many connections are opened at most, each when it is needed. A pool
            has its own limit.
        timeout: seconds that a call waits for a connection, and a write for row locks, before it
            raises ``StorageBusyError``.

    Raises:
        InvalidInputError: an argument is not valid. Nothing is opened before the first call.

    Example:
        >>> PostgresStorage("postgresql://app@db.internal/users", app_id="shop")
        PostgresStorage('db.internal/users', app_id='shop')
    """

    # Updates keep their order if one batch is written at a time; reads have none to keep.
    reads_in_flight, writes_in_flight = 2, 1

    def __init__(  # noqa: PLR0913 - the table's name has two parts
        self,
        database: str | ConnectionPool[Any],
        *,
        app_id: str = "public",
        table: str = "user_metadata",
        schema: str | None = None,
        max_connections: int = 10,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(app_id)
        if not isinstance(timeout, (int, float)) or not _MIN_TIMEOUT <= timeout <= _MAX_TIMEOUT:
            raise InvalidInputError(
                f"timeout: {timeout!r} is not a number of seconds, {_MIN_TIMEOUT} or more;"
                " pass for example 30"
            )
        if not isinstance(max_connections, int) or max_connections < 1:
            raise InvalidInputError(
                f"max_connections: {max_connections!r} is not 1 or more; pass for example 10"
            )
        names = {"table": table} if schema is None else {"schema": schema, "table": table}
        for argument, name in names.items():
            if not isinstance(name, str) or not _NAME.match(name):
                raise InvalidInputError(
                    f"{argument}: {name!r} is not a name; pass a text without U+0000"
                )
        self._connections = Connections(database, max_connections, timeout)
        self._table = Table(*names.values(), is_session_ours=not isinstance(database, str))
        self._timeout = str(round(timeout * 1000))

    def __repr__(self) -> str:
        return f"PostgresStorage({self._connections.name!r}, app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of those users that have a row, in one query."""
        if len(user_ids) == 1:
            found = self._read(READ_ONE, user_id=user_ids[0])
        else:
            found = self._read(READ_MANY, user_ids=_dump(user_ids))
        if not found.keys() <= set(user_ids):
            raise StorageError(
                f"{self._connections.name}: the database returned rows of other users than asked"
                f" for, of {min(found.keys() - set(user_ids))!r} for example; check the columns'"
                " types and collations"
            )
        return found

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return the metadata of the next users, in the database's order."""
        return self._read(READ_AFTER, user_id=user_id, limit=limit)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order in one transaction; without a function, in one round trip."""
        length = self._prepare(create=True)
        for user_id, _ in changes:
            if len(user_id) > length:
                raise InvalidInputError(
                    f"user_id: has {len(user_id)} characters; the column user_id of this"
                    f" database's table takes {length}"
                )
        is_native = {type(change) for _, change in changes} <= _NATIVE
        apply = self._apply_natively if is_native else self._apply_holding
        try:
            with self._changeable():
                results = self._connections.run(
                    lambda connection: apply(connection, changes), is_write=True
                )
        except ChangeError as failed:
            error = failed.error
        else:
            return self._decoded(changes, results)
        raise error

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """Remove the rows that a user has in any app, in one transaction.

        A role that a row-level policy of the table holds for cannot erase.
        """
        if not self._prepare(create=False):
            return {}
        try:
            with self._changeable():
                return self._connections.run(
                    lambda connection: self._erase(connection, user_id, check), is_write=True
                )
        except ChangeError as failed:
            error = failed.error
        raise error

    def close(self) -> None:
        """Close the connections that the storage opened itself."""
        self._connections.close()

    def _prepare(self, *, create: bool) -> int:
        """Describe the table; return the length of the longest user id, 0 without a table."""
        # Another thread may forget the description at any time.
        length = self._table.user_id_length
        if not length:
            self._connections.run_first(self._table.describe)
            length = self._table.user_id_length
        while create and not length:
            # Its creation is committed before it is described.
            self._connections.run(self._table.create)
            self._connections.run(self._table.describe)
            length = self._table.user_id_length
        return length

    @contextmanager
    def _changeable(self) -> Generator[None, None, None]:
        """Let no error of a table that was changed or dropped outlive it."""
        try:
            yield
        except StorageError as error:
            if isinstance(error.__cause__, _OF_THE_TABLE):
                self._table.forget()
            raise

    def _execute(
        self, connection: Connection[Any], statement: LiteralString, **parameters: object
    ) -> Cursor[tuple[str, str]]:
        # A borrowed pool may make other cursors and rows.
        cursor = Cursor(connection, row_factory=tuple_row)
        parameters = {"app_id": self._app_id, "timeout": self._timeout} | parameters
        return cursor.execute(self._table[statement], parameters)

    def _read(self, statement: LiteralString, **parameters: object) -> dict[str, Metadata]:
        if not self._prepare(create=False):
            return {}
        with self._changeable():
            rows = self._connections.run(
                lambda connection: self._execute(connection, statement, **parameters).fetchall()
            )
        return {user_id: self._decode(user_id, text) for user_id, text in rows}

    def _apply_natively(
        self, connection: Connection[Any], changes: Sequence[tuple[str, Change]]
    ) -> Sequence[str | Metadata | None]:
        texts: list[str | None] = [None] * len(changes)
        groups = list(_grouped(changes))
        users = {user_id for user_id, _ in changes}
        if len(groups) > _MOST_STATEMENTS:
            return self._apply_holding(connection, changes)
        try:
            # A pipeline is one transaction, without BEGIN and COMMIT.
            with connection.pipeline() if len(groups) > 1 else nullcontext():
                if len(groups) > 1 and len(users) > 1:
                    # Each statement locks in the order of the ids; several together do not.
                    self._execute(connection, HOLD, rows=_rows((user, "{}") for user in users))
                cursors = [
                    self._send(connection, *group, is_alone=len(groups) == 1) for group in groups
                ]
            for (_, by_user), cursor in zip(groups, cursors, strict=True):
                for user_id, text in cursor.fetchall():
                    texts[by_user[user_id][0]] = text
        except DataError:
            pass  # its text quotes the row: what follows must not have it as its context
        else:
            return texts
        # The server's JSON refuses U+0000 in a value and a damaged row; Python's may not. Why a row
        # was not removed is unknown until the rows are held.
        with before_commit():
            connection.rollback()  # of a transaction that a pooler has left open
        return self._apply_holding(connection, changes)

    def _decoded(
        self,
        changes: Sequence[tuple[str, Change]],
        results: Sequence[str | Metadata | None],
    ) -> list[Metadata | None]:
        try:
            return [
                self._decode(user_id, result) if isinstance(result, str) else result
                for (user_id, _), result in zip(changes, results, strict=True)
            ]
        except DamagedMetadataError as error:
            # PostgreSQL's JSON has numbers that no float can hold.
            raise OutcomeUnknownError(f"{error}; the write was done") from error

    def _send(
        self,
        connection: Connection[Any],
        kind: type,
        by_user: dict[str, tuple[int, Any]],
        *,
        is_alone: bool,
    ) -> Cursor[tuple[str, str]]:
        if kind is Clear:
            return self._execute(connection, REMOVE, user_ids=_dump(list(by_user)))
        texts = {
            user_id: encode_metadata(change(None) or {}) for user_id, (_, change) in by_user.items()
        }
        parameters: dict[str, Any] = {}
        if kind is Merge:
            keys = {user_id: [*change.update] for user_id, (_, change) in by_user.items()}
            parameters["keys"] = _dump(keys)
        if len(texts) > 1 or not is_alone:
            statement = MERGE if kind is Merge else STORE
            return self._execute(connection, statement, rows=_rows(texts.items()), **parameters)
        [(user_id, text)] = texts.items()
        statement = MERGE_ONE if kind is Merge else STORE_ONE
        cursor = self._execute(
            connection, statement, user_id=user_id, user_metadata=text, **parameters
        )
        if not cursor.rowcount:
            raise DataError(NOT_STORED + _dump(user_id))
        return cursor

    def _apply_holding(
        self, connection: Connection[Any], changes: Sequence[tuple[str, Change]]
    ) -> Sequence[str | Metadata | None]:
        users = dict.fromkeys(user_id for user_id, _ in changes)
        # Two round trips: one begins and locks the rows, one writes and commits. An error between
        # them leaves a transaction open, which `Connections` rolls back.
        with before_commit(), connection.pipeline():
            connection.execute("BEGIN")
            held = self._execute(connection, HOLD, rows=_rows((user, _NO_ROW) for user in users))
        if connection.pgconn.transaction_status != TransactionStatus.INTRANS:
            raise UncommittedError("the transaction has ended before its COMMIT")
        texts = {user_id: text for user_id, text in held.fetchall() if text != _NO_ROW}
        results: list[str | Metadata | None] = []
        try:
            results += apply_in_order(changes, texts, decode=self._decode, encode=encode_metadata)
        except BaseException as error:
            raise ChangeError(error) from error
        gone = [user_id for user_id in users if user_id not in texts]
        if is_gone(connection):
            with before_commit():
                connection.execute("SELECT 1")  # its error is the server's reason
            raise UncommittedError
        with connection.pipeline():
            stored = self._execute(connection, STORE, rows=_rows(texts.items()))
            if gone:
                self._execute(connection, REMOVE, user_ids=_dump(gone))
            committed = connection.execute("COMMIT")
        check_committed(committed)
        last = {user_id: position for position, (user_id, _) in enumerate(changes)}
        for user_id, text in stored.fetchall():
            if text != texts[user_id]:  # a trigger has changed it
                results[last[user_id]] = text
        return results

    def _erase(
        self, connection: Connection[Any], user_id: str, check: Callable[[Metadata], None]
    ) -> dict[str, Metadata]:
        with before_commit():
            connection.execute("BEGIN")
            texts = self._remove_from_all_apps(connection, user_id)
        try:
            name = self._connections.name
            removed = {
                app_id: decode_row(name, (app_id, user_id), text)
                for app_id, text in sorted(texts.items())
            }
            for metadata in removed.values():
                check(metadata)
        except BaseException as error:
            raise ChangeError(error) from error
        if is_gone(connection):
            with before_commit():
                connection.execute("SELECT 1")  # its error is the server's reason
            raise UncommittedError
        check_committed(connection.execute("COMMIT"))
        return removed

    def _remove_from_all_apps(self, connection: Connection[Any], user_id: str) -> dict[str, str]:
        """Remove the user's rows until none is left; return their texts by app id."""
        removed: dict[str, str] = {}
        held: set[str] = set()
        while True:
            found: list[tuple[str, str | None]] = [
                *self._execute(connection, ERASE, user_id=user_id)
            ]
            if connection.pgconn.transaction_status != TransactionStatus.INTRANS:
                raise UncommittedError("the transaction has ended before its COMMIT")
            if not found:
                # As of the last snapshot the user had only the rows that are removed, and locked,
                # here. Without it, a row could be left that is older than one that is removed.
                return removed
            removed |= {
                app_id: text for app_id, text in found if text is not None and text != _NO_ROW
            }
            kept = [app_id for app_id, text in found if text is None]
            if not held.isdisjoint(kept):
                raise DataError(NOT_STORED + _dump(user_id))
            # Another transaction may have removed these. With the row held, that cannot happen.
            for app_id in kept:
                self._execute(connection, HOLD, app_id=app_id, rows=_rows([(user_id, _NO_ROW)]))
            held.update(kept)

    def _decode(self, user_id: str, text: str) -> Metadata:
        return decode_row(self._connections.name, (self._app_id, user_id), text)


def _rows(texts: Iterable[tuple[str, str]]) -> str:
    return _dump([{"user_id": user_id, "user_metadata": text} for user_id, text in texts])


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _grouped(
    changes: Sequence[tuple[str, Change]],
) -> Iterable[tuple[type, dict[str, tuple[int, Any]]]]:
    """Group changes that one statement can apply; the changes of one user stay in order."""
    rounds: list[dict[type, dict[str, tuple[int, Any]]]] = []
    counts: dict[str, int] = {}
    for position, (user_id, change) in enumerate(changes):
        number = counts[user_id] = counts.get(user_id, -1) + 1
        if number == len(rounds):
            rounds.append({})
        rounds[number].setdefault(type(change), {})[user_id] = (position, change)
    for by_kind in rounds:
        yield from by_kind.items()

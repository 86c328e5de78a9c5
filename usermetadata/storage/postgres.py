"""The PostgreSQL storage: one table, through psycopg 3 and its pool."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

try:
    from psycopg import DataError
    from psycopg.errors import DivisionByZero, UniqueViolation

    from usermetadata._core.postgres import finding
    from usermetadata._core.postgres import indexes as indexing
    from usermetadata._core.postgres.batches import KEEPS_ROWS, rows_in, rows_of
    from usermetadata._core.postgres.citus import distribute
    from usermetadata._core.postgres.connections import Connections
    from usermetadata._core.postgres.joined import JoinedConnection
    from usermetadata._core.postgres.outcomes import NOT_STORED
    from usermetadata._core.postgres.pooled import PooledConnections
    from usermetadata._core.postgres.statements import (
        MERGE,
        MERGE_ONE,
        READ_AFTER,
        READ_ONE,
        STORE,
        STORE_ONE,
        Table,
    )
    from usermetadata._core.postgres.transactions import Statement, as_json
except ImportError as error:
    raise ImportError(
        "PostgresStorage: psycopg is not installed;"
        " pip install 'psycopg[binary,pool]>=3.2' 'msgspec>=0.19'"
    ) from error

from usermetadata._core.apps import OfOneApp
from usermetadata._core.joining import recognise
from usermetadata._core.reentry import ChangeError
from usermetadata._core.rows import decode_row
from usermetadata.changes import BLIND, Clear, Merge, Replace, apply_in_order
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    NotUniqueError,
    OutcomeUnknownError,
    StorageError,
    UsageError,
)
from usermetadata.indexes import check_indexes, values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from typing import Literal, Self

    from psycopg_pool import ConnectionPool

    from usermetadata._core.postgres.batches import Rows
    from usermetadata._core.postgres.joined import Tables
    from usermetadata._core.postgres.transactions import Transaction
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value

_MIN_TIMEOUT, _MAX_TIMEOUT = 0.001, 1_000_000  # seconds
_NATIVE_TYPES = (Merge, Replace, Clear)
_NATIVE = set(_NATIVE_TYPES)
_MOST_STATEMENTS = 3  # more of them take longer in one round trip than holding the rows does in two
_NAME = re.compile("[^\0\ud800-\udfff]+\\Z")
# The placeholder in a row that is locked before it is written. It is JSON, because a constraint or
# a trigger of the table may require that, but no stored text is like it.
_NO_ROW = "{ \t }"


class PostgresStorage(OfOneApp):
    """Keeps metadata in a PostgreSQL table, which many machines may share.

    ``Merge``, ``Replace`` and ``Clear`` of any number of users are one statement. Other changes
    lock their users' rows until they are written, including rows that do not exist yet.

    The table is ``user_metadata (app_id, user_id, user_metadata)``, as in SuperTokens' server, the
    core. It is created if it is missing. On a table that a core has created, the storage takes the
    core's locks, so both may write to it.

    Args:
        database: a connection string of libpq, ``"postgresql://..."`` or ``"host=... dbname=..."``;
            or a ``psycopg_pool.ConnectionPool``, which the caller opens and closes.
        app_id: the app that the storage reads and writes.
        table: the name of the table.
        schema: the table's schema; by default the first of the ``search_path``.
        max_connections: the largest number of connections, each opened when it is needed. A pool
            has its own limit.
        timeout: seconds that a call waits for a connection, and a write waits for row locks, before
            it raises ``StorageBusyError``.
        indexes: the properties by which users can be found. A missing index is built at the first
            call if the table has at most 10,000 rows. With a larger table, calls raise
            ``UsageError`` until ``python -m usermetadata index`` has built it.
        statements: ``"portable"`` selects statements that all engines with PostgreSQL's protocol
            execute. They are selected automatically for a table that Citus distributes or manages,
            for CockroachDB and for YugabyteDB.

    Raises:
        InvalidInputError: an argument is not valid. Nothing is opened before the first call.
        UsageError: both portable statements and indexes are requested. Portable statements do not
            maintain indexes.

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
        indexes: Iterable[Index] = (),
        statements: Literal["portable"] | None = None,
    ) -> None:
        super().__init__(app_id)
        self._indexes = check_indexes(indexes)
        self._has_unique = any(index.unique for index in self._indexes)
        if statements not in (None, "portable"):
            raise InvalidInputError(
                f'statements: {statements!r} is not known; pass "portable", or leave it out'
            )
        is_portable = statements is not None
        if is_portable and self._indexes:
            indexing.refuse_portable("portable statements")
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
        self._name = tuple(names.values())
        self._connections: PooledConnections | JoinedConnection = PooledConnections(
            Connections(database, max_connections, timeout),
            Table(
                *self._name,
                is_session_ours=not isinstance(database, str),
                is_portable=is_portable,
            ),
            timeout,
        )
        self._is_portable = is_portable
        self._joined_tables: Tables = WeakKeyDictionary()

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The declared indexes."""
        return self._indexes

    def __repr__(self) -> str:
        return f"PostgresStorage({self._connections.name!r}, app_id={self._app_id!r})"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Return the metadata of the users that have a row, in one query."""
        if len(user_ids) == 1:
            found = self._read(lambda rows: rows.statement(READ_ONE, user_id=user_ids[0]))
        else:
            found = self._read(lambda rows: rows.read(user_ids))
        if not found.keys() <= set(user_ids):
            raise StorageError(
                f"{self._connections.name}: the database returned rows of other users than asked"
                f" for, of {min(found.keys() - set(user_ids))!r} for example; check the columns'"
                " types and collations"
            )
        return found

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """Return one page of users and their metadata, in the database's order."""
        return self._read(lambda rows: rows.statement(READ_AFTER, user_id=user_id, limit=limit))

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Apply the changes in order in one transaction; without a function, in one round trip."""
        try:
            results = self._connections.run(
                lambda transaction: self._apply(transaction, changes), is_write=True
            )
        except ChangeError as failed:
            error = failed.error
        else:
            return self._decoded(changes, results)
        raise error

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        """Return one page of the users who have these values, in one query."""
        search = finding.Search(self._app_id, self._indexes, where)
        nothing: list[tuple[str, str]] = []
        rows = self._connections.run(lambda each: search.rows(each, after, limit), nothing)
        return {user_id: self._decode(user_id, text) for user_id, text in rows}

    def count(self, where: Mapping[str, Value] | None) -> int:
        """Return the number of users with these values, or of all users, in one query."""
        if where is not None:
            search = finding.Search(self._app_id, self._indexes, where)
            return self._connections.run(search.number, 0)

        def count(transaction: Transaction) -> int:
            statement = rows_in(transaction, self._app_id).statement(finding.COUNT_ALL)
            number: int = transaction.at_once([statement])[0].rows[0][0]
            return number

        return self._connections.run(count, 0)

    def stored_indexes(self) -> tuple[Index, ...]:
        """Return the indexes that exist in the database, declared or not."""
        nothing: tuple[Index, ...] = ()
        return self._connections.run(indexing.stored_indexes, nothing)

    def build_indexes(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Build the missing declared indexes, all or none.

        Writers wait briefly at the start, and later only for the rows of one page. In a block of
        ``within``, building is part of the caller's transaction, and writers wait until that ends.
        """
        if isinstance(self._connections, JoinedConnection):
            return self._connections.run(
                lambda each: indexing.build_at_once(each, self._indexes), is_write=True
            )
        return indexing.build_in_pages(self._connections, self._indexes, progress)

    def drop_index(self, name: str) -> None:
        """Remove an index from the database; readers and writers wait briefly."""
        self._connections.run(lambda each: indexing.drop(each, name), absent=(), is_write=True)

    def distribute(self) -> list[str]:
        """Create the table if it is missing, and let Citus distribute it over its servers.

        Programs may continue to use the table; writers wait until its rows are copied.

        Returns:
            One line for each step that was done.

        Raises:
            UsageError: the database does not have Citus, or the table cannot be distributed.
        """
        if isinstance(self._connections, JoinedConnection):
            raise UsageError("distribute: it is not part of a transaction; call it before")
        table = self._connections.table
        connections = self._connections.connections
        connections.run_first(lambda _: None)  # a failed connection raises its reason
        return connections.run(lambda connection: distribute(connection, table))

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """Remove a user's rows from all apps, in one transaction.

        A role to which a row-level policy of the table applies cannot erase.
        """
        nothing: dict[str, Metadata] = {}
        try:
            return self._connections.run(
                lambda transaction: self._erase(transaction, user_id, check), nothing, is_write=True
            )
        except ChangeError as failed:
            error = failed.error
        raise error

    @contextmanager
    def within(self, connection: object) -> Generator[Self, None, None]:
        """Yield a storage that is part of the transaction of the caller's connection.

        The table is found through that connection.

        Args:
            connection: a ``psycopg.Connection``, a ``Session`` or ``Connection`` of SQLAlchemy, or
                Django's ``connection``.
        """
        self._connections.check_open()
        joined = copy.copy(self)
        joined._connections = JoinedConnection(
            recognise(connection), self._joined_tables, self._name, is_portable=self._is_portable
        )
        try:
            yield joined
        finally:
            joined.close()

    def close(self) -> None:
        """Close the connections that the storage opened itself."""
        self._connections.close()

    def _read(self, query: Callable[[Rows], Statement]) -> dict[str, Metadata]:
        def read(transaction: Transaction) -> list[tuple[Any, ...]]:
            [found] = transaction.at_once([query(rows_in(transaction, self._app_id))])
            return found.rows

        nothing: list[tuple[Any, ...]] = []
        rows = self._connections.run(read, nothing)
        return {user_id: self._decode(user_id, text) for user_id, text in rows}

    def _apply(
        self, transaction: Transaction, changes: Sequence[tuple[str, Change]]
    ) -> Sequence[str | Metadata | None]:
        changes = self._checked(transaction, changes)
        if transaction.table.is_portable:
            return self._apply_portably(transaction, changes)
        is_native = {type(change) for _, change in changes} <= _NATIVE
        groups = list(_grouped(changes)) if is_native else []
        taken: finding.Taken | None = None
        # The error's text quotes the row, so the next exception must not have it as its context.
        if is_native and len(groups) <= (1 if self._has_unique else _MOST_STATEMENTS):
            try:
                return self._apply_natively(transaction, groups, len(changes))
            except DataError:
                pass
            except UniqueViolation as error:
                taken = finding.taken_in(error, self._app_id)
            # Holding the rows may succeed. Python's JSON accepts U+0000 and maybe a damaged row,
            # which the server's refuses. Why a row was not removed is known once the rows are held.
            # A later statement may free the value that an earlier one needs.
            transaction.undo()
        if taken is None or len(groups) > 1:
            try:
                return self._apply_holding(transaction, changes)
            except UniqueViolation as error:
                taken = finding.taken_in(error, self._app_id)
            transaction.undo()
        owner = finding.owner_of(transaction, taken)
        raise ChangeError(NotUniqueError(taken.name, owner))

    def _checked(
        self, transaction: Transaction, changes: Sequence[tuple[str, Change]]
    ) -> Sequence[tuple[str, Change]]:
        length = transaction.user_id_length
        for user_id, _ in changes:
            if len(user_id) > length:
                raise InvalidInputError(
                    f"user_id: has {len(user_id)} characters, and the column user_id takes"
                    f" {length}; pass a shorter one"
                )
        if not self._indexes:
            return changes
        checked = [(user_id, self._indexed(user_id, change)) for user_id, change in changes]
        indexing.ready(transaction, self._indexes)
        return checked

    def _indexed(self, user_id: str, change: Change) -> Change:
        """Return a change that stores only what can be indexed."""
        if isinstance(change, _NATIVE_TYPES):
            try:
                values_of(change(None) or {}, self._indexes, user_id)
            except InvalidInputError as error:
                raise ChangeError(error) from error
            return change

        def indexed(old: Metadata | None) -> Metadata | None:
            new = change(old)
            values_of(new or {}, self._indexes, user_id)
            return new

        return indexed

    def _apply_portably(
        self, transaction: Transaction, changes: Sequence[tuple[str, Change]]
    ) -> Sequence[str | Metadata | None]:
        table = transaction.table
        if len(changes) == 1 and type(changes[0][1]) in BLIND and not table.may_drop:
            try:
                return [self._apply_alone(transaction, *changes[0])]
            except DivisionByZero:
                table.may_drop = True
            transaction.undo()
        return self._apply_holding(transaction, changes)

    def _apply_alone(self, transaction: Transaction, user_id: str, change: Change) -> str | None:
        """Replace or remove one row without holding it first, in one round trip."""
        rows = rows_in(transaction, self._app_id)
        new = change(None)
        store = (
            rows.remove([user_id]) if new is None else rows.store({user_id: encode_metadata(new)})
        )
        answers = transaction.write_at_once([rows.statement(KEEPS_ROWS), *store])
        if new is None:
            return None
        rows.check(answers[1:], [user_id])
        text: str = answers[-1].rows[0][1]
        return text

    def _apply_natively(
        self,
        transaction: Transaction,
        groups: Sequence[tuple[type, dict[str, tuple[int, Any]]]],
        number: int,
    ) -> Sequence[str | None]:
        texts: list[str | None] = [None] * number
        users = {user_id for _, by_user in groups for user_id in by_user}
        is_alone = len(groups) == 1
        rows = rows_in(transaction, self._app_id)
        statements = [_native(rows, *group, is_alone=is_alone) for group in groups]
        if not is_alone and len(users) > 1:
            # Each statement locks rows in the order of the ids. A sequence of statements does not.
            statements = [*rows.hold(users, "{}"), *statements]
        answers = transaction.at_once(statements)[-len(groups) :] if groups else []
        for (kind, by_user), answer in zip(groups, answers, strict=True):
            if is_alone and kind is not Clear and not answer.affected:
                raise DataError(NOT_STORED + as_json(next(iter(by_user))))
            for user_id, text in answer.rows:
                texts[by_user[user_id][0]] = text
        return texts

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

    def _apply_holding(
        self, transaction: Transaction, changes: Sequence[tuple[str, Change]]
    ) -> Sequence[str | Metadata | None]:
        users = dict.fromkeys(user_id for user_id, _ in changes)
        rows = rows_in(transaction, self._app_id)
        # Two round trips: one begins and locks the rows, one writes and commits.
        begun = transaction.begin(rows.hold(users, _NO_ROW))
        rows.check(begun, users)
        held = dict(row for answer in begun for row in answer.rows)
        texts = {user_id: held[user_id] for user_id in users if held[user_id] != _NO_ROW}
        results: list[str | Metadata | None] = []
        try:
            results += apply_in_order(changes, texts, decode=self._decode, encode=encode_metadata)
        except BaseException as error:
            raise ChangeError(error) from error
        gone = [user_id for user_id in users if user_id not in texts]
        if gone and self._has_unique:
            # One statement gives up and takes all values in the same order as other writers, so
            # they do not deadlock.
            emptied = dict.fromkeys(gone, "{}")
            statements = [*rows.store(texts | emptied), *rows.remove(gone)]
        else:
            # An index that is not declared here may need the removed values for other users.
            statements = [*rows.remove(gone), *rows.store(texts)]
        if rows.may_drop(begun, gone):
            stored = transaction.go_on(statements)
            rows.check(stored, users)
            transaction.end([])
        else:
            stored = transaction.end(statements)
        last = {user_id: position for position, (user_id, _) in enumerate(changes)}
        for user_id, text in (row for answer in stored for row in answer.rows):
            if user_id in texts and text != texts[user_id]:  # a trigger has changed the text
                results[last[user_id]] = text
        return results

    def _erase(
        self, transaction: Transaction, user_id: str, check: Callable[[Metadata], None]
    ) -> dict[str, Metadata]:
        texts = self._remove_from_all_apps(transaction, user_id)
        name = self._connections.name
        try:
            removed = {
                app_id: decode_row(name, (app_id, user_id), text)
                for app_id, text in sorted(texts.items())
            }
            for metadata in removed.values():
                check(metadata)
        except BaseException as error:
            raise ChangeError(error) from error
        transaction.end([])
        return removed

    def _remove_from_all_apps(self, transaction: Transaction, user_id: str) -> dict[str, str]:
        """Remove the user's rows until none is left; return their texts by app id."""
        removed: dict[str, str] = {}
        held: set[str] = set()
        rows = rows_in(transaction, self._app_id)
        erase = rows.erase(user_id)
        found = rows.erased(transaction.begin(erase), user_id)
        # The last round finds nothing: in its snapshot the user had only the rows that are removed
        # and locked here. Otherwise a row could remain that is older than a removed one.
        while found:
            texts = dict(found)
            removed |= {
                app_id: text for app_id, text in texts.items() if text not in (None, _NO_ROW)
            }
            kept = [app_id for app_id, text in texts.items() if text is None]
            if not held.isdisjoint(kept):
                raise DataError(NOT_STORED + as_json(user_id))
            # Another transaction may have removed these rows. While a row is held, that cannot
            # happen.
            holds = [
                statement
                for app_id in kept
                for statement in rows_in(transaction, app_id).hold([user_id], _NO_ROW)
            ]
            held.update(kept)
            found = rows.erased(transaction.go_on([*holds, *erase]), user_id)
        return removed

    def _decode(self, user_id: str, text: str) -> Metadata:
        return decode_row(self._connections.name, (self._app_id, user_id), text)


def _native(
    rows: Rows, kind: type, by_user: dict[str, tuple[int, Any]], *, is_alone: bool
) -> Statement:
    if kind is Clear:
        [removal] = rows.remove(list(by_user))
        return removal
    texts = {
        user_id: encode_metadata(change(None) or {}) for user_id, (_, change) in by_user.items()
    }
    parameters: dict[str, Any] = {}
    if kind is Merge:
        keys = {user_id: [*change.update] for user_id, (_, change) in by_user.items()}
        parameters["keys"] = as_json(keys)
    if len(texts) > 1 or not is_alone:
        template = MERGE if kind is Merge else STORE
        return rows.statement(template, rows=rows_of(texts.items()), **parameters)
    [(user_id, text)] = texts.items()
    template = MERGE_ONE if kind is Merge else STORE_ONE
    return rows.statement(template, user_id=user_id, user_metadata=text, **parameters)


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

"""Statements that read, lock, store and remove rows: for PostgreSQL, and for all engines.

The second kind is for engines with PostgreSQL's protocol but not all of its statements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from psycopg import DataError

from usermetadata._core.postgres.outcomes import NOT_STORED
from usermetadata._core.postgres.statements import ERASE, HOLD, READ_MANY, REMOVE, STORE
from usermetadata._core.postgres.transactions import Statement, as_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import LiteralString

    from usermetadata._core.postgres.transactions import Answer, Transaction


class Rows(ABC):
    """The statements for some rows of an app; each list is sent in one round trip.

    Args:
        transaction: the transaction, which has the table.
        app_id: the app.
    """

    def __init__(self, transaction: Transaction, app_id: str) -> None:
        self._table = transaction.table
        self._always: dict[str, object] = {"app_id": app_id, "timeout": transaction.timeout}

    def statement(self, template: LiteralString, **parameters: object) -> Statement:
        """Return a statement."""
        return Statement(self._table[template], self._always | parameters)

    @abstractmethod
    def read(self, user_ids: Sequence[str]) -> Statement:
        """Return the query for these users."""

    @abstractmethod
    def hold(self, user_ids: Iterable[str], no_row: str) -> list[Statement]:
        """Lock the rows in one order; ``no_row`` is stored where there is none."""

    @abstractmethod
    def store(self, texts: Mapping[str, str]) -> list[Statement]:
        """Store the rows."""

    @abstractmethod
    def remove(self, user_ids: Sequence[str]) -> list[Statement]:
        """Remove the rows, which are held."""

    @abstractmethod
    def may_drop(self, held: Sequence[Answer], gone: Sequence[str]) -> bool:
        """Tell whether a later statement may drop a row silently.

        Args:
            held: the answers to ``hold``.
            gone: the users that will be removed.
        """

    @abstractmethod
    def check(self, answers: Sequence[Answer], user_ids: Iterable[str]) -> None:
        """Raise ``DataError`` if the answers do not have the rows of all these users."""

    @abstractmethod
    def erase(self, user_id: str) -> list[Statement]:
        """Remove the user's rows in all apps."""

    @abstractmethod
    def erased(self, answers: Sequence[Answer], user_id: str) -> list[tuple[str, str | None]]:
        """Return the apps and the texts of the found rows; ``None`` if one was not removed."""


class _OfPostgres(Rows):
    """One statement for any number of rows. It raises an error itself if a row is missing."""

    def read(self, user_ids: Sequence[str]) -> Statement:
        return self.statement(READ_MANY, user_ids=as_json(user_ids))

    def hold(self, user_ids: Iterable[str], no_row: str) -> list[Statement]:
        return [self.statement(HOLD, rows=rows_of((user_id, no_row) for user_id in user_ids))]

    def store(self, texts: Mapping[str, str]) -> list[Statement]:
        return [self.statement(STORE, rows=rows_of(texts.items()))]

    def remove(self, user_ids: Sequence[str]) -> list[Statement]:
        return [self.statement(REMOVE, user_ids=as_json(user_ids))] if user_ids else []

    def may_drop(self, held: Sequence[Answer], gone: Sequence[str]) -> bool:
        return False

    def check(self, answers: Sequence[Answer], user_ids: Iterable[str]) -> None:
        pass

    def erase(self, user_id: str) -> list[Statement]:
        return [self.statement(ERASE, user_id=user_id)]

    def erased(self, answers: Sequence[Answer], user_id: str) -> list[tuple[str, str | None]]:
        return [(app_id, text) for app_id, text in answers[-1].rows]


_READ_MANY = """/*NO LOAD BALANCE*/
SELECT user_id, user_metadata FROM {table}
WHERE app_id = %(app_id)s AND user_id = ANY (%(user_ids)s)
"""
_INSERT = "INSERT INTO {table} AS stored (app_id, user_id, user_metadata) VALUES "
_UPDATE = " ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = "
_RETURNING = " RETURNING user_id, user_metadata"
_HOLD = _UPDATE + "stored.user_metadata" + _RETURNING
_STORE = _UPDATE + "excluded.user_metadata" + _RETURNING
_REMOVE = """
DELETE FROM {table} WHERE app_id = %(app_id)s AND user_id = %(user_id)s
RETURNING user_id, user_metadata
"""
_REMOVE_MANY = """
DELETE FROM {table} WHERE app_id = %(app_id)s AND user_id = ANY (%(user_ids)s)
RETURNING user_id, user_metadata
"""
_ERASE = "DELETE FROM {table} WHERE user_id = %(user_id)s RETURNING app_id, user_metadata"
_LEFT = "SELECT app_id FROM {table} WHERE user_id = %(user_id)s"
# A trigger or a policy may drop a row without an error. This query does not see those of a table
# behind a view.
_DROPS = """relrowsecurity OR relkind <> 'r' OR EXISTS (
    SELECT FROM pg_trigger WHERE tgrelid = pg_class.oid AND NOT tgisinternal)"""
_OF_TABLE = " FROM pg_class WHERE oid = {name}::regclass"
_MAY_DROP = "SELECT relrowsecurity, " + _DROPS + _OF_TABLE
KEEPS_ROWS = "SELECT 1 / (NOT (" + _DROPS + "))::integer" + _OF_TABLE
"""Divides by zero if the table may drop a row without an error."""
_MOST_ROWS = 30_000  # a statement has at most 65,535 parameters


class _Portable(Rows):
    """Upserts of a list of rows.

    All writers lock in one order. PostgreSQL locks in the order of the list. Citus locks shard by
    shard, and within a shard in the order of the list.
    """

    def read(self, user_ids: Sequence[str]) -> Statement:
        return self.statement(_READ_MANY, user_ids=list(user_ids))

    def hold(self, user_ids: Iterable[str], no_row: str) -> list[Statement]:
        return [self.statement(_MAY_DROP), *self._upserts(_HOLD, dict.fromkeys(user_ids, no_row))]

    def store(self, texts: Mapping[str, str]) -> list[Statement]:
        return self._upserts(_STORE, texts)

    def remove(self, user_ids: Sequence[str]) -> list[Statement]:
        # Citus would send one statement for many users to all shards.
        if len(user_ids) > 1 and self._table.engine != "Citus":
            return [self.statement(_REMOVE_MANY, user_ids=list(user_ids))]
        return [self.statement(_REMOVE, user_id=user_id) for user_id in user_ids]

    def may_drop(self, held: Sequence[Answer], gone: Sequence[str]) -> bool:
        [(_, may_drop)] = held[0].rows
        # Many removals and COMMIT in one round trip have failed on Citus.
        return bool(may_drop) or (self._table.engine == "Citus" and bool(gone))

    def check(self, answers: Sequence[Answer], user_ids: Iterable[str]) -> None:
        done = {row[0] for answer in answers for row in answer.rows}
        for user_id in user_ids:
            if user_id not in done:
                raise DataError(NOT_STORED + as_json(user_id))

    def erase(self, user_id: str) -> list[Statement]:
        removal = (self.statement(each, user_id=user_id) for each in (_ERASE, _LEFT))
        return [self.statement(_MAY_DROP), *removal]

    def erased(self, answers: Sequence[Answer], user_id: str) -> list[tuple[str, str | None]]:
        policies, gone, left = answers[-3:]
        if policies.rows[0][0]:  # a policy may hide a row
            raise DataError(NOT_STORED + as_json(user_id))
        return [*gone.rows, *((app_id, None) for (app_id,) in left.rows)]

    def _upserts(self, end: LiteralString, texts: Mapping[str, str]) -> list[Statement]:
        statements: list[Statement] = []
        in_order = sorted(texts.items())
        for start in range(0, len(in_order), _MOST_ROWS):
            rows = in_order[start : start + _MOST_ROWS]
            parameters = {
                name: value
                for number, row in enumerate(rows)
                for name, value in zip((f"u{number}", f"m{number}"), row, strict=True)
            }
            text = self._table[_INSERT] + _values(len(rows)) + self._table[end]
            statements.append(Statement(text, self._always | parameters))
        return statements


def _values(number: int) -> bytes:
    rows = (f"(%(app_id)s, %(u{each})s, %(m{each})s)" for each in range(number))
    return ", ".join(rows).encode()


def rows_in(transaction: Transaction, app_id: str) -> Rows:
    """Return the statements for the table of a transaction."""
    kind = _Portable if transaction.table.is_portable else _OfPostgres
    return kind(transaction, app_id)


def rows_of(texts: Iterable[tuple[str, str]]) -> str:
    """Return rows as a parameter of PostgreSQL's statements for many rows."""
    return as_json([{"user_id": user_id, "user_metadata": text} for user_id, text in texts])

"""Finding users by the entries of the PostgreSQL storage's indexes."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from usermetadata._core.postgres.indexes import OWNERS, ready
from usermetadata._core.postgres.transactions import Statement, as_json
from usermetadata.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import LiteralString

    from psycopg import errors

    from usermetadata._core.postgres.transactions import Transaction
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value

_LONGEST_DIGITS = 255

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


class Taken(NamedTuple):
    """A value of a unique index that another user has.

    Attributes:
        app_id: the app.
        name: the index.
        value: the value, as in an entry.
    """

    app_id: str
    name: str
    value: str


class Search:
    """Finds and counts the users of an app who have given values.

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
        """Return the number of users."""
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
    """Return the value that a unique index refused; raise the error if another key did."""
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
    """Return the user who has a value, if this role can see the row."""
    parameters = {"wanted": as_json([taken._asdict()])}
    [answer] = transaction.at_once([Statement(transaction.table[OWNERS], parameters)])
    owner: str | None = answer.rows[0][-1]
    return owner


def _text_of(value: Value) -> str:
    """Return the value as in an entry."""
    text = as_json(value)
    if isinstance(value, int) and len(text) > _LONGEST_DIGITS:
        return f"sha256:{sha256(text.encode()).hexdigest()}"
    return text

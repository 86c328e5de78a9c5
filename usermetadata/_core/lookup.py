"""The in-memory index: users by the values of their indexed properties."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usermetadata.exceptions import NotUniqueError
from usermetadata.indexes import values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value

    Key = tuple[str, str]
    Values = dict[Key, dict[str, Value]]


class Lookup:
    """The users by value, for each index; used by one thread at a time.

    New values are added before the rows are stored, and old ones are removed afterwards. So an
    interrupt in between can leave a surplus user, but never a missing one. Callers therefore
    compare the row.

    Args:
        indexes: the declared indexes.
    """

    def __init__(self, indexes: tuple[Index, ...]) -> None:
        self.indexes = indexes
        # By app and property; then by value. A single user is stored without a set, which would
        # take more memory than the rest.
        self._users: dict[Key, dict[str, str | set[str]]] = {}

    def values(self, rows: Mapping[Key, Metadata | None]) -> Values:
        """Return the values of those users that have a row.

        Raises:
            InvalidInputError: one cannot be indexed.
        """
        return {
            key: values_of(metadata, self.indexes, key[1])
            for key, metadata in rows.items()
            if metadata is not None
        }

    def users(self, app_id: str, where: Mapping[str, Value]) -> set[str]:
        """Return the users that may have these values, by one of the indexes."""
        name = next(index.name for index in self.indexes if index.name in where)
        return self._having(app_id, name, where[name])

    def check_unique(
        self,
        values: Values,
        changed: Iterable[Key],
        has: Callable[[Key, Mapping[str, Value]], bool],
    ) -> None:
        """Check that no two users of an app will have the same value of a unique index.

        Args:
            values: the new values of the changed users.
            changed: the changed users, including those that will have no row.
            has: tells whether the row of a user has these values.

        Raises:
            NotUniqueError: two users will have the same value.
        """
        keys = set(changed)
        for index in self.indexes:
            if not index.unique:
                continue
            taken: dict[tuple[str, str], str] = {}
            for (app_id, user_id), by_name in values.items():
                if index.name not in by_name:
                    continue
                value = by_name[index.name]
                other = taken.setdefault((app_id, _text(value)), user_id)
                if other != user_id:
                    raise NotUniqueError(index.name, other)
                for other in self._having(app_id, index.name, value):
                    key = (app_id, other)
                    if key not in keys and has(key, {index.name: value}):
                        raise NotUniqueError(index.name, other)

    def add(self, values: Values) -> None:
        """Add the values that users will have."""
        for (app_id, user_id), by_name in values.items():
            for name, value in by_name.items():
                users = self._users.setdefault((app_id, name), {})
                having = users.setdefault(_text(value), user_id)
                if isinstance(having, set):
                    having.add(user_id)
                elif having != user_id:
                    users[_text(value)] = {having, user_id}

    def remove(self, old: Values, new: Values) -> None:
        """Remove the values that users no longer have."""
        for (app_id, user_id), by_name in old.items():
            kept = new.get((app_id, user_id), {})
            for name, value in by_name.items():
                if name in kept and _text(kept[name]) == _text(value):
                    continue
                users = self._users[app_id, name]
                having = users.get(_text(value))
                if isinstance(having, set):
                    having.discard(user_id)
                    if len(having) == 1:
                        users[_text(value)] = next(iter(having))
                elif having == user_id:
                    del users[_text(value)]

    def _having(self, app_id: str, name: str, value: Value) -> set[str]:
        having = self._users.get((app_id, name), {}).get(_text(value), set())
        return {having} if isinstance(having, str) else having


def _text(value: Value) -> str:
    """Return a text that differs for values that differ in type."""
    return value if isinstance(value, str) else f"\0{value!r}"

"""The queries of the functions that find users."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.indexes import check_where
from usermetadata.storage import IndexedStorage, ListingStorage
from usermetadata.validation import check_after

if TYPE_CHECKING:
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

R_co = TypeVar("R_co", covariant=True)


class Query(Protocol[R_co]):
    """A query to a storage."""

    def of(self, storage: Storage) -> R_co:
        """Return the result."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """One page of all users, or of those with given values.

    Raises:
        InvalidInputError: ``after`` or ``limit`` is not valid.
    """

    where: object
    after: object
    limit: object

    def of(self, storage: Storage) -> dict[str, Metadata]:
        """Return their metadata by user id."""
        after, limit = check_after(self.after), self.limit
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InvalidInputError(f"limit: {limit!r} is not 1 or more; pass for example 100")
        limit = min(limit, sys.maxsize)  # the largest that a database accepts
        if self.where is not None:
            indexed = _indexed(storage)
            return indexed.find(check_where(self.where, indexed.indexes), after, limit)
        if not isinstance(storage, ListingStorage):
            raise UsageError(
                f"list_user_metadata: {type(storage).__name__} cannot list users; define read_after"
            )
        return storage.read_after(after, limit)


@dataclass(frozen=True, slots=True)
class Count:
    """The number of all users, or of those with given values."""

    where: object

    def of(self, storage: Storage) -> int:
        """Return the number."""
        indexed = _indexed(storage)
        if self.where is None:
            return indexed.count(None)
        return indexed.count(check_where(self.where, indexed.indexes))


@dataclass(frozen=True, slots=True)
class Owner:
    """The user who has a given unique value."""

    where: object

    def of(self, storage: Storage) -> str | None:
        """Return the user id, if there is one."""
        indexed = _indexed(storage)
        where = check_where(self.where, indexed.indexes)
        for index in indexed.indexes:
            if index.unique and index.name in where:
                return next(iter(indexed.find(where, "", 1)), None)
        name = next(iter(where))
        raise UsageError(
            "find_user_id: no property of where has a unique index, so several users may have"
            f" these values; declare Index({name!r}, unique=True), or use list_user_metadata"
        )


def _indexed(storage: Storage) -> IndexedStorage:
    if not isinstance(storage, IndexedStorage):
        raise UsageError(
            f"storage: {type(storage).__name__} can neither find nor count users; use a storage of"
            " this library, or define the methods of IndexedStorage"
        )
    return storage

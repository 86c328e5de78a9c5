"""Removing a user: the changes for storages, and the requests of the runners."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from usermetadata.exceptions import UsageError
from usermetadata.storage import ErasingStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage


class Erasure:
    """Removes the rows that one user has in any app.

    Args:
        user_id: the user.
        check: called with the metadata of each row.

    Attributes:
        removed: the metadata by app id, once the changes were applied.
    """

    def __init__(self, user_id: str, check: Callable[[Metadata], None]) -> None:
        self.user_id = user_id
        self.removed: dict[str, Metadata] = {}
        self._check = check

    def changes(self, app_ids: Iterable[str]) -> list[tuple[tuple[str, str], Change]]:
        """Return one change for each of the apps in which the user has a row."""
        return [((app_id, self.user_id), partial(self._remove, app_id)) for app_id in app_ids]

    def _remove(self, app_id: str, metadata: Metadata | None) -> None:
        if metadata is not None:
            self._check(metadata)
            self.removed[app_id] = metadata


class Removal:
    """A change that removes the row and keeps its metadata."""

    old: Metadata | None = None

    def __call__(self, old: Metadata | None) -> None:
        """Return ``None``, which removes the row."""
        self.old = old

    def by_app(self, app_id: str) -> dict[str, Metadata]:
        """Return the row's metadata by app id."""
        return {} if self.old is None else {app_id: self.old}


@dataclass(frozen=True, slots=True)
class RemovalEverywhere:
    """The removal of a user's rows in all apps.

    Args:
        user_id: the user.
        check: called with each row's metadata and ``None``, before any row is removed.
    """

    user_id: str
    check: Callable[[Metadata | None, Metadata | None], None] | None

    def of(self, storage: Storage) -> dict[str, Metadata]:
        """Remove the rows; return their metadata by app id."""
        if not isinstance(storage, ErasingStorage):
            raise UsageError(
                f"erase_user: {type(storage).__name__} cannot find a user's apps; erase the user in"
                " each app, with all_apps=False"
            )
        return storage.erase(self.user_id, self._check)

    def _check(self, old: Metadata) -> None:
        if self.check is not None:
            self.check(old, None)

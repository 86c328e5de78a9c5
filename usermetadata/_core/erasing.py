"""Removing a user from every app, as changes like any others."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


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

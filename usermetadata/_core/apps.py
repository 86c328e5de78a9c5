"""Storages that keep the rows of many apps: one object for each app, with everything shared."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from usermetadata.validation import check_app_id

if TYPE_CHECKING:
    from typing import Self


class OfOneApp:
    """Base of a storage that reads and writes the rows of one app.

    Args:
        app_id: the app that the storage reads and writes.

    Raises:
        InvalidInputError: the app id is not valid.
    """

    def __init__(self, app_id: str) -> None:
        self._app_id = check_app_id(app_id)

    @property
    def app_id(self) -> str:
        """The app that the storage reads and writes."""
        return self._app_id

    def for_app(self, app_id: str) -> Self:
        """Return this storage for another app."""
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

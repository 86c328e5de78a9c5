"""What the functions return, and the interface that overrides implement, named as in the SDK."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class MetadataResult:
    """A user's metadata.

    Attributes:
        metadata: the JSON object, ``{}`` if nothing is stored. Changing it changes nothing stored.

    Example:
        >>> MetadataResult({"theme": "dark"}).metadata["theme"]
        'dark'
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"MetadataResult(metadata={self.metadata!r})"


class ClearUserMetadataResult:
    """Empty result, kept for compatibility with the SDK."""

    def __repr__(self) -> str:
        return "ClearUserMetadataResult()"


class RecipeInterface(ABC):
    """The functions behind both facades; an override replaces or wraps them.

    The first three are abstract, as in the SDK. An override class need not define the other four:
    the recipe then uses the original's.

    Each method is called with the arguments that the facade got, by position, not yet checked;
    ``user_context`` is never ``None``. The facade returns what the method returns.
    """

    @abstractmethod
    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        """See :func:`usermetadata.syncio.get_user_metadata`."""

    @abstractmethod
    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        """See :func:`usermetadata.syncio.update_user_metadata`."""

    @abstractmethod
    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        """See :func:`usermetadata.syncio.clear_user_metadata`."""

    async def set_user_metadata(
        self, user_id: str, metadata: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        """See :func:`usermetadata.syncio.set_user_metadata`."""
        raise NotImplementedError

    async def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult:
        """See :func:`usermetadata.syncio.modify_user_metadata`."""
        raise NotImplementedError

    async def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        """See :func:`usermetadata.syncio.get_bulk_user_metadata`."""
        raise NotImplementedError

    async def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        """See :func:`usermetadata.syncio.update_bulk_user_metadata`."""
        raise NotImplementedError

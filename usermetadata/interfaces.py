"""What the functions return, and the interface that overrides wrap, named as in the SDK."""

from __future__ import annotations

from abc import ABC, abstractmethod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from typing import Any


class MetadataResult:
    """A user's metadata.

    Attributes:
        metadata: the JSON object, ``{}`` if nothing is stored. It is the caller's own: changing it
            changes nothing stored.

    Example:
        >>> MetadataResult({"theme": "dark"}).metadata["theme"]
        'dark'
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"MetadataResult(metadata={self.metadata!r})"


class ClearUserMetadataResult:
    """The metadata is gone; there is nothing more to say."""

    def __repr__(self) -> str:
        return "ClearUserMetadataResult()"


class RecipeInterface(ABC):
    """The functions behind both facades; an override wraps one of these.

    The first three are abstract, as in the SDK. An override class need not define the other four:
    where it does not, the recipe calls the original's. Overrides are ``async def`` functions; the
    signatures here say ``Coroutine`` because the original's check their arguments when they are
    called, not when they are awaited.

    Every method is called with the arguments that the facade got, by position, not yet checked;
    ``user_context`` is never ``None``. What a method returns, the facade returns.
    """

    @abstractmethod
    def get_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """See :func:`usermetadata.syncio.get_user_metadata`."""

    @abstractmethod
    def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """See :func:`usermetadata.syncio.update_user_metadata`."""

    @abstractmethod
    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, ClearUserMetadataResult]:
        """See :func:`usermetadata.syncio.clear_user_metadata`."""

    def set_user_metadata(
        self, user_id: str, metadata: dict[str, Any], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """See :func:`usermetadata.syncio.set_user_metadata`."""
        raise NotImplementedError

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> Coroutine[Any, Any, MetadataResult]:
        """See :func:`usermetadata.syncio.modify_user_metadata`."""
        raise NotImplementedError

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, dict[str, MetadataResult]]:
        """See :func:`usermetadata.syncio.get_bulk_user_metadata`."""
        raise NotImplementedError

    def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, dict[str, MetadataResult]]:
        """See :func:`usermetadata.syncio.update_bulk_user_metadata`."""
        raise NotImplementedError

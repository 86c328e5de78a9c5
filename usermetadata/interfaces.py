"""The results of the functions, and the interface of overrides; names as in SuperTokens' SDK."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from typing_extensions import TypeVar

    M = TypeVar("M", bound=Mapping[str, Any], default=dict[str, Any])
    U = TypeVar("U", bound=Mapping[str, Any], default=M, contravariant=True)  # noqa: PLC0105 - it is shown
else:
    from typing import TypeVar

    M, U = TypeVar("M"), TypeVar("U")


Value = str | int | bool
"""A value by which users can be found. JSON types differ: ``1``, ``True`` and ``"1"`` are not
equal."""


class MetadataResult(Generic[M]):
    """A user's metadata.

    Attributes:
        metadata: the JSON object, ``{}`` if nothing is stored. Changing it does not change what is
            stored.

    Example:
        >>> MetadataResult({"theme": "dark"}).metadata["theme"]
        'dark'
    """

    def __init__(self, metadata: M) -> None:
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"MetadataResult(metadata={self.metadata!r})"


class ClearUserMetadataResult:
    """Empty result, kept for compatibility with SuperTokens' SDK."""

    def __repr__(self) -> str:
        return "ClearUserMetadataResult()"


class EraseUserResult(Generic[M]):
    """What was stored about a user before it was erased.

    Attributes:
        metadata: the metadata in the app of the call, ``{}`` if nothing was stored there.
        by_app: the metadata by app id, for each app in which a row of the user was erased.

    Example:
        >>> EraseUserResult({"theme": "dark"}, {"public": {"theme": "dark"}}).metadata
        {'theme': 'dark'}
    """

    def __init__(self, metadata: M, by_app: dict[str, M]) -> None:
        self.metadata = metadata
        self.by_app = by_app

    def __repr__(self) -> str:
        return f"EraseUserResult(metadata={self.metadata!r}, by_app={self.by_app!r})"


class RecipeInterface(ABC):
    """The functions of ``syncio`` and ``asyncio``; an override replaces or wraps them.

    The first three are abstract, as in the SDK. An override class need not define the other
    functions: those of the original are used. ``check_change`` is a hook that every write calls.

    Each function gets its arguments by position, as the caller passed them, before they are
    checked. ``user_context`` is never ``None``. The caller gets the result unchanged.
    """

    @abstractmethod
    async def get_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        """See :func:`usermetadata.syncio.get_user_metadata`."""

    @abstractmethod
    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        """See :func:`usermetadata.syncio.update_user_metadata`."""

    @abstractmethod
    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        """See :func:`usermetadata.syncio.clear_user_metadata`."""

    async def set_user_metadata(
        self, user_id: str, metadata: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        """See :func:`usermetadata.syncio.set_user_metadata`."""
        raise NotImplementedError

    async def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[Any], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult[Any]:
        """See :func:`usermetadata.syncio.modify_user_metadata`."""
        raise NotImplementedError

    async def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult[Any]]:
        """See :func:`usermetadata.syncio.get_bulk_user_metadata`."""
        raise NotImplementedError

    async def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult[Any]]:
        """See :func:`usermetadata.syncio.update_bulk_user_metadata`."""
        raise NotImplementedError

    async def erase_user(
        self,
        user_id: str,
        all_apps: bool,  # noqa: FBT001 - an override gets it by position, like all others
        user_context: dict[str, Any],
    ) -> EraseUserResult[Any]:
        """See :func:`usermetadata.syncio.erase_user`."""
        raise NotImplementedError

    async def list_user_metadata(
        self,
        where: Mapping[str, Value] | None,
        after: str,
        limit: int,
        user_context: dict[str, Any],
    ) -> dict[str, MetadataResult[Any]]:
        """See :func:`usermetadata.syncio.list_user_metadata`."""
        raise NotImplementedError

    async def count_user_metadata(
        self, where: Mapping[str, Value] | None, user_context: dict[str, Any]
    ) -> int:
        """See :func:`usermetadata.syncio.count_user_metadata`."""
        raise NotImplementedError

    async def find_user_id(
        self, where: Mapping[str, Value], user_context: dict[str, Any]
    ) -> str | None:
        """See :func:`usermetadata.syncio.find_user_id`."""
        raise NotImplementedError

    def check_change(  # noqa: B027 - without an override it checks nothing
        self,
        user_id: str,
        old: dict[str, Any] | None,
        new: dict[str, Any] | None,
        user_context: dict[str, Any],
    ) -> None:
        """Check a change before it is stored; to refuse it, raise an exception.

        Every write calls it once for each user, inside the storage's lock or transaction, so
        ``old`` is what the change replaces. It may be called again if the storage retries. It must
        be quick, must not call this library, and must not be ``async``. If an override defines it,
        a damaged row cannot be set or cleared.

        Args:
            user_id: the user whose metadata changes.
            old: the stored metadata; ``None`` if there is no row.
            new: the metadata to store; ``None`` to remove the row.
            user_context: what the caller of the function passed.

        Raises:
            Exception: any exception refuses the change. It propagates unchanged to the caller of
                the function, and nothing is written.
        """


class UserMetadataOverrideConfig:
    """Replaces or wraps the functions; an argument of ``init`` and of ``UserMetadata``.

    Args:
        functions: takes the original implementation and returns the one to use: the original with
            methods replaced by ``async`` functions, or an instance of a subclass of
            ``RecipeInterface`` that calls the original.

    Example:
        >>> def functions(original: RecipeInterface) -> RecipeInterface:
        ...     get_original = original.get_user_metadata
        ...     async def get_user_metadata(user_id, user_context):
        ...         return await get_original(user_id.lower(), user_context)
        ...     original.get_user_metadata = get_user_metadata
        ...     return original
        >>> override = UserMetadataOverrideConfig(functions=functions)

    SuperTokens' SDKs use the same pattern. Their older name for this class is
    ``InputOverrideConfig``.
    """

    def __init__(
        self, functions: Callable[[RecipeInterface], RecipeInterface] | None = None
    ) -> None:
        self.functions = functions


InputOverrideConfig = UserMetadataOverrideConfig

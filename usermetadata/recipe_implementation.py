"""The functions without an override: the one place where input is checked and copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.identifiers import check_user_id
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult, RecipeInterface
from usermetadata.json import copy_metadata

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from usermetadata.bridge import AwaitableStorage
    from usermetadata.changes import Change
    from usermetadata.json import Metadata


class RecipeImplementation(RecipeInterface):
    """The functions as they are without an override.

    Each checks and copies its arguments when it is called, and returns the coroutine that does the
    rest; what happens to the arguments before that is awaited is of no consequence.

    Args:
        storage: the two verbs to do it with.
    """

    def __init__(self, storage: AwaitableStorage) -> None:
        self._storage = storage

    def get_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Read one row."""
        return self._read_one(check_user_id(user_id))

    def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Merge into one row."""
        change = Merge(copy_metadata(metadata_update, "metadata_update"))
        return self._write_one(check_user_id(user_id), change)

    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, ClearUserMetadataResult]:
        """Remove one row."""
        return self._clear(check_user_id(user_id))

    def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Replace one row."""
        change = Replace(copy_metadata(metadata, "metadata"))
        return self._write_one(check_user_id(user_id), change)

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Pass one row through a function."""
        return self._write_one(check_user_id(user_id), Modify(_checked(function)))

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, dict[str, MetadataResult]]:
        """Read many rows at once."""
        if isinstance(user_ids, (str, bytes)) or not isinstance(user_ids, Iterable):
            raise InvalidInputError(
                f"user_ids: {type(user_ids).__name__} is not a list of user ids"
            )
        return self._read_many(
            [check_user_id(user_id, f"user_ids[{n}]") for n, user_id in enumerate(user_ids)]
        )

    def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, dict[str, MetadataResult]]:
        """Merge into many rows at once."""
        if not isinstance(metadata_updates, Mapping):
            raise InvalidInputError(
                f"metadata_updates: {type(metadata_updates).__name__} is not a mapping:"
                " pass {user_id: update}"
            )
        changes = [
            (
                check_user_id(user_id, f"metadata_updates: the key {user_id!r}"),
                Merge(copy_metadata(update, f"metadata_updates[{user_id!r}]")),
            )
            for user_id, update in metadata_updates.items()
        ]
        return self._write_many(changes)

    async def _read_many(self, user_ids: Sequence[str]) -> dict[str, MetadataResult]:
        _refuse_inside_function()
        found = await self._storage.read(user_ids)
        return {user_id: MetadataResult(found.get(user_id, {})) for user_id in user_ids}

    async def _read_one(self, user_id: str) -> MetadataResult:
        return (await self._read_many([user_id]))[user_id]

    async def _write_many(self, changes: Sequence[tuple[str, Change]]) -> dict[str, MetadataResult]:
        _refuse_inside_function()
        written = await self._storage.write(changes)
        return {
            user_id: MetadataResult(metadata or {})
            for (user_id, _), metadata in zip(changes, written, strict=True)
        }

    async def _write_one(self, user_id: str, change: Change) -> MetadataResult:
        return (await self._write_many([(user_id, change)]))[user_id]

    async def _clear(self, user_id: str) -> ClearUserMetadataResult:
        await self._write_one(user_id, Clear())
        return ClearUserMetadataResult()


# Holds something while the function runs; what the function starts elsewhere inherits the list, and
# finds it empty once the function has returned.
_inside_function: ContextVar[list[object]] = ContextVar("inside_modify_function", default=[])  # noqa: B039 - it stays empty


def _checked(
    function: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> Callable[[Metadata], Metadata]:
    if not callable(function):
        raise InvalidInputError(f"function: {type(function).__name__} cannot be called")

    def checked(old: Metadata) -> Metadata:
        inside: list[object] = [function]
        token = _inside_function.set(inside)
        try:
            new = function(old)
        finally:
            _inside_function.reset(token)
            inside.clear()
        return copy_metadata(new, "the function's result")

    return checked


def _refuse_inside_function() -> None:
    if _inside_function.get():
        raise UsageError(
            "usermetadata was called by a function given to modify_user_metadata, which runs inside"
            " the storage's lock: read what the function needs before, and write the rest after"
        )

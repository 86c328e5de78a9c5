"""The functions without an override: the one place where input is checked and copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError
from usermetadata.identifiers import check_user_id
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult, RecipeInterface
from usermetadata.json import copy_metadata
from usermetadata.reentry import call_guarded

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from usermetadata.bridge import Verbs
    from usermetadata.changes import Change
    from usermetadata.json import Metadata


class RecipeImplementation(RecipeInterface):
    """The functions as they are without an override.

    Each checks and copies its arguments when it is called, and returns what the verbs return: over
    coalesced verbs the coroutine that does the rest, to which it is of no consequence what happens
    to the arguments before it is awaited; over verbs on the spot the result.

    Args:
        verbs: the two verbs of the storage.
    """

    def __init__(self, verbs: Verbs) -> None:
        self._verbs = verbs

    def get_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Read one row."""
        user_id = check_user_id(user_id)
        return self._verbs.read([user_id], lambda found: MetadataResult(found.get(user_id, {})))

    def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Merge into one row."""
        change = Merge(copy_metadata(metadata_update, "metadata_update"))
        return self._write_one(user_id, change)

    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, ClearUserMetadataResult]:
        """Remove one row."""
        changes = [(check_user_id(user_id), Clear())]
        return self._verbs.write(changes, lambda _: ClearUserMetadataResult())

    def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Replace one row."""
        change = Replace(copy_metadata(metadata, "metadata"))
        return self._write_one(user_id, change)

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> Coroutine[Any, Any, MetadataResult]:
        """Pass one row through a function."""
        return self._write_one(user_id, Modify(_checked(function)))

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> Coroutine[Any, Any, dict[str, MetadataResult]]:
        """Read many rows at once."""
        if isinstance(user_ids, (str, bytes)) or not isinstance(user_ids, Iterable):
            raise InvalidInputError(
                f"user_ids: {type(user_ids).__name__} is not a list of user ids"
            )
        checked = [check_user_id(user_id, f"user_ids[{n}]") for n, user_id in enumerate(user_ids)]
        return self._verbs.read(
            checked,
            lambda found: {user_id: MetadataResult(found.get(user_id, {})) for user_id in checked},
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
        return self._verbs.write(
            changes,
            lambda written: {
                user_id: MetadataResult(metadata or {})
                for (user_id, _), metadata in zip(changes, written, strict=True)
            },
        )

    def _write_one(self, user_id: str, change: Change) -> Coroutine[Any, Any, MetadataResult]:
        return self._verbs.write(
            [(check_user_id(user_id), change)], lambda written: MetadataResult(written[0] or {})
        )


def _checked(
    function: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> Callable[[Metadata], Metadata]:
    if not callable(function):
        raise InvalidInputError(f"function: {type(function).__name__} cannot be called")
    in_context = copy_context().run  # in whichever thread that is

    def checked(old: Metadata) -> Metadata:
        return copy_metadata(in_context(call_guarded, function, old), "the function's result")

    return checked

"""Checked operations: what a call asks of a storage, and what the call returns.

An operation checks and copies its arguments when it is made. A runner executes it, blocking or for
``asyncio``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from usermetadata._core.reentry import call_guarded
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult
from usermetadata.validation import check_user_id, copy_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

T_co = TypeVar("T_co", covariant=True)


class Read(Protocol[T_co]):
    """An operation that reads some users."""

    @property
    def user_ids(self) -> Sequence[str]:
        """The users to read."""
        ...

    def result(self, found: dict[str, Metadata]) -> T_co:
        """Return what the call returns, from what ``Storage.read`` has returned."""
        ...


class Write(Protocol[T_co]):
    """An operation that changes some users."""

    @property
    def changes(self) -> Sequence[tuple[str, Change]]:
        """The changes, in order."""
        ...

    def result(self, written: Sequence[Metadata | None]) -> T_co:
        """Return what the call returns, from what ``Storage.write`` has returned."""
        ...


class Get:
    """Read one user."""

    def __init__(self, user_id: str) -> None:
        self.user_ids = [check_user_id(user_id)]

    def result(self, found: dict[str, Metadata]) -> MetadataResult:
        return MetadataResult(found.get(self.user_ids[0], {}))


class GetBulk:
    """Read many users."""

    def __init__(self, user_ids: Iterable[str]) -> None:
        if isinstance(user_ids, (str, bytes)) or not isinstance(user_ids, Iterable):
            raise InvalidInputError(
                f"user_ids: {type(user_ids).__name__} is not a list of user ids; pass a list"
            )
        self.user_ids = [
            check_user_id(user_id, f"user_ids[{number}]") for number, user_id in enumerate(user_ids)
        ]

    def result(self, found: dict[str, Metadata]) -> dict[str, MetadataResult]:
        return {user_id: MetadataResult(found.get(user_id, {})) for user_id in self.user_ids}


class _WriteOne:
    changes: Sequence[tuple[str, Change]]

    def result(self, written: Sequence[Metadata | None]) -> MetadataResult:
        return MetadataResult(written[0] or {})


class Update(_WriteOne):
    """Merge into one user's metadata."""

    def __init__(self, user_id: str, metadata_update: Mapping[str, Any]) -> None:
        update = copy_metadata(metadata_update, "metadata_update")
        self.changes = [(check_user_id(user_id), Merge(update))]


class Set(_WriteOne):
    """Replace one user's metadata."""

    def __init__(self, user_id: str, metadata: Mapping[str, Any]) -> None:
        self.changes = [(check_user_id(user_id), Replace(copy_metadata(metadata, "metadata")))]


class ModifyOne(_WriteOne):
    """Replace one user's metadata with the result of a function."""

    def __init__(
        self, user_id: str, function: Callable[[dict[str, Any]], Mapping[str, Any]]
    ) -> None:
        if not callable(function):
            raise InvalidInputError(
                f"function: {type(function).__name__} cannot be called; pass a function that"
                " takes the metadata and returns the new metadata"
            )
        in_context = copy_context().run  # a storage may call the function in another thread

        def checked(old: Metadata) -> Metadata:
            return copy_metadata(in_context(call_guarded, function, old), "the function's result")

        self.changes = [(check_user_id(user_id), Modify(checked))]


class UpdateBulk:
    """Merge into the metadata of many users."""

    def __init__(self, metadata_updates: Mapping[str, Mapping[str, Any]]) -> None:
        if not isinstance(metadata_updates, Mapping):
            raise InvalidInputError(
                f"metadata_updates: {type(metadata_updates).__name__} is not a mapping;"
                " pass {user_id: update}"
            )
        self.changes = [
            (
                check_user_id(user_id, f"metadata_updates: the key {user_id!r}"),
                Merge(copy_metadata(update, f"metadata_updates[{user_id!r}]")),
            )
            for user_id, update in metadata_updates.items()
        ]

    def result(self, written: Sequence[Metadata | None]) -> dict[str, MetadataResult]:
        return {
            user_id: MetadataResult(metadata or {})
            for (user_id, _), metadata in zip(self.changes, written, strict=True)
        }


class ClearOne:
    """Remove one user's metadata."""

    def __init__(self, user_id: str) -> None:
        self.changes = [(check_user_id(user_id), Clear())]

    def result(self, written: Sequence[Metadata | None]) -> ClearUserMetadataResult:
        return ClearUserMetadataResult()

"""The functions without an override, blocking.

This file is generated from ``usermetadata/_core/asyncio_functions.py``; change that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from usermetadata._core.arguments import check_all_apps, merges_of, modify_with, user_ids_of
from usermetadata._core.queries import Count, Owner, Page
from usermetadata.changes import Clear, Merge, Replace
from usermetadata.interfaces import (
    ClearUserMetadataResult,
    EraseUserResult,
    MetadataResult,
)
from usermetadata.validation import check_user_id, copy_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from usermetadata._core.runners import BlockingRunner
    from usermetadata.interfaces import Value


class BlockingFunctions:
    """Each function checks its arguments, reads or writes once, and wraps the result."""

    def __init__(self, runner: BlockingRunner) -> None:
        self._runner = runner

    def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult[Any]:
        user_id = check_user_id(user_id)
        found = self._runner.read([user_id])
        return MetadataResult(found.get(user_id, {}))

    def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        change = Merge(copy_metadata(metadata_update, "metadata_update"))
        [metadata] = self._runner.write([(check_user_id(user_id), change)], user_context)
        return MetadataResult(metadata or {})

    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        self._runner.write([(check_user_id(user_id), Clear())], user_context)
        return ClearUserMetadataResult()

    def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        change = Replace(copy_metadata(metadata, "metadata"))
        [stored] = self._runner.write([(check_user_id(user_id), change)], user_context)
        return MetadataResult(stored or {})

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[Any], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult[Any]:
        change = modify_with(self._runner.store, function)
        [metadata] = self._runner.write([(check_user_id(user_id), change)], user_context)
        return MetadataResult(metadata or {})

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult[Any]]:
        checked = user_ids_of(user_ids)
        found = self._runner.read(checked)
        return {user_id: MetadataResult(found.get(user_id, {})) for user_id in checked}

    def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult[Any]]:
        changes = merges_of(metadata_updates)
        written = self._runner.write(changes, user_context)
        return {
            user_id: MetadataResult(metadata or {})
            for (user_id, _), metadata in zip(changes, written, strict=True)
        }

    def erase_user(
        self,
        user_id: str,
        all_apps: bool,  # noqa: FBT001 - as the interface has it
        user_context: dict[str, Any],
    ) -> EraseUserResult[Any]:
        user_id = check_user_id(user_id)
        erased = self._runner.erase(user_id, user_context, all_apps=check_all_apps(all_apps))
        return EraseUserResult(erased.get(self._runner.app_id, {}), erased)

    def list_user_metadata(
        self,
        where: Mapping[str, Value] | None,
        after: str,
        limit: int,
        user_context: dict[str, Any],
    ) -> dict[str, MetadataResult[Any]]:
        found = self._runner.ask(Page(where, after, limit))
        return {user_id: MetadataResult(metadata) for user_id, metadata in found.items()}

    def count_user_metadata(
        self, where: Mapping[str, Value] | None, user_context: dict[str, Any]
    ) -> int:
        return self._runner.ask(Count(where))

    def find_user_id(self, where: Mapping[str, Value], user_context: dict[str, Any]) -> str | None:
        return self._runner.ask(Owner(where))

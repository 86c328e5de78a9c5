"""The ``asyncio`` functions without an override; an override wraps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from usermetadata._core.arguments import check_all_apps, merges_of, modify_with, user_ids_of
from usermetadata._core.queries import Count, Owner, Page
from usermetadata.changes import Clear, Merge, Replace
from usermetadata.interfaces import (
    ClearUserMetadataResult,
    EraseUserResult,
    MetadataResult,
    RecipeInterface,
)
from usermetadata.validation import check_user_id, copy_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from usermetadata._core.runners import AsyncioRunner
    from usermetadata.interfaces import Value


class AsyncioFunctions(RecipeInterface):
    """Each function checks its arguments, reads or writes once, and wraps the result."""

    def __init__(self, runner: AsyncioRunner) -> None:
        self._runner = runner

    async def get_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        user_id = check_user_id(user_id)
        found = await self._runner.read([user_id])
        return MetadataResult(found.get(user_id, {}))

    async def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        change = Merge(copy_metadata(metadata_update, "metadata_update"))
        [metadata] = await self._runner.write([(check_user_id(user_id), change)], user_context)
        return MetadataResult(metadata or {})

    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        await self._runner.write([(check_user_id(user_id), Clear())], user_context)
        return ClearUserMetadataResult()

    async def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult[Any]:
        change = Replace(copy_metadata(metadata, "metadata"))
        [stored] = await self._runner.write([(check_user_id(user_id), change)], user_context)
        return MetadataResult(stored or {})

    async def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[Any], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult[Any]:
        change = modify_with(self._runner.store, function)
        [metadata] = await self._runner.write([(check_user_id(user_id), change)], user_context)
        return MetadataResult(metadata or {})

    async def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult[Any]]:
        checked = user_ids_of(user_ids)
        found = await self._runner.read(checked)
        return {user_id: MetadataResult(found.get(user_id, {})) for user_id in checked}

    async def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult[Any]]:
        changes = merges_of(metadata_updates)
        written = await self._runner.write(changes, user_context)
        return {
            user_id: MetadataResult(metadata or {})
            for (user_id, _), metadata in zip(changes, written, strict=True)
        }

    async def erase_user(
        self,
        user_id: str,
        all_apps: bool,  # noqa: FBT001 - as the interface has it
        user_context: dict[str, Any],
    ) -> EraseUserResult[Any]:
        user_id = check_user_id(user_id)
        erased = await self._runner.erase(user_id, user_context, all_apps=check_all_apps(all_apps))
        return EraseUserResult(erased.get(self._runner.app_id, {}), erased)

    async def list_user_metadata(
        self,
        where: Mapping[str, Value] | None,
        after: str,
        limit: int,
        user_context: dict[str, Any],
    ) -> dict[str, MetadataResult[Any]]:
        found = await self._runner.ask(Page(where, after, limit))
        return {user_id: MetadataResult(metadata) for user_id, metadata in found.items()}

    async def count_user_metadata(
        self, where: Mapping[str, Value] | None, user_context: dict[str, Any]
    ) -> int:
        return await self._runner.ask(Count(where))

    async def find_user_id(
        self, where: Mapping[str, Value], user_context: dict[str, Any]
    ) -> str | None:
        return await self._runner.ask(Owner(where))

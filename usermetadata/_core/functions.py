"""The functions behind both facades: they turn a call into a checked operation and run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from usermetadata._core.operations import (
    ClearOne,
    Get,
    GetBulk,
    ModifyOne,
    Set,
    Update,
    UpdateBulk,
)
from usermetadata._core.runners import wait_for
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult, RecipeInterface

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from usermetadata._core.runners import AsyncioRunner, BlockingRunner


class AsyncioFunctions(RecipeInterface):
    """The functions without an override, for ``asyncio``; what an override wraps."""

    def __init__(self, runner: AsyncioRunner) -> None:
        self._runner = runner

    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        return await self._runner.read(Get(user_id))

    async def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        return await self._runner.write(Update(user_id, metadata_update))

    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        return await self._runner.write(ClearOne(user_id))

    async def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        return await self._runner.write(Set(user_id, metadata))

    async def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult:
        return await self._runner.write(ModifyOne(user_id, function))

    async def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        return await self._runner.read(GetBulk(user_ids))

    async def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        return await self._runner.write(UpdateBulk(metadata_updates))


class BlockingFunctions:
    """The functions without an override, blocking."""

    def __init__(self, runner: BlockingRunner) -> None:
        self._runner = runner

    def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        return self._runner.read(Get(user_id))

    def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        return self._runner.write(Update(user_id, metadata_update))

    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        return self._runner.write(ClearOne(user_id))

    def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        return self._runner.write(Set(user_id, metadata))

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult:
        return self._runner.write(ModifyOne(user_id, function))

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        return self._runner.read(GetBulk(user_ids))

    def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        return self._runner.write(UpdateBulk(metadata_updates))


class OverriddenFunctions(BlockingFunctions):
    """The functions as an override left them, blocking.

    Overrides are written for the SDK's type ``dict``, and nearly always get one.
    """

    def __init__(self, functions: RecipeInterface) -> None:
        self._functions = functions

    def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        return wait_for(self._functions.get_user_metadata, user_id, user_context)

    def update_user_metadata(
        self, user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        return wait_for(
            self._functions.update_user_metadata,
            user_id,
            cast("dict[str, Any]", metadata_update),
            user_context,
        )

    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        return wait_for(self._functions.clear_user_metadata, user_id, user_context)

    def set_user_metadata(
        self, user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        return wait_for(
            self._functions.set_user_metadata,
            user_id,
            cast("dict[str, Any]", metadata),
            user_context,
        )

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        user_context: dict[str, Any],
    ) -> MetadataResult:
        return wait_for(self._functions.modify_user_metadata, user_id, function, user_context)

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        return wait_for(self._functions.get_bulk_user_metadata, user_ids, user_context)

    def update_bulk_user_metadata(
        self, metadata_updates: Mapping[str, Mapping[str, Any]], user_context: dict[str, Any]
    ) -> dict[str, MetadataResult]:
        return wait_for(self._functions.update_bulk_user_metadata, metadata_updates, user_context)

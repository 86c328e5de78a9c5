"""An override that lets SuperTokens' Python SDK use this library's storage."""

from __future__ import annotations

from typing import Any

try:
    from supertokens_python.recipe.usermetadata.interfaces import (
        ClearUserMetadataResult,
        MetadataResult,
        RecipeInterface,
    )
except ImportError as error:
    raise ImportError(
        "usermetadata.supertokens needs the SDK; pip install 'supertokens-python>=0.30'"
    ) from error

from usermetadata.asyncio import (
    clear_user_metadata,
    get_user_metadata,
    update_user_metadata,
)


def use_storage(original: RecipeInterface) -> RecipeInterface:  # noqa: ARG001 - replaced
    """Let the SDK's user metadata recipe, and its dashboard, use the storage of ``init``.

    Args:
        original: the SDK's functions, which call a core. They are replaced.

    Returns:
        Functions that read and write the storage, for the ``override`` of the SDK's recipe.

    Example:
        Where the program starts, before the SDK's ``init``::

            import usermetadata
            from supertokens_python.recipe import usermetadata as recipe
            from usermetadata.supertokens import use_storage

            usermetadata.init("sqlite:///users.db")
            recipe_list = [
                recipe.init(override=recipe.UserMetadataOverrideConfig(functions=use_storage))
            ]

    The interface is that of ``supertokens_python.recipe.usermetadata.interfaces``.
    """
    return _Functions()


class _Functions(RecipeInterface):
    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        found = await get_user_metadata(user_id, user_context)
        return MetadataResult(found.metadata)

    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        updated = await update_user_metadata(user_id, metadata_update, user_context)
        return MetadataResult(updated.metadata)

    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        await clear_user_metadata(user_id, user_context)
        return ClearUserMetadataResult()

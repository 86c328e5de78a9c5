"""Overrides that let SuperTokens' Python SDK use this library's storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from supertokens_python.asyncio import get_user_id_mapping
    from supertokens_python.interfaces import GetUserIdMappingOkResult
    from supertokens_python.recipe.usermetadata.interfaces import (
        ClearUserMetadataResult,
        MetadataResult,
        RecipeInterface,
    )
except ImportError as error:
    raise ImportError(
        "usermetadata.supertokens: the SDK is not installed; pip install 'supertokens-python>=0.30'"
    ) from error

from usermetadata.asyncio import (
    clear_user_metadata,
    erase_user,
    get_user_metadata,
    update_user_metadata,
)
from usermetadata.exceptions import DamagedMetadataError, UserMetadataError

if TYPE_CHECKING:
    from supertokens_python.recipe.accountlinking import interfaces as accountlinking
    from supertokens_python.types import User


def use_storage(original: RecipeInterface) -> RecipeInterface:  # noqa: ARG001 - replaced
    """Make the SDK's user metadata recipe and dashboard use the storage of ``init``.

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

    The interface is ``RecipeInterface`` of ``supertokens_python.recipe.usermetadata.interfaces``.
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


def erase_deleted_users(
    original: accountlinking.RecipeInterface,
) -> accountlinking.RecipeInterface:
    """Make the SDK's ``delete_user`` also erase the metadata in the storage of ``init``.

    The SDK's dashboard deletes users with the same function. The ids whose metadata is erased are
    the same as in SuperTokens' server, the core; an external id replaces SuperTokens' id. The ids
    are looked up before the core deletes the user. Their metadata is erased after the core has
    succeeded.

    Args:
        original: the SDK's functions. ``delete_user`` is replaced, the others are unchanged.

    Returns:
        ``original``, for the ``override`` of the SDK's account-linking recipe.

    ``delete_user`` raises ``UserMetadataError`` if the core has deleted the user but some metadata
    was not erased. The message names the ids, and ``__cause__`` is the first error.

    Example:
        In the ``recipe_list`` of the SDK's ``init``, together with :func:`use_storage`::

            from supertokens_python.recipe import accountlinking
            from usermetadata.supertokens import erase_deleted_users

            accountlinking.init(
                override=accountlinking.AccountLinkingOverrideConfig(functions=erase_deleted_users)
            )
    """
    get_user, delete_user = original.get_user, original.delete_user

    async def delete_and_erase(
        user_id: str,
        remove_all_linked_accounts: bool,  # noqa: FBT001 - the SDK's signature
        user_context: dict[str, Any],
    ) -> None:
        erased: set[str] = set()
        user = await get_user(user_id, _without_cache(user_context))
        if user is not None:
            own_id = await _external_id(user_id, _without_cache(user_context))
            erased = _erased_ids(user, own_id, with_linked=remove_all_linked_accounts)
        await delete_user(user_id, remove_all_linked_accounts, user_context)
        failed: dict[str, Exception] = {}
        for erased_id in sorted(erased):
            try:
                # With ``force``, a mapping's external id can be the id of another user, who keeps
                # the metadata, as in the core.
                if await get_user(erased_id, _without_cache(user_context)) is None:
                    await _erase(erased_id, user_context)
            except Exception as error:  # noqa: BLE001 - raised below
                failed[erased_id] = error
        if failed:
            raise UserMetadataError(
                f"delete_user: the core has deleted the user, but the metadata of"
                f" {', '.join(map(repr, failed))} was not erased; clear it"
            ) from next(iter(failed.values()))

    original.delete_user = delete_and_erase  # type: ignore[method-assign] # as SDKs do
    return original


async def _erase(user_id: str, user_context: dict[str, Any]) -> None:
    try:
        await erase_user(user_id, user_context)
    except DamagedMetadataError:
        await clear_user_metadata(user_id, user_context)  # clearing does not read the row


def _erased_ids(user: User, own_id: str, *, with_linked: bool) -> set[str]:
    """Return the ids whose metadata a core removes when it deletes one of a user's accounts.

    ``AuthRecipe.deleteUserHelper`` in the core has the same rule. The metadata of a primary user
    stays while an account is linked to it.

    Args:
        user: the user as the core describes it, with external ids where there is a mapping.
        own_id: the id of the deleted account, external if there is a mapping; it may be the id of
            the primary user.
        with_linked: whether the linked accounts are deleted as well.
    """
    if with_linked:
        return {user.id, *(method.recipe_user_id.get_as_string() for method in user.login_methods)}
    if len(user.login_methods) == 1:
        return {user.id, own_id}
    return {own_id} - {user.id}


async def _external_id(user_id: str, user_context: dict[str, Any]) -> str:
    mapping = await get_user_id_mapping(user_id, "ANY", user_context)
    if isinstance(mapping, GetUserIdMappingOkResult):
        return mapping.external_user_id
    return user_id


def _without_cache(user_context: dict[str, Any]) -> dict[str, Any]:
    """Return a context without the SDK's cache of the core, which may be out of date."""
    return {**user_context, "_default": {**user_context.get("_default", {}), "core_call_cache": {}}}

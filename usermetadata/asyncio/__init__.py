"""The functions for ``asyncio``: they never block the event loop.

Arguments are checked and copied when the coroutine starts: at ``await``, or in the first step of a
task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from usermetadata._core.recipe import UserMetadataRecipe
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult


async def get_user_metadata(
    user_id: str, user_context: dict[str, Any] | None = None
) -> MetadataResult:
    """Return the metadata of a user.

    Users need not exist; an unknown user's metadata is ``{}``.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        The metadata, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed; ``__cause__`` is its driver's error.
        StorageBusyError: timed out waiting for a writer or a connection.
        StorageUnavailableError: the server cannot be reached.
        DamagedMetadataError: the stored row is not a JSON object.

    Example:
        >>> (await get_user_metadata("alice")).metadata
        {}
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    return await functions.get_user_metadata(user_id, context)


async def update_user_metadata(
    user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any] | None = None
) -> MetadataResult:
    """Merge an update into the metadata of a user, in one atomic step.

    Root-level properties of the update overwrite the stored ones; nested objects are not merged. A
    root-level property whose value is ``None`` is removed. A nested ``None`` is data and stays. Two
    concurrent updates of one user, from tasks, threads or processes, both survive.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        metadata_update: a mapping of properties to JSON values. It is copied.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        The whole metadata after the update, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid, or the update is not JSON; nothing was written.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: the connection or the disk failed during the write; it was written
            whole or not at all.
        DamagedMetadataError: the stored row is not a JSON object; nothing was written.

    Example:
        >>> (await update_user_metadata("alice", {"theme": "dark", "todos": ["a"]})).metadata
        {'theme': 'dark', 'todos': ['a']}
        >>> (await update_user_metadata("alice", {"todos": None})).metadata
        {'theme': 'dark'}

    The rule is that of SuperTokens, "Storing data about a user".
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    # Overrides are written for the SDK's type, and nearly always get it.
    return await functions.update_user_metadata(
        user_id, cast("dict[str, Any]", metadata_update), context
    )


async def clear_user_metadata(
    user_id: str, user_context: dict[str, Any] | None = None
) -> ClearUserMetadataResult:
    """Remove everything stored about a user; no error if there is nothing.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        An empty result.

    Raises:
        InvalidInputError: the user id is not valid.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was removed; ``__cause__`` is its driver's
            error.
        StorageBusyError: timed out waiting for a writer or a connection; nothing was removed.
        StorageUnavailableError: the server cannot be reached; nothing was removed.
        OutcomeUnknownError: the connection or the disk failed during the write; it was removed
            or not.

    Example:
        >>> await clear_user_metadata("alice")
        ClearUserMetadataResult()
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    return await functions.clear_user_metadata(user_id, context)


async def set_user_metadata(
    user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any] | None = None
) -> MetadataResult:
    """Replace all metadata of a user, in one atomic step.

    The result is that of clear followed by update, but no reader sees the user without metadata.
    Root-level properties whose value is ``None`` are left out.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        metadata: a mapping of properties to JSON values. It is copied.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        The metadata as stored, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid, or the metadata is not JSON; nothing was
            written.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: the connection or the disk failed during the write; it was written
            whole or not at all.

    Example:
        >>> (await set_user_metadata("alice", {"plan": "pro"})).metadata
        {'plan': 'pro'}
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    return await functions.set_user_metadata(user_id, cast("dict[str, Any]", metadata), context)


async def modify_user_metadata(
    user_id: str,
    function: Callable[[dict[str, Any]], Mapping[str, Any]],
    user_context: dict[str, Any] | None = None,
) -> MetadataResult:
    """Replace the metadata of a user with ``function(metadata)``, in one atomic step.

    For counters, nested edits and conditional changes. The function runs inside the storage's lock
    or transaction, so it should be quick and must not call this library. It may be called again if
    the storage retries. It is a plain function, not an ``async`` one. Root-level properties whose
    value is ``None`` are removed.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        function: takes the stored metadata, ``{}`` if there is none, and returns the new metadata;
            it may change its argument and return that. If it raises, nothing is written.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        The metadata as stored, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid, or the function's result is not JSON;
            nothing was written.
        UsageError: ``usermetadata.init`` was not called, or the function called this library.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: the connection or the disk failed during the write; it was written
            whole or not at all.
        DamagedMetadataError: the stored row is not a JSON object; nothing was written.
        Exception: exceptions of the function propagate unchanged; nothing was written.

    Example:
        >>> def count_visit(metadata):
        ...     return {**metadata, "visits": metadata.get("visits", 0) + 1}
        >>> (await modify_user_metadata("bob", count_visit)).metadata
        {'visits': 1}
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    return await functions.modify_user_metadata(user_id, function, context)


async def get_bulk_user_metadata(
    user_ids: Iterable[str], user_context: dict[str, Any] | None = None
) -> dict[str, MetadataResult]:
    """Return the metadata of many users, in one query.

    Args:
        user_ids: any number of user ids.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        The result of ``get_user_metadata`` by user id, in the order given, all as of one moment.

    Raises:
        InvalidInputError: a user id is not valid.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed; ``__cause__`` is its driver's error.
        StorageBusyError: timed out waiting for a writer or a connection.
        StorageUnavailableError: the server cannot be reached.
        DamagedMetadataError: the stored row of one of them is not a JSON object.

    Example:
        >>> await get_bulk_user_metadata(["erin", "frank"])
        {'erin': MetadataResult(metadata={}), 'frank': MetadataResult(metadata={})}
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    return await functions.get_bulk_user_metadata(user_ids, context)


async def update_bulk_user_metadata(
    metadata_updates: Mapping[str, Mapping[str, Any]],
    user_context: dict[str, Any] | None = None,
) -> dict[str, MetadataResult]:
    """Update the metadata of many users in one atomic step: all of them or none.

    Args:
        metadata_updates: the updates by user id, each as ``update_user_metadata`` takes it. They
            are copied.
        user_context: passed to an override unchanged; this library ignores it.

    Returns:
        The result of ``update_user_metadata`` by user id, in the order given.

    Raises:
        InvalidInputError: a user id is not valid, or an update is not JSON; nothing was written.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: the connection or the disk failed during the write; it was written
            whole or not at all.
        DamagedMetadataError: the stored row of one of them is not a JSON object; nothing was
            written.

    Example:
        >>> updated = await update_bulk_user_metadata({"carol": {"seat": 1}, "dave": {"seat": 2}})
        >>> updated["dave"].metadata
        {'seat': 2}
    """
    functions = UserMetadataRecipe.get_instance().recipe_implementation
    context = {} if user_context is None else user_context
    return await functions.update_bulk_user_metadata(metadata_updates, context)

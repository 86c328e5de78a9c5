"""The functions for code without ``async``: each returns when it is done.

They also work in a thread whose event loop is running, which they then block for that long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult
from usermetadata.recipe import UserMetadataRecipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:
    Any = object  # for who evaluates the annotations; typing takes longer to import than the rest


def get_user_metadata(user_id: str, user_context: dict[str, Any] | None = None) -> MetadataResult:
    """Return the metadata of a user.

    Nobody checks that the user exists: of an unknown user the metadata is ``{}``.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        The metadata, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed; ``__cause__`` is its driver's error.
        StorageBusyError: others held the storage for too long.
        StorageUnavailableError: the server cannot be reached.
        DamagedMetadataError: what is stored is not a JSON object.

    Example:
        >>> get_user_metadata("alice").metadata
        {}
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: MetadataResult = functions.get_user_metadata(user_id, context)
    return result


def update_user_metadata(
    user_id: str, metadata_update: Mapping[str, Any], user_context: dict[str, Any] | None = None
) -> MetadataResult:
    """Lay an update over the metadata of a user, in one atomic step.

    Root-level properties of the update replace the stored ones, whole; a root-level property whose
    value is ``None`` is removed. ``None`` deeper down is data and stays. Two concurrent updates of
    one user, from tasks, threads or processes, both survive.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        metadata_update: a mapping of properties to JSON values. It is copied at the call.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        The whole metadata after the update, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid, or the update is not JSON; nothing was written.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: others held the storage for too long; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: connection or disk failed in between; it was written whole or not at
            all.
        DamagedMetadataError: what is stored is not a JSON object; nothing was written.

    Example:
        >>> update_user_metadata("alice", {"theme": "dark", "todos": ["a"]}).metadata
        {'theme': 'dark', 'todos': ['a']}
        >>> update_user_metadata("alice", {"todos": None}).metadata
        {'theme': 'dark'}

    The rule is that of SuperTokens, "Storing data about a user".
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: MetadataResult = functions.update_user_metadata(user_id, metadata_update, context)
    return result


def clear_user_metadata(
    user_id: str, user_context: dict[str, Any] | None = None
) -> ClearUserMetadataResult:
    """Remove everything stored about a user; no error if there is nothing.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        An object without content.

    Raises:
        InvalidInputError: the user id is not valid.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was removed; ``__cause__`` is its driver's
            error.
        StorageBusyError: others held the storage for too long; nothing was removed.
        StorageUnavailableError: the server cannot be reached; nothing was removed.
        OutcomeUnknownError: connection or disk failed in between; it was removed or not.

    Example:
        >>> clear_user_metadata("alice")
        ClearUserMetadataResult()
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: ClearUserMetadataResult = functions.clear_user_metadata(user_id, context)
    return result


def set_user_metadata(
    user_id: str, metadata: Mapping[str, Any], user_context: dict[str, Any] | None = None
) -> MetadataResult:
    """Replace the metadata of a user whole, in one atomic step.

    The same as clear and update in turn, except that nobody ever sees the user without metadata:
    root-level properties whose value is ``None`` are left out.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        metadata: a mapping of properties to JSON values. It is copied at the call.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        The metadata as stored, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid, or the metadata is not JSON; nothing was
            written.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: others held the storage for too long; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: connection or disk failed in between; it was written whole or not at
            all.

    Example:
        >>> set_user_metadata("alice", {"plan": "pro"}).metadata
        {'plan': 'pro'}
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: MetadataResult = functions.set_user_metadata(user_id, metadata, context)
    return result


def modify_user_metadata(
    user_id: str,
    function: Callable[[dict[str, Any]], Mapping[str, Any]],
    user_context: dict[str, Any] | None = None,
) -> MetadataResult:
    """Pass the metadata of a user through a function, in one atomic step.

    For counters, nested edits and conditional changes. The function runs inside the storage's lock
    or transaction, so it should be quick, must not call this library, and may be called again if
    the storage retries. It is a plain function. Root-level properties that it leaves ``None`` are
    removed.

    Args:
        user_id: 1 to 255 characters, without U+0000.
        function: takes the stored metadata, ``{}`` if there is none, and returns the new one; it
            may change what it was given and return that. If it raises, nothing is written.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        The metadata as stored, in ``.metadata``.

    Raises:
        InvalidInputError: the user id is not valid, or what the function returned is not JSON;
            nothing was written.
        UsageError: ``usermetadata.init`` was not called, or the function called this library.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: others held the storage for too long; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: connection or disk failed in between; it was written whole or not at
            all.
        DamagedMetadataError: what is stored is not a JSON object; nothing was written.
        Exception: whatever the function raises, as it is; nothing was written.

    Example:
        >>> def count_visit(metadata):
        ...     return {**metadata, "visits": metadata.get("visits", 0) + 1}
        >>> modify_user_metadata("bob", count_visit).metadata
        {'visits': 1}
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: MetadataResult = functions.modify_user_metadata(user_id, function, context)
    return result


def get_bulk_user_metadata(
    user_ids: Iterable[str], user_context: dict[str, Any] | None = None
) -> dict[str, MetadataResult]:
    """Return the metadata of many users, in one query.

    Args:
        user_ids: any number of user ids.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        For each user id, in the order given, what ``get_user_metadata`` returns, all as of one
        moment.

    Raises:
        InvalidInputError: a user id is not valid.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed; ``__cause__`` is its driver's error.
        StorageBusyError: others held the storage for too long.
        StorageUnavailableError: the server cannot be reached.
        DamagedMetadataError: what is stored about one of them is not a JSON object.

    Example:
        >>> get_bulk_user_metadata(["nobody", "noone"])
        {'nobody': MetadataResult(metadata={}), 'noone': MetadataResult(metadata={})}
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: dict[str, MetadataResult] = functions.get_bulk_user_metadata(user_ids, context)
    return result


def update_bulk_user_metadata(
    metadata_updates: Mapping[str, Mapping[str, Any]],
    user_context: dict[str, Any] | None = None,
) -> dict[str, MetadataResult]:
    """Update the metadata of many users, all or none, in one atomic step.

    Args:
        metadata_updates: for each user id the update, as ``update_user_metadata`` takes it. All is
            copied at the call.
        user_context: handed on to an override; this library does not look into it.

    Returns:
        For each user id, in the order given, what ``update_user_metadata`` returns.

    Raises:
        InvalidInputError: a user id is not valid, or an update is not JSON; nothing was written.
        UsageError: ``usermetadata.init`` was not called.
        StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
            error.
        StorageBusyError: others held the storage for too long; nothing was written.
        StorageUnavailableError: the server cannot be reached; nothing was written.
        OutcomeUnknownError: connection or disk failed in between; it was written whole or not at
            all.
        DamagedMetadataError: what is stored about one of them is not a JSON object; nothing was
            written.

    Example:
        >>> updated = update_bulk_user_metadata({"carol": {"seat": 1}, "dave": {"seat": 2}})
        >>> updated["dave"].metadata
        {'seat': 2}
    """
    functions = UserMetadataRecipe.get_instance().blocking_implementation
    context = {} if user_context is None else user_context
    result: dict[str, MetadataResult] = functions.update_bulk_user_metadata(
        metadata_updates, context
    )
    return result

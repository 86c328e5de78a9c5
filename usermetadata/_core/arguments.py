"""Checking and copying the arguments of the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from usermetadata._core.reentry import ChangeError, call_guarded, is_awaitable
from usermetadata.changes import Merge, Modify
from usermetadata.exceptions import InvalidInputError
from usermetadata.validation import check_user_id, copy_metadata

if TYPE_CHECKING:
    from usermetadata.codec import Metadata


def user_ids_of(user_ids: Iterable[str], name: str = "user_ids") -> list[str]:
    """Return the checked user ids."""
    try:
        if isinstance(user_ids, (str, bytes)):
            raise TypeError
        iterator = iter(user_ids)
    except TypeError:
        raise InvalidInputError(
            f"{name}: {type(user_ids).__name__} is not a list of user ids; pass a list"
        ) from None
    return [check_user_id(user_id, f"{name}[{number}]") for number, user_id in enumerate(iterator)]


def check_all_apps(all_apps: object) -> bool:
    """Return whether a user is to be erased from all apps.

    Raises:
        InvalidInputError: it is not a ``bool``; the text ``"false"`` would count as true.
    """
    if not isinstance(all_apps, bool):
        raise InvalidInputError(
            f"all_apps: {type(all_apps).__name__} is not a bool; pass True or False"
        )
    return all_apps


def merges_of(metadata_updates: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Merge]]:
    """Return the checked user ids, each with its checked update."""
    if not isinstance(metadata_updates, Mapping):
        raise InvalidInputError(
            f"metadata_updates: {type(metadata_updates).__name__} is not a mapping;"
            " pass {user_id: update}"
        )
    try:
        updates = [(user_id, update) for user_id, update in metadata_updates.items()]
    except Exception as error:
        raise InvalidInputError(
            f"metadata_updates: reading this {type(metadata_updates).__name__} raised"
            f" {type(error).__name__}: pass a plain dict"
        ) from error
    return [
        (
            check_user_id(user_id, f"metadata_updates: the key {user_id!r}"),
            Merge(copy_metadata(update, f"metadata_updates[{user_id!r}]")),
        )
        for user_id, update in updates
    ]


def modify_with(store: object, function: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Modify:
    """Return a change that calls the function, in the caller's context, and checks its result.

    The function must not use ``store``.
    """
    if not callable(function):
        raise InvalidInputError(
            f"function: {type(function).__name__} cannot be called; pass a function that"
            " takes the metadata and returns the new metadata"
        )
    in_context = copy_context().run  # a storage may call the function in another thread

    def checked(old: Metadata) -> Metadata:
        result = in_context(call_guarded, store, function, old)
        try:
            return _result_of(result)
        except Exception as error:
            raise ChangeError(error) from error

    return Modify(checked)


def _result_of(result: object) -> Metadata:
    if result is None:
        raise InvalidInputError(
            "the function's result: None is not a mapping; end the function with `return metadata`"
        )
    if is_awaitable(result):
        raise InvalidInputError(
            "the function's result: nothing can be awaited inside the storage's lock; pass a"
            " function without `async`, and await what it needs before the call"
        )
    return copy_metadata(result, "the function's result")

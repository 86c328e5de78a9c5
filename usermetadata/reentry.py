"""Refusing calls of the library by a function that the library itself is calling."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from usermetadata.exceptions import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

A = TypeVar("A")
R = TypeVar("R")

# Holds something while the function runs; what the function starts elsewhere inherits the list, and
# finds it empty once the function has returned.
_inside: ContextVar[list[object]] = ContextVar("usermetadata_inside_function", default=[])  # noqa: B039 - it stays empty


def call_guarded(function: Callable[[A], R], argument: A) -> R:
    """Return ``function(argument)``; meanwhile, ``refuse_reentry`` raises."""
    inside: list[object] = [function]
    token = _inside.set(inside)
    try:
        return function(argument)
    finally:
        _inside.reset(token)
        inside.clear()


def refuse_reentry() -> None:
    """Raise ``UsageError`` if this is called from within ``call_guarded``."""
    if _inside.get():
        raise UsageError(
            "usermetadata was called by a function given to modify_user_metadata, which runs inside"
            " the storage's lock: read what the function needs before, and write the rest after"
        )

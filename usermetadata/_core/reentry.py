"""Calling the function given to ``modify``: what it must not do, and what it raises."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from usermetadata.exceptions import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

A = TypeVar("A")
R = TypeVar("R")

# The list is not empty while the function runs. Tasks and threads that the function starts
# inherit the list, and find it empty once the function has returned.
inside: ContextVar[list[object]] = ContextVar("usermetadata_inside_function", default=[])  # noqa: B039 - it stays empty


def call_guarded(function: Callable[[A], R], argument: A) -> R:
    """Return ``function(argument)``; during the call, ``inside.get()`` is true."""
    running: list[object] = [function]
    token = inside.set(running)
    try:
        return function(argument)
    finally:
        inside.reset(token)
        running.clear()


class ChangeError(Exception):
    """Holds what a change, or its function, raised: it must not look like the database's error.

    Attributes:
        error: the exception, to be raised unchanged.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def called_inside() -> UsageError:
    """Return the error of a call from within ``call_guarded``, where ``inside.get()`` is true."""
    return UsageError(
        "usermetadata: called by a function given to modify_user_metadata, which runs inside the"
        " storage's lock; read what the function needs before, and write the rest after"
    )

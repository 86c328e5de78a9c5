"""Calling the caller's functions inside the storage's lock, and detecting reentrant calls."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from usermetadata.exceptions import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import ParamSpec

    P = ParamSpec("P")

R = TypeVar("R")

# The stores in whose locks this code runs, each in a list. Tasks and threads that the function
# starts inherit the lists. A list is emptied when its function has returned.
inside: ContextVar[tuple[list[object], ...]] = ContextVar("usermetadata_inside", default=())


def call_guarded(store: object, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call the function; during the call, ``check_outside(store)`` raises.

    Raises:
        ChangeError: the function raised an exception.
    """
    running = [store]
    token = inside.set((*inside.get(), running))
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise ChangeError(error) from error
    finally:
        inside.reset(token)
        running.clear()


def check_outside(store: object) -> None:
    """Refuse a call that comes from a function that runs inside the store's lock."""
    if any(store in running for running in inside.get()):
        raise UsageError(
            "usermetadata: called by a function given to modify_user_metadata or by check_change,"
            " which runs inside the storage's lock; read what the function needs before, and write"
            " the rest after"
        )


def is_awaitable(returned: object) -> bool:
    """Tell whether a function of the caller's has returned something to await, for an error."""
    if isinstance(returned, Coroutine):
        returned.close()  # otherwise Python warns that it was never awaited
    return isinstance(returned, Awaitable)


class ChangeError(Exception):
    """Wraps an exception of a change, so that it is not taken for an error of the database.

    Attributes:
        error: the exception, to be raised unchanged.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error

"""Keeping ``fork`` from splitting what two processes must not share.

A lock that another thread holds at the moment of a fork stays locked in the child for ever, and an
SQLite connection must not cross a fork at all (https://sqlite.org/howtocorrupt.html, 2.6). So
whoever owns such a thing is told before each fork, and again afterwards on both sides.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable


class ForkAware(Protocol):
    """Owns something that must not be in use while the process forks."""

    def before_fork(self) -> None:
        """Wait until nothing is in use, or as long as is bearable, and keep it so."""
        ...

    def after_fork_in_parent(self) -> None:
        """Go on as before, also if ``before_fork`` was interrupted."""
        ...

    def after_fork_in_child(self) -> None:
        """Go on in the new process, in which only the forking thread exists."""
        ...


def watch(owner: ForkAware) -> None:
    """Tell ``owner`` of every fork for as long as it lives."""
    with _owners_lock:
        _owners.add(owner)


def notice() -> None:
    """Tell the owners now of a fork that Python itself has not been told of: uWSGI's are."""
    global _one_fork_at_a_time  # noqa: PLW0603 - another thread of the parent may have held it
    if os.getpid() != _process:
        with _noticing:
            if os.getpid() != _process:
                _one_fork_at_a_time = threading.RLock()
                _one_fork_at_a_time.acquire()
                _told[:] = _owners
                _after_in_child()


_owners: WeakSet[ForkAware] = WeakSet()
_owners_lock = threading.RLock()
_one_fork_at_a_time = threading.RLock()
_told: list[ForkAware] = []
_process = os.getpid()
_noticing = threading.Lock()


def _before() -> None:
    _one_fork_at_a_time.acquire()
    with _owners_lock:
        _told[:] = _owners
    for owner in _told:
        owner.before_fork()


def _after_in_parent() -> None:
    _after(lambda owner: owner.after_fork_in_parent())


def _after_in_child() -> None:
    global _owners_lock, _process  # noqa: PLW0603 - another thread of the parent may have held it
    _owners_lock = threading.RLock()
    try:
        _after(lambda owner: owner.after_fork_in_child())
    finally:
        _process = os.getpid()


def _after(tell: Callable[[ForkAware], None]) -> None:
    with ExitStack() as whatever_is_raised:
        whatever_is_raised.callback(_one_fork_at_a_time.release)
        # Held any longer, a storage that was dropped would stay open.
        whatever_is_raised.callback(_told.clear)
        for owner in _told:
            whatever_is_raised.callback(tell, owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )

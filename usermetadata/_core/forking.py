"""Keeping ``fork`` from splitting what two processes must not share.

A lock that another thread holds at the moment of a fork stays locked in the child forever, and an
SQLite connection must not cross a fork at all (https://sqlite.org/howtocorrupt.html, 2.6). Each
owner registers hooks that run before each fork, and afterwards on both sides.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from weakref import WeakSet


class ForkHooks:
    """Base of what must not be in use while the process forks; by default nothing happens."""

    def before_fork(self) -> None:
        """Wait until nothing is in use, for a limited time, and keep it so."""

    def after_fork_in_parent(self) -> None:
        """Go on as before, even if ``before_fork`` was interrupted."""

    def after_fork_in_child(self) -> None:
        """Go on in the new process, in which only the forking thread exists."""


def watch(owner: ForkHooks) -> None:
    """Run the hooks of ``owner`` at every fork for as long as it lives."""
    with _owners_lock:
        _owners.add(owner)


def notice() -> None:
    """Run the hooks now if C code has forked the process without telling Python, as uWSGI does."""
    global _one_fork_at_a_time  # noqa: PLW0603 - a thread of the parent may have held it
    if os.getpid() != process:
        with _noticing:
            if os.getpid() != process:
                _one_fork_at_a_time = threading.RLock()
                _one_fork_at_a_time.acquire()
                _hooked[:] = _owners
                _after_in_child()


process = os.getpid()
"""The number of this process, for all that does not ask the operating system."""

_owners: WeakSet[ForkHooks] = WeakSet()
_owners_lock = threading.RLock()
_one_fork_at_a_time = threading.RLock()
_hooked: list[ForkHooks] = []
_noticing = threading.Lock()


def _before() -> None:
    _one_fork_at_a_time.acquire()
    with _owners_lock:
        _hooked[:] = _owners
    for owner in _hooked:
        owner.before_fork()


def _after_in_parent() -> None:
    # The stack runs every hook, also after one that raises.
    with ExitStack() as hooks:
        hooks.callback(_one_fork_at_a_time.release)
        # The list would keep a dropped storage open.
        hooks.callback(_hooked.clear)
        for owner in _hooked:
            hooks.callback(owner.after_fork_in_parent)


def _after_in_child() -> None:
    global _owners_lock, process  # noqa: PLW0603 - a thread of the parent may have held it
    _owners_lock = threading.RLock()
    try:
        with ExitStack() as hooks:
            hooks.callback(_one_fork_at_a_time.release)
            hooks.callback(_hooked.clear)
            for owner in _hooked:
                hooks.callback(owner.after_fork_in_child)
    finally:
        process = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )

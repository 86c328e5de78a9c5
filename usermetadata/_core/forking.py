"""Hooks for ``fork``: what must not be in use while the process forks.

A lock that another thread holds during a fork stays locked in the child forever. An SQLite
connection must not be carried across a fork at all (https://sqlite.org/howtocorrupt.html, 2.6).
Each owner registers hooks that run before each fork, and afterwards on both sides.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from weakref import WeakSet


class ForkHooks:
    """Base class of objects that must not be in use during a fork; its hooks do nothing."""

    def before_fork(self) -> None:
        """Wait, up to a timeout, until nothing is in use; block new use."""

    def after_fork_in_parent(self) -> None:
        """Continue as before, even if ``before_fork`` was interrupted."""

    def after_fork_in_child(self) -> None:
        """Continue in the new process, in which only the forking thread exists."""


def watch(owner: ForkHooks) -> None:
    """Run the hooks of ``owner`` at every fork for as long as it lives."""
    with _owners_lock:
        _owners.add(owner)


def notice() -> None:
    """Run the hooks now if the process has changed, or its threads became greenlets.

    C code may have forked the process without telling Python, as uWSGI does. gevent may have
    patched it after ``init``, as a worker of gunicorn does with ``--preload``: locks that were made
    before would let in other greenlets of their thread, or block them all.
    """
    global _one_fork_at_a_time, _make_lock  # noqa: PLW0603 - a thread of the parent may have held it
    if threading.Lock is not _make_lock:
        _make_lock = threading.Lock
        _before()
        _after_in_child()
        _one_fork_at_a_time = threading.RLock()
    if os.getpid() != process:
        with _noticing:
            if os.getpid() != process:
                _one_fork_at_a_time = threading.RLock()
                _one_fork_at_a_time.acquire()
                _hooked[:] = _owners
                _after_in_child()


process = os.getpid()
"""The id of this process, cached."""

_owners: WeakSet[ForkHooks] = WeakSet()
_owners_lock = threading.RLock()
_one_fork_at_a_time = threading.RLock()
_hooked: list[ForkHooks] = []
_make_lock = threading.Lock
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

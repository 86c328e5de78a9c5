"""Calling a storage as if no event loop were running in its thread."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

from usermetadata._core.greenlets import patched_by

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")


def call_outside(function: Callable[..., R], *arguments: object) -> R:
    """Call the function in this thread; during the call no event loop is running there.

    The thread's event loop cannot continue before the function returns, so it is hidden for that
    time. Otherwise Django's ORM would refuse each query, and a storage could run no loop itself.
    """
    asyncio = sys.modules.get("asyncio")
    # Another thread may be importing asyncio.
    running_loop = getattr(asyncio, "_get_running_loop", None)
    loop = None if running_loop is None else running_loop()
    # Greenlets share the loop of their thread, which continues while this greenlet waits.
    if asyncio is None or loop is None or patched_by() is not None:
        return function(*arguments)
    task = asyncio.current_task(loop)
    try:
        # From CPython 3.14 on a thread has one current task, not one for each loop.
        if task is not None:
            asyncio._leave_task(loop, task)
        asyncio._set_running_loop(None)
        return function(*arguments)
    finally:
        asyncio._set_running_loop(loop)
        if task is not None and asyncio.current_task(loop) is None:
            asyncio._enter_task(loop, task)

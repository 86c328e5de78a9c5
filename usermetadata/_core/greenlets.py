"""Greenlet libraries, which replace Python's threads and locks by their own."""

from __future__ import annotations

import sys


def patched_by() -> str | None:
    """Name the library that has made the threads of this process greenlets, if one has."""
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None

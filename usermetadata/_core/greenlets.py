"""Greenlet libraries, which replace Python's threads and locks with greenlets."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")


class Call(Protocol):
    """Calls a function that may block."""

    def __call__(self, function: Callable[[A], R], argument: A, /) -> R: ...


def patched_by() -> str | None:
    """Return the name of the library that replaced this process's threads with greenlets."""
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None


def call_here(function: Callable[[A], R], argument: A) -> R:
    """Call the function in this thread."""
    return function(argument)


def run_in_real_thread(work: Callable[[Call], R]) -> R:
    """Run ``work`` in a thread of gevent's pool, while this greenlet waits and others run.

    ``work`` gets a function that makes a call in a greenlet of this thread: locks and connections
    that greenlets share must not be used in another thread.
    """
    gevent = sys.modules["gevent"]
    monkey = sys.modules["gevent.monkey"]
    hub = gevent.get_hub()

    def call(function: Callable[[A], B], argument: A) -> B:
        results: list[B] = []
        errors: list[BaseException] = []
        done = monkey.get_original("_thread", "allocate_lock")()
        done.acquire()

        def run() -> None:
            try:
                results.append(function(argument))
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                errors.append(error)
            finally:
                done.release()

        hub.loop.run_callback_threadsafe(gevent.spawn, run)
        done.acquire()
        for error in errors:
            raise error
        return results[0]

    def settle() -> tuple[list[R], BaseException | None]:
        # gevent would print an exception that leaves its thread.
        try:
            return [work(call)], None
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            return [], error

    outcome: tuple[list[R], BaseException | None] = hub.threadpool.apply(settle)
    results, failed = outcome
    if failed is not None:
        raise failed
    return results[0]

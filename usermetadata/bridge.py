"""The bridge between blocking storages and ``async`` functions, in both directions.

The recipe's functions are written once, as coroutines over two awaitable verbs. ``asyncio`` awaits
them over verbs that go to a thread; ``syncio`` runs them to their end on the spot, over verbs that
never wait.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from usermetadata.changes import Change
    from usermetadata.json import Metadata
    from usermetadata.storage import Storage

T = TypeVar("T")


class AwaitableStorage(Protocol):
    """The two verbs of a storage, to be awaited."""

    async def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """See ``Storage.read``."""
        ...

    async def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """See ``Storage.write``."""
        ...


class OnTheSpot:
    """The verbs executed in the calling thread: awaiting them never suspends."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read, blocking."""
        return self._storage.read(user_ids)

    async def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Write, blocking."""
        return self._storage.write(changes)


private_loop: ContextVar[object] = ContextVar("usermetadata_private_loop", default=None)
"""The event loop that ``run_in_thread`` made for one call, which nobody minds blocking."""


def run_on_the_spot(awaitable: Awaitable[T]) -> T:
    """Wait for what never suspends; no event loop takes part."""
    try:
        next(awaitable.__await__())
    except StopIteration as finished:
        result: T = finished.value
        return result
    raise AssertionError("a call over OnTheSpot suspended")


def run_in_thread(call: Callable[[], Awaitable[T]]) -> T:
    """Call, and await what that returns, in an event loop of its own, in a thread of its own.

    The calling thread may have an event loop running, and two loops cannot run in one thread. The
    caller's context variables are seen, as ``asyncio`` would have it.
    """
    import asyncio
    import contextvars

    async def main() -> T:
        private_loop.set(asyncio.get_running_loop())
        return await call()

    def run() -> T:
        return asyncio.run(main())

    in_context = contextvars.copy_context().run
    gevent_monkey = sys.modules.get("gevent.monkey")
    if gevent_monkey is not None and gevent_monkey.is_module_patched("threading"):
        # There a thread is a greenlet, and all greenlets share the one running loop of their real
        # thread. gevent's own pool has real threads, for which a greenlet waits as it should.
        in_gevent: T = sys.modules["gevent"].get_hub().threadpool.apply(in_context, (run,))
        return in_gevent

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, thread_name_prefix="usermetadata") as executor:
        return executor.submit(in_context, run).result()

"""The bridge between blocking storages and ``async`` functions, in both directions.

The recipe's functions are written once, over two verbs that are told what to make of their result.
For ``asyncio`` the verbs are coroutines that go to a thread; for ``syncio`` they are executed on
the spot, and overrides, which are ``async``, are run in a thread with a loop of its own.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from usermetadata.reentry import refuse_reentry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from usermetadata.changes import Change
    from usermetadata.interfaces import RecipeInterface
    from usermetadata.json import Metadata
    from usermetadata.storage import Storage

T = TypeVar("T")


class Verbs(Protocol):
    """The two verbs of a storage, to be awaited for what ``finish`` makes of the result."""

    def read(
        self, user_ids: Sequence[str], finish: Callable[[dict[str, Metadata]], T]
    ) -> Coroutine[Any, Any, T]:
        """See ``Storage.read``."""
        ...

    def write(
        self, changes: Sequence[tuple[str, Change]], finish: Callable[[list[Metadata | None]], T]
    ) -> Coroutine[Any, Any, T]:
        """See ``Storage.write``."""
        ...


class OnTheSpot:
    """The verbs executed in the calling thread: they return the result itself, not a coroutine."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self, user_ids: Sequence[str], finish: Callable[[dict[str, Metadata]], T]) -> T:
        """Read, blocking."""
        refuse_reentry()
        return finish(self._storage.read(user_ids))

    def write(
        self, changes: Sequence[tuple[str, Change]], finish: Callable[[list[Metadata | None]], T]
    ) -> T:
        """Write, blocking."""
        refuse_reentry()
        return finish(self._storage.write(changes))


class InThreads:
    """The functions of an override, made to return their result itself.

    Works in any thread, also in one whose event loop is running.
    """

    def __init__(self, implementation: RecipeInterface) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._implementation, name)
        return lambda *arguments: run_in_thread(lambda: function(*arguments))


private_loop: ContextVar[object] = ContextVar("usermetadata_private_loop", default=None)
"""The event loop that ``run_in_thread`` made for one call, which nobody minds blocking."""


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

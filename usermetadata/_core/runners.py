"""Runners read and write for the functions: in the calling thread, or for ``asyncio``."""

from __future__ import annotations

import copy
from contextvars import ContextVar, copy_context
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from usermetadata._core.greenlets import call_here, patched_by, run_in_real_thread
from usermetadata._core.reentry import ChangeError, called_inside, inside
from usermetadata.codec import decode_metadata, encode_metadata
from usermetadata.exceptions import StorageError, UsageError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Self

    from typing_extensions import ParamSpec

    from usermetadata._core.greenlets import Call
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.interfaces import RecipeInterface
    from usermetadata.storage import Storage

    P = ParamSpec("P")

T = TypeVar("T")


class BlockingRunner:
    """Reads and writes in the calling thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read some users."""
        if inside.get():
            raise called_inside()
        return self._storage.read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Change some users."""
        if inside.get():
            raise called_inside()
        try:
            return self._storage.write(changes)
        except ChangeError as failed:
            error = failed.error
        raise error


class AsyncioRunner:
    """Reads and writes in worker threads; concurrent calls share a ``read`` or ``write``.

    Args:
        storage: where to read and write. Its ``reads_in_flight`` and ``writes_in_flight`` say how
            many batches of each may run at a time: 1 where it does not say; 0 means that it never
            waits and is called on the event loop.
    """

    def __init__(self, storage: Storage) -> None:
        from usermetadata._core.batching import LoopBatches

        self._storage = storage
        self._app_id: str | None = None  # None: whichever app the storage is for
        self._reads_at_once: int = getattr(storage, "reads_in_flight", 1)
        self._writes_at_once: int = getattr(storage, "writes_in_flight", 1)
        self._reads = LoopBatches(_read_together, self._reads_at_once)
        self._writes = LoopBatches(_write_together, self._writes_at_once)

    def for_app(self, app_id: str) -> Self:
        """Return a runner for another app of the storage, with the same batches and threads.

        Raises:
            InvalidInputError: the app id is not valid.
        """
        other = copy.copy(self)
        other._storage, other._app_id = self._storage.for_app(app_id), app_id
        return other

    async def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read some users."""
        if inside.get():
            raise called_inside()
        if _must_not_block() and self._reads_at_once:
            return await self._reads.submit(self._app_id, (self._storage, user_ids))
        return _call.get()(self._storage.read, user_ids)

    async def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Change some users; writes take effect in the order of the calls."""
        if inside.get():
            raise called_inside()
        try:
            if _must_not_block() and self._writes_at_once:
                return await self._writes.submit(self._app_id, (self._storage, changes))
            return _call.get()(self._storage.write, changes)
        except ChangeError as failed:
            error = failed.error
        raise error

    def close(self) -> None:
        """Wait until the calls under way are executed, and end the worker threads."""
        self._reads.close()
        self._writes.close()


def _read_together(calls: list[tuple[Storage, Sequence[str]]]) -> list[dict[str, Metadata]]:
    [(storage, first), *others] = calls
    if not others:
        return [storage.read(first)]
    found = storage.read(list(dict.fromkeys(user_id for _, ids in calls for user_id in ids)))
    unused = dict(found)

    def take(user_id: str) -> Metadata:
        # Each call gets its own copy.
        if user_id in unused:
            return unused.pop(user_id)
        return decode_metadata(encode_metadata(found[user_id]))

    return [
        {user_id: take(user_id) for user_id in user_ids if user_id in found}
        for _, user_ids in calls
    ]


def _write_together(
    calls: list[tuple[Storage, Sequence[tuple[str, Change]]]],
) -> list[list[Metadata | None]]:
    storage = calls[0][0]
    together = [change for _, changes in calls for change in changes]
    written = storage.write(together)
    if len(written) != len(together):
        raise StorageError(
            f"{type(storage).__name__}.write: {len(written)} results for {len(together)} changes;"
            " return one for each"
        )
    results = iter(written)
    return [list(islice(results, len(changes))) for _, changes in calls]


class BlockingOverride:
    """The functions as an override left them, blocking; each method is that of ``functions``."""

    def __init__(self, functions: RecipeInterface) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Callable[..., object]:
        return partial(wait_for, getattr(self._functions, name))


# The event loop that `wait_for` made for one call. Blocking it is safe: nothing else runs in it.
_private_loop: ContextVar[AbstractEventLoop | None] = ContextVar("usermetadata_loop", default=None)
# How the storage is called there.
_call: ContextVar[Call] = ContextVar("usermetadata_call", default=call_here)


def _must_not_block() -> bool:
    """Tell whether the running event loop has other work than this call."""
    import asyncio

    try:
        return asyncio.get_running_loop() is not _private_loop.get()
    except RuntimeError:
        raise UsageError(
            "usermetadata.asyncio: no asyncio event loop is running; under trio, call a function of"
            " usermetadata.syncio with trio.to_thread.run_sync"
        ) from None


def wait_for(function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call an ``async`` function and wait for its result, also where an event loop is running.

    The function runs in a new event loop, with a copy of the caller's context variables. The loop
    runs in this thread, or in another one if there is an event loop in this one already.
    """
    import asyncio

    async def main(call: Call) -> T:
        _private_loop.set(asyncio.get_running_loop())
        _call.set(call)
        return await function(*args, **kwargs)

    def run(call: Call = call_here) -> T:
        # With a factory, the thread's current event loop, if it has one, stays as it is.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(main(call))

    library = patched_by()
    if library == "eventlet":
        raise UsageError(
            "usermetadata.syncio: an override cannot be used under eventlet, whose greenlets share"
            " an event loop; use gevent or threads, or no override"
        )
    if library is None and not _is_loop_running():
        return run()
    in_context = copy_context().run
    if library is not None:
        # There a thread is a greenlet, and all greenlets share the running loop of their real
        # thread.
        return run_in_real_thread(partial(in_context, run))

    import threading
    from concurrent.futures import Future

    outcome: Future[T] = Future()

    def settle() -> None:
        try:
            outcome.set_result(run())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            outcome.set_exception(error)

    # An executor would refuse to start a thread once the main thread has ended.
    thread = threading.Thread(target=in_context, args=(settle,), name="usermetadata")
    thread.start()
    try:
        return outcome.result()
    finally:
        thread.join()


def _is_loop_running() -> bool:
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

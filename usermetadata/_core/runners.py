"""Runners read and write for the functions: in the calling thread, or for ``asyncio``."""

from __future__ import annotations

import copy
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from usermetadata._core.erasing import Removal, RemovalEverywhere
from usermetadata._core.greenlets import call_here, patched_by, run_in_real_thread
from usermetadata._core.loops import call_outside
from usermetadata._core.reentry import ChangeError, check_outside, inside
from usermetadata.codec import decode_metadata, encode_metadata
from usermetadata.exceptions import StorageError, UsageError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Self

    from typing_extensions import ParamSpec

    from usermetadata._core.checks import Checks
    from usermetadata._core.greenlets import Call
    from usermetadata._core.queries import Query
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.interfaces import RecipeInterface
    from usermetadata.storage import Storage

    P = ParamSpec("P")

T = TypeVar("T")


class BlockingRunner:
    """Reads and writes in the calling thread.

    Args:
        storage: where to read and write. It is called as if no event loop were running in the
            thread, unless its ``reads_in_flight`` and ``writes_in_flight`` are 0.
        store: the store that ``modify`` locks; ``storage`` may be for another app of it.
        is_joined: whether the storage is part of the caller's transaction. Its connection may need
            the loop that is running: SQLAlchemy's greenlets switch to it.

    Attributes:
        store: the store, as passed.
        app_id: the app of the storage.
        checks: the checks before each write.
    """

    def __init__(self, storage: Storage, store: object = None, *, is_joined: bool = False) -> None:
        self._storage = storage
        self._loop_here: Callable[[], object] | None = None
        at_once = {getattr(storage, name, 1) for name in ("reads_in_flight", "writes_in_flight")}
        if not is_joined and at_once != {0}:
            import asyncio

            self._loop_here = asyncio._get_running_loop  # no call of Python code
        self.store = store or self
        self.app_id: str = getattr(storage, "app_id", "public")
        self.checks: Checks | None = None

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read some users."""
        if inside.get():
            check_outside(self.store)
        if self._loop_here is not None and self._loop_here() is not None:
            return call_outside(self._storage.read, user_ids)
        return self._storage.read(user_ids)

    def ask(self, query: Query[T]) -> T:
        """Return the answer to a query."""
        if inside.get():
            check_outside(self.store)
        if self._loop_here is not None and self._loop_here() is not None:
            return call_outside(query.of, self._storage)
        return query.of(self._storage)

    def write(
        self, changes: Sequence[tuple[str, Change]], user_context: dict[str, Any]
    ) -> list[Metadata | None]:
        """Change some users."""
        if inside.get():
            check_outside(self.store)
        try:
            if self.checks is not None:
                changes = self.checks.of_changes(changes, user_context)
            if self._loop_here is not None and self._loop_here() is not None:
                return call_outside(self._storage.write, changes)
            return self._storage.write(changes)
        except ChangeError as failed:
            error = failed.error
        raise error

    def erase(
        self, user_id: str, user_context: dict[str, Any], *, all_apps: bool
    ) -> dict[str, Metadata]:
        """Remove a user; return what was stored, by app id."""
        if not all_apps:
            removal = Removal()
            self.write([(user_id, removal)], user_context)
            return removal.by_app(self.app_id)
        if inside.get():
            check_outside(self.store)
        check = None if self.checks is None else self.checks.of_user(user_id, user_context)
        try:
            call: Call = call_here if self._loop_here is None else call_outside
            return call(RemovalEverywhere(user_id, check).of, self._storage)
        except ChangeError as failed:
            error = failed.error
        raise error


class AsyncioRunner:
    """Reads and writes in worker threads; concurrent calls share a ``read`` or ``write``.

    Args:
        storage: where to read and write. Its ``reads_in_flight`` and ``writes_in_flight`` are the
            numbers of batches of each that may run at the same time, by default 1. 0 means that it
            never waits and is called on the event loop.
        store: as for ``BlockingRunner``.

    Attributes:
        store: the store, as passed.
        app_id: the app of the storage.
        checks: the checks before each write.
    """

    def __init__(self, storage: Storage, store: object = None) -> None:
        from usermetadata._core.batching import LoopBatches

        self._storage = storage
        self.store = store or self
        self.app_id: str = getattr(storage, "app_id", "public")
        self.checks: Checks | None = None
        self._key: str | None = None  # of batches: the app id, unless it is the storage's
        self._reads_at_once: int = getattr(storage, "reads_in_flight", 1)
        self._writes_at_once: int = getattr(storage, "writes_in_flight", 1)
        self._reads = LoopBatches(_read_together, self._reads_at_once)
        self._queries = LoopBatches(_ask, self._reads_at_once)
        self._writes = LoopBatches(_write_together, self._writes_at_once)

    def for_app(self, app_id: str) -> Self:
        """Return a runner for another app of the storage, with the same batches and threads.

        Raises:
            InvalidInputError: the app id is not valid.
        """
        other = copy.copy(self)
        other._storage, other.checks = call_outside(self._storage.for_app, app_id), None
        other.app_id = other._key = app_id
        return other

    async def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read some users."""
        if inside.get():
            check_outside(self.store)
        storage, call = self._here(self._reads_at_once)
        if call is None:
            return await self._reads.submit(self._key, (storage, user_ids))
        return call(storage.read, user_ids)

    async def ask(self, query: Query[T]) -> T:
        """Return the answer to a query."""
        if inside.get():
            check_outside(self.store)
        storage, call = self._here(self._reads_at_once)
        if call is None:
            answer: T = await self._queries.submit(None, (storage, query))
            return answer
        return call(query.of, storage)

    async def write(
        self, changes: Sequence[tuple[str, Change]], user_context: dict[str, Any]
    ) -> list[Metadata | None]:
        """Change some users; writes happen in the order of the calls."""
        if inside.get():
            check_outside(self.store)
        try:
            if self.checks is not None:
                changes = self.checks.of_changes(changes, user_context)
            storage, call = self._here(self._writes_at_once)
            if call is None:
                return await self._writes.submit(self._key, (storage, changes))
            return call(storage.write, changes)
        except ChangeError as failed:
            error = failed.error
        raise error

    async def erase(
        self, user_id: str, user_context: dict[str, Any], *, all_apps: bool
    ) -> dict[str, Metadata]:
        """Remove a user; return what was stored, by app id."""
        if not all_apps:
            removal = Removal()
            await self.write([(user_id, removal)], user_context)
            return removal.by_app(self.app_id)
        if inside.get():
            check_outside(self.store)
        check = None if self.checks is None else self.checks.of_user(user_id, user_context)
        everywhere = RemovalEverywhere(user_id, check)
        try:
            storage, call = self._here(self._writes_at_once)
            if call is None:
                [by_app] = await self._writes.submit(None, (storage, everywhere), alone=True)
                return by_app or {}
            return call(everywhere.of, storage)
        except ChangeError as failed:
            error = failed.error
        raise error

    def close(self) -> None:
        """Wait until the running calls are executed, and end the worker threads."""
        self._reads.close()
        self._queries.close()
        self._writes.close()

    def _here(self, at_once: int) -> tuple[Storage, Call | None]:
        """Return the storage and how to call it in this thread; ``None`` if it needs a batch.

        A batch is needed if the running event loop has other work, and the call may wait.

        Args:
            at_once: how many batches of its kind may run at a time.
        """
        import asyncio

        place = _place.get()
        if place.runner is self and place.joined is not None:
            return place.joined, place.call
        try:
            is_private = asyncio.get_running_loop() is place.loop
        except RuntimeError:
            raise UsageError(
                "usermetadata.asyncio: no asyncio event loop is running; under trio, call a"
                " function of usermetadata.syncio with trio.to_thread.run_sync"
            ) from None
        if is_private:
            return self._storage, place.call
        return self._storage, None if at_once else call_here


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


def _ask(calls: list[tuple[Storage, Query[Any]]]) -> list[Any]:
    return [query.of(storage) for storage, query in calls]


def _write_together(
    calls: list[tuple[Storage, Sequence[tuple[str, Change]] | RemovalEverywhere]],
) -> list[list[Metadata | None]]:
    storage, first = calls[0]
    if isinstance(first, RemovalEverywhere):
        return [[first.of(storage)]]
    writes = [changes for _, changes in calls if not isinstance(changes, RemovalEverywhere)]
    together = [change for changes in writes for change in changes]
    written = storage.write(together)
    if len(written) != len(together):
        raise StorageError(
            f"{type(storage).__name__}.write: {len(written)} results for {len(together)} changes;"
            " return one for each"
        )
    results = iter(written)
    return [list(islice(results, len(changes))) for changes in writes]


class BlockingOverride:
    """The blocking functions with an override; each method calls that of ``functions``.

    Args:
        functions: the override's.
        runner: that of the original functions.
        joined: the storage that the runner uses in place of its own: one that is part of the
            caller's transaction.
    """

    def __init__(
        self, functions: RecipeInterface, runner: AsyncioRunner, joined: Storage | None = None
    ) -> None:
        self._functions = functions
        self._place = _Place(runner, joined)

    def __getattr__(self, name: str) -> Callable[..., object]:
        return partial(_wait_for, self._place, getattr(self._functions, name))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a blocking call executes an override.

    Args:
        runner: the runner of the original functions.
        joined: the storage that it uses in place of its own.
        loop: the event loop that was made for the call. Blocking it is safe: nothing else runs in
            it.
        call: how the storage is called there.
    """

    runner: AsyncioRunner | None = None
    joined: Storage | None = None
    loop: AbstractEventLoop | None = None
    call: Call = call_here


_NOWHERE = _Place()
_place: ContextVar[_Place] = ContextVar("usermetadata_place", default=_NOWHERE)


def _wait_for(
    place: _Place, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call an ``async`` function and wait for its result, even if an event loop is running.

    The function runs in a new event loop, with a copy of the caller's context variables. The loop
    runs in this thread, or in another thread if one is already running here.
    """
    import asyncio

    async def main(call: Call) -> T:
        _place.set(replace(place, loop=asyncio.get_running_loop(), call=call))
        return await function(*args, **kwargs)

    def run(call: Call = call_outside) -> T:
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
    if place.joined is not None:
        # The caller's connection may be bound to this thread, or to a greenlet of its event loop.
        return in_context(partial(_run_without_loop, place, partial(function, *args, **kwargs)))
    if library is not None:
        # Under gevent a thread is a greenlet, and all greenlets share the running loop of their
        # real thread.
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


def _run_without_loop(place: _Place, function: Callable[[], Awaitable[T]]) -> T:
    """Execute an ``async`` function that awaits nothing but the original functions."""
    _place.set(place)
    steps = function().__await__()
    try:
        next(steps)
    except StopIteration as ended:
        result: T = ended.value
        return result
    steps.close()
    raise UsageError(
        "within: the override waits for something else than the original functions, which is not"
        " possible in a block where an event loop is running, or under gevent; await it before the"
        " block"
    )


def _is_loop_running() -> bool:
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

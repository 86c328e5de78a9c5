"""The ``asyncio`` side of a blocking storage: concurrent calls become one.

While one batch of calls runs in a worker thread the next gathers. There is no timer and nothing is
waited for: a call that finds no batch running goes at once, and alone; of many concurrent calls all
that have gathered share one ``read`` or one ``write`` of the storage, and so one transaction.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from usermetadata.bridge import private_loop
from usermetadata.exceptions import (
    OutcomeUnknownError,
    StorageBusyError,
    StorageUnavailableError,
)
from usermetadata.forking import notice, watch
from usermetadata.json import decode_metadata, encode_metadata
from usermetadata.reentry import refuse_reentry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata.changes import Change
    from usermetadata.json import Metadata
    from usermetadata.storage import Storage

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")

_SHARED = (StorageBusyError, StorageUnavailableError, OutcomeUnknownError)
_LONGEST_IDLENESS = 1.0  # seconds that a worker waits for work before it ends


class Coalescer:
    """The two verbs of a storage, to be awaited from any number of event loops and threads.

    Args:
        storage: where to read and write. Its ``reads_in_flight`` and ``writes_in_flight`` say how
            many batches of each may run at a time: 1 where it does not say, and 0 means that it
            never waits and is called on the spot.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._start()
        watch(self)
        # Then, too, the calls under way come to their end.
        atexit.register(self.close)

    def _start(self) -> None:
        self._reads = _Lane(self._read_together, getattr(self._storage, "reads_in_flight", 1))
        self._writes = _Lane(self._write_together, getattr(self._storage, "writes_in_flight", 1))

    async def read(self, user_ids: Sequence[str], finish: Callable[[dict[str, Metadata]], T]) -> T:
        """Read, together with whoever else is reading."""
        notice()
        refuse_reentry()
        if not self._reads.in_flight or private_loop.get() is asyncio.get_running_loop():
            return finish(self._storage.read(user_ids))
        return finish(await self._reads.submit(user_ids))

    async def write(
        self, changes: Sequence[tuple[str, Change]], finish: Callable[[list[Metadata | None]], T]
    ) -> T:
        """Write, together with whoever else is writing; the order of calls is kept."""
        notice()
        refuse_reentry()
        if not self._writes.in_flight or private_loop.get() is asyncio.get_running_loop():
            return finish(self._storage.write(changes))
        return finish(await self._writes.submit(changes))

    def close(self) -> None:
        """Let the calls under way end, and the worker threads with them."""
        atexit.unregister(self.close)
        self._reads.close()
        self._writes.close()

    def before_fork(self) -> None:
        """Nothing to wait for: the storage has its own locks."""

    def after_fork_in_parent(self) -> None:
        """Nothing has changed."""

    def after_fork_in_child(self) -> None:
        """Start anew: the worker threads, and the loops that wait, are the parent's."""
        self._start()

    def _read_together(self, calls: Sequence[Sequence[str]]) -> list[dict[str, Metadata]]:
        everybody = dict.fromkeys(user_id for user_ids in calls for user_id in user_ids)
        found = self._storage.read(list(everybody))
        unused = dict(found)

        def take(user_id: str) -> Metadata:
            # Who asks for the same user gets an object of its own.
            if user_id in unused:
                return unused.pop(user_id)
            return decode_metadata(encode_metadata(found[user_id]))

        return [
            {user_id: take(user_id) for user_id in user_ids if user_id in found}
            for user_ids in calls
        ]

    def _write_together(
        self, calls: Sequence[Sequence[tuple[str, Change]]]
    ) -> list[list[Metadata | None]]:
        written = iter(self._storage.write([change for changes in calls for change in changes]))
        return [list(islice(written, len(changes))) for changes in calls]


class _Calls(Generic[A, R]):
    """Calls of one event loop: what each asks for, and who waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.arguments: list[A] = []
        self.futures: list[asyncio.Future[R]] = []

    def drop_cancelled(self) -> None:
        gone = {n for n, future in enumerate(self.futures) if future.cancelled()}
        if gone:
            self.arguments = [each for n, each in enumerate(self.arguments) if n not in gone]
            self.futures = [each for n, each in enumerate(self.futures) if n not in gone]

    def deliver(self, results: list[R | _Failure]) -> None:
        # A loop that is closed has nobody waiting any more.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(_deliver, self.futures, results)


class _Failure:
    """What is delivered in the place of a result."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Lane(Generic[A, R]):
    """Calls of one verb: those that wait, and the workers that execute them in batches."""

    def __init__(self, execute: Callable[[Sequence[A]], list[R]], in_flight: int) -> None:
        self._execute = execute
        self.in_flight = in_flight
        self._lock = threading.Lock()
        self._waiting: list[_Calls[A, R]] = []
        self._workers: set[threading.Thread] = set()
        self._idle_workers = 0
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_closed = False

    def submit(self, argument: A) -> asyncio.Future[R]:
        """Join the next batch, and let it start if there is a place for it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        with self._lock:
            if self._idle_workers:
                self._idle_workers -= 1
                self._wake.put(None)
            elif len(self._workers) < self.in_flight:
                worker = threading.Thread(target=self._work, name="usermetadata", daemon=True)
                worker.start()
                self._workers.add(worker)
            # Last: a worker looks once it has the lock, and never if it could not be started.
            if not self._waiting or self._waiting[-1].loop is not loop:
                self._waiting.append(_Calls(loop))
            calls = self._waiting[-1]
            calls.arguments.append(argument)
            calls.futures.append(future)
        return future

    def close(self) -> None:
        """Wait for the batches that run or wait, and for the workers to end."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._idle_workers):
                self._wake.put(None)
            self._idle_workers = 0
            workers = list(self._workers)
        for worker in workers:
            worker.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            for calls in batch:
                calls.drop_cancelled()
            results = iter(self._run([argument for calls in batch for argument in calls.arguments]))
            for calls in batch:
                calls.deliver(list(islice(results, len(calls.futures))))

    def _next_batch(self) -> list[_Calls[A, R]]:
        """Return all that waits, as soon as there is any; nothing if the worker is to end."""
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if batch:
                    return batch
                if self._is_closed:
                    self._workers.discard(threading.current_thread())
                    return []
                self._idle_workers += 1
            try:
                self._wake.get(timeout=_LONGEST_IDLENESS)
            except Empty:
                with self._lock:
                    try:
                        # Somebody may have counted on this worker at the last moment.
                        self._wake.get_nowait()
                    except Empty:
                        self._idle_workers -= 1
                        self._workers.discard(threading.current_thread())
                        return []

    def _run(self, arguments: list[A]) -> list[R | _Failure]:
        try:
            return [*self._execute(arguments)] if arguments else []
        except _SHARED as shared:
            # Each on its own would wait just as long, one after the other; or might be done twice.
            return [_Failure(shared) for _ in arguments]
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who gets it
            if len(arguments) == 1:
                return [_Failure(error)]
            # One of them is to blame, and only that one is to fail.
            return [result for argument in arguments for result in self._run([argument])]


def _deliver(futures: list[asyncio.Future[R]], results: list[R | _Failure]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.done():  # cancelled meanwhile
            continue
        if not isinstance(result, _Failure):
            future.set_result(result)
        elif isinstance(result.error, StopIteration):
            # A future cannot hold it; a coroutine would raise this instead, too.
            replaced = RuntimeError("the function raised StopIteration")
            replaced.__cause__ = result.error
            future.set_exception(replaced)
        else:
            future.set_exception(result.error)

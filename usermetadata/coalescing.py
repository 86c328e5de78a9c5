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
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from usermetadata.bridge import private_loop
from usermetadata.exceptions import StorageBusyError
from usermetadata.forking import watch
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
        refuse_reentry()
        if not self._reads.in_flight or private_loop.get() is asyncio.get_running_loop():
            return finish(self._storage.read(user_ids))
        return finish(await self._reads.submit(user_ids))

    async def write(
        self, changes: Sequence[tuple[str, Change]], finish: Callable[[list[Metadata | None]], T]
    ) -> T:
        """Write, together with whoever else is writing; the order of calls is kept."""
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
        return [[next(written) for _ in changes] for changes in calls]


# Plain tuples, as there are two for each call: what to do and who waits; who, result and error.
_Call = tuple[A, "asyncio.Future[R]"]
_Outcome = tuple["asyncio.Future[R]", "R | None", "BaseException | None"]


class _Lane(Generic[A, R]):
    """Calls of one verb: those that wait, and the workers that execute them in batches."""

    def __init__(self, execute: Callable[[Sequence[A]], list[R]], in_flight: int) -> None:
        self._execute = execute
        self.in_flight = in_flight
        self._lock = threading.Lock()
        self._waiting: list[_Call[A, R]] = []
        self._workers: set[threading.Thread] = set()
        self._idle_workers = 0
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_closed = False

    def submit(self, argument: A) -> asyncio.Future[R]:
        """Join the next batch, and let it start if there is a place for it."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._idle_workers:
                self._idle_workers -= 1
                self._wake.put(None)
            elif len(self._workers) < self.in_flight:
                worker = threading.Thread(target=self._work, name="usermetadata", daemon=True)
                worker.start()
                self._workers.add(worker)
            # Last: a worker looks once it has the lock, and never if it could not be started.
            self._waiting.append((argument, future))
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
        while calls := self._next_batch():
            calls = [call for call in calls if not call[1].cancelled()]
            by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome[R]]] = {}
            for outcome in self._run(calls):
                by_loop.setdefault(outcome[0].get_loop(), []).append(outcome)
            for loop, outcomes in by_loop.items():
                # A loop that is closed has nobody waiting any more.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(_deliver, outcomes)

    def _next_batch(self) -> list[_Call[A, R]]:
        """Return all that waits, as soon as there is any; nothing if the worker is to end."""
        while True:
            with self._lock:
                calls, self._waiting = self._waiting, []
                if calls:
                    return calls
                if self._is_closed:
                    self._workers.discard(threading.current_thread())
                    return []
                self._idle_workers += 1
            try:
                self._wake.get(timeout=_LONGEST_IDLENESS)
            except Empty:
                with self._lock:
                    if self._wake.empty():
                        self._idle_workers -= 1
                        self._workers.discard(threading.current_thread())
                        return []
                    self._wake.get()

    def _run(self, calls: list[_Call[A, R]]) -> list[_Outcome[R]]:
        try:
            results = self._execute([argument for argument, _ in calls]) if calls else []
        except StorageBusyError as busy:
            # Each on its own would wait just as long, one after the other.
            return [(future, None, _same(busy)) for _, future in calls]
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who gets it
            if len(calls) == 1:
                return [(calls[0][1], None, error)]
            # One of them is to blame, and only that one is to fail.
            return [outcome for call in calls for outcome in self._run([call])]
        return [(future, result, None) for (_, future), result in zip(calls, results, strict=True)]


def _same(busy: StorageBusyError) -> StorageBusyError:
    error = StorageBusyError(*busy.args)
    error.__cause__ = busy.__cause__
    return error


def _deliver(outcomes: list[_Outcome[Any]]) -> None:
    for future, result, error in outcomes:
        if future.done():  # cancelled meanwhile
            continue
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):
            # A future cannot hold it; a coroutine would raise this instead, too.
            replaced = RuntimeError("the function raised StopIteration")
            replaced.__cause__ = error
            future.set_exception(replaced)
        else:
            future.set_exception(error)

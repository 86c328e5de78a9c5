"""Batches: calls that arrive while one is being executed share the next execution.

There is no timer. A call that finds nothing running is executed at once and alone. Threads execute
batches themselves, one thread after the other (``ThreadBatches``); for event loops worker threads
do it (``LoopBatches``). Both follow one policy for errors, :func:`settle`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from usermetadata._core.forking import ForkHooks, notice, watch
from usermetadata._core.loops import call_outside
from usermetadata.exceptions import (
    OutcomeUnknownError,
    StorageBusyError,
    StorageUnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from concurrent.futures import ThreadPoolExecutor

A = TypeVar("A")
R = TypeVar("R")

# After these errors, every call of the batch gets the error. Repeating call by call would take the
# timeout once per call, or could make a change twice.
_SHARED_ERRORS = (StorageBusyError, StorageUnavailableError, OutcomeUnknownError)

_LONGEST_SLEEP = 0.5  # seconds


class Call(Generic[A, R]):
    """A call that waits in a queue, and its outcome once it is settled."""

    __slots__ = ("argument", "error", "is_settled", "result")

    result: R

    def __init__(self, argument: A) -> None:
        self.argument = argument
        self.error: BaseException | None = None
        self.is_settled = False

    def outcome(self) -> R:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result


def settle(
    execute: Callable[[list[A]], list[R]],
    calls: Sequence[Call[A, R]],
    own_errors: type[BaseException] = Exception,
) -> None:
    """Execute the calls together and settle each; a batch that fails is repeated call by call.

    ``execute`` does all or nothing, so after an error nothing has happened yet, and only one call
    may be faulty. ``_SHARED_ERRORS`` are the exceptions: nothing is repeated after them.

    Args:
        execute: takes the arguments of the calls and returns a result for each.
        calls: the calls.
        own_errors: the errors that belong to a call. Other exceptions, such as interrupts,
            propagate.
    """
    try:
        results = execute([call.argument for call in calls])
    except own_errors as error:
        if len(calls) > 1 and not isinstance(error, _SHARED_ERRORS):
            for call in calls:
                settle(execute, [call], own_errors)
            return
        for call in calls:
            call.error = error
            call.is_settled = True
    else:
        for call, result in zip(calls, results, strict=True):
            call.result = result
            call.is_settled = True


def acquire(lock: threading.RLock, timeout: float) -> bool:
    """Acquire the lock within so many seconds, or return ``False``."""
    if lock.acquire(blocking=False):
        return True
    deadline = time.monotonic() + timeout
    # Short waits: gevent's locks may miss a release by another real thread.
    while (left := deadline - time.monotonic()) > 0:
        if lock.acquire(timeout=min(left, _LONGEST_SLEEP)):
            return True
    return False


class _ThreadCall(Call[A, R]):
    __slots__ = ("_asleep",)

    def __init__(self, argument: A) -> None:
        super().__init__(argument)
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def sleep(self, seconds: float) -> None:
        self._asleep.acquire(timeout=seconds)

    def wake(self) -> None:
        with suppress(RuntimeError):  # the thread is awake already
            self._asleep.release()


class ThreadBatches(Generic[A, R]):
    """Batches of blocking calls, one batch at a time.

    The thread whose turn it is executes its own call and all waiting calls. Then the first call
    that arrived in between gets the turn. An interrupt (an exception raised by a signal handler)
    may occur between any two steps: the interrupted call fails, and the others continue.

    Args:
        execute: takes the arguments of some calls, does all or nothing, returns a result for each.
        timeout: seconds that a call waits for its turn.
        name: the name of the database, for error messages.

    Attributes:
        turn: the lock that the executing thread has.
    """

    def __init__(self, execute: Callable[[list[A]], list[R]], timeout: float, name: str) -> None:
        self._execute = execute
        self._timeout = timeout
        self._name = name
        self._waiting: deque[_ThreadCall[A, R]] = deque()
        self._executing_thread: int | None = None
        self.turn = threading.RLock()

    def call(self, argument: A, *, alone: bool = False) -> R:  # noqa: C901, PLR0912 - interrupts
        """Execute the call, or wait until another thread has executed it.

        Args:
            argument: what ``execute`` gets.
            alone: whether it must be executed in this thread, in a separate batch.

        Raises:
            StorageBusyError: no turn came within the timeout.
            UsageError: this thread is executing a batch already.
            Exception: what ``execute`` raised for this call.
        """
        me = threading.get_ident()
        if self._executing_thread == me:
            raise self._inside()
        call: _ThreadCall[A, R] | None = None
        deadline = 0.0
        try:
            while True:
                # An interrupt may occur after any call. So the lock is taken inside `try`, and
                # `finally` begins with its release, which only the thread that has it can do.
                try:
                    if (
                        acquire(self.turn, self._timeout)
                        if alone
                        else self.turn.acquire(blocking=False)
                    ):
                        self._executing_thread = me
                        if alone or not (self._waiting or call):
                            return self._execute([argument])[0]
                        call = call or _ThreadCall(argument)
                        if not call.is_settled:
                            self._execute_with_all_that_wait(call)
                finally:
                    had_turn = self._executing_thread == me
                    if had_turn:
                        self._executing_thread = None
                    try:  # noqa: SIM105 - suppress() would be a call before the release
                        self.turn.release()
                    except RuntimeError:
                        pass
                    if had_turn and self._waiting:
                        self._wake_one()
                if alone:
                    raise busy(self._name)
                if call is None:
                    call = _ThreadCall(argument)
                    deadline = time.monotonic() + self._timeout
                    self._waiting.append(call)
                elif call.is_settled:
                    return call.outcome()
                else:
                    self._sleep(call, deadline)
        except BaseException:
            if call is not None:
                self._withdraw(call)
                self._wake_one()
            raise

    @contextmanager
    def exclusive(self) -> Generator[None, None, None]:
        """Keep every call out of the block."""
        if self.is_executing_here():
            raise self._inside()
        try:
            if not acquire(self.turn, self._timeout):
                raise busy(self._name)
            yield
        finally:
            with suppress(RuntimeError):
                self.turn.release()
            self._wake_one()

    def is_executing_here(self) -> bool:
        """Tell whether the calling thread is executing a batch."""
        return self._executing_thread == threading.get_ident()

    def _inside(self) -> UsageError:
        return UsageError(
            f"{self._name}: a write inside a write of the same thread, by a change or a signal"
            " handler, would be lost; write before or after it"
        )

    def _execute_with_all_that_wait(self, call: _ThreadCall[A, R]) -> None:
        self._withdraw(call)
        calls = [call]
        with suppress(IndexError):  # calls may be withdrawn in between
            while self._waiting:
                calls.append(self._waiting.popleft())
        try:
            settle(self._execute, calls)
        finally:
            # After an interrupt, an unsettled call is executed by its own thread.
            for each in calls[1:]:
                each.wake()

    def _sleep(self, call: _ThreadCall[A, R], deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 and self._withdraw(call):
            raise busy(self._name)
        # The sleep is short, because an interrupted thread may have woken no other. A call that
        # another thread executes is waited for even after the deadline.
        call.sleep(min(left, _LONGEST_SLEEP) if left > 0 else _LONGEST_SLEEP)

    def _withdraw(self, call: _ThreadCall[A, R]) -> bool:
        """Take the call out of the queue; ``False`` if another thread has taken it to execute."""
        try:
            self._waiting.remove(call)
        except ValueError:
            return False
        return True

    def _wake_one(self) -> None:
        with suppress(IndexError):
            self._waiting[0].wake()


def busy(name: str) -> StorageBusyError:
    """Return the error of a write whose timeout has passed."""
    return StorageBusyError(
        f"{name}: timed out waiting for another writer; repeat the call (or the transaction that it"
        " is part of), or allow a longer timeout"
    )


class _LoopCall(Call[A, R]):
    __slots__ = ("future", "is_alone", "key", "loop")

    def __init__(
        self, key: object, argument: A, loop: asyncio.AbstractEventLoop, *, is_alone: bool
    ) -> None:
        super().__init__(argument)
        self.key = key
        self.is_alone = is_alone
        self.loop = loop
        self.future: asyncio.Future[R] = loop.create_future()


class LoopBatches(ForkHooks, Generic[A, R]):
    """Batches of calls from any number of event loops, executed in worker threads.

    Args:
        execute: takes the arguments of some calls, does all or nothing, returns a result for each.
        at_once: how many batches may run at a time.
    """

    def __init__(self, execute: Callable[[list[A]], list[R]], at_once: int) -> None:
        self._execute = execute
        self._at_once = at_once
        self._is_closed = False
        self._start()
        watch(self)

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._waiting: list[_LoopCall[A, R]] = []
        self._working = 0
        self._workers: ThreadPoolExecutor | None = None

    def submit(self, key: object, argument: A, *, alone: bool = False) -> asyncio.Future[R]:
        """Join the next batch of calls with the same key; it starts at once if none is running.

        A call that must be executed alone is executed after all that came before it, and before
        all that come after it.
        """
        notice()
        loop = asyncio.get_running_loop()
        call: _LoopCall[A, R] = _LoopCall(key, argument, loop, is_alone=alone)
        with self._lock:
            self._waiting.append(call)
            if self._working < self._at_once:
                try:
                    self._start_worker()
                    self._working += 1
                except RuntimeError:  # closed, or the interpreter is ending: no thread can start
                    self._working += 1
                    call_outside(self._work)
        return call.future

    def _start_worker(self) -> None:
        if self._is_closed:
            raise RuntimeError
        if self._workers is None:
            # While the interpreter ends, even this import raises RuntimeError.
            from concurrent.futures import ThreadPoolExecutor

            self._workers = ThreadPoolExecutor(max(1, self._at_once), "usermetadata")
        self._workers.submit(self._work)

    def close(self) -> None:
        """Wait until the calls under way are executed, and end the workers."""
        self._is_closed = True
        if self._workers is not None:
            self._workers.shutdown()

    def after_fork_in_child(self) -> None:
        """The workers, and the loops that wait, are the parent's."""
        self._start()

    def _work(self) -> None:
        while calls := self._next_batch():
            # A call that was cancelled before is not executed.
            calls = [call for call in calls if not call.future.cancelled()]
            if calls:
                settle(self._execute, calls, BaseException)
            loops: dict[asyncio.AbstractEventLoop, list[_LoopCall[A, R]]] = {}
            for call in calls:
                loops.setdefault(call.loop, []).append(call)
            for loop, settled in loops.items():
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(_deliver, settled)

    def _next_batch(self) -> list[_LoopCall[A, R]]:
        with self._lock:
            if not self._waiting:
                self._working -= 1
                return []
            waiting, key = self._waiting, self._waiting[0].key
            alone = next((at for at, call in enumerate(waiting) if call.is_alone), len(waiting))
            before, after = waiting[: alone or 1], waiting[alone or 1 :]
            self._waiting = [call for call in before if call.key != key] + after
            return [call for call in before if call.key == key]


def _deliver(calls: Iterable[_LoopCall[A, R]]) -> None:
    for call in calls:
        if call.future.done():  # cancelled in between
            continue
        if call.error is None:
            call.future.set_result(call.result)
        elif isinstance(call.error, StopIteration):
            # A future cannot hold it; a coroutine would also raise this instead.
            replaced = RuntimeError("the storage raised StopIteration")
            replaced.__cause__ = call.error
            call.future.set_exception(replaced)
        else:
            call.future.set_exception(call.error)

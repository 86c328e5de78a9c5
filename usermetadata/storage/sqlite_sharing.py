"""Letting threads that write at once share one transaction, and so one flush to the disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from usermetadata.exceptions import StorageBusyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

A = TypeVar("A")
R = TypeVar("R")


_LONGEST_SLEEP = 0.5  # seconds


def acquire(lock: threading.RLock, timeout: float) -> bool:
    """Acquire the lock within so many seconds, or return ``False``."""
    if lock.acquire(blocking=False):
        return True
    deadline = time.monotonic() + timeout
    # Looking again from time to time: gevent's locks may miss a release by another real thread.
    while (left := deadline - time.monotonic()) > 0:
        if lock.acquire(timeout=min(left, _LONGEST_SLEEP)):
            return True
    return False


class Sharing(Generic[A, R]):
    """Executes calls one at a time, and those that wait meanwhile together.

    A call that finds nothing running is executed in its own thread, at once and alone. One of those
    that come meanwhile then leads: its thread executes all that have come. Where that fails each
    thread executes its own call, so that each gets its own error.

    Args:
        execute: takes the arguments of some calls, and returns a result for each.
        timeout: seconds that a call waits for those before it.
        too_late: makes the error that is raised then.
    """

    def __init__(
        self,
        execute: Callable[[Sequence[A]], list[R]],
        timeout: float,
        too_late: Callable[[], StorageBusyError],
    ) -> None:
        self._execute = execute
        self._timeout = timeout
        self._too_late = too_late
        self._waiting: deque[_Call[A, R]] = deque()
        self._leadership = threading.RLock()
        self._leading_thread: int | None = None

    def call(self, argument: A) -> R:
        """Execute the call, or wait until another thread has executed it."""
        call: _Call[A, R] = _Call(argument)
        # A signal handler that interrupts the leader cannot wait for it.
        if self._leading_thread != threading.get_ident():
            self._waiting.append(call)
            try:
                self._lead_or_wait(call)
            except BaseException:
                self._withdraw(call)
                self._wake_one()
                raise
            if call.is_late:
                raise self._too_late()
            if call.is_done:
                return call.result
        [result] = self._execute([argument])
        return result

    def _lead_or_wait(self, call: _Call[A, R]) -> None:
        deadline = time.monotonic() + self._timeout
        while not (call.is_over or self._lead(call)):
            left = deadline - time.monotonic()
            if left > 0:
                # Not for long: an interrupted leader may have woken nobody.
                call.asleep.acquire(timeout=min(left, _LONGEST_SLEEP))
            elif self._withdraw(call):
                call.is_late = call.is_over = True
            else:
                # What another thread is executing already will come to its end.
                call.asleep.acquire(timeout=_LONGEST_SLEEP)

    def _lead(self, call: _Call[A, R]) -> bool:
        calls: list[_Call[A, R]] = []
        leads = False
        try:
            if not self._leadership.acquire(blocking=False):
                return False
            leads = True
            if not call.is_over:
                self._leading_thread = threading.get_ident()
                self._withdraw(call)
                calls.append(call)
                self._execute_with_all_that_wait(calls)
            return True
        finally:
            try:
                # Before another thread may lead: it would execute its call a second time.
                for each in calls:
                    each.is_over = True
            finally:
                if leads:
                    self._leading_thread = None
                # Whatever an interrupt has left undone, the lock itself knows whose it is.
                try:  # noqa: SIM105 - suppress() would be a call, before which one may come
                    self._leadership.release()
                except RuntimeError:
                    pass
            if leads:
                for each in calls[1:]:
                    each.wake()
                self._wake_one()

    def _execute_with_all_that_wait(self, calls: list[_Call[A, R]]) -> None:
        with suppress(IndexError):  # some may have withdrawn since we looked
            while self._waiting:
                calls.append(self._waiting.popleft())
        try:
            results = self._execute([each.argument for each in calls])
        except StorageBusyError:
            for each in calls:
                each.is_late = True
            raise
        except Exception:
            if len(calls) == 1:
                raise
        else:
            for each, result in zip(calls, results, strict=True):
                each.result = result
                each.is_done = True

    def _withdraw(self, call: _Call[A, R]) -> bool:
        try:
            self._waiting.remove(call)
        except ValueError:
            return False
        return True

    def _wake_one(self) -> None:
        # It came after the last leader's last look, and leads now unless yet another does.
        if self._waiting:
            with suppress(IndexError):
                self._waiting[0].wake()


class _Call(Generic[A, R]):
    result: R

    def __init__(self, argument: A) -> None:
        self.argument = argument
        self.asleep = threading.Lock()
        self.asleep.acquire()
        self.is_over = False
        self.is_done = False
        self.is_late = False

    def wake(self) -> None:
        with suppress(RuntimeError):  # it is awake already
            self.asleep.release()

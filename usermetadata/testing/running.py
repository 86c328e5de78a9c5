"""Threads of a test: their exceptions fail it, and a hang ends with the stacks of all threads."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakSet

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from usermetadata.testing.process import OtherProcess

T = TypeVar("T")

other_processes: WeakSet[OtherProcess] = WeakSet()


class Running(Generic[T]):
    """A function that runs in a thread.

    Args:
        function: the function.
        timeout: seconds after which the function counts as hanging.
    """

    def __init__(self, function: Callable[[], T], timeout: float) -> None:
        self._function = function
        self._timeout = timeout
        self._returned: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="of the test", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the function is still running."""
        return self._thread.is_alive()

    def give_time(self, seconds: float) -> None:
        """Wait for the function to end, at most so many seconds."""
        self._thread.join(seconds)

    def result(self) -> T:
        """Return what the function returned, or raise what it raised."""
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            fail_with_stacks(self._timeout)
        if self._error is not None:
            raise self._error
        return self._returned[0]

    def _run(self) -> None:
        try:
            self._returned.append(self._function())
        except BaseException as error:  # noqa: BLE001 - result() raises it
            error.add_note("It was raised in a thread that the test has started.")
            self._error = error


def run_in_rounds(
    functions: Sequence[Callable[[int], object]], rounds: int, timeout: float
) -> None:
    """Call each function in a separate thread with 0, 1, ...; rounds start together."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[int], object]) -> None:
        try:
            for number in range(rounds):
                barrier.wait(timeout)
                function(number)
        except threading.BrokenBarrierError:
            if not errors:
                raise
        except BaseException as error:
            errors.append(error)
            barrier.abort()
            raise

    errors: list[BaseException] = []
    threads = [Running(lambda each=each: run(each), timeout) for each in functions]  # type: ignore[misc]
    for thread in threads:
        thread.result()


@contextmanager
def limited(seconds: float) -> Generator[None, None, None]:
    """Fail with the stacks of all threads if the block takes longer, also in the main thread."""
    if not _can_be_interrupted():
        yield
        return

    def fail(number: int, frame: object) -> None:
        fail_with_stacks(seconds)

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _can_be_interrupted() -> bool:
    # A timer that is set already belongs to pytest-timeout, which does the same.
    return (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and not signal.getitimer(signal.ITIMER_REAL)[0]
    )


def fail_with_stacks(seconds: float) -> None:
    """Fail the test, which hangs."""
    texts = [stacks(), *(each.stacks() for each in other_processes)]
    pytest.fail(
        f"the test hangs: something in it has not ended within {seconds:g} s. A lock that is"
        " never released is the likely cause, or two writes that wait for each other, or a thread"
        " that an exception has ended: pytest warns of it below. Each thread's last line shows what"
        " it waits for.\n\n" + "\n".join(texts)
    )


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)!r}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()  # pyright: ignore[reportPrivateUsage]
    )

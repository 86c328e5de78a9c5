"""Concurrent callers of any kind see each user's metadata change one call at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import open_storage
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import usermetadata.asyncio
import usermetadata.syncio
from usermetadata import UserMetadataRecipe, merge_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata import Storage
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

NEVER = float("inf")


@dataclass
class Call:
    """One call for one user: when it began and ended, and its result."""

    name: str
    argument: Metadata
    began: float
    ended: float = NEVER
    result: Metadata | None = None  # None: it was cancelled, and may have taken effect or not

    def apply(self, stored: Metadata) -> Metadata:
        """Return the metadata after the call, which is also the call's result."""
        if self.name == "update":
            return merge_metadata(stored, self.argument)
        if self.name == "modify":
            return count(stored)
        return stored if self.name == "get" else self.argument


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {**metadata, "count": metadata.get("count", 0) + 1}


def is_linearisable(history: Sequence[Call]) -> bool:
    """Tell whether an order of the calls that respects their times explains all results."""
    seen: set[tuple[frozenset[int], str]] = set()
    todo: list[tuple[frozenset[int], Metadata]] = [(frozenset(range(len(history))), {})]
    while todo:
        left, stored = todo.pop()
        if all(history[index].result is None for index in left):
            return True
        if (left, repr(stored)) in seen:
            continue
        seen.add((left, repr(stored)))
        first_end = min(history[index].ended for index in left)
        for index in left:
            call = history[index]
            if call.began <= first_end:
                after = call.apply(stored)
                if call.result is None or call.result == after:
                    todo.append((left - {index}, after))
    return False


def test_the_check_knows_what_is_wrong() -> None:
    """A lost update, a stale read and an update out of order are found; a race is allowed."""
    first = Call("update", {"a": 1}, began=1, ended=4, result={"a": 1})
    lost = Call("update", {"b": 2}, began=2, ended=3, result={"b": 2})
    kept = Call("update", {"b": 2}, began=2, ended=3, result={"a": 1, "b": 2})
    assert not is_linearisable([first, lost])
    assert is_linearisable([first, kept])
    assert not is_linearisable([first, Call("get", {}, began=5, ended=6, result={})])
    assert is_linearisable([first, Call("get", {}, began=3, ended=6, result={})])
    later = Call("update", {"a": 3}, began=5, ended=6, result={"a": 3})
    assert not is_linearisable([first, later, Call("get", {}, began=7, ended=8, result={"a": 1})])
    cancelled = Call("update", {"a": 9}, began=2)
    for value in (3, 9):
        read = Call("get", {}, began=7, ended=8, result={"a": value})
        assert is_linearisable([first, later, cancelled, read])


class Gate:
    """A storage whose calls from worker threads can be blocked."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.open = threading.Event()
        self.open.set()
        self.reads_in_flight, self.writes_in_flight = 2, 1

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read, once the gate is open."""
        assert self.open.wait(60)
        return self._storage.read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Write, once the gate is open."""
        assert self.open.wait(60)
        return self._storage.write(changes)

    def for_app(self, app_id: str) -> Gate:
        """Not used here."""
        raise NotImplementedError

    def close(self) -> None:
        """The test closes the storage."""


class ConcurrentCalls(RuleBasedStateMachine):
    """Calls from two event loops and from threads, some cancelled, while the storage stalls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.opened = contextlib.ExitStack()
        folder = self.opened.enter_context(tempfile.TemporaryDirectory())
        self.gate = Gate(self.opened.enter_context(open_storage(kind, Path(folder))))
        self.threads = self.opened.enter_context(ThreadPoolExecutor(8))
        self.loops = [self.start_loop(), self.start_loop()]
        self.clock = itertools.count()
        self.numbers = itertools.count()
        self.history: dict[str, list[Call]] = {"alice": [], "bob": []}
        self.futures: list[Future[None]] = []
        usermetadata.init(self.gate)

    def start_loop(self) -> asyncio.AbstractEventLoop:
        """Run an event loop in a thread, until all its tasks have ended."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def end_all_tasks() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*tasks, return_exceptions=True)

        def stop() -> None:
            asyncio.run_coroutine_threadsafe(end_all_tasks(), loop).result(60)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

        self.opened.callback(stop)
        return loop

    @rule(
        where=st.sampled_from(["first loop", "second loop", "thread"]),
        name=st.sampled_from(["get", "update", "set", "modify", "clear"]),
        user_id=st.sampled_from(["alice", "alice", "bob"]),
        key=st.sampled_from(["a", "b", "count"]),
    )
    def call(self, where: str, name: str, user_id: str, key: str) -> None:
        """Begin a call; each writes a value that no other writes."""
        argument = {key: next(self.numbers)} if name in ("update", "set") else {}
        call = Call(name, argument, began=next(self.clock))
        self.history[user_id].append(call)
        if where == "thread":
            self.futures.append(self.threads.submit(self.call_in_thread, call, user_id))
        else:
            loop = self.loops[where == "second loop"]
            self.futures.append(
                asyncio.run_coroutine_threadsafe(self.call_in_loop(call, user_id), loop)
            )

    @precondition(lambda self: self.futures)
    @rule(index=st.integers(min_value=0))
    def cancel(self, index: int) -> None:
        """Cancel a call at any stage."""
        self.futures[index % len(self.futures)].cancel()

    @rule()
    def stall(self) -> None:
        """Let calls gather."""
        self.gate.open.clear()

    @rule()
    def go_on(self) -> None:
        """Let the gathered calls pass, and wait for their end."""
        self.gate.open.set()
        for future in self.futures:
            with contextlib.suppress(CancelledError):
                future.result(60)
        self.futures.clear()

    def teardown(self) -> None:
        """Check that an order explains the results."""
        self.go_on()
        UserMetadataRecipe.reset()
        self.opened.close()
        for history in self.history.values():
            assert is_linearisable(history), history

    def call_in_thread(self, call: Call, user_id: str) -> None:
        """Call ``syncio``."""
        self.end(call, self.function(usermetadata.syncio, call)(user_id))

    async def call_in_loop(self, call: Call, user_id: str) -> None:
        """Call ``asyncio``."""
        self.end(call, await self.function(usermetadata.asyncio, call)(user_id))

    def function(self, facade: Any, call: Call) -> Callable[[str], Any]:
        """Return a function that takes a user id and makes the call."""
        function = getattr(facade, f"{call.name}_user_metadata")
        if call.name in ("get", "clear"):
            result: Callable[[str], Any] = function
            return result
        argument = count if call.name == "modify" else call.argument
        return lambda user_id: function(user_id, argument)

    def end(self, call: Call, result: Any) -> None:
        """Note the result."""
        call.result = getattr(result, "metadata", {})
        call.ended = next(self.clock)


@pytest.mark.parametrize("kind", ["memory", "sqlite file"])
def test_concurrent_calls_are_linearisable(kind: str) -> None:
    """Each call takes effect at one moment between its begin and its end.

    So for each user there is an order of the calls of two event loops, of threads and of cancelled
    tasks that explains every result.
    """

    class Calls(ConcurrentCalls):
        def __init__(self) -> None:
            super().__init__(kind)

    often = settings(max_examples=40, stateful_step_count=25)
    run_state_machine_as_test(Calls, settings=often)

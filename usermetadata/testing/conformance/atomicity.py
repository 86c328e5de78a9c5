"""Writes that are whole or not at all, and threads."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import StorageBusyError, UsageError, UserMetadataError
from usermetadata.testing.conformance.suite import COUNT, Suite, explained, with_many_users

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

IN_OPPOSITE_ORDER = pytest.mark.parametrize(
    "change", [Merge({"m": 1}), Replace({"m": 1}), COUNT], ids=["merge", "replace", "modify"]
)
ROW_OR_NOT = pytest.mark.parametrize("row", [False, True], ids=["no row", "a row"])
# Writes that do not need the stored row. The last one leaves a row as new as the first.
BLIND_WRITES: dict[str, list[Change]] = {
    "replace": [Replace({"other": 1})],
    "clear": [Clear()],
    "clear and merge": [Clear(), Merge({"other": 1})],
}
WHICH_USER = pytest.mark.parametrize("which", ["the last user", "a user whose change comes later"])

_TURNS = 15
_RACE = 1.0  # seconds: a read that fills a cache meets a write within microseconds
_UNCHANGED = (
    "What a change raises has to reach the caller of write unchanged. Do not call changes where"
    " the driver's errors are translated, in a coroutine or in a generator."
)
_WHOLE = (
    "a write has to be one transaction, however many statements it needs; do not commit between"
    " its parts"
)
_ALONE = (
    "Changes of other writes raised exceptions at the same time: if the storage stores several"
    " writes together, each has to be undone, and to raise, by itself."
)
_TOGETHER = (
    "It was raised while several threads wrote. If the database has ended a deadlock, lock all"
    " users of a write in one order, or repeat the write. Otherwise the lock may not exclude other"
    " writers."
)
_LOST = (
    "writes are lost: a write has to hold the lock of all its users, against other threads and"
    " processes, from before it reads them until their rows are stored, or to compare when it"
    " stores"
)
_CACHED = (
    "a row is older than the last write that was acknowledged: did a read that met the write put it"
    " into a cache?"
)
_HALF = "a read during a write returned half of it, or rows that were not stored yet"
_RESULTS = "the results are not those of the attempt that was stored"
_CLOSING = (
    "A call that is under way when another thread closes the storage has to return, or to raise an"
    " error of this library."
)

# Exceptions of a change's own code, and exceptions that a storage expects from its driver or
# decoder.
_ERRORS = [
    LookupError("no such property"),
    ValueError("no such value"),
    ConnectionResetError("another server"),
    TimeoutError("another server"),
    StopIteration("no such item"),  # next() raises it; a coroutine or a generator replaces it
    KeyboardInterrupt(),
]


class AtomicityConformance(Suite):
    """The behaviour of one storage under threads."""

    # One write.

    @pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
    def test_a_failing_change_undoes_the_whole_write(
        self, storage: Storage, error: BaseException
    ) -> None:
        """An exception of a change, or an interrupt, propagates unchanged; nothing is stored."""
        storage.write([("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))])

        def fail(old: Metadata | None) -> Metadata:
            raise error

        with explained(_UNCHANGED), pytest.raises(type(error)) as caught:
            storage.write([("alice", Merge({"n": 2})), ("bob", Clear()), ("carol", fail)])
        assert caught.value is error
        expected = {"alice": {"n": 1}, "bob": {"n": 1}}
        assert storage.read(["alice", "bob", "carol"]) == expected

    def test_a_storage_works_after_a_failed_write(self, storage: Storage) -> None:
        """A change that raised leaves nothing locked or open."""

        def fail(old: Metadata | None) -> Metadata:
            raise LookupError

        for _ in range(3):
            with pytest.raises(LookupError):
                storage.write([("alice", fail)])
            storage.write([("alice", Merge({"n": 1}))])
            self.in_thread(lambda: storage.write([("alice", Merge({"m": 1}))]))
        assert storage.read(["alice"]) == {"alice": {"n": 1, "m": 1}}

    @with_many_users
    def test_a_write_of_many_users_is_whole(self, storage: Storage) -> None:
        """All of a write of 12,000 users is stored at once, or nothing if the last change fails."""
        users = [f"user {number:05}" for number in range(12_000)]

        def fail(old: Metadata | None) -> Metadata:
            raise LookupError

        changes: list[tuple[str, Change]] = [(user, Merge({})) for user in users]
        with pytest.raises(LookupError):
            storage.write([*changes[:-1], (users[-1], fail)])
        stored = storage.read(users)
        assert not stored, f"the last change failed, and {len(stored)} users are stored: {_WHOLE}"
        ends = [users[0], users[-1]]
        writing = self.start(lambda: storage.write(changes))
        while writing.is_alive:
            writing.give_time(0.005)  # reads without a pause would slow it down
            with contextlib.suppress(StorageBusyError):  # it may have waited for all of the write
                stored = storage.read(ends)
            assert len(stored) in {0, 2}, f"a read returned half of a write: {_WHOLE}"
        writing.result()
        assert storage.read(ends) == {user: {} for user in ends}

    # Concurrent writes.

    def test_a_failing_write_fails_alone(self, storage: Storage) -> None:
        """Writes that other threads make at the same time succeed, and are stored."""
        error = LookupError("of one write")

        def fail(old: Metadata | None) -> Metadata:
            raise error

        def write_and_fail(_: int) -> None:
            with pytest.raises(LookupError) as caught:
                storage.write([("bob", COUNT), ("alice", fail)])
            assert caught.value is error

        def write(_: int) -> None:
            with explained(_ALONE):
                storage.write([("alice", COUNT)])

        self.in_rounds([write, write, write, write_and_fail, write_and_fail], 20)
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 60}}, f"{_LOST}. {_ALONE}"

    @ROW_OR_NOT
    def test_no_write_comes_between(self, storage: Storage, *, row: bool) -> None:
        """A write that starts while a change runs is not lost, whether or not there is a row."""
        check_nothing_comes_between(self, storage, storage, row=row)

    @pytest.mark.parametrize("changes", BLIND_WRITES.values(), ids=BLIND_WRITES)
    def test_no_blind_write_comes_between(self, storage: Storage, changes: list[Change]) -> None:
        """A ``Replace`` or ``Clear`` that starts while a change runs is not undone by it."""
        check_no_blind_write_comes_between(self, storage, storage, changes)

    @WHICH_USER
    def test_every_user_of_a_write_is_locked(self, storage: Storage, which: str) -> None:
        """A write that starts while a write of several users runs is not lost."""
        check_every_user_is_locked(self, storage, storage, which)

    def test_a_change_that_is_called_again_starts_anew(self, storage: Storage) -> None:
        """A storage that repeats a write reads the rows again, so nothing counts twice."""
        check_nothing_counts_twice(self, storage, storage)

    def test_a_reader_sees_all_of_a_write_or_nothing(self, storage: Storage) -> None:
        """A ``read`` during a ``write`` returns the old metadata, or waits."""
        check_a_reader_sees_all_or_nothing(self, storage, storage)

    def test_functions_in_opposite_order_do_not_deadlock(self, storage: Storage) -> None:
        """``[a, b]``, ``[b, a]`` and ``[b]`` can be written at the same time, with functions."""
        check_functions_do_not_deadlock(self, storage, storage)

    @IN_OPPOSITE_ORDER
    def test_writes_in_opposite_order_do_not_deadlock(
        self, storage: Storage, change: Change
    ) -> None:
        """The same applies to many users that threads write again and again."""
        check_orders_do_not_deadlock(self, storage, storage, change)

    # Threads.

    def test_any_thread_may_use_the_storage(self, storage: Storage) -> None:
        """One thread reads what another has written; a third may call ``close``."""
        self.in_thread(lambda: storage.write([("alice", Merge({"n": 1}))]))
        assert self.in_thread(lambda: storage.read(["alice"])) == {"alice": {"n": 1}}
        self.in_thread(storage.close)
        with pytest.raises(UsageError):
            storage.read(["alice"])

    def test_what_was_acknowledged_is_stored(self, storage: Storage) -> None:
        """When ``write`` returns, another thread reads exactly what it returned."""
        count = Modify(lambda metadata: {"n": metadata.get("n", 0) + 1})
        with ThreadPoolExecutor(1) as other:
            for number in range(20):
                changes: list[tuple[str, Change]] = [
                    ("alice", Merge({"n": number})),
                    ("bob", Replace({"n": number})),
                    ("carol", count),
                    ("dave", Clear() if number % 2 else Merge({"n": number})),
                ]
                users = [user_id for user_id, _ in changes]
                answered = dict(zip(users, storage.write(changes), strict=True))
                stored = other.submit(storage.read, users).result()
                assert stored == {user: row for user, row in answered.items() if row is not None}

    def test_concurrent_writes_are_all_kept(self, storage: Storage) -> None:
        """If eight threads count in one row and merge into another, no write is lost."""
        check_all_are_kept(self, [storage] * 8, 25)

    def test_two_first_merges_both_survive(self, storage: Storage) -> None:
        """If two threads merge into a user without a row at once, no write is lost."""
        check_first_merges_survive(self, storage, storage)

    def test_a_read_is_of_one_moment(self, storage: Storage) -> None:
        """If two users are always written together, a reader sees both changes or neither."""
        check_reads_are_of_one_moment(self, storage, storage, 0)

    @with_many_users
    @pytest.mark.parametrize("between", [3000, 70_000])
    def test_a_read_of_many_users_is_of_one_moment(self, storage: Storage, between: int) -> None:
        """The same applies if thousands of others are read with them, even in several queries."""
        check_reads_are_of_one_moment(self, storage, storage, between)

    def test_a_read_does_not_bring_an_old_row_back(self, storage: Storage) -> None:
        """A read that meets a write does not leave the former row in a cache."""
        storage.write([("alice", Merge({"n": 0}))])
        written = 0

        def write(_: int) -> None:
            nonlocal written
            # The reads of the round before are over.
            assert storage.read(["alice"]) == {"alice": {"n": written}}, _CACHED
            for _ in range(3):
                storage.write([("alice", COUNT)])
                written += 1

        def read(_: int) -> None:
            for _ in range(5):
                storage.read(["alice"])

        end = time.monotonic() + _RACE
        while time.monotonic() < end:
            self.in_rounds([write, read, read, read, read], 20)

    def test_closing_leaks_no_other_error(self, storage: Storage) -> None:
        """Calls that run while another thread closes the storage complete, or raise an error.

        They raise ``UsageError``, or another error of this library, and never a driver's.
        """
        storage.write([("alice", Merge({}))])
        has_called = [threading.Event() for _ in range(4)]

        def call(number: int) -> None:
            try:
                while True:
                    if number % 2:
                        storage.read(["alice", "bob"])
                    else:
                        storage.write([("alice", COUNT), ("bob", Merge({"n": 1}))])
                    has_called[number].set()
            finally:
                has_called[number].set()

        threads = [self.start(partial(call, number)) for number in range(4)]
        for each in has_called:
            each.wait(self.timeout)
        with explained(_CLOSING):
            storage.close()
            for thread in threads:
                with pytest.raises(UserMetadataError):
                    thread.result()
        with pytest.raises(UsageError):
            storage.read(["alice"])

    def test_closing_in_the_middle_of_a_write(self, storage: Storage) -> None:
        """A write whose storage is closed while its change runs completes, or raises an error."""
        meanwhile = self.meanwhile(storage.close)

        def change(metadata: Metadata) -> Metadata:
            meanwhile()
            return {**metadata, "n": 1}

        def write() -> None:
            with contextlib.suppress(UserMetadataError):
                storage.write([("alice", Modify(change))])

        with explained(_CLOSING):
            self.in_thread(write)
            meanwhile.finish()
        with pytest.raises(UsageError):
            storage.read(["alice"])


def check_nothing_comes_between(
    suite: Suite, storage: Storage, other: Storage, *, row: bool
) -> None:
    """Change a user, and write other properties of the user while the change runs."""
    if row:
        storage.write([("alice", Merge({"old": 1}))])

    def write() -> None:
        other.write([("alice", Merge({"merged": 1}))])
        other.write([("alice", Modify(lambda metadata: {**metadata, "modified": 1}))])

    _change_while(suite, storage, write)
    expected = {"old": 1} if row else {}
    assert storage.read(["alice"]) == {
        "alice": {**expected, "mine": 1, "merged": 1, "modified": 1}
    }, "one of two writes that met is lost: the row was not locked, nor compared when it was stored"


def check_no_blind_write_comes_between(
    suite: Suite, storage: Storage, other: Storage, changes: Sequence[Change]
) -> None:
    """Change a user, and replace or remove the row while the change runs."""
    storage.write([("alice", Merge({"old": 1}))])

    def write() -> None:
        for each in changes:
            other.write([("alice", each)])

    _change_while(suite, storage, write)
    stored = storage.read(["alice"]).get("alice", {})
    assert "old" not in stored, (
        "what Replace or Clear had removed is there again: they have to wait for a lock like other"
        " writes, or a write that met them has to notice that the row is another one (a version"
        " must not begin anew)"
    )


def _change_while(suite: Suite, storage: Storage, write: Callable[[], object]) -> None:
    """Change alice, and call ``write`` in another thread while the change runs."""
    meanwhile = suite.meanwhile(write)

    def change(metadata: Metadata) -> Metadata:
        meanwhile()
        return {**metadata, "mine": 1}

    storage.write([("alice", Modify(change))])
    meanwhile.finish()


def check_every_user_is_locked(suite: Suite, storage: Storage, other: Storage, which: str) -> None:
    """Change two users, and write the second one while the first change runs."""
    storage.write([(user, Merge({"old": 1})) for user in ("alice", "bob")])
    meanwhile = suite.meanwhile(lambda: other.write([("bob", Merge({"other": 1}))]))

    def change(metadata: Metadata) -> Metadata:
        meanwhile()
        return {**metadata, "mine": 1}

    def mine(metadata: Metadata) -> Metadata:
        return {**metadata, "mine": 1}

    functions = [mine, change] if which == "the last user" else [change, mine]
    storage.write(list(zip(("alice", "bob"), map(Modify, functions), strict=True)))
    meanwhile.finish()
    assert storage.read(["alice", "bob"]) == {
        "alice": {"old": 1, "mine": 1},
        "bob": {"old": 1, "mine": 1, "other": 1},
    }, "a user of a write was not locked, nor compared when it was stored"


def check_nothing_counts_twice(suite: Suite, storage: Storage, other: Storage) -> None:
    """Count in a write that collides with another, so a storage without locks repeats it."""

    def add_ten(metadata: Metadata) -> Metadata:
        return {"n": metadata.get("n", 0) + 10}

    meanwhile = suite.meanwhile(
        lambda: other.write([("alice", Modify(add_ten)), ("bob", Modify(add_ten))])
    )

    def count(metadata: Metadata) -> Metadata:
        meanwhile()
        return {"n": metadata.get("n", 0) + 1}

    changes = [("alice", Modify(count)), ("alice", COUNT), ("bob", COUNT)]
    results = storage.write(changes)
    meanwhile.finish()
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 12}, "bob": {"n": 11}}, (
        "two writes that met count wrong: a write that is repeated has to begin with what is"
        " stored, not with the results of the attempt before"
    )
    assert results in (
        [{"n": 1}, {"n": 2}, {"n": 1}],
        [{"n": 11}, {"n": 12}, {"n": 11}],
    ), _RESULTS


def check_a_reader_sees_all_or_nothing(suite: Suite, storage: Storage, other: Storage) -> None:
    """Read two users during a write."""
    users = ["alice", "bob"]
    storage.write([(user_id, Merge({"n": 1})) for user_id in users])
    seen: list[dict[str, Metadata]] = []
    meanwhile = suite.meanwhile(lambda: seen.append(other.read(users)))

    def change(metadata: Metadata) -> Metadata:
        meanwhile()
        return {"n": 2}

    storage.write([("alice", Merge({"n": 2})), ("bob", Modify(change))])
    meanwhile.finish()
    both = ({user: {"n": 1} for user in users}, {user: {"n": 2} for user in users})
    assert seen[0] in both, _HALF


def check_functions_do_not_deadlock(suite: Suite, storage: Storage, other: Storage) -> None:
    """Begin two writes of the same users in opposite order, before either can end."""
    arrived = {"alice": threading.Event(), "bob": threading.Event()}

    def meeting(mine: str, theirs: str) -> Modify:
        def change(metadata: Metadata) -> Metadata:
            arrived[mine].set()
            # The event is not set if the storage makes the other write wait.
            arrived[theirs].wait(suite.moment)
            return {"n": metadata.get("n", 0) + 1}

        return Modify(change)

    writes: list[Callable[[], list[Metadata | None]]] = [
        lambda: storage.write([("alice", meeting("alice", "bob")), ("bob", COUNT)]),
        lambda: other.write([("bob", meeting("bob", "alice")), ("alice", COUNT)]),
        lambda: other.write([("bob", COUNT)]),
    ]
    with explained(_TOGETHER):
        results = [thread.result() for thread in [suite.start(write) for write in writes]]
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 2}, "bob": {"n": 3}}, _LOST
    with explained(_RESULTS):
        [_, first], [second, _], [third] = results
        assert sorted(each["n"] for each in (first, second, third) if each) == [1, 2, 3]


def check_orders_do_not_deadlock(
    suite: Suite, storage: Storage, other: Storage, change: Change
) -> None:
    """Write many users in both orders, and some of them alone, at the same time."""
    # No function of the test can hold up a Replace, so its writes have to be long to meet.
    number, rounds = (500, 5) if isinstance(change, Replace) else (20, 15)
    users = [f"user {each:03}" for each in range(number)]
    with explained(_TOGETHER):
        suite.in_rounds(
            [
                lambda _: storage.write([(user, change) for user in users]),
                lambda _: other.write([(user, change) for user in reversed(users)]),
                lambda _: storage.write([(users[-1], change), (users[0], change)]),
                lambda _: other.write([(users[-1], change)]),
            ],
            rounds,
        )
    last = storage.read([users[-1]])[users[-1]]
    assert last == ({"n": 4 * rounds} if change is COUNT else {"m": 1}), _LOST


def check_all_are_kept(suite: Suite, storages: list[Storage], number: int) -> None:
    """Count in one row and merge into another, with one thread for each of the storages."""

    def write(thread: int, storage: Storage) -> None:
        for each in range(number):
            storage.write([("alice", COUNT)])
            storage.write([("bob", Merge({f"{thread}:{each}": True}))])

    threads = [suite.start(partial(write, at, each)) for at, each in enumerate(storages)]
    with explained(_TOGETHER):
        for thread in threads:
            thread.result()
    assert storages[0].read(["alice"]) == {"alice": {"n": len(storages) * number}}, _LOST
    assert len(storages[0].read(["bob"])["bob"]) == len(storages) * number, _LOST


def check_first_merges_survive(suite: Suite, storage: Storage, other: Storage) -> None:
    """Merge into users without a row, in two threads at once."""
    with explained(_TOGETHER):
        suite.in_rounds(
            [
                lambda number: storage.write([(f"user {number}", Merge({"left": True}))]),
                lambda number: other.write([(f"user {number}", Merge({"right": True}))]),
            ],
            50,
        )
    found = storage.read([f"user {number}" for number in range(50)])
    assert list(found.values()) == [{"left": True, "right": True}] * 50, (
        f"{_LOST}, also for users without a row"
    )


def check_reads_are_of_one_moment(
    suite: Suite, storage: Storage, other: Storage, between: int
) -> None:
    """Read two users, the first and the last of many, who are written together all the time."""
    users = ["alice", *(f"absent {number}" for number in range(between)), "bob"]
    storage.write([(user_id, Merge({"n": 0})) for user_id in ("alice", "bob")])
    acknowledged = 0

    def write(number: int) -> None:
        nonlocal acknowledged
        other.write([(user_id, Merge({"n": number})) for user_id in ("alice", "bob")])
        acknowledged = number

    def read() -> None:
        last = acknowledged
        found = storage.read(users)
        assert found["alice"] == found["bob"], (
            "one read returned rows of two moments: several queries need one snapshot, and"
            " rows that are read one by one need a lock that excludes writers"
        )
        assert found["alice"]["n"] >= last, _CACHED

    call_while_writing(suite, write, read, {0: 100, 3000: 30}.get(between, 5))


def call_while_writing(
    suite: Suite, write: Callable[[int], object], call: Callable[[], object], times: int
) -> None:
    """Call repeatedly while another thread writes, until enough calls overlap with a write."""
    stop = threading.Event()
    written: list[int] = []

    def write_until_stopped() -> None:
        while not stop.is_set():
            write(len(written))
            written.append(len(written))

    writer = suite.start(write_until_stopped)
    called = met = 0
    try:
        # Each thread may run alone for a while; the threads have to take turns.
        while (called < times or met < min(times, _TURNS)) and writer.is_alive:
            before = len(written)
            call()
            called += 1
            met += before != len(written)
    finally:
        stop.set()
        writer.result()

"""The conformance suite for storages."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

_EXACT_VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2**53 + 1, -(2**63) - 1, 10**600),
    *(0.1, 1.0, -0.0, 5e-324, 1.7976931348623157e308, 1e22),
    *("", "1", "null", "\0", "\x7f\x80\u2028", "e\u0301 \u00e9", "\uffff", "\U0010ffff"),
    *([], {}, [[], {}], {"": 1, "\0": 2, "a.b": {"$c": []}}),
]
_USER_IDS = [
    "alice",
    "Alice",
    "alice ",
    " alice",
    "al%ce",
    "\u00e9",
    "e\u0301",
    "\U0010ffff",
    "x" * 255,
]


class StorageConformance:
    """A test for each promise of :class:`usermetadata.storage.Storage`; subclass it.

    The subclass has a fixture ``storage`` that yields an empty storage and closes it. pytest runs
    all of these tests over it.

    Example:
        The whole of a test file::

            class TestMyStorage(StorageConformance):
                @pytest.fixture
                def storage(self):
                    storage = MyStorage()
                    yield storage
                    storage.close()
    """

    # Absence.

    def test_a_user_without_a_row_is_absent(self, storage: Storage) -> None:
        """``read`` leaves out users without a row; a change gets ``None`` for them."""
        assert storage.read(["alice"]) == {}
        given: list[Metadata | None] = []
        storage.write([("alice", given.append)])
        assert given == [None]
        assert storage.read(["alice"]) == {}

    def test_an_empty_object_is_a_row(self, storage: Storage) -> None:
        """``{}`` is stored, read and given to a change as ``{}``."""
        assert storage.write([("alice", Merge({}))]) == [{}]
        assert storage.read(["alice"]) == {"alice": {}}
        given: list[Metadata | None] = []
        storage.write([("alice", given.append)])
        assert given == [{}]

    def test_none_removes_the_row(self, storage: Storage) -> None:
        """A change that returns ``None`` leaves no row, whether or not there was one."""
        storage.write([("alice", Merge({"n": 1}))])
        assert storage.write([("alice", Clear())]) == [None]
        assert storage.read(["alice"]) == {}
        assert storage.write([("alice", Clear())]) == [None]

    # Reading and writing.

    def test_read_takes_any_number_of_users(self, storage: Storage) -> None:
        """Zero ids, one, one twice and thousands of them are read alike."""
        user_ids = [f"user {number}" for number in range(2000)]
        storage.write([(user_id, Merge({"id": user_id})) for user_id in user_ids[::2]])
        assert storage.read([]) == {}
        assert storage.read(["user 0", "user 0"]) == {"user 0": {"id": "user 0"}}
        assert storage.read(user_ids) == {user_id: {"id": user_id} for user_id in user_ids[::2]}

    def test_merge_overwrites_root_properties(self, storage: Storage) -> None:
        """``Merge`` replaces whole values, drops root-level nulls and keeps nested ones."""
        storage.write([("alice", Replace({"a": {"x": 1}, "b": 2, "c": 3}))])
        update = {"a": {"y": None}, "b": None, "d": [None]}
        expected = {"a": {"y": None}, "c": 3, "d": [None]}
        assert storage.write([("alice", Merge(update))]) == [expected]
        assert storage.read(["alice"]) == {"alice": expected}

    def test_replace_forgets_what_was_there(self, storage: Storage) -> None:
        """``Replace`` stores its own properties only, root-level nulls left out."""
        storage.write([("alice", Merge({"a": 1}))])
        assert storage.write([("alice", Replace({"b": 2, "c": None}))]) == [{"b": 2}]
        assert storage.read(["alice"]) == {"alice": {"b": 2}}

    def test_modify_is_given_the_stored_metadata(self, storage: Storage) -> None:
        """``Modify`` stores ``function(metadata)``, with ``{}`` for a user without a row."""
        count = Modify(lambda metadata: {"n": metadata.get("n", 0) + 1})
        assert storage.write([("alice", count)]) == [{"n": 1}]
        assert storage.write([("alice", count)]) == [{"n": 2}]
        assert storage.read(["alice"]) == {"alice": {"n": 2}}

    def test_any_callable_is_a_change(self, storage: Storage) -> None:
        """A storage may recognise some changes, and calls all others."""
        storage.write([("alice", Merge({"n": 1}))])
        assert storage.write([("alice", lambda old: {"was": old})]) == [{"was": {"n": 1}}]
        assert storage.read(["alice"]) == {"alice": {"was": {"n": 1}}}

    def test_changes_apply_in_order(self, storage: Storage) -> None:
        """Each change sees the results of those before it, and has its own result."""
        changes: list[tuple[str, Change]] = [
            ("alice", Merge({"n": 1})),
            ("bob", Merge({"n": 5})),
            ("alice", Modify(lambda metadata: {"n": metadata.get("n", 0) + 1, "m": 0})),
            ("bob", Clear()),
            ("alice", Merge({"m": None})),
            ("bob", Merge({"again": True})),
        ]
        results = [{"n": 1}, {"n": 5}, {"n": 2, "m": 0}, None, {"n": 2}, {"again": True}]
        assert storage.write(changes) == results
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 2}, "bob": {"again": True}}

    def test_writing_nothing_is_nothing(self, storage: Storage) -> None:
        """``write([])`` returns ``[]``."""
        assert storage.write([]) == []

    # Exactness.

    @pytest.mark.parametrize("value", _EXACT_VALUES, ids=ascii)
    def test_values_come_back_exactly(self, storage: Storage, value: Any) -> None:
        """Integers of any size, floats bit for bit and all of Unicode survive storing."""
        metadata = {"": [value], "é.$": {"nested": value}}
        [written] = storage.write([("alice", Replace({**metadata, "root": value}))])
        found = storage.read(["alice"])["alice"]
        for stored in (written, found):
            expected = metadata if value is None else {**metadata, "root": value}
            assert _exactly(stored) == _exactly(expected)

    def test_large_objects_come_back_exactly(self, storage: Storage) -> None:
        """10,000 properties and 200 levels are stored like any others."""
        wide = {f"property {number}": number for number in range(10_000)}
        deep: dict[str, Any] = {}
        for _ in range(199):
            deep = {"deeper": deep}
        storage.write([("wide", Replace(wide)), ("deep", Replace(deep))])
        assert storage.read(["wide", "deep"]) == {"wide": wide, "deep": deep}

    def test_user_ids_are_told_apart(self, storage: Storage) -> None:
        """Case, blanks, wildcards and Unicode normalisation make different users."""
        storage.write([(user_id, Merge({"id": user_id})) for user_id in _USER_IDS])
        assert storage.read(_USER_IDS) == {user_id: {"id": user_id} for user_id in _USER_IDS}
        for user_id in _USER_IDS:
            assert storage.read([user_id]) == {user_id: {"id": user_id}}

    # Atomicity.

    @pytest.mark.parametrize("error", [LookupError("no such property"), KeyboardInterrupt()])
    def test_a_failing_change_undoes_the_whole_write(
        self, storage: Storage, error: BaseException
    ) -> None:
        """An exception of a change, or an interrupt, propagates unchanged; nothing is stored."""
        storage.write([("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))])

        def fail(old: Metadata | None) -> Metadata:
            raise error

        with pytest.raises(type(error)) as caught:
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
            _finish(_in_thread(lambda: storage.write([("alice", Merge({"m": 1}))])))
        assert storage.read(["alice"]) == {"alice": {"n": 1, "m": 1}}

    @pytest.mark.parametrize("row", [False, True], ids=["no row", "a row"])
    def test_no_write_comes_between(self, storage: Storage, *, row: bool) -> None:
        """A write that starts while a change runs is not lost, whether or not there is a row."""
        if row:
            storage.write([("alice", Merge({"old": 1}))])
        others: list[threading.Thread] = []

        def change(metadata: Metadata) -> Metadata:
            if not others:
                others.append(_in_thread(lambda: storage.write([("alice", Merge({"other": 1}))])))
                # It ends now only if the storage does not make it wait.
                others[0].join(_MOMENT)
            return {**metadata, "mine": 1}

        storage.write([("alice", Modify(change))])
        _finish(others[0])
        expected = {"old": 1} if row else {}
        assert storage.read(["alice"]) == {"alice": {**expected, "mine": 1, "other": 1}}

    def test_a_reader_sees_all_of_a_write_or_nothing(self, storage: Storage) -> None:
        """``read`` in the middle of a ``write`` returns the users as they were, or waits."""
        users = ["alice", "bob"]
        storage.write([(user_id, Merge({"n": 1})) for user_id in users])
        seen: list[dict[str, Metadata]] = []

        def change(metadata: Metadata) -> Metadata:
            readers.append(_in_thread(lambda: seen.append(storage.read(users))))
            readers[0].join(_MOMENT)
            return {"n": 2}

        readers: list[threading.Thread] = []
        storage.write([("alice", Merge({"n": 2})), ("bob", Modify(change))])
        _finish(readers[0])
        assert seen[0] in ({user: {"n": 1} for user in users}, {user: {"n": 2} for user in users})

    # Threads.

    def test_any_thread_may_use_the_storage(self, storage: Storage) -> None:
        """One thread reads what another has written; a third may call ``close``."""
        seen: list[dict[str, Metadata]] = []
        _finish(_in_thread(lambda: storage.write([("alice", Merge({"n": 1}))])))
        _finish(_in_thread(lambda: seen.append(storage.read(["alice"]))))
        assert seen == [{"alice": {"n": 1}}]
        _finish(_in_thread(storage.close))
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
        """Eight threads that count in one row, and merge into another, lose nothing."""
        count = Modify(lambda metadata: {"n": metadata.get("n", 0) + 1})

        def write(thread: int) -> None:
            for number in range(25):
                storage.write([("alice", count)])
                storage.write([("bob", Merge({f"{thread}:{number}": True}))])

        threads = [_in_thread(partial(write, thread)) for thread in range(8)]
        for thread in threads:
            _finish(thread)
        assert storage.read(["alice"]) == {"alice": {"n": 200}}
        assert len(storage.read(["bob"])["bob"]) == 8 * 25

    def test_two_first_merges_both_survive(self, storage: Storage) -> None:
        """Two threads that merge at once into a user without a row lose nothing."""
        start = threading.Barrier(2)

        def merge(name: str) -> None:
            for number in range(50):
                start.wait(_LONG)
                storage.write([(f"user {number}", Merge({name: True}))])

        threads = [_in_thread(partial(merge, name)) for name in ("left", "right")]
        for thread in threads:
            _finish(thread)
        found = storage.read([f"user {number}" for number in range(50)])
        assert list(found.values()) == [{"left": True, "right": True}] * 50

    def test_a_read_is_of_one_moment(self, storage: Storage) -> None:
        """A reader never sees only one change of two users that are always written together."""
        users = ["alice", "bob"]
        storage.write([(user_id, Merge({"n": 0})) for user_id in users])

        stop = threading.Event()

        def write() -> None:
            for number in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                storage.write([(user_id, Merge({"n": number})) for user_id in users])

        writer = _in_thread(write)
        try:
            for _ in range(100):
                found = storage.read(users)
                assert found["alice"] == found["bob"]
        finally:
            stop.set()
            _finish(writer)

    def test_a_storage_that_never_waits_does_not_block(self, storage: Storage) -> None:
        """What ``reads_in_flight`` or ``writes_in_flight`` of 0 promises: no call gives way."""
        calls: list[Callable[[], object]] = []
        if getattr(storage, "reads_in_flight", 1) == 0:
            calls.append(lambda: storage.read(["alice"]))
        if getattr(storage, "writes_in_flight", 1) == 0:
            calls.append(lambda: storage.write([("alice", Merge({"n": 1}))]))
        if not calls:
            pytest.skip("the storage may wait")
        storage.write([("alice", Merge({"n": 0}))])
        for call in calls:
            # The system may interrupt any thread, and a short wait may be over before it begins.
            waits = statistics.median(_waits(call) for _ in range(21))
            assert waits == 0, "it waits, on the event loop"

    # Ownership.

    def test_what_appears_twice_is_two(self, storage: Storage) -> None:
        """One list in two places comes back as two lists, as JSON has it."""
        tags = ["a"]
        storage.write([("alice", Replace({"old": tags, "new": tags}))])
        found = storage.read(["alice"])["alice"]
        found["new"].append("b")
        assert found == {"old": ["a"], "new": ["a", "b"]}

    def test_what_read_returns_is_the_callers(self, storage: Storage) -> None:
        """Changing them, however deep, changes nothing stored."""
        storage.write([("alice", Merge({"list": [1], "object": {"n": 1}}))])
        _spoil(storage.read(["alice"])["alice"])
        assert storage.read(["alice"]) == {"alice": {"list": [1], "object": {"n": 1}}}

    def test_what_write_returns_is_the_callers(self, storage: Storage) -> None:
        """Changing them, however deep, changes nothing stored."""
        storage.write([("alice", Merge({"list": [1]}))])
        for change in (Merge({"object": {"n": 1}}), Modify(lambda metadata: metadata)):
            [written] = storage.write([("alice", change)])
            assert written is not None
            _spoil(written)
        assert storage.read(["alice"]) == {"alice": {"list": [1], "object": {"n": 1}}}

    def test_results_share_nothing(self, storage: Storage) -> None:
        """Changing one result of a write, however deep, changes no other."""
        first, second = storage.write(
            [("alice", Merge({"list": [1], "object": {"n": 1}})), ("alice", Merge({"m": 1}))]
        )
        assert first is not None
        _spoil(first)
        assert second == {"list": [1], "object": {"n": 1}, "m": 1}

    def test_what_a_change_returned_is_its_own(self, storage: Storage) -> None:
        """Changing an update or a change's result after ``write`` changes nothing stored."""
        update: Metadata = {"list": [1], "object": {"n": 1}}
        storage.write(
            [("alice", Merge(update)), ("bob", Replace(update)), ("carol", lambda _: update)]
        )
        _spoil(update)
        expected = {"list": [1], "object": {"n": 1}}
        assert storage.read(["alice", "bob", "carol"]) == {
            "alice": expected,
            "bob": expected,
            "carol": expected,
        }

    def test_what_a_change_is_given_is_its_own(self, storage: Storage) -> None:
        """A change may alter its argument and fail, and nothing is stored."""
        storage.write([("alice", Merge({"list": [1], "object": {"n": 1}}))])

        def spoil_and_fail(old: Metadata | None) -> Metadata:
            assert old is not None
            _spoil(old)
            raise LookupError

        with pytest.raises(LookupError):
            storage.write([("alice", spoil_and_fail)])
        assert storage.read(["alice"]) == {"alice": {"list": [1], "object": {"n": 1}}}

    # Apps.

    def test_apps_never_see_each_others_rows(self, storage: Storage) -> None:
        """Reading, writing and clearing in one app leaves the same user of another alone."""
        other = storage.for_app("other")
        storage.write([("alice", Merge({"app": "public"}))])
        assert other.read(["alice"]) == {}
        assert other.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        assert storage.read(["alice"]) == {"alice": {"app": "public"}}
        storage.write([("alice", Clear())])
        assert other.read(["alice"]) == {"alice": {"n": 1}}

    def test_apps_are_told_apart(self, storage: Storage) -> None:
        """App ids are compared character by character, and apart from the user id."""
        rows = [("a", "bc"), ("ab", "c"), ("A", "bc"), ("a ", "bc"), ("é", "bc"), ("e\u0301", "bc")]
        for app_id, user_id in rows:
            storage.for_app(app_id).write([(user_id, Merge({"row": [app_id, user_id]}))])
        for app_id, user_id in rows:
            found = storage.for_app(app_id).read([user_id])
            assert found == {user_id: {"row": [app_id, user_id]}}

    def test_an_app_is_found_again(self, storage: Storage) -> None:
        """``for_app`` of the same id is the same rows; a storage starts as ``"public"``."""
        storage.write([("alice", Merge({"app": "public"}))])
        other = storage.for_app("other")
        other.write([("alice", Merge({"app": "other"}))])
        assert storage.for_app("other").read(["alice"]) == {"alice": {"app": "other"}}
        assert other.for_app("public").read(["alice"]) == {"alice": {"app": "public"}}

    def test_an_app_id_is_checked(self, storage: Storage) -> None:
        """``for_app`` refuses an app id that is not valid."""
        for app_id in ("", "a" * 65, "a\0"):
            with pytest.raises(InvalidInputError, match="app_id"):
                storage.for_app(app_id)

    # Closing.

    @pytest.mark.parametrize("which", ["the first", "the other"])
    def test_a_closed_storage_says_so(self, storage: Storage, which: str) -> None:
        """After ``close``, which may be called twice, reads and writes raise for every app."""
        other = storage.for_app("other")
        storage.write([("alice", Merge({"n": 1}))])
        closing = storage if which == "the first" else other
        closing.close()
        closing.close()
        for closed in (storage, other):
            with pytest.raises(UsageError):
                closed.read(["alice"])
            with pytest.raises(UsageError):
                closed.write([("alice", Merge({"n": 2}))])


# Seconds that a thread gets in which a faulty storage would not make it wait.
_MOMENT = 0.2
# Seconds after which a thread counts as stuck.
_LONG = 60.0


def _exactly(value: Any) -> str:
    """Return a text that differs where ``==`` sees no difference, as between 1 and 1.0."""
    return json.dumps(value, sort_keys=True)


def _waits(call: Callable[[], object]) -> int:
    """Return how often a call gave up the processor, as for a disk, a network or another thread."""
    try:
        import resource

        thread = resource.RUSAGE_THREAD
    except (ImportError, AttributeError):
        pytest.skip("this system does not count the waits of a thread")
    before = resource.getrusage(thread).ru_nvcsw
    call()
    return resource.getrusage(thread).ru_nvcsw - before


def _in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def _finish(thread: threading.Thread) -> None:
    thread.join(_LONG)
    assert not thread.is_alive(), "a thread waits forever"


def _spoil(metadata: Metadata) -> None:
    metadata["list"].append("spoilt")
    metadata["object"]["n"] = "spoilt"
    metadata["spoilt"] = True

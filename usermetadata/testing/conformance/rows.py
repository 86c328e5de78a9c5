"""Absence, reading and writing, ownership of objects, and closing."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

import pytest

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import UsageError
from usermetadata.testing.conformance.suite import COUNT, Suite, explained, spoil, with_many_users

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage


class RowConformance(Suite):
    """The behaviour of one storage in one thread."""

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

    @with_many_users
    def test_read_takes_any_number_of_users(self, storage: Storage) -> None:
        """``read`` takes no ids, one, the same id twice, thousands, and 100,000 ids."""
        user_ids = [f"user {number}" for number in range(2000)]
        storage.write([(user_id, Merge({"id": user_id})) for user_id in user_ids[::2]])
        assert storage.read([]) == {}
        assert storage.read(["user 0", "user 0"]) == {"user 0": {"id": "user 0"}}
        assert storage.read(user_ids) == {user_id: {"id": user_id} for user_id in user_ids[::2]}
        absent = [f"absent {number}" for number in range(100_000)]
        with explained("It was raised by a read of 100,002 ids."):
            found = storage.read(["user 0", *absent, "user 2"])
        assert found == {user_id: {"id": user_id} for user_id in ("user 0", "user 2")}

    @with_many_users
    def test_write_takes_any_number_of_users(self, storage: Storage) -> None:
        """A write of 35,000 users is one write."""
        absent = [f"absent {number}" for number in range(35_000)]
        storage.write([("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))])
        users = ["alice", *absent, "bob"]
        with explained("It was raised by a write of 35,002 users."):
            results = storage.write([(user, _count_if_there) for user in users])
        assert results == [{"n": 2}, *[None] * len(absent), {"n": 2}]
        assert storage.read(users) == {"alice": {"n": 2}, "bob": {"n": 2}}

    def test_merge_overwrites_root_properties(self, storage: Storage) -> None:
        """``Merge`` replaces whole values, drops root-level nulls and keeps nested ones."""
        storage.write([("alice", Replace({"a": {"x": 1}, "b": 2, "c": 3}))])
        update = {"a": {"y": None}, "b": None, "d": [None]}
        expected = {"a": {"y": None}, "c": 3, "d": [None]}
        assert storage.write([("alice", Merge(update))]) == [expected]
        assert storage.read(["alice"]) == {"alice": expected}

    def test_replace_forgets_what_was_there(self, storage: Storage) -> None:
        """``Replace`` stores only its own properties, without root-level nulls."""
        storage.write([("alice", Merge({"a": 1}))])
        assert storage.write([("alice", Replace({"b": 2, "c": None}))]) == [{"b": 2}]
        assert storage.read(["alice"]) == {"alice": {"b": 2}}

    def test_modify_is_given_the_stored_metadata(self, storage: Storage) -> None:
        """``Modify`` stores ``function(metadata)``, with ``{}`` for a user without a row."""
        assert storage.write([("alice", COUNT)]) == [{"n": 1}]
        assert storage.write([("alice", COUNT)]) == [{"n": 2}]
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

    # Ownership.

    def test_what_appears_twice_is_two(self, storage: Storage) -> None:
        """One list in two places comes back as two lists, as in JSON."""
        tags = ["a"]
        storage.write([("alice", Replace({"old": tags, "new": tags}))])
        found = storage.read(["alice"])["alice"]
        found["new"].append("b")
        assert found == {"old": ["a"], "new": ["a", "b"]}

    def test_what_read_returns_is_the_callers(self, storage: Storage) -> None:
        """Changing results at any depth does not change what is stored."""
        storage.write([("alice", Merge({"list": [1], "object": {"n": 1}}))])
        spoil(storage.read(["alice"])["alice"])
        assert storage.read(["alice"]) == {"alice": {"list": [1], "object": {"n": 1}}}

    def test_what_write_returns_is_the_callers(self, storage: Storage) -> None:
        """Changing results at any depth does not change what is stored."""
        storage.write([("alice", Merge({"list": [1]}))])
        for change in (Merge({"object": {"n": 1}}), Modify(lambda metadata: metadata)):
            [written] = storage.write([("alice", change)])
            assert written is not None
            spoil(written)
        assert storage.read(["alice"]) == {"alice": {"list": [1], "object": {"n": 1}}}

    def test_results_share_nothing(self, storage: Storage) -> None:
        """Changing one result of a write at any depth does not change another result."""
        first, second = storage.write(
            [("alice", Merge({"list": [1], "object": {"n": 1}})), ("alice", Merge({"m": 1}))]
        )
        assert first is not None
        spoil(first)
        assert second == {"list": [1], "object": {"n": 1}, "m": 1}

    def test_what_a_change_returned_is_its_own(self, storage: Storage) -> None:
        """Changing an update or a change's result after ``write`` does not change the row."""
        update: Metadata = {"list": [1], "object": {"n": 1}}
        storage.write(
            [("alice", Merge(update)), ("bob", Replace(update)), ("carol", lambda _: update)]
        )
        spoil(update)
        expected = {"list": [1], "object": {"n": 1}}
        assert storage.read(["alice", "bob", "carol"]) == {
            "alice": expected,
            "bob": expected,
            "carol": expected,
        }

    def test_what_a_change_is_given_is_its_own(self, storage: Storage) -> None:
        """If a change alters its argument and then fails, nothing is stored."""
        storage.write([("alice", Merge({"list": [1], "object": {"n": 1}}))])

        def spoil_and_fail(old: Metadata | None) -> Metadata:
            assert old is not None
            spoil(old)
            raise LookupError

        with pytest.raises(LookupError):
            storage.write([("alice", spoil_and_fail)])
        assert storage.read(["alice"]) == {"alice": {"list": [1], "object": {"n": 1}}}

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

    def test_a_storage_may_be_closed_before_its_first_call(self, storage: Storage) -> None:
        """It is then closed like any other, and no longer opens anything."""
        storage.close()
        with pytest.raises(UsageError):
            storage.read(["alice"])
        with pytest.raises(UsageError):
            storage.write([("alice", Merge({}))])

    # Waiting.

    def test_a_storage_that_never_waits_does_not_block(self, storage: Storage) -> None:
        """If ``reads_in_flight`` or ``writes_in_flight`` is 0, no such call waits."""
        calls: list[Callable[[], object]] = []
        if getattr(storage, "reads_in_flight", 1) == 0:
            calls.append(lambda: storage.read(["alice"]))
        if getattr(storage, "writes_in_flight", 1) == 0:
            calls.append(lambda: storage.write([("alice", Merge({"n": 1}))]))
        if not calls:
            pytest.skip("the storage may wait: neither reads_in_flight nor writes_in_flight is 0")
        storage.write([("alice", Merge({"n": 0}))])
        for call in calls:
            assert not _waits(call), "it waits, on the event loop"

    def test_for_app_does_not_block(self, storage: Storage) -> None:
        """``for_app`` is called on event loops, and waits for no disk and no network."""
        names = (f"app {number}" for number in itertools.count())
        waits = _waits(lambda: storage.for_app(next(names)))
        assert not waits, "for_app waits, on the event loop: connect or create tables later"


def _count_if_there(old: Metadata | None) -> Metadata | None:
    return None if old is None else COUNT(old)


def _waits(call: Callable[[], object]) -> bool:
    """Tell whether a call waits, for example for a disk, a network or another thread."""
    try:
        import resource

        thread = resource.RUSAGE_THREAD
    except (ImportError, AttributeError):
        pytest.skip("this system does not count the waits of a thread")
    counts: list[int] = []
    for _ in range(21):
        before = resource.getrusage(thread).ru_nvcsw
        call()
        counts.append(resource.getrusage(thread).ru_nvcsw - before)
    # The system may interrupt any thread, and a short wait may end before the thread sleeps.
    return statistics.median(counts) > 0

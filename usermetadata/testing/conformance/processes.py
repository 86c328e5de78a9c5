"""Two storages with the same rows, as in two processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from usermetadata.changes import Clear, Merge, Replace
from usermetadata.exceptions import UsageError
from usermetadata.testing.conformance.atomicity import (
    BLIND_WRITES,
    IN_OPPOSITE_ORDER,
    ROW_OR_NOT,
    WHICH_USER,
    check_a_reader_sees_all_or_nothing,
    check_all_are_kept,
    check_every_user_is_locked,
    check_first_merges_survive,
    check_functions_do_not_deadlock,
    check_no_blind_write_comes_between,
    check_nothing_comes_between,
    check_nothing_counts_twice,
    check_orders_do_not_deadlock,
    check_reads_are_of_one_moment,
)
from usermetadata.testing.conformance.suite import COUNT, Suite, with_many_users

if TYPE_CHECKING:
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage


class ProcessConformance(Suite):
    """The behaviour of two storages with the same rows."""

    def test_a_second_storage_reads_what_was_acknowledged(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """Each storage reads the other's writes, regardless of its earlier reads."""
        changes: list[Change] = [Merge({"n": 1}), Merge({"m": 2}), Replace({"n": 3}), Clear()]
        changes += [COUNT, COUNT]
        users = ["alice", "bob"]
        stored: dict[str, Metadata] = {}
        for number, change in enumerate(changes * 2):
            writer, reader = (storage, second_storage) if number % 2 else (second_storage, storage)
            for each in (writer, reader):
                assert each.read(users) == stored
                assert each.read(["alice"]) == {
                    user: stored[user] for user in stored.keys() & {"alice"}
                }
            results = writer.write([(user, change) for user in users])
            rows = zip(users, results, strict=True)
            stored = {user: row for user, row in rows if row is not None}
            for each in (reader, writer):
                assert each.read(users) == stored, (
                    "a storage does not read what another has written: does it keep rows, or a"
                    " snapshot, from an earlier call?"
                )

    def test_a_second_storage_has_the_same_apps(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """An app has the same rows in both storages."""
        storage.for_app("shop").write([("alice", Merge({"n": 1}))])
        assert second_storage.read(["alice"]) == {}
        assert second_storage.for_app("shop").read(["alice"]) == {"alice": {"n": 1}}

    def test_each_change_is_given_what_the_other_storage_wrote(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """Storages that count in turn lose no write, regardless of their earlier reads."""
        for _ in range(5):
            for each in (storage, second_storage):
                each.read(["alice"])
                each.write([("alice", COUNT), ("bob", COUNT)])
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 10}, "bob": {"n": 10}}

    @ROW_OR_NOT
    def test_no_write_of_a_second_storage_comes_between(
        self, storage: Storage, second_storage: Storage, *, row: bool
    ) -> None:
        """A write of the second storage during a change is not lost, with a row or without."""
        check_nothing_comes_between(self, storage, second_storage, row=row)

    @pytest.mark.parametrize("changes", BLIND_WRITES.values(), ids=BLIND_WRITES)
    def test_no_blind_write_of_a_second_storage_comes_between(
        self, storage: Storage, second_storage: Storage, changes: list[Change]
    ) -> None:
        """The same applies to ``Replace`` and ``Clear`` of the second storage."""
        check_no_blind_write_comes_between(self, storage, second_storage, changes)

    @WHICH_USER
    def test_every_user_is_locked_for_a_second_storage(
        self, storage: Storage, second_storage: Storage, which: str
    ) -> None:
        """A write of the second storage during a write of several users is not lost."""
        check_every_user_is_locked(self, storage, second_storage, which)

    def test_a_change_that_meets_a_second_storage_starts_anew(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """A repeated write reads the rows again, so nothing counts twice."""
        check_nothing_counts_twice(self, storage, second_storage)

    def test_a_second_storage_sees_all_of_a_write_or_nothing(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """A ``read`` of the second storage during a ``write`` returns old metadata, or waits."""
        check_a_reader_sees_all_or_nothing(self, storage, second_storage)

    def test_two_storages_do_not_deadlock(self, storage: Storage, second_storage: Storage) -> None:
        """They can write ``[a, b]``, ``[b, a]`` and ``[b]`` at the same time, with functions."""
        check_functions_do_not_deadlock(self, storage, second_storage)

    @IN_OPPOSITE_ORDER
    def test_two_storages_do_not_deadlock_with_many_users(
        self, storage: Storage, second_storage: Storage, change: Change
    ) -> None:
        """The same applies to many users that are written again and again."""
        check_orders_do_not_deadlock(self, storage, second_storage, change)

    def test_writes_of_two_storages_are_all_kept(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """Four threads with two storages count in one row and merge into another."""
        check_all_are_kept(self, [storage, second_storage] * 2, 25)

    def test_first_merges_of_two_storages_both_survive(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """If both merge into a user without a row at once, no write is lost."""
        check_first_merges_survive(self, storage, second_storage)

    @with_many_users
    @pytest.mark.parametrize("between", [0, 3000, 70_000])
    def test_a_read_is_of_one_moment_of_a_second_storage(
        self, storage: Storage, second_storage: Storage, between: int
    ) -> None:
        """A reader never sees half of a write of the second storage, even among many users."""
        check_reads_are_of_one_moment(self, storage, second_storage, between)

    def test_a_failed_write_leaves_nothing_locked_for_a_second_storage(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """A change that raised leaves nothing locked for other storages."""

        def fail(metadata: Metadata | None) -> Metadata:
            raise LookupError

        storage.write([("alice", Merge({"n": 1}))])
        for user in ("alice", "bob"):
            with pytest.raises(LookupError):
                storage.write([(user, fail)])
            self.in_thread(lambda user=user: second_storage.write([(user, Merge({"m": 1}))]))  # type: ignore[misc]
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 1, "m": 1}, "bob": {"m": 1}}

    def test_closing_one_storage_leaves_the_second_open(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """Writes of the closed storage are stored, and the second one continues to work."""
        second_storage.read(["alice"])
        storage.write([("alice", Merge({"n": 1}))])
        storage.close()
        assert second_storage.read(["alice"]) == {"alice": {"n": 1}}
        assert second_storage.write([("alice", COUNT)]) == [{"n": 2}]
        with pytest.raises(UsageError):
            storage.read(["alice"])

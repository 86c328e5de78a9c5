"""Finding users by their metadata, for a storage that is an ``IndexedStorage``."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError, NotUniqueError, UsageError
from usermetadata.storage import IndexedStorage
from usermetadata.testing.conformance.atomicity import call_while_writing
from usermetadata.testing.conformance.listing import check_pages_while_others_write, pages_of
from usermetadata.testing.conformance.suite import Suite, spoil

if TYPE_CHECKING:
    from collections.abc import Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

# Each value differs from every other, in type or in text.
_VALUES: list[Any] = [
    *(0, 1, -1, True, False, "0", "1", "true", "True", "", " ", "1.0", "null", '"1"', "'", "%"),
    *(2**53, 2**53 + 1, 2**63, 10**100, 10**100 + 1, str(2**53)),
    *("a", "A", "a ", "\u00e9", "e\u0301", "\U0001f600", "\U0001f601"),
    *("a:b", "\x1f", "ss", "\u00df"),
    *("x" * 254 + "a", "x" * 254 + "b", "\U0001f600" * 255),
]
_NOT_INDEXED: list[Any] = [1.0, [], {}, "x" * 256, "\0"]
_WRITES: list[type[Merge | Replace]] = [Merge, Replace]


class FindingConformance(Suite):
    """``find``, ``count`` and unique values.

    The storage declares the suite's ``indexes``.
    """

    # Values.

    @pytest.mark.parametrize("name", ["plan", "customer"])
    def test_values_differ_in_type_and_text(self, storage: Storage, name: str) -> None:
        """``1``, ``True`` and ``"1"`` differ, as do similar texts, with both kinds of index."""
        indexed = self._indexed(storage)
        rows = {f"user {at:02}": {name: value} for at, value in enumerate(_VALUES)}
        storage.write([(user, Replace(metadata)) for user, metadata in rows.items()])
        for user, metadata in rows.items():
            found = indexed.find(metadata, "", 10)
            where = f"users with {metadata[name]!a}: are different values taken for the same?"
            assert ascii(found) == ascii({user: metadata}), where
            assert indexed.count(metadata) == 1, where
        assert indexed.find({name: "unknown"}, "", 10) == {}

    @pytest.mark.parametrize("value", _NOT_INDEXED, ids=["float", "list", "dict", "long", "U+0000"])
    def test_what_cannot_be_indexed_is_refused(self, storage: Storage, value: Any) -> None:
        """The write raises ``InvalidInputError``, and the whole ``write`` stores nothing."""
        self._indexed(storage)
        for name in ("plan", "customer"):
            for change in (
                Merge({name: value}),
                Replace({name: value}),
                Modify(lambda _, name=name: {name: value}),  # type: ignore[misc]
            ):
                with pytest.raises(InvalidInputError):
                    storage.write([("alice", Merge({"n": 1})), ("bob", change)])
        assert storage.read(["alice", "bob"]) == {}

    def test_every_property_has_to_match(self, storage: Storage) -> None:
        """Properties without an index are also compared, in type and value."""
        indexed = self._indexed(storage)
        rows: dict[str, Metadata] = {
            "a": {"plan": "pro", "n": 1},
            "b": {"plan": "pro", "n": True},
            "c": {"plan": "pro", "n": "1"},
            "d": {"plan": "free", "n": 1},
            "e": {"plan": "pro", "n": 1, "customer": 5},
            "f": {"plan": "pro"},
        }
        storage.write([(user, Replace(metadata)) for user, metadata in rows.items()])
        assert [*indexed.find({"plan": "pro", "n": 1}, "", 10)] == ["a", "e"]
        assert [*indexed.find({"n": True, "plan": "pro"}, "", 10)] == ["b"]
        assert [*indexed.find({"plan": "pro", "customer": 5}, "", 10)] == ["e"]
        assert [*indexed.find({"plan": "pro", "n": 1}, "a", 1)] == ["e"]
        assert indexed.count({"plan": "pro", "n": 1}) == 2
        assert indexed.count({"plan": "free", "customer": 5}) == 0

    def test_a_user_is_found_by_what_is_stored(self, storage: Storage) -> None:
        """Each kind of change moves the user from the old value to the new one."""
        indexed = self._indexed(storage)
        changes: list[tuple[Change, str | None]] = [
            (Merge({"plan": "a"}), "a"),
            (Merge({"n": 1}), "a"),
            (Merge({"plan": "b"}), "b"),
            (Replace({"plan": "c"}), "c"),
            (Modify(lambda old: {**old, "plan": "d"}), "d"),
            (Merge({"plan": None}), None),
            (lambda _: {"plan": "e"}, "e"),
            (Replace({}), None),
            (Merge({"plan": "f"}), "f"),
            (Clear(), None),
        ]
        for change, plan in changes:
            storage.write([("alice", change)])
            for each in "abcdef":
                number = int(each == plan)
                assert (
                    len(indexed.find({"plan": each}, "", 10)),
                    indexed.count({"plan": each}),
                ) == (
                    number,
                    number,
                ), f"users with plan {each!r} after {change}; stored is {plan!r}"

    def test_users_are_counted(self, storage: Storage) -> None:
        """Without properties, ``count`` returns the number of users of the app."""
        indexed = self._indexed(storage)
        assert (indexed.count(None), indexed.count({"plan": "pro"})) == (0, 0)
        storage.write([(f"{at}", Merge({"plan": "pro"} if at % 2 else {})) for at in range(10)])
        storage.write([("0", Clear()), ("absent", Clear())])
        assert (indexed.count(None), indexed.count({"plan": "pro"})) == (9, 5)

    # Pages, moments and apps.

    def test_pages_of_found_users_follow_the_listing(self, storage: Storage) -> None:
        """Pages are in the order of ``read_after`` and have each user once."""
        indexed = self._indexed(storage)
        ids = ["a", "B", "\u00e9", "z", "\uffff", "\U0001f600", "10", "9", "a b", "'"]
        storage.write([(user, Merge({"plan": "pro"})) for user in ids])
        pages = pages_of(lambda after: indexed.find({"plan": "pro"}, after, 3))
        assert max(map(len, pages)) <= 3
        found = [user for page in pages for user in page]
        assert ascii(found) == ascii([*indexed.read_after("", 100)])

    def test_finding_misses_no_user_while_others_write(self, storage: Storage) -> None:
        """Users who match all the time are on exactly one page while others change."""
        indexed = self._indexed(storage)
        check_pages_while_others_write(
            storage, lambda after: indexed.find({"plan": "pro"}, after, 7)
        )

    def test_what_is_found_is_of_one_moment(self, storage: Storage) -> None:
        """If two users always change together, a page has both changes or neither."""
        indexed = self._indexed(storage)
        users = ["alice", "bob"]
        storage.write([(user, Merge({"plan": "pro"})) for user in users])

        def write(number: int) -> None:
            plan = ("free", "pro")[number % 2]
            storage.write([(user, Merge({"plan": plan})) for user in users])

        def find() -> None:
            found = indexed.find({"plan": "pro"}, "", 10)
            assert [*found.values()] in ([], [{"plan": "pro"}] * 2)
            assert indexed.count({"plan": "free"}) in {0, 2}

        call_while_writing(self, write, find, 50)

    def test_an_app_finds_its_own_users(self, storage: Storage) -> None:
        """An app finds and counts its own users, and a value is unique within an app."""
        indexed = self._indexed(storage)
        shop = indexed.for_app("shop")
        storage.write([("alice", Merge({"plan": "pro", "customer": 1}))])
        shop.write([("bob", Merge({"plan": "pro", "customer": 1})), ("carol", Merge({}))])
        assert indexed.find({"plan": "pro"}, "", 10).keys() == {"alice"}
        assert shop.find({"customer": 1}, "", 10).keys() == {"bob"}
        assert (indexed.count(None), shop.count(None), shop.count({"plan": "pro"})) == (1, 2, 1)

    def test_what_was_found_is_the_callers(self, storage: Storage) -> None:
        """Changing results at any depth does not change what is stored."""
        indexed = self._indexed(storage)
        metadata = {"plan": "pro", "list": [1], "object": {"n": 1}}
        storage.write([("alice", Merge(metadata))])
        spoil(indexed.find({"plan": "pro"}, "", 10)["alice"])
        assert indexed.find({"plan": "pro"}, "", 10) == {"alice": metadata}

    # Uniqueness.

    def test_a_value_belongs_to_one_user(self, storage: Storage) -> None:
        """Giving it to a second user is an error that names the property; nothing is stored."""
        indexed = self._indexed(storage)
        storage.write([("alice", Merge({"customer": 1})), ("bob", Merge({"customer": 2}))])
        changes: list[Change] = [
            Merge({"customer": 1}),
            Replace({"customer": 1}),
            Modify(lambda old: {**old, "customer": 1}),
        ]
        for change in changes:
            for user in ("bob", "carol"):
                with pytest.raises(NotUniqueError) as caught:
                    storage.write([("dave", Merge({"n": 1})), (user, change)])
                assert caught.value.name == "customer"
                assert caught.value.user_id in {"alice", None}
        with pytest.raises(NotUniqueError):
            storage.write([("dave", Merge({"customer": 3})), ("erin", Merge({"customer": 3}))])
        assert indexed.read_after("", 10) == {"alice": {"customer": 1}, "bob": {"customer": 2}}
        storage.write([("alice", Merge({"customer": 1, "n": 1})), ("carol", Merge({}))])
        storage.write([("alice", Clear())])
        storage.write([("bob", Merge({"customer": 1}))])
        assert indexed.find({"customer": 1}, "", 10).keys() == {"bob"}

    def test_only_the_end_of_a_write_counts(self, storage: Storage) -> None:
        """Users can exchange values in one write, in any order."""
        indexed = self._indexed(storage)
        start = {"alice": 1, "bob": 2, "carol": 3}
        writes: list[Sequence[tuple[str, Change]]] = [
            [("alice", Merge({"customer": 2})), ("bob", Merge({"customer": 1}))],
            [("carol", Merge({"customer": 1})), ("alice", Clear())],
            [("carol", Merge({"customer": 1})), ("alice", Merge({"customer": None}))],
            [("carol", Merge({"customer": 1})), ("carol", Merge({"customer": 9}))],
            [(user, Merge({"customer": at % 3 + 1})) for user, at in start.items()],
        ]
        for changes in writes:
            storage.write([(user, Replace({"customer": each})) for user, each in start.items()])
            results = storage.write(changes)
            ends = dict(zip([user for user, _ in changes], results, strict=True))
            assert storage.read([*ends]) == {
                user: row for user, row in ends.items() if row is not None
            }
            for number in (1, 2, 3, 9):
                found = indexed.find({"customer": number}, "", 10)
                assert len(found) <= 1
                assert found == {
                    user: metadata
                    for user, metadata in indexed.read_after("", 10).items()
                    if metadata.get("customer") == number
                }

    def test_threads_race_for_a_value(self, storage: Storage) -> None:
        """If several threads claim the same value at once, exactly one gets it."""
        self._race([self._indexed(storage)] * 4)

    def test_two_storages_race_for_a_value(self, storage: Storage, second_storage: Storage) -> None:
        """The same applies to two processes."""
        self._indexed(storage)
        self._race([storage, second_storage] * 2)

    def test_a_second_storage_finds_what_was_acknowledged(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """A user is found by the currently stored values, regardless of earlier results."""
        indexed, second = self._indexed(storage), self._indexed(second_storage)
        for number in range(3):
            for writer, reader in ((indexed, second), (second, indexed)):
                for plan, users in (("pro", {"alice"}), ("free", set[str]())):
                    writer.write([("alice", Merge({"plan": plan, "n": number}))])
                    assert reader.find({"plan": "pro"}, "", 10).keys() == users
                    assert reader.count({"plan": "pro"}) == len(users)

    def test_a_closed_storage_finds_no_user(self, storage: Storage) -> None:
        """After ``close``, finding and counting raise ``UsageError``."""
        indexed = self._indexed(storage)
        storage.write([("alice", Merge({"plan": "pro"}))])
        storage.close()
        with pytest.raises(UsageError):
            indexed.find({"plan": "pro"}, "", 10)
        with pytest.raises(UsageError):
            indexed.count(None)

    def _race(self, storages: Sequence[Storage]) -> None:
        rounds = 20
        winners: list[list[int]] = [[] for _ in range(rounds)]

        def claim(at: int, number: int) -> None:
            kind = _WRITES[number % len(_WRITES)]
            with contextlib.suppress(NotUniqueError):
                storages[at].write([(f"user {at}", kind({"customer": number}))])
                winners[number].append(at)

        self.in_rounds([partial(claim, at) for at in range(len(storages))], rounds)
        assert [len(each) for each in winners] == [1] * rounds, "how many users got each value"

    def _indexed(self, storage: Storage) -> IndexedStorage:
        if not isinstance(storage, IndexedStorage):
            pytest.skip("the storage is no IndexedStorage: it has no find")
        if not set(self.indexes) <= set(storage.indexes):
            pytest.skip("open the storage with indexes=self.indexes in the fixture")
        return storage

"""Listing users, for a storage that is a ``ListingStorage``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from usermetadata.changes import Clear, Merge
from usermetadata.exceptions import UsageError
from usermetadata.storage import ListingStorage
from usermetadata.testing.conformance.suite import Suite, spoil

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

_USER_IDS = [
    *("a", "B", "\u00e9", "e\u0301", "z", "\uffff", "\U0001f600", "10", "9", "a b", "a ", "'"),
    *("a:b", "a%", "_", "\x1f", "~", "x" * 254 + "a", "x" * 254 + "b"),
]


class ListingConformance(Suite):
    """``read_after`` finds each user once."""

    def test_pages_have_each_user_once(self, storage: Storage) -> None:
        """Pages of any size list all users in one order; the last id of one begins the next."""
        listing = _listing(storage)
        storage.write([(user_id, Merge({"id": user_id})) for user_id in _USER_IDS])
        everybody = listing.read_after("", 1000)
        assert everybody == {user_id: {"id": user_id} for user_id in _USER_IDS}
        for limit in (1, 3, len(_USER_IDS)):
            pages = pages_of(lambda after, limit=limit: listing.read_after(after, limit))  # type: ignore[misc]
            assert max(map(len, pages)) <= limit
            found = [user_id for page in pages for user_id in page]
            assert ascii(found) == ascii([*everybody])
        assert listing.read_after([*everybody][-1], 10) == {}

    def test_a_page_may_begin_after_a_user_who_is_gone(self, storage: Storage) -> None:
        """The id before a page needs no row, so its user may have been removed."""
        listing = _listing(storage)
        storage.write([(user_id, Merge({})) for user_id in _USER_IDS])
        everybody = [*listing.read_after("", 1000)]
        for number, user_id in enumerate(everybody):
            storage.write([(user_id, Clear())])
            later = everybody[number + 1 :]
            assert ascii([*listing.read_after(user_id, 1000)]) == ascii(later)
            storage.write([(user_id, Merge({}))])

    def test_an_app_lists_its_own_users(self, storage: Storage) -> None:
        """No user of another app is listed."""
        listing = _listing(storage)
        assert listing.read_after("", 10) == {}
        shop = listing.for_app("shop")
        storage.write([("alice", Merge({"n": 1})), ("carol", Merge({"n": 2}))])
        shop.write([("alice", Merge({"n": 3})), ("bob", Merge({"n": 4}))])
        assert listing.read_after("", 10) == {"alice": {"n": 1}, "carol": {"n": 2}}
        assert shop.read_after("", 10) == {"alice": {"n": 3}, "bob": {"n": 4}}
        assert listing.read_after("alice", 1) == {"carol": {"n": 2}}

    def test_listing_misses_no_user_while_others_write(self, storage: Storage) -> None:
        """Users who always have a row are on exactly one page while others come and go."""
        listing = _listing(storage)
        check_pages_while_others_write(storage, lambda after: listing.read_after(after, 7))

    def test_what_was_listed_is_the_callers(self, storage: Storage) -> None:
        """Changing results at any depth does not change what is stored."""
        listing = _listing(storage)
        metadata = {"list": [1], "object": {"n": 1}}
        storage.write([("alice", Merge(metadata))])
        spoil(listing.read_after("", 10)["alice"])
        assert listing.read_after("", 10) == {"alice": metadata}

    def test_a_second_storage_lists_what_was_acknowledged(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """The list has the current rows, regardless of earlier lists."""
        first, second = _listing(storage), _listing(second_storage)
        for number in range(3):
            for writer, reader in ((first, second), (second, first)):
                reader.read_after("", 10)
                writer.write([("alice", Merge({"n": number})), ("bob", Merge({}))])
                assert reader.read_after("", 10) == {"alice": {"n": number}, "bob": {}}
                writer.write([("bob", Clear())])
                assert reader.read_after("", 10) == {"alice": {"n": number}}

    def test_a_closed_storage_lists_no_user(self, storage: Storage) -> None:
        """After ``close``, listing raises ``UsageError``."""
        listing = _listing(storage)
        storage.write([("alice", Merge({}))])
        storage.close()
        with pytest.raises(UsageError):
            listing.read_after("", 10)


def pages_of(read: Callable[[str], dict[str, Metadata]]) -> list[dict[str, Metadata]]:
    """Return all pages; ``read`` returns the page after a user."""
    pages = [read("")]
    while pages[-1]:
        after = [*pages[-1]][-1]
        pages.append(read(after))
        assert after not in pages[-1], f"a page begins with {after!a}, the end of the one before"
    return pages


def check_pages_while_others_write(
    storage: Storage, read: Callable[[str], dict[str, Metadata]]
) -> None:
    """Read all pages; between them, users come and go among those who stay."""
    stay = [f"{at:02}" for at in range(0, 60, 2)]
    storage.write([(user, Merge({"plan": "pro"})) for user in stay])
    come_and_go = [f"{at:02}" for at in range(1, 60, 2)]
    changes: list[Change] = [Merge({"plan": "pro"}), Clear()]

    def page(after: str) -> dict[str, Metadata]:
        storage.write([(user, changes[0]) for user in come_and_go])
        changes.reverse()
        return read(after)

    for _ in range(2):
        found = [user for each in pages_of(page) for user in each]
        assert len(found) == len(set(found)), "a user is on two pages"
        assert set(stay) <= set(found), "a user is on no page"
        changes.reverse()


def _listing(storage: Storage) -> ListingStorage:
    if not isinstance(storage, ListingStorage):
        pytest.skip("the storage is no ListingStorage: it has no read_after")
    return storage

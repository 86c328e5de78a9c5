"""Erasing users, for a storage that is an ``ErasingStorage``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from usermetadata.changes import Merge
from usermetadata.exceptions import UsageError
from usermetadata.storage import ErasingStorage
from usermetadata.testing.conformance.suite import Suite, spoil

if TYPE_CHECKING:
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage


def _accept(metadata: Metadata) -> None:
    """Accept each row."""


class ErasureConformance(Suite):
    """``erase`` removes a user from all apps."""

    def test_a_user_is_erased_in_all_apps(self, storage: Storage) -> None:
        """The rows of all apps are removed and returned; other users keep theirs."""
        erasing = _erasing(storage)
        apps = {app_id: storage.for_app(app_id) for app_id in ("public", "shop", "a:b", "a ", "A")}
        for app_id, app in apps.items():
            app.write([("alice", Merge({"app": app_id})), ("bob", Merge({"app": app_id}))])
        removed = erasing.erase("alice", _accept)
        assert removed == {app_id: {"app": app_id} for app_id in apps}
        for app_id, app in apps.items():
            assert app.read(["alice", "bob"]) == {"bob": {"app": app_id}}
        assert erasing.erase("alice", _accept) == {}

    def test_only_that_user_is_erased(self, storage: Storage) -> None:
        """User ids are compared character by character, and separately from app ids."""
        erasing = _erasing(storage)
        others = ["Alice", "alice ", " alice", "al%ce", "al_ce"]
        others += ["alic\u00e9", "alice\u0301", "b:alice"]
        erased = "alice"
        storage.write([(user, Merge({"id": user})) for user in (*others, erased)])
        storage.for_app("a:b").write([(erased, Merge({"id": erased}))])
        storage.for_app("a").write([("b:alice", Merge({"id": "b:alice"}))])
        removed = erasing.erase(erased, _accept)
        assert removed == {"public": {"id": erased}, "a:b": {"id": erased}}
        left = storage.read([*others, erased])
        assert ascii(sorted(left)) == ascii(sorted(others))
        assert storage.for_app("a").read(["b:alice"]) == {"b:alice": {"id": "b:alice"}}
        for wildcard in ("al%ce", "al_ce"):
            assert erasing.erase(wildcard, _accept) == {"public": {"id": wildcard}}

    def test_an_erasure_that_is_refused_removes_nothing(self, storage: Storage) -> None:
        """An exception of ``check`` propagates unchanged; the user keeps the rows of all apps."""
        erasing = _erasing(storage)
        shop = storage.for_app("shop")
        for app in (storage, shop):
            app.write([("alice", Merge({"n": 1}))])
        error = LookupError("not this user")
        given: list[Metadata] = []

        def refuse_the_second(metadata: Metadata) -> None:
            given.append(metadata)
            if len(given) == 2:
                raise error

        with pytest.raises(LookupError) as caught:
            erasing.erase("alice", refuse_the_second)
        assert caught.value is error
        assert given == [{"n": 1}, {"n": 1}]
        for app in (storage, shop):
            assert app.read(["alice"]) == {"alice": {"n": 1}}
        assert storage.write([("alice", Merge({"n": 2}))]) == [{"n": 2}]

    def test_no_write_comes_between_an_erasure(self, storage: Storage) -> None:
        """A write that starts while a row is checked is erased and returned, or happens later."""
        check_no_write_comes_between(self, storage, storage)

    def test_no_write_of_a_second_storage_comes_between_an_erasure(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """The same applies to a write of another process."""
        check_no_write_comes_between(self, storage, second_storage)

    def test_what_was_erased_is_the_callers(self, storage: Storage) -> None:
        """Equal rows of two apps come back as two objects."""
        erasing = _erasing(storage)
        for app in (storage, storage.for_app("shop")):
            app.write([("alice", Merge({"list": [1], "object": {"n": 1}}))])
        removed = erasing.erase("alice", _accept)
        spoil(removed["public"])
        assert removed["shop"] == {"list": [1], "object": {"n": 1}}

    def test_a_closed_storage_erases_no_user(self, storage: Storage) -> None:
        """After ``close``, erasing raises ``UsageError``."""
        erasing = _erasing(storage)
        storage.write([("alice", Merge({}))])
        storage.close()
        with pytest.raises(UsageError):
            erasing.erase("alice", _accept)


def check_no_write_comes_between(suite: Suite, storage: Storage, other: Storage) -> None:
    """Erase a user, and write the user while the erasure runs."""
    erasing = _erasing(storage)
    storage.write([("alice", Merge({"old": 1}))])
    meanwhile = suite.meanwhile(lambda: other.write([("alice", Merge({"new": 1}))]))
    removed = erasing.erase("alice", lambda _: meanwhile())
    meanwhile.finish()
    outcome = removed.get("public"), storage.read(["alice"])
    later = {"old": 1}, {"alice": {"new": 1}}
    earlier: tuple[Metadata, dict[str, Metadata]] = {"old": 1, "new": 1}, {}
    assert outcome in (later, earlier), "what was written during an erasure is lost"


def _erasing(storage: Storage) -> ErasingStorage:
    if not isinstance(storage, ErasingStorage):
        pytest.skip("the storage is no ErasingStorage: it has no erase")
    return storage

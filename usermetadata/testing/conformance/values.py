"""Exactness of values and ids, and apps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError
from usermetadata.testing.conformance.suite import Suite, exactly

if TYPE_CHECKING:
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

_EXACT_VALUES: dict[str, list[Any]] = {
    "null, booleans and integers": [
        *(None, True, False, 0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 + 1, 10**600),
    ],
    "floats": [0.1, 1.0, -0.0, 5e-324, 1.7976931348623157e308, 1e22, 1e16, -1.5],
    "texts": [
        *("", " ", "1", "1.0", "null", "\0", "a\0b", "\x7f\x80\u2028", "e\u0301 \u00e9"),
        *("\uffff", "\ufeff", "\U0010ffff", "\U0001f600", "\ud800", "\\u0000", "\\", "'\"", "\r\n"),
    ],
    "lists and objects": [
        *([], {}, [[], {}], [None, [None]], {"": 1, "\0": 2, "a.b": {"$c": []}}, {"a": None}),
        {"B": 1, "b": 2, "a": 3, "e\u0301": 4, "\u00e9": 5, "1": 6, "01": 7},
    ],
}
_SEPARATORS = [*":/|\x1f-_.,;#@ \t\n\\", "::"]
# Each line has texts that are equal in some collation.
_ALIKE = [
    *("alice", "Alice", "ALICE", "alice ", " alice", "alice\t", "alice\n"),
    *("\uff41lice", "alic\u200be"),
    *("al%ce", "al_ce", "al*ce", "al?ce", "al[i]ce"),
    *("\u00e9", "e\u0301", "e", "\u00c9"),
    *("ss", "\u00df", "\u1e9e"),
    *("i", "I", "\u0130", "\u0131"),
    *("\U0001f600", "\U0001f601", "\U0010ffff", "\ufffd", "?"),
    *("1", "01", "1.0", "1e0", "\u0661"),
]
_USER_IDS = [
    *_ALIKE,
    *("x" * 254 + end for end in ("", "a", "b")),
    *("\U0001f600" * 254 + end for end in ("a", "b")),
    *(f"app{separator}user" for separator in _SEPARATORS),
]

# Names with a special meaning in paths, patterns or collations.
_NAMES = [
    *("n", "N", "n ", " n", "", " ", "\u00e9", "e\u0301", "\U0001f600", "\U0001f601", "\0"),
    *('"', 'n"', "'", "\\", "\n", "$", "$.n", "n.m", "n[0]", "[0]", "0", "00", "1e0", "-1", "#"),
    *("*", "**", "%", "?", ":n", "{n}", "n,m", "null", "id", "metadata", "user_id", "x" * 300),
]


class ValueConformance(Suite):
    """Values and ids come back exactly; apps are separate."""

    # Exactness.

    @pytest.mark.parametrize("values", _EXACT_VALUES.values(), ids=_EXACT_VALUES)
    def test_values_come_back_exactly(self, storage: Storage, values: list[Any]) -> None:
        """Integers of any size, floats bit for bit and all of Unicode survive each kind of change.

        They also survive a later merge of another property of the user.
        """
        metadata: Metadata = {f"value {at}": value for at, value in enumerate(values)}
        expected = {name: value for name, value in metadata.items() if value is not None}
        inside = {"": values, "\u00e9.$": {"nested": dict(metadata)}}
        metadata.update(inside)
        expected.update(inside)
        changes: dict[str, Change] = {
            "Merge": Merge(metadata),
            "Replace": Replace(metadata),
            "Modify": Modify(lambda _: metadata),
            "another callable": lambda _: expected,
        }

        def check(results: list[Metadata | None], after: str) -> None:
            found = storage.read([*changes])
            for kind, written in zip(changes, results, strict=True):
                for method, each in (("write", written), ("read", found.get(kind))):
                    wrong = "; ".join(_differences(each or {}, expected))
                    assert not wrong, (
                        f"stored by {kind}: what {method} returned after {after}: {wrong}"
                    )

        check([storage.write([each])[0] for each in changes.items()], "one change")
        check(storage.write([*changes.items()]), "changes of several users")
        others: list[tuple[str, Change]] = [(kind, Merge({"other": 1})) for kind in changes]
        expected["other"] = 1
        check([storage.write([each])[0] for each in others], "a merge of another property")
        check(storage.write(others), "merges of another property for several users")

    def test_property_names_are_told_apart(self, storage: Storage) -> None:
        """A merge sets or removes only the property that it names, regardless of the name."""
        expected: Metadata = {name: at for at, name in enumerate(_NAMES)}
        storage.write([("alice", Replace(expected))])
        new: list[Any] = ["new", None]
        for value in new:
            for name in _NAMES:
                expected = {**expected, name: value}
                if value is None:
                    del expected[name]
                [written] = storage.write([("alice", Merge({name: value}))])
                for method, each in (
                    ("write", written),
                    ("read", storage.read(["alice"])["alice"]),
                ):
                    wrong = "; ".join(_differences(each or {}, expected))
                    assert not wrong, (
                        f"after a merge of {name!a}: {exactly(value)}, {method} returned: {wrong}"
                    )

    def test_large_objects_come_back_exactly(self, storage: Storage) -> None:
        """10,000 properties and 200 levels are stored like any others."""
        wide = {f"property {number}": number for number in range(10_000)}
        deep: dict[str, Any] = {}
        for _ in range(199):
            deep = {"deeper": deep}
        storage.write([("wide", Replace(wide)), ("deep", Replace(deep))])
        assert storage.read(["wide", "deep"]) == {"wide": wide, "deep": deep}

    def test_user_ids_are_told_apart(self, storage: Storage) -> None:
        """Case, blanks, wildcards, normalisation and the last character distinguish ids."""
        storage.write([(user_id, Merge({"id": user_id})) for user_id in _USER_IDS])
        expected = {user_id: {"id": user_id} for user_id in _USER_IDS}
        found = storage.read(_USER_IDS)
        for user_id in _USER_IDS:
            alone = storage.read([user_id])
            for each in (found, alone):
                assert _row(each, user_id) == ascii({"id": user_id}), _other_row(user_id)
            assert ascii(alone) == ascii({user_id: {"id": user_id}})
        assert found == expected
        for number, user_id in enumerate(_USER_IDS):
            storage.write([(user_id, Merge({"alone": number}))])
        for number, user_id in enumerate(_USER_IDS):
            alone = storage.read([user_id])
            row = ascii({"alone": number, "id": user_id})
            assert _row(alone, user_id) == row, _other_row(user_id)

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
        """App ids are compared character by character, and separately from user ids."""
        rows = [
            *(
                ("a", "bc"),
                ("ab", "c"),
                ("A", "bc"),
                ("a ", "bc"),
                ("\u00e9", "bc"),
                ("e\u0301", "bc"),
            ),
            *((f"a{separator}b", "c") for separator in _SEPARATORS),
            *(("a", f"b{separator}c") for separator in _SEPARATORS),
            *(("x" * 63 + end, "c") for end in ("", "a", "b")),
            *((app_id, "one user") for app_id in _ALIKE),
        ]
        for app_id, user_id in rows:
            storage.for_app(app_id).write([(user_id, Merge({"row": [app_id, user_id]}))])
        for app_id, user_id in rows:
            found = storage.for_app(app_id).read([user_id])
            expected = ascii({"row": [app_id, user_id]})
            assert _row(found, user_id) == expected, f"in app {app_id!a}, {_other_row(user_id)}"

    def test_apps_are_apart_in_calls_for_many_users(self, storage: Storage) -> None:
        """A read or a write of several users does not use rows of another app."""
        everybody = ["alice", "bob", "carol"]
        shop = storage.for_app("shop")
        storage.write([(user, Replace({"public": user})) for user in ("alice", "bob")])
        shop.write([(user, Replace({"shop": user})) for user in ("bob", "carol")])
        of_public = {user: {"public": user} for user in ("alice", "bob")}
        of_shop = {user: {"shop": user} for user in ("bob", "carol")}
        storage.write([("Alice", Replace({"other": True}))])
        assert storage.read(everybody) == of_public
        assert shop.read(everybody) == of_shop
        merged = [(user, Merge({"n": 1})) for user in everybody]
        assert shop.write(merged) == [{**of_shop.get(user, {}), "n": 1} for user in everybody]
        seen: list[Metadata | None] = []
        shop.write([(user, seen.append) for user in everybody])
        assert seen == [{**of_shop.get(user, {}), "n": 1} for user in everybody]
        assert shop.read(everybody) == {}
        shop.write([(user, Clear()) for user in everybody])
        assert storage.read(everybody) == of_public

    def test_apps_do_not_share_a_write(self, storage: Storage) -> None:
        """Threads that write the same user ids in two apps do not mix them."""
        users = ["alice", "bob", "carol"]
        apps = {app_id: storage.for_app(app_id) for app_id in ("left", "right")}

        def write(app_id: str, number: int) -> None:
            changes = [(user, Merge({app_id: number})) for user in users]
            assert apps[app_id].write(changes) == [{app_id: number}] * 3
            assert apps[app_id].read(users) == {user: {app_id: number} for user in users}

        self.in_rounds([partial(write, app_id) for app_id in apps], 20)

    def test_an_app_is_found_again(self, storage: Storage) -> None:
        """``for_app`` with the same id has the same rows; a storage starts with ``"public"``."""
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


def _other_row(user_id: str) -> str:
    return f"user {user_id!a} has not the row that was stored, but this one: are keys ambiguous?"


def _row(found: dict[str, Metadata], user_id: str) -> str:
    """Return the row as a text in which all characters are distinguishable."""
    row = found.get(user_id)
    return ascii(row if row is None else dict(sorted(row.items())))


def _differences(found: Metadata, expected: Metadata) -> list[str]:
    """Return one text for each property that is not exactly as expected."""
    names: set[str] = {*expected, *found}
    return [
        f"{name!a} was {exactly(expected.get(name))}, and is {exactly(found.get(name))}"
        for name in sorted(names)
        if exactly(found.get(name)) != exactly(expected.get(name))
    ]

"""What every storage promises that finds users by their metadata."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres_server import empty_schema, server_url
from sqlite_utils import Database

from usermetadata import InMemoryStorage, InvalidInputError, PostgresStorage, SQLiteStorage
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import NotUniqueError
from usermetadata.indexes import Index, check_where
from usermetadata.storage import IndexedStorage

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from usermetadata.changes import Change

Open = Callable[..., IndexedStorage]

STORAGES = ["memory", "sqlite file", "sqlite memory", "sqlite borrowed", "postgres"]


@pytest.fixture(params=STORAGES)
def open_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Open, None, None]:
    """A function that opens an empty storage with indexes; each storage in turn."""
    with contextlib.ExitStack() as stack:

        def open_it(*indexes: Index) -> IndexedStorage:
            storage: IndexedStorage
            if request.param == "memory":
                storage = InMemoryStorage(indexes=indexes)
                return stack.enter_context(contextlib.closing(storage))
            if request.param == "postgres":
                schema = stack.enter_context(empty_schema())
                storage = PostgresStorage(server_url(), schema=schema, indexes=indexes)
                return stack.enter_context(contextlib.closing(storage))
            database: Any = tmp_path / "users.db" if request.param == "sqlite file" else ":memory:"
            if request.param == "sqlite borrowed":
                connection = sqlite3.connect(":memory:", check_same_thread=False)
                database = Database(stack.enter_context(contextlib.closing(connection)))
            return stack.enter_context(contextlib.closing(SQLiteStorage(database, indexes=indexes)))

        yield open_it


@pytest.fixture
def storage(open_storage: Open) -> IndexedStorage:
    """A storage with an index of ``plan``, and a unique one of ``customer``."""
    return open_storage(Index("plan"), Index("customer", unique=True))


def store(storage: IndexedStorage, **metadata: dict[str, Any]) -> None:
    """Store the metadata of some users."""
    storage.write([(user_id, Replace(each)) for user_id, each in metadata.items()])


def test_a_storage_that_finds_users_is_recognised(storage: IndexedStorage) -> None:
    """The storage has the methods of the protocol, and tells which indexes were declared."""
    assert isinstance(storage, IndexedStorage)
    assert storage.indexes == (Index("plan"), Index("customer", unique=True))
    assert storage.for_app("shop").indexes == storage.indexes


# Values.

VALUES: list[Any] = [0, 1, -1, True, False, "1", "0", "true", "True", "", " ", "1.0", "null"]


def test_types_differ(storage: IndexedStorage) -> None:
    """A user is found by a value of the same JSON type only."""
    storage.write([(f"user {at}", Merge({"plan": value})) for at, value in enumerate(VALUES)])
    for at, value in enumerate(VALUES):
        assert storage.find({"plan": value}, "", 10) == {f"user {at}": {"plan": value}}
        assert storage.count({"plan": value}) == 1


@pytest.mark.parametrize("number", [2**53, 2**63, -(2**64), 10**100])
def test_integers_are_exact(storage: IndexedStorage, number: int) -> None:
    """Integers that differ by one are different, however large."""
    store(storage, alice={"plan": number, "customer": number}, bob={"customer": number + 1})
    assert storage.find({"plan": number}, "", 10).keys() == {"alice"}
    assert storage.find({"customer": number + 1}, "", 10).keys() == {"bob"}
    assert storage.count({"plan": number - 1}) == 0


AWKWARD = [
    *("'", '"', "''", "\\", "\\\\", "\\'", '\\"', "`", "--", ";", "%", "_", "%s", "?", ":a", "{}"),
    *("$", "$.plan", '$."plan"', "$[0]", "a.b", ".", "[", "]", "#", "@", "/", "\\/", "*", "~"),
    *("__proto__", "constructor", "null", "NaN", "Infinity", "1e2", "-0", "0x10", "plan", "None"),
    *("\\u0000", "\\\\u0000", "\\u00e9", "\\x00", "\\n", "\n", "\r\n", "\t", "\b", "\f", "\v"),
    *("\x01", "\x1b", "\x1f", "\x7f", "\x80", "\x85", "\xa0", "\xad", "\u2028", "\u2029"),
    *("\u200b", "\u200d", "\u202e", "\ufeff", "\ufffd", "\ufffe", "\uffff", "\U0010ffff"),
    *("é", "e\u0301", "Ǆ", "ß", "SS", "İ", "i", "\u0131", "ﬁ", "Å", "\u212b", "A\u030a"),
    *("😀", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "日本語", "한국", "\u1112\u1161\u11ab", "مرحبا"),
    *(" a", "a ", "a", "A", "a" * 255, "é" * 255, "😀" * 255, '"' * 255, "\x01" * 255),
]


@pytest.mark.parametrize("name", ["plan", "customer"])
def test_awkward_texts_are_found(storage: IndexedStorage, name: str) -> None:
    """A user is found by any text up to 255 characters without U+0000, and by no other text."""
    storage.write([(f"user {at:03}", Merge({name: text})) for at, text in enumerate(AWKWARD)])
    for at, text in enumerate(AWKWARD):
        assert storage.find({name: text}, "", 10) == {f"user {at:03}": {name: text}}


NAMES = [
    *("'", "''", "a b", "$", "$.a", "a.b", "[0]", "#-1", "%s", "?", ":a", "{path}", "Plan", "^"),
    *("^p", "__proto__", "x" * 64, "--", "`", "]", "*", " "),
]


@pytest.mark.parametrize("name", NAMES)
def test_awkward_names_are_found(open_storage: Open, name: str) -> None:
    """Any valid name of an index works, with an index beside it whose name differs in case."""
    names = {name, name.swapcase(), "plan", "p", "P"}
    storage = open_storage(*(Index(each, unique=each == name) for each in sorted(names)))
    storage.write([("alice", Merge({name: "pro"})), ("bob", Merge({name: 5, name + "x": "pro"}))])
    assert storage.find({name: "pro"}, "", 10) == {"alice": {name: "pro"}}
    assert storage.count({name: 5}) == 1
    assert set(storage.stored_indexes()) == set(storage.indexes)
    with pytest.raises(NotUniqueError) as caught:
        storage.write([("carol", Merge({name: 5}))])
    assert (caught.value.name, caught.value.user_id) == (name, "bob")


values = (
    st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=255)
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(values, min_size=5, max_size=20), values)
def test_any_value_is_found(storage: IndexedStorage, stored: list[Any], other: Any) -> None:
    """Those users are found that a comparison of type and value finds, in order of their ids."""
    storage.write([(user_id, Clear()) for user_id in storage.read_after("", 100)])
    storage.write([(f"{at:02}", Merge({"plan": value})) for at, value in enumerate(stored)])
    for value in [*stored, other]:
        expected = [
            f"{at:02}"
            for at, each in enumerate(stored)
            if type(each) is type(value) and each == value
        ]
        assert list(storage.find({"plan": value}, "", 100)) == expected
        assert storage.count({"plan": value}) == len(expected)


UNFINDABLE: list[Any] = [1.0, [], {}, ["pro"], "x" * 256, "a\0b"]


@pytest.mark.parametrize("value", UNFINDABLE, ids=repr)
@pytest.mark.parametrize("name", ["plan", "customer"])
def test_other_values_are_refused(storage: IndexedStorage, name: str, value: Any) -> None:
    """Nothing of a write is stored if a value cannot be indexed; other properties hold anything."""
    store(storage, alice={"n": 1})
    changes: list[Change] = [
        Merge({name: value}),
        Replace({name: value}),
        Modify(lambda _: {name: value}),
    ]
    for change in changes:
        with pytest.raises(InvalidInputError, match=f"user 'bob': property '{name}' has an index"):
            storage.write([("alice", Merge({"n": 2})), ("bob", change)])
    assert storage.read_after("", 10) == {"alice": {"n": 1}}
    store(storage, alice={"other": value})
    assert storage.read(["alice"]) == {"alice": {"other": value}}


# Finding.


def test_changes_are_found_at_once(storage: IndexedStorage) -> None:
    """A user is found by what the last write stored, and not by what was there before."""
    store(storage, alice={"plan": "pro"}, bob={"plan": "pro"}, carol={"plan": "pro"}, dave={})
    storage.write([("alice", Merge({"plan": "free"})), ("bob", Merge({"plan": None}))])
    storage.write([("carol", Clear()), ("dave", Modify(lambda _: {"plan": "pro"}))])
    assert storage.find({"plan": "pro"}, "", 10) == {"dave": {"plan": "pro"}}
    assert storage.find({"plan": "free"}, "", 10) == {"alice": {"plan": "free"}}
    assert storage.count(None) == 3


def test_every_property_counts(storage: IndexedStorage) -> None:
    """Of several properties all have to be equal, whether they have an index or not."""
    names = ["n", "", "é", 'a"b', "a\\b", "$.x", "a\x01"]
    for at in range(12):
        extra: dict[str, Any] = dict.fromkeys(names, at % 3)
        storage.write([(f"{at:02}", Merge({"plan": "pro", "customer": at, **extra}))])
    store(storage, **{"99": {"plan": "pro", "n": True}, "98": {"n": 1, "plan": "free"}})
    for name in names:
        where = check_where({"plan": "pro", name: 1}, storage.indexes)
        assert list(storage.find(where, "", 10)) == ["01", "04", "07", "10"]
        assert list(storage.find(where, "01", 2)) == ["04", "07"]
        assert storage.count(where) == 4
    assert list(storage.find({"plan": "pro", "customer": 4}, "", 10)) == ["04"]
    assert list(storage.find({"plan": "pro", "customer": 4, "n": 1}, "", 10)) == ["04"]
    assert storage.count({"plan": "free", "customer": 4}) == 0
    assert storage.count({"plan": "pro", "n": 1.0}) == 0  # type: ignore[dict-item]


def test_pages_follow_the_order_of_ids(storage: IndexedStorage) -> None:
    """Pages come in the order of code points, and the last id of one begins the next."""
    ids = sorted(["a", "B", "é", "z", "\uffff", "😀", "10", "9", "a b", "'"])
    storage.write([(user_id, Merge({"plan": "pro"})) for user_id in ids])
    found: list[str] = []
    while page := storage.find({"plan": "pro"}, found[-1] if found else "", 3):
        assert len(page) <= 3
        found += page
    assert found == ids
    assert list(storage.find({"plan": "pro"}, "b", 2)) == ["z", "é"]


def test_pages_miss_no_user_while_others_write(storage: IndexedStorage) -> None:
    """Users who match all the time are on exactly one page, though others come and go."""
    storage.write([(f"{at:03}", Merge({"plan": "pro"})) for at in range(0, 200, 2)])
    stop = threading.Event()

    def others() -> None:
        at = 1
        while not stop.is_set():
            storage.write([(f"{at:03}", Merge({"plan": "pro"}))])
            storage.write([(f"{at:03}", Clear()), ("000", Merge({"n": at}))])
            at = (at + 2) % 200

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(5):
            found: list[str] = []
            while page := storage.find({"plan": "pro"}, found[-1] if found else "", 7):
                found += page
            assert found == sorted(set(found))
            assert {f"{at:03}" for at in range(0, 200, 2)} <= set(found)
    finally:
        stop.set()
        thread.join()


def test_a_page_is_of_one_moment(storage: IndexedStorage) -> None:
    """Two users who change together are never seen half changed."""
    stop = threading.Event()
    store(storage, alice={"plan": "pro"}, bob={"plan": "pro"})

    def others() -> None:
        plans = ["free", "pro"]
        while not stop.is_set():
            storage.write([(user_id, Merge({"plan": plans[0]})) for user_id in ("alice", "bob")])
            plans.reverse()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(200):
            assert len(storage.find({"plan": "pro"}, "", 10)) in {0, 2}
            assert storage.count({"plan": "free"}) in {0, 2}
    finally:
        stop.set()
        thread.join()


def test_apps_are_separate(storage: IndexedStorage) -> None:
    """An app finds and counts its own users, and a value is unique within an app."""
    shop = storage.for_app("shop")
    store(storage, alice={"plan": "pro", "customer": 1})
    store(shop, bob={"plan": "pro", "customer": 1}, carol={})
    assert storage.find({"plan": "pro"}, "", 10).keys() == {"alice"}
    assert shop.find({"customer": 1}, "", 10).keys() == {"bob"}
    assert (storage.count(None), shop.count(None), shop.count({"plan": "pro"})) == (1, 2, 1)


def test_an_empty_storage_finds_no_user(storage: IndexedStorage) -> None:
    """A new storage finds no user."""
    assert storage.find({"plan": "pro"}, "", 10) == {}
    assert (storage.count({"plan": "pro"}), storage.count(None)) == (0, 0)


# Uniqueness.


@pytest.mark.parametrize(
    "change",
    [Merge({"customer": 1}), Replace({"customer": 1}), Modify(lambda old: {**old, "customer": 1})],
    ids=["merge", "replace", "modify"],
)
def test_a_value_belongs_to_one_user(storage: IndexedStorage, change: Change) -> None:
    """A second user is refused the value; the error says who has it, and nothing is stored."""
    store(storage, alice={"customer": 1}, bob={"customer": 2})
    for user_id in ("bob", "carol"):
        with pytest.raises(NotUniqueError, match="property 'customer'") as caught:
            storage.write([("alice", Merge({"n": 1})), (user_id, change)])
        assert (caught.value.name, caught.value.user_id) == ("customer", "alice")
    assert storage.read_after("", 10) == {"alice": {"customer": 1}, "bob": {"customer": 2}}


def test_values_of_other_types_are_other_values(storage: IndexedStorage) -> None:
    """``1``, ``True`` and ``"1"`` may belong to three users; an absent value to any number."""
    store(storage, a={"customer": 1}, b={"customer": True}, c={"customer": "1"}, d={}, e={})
    store(storage, a={"customer": 1, "n": 2}, d={"n": 1})
    assert storage.count({"customer": 1}) == 1


def test_two_users_in_one_write_cannot_share_a_value(storage: IndexedStorage) -> None:
    """Nothing of a write is stored that gives two users the same value."""
    with pytest.raises(NotUniqueError) as caught:
        store(storage, alice={"customer": 1}, bob={"customer": 1})
    assert caught.value.name == "customer"
    assert caught.value.user_id in {"alice", "bob", None}
    assert storage.count(None) == 0


@pytest.mark.parametrize(
    "changes",
    [
        [("alice", Merge({"customer": 2})), ("bob", Merge({"customer": 1}))],
        [
            ("bob", Merge({"customer": 3})),
            ("carol", Merge({"customer": 2})),
            ("alice", Merge({"n": 1})),
        ],
        [("carol", Merge({"customer": 1})), ("alice", Clear())],
        [("carol", Merge({"customer": 1})), ("alice", Merge({"customer": None}))],
        [("carol", Merge({"customer": 1})), ("carol", Merge({"customer": 9}))],
        [
            ("alice", Merge({"customer": 2})),
            ("bob", Merge({"customer": 3})),
            ("carol", Merge({"customer": 1})),
        ],
    ],
    ids=["swap", "rotate", "cleared later", "removed later", "for a moment", "chain"],
)
def test_only_the_end_of_a_write_counts(
    storage: IndexedStorage, changes: Sequence[tuple[str, Change]]
) -> None:
    """Users can exchange values in one write, in any order."""
    store(storage, alice={"customer": 1, "n": 0}, bob={"customer": 2}, carol={"customer": 3})
    results = dict(zip([user_id for user_id, _ in changes], storage.write(changes), strict=True))
    stored = storage.read_after("", 10)
    for user_id, metadata in results.items():
        assert stored.get(user_id) == metadata
        if metadata and "customer" in metadata:
            assert storage.find({"customer": metadata["customer"]}, "", 10) == {user_id: metadata}


def test_a_swap_that_breaks_uniqueness_changes_nothing(storage: IndexedStorage) -> None:
    """If one of many users is refused, the others keep their values."""
    store(storage, alice={"customer": 1}, bob={"customer": 2}, carol={"customer": 3})
    before = storage.read_after("", 10)
    with pytest.raises(NotUniqueError) as caught:
        storage.write([("alice", Merge({"customer": 2})), ("bob", Merge({"customer": 3}))])
    assert caught.value.user_id == "carol"
    assert storage.read_after("", 10) == before
    assert storage.find({"customer": 1}, "", 10).keys() == {"alice"}


def test_threads_race_for_a_value(storage: IndexedStorage) -> None:
    """Of threads that claim the same value at a time, exactly one gets it."""
    threads, rounds = 8, 25
    barrier = threading.Barrier(threads)
    outcomes: list[list[str]] = [[] for _ in range(rounds)]

    def claim(user_id: str) -> None:
        for at in range(rounds):
            barrier.wait()
            with contextlib.suppress(NotUniqueError):
                storage.write([(user_id, Merge({"customer": at}))])
                outcomes[at].append(user_id)

    workers = [threading.Thread(target=claim, args=(f"user {at}",)) for at in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [len(winners) for winners in outcomes] == [1] * rounds
    assert storage.find({"customer": rounds - 1}, "", 10).keys() == set(outcomes[-1])


def test_a_refused_thread_fails_alone(storage: IndexedStorage) -> None:
    """Writes of other threads that share a transaction with a refused one are stored."""
    store(storage, alice={"customer": 1})
    begun, go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []

    def slow(metadata: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(30)
        return metadata

    def write(user_id: str, customer: int) -> None:
        try:
            storage.write([(user_id, Merge({"customer": customer}))])
        except NotUniqueError as error:
            errors.append(error)

    first = threading.Thread(target=lambda: storage.write([("slow", Modify(slow))]))
    first.start()
    assert begun.wait(30)
    others = [
        threading.Thread(target=write, args=(f"user {at}", 1 if at == 3 else 10 + at))
        for at in range(8)
    ]
    for thread in others:
        thread.start()
    go_on.set()
    for thread in [first, *others]:
        thread.join()
    assert len(errors) == 1
    assert storage.count(None) == 9
    assert storage.count({"customer": 1}) == 1


# Building.


def test_indexes_are_built_at_the_first_use(storage: IndexedStorage) -> None:
    """The indexes exist after the first write; building them again changes nothing."""
    store(storage, alice={})
    assert set(storage.stored_indexes()) == set(storage.indexes)
    assert storage.build_indexes() == []
    assert set(storage.stored_indexes()) == set(storage.indexes)


def test_an_index_can_be_dropped(storage: IndexedStorage) -> None:
    """A dropped index is gone until it is built again; in memory it stays until the end."""
    store(storage, alice={"customer": 1, "plan": "pro"})
    if isinstance(storage, InMemoryStorage):
        storage.drop_index("customer")
        assert storage.stored_indexes() == storage.indexes
        return
    storage.drop_index("customer")
    storage.drop_index("customer")
    storage.drop_index("never declared")
    assert storage.stored_indexes() == (Index("plan"),)
    reports: list[tuple[int, int]] = []
    assert storage.build_indexes(lambda done, total: reports.append((done, total))) == []
    assert reports[-1] == (1, 1)
    assert storage.find({"plan": "pro"}, "", 10).keys() == {"alice"}
    with pytest.raises(NotUniqueError):
        store(storage, bob={"customer": 1})

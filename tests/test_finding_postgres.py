"""Indexes of the PostgreSQL storage: right for every writer, whatever it knows of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from postgres_server import server_url
from psycopg.sql import SQL, Identifier
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from test_postgres import CORES_TABLES

from usermetadata import InvalidInputError, PostgresStorage, StorageError, UsageError
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import NotUniqueError
from usermetadata.indexes import Index
from usermetadata.storage import IndexedStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

PLAN, KEY = Index("plan"), Index("key", unique=True)


@pytest.fixture
def storage(schema: str) -> Generator[PostgresStorage, None, None]:
    """A storage with an index that is unique and one that is not."""
    with opened(schema, PLAN, KEY) as storage:
        yield storage


def triggers(direct: psycopg.Connection[Any]) -> list[Any]:
    """Return the names of the table's triggers."""
    query = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'user_metadata'::regclass"
    return direct.execute(query).fetchall()


def opened(schema: str, *indexes: Index, **arguments: Any) -> Any:
    """Open a storage in that schema."""
    storage = PostgresStorage(server_url(), schema=schema, indexes=indexes, **arguments)
    return contextlib.closing(storage)


def entries(direct: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """Return what is indexed."""
    query = "SELECT name, value, user_id FROM user_metadata_index_entries ORDER BY 1, 2, 3"
    return direct.execute(query).fetchall()


def is_consistent(direct: psycopg.Connection[Any], *names: str) -> bool:
    """Tell whether the entries are those of the rows."""
    wanted: list[tuple[str, str, str]] = []
    for user_id, text in direct.execute("SELECT user_id, user_metadata FROM user_metadata"):
        metadata = json.loads(text)
        wanted += [
            (name, json.dumps(metadata[name], ensure_ascii=False), user_id)
            for name in names
            if name in metadata
        ]
    return sorted(entries(direct)) == sorted(wanted)


# What is found.


def test_it_is_a_storage_that_finds_users(storage: PostgresStorage) -> None:
    """It has the protocol's methods; without a table it finds no user, and creates nothing."""
    assert isinstance(storage, IndexedStorage)
    assert storage.indexes == (PLAN, KEY)
    assert storage.find({"plan": "pro"}, "", 10) == {}
    assert storage.count({"plan": "pro"}) == storage.count(None) == 0
    assert storage.stored_indexes() == ()
    storage.drop_index("plan")


def test_pages_have_the_order_of_a_listing(storage: PostgresStorage) -> None:
    """Pages by value go through the users in the same order as pages of all users."""
    users = ["b", "B", "a", "Ä", "é", "z", "1", "_", "b c", "b-c"]
    storage.write([(user, Merge({"plan": "pro"})) for user in users])
    pages: list[str] = []
    while page := storage.find({"plan": "pro"}, pages[-1] if pages else "", 3):
        pages += page
    assert pages == [*storage.read_after("", 100)]
    assert sorted(pages) == sorted(users)


def test_further_properties_are_compared_exactly(storage: PostgresStorage) -> None:
    """Properties without an index narrow a search down, by type and value, as do other indexes."""
    values = [1, 1.0, True, "1", None, [1], "\0", 10**300, "é"]
    storage.write(
        [(str(n), Merge({"plan": "pro", "x": value, "key": n})) for n, value in enumerate(values)]
    )
    found: dict[Any, list[str]] = {1: ["0"], "1": ["3"], 10**300: ["7"], "é": ["8"], "a": []}
    for value, users in found.items():
        assert [*storage.find({"plan": "pro", "x": value}, "", 10)] == users
        assert storage.count({"plan": "pro", "x": value}) == len(users)
    assert [*storage.find({"plan": "pro", "x": True}, "", 10)] == ["2"]
    assert [*storage.find({"plan": "pro", "key": 4}, "", 10)] == ["4"]
    assert storage.find({"plan": "free", "key": 4}, "", 10) == {}


SPELLINGS: dict[str, Metadata] = {
    r'{"plan": "caf\u00e9"}': {"plan": "café"},
    r'{ "plan" :"\ud83d\ude00", "x": "\u0000"}': {"plan": "😀"},
    r'{"plan": "a\/b", "x": "\ud800"}': {"plan": "a/b"},
    r'{"pl\u0061n": "\\u0000", "x": "\u0000 \udc00\ud800"}': {"plan": "\\u0000"},
    '{"plan": -0}': {"plan": 0},
    '{"plan": 1, "plan": 2}': {"plan": 2},
}
NOT_FOUND = [
    "no JSON",
    '{"plan": "pro"',
    '"plan"',
    '["plan"]',
    '{"plan": 1.0}',
    '{"plan": 1e2}',
    '{"plan": null}',
    '{"plan": {"plan": "pro"}}',
    r'{"plan": "a\u0000b"}',
    r'{"plan": "a\ud800"}',
    json.dumps({"plan": "é" * 256}),
]


def test_what_other_programs_write_is_found_by_value(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Another program may spell a value in any way of JSON, and store what cannot be indexed."""
    storage.write([("alice", Merge({}))])
    for text in NOT_FOUND:
        direct.execute("UPDATE user_metadata SET user_metadata = %s", [text])
        assert entries(direct) == [], text
    for text, where in SPELLINGS.items():
        direct.execute("UPDATE user_metadata SET user_metadata = %s", [text])
        assert len(entries(direct)) == 1
        assert storage.count(where) == 1, text
    direct.execute("UPDATE user_metadata SET user_id = 'bob', user_metadata = '{\"plan\": 1}'")
    assert [*storage.find({"plan": 1}, "", 10)] == ["bob"]
    direct.execute("TRUNCATE user_metadata")
    assert storage.count({"plan": 1}) == 0
    copy = "COPY user_metadata (user_id, user_metadata) FROM STDIN"
    with direct.cursor().copy(copy) as rows:
        rows.write_row(["carol", '{"plan": 2}'])
    assert [*storage.find({"plan": 2}, "", 10)] == ["carol"]


def test_a_null_character_anywhere_is_stored(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """U+0000 in other properties, before or after, hinders neither writing nor finding."""
    storage.write([("alice", Merge({"x": "\0", "plan": "pro", "y": {"\0": "\0"}}))])
    storage.write([("alice", Merge({"plan": "free"})), ("bob", Merge({"x": "\0"}))])
    storage.write([("alice", Modify(lambda metadata: {**metadata, "n": 1}))])
    assert [*storage.find({"plan": "free"}, "", 10)] == ["alice"]
    assert is_consistent(direct, "plan", "key")


def test_what_cannot_be_indexed_is_refused(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Every kind of change refuses such a value before anything is written."""
    changes: list[Change] = [
        Merge({"plan": 1.5}),
        Replace({"plan": ["pro"]}),
        Modify(lambda metadata: {"plan": "é" * 256}),
    ]
    for change in changes:
        with pytest.raises(InvalidInputError, match="metadata of user 'bob': property 'plan'"):
            storage.write([("alice", Merge({"plan": "pro"})), ("bob", change)])
        assert storage.count(None) == 0
    storage.write([("bob", Merge({"plan": "pro"}))])
    storage.write([("bob", Merge({"plan": None, "other": 1.5}))])
    assert entries(direct) == []


# Unique values.


@pytest.mark.parametrize(
    "big", [10**3000, "😀" * 255, "\x01" * 255], ids=["int", "text", "control"]
)
def test_the_largest_values_are_found(storage: PostgresStorage, big: Any) -> None:
    """An integer of thousands of digits and the longest texts can be found, and are unique."""
    user = "é" * 255
    storage.write([(user, Merge({"key": big}))])
    assert [*storage.find({"key": big}, "", 10)] == [user]
    assert storage.find({"key": -big if isinstance(big, int) else big[1:]}, "", 10) == {}
    with pytest.raises(NotUniqueError):
        storage.write([("bob", Merge({"key": big}))])


WRITES: list[list[tuple[str, Change]]] = [
    [("bob", Merge({"key": "a, (b)"}))],
    [("bob", Replace({"key": "a, (b)"}))],
    [("bob", Modify(lambda metadata: {"key": "a, (b)"}))],
    [("carol", Merge({"x": 1})), ("bob", Merge({"key": "a, (b)"}))],
    [("carol", Clear()), ("bob", Merge({"key": "a, (b)"}))],
]


@pytest.mark.parametrize("changes", WRITES)
def test_a_value_that_another_user_has_is_refused(
    schema: str, changes: list[tuple[str, Change]]
) -> None:
    """The error names the property and the user, quotes nothing; nothing is written."""
    index = Index("a, key)=(", unique=True)
    changes = [
        (user, Modify(lambda metadata: {"a, key)=(": "a, (b)"}) if user == "bob" else change)
        if isinstance(change, Modify)
        else (user, _renamed(change))
        for user, change in changes
    ]
    with opened(schema, index, app_id="a, b") as storage:
        storage.write([("alice", Merge({index.name: "a, (b)"})), ("carol", Merge({"n": 1}))])
        with pytest.raises(NotUniqueError) as caught:
            storage.write(changes)
        assert (caught.value.name, caught.value.user_id) == (index.name, "alice")
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert storage.read(["bob", "carol"]) == {"carol": {"n": 1}}
        storage.for_app("other").write(changes)


def _renamed(change: Any) -> Any:
    name = "a, key)=("
    if isinstance(change, Merge):
        return Merge({name if key == "key" else key: each for key, each in change.update.items()})
    if isinstance(change, Replace):
        return Replace({name: "a, (b)"})
    return change


MOVES: list[list[tuple[str, Change]]] = [
    [("alice", Merge({"key": 2})), ("bob", Merge({"key": 1}))],
    [("bob", Replace({"key": 1})), ("alice", Replace({"key": 2}))],
    [("alice", Merge({"key": 2})), ("bob", Clear())],
    [("alice", Modify(lambda metadata: {"key": 2})), ("bob", Clear())],
    [("carol", Merge({"key": 1})), ("alice", Merge({"key": 2})), ("bob", Merge({"key": 3}))],
    [("bob", Merge({"key": 1})), ("alice", Replace({"key": 3})), ("alice", Merge({"key": 2}))],
    [("bob", Merge({"key": 1})), ("bob", Merge({"key": 4}))],
]


@pytest.mark.parametrize("changes", MOVES)
def test_values_can_move_within_one_write(
    storage: PostgresStorage, direct: psycopg.Connection[Any], changes: list[tuple[str, Change]]
) -> None:
    """What counts is the state after all changes: users can swap values, or hand them on."""
    storage.write([("alice", Merge({"key": 1})), ("bob", Merge({"key": 2}))])
    storage.write(changes)
    assert is_consistent(direct, "key")


def test_the_same_value_twice_in_one_write_is_refused(storage: PostgresStorage) -> None:
    """Two users of one bulk update cannot get the same value."""
    with pytest.raises(NotUniqueError, match="property 'key': another user"):
        storage.write([("alice", Merge({"key": 1})), ("bob", Merge({"key": 1}))])
    assert storage.count(None) == 0


def test_threads_that_take_each_others_values_do_not_deadlock(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Writers that wait for each other's values get them or an error, without a deadlock."""
    users = [f"user {n}" for n in range(6)]
    storage.write([(user, Merge({"key": n})) for n, user in enumerate(users)])
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = direct.execute(query).fetchone()

    def write(number: int) -> None:
        for n in range(40):
            first, second = (number + n) % 6, (number + n + 1 + n % 5) % 6
            changes: list[tuple[str, Change]] = [
                (users[first], Merge({"key": (second + n) % 7})),
                (users[second], Merge({"key": (first * n) % 7})),
            ]
            with contextlib.suppress(NotUniqueError):
                storage.write(changes[: 1 + n % 2])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(write, range(4)))
    assert is_consistent(direct, "key")
    direct.execute("SELECT pg_stat_force_next_flush()")
    assert direct.execute(query).fetchone() == before


@pytest.mark.parametrize(
    "change", [lambda key: Merge({"key": key}), lambda key: Modify(lambda _: {"key": key})]
)
@pytest.mark.parametrize("first", ["replace", "clear"])
def test_two_writes_that_take_two_values_crosswise_do_not_deadlock(
    storage: PostgresStorage,
    direct: psycopg.Connection[Any],
    first: str,
    change: Callable[[int], Change],
) -> None:
    """Values are given up and taken in one order, also if a write has several kinds of changes."""
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = direct.execute(query).fetchone()
    barrier = threading.Barrier(2)

    def write(users: str, mine: int, other: int) -> None:
        for _ in range(20):
            taken = Replace({"key": mine})
            storage.write([(users[0], Replace({}) if first == "replace" else taken)])
            storage.write([(users[1], Replace({}))])
            barrier.wait()
            with contextlib.suppress(NotUniqueError):
                kind = taken if first == "replace" else Clear()
                storage.write([(users[0], kind), (users[1], change(other))])
            barrier.wait()
            storage.write([(users[1], Replace({}))])
            barrier.wait()

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(write, ("ab", "cd"), (1, 2), (2, 1)))
    assert is_consistent(direct, "key")
    direct.execute("SELECT pg_stat_force_next_flush()")
    assert direct.execute(query).fetchone() == before


# The caller's transaction.


def test_a_refused_write_leaves_the_callers_transaction_usable(storage: PostgresStorage) -> None:
    """In a block of ``within`` only the write is undone; the transaction goes on."""
    storage.write([("alice", Merge({"key": 1}))])
    engine = create_engine(server_url().replace("postgresql:", "postgresql+psycopg:", 1))
    with psycopg.connect(server_url()) as plain, engine.connect() as connection:
        for each in (plain, connection):
            with storage.within(each) as joined:
                with pytest.raises(NotUniqueError) as caught:
                    joined.write([("bob", Merge({"key": 1}))])
                assert caught.value.user_id == "alice"
                with pytest.raises(InvalidInputError):
                    joined.write([("bob", Merge({"key": 1.5}))])
                joined.write([("bob", Merge({"key": 2}))])
                assert joined.find({"key": 2}, "", 10) == {"bob": {"key": 2}}
                assert storage.find({"key": 2}, "", 10) == {}
            each.rollback()
    engine.dispose()
    assert storage.count(None) == 1


def test_asyncpg_names_who_has_a_value(storage: PostgresStorage) -> None:
    """The error of asyncpg's connection is the same, and its transaction stays usable."""
    storage.write([("alice", Merge({"key": 1}))])

    def work(connection: Any) -> None:
        with storage.within(connection) as joined:
            with pytest.raises(NotUniqueError) as caught:
                joined.write([("bob", Merge({"key": 1}))])
            assert (caught.value.name, caught.value.user_id) == ("key", "alice")
            joined.write([("bob", Merge({"key": 2}))])
            assert joined.count({"key": 2}) == 1

    async def main() -> None:
        url = server_url().replace("postgresql:", "postgresql+asyncpg:", 1)
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(work)
        await engine.dispose()

    asyncio.run(main())
    assert storage.find({"key": 2}, "", 10) == {"bob": {"key": 2}}


def test_indexes_that_were_rolled_back_are_built_again(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Table and indexes may be made in the caller's transaction; if that fails, they are gone."""
    with psycopg.connect(server_url()) as connection:
        for undo in (connection.rollback, connection.commit):
            with storage.within(connection) as joined:
                joined.write([("alice", Merge({"key": 1, "plan": "pro"}))])
                assert joined.find({"key": 1}, "", 10) != {}
                assert joined.build_indexes() == []
            undo()
        with storage.within(connection) as joined:
            joined.drop_index("key")
            connection.rollback()
            joined.write([("bob", Merge({"plan": "pro"}))])
        connection.commit()
    assert set(storage.stored_indexes()) == {PLAN, KEY}
    assert is_consistent(direct, "plan", "key")


def test_a_transaction_older_than_the_index_cannot_leave_a_wrong_entry(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """A writer with an old snapshot is told to repeat its transaction."""
    with opened(schema) as storage, opened(schema, KEY) as later:
        storage.write([("alice", Merge({"key": 1}))])
        with psycopg.connect(server_url()) as old:
            old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            table = SQL("{}.user_metadata").format(Identifier(schema))
            old.execute(SQL("SELECT FROM {}").format(table))
            assert later.build_indexes() == []
            with pytest.raises(psycopg.errors.SerializationFailure, match="repeat it"):
                old.execute(SQL("UPDATE {} SET user_metadata = '{{}}'").format(table))
            old.rollback()
            old.execute(SQL("UPDATE {} SET user_metadata = '{{}}'").format(table))
        assert entries(direct) == []


def test_the_reports_of_the_documentation(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """The queries of the page work beside U+0000 and rows that are no JSON."""
    page = Path(__file__).parent.parent / "docs" / "finding.md"
    _, plans, themes = re.findall(r"```sql\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    metadata = {"a": {"theme": "dark"}, "b": {"theme": "\0"}, "c": {}}
    storage.write([(user, Merge({**metadata[user], "plan": "pro"})) for user in metadata])
    direct.execute("INSERT INTO user_metadata VALUES ('public', 'd', '{'), ('public', 'e', '[]')")
    assert direct.execute(plans).fetchall() == [('"pro"', 3)]
    if direct.info.server_version < 160000:
        older = r"strpos(user_metadata, '\u0000') = 0"
        themes = themes.replace("pg_input_is_valid(user_metadata, 'jsonb')", older)
        direct.execute("DELETE FROM user_metadata WHERE user_id = 'd'")
    found = dict(direct.execute(themes).fetchall())
    assert {user: theme for user, theme in found.items() if theme is not None} == {"a": "dark"}


# Building and dropping.


def test_updates_stay_heap_only(storage: PostgresStorage, direct: psycopg.Connection[Any]) -> None:
    """An index does not make PostgreSQL write to the table's own indexes at each update."""
    storage.write([("alice", Merge({"plan": "pro", "key": 1}))])
    for n in range(20):
        storage.write([("alice", Merge({"n": n, "plan": f"plan {n}"}))])
    storage.close()
    query = (
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
        " WHERE relid = 'user_metadata'::regclass"
    )
    deadline = time.monotonic() + 30
    while (found := direct.execute(query).fetchone() or (0, 0))[0] < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found == (20, 20)


def test_a_small_table_is_indexed_on_first_use(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """A declared index is built by the first call that needs it; later declarations add to it."""
    with opened(schema) as storage:
        storage.write([("alice", Merge({"plan": "pro", "key": 1}))])
    with opened(schema, PLAN) as storage:
        assert [*storage.find({"plan": "pro"}, "", 10)] == ["alice"]
    with opened(schema, KEY) as storage:
        storage.write([("bob", Merge({"plan": "pro", "key": 2}))])
        assert set(storage.stored_indexes()) == {PLAN, KEY}
    assert is_consistent(direct, "plan", "key")


def test_rows_in_the_way_are_named(schema: str, direct: psycopg.Connection[Any]) -> None:
    """The first use names the first row, and building all of them; then nothing is changed."""
    with opened(schema) as storage:
        rows: dict[str, Any] = {"alice": 1, "bob": 1, "carol": 1.5, "dave": "x", "eve": "x"}
        storage.write([(user, Merge({"key": value})) for user, value in rows.items()])
    with opened(schema, KEY) as storage:
        with pytest.raises(StorageError, match=r"user 'bob':.*usermetadata index --unique key`"):
            storage.find({"key": 1}, "", 10)
        faults = storage.build_indexes()
        assert [line.partition(": property")[0] for line in faults] == [
            f"app 'public': user '{user}'" for user in ("bob", "carol", "eve")
        ]
        assert "has the same value as that of user 'alice'" in faults[0]
        assert triggers(direct) == []
        with opened(schema) as other:
            other.write([(user, Clear()) for user in ("bob", "carol", "eve")])
        assert storage.build_indexes() == []
        assert is_consistent(direct, "key")


def test_a_large_table_is_indexed_by_command(schema: str, direct: psycopg.Connection[Any]) -> None:
    """A table of more than 10,000 rows is not locked by the way; its index is built beside writers.

    One of the writers knows nothing of the index, and no entry is missing or left over.
    """
    with opened(schema) as plain:
        plain.write([("user 0", Merge({}))])
        direct.execute("""
            INSERT INTO user_metadata (user_id, user_metadata)
            SELECT 'user ' || n, '{"plan": "plan ' || n % 7 || '", "n": ' || n || '}'
            FROM generate_series(1, 10000) AS n
        """)
        with opened(schema, PLAN) as storage:
            with pytest.raises(UsageError, match=r"run `.*usermetadata index --index plan` once"):
                storage.count({"plan": "plan 1"})
            stop = threading.Event()

            def write(number: int) -> None:
                n = number
                while not stop.is_set():
                    n += 1237
                    user = f"user {n % 11_000}"
                    changes = (Merge({"plan": f"plan {n % 5}"}), Clear(), Replace({"plan": n}))
                    plain.write([(user, changes[n % 3])])

            progress: list[tuple[int, int]] = []
            with ThreadPoolExecutor(2) as executor:
                writers = [executor.submit(write, number) for number in range(2)]
                try:
                    assert storage.build_indexes(lambda *each: progress.append(each)) == []
                finally:
                    stop.set()
                for writer in writers:
                    writer.result()
            assert len(progress) > 5
            assert progress[-1][0] == progress[-1][1]
            assert is_consistent(direct, "plan")
            assert storage.build_indexes() == []
            assert storage.count({"plan": "plan 6"}) > 0


def test_an_interrupted_build_leaves_nothing(schema: str, direct: psycopg.Connection[Any]) -> None:
    """Building can be interrupted, and begun again."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with opened(schema) as storage:
        storage.write([("alice", Merge({"key": 1}))])
    with opened(schema, KEY) as storage:
        with pytest.raises(KeyboardInterrupt):
            storage.build_indexes(interrupt)
        assert triggers(direct) == []
        assert storage.build_indexes() == []
        assert is_consistent(direct, "key")


def test_an_index_that_another_process_builds_meanwhile(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """Who is overtaken says so, and leaves the other's index as it is."""
    with opened(schema) as plain, opened(schema, KEY) as first, opened(schema, KEY) as second:
        plain.write([("alice", Merge({"key": 1}))])
        with pytest.raises(StorageError, match="another process has built"):
            first.build_indexes(lambda *each: second.count({"key": 1}))
        assert second.stored_indexes() == (KEY,)
        assert second.count({"key": 1}) == 1
        assert is_consistent(direct, "key")


def test_an_index_is_dropped_by_name(
    storage: PostgresStorage, schema: str, direct: psycopg.Connection[Any]
) -> None:
    """Dropping removes the entries, and at last the triggers; no search misses what it had."""
    storage.write([("alice", Merge({"plan": "pro", "key": 1}))])
    with opened(schema) as other:
        other.drop_index("nothing")
        other.drop_index("plan")
        assert other.stored_indexes() == (KEY,)
        assert is_consistent(direct, "key")
        other.drop_index("key")
        assert triggers(direct) == []
        assert entries(direct) == []
        other.drop_index("key")
    assert [*storage.find({"plan": "pro"}, "", 10)] == ["alice"]


def test_an_index_can_become_unique(schema: str) -> None:
    """A declaration that differs from the index in the database builds it anew."""
    with opened(schema, Index("key")) as storage:
        storage.write([("alice", Merge({"key": 1}))])
    with opened(schema, KEY) as storage:
        with pytest.raises(NotUniqueError):
            storage.write([("bob", Merge({"key": 1}))])
        assert storage.stored_indexes() == (KEY,)


def test_rows_in_the_way_of_uniqueness_change_nothing(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """An index that should become unique, and cannot, stays as it was and still finds users."""
    with opened(schema) as unaware, opened(schema, Index("key"), PLAN) as storage:
        values = {"alice": "x", "bob": "x", "carol": "y"}
        storage.write([(user, Merge({"key": value})) for user, value in values.items()])
        unaware.write([("dave", Merge({"key": 1.5})), ("erin", Merge({"n": 1.5}))])
        with opened(schema, KEY, Index("n")) as other:
            faults = other.build_indexes()
        assert [line.partition(": property")[0] for line in faults] == [
            f"app 'public': user '{user}'" for user in ("bob", "dave", "erin")
        ]
        assert "has the same value as that of user 'alice'" in faults[0]
        assert set(storage.stored_indexes()) == {Index("key"), PLAN}
        assert [*storage.find({"key": "x"}, "", 10)] == ["alice", "bob"]
        unaware.write([(user, Clear()) for user in ("bob", "dave", "erin")])
        with opened(schema, KEY, Index("n")) as other:
            assert other.build_indexes() == []
        assert is_consistent(direct, "key")


def test_an_index_stays_unique(storage: PostgresStorage, schema: str) -> None:
    """A program that declares a unique index as one that is not does not take uniqueness away."""
    storage.write([("alice", Merge({"key": 1}))])
    with opened(schema, Index("key")) as other:
        assert [*other.find({"key": 1}, "", 10)] == ["alice"]
        assert other.build_indexes() == []
        for writer in (other, storage):
            with pytest.raises(NotUniqueError, match="'alice'"):
                writer.write([("bob", Merge({"key": 1}))])
        other.drop_index("key")
        assert other.build_indexes() == []
        assert Index("key") in other.stored_indexes()


def test_a_table_that_was_made_again_is_indexed_again(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """Entries of a table that was dropped are not found."""
    for user in ("alice", "bob"):
        with opened(schema, KEY) as storage:
            storage.write([(user, Merge({"key": 1}))])
            assert [*storage.find({"key": 1}, "", 10)] == [user]
        direct.execute("DROP TABLE user_metadata")


# Other tables.


@pytest.mark.parametrize("name", ['100 % "users"; --%(app_id)s', "ü" * 31, "it's \\ $body$ {x}"])
def test_odd_names(schema: str, name: str) -> None:
    """Tables and properties may have any names."""
    indexes = [Index("it's 100 %s {x} $body$", unique=True), Index("a" * 64)]
    with opened(schema, *indexes, table=name) as storage:
        metadata = {index.name: f"%s {{}} ' {n}" for n, index in enumerate(indexes)}
        storage.write([("alice", Merge(metadata))])
        for index in indexes:
            where = {index.name: metadata[index.name]}
            assert storage.find(where, "", 10) == {"alice": metadata}
        with pytest.raises(NotUniqueError, match="it's 100 %s"):
            storage.write([("bob", Merge(metadata))])
        storage.drop_index(indexes[0].name)
        storage.drop_index(indexes[1].name)


def test_a_partitioned_table(schema: str, direct: psycopg.Connection[Any]) -> None:
    """A partitioned table can have indexes."""
    direct.execute("""
        CREATE TABLE user_metadata (
            app_id varchar(64) NOT NULL, user_id text NOT NULL, user_metadata text NOT NULL,
            PRIMARY KEY (app_id, user_id)) PARTITION BY HASH (app_id, user_id);
        CREATE TABLE part_0 PARTITION OF user_metadata FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE part_1 PARTITION OF user_metadata FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    """)
    with opened(schema, KEY) as storage:
        storage.write([(str(n), Merge({"key": n})) for n in range(20)])
        storage.write([(str(n), Merge({"key": 19 - n})) for n in range(20)])
        assert is_consistent(direct, "key")


def test_a_cores_table_and_a_view_cannot_be_indexed(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """The call says so before anything is changed."""
    direct.execute(CORES_TABLES.encode())
    direct.execute("CREATE VIEW users AS SELECT app_id, user_id, user_metadata FROM user_metadata")
    for table, what in {"user_metadata": "a SuperTokens core's", "users": "a view"}.items():
        with opened(schema, KEY, table=table) as storage:
            for call in (
                lambda storage=storage: storage.write([("alice", Merge({"key": 1}))]),
                lambda storage=storage: storage.find({"key": 1}, "", 10),
                storage.build_indexes,
            ):
                with pytest.raises(UsageError, match=what):
                    call()
    assert direct.execute("SELECT FROM user_metadata").fetchall() == []


def test_a_role_without_rights_on_the_entries_can_write(
    storage: PostgresStorage, schema: str, direct: psycopg.Connection[Any]
) -> None:
    """Another program's role needs rights on the table only; its rows are indexed."""
    storage.write([("alice", Merge({"key": 1}))])
    role = Identifier(f"role_{schema}")
    direct.execute(SQL("CREATE ROLE {}").format(role))
    try:
        direct.execute(SQL("GRANT USAGE ON SCHEMA {} TO {}").format(Identifier(schema), role))
        direct.execute(SQL("GRANT ALL ON user_metadata TO {}").format(role))
        direct.execute(SQL("SET ROLE {}").format(role))
        direct.execute("INSERT INTO user_metadata VALUES ('public', 'bob', '{\"key\": 2}')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            direct.execute("UPDATE user_metadata SET user_metadata = '{\"key\": 2}'")
        direct.execute("RESET ROLE")
        assert [*storage.find({"key": 2}, "", 10)] == ["bob"]
    finally:
        direct.execute("RESET ROLE")
        direct.execute(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))

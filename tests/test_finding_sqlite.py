"""Finding users in SQLite: query plans, other programs, and indexes of rows that exist."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlite_utils import Database

from usermetadata import DamagedMetadataError, SQLiteStorage, StorageError, UsageError
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import InvalidInputError, NotUniqueError
from usermetadata.indexes import Index

if TYPE_CHECKING:
    from collections.abc import Generator

INDEXES = (Index("plan"), Index("customer", unique=True))


@pytest.fixture
def storage(database: Path) -> Generator[SQLiteStorage, None, None]:
    """A storage on a file, with an index of ``plan`` and a unique one of ``customer``."""
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES, timeout=5)) as storage:
        yield storage


@pytest.fixture
def other(storage: SQLiteStorage, database: Path) -> Generator[sqlite3.Connection, None, None]:
    """Another program's connection to the file, in which the table and the indexes exist."""
    storage.write([])
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        yield connection


def insert(connection: sqlite3.Connection, user_id: str, text: object) -> None:
    """Store a row as another program does."""
    row = ("public", user_id, text)
    connection.execute("INSERT OR REPLACE INTO user_metadata VALUES (?, ?, ?)", row)


# Queries.


def test_queries_use_the_index(storage: SQLiteStorage, other: sqlite3.Connection) -> None:
    """SQLite searches in the index for each query of the storage, and sorts no page of many."""
    seen: list[str] = []
    borrowed = SQLiteStorage(Database(other), indexes=INDEXES)
    borrowed.write([("alice", Merge({"plan": "it's", "customer": 1, "n": 1}))])
    other.set_trace_callback(seen.append)
    assert borrowed.find({"plan": "it's"}, "", 5)
    assert borrowed.count({"plan": "it's"}) == 1
    assert borrowed.find({"plan": "it's", "n": 1}, "", 5)
    assert borrowed.count({"plan": "it's", "n": 1}) == 1
    assert borrowed.find({"plan": "it's", "customer": 1}, "", 5)
    other.set_trace_callback(None)
    queries = [query for query in seen if " WHERE app_id = " in query]
    assert len(queries) == 5
    for query in queries:
        plan = [detail for *_, detail in other.execute(f"EXPLAIN QUERY PLAN {query}")]
        name = "customer" if "customer" in query else "plan"
        assert plan[0].startswith(
            f"SEARCH user_metadata USING INDEX user_metadata_by_{name} (app_id=? AND <expr>=?"
        )
        assert name == "customer" or len(plan) == 1


def test_users_without_the_property_are_not_in_the_index(other: sqlite3.Connection) -> None:
    """The index has an entry only for users who can be found by it."""
    other.execute("BEGIN")
    for at in range(1000):
        insert(other, f"user {at}", '{"n":1}')
    other.execute("COMMIT")
    pages = other.execute("SELECT name, count(*) FROM dbstat GROUP BY name").fetchall()
    assert dict(pages)["user_metadata_by_plan"] == 1


# Other programs.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"plan": "caf\\u00e9"}', "café"),
        ('{"plan": "\\u0070ro"}', "pro"),
        ('{"plan": "\\ud83d\\ude00"}', "😀"),
        ('{"plan": "a\\/b"}', "a/b"),
        ('{"plan": "\\u0001\\u0009\\u007f\\u0022\\u005c"}', '\x01\t\x7f"\\'),
        ('{"plan": "\\\\u0000"}', "\\u0000"),
        (' {\n"n" : [1, {"plan": 2}],\t"plan" : 5 } ', 5),
        ('{"plan": -0}', 0),
        ('{"plan": -10}', -10),
        ('{"plan":true}', True),
        (f'{{"plan":{10**50}}}', 10**50),
    ],
)
def test_values_are_found_in_any_spelling(
    storage: SQLiteStorage, other: sqlite3.Connection, text: str, value: Any
) -> None:
    """JSON that another program wrote is found by its value, and its value is unique too."""
    insert(other, "alice", text)
    assert storage.find({"plan": value}, "", 5).keys() == {"alice"}
    assert storage.count({"plan": value}) == 1
    insert(other, "bob", text.replace('"plan"', '"customer"'))
    with pytest.raises(NotUniqueError) as caught:
        storage.write([("carol", Merge({"customer": value}))])
    assert caught.value.user_id == "bob"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"plan": 1.0}', 1),
        ('{"plan": 1e2}', 100),
        ('{"plan": "a\\u0000b"}', "a"),
        ('{"plan": null}', "null"),
        ('{"plan": ["pro"]}', "pro"),
        ('{"plan": {"plan": "pro"}}', "pro"),
        ('["plan"]', "plan"),
        ('"plan"', "plan"),
        ('{"plan": "pro"', "pro"),
        ("{'plan': 'pro'}", "pro"),
        ("", ""),
        (b'{"plan": "pro"}', "pro"),
        (b"\xff\x00\xff", "pro"),
        (5, 5),
    ],
)
def test_other_rows_disturb_no_user(
    storage: SQLiteStorage, other: sqlite3.Connection, text: object, value: Any
) -> None:
    """A row of another program that has no such value, or is damaged, is stored and not found."""
    insert(other, "alice", text)
    assert storage.find({"plan": value}, "", 5) == {}
    assert storage.count({"plan": value}) == 0
    storage.write([("alice", Replace({"plan": "free", "customer": 1}))])
    assert storage.count({"plan": "free"}) == 1


def test_a_damaged_row_that_is_found_is_reported(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """A row whose value matches, and which Python cannot hold exactly, is named in the error."""
    insert(other, "alice", '{"plan": "pro", "n": 1e999}')
    wheres: list[dict[str, Any]] = [{"plan": "pro"}, {"plan": "pro", "n": 1}]
    for where in wheres:
        with pytest.raises(DamagedMetadataError) as caught:
            storage.find(where, "", 5)
        assert caught.value.user_id == "alice"
    not_utf8 = b'{"plan":"pro","n":"\xff"}'
    other.execute("UPDATE user_metadata SET user_metadata = CAST(? AS TEXT)", [not_utf8])
    with pytest.raises(DamagedMetadataError, match="it is not UTF-8 text"):
        storage.find({"plan": "pro", "n": "x"}, "", 5)
    storage.write([("alice", Clear())])
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def test_an_error_that_is_kept_ends_the_search(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """Later reads see later writes, and the log can be emptied; a table of the caller's is free."""
    borrowed = SQLiteStorage(Database(other), indexes=INDEXES)
    for user_id in ("alice", "bob", "carol"):
        insert(other, user_id, '{"plan": "pro", "n": 1e999}')
    kept = []
    for each in (storage, borrowed):
        with pytest.raises(DamagedMetadataError) as caught:
            each.find({"plan": "pro", "n": 1}, "", 5)
        kept.append(caught)
    storage.write([("bob", Replace({"n": 2}))])
    assert storage.read(["bob"]) == borrowed.read(["bob"]) == {"bob": {"n": 2}}
    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    other.execute("DROP TABLE user_metadata")
    assert len(kept) == 2


def test_another_programs_writes_are_found(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """SQLite keeps the indexes for every writer, a storage without indexes among them."""
    insert(other, "alice", '{"plan": "pro", "customer": 1}')
    plain = SQLiteStorage(Database(other))
    plain.write([("bob", Merge({"plan": "pro"})), ("carol", Merge({"plan": ["any"]}))])
    other.execute("UPDATE user_metadata SET user_metadata = '{}' WHERE user_id = 'alice'")
    assert storage.find({"plan": "pro"}, "", 5) == {"bob": {"plan": "pro"}}


def test_uniqueness_binds_every_writer(storage: SQLiteStorage, other: sqlite3.Connection) -> None:
    """Another program's statement fails; a storage without indexes says who has the value."""
    storage.write([("alice", Merge({"customer": 1})), ("bob", Merge({"customer": 2}))])
    with pytest.raises(sqlite3.IntegrityError, match="user_metadata_by_customer"):
        other.execute("UPDATE user_metadata SET user_metadata = '{\"customer\": 1}'")
    plain = SQLiteStorage(Database(other))
    plain.write([("alice", Merge({"customer": 2})), ("bob", Merge({"customer": 1}))])
    with pytest.raises(NotUniqueError) as caught:
        plain.write([("carol", Merge({"customer": 1}))])
    assert (caught.value.name, caught.value.user_id) == ("customer", "bob")


def test_a_value_that_cannot_be_found_prevents_no_other_update(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """Another program may have stored it; only changes that store it again are refused."""
    insert(other, "alice", '{"plan": 1.5, "n": 1}')
    assert storage.write([("alice", Merge({"n": 2}))]) == [{"plan": 1.5, "n": 2}]
    for change in (Merge({"plan": 1.5}), Replace({"plan": 1.5}), Modify(lambda old: {**old})):
        with pytest.raises(InvalidInputError, match="property 'plan' has an index"):
            storage.write([("alice", change)])
    assert storage.write([("alice", Merge({"plan": "pro"}))]) == [{"plan": "pro", "n": 2}]
    assert storage.find({"plan": "pro"}, "", 5).keys() == {"alice"}


def test_another_index_that_refuses_a_row_is_reported_as_before(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """A unique index of another program gives a ``StorageError`` with the driver's message."""
    other.execute("CREATE UNIQUE INDEX one_user ON user_metadata (length(app_id))")
    storage.write([("alice", Merge({}))])
    with pytest.raises(StorageError, match="index 'one_user'"):
        storage.write([("bob", Merge({}))])


def test_other_columns_survive_a_swap(storage: SQLiteStorage, other: sqlite3.Connection) -> None:
    """Users exchange their values without a row being removed and inserted again."""
    other.execute("ALTER TABLE user_metadata ADD COLUMN note TEXT")
    storage.write([("alice", Merge({"customer": 1})), ("bob", Merge({"customer": 2}))])
    other.execute("UPDATE user_metadata SET note = user_id")
    storage.write([("alice", Merge({"customer": 2})), ("bob", Merge({"customer": 1}))])
    rows = other.execute("SELECT user_id, note FROM user_metadata ORDER BY user_id").fetchall()
    assert rows == [("alice", "alice"), ("bob", "bob")]


def test_the_report_of_the_documentation(storage: SQLiteStorage, other: sqlite3.Connection) -> None:
    """The query of the page counts the users of each plan, beside rows that are no JSON."""
    page = Path(__file__).parent.parent / "docs" / "finding.md"
    query, *_ = re.findall(r"```sql\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    storage.write([(user_id, Merge({"plan": "pro", "text": "\0"})) for user_id in "ab"])
    insert(other, "damaged", "{")
    insert(other, "list", "[]")
    assert dict(other.execute(query).fetchall()) == {"pro": 2, None: 1}


# A batch of several calls.


def test_each_call_of_a_shared_transaction_is_unique(database: Path) -> None:
    """A call is refused if its values are another's at its turn, whatever comes after it."""
    storage = SQLiteStorage(database, indexes=INDEXES)
    storage.write([("carol", Merge({"customer": 1}))])
    begun, go_on = threading.Event(), threading.Event()
    outcomes: list[object] = []

    def slow(metadata: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(30)
        return metadata

    def claim(customer: int) -> None:
        try:
            outcomes.append(storage.write([("alice", Merge({"customer": customer}))])[0])
        except NotUniqueError:
            outcomes.append("refused")

    threads = [threading.Thread(target=lambda: storage.write([("slow", Modify(slow))]))]
    threads[0].start()
    assert begun.wait(30)
    threads += [threading.Thread(target=claim, args=(1 + at % 2 * 5,)) for at in range(6)]
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == sorted(["refused", "{'customer': 6}"] * 3)
    storage.close()


# Transactions of the caller.


def test_within_writes_and_finds(storage: SQLiteStorage, other: sqlite3.Connection) -> None:
    """In a caller's transaction users are found as it sees them, and a refusal undoes one write."""
    storage.write([("alice", Merge({"customer": 1, "plan": "pro"}))])
    other.execute("BEGIN")
    with storage.within(other) as joined:
        assert joined.indexes == INDEXES
        joined.write([("bob", Merge({"plan": "pro"}))])
        with pytest.raises(NotUniqueError) as caught:
            joined.write([("dave", Merge({})), ("bob", Merge({"customer": 1}))])
        assert caught.value.user_id == "alice"
        with pytest.raises(InvalidInputError):
            joined.write([("dave", Merge({"plan": []}))])
        assert joined.find({"plan": "pro"}, "", 5).keys() == {"alice", "bob"}
        assert joined.count(None) == 2
    assert storage.count({"plan": "pro"}) == 1
    other.execute("COMMIT")
    assert storage.find({"plan": "pro"}, "", 5).keys() == {"alice", "bob"}


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_within_builds_the_indexes(database: Path, end: str) -> None:
    """The first write in a caller's transaction builds table and indexes; a rollback undoes it."""
    storage = SQLiteStorage(database, indexes=INDEXES)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        with storage.within(connection) as joined:
            assert joined.find({"plan": "pro"}, "", 5) == {}
            joined.write([("alice", Merge({"customer": 1}))])
            assert set(joined.stored_indexes()) == set(INDEXES)
        connection.execute(end)
        connection.execute("BEGIN")
        with storage.within(connection) as joined:
            joined.write([("alice", Merge({"customer": 1}))])
            with pytest.raises(NotUniqueError):
                joined.write([("bob", Merge({"customer": 1}))])
        connection.execute("COMMIT")
    assert storage.count({"customer": 1}) == 1
    storage.close()


def test_within_reads_without_building(database: Path) -> None:
    """A read in a caller's transaction finds users before any index exists, and locks nothing."""
    with contextlib.closing(SQLiteStorage(database)) as plain:
        plain.write([("alice", Merge({"plan": "pro"}))])
    storage = SQLiteStorage(database, indexes=INDEXES)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        with storage.within(connection) as joined:
            assert joined.find({"plan": "pro"}, "", 5).keys() == {"alice"}
            assert joined.count({"plan": "pro", "n": 1}) == 0
            assert joined.stored_indexes() == ()
        with contextlib.closing(SQLiteStorage(database, timeout=1)) as plain:
            plain.write([("bob", Merge({"plan": "pro"}))])
        connection.execute("COMMIT")
    storage.close()


def test_a_borrowed_transaction_that_is_rolled_back_takes_the_indexes_along() -> None:
    """The next write builds them again."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        storage = SQLiteStorage(Database(connection), indexes=INDEXES)
        connection.execute("BEGIN")
        storage.write([("alice", Merge({"customer": 1}))])
        connection.execute("ROLLBACK")
        assert storage.find({"customer": 1}, "", 5) == {}
        storage.write([("alice", Merge({"customer": 1}))])
        with pytest.raises(NotUniqueError):
            storage.write([("bob", Merge({"customer": 1}))])


# Rows that exist.


def fill(database: Path, rows: dict[str, Any]) -> None:
    """Store rows without indexes."""
    with contextlib.closing(SQLiteStorage(database)) as plain:
        plain.write([(user_id, Replace(metadata)) for user_id, metadata in rows.items()])


def fill_many(database: Path, number: int) -> None:
    """Store users with one of 100 plans, and each with a customer of their own."""
    fill(database, {})
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        query = """
            WITH RECURSIVE user (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM user LIMIT ?)
            INSERT INTO user_metadata
            SELECT 'public', printf('user %05d', n), json_object('plan', n % 100, 'customer', n)
            FROM user
        """
        connection.execute(query, [number])


@pytest.mark.parametrize("first", ["find", "count", "read", "write"])
def test_a_small_file_is_indexed_at_the_first_call(database: Path, first: str) -> None:
    """Any first call builds the indexes of up to 10,000 rows."""
    fill_many(database, 10_000)
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as storage:
        if first == "find":
            assert list(storage.find({"plan": 7}, "", 2)) == ["user 00007", "user 00107"]
        elif first == "count":
            assert storage.count({"plan": 7}) == 100
        elif first == "read":
            assert storage.read(["user 00007"])
        else:
            with pytest.raises(NotUniqueError):
                storage.write([("alice", Merge({"customer": 7}))])
        assert set(storage.stored_indexes()) == set(INDEXES)


def test_a_large_file_is_indexed_by_command(database: Path) -> None:
    """Above 10,000 rows each call says what to run, until the indexes were built."""
    fill_many(database, 10_001)
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as storage:
        command = "python -m usermetadata index --index plan --unique customer"
        advice = f"index 'plan': it does not exist.*run `{command}` once"
        with pytest.raises(UsageError, match=advice):
            storage.find({"plan": 1}, "", 5)
        with pytest.raises(UsageError, match=advice):
            storage.write([("alice", Merge({}))])
        with (
            contextlib.closing(sqlite3.connect(database)) as connection,
            storage.within(connection) as joined,
        ):
            with pytest.raises(UsageError, match=advice):
                joined.find({"plan": 1}, "", 5)
            with pytest.raises(UsageError, match=advice):
                joined.write([("alice", Merge({}))])
            assert joined.read(["user 00001"])
        assert storage.stored_indexes() == ()
        reports: list[tuple[int, int]] = []
        assert storage.build_indexes(lambda done, total: reports.append((done, total))) == []
        assert reports == [(10_000, 10_001), (10_001, 10_001)]
        assert set(storage.stored_indexes()) == set(INDEXES)
        assert storage.count({"plan": 0}) == 101


@pytest.mark.parametrize("change", ["none", "unfindable", "repeated"])
def test_writers_go_on_while_an_index_is_built(database: Path, change: str) -> None:
    """A writer does not wait while rows are read; what it wrote then is not overlooked."""
    fill_many(database, 10_001)
    value = {"none": -1, "unfindable": [], "repeated": 7}[change]
    text = json.dumps({"customer": value})
    with (
        contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as storage,
        contextlib.closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as other,
    ):
        lines = storage.build_indexes(lambda done, total: insert(other, "new", text))
        assert len(lines) == (change != "none")
        assert len(storage.stored_indexes()) == (2 if change == "none" else 0)


IN_THE_WAY: dict[str, Any] = {
    "ok": {"customer": 1, "plan": "pro"},
    "float": {"plan": 1.0},
    "long": {"plan": "s3cret" * 50, "customer": ["s3cret"]},
    "null byte": {"customer": "s3cret\0"},
    "escaped": {"plan": '"' * 255},
    "same": {"customer": 1},
}


def test_rows_in_the_way_are_listed(database: Path) -> None:
    """Each row that cannot be indexed is named before anything changes, never its value."""
    fill(database, IN_THE_WAY)
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as storage:
        with pytest.raises(StorageError, match=r"app 'public'.*usermetadata index --index plan"):
            storage.find({"plan": "pro"}, "", 5)
        lines = storage.build_indexes()
        assert [line.partition(" is ")[0] for line in sorted(lines[:-1])] == [
            "app 'public': user 'float': property 'plan'",
            "app 'public': user 'long': property 'customer'",
            "app 'public': user 'long': property 'plan'",
            "app 'public': user 'null byte': property 'customer'",
        ]
        assert lines[-1].startswith("app 'public': user 'same': property 'customer' has the same")
        assert "s3cret" not in "".join(lines)
        assert storage.stored_indexes() == ()
    fill(database, {user_id: {} for user_id in ("float", "long", "null byte")})
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as storage:
        [line] = storage.build_indexes()
        assert line.startswith("app 'public': user 'same': property 'customer'")
        assert "user 'ok'" in line
        with pytest.raises(StorageError, match=r"user 'same'.*python -m usermetadata index"):
            storage.write([("alice", Merge({}))])
        assert storage.stored_indexes() == ()
    fill(database, {"same": {"customer": 2}})
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as storage:
        assert storage.count({"customer": 2}) == 1


def test_damaged_rows_are_not_in_the_way(storage: SQLiteStorage, database: Path) -> None:
    """Indexes are built beside rows of other programs that hold no JSON object."""
    fill(database, {"alice": {"plan": "pro"}})
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        for at, text in enumerate(["", "x", "[1]", b"\xff", '{"plan":null}', '{"plan":1e999}', 5]):
            insert(other, f"user {at}", text)
        other.execute("INSERT INTO user_metadata VALUES (x'00', x'ff', '{\"plan\":[]}')")
        other.execute("INSERT INTO user_metadata VALUES ('a', 'b', CAST(x'ff' AS TEXT))")
    assert storage.count({"plan": "pro"}) == 1


def test_an_index_becomes_unique(database: Path) -> None:
    """Declaring an index unique replaces it; a unique one serves a storage that asks for less."""
    plain, unique = Index("plan"), Index("plan", unique=True)
    for declared, stored in [(plain, plain), (unique, unique), (plain, unique)]:
        with contextlib.closing(SQLiteStorage(database, indexes=[declared])) as storage:
            storage.write([("alice", Merge({"plan": 1}))])
            assert storage.find({"plan": 1}, "", 5).keys() == {"alice"}
            assert storage.stored_indexes() == (stored,)


def test_an_index_that_another_process_drops_is_missed(
    storage: SQLiteStorage, database: Path
) -> None:
    """No call scans, and no value is stored twice: a write builds the index again."""
    storage.write([("alice", Merge({"customer": 1, "plan": "pro"}))])
    with contextlib.closing(SQLiteStorage(database)) as other:
        other.drop_index("plan")
        with pytest.raises(StorageError, match=r"no such index.*repeat the call"):
            storage.find({"plan": "pro"}, "", 5)
        assert storage.find({"plan": "pro"}, "", 5).keys() == {"alice"}
        other.drop_index("customer")
        with pytest.raises(NotUniqueError):
            storage.write([("bob", Merge({"customer": 1}))])


def test_an_index_that_was_built_by_a_refused_write_is_built_again(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """A write that builds an index and fails builds nothing, whatever was known of the schema."""
    storage.write([("alice", Merge({"customer": 1}))])
    for _ in range(3):
        other.execute("DROP INDEX user_metadata_by_customer")
        with pytest.raises(NotUniqueError):
            storage.write([("bob", Merge({"customer": 1}))])
        # SQLite counts this change as it has counted the one that was undone.
        other.execute("CREATE TABLE theirs (n)")
        with pytest.raises(NotUniqueError):
            storage.write([("bob", Merge({"customer": 1}))])
        storage.write([("alice", Merge({}))])
        assert set(storage.stored_indexes()) == set(INDEXES)
        other.execute("DROP TABLE theirs")


def test_indexes_of_other_programs_are_not_ours(
    storage: SQLiteStorage, other: sqlite3.Connection
) -> None:
    """Only what this library has built is listed, and one with the name of ours is replaced."""
    storage.drop_index("plan")
    other.execute("CREATE INDEX user_metadata_by_plan ON user_metadata (user_id)")
    other.execute('CREATE INDEX "user_metadata_by_é" ON user_metadata (user_id)')
    other.execute("CREATE INDEX theirs ON user_metadata (user_id)")
    assert storage.stored_indexes() == (Index("customer", unique=True),)
    storage.write([("alice", Merge({"plan": "pro"}))])
    assert set(storage.stored_indexes()) == set(INDEXES)


def test_sqlite_utils_keeps_the_indexes(storage: SQLiteStorage, database: Path) -> None:
    """``sqlite-utils transform``, which makes a new table, takes the indexes along."""
    storage.write([("alice", Merge({"plan": "pro"}))])
    storage.close()
    with contextlib.closing(Database(database)) as db:
        db.table("user_metadata").transform(defaults={"user_metadata": "{}"})
    with contextlib.closing(SQLiteStorage(database, indexes=INDEXES)) as later:
        assert set(later.stored_indexes()) == set(INDEXES)
        assert later.count({"plan": "pro"}) == 1


def test_no_message_quotes_metadata(storage: SQLiteStorage) -> None:
    """Neither a refused nor a repeated value is in the error."""
    storage.write([("alice", Merge({"customer": "s3cret"}))])
    for value in ("s3cret", ["s3cret"], "s3cret\0", "s3cret" * 50):
        with pytest.raises((NotUniqueError, InvalidInputError)) as caught:
            storage.write([("bob", Merge({"customer": value}))])
        assert "s3cret" not in json.dumps([str(caught.value), str(caught.value.__cause__)])

"""``erase`` removes a user from every app of a storage, in one transaction."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner
from postgres_server import server_url, waiting_for_locks
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier
from sqlite_utils import Database
from sqlite_utils.cli import cli

from usermetadata import (
    DamagedMetadataError,
    Index,
    InMemoryStorage,
    PostgresStorage,
    SQLiteStorage,
    StorageBusyError,
    StorageError,
    UsageError,
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.storage import ErasingStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata import Storage
    from usermetadata.codec import Metadata

APPS = ["public", "shop", "Shop", "\u00fc", "a'b\"%s{}", "\U0001f600"]


@pytest.fixture
def storage(storage: Storage) -> ErasingStorage:
    """Every storage in turn, empty."""
    assert isinstance(storage, ErasingStorage)
    return storage


@pytest.fixture
def postgres(schema: str) -> Generator[PostgresStorage, None, None]:
    """A storage in that schema, with rows of alice in two apps and one of bob."""
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        fill(storage)
        yield storage


@pytest.fixture
def sqlite(database: Path) -> Generator[SQLiteStorage, None, None]:
    """A storage in that file, with the same rows."""
    with contextlib.closing(SQLiteStorage(database)) as storage:
        fill(storage)
        yield storage


ROWS = {
    ("public", "alice"): {"app": "public"},
    ("public", "bob"): {"app": "public"},
    ("shop", "alice"): {"app": "shop"},
}
ALICES = {"public": {"app": "public"}, "shop": {"app": "shop"}}


def fill(storage: Storage) -> None:
    """Store ``ROWS``."""
    for (app_id, user_id), metadata in ROWS.items():
        storage.for_app(app_id).write([(user_id, Replace(metadata))])


def stored(storage: Storage) -> dict[tuple[str, str], Metadata]:
    """Return those of ``ROWS`` that are stored, as they are stored."""
    return {
        (app_id, user_id): metadata
        for app_id in ("public", "shop")
        for user_id, metadata in storage.for_app(app_id).read(["alice", "bob"]).items()
    }


def accept(_: Metadata) -> None:
    """Accept any metadata."""


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {"n": metadata.get("n", 0) + 1}


def test_a_user_is_removed_from_all_apps(storage: ErasingStorage) -> None:
    """All rows of the user are returned by app, from whichever app it is called; others stay."""
    users = ["alice", "Alice", "alice "]
    for number, app_id in enumerate(APPS):
        changes = [(user_id, Replace({"n": [number, user_id, "\0"]})) for user_id in users]
        storage.for_app(app_id).write(changes)
    storage.for_app("empty").write([("alice", Replace({}))])
    checked: list[Metadata] = []
    removed = storage.for_app("another").erase("alice", checked.append)
    expected = {app_id: {"n": [n, "alice", "\0"]} for n, app_id in enumerate(APPS)}
    assert removed == {**expected, "empty": {}}
    assert list(removed.values()) == checked
    for number, app_id in enumerate(APPS):
        left = {user_id: {"n": [number, user_id, "\0"]} for user_id in users[1:]}
        assert storage.for_app(app_id).read(users) == left


def test_a_user_without_rows(storage: ErasingStorage) -> None:
    """Nothing is returned, nothing is checked: before the first write, and after an erasure."""

    def refuse(metadata: Metadata) -> None:
        raise AssertionError(metadata)

    assert storage.erase("alice", refuse) == {}
    fill(storage)
    assert storage.erase("alice", accept) == ALICES
    assert storage.erase("alice", refuse) == {}
    storage.write([("alice", Merge({"new": True}))])
    assert storage.erase("alice", accept) == {"public": {"new": True}}


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        sqlite3.OperationalError("database is locked"),
        psycopg.errors.SerializationFailure("again"),
        StorageBusyError("busy"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("app_id", ["public", "shop"])
def test_what_a_check_raises_keeps_all_rows(
    storage: ErasingStorage, app_id: str, error: Exception
) -> None:
    """The exception propagates unchanged, also one that a database could raise; no row is gone."""
    fill(storage)
    checked: list[Metadata] = []

    def check(metadata: Metadata) -> None:
        checked.append(metadata)
        if metadata == {"app": app_id}:
            raise error

    with pytest.raises(type(error)) as caught:
        storage.erase("alice", check)
    assert caught.value is error
    assert {"app": app_id} in checked
    assert len(checked) <= len(ALICES)
    assert stored(storage) == ROWS
    assert storage.erase("alice", accept) == ALICES


def test_a_check_cannot_write(storage: ErasingStorage) -> None:
    """A write inside the check, which the erasure could undo, is refused where locks are shared."""
    if isinstance(storage, PostgresStorage):
        pytest.skip("each call has a connection")
    fill(storage)

    def write(_: Metadata) -> None:
        storage.write([("bob", Clear())])

    with pytest.raises(UsageError, match="a write inside a write of the same thread"):
        storage.erase("alice", write)
    with pytest.raises(UsageError, match="a write inside a write of the same thread"):
        storage.write([("bob", lambda old: storage.erase("alice", accept) and old)])
    assert stored(storage) == ROWS


def test_a_closed_storage_erases_nothing(storage: ErasingStorage) -> None:
    """As with a write, the error says that the storage is closed."""
    storage.write([("alice", Merge({"n": 1}))])
    storage.close()
    with pytest.raises(UsageError, match="closed"):
        storage.erase("alice", accept)


def test_no_update_is_lost_to_an_erasure(storage: ErasingStorage) -> None:
    """Each update during erasures is in the result of exactly one of them, or is still stored."""
    apps = ["public", "shop", "blog"]
    updates, erasers = 40, 2
    writers = apps * 2
    together = threading.Barrier(len(writers) + erasers)

    def update(app_id: str) -> None:
        in_app = storage.for_app(app_id)
        together.wait()
        for _ in range(updates):
            in_app.write([("alice", Modify(count)), ("bob", Modify(count))])

    def erase() -> int:
        total = 0
        together.wait()
        while not all(future.done() for future in updating):
            removed = storage.erase("alice", accept)
            total += sum(metadata["n"] for metadata in removed.values())
        return total

    with ThreadPoolExecutor(len(writers) + erasers) as executor:
        updating = [executor.submit(update, app_id) for app_id in writers]
        erasing = [executor.submit(erase) for _ in range(erasers)]
        for future in updating:
            future.result()
        erased = sum(future.result() for future in erasing)
    users = [storage.for_app(app_id).read(["alice", "bob"]) for app_id in apps]
    remaining = sum(found.get("alice", {"n": 0})["n"] for found in users)
    assert erased + remaining == updates * len(writers)
    assert sum(found["bob"]["n"] for found in users) == updates * len(writers)


@pytest.fixture
def switching() -> Generator[None, None, None]:
    """Let threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_erasing_from_memory_that_grows() -> None:
    """Threads may store new users while the rows of one are looked for."""
    storage = InMemoryStorage()
    storage.write([(f"user {n}", Replace({})) for n in range(20_000)])
    is_done = threading.Event()

    def store() -> None:
        number = 0
        while not is_done.is_set():
            storage.write([(f"new {number}", Replace({})), ("alice", Merge({}))])
            number += 1

    with ThreadPoolExecutor(1) as executor:
        storing = executor.submit(store)
        try:
            for _ in range(20):
                assert storage.erase("alice", accept) in ({}, {"public": {}})
        finally:
            is_done.set()
        storing.result()


# Damage, and what swallows an erasure.


def test_a_damaged_row_keeps_all_rows_in_sqlite(sqlite: SQLiteStorage, database: Path) -> None:
    """The error names user and app. Once the row is cleared, the user can be erased."""
    for damage in ("", "[1]", b"\xff{"):
        with contextlib.closing(sqlite3.connect(database)) as other, other:
            other.execute(
                "UPDATE user_metadata SET user_metadata = CAST(? AS TEXT) WHERE app_id = 'shop'",
                [damage],
            )
        with pytest.raises(DamagedMetadataError, match="'alice' in app 'shop' is damaged"):
            sqlite.erase("alice", accept)
        assert sqlite.read(["alice", "bob"]) == {
            "alice": {"app": "public"},
            "bob": ROWS["public", "bob"],
        }
    sqlite.for_app("shop").write([("alice", Clear())])
    assert sqlite.erase("alice", accept) == {"public": {"app": "public"}}


def test_a_damaged_row_keeps_all_rows_in_postgres(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """The error names user and app. Once the row is cleared, the user can be erased."""
    for damage in ("", "[1]", "{"):
        direct.execute(
            "UPDATE user_metadata SET user_metadata = %s WHERE app_id = 'shop'", [damage]
        )
        with pytest.raises(DamagedMetadataError, match="'alice' in app 'shop' is damaged"):
            postgres.erase("alice", accept)
        assert direct.execute("SELECT count(*) FROM user_metadata").fetchone() == (len(ROWS),)
    postgres.for_app("shop").write([("alice", Clear())])
    assert postgres.erase("alice", accept) == {"public": {"app": "public"}}


def test_an_app_id_that_is_not_text(sqlite: SQLiteStorage, database: Path) -> None:
    """A row that another program wrote is named and keeps all rows, so it is not left behind."""
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute("INSERT INTO user_metadata VALUES (x'6162', 'alice', '{}')")
    with pytest.raises(DamagedMetadataError, match=r"an app id of user 'alice' is not text: b'ab'"):
        sqlite.erase("alice", accept)
    assert stored(sqlite) == ROWS


def test_a_swallowed_erasure_is_an_error_in_sqlite(sqlite: SQLiteStorage, database: Path) -> None:
    """A trigger that keeps one row keeps all; the error names the app and the trigger."""
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute(
            "CREATE TRIGGER soft BEFORE DELETE ON user_metadata WHEN OLD.app_id = 'shop'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StorageError, match=r"did not store.*'alice' in app 'shop'.*a trigger"):
        sqlite.erase("alice", accept)
    assert stored(sqlite) == ROWS
    assert sqlite.erase("bob", accept) == {"public": {"app": "public"}}


@pytest.mark.parametrize(
    "body",
    [
        "IF OLD.app_id = 'shop' THEN RETURN NULL; END IF;",
        """IF OLD.app_id = 'shop' THEN
            UPDATE user_metadata SET user_metadata = '{"deleted":true}'
                WHERE app_id = OLD.app_id AND user_id = OLD.user_id;
            RETURN NULL;
        END IF;""",
    ],
    ids=["trigger", "soft delete"],
)
def test_a_swallowed_erasure_is_an_error_in_postgres(
    postgres: PostgresStorage, direct: psycopg.Connection[Any], body: str
) -> None:
    """A trigger that keeps one row keeps all, and what the trigger itself did is undone."""
    direct.execute(
        f"""
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
            BEGIN {body} RETURN OLD; END $$;
        CREATE TRIGGER keep BEFORE DELETE ON user_metadata FOR EACH ROW EXECUTE FUNCTION keep();
    """.encode()
    )
    with pytest.raises(StorageError, match="of user 'alice', without an error: a trigger"):
        postgres.erase("alice", accept)
    assert stored(postgres) == ROWS
    assert postgres.erase("bob", accept) == {"public": {"app": "public"}}


def test_a_rule_is_an_error(postgres: PostgresStorage, direct: psycopg.Connection[Any]) -> None:
    """A rule that does something else instead of removing is named; nothing is removed."""
    direct.execute("CREATE RULE instead AS ON DELETE TO user_metadata DO INSTEAD NOTHING")
    with pytest.raises(StorageError, match=r"a rule on the table.*nothing was.*drop the rule"):
        postgres.erase("alice", accept)
    assert stored(postgres) == ROWS


def test_a_role_that_may_not_see_all_rows_cannot_erase(
    postgres: PostgresStorage, direct: psycopg.Connection[Any], schema: str
) -> None:
    """A row that a policy hides would be left behind without an error, so the call raises one."""
    role = Identifier(f"role_{schema}")
    direct.execute(SQL("CREATE ROLE {}").format(role))
    grant = "GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT ALL ON user_metadata TO {role}"
    direct.execute(SQL(grant).format(schema=Identifier(schema), role=role))
    direct.execute("ALTER TABLE user_metadata ENABLE ROW LEVEL SECURITY")
    direct.execute("CREATE POLICY one_app ON user_metadata USING (app_id = 'public')")
    url = make_conninfo(server_url(), options=f"-c role={role.as_string()[1:-1]}")
    try:
        with contextlib.closing(PostgresStorage(url, schema=schema)) as restricted:
            for user_id in ("alice", "carol"):
                with pytest.raises(StorageError, match=f"'{user_id}'.*row-level policy"):
                    restricted.erase(user_id, accept)
        assert stored(postgres) == ROWS
    finally:
        direct.execute(SQL("DROP OWNED BY {role}; DROP ROLE {role}").format(role=role))


# Other transactions.


def erase_during(
    postgres: PostgresStorage,
    direct: psycopg.Connection[Any],
    before: list[str],
    meanwhile: Callable[[], object],
) -> dict[str, Metadata]:
    """Erase alice while a transaction has executed some statements, and commit it then."""
    with ThreadPoolExecutor(1) as executor:
        with direct.transaction():
            for statement in before:
                direct.execute(statement.encode())
            erasing = executor.submit(postgres.erase, "alice", accept)
            waiting_for_locks(1)
            meanwhile()
        return erasing.result(60)


IN_PUBLIC = "user_metadata WHERE app_id = 'public' AND user_id = 'alice'"


def test_an_erasure_waits_for_the_writers_before_it(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """It removes what they stored, also rows that were written in further apps meanwhile.

    Otherwise the later of two writes could be erased and the earlier one stay.
    """
    removed = erase_during(
        postgres,
        direct,
        ["""UPDATE user_metadata SET user_metadata = '{"n":1}' WHERE app_id = 'public'"""],
        lambda: postgres.for_app("blog").write([("alice", Merge({"earlier": True}))]),
    )
    assert removed == {"blog": {"earlier": True}, "public": {"n": 1}, "shop": {"app": "shop"}}
    assert stored(postgres) == {("public", "bob"): {"n": 1}}


@pytest.mark.parametrize(
    ("then", "left"),
    [
        ([], {}),
        (
            ["""INSERT INTO user_metadata VALUES ('public', 'alice', '{"new":1}')"""],
            {"public": {"new": 1}},
        ),
    ],
    ids=["removed", "replaced"],
)
def test_a_row_that_another_transaction_removes_meanwhile(
    postgres: PostgresStorage,
    direct: psycopg.Connection[Any],
    then: list[str],
    left: dict[str, Metadata],
) -> None:
    """It is not taken for one that a trigger has kept; one in its place is removed."""
    removed = erase_during(postgres, direct, [f"DELETE FROM {IN_PUBLIC}", *then], lambda: None)
    assert removed == {"shop": {"app": "shop"}, **left}
    assert stored(postgres) == {("public", "bob"): {"app": "public"}}


def test_an_erasure_waits_as_long_as_the_timeout(
    postgres: PostgresStorage, direct: psycopg.Connection[Any], schema: str
) -> None:
    """A lock that another transaction keeps raises ``StorageBusyError``; nothing is removed."""
    impatient = PostgresStorage(server_url(), schema=schema, timeout=1)
    with contextlib.closing(impatient):
        with direct.transaction():
            direct.execute(f"SELECT FROM {IN_PUBLIC} FOR UPDATE".encode())
            with pytest.raises(StorageBusyError):
                impatient.erase("alice", accept)
        assert stored(postgres) == ROWS
        assert impatient.erase("alice", accept) == ALICES


def test_the_locks_of_a_core(schema: str, direct: psycopg.Connection[Any]) -> None:
    """On a core's table the erasure waits for the core's lock in each app, and holds it then."""
    direct.execute("""
        CREATE TABLE apps (app_id varchar(64) PRIMARY KEY);
        INSERT INTO apps VALUES ('public'), ('shop');
        CREATE TABLE user_metadata (
            app_id varchar(64) DEFAULT 'public' REFERENCES apps ON DELETE CASCADE,
            user_id varchar(128) NOT NULL,
            user_metadata text NOT NULL,
            PRIMARY KEY (app_id, user_id));
    """)
    free: list[bool] = []

    def check(_: Metadata) -> None:
        for key in ("public~alice", "shop~alice", "shop~bob"):
            row = direct.execute("SELECT pg_try_advisory_xact_lock(hashtext(%s))", [key]).fetchone()
            assert row is not None
            free.append(row[0])

    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        fill(storage)
        read: list[object] = []

        def update_as_a_core() -> None:
            # It has read before the erasure could remove the row, and writes what it read.
            read.extend(direct.execute(f"SELECT user_metadata FROM {IN_PUBLIC}".encode()))
            direct.execute(
                """UPDATE user_metadata SET user_metadata = '{"core":1}' WHERE user_id = 'alice'"""
            )

        lock = "SELECT pg_advisory_xact_lock(hashtext('public~alice'))"
        removed = erase_during(storage, direct, [lock], update_as_a_core)
        assert read == [('{"app":"public"}',)]
        assert removed == {"public": {"core": 1}, "shop": {"core": 1}}
        assert storage.read(["alice", "bob"]) == {"bob": {"app": "public"}}
        fill(storage)
        assert storage.erase("alice", check) == ALICES
        assert free == [False, False, True] * 2
        assert storage.erase("x" * 200, accept) == {}


def test_a_connection_that_is_lost_before_the_commit(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """The erasure is repeated: the check is called again, and the result is whole."""
    checked: list[Metadata] = []

    def check(metadata: Metadata) -> None:
        checked.append(metadata)
        if len(checked) == len(ALICES):
            direct.execute("""
                SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
                WHERE application_name = 'usermetadata' AND state = 'idle in transaction'
            """)

    assert postgres.erase("alice", check) == ALICES
    assert checked == [*ALICES.values()] * 2
    assert stored(postgres) == {("public", "bob"): {"app": "public"}}


def test_to_erase_creates_nothing(schema: str, direct: psycopg.Connection[Any]) -> None:
    """Without a table nothing is stored, and none is created."""
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        assert storage.erase("alice", accept) == {}
    assert direct.execute("SELECT to_regclass('user_metadata')").fetchone() == (None,)


# Tables of other kinds.

POSTGRES_TABLES = {
    "user_id first": ["CREATE TABLE user_metadata ({columns}, PRIMARY KEY (user_id, app_id))"],
    "index of user_id": [
        "CREATE TABLE user_metadata ({columns}, PRIMARY KEY (app_id, user_id))",
        "CREATE INDEX ON user_metadata (user_id)",
    ],
    "partial index": [
        "CREATE TABLE user_metadata ({columns}, PRIMARY KEY (app_id, user_id))",
        "CREATE INDEX ON user_metadata (user_id) WHERE app_id = 'shop'",
    ],
    "unique": ["CREATE TABLE user_metadata ({columns}, UNIQUE (app_id, user_id))"],
    "partitioned": [
        "CREATE TABLE user_metadata ({columns}) PARTITION BY LIST (app_id)",
        "ALTER TABLE user_metadata ADD UNIQUE (app_id, user_id)",
        "CREATE TABLE of_shop PARTITION OF user_metadata FOR VALUES IN ('shop')",
        "CREATE TABLE of_others PARTITION OF user_metadata DEFAULT",
    ],
    "view": [
        "CREATE TABLE other ({columns}, PRIMARY KEY (app_id, user_id))",
        "CREATE VIEW user_metadata AS SELECT * FROM other",
    ],
}


@pytest.mark.parametrize("statements", POSTGRES_TABLES.values(), ids=POSTGRES_TABLES)
def test_tables_in_postgres(
    schema: str, direct: psycopg.Connection[Any], statements: list[str]
) -> None:
    """All rows are found whatever indexes and partitions there are, also in a view."""
    for statement in statements:
        columns = "app_id varchar(64), user_id varchar(255), user_metadata text"
        direct.execute(statement.format(columns=columns).encode())
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        fill(storage)
        assert storage.erase("alice", accept) == ALICES
        assert stored(storage) == {("public", "bob"): {"app": "public"}}


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE user_metadata ({columns}, PRIMARY KEY (user_id, app_id))"],
        [
            "CREATE TABLE user_metadata ({columns}, PRIMARY KEY (app_id, user_id))",
            "CREATE INDEX users ON user_metadata (user_id)",
        ],
        [
            "CREATE TABLE user_metadata ({columns}, PRIMARY KEY (app_id, user_id))",
            "CREATE INDEX users ON user_metadata (user_id) WHERE app_id = 'shop'",
        ],
        ["CREATE TABLE user_metadata ({columns}, PRIMARY KEY (app_id, user_id)) WITHOUT ROWID"],
    ],
    ids=["user_id first", "index of user_id", "partial index", "without rowid"],
)
def test_tables_in_sqlite(database: Path, statements: list[str]) -> None:
    """All rows are found whatever indexes there are."""
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        for statement in statements:
            other.execute(statement.format(columns="app_id TEXT, user_id TEXT, user_metadata TEXT"))
    with contextlib.closing(SQLiteStorage(database)) as storage:
        fill(storage)
        assert storage.erase("alice", accept) == ALICES
        assert stored(storage) == {("public", "bob"): {"app": "public"}}


@pytest.mark.parametrize("index", ["(app_id, user_id)", "(user_id, app_id)"])
def test_sqlite_does_not_read_every_row(index: str) -> None:
    """With either order of the key an erasure takes few steps, however many users there are."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute(
            "CREATE TABLE user_metadata (app_id TEXT, user_id TEXT, user_metadata TEXT,"
            f" PRIMARY KEY {index})"
        )
        storage = SQLiteStorage(Database(connection))
        connection.execute("""
            WITH RECURSIVE number (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM number LIMIT 20000)
            INSERT INTO user_metadata
            SELECT 'app ' || (n % 20), 'user ' || (n / 20), '{}' FROM number
        """)
        assert storage.read(["user 1"]) == {}
        steps = 0

        def step() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(step, 100)
        assert len(storage.erase("user 77", accept)) == 20
        assert 0 < steps < 100


# A borrowed connection.


@pytest.fixture
def borrowed() -> Generator[Database, None, None]:
    """A database of the caller's, with a table and the rows."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
        database = Database(connection)
        fill(SQLiteStorage(database))
        yield database


def test_an_erasure_in_the_callers_transaction(borrowed: Database) -> None:
    """It is committed or rolled back with the caller's rows."""
    storage = SQLiteStorage(borrowed)
    borrowed.execute("BEGIN")
    borrowed.execute("DELETE FROM orders")
    assert storage.erase("alice", accept) == ALICES
    assert stored(storage) == {("public", "bob"): {"app": "public"}}
    borrowed.execute("ROLLBACK")
    assert stored(storage) == ROWS
    borrowed.execute("BEGIN")
    assert storage.erase("alice", accept) == ALICES
    borrowed.execute("COMMIT")
    assert stored(storage) == {("public", "bob"): {"app": "public"}}


def test_a_refused_erasure_leaves_the_callers_transaction(borrowed: Database) -> None:
    """In the caller's transaction only the erasure is undone."""
    storage = SQLiteStorage(borrowed)
    borrowed.execute("BEGIN")
    borrowed.execute("INSERT INTO orders VALUES (7)")

    def refuse(metadata: Metadata) -> None:
        raise ValueError(metadata["app"])

    with pytest.raises(ValueError, match="public"):
        storage.erase("alice", refuse)
    borrowed.execute("COMMIT")
    assert [row["id"] for row in borrowed.query("SELECT id FROM orders")] == [7]
    assert stored(storage) == ROWS


# What is left on the disk.

SECRET = "sesame"


def files_with(secret: str, database: Path) -> list[str]:
    """Return the names of the database's files in which a text can be found."""
    files = sorted(database.parent.glob(f"{database.name}*"))
    return [file.name for file in files if secret.encode() in file.read_bytes()]


def sqlite_utils(*arguments: object) -> str:
    """Run the command line of sqlite-utils, in this process: that is ten times as fast."""
    finished = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return finished.stdout


@pytest.mark.parametrize("secret", [SECRET, SECRET * 10_000], ids=["short", "long"])
@pytest.mark.parametrize("secure_delete", ["OFF", "ON"])
def test_what_sqlite_leaves_on_the_disk(database: Path, secure_delete: str, secret: str) -> None:
    """The log and, without ``secure_delete``, the file keep the bytes; two commands remove them."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA secure_delete = {secure_delete}")
        storage = SQLiteStorage(Database(connection))
        storage.write([(f"user {n}", Replace({"n": n})) for n in range(100)])
        storage.write([("alice", Replace({"secret": secret}))])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        storage.for_app("shop").write([("alice", Replace({"secret": secret}))])
        storage.erase("alice", accept)
        assert files_with(SECRET, database) == ["users.db", "users.db-wal"]
        checkpoint = ["query", database, "PRAGMA wal_checkpoint(TRUNCATE)"]
        assert '"busy": 0' in sqlite_utils(*checkpoint)
        assert files_with(SECRET, database) == ([] if secure_delete == "ON" else ["users.db"])
        sqlite_utils("vacuum", database)
        assert '"busy": 0' in sqlite_utils(*checkpoint)
        assert files_with(SECRET, database) == []
        assert len(storage.read_after("", 1000)) == 100


def test_the_documented_commands_while_a_storage_is_open(database: Path) -> None:
    """They work on the file of a running program and leave nothing of the user in it."""
    with contextlib.closing(SQLiteStorage(database)) as storage:
        storage.write([("alice", Merge({"secret": SECRET})), ("bob", Merge({"n": 1}))])
        storage.erase("alice", accept)
        assert files_with(SECRET, database) == ["users.db-wal"]
        sqlite_utils("vacuum", database)
        assert '"busy": 0' in sqlite_utils("query", database, "PRAGMA wal_checkpoint(TRUNCATE)")
        assert files_with(SECRET, database) == files_with("alice", database) == []
        assert storage.write([("bob", Merge({"m": 1}))]) == [{"n": 1, "m": 1}]


def test_what_postgres_leaves_on_the_disk(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """The table's file keeps the bytes, also after ``VACUUM``, until ``VACUUM FULL``."""

    def is_in_the_file() -> bool:
        direct.execute("CHECKPOINT")
        query = "SELECT position(%s IN pg_read_binary_file(pg_relation_filepath('user_metadata')))"
        row = direct.execute(query, [SECRET.encode()]).fetchone()
        assert row is not None
        return bool(row[0] > 0)

    postgres.write([("alice", Merge({"secret": SECRET}))])
    postgres.erase("alice", accept)
    assert is_in_the_file()
    direct.execute("VACUUM user_metadata")
    assert is_in_the_file()
    direct.execute("VACUUM FULL user_metadata")
    assert not is_in_the_file()
    assert stored(postgres) == {("public", "bob"): {"app": "public"}}


def test_what_the_indexes_of_postgres_leave_on_the_disk(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """The table of the entries keeps an indexed value until the same command is run for it."""

    def is_in_the_file() -> bool:
        direct.execute("CHECKPOINT")
        query = (
            "SELECT position(%s IN"
            " pg_read_binary_file(pg_relation_filepath('user_metadata_index_entries')))"
        )
        row = direct.execute(query, [SECRET.encode()]).fetchone()
        assert row is not None
        return bool(row[0] > 0)

    storage = PostgresStorage(server_url(), schema=schema, indexes=[Index("secret")])
    with contextlib.closing(storage):
        storage.write([("alice", Merge({"secret": SECRET}))])
        storage.erase("alice", accept)
        direct.execute("VACUUM FULL user_metadata")
        assert is_in_the_file()
        direct.execute("VACUUM FULL user_metadata, user_metadata_index_entries")
        assert not is_in_the_file()


# Forks.


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_fork_inside_a_check_cannot_commit_twice(kind: str, database: Path, schema: str) -> None:
    """A child forked inside the erasure cannot end it; the parent is not affected."""
    program = """
import os, sys
from usermetadata import PostgresStorage, SQLiteStorage, StorageError
from usermetadata.changes import Merge

_, kind, database, schema, url = sys.argv
storage = SQLiteStorage(database) if kind == "sqlite" else PostgresStorage(url, schema=schema)
for app_id in ("public", "shop"):
    storage.for_app(app_id).write([("alice", Merge({"n": 1}))])
children = []

def fork(metadata):
    if not children:
        children.append(os.fork())

try:
    removed = storage.erase("alice", fork)
except StorageError as error:
    assert children == [0] and "forked in" in str(error), error
    os._exit(0)
assert children[0] > 0
assert os.waitpid(children[0], 0)[1] == 0
print(removed, storage.for_app("shop").read(["alice"]), storage.erase("alice", fork))
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    finished = subprocess.run(
        [*command, kind, database, schema, server_url()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "{'public': {'n': 1}, 'shop': {'n': 1}} {} {}\n"

"""Portable statements: plain SQL, for engines that have PostgreSQL's protocol alone.

They are tested on PostgreSQL here, and on Citus in ``tests/citus``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy
from click.testing import CliRunner
from postgres_proxy import Proxy
from postgres_server import server_url, waiting_for_locks, with_parameters
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy.ext.asyncio import create_async_engine
from test_postgres import CORES_TABLES
from test_postgres_tables import SWALLOWED_BY, WRITES, rows, trigger

import usermetadata
from usermetadata import (
    DamagedMetadataError,
    Index,
    InvalidInputError,
    OutcomeUnknownError,
    PostgresStorage,
    StorageBusyError,
    StorageError,
    UsageError,
    UserMetadata,
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

Open = "Callable[..., PostgresStorage]"


@pytest.fixture
def portable(schema: str) -> Generator[Callable[..., PostgresStorage], None, None]:
    """Opens storages with portable statements in that schema."""
    with contextlib.ExitStack() as stack:

        def portable(url: str = "", **arguments: Any) -> PostgresStorage:
            storage = PostgresStorage(
                url or server_url(), schema=schema, statements="portable", **arguments
            )
            return stack.enter_context(contextlib.closing(storage))

        yield portable


@pytest.fixture
def storage(portable: Callable[..., PostgresStorage]) -> PostgresStorage:
    """A storage in that schema, with rows of alice and bob in it."""
    storage = portable()
    storage.write([(user, Replace({"n": 1})) for user in ("alice", "bob")])
    return storage


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {**metadata, "n": metadata.get("n", 0) + 1}


def with_one(key: str, old: Metadata | None) -> Metadata:
    """Set a property."""
    return {**(old or {}), key: 1}


# What is sent.


def test_the_statements_use_nothing_but_plain_sql(
    portable: Callable[..., PostgresStorage],
) -> None:
    """No functions, no JSON, no subqueries in an ``INSERT``: what every engine executes."""
    with contextlib.closing(Proxy(server_url())) as proxy:
        storage = portable(proxy.url)
        storage.write([])
        proxy.sent.clear()
        for change in (Merge({"n": 2}), Replace({"n": 2}), Modify(count), Clear()):
            storage.write([("alice", change), ("carol", change)])
        storage.read(["alice", "bob"])
        sent = b"".join(proxy.sent).decode(errors="replace")
    assert sent.count("INSERT INTO") == 7
    assert "DELETE FROM" in sent
    assert "= ANY ($" in sent
    insert = (
        r"INSERT INTO \S+ AS stored \(app_id, user_id, user_metadata\)\s"
        r"VALUES \(\$1, \$2, \$3\), \(\$1, \$4, \$5\) "
        r"ON CONFLICT \(app_id, user_id\) DO UPDATE SET user_metadata = \w+\.user_metadata"
        r" RETURNING user_id, user_metadata\0"
    )
    assert len(re.findall(insert, sent)) == sent.count("INSERT INTO")
    assert "json" not in sent
    assert "set_config" not in sent


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (2, [("alice", Merge({"n": 1, "gone": None}))]),
        (1, [("alice", Replace({"n": 1}))]),
        (1, [("alice", Clear())]),
        (1, [("absent", Clear())]),
        (2, [(f"user {n}", Merge({"n": n})) for n in range(100)]),
        (2, [("alice", Merge({})), ("bob", Clear()), ("carol", Replace({}))]),
        (2, [("alice", Merge({str(n): n})) for n in range(50)]),
        (2, [("alice", Modify(dict)), ("bob", Modify(dict)), ("alice", Merge({}))]),
    ],
    ids=[
        "merge",
        "replace",
        "clear",
        "clear nothing",
        "100",
        "all kinds",
        "one 50 times",
        "modify",
    ],
)
def test_round_trips_of_a_write(
    portable: Callable[..., PostgresStorage], number: int, changes: list[tuple[str, Change]]
) -> None:
    """A write of any size is two round trips: one holds the rows, one stores them.

    To replace or remove one row, one is enough.
    """
    proxy = Proxy(server_url())
    with contextlib.closing(proxy):
        storage = portable(proxy.url)
        storage.write([("somebody", Merge({}))])
        before = proxy.round_trips
        storage.write(changes)
        assert proxy.round_trips - before == number
        before = proxy.round_trips
        storage.read(["alice"])
        storage.read(["alice", "bob"])
        assert proxy.round_trips - before == 2


def test_values_come_back_to_the_last_digit(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """They are stored as text; what a float would change is an error, and stays as it is."""
    text = '{"big":12345678901234567890.123456789,"n":1.10}'
    direct.execute("UPDATE user_metadata SET user_metadata = %s WHERE user_id = 'bob'", [text])
    with pytest.raises(DamagedMetadataError, match="of user 'bob'"):
        storage.write([("alice", Merge({"n": 2})), ("bob", Merge({"m": 2}))])
    query = "SELECT user_metadata FROM user_metadata WHERE user_id = 'bob'"
    assert direct.execute(query).fetchone() == (text,)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    values = {"zero": -0.0, "nul": "\0", "long": 10**300}
    assert storage.write([("bob", Replace(values)), ("alice", Clear())]) == [values, None]
    assert repr(storage.read(["bob", "alice"])) == repr({"bob": values})


def test_they_are_asked_for_by_argument_or_url(schema: str) -> None:
    """``statements="portable"`` is an argument, and a parameter of the URL; others are refused."""
    options = conninfo_to_dict(server_url())
    url = f"postgresql://{options['user']}@/{options['dbname']}?host={options['host']}"
    users = UserMetadata(with_parameters(url, schema=schema, statements="portable"))
    with contextlib.closing(users):
        assert users.syncio.update_user_metadata("alice", {"n": 1}).metadata == {"n": 1}
    for statements in ("portabel", "", 1):
        with pytest.raises(InvalidInputError, match=r'statements: .* pass "portable"'):
            PostgresStorage(server_url(), statements=statements)  # type: ignore[arg-type]


# Concurrency.


def test_batches_of_many_threads_neither_deadlock_nor_lose(
    portable: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """All writes lock users in one order, for every kind of change, and nothing is lost."""
    name = "portable"
    storage = portable(make_conninfo(server_url(), application_name=name))
    users = [f"user {n}" for n in range(12)]
    storage.write([(user, Replace({})) for user in users])
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    [before] = direct.execute(deadlocks).fetchone() or [None]

    def write(thread: int) -> list[tuple[str, str]]:
        kinds: list[Change]
        choice = random.Random(thread)
        acknowledged: list[tuple[str, str]] = []
        for n in range(40):
            key = f"{thread} {n}"
            kinds = [Merge({key: n}), partial(with_one, key)]
            chosen = choice.sample(users, choice.choice([1, 4, 8]))
            storage.write([(user, choice.choice(kinds)) for user in chosen])
            kinds.append(Clear())
            storage.write([(f"other {user}", choice.choice(kinds)) for user in chosen])
            acknowledged += [(user, key) for user in chosen]
        return acknowledged

    with ThreadPoolExecutor(4) as executor:
        done = [pair for pairs in executor.map(write, range(4)) for pair in pairs]
    stored = storage.read(users)
    assert all(key in stored[user] for user, key in done)
    storage.close()
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    while direct.execute(query, [name]).fetchone() != (0,):
        pass  # sessions report their deadlocks when they end, at the latest
    assert direct.execute(deadlocks).fetchone() == (before,)


def test_tasks_share_batches(storage: PostgresStorage) -> None:
    """64 concurrent updates of a few users are all stored."""
    users = UserMetadata(storage)

    async def main() -> None:
        await asyncio.gather(
            *(users.asyncio.update_user_metadata(f"user {n % 9}", {str(n): n}) for n in range(64))
        )

    asyncio.run(main())
    stored = storage.read([f"user {n}" for n in range(9)])
    assert stored == {f"user {k}": {str(n): n for n in range(k, 64, 9)} for k in range(9)}


@pytest.mark.parametrize("change", [Merge({"n": 3}), Replace({"n": 3}), Modify(count), Clear()])
def test_a_locked_row_is_waited_for_until_the_timeout(
    storage: PostgresStorage,
    portable: Callable[..., PostgresStorage],
    direct: psycopg.Connection[Any],
    change: Change,
) -> None:
    """Then the call raises ``StorageBusyError``, and nothing is written."""
    impatient = portable(timeout=1)
    with direct.transaction():
        direct.execute("SELECT FROM user_metadata WHERE user_id = 'bob' FOR UPDATE")
        with pytest.raises(StorageBusyError):
            impatient.write([("alice", change), ("bob", change)])
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}, "bob": {"n": 1}}
    assert len(impatient.write([("alice", change), ("bob", change)])) == 2


def test_a_deadlock_with_another_program_is_repeated(
    portable: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """If the server undoes a write because of a deadlock, the write is repeated."""
    storage = portable()
    storage.write([("alice", Merge({})), ("bob", Merge({}))])
    with ThreadPoolExecutor(1) as executor:
        direct.execute("SET deadlock_timeout = '10min'")
        with direct.transaction():
            direct.execute("SELECT FROM user_metadata WHERE user_id = 'bob' FOR UPDATE")
            written = executor.submit(storage.write, [(u, Modify(count)) for u in ("alice", "bob")])
            waiting_for_locks(1)
            direct.execute("SELECT FROM user_metadata WHERE user_id = 'alice' FOR UPDATE")
        assert written.result() == [{"n": 1}, {"n": 1}]


@pytest.mark.parametrize("level", [r"repeatable\ read", "serializable"])
def test_strict_isolation_loses_nothing(
    portable: Callable[..., PostgresStorage], level: str
) -> None:
    """Failures 40001, which other engines report often, are repeated."""
    options = f"-c default_transaction_isolation={level}"
    storage = portable(make_conninfo(server_url(), options=options))
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: storage.write([("alice", Modify(count))]), range(20)))
        list(executor.map(lambda n: storage.write([("bob", Merge({str(n): n}))]), range(20)))
    assert storage.read(["alice", "bob"]) == {
        "alice": {"n": 20},
        "bob": {str(n): n for n in range(20)},
    }


def test_a_write_whose_answer_is_lost_is_not_repeated(
    portable: Callable[..., PostgresStorage],
) -> None:
    """A commit in doubt raises ``OutcomeUnknownError``; a loss before it is repeated."""
    with contextlib.closing(Proxy(server_url())) as proxy:
        storage = portable(proxy.url)
        storage.write([("alice", Merge({"n": 0}))])
        proxy.replies_to_lose = 1
        assert storage.write([("alice", Merge({"m": 0}))]) == [{"n": 0, "m": 0}]

        def lose(metadata: Metadata) -> Metadata:
            proxy.replies_to_lose = 1
            return count(metadata)

        with pytest.raises(OutcomeUnknownError, match="done whole or not at all; read to find"):
            storage.write([("alice", Modify(lose)), ("bob", Merge({"n": 1}))])
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 1, "m": 0}, "bob": {"n": 1}}


def test_an_error_in_a_long_batch_is_not_logged(
    storage: PostgresStorage, direct: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The call raises it, and the connection works afterwards."""
    caplog.set_level(logging.DEBUG)
    direct.execute("ALTER TABLE user_metadata ADD CHECK (user_id <> 'user 7')")
    with pytest.raises(StorageError, match="violates check constraint"):
        storage.write([(f"user {n}", Merge({})) for n in range(300)])
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert storage.count(None) == 2


# What a table drops.


@pytest.mark.parametrize("by", SWALLOWED_BY)
def test_a_write_that_a_trigger_swallows_is_an_error(
    storage: PostgresStorage, direct: psycopg.Connection[Any], by: str
) -> None:
    """The error names the user; nothing of the write is stored, nor what the trigger did."""
    direct.execute(SWALLOWED_BY[by].encode())
    for changes in WRITES:
        with pytest.raises(StorageError, match=r"of user '\w+', without an error: a trigger"):
            storage.write(changes)
        assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}
    if by == "soft delete":
        assert direct.execute("SELECT FROM user_metadata WHERE deleted").fetchall() == []


@pytest.mark.parametrize("change", [Merge({"n": 2}), Replace({"n": 2}), Modify(count)])
def test_a_write_that_a_trigger_drops_for_its_content_is_an_error(
    storage: PostgresStorage, direct: psycopg.Connection[Any], change: Change
) -> None:
    """The row could be held, and is then not stored: the whole write is undone."""
    body = """RETURN CASE WHEN NEW.user_id <> 'bob' OR NEW.user_metadata::json ->> 'n' = '1'
        THEN NEW END;"""
    trigger(direct, "UPDATE", body)
    with pytest.raises(StorageError, match=r"metadata of user 'bob'.*nothing was written"):
        storage.write([("alice", change), ("bob", change)])
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}


def test_what_a_trigger_makes_of_it_is_answered(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Metadata that a trigger changes is returned as it is stored."""
    stamp = """NEW.user_metadata := jsonb_set(NEW.user_metadata::jsonb, '{by}', '"trigger"');"""
    trigger(direct, "INSERT OR UPDATE", stamp + "RETURN NEW;")
    written = storage.write([("bob", Merge({"m": 2})), ("carol", Replace({"m": 2}))])
    assert written == [{"n": 1, "m": 2, "by": "trigger"}, {"m": 2, "by": "trigger"}]
    assert storage.read(["bob", "carol"]) == dict(zip(("bob", "carol"), written, strict=True))


# Erasing, and the application's own transaction.


def test_a_user_is_erased_in_all_apps(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """``erase`` returns and removes the user's rows; what a trigger keeps is an error."""
    storage.for_app("shop").write([("alice", Merge({"shop": 1}))])
    removed = {"public": {"n": 1}, "shop": {"shop": 1}}
    trigger(direct, "DELETE", "RETURN CASE WHEN OLD.app_id <> 'shop' THEN OLD END;")
    with pytest.raises(StorageError, match="or remove, the metadata of user 'alice'"):
        storage.erase("alice", lambda _: None)
    direct.execute("DROP TRIGGER guard ON user_metadata")

    def refuse(metadata: Metadata) -> None:
        raise LookupError(repr(metadata))

    with pytest.raises(LookupError):
        storage.erase("alice", refuse)
    assert storage.erase("alice", lambda _: None) == removed
    assert storage.erase("alice", lambda _: None) == {}
    assert storage.read(["alice", "bob"]) == {"bob": {"n": 1}}
    direct.execute("ALTER TABLE user_metadata ENABLE ROW LEVEL SECURITY")
    with pytest.raises(StorageError, match="row-level policy"):
        storage.erase("bob", lambda _: None)


def test_no_update_is_lost_to_an_erasure(storage: PostgresStorage) -> None:
    """Each update is in what an erasure returns, or is still there: none twice, none lost."""
    numbers = range(60)
    found: list[dict[str, Metadata]] = []
    done = threading.Event()

    def erase() -> None:
        while not done.is_set():
            found.append(storage.erase("carol", lambda _: None))

    with ThreadPoolExecutor(4) as executor:
        erasing = executor.submit(erase)
        writes = [
            executor.submit(storage.for_app(f"app {n % 2}").write, [("carol", Merge({str(n): n}))])
            for n in numbers
        ]
        for write in writes:
            write.result()
        done.set()
        erasing.result()
    found.append(storage.erase("carol", lambda _: None))
    names = [name for each in found for metadata in each.values() for name in metadata]
    assert sorted(names) == sorted(map(str, numbers))


def test_they_join_a_transaction_of_psycopg(storage: PostgresStorage) -> None:
    """Both are stored or neither; a write that failed leaves the transaction usable."""
    with psycopg.connect(server_url()) as connection:
        for end in (connection.rollback, connection.commit):
            with storage.within(connection) as joined:
                joined.write([("alice", Merge({"m": 1})), ("carol", Merge({"m": 1}))])
                with pytest.raises(ZeroDivisionError):
                    joined.write([("alice", Modify(lambda _: {"n": 1 // 0}))])
                assert joined.read(["alice", "carol"])["alice"] == {"n": 1, "m": 1}
                assert joined.erase("bob", lambda _: None) == {"public": {"n": 1}}
            end()
    assert storage.read(["alice", "bob", "carol"]) == {
        "alice": {"n": 1, "m": 1},
        "carol": {"m": 1},
    }


def test_they_join_a_transaction_of_asyncpg(storage: PostgresStorage) -> None:
    """The ids of a read are an array there, too."""
    options = conninfo_to_dict(server_url())

    async def run() -> None:
        engine = create_async_engine(
            sqlalchemy.URL.create(
                "postgresql+asyncpg", str(options["user"]), database=str(options["dbname"])
            ),
            connect_args={"host": options["host"]},
        )
        async with engine.begin() as connection:

            def work(session: sqlalchemy.Connection) -> None:
                with storage.within(session) as joined:
                    joined.write([(user, Merge({"m": 1})) for user in ("alice", "carol")])
                    assert joined.read(["alice", "carol"])["carol"] == {"m": 1}

            await connection.run_sync(work)
        await engine.dispose()

    asyncio.run(run())
    assert storage.read(["alice"]) == {"alice": {"n": 1, "m": 1}}


# What they cannot do.


def test_indexes_are_refused_when_they_are_declared(storage: PostgresStorage) -> None:
    """They would need triggers that write to another table."""
    for index in (Index("plan"), Index("plan", unique=True)):
        with pytest.raises(UsageError, match="indexes: portable statements cannot maintain them"):
            PostgresStorage(server_url(), indexes=[index], statements="portable")
    assert storage.stored_indexes() == ()
    assert storage.count(None) == 2


def test_a_cores_table_is_refused(
    portable: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """A SuperTokens core takes advisory locks, which other engines do not have."""
    direct.execute(CORES_TABLES)
    for call in (lambda: portable().read(["a"]), lambda: portable().write([("a", Clear())])):
        with pytest.raises(UsageError, match="a SuperTokens core's, whose locks portable"):
            call()


def test_a_server_without_citus_says_so(schema: str) -> None:
    """``create-table`` makes the table on any storage; ``--distributed`` needs Citus."""
    options = conninfo_to_dict(server_url())
    url = f"postgresql://{options['user']}@/{options['dbname']}?host={options['host']}"
    url = with_parameters(url, schema=schema)
    for arguments, code, text in (
        (["--storage", url, "--distributed"], 1, "no extension citus"),
        (["--storage", "sqlite://", "--distributed"], 1, "SQLiteStorage has one server"),
        (["--storage", url], 0, "the table exists"),
        (["--storage", "sqlite://"], 0, "the table exists"),
    ):
        result = CliRunner().invoke(main, ["create-table", *arguments])
        assert (result.exit_code, text in result.output) == (code, True), result.output
    with contextlib.closing(usermetadata.UserMetadata(url)) as users:
        assert users.syncio.update_user_metadata("alice", {"n": 1}).metadata == {"n": 1}

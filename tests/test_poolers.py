"""PostgreSQL behind poolers, simulated and real: acknowledged means committed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from pooler_work import work
from postgres_proxy import BeginningPooler
from postgres_server import OwnServer, empty_schema, server_url
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.sql import SQL, Identifier
from psycopg_pool import ConnectionPool
from real_poolers import Pgbouncer, Pgpool, RealPooler
from test_postgres_connections import trouble

import usermetadata
from usermetadata import (
    Index,
    NotUniqueError,
    OutcomeUnknownError,
    PostgresStorage,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.syncio import (
    clear_user_metadata,
    get_user_metadata,
    modify_user_metadata,
    set_user_metadata,
    update_bulk_user_metadata,
    update_user_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import LiteralString

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {**metadata, "n": metadata.get("n", 0) + 1}


@pytest.fixture
def pooler() -> Generator[BeginningPooler, None, None]:
    """A pooler that begins a transaction before each statement, and does not end it."""
    with contextlib.closing(BeginningPooler(server_url())) as pooler:
        yield pooler


@pytest.fixture(params=["own pool", "borrowed pool", "borrowed pool in autocommit mode"])
def storage(
    request: pytest.FixtureRequest, pooler: BeginningPooler, schema: str
) -> Generator[PostgresStorage, None, None]:
    """A storage behind that pooler."""
    with contextlib.ExitStack() as stack:
        database: str | ConnectionPool[Any] = pooler.url
        if request.param != "own pool":
            autocommit = "mode" in request.param
            pool = ConnectionPool(
                pooler.url, kwargs={"autocommit": autocommit}, min_size=1, max_size=4, open=False
            )
            database = stack.enter_context(pool)
        yield stack.enter_context(contextlib.closing(PostgresStorage(database, schema=schema)))


@pytest.fixture
def table(storage: PostgresStorage, direct: psycopg.Connection[Any]) -> None:
    """The table, with a row of alice."""
    storage.write([("alice", Replace({"n": 1}))])
    assert rows(direct) == {"alice": {"n": 1}}


def rows(direct: psycopg.Connection[Any]) -> dict[str, Metadata]:
    """Return the committed rows."""
    query = "SELECT user_id, user_metadata::json FROM user_metadata"
    return dict(direct.execute(query).fetchall())


def test_what_each_function_writes_is_committed(
    storage: PostgresStorage,
    pooler: BeginningPooler,
    direct: psycopg.Connection[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """When a function returns, its write is committed, and no transaction is open."""
    usermetadata.init(storage)
    update_user_metadata("alice", {"a": 1})
    assert rows(direct) == {"alice": {"a": 1}}
    set_user_metadata("alice", {"b": 2})
    assert rows(direct) == {"alice": {"b": 2}}
    modify_user_metadata("alice", count)
    assert rows(direct) == {"alice": {"b": 2, "n": 1}}
    update_bulk_user_metadata({"alice": {"b": None}, "bob": {"c": 3}})
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"c": 3}}
    clear_user_metadata("alice")
    assert rows(direct) == {"bob": {"c": 3}}
    assert get_user_metadata("bob").metadata == {"c": 3}
    assert pooler.begun >= 6
    assert "rolling back" not in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        [("alice", Merge({"m": 2})), ("bob", Replace({"n": 1}))],
        [("alice", Merge({"m": 2})), ("carol", Clear()), ("bob", Replace({"n": 1}))],
        [("alice", Merge({"m": 2})), *[("bob", Merge({"n": n})) for n in (4, 3, 2, 1)]],
        [("alice", Modify(lambda old: {**old, "m": 2})), ("bob", Replace({"n": 1}))],
    ],
    ids=["two statements", "three statements", "more", "function"],
)
@pytest.mark.usefixtures("table")
def test_several_kinds_of_changes_are_committed(
    storage: PostgresStorage,
    direct: psycopg.Connection[Any],
    changes: list[tuple[str, Change]],
) -> None:
    """An acknowledged write of several kinds of changes is committed as a whole."""
    assert storage.write(changes)[0] == {"n": 1, "m": 2}
    assert rows(direct) == {"alice": {"n": 1, "m": 2}, "bob": {"n": 1}}


@pytest.mark.usefixtures("table")
def test_what_only_python_can_merge_is_committed(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """After a statement fails in the pooler's transaction, the merge in Python succeeds."""
    storage.write([("bob", Replace({"zero": "\0"}))])
    assert storage.write([("bob", Merge({"n": 1}))]) == [{"zero": "\0", "n": 1}]
    query = "SELECT user_metadata FROM user_metadata WHERE user_id = 'bob'"
    assert direct.execute(query).fetchone() == ('{"zero":"\\u0000","n":1}',)


@pytest.mark.usefixtures("table")
def test_a_failed_write_leaves_nothing_behind(
    storage: PostgresStorage, pooler: BeginningPooler, direct: psycopg.Connection[Any], schema: str
) -> None:
    """A failed write writes nothing, and later calls do not inherit its transaction."""
    with (
        contextlib.closing(PostgresStorage(pooler.url, schema=schema, timeout=1)) as hasty,
        direct.transaction(),
    ):
        direct.execute("SELECT FROM user_metadata FOR UPDATE")
        for change in (Merge({"n": 5}), Modify(count)):
            with pytest.raises(StorageBusyError):
                hasty.write([("bob", Merge({})), ("alice", change)])
        assert hasty.read(["alice", "bob"]) == {"alice": {"n": 1}}
    assert storage.write([("alice", Modify(count))]) == [{"n": 2}]
    assert rows(direct) == {"alice": {"n": 2}}


@pytest.mark.parametrize("fate", ["", "lose", "abort", "begin"])
def test_the_table_is_there_when_it_has_been_created(
    pooler: BeginningPooler, schema: str, direct: psycopg.Connection[Any], fate: str
) -> None:
    """The first write finds a table, also if the COMMIT that creates it fails."""
    with (
        ConnectionPool(pooler.url, min_size=1, max_size=1) as pool,
        contextlib.closing(PostgresStorage(pool, schema=schema)) as storage,
    ):
        assert storage.read(["alice"]) == {}
        assert direct.execute("SELECT to_regclass('user_metadata')").fetchone() == (None,)
        # The first COMMIT ends the check for the table.
        pooler.fates = ["", fate]
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        assert pooler.fates == []
        assert rows(direct) == {"alice": {"n": 1}}


@pytest.mark.parametrize("fate", ["lose", "abort", "begin"])
def test_the_first_call_of_all_may_fail(
    pooler: BeginningPooler, schema: str, direct: psycopg.Connection[Any], fate: str
) -> None:
    """The error is the library's, nothing was done, and the next call works."""
    with contextlib.closing(PostgresStorage(pooler.url, schema=schema)) as storage:
        pooler.fates = [fate]
        with pytest.raises(StorageUnavailableError, match="nothing was done"):
            storage.write([("alice", Merge({"n": 1}))])
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        assert rows(direct) == {"alice": {"n": 1}}


@pytest.mark.parametrize("fate", ["lose", "abort", "begin"])
@pytest.mark.parametrize(
    "changes",
    [
        [("alice", Merge({"n": 2}))],
        [("alice", Replace({"n": 2})), ("bob", Replace({"n": 2}))],
        [("alice", Merge({"n": 2})), ("bob", Replace({"n": 2}))],
    ],
    ids=["one statement", "one statement for two", "two statements"],
)
@pytest.mark.usefixtures("table")
def test_what_may_not_be_committed_is_not_acknowledged(
    storage: PostgresStorage,
    pooler: BeginningPooler,
    direct: psycopg.Connection[Any],
    fate: str,
    changes: list[tuple[str, Change]],
) -> None:
    """If COMMIT is not answered, or not with COMMIT, the outcome of a write is unknown."""
    pooler.fates = [fate]
    with pytest.raises(OutcomeUnknownError, match="done whole or not at all; read to find out"):
        storage.write(changes)
    assert pooler.fates == []
    written = {user_id: {"n": 2} for user_id, _ in changes}
    assert rows(direct) == ({"alice": {"n": 1}} if fate == "abort" else written)
    assert storage.write(changes) == [{"n": 2}] * len(changes)
    assert rows(direct) == written


@pytest.mark.usefixtures("table")
def test_a_function_is_called_again_where_nothing_was_committed(
    storage: PostgresStorage, pooler: BeginningPooler, direct: psycopg.Connection[Any]
) -> None:
    """If COMMIT is answered with ROLLBACK, the write was undone and is repeated."""
    calls = []

    def note(metadata: Metadata) -> Metadata:
        calls.append(metadata)
        return count(metadata)

    pooler.fates = ["abort"]
    assert storage.write([("alice", Modify(note))]) == [{"n": 2}]
    assert calls == [{"n": 1}] * 2
    assert rows(direct) == {"alice": {"n": 2}}


@pytest.mark.usefixtures("table")
def test_a_transaction_that_has_ended_holds_no_rows(
    storage: PostgresStorage, pooler: BeginningPooler, direct: psycopg.Connection[Any]
) -> None:
    """A function's result is stored only while its rows are held; otherwise it is called again."""
    pooler.ends = 2
    assert storage.write([("alice", Modify(count))]) == [{"n": 2}]
    assert pooler.ends == 0
    assert rows(direct) == {"alice": {"n": 2}}


@pytest.mark.parametrize(
    "fates", [["begin"], ["begin", "begin"], ["begin", "abort"], ["begin", "lose"]]
)
@pytest.mark.usefixtures("table")
def test_a_transaction_after_that_of_a_function(
    storage: PostgresStorage,
    pooler: BeginningPooler,
    direct: psycopg.Connection[Any],
    fates: list[str],
) -> None:
    """A transaction begun after the COMMIT of a function's write is also ended."""
    pooler.fates = [*fates]
    if len(fates) == 1:
        assert storage.write([("alice", Modify(count))]) == [{"n": 2}]
    else:
        with pytest.raises(OutcomeUnknownError):
            storage.write([("alice", Modify(count))])
    assert pooler.fates == []
    assert rows(direct) == {"alice": {"n": 2}}
    assert storage.write([("alice", Modify(count))]) == [{"n": 3}]


@pytest.mark.parametrize("fate", ["", "lose", "abort", "begin"])
@pytest.mark.usefixtures("table")
def test_a_read_leaves_no_transaction_open(
    storage: PostgresStorage, pooler: BeginningPooler, caplog: pytest.LogCaptureFixture, fate: str
) -> None:
    """A read is repeated until its transaction has ended; the pool gets no open transaction."""
    reads: list[Callable[[], object]] = [
        lambda: storage.read(["alice"]),
        lambda: storage.read(["alice", "bob"]),
        lambda: storage.read_after("", 10),
    ]
    for read in reads:
        pooler.fates = [fate]
        assert read() == {"alice": {"n": 1}}
        assert pooler.fates == []
    assert "rolling back" not in caplog.text


@pytest.mark.usefixtures("table")
def test_a_borrowed_pool_has_no_open_transaction_afterwards(
    pooler: BeginningPooler, schema: str, direct: psycopg.Connection[Any]
) -> None:
    """Afterwards the connections are the same, and not in a transaction."""
    with ConnectionPool(pooler.url, min_size=1, max_size=1) as pool:
        pool.wait()
        connections = pooler.connections
        storage = PostgresStorage(pool, schema=schema)
        for _ in range(3):
            storage.write([("alice", Merge({"n": 2}))])
            storage.read(["alice"])
            with pool.connection() as connection:
                assert connection.info.transaction_status == TransactionStatus.IDLE
                assert not connection.autocommit
        assert pooler.connections == connections
    assert rows(direct) == {"alice": {"n": 2}}


def test_a_borrowed_pool_may_check_its_connections(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """A transaction that the pool's own check leaves open does not affect the write."""

    def check(connection: psycopg.Connection[Any]) -> None:
        connection.execute("SELECT 1")

    with ConnectionPool(server_url(), min_size=1, max_size=1, check=check) as pool:
        storage = PostgresStorage(pool, schema=schema)
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        assert storage.read(["alice"]) == {"alice": {"n": 1}}
        assert rows(direct) == {"alice": {"n": 1}}


# The real ones.


@pytest.fixture(scope="module")
def server() -> Generator[OwnServer, None, None]:
    """The server behind the real poolers."""
    server = OwnServer()
    yield server
    server.stop()


POOLERS: dict[str, Callable[[OwnServer], RealPooler]] = {
    "pgpool-II": Pgpool,
    "pgbouncer in session mode": Pgbouncer,
    "pgbouncer in transaction mode": lambda server: Pgbouncer(
        server, pool_mode="transaction", default_pool_size=5
    ),
}


@pytest.fixture(scope="module", params=POOLERS)
def real_pooler(
    request: pytest.FixtureRequest, server: OwnServer
) -> Generator[RealPooler, None, None]:
    """Each pooler in turn, in each mode that the storage supports."""
    with contextlib.closing(POOLERS[request.param](server)) as pooler:
        yield pooler


@pytest.mark.parametrize(
    "changes",
    [
        [("alice", Merge({"n": 1}))],
        [("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))],
        [("alice", Merge({"n": 1})), ("bob", Clear())],
        [("alice", Replace({"n": 1})), ("bob", Merge({"n": 1}))],
        [("alice", Modify(lambda _: {"n": 1})), ("bob", Clear())],
    ],
    ids=["merge", "merge of two", "merge and clear", "replace and merge", "function"],
)
def test_first_writes_behind_a_pooler_are_committed(
    server: OwnServer, real_pooler: RealPooler, changes: list[tuple[str, Change]]
) -> None:
    """What a pooler does when it meets a table for the first time loses no acknowledged write."""
    with (
        empty_schema(server.url) as schema,
        contextlib.closing(PostgresStorage(server.url, schema=schema)) as direct,
    ):
        for _ in range(3):
            direct.write([("alice", Clear()), ("bob", Clear())])
            # Each connection is served by another process of pgpool-II, which has seen no table.
            with contextlib.closing(PostgresStorage(real_pooler.url, schema=schema)) as storage:
                results = storage.write(changes)
                assert results[0] == {"n": 1}
                expected = {
                    user_id: result
                    for (user_id, _), result in zip(changes, results, strict=True)
                    if result is not None
                }
                assert direct.read(["alice", "bob"]) == expected
                assert storage.read(["alice", "bob"]) == expected


def test_threads_tasks_and_processes_lose_nothing(
    server: OwnServer, real_pooler: RealPooler, caplog: pytest.LogCaptureFixture
) -> None:
    """What two processes write at once with every function is there, and nothing complains."""
    program = os.path.join(os.path.dirname(__file__), "pooler_work.py")
    with empty_schema(server.url) as schema:
        command = [sys.executable, "-W", "error", program, real_pooler.url, schema, "other"]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ours = work(real_pooler.url, schema, "ours")
        output, errors = other.communicate(timeout=60)
        assert (other.returncode, errors) == (0, "")
        with contextlib.closing(PostgresStorage(server.url, schema=schema)) as direct:
            for acknowledged in (ours, json.loads(output)):
                stored = direct.read([*acknowledged])
                for user_id, metadata in acknowledged.items():
                    if metadata is None:
                        assert user_id not in stored
                    else:
                        assert metadata.items() <= stored[user_id].items()
    assert "rolling back" not in caplog.text


def test_users_are_found_behind_a_pooler(server: OwnServer, real_pooler: RealPooler) -> None:
    """Indexes are built, used and dropped through a pooler, which may share sessions."""
    indexes = [Index("plan"), Index("key", unique=True)]
    with (
        empty_schema(server.url) as schema,
        contextlib.closing(
            PostgresStorage(real_pooler.url, schema=schema, indexes=indexes)
        ) as storage,
    ):
        storage.write([(str(n), Merge({"plan": "pro", "key": n})) for n in range(20)])
        assert storage.count({"plan": "pro"}) == 20
        with pytest.raises(NotUniqueError):
            storage.write([("x", Merge({"key": 1}))])
        storage.drop_index("key")
        assert storage.build_indexes() == []
        assert [*storage.find({"key": 7}, "", 10)] == ["7"]


def test_a_pooler_that_is_killed_loses_nothing(server: OwnServer, real_pooler: RealPooler) -> None:
    """A pooler that dies under load and is started again: what was acknowledged is there."""

    def kill() -> None:
        real_pooler.kill()
        real_pooler.start()

    with empty_schema(server.url) as schema:
        trouble(real_pooler.url, schema, kill)


# What another client leaves behind in a session that a pooler shares.


@pytest.fixture
def shared(server: OwnServer) -> Generator[RealPooler, None, None]:
    """A pooler all whose clients share one session."""
    with contextlib.closing(
        Pgbouncer(server, pool_mode="transaction", default_pool_size=1)
    ) as pooler:
        yield pooler


@pytest.mark.parametrize(
    "setting",
    [
        "search_path = other",
        "client_encoding = 'LATIN1'",
        "default_transaction_isolation = 'serializable'",
        "synchronous_commit = off",
        "lock_timeout = 1",
        "idle_in_transaction_session_timeout = 10000",
        "quote_all_identifiers = on",
        "standard_conforming_strings = off",
        "row_security = off",
    ],
)
def test_settings_of_another_client_do_no_harm(
    server: OwnServer, shared: RealPooler, setting: str
) -> None:
    """What another client sets in the session changes neither where nor what is stored."""
    with (
        empty_schema(server.url) as schema,
        psycopg.connect(server.url, autocommit=True) as direct,
        psycopg.connect(shared.url, autocommit=True) as other,
        contextlib.closing(PostgresStorage(shared.url, table=schema)) as storage,
    ):
        storage.write([("alice", Merge({"n": 1}))])
        direct.execute("DROP SCHEMA IF EXISTS other CASCADE")
        direct.execute("CREATE SCHEMA other")
        name = Identifier(schema)
        direct.execute(
            SQL("CREATE TABLE other.{name} (LIKE {name} INCLUDING ALL)").format(name=name)
        )
        other.execute(f"SET {setting}".encode())
        assert storage.write([("alice", Merge({"\u65e5": "\u672c"}))])
        assert storage.write([("alice", Modify(count)), ("bob", Clear())])
        assert storage.read(["alice"]) == {"alice": {"n": 2, "\u65e5": "\u672c"}}
        query = SQL("SELECT user_metadata FROM public.{}").format(name)
        assert direct.execute(query).fetchall() == [('{"n":2,"\u65e5":"\u672c"}',)]
        assert direct.execute(SQL("SELECT FROM other.{}").format(name)).fetchall() == []
        direct.execute(SQL("DROP TABLE public.{}").format(name))


def test_the_table_is_not_looked_for_on_the_path_of_another_client(
    server: OwnServer, shared: RealPooler
) -> None:
    """A first call in a session whose search_path was changed is refused; ``schema`` helps."""
    with (
        empty_schema(server.url) as schema,
        psycopg.connect(shared.url, autocommit=True) as other,
        contextlib.closing(PostgresStorage(shared.url)) as storage,
        contextlib.closing(PostgresStorage(shared.url, schema=schema)) as named,
    ):
        other.execute("SET search_path = other")
        calls: list[Callable[[], object]] = [
            lambda: storage.read(["alice"]),
            lambda: storage.write([("alice", Merge({}))]),
        ]
        for call in calls:
            with pytest.raises(StorageError, match=r"search_path of this.*pass schema="):
                call()
        assert named.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        other.execute("RESET search_path")
        assert storage.read(["alice"]) == {}


@pytest.mark.parametrize(
    "setting", ["default_transaction_read_only = on", "statement_timeout = 1", "ROLE pg_monitor"]
)
def test_settings_of_another_client_that_prevent_a_write_are_errors(
    server: OwnServer, shared: RealPooler, setting: str
) -> None:
    """The write is not acknowledged, and works again when the session is as it was."""
    with (
        empty_schema(server.url) as schema,
        psycopg.connect(server.url, autocommit=True) as direct,
        psycopg.connect(shared.url, autocommit=True) as other,
        contextlib.closing(PostgresStorage(shared.url, schema=schema)) as storage,
    ):
        storage.write([("alice", Merge({"n": 1}))])
        other.execute(f"SET {setting}".encode())
        with direct.transaction():
            table = Identifier(schema, "user_metadata")
            direct.execute(SQL("SELECT FROM {} FOR UPDATE").format(table))
            with pytest.raises(StorageError):
                storage.write([("alice", Merge({"n": 2}))])
        other.execute("RESET ALL; RESET ROLE")
        assert storage.write([("alice", Modify(count))]) == [{"n": 2}]


# Limits and modes.


def test_the_statement_mode_is_named(server: OwnServer) -> None:
    """Where a pooler refuses transactions, the error says that its mode is the likely cause."""
    with (
        empty_schema(server.url) as schema,
        contextlib.closing(Pgbouncer(server, pool_mode="statement")) as pooler,
        contextlib.closing(PostgresStorage(server.url, schema=schema)) as direct,
        contextlib.closing(PostgresStorage(pooler.url, schema=schema)) as storage,
    ):
        match = "statement mode is the likely cause: set pool_mode to transaction; nothing was done"
        with pytest.raises(StorageUnavailableError, match=match):
            storage.write([("alice", Merge({"n": 1}))])  # creates the table
        direct.write([("alice", Merge({"n": 1}))])
        with pytest.raises(StorageUnavailableError, match=match):
            storage.write([("alice", Modify(count))])
        assert storage.write([("alice", Merge({})), ("bob", Clear())]) == [{"n": 1}, None]


def test_a_program_ends_at_once_behind_a_pooler_with_few_connections(server: OwnServer) -> None:
    """Connections that the pooler does not let through do not delay the end, nor print anything."""
    program = """
import sys, threading, time
from usermetadata import PostgresStorage
from usermetadata.changes import Merge

storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
storage.write([("alice", Merge({}))])

def use(number):
    for n in range(20):
        storage.write([(f"user {number}", Merge({str(n): n}))])

threads = [threading.Thread(target=use, args=[number]) for number in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(time.time())
"""
    with (
        empty_schema(server.url) as schema,
        contextlib.closing(Pgbouncer(server, default_pool_size=4)) as pooler,
    ):
        command = [sys.executable, "-W", "error", "-c", program, pooler.url, schema]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        end = time.time()
    assert (finished.returncode, finished.stderr) == (0, "")
    assert end - float(finished.stdout) < 4


def test_reads_behind_pgpool_see_the_last_update(server: OwnServer) -> None:
    """pgpool-II sends no query of the storage to a standby, which may be behind."""
    standby = server.start_standby()
    options = conninfo_to_dict(standby)
    with (
        empty_schema(server.url) as schema,
        contextlib.closing(PostgresStorage(server.url, schema=schema)) as direct,
        contextlib.closing(
            Pgpool(
                server,
                backend_clustering_mode="streaming_replication",
                backend_weight0=0,
                backend_hostname1=options["host"],
                backend_port1=5432,
                backend_weight1=1,
                sr_check_user="postgres",
                sr_check_period=0,
            )
        ) as pooler,
        contextlib.closing(PostgresStorage(pooler.url, schema=schema)) as storage,
        psycopg.connect(standby, autocommit=True) as replica,
        psycopg.connect(pooler.url, autocommit=True) as other,
    ):
        direct.write([("alice", Merge({"n": 0}))])
        found = "SELECT to_regclass(%s) IS NOT NULL"
        wait_for(replica, found, f"{schema}.user_metadata")
        replica.execute("SELECT pg_wal_replay_pause()")
        wait_for(replica, "SELECT pg_get_wal_replay_pause_state() = %s", "paused")
        try:
            for n in range(8):  # at the sixth the driver would prepare the statements
                changes: list[tuple[str, Change]] = [("bob", Modify(count)), ("carol", Clear())]
                assert storage.write(changes) == [{"n": n + 1}, None]
                assert storage.write([("alice", Merge({"n": n}))]) == [{"n": n}]
                expected = {"alice": {"n": n}, "bob": {"n": n + 1}}
                assert storage.read(["alice"]) == {"alice": {"n": n}}
                assert storage.read(["alice", "bob"]) == storage.read_after("", 9) == expected
            # Another program's queries do go to the standby.
            query = SQL("SELECT user_metadata FROM {}").format(Identifier(schema, "user_metadata"))
            assert ('{"n":7}',) not in other.execute(query).fetchall()
            # A table that is created now is unknown to the standby.
            with contextlib.closing(
                PostgresStorage(pooler.url, schema=schema, table="another")
            ) as another:
                assert another.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
                assert another.read(["alice"]) == {"alice": {"n": 1}}
        finally:
            replica.execute("SELECT pg_wal_replay_resume()")


def wait_for(connection: psycopg.Connection[Any], query: LiteralString, parameter: str) -> None:
    """Return as soon as a query answers true."""
    deadline = time.monotonic() + 30
    while connection.execute(query, [parameter]).fetchone() != (True,):
        assert time.monotonic() < deadline
        time.sleep(0.001)

"""The PostgreSQL storage's connections: limits, losses, restarts, poolers and forks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from postgres_proxy import Pooler, Proxy
from postgres_server import OwnServer, empty_schema, server_url, waiting_for_locks
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.sql import SQL, Literal
from psycopg_pool import ConnectionPool
from test_processes import FORK, WORK

import usermetadata
from usermetadata import (
    InvalidInputError,
    OutcomeUnknownError,
    PostgresStorage,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UserMetadataError,
)
from usermetadata.asyncio import modify_user_metadata
from usermetadata.changes import Clear, Merge, Modify, Replace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

NAME = "usermetadata tests"


@pytest.fixture
def open_storage(schema: str) -> Generator[Callable[..., PostgresStorage], None, None]:
    """Open storages in that schema, with named connections."""
    with contextlib.ExitStack() as stack:

        def open_storage(url: str = "", options: str = "", **arguments: Any) -> PostgresStorage:
            url = make_conninfo(url or server_url(), application_name=NAME, options=options)
            storage = PostgresStorage(url, schema=schema, **arguments)
            return stack.enter_context(contextlib.closing(storage))

        yield open_storage


@pytest.fixture
def proxy() -> Generator[Proxy, None, None]:
    """A network between the storage and the server."""
    with contextlib.closing(Proxy(server_url())) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def own_server() -> Generator[OwnServer, None, None]:
    """A server that tests may stop."""
    server = OwnServer()
    yield server
    server.stop()


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {"n": metadata.get("n", 0) + 1}


def sessions(direct: psycopg.Connection[Any]) -> list[int]:
    """Return the server processes of the storages' connections."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
    return [pid for (pid,) in direct.execute(query, [NAME])]


@contextlib.contextmanager
def locked_row(direct: psycopg.Connection[Any]) -> Generator[None, None, None]:
    """Lock alice's row, as another application may."""
    with direct.transaction():
        direct.execute("SELECT FROM user_metadata WHERE user_id = 'alice' FOR UPDATE")
        yield


# Limits.


def test_connections_are_opened_when_they_are_needed(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """None is open before the first call or after ``close``; ``max_connections`` is the limit."""
    storage = open_storage(max_connections=3)
    assert sessions(direct) == []
    barrier = threading.Barrier(3)

    def at_once(metadata: Metadata) -> Metadata:
        barrier.wait(timeout=30)
        return metadata

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda n: storage.write([(f"user {n}", Modify(at_once))]), range(6)))
        assert len(sessions(direct)) == 3
    storage.close()
    while sessions(direct):
        time.sleep(0.001)


def test_a_locked_row_is_waited_for_until_the_timeout(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """After the timeout a write raises ``StorageBusyError``; readers never wait."""
    storage = open_storage(options="-c statement_timeout=20s", timeout=1)
    storage.write([("alice", Merge({"n": 0}))])
    changes: list[list[tuple[str, Change]]] = [
        [("bob", Merge({})), ("alice", Merge({"n": 1}))],
        [("alice", Replace({"n": 1}))],
        [("alice", Clear())],
        [("bob", Replace({})), ("alice", Clear())],
        [("bob", Merge({})), ("alice", Modify(count))],
    ]
    with locked_row(direct):
        for each in changes:
            with pytest.raises(StorageBusyError, match="lock timeout; nothing was done; repeat"):
                storage.write(each)
            assert storage.read(["alice", "bob"]) == {"alice": {"n": 0}}
    assert storage.write([("alice", Modify(count))]) == [{"n": 1}]


def test_the_servers_own_limits_are_kept(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """A ``statement_timeout`` of the URL, the role or the database raises ``StorageBusyError``."""
    storage = open_storage(options="-c statement_timeout=1s")
    storage.write([("alice", Merge({"n": 0}))])
    with locked_row(direct), pytest.raises(StorageBusyError, match="due to statement timeout"):
        storage.write([("alice", Modify(count))])
    assert storage.write([("alice", Modify(count))]) == [{"n": 1}]


def test_a_pool_may_be_exhausted(open_storage: Callable[..., PostgresStorage]) -> None:
    """If no connection is free within the timeout, the error says what to do."""
    storage = open_storage(max_connections=1, timeout=1)
    storage.read([])
    with ThreadPoolExecutor(1) as executor:

        def hold(metadata: Metadata) -> Metadata:
            with pytest.raises(StorageBusyError, match=r"no connection was free.*max_connections"):
                executor.submit(storage.read, ["alice"]).result()
            return metadata

        assert storage.write([("alice", Modify(hold))]) == [{}]
    assert storage.read(["alice"]) == {"alice": {}}


# Lost connections.


def test_an_idle_connection_may_be_closed(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """Calls do not fail if the server closed an idle connection."""
    storage = open_storage()
    for n in range(3):
        assert storage.write([("alice", Modify(count))]) == [{"n": n + 1}]
        for pid in sessions(direct):
            direct.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


def test_an_idle_connection_may_be_cut(
    open_storage: Callable[..., PostgresStorage], proxy: Proxy
) -> None:
    """Nor if an idle connection was cut: the write uses another connection."""
    storage = open_storage(proxy.url)
    for n in range(3):
        assert storage.write([("alice", Merge({"n": n}))]) == [{"n": n}]
        proxy.cut()


def test_all_connections_may_be_gone(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """After a restart a call does not wait for all the lost connections of the pool."""
    storage = open_storage(max_connections=10, timeout=5)
    barrier = threading.Barrier(10)

    def at_once(metadata: Metadata) -> Metadata:
        barrier.wait(timeout=30)
        return metadata

    with ThreadPoolExecutor(10) as executor:
        list(executor.map(lambda n: storage.write([(f"user {n}", Modify(at_once))]), range(10)))
    for pid in sessions(direct):
        direct.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
    assert storage.read(["user 1"]) == {"user 1": {}}


@pytest.mark.parametrize("change", [Merge({"n": 1}), Modify(count)], ids=["merge", "modify"])
def test_a_write_whose_backend_is_killed_is_repeated(
    open_storage: Callable[..., PostgresStorage],
    direct: psycopg.Connection[Any],
    change: Change,
) -> None:
    """The server reports that it has undone the write, so it is repeated, and done once."""
    storage = open_storage()
    storage.write([("alice", Merge({}))])
    with ThreadPoolExecutor(1) as executor:
        with locked_row(direct):
            written = executor.submit(storage.write, [("alice", change), ("bob", change)])
            waiting_for_locks(1)
            for pid in sessions(direct):
                direct.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
        assert written.result() == [{"n": 1}, {"n": 1}]
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}, "bob": {"n": 1}}


def test_a_function_whose_backend_is_killed_is_called_again(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """The first attempt wrote nothing, so the function is called again."""
    storage = open_storage()
    calls = []

    def kill(metadata: Metadata) -> Metadata:
        calls.append(metadata)
        if len(calls) == 1:
            for pid in sessions(direct):
                direct.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
        return count(metadata)

    assert storage.write([("alice", Modify(kill))]) == [{"n": 1}]
    assert calls == [{}, {}]


def test_a_write_whose_answer_is_lost_is_not_repeated(
    open_storage: Callable[..., PostgresStorage], proxy: Proxy
) -> None:
    """The write may have been done: the error says so, and nothing is done twice."""
    storage = open_storage(proxy.url)
    storage.write([("alice", Merge({"n": 0}))])
    proxy.replies_to_lose = 1
    with pytest.raises(OutcomeUnknownError, match="done whole or not at all; read to find out"):
        storage.write([("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))])
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}, "bob": {"n": 1}}


def test_a_read_whose_answer_is_lost_is_repeated(
    open_storage: Callable[..., PostgresStorage], proxy: Proxy
) -> None:
    """Repeating a read is safe."""
    storage = open_storage(proxy.url)
    storage.write([("alice", Merge({"n": 1}))])
    proxy.replies_to_lose = 2
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    assert proxy.replies_to_lose == 0


def test_a_batch_whose_answer_is_lost_is_not_repeated(
    open_storage: Callable[..., PostgresStorage], proxy: Proxy
) -> None:
    """The same holds for ``asyncio``, whose batches are otherwise repeated call by call."""
    storage = open_storage(proxy.url)
    usermetadata.init(storage)

    async def main() -> list[Any]:
        await modify_user_metadata("alice", count)
        # The first update is a batch; the others share the second batch, whose COMMIT is lost.
        first = asyncio.create_task(modify_user_metadata("alice", lose_the_next_but_one))
        calls = [modify_user_metadata("alice", count) for _ in range(20)]
        return [*await asyncio.gather(first, *calls, return_exceptions=True)]

    def lose_the_next_but_one(metadata: Metadata) -> Metadata:
        proxy.replies_to_lose = 1
        return count(metadata)

    results = asyncio.run(main())
    lost = [result for result in results if isinstance(result, OutcomeUnknownError)]
    done = [result for result in results if not isinstance(result, BaseException)]
    assert lost
    assert len(lost) + len(done) == 21
    # All updates whose answer was lost have been done, none twice.
    assert storage.read(["alice"]) == {"alice": {"n": 22}}


def test_a_server_that_is_not_there_is_named(schema: str) -> None:
    """The first call raises at once, with the reason and without the password."""
    with contextlib.closing(Proxy(server_url())) as proxy:
        url = proxy.url
    storage = PostgresStorage(url, schema=schema)
    with contextlib.closing(storage):
        for _ in range(2):
            with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1/.*refused") as caught:
                storage.read(["alice"])
            assert isinstance(caught.value, ConnectionError)


def test_a_server_that_went_away_is_named(
    open_storage: Callable[..., PostgresStorage], proxy: Proxy
) -> None:
    """The call raises after the timeout, because the server may come back."""
    storage = open_storage(proxy.url, timeout=1)
    storage.write([("alice", Merge({}))])
    proxy.close()
    with pytest.raises(StorageUnavailableError, match="refused"):
        storage.read(["alice"])


def test_passwords_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """No error, representation or log contains the password of the URL."""
    caplog.set_level(logging.DEBUG)
    options = conninfo_to_dict(server_url())
    options |= {"password": "open sesame", "dbname": "not there"}
    storage = PostgresStorage(make_conninfo("", **options), timeout=0.1)
    with contextlib.closing(storage), pytest.raises(StorageUnavailableError) as unavailable:
        storage.read(["alice"])
    with pytest.raises(UserMetadataError) as unreadable:
        usermetadata.init("postgresql://me:open sesame@[host/")
    with pytest.raises(UserMetadataError) as unknown:
        usermetadata.init("mysql://me:open sesame@host/")
    shown = [repr(storage), caplog.text]
    for caught in (unavailable, unreadable, unknown):
        error: BaseException | None = caught.value
        while error is not None:
            shown.append(str(error))
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "FATAL" in shown[2]
    assert "sesame" not in "".join(shown)


# Servers that stop.


def counts(
    acknowledged: list[int], storage: PostgresStorage, name: str, stop: threading.Event
) -> None:
    """Update until stopped; record the number of each acknowledged update."""
    number = 0
    while not stop.is_set():
        number += 1
        with contextlib.suppress(OutcomeUnknownError, StorageUnavailableError):
            storage.write([("alice", Merge({f"{name} {number}": number}))])
            acknowledged.append(number)


def trouble(url: str, schema: str, make_trouble: Callable[[], None]) -> None:
    """Let four threads update one user during a failure, and check that nothing is lost."""
    stop = threading.Event()
    acknowledged: list[list[int]] = [[] for _ in range(4)]
    storage = PostgresStorage(url, schema=schema)

    def seen(number: int) -> None:
        goals = [len(each) + number for each in acknowledged]
        while any(len(each) < goal for each, goal in zip(acknowledged, goals, strict=True)):
            if any(each.done() for each in threads):
                break
            time.sleep(0.001)

    with contextlib.closing(storage), ThreadPoolExecutor(4) as executor:
        storage.write([("alice", Merge({}))])
        threads = [
            executor.submit(counts, each, storage, str(name), stop)
            for name, each in enumerate(acknowledged)
        ]
        try:
            seen(10)
            make_trouble()
            seen(10)
        finally:
            stop.set()
        for each in threads:
            each.result()
        stored = storage.read(["alice"])["alice"]
    for name, numbers in enumerate(acknowledged):
        assert all(stored[f"{name} {number}"] == number for number in numbers)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_loses_nothing(own_server: OwnServer, mode: str) -> None:
    """After an orderly restart or a crash all acknowledged updates exist, and calls continue."""
    with empty_schema(own_server.url) as schema:
        trouble(own_server.url, schema, lambda: own_server.restart(mode))


def test_a_failover_loses_nothing() -> None:
    """With two servers in the URL the storage finds the one that has been promoted."""
    server = OwnServer()  # the end of the run stops it
    standby = server.start_standby()
    first, second = conninfo_to_dict(server.url), conninfo_to_dict(standby)
    url = make_conninfo(
        server.url, host=f"{first['host']},{second['host']}", target_session_attrs="read-write"
    )
    with psycopg.connect(server.url) as connection:
        connection.execute("CREATE SCHEMA app")

    def fail_over() -> None:
        server.crash()
        server.promote_standby()

    trouble(url, "app", fail_over)
    with contextlib.closing(PostgresStorage(standby, schema="app")) as storage:
        assert len(storage.read(["alice"])["alice"]) > 80


@pytest.mark.parametrize("state", ["08006", "57P02"], ids=["connection failure", "crash"])
def test_what_says_that_the_connection_was_lost_leaves_it_open(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any], state: str
) -> None:
    """A pooler may answer in place of a server that it has lost; the write may have been done."""
    storage = open_storage()
    storage.write([("alice", Merge({"n": 1}))])
    function = SQL(
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = {}; END $$"
    )
    direct.execute(function.format(Literal(state)))
    direct.execute(
        "CREATE TRIGGER losing BEFORE INSERT ON user_metadata FOR EACH ROW EXECUTE FUNCTION lose()"
    )
    with pytest.raises(OutcomeUnknownError, match="lost"):
        storage.write([("alice", Merge({"n": 2}))])
    assert storage.read(["alice"]) == {"alice": {"n": 1}}


@pytest.mark.parametrize("change", [Merge({"n": 1}), Modify(count)], ids=["merge", "modify"])
def test_a_write_that_a_standby_may_miss_is_not_acknowledged(
    own_server: OwnServer, change: Change
) -> None:
    """A cancelled wait for the synchronous standby is no success: a failover may lose the write."""

    def require_standby(name: str) -> None:
        with psycopg.connect(own_server.url, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'".encode())
        own_server.restart("fast")

    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with (
        empty_schema(own_server.url) as schema,
        contextlib.closing(PostgresStorage(own_server.url, schema=schema)) as storage,
        ThreadPoolExecutor(1) as executor,
    ):
        storage.write([("alice", Merge({}))])
        require_standby("missing")
        try:
            written = executor.submit(storage.write, [("alice", change)])
            with psycopg.connect(own_server.url, autocommit=True) as direct:
                while not direct.execute(cancel).fetchall() and not written.done():
                    time.sleep(0.001)
            with pytest.raises(OutcomeUnknownError, match=r"standby was cancelled.*read to find"):
                written.result()
            assert storage.read(["alice"]) == {"alice": {"n": 1}}
        finally:
            require_standby("")


def test_a_read_only_server_says_so(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """A replica, or a former primary, can be read; writing raises an error."""
    open_storage().write([("alice", Merge({"n": 1}))])
    storage = open_storage(options="-c default_transaction_read_only=on")
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    with pytest.raises(
        StorageError, match=r"in a read-only transaction; connect to a server that accepts writes"
    ):
        storage.write([("alice", Merge({"n": 2}))])


def test_a_server_that_was_read_only_is_left(own_server: OwnServer) -> None:
    """A connection to a read-only server is replaced after a failover."""
    with (
        psycopg.connect(own_server.url, autocommit=True) as direct,
        contextlib.closing(PostgresStorage(own_server.url)) as storage,
    ):
        storage.write([("alice", Merge({"n": 1}))])
        direct.execute("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on")
        direct.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = 'usermetadata'"
        )
        assert storage.read(["alice"]) == {"alice": {"n": 1}}
        direct.execute("ALTER ROLE CURRENT_USER RESET default_transaction_read_only")
        assert storage.write([("alice", Merge({"n": 2}))]) == [{"n": 2}]


# Other isolation, poolers, forks.


@pytest.mark.parametrize("level", [r"repeatable\ read", "serializable"])
def test_strict_isolation_loses_nothing(
    open_storage: Callable[..., PostgresStorage], level: str
) -> None:
    """If the database's default isolation makes concurrent writes fail, they are repeated."""
    storage = open_storage(options=f"-c default_transaction_isolation={level}")
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: storage.write([("alice", Modify(count))]), range(40)))
        list(executor.map(lambda n: storage.write([("bob", Merge({str(n): n}))]), range(40)))
    assert storage.read(["alice", "bob"]) == {
        "alice": {"n": 40},
        "bob": {str(n): n for n in range(40)},
    }


def test_writes_of_many_kinds_do_not_deadlock(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """All writes lock users in one order, for every kind of change."""
    storage = open_storage()
    users = [f"user {n}" for n in range(20)]

    def write(thread: int) -> None:
        for n in range(100):
            kinds: list[Change] = [Clear(), Merge({"n": n}), Replace({"n": n})]
            choice = random.Random(1000 * thread + n)
            if n % 2:  # all of one kind are one statement
                kinds = [choice.choice(kinds)]
            storage.write([(user, choice.choice(kinds)) for user in choice.sample(users, 10)])

    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    [before] = direct.execute(deadlocks).fetchone() or [None]
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(write, range(4)))
    storage.close()
    while sessions(direct):  # sessions report their deadlocks when they end, at the latest
        time.sleep(0.001)
    assert direct.execute(deadlocks).fetchone() == (before,)


@pytest.mark.parametrize("change", [Clear(), Merge({}), Replace({}), Modify(lambda old: old)])
def test_rows_are_locked_in_the_order_of_the_ids(
    open_storage: Callable[..., PostgresStorage],
    direct: psycopg.Connection[Any],
    change: Change,
) -> None:
    """A write that waits for a user has no lock of a later one, wherever their rows are stored."""
    storage = open_storage()
    for user_id in ("bob", "alice"):
        storage.write([(user_id, Merge({}))])
    direct.execute("ANALYZE user_metadata")  # a small table is read as a whole
    lock = "SELECT FROM user_metadata WHERE user_id = %s FOR UPDATE NOWAIT"
    with ThreadPoolExecutor(1) as executor:
        with direct.transaction():
            direct.execute(lock, ["alice"])
            written = executor.submit(storage.write, [("bob", change), ("alice", change)])
            waiting_for_locks(1)
            direct.execute(lock, ["bob"])
        written.result()


def test_a_failed_write_leaves_the_connection_usable(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """Calls work after a failed batch in which the driver had prepared a statement."""
    storage = open_storage(max_connections=1, timeout=1)
    changes: list[tuple[str, Change]] = [("alice", Merge({"n": 1})), ("bob", Clear())]
    for _ in range(5):  # with the next the driver prepares
        storage.write(changes)
    with locked_row(direct), pytest.raises(StorageBusyError):
        storage.write(changes)
    for _ in range(3):
        assert storage.write(changes) == [{"n": 1}, None]


def test_a_deadlock_is_repeated(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """If the server undoes a write because of a deadlock, the write is repeated."""
    storage = open_storage()
    storage.write([("alice", Merge({})), ("bob", Merge({}))])

    with ThreadPoolExecutor(1) as executor:
        direct.execute("SET deadlock_timeout = '10min'")
        with direct.transaction():
            direct.execute("SELECT FROM user_metadata WHERE user_id = 'bob' FOR UPDATE")
            written = executor.submit(
                storage.write, [("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))]
            )
            waiting_for_locks(1)
            # Both wait for each other now; the storage's session detects the deadlock.
            direct.execute("SELECT FROM user_metadata WHERE user_id = 'alice' FOR UPDATE")
        assert written.result() == [{"n": 1}, {"n": 1}]


def test_a_pooler_may_give_each_transaction_another_session(own_server: OwnServer) -> None:
    """Behind pgbouncer in transaction mode the storage relies on no session state."""
    with (
        empty_schema(own_server.url) as schema,
        contextlib.closing(Pooler(own_server.url)) as pooler,
        contextlib.closing(PostgresStorage(pooler.url, schema=schema)) as storage,
        ThreadPoolExecutor(4) as executor,
    ):

        def use(name: int) -> None:
            for n in range(20):
                storage.write([("alice", Modify(count))])
                storage.write([("alice", Merge({f"{name} {n}": n})), ("bob", Clear())])
                storage.write([(f"user {name}", Merge({"n": n}))])
                assert storage.read([f"user {name}"]) == {f"user {name}": {"n": n}}
                assert len(storage.read([f"user {name}", "alice"])) == 2

        def keep(metadata: Metadata) -> Metadata:
            return {**metadata, **count(metadata)}

        list(executor.map(use, range(4)))
        assert storage.write([("alice", Modify(keep))])[0]["n"] >= 1  # type: ignore[index]


def test_a_fork_leaves_both_sides_working(schema: str) -> None:
    """Parent and child continue to use a busy storage, each with its own connections."""
    program = """
from usermetadata import PostgresStorage
storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
usermetadata.init(storage)

for thread in work("before", 20):
    thread.join()
busy = work("meanwhile", 20)
children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        for thread in work(f"child {number}", 20):
            thread.join()
        if number:
            storage.close()
        if number == 2:
            os._exit(0)
        sys.exit()
    children.append(child)
busy += work("parent", 20)
for thread in busy:
    thread.join()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
print(len(syncio.get_user_metadata("alice").metadata))
storage.close()
"""
    assert run(WORK + program, server_url(), schema) == f"{6 * 40}\n"


def test_a_fork_inside_a_change_cannot_commit_twice(schema: str) -> None:
    """A child forked inside a transaction cannot end it; the parent is not affected."""
    program = """
import logging, os, sys
from usermetadata import PostgresStorage, StorageError
logging.disable()  # psycopg complains, in the child, of the connection that we took away
from usermetadata.changes import Merge, Modify
storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
storage.write([("alice", Merge({}))])
children = []
def fork(metadata):
    children.append(os.fork())
    return {"forked": children[0] > 0}
try:
    print(storage.write([("alice", Modify(fork))]), flush=True)
except StorageError as error:
    assert children == [0] and "forked inside a write" in str(error)
    print(storage.write([("bob", Merge({"child": True}))]), flush=True)
    os._exit(0)
assert os.waitpid(children[0], 0)[1] == 0
print(storage.write([("alice", Merge({"after": True}))]))
storage.close()
"""
    output = run(program, server_url(), schema)
    assert sorted(output.splitlines()) == [
        "[{'child': True}]",
        "[{'forked': True, 'after': True}]",
        "[{'forked': True}]",
    ]


def test_a_fork_that_python_is_not_told_of(schema: str) -> None:
    """After a fork by C code, without Python's hooks, each side has its own connections."""
    program = """
import asyncio, os, sys
import usermetadata
from usermetadata import PostgresStorage, asyncio as asynchronous, syncio

usermetadata.init(PostgresStorage(sys.argv[1], schema=sys.argv[2]))

def block(who):
    for n in range(20):
        updated = syncio.update_user_metadata("alice", {f"{who} {n}": n})
        assert f"{who} {n}" in updated.metadata

def gather(who):
    async def main():
        update = asynchronous.update_user_metadata
        await asyncio.gather(*[update("alice", {f"{who} {n}": n}) for n in range(20)])
    asyncio.run(main())

for update in (block, gather):
    update(f"before {update}")
    child = fork()
    update(f"{child > 0} {update}")
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print(len(syncio.get_user_metadata("alice").metadata))
usermetadata.UserMetadataRecipe.reset()
"""
    assert run(FORK + program, server_url(), schema) == "120\n"


def test_a_borrowed_pool_stays_with_its_process(schema: str) -> None:
    """A child cannot use its parent's pool: its calls raise an error."""
    program = """
import os, sys
from psycopg_pool import ConnectionPool
from usermetadata import PostgresStorage, UsageError
from usermetadata.changes import Merge
with ConnectionPool(sys.argv[1], min_size=1, max_size=2) as pool:
    storage = PostgresStorage(pool, schema=sys.argv[2])
    storage.write([("alice", Merge({}))])
    child = os.fork()
    if child == 0:
        try:
            storage.read(["alice"])
        except UsageError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(storage.write([("alice", Merge({"n": 1}))]))
"""
    assert run(program, server_url(), schema) == (
        "the borrowed pool: it belongs to the parent process; make one in each process\n"
        "[{'n': 1}]\n"
    )


def test_who_forgets_to_close_is_not_held_up(schema: str) -> None:
    """A storage that is dropped, or open at exit, ends its threads and connections."""
    program = """
import sys, threading
from usermetadata import PostgresStorage
storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
storage.read(["alice"])
assert threading.active_count() > 1
storage = None
assert threading.active_count() == 1
storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
print(storage.read(["alice"]))
"""
    assert run(program, server_url(), schema) == "{}\n"


def run(program: str, *arguments: str) -> str:
    """Run a program whose threads fork; it causes no warnings but those about that."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


def test_a_borrowed_pool_may_be_exhausted(schema: str) -> None:
    """The storage's timeout and the pool's own limit both apply to a borrowed pool."""
    with ConnectionPool(server_url(), min_size=1, max_size=1, max_waiting=1) as pool:
        storage = PostgresStorage(pool, schema=schema, timeout=1)
        with pool.connection(), pytest.raises(StorageBusyError, match="no connection was free"):
            storage.read(["alice"])
        patient = PostgresStorage(pool, schema=schema)
        with ThreadPoolExecutor(1) as executor:
            with pool.connection():
                waiting = executor.submit(patient.read, ["alice"])
                while not pool.get_stats()["requests_waiting"]:
                    time.sleep(0.001)
                with pytest.raises(StorageBusyError, match="no connection was free"):
                    patient.write([("alice", Merge({}))])
            assert waiting.result() == {}


def test_a_borrowed_pool_may_have_a_closed_connection(schema: str) -> None:
    """Connections that were closed while idle, or by an exception during a call, are replaced."""
    with ConnectionPool(server_url(), min_size=1, max_size=1) as pool:
        storage = PostgresStorage(pool, schema=schema)
        with pool.connection() as connection:
            pass
        connection.close()
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]

        def interrupt(*_: object) -> None:
            raise InterruptedError

        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            with psycopg.connect(server_url(), options=f"-c search_path={schema}") as other:
                other.execute("SELECT FROM user_metadata FOR UPDATE")
                with ThreadPoolExecutor(1) as executor:
                    executor.submit(interrupt_who_waits)
                    with pytest.raises(InterruptedError):
                        storage.write([("alice", Merge({"n": 2}))])
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert storage.write([("alice", Merge({"n": 3}))]) == [{"n": 3}]


def interrupt_who_waits() -> None:
    """Send the main thread a signal once it waits for a row."""
    waiting_for_locks(1)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("change", "fails_once"),
    [
        ("ALTER TABLE user_metadata ALTER user_id TYPE varchar(128)", False),
        ("ALTER TABLE user_metadata ALTER user_metadata TYPE varchar(1000)", False),
        ("ALTER TABLE user_metadata ADD COLUMN at timestamptz DEFAULT now()", False),
        ("DROP TABLE user_metadata", True),
        ("ALTER TABLE user_metadata RENAME TO old", True),
    ],
    ids=["a key", "the metadata", "a column more", "dropped", "renamed"],
)
def test_no_error_of_a_changed_table_outlives_it(
    open_storage: Callable[..., PostgresStorage],
    direct: psycopg.Connection[Any],
    change: str,
    *,
    fails_once: bool,
) -> None:
    """After a change of the table the calls work: at once, or after one error if it is gone."""
    storage = open_storage()
    for _ in range(7):  # the driver prepares statements that it has seen often
        storage.write([("alice", Merge({"n": 1}))])
        storage.write([("alice", Modify(count))])
        storage.read(["alice"])
    direct.execute(change.encode())
    if fails_once:
        with pytest.raises(StorageError, match="user_metadata"):
            storage.read(["alice"])
        assert storage.read(["alice"]) == {}
    storage.write([("alice", Replace({"n": 1}))])
    assert storage.write([("alice", Modify(count))]) == [{"n": 2}]
    assert storage.read(["alice"]) == {"alice": {"n": 2}}


def test_a_column_that_was_shortened_is_noticed(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """A user id that does not fit any more is an error, and afterwards the limit is named."""
    storage = open_storage()
    storage.write([("alice", Merge({}))])
    direct.execute("ALTER TABLE user_metadata ALTER user_id TYPE varchar(128)")
    with pytest.raises(StorageError, match="too long"):
        storage.write([("x" * 129, Merge({}))])
    with pytest.raises(InvalidInputError, match="takes 128"):
        storage.write([("x" * 129, Merge({}))])


def test_a_read_ends_if_the_server_does_not_answer(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """A read waits for the timeout and no longer; the next call uses another connection."""
    storage = open_storage(timeout=1)
    storage.write([("alice", Merge({"n": 1}))])
    [session] = sessions(direct)
    os.kill(session, signal.SIGSTOP)
    try:
        with pytest.raises(StorageUnavailableError, match="no answer within 1 seconds"):
            storage.read(["alice"])
        assert storage.read(["alice"]) == {"alice": {"n": 1}}
    finally:
        os.kill(session, signal.SIGCONT)


def test_a_function_that_is_too_slow_for_the_server(
    open_storage: Callable[..., PostgresStorage], direct: psycopg.Connection[Any]
) -> None:
    """The error names the server's limit, and the function is called once."""
    storage = open_storage(options="-c transaction_timeout=2000")
    storage.write([("alice", Merge({"n": 1}))])
    calls: list[Metadata] = []
    before = sessions(direct)

    def wait(metadata: Metadata) -> Metadata:
        calls.append(metadata)
        deadline = time.monotonic() + 20
        while sessions(direct) == before:  # until the server has ended the session
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return {"n": 2}

    with pytest.raises(StorageError, match=r"timeout.* the function took longer than the server"):
        storage.write([("alice", Modify(wait))])
    assert calls == [{"n": 1}]
    assert storage.read(["alice"]) == {"alice": {"n": 1}}

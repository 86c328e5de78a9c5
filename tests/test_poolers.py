"""PostgreSQL behind a pooler that begins transactions itself: acknowledged means committed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from postgres_proxy import BeginningPooler
from postgres_server import OwnServer, empty_schema, server_url
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

import usermetadata
from usermetadata import (
    OutcomeUnknownError,
    PostgresStorage,
    StorageBusyError,
    StorageUnavailableError,
    UserMetadataRecipe,
)
from usermetadata import asyncio as asynchronous
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
    from pathlib import Path

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
        contextlib.closing(PostgresStorage(pooler.url, schema=schema, timeout=0.05)) as hasty,
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
    with pytest.raises(OutcomeUnknownError, match="done whole or not at all: read to find out"):
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


# pgpool-II itself.


@pytest.fixture(scope="module")
def pgpool_program() -> str:
    """The path of pgpool-II."""
    program = shutil.which("pgpool", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("pgpool-II is not installed: apt-get install pgpool2")
        pytest.skip("pgpool-II is not installed: apt-get install pgpool2")
    return program


@pytest.fixture(scope="module")
def pgpool(
    pgpool_program: str, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[str, str], None, None]:
    """The URLs of a server and of a pgpool-II before it, with the defaults of its raw mode."""
    server = OwnServer()
    folder = tmp_path_factory.mktemp("pgpool")
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(listener.getsockname()[1])
    options = conninfo_to_dict(server.url)
    settings = {
        "backend_clustering_mode": "raw",
        "backend_hostname0": options["host"],
        "backend_port0": options.get("port", 5432),
        "listen_addresses": "127.0.0.1",
        "port": ports[0],
        "pcp_listen_addresses": "127.0.0.1",
        "pcp_port": ports[1],
        **dict.fromkeys(["socket_dir", "pcp_socket_dir", "logdir"], folder),
        "pid_file_name": folder / "pgpool.pid",
    }
    configuration = folder / "pgpool.conf"
    configuration.write_text("".join(f"{name} = '{value}'\n" for name, value in settings.items()))
    url = make_conninfo(
        server.url, host="127.0.0.1", port=str(ports[0]), sslmode="disable", gssencmode="disable"
    )
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [pgpool_program, "-n", "-f", configuration], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until_it_answers(url, process, folder / "log")
        yield server.url, url
    finally:
        process.send_signal(signal.SIGINT)  # it does not wait for its clients
        process.wait(timeout=30)
        server.stop()


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return as soon as a pooler accepts connections."""
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)


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
def test_first_writes_behind_pgpool_are_committed(
    pgpool: tuple[str, str], changes: list[tuple[str, Change]]
) -> None:
    """pgpool-II's lookup of a table that it sees for the first time loses no acknowledged write."""
    url, behind = pgpool
    with (
        empty_schema(url) as schema,
        contextlib.closing(PostgresStorage(url, schema=schema)) as direct,
    ):
        for _ in range(5):
            direct.write([("alice", Clear()), ("bob", Clear())])
            # A separate process of pgpool-II serves each connection, and has seen no table yet.
            with contextlib.closing(PostgresStorage(behind, schema=schema)) as storage:
                results = storage.write(changes)
                assert results[0] == {"n": 1}
                expected = {
                    user_id: result
                    for (user_id, _), result in zip(changes, results, strict=True)
                    if result is not None
                }
                assert direct.read(["alice", "bob"]) == expected
                assert storage.read(["alice", "bob"]) == expected


def test_threads_and_tasks_behind_pgpool_lose_nothing(
    pgpool: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """All concurrent writes of eight threads and 200 tasks are stored, without a warning."""
    url, behind = pgpool
    users = [f"user {n}" for n in range(10)]
    acknowledged: list[tuple[str, str]] = []

    def keep(key: str) -> Any:
        return lambda metadata: {**metadata, key: 1}

    def use(name: int) -> None:
        for n in range(10):
            user, other = users[n], users[n - 1]
            update_user_metadata(user, {f"{name} update": n})
            modify_user_metadata(user, keep(f"{name} modify"))
            key = f"{name} {n} bulk"
            update_bulk_user_metadata({user: {key: n}, other: {key: n}})
            acknowledged.extend((user, f"{name} {kind}") for kind in ("update", "modify"))
            acknowledged.extend(((user, key), (other, key)))

    async def use_too(name: int) -> None:
        user, other = users[name % 10], users[name % 10 - 1]
        await asynchronous.update_user_metadata(user, {f"task {name} update": 1})
        await asynchronous.modify_user_metadata(user, keep(f"task {name} modify"))
        key = f"task {name} bulk"
        await asynchronous.update_bulk_user_metadata({user: {key: 1}, other: {key: 1}})
        acknowledged.extend((user, f"task {name} {kind}") for kind in ("update", "modify", "bulk"))
        acknowledged.append((other, key))

    async def use_together() -> None:
        await asyncio.gather(*map(use_too, range(200)))

    with (
        empty_schema(url) as schema,
        contextlib.closing(PostgresStorage(url, schema=schema)) as direct,
        contextlib.closing(PostgresStorage(behind, schema=schema)) as storage,
    ):
        usermetadata.init(storage)
        with ThreadPoolExecutor(8) as executor:
            threads = executor.map(use, range(8))
            asyncio.run(use_together())
            list(threads)
        UserMetadataRecipe.reset()
        stored = direct.read(users)
    assert len(acknowledged) == 8 * 10 * 4 + 200 * 4
    assert [(user, key) for user, key in acknowledged if key not in stored[user]] == []
    assert "rolling back" not in caplog.text

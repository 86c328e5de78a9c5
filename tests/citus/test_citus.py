"""The storage on a Citus cluster: a coordinator and two workers on this machine.

Only where Citus is installed, built from its source against the server's packages.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from citus_cluster import Cluster, bin_folder
from click.testing import CliRunner
from postgres_proxy import Proxy
from psycopg.conninfo import conninfo_to_dict

from usermetadata import (
    Index,
    OutcomeUnknownError,
    PostgresStorage,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
    UserMetadata,
)
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.cli import main
from usermetadata.testing import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from multiprocessing.queues import Queue
    from threading import Event

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

if bin_folder() is None:
    pytest.skip("Citus is not installed; see docs/contributing.md", allow_module_level=True)

SPAWN = multiprocessing.get_context("spawn")
USERS = [f"user {n}" for n in range(12)]


@pytest.fixture(scope="module")
def cluster() -> Generator[Cluster, None, None]:
    """A coordinator and two workers."""
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def distributed(cluster: Cluster) -> str:
    """The coordinator's URL; the command line has made and distributed the table."""
    arguments = ["create-table", "--distributed", "--storage", url_of(cluster)]
    for how in ("created", "it exists"):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        first, second = result.output.splitlines()
        assert first == f'table "public"."user_metadata": {how}'
        assert second.endswith("by user_id: 8 shards on 2 servers")
    return url_of(cluster)


@pytest.fixture
def storage(distributed: str, cluster: Cluster) -> Generator[PostgresStorage, None, None]:
    """A storage on the empty distributed table."""
    cluster.execute("TRUNCATE user_metadata")
    with contextlib.closing(PostgresStorage(distributed)) as storage:
        yield storage


def url_of(cluster: Cluster) -> str:
    """Return the coordinator's URL."""
    return f"postgresql://postgres@127.0.0.1:{cluster.coordinator.port}/postgres?sslmode=disable"


class TestCitus(StorageConformance):
    """The storage keeps the promises of a storage on a distributed table, except one."""

    @pytest.fixture
    def second_storage(self, distributed: str) -> Generator[PostgresStorage, None, None]:
        """Another storage on the same table."""
        with contextlib.closing(PostgresStorage(distributed)) as second:
            yield second

    def test_a_read_is_of_one_moment(self, storage: Storage) -> None:
        """The one that Citus cannot keep: its servers share no snapshot.

        A read may see a write of several users on one server, and not yet on another. Once the
        write has returned, every read sees all of it.
        """
        check_that_a_write_that_returned_is_read(storage, storage, 0)

    @pytest.mark.parametrize("between", [3000, 70_000])
    def test_a_read_of_many_users_is_of_one_moment(self, storage: Storage, between: int) -> None:
        """The same, if thousands of others are read with them."""
        check_that_a_write_that_returned_is_read(storage, storage, between)

    @pytest.mark.parametrize("between", [0, 3000])
    def test_a_read_is_of_one_moment_of_a_second_storage(
        self, storage: Storage, second_storage: Storage, between: int
    ) -> None:
        """The same for two storages, as in two processes."""
        check_that_a_write_that_returned_is_read(storage, second_storage, between)

    def test_a_reader_sees_all_of_a_write_or_nothing(self, storage: Storage) -> None:
        """A read during a write sees, of each user, the old row or the new one."""
        check_that_a_read_during_a_write_sees_whole_rows(storage, storage)

    def test_a_second_storage_sees_all_of_a_write_or_nothing(
        self, storage: Storage, second_storage: Storage
    ) -> None:
        """The same for two storages."""
        check_that_a_read_during_a_write_sees_whole_rows(storage, second_storage)

    def test_a_write_of_many_users_is_whole(self, storage: Storage) -> None:
        """All of a write of 12,000 users is stored, or nothing if the last change fails.

        A read at the same time may see it on one server only.
        """
        users = [f"user {number:05}" for number in range(12_000)]
        changes: list[tuple[str, Change]] = [(user, Merge({})) for user in users]

        def fail(_: Metadata | None) -> Metadata:
            raise LookupError

        with pytest.raises(LookupError):
            storage.write([*changes[:-1], (users[-1], fail)])
        assert storage.read(users) == {}
        storage.write(changes)
        assert storage.read(users) == {user: {} for user in users}


def check_that_a_write_that_returned_is_read(
    storage: Storage, reader: Storage, between: int
) -> None:
    """Write a few users together, then read them among others."""
    users = [*(f"absent {number}" for number in range(between)), *USERS]
    # Citus takes two seconds to plan the longest read.
    for number in range(50 if not between else 30 if between < 10_000 else 3):
        storage.write([(user, Merge({"n": number})) for user in USERS])
        assert reader.read(users) == {user: {"n": number} for user in USERS}


def check_that_a_read_during_a_write_sees_whole_rows(storage: Storage, reader: Storage) -> None:
    """Read users of both workers while they are written together."""
    storage.write([(user, Replace({"n": 0, "m": 0})) for user in USERS])
    with ThreadPoolExecutor(1) as executor:
        for number in range(1, 20):
            change = Merge({"n": number, "m": number})
            writing = executor.submit(storage.write, [(user, change) for user in USERS])
            found = [reader.read(USERS)]
            while not writing.done():
                found.append(reader.read(USERS))
            assert writing.result() == [{"n": number, "m": number}] * len(USERS)
            rows = [row for stored in found for row in stored.values()]
            assert len(rows) == len(found) * len(USERS)
            assert all(row["n"] == row["m"] and row["n"] in {number - 1, number} for row in rows)


# Concurrency.


def write_batches(url: str, name: str, seconds: float, results: Queue[Any]) -> None:
    """Write 1, 4 or 8 users at random; put what was acknowledged, and the slowest call."""
    acknowledged: list[tuple[str, str]] = []
    choice = random.Random(name)
    slowest, end = 0.0, time.monotonic() + seconds
    with contextlib.closing(PostgresStorage(url)) as storage:
        number = 0
        while (began := time.monotonic()) < end:
            users = choice.sample(USERS, choice.choice([1, 4, 8]))
            key = f"{name} {number}"
            storage.write([(user, Merge({key: number})) for user in users])
            acknowledged += [(user, key) for user in users]
            slowest = max(slowest, time.monotonic() - began)
            number += 1
    results.put((acknowledged, slowest))


def test_processes_that_write_batches_lose_nothing(
    storage: PostgresStorage, distributed: str, cluster: Cluster
) -> None:
    """Batches of several users from several processes neither deadlock nor lose an update."""
    deadlocks = cluster.log().count("deadlock")
    results: Queue[Any] = SPAWN.Queue()
    processes = [
        SPAWN.Process(target=write_batches, args=(distributed, str(number), 5, results))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    stored = storage.read(USERS)
    for acknowledged, slowest in found:
        assert len(acknowledged) > 20
        assert slowest < 2
        assert all(key in stored[user] for user, key in acknowledged)
    assert cluster.log().count("deadlock") == deadlocks


def test_all_kinds_of_writes_together(storage: PostgresStorage, cluster: Cluster) -> None:
    """Writes of every kind, of users in any order, do not deadlock."""
    deadlocks = cluster.log().count("deadlock")

    def write(thread: int) -> None:
        choice = random.Random(thread)
        for n in range(20):
            kinds: list[Change] = [Clear(), Merge({"n": n}), Replace({"n": n}), Modify(dict)]
            if n % 2:
                kinds = [choice.choice(kinds)]
            storage.write([(user, choice.choice(kinds)) for user in choice.sample(USERS, 6)])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(write, range(4)))
    assert cluster.log().count("deadlock") == deadlocks


def test_a_locked_row_is_waited_for_until_the_timeout(
    storage: PostgresStorage, distributed: str
) -> None:
    """The wait for a row on a worker ends with ``StorageBusyError``, and nothing is written."""
    storage.write([("alice", Merge({"n": 1}))])
    with (
        contextlib.closing(PostgresStorage(distributed, timeout=0.2)) as other,
        psycopg.connect(distributed) as connection,
    ):
        with storage.within(connection) as joined:
            joined.write([("alice", Merge({"n": 2}))])
        for change in (Merge({"n": 3}), Replace({"n": 3}), Clear()):
            with pytest.raises(StorageBusyError):
                other.write([("bob", change), ("alice", change)])
        connection.rollback()
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}}


def test_a_deadlock_with_another_program_is_repeated(
    storage: PostgresStorage, distributed: str, cluster: Cluster
) -> None:
    """Citus ends the younger of two transactions that wait for each other; it is repeated."""
    update = "UPDATE user_metadata SET user_metadata = %s WHERE user_id = %s"
    deadlocks = cluster.log().count("deadlock")
    # One of the two is locked first, as the shards are ordered.
    for held, wanted in (("user 0", "user 9"), ("user 9", "user 0")):
        storage.write([(user, Replace({})) for user in (held, wanted)])
        with psycopg.connect(distributed) as connection, ThreadPoolExecutor(1) as executor:
            connection.execute(update, ["{}", held])
            changes = [(user, Merge({"n": 1})) for user in (held, wanted)]
            written = executor.submit(storage.write, changes)
            while cluster.execute("SELECT count(*) FROM citus_lock_waits") == [(0,)]:
                assert not written.done()
            connection.execute(update, ['{"m":1}', wanted])
            connection.commit()
            assert written.result() == [{"n": 1}, {"n": 1, "m": 1}]
    assert cluster.log().count("deadlock") > deadlocks


# Servers that stop, and shards that move.


def counts(storage: PostgresStorage, name: str, acknowledged: list[int], stop: Event) -> None:
    """Update two users on any workers until stopped; record each acknowledged number."""
    choice = random.Random(name)
    number = 0
    while not stop.is_set():
        number += 1
        users = [*choice.sample(USERS, 1), "everybody"]
        with contextlib.suppress(OutcomeUnknownError, StorageUnavailableError, StorageBusyError):
            storage.write([(user, Merge({f"{name} {number}": number})) for user in users])
            acknowledged.append(number)


def trouble(storage: PostgresStorage, make_trouble: Callable[[], None]) -> None:
    """Let four threads write during a failure, and check that nothing acknowledged is lost."""
    stop = threading.Event()
    acknowledged: list[list[int]] = [[] for _ in range(4)]

    def seen(number: int) -> None:
        goals = [len(each) + number for each in acknowledged]
        deadline = time.monotonic() + 60
        while any(len(each) < goal for each, goal in zip(acknowledged, goals, strict=True)):
            assert time.monotonic() < deadline
            assert not any(each.done() for each in threads)
            time.sleep(0.001)

    with ThreadPoolExecutor(4) as executor:
        threads = [
            executor.submit(counts, storage, str(name), each, stop)
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
    for name, numbers in enumerate(acknowledged):
        keys = {f"{name} {number}" for number in numbers}
        stored = storage.read(["everybody", *USERS])
        assert keys <= stored["everybody"].keys()
        assert keys <= {key for user in USERS for key in stored.get(user, {})}


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_worker_that_restarts_loses_nothing(
    storage: PostgresStorage, cluster: Cluster, mode: str
) -> None:
    """After an orderly restart or a crash of a worker all acknowledged updates are there."""

    def restart() -> None:
        cluster.workers[0].stop(mode)
        cluster.workers[0].start()

    trouble(storage, restart)
    # A transaction that the crash left half committed is completed by Citus, within this interval.
    while cluster.prepared_transactions():
        time.sleep(0.01)


def test_a_worker_that_is_away_is_named(storage: PostgresStorage, cluster: Cluster) -> None:
    """Calls for its users raise ``StorageUnavailableError``; those for others work."""
    storage.write([(user, Merge({"n": 1})) for user in USERS])
    cluster.workers[0].stop("fast")
    try:
        outcomes: set[type] = set()
        for user in USERS[:4]:
            try:
                storage.write([(user, Merge({"n": 2}))])
                outcomes.add(type(None))
            except StorageUnavailableError as error:
                # For some users only.
                assert str(cluster.workers[0].port) in str(error)  # noqa: PT017
                assert "pooler" not in str(error)  # noqa: PT017
                outcomes.add(type(error))
        assert outcomes == {type(None), StorageUnavailableError}
    finally:
        cluster.workers[0].start()


@pytest.fixture
def network(cluster: Cluster, storage: PostgresStorage) -> Generator[Proxy, None, None]:
    """What is between the coordinator and the first worker."""
    move = "SELECT citus_update_node(nodeid, '127.0.0.1', %s) FROM pg_dist_node WHERE nodeport = %s"
    worker = cluster.workers[0]
    with contextlib.closing(Proxy(worker.url)) as proxy:
        port = int(conninfo_to_dict(proxy.url)["port"] or 0)
        cluster.execute(move, port, worker.port)
        cluster.execute("SELECT start_metadata_sync_to_all_nodes()")
        yield proxy
        cluster.execute(move, worker.port, port)
        cluster.execute("SELECT start_metadata_sync_to_all_nodes()")


def users_by_worker(cluster: Cluster, network: Proxy) -> tuple[str, str]:
    """Return a user of the first worker, and one of the other."""
    ports = {
        cluster.execute(
            "SELECT nodeport FROM pg_dist_shard_placement WHERE shardid ="
            " get_shard_id_for_distribution_column('user_metadata', %s::text)",
            user,
        )[0][0]: user
        for user in USERS
    }
    assert len(ports) == 2
    first = ports.pop(int(conninfo_to_dict(network.url)["port"] or 0))
    return first, *ports.values()  # type: ignore[return-value]


@pytest.mark.parametrize("change", [Merge({"n": 2}), Replace({"n": 2})], ids=["merge", "replace"])
def test_a_commit_in_doubt_is_not_repeated(
    storage: PostgresStorage, cluster: Cluster, network: Proxy, change: Change
) -> None:
    """If a worker's answer to COMMIT is lost, the outcome is unknown; a lost statement is not."""
    user, other = users_by_worker(cluster, network)
    storage.write([(user, Merge({"n": 1}))])
    network.answer_to_lose = b"INSERT INTO"
    assert storage.write([(user, Merge({"n": 1}))]) == [{"n": 1}]
    assert network.answer_to_lose == b""
    network.answer_to_lose = b"COMMIT\0"
    with pytest.raises(OutcomeUnknownError, match="done whole or not at all; read to find out"):
        storage.write([(user, change)])
    assert storage.read([user]) == {user: {"n": 2}}
    network.answer_to_lose = b"PREPARE TRANSACTION"
    with pytest.raises(OutcomeUnknownError, match="done whole or not at all; read to find out"):
        storage.write([(user, Merge({"n": 3})), (other, Merge({"n": 3}))])
    stored = storage.read([user, other])
    assert stored == {user: {"n": 2}}
    network.answer_to_lose = b"COMMIT PREPARED"
    assert storage.write([(each, Merge({"n": 4})) for each in (user, other)]) == [{"n": 4}] * 2
    assert storage.read([user, other]) == {user: {"n": 4}, other: {"n": 4}}


def test_a_function_whose_worker_is_lost_is_called_again(
    storage: PostgresStorage, cluster: Cluster, network: Proxy
) -> None:
    """The first attempt wrote nothing, so nothing is done twice."""
    user, other = users_by_worker(cluster, network)
    calls: list[Metadata] = []

    def cut(metadata: Metadata) -> Metadata:
        calls.append(metadata)
        if len(calls) == 1:
            network.cut()
        return {"n": len(calls)}

    assert storage.write([(other, Merge({"m": 1})), (user, Modify(cut))]) == [{"m": 1}, {"n": 2}]
    assert calls == [{}, {}]
    assert storage.read([user, other]) == {user: {"n": 2}, other: {"m": 1}}


def test_a_shard_may_move_while_it_is_written(storage: PostgresStorage, cluster: Cluster) -> None:
    """``citus_move_shard_placement`` under load loses nothing, there and back."""
    first, second = (worker.port for worker in cluster.workers)

    def move() -> None:
        [(shard,)] = cluster.execute(
            "SELECT get_shard_id_for_distribution_column('user_metadata', 'everybody')"
        )
        [(port,)] = cluster.execute(
            "SELECT nodeport FROM pg_dist_shard_placement WHERE shardid = %s", shard
        )
        cluster.execute(
            "SELECT citus_move_shard_placement(%s, '127.0.0.1', %s, '127.0.0.1', %s)",
            *(shard, port, second if port == first else first),
        )

    trouble(storage, move)
    trouble(storage, move)


def test_a_worker_may_be_added_while_users_are_written(
    storage: PostgresStorage, cluster: Cluster
) -> None:
    """After ``citus_rebalance_start`` a third worker has shards, and nothing is lost."""
    third = cluster.add_worker()

    def rebalance() -> None:
        cluster.execute("SELECT citus_rebalance_start()")
        cluster.execute("SELECT citus_rebalance_wait()")

    try:
        trouble(storage, rebalance)
        shards = "SELECT count(*) FROM pg_dist_shard_placement WHERE nodeport = %s"
        [(number,)] = cluster.execute(shards, third.port)
        assert number
    finally:
        cluster.remove_worker(third)


# What else works on it, and what is refused.


def test_metadata_joins_the_callers_transaction(storage: PostgresStorage, distributed: str) -> None:
    """``within`` stores with the application's own rows, or not at all."""
    users = UserMetadata(storage)
    with psycopg.connect(distributed) as connection:
        for end in (connection.rollback, connection.commit):
            with users.within(connection) as metadata:
                metadata.update_bulk_user_metadata({user: {"n": 1} for user in USERS})
                assert metadata.get_user_metadata("user 1").metadata == {"n": 1}
                with pytest.raises(ZeroDivisionError):
                    metadata.modify_user_metadata("user 2", lambda _: {"n": 1 // 0})
            end()
            written = [] if end == connection.rollback else USERS
            assert storage.read(USERS) == {user: {"n": 1} for user in written}


def test_a_user_is_erased_in_all_apps(storage: PostgresStorage) -> None:
    """``erase`` removes the user's rows in every app, and no other's."""
    for app in ("public", "shop"):
        storage.for_app(app).write([(user, Merge({"app": app})) for user in USERS])
    assert storage.erase("user 1", lambda _: None) == {
        app: {"app": app} for app in ("public", "shop")
    }
    assert storage.erase("user 1", lambda _: None) == {}
    for app in ("public", "shop"):
        assert storage.for_app(app).read(USERS).keys() == {*USERS} - {"user 1"}


@pytest.mark.parametrize("unique", [False, True])
def test_indexes_are_refused(storage: PostgresStorage, distributed: str, *, unique: bool) -> None:
    """Before anything is written or found: Citus could not keep them."""
    indexes = [Index("plan", unique=unique)]
    with contextlib.closing(PostgresStorage(distributed, indexes=indexes)) as indexed:
        for call in (
            lambda: indexed.write([("alice", Merge({"plan": "pro"}))]),
            lambda: indexed.find({"plan": "pro"}, "", 10),
            indexed.build_indexes,
        ):
            with pytest.raises(UsageError, match="indexes: Citus cannot maintain them"):
                call()
    assert storage.read(["alice"]) == {}
    assert storage.count(None) == 0


@pytest.mark.parametrize(
    "changes",
    [
        [("alice", Merge({"n": 2}))],
        [("alice", Replace({"n": 2}))],
        [("alice", Replace({"n": 2})), ("bob", Replace({"n": 2}))],
        [("alice", Modify(dict))],
        [("alice", Clear())],
        [("alice", Clear()), ("bob", Clear())],
    ],
    ids=["merge", "replace", "replace 2", "modify", "clear", "clear 2"],
)
@pytest.mark.parametrize("how", ["pool", "transaction"])
def test_a_table_may_be_distributed_while_it_is_used(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, changes: list[tuple[str, Change]], how: str
) -> None:
    """The rows are moved; whatever a storage has used the table for before, it goes on.

    A write there waits for rows no longer than its timeout, as on any distributed table.
    """
    url = url_of(cluster)
    cluster.execute("DROP TABLE IF EXISTS moved")
    with (
        contextlib.closing(PostgresStorage(url, table="moved", timeout=0.3)) as storage,
        psycopg.connect(url) as connection,
        storage.within(connection) as joined,
    ):
        used = storage if how == "pool" else joined
        results: list[object] = []
        for _ in range(7):  # psycopg prepares what is repeated
            results.append(used.write(changes))
            used.write([(user, Merge({"n": 1})) for user in ("alice", "bob")])
        connection.commit()
        with contextlib.closing(PostgresStorage(url, table="moved")) as other:
            assert other.distribute() == [
                'table "public"."moved": it exists',
                'table "public"."moved": distributed by user_id: 8 shards on 2 servers',
            ]
        assert used.write(changes) == results[-1]
        connection.commit()
        storage.write([("alice", Replace({}))])
        with psycopg.connect(url) as locking, storage.within(locking) as holding:
            holding.write([("alice", Replace({}))])
            with pytest.raises(StorageBusyError):
                storage.write(changes)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_table_that_citus_only_manages(cluster: Cluster) -> None:
    """A table that stays on the coordinator in Citus's metadata is used likewise."""
    with contextlib.closing(PostgresStorage(url_of(cluster), table="managed")) as storage:
        storage.write([("alice", Merge({"n": 1}))])
        cluster.execute("SELECT citus_add_local_table_to_metadata('managed')")
        assert storage.write([("alice", Merge({"m": 1}))]) == [{"n": 1, "m": 1}]
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 1, "m": 1}}
        # Unlike a distributed table it may have triggers.
        cluster.execute(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        )
        cluster.execute(
            "CREATE TRIGGER keep BEFORE UPDATE ON managed FOR EACH ROW"
            " WHEN (OLD.user_metadata <> NEW.user_metadata) EXECUTE FUNCTION keep()"
        )
        with pytest.raises(StorageError, match=r"did not store.* of user 'alice'.* a trigger"):
            storage.write([("alice", Merge({"m": 2}))])
        assert storage.read(["alice"]) == {"alice": {"n": 1, "m": 1}}


def test_a_table_may_have_any_name(cluster: Cluster) -> None:
    """Whatever stands in a name of PostgreSQL's is distributed and written likewise."""
    name = "100%(x)s '{}\""
    with contextlib.closing(PostgresStorage(url_of(cluster), table=name)) as storage:
        assert len(storage.distribute()) == 2
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        assert storage.erase("alice", lambda _: None) == {"public": {"n": 1}}


def test_a_table_that_cannot_be_distributed_says_why(cluster: Cluster) -> None:
    """It has indexes, is another program's, is a view, or no server takes it, for example."""
    url = url_of(cluster)
    with contextlib.closing(PostgresStorage(url, table="t", indexes=[Index("plan")])) as storage:
        storage.write([("alice", Merge({"plan": "pro"}))])
        with pytest.raises(UsageError, match=r"it has triggers.*index --drop NAME"):
            storage.distribute()
    cluster.execute("CREATE TABLE by_app (LIKE t)")
    cluster.execute("ALTER TABLE by_app ADD PRIMARY KEY (app_id, user_id)")
    cluster.execute("SELECT create_distributed_table('by_app', 'app_id')")
    with (
        contextlib.closing(PostgresStorage(url, table="by_app")) as storage,
        pytest.raises(UsageError, match=r"not distributed by user_id; .* undistribute_table"),
    ):
        storage.distribute()
    cluster.execute("CREATE VIEW seen AS SELECT * FROM by_app")
    with (
        contextlib.closing(PostgresStorage(url, table="seen")) as storage,
        pytest.raises(UsageError, match=r"it is a view .* name the table behind it"),
    ):
        storage.distribute()
    cluster.execute("CREATE TABLE apps (app_id varchar(64) PRIMARY KEY)")
    cluster.execute("SELECT create_reference_table('apps')")  # Citus would distribute the next one
    cluster.execute("CREATE TABLE of_core (LIKE t INCLUDING ALL)")
    cluster.execute("ALTER TABLE of_core ADD FOREIGN KEY (app_id) REFERENCES apps")
    with (
        contextlib.closing(PostgresStorage(url, table="of_core")) as storage,
        pytest.raises(UsageError, match=r"it is a SuperTokens core's.* a table of your own"),
    ):
        storage.distribute()
    with (
        contextlib.closing(PostgresStorage(cluster.workers[0].url, table="new")) as storage,
        pytest.raises(UsageError, match=r"is a worker .*; connect to the coordinator"),
    ):
        storage.distribute()
    takes = "SELECT citus_set_node_property(nodename, nodeport, 'shouldhaveshards', %s::boolean)"
    workers = " FROM pg_dist_node WHERE groupid > 0"
    with contextlib.closing(PostgresStorage(url, table="new")) as storage:
        cluster.execute(takes + workers, "false")
        with pytest.raises(UsageError, match=r"no server .* takes shards; .* citus_add_node"):
            storage.distribute()
        cluster.execute(takes + workers, "true")
        assert len(storage.distribute()) == 2

"""Promises of the SQLite storage beyond the conformance suite."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from conftest import small_files
from sqlite_utils import Database
from sqlite_utils.cli import cli

from usermetadata import (
    DamagedMetadataError,
    InvalidInputError,
    OutcomeUnknownError,
    SQLiteStorage,
    StorageBusyError,
    StorageError,
    UsageError,
)
from usermetadata.changes import Clear, Merge, Modify, Replace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata


@pytest.fixture
def storage(database: Path) -> Generator[SQLiteStorage, None, None]:
    """A storage on a file, with a short timeout."""
    storage = SQLiteStorage(database, timeout=0.1)
    yield storage
    storage.close()


# The file.


def test_the_table_has_supertokens_names(storage: SQLiteStorage, database: Path) -> None:
    """sqlite-utils and every other program see one plain table with JSON as text."""
    storage.write([("alice", Merge({"name": "Zoë"}))])
    with contextlib.closing(Database(database)) as seen:
        table = seen.table("user_metadata")
        assert table.pks == ["app_id", "user_id"]
        assert table.columns_dict == {"app_id": str, "user_id": str, "user_metadata": str}
        row = {"app_id": "public", "user_id": "alice", "user_metadata": '{"name":"Zoë"}'}
        assert list(table.rows) == [row]


def test_sqlites_own_functions_read_the_numbers(storage: SQLiteStorage, database: Path) -> None:
    """SQLite's JSON functions read a number, whether it is stored as 1e16 or as 1e+16."""
    numbers = [1e16, -1.5e17, 1e-5, 1.25e-7, 5e-324, 0.1, 2**53 + 1]
    storage.write([("alice", Replace({"numbers": numbers}))])
    query = "SELECT value FROM user_metadata, json_each(user_metadata, '$.numbers')"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert [number for [number] in connection.execute(query)] == numbers


def test_nothing_is_opened_before_the_first_call(database: Path) -> None:
    """A storage may be made at import time, before a fork, and before its directory exists."""
    SQLiteStorage(database)
    assert not database.exists()


def test_a_relative_path_is_meant_where_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later change of the working directory does not move the file."""
    monkeypatch.chdir(tmp_path)
    storage = SQLiteStorage("users.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write([("alice", Merge({}))])
    storage.close()
    assert (tmp_path / "users.db").exists()


def test_the_file_outlives_the_storage(storage: SQLiteStorage, database: Path) -> None:
    """The next storage of the same path reads what was written."""
    storage.write([("alice", Merge({"n": 1}))])
    storage.read(["alice"])
    storage.close()
    assert os.listdir(database.parent) == [database.name]
    with contextlib.closing(SQLiteStorage(database)) as later:
        assert later.read(["alice"]) == {"alice": {"n": 1}}


def test_apps_share_the_file(storage: SQLiteStorage, database: Path) -> None:
    """``app_id`` and ``for_app`` name the same rows."""
    storage.for_app("shop").write([("alice", Merge({"n": 1}))])
    with contextlib.closing(SQLiteStorage(database, app_id="shop")) as shop:
        assert shop.read(["alice"]) == {"alice": {"n": 1}}


@pytest.mark.parametrize(
    ("settings", "level"),
    [({}, 2), ({"synchronous": "FULL"}, 2), ({"synchronous": "NORMAL"}, 1)],
    ids=["default", "FULL", "NORMAL"],
)
def test_the_writer_syncs_as_it_was_told(
    database: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], level: int
) -> None:
    """The file is in WAL mode, and commits wait for the disk unless ``NORMAL`` was set."""
    connect, opened = sqlite3.connect, list[sqlite3.Connection]()

    def remember(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        opened.append(connect(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", remember)
    with contextlib.closing(SQLiteStorage(database, **settings)) as storage:
        storage.write([("alice", Merge({}))])
        [writer] = opened
        assert writer.execute("PRAGMA synchronous").fetchone() == (level,)
        assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert writer.execute("PRAGMA fullfsync").fetchone() == (level - 1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"database": ""}, "database: '' cannot be a path"),
        ({"database": "a\0.db"}, "database: .* cannot be a path"),
        ({"database": 5}, "database: int is neither a path nor a sqlite_utils.Database"),
        ({"database": "a.db", "synchronous": "OFF"}, "synchronous: 'OFF' is neither"),
        ({"database": "a.db", "timeout": -1}, "timeout: -1 is not a number of seconds"),
        ({"database": "a.db", "timeout": "5"}, "timeout: '5' is not a number of seconds"),
        ({"database": "a.db", "app_id": ""}, "app_id: is empty"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """A wrong argument raises when the storage is made."""
    with pytest.raises(InvalidInputError, match=message):
        SQLiteStorage(**arguments)


def test_a_forgotten_storage_closes_its_file(database: Path) -> None:
    """A storage that is dropped, or open at exit, leaves no warning and no WAL file."""
    program = """
import gc, sys
from usermetadata import SQLiteStorage
from usermetadata.changes import Merge
storage = SQLiteStorage(sys.argv[1])
storage.write([("alice", Merge({}))])
storage.read(["alice"])
if sys.argv[2] == "drop":
    del storage
    gc.collect()
"""
    for when in ("drop", "exit"):
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, str(database), when]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert os.listdir(database.parent) == [database.name]


# Readers and writers.


@pytest.mark.parametrize("warm", [True, False], ids=["known file", "new storage"])
def test_readers_do_not_wait_for_a_writer(
    storage: SQLiteStorage, database: Path, *, warm: bool
) -> None:
    """During a long write transaction a reader gets the old state at once."""
    storage.write([("alice", Merge({"n": 1}))])
    seen: list[dict[str, Metadata]] = []

    def change(metadata: Metadata) -> Metadata:
        with contextlib.closing(SQLiteStorage(database)) as another:
            reader = storage if warm else another
            thread = threading.Thread(target=lambda: seen.append(reader.read(["alice"])))
            thread.start()
            thread.join(30)
        return {"n": 2}

    storage.write([("alice", Modify(change))])
    assert seen == [{"alice": {"n": 1}}]
    assert storage.read(["alice"]) == {"alice": {"n": 2}}


def test_another_programs_lock_is_waited_for_and_reported(
    storage: SQLiteStorage, database: Path
) -> None:
    """A write raises ``StorageBusyError`` after the timeout, and works again afterwards."""
    storage.write([("alice", Merge({"n": 1}))])
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageBusyError, match="longer timeout") as caught:
            storage.write([("alice", Merge({"n": 2}))])
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert isinstance(caught.value, TimeoutError)
        assert storage.read(["alice"]) == {"alice": {"n": 1}}
    assert storage.write([("alice", Merge({"n": 3}))]) == [{"n": 3}]


def test_the_first_opening_waits_for_others(database: Path) -> None:
    """The first call waits for a program that writes a file that is not yet in WAL mode."""
    other = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    with contextlib.closing(other), contextlib.closing(SQLiteStorage(database)) as storage:
        other.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(0.1, other.execute, ["COMMIT"]).start()
        works(storage)


def test_another_thread_is_waited_for_and_reported(storage: SQLiteStorage) -> None:
    """A write that waits for another thread's write also raises after the timeout."""
    errors: list[Exception] = []

    def write() -> None:
        try:
            storage.write([("alice", Merge({"n": 2}))])
        except StorageBusyError as error:
            errors.append(error)

    def change(metadata: Metadata) -> Metadata:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join(30)
        return {"n": 1}

    assert storage.write([("alice", Modify(change))]) == [{"n": 1}]
    assert len(errors) == 1
    assert storage.write([("alice", Merge({"n": 3}))]) == [{"n": 3}]


@pytest.mark.parametrize("path", ["users.db", ":memory:"])
def test_closing_completes_the_write_under_way(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``close`` waits for another thread's write; the write's own thread is refused."""
    monkeypatch.chdir(tmp_path)
    storage = SQLiteStorage(path)
    closing = threading.Thread(target=storage.close)

    def change(metadata: Metadata) -> Metadata:
        with pytest.raises(UsageError, match="a write inside a write"):
            storage.close()
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        return {"n": 1}

    assert storage.write([("alice", Modify(change))]) == [{"n": 1}]
    closing.join()
    with pytest.raises(UsageError, match="closed"):
        storage.read(["alice"])


@pytest.mark.parametrize("path", ["users.db", ":memory:"])
def test_a_refused_close_closes_nothing(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``close`` inside a change, which is refused, the storage works as before."""
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(SQLiteStorage(path)) as storage:

        def change(metadata: Metadata) -> Metadata:
            with pytest.raises(UsageError, match="a write inside a write"):
                storage.close()
            return {"n": 1}

        storage.write([("alice", Modify(change))])
        works(storage)


def test_closing_in_the_middle_of_a_read(
    storage: SQLiteStorage, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read is completed, and its connection is closed then: no log is left behind."""
    storage.write([("alice", Merge({"n": 1}))])
    connect: Any = sqlite3.connect

    class Reading(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            cursor = super().execute(sql, *parameters)
            if sql.startswith("SELECT user_id"):
                storage.close()
            return cursor

    def connect_reading(path: str, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **options | {"factory": Reading})
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_reading)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    assert os.listdir(database.parent) == [database.name]


def test_an_interrupt_undoes_the_write(storage: SQLiteStorage) -> None:
    """Control-C in the middle of a write leaves nothing half done and nothing locked."""

    def interrupt(metadata: Metadata) -> Metadata:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write([("alice", Merge({"n": 1})), ("bob", Modify(interrupt))])
    assert storage.read(["alice"]) == {}
    assert storage.write([("alice", Merge({"n": 2}))]) == [{"n": 2}]


@pytest.mark.parametrize(("others", "times"), [(0, 250), (2, 60)], ids=["alone", "among threads"])
def test_real_interrupts_leave_nothing_locked(database: Path, others: int, times: int) -> None:
    """Control-C at many random moments leaves no lock behind and loses no acknowledged update."""
    program = """
import random, signal, sqlite3, sys, threading
from usermetadata import SQLiteStorage
from usermetadata.changes import Merge
from usermetadata.codec import encode_metadata

def write_for_ever(user_id):
    while True:
        storage.write([(user_id, Merge({"n": 1}))])

encode_metadata({})  # Python can lose an interrupt of an import, and JSON is imported on first use
storage = SQLiteStorage(sys.argv[1], timeout=5)
for n in range(int(sys.argv[2])):
    threading.Thread(target=write_for_ever, args=[f"user {n}"], daemon=True).start()
other = sqlite3.connect(sys.argv[1], timeout=5, isolation_level=None)
signal.signal(signal.SIGALRM, signal.default_int_handler)
acknowledged, interrupts = -1, 0
while interrupts < int(sys.argv[3]):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.003))
        while True:
            storage.write([("alice", Merge({"n": acknowledged + 1}))])
            acknowledged += 1
    except KeyboardInterrupt:
        interrupts += 1
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        stored = storage.read(["alice"]).get("alice", {"n": -1})["n"]
        assert stored in (acknowledged, acknowledged + 1), (stored, acknowledged)
        acknowledged = stored
"""
    command = [sys.executable, "-c", program, str(database), str(others), str(times)]
    subprocess.run(command, check=True, timeout=60)


def test_a_signal_handler_may_read(storage: SQLiteStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler may read even while its thread is opening a connection."""
    storage.write([("alice", Merge({"n": 1}))])
    connect = sqlite3.connect
    seen: list[object] = []

    def interrupted(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)
        connection: sqlite3.Connection = connect(*args, **kwargs)
        return connection

    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(storage.read(["alice"])))
    try:
        monkeypatch.setattr(sqlite3, "connect", interrupted)
        seen.append(storage.read(["alice"]))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [{"alice": {"n": 1}}] * 2


def test_a_write_inside_a_write_is_refused(storage: SQLiteStorage) -> None:
    """A signal handler or a change that writes in the middle of a write gets an error."""

    def change(metadata: Metadata) -> Metadata:
        with pytest.raises(UsageError, match="a write inside a write"):
            storage.write([("alice", Merge({"inner": 1}))])
        return {**metadata, "outer": 1}

    assert storage.write([("alice", Modify(change))]) == [{"outer": 1}]
    assert storage.write([("alice", Merge({"n": 1}))]) == [{"outer": 1, "n": 1}]


# Errors of the file: a clear error with the driver's as its cause; later calls work.


def fails(storage: SQLiteStorage, message: str) -> None:
    """Check that both methods raise ``StorageError`` with this message."""
    for call in (
        lambda: storage.read(["alice"]),
        lambda: storage.write([("alice", Merge({"n": 1}))]),
    ):
        with pytest.raises(StorageError, match=message) as caught:
            call()
        assert isinstance(caught.value.__cause__, sqlite3.Error)


def works(storage: SQLiteStorage) -> None:
    """Check that both methods work."""
    storage.write([("alice", Replace({"works": True}))])
    assert storage.read(["alice"]) == {"alice": {"works": True}}


def test_a_missing_directory(tmp_path: Path) -> None:
    """The error says which directory to create."""
    folder = tmp_path / "missing"
    with contextlib.closing(SQLiteStorage(folder / "users.db")) as storage:
        fails(storage, f"the directory {folder} does not exist; create it")
        folder.mkdir()
        works(storage)


def test_a_directory_in_place_of_the_file(database: Path) -> None:
    """The error says to name a file."""
    database.mkdir()
    with contextlib.closing(SQLiteStorage(database)) as storage:
        fails(storage, "name a file that this process may open")
        database.rmdir()
        works(storage)


def test_a_directory_that_may_not_be_written() -> None:
    """The error says so: a read-only file system, for example."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        Path(folder).chmod(0o555)
        if os.geteuid() == 0:
            # Nothing is read-only for root.
            os.seteuid(65534)
            undo.callback(os.seteuid, 0)
        with contextlib.closing(SQLiteStorage(Path(folder, "users.db"))) as storage:
            fails(storage, "may not write to its directory.* let it, or write where the file sys")
            undo.close()
            Path(folder).chmod(0o755)
            works(storage)


def test_a_borrowed_connection_that_cannot_open_its_file(database: Path) -> None:
    """The error says what SQLite says; it names no directory, which is not known."""
    with contextlib.closing(SQLiteStorage(database)) as storage:
        works(storage)
    database.with_name(database.name + "-wal").mkdir()  # where SQLite has a file
    with (
        contextlib.closing(SQLiteStorage(database)) as storage,
        contextlib.closing(sqlite3.connect(database)) as connection,
        storage.within(connection) as joined,
        pytest.raises(StorageError, match="connection: unable to open database file; name a file"),
    ):
        joined.read(["alice"])


def test_a_file_that_is_not_sqlite(storage: SQLiteStorage, database: Path) -> None:
    """The error says so, and the file stays unchanged."""
    database.write_text("alice: likes dark themes\n" * 100)
    fails(storage, "not a database; name an SQLite file")
    assert database.read_text() == "alice: likes dark themes\n" * 100
    database.unlink()
    works(storage)


def test_a_damaged_file(storage: SQLiteStorage, database: Path) -> None:
    """The error suggests a backup; once the file is restored the same storage works."""
    storage.write([(f"user {n}", Merge({"n": n, "text": "x" * 100})) for n in range(1000)])
    storage.close()
    sound = database.read_bytes()
    page = 4096
    database.write_bytes(sound[:page] + b"\xa5" * (len(sound) - page))
    with contextlib.closing(SQLiteStorage(database)) as later:
        fails(later, "malformed; restore it from a backup")
        database.write_bytes(sound)
        assert later.read(["user 7"])["user 7"]["n"] == 7
        works(later)


READ_AT_ONCE = """
import resource, sys, threading
from usermetadata import SQLiteStorage, StorageError

storage = SQLiteStorage(sys.argv[1])
storage.read(["alice"])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), hard))
barrier = threading.Barrier(150)

def read():
    barrier.wait()
    try:
        for _ in range(20):
            assert storage.read(["alice"]) == {"alice": {"n": 1}}
    except StorageError as error:
        print(error)

threads = [threading.Thread(target=read) for _ in range(150)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_many_threads_read_with_few_files(storage: SQLiteStorage, database: Path) -> None:
    """The number of open files does not grow with the number of threads that read."""
    storage.write([("alice", Merge({"n": 1}))])
    command = [sys.executable, "-c", READ_AT_ONCE, str(database)]
    done = subprocess.run([*command, "64"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_too_few_files(storage: SQLiteStorage, database: Path) -> None:
    """The error names the limit of open files."""
    storage.write([("alice", Merge({"n": 1}))])
    command = [sys.executable, "-c", READ_AT_ONCE, str(database), "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "this process has too many open files; close some, or raise the limit" in done.stdout


def test_a_full_disk(storage: SQLiteStorage, tmp_path: Path) -> None:
    """A write to a full disk changes nothing; once there is space it works."""
    storage.write([("alice", Merge({"n": 1}))])
    with small_files(200_000):
        with pytest.raises(StorageError, match="so nothing was written") as caught:
            storage.write([("alice", Merge({"n": 2})), ("bob", Merge({"text": "x" * 1_000_000}))])
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}}
    assert after_a_crash(tmp_path) == {"alice": {"n": 1}}
    storage.write([("bob", Merge({"text": "x" * 1_000_000}))])
    works(storage)


@pytest.mark.parametrize("meanwhile", [False, True], ids=["then read", "read meanwhile"])
def test_an_error_of_the_disk(
    storage: SQLiteStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, meanwhile: bool
) -> None:
    """Nothing is written; later calls use no connection to the former file."""
    storage.write([("alice", Merge({"old": True}))])

    def fail_and_replace() -> None:
        # A part of the write is in the log.
        size = (tmp_path / "users.db-wal").stat().st_size
        with small_files(size + 20_000):
            with pytest.raises(StorageError, match="so nothing was written") as caught:
                storage.write([("alice", Merge({"text": "x" * 200_000}))])
            assert not isinstance(caught.value, OutcomeUnknownError)
        files = list(tmp_path.glob("users.db*"))
        for path in files:
            path.rename(tmp_path / f"old {path.name}")
        with pytest.raises(StorageError, match="removed or moved"):
            storage.write([("alice", Replace({"works": True}))])
        for path in files:
            path.with_name(f"old {path.name}").rename(path)
        storage.write([("alice", Replace({"works": True}))])

    class Reading(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            cursor = super().execute(sql, *parameters)
            if sql.startswith("SELECT user_id"):
                monkeypatch.undo()
                fail_and_replace()
            return cursor

    if meanwhile:
        connect: Any = sqlite3.connect

        def connect_reading(path: str, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(path, **options | {"factory": Reading})
            return connection

        monkeypatch.setattr(sqlite3, "connect", connect_reading)
        assert storage.read(["alice"]) == {"alice": {"old": True}}
    else:
        storage.read(["alice"])
        fail_and_replace()
    works(storage)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ([], "make it writable, let the file grow"),
        ([".primary"], "this is a replica of LiteFS: write on"),
    ],
)
def test_a_file_system_that_refuses_the_commit(
    storage: SQLiteStorage, tmp_path: Path, files: list[str], advice: str
) -> None:
    """Nothing was written, not even for a crash to find."""
    storage.write([("alice", Merge({"n": 1}))])
    for file in files:
        (tmp_path / file).write_text("primary.internal\n")
    with small_files(4096):
        for change in (Merge({"n": 2}), Modify(lambda _: {"n": 2}), Clear()):
            with pytest.raises(StorageError, match=f"nothing was written; {advice}") as caught:
                storage.write([("alice", change), ("bob", Merge({"n": 2}))])
            assert not isinstance(caught.value, OutcomeUnknownError)
            assert caught.value.__cause__.sqlite_errorname == "SQLITE_IOERR_WRITE"  # type: ignore[union-attr]
            assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}}
    assert after_a_crash(tmp_path) == {"alice": {"n": 1}}
    works(storage)


def after_a_crash(folder: Path) -> dict[str, Any]:
    """Return the users that a crash would leave: SQLite recovers them from the log."""
    for suffix in ("", "-wal"):
        shutil.copy(folder / f"users.db{suffix}", folder / f"crashed.db{suffix}")
    with contextlib.closing(SQLiteStorage(folder / "crashed.db")) as recovered:
        return recovered.read_after("", 100)


FLUSHES_FAIL = """
import ctypes, platform, struct, sys
from usermetadata import OutcomeUnknownError, SQLiteStorage
from usermetadata.changes import Merge

storage = SQLiteStorage(sys.argv[1])
storage.write([("alice", Merge({"n": 1}))])
# The kernel answers both system calls with EIO from now on.
fsync, fdatasync = {"x86_64": (74, 75), "aarch64": (82, 83)}[platform.machine()]
program = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 1, 0, fsync),
        (0x15, 0, 1, fdatasync),
        (0x06, 0, 0, 0x00050000 | 5),  # return EIO
        (0x06, 0, 0, 0x7FFF0000),  # allow
    ]
)
code = ctypes.create_string_buffer(program)
filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert prctl(22, 2, ctypes.c_char_p(filters), 0, 0) == 0  # seccomp
try:
    storage.write([("alice", Merge({"n": 2}))])
except OutcomeUnknownError as error:
    print(error.__cause__.sqlite_errorname, error)
print(storage.read(["alice"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the kernel refuses to flush")
def test_a_flush_that_fails(database: Path) -> None:
    """The outcome is unknown: the write is in the log, and opening the file anew recovers it."""
    command = [sys.executable, "-c", FLUSHES_FAIL, str(database)]
    shown = subprocess.check_output(command, text=True).splitlines()
    assert shown[0].startswith("SQLITE_IOERR_FSYNC ")
    assert shown[0].endswith("it is unknown whether the write was stored; read to find out")
    assert shown[1] == "{'alice': {'n': 2}}"


def until_it_fails(call: Callable[[], object]) -> str:
    """Repeat the call until it fails, for a limited time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            call()
        except StorageError as error:
            return str(error)
    raise AssertionError("it never failed")


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_file_without_its_name(
    storage: SQLiteStorage, database: Path, tmp_path: Path, how: str, kind: str
) -> None:
    """A file that is gone is reported, and no other is created; put back, it is used again."""
    storage.write([("alice", Merge({"n": 1}))])
    moved = tmp_path / "moved.db"
    moved.hardlink_to(database)
    database.unlink()
    if how == "replaced":
        database.write_bytes(b"")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read(["alice"]),
        "write": lambda: storage.write([("alice", Merge({"n": 2}))]),
    }
    message = until_it_fails(calls[kind])
    what = "replaced by another file" if how == "replaced" else "removed or moved"
    assert f"{database}: the file was {what} while it was open; put it back" in message
    for call in calls.values():
        with pytest.raises(StorageError, match=what):
            call()
    assert database.exists() == (how == "replaced")
    if how == "moved":
        moved.rename(database)
        assert storage.read(["alice"])["alice"]["n"] in {1, 2}
        works(storage)


def test_a_file_without_its_name_after_an_error(storage: SQLiteStorage, database: Path) -> None:
    """A call that opens the file anew does not create it."""
    storage.write([("alice", Merge({}))])
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute("DROP TABLE user_metadata")
    with pytest.raises(StorageError, match="no such table"):
        storage.read(["alice"])
    for path in database.parent.glob("users.db*"):
        path.unlink()
    with pytest.raises(StorageError, match="removed or moved"):
        storage.read(["alice"])
    assert not database.exists()


SWALLOWED = r"did not store the change of user 'alice' in app 'public'.*trigger"


@pytest.mark.parametrize("event", ["INSERT", "UPDATE"])
@pytest.mark.parametrize(
    "changes",
    [
        [("alice", Merge({"n": 2}))],
        [("alice", Replace({"n": 2}))],
        [("alice", lambda old: {"n": 2})],
        [("bob", Merge({"n": 2})), ("alice", Merge({"n": 2})), ("carol", Clear())],
    ],
    ids=["update", "set", "modify", "bulk"],
)
def test_a_swallowed_write_is_an_error(
    storage: SQLiteStorage, database: Path, event: str, changes: list[tuple[str, Change]]
) -> None:
    """A write that a trigger drops without an error is not acknowledged, and nothing is written."""
    stored = {user_id: {"n": 1} for user_id in ("alice", "bob", "carol")}
    if event == "INSERT":
        del stored["alice"]
    storage.write([(user_id, Replace(metadata)) for user_id, metadata in stored.items()])
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute(
            f"CREATE TRIGGER soft BEFORE {event} ON user_metadata WHEN NEW.user_id = 'alice'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StorageError, match=SWALLOWED):
        storage.write(changes)
    assert storage.read(["alice", "bob", "carol"]) == stored
    assert storage.write([("bob", Merge({"m": 1}))]) == [{"n": 1, "m": 1}]


def test_a_swallowed_clear_is_an_error(storage: SQLiteStorage, database: Path) -> None:
    """A row that a trigger keeps is reported; the same trigger is no matter where no row is."""
    storage.write([("alice", Replace({"n": 1})), ("bob", Replace({"n": 1}))])
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute(
            "CREATE TRIGGER soft BEFORE DELETE ON user_metadata WHEN OLD.user_id = 'alice'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StorageError, match=SWALLOWED):
        storage.write([("bob", Clear()), ("alice", Clear())])
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}, "bob": {"n": 1}}
    assert storage.write([("bob", Clear()), ("carol", Clear())]) == [None, None]


def test_a_swallowed_write_leaves_the_callers_transaction(borrowed: Database) -> None:
    """In the caller's transaction only this write is undone."""
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Replace({"n": 1}))])
    borrowed.execute(
        "CREATE TRIGGER soft BEFORE UPDATE ON user_metadata BEGIN SELECT RAISE(IGNORE); END"
    )
    borrowed.execute("BEGIN")
    borrowed.execute("INSERT INTO orders VALUES (7)")
    with pytest.raises(StorageError, match="did not store the change of user 'alice'"):
        storage.write([("bob", Merge({"n": 1})), ("alice", Merge({"n": 2}))])
    borrowed.execute("COMMIT")
    assert [row["id"] for row in borrowed.query("SELECT id FROM orders")] == [7]
    assert storage.read(["alice", "bob"]) == {"alice": {"n": 1}}


COLUMNS = "app_id TEXT, user_id TEXT, user_metadata TEXT"
KEY = ", PRIMARY KEY (app_id, user_id)"
VARCHAR = COLUMNS.replace("TEXT", "VARCHAR(64)") + ", UNIQUE (user_id, app_id)"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            COLUMNS.replace("user_id TEXT", "user_id INTEGER") + KEY,
            "column user_id is INTEGER, not TEXT; run: .* --type user_id text",
        ),
        (
            COLUMNS.replace("user_metadata TEXT", "user_metadata JSON") + KEY,
            "column user_metadata is JSON, not TEXT; run: .* --type user_metadata text",
        ),
        (
            COLUMNS.replace("user_id TEXT", "user_id TEXT COLLATE NOCASE") + KEY,
            r"column user_id takes different ids for the same \(COLLATE\)",
        ),
        (
            COLUMNS.replace("app_id TEXT", "app_id TEXT COLLATE RTRIM") + KEY,
            r"column app_id takes different ids for the same \(COLLATE\)",
        ),
        (
            COLUMNS + KEY.replace("user_id", "user_id COLLATE NOCASE"),
            r"it has no key \(app_id, user_id\) .* --pk user_id",
        ),
        (
            COLUMNS.replace("user_id TEXT", "user_id TEXT PRIMARY KEY"),
            r"it has no key \(app_id, user_id\) .* --pk user_id",
        ),
        (COLUMNS, r"it has no key \(app_id, user_id\) .*create-index"),
        (
            f"{COLUMNS}, tenant TEXT NOT NULL{KEY}",
            "column tenant is NOT NULL and has no default; run: .* --default tenant",
        ),
    ],
    ids=["integer", "JSON", "NOCASE", "RTRIM", "NOCASE key", "one app", "no key", "more columns"],
)
def test_a_table_that_will_not_do(
    storage: SQLiteStorage, database: Path, columns: str, message: str
) -> None:
    """The first call says which column is at fault and what to do; the advice makes it work."""
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute(f"CREATE TABLE user_metadata ({columns})")
    for call in (lambda: storage.read(["007"]), lambda: storage.write([("007", Merge({}))])):
        with pytest.raises(StorageError, match=f"table user_metadata: {message}") as caught:
            call()
    command = str(caught.value).partition("run: ")[2].replace("FILE", str(database))
    program, *arguments = shlex.split(command)
    assert program == "sqlite-utils"
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    storage.write([(user_id, Merge({"id": user_id})) for user_id in ("007", "7", "Bob", "bob")])
    assert storage.read(["007", "bob", "bob "]) == {"007": {"id": "007"}, "bob": {"id": "bob"}}


@pytest.mark.parametrize(
    "columns",
    [
        f"id INTEGER PRIMARY KEY NOT NULL, at CLOB NOT NULL DEFAULT '', {VARCHAR}",
        f"app_id, user_id, user_metadata TEXT COLLATE NOCASE{KEY}",
        f"{COLUMNS}{KEY}) STRICT, WITHOUT ROWID --",
    ],
    ids=["an ORM's", "by hand", "STRICT"],
)
def test_a_table_of_another_framework_is_used(
    storage: SQLiteStorage, database: Path, columns: str
) -> None:
    """A table with other names of types, more columns and a key of another form will do."""
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute(f"CREATE TABLE user_metadata ({columns}\n)".replace("--\n)", ""))
    storage.write([("007", Merge({"n": 1})), ("7", Merge({"n": 2}))])
    assert storage.read(["007", "7"]) == {"007": {"n": 1}, "7": {"n": 2}}
    works(storage)


def test_sqlites_own_limit_of_pages() -> None:
    """SQLite itself undoes the transaction when a database is full; the error is the same."""
    connection = sqlite3.connect(":memory:")
    with (
        contextlib.closing(connection),
        contextlib.closing(SQLiteStorage(Database(connection))) as storage,
    ):
        storage.write([("alice", Merge({"n": 1}))])
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StorageError, match="full; free some space and repeat the call"):
            storage.write([("alice", Merge({"text": "x" * 100_000}))])
        connection.execute("PRAGMA max_page_count = 10000")
        works(storage)


def test_another_programs_table(storage: SQLiteStorage, database: Path) -> None:
    """A table of the same name with other columns stays unchanged."""
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("CREATE TABLE user_metadata (id INTEGER PRIMARY KEY, value TEXT)")
    for call in (lambda: storage.read(["a"]), lambda: storage.write([("a", Merge({}))])):
        with pytest.raises(StorageError, match="no column app_id, so it is another program's"):
            call()


def test_a_view_in_place_of_the_table(storage: SQLiteStorage, database: Path) -> None:
    """The error names the view."""
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("CREATE VIEW user_metadata AS SELECT 1")
    with pytest.raises(StorageError, match="is actually a view; use another file"):
        storage.read(["alice"])


def test_a_damaged_row_leaves_no_query_open(storage: SQLiteStorage, database: Path) -> None:
    """Keeping the error does not keep SQLite from truncating its log."""
    users = [f"user {number}" for number in range(1000)]
    storage.write([(user_id, Merge({"n": 1})) for user_id in users])
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("UPDATE user_metadata SET user_metadata = '['")
        with pytest.raises(DamagedMetadataError) as kept:
            storage.read(users)
        [busy, _, _] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds an array, not an object"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1e999}', "it holds a number that a float would change"),
        ('{"a": 12345678901234567890.12}', "it holds a number that a float would change"),
        ('{"a":' * 100_000, "it nests deeper than 200 levels"),
        (b'{"a": 1}', "it is not UTF-8 text"),
        (f'{{"a": {"9" * 5000}}}', "Exceeds the limit"),
    ],
    ids=[
        "cut off",
        "an array",
        "NaN",
        "infinity",
        "many digits",
        "deep",
        "a blob",
        "a long integer",
    ],
)
def test_a_damaged_row(
    storage: SQLiteStorage, database: Path, damage: str | bytes, message: str
) -> None:
    """The error names the user; other users work; ``set`` and ``clear`` repair the row."""
    storage.write([(user_id, Merge({"n": 1})) for user_id in ("alice", "bob", "carol")])
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute("UPDATE user_metadata SET user_metadata = ? WHERE user_id != 'bob'", [damage])
    calls: list[Callable[[], object]] = [
        lambda: storage.read(["alice"]),
        lambda: storage.read(["bob", "alice"]),
        lambda: storage.write([("alice", Merge({"n": 1}))]),
    ]
    for call in calls:
        with pytest.raises(DamagedMetadataError, match=f"user 'alice'.*{message}") as caught:
            call()
        assert isinstance(caught.value.__cause__, ValueError)
    assert storage.read(["bob"]) == {"bob": {"n": 1}}
    storage.write([("alice", Clear()), ("carol", Replace({"n": 2}))])
    assert storage.read(["alice", "carol"]) == {"carol": {"n": 2}}


@pytest.mark.parametrize("is_borrowed", [False, True])
def test_a_row_that_is_not_text(database: Path, *, is_borrowed: bool) -> None:
    """Bytes that are not UTF-8 are a damaged row: the error names the user, and quotes nothing."""
    not_utf8 = '{"ssn":"\udcff"}'.encode(errors="surrogateescape").hex()
    with contextlib.closing(sqlite3.connect(database)) as other:
        storage = SQLiteStorage(Database(other) if is_borrowed else database)
        storage.write([(user_id, Merge({"n": 1})) for user_id in ("alice", "bob")])
        other.execute(
            f"UPDATE user_metadata SET user_metadata = CAST(x'{not_utf8}' AS TEXT)"
            " WHERE user_id = 'alice'"
        )
        other.commit()
        for call in (
            lambda: storage.read(["alice"]),
            lambda: storage.read(["bob", "alice"]),
            lambda: storage.read_after("", 10),
            lambda: storage.write([("alice", Merge({}))]),
            lambda: storage.write([("bob", Merge({})), ("alice", Merge({}))]),
        ):
            with pytest.raises(DamagedMetadataError, match=r"user 'alice'.*not UTF-8") as caught:
                call()
            assert caught.value.user_id == "alice"
            assert "ssn" not in "".join(traceback.format_exception(caught.value))
        assert storage.read(["bob"]) == {"bob": {"n": 1}}
        storage.write([("alice", Clear())])
        works(storage)
        storage.close()


def test_a_dropped_table(storage: SQLiteStorage, database: Path) -> None:
    """A table that was dropped is created again after the error."""
    storage.write([("alice", Merge({}))])
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute("DROP TABLE user_metadata")
    with pytest.raises(StorageError, match="no such table"):
        storage.read(["alice"])
    works(storage)


@pytest.mark.parametrize("kind", ["a file", "borrowed"])
def test_what_a_change_raises_is_not_the_databases(
    storage: SQLiteStorage, borrowed: Database, kind: str
) -> None:
    """A function may use another database; its error arrives as it is, whatever it looks like."""
    error = sqlite3.OperationalError("database is locked")

    def fail(metadata: Metadata) -> Metadata:
        raise error

    used = storage if kind == "a file" else SQLiteStorage(borrowed)
    with pytest.raises(sqlite3.OperationalError) as caught:
        used.write([("alice", Modify(fail))])
    assert caught.value is error
    works(used)


def test_columns_of_an_application_are_kept(storage: SQLiteStorage, database: Path) -> None:
    """What an application has added to the table, or refers to it, outlives updates."""
    storage.write([("alice", Merge({"n": 1}))])
    with contextlib.closing(sqlite3.connect(database)) as other, other:
        other.execute("ALTER TABLE user_metadata ADD COLUMN note TEXT")
        other.execute("UPDATE user_metadata SET note = 'mine'")
    storage.write([("alice", Merge({"n": 2})), ("bob", Merge({}))])
    storage.write([("alice", Replace({"n": 3}))])
    with contextlib.closing(sqlite3.connect(database)) as other:
        rows = other.execute("SELECT user_id, note FROM user_metadata ORDER BY user_id").fetchall()
    assert rows == [("alice", "mine"), ("bob", None)]


# A borrowed database.


@pytest.fixture
def borrowed(database: Path) -> Generator[Database, None, None]:
    """Open a database as an application would."""
    borrowed = Database(database)
    borrowed.table("orders").create({"id": int}, pk="id")
    yield borrowed
    borrowed.close()


def test_a_borrowed_database_commits_by_itself(borrowed: Database, database: Path) -> None:
    """Without a transaction of the caller, a write is committed when it returns."""
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Merge({"n": 1}))])
    assert not borrowed.conn.in_transaction
    with contextlib.closing(SQLiteStorage(database)) as other:
        assert other.read(["alice"]) == {"alice": {"n": 1}}


def test_reads_of_a_borrowed_database_are_one_statement(borrowed: Database) -> None:
    """The first read checks the schema; later reads do not, even if nothing is ever written."""
    SQLiteStorage(borrowed).write([("alice", Merge({"n": 1}))])
    storage = SQLiteStorage(borrowed)
    storage.read(["alice"])
    statements: list[str] = []
    borrowed.conn.set_trace_callback(statements.append)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    borrowed.conn.set_trace_callback(None)
    assert len(statements) == 1


def test_a_borrowed_table_that_is_dropped(borrowed: Database) -> None:
    """It is created again after the error, as in a file."""
    storage = SQLiteStorage(borrowed)
    calls: list[Callable[[], object]] = [
        lambda: storage.read(["alice"]),
        lambda: storage.write([("alice", Merge({"n": 1}))]),
    ]
    for call in calls:
        works(storage)
        borrowed.table("user_metadata").drop()
        with pytest.raises(StorageError, match="no such table"):
            call()
    works(storage)


def test_a_commit_without_effect_is_not_acknowledged(borrowed: Database, database: Path) -> None:
    """If the application's authorizer suppresses COMMIT, a write is not acknowledged."""
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Replace({"n": 1}))])

    def authorize(action: int, operation: str | None, *_: object) -> int:
        is_suppressed = action == sqlite3.SQLITE_TRANSACTION and operation == "COMMIT"
        return sqlite3.SQLITE_IGNORE if is_suppressed else sqlite3.SQLITE_OK

    borrowed.conn.set_authorizer(authorize)
    with pytest.raises(OutcomeUnknownError, match="a transaction is still open after COMMIT"):
        storage.write([("alice", Replace({"n": 2}))])
    with contextlib.closing(sqlite3.connect(database)) as other:
        assert other.execute("SELECT user_metadata FROM user_metadata").fetchall() == [('{"n":1}',)]
    borrowed.conn.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
    borrowed.rollback()
    assert storage.write([("alice", Merge({"m": 2}))]) == [{"n": 1, "m": 2}]


def test_a_file_whose_commit_has_no_effect_is_not_acknowledged(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does it where a program puts an authorizer on every connection that it opens."""
    connect = sqlite3.connect

    def authorize(action: int, operation: str | None, *_: object) -> int:
        is_suppressed = action == sqlite3.SQLITE_TRANSACTION and operation == "COMMIT"
        return sqlite3.SQLITE_IGNORE if is_suppressed else sqlite3.SQLITE_OK

    def connect_with_authorizer(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_authorizer(authorize)
        return connection

    with contextlib.closing(SQLiteStorage(database)) as storage:
        storage.write([("alice", Replace({"n": 1}))])
    monkeypatch.setattr(sqlite3, "connect", connect_with_authorizer)
    with (
        contextlib.closing(SQLiteStorage(database)) as storage,
        pytest.raises(OutcomeUnknownError, match="a transaction is still open after COMMIT"),
    ):
        storage.write([("alice", Replace({"n": 2}))])
    monkeypatch.undo()
    with contextlib.closing(SQLiteStorage(database)) as storage:
        assert storage.write([("alice", Merge({"m": 2}))]) == [{"n": 1, "m": 2}]


def test_an_error_of_the_disk_under_a_borrowed_database(borrowed: Database) -> None:
    """Nothing is written by a COMMIT that failed there, and later calls work."""
    borrowed.enable_wal()
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Merge({"n": 1}))])
    with small_files(20_000):
        with pytest.raises(StorageError, match="so nothing was written") as caught:
            storage.write([("alice", Merge({"text": "x" * 200_000}))])
        assert not isinstance(caught.value, OutcomeUnknownError)
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    works(storage)


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
def test_metadata_joins_the_callers_transaction(borrowed: Database, *, commit: bool) -> None:
    """Metadata and the caller's rows are committed, or rolled back, together."""
    storage = SQLiteStorage(borrowed)
    borrowed.begin()
    borrowed.table("orders").insert({"id": 1})
    storage.write([("alice", Merge({"last order": 1}))])
    assert storage.read(["alice"]) == {"alice": {"last order": 1}}
    assert borrowed.conn.in_transaction
    borrowed.commit() if commit else borrowed.rollback()
    assert storage.read(["alice"]) == ({"alice": {"last order": 1}} if commit else {})
    assert borrowed.table("orders").count == (1 if commit else 0)
    storage.write([("alice", Merge({"n": 1}))])


def test_a_failed_write_leaves_the_callers_transaction(borrowed: Database) -> None:
    """Only the write itself is undone; the caller's rows before and after it stay."""
    storage = SQLiteStorage(borrowed)

    def fail(metadata: Metadata) -> Metadata:
        raise LookupError

    with borrowed.atomic():
        borrowed.table("orders").insert({"id": 1})
        storage.write([("alice", Merge({"n": 1}))])
        with pytest.raises(LookupError):
            storage.write([("alice", Merge({"n": 2})), ("alice", Modify(fail))])
        borrowed.table("orders").insert({"id": 2})
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    assert borrowed.table("orders").count == 2


@pytest.mark.parametrize("inside", [True, False], ids=["in a transaction", "outside"])
def test_a_write_that_the_database_refuses_is_undone_whole(
    borrowed: Database, *, inside: bool
) -> None:
    """Also if some of its rows were stored before; the caller's own rows stay."""
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Replace({"n": 1}))])
    borrowed.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON user_metadata WHEN new.user_id = 'bob'"
        " BEGIN SELECT raise(ABORT, 'no room for bob'); END"
    )
    with borrowed.atomic() if inside else contextlib.nullcontext():
        borrowed.table("orders").insert({"id": 1})
        with pytest.raises(StorageError, match="no room for bob"):
            storage.write([(user, Replace({"n": 2})) for user in ("alice", "bob", "carol")])
        assert storage.read(["alice", "bob", "carol"]) == {"alice": {"n": 1}}
        storage.write([("carol", Replace({"n": 3}))])
    assert storage.read(["alice", "bob", "carol"]) == {"alice": {"n": 1}, "carol": {"n": 3}}
    assert borrowed.table("orders").count == 1


def test_a_borrowed_database_stays_open(borrowed: Database) -> None:
    """Closing the storage does not close the caller's database."""
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Merge({}))])
    storage.close()
    assert borrowed.table("user_metadata").count == 1


def test_a_borrowed_database_knows_its_thread(borrowed: Database) -> None:
    """The error says how to open a connection that other threads may use."""
    storage = SQLiteStorage(borrowed)
    errors: list[StorageError] = []

    def read() -> None:
        try:
            storage.read(["alice"])
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert "check_same_thread=False" in str(errors[0])


def test_a_borrowed_database_may_have_a_row_factory(borrowed: Database) -> None:
    """The caller's row factory does not matter."""
    borrowed.conn.row_factory = sqlite3.Row
    storage = SQLiteStorage(borrowed)
    works(storage)
    borrowed.conn.row_factory = lambda _, row: {"row": row}
    works(SQLiteStorage(borrowed))
    assert storage.write([("alice", Merge({"m": 1}))]) == [{"works": True, "m": 1}]


def test_a_transaction_that_refuses_a_savepoint(borrowed: Database) -> None:
    """The error is SQLite's own, and the caller's transaction goes on."""
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Merge({"n": 1}))])
    borrowed.begin()
    borrowed.table("orders").insert({"id": 1})

    def authorize(action: int, operation: str | None, *_: object) -> int:
        is_refused = action == sqlite3.SQLITE_SAVEPOINT and operation == "BEGIN"
        return sqlite3.SQLITE_DENY if is_refused else sqlite3.SQLITE_OK

    borrowed.conn.set_authorizer(authorize)
    with pytest.raises(StorageError, match="not authorized"):
        storage.write([("alice", Merge({"n": 2}))])
    borrowed.conn.set_authorizer(None)
    borrowed.commit()
    assert borrowed.table("orders").count == 1
    assert storage.read(["alice"]) == {"alice": {"n": 1}}


@pytest.mark.parametrize("factory", [bytes, bytearray, lambda text: text.upper()])
def test_a_borrowed_database_may_have_a_text_factory(
    borrowed: Database, factory: Callable[[bytes], object]
) -> None:
    """Metadata is read as text, and the caller's setting stays."""
    borrowed.conn.text_factory = factory
    storage = SQLiteStorage(borrowed)
    storage.write([("alice", Merge({"n": "x"})), ("bob", Merge({}))])
    assert storage.write([("alice", Merge({"m": 1}))]) == [{"n": "x", "m": 1}]
    assert storage.read(["alice"]) == {"alice": {"n": "x", "m": 1}}
    assert borrowed.conn.text_factory is factory


def test_a_borrowed_database_that_was_closed(borrowed: Database) -> None:
    """The error is the library's, with the driver's as its cause."""
    storage = SQLiteStorage(borrowed)
    borrowed.close()
    fails(storage, "closed database")


# The sqlite-utils command line.


def test_the_command_line_of_sqlite_utils_works_on_the_file(
    storage: SQLiteStorage, database: Path
) -> None:
    """``sqlite-utils query`` reads the metadata with SQLite's JSON functions."""
    storage.write([("alice", Merge({"theme": "dark"}))])
    query = "select user_id, user_metadata ->> 'theme' as theme from user_metadata"
    command = [sys.executable, "-m", "sqlite_utils", "query", str(database), query]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout) == [{"user_id": "alice", "theme": "dark"}]

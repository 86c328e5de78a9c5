"""Several processes, forks and ``kill -9``."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from postgres_server import server_url, with_parameters

from usermetadata import DamagedMetadataError, SQLiteStorage
from usermetadata.changes import Merge

if TYPE_CHECKING:
    from pathlib import Path

    from usermetadata.codec import Metadata


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python program; warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a program, check that it succeeded, and return its output."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def read(database: Path, user_id: str) -> Metadata:
    """Read one user from a file that no other process has open."""
    with contextlib.closing(SQLiteStorage(database)) as storage:
        return storage.read([user_id])[user_id]


def is_sound(database: Path) -> bool:
    """Let SQLite check the whole file."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


UPDATE = """
import sys
import usermetadata
from usermetadata.syncio import update_user_metadata
usermetadata.init(sys.argv[1])
sys.stdin.readline()
for n in range(int(sys.argv[3])):
    update_user_metadata("alice", {f"{sys.argv[2]}:{n}": n})
"""


def test_processes_lose_no_update(database: Path) -> None:
    """8 processes that create the file together and update one user 100 times each lose nothing."""
    processes = [start(UPDATE, database, number, 100) for number in range(8)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        finish(process)
    expected = {f"{number}:{n}": n for number in range(8) for n in range(100)}
    assert read(database, "alice") == expected
    assert is_sound(database)


RACE = """
import sys
import usermetadata
from usermetadata.syncio import update_user_metadata
usermetadata.init(sys.argv[1])
for user_id in sys.stdin:
    update_user_metadata(user_id.strip(), {sys.argv[2]: True})
    print("done", flush=True)
"""


def test_two_first_updates_both_survive(database: Path) -> None:
    """The race that SuperTokens' core tests: two writers of a user without a row, 100 rounds."""
    writers = [start(RACE, database, name) for name in ("left", "right")]
    for number in range(100):
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(f"user {number}\n")
            writer.stdin.flush()
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "done\n"
    for writer in writers:
        finish(writer)
    with contextlib.closing(SQLiteStorage(database)) as storage:
        users = storage.read([f"user {number}" for number in range(100)])
    assert list(users.values()) == [{"left": True, "right": True}] * 100


NURSERY = """
import itertools, os, sys
import usermetadata
from usermetadata.syncio import update_user_metadata
usermetadata.init(sys.argv[1])  # opens nothing yet

def write_for_ever(user_id):
    acknowledged = os.open(os.path.join(sys.argv[2], user_id), os.O_WRONLY | os.O_CREAT)
    for n in itertools.count():
        update_user_metadata(user_id, {str(n): n})
        os.write(acknowledged, f"{n}\\n".encode())

for line in sys.stdin:
    if line == "wait\\n":
        print(os.wait()[1], flush=True)
    else:
        child = os.fork()
        if child == 0:
            write_for_ever(line.strip())
        print(child, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(database: Path, tmp_path: Path) -> None:
    """60 writers, 3 at a time, are killed at random moments; no acknowledged update is missing.

    On a slow machine there are more of them, until enough updates were acknowledged.
    """
    acknowledged = tmp_path / "acknowledged"
    acknowledged.mkdir()
    nursery = start(NURSERY, database, acknowledged)

    def ask(line: str) -> int:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        nursery.stdin.write(f"{line}\n")
        nursery.stdin.flush()
        return int(nursery.stdout.readline())

    def is_enough() -> bool:
        return sum(log.stat().st_size for log in acknowledged.iterdir()) > 1000

    batches = 0
    while batches < 20 or not is_enough():
        batches += 1
        assert batches < 500
        for writer in [ask(f"user {batches} {number}") for number in range(3)]:
            # Not to wait for an event: kills happen at random moments, from the first opening on.
            threading.Event().wait(random.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
            assert ask("wait") == signal.SIGKILL
        assert is_sound(database)
    finish(nursery)

    with contextlib.closing(SQLiteStorage(database)) as storage:
        for batch in range(1, batches + 1):
            for number in range(3):
                user_id = f"user {batch} {number}"
                log = acknowledged / user_id
                count = len(log.read_text().splitlines()) if log.exists() else 0
                stored = storage.read([user_id]).get(user_id, {})
                # The last update may be stored but not acknowledged.
                assert list(stored.values()) in (list(range(count)), list(range(count + 1)))


# The beginning of a program that forks as C code does. In the child, a lock that another thread had
# at that moment is never released, and one of these is the interpreter's own. So the other threads
# have to wait for work.
FORK = """
import ctypes, pathlib, sys, threading, time

def fork():
    before, quiet = None, 0
    while quiet < 5:
        time.sleep(0.01)
        frames = {**sys._current_frames()}
        del frames[threading.get_ident()]
        now = {ident: (frame.f_code, frame.f_lasti) for ident, frame in frames.items()}
        stats = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/stat")]
        running = [stat for stat in stats if stat.rpartition(")")[2].split()[0] != "S"]
        quiet = quiet + 1 if now == before and len(running) == 1 else 0
        before = now
    return ctypes.PyDLL(None).fork()
"""

WORK = """
import asyncio, os, sys, threading
import usermetadata
from usermetadata import syncio
from usermetadata.asyncio import update_user_metadata

def work(name, rounds):
    async def several():
        updates = (update_user_metadata("alice", {f"{name}:a{n}": n}) for n in range(rounds))
        await asyncio.gather(*updates)
    def one_by_one():
        for n in range(rounds):
            syncio.update_user_metadata("alice", {f"{name}:s{n}": n})
            syncio.get_user_metadata("alice")
    several_at_once = threading.Thread(target=lambda: asyncio.run(several()))
    threads = [threading.Thread(target=one_by_one), several_at_once]
    for thread in threads:
        thread.start()
    return threads
"""


def test_a_fork_leaves_both_sides_working(database: Path) -> None:
    """Parent and child continue to use a busy storage; the child inherits no open file."""
    program = """
usermetadata.init(sys.argv[1])

def opened():
    file, found = os.stat(sys.argv[1]), []
    for number in range(256):
        try:
            found += [number] if os.path.samestat(os.fstat(number), file) else []
        except OSError:
            pass
    return found

for thread in work("before", 50):
    thread.join()
assert opened()
busy = work("meanwhile", 50)
children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        assert not opened()
        for thread in work(f"child {number}", 50):
            thread.join()
        usermetadata.UserMetadataRecipe.reset()
        os._exit(0)
    children.append(child)
busy += work("parent", 50)
for thread in busy:
    thread.join()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
print(len(syncio.get_user_metadata("alice").metadata))
"""
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        WORK + program,
        str(database),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == f"{6 * 100}\n"
    assert is_sound(database)


def test_a_fork_does_not_starve(database: Path) -> None:
    """Threads that never stop reading do not keep a fork waiting."""
    program = """
import os, sys, threading, time
from usermetadata import SQLiteStorage
from usermetadata.changes import Merge
storage = SQLiteStorage(sys.argv[1], timeout=20)
storage.write([("alice", Merge({"n": 1}))])
stop = threading.Event()
def read():
    while not stop.is_set():
        storage.read(["alice"])
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
start = time.monotonic()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(storage.read(["alice"]) != {"alice": {"n": 1}})
    assert os.waitpid(child, 0)[1] == 0
stop.set()
assert time.monotonic() - start < 20
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, str(database)]
    subprocess.run(command, timeout=60, check=True)


def test_a_fork_that_python_is_not_told_of(database: Path) -> None:
    """An unused storage works after a fork by C code, without Python's hooks."""
    program = """
usermetadata.init(sys.argv[1])
child = fork()
for thread in work(f"{child == 0}", 50):
    thread.join()
if child == 0:
    usermetadata.UserMetadataRecipe.reset()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(len(syncio.get_user_metadata("alice").metadata))
"""
    assert finish(start(FORK + WORK + program, database)) == "200\n"
    assert is_sound(database)


def test_tasks_go_on_after_a_fork_that_python_is_not_told_of() -> None:
    """Worker threads stay with the parent; the child's calls get new ones instead of waiting."""
    program = """
import asyncio, os
import usermetadata
from usermetadata import InMemoryStorage
from usermetadata.asyncio import get_user_metadata, update_user_metadata

class InWorkers(InMemoryStorage):
    reads_in_flight = writes_in_flight = 1

async def visit(name):
    async with asyncio.timeout(30):
        await update_user_metadata("alice", {name: True})
        return list((await get_user_metadata("alice")).metadata)

usermetadata.init(InWorkers())
asyncio.run(visit("before"))
child = fork()
if child == 0:
    try:
        os._exit(asyncio.run(visit("child")) != ["before", "child"])
    except TimeoutError:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
print(asyncio.run(visit("parent")))
"""
    assert finish(start(FORK + program)) == "['before', 'parent']\n"


def test_an_open_file_does_not_cross_a_fork_that_python_is_not_told_of(database: Path) -> None:
    """SQLite could damage the file: the child's calls raise an error; the parent's calls work."""
    program = """
import os, sys
from usermetadata import SQLiteStorage, StorageError
from usermetadata.changes import Merge

storage = SQLiteStorage(sys.argv[1])
storage.write([("alice", Merge({"before": True}))])
storage.read(["alice"])

def read():
    storage.read(["alice"])

def write():
    storage.write([("alice", Merge({"child": True}))])

for calls in ([read, write], [write, read]):
    child = fork()
    if child == 0:
        refused = 0
        for call in calls:
            try:
                call()
            except StorageError as error:
                refused += "py-call-uwsgi-fork-hooks" in str(error)
        os._exit(refused)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(storage.write([("alice", Merge({"after": True}))]))
"""
    assert finish(start(FORK + program, database)) == "2\n2\n[{'before': True, 'after': True}]\n"
    assert is_sound(database)


def test_a_fork_inside_a_change_cannot_commit_twice(database: Path) -> None:
    """A child forked inside a transaction cannot end it; the parent is not affected."""
    program = """
import os, sys
from usermetadata import SQLiteStorage, StorageError
from usermetadata.changes import Merge, Modify

storage = SQLiteStorage(sys.argv[1])
children = []

def fork(metadata):
    children.append(os.fork())
    return {"forked": children[0] > 0}

try:
    print(storage.write([("alice", Modify(fork))]), flush=True)
except StorageError as error:
    assert children == [0] and "forked in the middle of a call" in str(error)
    for again in (storage, SQLiteStorage(sys.argv[1])):
        try:
            again.write([("bob", Merge({}))])
        except StorageError as error:
            assert "forked in the middle of a call" in str(error)
        else:
            os._exit(1)
    os._exit(0)
assert os.waitpid(children[0], 0)[1] == 0
print(storage.write([("alice", Merge({"after": True}))]))
"""
    output = finish(start(program, database))
    assert output == "[{'forked': True}]\n[{'forked': True, 'after': True}]\n"
    assert is_sound(database)


READING = """
import sqlite3

connect = sqlite3.connect

class Reading(sqlite3.Connection):
    def execute(self, sql, *parameters):
        cursor = super().execute(sql, *parameters)
        if sql.startswith("SELECT user_id"):
            in_the_middle_of_a_read()
        return cursor

sqlite3.connect = lambda path, **options: connect(path, **{**options, "factory": Reading})
"""


def test_a_fork_during_a_long_read_is_no_way_around_the_locks(database: Path) -> None:
    """If a fork cannot wait for a read, the child's calls raise an error; the parent works."""
    program = """
import os, sys, threading
from usermetadata import SQLiteStorage, StorageError
from usermetadata.changes import Merge

storage = SQLiteStorage(sys.argv[1], timeout=0.1)
storage.write([("alice", Merge({"n": 1}))])
reading, forked = threading.Event(), threading.Event()

def in_the_middle_of_a_read():
    reading.set()
    forked.wait()

reader = threading.Thread(target=storage.read, args=[["alice"]])
reader.start()
reading.wait()
child = os.fork()
if child == 0:
    refused = 0
    for each in (storage, SQLiteStorage(sys.argv[1])):
        try:
            each.write([("alice", Merge({"child": 1}))])
        except StorageError as error:
            refused += "forked in the middle of a call" in str(error)
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
forked.set()
reader.join()
print(storage.write([("alice", Merge({"after": 1}))]))
"""
    ignore = ["-W", "ignore::DeprecationWarning"]
    command = [sys.executable, *ignore, "-c", READING + program, str(database)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "2\n[{'n': 1, 'after': 1}]\n"
    assert is_sound(database)


def test_a_fork_inside_a_read(database: Path) -> None:
    """For example by a signal handler: the child completes that read, and cannot begin another."""
    program = """
import os, sys
from usermetadata import SQLiteStorage, StorageError
from usermetadata.changes import Merge

storage = SQLiteStorage(sys.argv[1], timeout=0.1)
storage.write([("alice", Merge({"n": 1}))])
children = []

def in_the_middle_of_a_read():
    if not children:
        children.append(os.fork())

assert storage.read(["alice"]) == {"alice": {"n": 1}}
try:
    print(storage.read(["alice"]), flush=True)
except StorageError as error:
    assert children == [0] and "forked in the middle of a call" in str(error)
    sys.exit()  # the end of the program must not close the connection
assert os.waitpid(children[0], 0)[1] == 0
"""
    assert finish(start(READING + program, database)) == "{'alice': {'n': 1}}\n"


def test_a_storage_that_is_dropped_after_a_fork_closes_its_file(database: Path) -> None:
    """A fork keeps no storage alive, neither in the parent nor in the child."""
    program = """
import gc, os, sys
from usermetadata import SQLiteStorage
from usermetadata.changes import Merge

storage = SQLiteStorage(sys.argv[1])
storage.write([("alice", Merge({}))])
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
storage.write([("alice", Merge({"n": 1}))])
opened = os.listdir(os.path.dirname(sys.argv[1]))
del storage
gc.collect()
closed = os.listdir(os.path.dirname(sys.argv[1]))
if child == 0:
    os._exit((len(opened), len(closed)) != (3, 1))
print(len(opened), len(closed))
"""
    assert finish(start(program, database)) == "3 1\n"


def test_a_fork_while_storages_are_made() -> None:
    """A child can make storages, regardless of what another thread was doing at the fork."""
    program = """
import os, signal, sys, threading
from usermetadata import InMemoryStorage

sys.setswitchinterval(1e-6)
stop = threading.Event()

def make():
    while not stop.is_set():
        InMemoryStorage()

thread = threading.Thread(target=make)
thread.start()
failed = []
for _ in range(50):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        InMemoryStorage()
        os._exit(0)
    failed.append(os.waitpid(child, 0)[1])
    if failed[-1]:
        break
stop.set()
thread.join()
print(sum(failed))
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    assert subprocess.check_output(command, text=True, timeout=60) == "0\n"


def test_a_fork_does_not_wait_for_who_keeps_an_error(database: Path) -> None:
    """A fork does not wait for a connection that only a kept traceback refers to."""
    with contextlib.closing(SQLiteStorage(database, timeout=20)) as storage:
        storage.write([("alice", Merge({}))])
        with contextlib.closing(sqlite3.connect(database)) as other, other:
            other.execute("UPDATE user_metadata SET user_metadata = CAST(x'7bff7d' AS TEXT)")
        with pytest.raises(DamagedMetadataError) as kept:
            storage.read(["alice"])
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", ""], check=True, preexec_fn=int)
        assert time.monotonic() - begin < 15
    assert kept.value.__traceback__ is not None


def test_the_end_of_a_forked_child_damages_nothing(database: Path) -> None:
    """A child that was forked inside a transaction exits normally; the file is not damaged."""
    program = """
import os, sqlite3, sys
from usermetadata import SQLiteStorage, StorageError
from usermetadata.changes import Modify

storage = SQLiteStorage(sys.argv[1])
children = []
receiver, sender = os.pipe()

def fork(metadata):
    children.append(os.fork())
    return metadata

try:
    storage.write([("alice", Modify(fork))])
except StorageError:
    os.close(sender)
    os.read(receiver, 1)
    sys.exit()
# The child exits while the log holds half of another connection's transaction.
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("PRAGMA cache_size = 5")
other.execute("BEGIN IMMEDIATE")
rows = [("public", f"user {n}", '{"text":"' + "x" * 300 + '"}') for n in range(3000)]
other.executemany("INSERT INTO user_metadata VALUES (?, ?, ?)", rows)
os.close(sender)
assert os.waitpid(children[0], 0)[1] == 0
other.execute("COMMIT")
other.close()
print(len(SQLiteStorage(sys.argv[1]).read([user_id for _, user_id, _ in rows])))
"""
    command = [sys.executable, "-c", program, str(database)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "3000\n"
    assert is_sound(database)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///users.db"])
def test_a_daemon_thread_does_not_crash_the_interpreters_end(url: str, tmp_path: Path) -> None:
    """Threads that never stop are cut off, and the program exits normally."""
    program = """
import sys, threading
import usermetadata
from usermetadata import syncio

usermetadata.init(sys.argv[1])
started = threading.Barrier(4)

def work(function):
    function()
    started.wait()
    while True:
        function()

for function in (
    lambda: syncio.update_user_metadata("alice", {"n": 1}),
    lambda: syncio.modify_user_metadata("alice", lambda metadata: metadata),
    lambda: syncio.get_user_metadata("alice"),
):
    threading.Thread(target=work, args=[function], daemon=True).start()
started.wait()
"""
    command = [sys.executable, "-c", program, url]
    for _ in range(3):
        finished = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (finished.returncode, finished.stderr) == (0, "")


AT_THE_END = """import asyncio, atexit, sys, threading
import usermetadata
import usermetadata.asyncio as aio
from usermetadata import UserMetadataOverrideConfig, syncio

def functions(original):
    real = original.update_user_metadata
    async def update_user_metadata(user_id, update, user_context):
        await asyncio.sleep(0)
        return await real(user_id, update, user_context)
    original.update_user_metadata = update_user_metadata
    return original

def write(name):
    syncio.update_user_metadata("alice", {f"syncio {name}": 1})
    asyncio.run(aio.update_user_metadata("alice", {f"asyncio {name}": 1}))

def write_last():
    write("first handler")
    print(", ".join(sorted(syncio.get_user_metadata("alice").metadata)))

def write_when_ending():
    ending.wait()
    write("joined thread")

def join():
    ending.set()
    thread.join(60)

def write_after_main():
    threading.main_thread().join()
    write("thread after main")

atexit.register(write_last)
ending = threading.Event()
thread = threading.Thread(target=write_when_ending, daemon=True)
thread.start()
atexit.register(join)
_, url, override, used = sys.argv
usermetadata.init(url, UserMetadataOverrideConfig(functions) if override == "override" else None)
if used == "used before":
    write("main")
    threading.Thread(target=write_after_main).start()
    atexit.register(write, "last handler")
"""


@pytest.mark.parametrize("used", ["used before", "not used before"])
@pytest.mark.parametrize("override", ["override", "no override"])
@pytest.mark.parametrize("kind", ["memory", "sqlite memory", "sqlite file", "postgres"])
def test_writing_works_until_the_end(
    kind: str, override: str, used: str, tmp_path: Path, schema: str
) -> None:
    """Calls by exit handlers, and by threads that outlive the main thread, are done as before.

    Also by handlers that were registered before ``init``, with an override, through both facades,
    and if the storage was not used before. An SQLite file is closed afterwards.
    """
    url = {
        "memory": "memory://",
        "sqlite memory": "sqlite://",
        "sqlite file": f"sqlite:///{tmp_path}/users.db",
        "postgres": with_parameters(server_url(), schema=schema),
    }[kind]
    written = ["first handler", "joined thread"]
    if used == "used before":
        written += ["last handler", "main", "thread after main"]
    command = [sys.executable, "-W", "error", "-c", AT_THE_END, url, override, used]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    expected = sorted(f"{facade} {who}" for who in written for facade in ("asyncio", "syncio"))
    assert finished.stdout == f"{', '.join(expected)}\n"
    assert os.listdir(tmp_path) == (["users.db"] if kind == "sqlite file" else [])


def test_memory_is_each_processs_own() -> None:
    """After a fork each side has a copy of an in-memory store, also if a thread held its lock.

    A fork waits for a write to an in-memory SQLite database, but not to an ``InMemoryStorage``.
    """
    program = """
import os, sys, threading
import usermetadata
from usermetadata import SQLiteStorage, InMemoryStorage
from usermetadata.changes import Merge, Modify

for storage, waits in ((InMemoryStorage(), False), (SQLiteStorage(":memory:"), True)):
    storage.write([("alice", Merge({"before": True}))])
    entered, forking = threading.Event(), threading.Event()

    def hold(metadata):
        entered.set()
        forking.wait()
        return {**metadata, "held": True}

    holder = threading.Thread(target=storage.write, args=[[("alice", Modify(hold))]])
    holder.start()
    entered.wait()
    if waits:
        threading.Timer(0.05, forking.set).start()  # the fork waits for the holder
    child = os.fork()
    if child == 0:
        [written] = storage.write([("alice", Merge({"child": True}))])
        held = {"held": True} if waits else {}
        os._exit(written != {"before": True, **held, "child": True})
    forking.set()
    assert os.waitpid(child, 0)[1] == 0
    holder.join()
    assert storage.read(["alice"]) == {"alice": {"before": True, "held": True}}
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    subprocess.run(command, timeout=60, check=True)

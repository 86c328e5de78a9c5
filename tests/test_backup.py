"""Backups that are made as ``docs/backup.md`` shows, while other processes write."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from postgres_server import OwnServer
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier

from usermetadata import Index, PostgresStorage, SQLiteStorage
from usermetadata.changes import Merge, Replace

if TYPE_CHECKING:
    from collections.abc import Generator

    from usermetadata import Storage

PAGE = Path(__file__).parent.parent / "docs" / "backup.md"
WRITER = """
import itertools, sys
from usermetadata._core.urls import open_storage
from usermetadata.changes import Merge
_, url, name = sys.argv
storage = open_storage(url)
for n in itertools.count(1):
    storage.write([(name, Merge({"n": n})), (f"{name}'s twin", Merge({"n": n}))])
    print(n, flush=True)
"""
NAMES = ["alice", "bob", "carol", "dave"]


class Writers:
    """Processes that each update two users in one transaction, again and again.

    Attributes:
        acknowledged: the last number of each that the storage has acknowledged.
    """

    def __init__(self, url: str) -> None:
        self.acknowledged = dict.fromkeys(NAMES, 0)
        self._progress = threading.Condition()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, url, name], stdout=subprocess.PIPE, text=True
            )
            for name in NAMES
        ]
        self._threads = [
            threading.Thread(target=self._watch, args=each)
            for each in zip(NAMES, self._processes, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _watch(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with self._progress:
                    self.acknowledged[name] = int(line)
                    self._progress.notify_all()

    def wait_for(self, number: int) -> dict[str, int]:
        """Wait until each has written so often once more; return what is acknowledged."""
        with self._progress:
            goal = {name: n + number for name, n in self.acknowledged.items()}
            assert self._progress.wait_for(
                lambda: all(self.acknowledged[name] >= goal[name] for name in NAMES), timeout=120
            )
            return {**self.acknowledged}

    def kill(self) -> dict[str, int]:
        """Kill them, as a crash does; return what was acknowledged."""
        for process in self._processes:
            process.kill()
            process.wait(timeout=60)
        for thread in self._threads:
            thread.join(timeout=60)
        return {**self.acknowledged}


@contextlib.contextmanager
def writing(url: str) -> Generator[Writers, None, None]:
    """Let the processes write during a block."""
    writers = Writers(url)
    try:
        yield writers
    finally:
        writers.kill()


def check(storage: Storage, before: dict[str, int], at_most: dict[str, int]) -> None:
    """Check that a restored storage has what was acknowledged, and each later update as a whole."""
    found = storage.read([*NAMES, *(f"{name}'s twin" for name in NAMES)])
    for name in NAMES:
        assert before[name] <= found[name]["n"] <= at_most[name] + 1
        assert found[name] == found[f"{name}'s twin"]
    assert storage.write([("alice", Merge({"works": True}))])


def restore(database: Path, backup: Path) -> None:
    """Replace the file as the page shows."""
    damaged = database.with_name("damaged")
    damaged.mkdir()
    for file in database.parent.glob(f"{database.name}*"):
        file.rename(damaged / file.name)
    shutil.copy(backup, database)


def test_a_backup_while_processes_write(database: Path, tmp_path: Path) -> None:
    """It has each update that was acknowledged before; the writers go on while it is made."""
    with contextlib.closing(SQLiteStorage(database)) as storage:
        storage.write([(f"user {n}", Replace({"text": "x" * 500})) for n in range(2000)])
    backup = tmp_path / "backup.db"
    progress: list[dict[str, int]] = []
    with writing(f"sqlite:///{database}") as writers:
        before = writers.wait_for(5)

        def go_on_for_a_while() -> None:
            if not progress:
                progress.append(writers.wait_for(5))

        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.set_progress_handler(go_on_for_a_while, 10_000)
            connection.execute("VACUUM INTO ?", [str(backup)])
        after = writers.wait_for(5)
        writers.kill()
    assert all(progress[0][name] > before[name] for name in NAMES)
    restore(database, backup)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with contextlib.closing(SQLiteStorage(database)) as storage:
        check(storage, before, after)
        assert len(storage.read_after("user ", 3000)) == 2000


def test_the_command_while_processes_write(database: Path, tmp_path: Path) -> None:
    """The command of sqlite-utils makes the same backup."""
    with writing(f"sqlite:///{database}") as writers:
        before = writers.wait_for(5)
        subprocess.run(
            [sys.executable, "-m", "sqlite_utils", "query", database, "VACUUM INTO 'backup.db'"],
            cwd=tmp_path,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        at_most = writers.kill()
    restore(database, tmp_path / "backup.db")
    with contextlib.closing(SQLiteStorage(database)) as storage:
        check(storage, before, at_most)


def test_a_backup_has_nothing_of_an_erased_user(database: Path, tmp_path: Path) -> None:
    """It has no free space, in which SQLite may keep a removed row."""
    backup = tmp_path / "backup.db"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        with contextlib.closing(SQLiteStorage(database)) as storage:
            storage.write([("alice", Replace({"secret": "sesame"})), ("bob", Replace({}))])
        connection.execute("DELETE FROM user_metadata WHERE user_id = 'alice'")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert b"sesame" in database.read_bytes()
        connection.execute("VACUUM INTO ?", [str(backup)])
    assert b"sesame" not in backup.read_bytes()


def test_a_log_that_is_left_changes_the_restored_file(database: Path, tmp_path: Path) -> None:
    """So the log has to be removed together with the file."""
    backup = tmp_path / "backup.db"
    with contextlib.closing(SQLiteStorage(database)) as storage:
        storage.write([("alice", Replace({"n": 1}))])
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("VACUUM INTO ?", [str(backup)])
        storage.write([("alice", Replace({"n": 2}))])
        log = database.with_name("users.db-wal").read_bytes()
    restored = tmp_path / "restored.db"
    shutil.copy(backup, restored)
    restored.with_name("restored.db-wal").write_bytes(log)
    with contextlib.closing(sqlite3.connect(restored)) as connection:
        rows = connection.execute("SELECT user_metadata FROM user_metadata").fetchall()
    assert rows == [('{"n":2}',)]
    restored.with_name("restored.db-wal").unlink(missing_ok=True)
    shutil.copy(backup, restored)
    with contextlib.closing(SQLiteStorage(restored)) as storage:
        assert storage.read(["alice"]) == {"alice": {"n": 1}}


@pytest.fixture(scope="module")
def server() -> Generator[OwnServer, None, None]:
    """A server with the programs of the same version."""
    server = OwnServer()
    yield server
    server.stop()


@pytest.mark.parametrize("indexes", [(), (Index("n"),)], ids=["no index", "an index"])
def test_a_dump_while_processes_write(
    server: OwnServer, tmp_path: Path, indexes: tuple[Index, ...]
) -> None:
    """The commands of the page restore what was acknowledged before, and fill indexes."""
    section = PAGE.read_text(encoding="utf-8").partition("## PostgreSQL")[2]
    dump, load = re.findall(r"^```console\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    urls: dict[str, str] = {}
    with psycopg.connect(server.url, autocommit=True) as connection:
        for variable in ("DATABASE_URL", "NEW_DATABASE_URL"):
            name = f"{variable}_{len(indexes)}".lower()
            connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
            host = connection.info.host
            urls[variable] = f"postgresql://{connection.info.user}@/{name}?host={host}"
    path = [str(Path(sys.executable).parent), str(server.programs), os.environ["PATH"]]
    environment: dict[str, Any] = {**os.environ, **urls, "PATH": os.pathsep.join(path)}

    def run(commands: str) -> None:
        subprocess.run(
            ["sh", "-e", "-c", commands],
            env=environment,
            cwd=tmp_path,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    for url in urls.values() if indexes else ():
        with contextlib.closing(PostgresStorage(url, indexes=indexes)) as storage:
            storage.build_indexes()
    with writing(urls["DATABASE_URL"]) as writers:
        before = writers.wait_for(5)
        run(dump)
        at_most = writers.kill()
    run(load)
    with contextlib.closing(
        PostgresStorage(make_conninfo(urls["NEW_DATABASE_URL"]), indexes=indexes)
    ) as storage:
        found = storage.read(["alice"])["alice"]["n"]
        if indexes:
            assert storage.find({"n": found}, "", 9).keys() >= {"alice", "alice's twin"}
        check(storage, before, at_most)

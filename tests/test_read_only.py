"""A program that may only read: a file, a connection or a role without the right to write."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from postgres_server import server_url, with_parameters
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier
from sqlite_utils import Database

from usermetadata import Index, PostgresStorage, SQLiteStorage, StorageError
from usermetadata.changes import Clear, Merge, Modify
from usermetadata.cli import main

if TYPE_CHECKING:
    from collections.abc import Generator

    import psycopg

    from usermetadata.changes import Change

INDEXES = (Index("plan"), Index("customer", unique=True))
ALICE = {"plan": "pro", "customer": "c1"}
CHANGES: list[Change] = [Merge({"n": 2}), Modify(lambda _: {"n": 2}), Clear()]
NO_USER = 65534


@pytest.fixture
def file() -> Generator[Path, None, None]:
    """The path of a file that a test may create, in a folder that other users can reach."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "users.db")


def fill(file: Path, mode: str = "WAL") -> None:
    """Store alice, with indexes."""
    with contextlib.closing(SQLiteStorage(file, indexes=INDEXES)) as storage:
        storage.write([("alice", Merge(ALICE))])
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")


@contextlib.contextmanager
def only_reading(file: Path) -> Generator[None, None, None]:
    """Take away the right to write the file and its directory."""
    for each in file.parent.iterdir():
        each.chmod(0o444)
    file.parent.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:  # who may write everything
        os.seteuid(NO_USER)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        file.parent.chmod(0o755)
        for each in file.parent.iterdir():
            each.chmod(0o644)


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_read_only_file(file: Path, mode: str) -> None:
    """It can be read, and a write says what to permit; once that is permitted, it is written."""
    fill(file, mode)
    with contextlib.closing(SQLiteStorage(file)) as storage:
        with only_reading(file):
            for _ in range(2):
                assert storage.read(["alice", "bob"]) == {"alice": ALICE}
            for change in CHANGES:
                with pytest.raises(StorageError, match="let this process write the file and its"):
                    storage.write([("alice", change)])
            with pytest.raises(StorageError, match="let this process write the file and its"):
                storage.erase("alice", lambda _: None)
            assert storage.read_after("", 9) == {"alice": ALICE}
        assert storage.write([("alice", Merge({"n": 3}))]) == [{**ALICE, "n": 3}]
        assert storage.read(["alice"]) == {"alice": {**ALICE, "n": 3}}


def test_a_read_only_file_is_searched(file: Path) -> None:
    """Users are found by the indexes that the file has; they need not be declared to be listed."""
    fill(file)
    with only_reading(file), contextlib.closing(SQLiteStorage(file, indexes=INDEXES)) as storage:
        assert storage.find({"plan": "pro"}, "", 5) == {"alice": ALICE}
        assert storage.find({"customer": "c1"}, "", 5) == {"alice": ALICE}
        assert storage.count({"plan": "pro", "n": 1}) == 0
    with only_reading(file), contextlib.closing(SQLiteStorage(file)) as storage:
        assert set(storage.stored_indexes()) == set(INDEXES)
        assert storage.count(None) == 1
        with pytest.raises(StorageError, match="let this process write the file and its"):
            storage.drop_index("plan")


def test_an_index_that_a_read_only_file_lacks(file: Path) -> None:
    """The error says that it must be built elsewhere; what needs no index is read."""
    fill(file)
    index = Index("n")
    with only_reading(file), contextlib.closing(SQLiteStorage(file, indexes=[index])) as storage:
        with pytest.raises(StorageError, match=r"by_n; repeat the call where the file may be writ"):
            storage.find({"n": 1}, "", 5)
        assert storage.read(["alice"]) == {"alice": ALICE}


def test_the_command_line_reads_a_read_only_file(file: Path) -> None:
    """The commands that only read work."""
    fill(file)
    environment = {"USERMETADATA_URL": f"sqlite:///{file}"}
    CliRunner().invoke(main, ["export"], env=environment)  # what it imports, root may own
    shown: dict[tuple[str, ...], object] = {
        ("get", "alice"): ALICE,
        ("count", "--where", "plan=pro"): 1,
        ("list", "--where", "plan=pro"): {"userId": "alice", "metadata": ALICE},
        ("export",): {"userId": "alice", "metadata": ALICE},
    }
    with only_reading(file):
        for arguments, expected in shown.items():
            finished = CliRunner().invoke(main, arguments, env=environment)
            assert finished.exit_code == 0, finished.stderr
            assert json.loads(finished.stdout) == expected
        finished = CliRunner().invoke(main, ["find", "--where", "customer=c1"], env=environment)
        assert finished.stdout == "alice\n"


def test_a_read_only_file_before_the_first_write(file: Path) -> None:
    """No user has metadata, as in a table that is empty; other programs' tables do not matter."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
    with only_reading(file), contextlib.closing(SQLiteStorage(file, indexes=INDEXES)) as storage:
        assert storage.read(["alice"]) == {}
        assert storage.read_after("", 9) == {}
        assert storage.find({"plan": "pro"}, "", 5) == {}
        assert storage.count(None) == 0


def test_a_read_only_table_is_checked(file: Path) -> None:
    """A table that takes Bob for bob is refused, as in a file that may be written."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute(
            "CREATE TABLE user_metadata (app_id TEXT, user_id TEXT COLLATE NOCASE,"
            " user_metadata TEXT, PRIMARY KEY (app_id, user_id))"
        )
    with (
        only_reading(file),
        contextlib.closing(SQLiteStorage(file)) as storage,
        pytest.raises(StorageError, match="user_id takes different ids for the same"),
    ):
        storage.read(["Bob"])


def test_no_uncommitted_changes_are_read(file: Path) -> None:
    """A transaction that a crash has cut off is not read, and undone by the next one who may write.

    Without a write-ahead log, SQLite may write changes to the file before the commit.
    """
    fill(file, "DELETE")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("PRAGMA cache_size = 1")
        other.execute("BEGIN")
        other.execute("UPDATE user_metadata SET user_metadata = '{\"uncommitted\": 1}'")
        for number in range(100):
            row = ("public", f"user {number}", json.dumps({"text": "x" * 1000}))
            other.execute("INSERT INTO user_metadata VALUES (?, ?, ?)", row)
        journal = file.with_name("users.db-journal")
        crashed = {path: path.read_bytes() for path in (file, journal)}
    for path, content in crashed.items():
        path.write_bytes(content)
    with contextlib.closing(SQLiteStorage(file)) as storage:
        with only_reading(file), pytest.raises(StorageError, match="let this process write"):
            storage.read(["alice"])
        assert storage.read(["alice", "user 7"]) == {"alice": ALICE}


WRITER = """
import sys
from usermetadata import SQLiteStorage
from usermetadata.changes import Merge
storage = SQLiteStorage(sys.argv[1])
for line in sys.stdin:
    storage.write([("alice", Merge({"n": int(line)}))])
    print(line, end="", flush=True)
storage.close()
"""


def test_what_another_process_writes_is_read(file: Path) -> None:
    """A reader without rights sees each acknowledged update, also after the writer has ended."""
    fill(file)
    command = [sys.executable, "-c", WRITER, str(file)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with writer, contextlib.closing(SQLiteStorage(file)) as reader:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for number in range(20):
            writer.stdin.write(f"{number}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == f"{number}\n"
            with only_reading(file):
                assert reader.read(["alice"])["alice"]["n"] == number
        writer.stdin.close()
        assert writer.wait(timeout=60) == 0
        with only_reading(file):
            assert reader.read(["alice"])["alice"]["n"] == 19


IN_A_GROUP = """
import os, sys
from usermetadata import SQLiteStorage, StorageError
from usermetadata.changes import Merge

WRITER, READER, GROUP = 1000, 65534, 2000
SQLiteStorage(":memory:").read(["alice"])  # what it imports, root may own
_, file = sys.argv


def run_as(user, groups, work):
    child = os.fork()
    if not child:
        os.setgroups(groups)
        os.setgid(user)
        os.setuid(user)
        work(SQLiteStorage(file))
        os._exit(0)  # like a crash: the log stays
    assert os.waitpid(child, 0)[1] == 0


def write(storage):
    storage.write([("alice", Merge({"n": 1}))])


def read(storage):
    assert storage.read(["alice"]) == {"alice": {"n": 1}}
    try:
        write(storage)
    except StorageError:
        return
    raise AssertionError


def fail(storage):
    try:
        storage.read(["alice"])
    except StorageError:
        return
    raise AssertionError


run_as(WRITER, [], write)
assert os.path.exists(file + "-wal")
run_as(READER, [GROUP], read)
run_as(READER, [], fail)
run_as(WRITER, [], write)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become other users")
def test_a_reader_in_the_group_of_the_page(file: Path) -> None:
    """The page's commands let a group read what SQLite makes later, and keep others out."""
    file.parent.chmod(0o755)
    with contextlib.closing(SQLiteStorage(file)) as storage:
        storage.write([])
    for path in (file.parent, file):
        os.chown(path, 1000, 1000)
    page = (Path(__file__).parent.parent / "docs" / "read-only.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, ours in (("/var/lib/app", str(file.parent)), ("readers", "2000")):
        commands = commands.replace(name, ours)
    subprocess.run(["sh", "-e", "-c", commands], check=True)
    subprocess.run([sys.executable, "-c", IN_A_GROUP, str(file)], check=True)


@pytest.mark.parametrize("has_table", [True, False])
def test_a_borrowed_connection_that_only_reads(file: Path, *, has_table: bool) -> None:
    """It needs no table, and an index only to search; a write changes nothing."""
    if has_table:
        with contextlib.closing(SQLiteStorage(file)) as storage:
            storage.write([("alice", Merge(ALICE))])
    else:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE orders (id INTEGER)")
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        storage = SQLiteStorage(Database(connection), indexes=INDEXES)
        for _ in range(2):
            assert storage.read(["alice"]) == ({"alice": ALICE} if has_table else {})
            assert storage.count(None) == has_table
            for change in CHANGES:
                with pytest.raises(StorageError, match="with a connection that may write"):
                    storage.write([("alice", change)])


@pytest.fixture
def reader(direct: psycopg.Connection[Any], schema: str) -> Generator[str, None, None]:
    """A role that may see what is in the schema; the name of the schema is its own as well."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    direct.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    direct.execute(SQL("GRANT USAGE ON SCHEMA {} TO {}").format(*map(Identifier, (schema, role))))
    yield role
    direct.execute(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(Identifier(role)))


def test_a_role_that_may_only_select(
    direct: psycopg.Connection[Any], schema: str, reader: str
) -> None:
    """It reads, before and after the table is created; a write says what it lacks."""
    url = make_conninfo(with_parameters(server_url(), options=f"-csearch_path={schema}"))
    with (
        contextlib.closing(PostgresStorage(url, indexes=INDEXES)) as writer,
        contextlib.closing(PostgresStorage(make_conninfo(url, user=reader))) as storage,
    ):
        assert storage.read(["alice"]) == {}
        with pytest.raises(StorageError, match=r"permission denied for schema .*; grant the right"):
            storage.write([("alice", Merge({"n": 1}))])
        writer.write([("alice", Merge(ALICE))])
        with pytest.raises(StorageError, match="permission denied for table user_metadata; grant"):
            storage.read(["alice"])
        grant = SQL("GRANT SELECT ON user_metadata TO {}")
        direct.execute(grant.format(Identifier(reader)))
        assert storage.read(["alice", "bob"]) == {"alice": ALICE}
        assert storage.read_after("", 9) == {"alice": ALICE}
        assert storage.count(None) == 1
        for change in CHANGES:
            with pytest.raises(StorageError, match="for table user_metadata; grant the right"):
                storage.write([("alice", change)])
        with pytest.raises(StorageError, match="for table user_metadata; grant the right"):
            storage.erase("alice", lambda _: None)
        assert writer.read(["alice"]) == {"alice": ALICE}


def test_a_role_that_may_only_select_finds_users(
    direct: psycopg.Connection[Any], schema: str, reader: str
) -> None:
    """It needs the same right on the two tables of the indexes."""
    url = make_conninfo(with_parameters(server_url(), options=f"-csearch_path={schema}"))
    with (
        contextlib.closing(PostgresStorage(url, indexes=INDEXES)) as writer,
        contextlib.closing(
            PostgresStorage(make_conninfo(url, user=reader), indexes=INDEXES)
        ) as storage,
    ):
        writer.write([("alice", Merge(ALICE))])
        grant = SQL("GRANT SELECT ON user_metadata TO {}")
        direct.execute(grant.format(Identifier(reader)))
        with pytest.raises(StorageError, match="table user_metadata_indexes; grant the right"):
            storage.find({"plan": "pro"}, "", 5)
        grant = SQL("GRANT SELECT ON user_metadata_indexes, user_metadata_index_entries TO {}")
        direct.execute(grant.format(Identifier(reader)))
        assert storage.find({"plan": "pro"}, "", 5) == {"alice": ALICE}
        assert storage.count({"customer": "c1"}) == 1
        assert set(storage.stored_indexes()) == set(INDEXES)


def test_the_statements_of_the_page(direct: psycopg.Connection[Any], schema: str) -> None:
    """They give a role all it needs to read and to find users, and no right to write."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    page = (Path(__file__).parent.parent / "docs" / "read-only.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sql\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    statements = re.sub(r"\breader\b", role, re.sub(r"\bpublic\b", schema, "".join(blocks)))
    url = server_url()
    with (
        contextlib.closing(PostgresStorage(url, schema=schema, indexes=INDEXES)) as writer,
        contextlib.closing(
            PostgresStorage(make_conninfo(url, user=role), schema=schema, indexes=INDEXES)
        ) as reader,
    ):
        writer.write([("alice", Merge(ALICE))])
        try:
            direct.execute(statements.encode())
            assert reader.read(["alice"]) == reader.find({"plan": "pro"}, "", 5) == {"alice": ALICE}
            with pytest.raises(StorageError, match="for table user_metadata; grant the right"):
                reader.write([("alice", Merge({"n": 1}))])
        finally:
            direct.execute(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(Identifier(role)))

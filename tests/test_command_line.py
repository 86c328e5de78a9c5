"""The command line, ``python -m usermetadata``, and the plugin of sqlite-utils."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from conftest import STORAGES, open_storage
from postgres_server import server_url
from psycopg.conninfo import make_conninfo

from usermetadata import Index, PostgresStorage, SQLiteStorage
from usermetadata.changes import Clear, Merge
from usermetadata.cli import main
from usermetadata.storage import ListingStorage

if TYPE_CHECKING:
    from pathlib import Path

    import psycopg


class Shell:
    """Runs commands on one SQLite file."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.environment = {"USERMETADATA_URL": f"sqlite:///{database}"}

    def run(self, *arguments: str, stdin: str = "", code: int = 0) -> str:
        """Run a command in this process, which is ten times as fast as in a new one.

        Return its output, that on standard error if it should fail. On success it only prints the
        number of users there. An error that it does not handle is raised.
        """
        with contextlib.chdir(self.database.parent):
            finished = CliRunner().invoke(
                main, arguments, stdin, self.environment, catch_exceptions=False
            )
        return self._checked(finished.exit_code, code, finished.stdout, finished.stderr)

    def run_program(self, *arguments: str, stdin: str = "", code: int = 0) -> str:
        """Do the same by ``python -m usermetadata``, in a new process."""
        finished = subprocess.run(
            [sys.executable, "-m", "usermetadata", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **self.environment},
            cwd=self.database.parent,
        )
        return self._checked(finished.returncode, code, finished.stdout, finished.stderr)

    @staticmethod
    def _checked(found: int, code: int, stdout: str, stderr: str) -> str:
        assert found == code, stderr
        assert "Traceback" not in stderr
        assert code or re.fullmatch(r"(\d+ users?\n)?", stderr)
        return stderr if code else stdout


@pytest.fixture
def shell(database: Path) -> Shell:
    """A shell on an empty file."""
    return Shell(database)


def test_the_functions_are_commands(shell: Shell) -> None:
    """JSON comes as an argument or on standard input, and goes to standard output."""
    shown = shell.run_program("update", "alice", '{"theme": "dark", "todos": [1], "text": "é"}')
    assert json.loads(shown) == {"theme": "dark", "todos": [1], "text": "é"}
    shown = shell.run_program("update", "alice", stdin='{"todos": null, "text": null}')
    assert json.loads(shown) == {"theme": "dark"}
    assert json.loads(shell.run("set", "alice", "-", stdin='{"n": 1}')) == {"n": 1}
    assert json.loads(shell.run("get", "alice")) == {"n": 1}
    assert shell.run("clear", "alice") == ""
    assert shell.run("get", "alice") == "{}\n"
    shell.run("set", "alice", '{"n": 2}', "--app-id", "shop")
    assert shell.run("get", "alice") == "{}\n"
    shop = f"sqlite:///{shell.database}?app_id=shop&timeout=5"
    assert json.loads(shell.run("get", "alice", "--storage", shop)) == {"n": 2}
    assert shell.run("get", "alice", "--storage", shop, "--app-id", "public") == "{}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["clear", ""], 2, "user_id: is empty"),
        (["get", "alice"], 2, "--storage: there is no file "),
        (["export", "--storage", "missing.db"], 2, "--storage: there is no file missing.db"),
        (["update", "alice", "{"], 2, "metadata_update: it is not JSON: Expecting property name"),
        (["set", "alice", "[1]"], 2, "metadata: list is not a mapping"),
        (["set", "alice", '{"n": NaN}'], 2, 'metadata["n"]: NaN is not JSON; pass'),
        (["set", "a", '{"b": [12345678901234567890.12]}'], 2, 'metadata["b"][0]: a float would'),
        (["update", "a", '{"p": 0.1, "q": 1e-999}'], 2, 'metadata_update["q"]: a float would'),
        (["set", "a", '{"ssn":', "1}"], 2, "too many arguments; put quotes around the JSON"),
        (["import", "inexact.jsonl"], 2, 'line 1["metadata"]["p"]: a float would'),
        (["import", "no_object.jsonl"], 2, "line 1: metadata: it is not an object"),
        (
            ["clear", "--stroage=x", "a"],
            2,
            "No such option '--stroage'. Before a user id that begins",
        ),
        (["get", "alice", "--storage", "mysql://x"], 2, "unsupported storage URL: mysql://"),
        (["clear", "alice", "--storage", "/missing/users.db"], 1, "the directory /missing does"),
        (["export", "missing/x", "--storage", "memory://"], 1, "No such file or directory"),
        (["import", "missing.jsonl"], 2, "No such file"),
        (["import", "not_utf8.jsonl"], 2, "'utf-8' codec can't decode byte 0xff"),
        (["import", "missing.jsonl", "--from-line", "0"], 2, "0 is not in the range x>=1"),
        (["serve", "--host", "0.0.0.0", "--api-key", ""], 2, "api_keys: an empty key"),
        (
            ["serve", "--host", "0.0.0.0"],
            2,
            "'0.0.0.0' can be reached from elsewhere: set USERMETADATA_API_KEYS",
        ),
        (["serve", "--host", "example.com"], 2, "'example.com' can be reached from elsewhere"),
        (["serve", "--storage", "/missing/users.db"], 1, "the directory /missing does not exist"),
    ],
)
def test_errors_are_a_line_and_an_exit_code(
    shell: Shell, arguments: list[str], code: int, message: str
) -> None:
    """The exit code is 2 for invalid arguments, 1 if the storage failed; no traceback."""
    (shell.database.parent / "not_utf8.jsonl").write_bytes(b"\xff\n")
    for name, metadata in (("inexact", '{"p": 1e-999}'), ("no_object", "[]")):
        line = f'{{"userId": "a", "metadata": {metadata}}}'
        (shell.database.parent / f"{name}.jsonl").write_text(line)
    # A server that did start would not end.
    run = shell.run_program if arguments[0] == "serve" else shell.run
    assert message in run(*arguments, code=code)


def test_an_error_ends_the_program(shell: Shell) -> None:
    """A line on standard error and the exit code are also what a shell sees."""
    assert "there is no file" in shell.run_program("get", "alice", code=2)
    nowhere = ["--host", "192.0.2.1", "--api-key", "key", "--storage", "memory://"]
    error = shell.run_program("serve", *nowhere, code=1)
    assert "cannot listen at --host '192.0.2.1' --port 3567" in error


@pytest.mark.parametrize("user_id", ["-V1StGXR8_Z5jdHi6B", "-", "-s", "-5", "--", "--storage"])
def test_a_user_id_may_begin_with_a_hyphen(shell: Shell, user_id: str) -> None:
    """An id with one hyphen needs nothing; one with two comes after ``--``."""
    separator = ["--"] if user_id.startswith("--") else []
    storage = ["--storage", str(shell.database)]
    for number, (command, *update) in enumerate([("update", '{"n": 1}'), ("get",), ("clear",)]):
        shown = CliRunner().invoke(main, [command, *storage, *separator, user_id, *update])
        assert shown.exit_code == 0, shown.output
        assert read_all(shell.database) == ({user_id: {"n": 1}} if number < 2 else {})


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        ("update a <&-", "standard input or output: it is closed"),
        ("update a 0>/dev/null", "standard input or output: it is closed"),
        ("import <&-", "standard input or output: it is closed"),
        ("get a >&-", "stdout: it is closed"),
        ("export >&-", "stdout: it is closed"),
        ("get a 1</dev/null", "standard input or output: it is closed"),
        ("get a 2>&-", ""),
        ("update a '{}' <&- >&- 2>&-", ""),
    ],
)
def test_a_closed_stream_is_an_error(shell: Shell, redirection: str, message: str) -> None:
    """One line, the exit code 2, and nothing is written; also if it is standard error."""
    users = fill(shell.database, 2)
    command = f"{shlex.quote(sys.executable)} -m usermetadata {redirection}"
    environment = {**os.environ, "USERMETADATA_URL": f"sqlite:///{shell.database}"}
    finished = subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert read_all(shell.database) == users


@pytest.mark.parametrize("command", ["get a", "export"])
def test_a_full_disk_is_an_error(shell: Shell, command: str) -> None:
    """Output that cannot be written is one line and the exit code 1."""
    shell.run("set", "a", "{}")
    shown = f"{shlex.quote(sys.executable)} -m usermetadata {command} >/dev/full"
    environment = {**os.environ, "USERMETADATA_URL": f"sqlite:///{shell.database}"}
    finished = subprocess.run(
        ["sh", "-c", shown], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "No space left on device" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_line_that_does_not_fit_in_memory(shell: Shell, tmp_path: Path) -> None:
    """One line and the exit code 2, not a traceback."""
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(2**26)  # one line without an end, on a sparse file
    program = """
import resource
from usermetadata import SQLiteStorage
from usermetadata.cli import main

with open("/proc/self/statm") as mapped:
    limit = int(mapped.read().split()[0]) * resource.getpagesize() + 2**25
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""
    for arguments in (["import", "huge.jsonl"], ["set", "a"]):
        with (tmp_path / "huge.jsonl").open("rb") as stdin:
            finished = subprocess.run(
                [sys.executable, "-c", program, *arguments, "--storage", str(shell.database)],
                stdin=stdin,
                capture_output=True,
                text=True,
                check=False,
                cwd=tmp_path,
            )
        assert finished.returncode == 2, finished.stderr
        assert "the input does not fit in memory; split it" in finished.stderr
        assert "Traceback" not in finished.stderr


def test_help_says_what_there_is(shell: Shell) -> None:
    """Every command has a line of help."""
    shown = shell.run_program("--help")
    assert shown.startswith("Usage: python -m usermetadata ")
    for command in ("get", "set", "update", "clear", "export", "import", "import-supertokens"):
        assert f"\n  {command} " in shown
        assert f" {command} [OPTIONS] " in shell.run(command, "--help")


@pytest.mark.parametrize("program", ["usermetadata", "python -m usermetadata"])
def test_without_arguments_the_next_step_is_shown(shell: Shell, program: str) -> None:
    """The commands, and two that run as they are copied, by the name that was called."""
    folder = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("USERMETADATA_URL", None)

    def run(command: str, code: int) -> str:
        finished = subprocess.run(
            ["sh", "-c", f"{command} 2>&1"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
            cwd=shell.database.parent,
        )
        assert finished.returncode == code, finished.stdout
        return finished.stdout

    shown = run(program, 2)  # as click's groups do
    assert shown.startswith(f"Usage: {program} ")
    assert shown.index("  get ") < shown.index("  update ") < shown.index("  export ")
    update, get = shown.splitlines()[-2:]
    assert update.startswith(f"  {program} update ")
    assert run(update, 0) == run(get, 0) == '{\n  "theme": "dark"\n}\n'
    assert read_all(shell.database) == {"alice": {"theme": "dark"}}


def test_one_user_is_a_user(shell: Shell) -> None:
    """Export and import say "1 user", and "2 users"."""
    for count, words in ((1, "1 user\n"), (2, "2 users\n")):
        fill(shell.database, count)
        environment = {"USERMETADATA_URL": str(shell.database)}
        exported = CliRunner().invoke(main, ["export"], env=environment)
        assert exported.stderr == words
        assert CliRunner().invoke(main, ["import"], exported.stdout, environment).stderr == words


def fill(database: Path, count: int) -> dict[str, Any]:
    """Store so many users."""
    users = {f"user {n:05}": {"n": n, "text": "é\u2028"} for n in range(count)}
    with closing(SQLiteStorage(database)) as storage:
        storage.write([(user, Merge(users[user])) for user in users])
    return users


def read_all(database: Path) -> dict[str, Any]:
    """Read all users."""
    with closing(SQLiteStorage(database)) as storage:
        return storage.read_after("", 10**9)


def test_what_is_exported_can_be_imported(shell: Shell, tmp_path: Path) -> None:
    """JSON Lines, one user each, over files or pipes; existing users are overwritten."""
    users = fill(shell.database, 2500)
    lines = shell.run("export")
    first = '{"userId":"user 00000","metadata":{"n":0,"text":"é\u2028"}}'
    assert lines.split("\n")[0] == first
    shell.run("export", "users.jsonl")
    other = Shell(tmp_path / "other.db")
    other.run("set", "user 00000", '{"old": true}')
    other.run("import", "users.jsonl")
    assert read_all(other.database) == users
    third = Shell(tmp_path / "third.db")
    third.run("import", stdin=lines)
    assert read_all(third.database) == users


def test_a_file_may_have_been_edited(shell: Shell, tmp_path: Path) -> None:
    """A byte order mark, other line ends and empty lines are accepted."""
    text = (
        '\ufeff{"userId": "alice", "metadata": {"n": 1}}\r\n\n{"userId": "bob", "metadata": {}}\n\n'
    )
    (tmp_path / "users.jsonl").write_bytes(text.encode())
    shell.run("import", "users.jsonl")
    assert read_all(shell.database) == {"alice": {"n": 1}, "bob": {}}
    assert shell.run("update", "alice", stdin='\ufeff{"n": 2}') == '{\n  "n": 2\n}\n'


ROWS = {
    "half a pair": r'{"\udc00": ["é\ud800"], "a": {"\ud83d": "\ude00"}}',
    "null": '{"nick": null, "deep": {"nick": null}}',
    "u+0000": r'{"\u0000": "\u0000"}',
    "deep": '{"a":' + "[" * 400 + "]" * 400 + "}",
    "numbers": '{"n": 123456789012345678901234567890, "f": -0.0, "e": 1E5, "g": 5e-324}',
    "empty": "{}",
    "blanks and order": '\n{"b" : 1, \t"a" : true }\n',
}


@pytest.mark.parametrize("target", ["sqlite", "postgres"])
def test_rows_of_other_programs_are_copied(
    shell: Shell, tmp_path: Path, schema: str, target: str
) -> None:
    """What export writes, import reads, exactly: half a surrogate pair, a null at the root."""
    fill(shell.database, 1)
    with closing(sqlite3.connect(shell.database)) as connection, connection:
        connection.execute("DELETE FROM user_metadata")
        connection.executemany(
            "INSERT INTO user_metadata (app_id, user_id, user_metadata) VALUES ('public', ?, ?)",
            ROWS.items(),
        )
    url = str(tmp_path / "copy.db")
    if target == "postgres":
        separator = "&" if "?" in server_url() else "?"
        url = f"{server_url()}{separator}options=-csearch_path%3D{schema}"
    lines = shell.run("export")
    shell.run("import", "--storage", url, stdin=lines)
    again = shell.run("export", "--storage", url)
    assert sorted(map(repr, map(json.loads, again.splitlines()))) == sorted(
        repr({"userId": user_id, "metadata": json.loads(text)}) for user_id, text in ROWS.items()
    )


def damage(database: Path) -> list[str]:
    """Damage some rows of an SQLite file with 2,500 users; return their user ids."""
    not_utf8 = '{"ssn":"\udcff"}'.encode(errors="surrogateescape").hex()
    values = ["'['", "'[]'", "x'ff'", "'{\"ssn\"'", f"CAST(x'{not_utf8}' AS TEXT)"]
    damaged = [f"user {n:05}" for n in (0, 998, 999, 1700, 2499)]
    with closing(sqlite3.connect(database)) as connection, connection:
        for user_id, value in zip(damaged, values, strict=True):
            connection.execute(
                f"UPDATE user_metadata SET user_metadata = {value} WHERE user_id = ?", [user_id]
            )
    return damaged


def test_an_export_stops_at_a_damaged_row(shell: Shell, tmp_path: Path) -> None:
    """The error names the user and the option that goes on, and the last export stays."""
    fill(shell.database, 2500)
    shell.run("export", "users.jsonl")
    whole = (tmp_path / "users.jsonl").read_bytes()
    first, *_ = damage(shell.database)
    error = shell.run("export", "users.jsonl", code=1)
    assert f"the metadata of user '{first}' in app 'public' is damaged" in error
    assert error.endswith("set or clear it to repair it; or leave it out with --skip-damaged\n")
    assert "ssn" not in error
    assert (tmp_path / "users.jsonl").read_bytes() == whole
    with closing(sqlite3.connect(shell.database)) as connection, connection:
        connection.execute("UPDATE user_metadata SET user_metadata = '{}'")
        connection.execute("INSERT INTO user_metadata VALUES ('public', ?, '{}')", ["~" * 256])
    error = shell.run("export", code=1)
    assert "has 256 characters; 255 are allowed; or leave it out with --skip-damaged\n" in error


def test_damaged_rows_are_left_out_of_an_export(shell: Shell, tmp_path: Path) -> None:
    """With ``--skip-damaged`` all good rows are written, and the damaged ones are named.

    What they hold is not shown, and the exit code says that they are missing.
    """
    users = fill(shell.database, 2500)
    shell.run("export", "--skip-damaged", "users.jsonl")
    damaged = damage(shell.database)
    with closing(sqlite3.connect(shell.database)) as connection, connection:
        connection.execute("INSERT INTO user_metadata VALUES ('public', ?, '{}')", ["~" * 256])
    error = shell.run("export", "--skip-damaged", "users.jsonl", code=3)
    assert re.findall(r"the metadata of user '(.*?)' in app 'public' is damaged", error) == damaged
    assert "has 256 characters; 255 are allowed" in error
    assert "ssn" not in error
    assert "2495 users\n" in error
    assert error.endswith("Error: rows left out: 6; all others are done\n")
    good = {user_id: users[user_id] for user_id in users if user_id not in damaged}
    lines = map(json.loads, (tmp_path / "users.jsonl").read_bytes().splitlines())
    assert {line["userId"]: line["metadata"] for line in lines} == good


def test_damaged_rows_of_a_core_are_left_out(
    shell: Shell, schema: str, direct: psycopg.Connection[Any]
) -> None:
    """``import-supertokens`` stops at a damaged row, and continues or leaves it out if told to."""
    url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
    users = {f"user {n:05}": {"n": n} for n in range(1200)}
    with closing(PostgresStorage(url)) as core:
        core.write([(user, Merge(users[user])) for user in users])
    damaged = ["user 00700", "user 00701", "user 01100"]
    direct.execute(
        "UPDATE user_metadata SET user_metadata = '{\"ssn\"' WHERE user_id = ANY(%s)", [damaged]
    )
    error = shell.run("import-supertokens", url, code=1)
    assert "Go on with --after 'user 00699' after this error:" in error
    assert "the metadata of user 'user 00700' in app 'public' is damaged" in error
    assert list(read_all(shell.database)) == list(users)[:700]
    arguments = ("import-supertokens", url, "--skip-damaged", "--after", "user 00699")
    error = shell.run(*arguments, code=3)
    assert re.findall(r"the metadata of user '(.*?)' in app 'public' is damaged", error) == damaged
    assert "ssn" not in error
    assert "rows left out: 3" in error
    assert list(read_all(shell.database)) == [user for user in users if user not in damaged]


def test_exports_do_not_share_a_file(shell: Shell, tmp_path: Path) -> None:
    """Exports at the same time each write a whole file; a planted link is not followed."""
    fill(shell.database, 2500)
    target = tmp_path / "target"
    target.write_text("unharmed")
    for name in ("users.jsonl.part", "users.jsonl.tmp", "users.jsonl."):
        (tmp_path / name).symlink_to(target)
    command = [sys.executable, "-m", "usermetadata", "export", str(tmp_path / "users.jsonl")]
    command += ["--storage", str(shell.database)]
    exports = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [export.wait() for export in exports] == [0, 0, 0]
    assert len((tmp_path / "users.jsonl").read_text(encoding="utf-8").split("\n")) == 2501
    assert (tmp_path / "users.jsonl").stat().st_mode & 0o777 == 0o600
    assert target.read_text() == "unharmed"


def test_a_failed_export_leaves_the_last_one(shell: Shell, tmp_path: Path) -> None:
    """The file is replaced when all users are written; a failure leaves no temporary file."""
    fill(shell.database, 2500)
    file = tmp_path / "elsewhere.jsonl"
    (tmp_path / "users.jsonl").symlink_to(file)
    shell.run("export", "users.jsonl")
    whole = file.read_bytes()
    with closing(sqlite3.connect(shell.database)) as connection, connection:
        connection.execute("INSERT INTO user_metadata VALUES ('public', x'7e', '{}')")
    error = shell.run("export", "users.jsonl", code=1)
    assert "a user id in app 'public' is not text: b'~'; remove the row" in error
    assert file.read_bytes() == whole
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".db", ".jsonl", ".jsonl"]
    with closing(sqlite3.connect(shell.database)) as connection, connection:
        connection.execute("DELETE FROM user_metadata WHERE user_id = x'7e'")
        connection.execute("UPDATE user_metadata SET user_metadata = '{}'")
    shell.run("export", "users.jsonl")
    assert (tmp_path / "users.jsonl").is_symlink()
    assert len(file.read_bytes().splitlines()) == 2500
    assert file.read_bytes() != whole


def test_an_export_into_a_pipe(shell: Shell) -> None:
    """A file that is not a regular file is written to directly."""
    fill(shell.database, 1)
    assert shell.run_program("export", "/dev/stdout") == shell.run("export")


def test_an_export_of_a_storage_that_cannot_be_read(shell: Shell, tmp_path: Path) -> None:
    """An export that fails leaves the last export unchanged."""
    file = tmp_path / "file"
    file.write_text("the last export")
    nobody = "postgresql://127.0.0.1:1/nobody"
    assert "refused" in shell.run("export", "file", "--storage", nobody, code=1)
    assert file.read_text() == "the last export"


def test_an_export_is_private(shell: Shell, tmp_path: Path) -> None:
    """Only its owner can read a new file; a file that is replaced keeps its mode."""
    shell.run("set", "alice", "{}")
    shell.run("export", "new.jsonl")
    assert (tmp_path / "new.jsonl").stat().st_mode & 0o777 == 0o600
    (tmp_path / "new.jsonl").chmod(0o640)
    shell.run("export", "new.jsonl")
    assert (tmp_path / "new.jsonl").stat().st_mode & 0o777 == 0o640


def test_rows_of_other_programs_are_shown(shell: Shell) -> None:
    """A lone surrogate is shown and exported as an escape."""
    shell.run("set", "alice", '{"text": "?"}')
    with closing(sqlite3.connect(shell.database)) as connection, connection:
        connection.execute(r"""UPDATE user_metadata SET user_metadata = '{"text":"é\ud800"}'""")
    assert shell.run("get", "alice") == '{\n  "text": "\\u00e9\\ud800"\n}\n'
    line = shell.run("export")
    assert line == '{"userId":"alice","metadata":{"text":"\\u00e9\\ud800"}}\n'


def test_an_import_is_resumed(shell: Shell, tmp_path: Path) -> None:
    """The error names the line at fault, and the import can continue from there."""
    users = fill(tmp_path / "source.db", 2500)
    Shell(tmp_path / "source.db").run("export", "users.jsonl")
    lines = (tmp_path / "users.jsonl").read_text(encoding="utf-8").split("\n")
    broken = [*lines[:1700], '{"userId": 1}', *lines[1701:]]
    (tmp_path / "broken.jsonl").write_text("\n".join(broken), encoding="utf-8")
    error = shell.run("import", "broken.jsonl", code=2)
    assert "line 1701: is not" in error
    assert "Go on with --from-line 1001" in error
    assert len(read_all(shell.database)) == 1000
    with closing(sqlite3.connect(shell.database)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON user_metadata WHEN new.user_id > 'user 02100'"
            " BEGIN SELECT raise(ABORT, 'full'); END"
        )
    error = shell.run("import", "users.jsonl", code=1)
    assert "full" in error
    assert "Go on with --from-line 2001" in error
    with closing(sqlite3.connect(shell.database)) as connection:
        connection.execute("DROP TRIGGER full")
    shell.run("import", "users.jsonl", "--from-line", "2001")
    assert read_all(shell.database) == users


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"userId": "alice", "metadata": {}, "more": 1}', 'line 2: is not {"userId": "...", '),
        ('{"userId": "alice"}', 'line 2: is not {"userId": "...", '),
        ('["alice", {}]', 'line 2: is not {"userId": "...", '),
        ('{"userId": "", "metadata": {}}', "line 2: userId: is empty"),
        ('{"userId": "alice", "metadata": {"n": NaN}}', 'line 2["metadata"]["n"]: NaN is not JSON'),
    ],
)
def test_a_line_that_export_does_not_write(shell: Shell, line: str, message: str) -> None:
    """It is named, and nothing of its batch is stored."""
    lines = '{"userId": "bob", "metadata": {}}\n' + line
    assert message in shell.run("import", stdin=lines, code=2)
    assert read_all(shell.database) == {}


def test_a_cores_users_are_copied(shell: Shell, schema: str) -> None:
    """``import-supertokens`` reads the table of a core's PostgreSQL database."""
    url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
    users = {f"user {n:05}": {"n": n} for n in range(1200)}
    with closing(PostgresStorage(url)) as core:
        core.write([(user, Merge(users[user])) for user in users])
    with closing(SQLiteStorage(shell.database)) as storage:
        storage.write([])
    with closing(sqlite3.connect(shell.database)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON user_metadata WHEN new.user_id > 'user 01100'"
            " BEGIN SELECT raise(ABORT, 'full'); END"
        )
    assert "Go on with --after 'user 00999'" in shell.run("import-supertokens", url, code=1)
    assert list(read_all(shell.database)) == list(users)[:1000]
    with closing(sqlite3.connect(shell.database)) as connection:
        connection.execute("DROP TRIGGER full")
    shell.run("import-supertokens", url)
    assert read_all(shell.database) == users
    with closing(SQLiteStorage(shell.database)) as storage:
        storage.write([(user, Clear()) for user in users])
    shell.run("import-supertokens", url, "--after", "user 00999")
    assert list(read_all(shell.database)) == list(users)[1000:]
    error = shell.run("import-supertokens", url, "--table", "other", code=1)
    assert "has no table 'other', or no users in it; check --schema, --table" in error
    shell.run("set", "user 00000", '{"old": true}')
    shell.run("import-supertokens", server_url(), "--schema", schema)
    assert read_all(shell.database) == users
    with closing(PostgresStorage(url, table="other")) as other:
        assert other.read(["user 00000"]) == {}


def test_a_cores_user_with_the_value_of_another_stops_the_copy(shell: Shell, schema: str) -> None:
    """The error says who has the value of a unique index, and how to go on."""
    url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
    with closing(PostgresStorage(url)) as core:
        core.write([(f"user {n:05}", Merge({"n": n})) for n in range(1200)])
    with closing(SQLiteStorage(shell.database, indexes=[Index("n", unique=True)])) as storage:
        storage.write([("alice", Merge({"n": 1100}))])
    error = shell.run("import-supertokens", url, code=2)
    assert "user 'alice' has this value" in error
    assert "Go on with --after 'user 00999'" in error


def test_serve_answers_and_stops_when_told(shell: Shell) -> None:
    """A request under way is answered, its write is stored, and the file is closed."""
    options = ["--port", "0", "--log-level", "debug"]
    command = [sys.executable, "-m", "usermetadata", "serve", *options]
    environment = {
        **os.environ,
        "USERMETADATA_URL": f"sqlite:///{shell.database}",
        "USERMETADATA_API_KEYS": "another, the key",
    }
    fill(shell.database, 1)
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(server.kill)
        assert server.stderr is not None
        line = next(line for line in server.stderr if "running on" in line)
        port = int(line.split("127.0.0.1:")[1].split()[0])
        first, second = (
            stack.enter_context(closing(HTTPConnection("127.0.0.1", port, timeout=30)))
            for _ in range(2)
        )
        writer = stack.enter_context(closing(sqlite3.connect(shell.database)))
        writer.execute("BEGIN IMMEDIATE")
        for connection in (first, second):
            connection.request("GET", "/hello")
            connection.getresponse().read()
        body = json.dumps({"userId": "alice", "metadataUpdate": {"n": 1}})
        first.request("PUT", "/recipe/user/metadata", body, {"api-key": "the key"})
        # Once this is answered, the request before it has been read and waits for the writer.
        second.request("GET", "/hello")
        second.getresponse().read()
        server.send_signal(signal.SIGTERM)
        writer.rollback()
        writer.close()
        assert first.getresponse().status == 200
        _, log = server.communicate(timeout=30)
        assert "DEBUG:     PUT '/recipe/user/metadata': 200" in log
        assert server.returncode == 0
        assert os.listdir(shell.database.parent) == [shell.database.name]
    assert read_all(shell.database)["alice"] == {"n": 1}


# The plugin.


def test_sqlite_utils_has_the_commands(shell: Shell) -> None:
    """``sqlite-utils usermetadata`` has the same commands, on the named file."""
    command = [sys.executable, "-m", "sqlite_utils", "usermetadata"]
    command += ["update", "alice", '{"n": 1}', "--storage", str(shell.database)]
    assert json.loads(subprocess.check_output(command)) == {"n": 1}
    assert read_all(shell.database) == {"alice": {"n": 1}}


def test_sqlite_utils_has_the_merge_as_a_function(shell: Shell) -> None:
    """``merge_metadata(stored, update)`` in SQL, on every connection that sqlite-utils opens."""
    fill(shell.database, 1)
    query = """
        SELECT merge_metadata(user_metadata, '{"n": null, "new": 1}') AS merged,
            merge_metadata(NULL, '{"a": 1, "b": null}') AS first FROM user_metadata
    """
    command = [sys.executable, "-m", "sqlite_utils", "query", str(shell.database), query]
    [row] = json.loads(subprocess.check_output(command))
    assert json.loads(row["merged"]) == {"text": "é\u2028", "new": 1}
    assert row["first"] == '{"a":1}'
    changed = query.replace('"new": 1', '"new": 1e-999')  # a float would change it
    finished = subprocess.run([*command[:-1], changed], capture_output=True, check=False)
    assert finished.returncode == 1


@pytest.mark.parametrize("kind", STORAGES)
def test_every_storage_lists_its_users(kind: str, tmp_path: Path) -> None:
    """``read_after`` returns all users of its app, each once, in one order."""
    with open_storage(kind, tmp_path) as storage:
        assert isinstance(storage, ListingStorage)
        users = {f"user {n:02}": {"n": n} for n in range(25)}
        storage.write([(user, Merge(users[user])) for user in users])
        others = [(f"user 1{n:02}", Merge({"other": True})) for n in range(25)]
        storage.for_app("shop").write([("user 00", Merge({"other": True})), *others])
        found: dict[str, Any] = {}
        after = ""
        while batch := storage.read_after(after, 10):
            assert len(batch) <= 10
            assert not batch.keys() & found.keys()
            found |= batch
            after = list(batch)[-1]
        assert found == users

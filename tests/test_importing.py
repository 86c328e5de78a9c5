"""``import``: the exports of other products, CSV, gzip, merging, and invalid lines."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from click.testing import CliRunner
from postgres_server import server_url

from usermetadata import Index, PostgresStorage, SQLiteStorage
from usermetadata.changes import Merge
from usermetadata.cli import main

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import psycopg


class Imported(NamedTuple):
    """What an import left behind."""

    code: int
    stderr: str
    users: dict[str, Any]


def run(database: Path, content: str | bytes, *arguments: str) -> Imported:
    """Import a file, and read all users afterwards."""
    file = database.parent / "export"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["import", str(file), "--storage", str(database), *arguments]
    finished = CliRunner().invoke(main, command, catch_exceptions=False)
    assert finished.stdout == ""
    with closing(SQLiteStorage(database)) as storage:
        return Imported(finished.exit_code, finished.stderr, storage.read_after("", 10**6))


def store(database: Path, users: Mapping[str, dict[str, Any]]) -> None:
    """Store users before an import."""
    with closing(SQLiteStorage(database)) as storage:
        storage.write([(user_id, Merge(metadata)) for user_id, metadata in users.items()])


AUTH0 = """\
{"user_id":"auth0|1","email":"a@example.com","user_metadata":{"theme":"dark"},"app_metadata":{"plan":"pro"}}
{"Id":"google-oauth2|2","user_metadata":{},"app_metadata":{"plan":null,"seats":3}}
{"user_id":"auth0|3","email":"c@example.com"}
{"user_id":"auth0|4","user_metadata":{},"app_metadata":null}
"""
AUTH0_USERS = {
    "auth0|1": {"user_metadata": {"theme": "dark"}, "app_metadata": {"plan": "pro"}},
    "google-oauth2|2": {"app_metadata": {"plan": None, "seats": 3}},
}
# Auth0 writes an apostrophe before each string, so that a spreadsheet does not calculate it.
AUTH0_CSV = """\
"user_id","email","user_metadata.theme","user_metadata.address.city","app_metadata.seats","app_metadata.beta","created_at"
"'auth0|1","'a@example.com","'dark","'O""Hara, '5",3,true,"2026-01-02T03:04:05.678Z"
"'auth0|2","'b@example.com","'5",,,false,
"'auth0|3","'c@example.com",,,,,
"""
AUTH0_CSV_USERS = {
    "auth0|1": {
        "user_metadata": {"theme": "dark", "address": {"city": "O\"Hara, '5"}},
        "app_metadata": {"seats": 3, "beta": True},
    },
    "auth0|2": {"user_metadata": {"theme": "5"}, "app_metadata": {"beta": False}},
}
CLERK = """\
[
  {"id": "user_1", "first_name": "Ada", "public_metadata": {"plan": "pro"},
   "private_metadata": {"stripe_id": "cus_1"}, "unsafe_metadata": {}},
  {"id": "user_2", "publicMetadata": {"beta": true}, "unsafeMetadata": {"tour": [1, 2]}},
  {"id": "user_3", "public_metadata": {}, "private_metadata": null}
]
"""
CLERK_USERS = {
    "user_1": {
        "public_metadata": {"plan": "pro"},
        "private_metadata": {"stripe_id": "cus_1"},
    },
    "user_2": {"public_metadata": {"beta": True}, "unsafe_metadata": {"tour": [1, 2]}},
}
FIREBASE = """\
{"users": [
{
  "localId": "uid1",
  "email": "a@example.com",
  "customAttributes": "{\\"role\\":\\"admin\\",\\"name\\":\\"Zo\\u00eb\\",\\"old\\":null}"
},
{
  "localId": "uid2",
  "customAttributes": "{}"
},
{
  "localId": "uid3",
  "email": "c@example.com"
}]}
"""
FIREBASE_USERS = {"uid1": {"role": "admin", "name": "Zoë"}}
# As firebase-tools writes it: no header, 28 columns, and a comma at the end.
FIREBASE_CSV = f"""\
uid1,a@x,true,,,"Doe, Jane",{"," * 17}1704067200000,,,false,"{{""role"":""admin"",""n"":[1,2]}}",
uid2,b@example.com,false,,,,{"," * 17}1704067200000,,,,,
uid3,c@example.com,false,,,,{"," * 17}1704067200000,,,,
"""
FIREBASE_CSV_USERS = {"uid1": {"role": "admin", "n": [1, 2]}}
SUPERTOKENS = """\
{
  "users": [
    {"externalUserId": "1", "userMetadata": {"plan": "pro"}, "userRoles": [{"role": "x"}],
     "loginMethods": [{"recipeId": "emailpassword", "email": "a@example.com"}]},
    {"externalUserId": "2", "loginMethods": []}
  ]
}
"""
SUPERTOKENS_CSV = """\
app_id,user_id,user_metadata
public,1,"{""plan"": ""pro"", ""n"": [1, 2]}"
public,2,{}
"""
CSV = """\
user_id,plan,visits,zip,tags,note
1,pro,12,01067,"[""a"",""b""]","two
lines, and a comma"
2,free,,80331,,
3,,,,,
"""
CSV_USERS = {
    "1": {
        "plan": "pro",
        "visits": 12,
        "zip": "01067",
        "tags": ["a", "b"],
        "note": "two\nlines, and a comma",
    },
    "2": {"plan": "free", "zip": "80331"},
}
EXPORTS: dict[str, tuple[str, list[str], dict[str, Any], int]] = {
    "auth0": (AUTH0, [], AUTH0_USERS, 2),
    "auth0 csv": (AUTH0_CSV, [], AUTH0_CSV_USERS, 1),
    "auth0 array": (f"[{','.join(AUTH0.splitlines())}]", [], AUTH0_USERS, 2),
    "clerk": (CLERK, [], CLERK_USERS, 1),
    "firebase": (FIREBASE, [], FIREBASE_USERS, 2),
    "firebase csv": (FIREBASE_CSV, [], FIREBASE_CSV_USERS, 2),
    "supertokens": (SUPERTOKENS, [], {"1": {"plan": "pro"}}, 1),
    "supertokens csv": (SUPERTOKENS_CSV, [], {"1": {"plan": "pro", "n": [1, 2]}}, 1),
    "csv": (CSV, ["--json", "visits", "--json", "tags"], CSV_USERS, 1),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_imported(database: Path, name: str, *, packed: bool) -> None:
    """Ids and metadata are mapped, also from gzip; users without metadata are counted only."""
    content, options, users, empty = EXPORTS[name]
    data = gzip.compress(content.encode()) if packed else content.encode()
    imported = run(database, data, "--format", name.split(maxsplit=1)[0], *options)
    total = len(users) + empty
    without = "1 user" if empty == 1 else f"{empty} users"
    message = f"{total} users\n{without} without metadata: nothing stored for them\n"
    assert imported == (0, message, users)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_byte_order_mark_and_other_line_ends_are_accepted(database: Path, name: str) -> None:
    """An editor on Windows may have saved the file."""
    content, options, users, _ = EXPORTS[name]
    content = "\ufeff" + content.replace("\n", "\r\n")
    imported = run(database, content, "--format", name.split(maxsplit=1)[0], *options)
    assert imported.code == 0
    shown = json.dumps(imported.users).replace("\\r\\n", "\\n")
    assert json.loads(shown) == users


def test_the_table_of_a_core_is_imported_from_csv(
    database: Path, schema: str, direct: psycopg.Connection[Any]
) -> None:
    """``COPY`` of PostgreSQL writes what ``--format supertokens`` reads, exactly."""
    users: dict[str, dict[str, Any]] = {
        "1": {"quote": '"', "comma": ",\n", "n": 2**70, "f": 1e-7},
        "2, é": {"a": {"b": None}},
    }
    with closing(PostgresStorage(server_url(), schema=schema)) as core:
        core.write([(user_id, Merge(metadata)) for user_id, metadata in users.items()])
    with direct.cursor().copy("COPY user_metadata TO STDOUT (FORMAT csv, HEADER)") as copy:
        content = b"".join(copy)
    assert run(database, content, "--format", "supertokens") == (0, "2 users\n", users)


def test_a_file_of_export_may_be_packed(database: Path) -> None:
    """The own format is recognised in gzip, in one part or several, and ``{}`` is stored."""
    lines = ['{"userId": "a", "metadata": {"n": 1}}\n', '{"userId": "b", "metadata": {}}\n']
    packed = b"".join(gzip.compress(line.encode()) for line in lines)
    assert run(database, packed) == (0, "2 users\n", {"a": {"n": 1}, "b": {}})


def test_standard_input_may_be_packed(database: Path) -> None:
    """``import`` reads gzip from a pipe."""
    command = [sys.executable, "-m", "usermetadata", "import", "--storage", str(database)]
    line = gzip.compress(b'{"userId": "a", "metadata": {"n": 1}}')
    finished = subprocess.run(command, input=line, capture_output=True, check=True)
    assert finished.stderr == b"1 user\n"
    with closing(SQLiteStorage(database)) as storage:
        assert storage.read(["a"]) == {"a": {"n": 1}}


@pytest.mark.parametrize("damage", ["cut", "block", "checksum"])
def test_damaged_gzip_is_an_error(database: Path, damage: str) -> None:
    """A download that broke off is invalid input: one line, and where to go on; no traceback."""
    lines = "".join(f'{{"userId": "{n}", "metadata": {{}}}}\n' for n in range(3000))
    packed = gzip.compress(lines.encode())
    broken = {
        "cut": packed[:-200],
        "block": packed[:10] + b"\xff" * 10 + packed[20:],
        "checksum": packed[:-8] + bytes(8),
    }[damage]
    imported = run(database, broken)
    assert imported.code == 2
    assert "Error: the file: damaged gzip: " in imported.stderr
    assert "copy it again" in imported.stderr
    assert len(imported.users) % 1000 == 0
    assert ("Go on with --from-line" in imported.stderr) == (len(imported.users) > 0)


@pytest.mark.parametrize("name", ["usermetadata", "firebase"])
def test_merge_keeps_other_properties(database: Path, name: str) -> None:
    """With ``--merge`` root-level properties are overwritten or removed; without, all is new."""
    metadata = {"plan": "pro", "old": None}
    content = json.dumps({"userId": "a", "metadata": metadata})
    if name == "firebase":
        content = json.dumps({"users": [{"localId": "a", "customAttributes": str(metadata)}]})
        content = content.replace("'", '\\"').replace("None", "null")
    before: dict[str, dict[str, Any]] = {
        "a": {"plan": "free", "theme": "dark", "old": 1},
        "b": {"n": 1},
    }
    store(database, before)
    merged = run(database, content, "--format", name, "--merge")
    assert merged == (0, "1 user\n", {"a": {"plan": "pro", "theme": "dark"}, "b": {"n": 1}})
    replaced = run(database, content, "--format", name).users["a"]
    assert replaced.pop("old", None) is None
    assert replaced == {"plan": "pro"}


def test_a_value_in_csv_may_be_long(database: Path) -> None:
    """It may be longer than the 128 KiB that Python's module ``csv`` accepts by default."""
    text = "x" * 2**18
    assert run(database, f"id,n\na,{text}\n", "--format", "csv").users == {"a": {"n": text}}


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["replace", "merge"])
def test_a_value_that_is_not_unique_is_named(database: Path, merge: list[str]) -> None:
    """The error says which user has the value of another one; users without metadata count."""
    with closing(SQLiteStorage(database, indexes=[Index("role", unique=True)])) as storage:
        storage.write([("uid0", Merge({"role": "admin"}))])
    users: list[dict[str, Any]] = [{"localId": f"uid{n}"} for n in range(1, 4)]
    users[2]["customAttributes"] = '{"role": "admin"}'
    imported = run(database, json.dumps(users), "--format", "firebase", *merge)
    assert imported.code == 2
    assert "Error: user 3: property 'role': " in imported.stderr
    assert imported.users == {"uid0": {"role": "admin"}}


def test_users_without_metadata_keep_what_is_stored(database: Path) -> None:
    """An export without metadata removes nothing."""
    store(database, {"auth0|3": {"n": 1}})
    imported = run(database, AUTH0, "--format", "auth0")
    assert imported.users == AUTH0_USERS | {"auth0|3": {"n": 1}}


INVALID: dict[str, tuple[str | bytes, list[str]]] = {
    "usermetadata": (
        (
            '{"userId": "a", "metadata": {}}\n{"userId": 1, "metadata": {}}\nno JSON\n'
            '{"userId": "b", "metadata": {}}\n'
        ),
        ["line 2: userId: int is not str", "line 3: it is not JSON: "],
    ),
    "auth0": (
        (
            '{"user_id": "a", "app_metadata": {"n": 1}}\n{"user_id": "c", "app_metadata": [1]}\n'
            '{"email": "secret"}\n{"user_id": "d", "app_metadata": {"n": 1e-999}}\n[]\n'
            '{"user_id": "b", "user_metadata": {"n": 1}}\n'
        ),
        [
            "line 2: app_metadata: it is not an object",
            "line 3: user_id: NoneType is not str",
            'line 4["app_metadata"]["n"]: a float would change',
            "line 5: it is not an object",
        ],
    ),
    "clerk": (
        (
            '[{"id": "a", "public_metadata": {"n": 1}}, 5, {"id": "", "public_metadata": {"n": 1}},'
            ' {"id": "b", "public_metadata": {"n": 1}},'
            ' {"id": "c", "public_metadata": {"n": "secret\\ud800"}}]'
        ),
        [
            "user 2: it is not an object",
            "user 3: id: is empty",
            'user 5: metadata["public_metadata"]["n"]: a lone surrogate',
        ],
    ),
    "firebase": (
        (
            f'a{"," * 27}"{{""n"": 1}}",\nshort,secret\nc{"," * 27}secret,\n'
            f'b{"," * 27}"{{""n"": 1}}"\n'
        ),
        ["line 2: has 2 columns, not 28", "line 3: customAttributes: it is not JSON"],
    ),
    "supertokens": (
        (
            'app_id,user_id,user_metadata\npublic,a,"{""n"": 1}"\nshop,c,"{""n"": 1}"\n'
            'public,,"{""n"": 1}"\npublic,d,secret\npublic,e,[]\npublic,b,"{""n"": 1}"\n'
        ),
        [
            "line 3: app_id: it is not that of the rows before; export one app at a time",
            "line 4: user_id: is empty",
            "line 5: user_metadata: it is not JSON",
            "line 6: user_metadata: it is not an object",
        ],
    ),
    "csv": (
        b'id,n\na,1\nc,"1,\n2",secret\nd,secret\ne,1e-999\n\xe9,1\nb,1\n',
        [
            "line 3: it has 3 values for 2 columns; put quotes",
            "line 5: n: it is not JSON",
            "line 6: n: a float would change",
            "line 7: it is not UTF-8; save the file as UTF-8",
        ],
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_lines_are_left_out_if_asked(database: Path, name: str) -> None:
    """``--skip-invalid`` names each, without its values, stores the others, and exits with 3."""
    content, messages = INVALID[name]
    options = ["--format", name, *(["--json", "n"] if name == "csv" else [])]
    stopped = run(database, content, *options)
    assert (stopped.code, stopped.users) == (2, {})
    assert messages[0] in stopped.stderr
    imported = run(database, content, *options, "--skip-invalid")
    assert imported.code == 3
    assert sorted(imported.users) == ["a", "b"]
    *lines, users, error = imported.stderr.splitlines()
    assert len(lines) == len(messages)
    assert all(map(str.startswith, lines, messages)), lines
    assert users == "2 users"
    assert error == f"Error: rows left out: {len(messages)}; all others are done"
    assert "secret" not in stopped.stderr + imported.stderr


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("id,first_name\nuser_1,Ada\n", ["--format", "clerk"], "the dashboard's CSV has no"),
        ('{"users": []}\n', ["--format", "clerk"], "it is not a JSON array"),
        ("user_id,email\n'a,'b\n", ["--format", "auth0"], "no column is a field of user_metadata"),
        ("email,app_metadata.n\n", ["--format", "auth0"], "named user_id or Id"),
        ("n,plan\n", ["--format", "csv"], "line 1: no column is named user_id or userId or id"),
        ("id,n,n\n", ["--format", "csv"], "line 1: two columns are named 'n'; rename one"),
        ("id,n\n", ["--format", "csv", "--json", "m"], "line 1: no column is named m"),
        ("", ["--format", "csv"], "line 1: no column is named"),
        ("id,n\n".encode("utf-16"), ["--format", "csv"], "line 1: it is not UTF-8"),
        ("{}\n", ["--json", "m"], "--json: only the columns of --format csv are text"),
        ("1\t{}\n", ["--format", "supertokens"], "no column is named user_id"),
        ('{"users": [{"userMetadata": {}}]}', ["--format", "supertokens"], "no externalUserId"),
        ('[{"localId": "a"}', ["--format", "firebase"], "user 2: it is not JSON: "),
        ('{"all": [{"localId": "a"}]}', ["--format", "firebase"], "expected a JSON array of users"),
        ('[{"localId": "a"}] trailing', ["--format", "firebase"], "at character 19; check"),
        ("[" + "[" * 10**6, ["--format", "firebase"], "user 1: maximum recursion depth"),
        ('{"user_id": "a"}', [], "line 1: is not"),
    ],
)
def test_a_file_of_another_format_is_refused(
    database: Path, content: str | bytes, options: list[str], message: str
) -> None:
    """The error says what is missing and what to do; nothing is stored."""
    imported = run(database, content, *options)
    assert imported.code in {1, 2}
    assert message in imported.stderr
    assert imported.users == {}


def test_several_arrays_follow_each_other(database: Path) -> None:
    """Pages of an API, or files of 10,000 users, may be put together with ``cat``."""
    pages = [
        json.dumps({"users": [{"localId": user, "customAttributes": '{"n":1}'}]}) for user in "abc"
    ]
    imported = run(database, "\n".join([*pages, "[]"]), "--format", "firebase")
    assert imported == (0, "3 users\n", {user: {"n": 1} for user in "abc"})


@pytest.mark.parametrize("name", ["csv", "clerk"])
def test_an_import_of_another_format_is_resumed(database: Path, name: str) -> None:
    """``--from-line`` counts lines, in an array users; also if a value has several lines."""
    if name == "csv":
        rows = [f'{n:04},"two\nlines"\n' for n in range(1500)]
        good, bad = (
            "".join(["id,note\n", *rows[:1200], more, *rows[1200:]]) for more in ("", "x\n")
        )
        fault, resume = "line 2402: it has 1 values", "--from-line 2001"
    else:
        users = [f'{{"id": "{n:04}", "public_metadata": {{"n": 1}}}}' for n in range(1500)]
        good, bad = (f"[{','.join([*users[:1200], *x, *users[1200:]])}]" for x in ([], ["5"]))
        fault, resume = "user 1201: it is not an object", "--from-line 1001"
    stopped = run(database, bad, "--format", name)
    assert stopped.code == 2
    assert fault in stopped.stderr
    assert f"Go on with {resume} after this error" in stopped.stderr
    assert list(stopped.users) == [f"{n:04}" for n in range(1000)]
    resumed = run(database, good, "--format", name, *resume.split())
    assert (resumed.code, resumed.stderr) == (0, "500 users\n")
    assert list(resumed.users) == [f"{n:04}" for n in range(1500)]


@pytest.mark.parametrize("name", ["auth0", "csv"])
def test_lines_are_read_one_after_the_other(tmp_path: Path, name: str) -> None:
    """A file that is larger than the memory can be imported, also from gzip."""
    text = "x" * 3000
    line = {
        "auth0": f'{{"user_id": "a", "app_metadata": {{"n": "{text}"}}}}\n',
        "csv": f"a,{text}\n",
    }[name]
    with gzip.open(tmp_path / "large.gz", "wt", compresslevel=1) as file:
        file.write("user_id,n\n" if name == "csv" else "")
        for _ in range(16):
            file.write(line * 1000)  # 48 MB in all
    program = """
import resource
from usermetadata import SQLiteStorage
from usermetadata.cli import main

with open("/proc/self/statm") as mapped:
    limit = int(mapped.read().split()[0]) * resource.getpagesize() + 32 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""
    arguments = ["import", "large.gz", "--format", name, "--storage", "users.db"]
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (finished.returncode, finished.stderr) == (0, "16000 users\n")

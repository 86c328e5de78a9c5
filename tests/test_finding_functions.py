"""The functions that find users, in both facades, and the commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from postgres_server import empty_schema, server_url, with_parameters

import usermetadata
from usermetadata import (
    Index,
    InMemoryStorage,
    InvalidInputError,
    NotUniqueError,
    PostgresStorage,
    SQLiteStorage,
    UsageError,
    UserMetadata,
    UserMetadataOverrideConfig,
    syncio,
)
from usermetadata.cli import main

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from usermetadata.interfaces import RecipeInterface

INDEXES = [Index("plan"), Index("customer", unique=True)]


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[str, None, None]:
    """The URL of an empty store; each kind in turn."""
    if request.param == "memory":
        yield "memory://"
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/users.db"
    else:
        with empty_schema() as schema:
            yield with_parameters(server_url(), schema=schema)


def fill() -> None:
    """Store four users."""
    syncio.update_bulk_user_metadata(
        {
            "alice": {"plan": "pro", "customer": "c1", "n": 1},
            "bob": {"plan": "free", "customer": "c2"},
            "carol": {"plan": "pro", "n": 2},
            "dave": {"plan": True},
        }
    )


def test_users_are_found(facade: Any, url: str) -> None:
    """By one or several values, page by page, and by a unique value."""
    usermetadata.init(url, indexes=INDEXES)
    assert facade.list_user_metadata() == {}
    assert facade.count_user_metadata() == 0
    fill()
    assert list(facade.list_user_metadata()) == ["alice", "bob", "carol", "dave"]
    assert list(facade.list_user_metadata(after="alice", limit=2)) == ["bob", "carol"]
    assert list(facade.list_user_metadata(after="bob" * 100, limit=10**30)) == ["carol", "dave"]
    assert list(facade.list_user_metadata({"plan": "pro"}, limit=10**30)) == ["alice", "carol"]
    found = facade.list_user_metadata({"plan": "pro"})
    assert {user_id: each.metadata["plan"] for user_id, each in found.items()} == {
        "alice": "pro",
        "carol": "pro",
    }
    assert list(facade.list_user_metadata({"plan": "pro", "n": 2})) == ["carol"]
    assert facade.list_user_metadata({"plan": 1}) == {}
    assert list(facade.list_user_metadata({"plan": True})) == ["dave"]
    assert facade.count_user_metadata({"plan": "pro"}) == 2
    assert facade.count_user_metadata() == 4
    assert facade.find_user_id({"customer": "c2"}) == "bob"
    assert facade.find_user_id({"customer": "c2", "plan": "pro"}) is None
    assert facade.find_user_id({"customer": "c3"}) is None
    facade.clear_user_metadata("bob")
    assert facade.find_user_id({"customer": "c2"}) is None


def test_a_unique_value_is_refused(facade: Any, url: str) -> None:
    """The error names the property and the user, never the value; a swap works."""
    usermetadata.init(url, indexes=INDEXES)
    fill()
    writes: list[Any] = [
        partial(facade.update_user_metadata, "bob", {"customer": "c1"}),
        partial(facade.set_user_metadata, "new", {"customer": "c1"}),
        partial(facade.modify_user_metadata, "bob", lambda old: {**old, "customer": "c1"}),
        partial(facade.update_bulk_user_metadata, {"x": {"n": 1}, "bob": {"customer": "c1"}}),
    ]
    for refused in writes:
        with pytest.raises(NotUniqueError, match="property 'customer': user 'alice' has") as caught:
            refused()
        assert isinstance(caught.value, ValueError)
        assert (caught.value.name, caught.value.user_id) == ("customer", "alice")
        assert "c1" not in str(caught.value)
    assert facade.get_bulk_user_metadata(["x", "new"])["x"].metadata == {}
    facade.update_bulk_user_metadata({"alice": {"customer": "c2"}, "bob": {"customer": "c1"}})
    assert facade.find_user_id({"customer": "c1"}) == "bob"


def test_wrong_questions_are_refused(facade: Any, url: str) -> None:
    """The error says what is wrong, and what to declare."""
    usermetadata.init(url, indexes=INDEXES)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (partial(facade.list_user_metadata, {"n": 1}), UsageError, r"indexes=\[Index\('n'\)\]"),
        (partial(facade.count_user_metadata, {"n": 1}), UsageError, "none of its properties"),
        (partial(facade.find_user_id, {"plan": "pro"}), UsageError, r"Index\('plan', unique=True"),
        (partial(facade.list_user_metadata, {}), InvalidInputError, "where: it is empty"),
        (partial(facade.list_user_metadata, "plan"), InvalidInputError, "where: str is not a"),
        (partial(facade.list_user_metadata, {"plan": 1.5}), InvalidInputError, "float is neither"),
        (partial(facade.list_user_metadata, {"plan": None}), InvalidInputError, "NoneType is"),
        (partial(facade.list_user_metadata, {"plan": "x" * 256}), InvalidInputError, "255 char"),
        (partial(facade.list_user_metadata, limit=0), InvalidInputError, "limit: 0 is not 1"),
        (partial(facade.list_user_metadata, limit=True), InvalidInputError, "limit: True is not"),
        (partial(facade.list_user_metadata, after=3), InvalidInputError, "after: int is not str"),
        (partial(facade.list_user_metadata, after="a\0"), InvalidInputError, "after: .* U.0000"),
        (partial(facade.list_user_metadata, after="\ud800"), InvalidInputError, "after: .* lone"),
        (
            partial(facade.update_user_metadata, "alice", {"plan": ["pro"]}),
            InvalidInputError,
            "property 'plan' has an index, and list is neither",
        ),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
    assert facade.count_user_metadata() == 0


@pytest.mark.parametrize("indexes", ["plan", [7], [Index("plan"), Index("plan", unique=True)]])
def test_wrong_indexes_are_refused(indexes: Any) -> None:
    """``init`` and each storage say what is wrong."""
    makers: list[Any] = [
        partial(usermetadata.init, "memory://", indexes=indexes),
        partial(UserMetadata, "users.db", indexes=indexes),
        partial(InMemoryStorage, indexes=indexes),
        partial(SQLiteStorage, "users.db", indexes=indexes),
        partial(PostgresStorage, "postgresql://x", indexes=indexes),
    ]
    for make in makers:
        with pytest.raises(InvalidInputError, match="indexes: "):
            make()
    with pytest.raises(InvalidInputError, match="pass them to its constructor"):
        UserMetadata(InMemoryStorage(), indexes=[Index("plan")])


@pytest.mark.parametrize("name", ["", "a" * 65, 'a"b', "a\\b", "é", "a\nb", 7])
def test_wrong_names_are_refused(name: Any) -> None:
    """A name is 1 to 64 printable ASCII characters without quotation marks and backslashes."""
    with pytest.raises(InvalidInputError, match="cannot be the name of an index"):
        Index(name)


@pytest.mark.parametrize("unique", ["customer", 1, None])
def test_an_index_is_of_one_property(unique: Any) -> None:
    """A second name in place of ``unique`` is refused, and makes no unique index."""
    with pytest.raises(InvalidInputError, match=r"Index\('plan'\): unique is of type"):
        Index("plan", unique)


def test_finding_passes_through_overrides(facade: Any) -> None:
    """The arguments come by position, ``user_context`` last."""
    seen: list[tuple[Any, ...]] = []

    async def spy(name: str, real: Any, *arguments: Any) -> Any:
        seen.append((name, *arguments))
        return await real(*arguments)

    def functions(original: RecipeInterface) -> RecipeInterface:
        for name in ("list_user_metadata", "count_user_metadata", "find_user_id"):
            setattr(original, name, partial(spy, name, getattr(original, name)))
        return original

    override = UserMetadataOverrideConfig(functions=functions)
    usermetadata.init("memory://", override, indexes=INDEXES)
    facade.list_user_metadata({"plan": "pro"}, {"request": 7}, after="a", limit=3)
    facade.count_user_metadata(user_context={"request": 7})
    facade.find_user_id({"customer": "c"}, {"request": 7})
    assert seen == [
        ("list_user_metadata", {"plan": "pro"}, "a", 3, {"request": 7}),
        ("count_user_metadata", None, {"request": 7}),
        ("find_user_id", {"customer": "c"}, {"request": 7}),
    ]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_block_finds_what_it_has_written(kind: str, database: Path, schema: str) -> None:
    """In the caller's transaction; a refused value leaves the transaction usable."""
    with contextlib.ExitStack() as stack:
        connection: Any
        if kind == "sqlite":
            users = UserMetadata(database, indexes=INDEXES)
            users.syncio.update_user_metadata("alice", {"customer": "c1"})
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(database)))
        else:
            url = with_parameters(server_url(), schema=schema)
            users = UserMetadata(url, indexes=INDEXES)
            users.syncio.update_user_metadata("alice", {"customer": "c1"})
            connection = stack.enter_context(psycopg.connect(server_url()))
        stack.enter_context(users)
        with users.within(connection) as metadata:
            metadata.update_user_metadata("bob", {"customer": "c2"})
            assert metadata.find_user_id({"customer": "c2"}) == "bob"
            with pytest.raises(NotUniqueError):
                metadata.update_user_metadata("bob", {"customer": "c1"})
            metadata.update_user_metadata("bob", {"n": 1})
        connection.rollback()
        assert users.syncio.find_user_id({"customer": "c2"}) is None
        assert users.syncio.count_user_metadata() == 1


def test_a_refused_task_fails_alone(url: str) -> None:
    """Concurrent updates that share a batch with it are stored."""

    async def main() -> None:
        async with UserMetadata(url, indexes=INDEXES) as users:
            await users.asyncio.update_user_metadata("alice", {"customer": "c0"})
            updates = [
                users.asyncio.update_user_metadata(f"user {n}", {"customer": f"c{n}"})
                for n in range(16)
            ]
            outcomes = await asyncio.gather(*updates, return_exceptions=True)
            kinds = ["NotUniqueError"] + ["MetadataResult"] * 15
            assert [type(outcome).__name__ for outcome in outcomes] == kinds
            assert await users.asyncio.count_user_metadata() == 16

    asyncio.run(main())


ROUNDS = 100  # of 8 processes; 500 take 8 s on SQLite and 18 s on PostgreSQL
RACE = """
import json, multiprocessing, sys
import psycopg, sqlite_utils
import usermetadata
from usermetadata import Index, NotUniqueError
from usermetadata.syncio import update_user_metadata

url, processes, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(processes)

def race(who, answer):
    usermetadata.init(url, indexes=[Index("customer", unique=True)] if who else [])
    owners = []
    for number in range(rounds):
        # Not each time: SQLite's writers poll for the lock, and the slowest would set the pace.
        if number % 5 == 0:
            barrier.wait(60)
        user_id = f"{who} {number}"
        try:
            update_user_metadata(user_id, {"customer": number})
            owners.append(user_id)
        except NotUniqueError as error:
            owners.append([error.name, error.user_id])
    usermetadata.close()
    answer.send(owners)

answers = []
for who in range(processes):
    answer, send = fork.Pipe(duplex=False)
    answers.append(answer)
    fork.Process(target=race, args=(who, send)).start()
    send.close()  # else the end of the process would not be seen
print(json.dumps([answer.recv() for answer in answers]))
"""


@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
def test_processes_race_for_values(url: str) -> None:
    """Of 8 processes that want a value exactly one gets it, and the others are told who.

    One of them does not declare the index.
    """
    usermetadata.init(url, indexes=INDEXES[1:])
    syncio.update_user_metadata("first", {})
    command = [sys.executable, "-W", "error", "-c", RACE, url, "8", str(ROUNDS)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True)
    for number, outcomes in enumerate(zip(*json.loads(finished.stdout), strict=True)):
        [winner] = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert outcomes.count(["customer", winner]) == 7
        assert syncio.find_user_id({"customer": number}) == winner
    assert syncio.count_user_metadata() == ROUNDS + 1


class Finding(RuleBasedStateMachine):
    """Compares a store with a plain dictionary."""

    users: UserMetadata[dict[str, Any], dict[str, Any]]
    values = st.sampled_from(["a", "A", "1", 1, 0, True, False, "", "é"])
    ids = st.sampled_from(["alice", "bob", "Carol", "dave"])

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, dict[str, Any]] = {}
        for user_id in self.users.syncio.list_user_metadata():
            self.users.syncio.clear_user_metadata(user_id)

    def _store(self, changed: dict[str, dict[str, Any]], write: Any) -> None:
        after = {**self.model, **changed}
        owned = [repr(each["customer"]) for each in after.values() if "customer" in each]
        if len(owned) == len(set(owned)):
            write()
            self.model = after
        else:
            with pytest.raises(NotUniqueError):
                write()

    @rule(user_id=ids, plan=values, customer=st.none() | values)
    def update(self, user_id: str, plan: Any, customer: Any) -> None:
        """Update one user."""
        update = {"plan": plan, "customer": customer}
        merged = {**self.model.get(user_id, {}), **update}
        new = {name: value for name, value in merged.items() if value is not None}
        self._store({user_id: new}, lambda: self.users.syncio.update_user_metadata(user_id, update))

    @rule(one=ids, other=ids)
    def swap(self, one: str, other: str) -> None:
        """Let two users exchange their values."""
        a, b = (self.model.get(each, {}).get("customer") for each in (one, other))
        updates = {one: {"customer": b}, other: {"customer": a}}
        changed = {
            user_id: {
                name: value
                for name, value in {**self.model.get(user_id, {}), **update}.items()
                if value is not None
            }
            for user_id, update in updates.items()
        }
        self._store(changed, lambda: self.users.syncio.update_bulk_user_metadata(updates))

    @rule(user_id=ids)
    def clear(self, user_id: str) -> None:
        """Remove one user."""
        self.users.syncio.clear_user_metadata(user_id)
        self.model.pop(user_id, None)

    @rule(plan=values)
    def find(self, plan: Any) -> None:
        """Find users by a value."""
        expected = sorted(
            user_id
            for user_id, metadata in self.model.items()
            if "plan" in metadata and repr(metadata["plan"]) == repr(plan)
        )
        assert list(self.users.syncio.list_user_metadata({"plan": plan})) == expected
        assert self.users.syncio.count_user_metadata({"plan": plan}) == len(expected)

    @rule(customer=values)
    def find_one(self, customer: Any) -> None:
        """Find the user who has a unique value."""
        owners = [
            user_id
            for user_id, metadata in self.model.items()
            if "customer" in metadata and repr(metadata["customer"]) == repr(customer)
        ]
        found = self.users.syncio.find_user_id({"customer": customer})
        assert found == (owners[0] if owners else None)

    @invariant()
    def the_same_users(self) -> None:
        """The pages have all users."""
        first = self.users.syncio.list_user_metadata(limit=2)
        last = list(first)[-1] if first else ""
        rest = self.users.syncio.list_user_metadata(after=last) if first else {}
        listed = {user_id: each.metadata for user_id, each in {**first, **rest}.items()}
        assert listed == self.model


def test_a_store_behaves_like_a_dictionary(url: str) -> None:
    """Updates, swaps, clears, pages and questions in any order; uniqueness is never broken."""
    with UserMetadata(url, indexes=INDEXES) as users:
        machine = type("Machine", (Finding,), {"users": users})
        checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=15, stateful_step_count=25, suppress_health_check=checks
            ),
        )


def run(*arguments: str, code: int = 0) -> str:
    """Run a command; return what it shows."""
    finished = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert finished.exit_code == code, finished.output
    return finished.stdout if code == 0 else finished.stderr


def test_the_commands(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``index`` builds, shows and drops; ``list``, ``count`` and ``find`` ask."""
    monkeypatch.setenv("USERMETADATA_URL", f"sqlite:///{database}")
    usermetadata.init()
    fill()
    usermetadata.close()
    advice = (
        "none of the properties has an index; build one, for example with `python -m usermetadata"
    )
    assert f"{advice} index --index plan`" in run("list", "--where", "plan=pro", code=1)
    built = [json.loads(line) for line in run("index", "--index", "plan").splitlines()]
    assert built == [{"name": "plan", "unique": False}]
    assert len(run("index", "--unique", "customer").splitlines()) == 2
    lines = [json.loads(line) for line in run("list", "--where", "plan=pro").splitlines()]
    assert [line["userId"] for line in lines] == ["alice", "carol"]
    assert lines[0]["metadata"] == {"plan": "pro", "customer": "c1", "n": 1}
    assert len(run("list").splitlines()) == 4
    assert len(run("list", "--limit", "2", "--after", "alice").splitlines()) == 2
    assert run("count") == "4\n"
    assert run("count", "--where", "plan=true") == "1\n"
    assert run("count", "--where", 'plan="pro"', "--where", "n=2") == "1\n"
    assert run("find", "--where", "customer=c2") == "bob\n"
    for text in ("NaN", "-Infinity", "[NaN]", "007"):  # they are no JSON
        assert run("count", "--where", f"plan={text}") == "0\n"
    shown = run("count", "--where", "plan=5.0", code=2)
    assert "where['plan']: float is neither a text, an integer nor a boolean" in shown
    assert "no user has these values" in run("find", "--where", "customer=c9", code=1)
    assert "index --unique plan`" in run("find", "--where", "plan=pro", code=1)
    assert "Missing option '--where'" in run("find", code=2)
    assert "--where: it has no =" in run("count", "--where", "plan", code=2)
    both = ("--where", "plan=pro", "--where", "plan=free")
    assert "--where plan: it has two values" in run("count", *both, code=2)
    assert "--where plan: Exceeds the limit" in run(
        "count", "--where", f"plan={'1' * 5000}", code=2
    )
    assert run("index", "--drop", "plan") == '{"name": "customer", "unique": true}\n'


def test_the_command_names_rows_in_the_way(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users are named, never the value, and nothing is built."""
    monkeypatch.setenv("USERMETADATA_URL", f"sqlite:///{database}")
    usermetadata.init()
    syncio.update_bulk_user_metadata(
        {"alice": {"plan": 1.5}, "bob": {"plan": ["secret"]}, "carol": {"plan": "secret"}}
    )
    syncio.update_user_metadata("dave", {"plan": "secret"})
    usermetadata.close()
    shown = run("index", "--unique", "plan", code=1)
    assert "'alice'" in shown
    assert "'bob'" in shown
    assert "user 'dave': property 'plan' has the same value as that of user 'carol'" in shown
    assert "rows in the way: 3; nothing was built" in shown
    assert "secret" not in shown
    assert run("index") == ""
    assert "there is no file missing.db" in run("index", "--storage", "missing.db", code=2)


@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize(
    "command",
    [
        ("update", "alice", '{"plan": 1.5}'),
        ("set", "alice", '{"plan": 1.5}'),
        ("import", "file"),
        ("import", "--format", "csv", "--json", "plan", "--merge", "table"),
    ],
    ids=["update", "set", "import", "merge"],
)
def test_commands_store_what_can_be_found(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """A command that stores a value that cannot be indexed is refused where there is an index."""
    usermetadata.init(url, indexes=INDEXES)
    fill()
    usermetadata.close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text('{"userId": "alice", "metadata": {"plan": 1.5}}\n')
    (tmp_path / "table").write_text("user_id,plan\nalice,1.5\n")
    assert "property 'plan' has an index, and float" in run(*command, "--storage", url, code=2)
    assert run("count", "--where", "plan=pro", "--storage", url) == "2\n"


LINES = [{"userId": f"user {n}", "metadata": {"customer": n}} for n in range(3)]


@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize(
    ("user_id", "customer", "line"),
    [("user 1", "c1", 2), ("user 1", 2, 3), ("user 1", True, 0), ("alice", 2, 3), ("alice", 7, 0)],
)
def test_an_import_names_the_line_that_is_not_unique(
    url: str, tmp_path: Path, user_id: str, customer: Any, line: int
) -> None:
    """The error says which line has the value of another user; users may exchange values."""
    usermetadata.init(url, indexes=INDEXES)
    fill()
    usermetadata.close()
    file = tmp_path / "users.jsonl"
    lines = [*LINES]
    if user_id == "alice":
        lines[0] = {"userId": user_id, "metadata": {"customer": customer}}
    else:
        lines[1] = {"userId": user_id, "metadata": {"customer": customer}}
    file.write_text("\n".join(map(json.dumps, lines)))
    shown = run("import", str(file), "--storage", url, code=2 if line else 0)
    assert f"line {line}: property 'customer': " in shown if line else shown == ""


@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
def test_an_import_leaves_out_what_cannot_be_found(url: str, tmp_path: Path) -> None:
    """``--skip-invalid`` names the line of a value that cannot be indexed, and goes on.

    A null, which another program has stored and ``export`` has written, counts as absent.
    """
    usermetadata.init(url, indexes=INDEXES)
    fill()
    usermetadata.close()
    rows: list[Any] = [{"plan": "pro"}, {"plan": [1]}, {"plan": None, "n": 9}]
    lines = [json.dumps({"userId": f"new {n}", "metadata": row}) for n, row in enumerate(rows, 1)]
    (tmp_path / "users.jsonl").write_text("\n".join(lines))
    file = str(tmp_path / "users.jsonl")
    assert "line 2: metadata of user 'new 2'" in run("import", file, "--storage", url, code=2)
    assert run("count", "--where", "plan=pro", "--storage", url) == "2\n"
    shown = run("import", file, "--skip-invalid", "--storage", url, code=3)
    assert "line 2: metadata of user 'new 2': property 'plan' has an index, and list" in shown
    listed = run("list", "--after", "new", "--storage", url).splitlines()
    assert [json.loads(line)["metadata"] for line in listed] == [rows[0], rows[2]]

"""Every example in the README, in ``docs/`` and in docstrings shows the right results."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import itertools
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest
from click.testing import CliRunner
from conftest import FUNCTIONS
from postgres_server import OwnServer, empty_schema, server_url
from psycopg.conninfo import make_conninfo
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import usermetadata
from usermetadata import Index, PostgresStorage, StorageError, UserMetadata, syncio
from usermetadata.changes import Merge
from usermetadata.cli import main

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"  # test_tutorial.py follows it
MODULES = ["usermetadata"] + [
    module.name
    for module in pkgutil.walk_packages(usermetadata.__path__, "usermetadata.")
    if module.name != "usermetadata.__main__"
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Run examples in an empty folder and with an empty database."""
    monkeypatch.chdir(tmp_path)
    with empty_schema() as schema:
        url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
        monkeypatch.setenv("DATABASE_URL", url)
        yield
        usermetadata.UserMetadataRecipe.reset()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != TUTORIAL], ids=lambda page: page.name
)
def test_the_examples_of_a_page_run(page: Path) -> None:
    """Every Python block of a page runs, from top to bottom, and shows the right results."""
    for example in Document.parse(str(page), PythonCodeBlockParser()).examples():
        example.evaluate()


POSTGRESQL = ROOT / "docs/postgresql.md"  # its commands and its SQL run together, on a server
COMMANDS = [
    page
    for page in PAGES
    if page not in (POSTGRESQL, TUTORIAL) and "\n$ " in page.read_text(encoding="utf-8")
]


def commands_of(block: str) -> list[tuple[str, str]]:
    """Return the commands of a block, each with what it shows."""
    return re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def output_of(command: str, **variables: str) -> str:
    """Run a command as a reader does, and return what it prints."""
    program, *arguments = shlex.split(command)
    if program == "usermetadata" and not variables and not set(command) & set("|<>;&$`"):
        # In this process it takes a tenth of the time.
        unset: dict[str, str | None] = {"USERMETADATA_URL": None}
        return CliRunner().invoke(main, arguments, env=unset, catch_exceptions=False).output
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: os.environ[name] for name in os.environ if name != "USERMETADATA_URL"}
    return subprocess.run(
        ["sh", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**environment, "PATH": path, **variables},
    ).stdout


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    """Each command after ``$`` prints what is shown, with the files that the page shows."""
    text = page.read_text(encoding="utf-8")
    for name, content in re.findall(
        r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for block in re.findall(r"^```console\n(\$ .*?)^```", text, re.DOTALL | re.MULTILINE):
        for command, shown in commands_of(block):
            assert output_of(command) == shown, command


def test_the_page_on_postgresql_runs_while_a_program_uses_the_table() -> None:
    """Its commands and statements run in order; the role that it creates may use all functions."""
    server = OwnServer()
    text = POSTGRESQL.read_text(encoding="utf-8")
    program = UserMetadata(
        PostgresStorage(make_conninfo(server.url, user="app"), indexes=[Index("plan")])
    )
    functions = program.syncio
    is_role_ready = False
    with program, psycopg.connect(server.url, autocommit=True) as owner:
        for kind, block in re.findall(
            r"^```(console|sql)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        ):
            for command, shown in commands_of(block):
                output = output_of(command, DATABASE_URL=server.url)
                assert output.replace(f"{server.folder}/postgres", "db.internal/shop") == shown
            for statement in block.split(";\n") if kind == "sql" else []:
                owner.execute(statement.encode())
                is_role_ready |= "user_metadata_index_entries TO app" in statement
                if is_role_ready:
                    functions.update_bulk_user_metadata({"alice": {"plan": "pro"}, "bob": {}})
                    functions.modify_user_metadata("alice", lambda found: {**found, "n": 1})
                    assert [*functions.list_user_metadata({"plan": "pro"})] == ["alice"]
                    assert functions.erase_user("alice", all_apps=True).metadata["n"] == 1
        assert is_role_ready
        with pytest.raises(StorageError, match="permission denied"):
            PostgresStorage(make_conninfo(server.url, user="app"), table="other").write(
                [("alice", Merge({}))]
            )
    server.stop()


def test_the_export_from_supabase_writes_what_the_page_shows() -> None:
    """The queries read the columns of ``auth.users``; the format of ``export`` is imported."""
    text = (ROOT / "docs/moving-from-others.md").read_text(encoding="utf-8")
    files: dict[str, str] = dict(
        re.findall(r"^`(supabase\.\w+)`:\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    )
    to_csv, to_import = re.findall(
        r"^```console\n(psql \"\$SUPA.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    Path("supabase.sql").write_text(files["supabase.sql"], encoding="utf-8")
    server = OwnServer()
    programs = [str(Path(sys.executable).parent), str(server.programs), os.environ["PATH"]]
    variables = {"SUPABASE_DB_URL": server.url, "PATH": os.pathsep.join(programs)}
    with psycopg.connect(server.url, autocommit=True) as owner:
        owner.execute("CREATE SCHEMA auth")
        owner.execute(
            "CREATE TABLE auth.users (id uuid PRIMARY KEY, email text, raw_user_meta_data jsonb,"
            " raw_app_meta_data jsonb, deleted_at timestamptz)"
        )
        owner.execute(
            "INSERT INTO auth.users (id, raw_user_meta_data, raw_app_meta_data, deleted_at) VALUES"
            " (%s, %s, %s, NULL), (%s, NULL, NULL, NULL), (%s, NULL, '{}', now())",
            [
                "6f1c7a52-0d7a-4c1e-9a53-1d2f6a0b7c01",
                '{"theme": "dark"}',
                '{"plan": "pro", "provider": "email", "providers": ["email"]}',
                "6f1c7a52-0d7a-4c1e-9a53-1d2f6a0b7c02",
                "6f1c7a52-0d7a-4c1e-9a53-1d2f6a0b7c03",
            ],
        )
    assert output_of(to_csv, **variables) == ""
    assert Path("supabase.csv").read_text(encoding="utf-8") == files["supabase.csv"]
    assert output_of(to_import, **variables) == "2 users\n"
    usermetadata.init()
    users = syncio.list_user_metadata().values()
    assert [user.metadata for user in users] == [{"plan": "pro"}, {}]
    server.stop()


def test_the_pages_show_commands() -> None:
    """The test above finds the pages."""
    assert {"command-line.md", "moving-from-others.md"} <= {page.name for page in COMMANDS}


def test_the_test_in_the_readme_runs_as_it_is_copied(tmp_path: Path) -> None:
    """It needs nothing but the library and pytest, in an empty folder."""
    [block] = re.findall(
        r"^## In tests\n.*?```python\n(.*?)```", README.read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "test_theme.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:hypothesispytest"]
    shown = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert "1 passed" in shown


def test_the_pages_have_examples() -> None:
    """The test above finds the examples."""
    pages = [Document.parse(str(page), PythonCodeBlockParser()) for page in PAGES]
    examples = [len(list(page.examples())) for page in pages]
    assert sum(examples) > 30
    assert examples[0] > 5


def test_the_index_links_to_every_page() -> None:
    """Also on GitHub, which does not show the table of contents."""
    linked = re.findall(r"\]\((.*?)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8"))
    assert sorted(linked) == [page.name for page in PAGES[1:] if page.name != "index.md"]


def test_every_picture_has_dark_colours_and_an_alternative_text() -> None:
    """A picture fits dark pages, and a screen reader can describe it."""
    included = sorted((ROOT / "docs/_static/benchmarks").glob("*.md"))
    alternatives = {
        (page.parent / picture).resolve(): alternative
        for page in [*PAGES, *included]
        for alternative, picture in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text("utf-8"))
    }
    pictures = sorted((ROOT / "docs/_static").rglob("*.svg"))
    assert pictures == sorted(alternatives)
    for picture in pictures:
        assert alternatives[picture]
        assert "@media (prefers-color-scheme: dark)" in picture.read_text("utf-8")


class _Await:
    """Replaces ``await`` outside a coroutine."""

    def __matmul__(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(coroutine)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    """The examples of docstrings show the right results, on a fresh in-memory store."""
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module, name):
        usermetadata.UserMetadataRecipe.reset()
        if name.endswith("io"):
            usermetadata.init("memory://")
        for example in test.examples:
            example.source = example.source.replace("await ", "AWAIT @ ")
        test.globs["AWAIT"] = _Await()
        results = doctest.DocTestRunner().run(test)
        assert results.failed == 0, test.name


def test_public_functions_have_examples() -> None:
    """Every function in the reference has an example."""
    for name in FUNCTIONS:
        assert ">>>" in getattr(syncio, name).__doc__


def test_the_quickstart_prints_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    """A second run continues to count visits: the metadata was kept in the file."""
    for visits in (1, 2):
        runpy.run_path(str(ROOT / "docs/examples/quickstart.py"))
        usermetadata.UserMetadataRecipe.reset()
        alice = {"theme": "dark", "notifications": {"sms": True}, "visits": visits}
        assert capsys.readouterr().out == f"alice: {alice}\nbob: {{}}\n"


def test_the_readme_shows_it_by_line_40() -> None:
    """The first 40 lines show how to install and run the library, and results."""
    start = "\n".join(README.read_text(encoding="utf-8").splitlines()[:40])
    assert "pip install . && python docs/examples/quickstart.py" in start
    assert ">>> update_user_metadata(" in start


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("usermetadata.storage.postgres", "psycopg", "postgres"),
        ("usermetadata.server", "starlette", "server"),
        ("usermetadata._core.http", "httptools", "server"),
        ("usermetadata.supertokens", "supertokens_python", "supertokens"),
    ],
)
def test_a_missing_package_is_named_with_a_command(module: str, missing: str, extra: str) -> None:
    """The command installs what the extra does, also where no index has this library."""
    program = f"""
import sys
import tomllib
sys.modules[{missing!r}] = None
try:
    import {module}
except ImportError as error:
    print(error)
"""
    message = subprocess.check_output([sys.executable, "-c", program], text=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command = shlex.split(message.partition("pip install ")[2])
    extras = project["optional-dependencies"]
    installed = {*extras[extra]}
    if "usermetadata[fast]" in installed:
        installed ^= {"usermetadata[fast]", *extras["fast"]}
    assert {*command} == installed


def test_no_page_installs_from_an_index() -> None:
    """The pages' commands work in a checkout: the library is on no index."""
    for page in PAGES:
        assert "pip install 'usermetadata" not in page.read_text(encoding="utf-8"), page.name


def test_no_page_shows_a_key_in_a_command() -> None:
    """Commands take keys from the environment: arguments are in the list of processes."""
    for page in PAGES:
        for block in re.findall(
            r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            assert "--api-key" not in block, page.name
            assert not re.search(r"://\w+:[^@\s]+@", block), page.name


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution has no .ci")
def test_the_commands_that_ci_takes_from_pages_are_there() -> None:
    """``.ci/run`` executes commands as pages show them; without the command it would stop."""
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = re.findall(r"""grep -F (['"])(.+?)\1 ([\w/]+\.md)""", run)
    assert len(commands) == 2
    for _, command, page in commands:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        assert len([line for line in lines if command in line]) == 1, command


def test_one_file_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the quickstart, ``init()`` and the command line find what it has stored."""
    monkeypatch.delenv("USERMETADATA_URL", raising=False)
    runpy.run_path(str(ROOT / "docs/examples/quickstart.py"))
    usermetadata.UserMetadataRecipe.reset()
    usermetadata.init()
    alice = syncio.get_user_metadata("alice").metadata
    shown = subprocess.check_output([sys.executable, "-m", "usermetadata", "get", "alice"])
    assert json.loads(shown) == alice
    assert alice["theme"] == "dark"


def prose_of(page: Path) -> str:
    """Return the text of a page without its blocks and spans of code."""
    text = re.sub(
        r"^(```+).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", lambda code: re.sub(r"[][()]", "", code[0]), text)


def links_of(page: Path) -> list[str]:
    """Return the targets of the links on a page."""
    return re.findall(r"\]\(([^)\s]*)\)", prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors: set[str] = set()
    for title in re.findall(r"^#+ (.+)", prose_of(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = (f"{anchor}-{number}" for number in itertools.count(1))
        anchors.add(
            next(each for each in itertools.chain([anchor], repeated) if each not in anchors)
        )
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_pages_lead_somewhere(page: Path) -> None:
    """Each link to a file or a heading leads to one that exists, as GitHub shows the pages.

    Sphinx checks the same for the pages that it builds, with ``-W``.
    """
    for link in links_of(page):
        if ":" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_other_sites_are_addresses(page: Path) -> None:
    """Each is an address with https, and nothing else: no request is made."""
    for link in links_of(page):
        if ":" in link:
            address = urlsplit(link)
            assert address.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), link
            assert link.isascii(), link


def test_the_pages_have_links() -> None:
    """The tests above find the links, and the headings of their targets."""
    links = [link for page in PAGES for link in links_of(page)]
    assert len([link for link in links if "#" in link and ":" not in link]) > 50
    assert len([link for link in links if ":" in link]) > 30
    assert "with-asyncio" in anchors_of(ROOT / "docs/asyncio-and-threads.md")


def test_pages_that_the_code_names_exist() -> None:
    """Docstrings, messages and comments name no page that is not there."""
    for program in [
        *ROOT.glob("usermetadata/**/*.py"),
        *ROOT.glob("docs/examples/*.py"),
        *ROOT.glob("tests/**/*.py"),
    ]:
        if "node_modules" in program.parts:
            continue
        for path, anchor in re.findall(
            r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?", program.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), f"{program.name}: {path}"
            assert not anchor or anchor in anchors_of(ROOT / path), f"{program.name}: {path}"


def test_the_test_index_names_tests_that_exist() -> None:
    """Each test in the index of the contributors' page exists."""
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/contributing.md").read_text())
    assert len(names) > 30
    for file, name in names:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_the_storage_of_the_guide_is_short() -> None:
    """The example storage has at most 50 lines of code."""
    text = (ROOT / "docs/examples/json_file_storage.py").read_text(encoding="utf-8")
    storage = text[text.index("class JSONFileStorage") :]
    assert len([line for line in storage.splitlines() if line.strip()]) <= 50


def test_typed_callers_need_no_ignores() -> None:
    """The small program that the type checkers check also runs."""
    program = ROOT / "tests" / "typed_caller.py"
    assert "ignore" not in program.read_text(encoding="utf-8")
    subprocess.run([sys.executable, "-W", "error", str(program)], check=True)

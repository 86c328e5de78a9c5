"""Every example in the README, in ``docs/`` and in docstrings does what it says."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import FUNCTIONS
from postgres_server import empty_schema, server_url
from psycopg.conninfo import make_conninfo
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import usermetadata
from usermetadata import syncio

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ["usermetadata"] + [
    module.name
    for module in pkgutil.walk_packages(usermetadata.__path__, "usermetadata.")
    if module.name != "usermetadata.__main__"
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Let examples write where they are, and into a database that is empty."""
    monkeypatch.chdir(tmp_path)
    with empty_schema() as schema:
        url = make_conninfo(server_url(), options=f"-csearch_path={schema}")
        monkeypatch.setenv("DATABASE_URL", url)
        yield
        usermetadata.UserMetadataRecipe.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path) -> None:
    """Run from top to bottom, every Python block works and shows the right results."""
    for example in Document.parse(str(page), PythonCodeBlockParser()).examples():
        example.evaluate()


def test_the_pages_have_examples() -> None:
    """The test above runs what a reader sees."""
    pages = [Document.parse(str(page), PythonCodeBlockParser()) for page in PAGES]
    examples = [len(list(page.examples())) for page in pages]
    assert sum(examples) > 30
    assert examples[0] > 5


class _Await:
    """Stands for ``await`` where there is no coroutine around."""

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
    """A reader of the reference sees every function at work."""
    for name in FUNCTIONS:
        assert ">>>" in getattr(syncio, name).__doc__


def test_the_quickstart_prints_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    """Run again, the visits count on: the metadata was kept in the file."""
    for visits in (1, 2):
        runpy.run_path(str(ROOT / "docs/examples/quickstart.py"))
        usermetadata.UserMetadataRecipe.reset()
        alice = {"theme": "dark", "notifications": {"sms": True}, "visits": visits}
        assert capsys.readouterr().out == f"alice: {alice}\nbob: {{}}\n"


def test_the_readme_shows_it_by_line_40() -> None:
    """A reader with five minutes has seen installing, running and results by then."""
    start = "\n".join(README.read_text(encoding="utf-8").splitlines()[:40])
    assert "pip install . && python docs/examples/quickstart.py" in start
    assert ">>> update_user_metadata(" in start


def test_links_between_pages_lead_somewhere() -> None:
    """No page links to a file that is not there."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_test_index_names_tests_that_exist() -> None:
    """Each promise in the index of the contributors' page leads to a test."""
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/contributing.md").read_text())
    assert len(names) > 30
    for file, name in names:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_the_storage_of_the_guide_is_short() -> None:
    """A third party writes a storage in about 40 lines of code."""
    text = (ROOT / "docs/examples/json_file_storage.py").read_text(encoding="utf-8")
    storage = text[text.index("class JSONFileStorage") :]
    assert len([line for line in storage.splitlines() if line.strip()]) <= 50


def test_typed_callers_need_no_ignores() -> None:
    """The small typed program that the type checkers are run over works, too."""
    program = ROOT / "tests" / "typed_caller.py"
    assert "ignore" not in program.read_text(encoding="utf-8")
    subprocess.run([sys.executable, "-W", "error", str(program)], check=True)

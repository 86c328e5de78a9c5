"""The package: imports, public names, and the distribution's metadata."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import FUNCTIONS

import usermetadata
import usermetadata.asyncio
import usermetadata.syncio

if typing.TYPE_CHECKING:
    from types import ModuleType

PACKAGE = Path(usermetadata.__file__).parent


@pytest.mark.parametrize("module", ["usermetadata", "usermetadata.syncio", "usermetadata.asyncio"])
def test_importing_stays_light(module: str) -> None:
    """Slow imports happen on first use, so scripts and tests start quickly."""
    heavy = {"asyncio", "dataclasses", "inspect", "json", "sqlite3", "sqlite_utils", "click"}
    heavy |= {"msgspec"}
    program = f"import sys, {module}; print(*sys.modules)"
    # -S skips what site-packages import at start-up; the library is found by its path.
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}"]
    before = [sys.executable, "-S", "-c", "import sys; print(*sys.modules)"]
    loaded, bare = (
        set(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
        for line in (command, before)
    )
    assert module in loaded
    assert not (loaded - bare) & heavy


@pytest.mark.parametrize("facade", [usermetadata.asyncio, usermetadata.syncio])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_frameworks_can_evaluate_the_annotations(facade: ModuleType, name: str) -> None:
    """``typing.get_type_hints`` finds every name, so a function may be injected or exposed."""
    function = getattr(facade, name)
    assert typing.get_type_hints(function).keys() == {
        *inspect.signature(function).parameters,
        "return",
    }


def test_every_public_name_is_there() -> None:
    """``from usermetadata import *`` imports all of ``__all__``, also lazily loaded names."""
    for name in usermetadata.__all__:
        assert getattr(usermetadata, name).__doc__
    assert not hasattr(usermetadata, "NoStorage")


def test_all_names_can_be_imported_without_extras() -> None:
    """``from usermetadata import *`` works without psycopg."""
    program = "import sys; sys.modules['psycopg'] = None; from usermetadata import *; SQLiteStorage"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_error_is_ours_and_documented() -> None:
    """One ``except UserMetadataError`` catches every error that the library raises itself."""
    for name in usermetadata.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(usermetadata, name), usermetadata.UserMetadataError)


def test_msgspec_is_imported_with_the_first_object() -> None:
    """``init`` does not wait for its import either; the first call that needs JSON does."""
    program = """
import sys
import usermetadata
from usermetadata.syncio import update_user_metadata
usermetadata.init("sqlite:///:memory:")
assert "msgspec" not in sys.modules
update_user_metadata("alice", {"n": 1})
assert "msgspec" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_extras_that_serve_many_users_include_msgspec() -> None:
    """A server, and an application with PostgreSQL, have fast JSON without asking for it."""
    lines = importlib.metadata.distribution("usermetadata").requires or []
    of_msgspec = [line for line in lines if line.startswith("msgspec")]
    for extra in ("fast", "postgres", "server"):
        assert any(f"extra == '{extra}'" in line for line in of_msgspec)


def test_the_distribution_is_what_it_says() -> None:
    """The base install needs two libraries, and includes type information and the licence."""
    distribution = importlib.metadata.distribution("usermetadata")
    base = [line for line in distribution.requires or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0].split("<")[0] for line in base) == [
        "sqlite-utils",
        "typing-extensions",
    ]
    assert (PACKAGE / "py.typed").exists()
    assert distribution.metadata["License-Expression"] == "Apache-2.0"

"""The structure of the library, as ``docs/design.md`` describes it."""

from __future__ import annotations

import ast
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

# Who may import whom at run time; below stands what knows nothing of what is above.
HOUSE: dict[str, set[str]] = {
    "testing": {"changes", "exceptions", "recipe", "server", "storage.memory"},
    "__main__": {"command_line"},
    "sqlite_utils_plugin": {"command_line", "json", "merge"},
    "command_line": {
        "changes",
        "exceptions",
        "identifiers",
        "json",
        "recipe",
        "server",
        "storage",
        "storage.postgres",
    },
    "server": {
        "coalescing",
        "exceptions",
        "identifiers",
        "json",
        "recipe_implementation",
        "storage",
    },
    "supertokens": {"asyncio"},
    "": {
        "exceptions",
        "merge",
        "recipe",
        "storage",
        "storage.memory",
        "storage.postgres",
        "storage.sqlite",
    },
    "asyncio": {"interfaces", "recipe"},
    "syncio": {"interfaces", "recipe"},
    "recipe": {
        "bridge",
        "coalescing",
        "exceptions",
        "interfaces",
        "recipe_implementation",
        "reentry",
        "storage",
        "storage.memory",
        "storage.postgres",
        "storage.sqlite",
    },
    "recipe_implementation": {
        "changes",
        "exceptions",
        "identifiers",
        "interfaces",
        "json",
        "reentry",
    },
    "coalescing": {"bridge", "exceptions", "forking", "json", "reentry"},
    "bridge": {"reentry"},
    "interfaces": set(),
    "storage": set(),
    "storage.memory": {"exceptions", "forking", "identifiers"},
    "storage.sqlite": {
        "changes",
        "exceptions",
        "identifiers",
        "json",
        "storage.sqlite_connections",
    },
    "storage.sqlite_connections": {
        "exceptions",
        "forking",
        "storage.sqlite_errors",
        "storage.sqlite_sharing",
    },
    "storage.sqlite_sharing": {"exceptions"},
    "storage.sqlite_errors": {"exceptions"},
    "storage.postgres": {
        "changes",
        "exceptions",
        "identifiers",
        "json",
        "storage.postgres_connections",
        "storage.postgres_statements",
    },
    "storage.postgres_connections": {"exceptions", "forking"},
    "storage.postgres_statements": {"exceptions", "identifiers"},
    "changes": {"merge"},
    "merge": set(),
    "identifiers": {"exceptions"},
    "json": {"exceptions"},
    "reentry": {"exceptions"},
    "forking": set(),
    "exceptions": set(),
}


def modules() -> dict[str, Path]:
    """Return every module's name below the package, with its file."""
    found: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Return what a module imports of the package at run time, inside functions too."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found.add(str(node.module))
        todo += ast.iter_child_nodes(node)
    prefix = "usermetadata"
    return {name[len(prefix) + 1 :] for name in found if name.split(".")[0] == prefix}


def test_the_house_has_the_rooms_of_the_design() -> None:
    """Every module stands in the table, and every room of the table is there."""
    assert set(modules()) == set(HOUSE)


@pytest.mark.parametrize("module", HOUSE)
def test_nothing_imports_upwards(module: str) -> None:
    """A module imports what its row of the table says, no less and no more."""
    assert imports(modules()[module]) == HOUSE[module]


def test_the_house_has_no_circles() -> None:
    """Following the imports always comes to an end."""
    left = dict(HOUSE)
    while left:
        ground = [module for module, below in left.items() if not below & set(left)]
        assert ground
        for module in ground:
            del left[module]


def test_no_storage_knows_another() -> None:
    """Each backend can be understood, or deleted, by itself."""
    for module, below in HOUSE.items():
        if module.startswith("storage."):
            backend = module.split("_")[0]
            assert all(other.startswith(backend) for other in below if "storage." in other)


@pytest.mark.parametrize("module", ["usermetadata", "usermetadata.syncio", "usermetadata.asyncio"])
def test_importing_stays_light(module: str) -> None:
    """What is heavy loads on first use, so that scripts and tests start at once."""
    heavy = {"sqlite3", "sqlite_utils", "pytest", "click", "pluggy"}
    if module != "usermetadata.asyncio":
        heavy |= {"asyncio", "inspect", "json", "re", "threading", "typing"}
    program = f"import sys, {module}; print(*sys.modules)"
    # -S leaves out what site-packages load by themselves; the library is found by its path.
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
    """``__all__`` is what ``from usermetadata import *`` gives, lazily loaded names included."""
    for name in usermetadata.__all__:
        assert getattr(usermetadata, name).__doc__
    assert not hasattr(usermetadata, "NoStorage")


def test_all_names_can_be_imported_without_extras() -> None:
    """``from usermetadata import *`` is for whoever has not installed psycopg, too."""
    program = "import sys; sys.modules['psycopg'] = None; from usermetadata import *; SQLiteStorage"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_error_is_ours_and_documented() -> None:
    """One ``except UserMetadataError`` catches all that the library raises itself."""
    for name in usermetadata.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(usermetadata, name), usermetadata.UserMetadataError)


def test_the_distribution_is_what_it_says() -> None:
    """The base install needs two libraries; typing information and licence are inside."""
    distribution = importlib.metadata.distribution("usermetadata")
    base = [line for line in distribution.requires or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0].split("<")[0] for line in base) == [
        "sqlite-utils",
        "typing-extensions",
    ]
    assert (PACKAGE / "py.typed").exists()
    assert distribution.metadata["License-Expression"] == "Apache-2.0"

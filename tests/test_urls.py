"""Storages of other packages, by the scheme of their URLs or by a factory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import usermetadata
from usermetadata import InvalidInputError, UserMetadata, UserMetadataRecipe, syncio
from usermetadata.cli import main

if TYPE_CHECKING:
    from pathlib import Path

MODULE = """
from usermetadata import InMemoryStorage

class Shelf(InMemoryStorage):
    opened = []

def open_url(url):
    Shelf.opened.append(url)
    return Shelf()

def open_default():
    return Shelf()

def open_nothing(url):
    return {}

not_callable = 7
"""
METADATA = "Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n"
ENTRY_POINTS = """
[usermetadata.storages]
Shelf = shelf_storage:open_url
broken = shelf_storage:open_nothing
memory = shelf_storage:open_nothing
"""


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that registers URLs."""
    (tmp_path / "shelf_storage.py").write_text(MODULE)
    info = tmp_path / "shelf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_package")
def test_a_package_registers_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """``init``, the environment variable, ``UserMetadata`` and the command line take its URLs.

    Schemes are compared without case, as in all URLs.
    """
    url = "shelf://host/1?timeout=5"
    usermetadata.init(url)
    assert repr(UserMetadataRecipe.get_instance().storage) == "InMemoryStorage(app_id='public')"
    assert type(UserMetadataRecipe.get_instance().storage).__name__ == "Shelf"
    assert syncio.update_user_metadata("alice", {"n": 1}).metadata == {"n": 1}
    usermetadata.close()
    monkeypatch.setenv("USERMETADATA_URL", url)
    usermetadata.init()
    assert syncio.get_user_metadata("alice").metadata == {}
    assert type(UserMetadata("Shelf://x").storage).__name__ == "Shelf"
    shown = CliRunner().invoke(main, ["update", "alice", '{"n": 2}'], catch_exceptions=False)
    assert json.loads(shown.stdout) == {"n": 2}


@pytest.mark.usefixtures("_package")
def test_a_factory_is_named_by_its_module() -> None:
    """The command line takes ``package.module:factory``."""
    storage = ["--storage", "shelf_storage:open_default"]
    shown = CliRunner().invoke(main, ["update", "alice", '{"n": 2}', *storage])
    assert json.loads(shown.stdout) == {"n": 2}
    shown = CliRunner().invoke(main, ["get", "alice", *storage])
    assert json.loads(shown.stdout) == {}  # it makes a new storage each time


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "mysql://u:secret@host/db",
            "unsupported storage URL: mysql://; known are broken://, memory://, postgresql:",
        ),
        ("broken://x", "dict is not a storage"),
        ("shelf_storage:missing", "shelf_storage:missing: module 'shelf_storage' has no attribute"),
        (
            "missing_module:factory",
            "missing_module:factory: No module named 'missing_module'; pass",
        ),
        ("shelf_storage:not_callable", "shelf_storage:not_callable: int is not a function; pass"),
        ("memory://x", "unsupported storage URL: memory://"),
    ],
)
def test_what_is_not_known_is_refused(url: str, message: str) -> None:
    """The error lists the schemes that are known; those of this library cannot be replaced."""
    with pytest.raises(InvalidInputError, match=f"storage: {message}") as caught:
        UserMetadata(url)
    assert "secret" not in str(caught.value)
